"""BudgetService over a real server: what each role may see, figures that the ledger gives, pages, and whole lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import Connection, MetaData

from src.aggregator.accounts import Accounts
from src.aggregator.budgets import Budgets
from src.aggregator.servicers import budget as budget_servicer
from src.communication.generated import budget_pb2, budget_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.config_budgets import aggregator_limits
from src.config_sections import AggregatorPrivacy
from src.errors import AccessError, BudgetError, InvalidInput, NotFoundError
from src.jobs.states import JobRow
from src.jobs.store import JobStore
from src.privacy.accounting import epsilon
from src.privacy.events import event_from_json
from src.privacy.figures import Against
from src.privacy.ledger import verify_lines
from src.privacy.noise_plan import plan_noise
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.schema import FromMetadata
from tests.protocol.signatures import check_signatures

KEY = SigningKey.from_bytes(b"aggregator".ljust(32, b"-"))
SHARES = plan_noise(noise_by="both", noise_multiplier=4.0, sensitivity=1e4, quorum=3, colluders=1)
SUM = SHARES.event("release", dimension=1)
ALL: tuple[Against, ...] = ("release", "aggregator", "all_others")
PRIVACY = AggregatorPrivacy.model_validate({"budget": {"max_rounds": 9, "epsilon": 50.0}, "per_job": {"max_rounds": 4}})
OLGA, ADA, BOB, PARTY = (
    Identity("operator", "olga"),
    Identity("scientist", "ada"),
    Identity("scientist", "bob"),
    Identity("party", "a"),
)


def fill(connection: Connection, jobs: JobStore, own: Accounts) -> None:
    """Two rounds of a job of ada's, one of bob's, of which one is given back, and a job that was refused."""
    own.open(connection, now=0.0)
    for name, owner in (("ja", ADA), ("jb", BOB)):
        row = JobRow(
            job_id=name,
            request_id=name,
            owner=str(owner),
            display_name="",
            kind="federated_training",
            spec={},
            spec_digest="",
            max_attempts=1,
            created_at="2026-01-01T00:00:00Z",
        )
        jobs.create(connection, row)
    for job, number in (("ja", 1), ("ja", 2), ("jb", 1)):
        own.reserve(connection, job, number, event=SUM, parties=("a", "b") if number == 1 else ("b", "c"), now=1.0)
    own.spend(connection, "ja", 1, now=2.0)
    own.release(connection, "ja", 1, figures={"transcript": "ab"}, now=2.0)
    own.return_(connection, "jb", 1, now=3.0, reason="no quorum")
    own.refuse(connection, "", None, event=SUM, error=BudgetError("no", unit="party"), now=4.0)


class House:
    """A server with nothing but BudgetService, and a ledger behind it."""

    def __init__(self, directory: Path) -> None:
        metadata = MetaData()
        self.jobs, self.store = JobStore(metadata), LedgerStore(metadata, signer=EntrySigner(KEY))
        self.database = Database(directory / "aggregator.sqlite", FromMetadata(metadata))
        self.accounts = Accounts(self.store, PRIVACY, federation="demo")
        self.channels: list[grpc.aio.Channel] = []

    async def start(self) -> None:
        await self.database.open()
        await self.database.run(lambda c: fill(c, self.jobs, self.accounts))
        budgets = Budgets(
            self.database,
            self.store,
            jobs=self.jobs,
            limits=aggregator_limits(PRIVACY, federation="demo"),
            federation="demo",
            max_message_bytes=65_536,
        )
        self.server = GrpcServer(
            listen="127.0.0.1:0", tls=None, insecure=True, federation="demo", roles=budget_servicer.ROLES
        )
        servicer = budget_servicer.BudgetServicer(budgets, verify_key=KEY.verify_key)
        self.server.add(budget_pb2_grpc.add_BudgetServiceServicer_to_server, servicer, budget_servicer.SERVICE)
        self.address = f"127.0.0.1:{await self.server.start()}"

    def stub(self, identity: Identity) -> Any:
        self.channels.append(connect(self.address, tls=None, insecure=True, identity=identity))
        return budget_pb2_grpc.BudgetServiceStub(self.channels[-1])

    async def budget(self, identity: Identity, **fields: Any) -> budget_pb2.GetBudgetResponse:
        answer = await self.stub(identity).GetBudget(budget_pb2.GetBudgetRequest(**fields), timeout=60)
        assert isinstance(answer, budget_pb2.GetBudgetResponse)
        return answer

    async def entries(self, identity: Identity, **fields: Any) -> budget_pb2.ListEntriesResponse:
        answer = await self.stub(identity).ListEntries(budget_pb2.ListEntriesRequest(**fields), timeout=60)
        assert isinstance(answer, budget_pb2.ListEntriesResponse)
        return answer

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close(None)
        await self.server.stop(grace_s=0)
        await self.database.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    await house.start()
    yield house
    await house.close()


def test_every_method_has_its_row_in_the_table_of_roles() -> None:
    (service,) = budget_pb2.DESCRIPTOR.services_by_name.values()
    assert set(budget_servicer.ROLES) == {f"/{service.full_name}/{method.name}" for method in service.methods}


@pytest.mark.parametrize("who", [OLGA, ADA, BOB, PARTY])
async def test_everybody_sees_what_the_federation_has_spent(house: House, who: Identity) -> None:
    answer = await house.budget(who, delta=1e-7)
    (row,) = answer.budgets
    assert (row.unit, row.subject, row.neighbouring_relation) == ("party", "federation:demo", "REPLACE_SPECIAL")
    assert (row.rounds_spent, row.rounds_limit, row.rounds_left, row.periods) == (2, 9, 7, 1)
    assert row.epsilon_spent == row.epsilon_ever == epsilon([SUM, SUM], delta=1e-5)
    assert row.epsilon_left == pytest.approx(50.0 - row.epsilon_spent)
    assert row.epsilon_at_delta == epsilon([SUM, SUM], delta=1e-7)
    assert (row.against, row.assumption) == ("whoever sees the release", SHARES.assumption("release"))
    assert row.assumption_against_aggregator == SHARES.assumption("aggregator")
    aggregator, others = (epsilon([SHARES.event(who, dimension=1, rounds=2)], delta=1e-5) for who in ALL[1:])
    assert row.epsilon_against_aggregator == pytest.approx(aggregator)
    assert row.epsilon_if_all_others_collude == pytest.approx(others)
    assert answer.verify_key == KEY.verify_key
    assert answer.entries == 9
    assert answer.head == (await house.entries(OLGA)).entries[-1].digest == answer.head


async def test_an_operator_sees_every_entry_and_can_verify_the_lines(house: House) -> None:
    answer = await house.entries(OLGA)
    entries = verify_lines([entry.line for entry in answer.entries], known_heads=[answer.head])
    assert check_signatures(entries, verify_keys=[KEY.verify_key]) == 9
    assert [entry.kind for entry in answer.entries] == [
        *["correction"] * 2,
        *["reservation"] * 3,
        *["final", "release", "returned", "refusal"],
    ]
    fifth = answer.entries[4]
    assert (fifth.sequence, fifth.job_id, fifth.round, fifth.charged_rounds) == (5, "jb", 1, 1)
    assert event_from_json(json.loads(fifth.event)) == SUM
    assert fifth.time.ToDatetime().year == 1970
    assert not answer.entries[8].HasField("round")


@pytest.mark.parametrize(
    ("who", "expected"),
    [(ADA, [3, 4, 6, 7]), (BOB, [5, 8]), (PARTY, [1, 3, 4, 5, 6, 7, 8, 9]), (Identity("scientist", "eve"), [])],
)
async def test_others_see_the_entries_that_are_theirs(house: House, who: Identity, expected: list[int]) -> None:
    assert [entry.sequence for entry in (await house.entries(who)).entries] == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ({"job_id": "ja"}, [3, 4, 6, 7]),
        ({"subject": "job:jb"}, [5, 8]),
        ({"subject": "federation:demo", "kind": "correction"}, [1]),
        ({"kind": "final"}, [6]),
        ({"unit": "example"}, []),
    ],
)
async def test_a_list_can_be_narrowed(house: House, question: dict[str, str], expected: list[int]) -> None:
    assert [entry.sequence for entry in (await house.entries(OLGA, **question)).entries] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 8])
async def test_pages_give_every_entry_once_whatever_is_written_meanwhile(house: House, size: int) -> None:
    found: list[int] = []
    token = ""
    while True:
        answer = await house.entries(OLGA, page_size=size, page_token=token)
        assert len(answer.entries) <= size
        found += [entry.sequence for entry in answer.entries]
        token = answer.next_page_token
        if not token or len(found) > 20:
            break
        if len(found) == size:
            await house.database.run(lambda c: house.accounts.reserve(c, "late", 1, event=SUM, now=9.0))
    assert found == list(range(1, 11))


async def test_a_page_fits_into_a_message(house: House) -> None:
    reason = "x" * 490
    for number in range(60):
        error = BudgetError(f"{reason}{number}", unit="party")
        await house.database.run(
            lambda c, number=number, error=error: house.accounts.refuse(  # type: ignore[misc]
                c, "ja", number, event=SUM, error=error, now=9.0
            )
        )
    answer = await house.entries(OLGA, page_size=1000)
    assert answer.next_page_token
    assert len(answer.entries) > 10
    assert answer.ByteSize() < 65_536


REFUSED: list[tuple[str, Identity, str, dict[str, Any], type[Exception]]] = [
    ("a unit that is none", ADA, "budget", {"unit": "user"}, InvalidInput),
    ("a δ that is none", ADA, "budget", {"delta": 1.0}, InvalidInput),
    ("a negative δ", ADA, "budget", {"delta": -0.5}, InvalidInput),
    ("another's job", ADA, "budget", {"subject": "job:jb"}, NotFoundError),
    ("a job that is not there", ADA, "budget", {"subject": "job:none"}, NotFoundError),
    ("another party's account", PARTY, "budget", {"subject": "party:b"}, AccessError),
    ("a party's account", ADA, "budget", {"subject": "party:a"}, AccessError),
    ("a job, for a party", PARTY, "budget", {"subject": "job:ja"}, AccessError),
    ("a page of a negative size", ADA, "entries", {"page_size": -1}, InvalidInput),
    ("entries of no unit", ADA, "entries", {"unit": "all"}, InvalidInput),
    ("a token that is none", ADA, "entries", {"page_token": "?"}, InvalidInput),
    ("a token with other content", ADA, "entries", {"page_token": "WzFd"}, InvalidInput),
]


@pytest.mark.parametrize(
    ("who", "method", "fields", "error"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
async def test_refused_is(
    house: House, who: Identity, method: str, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await getattr(house, method)(who, **fields)


async def test_a_token_is_for_the_same_list_of_the_same_caller(house: House) -> None:
    token = (await house.entries(ADA, page_size=1)).next_page_token
    for who, fields in ((OLGA, {}), (ADA, {"kind": "final"})):
        with pytest.raises(InvalidInput, match="another list"):
            await house.entries(who, page_token=token, **fields)


async def test_a_job_s_quota_is_shown_to_its_owner_and_a_party_s_own_account_to_it(house: House) -> None:
    (row,) = (await house.budget(ADA, subject="job:ja")).budgets
    assert (row.rounds_spent, row.rounds_limit, row.rounds_left) == (2, 4, 2)
    assert not row.HasField("epsilon_limit")
    (row,) = (await house.budget(PARTY, subject="party:a")).budgets
    assert (row.rounds_spent, row.epsilon_spent) == (1, epsilon([SUM], delta=1e-5))
