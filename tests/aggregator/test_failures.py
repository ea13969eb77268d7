"""What a party says of itself is shown as far as it is of the closed form, and what lasts fails a job at once."""

from __future__ import annotations

from typing import Any

import pytest

from src.aggregator.failures import failure_of
from src.aggregator.round_row import Failure, PartyFailed, Work
from src.communication.generated import federation_pb2
from src.jobs.states import JobState
from src.protocol.faults import SENTENCES, TaskProblem
from tests.aggregator.played import Place


def told(**fields: Any) -> Failure:
    values = {"stage": "contribute", "reason": "TASK_NOT_READY", "message": "row 7 is 31337", **fields}
    return failure_of(federation_pb2.ReportFailureRequest(**values), task="triage")


def test_why_a_task_cannot_be_trained_is_said_in_our_words() -> None:
    failure = told(problem="ROWS_MIXED", place="net.py:12")
    assert failure.message == "task triage cannot be trained here: model or loss mix the rows of a batch (net.py:12)"
    assert (failure.problem, failure.place) == ("ROWS_MIXED", "net.py:12")


@pytest.mark.parametrize("problem", ["", "ROW_7_IS_31337", "rows_mixed", "ROWS_MIXED ", "31337" * 100])
def test_of_a_class_that_is_not_on_the_list_nothing_is_shown(problem: str) -> None:
    failure = told(problem=problem, place="net.py:12")
    assert failure.problem == ""
    assert "31337" not in str(failure)


@pytest.mark.parametrize(
    "where",
    ["/home/ann/net.py:12", "net.py:31337 is row 7", "x" * 200 + ".py:1", "net.py", "net.py:1\n", "\x1b[2J.py:1"],
)
def test_of_a_place_that_is_none_nothing_is_shown(where: str) -> None:
    failure = told(problem="ROWS_MIXED", place=where)
    assert failure.place == ""
    assert where not in failure.message


def test_another_reason_has_neither() -> None:
    failure = told(reason="BUDGET_EXCEEDED", message="no", problem="ROWS_MIXED", place="net.py:12")
    assert failure == Failure("contribute", "BUDGET_EXCEEDED", "no")


def test_failures_of_before_are_read() -> None:
    kept = {"stage": "contribute", "reason": "WORKER_FAILED", "message": "no"}
    assert Failure(**kept) == Failure("contribute", "WORKER_FAILED", "no", "", "")


async def refuse(place: Place, job_id: str, problem: TaskProblem, *parties: str, number: int = 1) -> None:
    for party in parties:
        failure = told(problem=problem.value, place="net.py:12")
        assert failure.stage == Work.CONTRIBUTE.value
        await place.coordinator.trainings.happened(job_id, number, PartyFailed(party, failure))
    await place.turn()


LASTING = sorted(set(TaskProblem) - {TaskProblem.CHECKING, TaskProblem.DATA_NOT_READY, TaskProblem.TRIAL_DIED})


@pytest.mark.parametrize("problem", LASTING)
async def test_what_every_further_round_would_meet_fails_the_job_at_once_and_is_named(
    place: Place, problem: TaskProblem
) -> None:
    job_id = await place.submit(place.training(spare_rounds=5))
    await place.turn()
    await refuse(place, job_id, problem, "a")
    job = await place.job(job_id)
    assert (job.state, job.rounds_failed) == (JobState.FAILED, 1)
    assert job.error is not None
    assert (job.error.reason, job.error.parties) == ("TASK_NOT_READY", ("a",))
    assert f"{SENTENCES[problem]} (net.py:12)" in job.error.message
    assert await place.charged(job_id) == ["returned"]


@pytest.mark.parametrize("problem", [TaskProblem.TRIAL_DIED, TaskProblem.DATA_NOT_READY])
async def test_what_may_be_gone_by_the_next_round_costs_one(place: Place, problem: TaskProblem) -> None:
    job_id = await place.submit(place.training(spare_rounds=1))
    await place.turn()
    await refuse(place, job_id, problem, "a")
    assert await place.state(job_id) is JobState.RUNNING


async def test_where_the_quorum_holds_without_it_the_job_goes_on_without_it(place: Place) -> None:
    job_id = await place.submit(place.training(parties=("a", "b", "c"), quorum=2))
    await place.turn()
    await refuse(place, job_id, TaskProblem.MODEL_DOES_NOT_FIT_PLAN, "c")
    assert await place.state(job_id) is JobState.RUNNING
    assert (await place.round(job_id)).failures["c"].problem == "MODEL_DOES_NOT_FIT_PLAN"
