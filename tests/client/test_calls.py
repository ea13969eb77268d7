"""What the client sends, and how it goes on when the aggregator goes away."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from src import client as client_module
from src.client import EvaluationSpec, Export, ExportSpec, FederatedTrainingSpec, SottoClient, result_of
from src.client_patience import FIRST_PAUSE_S, NOTICED_S, Patience
from src.client_signing import CLOCKS_S, ORDER_VALID_S, JobSigner
from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.communication.messages import signed_from_proto
from src.errors import (
    CATALOGUE,
    PASSING,
    AbandonedError,
    ConfigError,
    InvalidInput,
    JobFailed,
    KeyMaterialError,
    NotFoundError,
    StateError,
    StorageError,
    UnavailableError,
)
from src.jobs.orders import check_order
from src.jobs.specs import spec_from_proto
from src.protocol.order import open_order, order_time
from src.protocol.roster import Roster, Scientist
from src.protocol.signing import SigningKey
from tests.conftest import ROOT

ANN = Identity("scientist", "ann")


def roster_of(key: SigningKey) -> Roster:
    """In which ann may order jobs."""
    return Roster(
        federation="demo",
        key_id="",
        custody="threshold",
        threshold=2,
        colluders=0,
        aggregator_verify_key=bytes(32),
        members=(),
        created_at="",
        scientists=(Scientist("ann", key.verify_key),),
    )


JOB_ID = "0123456789abcdef"


# --- an aggregator that goes away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_broken_watch_goes_on_and_every_event_comes_once(house: Any, code: grpc.StatusCode) -> None:
    house.service.breaks, house.service.break_after, house.service.code = 3, 2, code
    events = [event.sequence async for event in house.client().watch(JOB_ID)]
    assert events == [1, 2, 3, 4, 5, 6, 7]
    assert [request.after_sequence for request in house.service.asked] == [0, 2, 3, 4]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_submission_that_got_lost_is_sent_again_under_the_same_request_id(
    house: Any, code: grpc.StatusCode
) -> None:
    """A server that stops cancels the calls it still has."""
    house.service.breaks, house.service.code = 2, code
    job = await house.client().submit(FederatedTrainingSpec.from_json({"task": "t"}))
    assert job.job_id == JOB_ID
    *asked, _ = house.service.asked
    assert len(asked) == 3
    assert len({request.request_id for request in asked}) == 1
    assert asked[0].job.federated_training.task == "t"


async def test_what_is_submitted_is_signed_by_whoever_has_a_key_and_sent_again_as_it_was(house: Any) -> None:
    key = SigningKey.from_bytes(bytes(32))
    house.service.breaks = 2
    client = house.client(signer=JobSigner("demo", "ann", key))
    before = time.time()
    await client.submit(jobs_pb2.FederatedTraining(task="t", initial_model=b"model"), "r")
    asked = [each for each in house.service.asked if isinstance(each, jobs_pb2.CreateJobRequest)]
    assert len(asked) == 3
    assert len({each.SerializeToString(deterministic=True) for each in asked}) == 1
    order, _ = open_order(signed_from_proto(asked[0].order), roster_of(key))
    spec = spec_from_proto(asked[0].job)
    check_order(order, spec=spec, caller=ANN, request_id="r", now=before + ORDER_VALID_S - 1)
    with pytest.raises(InvalidInput, match="expired"):
        check_order(order, spec=spec, caller=ANN, request_id="r", now=time.time() + ORDER_VALID_S)


async def test_an_order_ends_with_the_job_s_time(house: Any, tmp_path: Path) -> None:
    SigningKey.from_bytes(bytes(32)).save(tmp_path / "signing.key")
    client, before = house.client(signer=JobSigner("demo", "ann", tmp_path / "signing.key")), time.time()
    await client.submit(ExportSpec(job_id="j"), timeout_s=100.0)
    statement = json.loads(house.service.asked[0].order.statement)
    earliest, latest = (order_time(when + 100.0 + CLOCKS_S) for when in (before, time.time()))
    assert earliest <= statement["expires_at"] <= latest
    lost = house.client(signer=JobSigner("demo", "ann", tmp_path / "none.key"))
    with pytest.raises(KeyMaterialError, match="cannot read the signing key"):
        await lost.submit(ExportSpec(job_id="j"))


async def test_two_submissions_are_two_requests(house: Any) -> None:
    for _ in range(2):
        await house.client().submit(jobs_pb2.FederatedTraining(task="t"))
    asked = [request for request in house.service.asked if isinstance(request, jobs_pb2.CreateJobRequest)]
    assert len({request.request_id for request in asked}) == 2


async def test_a_watch_that_ends_before_the_job_goes_on(house: Any) -> None:
    """As a server that stops may end it: without an error."""
    house.service.ends_early = True
    events = [event.sequence async for event in house.client().watch(JOB_ID)]
    assert events == [1, 2, 3, 4, 5, 6, 7]
    assert len(house.service.asked) == 6  # each later one begins with the event that was the last


async def test_a_watch_outlives_a_restart_of_the_server(house: Any) -> None:
    events = house.client().watch(JOB_ID)
    seen = [await anext(events)]
    await house.server.stop(0)
    await house.start()
    seen += [event async for event in events]
    assert [event.sequence for event in seen] == [1, 2, 3, 4, 5, 6, 7]


PASSES: Final = {"UNAVAILABLE", "CANCELLED", "TOO_MANY_CALLS", "STORAGE_FULL", "LEASE_LOST"}


async def test_what_may_pass_is_asked_again_and_nothing_else(house: Any) -> None:
    """Every error of the catalogue: what is refused or broken is said at once, not after a minute."""
    client, again = house.client(), set()
    for cls, row in CATALOGUE.items():
        house.service.asked.clear()
        house.service.errors = [cls("no")]
        answer: Any = (await asyncio.gather(client.get(JOB_ID), return_exceptions=True))[0]
        if isinstance(answer, BaseException):
            assert type(answer) is cls
            assert len(house.service.asked) == 1
        else:
            assert len(house.service.asked) == 2
            again.add(row.reason)
    assert again == PASSES == {CATALOGUE[cls].reason for cls in PASSING}


def test_the_client_in_javascript_repeats_the_same() -> None:
    source = (ROOT / "examples" / "clients" / "node" / "wire.mjs").read_text()
    (listed,) = re.findall(r"PASSING = new Set\(\[(.*)\]\)", source)
    assert set(re.findall(r'"([A-Z_]+)"', listed)) == PASSES


async def test_silence_is_no_absence_and_absence_is_bounded() -> None:
    """What failed after it was connected for long is tried again; what never connects is given up in time."""
    now = 0.0
    patience = Patience(10.0, clock=lambda: now)
    gone = UnavailableError("gone")
    now = 3600.0
    await patience.pause(gone)
    now += NOTICED_S + 1
    await patience.pause(gone)
    now += 10 - FIRST_PAUSE_S
    with pytest.raises(UnavailableError):
        await patience.pause(gone)
    patience.reset()
    await patience.pause(gone)


async def test_patience_ends(house: Any) -> None:
    house.service.breaks, house.service.break_after = 10**6, 0
    client = house.client(retry_for_s=0.15)
    for attempt in (client.get(JOB_ID), anext(client.watch(JOB_ID)), client.submit(jobs_pb2.FederatedTraining())):
        with pytest.raises(UnavailableError):
            await attempt


# --- what is sent -----------------------------------------------------------------------------------------------------


def answer(**fields: Any) -> operations_pb2.Operation:
    operation = operations_pb2.Operation(name=f"operations/{JOB_ID}")
    operation.metadata.Pack(jobs_pb2.OperationMetadata(job_id=JOB_ID, **fields))
    return operation


async def test_a_submission_is_one_call_and_gives_what_was_sent_and_answered(house: Any) -> None:
    house.service.operation = answer(
        state=jobs_pb2.PENDING,
        progress=jobs_pb2.JobProgress(queue_position=3),
        create_time=Timestamp(seconds=5),
        attempt=1,
        max_attempts=4,
        kind="evaluation",
        priority=jobs_pb2.HIGH,
    )
    sent = jobs_pb2.Job(display_name="mine", evaluation=jobs_pb2.Evaluation(model=b"model", task="t"))
    job = await house.client().submit(sent, "once", priority="High", timeout_s=1.5, inline_wait_s=2)
    (request,) = house.service.asked
    assert (request.request_id, request.inline_wait_s, request.job.evaluation.model) == ("once", 2, b"model")
    assert (request.job.priority, request.job.timeout.ToNanoseconds()) == (jobs_pb2.HIGH, 1_500_000_000)
    assert (job.job_id, job.display_name, job.create_time.seconds) == (JOB_ID, "mine", 5)
    assert (job.state, job.progress.queue_position, job.max_attempts) == (jobs_pb2.PENDING, 3, 4)
    assert (job.evaluation.task, job.evaluation.model, job.kind) == ("t", b"", "evaluation")
    assert sent == jobs_pb2.Job(display_name="mine", evaluation=jobs_pb2.Evaluation(model=b"model", task="t"))


async def test_a_job_that_is_done_when_the_answer_comes_is_whole(house: Any) -> None:
    house.service.operation = answer(state=jobs_pb2.SUCCEEDED)
    house.service.operation.done = True
    house.service.files = {"model.npz": b"npz"}
    job = await house.client().submit(Export(job_id="j"), inline_wait_s=9)
    assert [file.name for file in job.result.files] == ["model.npz"]


JOBS: dict[str, tuple[Any, jobs_pb2.Job]] = {
    "a specification of a training": (
        FederatedTrainingSpec.from_json({"task": "t", "rounds": 7}),
        jobs_pb2.Job(federated_training=jobs_pb2.FederatedTraining(task="t", rounds=7)),
    ),
    "a specification of an evaluation": (
        EvaluationSpec.from_json({"job_id": "j"}),
        jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(job_id="j")),
    ),
    "a specification of an export": (
        ExportSpec.from_json({"job_id": "j"}),
        jobs_pb2.Job(export=jobs_pb2.Export(job_id="j", format="npz")),
    ),
    "an evaluation": (jobs_pb2.Evaluation(task="t"), jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(task="t"))),
    "an export": (Export(job_id="j"), jobs_pb2.Job(export=Export(job_id="j"))),
}


@pytest.mark.parametrize(("job", "sent"), JOBS.values(), ids=JOBS)
async def test_whatever_describes_a_job_can_be_submitted(house: Any, job: Any, sent: jobs_pb2.Job) -> None:
    house.service.operation = answer()
    await house.client().submit(job)
    (request,) = house.service.asked
    kind = sent.WhichOneof("spec")
    assert request.job.WhichOneof("spec") == kind
    got = getattr(request.job, str(kind))
    for field, value in getattr(sent, str(kind)).ListFields():
        assert getattr(got, field.name) == value


BAD_TERMS: dict[str, tuple[dict[str, Any], str]] = {
    "no such priority": ({"priority": "urgent"}, "priority"),
    "no priority": ({"priority": ""}, "priority"),
    "no time": ({"timeout_s": 0}, "timeout"),
    "time that has passed": ({"timeout_s": -1.0}, "timeout"),
    "no number": ({"timeout_s": float("nan")}, "timeout"),
    "for ever": ({"timeout_s": float("inf")}, "timeout"),
    "more than the wire can say": ({"timeout_s": 1e13}, "timeout"),
}


@pytest.mark.parametrize(("terms", "field"), BAD_TERMS.values(), ids=BAD_TERMS)
async def test_terms_that_are_none_are_refused_before_anything_is_sent(
    house: Any, terms: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await house.client().submit(jobs_pb2.FederatedTraining(task="t"), **terms)
    assert set(caught.value.violations) == {field}
    assert not house.service.asked


async def test_a_listing_goes_from_page_to_page_until_it_has_enough(house: Any) -> None:
    client = house.client()
    jobs = await client.list("state = RUNNING", "priority desc", page_size=2, show_deleted=True)
    assert [job.job_id for job in jobs] == ["0", "1", "2", "3", "4"]
    asked = house.service.asked
    assert [request.page_token for request in asked] == ["", "2", "4"]
    assert {(each.filter, each.order_by, each.page_size, each.show_deleted) for each in asked} == {
        ("state = RUNNING", "priority desc", 2, True)
    }
    assert [job.job_id for job in await client.list(limit=3)] == ["0", "1", "2"]
    assert len(asked) == 5


async def test_a_history_comes_page_by_page(house: Any) -> None:
    client = house.client()
    assert [event.sequence for event in await client.events(JOB_ID)] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.sequence for event in await client.events(JOB_ID, 5)] == [6, 7]
    assert [request.after_sequence for request in house.service.asked] == [0, 3, 6, 5]


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_what_a_job_brought_depends_on_its_state() -> None:
    error = jobs_pb2.JobError(reason="ROUND_FAILED", message="nobody answered", stage="round 2", parties=["a", "b"])
    error.log_reference = "incident 7"
    failed = jobs_pb2.Job(job_id="x", state=jobs_pb2.FAILED, error=error)
    with pytest.raises(JobFailed, match=r"failed in round 2: nobody answered \[ROUND_FAILED\]") as caught:
        result_of(failed)
    assert (caught.value.metadata["parties"], caught.value.metadata["log_reference"]) == ("a, b", "incident 7")
    with pytest.raises(AbandonedError):
        result_of(jobs_pb2.Job(state=jobs_pb2.CANCELLED))
    for state in (jobs_pb2.PENDING, jobs_pb2.RUNNING, jobs_pb2.RETRYING, jobs_pb2.CANCELLING):
        with pytest.raises(StateError):
            result_of(jobs_pb2.Job(state=state))


def test_every_exported_name_is_there() -> None:
    assert [name for name in client_module.__all__ if not hasattr(client_module, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = client_module.Nothing


def test_a_closed_client_says_so() -> None:
    client = SottoClient("127.0.0.1:1", insecure=True, identity=ANN)
    client.close()
    client.close()
    with pytest.raises(StateError, match="closed"):
        client.get("x")
    with pytest.raises(StateError, match="closed"):
        next(client.watch("x"))


@pytest.mark.parametrize("wait", [lambda client: list(client.watch("x")), lambda client: client.get("x")])
def test_closing_ends_what_waits_in_another_thread(wait: Callable[[SottoClient], Any]) -> None:
    """Nobody listens at port 1, so that both would wait for as long as their patience lasts."""
    client = SottoClient("127.0.0.1:1", insecure=True, identity=ANN, retry_for_s=10**6)
    errors: list[BaseException] = []
    begun = threading.Event()

    def scientist() -> None:
        begun.set()
        try:
            wait(client)
        except StateError as error:
            errors.append(error)

    thread = threading.Thread(target=scientist)
    thread.start()
    begun.wait()
    client.close()
    thread.join(30)
    assert [str(error) for error in errors] == ["this client is closed"]


def test_a_client_that_cannot_be_made_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="loopback"):
        SottoClient("example.org:1", insecure=True)
    assert set(threading.enumerate()) <= before  # those of others may end meanwhile


async def test_in_a_notebook_it_works_and_closes(house: Any) -> None:
    """A cell runs in a thread whose event loop runs already; the service is served by another one."""

    def cell() -> list[str]:
        async def run() -> list[str]:
            found = []
            for _ in range(2):
                with SottoClient(house.address, insecure=True, identity=ANN) as client:
                    found.append(client.get("x").job_id)
                    assert len(list(client.watch("x"))) == 7
                client.close()
            return found

        return asyncio.run(run())

    assert await asyncio.to_thread(cell) == ["x", "x"]


async def test_a_client_that_cannot_be_made_says_so_in_a_notebook_too() -> None:
    with pytest.raises(ConfigError, match="loopback"):
        SottoClient("example.org:1", insecure=True)


@pytest.mark.parametrize("kind", ["federated_training", "evaluation"])
async def test_a_model_that_is_too_large_for_a_message_is_uploaded_and_named_in_what_is_signed(
    house: Any, kind: str
) -> None:
    """And sent again where the aggregator has forgotten it in between; what the caller holds is not changed."""
    model = bytes(5 << 20)
    digest = hashlib.sha256(model).digest()
    if kind == "federated_training":
        job = jobs_pb2.Job(federated_training=jobs_pb2.FederatedTraining(task="t", initial_model=model))
    else:
        job = jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(task="t", model=model))
    house.service.errors = [NotFoundError("not here", sha256=digest.hex())]
    key = SigningKey.from_bytes(bytes(32))
    await house.client(signer=JobSigner("demo", "ann", key)).submit(job, "r")
    first, refused, again, taken = house.service.asked[:4]
    assert (first, again) == (model, model)
    assert refused == taken
    assert taken.ByteSize() < 10_000
    spec = spec_from_proto(taken.job)
    assert digest.hex() in (spec.to_json().get("initial_model_sha256"), spec.to_json().get("model_sha256"))
    order, _ = open_order(signed_from_proto(taken.order), roster_of(key))
    check_order(order, spec=spec, caller=ANN, request_id="r", now=time.time())
    assert job.ByteSize() > len(model)


async def test_a_small_model_travels_in_the_job(house: Any) -> None:
    await house.client().submit(jobs_pb2.FederatedTraining(task="t", initial_model=b"small"))
    assert house.service.asked[0].job.federated_training.initial_model == b"small"


async def test_a_model_is_uploaded_from_a_file_by_either_client(house: Any, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    assert await house.client().upload_model(tmp_path / "model") == digest

    def blocking() -> str:
        with SottoClient(house.address, insecure=True, identity=ANN) as client:
            return client.upload_model(b"model")

    assert await asyncio.to_thread(blocking) == digest
    with pytest.raises(StorageError, match="cannot be read"):
        await house.client().upload_model(tmp_path / "none")
