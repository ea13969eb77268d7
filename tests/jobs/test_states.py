"""The rules of a job."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.communication.generated import jobs_pb2
from src.errors import CATALOGUE, UNEXPECTED, StateError
from src.jobs.states import (
    MENDABLE,
    TRANSITIONS,
    Event,
    EventKind,
    JobError,
    JobRow,
    JobState,
    Priority,
    advance,
    after_failure,
    expired_event,
    failed_event,
    replay,
    round_event,
    seconds,
    succeeded_event,
    utc,
)

PENDING = JobRow(
    job_id="00ff",
    request_id="r",
    owner="scientist/s",
    display_name="",
    kind="federated_training",
    spec={},
    spec_digest="d",
    max_attempts=3,
    created_at=utc(0.0),
    deadline_at=utc(600.0),
)
DIED = JobError("WORKER_FAILED", "a process died", stage="round 3", parties=("a",), log_reference="00ff/3")
RETRYING = {"error": DIED.to_json(), "attempt": 1, "retry_at": utc(70.0)}
EVENTS = st.sampled_from(
    [
        Event(kind=EventKind.SUBMITTED),
        Event(kind=EventKind.STARTED),
        Event(kind=EventKind.WAITING, detail={"waiting_for": ["a"]}),
        round_event({"round": 1, "state": "RELEASED"}),
        round_event({"round": 2, "state": "FAILED", "reason": "too few"}),
        Event(kind=EventKind.RETRYING, detail=RETRYING),
        Event(kind=EventKind.RESUMED),
        expired_event(PENDING),
        succeeded_event({"files": [{"name": "m", "bytes": 1, "sha256": "ff"}], "metrics": {"auc": 0.6}}),
        failed_event(JobError("BUDGET_EXCEEDED", "no budget is left")),
        Event(kind=EventKind.FAILED, message="something"),
        Event(kind=EventKind.CANCELLING),
        Event(kind=EventKind.CANCELLED),
        Event(kind=EventKind.DELETED),
    ]
)
RUNNING = advance(PENDING, Event(kind=EventKind.STARTED), 1.0)


@settings(deadline=None, max_examples=300)
@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_only_the_tables_transitions_are_taken_and_rest_is_final(events: list[Event]) -> None:
    row, history = PENDING, []
    for now, event in enumerate(events, 1):
        wanted = TRANSITIONS.get((row.state, event.kind))
        if wanted is None:
            with pytest.raises(StateError, match=row.state.value):
                advance(row, event, float(now))
            continue
        was_at_rest = row.at_rest
        row = advance(row, event, float(now))
        history.append((event, float(now)))
        assert row.state is wanted
        assert not was_at_rest or event.kind is EventKind.DELETED
        assert bool(row.ended_at) == row.at_rest
        assert (row.result is not None) == (row.state is JobState.SUCCEEDED)
        assert bool(row.retry_at) == (row.state is JobState.RETRYING)
        assert bool(row.deleted_at) == any(each.kind is EventKind.DELETED for each, _ in history)
        assert row.rounds_released + row.rounds_failed == 0 or row.started_at
        assert (row.attempt > 0) == bool(row.started_at)
        if row.state in (JobState.FAILED, JobState.RETRYING):
            assert row.error is not None
        elif row.state is not JobState.CANCELLING:
            assert row.error is None
    assert replay(PENDING, history) == row


def test_the_states_and_priorities_are_the_wires_and_every_state_can_be_reached() -> None:
    assert set(JobState) == set(jobs_pb2.JobState.keys()) - {"JOB_STATE_UNSPECIFIED"}
    assert set(Priority) == set(jobs_pb2.JobPriority.keys()) - {"JOB_PRIORITY_UNSPECIFIED"}
    assert {JobState.PENDING, *TRANSITIONS.values()} == set(JobState)


def test_the_changes_of_state_are_these() -> None:
    changes = {(a.value, b.value) for (a, _), b in TRANSITIONS.items() if a is not b}
    assert changes == {
        ("PENDING", "RUNNING"),
        ("PENDING", "FAILED"),
        ("PENDING", "CANCELLED"),
        ("RUNNING", "RETRYING"),
        ("RUNNING", "SUCCEEDED"),
        ("RUNNING", "FAILED"),
        ("RUNNING", "CANCELLING"),
        ("RETRYING", "RUNNING"),
        ("RETRYING", "FAILED"),
        ("RETRYING", "CANCELLING"),
        ("CANCELLING", "CANCELLED"),
        ("CANCELLING", "SUCCEEDED"),
        ("CANCELLING", "FAILED"),
    }


def test_a_row_keeps_when_it_happened_what_came_of_it_and_how_many_rounds() -> None:
    row = advance(PENDING, Event(kind=EventKind.STARTED), 1.5)
    row = advance(row, round_event({"round": 1, "state": "FAILED"}), 2.0)
    row = advance(row, round_event({"round": 2, "state": "RELEASED"}), 3.0)
    row = advance(row, round_event({"round": 3, "state": "CANCELLED"}), 3.0)
    done = advance(row, succeeded_event({"epsilon_party": 3.0}), 4.0)
    assert (done.started_at, done.ended_at) == ("1970-01-01T00:00:01.500000Z", "1970-01-01T00:00:04.000000Z")
    assert (done.rounds_released, done.rounds_failed) == (1, 1)
    assert done.result == {"epsilon_party": 3.0}
    error = JobError("ROUND_FAILED", "nobody answered", "round 4", ("a", "b"), "log line 7")
    assert advance(row, failed_event(error), 5.0).error == error
    unexplained = advance(row, Event(kind=EventKind.FAILED, message="something"), 5.0).error
    assert unexplained == JobError(UNEXPECTED.reason, "something")


def test_attempts_are_counted_until_a_round_is_released() -> None:
    row = RUNNING
    seen = []
    for at in (10.0, 20.0):
        event = after_failure(row, DIED, delays_s=(0.0, 60.0), now=at)
        row = advance(row, event, at)
        seen.append((row.state, row.attempt, row.retry_at, row.error))
        row = advance(row, Event(kind=EventKind.RESUMED), at + 60.0)
        assert (row.state, row.retry_at, row.error) == (JobState.RUNNING, "", None)
    assert seen == [(JobState.RETRYING, 1, utc(10.0), DIED), (JobState.RETRYING, 2, utc(80.0), DIED)]
    assert row.attempt == row.max_attempts == 3
    assert after_failure(row, DIED, delays_s=(0.0, 60.0), now=90.0) == failed_event(DIED)
    row = advance(row, round_event({"round": 1, "state": "RELEASED"}), 90.0)
    assert row.attempt == 1
    assert after_failure(row, DIED, delays_s=(0.0, 60.0), now=90.0).kind is EventKind.RETRYING


def test_another_process_that_goes_on_with_an_attempt_does_not_count_as_one() -> None:
    assert advance(RUNNING, Event(kind=EventKind.RESUMED), 9.0) == RUNNING


@pytest.mark.parametrize("reason", sorted({meaning.reason for meaning in CATALOGUE.values()} | {UNEXPECTED.reason}))
def test_only_what_another_attempt_may_mend_is_tried_again(reason: str) -> None:
    event = after_failure(RUNNING, JobError(reason, "no"), delays_s=(), now=5.0)
    assert (event.kind is EventKind.RETRYING) == (reason in MENDABLE)
    assert event.kind in (EventKind.RETRYING, EventKind.FAILED)
    assert {meaning.reason for meaning in CATALOGUE.values()} >= MENDABLE


@pytest.mark.parametrize(
    ("delays_s", "attempt", "delay_s"),
    [((), 1, 0.0), ((), 5, 0.0), ((1.0,), 1, 1.0), ((1.0,), 9, 1.0), ((0.0, 60.0, 300.0), 2, 60.0)]
    + [((0.0, 60.0, 300.0), attempt, 300.0) for attempt in (3, 4)],
)
def test_the_last_delay_is_also_that_of_all_later_attempts(
    delays_s: tuple[float, ...], attempt: int, delay_s: float
) -> None:
    row = replace(RUNNING, attempt=attempt, max_attempts=10)
    event = after_failure(row, DIED, delays_s=delays_s, now=1000.0)
    assert event.detail is not None
    assert seconds(event.detail["retry_at"]) == 1000.0 + delay_s
    assert JobError.from_json(event.detail["error"]) == DIED
    assert event.detail["attempt"] == attempt


def test_a_job_that_waits_past_its_deadline_fails_and_one_under_way_is_stopped_first() -> None:
    waiting = advance(PENDING, expired_event(PENDING), 601.0)
    assert waiting.state is JobState.FAILED
    assert waiting.error is not None
    assert waiting.error.reason == "DEADLINE_EXCEEDED"
    assert PENDING.deadline_at in waiting.error.message
    running = advance(RUNNING, expired_event(RUNNING), 601.0)
    assert (running.state, running.ended_at) == (JobState.CANCELLING, "")
    assert running.error == waiting.error
    failed = advance(running, failed_event(waiting.error), 602.0)
    assert (failed.state, failed.error) == (JobState.FAILED, waiting.error)
    retrying = advance(RUNNING, after_failure(RUNNING, DIED, delays_s=(60.0,), now=2.0), 2.0)
    cancelling = advance(retrying, Event(kind=EventKind.CANCELLING), 3.0)
    assert (cancelling.error, cancelling.retry_at) == (None, "")


def test_a_deleted_job_keeps_everything_but_its_files() -> None:
    result = {"files": [{"name": "m", "bytes": 1, "sha256": "ff"}], "epsilon_party": 3.0}
    done = advance(RUNNING, succeeded_event(result), 2.0)
    deleted = advance(done, Event(kind=EventKind.DELETED), 9.0)
    assert deleted == replace(done, deleted_at=utc(9.0), result={"files": [], "epsilon_party": 3.0})
    assert advance(deleted, Event(kind=EventKind.DELETED), 10.0) == deleted
    with pytest.raises(StateError):
        advance(RUNNING, Event(kind=EventKind.DELETED), 2.0)


def test_what_is_no_history_does_not_replay() -> None:
    with pytest.raises(StateError):
        replay(PENDING, [(Event(kind=EventKind.STARTED), 1.0), (Event(kind=EventKind.STARTED), 2.0)])


def test_an_infinite_epsilon_is_stored_as_a_text_that_json_has() -> None:
    event = round_event({"round": 1, "state": "RELEASED", "epsilon_party_against_aggregator": math.inf, "parties": []})
    assert json.loads(json.dumps(event.detail, allow_nan=False))["epsilon_party_against_aggregator"] == "inf"


@given(st.floats(0, 4e9))
def test_a_time_survives_to_the_microsecond(moment: float) -> None:
    assert abs(seconds(utc(moment)) - moment) <= 1e-6
    assert utc(seconds(utc(moment))) == utc(moment)


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_times_sort_as_texts(a: float, b: float) -> None:
    if utc(a) < utc(b):
        assert a < b
