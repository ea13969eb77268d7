"""Heads of other roles' ledgers: what is remembered of each, and which ledger lacks what is remembered of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, MetaData, create_engine

from src.errors import InvalidInput, LedgerError
from src.privacy.ledger import Entry, Limit, correct
from src.storage.heads import HEADS_KEPT, MOST_NAMED, Head, HeadStore, check_heads

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


def test_a_job_that_tells_often_drives_no_other_out(connection: Connection, store: HeadStore) -> None:
    store.remember(connection, "a", head(0, "quiet"))
    for number in range(1, 2 * HEADS_KEPT):
        store.remember(connection, "a", head(number, f"job-{number % (HEADS_KEPT - 1)}"))
    assert len(store.told(connection, "a")) == HEADS_KEPT
    assert store.told(connection, "a")[0] == head(0, "quiet")


def refused(entries: list[Entry], heads: list[Head]) -> str:
    with pytest.raises(LedgerError) as error:
        check(entries, heads)
    return error.value.message


def named_in(message: str) -> str:
    """What the message would have the operator enter."""
    return message.partition("--reason '")[2].partition("'")[0]


@given(st.permutations(range(5)), st.integers(0, 4), st.integers(0, 4))
def test_a_ledger_put_back_to_any_copy_is_found_in_whatever_order_its_heads_were_told(
    order: list[int], kept: int, goes_on: int
) -> None:
    entries: list[Entry] = []
    for _ in range(5):
        entries = grown(entries)
    told = {f"job-{at}": Head(entries[at].digest, f"job-{at}", 1) for at in order}
    check(entries, list(told.values()))
    message = refused(entries[:kept], list(told.values()))
    assert {entry.digest[:16] for entry in entries[kept:]} == set(named_in(message).split()[1:])
    answered = grown(entries[:kept], reason=named_in(message))
    check(answered, list(told.values()))
    # A job, perhaps one of those whose head was lost, goes on; what was answered for stays so.
    later = grown(answered)
    told.pop(f"job-{goes_on}")
    told[f"job-{goes_on}"] = Head(later[-1].digest, f"job-{goes_on}", 2)
    check(later, list(told.values()))
    assert later[-1].digest in refused(answered, list(told.values()))


def test_more_heads_than_one_reason_can_name_are_answered_for_one_reason_after_the_other() -> None:
    heads = [Head(f"{number:x}".ljust(64, "f"), f"job-{number}", 1) for number in range(1, MOST_NAMED + 3)]
    entries = grown([])
    message = refused(entries, heads)
    assert f"{MOST_NAMED} of {len(heads)}" in message
    entries = grown(entries, reason=named_in(message))
    entries = grown(entries, reason=named_in(refused(entries, heads)))
    check(entries, heads)


@pytest.mark.parametrize(
    "wrong", [("f" * 63, "j"), ("F" * 64, "j"), ("f" * 64, ""), ("f" * 64, "j" * 65), ("f" * 64, "\n")]
)
def test_what_is_no_head_is_refused(wrong: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput):
        Head(*wrong, round=1)
