"""Telling those who follow a job that something happened to it, and reading it for all of them at once.

Everything durable is in the store; the `Notifier` only says "look again". So a watcher that reads slowly misses
nothing, and nothing is kept for it: it asks the store for what came after the last event it passed on. Watchers that
are equally far ask the same question, and the store is asked once: with two hundred of them a change costs one read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

READS_KEPT: Final = 8
"""Answers kept for a job until something happens to it. Watchers that are up to date share one; the others are for
those who are still catching up, each at another place of the history."""


class Notifier:
    """Rings everybody who follows a job. To be used from the event loop's thread only."""

    def __init__(self) -> None:
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._reads: dict[str, dict[object, asyncio.Task[Any]]] = {}
        self.closed = False

    def notify(self, job_id: str) -> None:
        """Something happened to a job and is committed."""
        self._reads.pop(job_id, None)  # before the bells: whoever is rung reads anew
        for bell in self._bells.get(job_id, ()):
            bell.set()

    def notify_all(self) -> None:
        """Something may have happened to any job: the answer to a commit was lost."""
        for job_id in list(self._bells):
            self.notify(job_id)

    def close(self) -> None:
        """Shutdown: everybody who waits is told to come back later."""
        self.closed = True
        for bells in self._bells.values():
            for bell in bells:
                bell.set()

    @contextlib.contextmanager
    def subscribe(self, job_id: str) -> Iterator[asyncio.Event]:
        """A bell that is set by every later `notify`. Clear it *before* reading the store: then nothing is missed."""
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        try:
            yield bell
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]
                self._reads.pop(job_id, None)

    async def shared(self, job_id: str, question: object, read: Callable[[], Awaitable[T]]) -> T:
        """What `read` gives, read once for everybody who asks the same until something happens to the job.

        To be called by subscribers that have cleared their bell: what is committed while an answer is on its way rings
        it again. A caller that is cancelled takes nothing from the others; a read that fails is not kept.

        Args:
            job_id: subscribed to.
            question: hashable; the same question has the same answer as long as nothing happens.
            read: asks the store.

        Raises:
            Exception: whatever `read` raises.
        """
        reads = self._reads.setdefault(job_id, {})
        task = reads.get(question)
        if task is None:
            if len(reads) >= READS_KEPT:
                del reads[next(iter(reads))]
            task = asyncio.ensure_future(_awaited(read))
            reads[question] = task
            task.add_done_callback(lambda done: _forget_failed(reads, question, done))
        answer: T = await asyncio.shield(task)
        return answer


async def _awaited(read: Callable[[], Awaitable[T]]) -> T:
    return await read()


def _forget_failed(reads: dict[object, asyncio.Task[Any]], question: object, task: asyncio.Task[Any]) -> None:
    if (task.cancelled() or task.exception() is not None) and reads.get(question) is task:
        del reads[question]
