"""The worker pool, with real processes: what a unit is, how it ends, and that nothing is left."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from src.errors import (
    BY_REASON,
    AbandonedError,
    ConfigError,
    DeadlineError,
    InvalidInput,
    LimitError,
    NotFoundError,
    SottoError,
    StateError,
    VersionError,
    WorkerError,
)
from src.jobs.executors import units
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.settings import PoolSettings
from src.storage.blobs import Blobs

ROOT = Path(__file__).parents[2]
SELFTEST = "jobs.executors.selftest"

MakePool = Callable[..., Awaitable[WorkerPool]]


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.fixture
async def make_pool(tmp_path: Path) -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    async def make(
        size: int = 1, handlers: str = SELFTEST, preload: tuple[str, ...] = (), **numbers: Any
    ) -> WorkerPool:
        settings = PoolSettings(**{"size": size, "min_size": size, "max_size": size, "nice": 0, **numbers})
        directories: dict[str, Any] = {"blobs_root": tmp_path / "blobs", "workspace": tmp_path / "work"}
        pool = WorkerPool(settings, handlers=handlers, preload=preload, **directories)
        pools.append(pool)
        await pool.start()
        return pool

    yield make
    for pool in pools:
        await pool.close()


async def _until(condition: Callable[[], bool]) -> None:
    """Waits for a state; the test's own timeout is the limit."""
    while not condition():  # noqa: ASYNC110  what it waits for happens in another process
        await asyncio.sleep(0.005)


