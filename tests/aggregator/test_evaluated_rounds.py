"""Nothing optional stands between the opening of a model and its release: it is measured afterwards, whatever comes of
that; and whether it can be measured at all is tried before anything is charged."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from src.aggregator.federation import Federation
from src.aggregator.round_row import RoundRow, RoundState
from src.errors import (
    DeadlineError,
    EvaluationError,
    InvalidInput,
    NotFoundError,
    StorageFullError,
    WorkerError,
)
from src.jobs.states import JobState
from src.jobs.wire import result_to_proto, round_to_proto
from tests.aggregator.played import Place

UNIT = "evaluate_model"
WHY = "metric 'f1' is text"


@pytest.fixture
async def place(federation: Federation, tmp_path: Path) -> AsyncIterator[Place]:
    found = Place(federation, tmp_path, retry_delays_s=(1.0, 1.0))
    found.config.evaluation["t"] = {}
    await found.database.open()
    yield found
    await found.coordinator.stop()
    await found.database.close()


def manifest(place: Place, result: dict[str, Any]) -> dict[str, Any]:
    file = next(file for file in result["files"] if file["name"] == "manifest.json")
    readable: dict[str, Any] = json.loads(place.blobs.read(file["sha256"]))["readable"]
    return readable


FAULTS = (EvaluationError(WHY), InvalidInput(WHY), WorkerError(WHY), NotFoundError(WHY))


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
async def test_a_model_that_was_opened_is_released_whatever_becomes_of_its_evaluation(
    place: Place, error: Exception
) -> None:
    job_id = await place.submit(place.training(rounds=2))
    await place.turn()
    place.work.failures[UNIT] = [error]
    await place.contribute(job_id)
    await place.contribute(job_id, 2)
    job = await place.job(job_id)
    assert (job.state, job.rounds_released, job.rounds_failed) == (JobState.SUCCEEDED, 2, 0)
    assert "retrying" not in await place.kinds(job_id)
    assert await place.charged(job_id) == ["final", "final"]
    first, second = [event.detail or {} for event in await place.events(job_id) if event.kind == "round"]
    assert (first["metrics"], first["not_evaluated"]) == ({}, WHY)
    assert (second["metrics"], second.get("not_evaluated")) == ({"auc": 0.5}, None)
    assert round_to_proto(first).not_evaluated == WHY


@pytest.mark.parametrize("at_start", [True, False], ids=["of the initial model", "of a round's"])
async def test_a_measurement_that_does_not_end_costs_a_job_its_time_once(place: Place, at_start: bool) -> None:
    slow, rounds = DeadlineError("unit evaluate_model did not end within 60 s"), 3
    if at_start:
        place.work.failures[UNIT] = [slow]
    job_id = await place.submit(place.training(rounds=rounds))
    await place.turn()
    place.work.failures[UNIT] = [] if at_start else [slow]
    for number in range(1, rounds + 1):
        await place.contribute(job_id, number)
    job = await place.job(job_id)
    assert (job.state, job.rounds_released) == (JobState.SUCCEEDED, rounds)
    said = [(event.detail or {})["not_evaluated"] for event in await place.events(job_id) if event.kind == "round"]
    what = "the initial model" if at_start else "the model of round 1"
    again = f"not tried again in this job: {what} was not measured in time ({slow.message})"
    assert said == [again if at_start else slow.message, again, again]
    assert (job.result or {})["not_evaluated"] == again


async def test_manifest_and_result_say_why_the_last_model_was_not_evaluated(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    place.work.failures[UNIT] = [EvaluationError(WHY)]
    await place.contribute(job_id)
    result = (await place.job(job_id)).result or {}
    assert (result["metrics"], result["not_evaluated"]) == ({}, WHY)
    assert manifest(place, result)["evaluation"] == f"not evaluated: {WHY}"
    assert result_to_proto(result).not_evaluated == WHY


async def test_what_is_left_out_of_the_metrics_is_said_beside_the_others(place: Place) -> None:
    place.work.evaluated = {"without": "not finite, and left out: r"}
    job_id = await place.submit(place.training())
    await place.turn()
    await place.contribute(job_id)
    result = (await place.job(job_id)).result or {}
    assert (result["metrics"], result["not_evaluated"]) == ({"auc": 0.5}, "not finite, and left out: r")
    stated = manifest(place, result)
    assert stated["evaluation"] == {"auc": "0.5"}
    assert "not all metrics are given: not finite, and left out: r" in stated["statements"]


async def test_a_job_whose_evaluation_cannot_work_fails_before_anything_is_charged(place: Place) -> None:
    place.work.failures[UNIT] = [EvaluationError(WHY)]
    job_id = await place.submit(place.training())
    await place.turn()
    job = await place.job(job_id)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.reason == "EVALUATION_FAILED"
    assert WHY in job.error.message
    assert "nothing was charged" in job.error.message
    assert await place.charged(job_id) == []


@pytest.mark.parametrize(
    "error", [InvalidInput(WHY), WorkerError(WHY), DeadlineError(WHY)], ids=lambda e: type(e).__name__
)
async def test_what_may_be_of_the_initial_model_alone_or_of_chance_is_a_warning(place: Place, error: Exception) -> None:
    place.work.failures[UNIT] = [error]
    job_id = await place.submit(place.training())
    await place.turn()
    kinds = await place.kinds(job_id)
    assert "warning" in kinds
    assert await place.state(job_id) is JobState.RUNNING
    said = next(event.message for event in await place.events(job_id) if event.kind == "warning")
    assert said == f"the initial model is not evaluated: {WHY}; the job goes on"
    await place.contribute(job_id)
    assert (await place.job(job_id)).state is JobState.SUCCEEDED


async def test_while_a_model_is_measured_it_is_released_already_and_a_job_that_is_cancelled_does_not_wait(
    place: Place,
) -> None:
    job_id = await place.submit(place.training(rounds=2))
    await place.turn()
    place.work.hanging = {UNIT}
    await place.contribute(job_id)
    row = await place.round(job_id)
    assert (row.state, row.settled) == (RoundState.RELEASED, False)
    assert await place.charged(job_id) == ["final"]
    await place.cancel(job_id)
    await place.turn()
    assert place.work.ended[UNIT] == 1
    assert await place.state(job_id) is JobState.CANCELLED
    row = await place.round(job_id)
    assert (row.state, row.settled, row.evaluation) == (RoundState.RELEASED, True, None)


async def test_a_process_that_dies_while_it_measures_leaves_a_released_model_to_the_next(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    place.work.hanging = {UNIT}
    await place.contribute(job_id)
    await place.coordinator.stop()
    place.work.hanging = set()
    place.coordinator = place.another()
    await place.coordinator.restore()
    await place.turn()
    job = await place.job(job_id)
    assert job.state is JobState.SUCCEEDED
    assert (job.result or {})["metrics"] == {"auc": 0.5}
    assert place.work.asked["open_aggregate"] == 1


async def test_what_passes_is_tried_again_and_then_no_more(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    place.work.failures[UNIT] = [StorageFullError("full")] * 9
    await place.contribute(job_id)
    assert await place.state(job_id) is JobState.RETRYING
    for _ in range(3):
        await place.turn(2.0)
    job = await place.job(job_id)
    assert (job.state, (job.result or {})["not_evaluated"]) == (JobState.SUCCEEDED, "full")


async def test_metrics_that_an_earlier_version_kept_with_the_result_are_found(place: Place) -> None:
    job_id = await place.submit(place.training(rounds=2))
    await place.turn()
    await place.contribute(job_id)
    stored = (await place.round(job_id)).to_json()
    del stored["evaluation"]
    stored["result"]["metrics"] = {"auc": 0.7}
    assert RoundRow.from_json(stored).metrics == {"auc": 0.7}
