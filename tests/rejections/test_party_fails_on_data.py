"""A party that fails once data was touched tells nobody anything but that, and what it had reserved is spent."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from src.errors import (
    ConfigError,
    DeadlineError,
    InvalidInput,
    LimitError,
    StorageError,
    UnavailableError,
    WorkerError,
)
from src.learning.flatten import to_safetensors
from src.party.rounds import NO_CONTRIBUTION, RoundWorker
from src.party.store import PartyRound, Stage
from tests.rejections.cheating import DIMENSION, Answer, Meeting

MARKER = "row 7 is 31337"

FAILURES: dict[str, Exception] = {
    "a value that is not finite": InvalidInput(f"the update holds a value that is not finite: {MARKER}"),
    "a killed worker": WorkerError(f"the worker died: {MARKER}", private="exit status -9"),
    "an option of the task": ConfigError(f"no such file: {MARKER}", problems=(MARKER,)),
    "a limit": LimitError(f"more than 3: {MARKER}", limit=MARKER),
    "a time": DeadlineError(f"too slow: {MARKER}"),
    "anything else": IndexError(f"Target 7 is out of bounds: {MARKER}"),
}


@pytest.mark.parametrize("what", FAILURES)
async def test_one_text_for_whatever_fails_on_data_and_nothing_is_given_back(
    meeting: Meeting, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    meeting.a.pool.dies_at, meeting.a.pool.error = "contribute", FAILURES[what]
    with caplog.at_level(logging.DEBUG):
        round_ = meeting.them.plan()
        assert await meeting.them.ask_contribute(round_) == Answer("failure", ("contribute", "WORKER_FAILED"))
        meeting.a.pool.dies_at = ""
        # Asked again, in whatever way, it does not try again: another attempt would be another answer.
        await meeting.restart()
        assert await meeting.them.ask_contribute(round_) == Answer("failure", ("contribute", "WORKER_FAILED"))
    assert meeting.them.told == [NO_CONTRIBUTION] * 2
    assert MARKER not in caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert await meeting.a.charges() == ["final", "final"]  # of the rows, and of the party
    released = [entry for entry in await meeting.a.entries() if entry.kind == "release"]
    assert [dict(entry.figures) for entry in released] == [{"failure": "WORKER_FAILED"}] * 2  # no more can be told


async def test_what_fails_before_data_is_touched_says_why_and_is_given_back(meeting: Meeting) -> None:
    await meeting.committed()  # so that the task is tried already: else nothing is reserved as long as it is not
    round_ = meeting.them.plan(2)
    meeting.them.model = to_safetensors({"w": np.ones(DIMENSION, np.float32)})
    assert await meeting.them.ask_contribute(round_) == Answer("failure", ("contribute", "DIGEST_MISMATCH"))
    assert meeting.them.told != [NO_CONTRIBUTION]
    assert await meeting.a.charges() == ["final", "final", "returned", "returned"]


async def test_as_long_as_the_task_cannot_be_tried_nothing_is_charged_at_all(meeting: Meeting) -> None:
    round_ = meeting.them.plan()
    meeting.them.model = to_safetensors({"w": np.ones(DIMENSION, np.float32)})
    assert await meeting.them.ask_contribute(round_) == Answer("failure", ("contribute", "DIGEST_MISMATCH"))
    assert await meeting.a.charges() == []


async def test_a_failure_that_cannot_be_entered_is_no_refusal(meeting: Meeting) -> None:
    """Which would be told, and give the charge back: the round stays as it is, reserved, which counts as spent."""

    class Full:
        async def run(self, _: object) -> None:
            raise StorageError("the disk is full")

    worker = RoundWorker.__new__(RoundWorker)
    worker._database = Full()  # type: ignore[assignment]  # all that is asked of it here
    worker._readiness = None
    row = PartyRound(job_id="j", number=1, stage=Stage.RESERVED, plan="0" * 64)
    with pytest.raises(UnavailableError):
        await worker._failed_on_data(row, WorkerError("it died"), task="t")
