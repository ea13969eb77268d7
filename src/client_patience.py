"""How long a client goes on trying."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from .communication.options import CLIENT_PING_INTERVAL_S, PING_TIMEOUT_S
from .errors import SottoError

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
NOTICED_S: Final = float(CLIENT_PING_INTERVAL_S + PING_TIMEOUT_S)
"""Within it a channel notices that nobody answers: what failed later was connected until then, however silent."""


class Patience:
    """Growing pauses between attempts, bounded one by one and, as long as nobody is there, all together."""

    def __init__(self, retry_for_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry_for_s = retry_for_s
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Something came: the next failure is a first one again."""
        self._since = self._began = self._clock()
        self._pause_s = FIRST_PAUSE_S

    async def pause(self, error: SottoError) -> None:
        """Wait before the next attempt; raises `error` when the time is over."""
        if self._clock() - self._began > NOTICED_S:
            self.reset()
        if self._clock() + self._pause_s > self._since + self._retry_for_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._began = self._clock()
