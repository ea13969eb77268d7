"""Which datasets a party is ready for: found out at its start, told by class alone, and again once that changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from src.config import PartyConfig
from src.errors import TaskError, WorkerError
from src.learning.row_kind import RowKind
from src.party import readiness as module
from src.party.readiness import Readiness, _told_after
from src.protocol.faults import TaskProblem, task_error

SECRET = "v31337"
PATIENCE_S = 20.0
CODE: dict[str, Any] = {"problem": "", "place": "", "said": "", "rows": None}


class Workers:
    """Answers as it is told to; `rows` and `code` are what a look raises, or returns."""

    def __init__(self) -> None:
        self.code: Exception | dict[str, Any] = CODE
        self.rows: Exception | None = None
        self.looks = 0
        self.units: list[str] = []
        self.free = asyncio.Event()

    async def run(
        self, name: str, params: Mapping[str, Any], *, timeout_s: float | None = None, alone: bool = False
    ) -> dict[str, Any]:
        await self.free.wait()
        assert alone == (name == "check_code")  # what others hear of it was computed where no row ever was
        if params["task"] != "ward":
            return CODE
        self.units.append(name)
        if name == "check_code":
            self.looks += 1
            if isinstance(self.code, Exception):
                raise self.code
            return self.code
        assert params["options"] == {"file": "rows.csv"}  # what is left to jobs has the task's default
        if self.rows is not None:
            raise self.rows
        return {"shape": [3], "labels": "int64"}


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
async def party(
    workers: Workers, make_config: Callable[..., PartyConfig], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Readiness]:
    monkeypatch.setattr(module, "_told_after", lambda seconds: seconds)
    monkeypatch.setattr(module, "ASKED_PAUSE_S", 0.0)
    options = {"file": "rows.csv", "left": None}
    config = make_config(datasets={"ward": {"declared_rows": 100, "options": options}})
    readiness = Readiness(config, workers)
    task = asyncio.create_task(readiness.run())
    yield readiness
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def told(party: Readiness) -> tuple[bool, str, str]:
    """What others hear once it is known."""
    party._pool.free.set()  # type: ignore[attr-defined]  # the `Workers` above
    async with asyncio.timeout(PATIENCE_S):
        known = party.standings
        while known["ward"].problem == TaskProblem.CHECKING:
            known = await party.change(known)
    return known["ward"].ready, known["ward"].problem, known["ward"].place


def not_ready(private: str = "no such file: /srv/rows.csv") -> TaskError:
    return task_error(TaskProblem.DATA_NOT_READY, task="ward", private=private)


async def test_until_it_is_known_others_hear_that_it_is_being_found_out(party: Readiness, workers: Workers) -> None:
    assert party.standings["ward"].problem == "CHECKING"
    assert await told(party) == (True, "", "")


async def test_what_a_row_looks_like_is_known_from_the_one_look_at_them(party: Readiness, workers: Workers) -> None:
    assert party.rows_of("ward") is None
    assert await told(party) == (True, "", "")
    assert party.rows_of("ward") == RowKind((3,), "int64")
    assert workers.units == ["check_code", "check_rows"]


async def test_a_party_that_becomes_ready_later_knows_then_what_a_row_looks_like(
    party: Readiness, workers: Workers
) -> None:
    workers.rows = not_ready()
    await told(party)
    assert party.rows_of("ward") is None
    workers.rows = None
    await asyncio.wait_for(party.require("ward"), PATIENCE_S)
    assert party.rows_of("ward") == RowKind((3,), "int64")


async def test_the_owner_reads_what_is_missing_and_others_that_the_data_is_not_ready(
    party: Readiness, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    workers.rows = not_ready()
    with caplog.at_level(logging.INFO):
        assert await told(party) == (False, "DATA_NOT_READY", "")
    assert "not ready for ward: its data is not ready: no such file: /srv/rows.csv" in caplog.text


@pytest.mark.parametrize("rows", [not_ready(), WorkerError("the worker died", private="exit status -9")])
async def test_what_the_code_alone_shows_is_told_whatever_the_rows_did(
    party: Readiness, workers: Workers, rows: Exception
) -> None:
    workers.code, workers.rows = CODE | {"problem": "ROWS_MIXED", "place": "ward.py:7", "said": "it mixes rows"}, rows
    assert await told(party) == (False, "ROWS_MIXED", "ward.py:7")


@pytest.mark.parametrize(
    "problem", [TaskProblem.TASK_IMPORT_FAILED, TaskProblem.MODEL_NOT_BUILT, TaskProblem.LAYER_REFUSED]
)
async def test_what_a_worker_that_loads_rows_finds_of_the_code_is_told_nobody_else(
    party: Readiness, workers: Workers, problem: TaskProblem
) -> None:
    """It may keep something of rows that it loaded before, on which what the code does then depends."""
    workers.rows = task_error(problem, task="ward", place="ward.py:7", private="its own log")
    assert await told(party) == (False, "DATA_NOT_READY", "")


async def test_what_the_code_alone_may_show_does_not_stand_against_rows_that_go_with_it(
    party: Readiness, workers: Workers
) -> None:
    workers.code = CODE | {"problem": "ROWS_MIXED", "place": "ward.py:7", "said": "it mixes rows"}
    assert await told(party) == (True, "", "")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            task_error(TaskProblem.TASK_IMPORT_FAILED, task="ward", place="ward.py:3", private=SECRET),
            "TASK_IMPORT_FAILED",
        ),
        (WorkerError("the worker died", private="exit status 3"), "TRIAL_DIED"),
    ],
)
async def test_a_task_that_cannot_be_used_is_told_by_its_class(
    party: Readiness, workers: Workers, code: Exception, problem: str
) -> None:
    workers.code = code
    assert (await told(party))[:2] == (False, problem)
    assert SECRET not in str(party.standings)


async def test_whoever_asks_for_what_is_not_ready_has_it_looked_at_again_at_once(
    party: Readiness, workers: Workers
) -> None:
    """The file is there by now: nobody starts anything again."""
    workers.rows = not_ready()
    await told(party)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TaskError) as raised:
            await party.require("ward")
        assert raised.value.message == "task ward cannot be trained here: its data is not ready"
        assert raised.value.private == ""
        workers.rows = None
        await party.require("ward")
    assert party.standings["ward"].ready


async def test_whoever_asks_while_it_is_being_found_out_waits_for_that(party: Readiness, workers: Workers) -> None:
    asked = asyncio.create_task(party.require("ward"))
    await asyncio.sleep(0)
    assert not asked.done()
    workers.rows = not_ready()
    workers.free.set()
    with pytest.raises(TaskError):
        await asyncio.wait_for(asked, PATIENCE_S)


async def test_after_a_training_failed_the_next_waits_for_another_look(party: Readiness, workers: Workers) -> None:
    """The file that was there at the start is gone: the second round is not paid for."""
    assert await told(party) == (True, "", "")
    workers.rows = not_ready()
    party.look_again("ward")
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TaskError):
            await party.require("ward")


async def test_what_is_not_ready_is_looked_at_again_by_itself(
    party: Readiness, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.002)
    workers.rows = not_ready()
    await told(party)
    workers.rows = None
    async with asyncio.timeout(PATIENCE_S):
        await party.change(party.standings)
    assert party.standings["ward"].ready


def test_how_long_looking_took_is_told_by_powers_of_two_alone() -> None:
    assert [_told_after(took) for took in (0.0, 0.3, 1.0, 1.1, 3.9, 100.0)] == [1.0, 1.0, 1.0, 2.0, 4.0, 128.0]


async def test_when_it_is_looked_at_again_tells_no_more_of_how_long_loading_took(
    workers: Workers, make_config: Callable[..., PartyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table that takes 100 s: what came of it is told after 128, and the next look begins 128 s after that."""
    now, waited, enough = [0.0], [], asyncio.Event()

    class Hurried:
        """asyncio, but that no second passes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(0)

        def timeout(self, seconds: float | None) -> Any:
            waited.append(seconds)
            if len(waited) == 3:
                enough.set()
            return asyncio.timeout(0)

    def took_long() -> float:
        now[0] += 100.0
        return now[0]

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=took_long))
    monkeypatch.setattr(module, "asyncio", Hurried())
    workers.rows = not_ready()
    workers.free.set()
    readiness = Readiness(
        make_config(datasets={"ward": {"declared_rows": 1, "options": {"file": "rows.csv"}}}), workers
    )
    task = asyncio.create_task(readiness.run())
    async with asyncio.timeout(PATIENCE_S):
        await enough.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert set(waited) == {128.0}


async def test_the_log_says_the_same_thing_once(
    party: Readiness, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    workers.rows = not_ready()
    with caplog.at_level(logging.WARNING):
        await told(party)
        for _ in range(3):
            with pytest.raises(TaskError):
                await asyncio.wait_for(party.require("ward"), PATIENCE_S)
    assert caplog.text.count("not ready for ward") == 1
    assert workers.looks >= 4
