"""What runs beside the coordinator's loop: at most one task of a kind for each round of a job."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Final

from .troubles import Troubles

Key = tuple[str, int, str]
"""Job, round (0 where there is none), what is done."""

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
"""Before work that failed twice running begins again, and more often: its cause (a full disk, say) lasts, and what it
computes would be computed for nothing."""


class Tasks:
    """Running tasks by key. Used from the event loop alone.

    Args:
        wake: called when one has ended.
        storing: entered while one runs, which may store what no row names yet (`Leftovers.storing`).
        clock: seconds that only grow.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        storing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wake = wake
        self._storing = storing
        self._clock = clock
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._failed: dict[Key, tuple[int, float]] = {}
        self._troubles = Troubles()

    def spawn(self, key: Key, work: Callable[[], Awaitable[None]]) -> None:
        """Begin `work` unless a task of this key runs already, or failed so often that it is too early."""
        known = self._running.get(key)
        if known is not None and not known.done():
            return
        if key in self._failed and self._clock() < self._failed[key][1]:
            return

        async def run() -> None:
            try:
                with self._storing():
                    await work()
            except Exception as error:  # the rows are as they were: a later turn begins the same work again
                self._note_failure(key, error)
            else:
                self._forget(key)

        def ended(task: asyncio.Task[None]) -> None:  # also of one that was cancelled before it began
            if self._running.get(key) is task:
                del self._running[key]
            self._wake()

        task = asyncio.get_running_loop().create_task(run())
        self._running[key] = task
        task.add_done_callback(ended)

    def _note_failure(self, key: Key, error: Exception) -> None:
        times = self._failed.get(key, (0, 0.0))[0] + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (times - 2), LONGEST_PAUSE_S) if times > 1 else 0.0
        self._failed[key] = times, self._clock() + pause_s
        self._troubles.note(_what(key), error)

    def _forget(self, key: Key) -> None:
        self._failed.pop(key, None)
        self._troubles.over(_what(key))

    async def cancel(self, job_id: str, number: int | None = None) -> None:
        """Cancel a job's tasks, or those of one round, and wait until they are gone: their workers are killed."""
        for key in [key for key in self._failed if key[0] == job_id and number in (None, key[1])]:
            self._forget(key)
        mine = [task for key, task in self._running.items() if key[0] == job_id and number in (None, key[1])]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)

    async def drain(self, timeout_s: float) -> bool:
        """Wait for those that run; False when some still do after `timeout_s`."""
        if not self._running:
            return True
        _, left = await asyncio.wait(list(self._running.values()), timeout=timeout_s)
        return not left

    async def stop(self) -> None:
        """Cancel all of them and wait."""
        for job_id in {key[0] for key in self._running}:
            await self.cancel(job_id)


def _what(key: Key) -> str:
    job_id, number, what = key
    return f"{what} of round {number} of job {job_id}" if number else f"{what} of job {job_id}" if job_id else what
