"""The federation's budget, and the quota of any one job inside it: at submission, and at each round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, MetaData
from sqlalchemy.pool import StaticPool

from src.aggregator.accounts import Accounts, Planned
from src.config_sections import AggregatorPrivacy
from src.errors import BudgetError, NotFoundError
from src.privacy.events import NoisySum
from src.privacy.ledger import Limit, correct
from src.storage.ledger import LedgerStore

SUM = NoisySum(noise_multiplier=4.0)
AT = "2026-01-01T00:00:00Z"


@pytest.fixture
def connection() -> Iterator[Connection]:
    """One transaction on an empty ledger in memory."""
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    metadata = MetaData()
    LedgerStore(metadata)
    metadata.create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def accounts(**privacy: Any) -> Accounts:
    return Accounts(LedgerStore(MetaData()), AggregatorPrivacy.model_validate(privacy), federation="demo")


def reserve(
    own: Accounts, connection: Connection, *, job: str = "j", number: int = 1, parties: tuple[str, ...] = ("a", "b")
) -> None:
    own.reserve(connection, job, number, event=SUM, parties=parties, now=0.0)


def test_a_job_is_checked_as_a_whole_beside_those_accepted_before(connection: Connection) -> None:
    own = accounts(budget={"max_rounds": 5})
    reserve(own, connection)
    own.check(connection, [Planned(3, SUM), Planned(1, SUM)])
    with pytest.raises(BudgetError, match="asked 5, spent 1, limit 5, left 4"):
        own.check(connection, [Planned(3, SUM), Planned(2, SUM)])


def test_the_quota_of_a_job_is_for_it_alone(connection: Connection) -> None:
    own = accounts(budget={"max_rounds": 9}, per_job={"max_rounds": 2})
    own.check(connection, [Planned(5, SUM), Planned(2, SUM)])
    with pytest.raises(BudgetError, match="round budget at party level of one job does not allow it: asked 3"):
        own.check(connection, [Planned(1, SUM), Planned(3, SUM)])
    for number in (1, 2):
        reserve(own, connection, number=number)
    with pytest.raises(BudgetError, match="of job j does not allow it"):
        reserve(own, connection, number=3)
    reserve(own, connection, job="another")


def test_a_round_goes_its_way_once(connection: Connection) -> None:
    own, store = accounts(budget={"max_rounds": 1}), LedgerStore(MetaData())
    for _ in range(2):
        reserve(own, connection)
        own.spend(connection, "j", 1, now=0.0)
        own.release(connection, "j", 1, figures={"transcript": "ab"}, now=0.0)
    assert [entry.kind for entry in store.entries(connection)] == ["reservation", "final", "release"]
    assert own.head(connection) == store.entries(connection)[-1].digest
    with pytest.raises(BudgetError) as caught:
        reserve(own, connection, number=2)
    own.refuse(connection, "j", 2, event=SUM, error=caught.value, now=0.0)
    own.refuse(connection, "", None, event=SUM, error=caught.value, now=0.0)
    assert [entry.job_id for entry in store.entries(connection)[3:]] == ["j", ""]


def test_nothing_is_spent_that_was_not_reserved(connection: Connection) -> None:
    own = accounts(budget={"max_rounds": 1})
    with pytest.raises(NotFoundError, match="never charged"):
        own.spend(connection, "j", 1, now=0.0)
    reserve(own, connection)
    own.return_(connection, "j", 1, now=0.0, reason="no quorum " * 100)
    reserve(own, connection, number=2)
    with pytest.raises(BudgetError):
        reserve(own, connection, number=3)


def test_the_first_start_enters_the_budget_and_a_later_one_does_not_raise_it(connection: Connection) -> None:
    assert accounts(budget={"max_rounds": 1}).open(connection, now=0.0) == []
    own = accounts(budget={"max_rounds": 200})
    (warning,) = own.open(connection, now=0.0)
    assert "federation:demo" in warning
    with pytest.raises(BudgetError, match="limit 1"):
        own.check(connection, [Planned(2, SUM)])


def test_a_partys_budget_counts_the_rounds_that_invite_it_at_submission_and_at_each_round(
    connection: Connection,
) -> None:
    own = accounts(budget={"max_rounds": 99}, parties={"a": {"max_rounds": 3}}, per_party={"max_rounds": 5})
    assert own.open(connection, now=0.0) == []
    reserve(own, connection, parties=("b", "a"))
    waiting = [Planned(2, SUM, ("b", "c")), Planned(1, SUM, ("a", "c"))]
    own.check(connection, [*waiting, Planned(1, SUM, ("a", "b"))])
    own.check(connection, [*waiting, Planned(9, SUM)])
    with pytest.raises(BudgetError, match="at party level of party a does not allow it: asked 3, spent 1, limit 3"):
        own.check(connection, [*waiting, Planned(2, SUM, ("a", "b"))])
    with pytest.raises(BudgetError, match="of party c does not allow it: asked 6, spent 0, limit 5"):
        own.check(connection, [*waiting, Planned(3, SUM, ("c", "d"))])
    for number in (2, 3):
        reserve(own, connection, number=number)
    with pytest.raises(BudgetError, match="of party a does not allow it"):
        reserve(own, connection, number=4)
    reserve(own, connection, number=4, parties=("b", "c"))
    entries = LedgerStore(MetaData()).entries(connection)
    assert [entry.parties for entry in entries if entry.kind == "reservation"] == [("a", "b")] * 3 + [("b", "c")]


def test_a_party_that_was_set_to_nothing_is_invited_no_more(connection: Connection) -> None:
    """An operator's entry holds though the configuration says nothing about the party."""
    own, store = accounts(), LedgerStore(MetaData())
    own.open(connection, now=0.0)
    nothing = Limit(max_rounds=0, epsilon=None, delta=1e-5)
    entries = store.entries(connection)
    store.add(
        connection,
        correct(entries, at=AT, unit="party", subject="party:a", action="set", limit=nothing, reason="it left"),
    )
    with pytest.raises(BudgetError, match="of party a"):
        own.check(connection, [Planned(5, SUM, ("a", "b"))])
    with pytest.raises(BudgetError, match="of party a"):
        reserve(own, connection)
    reserve(own, connection, parties=("b", "c"))
