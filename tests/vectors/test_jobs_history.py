"""Histories that some version recorded replay to the rows that they led to then."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from src.jobs.states import AT_REST, TRANSITIONS, Event, EventKind, JobState, advance, replay, seconds
from tests.vectors import generate_jobs
from tests.vectors.generate_jobs import FILE, Json, row_from_json, row_to_json

VECTOR: Json = json.loads(FILE.read_text(encoding="utf-8"))
RECORDED: list[Json] = VECTOR["histories"]


def events(record: Json) -> Iterator[tuple[Event, float]]:
    """What happened after "submitted"."""
    for each in record["events"][1:]:
        kind = EventKind(each["kind"])
        event = Event(kind=kind, message=each["message"], cause=each["cause"], detail=each["detail"])
        yield event, seconds(each["time"])


def as_recorded(now: Any, then: Any) -> Any:
    """What is made now, without the fields that the record does not have yet."""
    if isinstance(then, dict):
        return {key: as_recorded(now[key], value) for key, value in then.items()}
    if isinstance(then, list):
        assert len(now) == len(then)
        return [as_recorded(a, b) for a, b in zip(now, then, strict=True)]
    return now


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record["name"])
def test_a_recorded_history_replays_to_the_row_it_led_to(record: Json) -> None:
    row = row_from_json(record["submitted"])
    assert row.state is JobState.PENDING
    assert as_recorded(row_to_json(replay(row, events(record))), record["final"]) == record["final"]
    for (event, now), each in zip(events(record), record["events"][1:], strict=True):
        row = advance(row, event, now)
        assert row.state == each["state"]
    assert row.at_rest


def test_the_record_has_every_transition_that_there_was_and_every_end() -> None:
    taken = {
        (JobState(before["state"]), EventKind(after["kind"]))
        for record in RECORDED
        for before, after in itertools.pairwise(record["events"])
    }
    assert taken <= set(TRANSITIONS)
    assert len(taken) == 28  # a version that adds some records them in a file of its own
    assert {record["events"][0]["kind"] for record in RECORDED} == {"submitted"}
    assert {JobState(record["final"]["state"]) for record in RECORDED} == AT_REST


def test_the_record_says_what_was_meant() -> None:
    rows = {record["name"]: row_from_json(record["final"]) for record in RECORDED}
    row = rows["a training that succeeds, loses an attempt and a round on its way, and is deleted"]
    assert (row.state, row.attempt, row.rounds_released, row.rounds_failed) == (JobState.SUCCEEDED, 1, 2, 1)
    assert (row.started_at, row.ended_at) == ("2026-01-01T00:03:00.250000Z", "2026-01-01T00:15:01.250000Z")
    assert row.deleted_at == "2026-01-01T00:16:31.375000Z"
    assert row.result is not None
    assert (row.result["files"], row.result["epsilon_party_against_aggregator"]) == ([], "inf")
    row = rows["attempts run out"]
    assert (row.state, row.attempt, row.error and row.error.reason) == (JobState.FAILED, 3, "WORKER_FAILED")
    row = rows["a released round gives the attempts back"]
    assert (row.state, row.attempt, row.error) == (JobState.SUCCEEDED, 3, None)
    row = rows["expired under way"]
    assert (row.state, row.error and row.error.reason) == (JobState.FAILED, "DEADLINE_EXCEEDED")


def test_what_the_generator_makes_is_what_was_recorded() -> None:
    assert as_recorded(json.loads(generate_jobs.build()), VECTOR) == VECTOR