def _gone(process: psutil.Process) -> bool:
    """Ended; who reaps it is its new parent's business."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _begin_busy(
    pool: WorkerPool, blobs: Blobs, unit: str = "busy", **settings: Any
) -> asyncio.Task[dict[str, Any]]:
    """A unit that never ends, once it is really computing."""
    name = os.urandom(8).hex()
    task = asyncio.create_task(pool.run(unit, {"blob": name}, **settings))
    await _until(lambda: task.done() or blobs.exists(hashlib.sha256(name.encode()).hexdigest()))
    return task


async def _pid(pool: WorkerPool) -> int:
    return int((await pool.run("describe", {}))["pid"])


async def test_parameters_and_results_are_json_and_large_values_go_by_blobs(make_pool: MakePool, blobs: Blobs) -> None:
    pool = await make_pool()
    value = {"int": 2**80, "float": 0.1, "inf": float("inf"), "text": "ε\n", "list": [1, None, True], "o": {"a": []}}
    assert await pool.run("echo", value) == value
    large = {"text": "x" * 3_000_000}
    assert await pool.run("echo", large) == large
    stored = await pool.run("store", {"text": "a model"})
    assert blobs.read(stored["sha256"]) == b"a model"
    assert pool.stats().tasks_done == 3


async def test_a_worker_is_what_the_design_says(make_pool: MakePool) -> None:
    """No grpc, no database, no descriptor of the role, one thread for arithmetic, lower priority, its own group."""
    pool = await make_pool(nice=7, preload=("encryption.packing",))
    found = await pool.run("describe", {})
    assert found["modules"] == ["numpy"]
    assert found["nice"] == min(19, os.nice(0) + 7)
    assert found["omp_threads"] == "1"
    assert found["pid"] == found["group"] != os.getpgid(0)
    assert found["interrupt_ignored"]
    assert found["main"] is None
    assert found["core_bytes"] == 0
    assert found["workspace"] == []
    kinds = {name.partition(":")[0] for name in found["files"] if not name.startswith("/proc/")}
    assert kinds <= {"socket", "pipe"}
    parent = psutil.Process(found["pid"]).parent()
    assert parent is not None
    assert parent.ppid() == os.getpid()
    assert parent.num_threads() == 1


async def test_every_unit_finds_its_workspace_empty_and_leaves_nothing(make_pool: MakePool) -> None:
    pool = await make_pool()
    used = Path((await pool.run("store", {"text": "private"}))["workspace"])
    assert not used.exists()  # noqa: ASYNC240
    assert (await pool.run("describe", {}))["workspace"] == []


@pytest.mark.parametrize("reason", ["SLOT_OVERFLOW", "BUDGET_EXCEEDED", "WORKER_FAILED", "CONFIG_INVALID"])
async def test_an_error_of_the_catalogue_is_raised_again_as_itself(make_pool: MakePool, reason: str) -> None:
    pool = await make_pool()
    with pytest.raises(SottoError, match=r"^on purpose$") as caught:
        await pool.run("fail", {"reason": reason})
    assert type(caught.value) is BY_REASON[reason]
    assert caught.value.metadata == {"unit": "fail", "index": "3"}
    assert caught.value.private == "for the log"
    stats = pool.stats()
    assert (stats.tasks_failed, stats.tasks_refused) == ((1, 0) if reason == "WORKER_FAILED" else (0, 1))
    assert stats.replaced == 0


@pytest.mark.parametrize("cls", BY_REASON.values())
def test_every_error_survives_its_frame(cls: type[SottoError], blobs: Blobs) -> None:
    more: dict[str, Any] = {}
    if issubclass(cls, InvalidInput):
        more = {"violations": {"slot": "full"}}
    if issubclass(cls, ConfigError):
        more = {"problems": ("a: b",)}
    sent = cls("text", private="log", index=1, **more)

    def raises(params: object, context: object) -> dict[str, Any]:
        raise sent

    context = units.WorkContext(blobs, blobs.root)
    frame = units.execute(units.encode_unit("x", {}, version=1), {"x": raises}, context)
    with pytest.raises(cls) as caught:
        units.decode_reply(frame)
    assert type(caught.value) is cls
    assert vars(caught.value) == vars(sent)


async def test_any_other_exception_shows_its_type_and_place_but_not_its_text(make_pool: MakePool) -> None:
    pool = await make_pool()
    with pytest.raises(WorkerError, match=r"^unit fail failed$") as caught:
        await pool.run("fail", {})
    assert caught.value.private.startswith("ValueError at selftest.py:")
    assert "1,2,3" not in repr(vars(caught.value))
    for name in ("leave", "misbehave"):
        with pytest.raises(WorkerError, match=name):
            await pool.run(name, {})
    assert await pool.run("echo", {"still": "there"}) == {"still": "there"}
    assert pool.stats().replaced == 0


async def test_units_that_cannot_be_run_are_refused(make_pool: MakePool) -> None:
    pool = await make_pool()
    with pytest.raises(NotFoundError, match=r"no unit of work called os\.system"):
        await pool.run("os.system", {})
    with pytest.raises(VersionError, match="has version 2 here, not 1"):
        await pool.run("echo_again", {})
    assert await pool.run("echo_again", {}, version=2) == {"version": 2}
    with pytest.raises(InvalidInput, match="not JSON"):
        await pool.run("echo", {"bytes": b"x"})
    with pytest.raises(LimitError):
        await pool.run("echo", {"text": "x" * (units.MAX_FRAME_BYTES + 1)})


async def test_a_worker_that_dies_fails_its_unit_and_is_replaced(make_pool: MakePool) -> None:
    pool = await make_pool()
    before = await _pid(pool)
    with pytest.raises(WorkerError, match="the worker of unit die died") as caught:
        await pool.run("die", {})
    assert caught.value.private == "exit status -9"
    assert await _pid(pool) != before
    assert pool.stats().replaced == 1


async def test_what_units_keep_lasts_as_long_as_their_worker_and_no_other_has_it(make_pool: MakePool) -> None:
    """Nor the zygote, of which every worker would inherit it."""
    pool = await make_pool()
    assert [(await pool.run("count", {}))["counted"] for _ in range(3)] == [1, 2, 3]
    assert (await pool.run("count", {}, alone=True))["counted"] == 1
    with pytest.raises(WorkerError):
        await pool.run("die", {})
    assert (await pool.run("count", {}))["counted"] == 1


async def test_a_worker_that_dies_while_idle_fails_nobody(make_pool: MakePool) -> None:
    pool = await make_pool()
    before = await _pid(pool)
    os.kill(before, signal.SIGKILL)
    await _until(lambda: pool.stats().replaced == 1)
    assert await _pid(pool) != before
    assert not psutil.pid_exists(before)
    assert pool.stats().tasks_failed == 0


async def test_when_the_zygote_dies_the_pool_starts_over(make_pool: MakePool) -> None:
    pool = await make_pool(size=2)
    pid = await _pid(pool)
    zygote = psutil.Process(pid).parent()
    assert zygote is not None
    zygote.kill()
    for _ in range(3):
        with pytest.raises(WorkerError):
            await pool.run("die", {})
        assert await pool.run("echo", {"n": 1}) == {"n": 1}
    await pool.close()
    assert not psutil.Process().children(recursive=True)


async def test_a_zygote_that_dies_is_replaced_before_anybody_asks_and_takes_its_workers_along(
    make_pool: MakePool, blobs: Blobs
) -> None:
    pool = await make_pool(size=2)
    task = await _begin_busy(pool, blobs)
    before = psutil.Process().children(recursive=True)
    (zygote,) = psutil.Process().children()
    zygote.kill()
    with pytest.raises(WorkerError, match="the worker of unit busy died"):
        await task
    await _until(lambda: pool.stats().idle == 2)
    await _until(lambda: all(_gone(process) for process in before))
    assert not psutil.pid_exists(zygote.pid)
    assert await pool.run("echo", {"n": 1}) == {"n": 1}


async def test_a_unit_over_its_time_is_killed_and_its_worker_replaced(make_pool: MakePool, blobs: Blobs) -> None:
    pool = await make_pool()
    before = await _pid(pool)
    with pytest.raises(DeadlineError, match=r"unit busy did not end within 0\.2 s"):
        await pool.run("busy", {"blob": "x"}, timeout_s=0.2)
    assert await _pid(pool) != before
    assert not psutil.pid_exists(before)


async def test_cancelling_the_caller_kills_the_unit(make_pool: MakePool, blobs: Blobs) -> None:
    pool = await make_pool()
    before = await _pid(pool)
    task = await _begin_busy(pool, blobs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _pid(pool) != before
    assert not psutil.pid_exists(before)


async def test_what_a_unit_started_is_killed_with_it(make_pool: MakePool, blobs: Blobs) -> None:
    pool = await make_pool()
    before = psutil.Process(await _pid(pool))
    task = await _begin_busy(pool, blobs, unit="spawn")
    (child,) = before.children()
    assert os.getpgid(child.pid) == before.pid
    task.cancel()
    await asyncio.wait([task])
    await _until(lambda: not before.is_running())
    await _until(lambda: _gone(child))


async def test_a_stopped_worker_is_killed_when_its_time_is_over(make_pool: MakePool) -> None:
    pool = await make_pool()
    before = await _pid(pool)
    os.kill(before, signal.SIGSTOP)
    with pytest.raises(DeadlineError):
        await pool.run("echo", {}, timeout_s=0.1)
    assert await _pid(pool) != before
    assert not psutil.pid_exists(before)


async def test_a_busy_pool_neither_blocks_the_loop_nor_a_free_worker(make_pool: MakePool, blobs: Blobs) -> None:
    pool = await make_pool(size=2)
    task = await _begin_busy(pool, blobs)
    assert await pool.run("echo", {"n": 1}) == {"n": 1}
    second = await _begin_busy(pool, blobs)
    queued = asyncio.create_task(pool.run("echo", {"n": 2}))
    ticks = 0
    async with asyncio.timeout(10):
        for _ in range(1000):
            await asyncio.sleep(0)
            ticks += 1
    stats = pool.stats()
    assert (ticks, stats.busy, stats.idle, stats.waiting) == (1000, 2, 0, 1)
    assert not queued.done()
    task.cancel()
    assert await queued == {"n": 2}
    second.cancel()
    await asyncio.gather(task, second, return_exceptions=True)


async def test_units_wait_in_the_order_they_came_and_a_cancelled_one_leaves_the_queue(
    make_pool: MakePool, blobs: Blobs
) -> None:
    pool = await make_pool()
    first = await _begin_busy(pool, blobs)
    order: list[int] = []

    async def unit(number: int) -> None:
        await pool.run("echo", {"n": number})
        order.append(number)

    tasks = [asyncio.create_task(unit(number)) for number in range(8)]
    await _until(lambda: pool.stats().waiting == 8)
    tasks[3].cancel()
    first.cancel()
    await asyncio.gather(first, *tasks, return_exceptions=True)
    assert order == [0, 1, 2, 4, 5, 6, 7]
    assert pool.stats().idle == 1


async def test_close_leaves_no_process_and_no_file_and_abandons_what_is_under_way(
    make_pool: MakePool, blobs: Blobs, tmp_path: Path
) -> None:
    pool = await make_pool(size=2)
    processes = psutil.Process().children(recursive=True)
    assert len(processes) == 3
    running = [await _begin_busy(pool, blobs) for _ in range(2)]
    queued = asyncio.create_task(pool.run("echo", {}))
    await _until(lambda: pool.stats().waiting == 1)
    await pool.close()
    assert not any(process.is_running() for process in processes)
    for task in (*running, queued):
        with pytest.raises(AbandonedError):
            await task
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(StateError):
        await pool.run("echo", {})
    await pool.close()


async def test_a_closed_pool_can_be_started_again(make_pool: MakePool) -> None:
    pool = await make_pool()
    with pytest.raises(StateError):
        await pool.start()
    await pool.close()
    await pool.start()
    assert await pool.run("echo", {"n": 1}) == {"n": 1}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
async def test_a_start_that_is_cancelled_leaves_nothing(make_pool: MakePool, steps: int) -> None:
    """At its first steps, and in the middle of the zygote's imports."""
    task: asyncio.Task[WorkerPool] = asyncio.ensure_future(make_pool(size=2))
    for _ in range(steps):
        await asyncio.sleep(0)
    if steps == 8:
        await _until(lambda: len(psutil.Process().children(recursive=True)) > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.Process().children(recursive=True)


async def test_a_start_that_is_closed_meanwhile_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    pool = WorkerPool(PoolSettings(), handlers=SELFTEST, blobs_root=tmp_path, workspace=tmp_path / "work")
    task = asyncio.create_task(pool.start())
    await _until(lambda: len(psutil.Process().children(recursive=True)) > 0)
    await pool.close()
    with pytest.raises(AbandonedError, match="closed while it started"):
        await task
    assert not psutil.Process().children(recursive=True)


async def test_a_close_that_is_cancelled_is_finished_all_the_same(make_pool: MakePool, blobs: Blobs) -> None:
    pool = await make_pool(size=2)
    unit = await _begin_busy(pool, blobs)
    task = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(AbandonedError):
        await unit
    await pool.close()
    assert not psutil.Process().children(recursive=True)


ROLE = """
import asyncio, hashlib, json, sys
from pathlib import Path
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.settings import PoolSettings
from src.storage.blobs import Blobs
print("main runs", file=sys.stderr)
async def main():
    root = Path(sys.argv[1])
    directories = {"blobs_root": root / "blobs", "workspace": root / "work"}
    pool = WorkerPool(PoolSettings(size=2), handlers="jobs.executors.selftest", **directories)
    await pool.start()
    pid = (await pool.run("describe", {}))["pid"]
    busy = asyncio.create_task(pool.run("busy", {"blob": "begun"}))
    while not Blobs(root / "blobs").exists(hashlib.sha256(b"begun").hexdigest()):
        await asyncio.sleep(0.005)
    print(json.dumps(pid), flush=True)
    await asyncio.Event().wait()
if __name__ == "__main__":
    asyncio.run(main())
"""


def test_when_the_role_is_killed_everything_ends_even_a_busy_worker_and_main_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "role.py"
    script.write_text(ROLE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as role:
        assert role.stdout is not None
        assert role.stderr is not None
        json.loads(role.stdout.readline())
        processes = psutil.Process(role.pid).children(recursive=True)
        assert len(processes) == 3
        role.kill()
        while not all(_gone(process) for process in processes):
            time.sleep(0.005)
        assert role.stderr.read() == "main runs\n"


@pytest.mark.parametrize(
    ("handlers", "private"),
    [
        ("jobs.executors.no_such_module", "ModuleNotFoundError"),
        ("jobs.executors.units", "has no table HANDLERS"),
        ("communication.errors", "HANDLERS"),
    ],
)
async def test_a_pool_whose_handlers_cannot_be_loaded_says_why_in_the_log(
    make_pool: MakePool, handlers: str, private: str
) -> None:
    with pytest.raises(WorkerError, match="cannot be started") as caught:
        await make_pool(handlers=handlers)
    assert private in caught.value.private
    assert not psutil.Process().children(recursive=True)


async def test_handlers_that_import_grpc_are_refused(make_pool: MakePool) -> None:
    with pytest.raises(WorkerError) as caught:
        await make_pool(preload=("communication.errors",))
    assert "must not import grpc" in caught.value.private
