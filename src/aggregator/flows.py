"""What flows between parties and rounds now: uploads and downloads. Each ends with the round that it is for, and of
uploads a party has one at a time: a newer one ends the older, which is a line that is gone, or a mistake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ..communication.calls import Call, current_call
from ..errors import AbandonedError, StateError
from .round_row import RoundRow, Work

T = TypeVar("T")
RoundKey = tuple[str, int]
"""Job and round."""
_Place = tuple[str, int, str, Work]
OfUse = Callable[[RoundRow], bool]


@dataclass(frozen=True, eq=False, slots=True)
class _Flow:
    call: Call
    of_use: OfUse


@dataclass(eq=False, slots=True)
class _Settling:
    task: asyncio.Task[Any]
    of_use: OfUse
    why: StateError | None = None


class Flows:
    """The streams of rounds that are open now. Used from the event loop alone, inside the calls that they are."""

    def __init__(self) -> None:
        self._open: dict[RoundKey, set[_Flow]] = {}
        self._receiving: dict[_Place, Call] = {}
        self._settling: dict[_Place, _Settling] = {}

    def changed(self, row: RoundRow) -> None:
        """A round has moved on: what it has no use for any more ends, whatever that waits for or is computed for it."""
        for flow in list(self._open.get((row.job_id, row.number), ())):
            if not flow.of_use(row):
                flow.call.end(useless(row))
        for place, settling in list(self._settling.items()):
            mover = settling.task is asyncio.current_task()  # what moved the round on has come to its end
            if place[:2] == (row.job_id, row.number) and not mover and not settling.of_use(row):
                settling.why = useless(row)
                settling.task.cancel()

    @contextlib.contextmanager
    def open(self, row: RoundRow, of_use: OfUse) -> Iterator[None]:
        """Around a stream of the present call, for as long as a round can use it.

        Raises:
            StateError: it has no use for it now, or later has none any more.
        """
        if not of_use(row):
            raise useless(row)
        key, flow = (row.job_id, row.number), _Flow(current_call(), of_use)
        self._open.setdefault(key, set()).add(flow)
        try:
            yield
        finally:
            self._forget(key, flow)

    def _forget(self, key: RoundKey, flow: _Flow) -> None:
        flows = self._open.get(key, set())
        flows.discard(flow)
        if not flows:
            self._open.pop(key, None)

    @contextlib.asynccontextmanager
    async def upload(self, row: RoundRow, party: str, work: Work, of_use: OfUse) -> AsyncIterator[Upload]:
        """Around the one upload of a party for a piece of its work in a round, which is the present call.

        An older one that still receives ends with AbandonedError. One that has all its bytes is waited for: what it
        brought may count by then, so read the round again inside.

        Raises:
            StateError: as `open`.
        """
        place, call = (row.job_id, row.number, party, work), current_call()
        with self.open(row, of_use):
            older = self._receiving.get(place)
            if older is not None:
                older.end(AbandonedError(f"a newer upload of {party} in round {row.number} took this one's place"))
            self._receiving[place] = call
            try:
                while place in self._settling:
                    await asyncio.wait({self._settling[place].task})
                yield Upload(self, place, call, of_use)
            finally:
                self._leave(place, call)

    def _leave(self, place: _Place, call: Call) -> None:
        if self._receiving.get(place) is call:
            del self._receiving[place]

    def _settle(self, place: _Place, call: Call, of_use: OfUse, *, work: Coroutine[Any, Any, Any]) -> _Settling:
        self._leave(place, call)
        for flow in [each for each in self._open.get(place[:2], ()) if each.call is call]:
            self._forget(place[:2], flow)
        settling = _Settling(asyncio.get_running_loop().create_task(work), of_use)
        self._settling[place] = settling

        def ended(done: asyncio.Task[Any]) -> None:
            if self._settling.get(place) is settling:
                del self._settling[place]
            if not done.cancelled():
                done.exception()  # whoever asked may be gone

        settling.task.add_done_callback(ended)
        return settling


class Upload:
    """One that receives."""

    def __init__(self, flows: Flows, place: _Place, call: Call, of_use: OfUse) -> None:
        self._flows = flows
        self._place = place
        self._call = call
        self._of_use = of_use

    async def settle(self, work: Coroutine[Any, Any, T]) -> T:
        """All bytes are there: from here on no newer one ends it, and `work` goes on also if the caller leaves.

        Raises:
            StateError: the round has no use for it any more; `work` is cancelled.
        """
        settling = self._flows._settle(self._place, self._call, self._of_use, work=work)
        try:
            result: T = await asyncio.shield(settling.task)
        except asyncio.CancelledError:
            if settling.why is None or not settling.task.cancelled():
                raise
            raise settling.why from None
        return result


def useless(row: RoundRow) -> StateError:
    """What a stream ends with that its round cannot use any more."""
    return StateError(
        f"round {row.number} of job {row.job_id} is {row.state.value}, and has no use for this", state=row.state.value
    )
