"""What runs beside the coordinator's loop."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from src.aggregator.tasks import Key, Tasks
from src.errors import StorageFullError


class Work:
    """Counts how often it was begun and cancelled; ends when it is let go."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.woken = 0
        self.let_go = asyncio.Event()
        self.tasks = Tasks(self.wake)

    def wake(self) -> None:
        self.woken += 1

    async def __call__(self) -> None:
        self.begun += 1
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


KEY: Key = ("j", 1, "fold")


async def test_the_same_work_runs_once_at_a_time_and_again_once_it_has_ended() -> None:
    work = Work()
    for _ in range(3):
        work.tasks.spawn(KEY, work)
        await asyncio.sleep(0)
    assert work.begun == 1
    work.let_go.set()
    assert await work.tasks.drain(30)
    assert work.woken == 1
    work.tasks.spawn(KEY, work)
    assert await work.tasks.drain(30)
    assert work.begun == 2


async def test_work_that_fails_wakes_the_loop_and_may_begin_again(caplog: pytest.LogCaptureFixture) -> None:
    work = Work()

    async def fails() -> None:
        raise RuntimeError("no")

    work.tasks.spawn(KEY, fails)
    assert await work.tasks.drain(30)
    assert (work.woken, [record.levelname for record in caplog.records]) == (1, ["ERROR"])
    work.tasks.spawn(KEY, work)
    await asyncio.sleep(0)
    assert work.begun == 1
    await work.tasks.stop()


@pytest.mark.parametrize(
    ("arguments", "cancelled"), [(("j",), 3), (("j", 1), 2), (("j", 2), 1), (("other",), 1), (("none",), 0)]
)
async def test_cancelling_ends_a_jobs_work_or_that_of_one_round_and_waits_for_its_end(
    arguments: tuple[Any, ...], cancelled: int
) -> None:
    work = Work()
    for key in (KEY, ("j", 1, "plan"), ("j", 2, "plan"), ("other", 1, "plan")):
        work.tasks.spawn(key, work)
    await asyncio.sleep(0)
    await work.tasks.cancel(*arguments)
    assert work.cancelled == cancelled
    await work.tasks.stop()
    assert work.cancelled == 4


async def test_draining_waits_as_long_as_it_may_and_says_whether_that_was_enough() -> None:
    work = Work()
    assert await work.tasks.drain(0)
    work.tasks.spawn(KEY, work)
    assert not await work.tasks.drain(0)
    work.let_go.set()
    assert await work.tasks.drain(30)
    assert (work.begun, work.cancelled) == (1, 0)


async def test_work_that_is_cancelled_before_it_began_can_begin_later() -> None:
    work = Work()
    work.tasks.spawn(KEY, work)
    await work.tasks.cancel("j")
    work.let_go.set()
    work.tasks.spawn(KEY, work)
    assert await work.tasks.drain(30)
    assert work.begun == 1


async def test_work_that_goes_on_failing_is_begun_less_and_less_often_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While a disk is full, what it computes would be computed for nothing."""
    now, work = 100.0, Work()
    work.tasks = Tasks(work.wake, clock=lambda: now)
    tries: list[float] = []

    async def fails() -> None:
        tries.append(now)
        raise StorageFullError("the disk is full")

    for _ in range(200):  # turns of the loop, two a second: it is woken by every failure
        work.tasks.spawn(KEY, fails)
        assert await work.tasks.drain(30)
        now += 0.5
    assert [b - a for a, b in pairwise(tries)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert len(caplog.records) == 1
    assert "fold of round 1 of job j does not get on" in caplog.text

    now += 30
    work.let_go.set()
    work.tasks.spawn(KEY, work)
    assert await work.tasks.drain(30)
    assert work.begun == 1
    work.tasks.spawn(KEY, work)
    assert await work.tasks.drain(30)
    assert work.begun == 2


async def test_what_is_cancelled_has_not_failed() -> None:
    work = Work()

    async def fails() -> None:
        raise RuntimeError("no")

    for _ in range(3):
        work.tasks.spawn(KEY, fails)
        assert await work.tasks.drain(30)
    work.tasks.spawn(KEY, work)
    await asyncio.sleep(0)
    assert work.begun == 0
    await work.tasks.cancel("j")
    work.let_go.set()
    work.tasks.spawn(KEY, work)
    assert await work.tasks.drain(30)
    assert work.begun == 1
