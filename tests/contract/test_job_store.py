"""Jobs, events, leases and queues: the same on every engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src.errors import ConflictError, InvalidInput, LeaseError, NotFoundError, StateError
from src.jobs.scheduler import Capacity, RunningJob
from src.jobs.states import (
    Event,
    EventKind,
    JobError,
    JobRow,
    JobState,
    Priority,
    after_failure,
    expired_event,
    failed_event,
    round_event,
    succeeded_event,
    utc,
)
from src.jobs.store import JobQuery, JobStore, Lease
from src.storage.database import Database
from src.storage.schema import FromMetadata, Schema

OpenDatabase = Callable[[Schema], Awaitable[Database]]

METADATA = MetaData()
STORE = JobStore(METADATA)
STARTED = Event(kind=EventKind.STARTED)
DIED = JobError("WORKER_FAILED", "a process died", stage="round 1", parties=("a",), log_reference="0001/1")
CAPACITY = Capacity(max_trainings=1, max_computations=1, max_per_scientist=1)


def in_database(test: Callable[[Connection], None]) -> Callable[[OpenDatabase], Awaitable[None]]:
    """A test that is one transaction of an empty database."""

    async def run(open_database: OpenDatabase) -> None:
        database = await open_database(FromMetadata(METADATA))
        await database.run(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def make_row(number: int, **fields: Any) -> JobRow:
    row = JobRow(
        job_id=f"{number:04x}",
        request_id=f"request {number}",
        owner="scientist/s",
        display_name=f"job {number}",
        kind="federated_training",
        spec={"task": "randhie", "rounds": 3, "rate": 0.1, "initial_model_sha256": f"{number:064x}"},
        spec_digest=f"digest {number}",
        max_attempts=3,
        created_at=utc(number),
    )
    return replace(row, **fields)


def started(connection: Connection, number: int, **fields: Any) -> JobRow:
    row = STORE.create(connection, make_row(number, **fields))
    return STORE.apply(connection, row.job_id, STARTED, now=number + 0.5)


def result(*blobs: str) -> Event:
    return succeeded_event({"files": [{"name": "m", "bytes": 1, "sha256": blob} for blob in blobs], "delta": 1e-5})


def found(connection: Connection, **query: Any) -> list[str]:
    return [row.job_id for row in STORE.list_jobs(connection, query=JobQuery(**query)).rows]


# --- jobs and events --------------------------------------------------------------------------------------------------


@in_database
def test_a_stored_job_reads_back_as_it_was_in_every_state(connection: Connection) -> None:
    seen = set()

    def happens(row: JobRow, event: Event) -> JobRow:
        row = STORE.apply(connection, row.job_id, event, now=7.25)
        assert STORE.get(connection, row.job_id) == row
        seen.add(row.state)
        return row

    row = make_row(1, priority=Priority.HIGH, deadline_at=utc(9.0), display_name="größe \U0001f600 'x' %")
    assert STORE.create(connection, row) == row == STORE.get(connection, row.job_id)
    seen.add(row.state)
    row = happens(row, STARTED)
    row = happens(row, after_failure(row, DIED, delays_s=(60.0,), now=2.0))
    row = happens(row, Event(kind=EventKind.RESUMED))
    row = happens(row, round_event({"round": 1, "state": "RELEASED"}))
    row = happens(row, expired_event(row))
    happens(row, failed_event(JobError("DEADLINE_EXCEEDED", "late")))
    done = happens(started(connection, 2), result("ff"))
    happens(done, Event(kind=EventKind.DELETED))
    happens(STORE.create(connection, make_row(3)), Event(kind=EventKind.CANCELLED))
    assert seen == set(JobState)
    with pytest.raises(NotFoundError):
        STORE.get(connection, "none")
    with pytest.raises(NotFoundError):
        STORE.apply(connection, "none", STARTED, now=1.0)


@in_database
def test_the_same_request_gives_the_same_job_and_another_job_under_it_is_refused(connection: Connection) -> None:
    first = STORE.create(connection, make_row(1))
    again = make_row(2, request_id=first.request_id, spec_digest=first.spec_digest)
    assert STORE.create(connection, again) == first == STORE.find_request(connection, first.owner, first.request_id)
    with pytest.raises(ConflictError, match=first.job_id):
        STORE.create(connection, make_row(3, request_id=first.request_id))
    other = make_row(4, request_id=first.request_id, owner="scientist/t")
    assert STORE.create(connection, other) == other
    assert [event.kind for event in STORE.events(connection, first.job_id)] == [EventKind.SUBMITTED]
    assert STORE.count(connection, JobState.PENDING) == 2
    assert STORE.find_request(connection, "scientist/u", first.request_id) is None


@in_database
def test_a_refused_event_leaves_nothing_behind(connection: Connection) -> None:
    row = STORE.create(connection, make_row(1))
    with pytest.raises(StateError):
        STORE.apply(connection, row.job_id, result(), now=2.0)
    assert STORE.get(connection, row.job_id) == row
    assert len(STORE.events(connection, row.job_id)) == 1


@in_database
def test_events_are_read_after_a_number_and_at_most_so_many(connection: Connection) -> None:
    job_id = started(connection, 1).job_id
    for number in range(5):
        STORE.apply(connection, job_id, round_event({"round": number, "state": "RELEASED"}), now=2.0)
    assert [event.sequence for event in STORE.events(connection, job_id, after=3, limit=2)] == [4, 5]
    assert STORE.events(connection, job_id, after=7) == STORE.events(connection, "none") == []
    assert [summary["round"] for summary in STORE.round_summaries(connection, job_id)] == [0, 1, 2, 3, 4]


@in_database
def test_an_event_keeps_when_it_happened_and_who_brought_it_about(connection: Connection) -> None:
    job_id = started(connection, 1).job_id
    cause = "scientist/" + "x" * 400
    event = Event(kind=EventKind.CANCELLING, message="no\0more", cause=cause, detail={"why": "no\0more"})
    STORE.apply(connection, job_id, event, now=3.25)
    submitted, _, cancelling = STORE.events(connection, job_id)
    assert (submitted.cause, submitted.time) == ("scientist/s", utc(1))
    assert (cancelling.kind, cancelling.state) == (EventKind.CANCELLING, JobState.CANCELLING)
    assert (cancelling.time, cancelling.cause, cancelling.message) == (
        utc(3.25),
        cause[:300],
        "no\N{REPLACEMENT CHARACTER}more",
    )
    assert cancelling.detail == event.detail


@in_database
def test_texts_that_some_database_would_not_keep_are_refused(connection: Connection) -> None:
    for fields in ({"display_name": "a\0"}, {"request_id": "\0"}, {"spec": {"task_options": {"x": "\0"}}}):
        with pytest.raises(InvalidInput) as caught:
            STORE.create(connection, make_row(1, **fields))
        assert list(caught.value.violations) == list(fields)
    assert found(connection) == []


# --- leases -----------------------------------------------------------------------------------------------------------


@in_database
def test_a_lease_is_taken_when_it_has_expired_or_is_seized_and_every_one_has_a_larger_token(
    connection: Connection,
) -> None:
    job_id = started(connection, 1).job_id

    def acquire(holder: str, now: float, **options: Any) -> Lease:
        return STORE.acquire(connection, job_id, holder=holder, now=now, lease_s=10.0, **options)

    assert acquire("a", 100.0) == Lease(job_id, "a", 1)
    with pytest.raises(LeaseError, match="another process holds"):
        acquire("b", 109.9)
    assert acquire("a", 105.0).token == 2  # its own, again
    STORE.renew(connection, Lease(job_id, "a", 2), now=110.0, lease_s=10.0)
    with pytest.raises(LeaseError):
        acquire("b", 119.9)
    assert acquire("b", 120.0).token == 3
    assert acquire("c", 120.0, seize=True) == Lease(job_id, "c", 4)


@in_database
def test_only_the_present_lease_writes_and_the_state_says_so_second(connection: Connection) -> None:
    job_id, other = started(connection, 1).job_id, started(connection, 2).job_id
    old = STORE.acquire(connection, job_id, holder="a", now=100.0, lease_s=10.0)
    new = STORE.acquire(connection, job_id, holder="b", now=110.0, lease_s=10.0)
    foreign = STORE.acquire(connection, other, holder="b", now=110.0, lease_s=10.0)
    waiting = Event(kind=EventKind.WAITING)
    ghosts = [old, replace(new, holder="a"), replace(new, token=new.token + 1), replace(new, holder=""), foreign]
    for ghost in ghosts:
        for event in (waiting, STARTED):  # the second would be a StateError
            with pytest.raises(LeaseError):
                STORE.apply(connection, job_id, event, now=111.0, lease=ghost)
        if ghost is not foreign:
            with pytest.raises(LeaseError):
                STORE.check(connection, ghost)
            with pytest.raises(LeaseError):
                STORE.renew(connection, ghost, now=111.0, lease_s=10.0)
    STORE.check(connection, new)
    STORE.apply(connection, job_id, waiting, now=500.0, lease=new)  # late, and nobody took over
    assert len(STORE.events(connection, job_id)) == 3


@in_database
def test_a_job_that_comes_to_rest_has_no_lease_and_only_one_under_way_can_have_one(connection: Connection) -> None:
    job_id = started(connection, 1).job_id
    lease = STORE.acquire(connection, job_id, holder="a", now=100.0, lease_s=10.0)
    STORE.apply(connection, job_id, Event(kind=EventKind.CANCELLING), now=101.0)  # by somebody who does not drive it
    STORE.apply(connection, job_id, Event(kind=EventKind.CANCELLED), now=102.0, lease=lease)
    for refused in (STORE.check, lambda c, each: STORE.renew(c, each, now=103.0, lease_s=1.0)):
        with pytest.raises(LeaseError):
            refused(connection, lease)
    with pytest.raises(LeaseError):
        STORE.apply(connection, job_id, Event(kind=EventKind.DELETED), now=103.0, lease=lease)
    for number in (job_id, STORE.create(connection, make_row(2)).job_id):
        with pytest.raises(StateError):
            STORE.acquire(connection, number, holder="b", now=1e6, lease_s=1.0, seize=True)
    with pytest.raises(NotFoundError):
        STORE.acquire(connection, "none", holder="b", now=1e6, lease_s=1.0)


async def test_what_belongs_to_a_refused_write_is_not_written_either(open_database: OpenDatabase) -> None:
    database = await open_database(FromMetadata(METADATA))

    def set_up(connection: Connection) -> tuple[Lease, Lease]:
        job_id = started(connection, 1).job_id
        old = STORE.acquire(connection, job_id, holder="a", now=100.0, lease_s=1.0)
        return old, STORE.acquire(connection, job_id, holder="b", now=102.0, lease_s=1.0)

    old, new = await database.run(set_up)

    def step(connection: Connection) -> None:
        started(connection, 2)  # whatever belongs to the step
        STORE.apply(connection, old.job_id, Event(kind=EventKind.WAITING), now=103.0, lease=old)

    with pytest.raises(LeaseError):
        await database.run(step)
    assert await database.run(found) == ["0001"]
    await database.run(lambda connection: STORE.check(connection, new))


# --- the queue --------------------------------------------------------------------------------------------------------


@in_database
def test_the_job_whose_turn_it_is_is_started_and_leased_in_one_step(connection: Connection) -> None:
    STORE.create(connection, make_row(1, priority=Priority.LOW, kind="export"))
    STORE.create(connection, make_row(2, priority=Priority.HIGH, kind="export"))
    assert STORE.positions(connection, CAPACITY) == {"0002": 1, "0001": 2}
    taken = STORE.take_next(connection, capacity=CAPACITY, holder="a", now=5.0, lease_s=10.0)
    assert taken is not None
    row, lease = taken
    assert row == STORE.get(connection, "0002")
    assert (row.state, row.attempt, row.started_at) == (JobState.RUNNING, 1, utc(5.0))
    assert lease == Lease("0002", "a", 1)
    STORE.check(connection, lease)
    last = STORE.events(connection, "0002")[-1]
    assert (last.kind, last.cause) == (EventKind.STARTED, "aggregator")
    assert STORE.running(connection) == [RunningJob("scientist/s", "export")]
    assert STORE.positions(connection, CAPACITY) == {"0001": 1}
    assert STORE.take_next(connection, capacity=CAPACITY, holder="a", now=5.0, lease_s=10.0) is None


@in_database
def test_classes_share_the_starts_across_many_transactions_worth_of_passes(connection: Connection) -> None:
    for number in range(30):
        priority = [Priority.HIGH, Priority.NORMAL, Priority.LOW][number % 3]
        STORE.create(connection, make_row(number, priority=priority))
    order = []
    for _ in range(10):
        taken = STORE.take_next(connection, capacity=CAPACITY, holder="a", now=50.0, lease_s=10.0)
        assert taken is not None
        row, lease = taken
        order.append(row.priority)
        STORE.apply(connection, row.job_id, result(), now=51.0, lease=lease)
    assert [order.count(priority) for priority in (Priority.HIGH, Priority.NORMAL, Priority.LOW)] == [6, 3, 1]
    assert STORE.passes(connection) == {"training/HIGH": 6, "training/NORMAL": 6, "training/LOW": 6}


@in_database
def test_a_job_that_is_not_ready_is_passed_over(connection: Connection) -> None:
    for number in (1, 2, 3):
        STORE.create(connection, make_row(number))
    options: dict[str, Any] = {"capacity": CAPACITY, "holder": "a", "now": 5.0, "lease_s": 10.0}
    assert STORE.take_next(connection, ready=lambda _row: False, **options) is None
    assert STORE.passes(connection) == {}
    taken = STORE.take_next(connection, ready=lambda row: row.display_name == "job 2", **options)
    assert taken is not None
    assert taken[0].job_id == "0002"


@in_database
def test_what_is_under_way_takes_a_place_until_it_is_at_rest(connection: Connection) -> None:
    jobs = [started(connection, number) for number in range(4)]
    STORE.apply(connection, "0001", after_failure(jobs[1], DIED, delays_s=(60.0,), now=2.0), now=2.0)
    STORE.apply(connection, "0002", Event(kind=EventKind.CANCELLING), now=3.0)
    STORE.apply(connection, "0003", result(), now=3.0)
    assert [row.job_id for row in STORE.active(connection)] == ["0000", "0001", "0002"]
    assert len(STORE.running(connection)) == 3
    assert {state: STORE.count(connection, state) for state in JobState if STORE.count(connection, state)} == {
        JobState.RUNNING: 1,
        JobState.RETRYING: 1,
        JobState.CANCELLING: 1,
        JobState.SUCCEEDED: 1,
    }
    STORE.create(connection, make_row(9))
    assert [STORE.pending_of(connection, owner) for owner in ("scientist/s", "scientist/t")] == [1, 0]


@in_database
def test_lapsed_are_the_jobs_under_way_that_nobody_drives(connection: Connection) -> None:
    for number in (1, 2, 3, 4):
        started(connection, number)
    STORE.acquire(connection, "0001", holder="a", now=100.0, lease_s=10.0)
    STORE.acquire(connection, "0002", holder="a", now=105.0, lease_s=10.0)
    STORE.apply(connection, "0003", result(), now=100.0)
    assert [row.job_id for row in STORE.lapsed(connection, 109.9)] == ["0004"]
    assert [row.job_id for row in STORE.lapsed(connection, 110.0)] == ["0001", "0004"]


@in_database
def test_overdue_are_the_jobs_that_can_still_expire(connection: Connection) -> None:
    STORE.create(connection, make_row(1, deadline_at=utc(100.0)))
    STORE.create(connection, make_row(2))
    for number in (3, 4, 5, 6):
        started(connection, number, deadline_at=utc(99.0 + number))
    STORE.apply(connection, "0004", Event(kind=EventKind.CANCELLING), now=50.0)
    STORE.apply(connection, "0005", result(), now=50.0)
    assert [row.job_id for row in STORE.overdue(connection, 99.9)] == []
    assert [row.job_id for row in STORE.overdue(connection, 103.0)] == ["0001", "0003"]
    for row in STORE.overdue(connection, 200.0):
        STORE.apply(connection, row.job_id, expired_event(row), now=200.0)
    assert STORE.overdue(connection, 200.0) == []
    assert STORE.get(connection, "0006").state is JobState.CANCELLING


@in_database
def test_the_blobs_that_somebody_may_still_read_are_named_and_no_others(connection: Connection) -> None:
    for number in (1, 2, 3, 4):
        started(connection, number)
    for number, blob in ((1, "source"), (2, "kept"), (3, "gone")):
        STORE.apply(connection, f"{number:04x}", result(blob), now=9.0)
    STORE.apply(connection, "0004", failed_event(DIED), now=9.0)
    STORE.create(connection, make_row(5, kind="export", spec={"job_id": "0001", "format": "npz"}))
    started(connection, 6, kind="evaluation", spec={"job_id": "", "model_sha256": "model", "task": "randhie"})
    for number in (1, 3):
        STORE.apply(connection, f"{number:04x}", Event(kind=EventKind.DELETED), now=10.0)
    STORE.create(connection, make_row(7))
    assert STORE.blobs(connection) == {"source", "kept", "model", f"{7:064x}"}
    under_way = [job_id for (job_id,) in connection.execute(STORE.under_way().order_by(STORE.jobs.c.job_id))]
    assert under_way == ["0005", "0006", "0007"]
    assert STORE.blobs_of(connection, "0003") == {"gone", f"{3:064x}"}  # it is deleted, and what it named is known
    assert STORE.blobs_of(connection, "0005") == {"source"}
    assert STORE.blobs_of(connection, "0006") == {"model"}
    STORE.apply(connection, "0005", Event(kind=EventKind.CANCELLED), now=11.0)
    assert STORE.blobs(connection) == {"kept", "model", f"{7:064x}"}
