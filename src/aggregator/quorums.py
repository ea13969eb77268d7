"""Who can train a round: parties say so before any of them begins, so that a fault of one costs the others nothing.

Who asks is known in memory alone: after a restart they ask again. That they were enough is in the round's row.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from .flows import RoundKey
from .round_row import RoundRow

AGAIN_S: Final = 5.0
"""In which a party that was told no asks again. It counts meanwhile, or many parties would never count all at once."""

MOST_KNOWN: Final = 64
"""Rounds of which it is known who waited in vain: an aggregator runs a few jobs at a time."""


@dataclass(eq=False, slots=True)
class _Waiting:
    parties: Counter[str] = field(default_factory=Counter)
    enough: asyncio.Event = field(default_factory=asyncio.Event)


class Quorums:
    """Parties that ask for a quorum, by round. Used from the event loop alone.

    Args:
        connected: who can be reached now: of those who hold key shares as many as have to open.
    """

    def __init__(self, connected: Callable[[], frozenset[str]]) -> None:
        self._connected = connected
        self._rounds: dict[RoundKey, _Waiting] = {}
        self._in_vain: dict[RoundKey, frozenset[str]] = {}

    async def wait(self, row: RoundRow, party: str, *, at_most_s: float) -> bool:
        """A party can train a round that is under way, for as long as it asks, and `AGAIN_S` longer once told no.
        Returns whether as many as it needs can, and as many as have to open it can be reached, at some moment before a
        time has passed.

        Once they could they have begun, and it stays so whatever becomes of them.
        """
        if row.able_at:
            return True
        waiting = self._rounds.setdefault((row.job_id, row.number), _Waiting())
        waiting.parties[party] += 1
        self._look(row, waiting)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(at_most_s):
                    await waiting.enough.wait()
        except BaseException:  # it is gone
            waiting.parties[party] -= 1
            raise
        asyncio.get_running_loop().call_later(AGAIN_S, waiting.parties.subtract, (party,))
        return waiting.enough.is_set()

    def changed(self, row: RoundRow) -> None:
        """A round has moved on, or somebody has come; one that is over is forgotten, and who waits for it is told by
        `Flows`."""
        if row.at_rest:
            waiting = self._rounds.pop((row.job_id, row.number), None)
            if waiting is not None and not waiting.enough.is_set():
                self._in_vain[row.job_id, row.number] = frozenset(+waiting.parties)
            for key in list(self._in_vain)[:-MOST_KNOWN]:
                del self._in_vain[key]
        elif (waiting := self._rounds.get((row.job_id, row.number))) is not None:
            self._look(row, waiting)

    def waiting(self, job_id: str, number: int) -> frozenset[str]:
        """Who could train a round, and is not let yet: too few others can."""
        waiting = self._rounds.get((job_id, number))
        return frozenset() if waiting is None or waiting.enough.is_set() else frozenset(+waiting.parties)

    def waited_in_vain(self, row: RoundRow) -> frozenset[str]:
        """Who could have trained a round that ended, lately, and was never let: it lacked others."""
        return self._in_vain.get((row.job_id, row.number), frozenset())

    def _look(self, row: RoundRow, waiting: _Waiting) -> None:
        asking = {*(+waiting.parties)}
        able = {*asking, *row.committed} - row.failures.keys()
        holders = (self._connected() | asking).intersection(row.holders)
        if len(able) >= row.quorum and len(holders) >= row.threshold:
            waiting.enough.set()
