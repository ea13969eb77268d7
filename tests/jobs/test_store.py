"""Laws of jobs, events, leases and pages in the database. That every engine obeys is in tests/contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, MetaData, create_engine, event

from src.errors import LeaseError, StateError
from src.jobs.scheduler import Capacity
from src.jobs.states import Event, EventKind, JobError, JobRow, JobState, Priority, replay, seconds, utc
from src.jobs.store import JobQuery, JobStore, Lease
from src.jobs.tables import dump

METADATA = MetaData()
STORE = JobStore(METADATA)


@contextmanager
def database() -> Iterator[Connection]:
    """A new database in memory."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        METADATA.create_all(connection)
        yield connection
    engine.dispose()


def make_row(number: int, **fields: Any) -> JobRow:
    row = JobRow(
        job_id=f"{number:04x}",
        request_id=f"request {number}",
        owner="scientist/s",
        display_name=f"job {number}",
        kind="federated_training",
        spec={"task": "randhie"},
        spec_digest=f"digest {number}",
        max_attempts=3,
        created_at=utc(number),
    )
    return replace(row, **fields)


EVENTS = st.one_of(
    st.sampled_from([kind for kind in EventKind if kind not in (EventKind.RETRYING, EventKind.EXPIRED)]).map(
        lambda kind: Event(kind=kind, message="m", cause="c")
    ),
    st.sampled_from(["RELEASED", "FAILED", "CANCELLED"]).map(
        lambda state: Event(kind=EventKind.ROUND, detail={"round": 1, "state": state})
    ),
    st.just(Event(kind=EventKind.EXPIRED, detail=JobError("DEADLINE_EXCEEDED", "late").to_json())),
    st.just(
        Event(
            kind=EventKind.RETRYING,
            detail={"error": JobError("UNAVAILABLE", "away").to_json(), "attempt": 1, "retry_at": utc(9.0)},
        )
    ),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), EVENTS), max_size=40))
def test_each_jobs_events_count_from_one_without_gaps_and_replay_to_its_row(
    happenings: list[tuple[int, Event]],
) -> None:
    with database() as connection:
        for number in range(3):
            STORE.create(connection, make_row(number))
        for now, (number, happening) in enumerate(happenings, 10):
            before = STORE.get(connection, f"{number:04x}")
            try:
                STORE.apply(connection, before.job_id, happening, now=now)
            except StateError:
                assert STORE.get(connection, before.job_id) == before
        for number in range(3):
            row = make_row(number)
            events = STORE.events(connection, row.job_id)
            assert [each.sequence for each in events] == list(range(1, len(events) + 1))
            history = [
                (Event(kind=each.kind, message=each.message, cause=each.cause, detail=each.detail), seconds(each.time))
                for each in events[1:]
            ]
            assert replay(row, history) == STORE.get(connection, row.job_id)
            assert [each.state for each in events[1:]] == [
                replay(row, history[:count]).state for count in range(1, len(events))
            ]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["acquire", "seize", "renew", "write"]), st.floats(0, 30)),
        max_size=30,
    )
)
def test_of_all_who_ever_held_a_job_only_the_newest_token_writes(steps: list[tuple[str, str, float]]) -> None:
    lease_s, now = 20.0, 1000.0
    with database() as connection:
        job_id = STORE.create(connection, make_row(1)).job_id
        STORE.apply(connection, job_id, Event(kind=EventKind.STARTED), now=now)
        held: dict[str, Lease] = {}
        newest, expires_at = None, 0.0
        for holder, step, passed_s in steps:
            now += passed_s
            if step in ("acquire", "seize"):
                seize = step == "seize"
                free = newest is None or newest.holder == holder or expires_at <= seconds(utc(now))
                if not (free or seize):
                    with pytest.raises(LeaseError):
                        STORE.acquire(connection, job_id, holder=holder, now=now, lease_s=lease_s)
                    continue
                lease = STORE.acquire(connection, job_id, holder=holder, now=now, lease_s=lease_s, seize=seize)
                assert newest is None or lease.token > newest.token
                held[holder] = newest = lease
                expires_at = seconds(utc(now + lease_s))
            elif holder in held:
                try:
                    if step == "renew":
                        STORE.renew(connection, held[holder], now=now, lease_s=lease_s)
                        expires_at = seconds(utc(now + lease_s))
                    else:
                        happening = Event(kind=EventKind.WAITING, cause=str(held[holder].token))
                        STORE.apply(connection, job_id, happening, now=now, lease=held[holder])
                except LeaseError:
                    assert held[holder] != newest
                else:
                    assert held[holder] == newest
        tokens = [int(each.cause) for each in STORE.events(connection, job_id, after=2)]
        assert tokens == sorted(tokens)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_a_specification_reads_back_to_the_last_bit(spec: dict[str, Any]) -> None:
    with database() as connection:
        STORE.create(connection, make_row(1, spec=spec))
        found = STORE.get(connection, "0001").spec
        assert found == spec
        assert dump(found) == dump(spec)  # -0.0 too


