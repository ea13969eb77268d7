"""How the worker pool looks after its workers, with real processes: how many, limits, order, health, counts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import AbandonedError, ConfigError, InvalidInput, NotFoundError, UnavailableError, WorkerError
from src.jobs.executors import fleet as fleet_module
from src.jobs.executors import pool as pool_module
from src.jobs.executors import processes
from src.jobs.executors.limits import cores
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.processes import Worker
from src.jobs.executors.settings import PoolSettings
from src.jobs.executors.stats import DURATIONS, OUTCOMES, Outcome, Tally
from src.storage.blobs import Blobs

SELFTEST = "jobs.executors.selftest"
NEVER_S = 10_000.0

MakePool = Callable[..., Awaitable[WorkerPool]]


@pytest.fixture
async def make_pool(tmp_path: Path) -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    async def make(handlers: str = SELFTEST, preload: tuple[str, ...] = (), **numbers: Any) -> WorkerPool:
        quiet = {"nice": 0, "idle_s": NEVER_S, "grow_after_s": NEVER_S, "health_interval_s": NEVER_S}
        given_numbers = PoolSettings(**{**quiet, "size": 1, "min_size": 1, **numbers})
        directories: dict[str, Any] = {"blobs_root": tmp_path / "blobs", "workspace": tmp_path / "work"}
        pool = WorkerPool(given_numbers, handlers=handlers, preload=preload, **directories)
        pools.append(pool)
        await pool.start()
        return pool

    yield make
    for pool in pools:
        await pool.close()
    assert not psutil.Process().children(recursive=True), "a process is left"


@pytest.fixture
def begin_busy(tmp_path: Path) -> Callable[..., Awaitable[asyncio.Task[dict[str, Any]]]]:
    """Starts a unit that never ends, and returns once it is really computing."""
    blobs = Blobs(tmp_path / "blobs")

    async def begin(pool: WorkerPool, **arguments: Any) -> asyncio.Task[dict[str, Any]]:
        name = os.urandom(8).hex()
        task = asyncio.create_task(pool.run("busy", {"blob": name}, **arguments))
        await _until(lambda: task.done() or blobs.exists(hashlib.sha256(name.encode()).hexdigest()))
        return task

    return begin


async def _until(condition: Callable[[], bool]) -> None:
    """Waits for a state; the test's own timeout is the limit."""
    while not condition():  # noqa: ASYNC110  what it waits for happens in another process
        await asyncio.sleep(0.005)


