"""Jobs and events in the database."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, MetaData, create_engine
from sqlalchemy.pool import StaticPool

from src.errors import ConflictError, InvalidInput, NotFoundError, StateError
from src.jobs.states import Event, EventKind, JobRow, JobState, advance, failed_event, round_event, succeeded_event, utc
from src.jobs.store import MAX_PAGE_SIZE, JobStore

METADATA = MetaData()
STORE = JobStore(METADATA)
STARTED = Event(kind=EventKind.STARTED)


def fresh_engine() -> Engine:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    METADATA.create_all(engine)
    return engine


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = fresh_engine()
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def make_row(number: int, *, owner: str = "scientist/s", created: float | None = None) -> JobRow:
    return JobRow(
        job_id=f"{number:04x}",
        request_id=f"request {number}",
        owner=owner,
        display_name=f"job {number}",
        spec={"rounds": 3, "initial_model_sha256": f"{number:064x}"},
        spec_digest=f"digest {number}",
        created_at=utc(number if created is None else created),
    )


def test_a_stored_job_reads_back_as_it_was_in_every_state(connection: Connection) -> None:
    row = STORE.create(connection, make_row(1))
    assert STORE.get(connection, row.job_id) == row == make_row(1)
    result = {"files": [{"name": "m", "bytes": 3, "sha256": "ab"}], "metrics": {"auc": 0.61}, "epsilon_party": "inf"}
    row = STORE.apply(connection, row.job_id, STARTED, now=2.0)
    row = STORE.apply(connection, row.job_id, succeeded_event(result), now=3.0)
    assert STORE.get(connection, row.job_id) == row
    assert (row.state, row.result, row.started_at, row.ended_at) == (JobState.SUCCEEDED, result, utc(2.0), utc(3.0))
    other = STORE.create(connection, make_row(2))
    other = STORE.apply(connection, other.job_id, failed_event("ROUND_FAILED", "why", parties=["a"]), now=3.0)
    assert STORE.get(connection, other.job_id) == other
    with pytest.raises(NotFoundError):
        STORE.get(connection, "none")


def test_the_same_request_gives_the_same_job_and_another_job_under_it_is_refused(connection: Connection) -> None:
    first = STORE.create(connection, make_row(1))
    again = replace(make_row(2), request_id=first.request_id, spec_digest=first.spec_digest)
    assert STORE.create(connection, again) == first
    with pytest.raises(ConflictError, match=first.job_id):
        STORE.create(connection, replace(make_row(3), request_id=first.request_id))
    assert len(STORE.events(connection, first.job_id)) == 1
    assert STORE.count(connection, JobState.PENDING) == 1


def test_two_owners_may_use_the_same_request_id(connection: Connection) -> None:
    STORE.create(connection, make_row(1))
    other = replace(make_row(2, owner="scientist/t"), request_id="request 1")
    assert STORE.create(connection, other) == other


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*EventKind])), max_size=40))
def test_each_jobs_events_count_from_one_without_gaps_and_replay_to_its_state(
    happenings: list[tuple[int, EventKind]],
) -> None:
    engine = fresh_engine()
    with engine.begin() as connection:
        for number in range(3):
            STORE.create(connection, make_row(number))
        for number, kind in happenings:
            event = round_event({"round": 1, "state": "RELEASED"}) if kind is EventKind.ROUND else Event(kind=kind)
            try:
                STORE.apply(connection, f"{number:04x}", event, now=10.0)
            except StateError:
                continue
        for number in range(3):
            events = STORE.events(connection, f"{number:04x}")
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            row = make_row(number)
            for stored in events[1:]:
                row = advance(row, Event(kind=stored.kind, message=stored.message, detail=stored.detail), 10.0)
                assert row.state is stored.state
            assert STORE.get(connection, row.job_id) == row
    engine.dispose()


def test_a_refused_event_leaves_nothing_behind(connection: Connection) -> None:
    row = STORE.create(connection, make_row(1))
    with pytest.raises(StateError):
        STORE.apply(connection, row.job_id, succeeded_event({}), now=2.0)
    assert STORE.get(connection, row.job_id) == row
    assert len(STORE.events(connection, row.job_id)) == 1


def test_a_row_that_the_table_does_not_lead_to_is_not_written(connection: Connection) -> None:
    row = STORE.create(connection, make_row(1))
    running = STORE.update(connection, advance(row, STARTED, 2.0), EventKind.STARTED, now=2.0, message="go")
    assert STORE.get(connection, row.job_id) == running
    assert STORE.events(connection, row.job_id, after=1)[0].message == "go"
    refusals = [
        (row, EventKind.STARTED),  # back to PENDING
        (replace(running, state=JobState.SUCCEEDED), EventKind.ROUND),  # an event that leads elsewhere
        (replace(running, state=JobState.CANCELLED), EventKind.CANCELLED),
    ]
    for refused, kind in refusals:
        with pytest.raises(StateError):
            STORE.update(connection, refused, kind, now=3.0)
    with pytest.raises(NotFoundError):
        STORE.update(connection, make_row(9), EventKind.STARTED, now=3.0)


def test_events_are_read_after_a_number_and_at_most_so_many(connection: Connection) -> None:
    job_id = STORE.create(connection, make_row(1)).job_id
    STORE.apply(connection, job_id, STARTED, now=1.0)
    for number in range(5):
        STORE.apply(connection, job_id, round_event({"round": number, "state": "RELEASED"}), now=2.0)
    assert [event.sequence for event in STORE.events(connection, job_id, after=3, limit=2)] == [4, 5]
    assert STORE.events(connection, job_id, after=7) == []
    assert [summary["round"] for summary in STORE.round_summaries(connection, job_id)] == [0, 1, 2, 3, 4]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 5))
def test_pages_show_every_job_once_newest_first_while_new_ones_arrive(created: list[int], size: int) -> None:
    engine = fresh_engine()
    with engine.begin() as connection:
        for number, at in enumerate(created):
            STORE.create(connection, make_row(number, created=float(at)))
        seen: list[JobRow] = []
        token, page_number = "", 0
        while True:
            page = STORE.list_jobs(connection, page_size=size, page_token=token)
            seen += page.rows
            token, page_number = page.next_page_token, page_number + 1
            if not token:
                break
            assert len(page.rows) == size
            STORE.create(connection, make_row(100 + page_number))  # newer than every page: on none that follows
        expected = sorted(
            (make_row(number, created=float(at)) for number, at in enumerate(created)),
            key=lambda row: (row.created_at, row.job_id),
            reverse=True,
        )
        assert seen == expected
    engine.dispose()


def test_a_listing_is_by_state_and_owner(connection: Connection) -> None:
    for number in range(4):
        STORE.create(connection, make_row(number, owner=f"scientist/{'st'[number % 2]}"))
    STORE.apply(connection, "0001", STARTED, now=9.0)
    assert [row.job_id for row in STORE.list_jobs(connection, state=JobState.RUNNING).rows] == ["0001"]
    assert [row.job_id for row in STORE.list_jobs(connection, owner="scientist/s").rows] == ["0002", "0000"]
    page = STORE.list_jobs(connection, page_size=1, state=JobState.PENDING)
    assert STORE.list_jobs(connection, page_size=10**6, page_token=page.next_page_token, state=JobState.PENDING).rows
    with pytest.raises(InvalidInput, match="another listing"):
        STORE.list_jobs(connection, page_token=page.next_page_token)


@pytest.mark.parametrize("token", ["?", "AAAA", "bnVsbA", "W10", "WzEsMl0"])
def test_a_token_that_was_not_handed_out_is_refused(connection: Connection, token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        STORE.list_jobs(connection, page_token=token)
    assert list(caught.value.violations) == ["page_token"]


def test_a_negative_page_size_is_refused_and_a_huge_one_cut(connection: Connection) -> None:
    with pytest.raises(InvalidInput) as caught:
        STORE.list_jobs(connection, page_size=-1)
    assert list(caught.value.violations) == ["page_size"]
    assert MAX_PAGE_SIZE == 1000


def test_the_queue_is_in_order_of_arrival(connection: Connection) -> None:
    assert STORE.next_pending(connection) is None
    for number, at in enumerate([5.0, 3.0, 3.0]):
        STORE.create(connection, make_row(number, created=at))
    positions = {row.job_id: STORE.queue_position(connection, row) for row in STORE.list_jobs(connection).rows}
    assert positions == {"0001": 1, "0002": 2, "0000": 3}
    first = STORE.next_pending(connection)
    assert first is not None
    assert first.job_id == "0001"
    running = STORE.apply(connection, "0001", STARTED, now=9.0)
    assert STORE.queue_position(connection, running) == 0
    STORE.apply(connection, "0002", STARTED, now=9.0)
    STORE.apply(connection, "0002", Event(kind=EventKind.CANCELLING), now=9.0)
    assert [row.job_id for row in STORE.active(connection)] == ["0001", "0002"]


def test_the_blobs_of_artifacts_and_of_waiting_jobs_are_named_and_those_of_the_others_not(
    connection: Connection,
) -> None:
    for number in (1, 2, 3):
        STORE.create(connection, make_row(number))
    STORE.apply(connection, "0001", STARTED, now=9.0)
    STORE.apply(connection, "0001", succeeded_event({"files": [{"name": "m", "bytes": 1, "sha256": "ff"}]}), now=9.0)
    STORE.apply(connection, "0002", Event(kind=EventKind.CANCELLED), now=9.0)
    assert STORE.blobs(connection) == {"ff", f"{3:064x}"}
