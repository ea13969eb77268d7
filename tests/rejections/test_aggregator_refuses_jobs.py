"""Jobs that a real aggregator, over mutual TLS, does not take: of whatever kind, nobody's or another's than they say.

Each row is one order that does not fit, and what is said of it. After every one there is not one job and not one file
more.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from src.client import AsyncSottoClient
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.messages import signed_from_proto, signed_to_proto
from src.communication.tls import TlsFiles
from src.errors import InvalidInput, PolicyError, SignatureError, SottoError
from src.jobs.orders import order_of
from src.learning.flatten import to_safetensors
from src.protocol.order import ORDER_KIND, Order, open_order, order_time, sign_order
from src.protocol.signing import Signed, SigningKey
from tests.rejections.scripted import House

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST: Final = "request-1"


@dataclass(frozen=True)
class Desk:
    """What a caller has: the house's kits."""

    house: House

    def key(self, name: str) -> SigningKey:
        return SigningKey.load(self.house.kits / name / "signing.key")

    def training(self, **fields: Any) -> jobs_pb2.Job:
        model = to_safetensors({"w": self.house.initial})
        return jobs_pb2.Job(
            federated_training=jobs_pb2.FederatedTraining(**{"task": "scripted", "initial_model": model, **fields})
        )

    def order(self, job: jobs_pb2.Job | None = None, **changes: Any) -> Order:
        """The right one, with fields changed before it is signed."""
        order = order_of(
            job or self.training(),
            federation="demo",
            scientist="scientist",
            request_id=REQUEST,
            expires_at=order_time(time.time() + 60),
        )
        return replace(order, **changes)

    def signed(self, by: str = "scientist", **changes: Any) -> Signed:
        return sign_order(self.order(**changes), self.key(by))


@asynccontextmanager
async def stub(house: House, kit: str = "scientist") -> AsyncIterator[Any]:
    """Of somebody with this kit."""
    tls = house.kits / kit / "tls"
    files = TlsFiles(tls / "cert.pem", tls / "key.pem", tls / "ca.pem")
    async with connect(house.address, tls=files) as channel:
        yield jobs_pb2_grpc.JobServiceStub(channel)


async def create(house: House, job: jobs_pb2.Job, order: Signed | None, *, kit: str = "scientist") -> Any:
    request = jobs_pb2.CreateJobRequest(request_id=REQUEST, job=job)
    if order is not None:
        request.order.CopyFrom(signed_to_proto(order))
    async with stub(house, kit) as service:
        return await service.CreateJob(request)


async def jobs(house: House) -> set[str]:
    async with stub(house, "operator") as service:
        return {job.job_id for job in (await service.ListJobs(jobs_pb2.ListJobsRequest())).jobs}


def with_seed_7(desk: Desk) -> Signed:
    return desk.signed(job=desk.training(seed=7))


def an_export(job_id: str) -> jobs_pb2.Job:
    return jobs_pb2.Job(export=jobs_pb2.Export(job_id=job_id))


def one_bit(desk: Desk) -> Signed:
    signed = desk.signed()
    return replace(signed, statement=signed.statement.replace(b'"most_rounds":12', b'"most_rounds":13'))


def as_a_plan(desk: Desk) -> Signed:
    return desk.key("scientist").sign("plan", desk.order().to_statement(), signer="scientist")


Row = tuple[str, type[SottoError], str, Callable[[Desk], Signed | None]]
REFUSED: Final[list[Row]] = [
    ("nobody's", PolicyError, "no job that nobody signed", lambda d: None),
    ("a stranger's", SignatureError, "does not verify", lambda d: sign_order(d.order(), SigningKey.generate())),
    ("the aggregator's own", SignatureError, "does not verify", lambda d: d.signed("aggregator")),
    ("a party's", SignatureError, "does not verify", lambda d: d.signed("party-a")),
    ("another scientist's, in this one's name", SignatureError, "does not verify", lambda d: d.signed("scientist-eve")),
    ("another scientist's", InvalidInput, "by scientist/eve", lambda d: d.signed("scientist-eve", scientist="eve")),
    ("the operator's", InvalidInput, "by operator/operator", lambda d: d.signed("operator", scientist="operator")),
    ("of a scientist that there is not", SignatureError, "stranger", lambda d: d.signed(scientist="ann")),
    ("signed as something else", SignatureError, "does not verify", as_a_plan),
    ("changed after it was signed", SignatureError, "does not verify", one_bit),
    ("for another federation", InvalidInput, "for federation 'other'", lambda d: d.signed(federation="other")),
    ("of another request", InvalidInput, "order.request_id", lambda d: d.signed(request_id="request-2")),
    ("that has expired", InvalidInput, "it expired at", lambda d: d.signed(expires_at="2026-01-01T00:00:00Z")),
    ("for more rounds than it says", InvalidInput, "for 13 rounds", lambda d: d.signed(most_rounds=13)),
    ("with another seed", InvalidInput, "other than there: seed", with_seed_7),
    ("with another model", InvalidInput, "initial_model_sha256", lambda d: d.signed(model_sha256="0" * 64)),
    ("without the model", InvalidInput, "initial_model_sha256", lambda d: d.signed(model_sha256="")),
    ("for another kind of job", InvalidInput, "kind", lambda d: d.signed(job=an_export("j"))),
]


