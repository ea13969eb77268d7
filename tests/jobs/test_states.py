"""The rules of a job."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.communication.generated import jobs_pb2
from src.errors import StateError
from src.jobs.states import (
    AT_REST,
    TRANSITIONS,
    Event,
    EventKind,
    JobError,
    JobRow,
    JobState,
    advance,
    failed_event,
    round_event,
    succeeded_event,
    utc,
)

EVENTS = st.sampled_from(
    [
        Event(kind=EventKind.SUBMITTED),
        Event(kind=EventKind.STARTED),
        Event(kind=EventKind.WAITING, detail={"waiting_for": ["a"]}),
        round_event({"round": 1, "state": "RELEASED"}),
        round_event({"round": 2, "state": "FAILED", "reason": "too few"}),
        succeeded_event({"files": [], "metrics": {"auc": 0.6}}),
        failed_event("BUDGET_EXCEEDED", "no budget is left", stage="round 3", parties=["a"]),
        Event(kind=EventKind.FAILED, message="something"),
        Event(kind=EventKind.CANCELLING),
        Event(kind=EventKind.CANCELLED),
    ]
)
PENDING = JobRow(
    job_id="00ff", request_id="r", owner="scientist/s", display_name="", spec={}, spec_digest="d", created_at=utc(0.0)
)


@settings(deadline=None, max_examples=300)
@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_only_the_tables_transitions_are_taken_and_rest_is_final(events: list[Event]) -> None:
    row = PENDING
    for now, event in enumerate(events, 1):
        wanted = TRANSITIONS.get((row.state, event.kind))
        if wanted is None:
            with pytest.raises(StateError, match=row.state.value):
                advance(row, event, float(now))
            continue
        assert row.state not in AT_REST
        row = advance(row, event, float(now))
        assert row.state is wanted
        assert bool(row.ended_at) == row.at_rest
        assert (row.error is not None) == (row.state is JobState.FAILED)
        assert (row.result is not None) == (row.state is JobState.SUCCEEDED)
        assert row.rounds_released + row.rounds_failed == 0 or row.started_at


def test_the_states_are_the_wires_states_and_every_one_can_be_reached() -> None:
    assert set(JobState) == set(jobs_pb2.JobState.keys()) - {"JOB_STATE_UNSPECIFIED"}
    assert {JobState.PENDING, *TRANSITIONS.values()} == set(JobState)


def test_the_changes_of_state_are_these() -> None:
    changes = {(a.value, b.value) for (a, _), b in TRANSITIONS.items() if a is not b}
    assert changes == {
        ("PENDING", "RUNNING"),
        ("PENDING", "FAILED"),
        ("PENDING", "CANCELLED"),
        ("RUNNING", "SUCCEEDED"),
        ("RUNNING", "FAILED"),
        ("RUNNING", "CANCELLING"),
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
    failed = advance(row, failed_event("ROUND_FAILED", "nobody answered", stage="round 4", parties=("a", "b")), 5.0)
    assert failed.error == JobError("ROUND_FAILED", "nobody answered", "round 4", ("a", "b"))


def test_an_infinite_epsilon_is_stored_as_a_text_that_json_has() -> None:
    event = round_event({"round": 1, "state": "RELEASED", "epsilon_party_against_aggregator": math.inf, "parties": []})
    assert json.loads(json.dumps(event.detail, allow_nan=False))["epsilon_party_against_aggregator"] == "inf"


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_times_sort_as_texts(a: float, b: float) -> None:
    if utc(a) < utc(b):
        assert a < b
