"""Durable jobs: what a scientist waits for while the aggregator is busy, and what warm workers are worth.

A real aggregator in a process of its own (jobs_server.py) is asked over mutual TLS by a client in another process
(jobs_client.py). "Busy" means: as many sums as the pool may have workers are computed, and as many wait; each sum is
the unit "fold" over two batches of a million parameters, encrypted with 3072 bits.

- submit_busy_median_ms: `CreateJob` of a federated training with a specification that is new to the aggregator, with
  up to 100 others waiting; `submit_busy_first_ms` is the first one, whose privacy parameters are new as well.
- status_busy_p99_ms: `GetStatus`.
- list_1000_jobs_ms: `ListJobs`, a page of 1000 with 100 that wait, until it is parsed; `…_first_ms` is the first one of
  a process, before any job is known as a message.
- watchers_200_missing_or_double: of the events of one job that 200 streams of one client saw while they happened, a
  quarter of the streams being cut and coming back. The job is played: 300 events, written by the store and told by
  the service as all events are, as quickly as that goes.
- first_task_cold_vs_warm: the unit "initial_model" (torch builds a model) by a process that is started for it, over the
  same as the first unit of a pool that has just started.
- throughput_1, throughput_3: units "fold" a second with one and three workers, on `throughput_cores` cores.
- cli_list_ms: `sotto jobs list` as a command, from its start to its end, with 50 jobs.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

from src.jobs.executors.limits import cores
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.settings import PoolSettings
from src.jobs.executors.units import decode_reply, encode_unit

from .jobs_kit import Load, environment, make_kit, make_load, serving
from .measure import REPEATS, Figures, say

ROOT: Final = Path(__file__).resolve().parent.parent
SUBMISSIONS: Final = 32
"""In each of `REPEATS` runs: together nearly as many as `limits.max_jobs_pending` lets wait."""
STATUS_CALLS: Final = 300
PAGES: Final = 11
JOBS: Final = 1000
WAITING: Final = 100
"""Of them, which is what `limits.max_jobs_pending` allows by default."""
WATCHERS: Final = 200
EVENTS: Final = 300
CLI_JOBS: Final = 50
CLI_RUNS: Final = 10
COLD_RUNS: Final = 3
POOL_SIZES: Final = (1, 3)
THROUGHPUT_S: Final = 5.0

REACH: Final[dict[str, tuple[str, float]]] = {
    "submit_busy_median_ms": ("<", 20),
    "list_1000_jobs_ms": ("<", 50),
    "watchers_200_missing_or_double": ("≤", 0),
    "status_busy_p99_ms": ("<", 100),
    "first_task_cold_vs_warm": ("≥", 5),
    "cli_list_ms": ("<", 500),
}


QUIET_PERCENT: Final = 25.0
"""Of all cores: a machine that does more by itself slows down what it is asked for."""


def run() -> Figures:
    """Everything; two minutes on two free cores. Of each median and percentile the best of `REPEATS` runs counts."""
    figures: Figures = {}
    if (used := psutil.cpu_percent(interval=1.0)) > QUIET_PERCENT:
        say(f"times are disturbed: {used:.0f} % of the cores are in use by others")
    with tempfile.TemporaryDirectory(prefix="sotto-bench-") as name:
        folder = Path(name)
        say("key and kits")
        kit = make_kit(folder / "kits")
        say("encrypted batches")
        load = make_load(kit, folder / "batches")
        steps: list[tuple[str, Callable[[], Figures]]] = [
            ("while all workers sum", lambda: busy(kit, folder / "busy", load)),
            ("a page of jobs", lambda: listing(kit, folder / "listing")),
            ("watchers", lambda: watching(kit, folder / "watching")),
            ("the command line", lambda: command_line(kit, folder / "cli")),
            ("cold and warm workers", lambda: first_task(folder)),
            ("throughput", lambda: throughput(folder, load)),
        ]
        for text, step in steps:
            say(text)
            figures |= step()
    return figures


def busy(kit: Path, folder: Path, load: Load) -> Figures:
    """Submitting and asking while every worker of the pool computes."""
    with serving(kit, folder, load) as server:
        workers = server.tell("saturate")["workers"]
        (first,) = server.ask("submit", 0, 1)
        submitted = [server.ask("submit", 1 + run * SUBMISSIONS, SUBMISSIONS) for run in range(REPEATS)]
        asked = [server.ask("status", STATUS_CALLS) for _ in range(REPEATS)]
        server.tell("check")
    least = min(min(each["busy"]) for each in asked)
    if least < workers - 1:  # one may just have handed in its sum
        say(f"status_busy_p99_ms is disturbed: at times {least} of {workers} workers were busy")
    return {
        "submit_busy_median_ms": min(map(statistics.median, submitted)),
        "submit_busy_first_ms": first,
        "status_busy_p99_ms": min(_p99(each["ms"]) for each in asked),
        "status_busy_median_ms": min(statistics.median(each["ms"]) for each in asked),
    }


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def listing(kit: Path, folder: Path) -> Figures:
    """One page of a thousand jobs."""
    with serving(kit, folder) as server:
        server.tell("fill", waiting=WAITING, at_rest=JOBS - WAITING)
        (first,) = server.ask("page", JOBS, 1)
        times = [server.ask("page", JOBS, PAGES) for _ in range(REPEATS)]
    return {"list_1000_jobs_ms": min(map(statistics.median, times)), "list_1000_jobs_first_ms": first}


def watching(kit: Path, folder: Path) -> Figures:
    """Two hundred watchers of one job, some of whom are cut."""
    with serving(kit, folder) as server:
        begun = server.tell("begin")
        with server.asking("watch", begun["job_id"], WATCHERS) as watchers:
            assert watchers.stdout is not None
            if not watchers.stdout.readline():  # they have failed: the reason is on the terminal
                raise RuntimeError("the watchers have ended")
            played = server.tell("play", job_id=begun["job_id"], events=EVENTS)
            said = watchers.stdout.readline()
    found = json.loads(said)
    lost = abs(begun["events"] + played["events"] - found["events"])
    say(f"{found['events']} events in {played['seconds']:.1f} s, {found['cuts']} times a stream was cut")
    return {"watchers_200_missing_or_double": found["missing"] + found["double"] + found["out_of_order"] + lost}


def command_line(kit: Path, folder: Path) -> Figures:
    """The whole command, as somebody at a terminal waits for it."""
    script = Path(sys.executable).with_name("sotto")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "src"]
    with serving(kit, folder) as server:
        server.tell("fill", waiting=0, at_rest=CLI_JOBS)
        command += ["jobs", "list", "--config", str(server.client_config)]
        times = [[_command_ms(command) for _ in range(CLI_RUNS)] for _ in range(REPEATS)]
    return {"cli_list_ms": min(map(statistics.median, times))}


def _command_ms(command: list[str]) -> float:
    begun_s = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own
    took_s = time.perf_counter() - begun_s
    if done.stdout.count("\n") < CLI_JOBS:
        raise RuntimeError(f"not all jobs are listed:\n{done.stdout}")
    return took_s * 1e3


def first_task(folder: Path) -> Figures:
    """The first unit of a process that is started for it, and of a worker that is there."""
    params = {"task": "randhie", "seed": 0}
    frame = encode_unit("initial_model", params, version=1)
    command = [sys.executable, str(Path(__file__).with_name("jobs_cold.py")), "aggregator.work", str(folder / "cold")]
    cold, warm = [], []
    for _ in range(COLD_RUNS):
        begun_s = time.perf_counter()
        done = subprocess.run(command, input=frame, env=environment(), check=True, stdout=subprocess.PIPE)  # noqa: S603  our own
        cold.append(time.perf_counter() - begun_s)
        expected = decode_reply(done.stdout)
        found, seconds = asyncio.run(_first(folder / "warm", params))
        warm.append(seconds)
        if found != expected:
            raise RuntimeError("a cold and a warm worker computed different models")
    return {
        "first_task_cold_vs_warm": statistics.median(cold) / statistics.median(warm),
        "first_task_cold_ms": statistics.median(cold) * 1e3,
        "first_task_warm_ms": statistics.median(warm) * 1e3,
    }


async def _first(folder: Path, params: dict[str, Any]) -> tuple[dict[str, Any], float]:
    pool = WorkerPool(
        PoolSettings(size=1, min_size=1),
        handlers="aggregator.work",
        blobs_root=folder / "blobs",
        workspace=folder / "work",
        preload=("learning.evaluation", "learning.warm"),  # as an aggregator that evaluates
    )
    await pool.start()
    try:
        begun_s = time.perf_counter()
        found = await pool.run("initial_model", params)
        return found, time.perf_counter() - begun_s
    finally:
        await pool.close()


def throughput(folder: Path, load: Load) -> Figures:
    """Sums a second. Each worker computes with one core, and always has the next sum."""
    figures = {
        f"throughput_{size}": max(asyncio.run(_units_a_second(size, folder, load)) for _ in range(2))
        for size in POOL_SIZES
    }
    return figures | {"throughput_cores": float(cores())}


async def _units_a_second(size: int, folder: Path, load: Load) -> float:
    pool = WorkerPool(
        PoolSettings(size=size, min_size=size, max_size=size),
        handlers="aggregator.work",
        blobs_root=load.blobs,
        workspace=folder / "work",
    )
    await pool.start()
    end_s = time.perf_counter() + THROUGHPUT_S
    done = 0

    async def sums() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            await pool.run("fold", load.params)
            done += 1

    try:
        begun_s = time.perf_counter()
        await asyncio.gather(*(sums() for _ in range(size)))
        return done / (time.perf_counter() - begun_s)
    finally:
        await pool.close()
