"""The calls that a server has under way: who has how many, and one of them as others may end it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Final

from ..errors import BusyError, SottoError

_current: ContextVar[Call] = ContextVar("sotto_call")


class Call:
    """An RPC under way. To be made in the task that answers it, and used from the event loop alone."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._why: SottoError | None = None
        self._writing = False
        self._over = False

    def end(self, why: SottoError) -> None:
        """Let the call fail with `why`, wherever its handler is; at once unless a message is on its way to the caller:
        then as soon as that is taken. Does nothing to a call that is over or being ended."""
        if self._over or self._why is not None:
            return
        self._why = why
        if not self._writing:
            self._task.cancel()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the handler: raises what the call was ended with."""
        token = _current.set(self)
        try:
            yield
        except asyncio.CancelledError:
            if self._why is None or self._task.uncancel() > 0:  # the caller is gone, or the server stops
                raise
            raise self._why from None
        finally:
            self._over = True
            _current.reset(token)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around sending one message: it goes out whole, and what the call was ended with meanwhile is raised then."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        if self._why is not None:
            raise self._why


def current_call() -> Call:
    """The RPC that this task answers. Raises LookupError outside of one."""
    return _current.get()


class CallCounts:
    """How many calls each caller has under way.

    Args:
        streams: of one caller at a time, of calls that stream in either direction.
        requests: of one caller at a time, of all others: whoever follows as much as they may can still ask.
    """

    def __init__(self, *, streams: int, requests: int) -> None:
        self._most: Final = {"streams": streams, "requests": requests}
        self._held: Counter[tuple[str, str]] = Counter()

    def take(self, who: str, *, streams: bool) -> Callable[[], None]:
        """A call of this caller is under way, until what is returned is called (once).

        Raises:
            BusyError: they have as many as they may.
        """
        kind = "streams" if streams else "requests"
        key, most = (who, kind), self._most[kind]
        if self._held[key] >= most:
            raise BusyError(
                f"{who} has {most} {kind} under way here, which is as many as one caller may have at a time",
                limit=most,
                what=kind,
            )
        self._held[key] += 1
        return partial(self._give_back, key)

    def _give_back(self, key: tuple[str, str]) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