@pytest.mark.parametrize(
    ("error", "said", "make"), [pytest.param(row[1], row[2], row[3], id=row[0]) for row in REFUSED]
)
async def test_no_job_comes_with_an_order_that_is(
    house: House, error: type[SottoError], said: str, make: Callable[[Desk], Signed | None]
) -> None:
    desk = Desk(house)
    before, files = await jobs(house), house.files()
    with pytest.raises(SottoError, match=said) as caught:
        await create(house, desk.training(), make(desk))
    assert type(caught.value) is error
    assert (await jobs(house), house.files()) == (before, files)


@pytest.mark.parametrize(
    "job",
    [
        jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(job_id="0123456789abcdef")),
        an_export("0123456789abcdef"),
    ],
    ids=["an evaluation", "an export"],
)
async def test_no_other_kind_of_job_is_taken_unsigned_either(house: House, job: jobs_pb2.Job) -> None:
    with pytest.raises(PolicyError, match="no job that nobody signed"):
        await create(house, job, None)
    with pytest.raises(SignatureError):
        await create(house, job, sign_order(Desk(house).order(job), SigningKey.generate()))


async def test_an_operator_orders_with_the_operator_s_key(house: House) -> None:
    desk = Desk(house)
    job = an_export("0123456789abcdef")
    with pytest.raises(SottoError, match="no job '0123456789abcdef'"):  # signed as it should be: only there is none
        await create(house, job, desk.signed("operator", job=job, scientist="operator"), kit="operator")


async def test_a_request_that_is_signed_again_is_the_same_job_and_the_first_order_stays(house: House) -> None:
    """A client that lost the answer signs anew, with another expiry."""
    async with AsyncSottoClient(house.address, tls=house.scientist_tls, signer=house.signer()) as client:
        training = Desk(house).training(parties=("a", "b", "c")).federated_training
        first = await client.submit(training, "again")
        order = await stored(house, first.job_id)
        again = await create_as(house, training, "again", valid_s=7200.0)
        assert again == first.job_id
        assert await stored(house, first.job_id) == order
        await client.cancel(first.job_id)
        await client.wait(first.job_id, timeout_s=30)


async def test_every_round_names_the_order_and_brings_it_also_to_who_is_only_asked_to_open(house: House) -> None:
    async with house.job(rounds=2) as (job_id, parties):
        for _ in range(2):
            parts = {name: await parties[name].contribute() for name in "abc"}
            for name, part in parts.items():
                await parties[name].deliver(part)
            for name in "ab":
                await parties[name].open()
            await parties["c"].send_share(await parties["c"].look(await parties["c"].wanted("open")), b"of no form")
            assignment = await parties["d"].wanted("open")
            orders = {part.plan.order for part in parts.values()}
            signed = signed_from_proto(assignment.open.order)
            order, digest = open_order(signed, house.app.federation.roster)
            assert orders == {digest}
            assert signed.statement.decode() == await stored(house, job_id)
            assert (order.scientist, order.most_rounds) == ("scientist", 2)
            await parties["d"].send_share(await parties["d"].look(assignment))
        assert (await house.client.wait(job_id, timeout_s=30)).state == jobs_pb2.SUCCEEDED


async def create_as(house: House, training: jobs_pb2.FederatedTraining, request_id: str, *, valid_s: float) -> str:
    job = jobs_pb2.Job(federated_training=training)
    order = house.signer().sign(job, request_id, now=time.time() + valid_s)
    async with stub(house) as service:
        operation = await service.CreateJob(jobs_pb2.CreateJobRequest(request_id=request_id, job=job, order=order))
    assert open_order(signed_from_proto(order), house.app.federation.roster)[0].request_id == request_id
    return str(operation.name.removeprefix("operations/"))


async def stored(house: House, job_id: str) -> str:
    """The order in the job's row: what its rounds name."""
    row = await house.app._database.run(lambda c: house.app._service._store.get(c, job_id))
    statement = Signed.from_text(row.signed_order).statement.decode()
    assert f'"kind":"{ORDER_KIND}"' in statement
    return statement
