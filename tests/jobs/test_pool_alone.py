"""A unit that is computed alone: in a worker that has computed nothing before and computes nothing after."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from src import confinement
from src.errors import AbandonedError, DeadlineError, NotFoundError, WorkerError
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.settings import PoolSettings

LANDLOCK = pytest.mark.skipif(not confinement.version(), reason="this kernel has no Landlock")


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """Of one worker, which is used from the start."""
    settings = PoolSettings(size=1, min_size=1, max_size=1, nice=0)
    pool = WorkerPool(
        settings, handlers="jobs.executors.selftest", blobs_root=tmp_path / "blobs", workspace=tmp_path / "work"
    )
    await pool.start()
    yield pool
    await pool.close()


@LANDLOCK
async def test_a_worker_that_confined_itself_computes_nothing_else(pool: WorkerPool, tmp_path: Path) -> None:
    private = tmp_path / "rows.csv"
    private.write_text("31337")
    usual = (await pool.run("describe", {}))["pid"]
    files = {"files": [str(private), confinement.__file__]}
    for _ in range(2):
        told = await pool.run("withdraw", files, alone=True)
        assert (told["confined"], told["untouched"]) == (True, True)
        assert told["readable"] == [confinement.__file__]
        assert told["pid"] != usual
        assert not psutil.pid_exists(told["pid"]) or psutil.Process(told["pid"]).ppid() != usual
    assert (await pool.run("describe", {}))["pid"] == usual
    await pool.close()
    assert [path.name for path in (tmp_path / "work").iterdir()] == []


@LANDLOCK
async def test_a_worker_of_the_others_that_confines_itself_computes_nothing_else_either(pool: WorkerPool) -> None:
    first = (await pool.run("withdraw", {"files": []}))["pid"]
    with contextlib.suppress(WorkerError):  # the next unit may be on its way to it when it ends
        await pool.run("describe", {})
    assert (await pool.run("describe", {}))["pid"] != first


async def test_it_takes_the_place_of_no_other_and_counts_as_none(pool: WorkerPool) -> None:
    busy = asyncio.create_task(pool.run("busy", {"blob": "begun"}))
    assert await pool.run("echo", {"n": 1}, alone=True) == {"n": 1}
    assert (pool.stats().size, pool.stats().replaced, pool.stats().recycled) == (1, 0, 0)
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)


HOW: dict[str, Callable[[WorkerPool], Awaitable[object]]] = {
    "it dies": lambda pool: pool.run("die", {}, alone=True),
    "it takes too long": lambda pool: pool.run("busy", {"blob": "x"}, alone=True, timeout_s=0.05),
    "it fails": lambda pool: pool.run("fail", {"reason": "NOT_FOUND"}, alone=True),
}


@pytest.mark.parametrize("how", HOW)
async def test_however_it_ends_its_process_is_gone_and_the_next_one_is_another(pool: WorkerPool, how: str) -> None:
    usual = (await pool.run("describe", {}))["pid"]
    with pytest.raises((WorkerError, DeadlineError, NotFoundError)):
        await HOW[how](pool)
    assert (await pool.run("describe", {}, alone=True))["pid"] != usual
    assert (await pool.run("describe", {}))["pid"] == usual
    assert pool.stats().size == 1


async def test_who_waits_for_one_hears_that_the_pool_was_closed(pool: WorkerPool) -> None:
    first = asyncio.create_task(pool.run("busy", {"blob": "x"}, alone=True))
    await asyncio.sleep(0)
    second = asyncio.create_task(pool.run("echo", {}, alone=True))
    await asyncio.sleep(0)
    await pool.close()
    assert [type(each) for each in await asyncio.gather(first, second, return_exceptions=True)] == [AbandonedError] * 2
