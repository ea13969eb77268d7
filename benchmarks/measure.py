"""How the benchmarks measure: the best of several runs, since whatever else the machine does only makes one slower."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable

import psutil

Figures = dict[str, float]

REPEATS = 3
SAMPLE_EVERY = 16
"""Blocks between two looks at the memory of children, each of which costs a millisecond."""
LEAST_S = 12
"""How long a speed-up is measured at least, however short its work is: neighbours come and go."""
PATIENCE_S = 30
"""How long a speed-up is measured again because two cores were not to be had."""
CORES_HAD = 1.9
"""A run on two cores that got less than this of them says nothing about the speed-up."""


def say(text: str) -> None:
    """Progress, on the terminal alone."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def cpu_s(work: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """Least CPU time of this process in `repeats` runs: what one core needs, whoever else is running."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def cpu_in_turn_s(*works: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """`cpu_s` of each, run in turn: what slows a machine for a while slows all, and leaves their ratios."""
    found = [[cpu_s(work, repeats=1) for work in works] for _ in range(repeats)]
    return [min(times) for times in zip(*found, strict=True)]


def _all_cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def speedup(name: str, one: Callable[[], object], two: Callable[[], object], *, repeats: int = REPEATS) -> Figures:
    """Wall time of `one` over that of `two`, best of each, run in turn.

    It is tried again while two cores are not to be had, and said in the end that they were not.
    """
    best = {"one": float("inf"), "two": float("inf")}
    cores, done, begun = 0.0, 0, time.perf_counter()
    while done < repeats or time.perf_counter() - begun < (LEAST_S if cores >= CORES_HAD else PATIENCE_S):
        done += 1
        for which, work in (("one", one), ("two", two)):
            cpu, start = _all_cpu_s(), time.perf_counter()
            work()
            wall = time.perf_counter() - start
            if which == "two":
                cores = max(cores, (_all_cpu_s() - cpu) / wall)
            best[which] = min(best[which], wall)
    if cores < CORES_HAD:
        say(f"{name} is disturbed: it had {cores:.2f} of two cores")
    return {name: best["one"] / best["two"]}


def peak_mb(blocks: Iterable[bytes], *, take: Callable[[bytes], object]) -> float:
    """Hands each block to `take`; the most memory that this process and its children took meanwhile, in 10^6 bytes
    beyond what this one had at the start. Of children only what they do not share."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    children = 0
    for position, block in enumerate(blocks):
        take(block)
        if position % SAMPLE_EVERY == 0:
            children = max(children, sum(_private_bytes(child) for child in process.children()))
        peak = max(peak, process.memory_info().rss)
    return (peak + children - before) / 1e6


def _private_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it has just ended
        return 0
