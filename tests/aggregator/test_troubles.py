"""What fails for a while stops nothing else, is said once, and is over when it is over: a full disk, one job's bug."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from src.aggregator.troubles import MOST_KNOWN, Troubles
from src.errors import StateError, StorageError, StorageFullError
from src.jobs.states import JobState
from tests.aggregator.played import LEASE_S, Place


@contextlib.contextmanager
def full(place: Place, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> Iterator[None]:
    """Nothing can be written or read for a while."""
    with monkeypatch.context() as broken:

        async def fails(_: Any) -> None:
            raise error()

        broken.setattr(place.database, "run", fails)
        yield


@pytest.mark.parametrize("work", ["training", "evaluation"])
async def test_a_disk_that_is_full_for_longer_than_a_lease_costs_no_job_and_two_lines(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, work: str
) -> None:
    job_id = await place.submit(*([place.training()] if work == "training" else []))
    with full(place, monkeypatch, lambda: StorageFullError("the database failed: database or disk is full")):
        for _ in range(20):
            await place.turn(after_s=LEASE_S)
    lines = [record.getMessage() for record in caplog.records if "disk is full" in record.getMessage()]
    assert len(lines) == len(set(lines))  # each thing that is in the way is said once
    assert len(lines) <= 5
    await place.turn(after_s=1)
    assert await place.state(job_id) is (JobState.RUNNING if work == "training" else JobState.SUCCEEDED)


async def test_a_job_that_runs_while_the_disk_is_full_goes_on_when_it_is_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await place.submit(place.training(round_timeout_s=1000 * LEASE_S))
    await place.turn()
    lease = place.coordinator._held._lease(job_id)

    async def fails(*_: Any, **__: Any) -> None:
        raise StorageFullError("a blob cannot be stored: No space left on device")

    with monkeypatch.context() as broken:  # reading goes well, and whatever the job would write does not
        broken.setattr(place.coordinator.trainings, "advance", fails)
        for _ in range(5):
            await place.turn(after_s=LEASE_S)
        assert await place.state(job_id) is JobState.RUNNING
    await place.turn(after_s=1)
    assert await place.state(job_id) is JobState.RUNNING
    assert place.coordinator._held._lease(job_id).expires_at > lease.expires_at


async def test_a_unit_that_finds_the_disk_full_is_tried_again_and_the_job_succeeds(place: Place) -> None:
    place.work.failures["evaluation"] = [StorageFullError("a blob cannot be stored: No space left on device")]
    job_id = await place.submit()
    await place.turn()
    for _ in range(3):
        await place.turn(after_s=100)
    assert await place.state(job_id) is JobState.SUCCEEDED
    assert place.work.asked["evaluation"] == 2


PARTS = ("_start_jobs", "_expire", "_take_up_lapsed", "_offer")


@pytest.mark.parametrize("part", PARTS)
async def test_one_part_of_a_turn_that_fails_keeps_no_other_from_its_work(
    place: Place, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    job_id = await place.submit()

    async def fails(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    if part == "_start_jobs":  # then it has to be started already
        place.work.hanging.add("evaluation")
        await place.turn()
        place.work.hanging.clear()
    monkeypatch.setattr(place.coordinator, part, fails)
    place.work.let_go.set()
    await place.turn(after_s=1)
    await place.turn(after_s=1)
    assert await place.state(job_id) is JobState.SUCCEEDED


async def test_an_overdue_job_that_cannot_be_ended_keeps_no_other_from_its_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.work.hanging.add("evaluation")
    jobs = [await place.submit(timeout_s=10) for _ in range(2)]
    await place.turn()
    happen = place.coordinator._held.happen

    async def fails(job_id: str, event: Any) -> Any:
        if job_id == jobs[0]:
            raise StateError("not this one")
        return await happen(job_id, event)

    monkeypatch.setattr(place.coordinator._held, "happen", fails)
    await place.turn(after_s=LEASE_S / 2)
    assert [await place.state(job_id) for job_id in jobs] == [JobState.RUNNING, JobState.FAILED]


async def test_the_loop_outlives_whatever_a_turn_raises(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = asyncio.Event()
    turns = []

    async def fails(*_: Any) -> None:
        turns.append(1)
        if len(turns) == 3:
            turned.set()
        place.coordinator.wake()
        raise (StorageError("no"), RuntimeError("no"), AssertionError("no"))[len(turns) % 3]

    monkeypatch.setattr(place.coordinator, "_start_jobs", fails)
    task = asyncio.create_task(place.coordinator.run())
    async with asyncio.timeout(30):
        await turned.wait()
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_trouble_is_said_when_it_comes_when_it_changes_and_when_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sotto.aggregator")
    troubles = Troubles()
    for _ in range(50):
        troubles.note("moving jobs", StorageFullError("full"))
    for _ in range(50):
        troubles.note("moving jobs", RuntimeError("another"))
    troubles.over("moving jobs")
    troubles.over("moving jobs")
    troubles.over("what went well all the time")
    assert [record.getMessage() for record in caplog.records] == [
        "moving jobs does not get on, and is tried again: STORAGE_FULL: full",
        "moving jobs does not get on, and is tried again: RuntimeError('another')",
        "moving jobs gets on again",
    ]
    for number in range(10 * MOST_KNOWN):
        troubles.note(f"job {number}", RuntimeError("x"))
    assert len(troubles._known) == MOST_KNOWN


def test_what_comes_and_goes_is_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """Room on a full disk that something else uses up again: it filled the disk with tracebacks."""
    caplog.set_level("INFO", logger="sotto.aggregator")
    troubles = Troubles()
    now = [0.0]
    troubles._seldom._clock = lambda: now[0]
    for _ in range(120):
        for error in (StorageFullError("full"), StorageError("disk I/O error")):
            troubles.note("moving jobs", error)
            troubles.over("moving jobs")
        now[0] += 1
    failed = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(failed) == 4
    assert "(and 59 times since the last line)" in failed[-1].getMessage()
    assert len([record for record in failed if record.exc_info]) == 1
    assert len(caplog.records) <= 8
