"""What a party has been asked for and has not done yet: never more than so much, whatever it is asked for.

Nothing is queued for a party: the aggregator says what it is wanted for now, and says it again when the party comes
back. So what a round wants is one thing, the latest that was said; of the same work that is under way a second is
dropped. At most `AT_ONCE` rounds are worked on, `WAITING` more wait, and while so many do nothing further is taken from
the stream, which then waits at the other end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

AT_ONCE: Final = 16
"""Tasks: an aggregator runs a few jobs at a time, and a job one round."""
WAITING: Final = 16
"""With a message of `limits.max_message_bytes` each, both together bound what an aggregator can have kept here."""
ENDED: Final = "ended"
"""That a round has ended is worked on beside all others, and ends what waits for it: it makes room."""

Round = tuple[str, int]
"""Job and round."""
Key = tuple[str, int, str]
"""Job, round, and kind of work."""


class Desk(Generic[T]):
    """Work by round and kind. Used from the event loop alone.

    Args:
        do: the work; raises nothing.
    """

    def __init__(self, do: Callable[[T, str], Coroutine[Any, Any, None]]) -> None:
        self._do = do
        self.tasks: dict[Key, asyncio.Task[None]] = {}
        self._waiting: dict[Round, tuple[str, T]] = {}
        self._freed = asyncio.Event()

    async def room(self) -> None:
        """Until one more can be taken."""
        while len(self._waiting) >= WAITING:
            self._freed.clear()
            await self._freed.wait()

    def take(self, job_id: str, number: int, kind: str, work: T) -> None:
        """Begin what is asked, or have it wait in the place of whatever waits of the same round."""
        if (job_id, number, kind) in self.tasks:
            return
        self._waiting.pop((job_id, number), None)
        self._waiting[job_id, number] = kind, work
        self._begin()

    async def cancel(self, which: Callable[[Key], bool] = lambda _: True) -> None:
        """End what is under way or waits of these, and wait until it is gone."""
        for (job_id, number), (kind, _) in list(self._waiting.items()):
            if which((job_id, number, kind)):
                del self._waiting[job_id, number]
        self._freed.set()
        tasks = [task for key, task in self.tasks.items() if which(key)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self) -> None:
        """As much of what waits as there is room for, in the order in which it came."""
        for (job_id, number), (kind, work) in list(self._waiting.items()):
            of_ends = sum(key[2] == ENDED for key in self.tasks)
            under_way = of_ends if kind == ENDED else len(self.tasks) - of_ends
            if under_way < AT_ONCE:
                del self._waiting[job_id, number]
                self._start((job_id, number, kind), work)

    def _start(self, key: Key, work: T) -> None:
        task = asyncio.get_running_loop().create_task(self._do(work, key[2]))
        self.tasks[key] = task
        task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: Key) -> None:
        self.tasks.pop(key, None)
        self._begin()
        self._freed.set()
