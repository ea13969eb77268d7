"""How the benchmarks measure: the best of several runs, since whatever else the machine does only makes one slower."""

from __future__ import annotations

import multiprocessing
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


def least_in_turn(*measures: Callable[[], Figures], repeats: int = REPEATS) -> list[Figures]:
    """The least of each figure of each measurement, likewise in turn."""
    found = [[measure() for measure in measures] for _ in range(repeats)]
    return [{name: min(each[name] for each in runs) for name in runs[0]} for runs in zip(*found, strict=True)]


def speedup(name: str, one: Callable[[], object], two: Callable[[], object], *, repeats: int = REPEATS) -> Figures:
    """What two cores are worth to work on one thing: best of each, run in turn.

    Returns:
        `NAME_speedup`: wall time of `one` over that of `two`. `NAME_of_two_alone`: what `two` gets done in a time, over
        what two processes do that each have `one` to themselves: two cores of many machines share memory, caches or
        more, so that each is slower than one would be alone, whoever uses them.
    """
    best = dict.fromkeys(("one", "two", "alone"), float("inf"))
    done, begun = 0, time.perf_counter()
    while done < repeats or time.perf_counter() - begun < LEAST_S:
        done += 1
        for which, work in (("one", one), ("two", two), ("alone", lambda: _side_by_side(one))):
            start = time.perf_counter()
            work()
            best[which] = min(best[which], time.perf_counter() - start)
    return {f"{name}_speedup": best["one"] / best["two"], f"{name}_of_two_alone": best["alone"] / 2 / best["two"]}


def _side_by_side(work: Callable[[], object]) -> None:
    """Do the work twice, in two processes at a time."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with {process.exitcode}")


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
