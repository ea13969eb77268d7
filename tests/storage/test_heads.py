"""Heads of other roles' ledgers: what is remembered of each, and which ledger lacks what is remembered of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, MetaData, create_engine

from src.errors import InvalidInput, LedgerError
from src.privacy.ledger import Entry, Limit, correct
from src.storage.heads import HEADS_KEPT, Head, HeadStore, check_heads

ACCOUNT = ("party", "federation:demo")


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def store(connection: Connection) -> HeadStore:
    metadata = MetaData()
    store = HeadStore(metadata)
    metadata.create_all(connection)
    return store


def head(number: int, job_id: str = "job") -> Head:
    return Head(f"{number:064x}", job_id, number)


def grown(entries: list[Entry], reason: str = "why not") -> list[Entry]:
    """A ledger with one more entry."""
    limit = Limit(max_rounds=len(entries) + 1, epsilon=None, delta=1e-5)
    at, subject = "2026-01-01T00:00:00Z", ACCOUNT[1]
    return [
        *entries,
        correct(entries, at=at, unit="party", subject=subject, action="set", limit=limit, reason=reason),
    ]


def check(entries: list[Entry], heads: list[Head]) -> None:
    check_heads(entries, heads, whose="party a's", told_by="the aggregator", account=ACCOUNT)


def test_of_each_role_the_last_head_that_each_job_told_is_kept_in_the_order_told(
    connection: Connection, store: HeadStore
) -> None:
    for name, told in (("a", head(1, "x")), ("a", head(2, "y")), ("b", head(3, "x")), ("a", head(4, "x"))):
        store.remember(connection, name, told)
    store.remember(connection, "a", head(2, "y"))  # nothing new
    assert store.told(connection, "a") == (head(2, "y"), head(4, "x"))
    assert store.told(connection, "b") == (head(3, "x"),)
    assert store.told(connection, "c") == ()


def test_of_too_many_jobs_the_first_goes(connection: Connection, store: HeadStore) -> None:
    for number in range(HEADS_KEPT + 3):
        store.remember(connection, "a", head(number, f"job-{number}"))
    assert [each.round for each in store.told(connection, "a")] == list(range(3, HEADS_KEPT + 3))


@given(st.permutations(range(5)), st.integers(0, 5))
def test_a_ledger_put_back_to_any_copy_is_found_in_whatever_order_its_heads_were_told(
    order: list[int], kept: int
) -> None:
    entries: list[Entry] = []
    for _ in range(5):
        entries = grown(entries)
    heads = [Head(entries[at].digest, f"job-{at}", 1) for at in order]
    check(entries, heads)
    if kept == 5:
        return
    with pytest.raises(LedgerError) as refused:
        check(entries[:kept], heads)
    lost = [each for each in heads if each.digest in {entry.digest for entry in entries[kept:]}]
    assert lost[-1].digest in refused.value.message  # and who answers for that one has answered for all
    answered = grown(entries[:kept], reason=f"lost: {lost[-1].digest}")
    check(answered, heads)
    later = grown(answered)
    told = [*heads, Head(later[-1].digest, "job-6", 1)]
    check(later, told)
    with pytest.raises(LedgerError, match=later[-1].digest):
        check(answered, told)


@pytest.mark.parametrize(
    "wrong", [("f" * 63, "j"), ("F" * 64, "j"), ("f" * 64, ""), ("f" * 64, "j" * 65), ("f" * 64, "\n")]
)
def test_what_is_no_head_is_refused(wrong: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput):
        Head(*wrong, round=1)