def test_what_only_looks_like_a_nul_is_kept() -> None:
    spec = {"path": r"C:\u0000", "more": r"\\u0000"}
    with database() as connection:
        STORE.create(connection, make_row(1, spec=spec))
        assert STORE.get(connection, "0001").spec == spec


COLUMNS = {"create_time": "created_at", "priority": "priority", "owner": "owner", "state": "state"}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(Priority), st.sampled_from("ab"), st.booleans()), max_size=15
    ),
    st.lists(st.tuples(st.sampled_from([*COLUMNS]), st.booleans()), max_size=3, unique_by=lambda each: each[0]),
    st.integers(1, 5),
)
def test_pages_in_any_order_show_every_job_once_as_sorting_would(
    jobs: list[tuple[int, Priority, str, bool]], order: list[tuple[str, bool]], size: int
) -> None:
    with database() as connection:
        for number, (at, priority, owner, cancelled) in enumerate(jobs):
            STORE.create(connection, make_row(number, created_at=utc(at), priority=priority, owner=owner))
            if cancelled:
                STORE.apply(connection, f"{number:04x}", Event(kind=EventKind.CANCELLED), now=99.0)
        expected = STORE.active(connection) + [STORE.get(connection, f"{number:04x}") for number in range(len(jobs))]
        effective = order or [("create_time", True)]
        expected.sort(key=lambda row: row.job_id, reverse=effective[-1][1])
        ranks = {"priority": ["LOW", "NORMAL", "HIGH"].index, "state": [*JobState].index}
        for field, descending in reversed(effective):

            def key(row: JobRow, field: str = field) -> Any:
                value = getattr(row, COLUMNS[field])
                return ranks[field](value) if field in ranks else value

            expected.sort(key=key, reverse=descending)
        text = ", ".join(f"{field} desc" if descending else field for field, descending in order)
        seen: list[JobRow] = []
        token = ""
        while True:
            page = STORE.list_jobs(connection, query=JobQuery(order_by=text, page_size=size, page_token=token))
            seen += page.rows
            token = page.next_page_token
            if not token:
                break
            assert len(page.rows) == size
        assert seen == expected


def test_a_page_is_one_query_that_an_index_answers_and_positions_are_three() -> None:
    with database() as connection:
        for number in range(30):
            STORE.create(connection, make_row(number))
        statements: list[tuple[str, Any]] = []
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _c, _cursor, sql, values, *_rest: statements.append((sql, values)),
        )
        token = STORE.list_jobs(connection, query=JobQuery(page_size=10)).next_page_token
        STORE.list_jobs(connection, query=JobQuery(page_size=10, page_token=token))
        STORE.list_jobs(connection, query=JobQuery(page_size=10, owner="scientist/s"))
        assert len(statements) == 3
        plans = [
            " ".join(str(line) for line in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values))
            for sql, values in [*statements]
        ]
        assert ["INDEX jobs_newest" in plan for plan in plans] == [True, True, False]
        assert "SEARCH" in plans[1]
        assert "INDEX jobs_owner" in plans[2]
        assert not any("TEMP B-TREE" in plan for plan in plans)
        statements.clear()
        assert len(STORE.positions(connection, Capacity())) == 30
        assert len(statements) == 3
