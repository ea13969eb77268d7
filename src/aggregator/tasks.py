"""What runs beside the coordinator's loop: at most one task of a kind for each round of a job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

LOG = logging.getLogger("sotto.aggregator")

Key = tuple[str, int, str]
"""Job, round (0 where there is none), what is done."""


class Tasks:
    """Running tasks by key. Used from the event loop alone.

    Args:
        wake: called when one has ended.
        storing: entered while one runs, which may store what no row names yet (`Leftovers.storing`).
    """

    def __init__(
        self,
        wake: Callable[[], None],
        storing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._wake = wake
        self._storing = storing
        self._running: dict[Key, asyncio.Task[None]] = {}

    def spawn(self, key: Key, work: Callable[[], Awaitable[None]]) -> None:
        """Begin `work` unless a task of this key runs already."""
        known = self._running.get(key)
        if known is not None and not known.done():
            return

        async def run() -> None:
            try:
                with self._storing():
                    await work()
            except Exception:  # the rows are as they were: the next turn begins the same work again
                LOG.exception("task %s failed", key)

        def ended(task: asyncio.Task[None]) -> None:  # also of one that was cancelled before it began
            if self._running.get(key) is task:
                del self._running[key]
            self._wake()

        task = asyncio.get_running_loop().create_task(run())
        self._running[key] = task
        task.add_done_callback(ended)

    async def cancel(self, job_id: str, number: int | None = None) -> None:
        """Cancel a job's tasks, or those of one round, and wait until they are gone: their workers are killed."""
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