async def _pid(pool: WorkerPool, **arguments: Any) -> int:
    return int((await pool.run("describe", {}, **arguments))["pid"])


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_defaults_are_within_their_ranges_and_the_documented_ones() -> None:
    numbers = PoolSettings()
    assert (numbers.min_size, numbers.size, numbers.max_size) == (1, 3, 6)
    assert (numbers.nice, numbers.recycle_after, numbers.idle_s, numbers.grow_after_s) == (10, 200, 60, 0.5)
    assert (numbers.health_interval_s, numbers.health_timeout_s) == (30, 10)
    assert (numbers.memory_limit_mb, numbers.cpu_limit_s) == (8192, 3600)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"size": 0, "min_size": 0}, ["size", "min_size"]),
        ({"size": 257, "max_size": 257}, ["size", "max_size"]),
        ({"min_size": 4}, ["size"]),
        ({"max_size": 2}, ["size"]),
        ({"size": 2.0}, ["size"]),
        ({"size": True}, ["size"]),
        ({"nice": -1}, ["nice"]),
        ({"nice": 20}, ["nice"]),
        ({"recycle_after": 0}, ["recycle_after"]),
        ({"idle_s": -0.1}, ["idle_s"]),
        ({"grow_after_s": float("nan")}, ["grow_after_s"]),
        ({"health_interval_s": 0}, ["health_interval_s"]),
        ({"health_timeout_s": float("inf")}, ["health_timeout_s"]),
        ({"memory_limit_mb": 1}, ["memory_limit_mb"]),
        ({"cpu_limit_s": 0}, ["cpu_limit_s"]),
        ({"size": None}, ["size"]),
    ],
)
def test_numbers_that_make_no_sense_are_refused_all_at_once(numbers: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolSettings(**numbers)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == named


# --------------------------------------------------------------------------------------------------- growing, shrinking


async def test_a_unit_that_waits_long_enough_gets_another_worker_up_to_the_largest_size(
    make_pool: MakePool, begin_busy: Any
) -> None:
    pool = await make_pool(max_size=3, grow_after_s=0.05)
    busy = [await begin_busy(pool) for _ in range(3)]
    waiting = asyncio.create_task(pool.run("echo", {}))
    await _until(lambda: pool.stats().waiting == 1)
    stats = pool.stats()
    assert (stats.size, stats.busy, stats.grown, stats.started) == (3, 3, 2, 3)
    busy.pop().cancel()
    assert await waiting == {}
    assert pool.stats().size <= 3
    await _end(*busy)


async def test_a_unit_that_has_not_waited_long_enough_gets_none(make_pool: MakePool, begin_busy: Any) -> None:
    pool = await make_pool(max_size=3, grow_after_s=NEVER_S)
    busy = await begin_busy(pool)
    waiting = asyncio.create_task(pool.run("echo", {}))
    await _until(lambda: pool.stats().waiting == 1)
    assert pool.cores_for_a_unit() == max(1, cores() // 3)
    assert (pool.stats().size, pool.stats().grown) == (1, 0)
    await _end(busy)
    assert await waiting == {}


async def test_workers_with_nothing_to_do_end_down_to_the_smallest_size_and_come_back_at_once(
    make_pool: MakePool, begin_busy: Any
) -> None:
    """Up to `size`, no unit waits for `grow_after_s`."""
    pool = await make_pool(size=3, idle_s=0.05)
    await _until(lambda: pool.stats().size == 1)
    await _until(lambda: len(psutil.Process().children(recursive=True)) == 2)
    assert pool.stats().shrunk == 2
    busy = [await begin_busy(pool) for _ in range(3)]
    stats = pool.stats()
    assert (stats.busy, stats.grown, stats.replaced, stats.tasks_failed) == (3, 2, 0, 0)
    await _end(*busy)


async def test_the_worker_that_was_used_last_is_used_next_so_that_the_others_can_end(make_pool: MakePool) -> None:
    pool = await make_pool(size=3)
    assert len({await _pid(pool) for _ in range(10)}) == 1


async def test_a_worker_is_replaced_after_its_share_of_units_and_nobody_fails(make_pool: MakePool) -> None:
    pool = await make_pool(recycle_after=3)
    pids = [await _pid(pool) for _ in range(9)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]
    await _until(lambda: pool.stats().idle == 1)
    stats = pool.stats()
    assert (stats.recycled, stats.replaced, stats.tasks_done, stats.tasks_failed) == (3, 0, 9, 0)
    assert not any(psutil.pid_exists(pid) for pid in pids)


# --------------------------------------------------------------------------------------------------------------- health


async def test_an_idle_worker_that_does_not_answer_is_killed_and_replaced(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = await make_pool(size=2, health_interval_s=0.05, health_timeout_s=2.0)
    stopped = await _pid(pool)
    os.kill(stopped, signal.SIGSTOP)
    await _until(lambda: pool.stats().replaced >= 1)  # the other, too, if this machine is that busy
    await _until(lambda: not psutil.pid_exists(stopped))
    assert f"worker {stopped} does not answer" in caplog.text
    assert await pool.run("echo", {"n": 1}) == {"n": 1}
    assert pool.stats().tasks_failed == 0


async def test_workers_that_answer_stay_and_still_end_when_nobody_needs_them(make_pool: MakePool) -> None:
    """Being asked for a sign of life is not work."""
    pool = await make_pool(size=2, health_interval_s=0.02, health_timeout_s=10, idle_s=0.3)
    await _until(lambda: pool.stats().size == 1)
    stats = pool.stats()
    assert (stats.replaced, stats.shrunk, stats.started) == (0, 1, 2)


async def test_a_zygote_that_does_not_answer_is_replaced(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = await make_pool()
    monkeypatch.setattr(processes.Zygote.ask, "__kwdefaults__", {"timeout_s": 0.5})
    (zygote,) = psutil.Process().children()
    zygote.suspend()
    with pytest.raises(WorkerError):
        await pool.run("die", {})
    monkeypatch.undo()
    assert await pool.run("echo", {"n": 1}) == {"n": 1}
    assert not psutil.pid_exists(zygote.pid)


async def test_a_worker_that_cannot_be_started_fails_whoever_waits_for_it_and_the_next_attempt_may_succeed(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await make_pool()

    def full() -> tuple[Any, Any]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socketpair", full)
    with pytest.raises(WorkerError, match="died"):
        await pool.run("die", {})
    with pytest.raises(WorkerError, match="cannot be started") as caught:
        await pool.run("echo", {})
    assert "too many open files" in caught.value.private
    monkeypatch.undo()
    assert await pool.run("echo", {"n": 1}) == {"n": 1}


async def test_whatever_goes_wrong_while_a_worker_is_started_nobody_waits_for_ever(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what nobody thought of; and the next attempt may succeed."""
    pool = await make_pool()

    async def mistake(*_: Any) -> Any:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(Worker, "start", mistake)
    with pytest.raises(WorkerError, match="died"):
        await pool.run("die", {})
    async with asyncio.timeout(60):
        with pytest.raises(WorkerError, match="cannot be started"):
            await pool.run("echo", {})
    monkeypatch.undo()
    assert await pool.run("echo", {"n": 1}) == {"n": 1}


async def test_looking_after_the_workers_outlives_its_own_mistakes(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what adds workers, and what asks whether they live: without it a pool looks well and is dead."""
    pool = await make_pool(health_interval_s=0.05, health_timeout_s=2.0)
    monkeypatch.setattr(fleet_module, "_RETRY_S", 0.01)
    seen = []

    def mistake(now_s: float) -> float | None:
        seen.append(now_s)
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(pool._fleet, "_chore", mistake)
    pool._fleet.nudge()
    await _until(lambda: len(seen) > 3)
    monkeypatch.undo()
    pid = await _pid(pool)
    os.kill(pid, signal.SIGSTOP)
    await _until(lambda: not psutil.pid_exists(pid))  # it was asked, did not answer, and was replaced
    assert await pool.run("echo", {"n": 1}) == {"n": 1}


# --------------------------------------------------------------------------------------------------------------- limits


async def test_a_unit_over_its_cpu_time_is_killed_and_says_so(make_pool: MakePool) -> None:
    pool = await make_pool(cpu_limit_s=0.1)
    before = await _pid(pool)
    with pytest.raises(WorkerError, match=r"unit busy used more CPU time than its limit of 0\.1 s") as caught:
        await pool.run("busy", {"blob": "x"})
    assert caught.value.private == f"exit status -{int(signal.SIGXCPU)}"
    assert await _pid(pool) != before
    assert (pool.stats().tasks_failed, pool.stats().replaced) == (1, 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits private memory")
async def test_a_unit_over_its_memory_fails_and_says_so_and_its_worker_is_replaced(make_pool: MakePool) -> None:
    pool = await make_pool(memory_limit_mb=512)
    before = await _pid(pool)
    assert await pool.run("allocate", {"mb": 100}) == {"bytes": 100 << 20}
    with pytest.raises(WorkerError, match=r"^unit allocate got no more memory; a worker may have 512 MiB$"):
        await pool.run("allocate", {"mb": 600})
    assert await _pid(pool) != before
    assert (pool.stats().tasks_failed, pool.stats().replaced) == (1, 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits private memory")
async def test_a_memory_limit_below_what_the_imports_take_is_refused_at_the_start(make_pool: MakePool) -> None:
    with pytest.raises(WorkerError, match="cannot be started") as caught:
        await make_pool(memory_limit_mb=16, preload=("numpy",))
    assert "memory_limit_mb: 16 is too little: the imports alone take" in caught.value.private


async def test_without_limits_there_are_none(make_pool: MakePool) -> None:
    pool = await make_pool(memory_limit_mb=None, cpu_limit_s=None)
    assert await pool.run("allocate", {"mb": 100}) == {"bytes": 100 << 20}


# ---------------------------------------------------------------------------------------------------------------- order


async def test_an_urgent_unit_goes_before_those_that_wait(make_pool: MakePool, begin_busy: Any) -> None:
    pool = await make_pool(max_size=1)
    first = await begin_busy(pool)
    order: list[str] = []

    async def unit(name: str, urgent: bool) -> None:
        await pool.run("echo", {}, urgent=urgent)
        order.append(name)

    plan = [("a", False), ("b", False), ("c", True), ("d", True), ("e", False)]
    tasks = [asyncio.create_task(unit(*each)) for each in plan]
    await _until(lambda: pool.stats().waiting == len(plan))
    await _end(first)
    await asyncio.gather(*tasks)
    assert order == ["c", "d", "a", "b", "e"]


async def test_an_urgent_unit_gets_a_worker_at_once_where_one_may_be(make_pool: MakePool, begin_busy: Any) -> None:
    pool = await make_pool(max_size=2, grow_after_s=NEVER_S)
    first = await begin_busy(pool)
    patient = asyncio.create_task(pool.run("echo", {"n": 1}))
    await _until(lambda: pool.stats().waiting == 1)
    assert await pool.run("echo", {"n": 2}, urgent=True) == {"n": 2}
    assert pool.stats().grown == 1
    assert await patient == {"n": 1}
    await _end(first)


async def test_the_cores_are_shared_among_the_units_that_there_are(
    make_pool: MakePool, begin_busy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "cores", lambda: 12)
    pool = await make_pool(size=2, max_size=2)
    assert pool.cores_for_a_unit() == 12
    first = await begin_busy(pool)
    assert pool.cores_for_a_unit() == 6
    second = await begin_busy(pool)
    assert pool.cores_for_a_unit() == 6  # a third would wait for one of them
    await _end(first, second)
    monkeypatch.setattr(pool_module, "cores", lambda: 1)
    assert pool.cores_for_a_unit() == 1


# ------------------------------------------------------------------------------------------------------------- draining


async def test_a_pool_that_is_drained_finishes_what_it_has_and_takes_no_more(
    make_pool: MakePool, begin_busy: Any
) -> None:
    pool = await make_pool(max_size=1)
    first = await begin_busy(pool)
    waiting = asyncio.create_task(pool.run("echo", {"n": 1}))
    await _until(lambda: pool.stats().waiting == 1)
    assert not await pool.drain(0.01)
    with pytest.raises(UnavailableError, match="being stopped"):
        await pool.run("echo", {})
    draining = asyncio.create_task(pool.drain(60))
    await _end(first)
    assert await draining
    assert waiting.result() == {"n": 1}
    await pool.close()
    await pool.start()
    assert await pool.run("echo", {}) == {}


async def test_draining_a_pool_that_has_nothing_to_do_takes_no_time(make_pool: MakePool) -> None:
    pool = await make_pool()
    assert await pool.drain(0)


# --------------------------------------------------------------------------------------------------------------- counts


async def test_every_way_to_end_is_counted_as_what_it_is(make_pool: MakePool, begin_busy: Any) -> None:
    pool = await make_pool(max_size=1)
    for _ in range(3):
        await pool.run("echo", {})
    with pytest.raises(InvalidInput):
        await pool.run("fail", {"reason": "INVALID_INPUT"})
    with pytest.raises(NotFoundError):
        await pool.run("unheard", {})
    for name in ("fail", "die"):
        with pytest.raises(WorkerError):
            await pool.run(name, {})
    await _end(await begin_busy(pool))
    abandoned = await begin_busy(pool)
    await pool.close()
    with pytest.raises(AbandonedError):
        await abandoned
    stats = pool.stats()
    assert (stats.tasks_done, stats.tasks_refused, stats.tasks_failed, stats.tasks_cancelled) == (3, 2, 2, 2)
    assert stats.failure_rate == pytest.approx(2 / 7)
    assert (stats.size, stats.busy, stats.idle, stats.waiting, stats.replaced) == (0, 0, 0, 0, 2)
    units = {unit.name: unit for unit in stats.units}
    assert list(units) == ["busy", "die", "echo", "fail", "unheard"]
    assert (units["fail"].refused, units["fail"].failed, units["busy"].cancelled, units["echo"].done) == (1, 1, 2, 3)
    assert 0 < units["echo"].p50_s <= units["echo"].p95_s <= units["echo"].longest_s
    assert units["busy"].mean_s == units["busy"].longest_s == 0


@settings(deadline=None, max_examples=30)
@given(durations=st.lists(st.floats(0, 1e6), min_size=1, max_size=2 * DURATIONS))
def test_durations_are_of_the_latest_units_and_percentiles_bound_their_share(durations: list[float]) -> None:
    tally = Tally()
    for duration_s in durations:
        tally.record("fold", Outcome.DONE, duration_s)
    (unit,) = tally.units()
    latest = durations[-DURATIONS:]
    assert unit.done == len(durations)
    assert unit.longest_s == max(latest)
    assert unit.mean_s == pytest.approx(sum(latest) / len(latest))
    for percent, value in ((50, unit.p50_s), (95, unit.p95_s)):
        assert value in latest
        assert sum(each <= value for each in latest) * 100 >= percent * len(latest)
        assert sum(each < value for each in latest) * 100 < percent * len(latest)


def test_the_failure_rate_is_of_the_latest_units_and_a_cancelled_one_is_no_failure() -> None:
    tally = Tally()
    assert tally.failure_rate == 0
    for _ in range(OUTCOMES):
        tally.record("fold", Outcome.FAILED)
    tally.record("fold", Outcome.CANCELLED)
    assert tally.failure_rate == 1
    for _ in range(OUTCOMES // 4):
        tally.record("fold", Outcome.REFUSED)
    assert tally.failure_rate == pytest.approx(0.75)


async def test_the_log_has_a_line_of_the_state_after_work_and_at_the_end_and_none_of_the_content(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "sotto.jobs.pool")
    pool = await make_pool()
    await pool.run("echo", {"secret": "row"})
    assert caplog.messages == []  # not before its time
    monkeypatch.setattr(pool_module, "_REPORT_S", 0.0)
    await pool.run("echo", {"secret": "row"})
    await _until(lambda: any("2 done" in message for message in caplog.messages))
    before = len(caplog.messages)
    await pool.close()
    assert len(caplog.messages) == before + 1
    assert caplog.messages[-1].startswith("1 workers (1 to 6): 0 busy, 0 units waiting; units: 2 done, 0 refused")
    assert "secret" not in caplog.text


# ---------------------------------------------------------------------------------------------------- all of it at once


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_is_cancelled_killed_or_over_its_time_nothing_leaks(make_pool: MakePool, seed: int) -> None:
    """Random units, cancelled after random numbers of steps, while workers are killed."""
    chance = random.Random(seed)
    descriptors = psutil.Process().num_fds()
    pool = await make_pool(size=2, max_size=4, grow_after_s=0.01, idle_s=0.05, recycle_after=5, health_interval_s=0.02)
    outcomes = []
    for _ in range(6):
        tasks = []
        for number in range(12):
            name = chance.choice(["echo", "fail", "die", "busy"])
            limit_s = 0.05 if name == "busy" else None
            unit = pool.run(
                name, {"blob": str(number)} if name == "busy" else {}, timeout_s=limit_s, urgent=chance.random() < 0.2
            )
            tasks.append(asyncio.create_task(unit))
        for task in tasks:
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                task.cancel()
        with contextlib.suppress(psutil.NoSuchProcess):  # it may just have ended
            workers = [worker for zygote in psutil.Process().children() for worker in zygote.children()]
            if workers:
                chance.choice(workers).kill()
        outcomes += await asyncio.gather(*tasks, return_exceptions=True)
    await _until(lambda: pool.stats().busy == 0 and pool.stats().size == 1)
    assert await pool.run("echo", {"n": 1}) == {"n": 1}
    stats = asdict(pool.stats())
    assert stats["waiting"] == 0
    ended = stats["tasks_done"] + stats["tasks_failed"] + stats["tasks_cancelled"]
    never_begun = sum(isinstance(each, asyncio.CancelledError) for each in outcomes) - stats["tasks_cancelled"]
    assert ended + never_begun == len(outcomes) + 1
    await _until(lambda: len(psutil.Process().children(recursive=True)) == 2)  # a zygote and a worker, no zombie
    await pool.close()
    assert psutil.Process().num_fds() == descriptors
