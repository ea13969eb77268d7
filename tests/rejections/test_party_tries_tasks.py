"""What a party finds of a task on public rows is told by name, before anything is charged, and costs nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest

from src.communication.generated import federation_pb2
from src.errors import DeadlineError, WorkerError
from src.learning.row_kind import RowKind
from src.protocol.faults import SENTENCES, TaskProblem, task_error
from tests.rejections.cheating import SPEC, Answer, Meeting, contribute_to

MARKER = "row 7 is 31337"
REFUSED = Answer("failure", ("contribute", "TASK_NOT_READY"))


def found(problem: TaskProblem, place: str = "net.py:12") -> dict[str, object]:
    return {"problem": problem.value, "place": place, "detail": f"IndexError: {MARKER}", "confined": True}


@pytest.mark.parametrize("problem", [TaskProblem.RANDOM_DRAWN, TaskProblem.MODEL_DOES_NOT_FIT_PLAN])
async def test_a_fault_is_told_by_name_and_charged_to_nobody(
    meeting: Meeting, problem: TaskProblem, caplog: pytest.LogCaptureFixture
) -> None:
    meeting.a.pool.found = found(problem)
    assert await meeting.them.ask_contribute(meeting.them.plan()) == REFUSED
    (report,) = meeting.them.reports
    assert (report.problem, report.place) == (problem.value, "net.py:12")
    assert SENTENCES[problem] in report.message
    assert MARKER not in str(report)
    assert await meeting.a.charges() == []
    assert await meeting.a.entries() == []
    assert meeting.a.pool.begun == []
    found_by, told_by = [each for each in caplog.records if SENTENCES[problem] in each.getMessage()]
    assert (found_by.levelno, told_by.levelno) == (logging.WARNING, logging.WARNING)
    assert MARKER in vars(found_by)["private"]  # in its owner's own log


async def test_it_is_tried_once_for_all_rounds_of_a_job_and_told_in_each(meeting: Meeting) -> None:
    meeting.a.pool.found = found(TaskProblem.ROWS_MIXED)
    for number in (1, 2, 3):
        assert await meeting.them.ask_contribute(meeting.them.plan(number)) == REFUSED
    assert len(meeting.a.pool.tried) == 1
    assert await meeting.a.charges() == []


async def test_a_task_that_is_fine_is_tried_once_for_a_job_and_again_for_another(meeting: Meeting) -> None:
    for number in (1, 2):
        assert (await meeting.them.ask_contribute(meeting.them.plan(number))).kind == "root"
    assert len(meeting.a.pool.tried) == 1
    spec = SPEC.model_copy(update={"seed": 5})
    other = meeting.them.plan(spec=spec, order=meeting.them.order(spec), job_id="other")
    assert (await meeting.them.ask_contribute(other)).kind == "root"
    assert len(meeting.a.pool.tried) == 2


@pytest.mark.parametrize(
    "error", [WorkerError("it died", private="exit status -9"), DeadlineError("it did not end within 300 s")]
)
async def test_a_trial_that_comes_to_no_end_is_no_verdict_and_is_made_again(meeting: Meeting, error: Exception) -> None:
    meeting.a.pool.dies_at, meeting.a.pool.error = "try_task", error
    assert await meeting.them.ask_contribute(meeting.them.plan()) == REFUSED
    assert meeting.them.reports[0].problem == TaskProblem.TRIAL_DIED
    assert await meeting.a.charges() == []
    meeting.a.pool.dies_at = ""
    assert (await meeting.them.ask_contribute(meeting.them.plan(2))).kind == "root"


async def test_a_round_that_ends_while_the_task_is_tried_costs_nothing(meeting: Meeting) -> None:
    meeting.a.pool.gates["try_task"] = asyncio.Event()
    round_ = meeting.them.plan()
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))
    async with asyncio.timeout(20):
        while not meeting.a.pool.tried:  # noqa: ASYNC110  it is the party that begins
            await asyncio.sleep(0.01)
    await meeting.them.tell(round_.name, ended=federation_pb2.RoundEnded(state="FAILED", reason="because"))
    async with asyncio.timeout(20):
        while meeting.a._node._tasks:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)
    assert await meeting.a.charges() == []
    meeting.a.pool.found = found(TaskProblem.ROWS_MIXED)
    meeting.a.pool.gates["try_task"].set()
    assert await meeting.them.ask_contribute(meeting.them.plan(2)) == REFUSED
    assert len(meeting.a.pool.tried) == 1  # it went on, for its owner to read


async def test_a_trial_that_outlives_its_round_keeps_the_model_that_it_tries(meeting: Meeting) -> None:
    meeting.a.pool.gates["try_task"] = asyncio.Event()
    round_ = meeting.them.plan()
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))
    async with asyncio.timeout(20):
        while not meeting.a.pool.tried:  # noqa: ASYNC110  it is the party that begins
            await asyncio.sleep(0.01)
    await meeting.them.tell(round_.name, ended=federation_pb2.RoundEnded(state="FAILED", reason="because"))
    async with asyncio.timeout(20):
        while meeting.a._node._tasks:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)
    model = round_.plan.model_sha256
    meeting.a.worker.uses.let_go({model})
    await meeting.a.worker.uses.settled()
    assert meeting.a.blobs.read(model)
    meeting.a.pool.gates["try_task"].set()
    assert (await meeting.them.ask_contribute(meeting.them.plan(2))).kind == "root"


class Ready:
    """A party that is ready for whatever it is asked for."""

    async def require(self, task: str) -> None:
        assert task == "scripted"

    def rows_of(self, task: str) -> RowKind:
        assert task == "scripted"
        return RowKind((3,), "int64")


class Gone(Ready):
    """A party whose data is not ready."""

    async def require(self, task: str) -> None:
        raise task_error(TaskProblem.DATA_NOT_READY, task=task)


async def test_rows_are_not_looked_at_for_a_trial(meeting: Meeting) -> None:
    """What they look like is known since the party found that it is ready, and is one for all trials until it looks
    again."""
    meeting.a.worker._readiness = cast(Any, Ready())
    assert (await meeting.them.ask_contribute(meeting.them.plan())).kind == "root"
    (tried,) = meeting.a.pool.tried
    assert tried["rows"] == {"shape": [3], "labels": "int64"}
    assert meeting.a.pool.begun == ["contribute"]


async def test_another_untrained_part_is_tried_as_another_model_also_in_a_later_round(meeting: Meeting) -> None:
    assert (await meeting.them.ask_contribute(meeting.them.plan())).kind == "root"
    meeting.a.pool.found = found(TaskProblem.NOT_TRAINED_STATE_DIFFERS)
    charged = await meeting.a.charges()
    assert await meeting.them.ask_contribute(meeting.them.plan(2, not_trained="ab" * 32)) == REFUSED
    assert meeting.them.reports[0].problem == TaskProblem.NOT_TRAINED_STATE_DIFFERS
    assert await meeting.a.charges() == charged


async def test_what_is_computed_and_paid_for_is_told_also_where_the_data_is_gone_meanwhile(meeting: Meeting) -> None:
    round_ = meeting.them.plan()
    first = await meeting.them.ask_contribute(round_)
    await meeting.restart()
    meeting.a.worker._readiness = cast(Any, Gone())
    assert await meeting.them.ask_contribute(round_) == first
    assert await meeting.them.ask_contribute(meeting.them.plan(2)) == REFUSED


@pytest.mark.parametrize("place", ["/home/ann/net.py:12", "net.py:0", MARKER, "net.py:12\n"])
async def test_what_is_no_place_in_a_file_leaves_no_party(meeting: Meeting, place: str) -> None:
    meeting.a.pool.found = found(TaskProblem.STATE_KEPT, place)
    assert await meeting.them.ask_contribute(meeting.them.plan()) == REFUSED
    assert meeting.them.reports[0].place == ""
    assert place not in meeting.them.told[0]
