"""The workers of a pool and the units that wait for one: who is handed out next, and how many there are.

One task of the event loop keeps house: it adds workers where units wait, ends those that nobody needs, and asks idle
ones for a sign of life. It sleeps until the next of these is due.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import time
from bisect import insort
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

from ...errors import AbandonedError, SottoError, StateError, WorkerError
from .processes import Lost, Worker, Zygote
from .settings import PoolSettings

_log = logging.getLogger("sotto.jobs.pool")

_FIRST_ANSWER_S: Final = 60.0
"""How long a new worker may take to answer for the first time; it takes milliseconds, unless the machine is stuck."""
_RETRY_S: Final = 5.0
"""Between two attempts to start a worker, when nobody asks for it meanwhile."""

_T = TypeVar("_T")


class _Phase(Enum):
    CLOSED = "closed"
    STARTING = "starting"
    SERVING = "serving"


@dataclass(slots=True)
class Counts:
    """Workers so far; see `PoolStats`."""

    started: int = 0
    replaced: int = 0
    recycled: int = 0
    grown: int = 0
    shrunk: int = 0


@dataclass(slots=True, eq=False)
class _Ticket:
    """A unit's place in the queue."""

    urgent: bool
    number: int
    since_s: float
    handed: asyncio.Future[Worker]

    @property
    def rank(self) -> tuple[bool, int]:
        return (not self.urgent, self.number)


class Fleet:
    """Hands out workers and looks after them.

    Args:
        settings: how many, and how they are looked after.
        boot: what the zygote is told at its start.
        workspace: directory for the workers' directories.
        chore: called whenever the fleet looks after its workers, with the monotonic clock's time; returns when it wants
            to be called again at the latest.
    """

    def __init__(
        self,
        settings: PoolSettings,
        *,
        boot: dict[str, Any],
        workspace: Path,
        chore: Callable[[float], float | None],
    ) -> None:
        self._settings = settings
        self._boot = boot
        self._workspace = workspace.absolute()
        self._chore = chore
        self.counts = Counts()
        self._phase = _Phase.CLOSED
        self._zygote: Zygote | None = None
        self._zygote_lock = asyncio.Lock()
        self._target = settings.size
        self._workers: set[Worker] = set()  # busy, idle, or being checked
        self._beside: set[Worker] = set()  # of these, those that are none of the `_target`
        self._busy: set[Worker] = set()
        self._idle: list[Worker] = []  # by `idle_since_s`
        self._waiting: list[_Ticket] = []  # by rank
        self._starting: set[asyncio.Task[Any]] = set()
        self._adding: set[asyncio.Task[Worker]] = set()  # beside the others
        self._checking: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._numbers = itertools.count(1)
        self._retry_s = 0.0

    @property
    def serving(self) -> bool:
        """Whether workers can be had."""
        return self._phase is _Phase.SERVING

    @property
    def size(self) -> int:
        """Workers now, those beside the others not counted."""
        return len(self._workers) - len(self._beside)

    @property
    def busy(self) -> int:
        """Workers that are handed out."""
        return len(self._busy)

    @property
    def waiting(self) -> int:
        """Units that wait for a worker."""
        return len(self._waiting)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `WorkerPool.start`."""
        if self._phase is not _Phase.CLOSED or self._closing is not None:
            raise StateError("the pool is started already")
        self._phase = _Phase.STARTING
        self._target = self._settings.size
        try:
            await asyncio.to_thread(self._sweep)
            workers = await self._first_workers()
        except BaseException:
            await self.close()
            raise
        self._phase = _Phase.SERVING
        for worker in workers:
            self._offer(worker)
        self._keeper = asyncio.create_task(self._keep_house())

    async def _first_workers(self) -> list[Worker]:
        closed = AbandonedError("the worker pool was closed while it started")
        if self._phase is not _Phase.STARTING:
            raise closed
        try:
            workers = await asyncio.gather(*[_kept(self._starting, self._new_worker()) for _ in range(self._target)])
        except asyncio.CancelledError:
            if _this_task().cancelling():
                raise
            raise closed from None  # `close` has cancelled what was under way
        except WorkerError as error:
            _log.error("a worker cannot be started: %s", error.private)
            raise
        if self._phase is not _Phase.STARTING:
            raise closed
        return workers

    async def close(self) -> None:
        """See `WorkerPool.close`."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            self._phase = _Phase.CLOSED
            self._fail_waiting(AbandonedError, "the worker pool is closed")
            await _cancelled(
                [*self._starting, *self._adding, *self._checking, *([self._keeper] if self._keeper else [])]
            )
            while self._ending:
                await asyncio.gather(*self._ending, return_exceptions=True)
            if self._zygote is not None:
                await self._zygote.close()
                self._zygote = None
            self._idle.clear()
            self._busy.clear()
            self._beside.clear()
            while self._workers:
                await self._workers.pop().end()
            await asyncio.to_thread(self._sweep)
        finally:
            self._keeper = self._closing = None

    def _fail_waiting(self, cls: type[SottoError], message: str, private: str = "") -> None:
        for ticket in self._waiting:
            if not ticket.handed.done():
                ticket.handed.set_exception(cls(message, private=private))
        self._waiting.clear()

    def _sweep(self) -> None:
        if self._workspace.is_dir():
            for leftover in self._workspace.glob("worker-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    # --- handing out workers ------------------------------------------------------------------------------------------

    async def acquire(self, *, urgent: bool) -> Worker:
        """The next free worker; it goes back by `release` or `replace`.

        Raises:
            AbandonedError: the pool is closed.
            WorkerError: no worker can be started.
        """
        ticket_number, since_s = next(self._numbers), time.monotonic()
        while True:
            if not self.serving:
                raise AbandonedError("the worker pool is closed")
            self._fill()
            if self._idle:
                worker = self._idle.pop()
                self._busy.add(worker)
            else:
                handed: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
                worker = await self._wait(_Ticket(urgent, ticket_number, since_s, handed))
            if worker.alive:
                return worker
            self.replace(worker)  # it died while it had nothing to do: no unit's fault

    async def add_beside(self) -> Worker:
        """One more worker, for one unit alone; it ends with `release` or `replace`.

        Raises:
            AbandonedError: the pool is closed.
            WorkerError: no worker can be started.
        """
        if not self.serving:
            raise AbandonedError("the worker pool is closed")
        adding = _kept(self._adding, self._new_worker(beside=True))
        try:
            return await adding
        except asyncio.CancelledError:
            if adding.done() and not adding.cancelled() and adding.exception() is None:
                self.release(adding.result())  # it came in the moment of cancelling
            if _this_task().cancelling():
                raise
            raise AbandonedError("the worker pool is closed") from None

    async def _wait(self, ticket: _Ticket) -> Worker:
        insort(self._waiting, ticket, key=lambda each: each.rank)
        self._grow(time.monotonic())
        self._wake.set()
        try:
            return await ticket.handed
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif ticket.handed.done() and not ticket.handed.cancelled() and ticket.handed.exception() is None:
                self.release(ticket.handed.result())  # handed over in the moment of cancelling
            raise

    def release(self, worker: Worker) -> None:
        """Its unit has ended in order."""
        self._busy.discard(worker)
        if not self.serving:
            return
        if worker in self._beside:
            self._end(worker)
        elif not worker.alive:
            self.replace(worker)
        elif worker.units >= self._settings.recycle_after:
            self.counts.recycled += 1
            self._end(worker)
            self._fill()
        else:
            self._offer(worker)

    def _offer(self, worker: Worker) -> None:
        """To the first who waits; else it has nothing to do from now on."""
        worker.idle_since_s = worker.checked_s = time.monotonic()
        self._hand_over(worker)

    def _hand_over(self, worker: Worker) -> None:
        while self._waiting:
            ticket = self._waiting.pop(0)
            if not ticket.handed.done():
                self._busy.add(worker)
                ticket.handed.set_result(worker)
                return
        insort(self._idle, worker, key=lambda each: each.idle_since_s)
        self._wake.set()

    # --- starting and ending workers ----------------------------------------------------------------------------------

    def replace(self, worker: Worker) -> asyncio.Task[int | None] | None:
        """Ends a worker and starts another, both without being waited for; returns the task that ends it.

        None while the pool is being closed: `close` ends all of them.
        """
        if not self.serving:
            return None
        self.counts.replaced += worker not in self._beside
        ending = self._end(worker)
        self._fill()
        return ending

    def _end(self, worker: Worker) -> asyncio.Task[int | None]:
        for those in (self._workers, self._busy, self._beside):
            those.discard(worker)
        return _kept(self._ending, worker.end())

    def _fill(self) -> None:
        """Starts the workers that are missing."""
        for _ in range(self._target - self.size - len(self._starting)):
            _kept(self._starting, self._add_worker())

    async def _add_worker(self) -> None:
        try:
            worker = await self._new_worker()
        except WorkerError as error:
            self._not_added(error)
        except Exception as error:  # else units would wait for a worker that nobody starts any more
            _log.exception("starting a worker failed unexpectedly")
            self._not_added(WorkerError("a worker process cannot be started", private=repr(error)))
        else:
            self._starting.discard(_this_task())
            self._offer(worker)

    def _not_added(self, error: WorkerError) -> None:
        self._starting.discard(_this_task())
        _log.error("a worker cannot be started: %s", error.private)
        self._retry_s = time.monotonic() + _RETRY_S
        self._wake.set()
        if not self.size and not self._starting:
            self._fail_waiting(WorkerError, error.message, error.private)

    async def _new_worker(self, *, beside: bool = False) -> Worker:
        """A worker that answers. Raises WorkerError."""
        try:
            return await self._forked_worker(beside=beside)
        except OSError as error:  # no more processes, no more descriptors
            raise WorkerError("a worker process cannot be started", private=str(error)) from error

    async def _forked_worker(self, *, beside: bool) -> Worker:
        """Of the present zygote, or of a new one where that is gone with all of its workers."""
        for _ in range(2):
            zygote = await self._ready_zygote()
            directory = self._workspace / f"worker-{next(self._numbers)}"
            with contextlib.suppress(Lost):
                worker = await Worker.start(zygote, directory, self._worker_gone)
                try:
                    await worker.ping(_FIRST_ANSWER_S)
                except BaseException as error:
                    ending = _kept(self._ending, worker.end())
                    if isinstance(error, Lost) and not zygote.lost:
                        private = f"it did not answer; exit status {await asyncio.shield(ending)}"
                        raise WorkerError("a worker process cannot be started", private=private) from None
                    raise
                self._workers.add(worker)
                if beside:
                    self._beside.add(worker)
                self.counts.started += 1
                return worker
        raise WorkerError("the worker processes cannot be started", private="the zygote died twice")

    async def _ready_zygote(self) -> Zygote:
        async with self._zygote_lock:
            if self._zygote is not None and self._zygote.lost:
                await self._zygote.close()
                self._zygote = None
            if self._zygote is None:
                zygote = Zygote.launch(self._zygote_gone)
                try:
                    await zygote.prepare(self._boot)
                except BaseException:
                    _kept(self._ending, zygote.close())  # not here: who is cancelled once may be cancelled again
                    raise
                self._zygote = zygote
            return self._zygote

    def _worker_gone(self, worker: Worker) -> None:
        """A worker has ended; one that was computing or being asked is noticed by whoever waits for its answer."""
        if self.serving and worker in self._idle:
            self._idle.remove(worker)
            self.replace(worker)

    def _zygote_gone(self) -> None:
        """The zygote has ended by itself, and nobody can end its workers but the lifeline."""
        zygote = self._zygote
        if not self.serving or zygote is None or not zygote.lost:
            return
        _log.error("the zygote of the worker processes died; a new one is started")
        _kept(self._ending, zygote.close())
        for worker in list(self._idle):
            self._worker_gone(worker)

    # --- looking after them -------------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Looks after everything now, `chore` included."""
        self._wake.set()

    async def _keep_house(self) -> None:
        while True:
            now_s = time.monotonic()
            try:
                due_s = self._look_after(now_s)
            except Exception:  # this task is the only one that adds workers and asks whether they live
                _log.exception("looking after the workers failed; it is tried again")
                due_s = now_s + _RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due_s is None else max(0.0, due_s - now_s)):
                    await self._wake.wait()
            self._wake.clear()

    def _look_after(self, now_s: float) -> float | None:
        """Returns when there will be something to do, if nothing happens before."""
        if self.size + len(self._starting) < self._target and now_s >= self._retry_s:
            self._fill()
        self._grow(now_s)
        self._shrink(now_s)
        self._check_health(now_s)
        return min((at_s for at_s in (self._next_due_s(now_s), self._chore(now_s)) if at_s is not None), default=None)

    def _next_due_s(self, now_s: float) -> float | None:
        """When there will be something to do, if nothing happens before."""
        settings = self._settings
        due = [worker.checked_s + settings.health_interval_s for worker in self._idle]
        if self._idle and self._target > settings.min_size:
            due.append(self._idle[0].idle_since_s + settings.idle_s)
        if self._target < settings.max_size:
            ripe = (ticket.since_s + settings.grow_after_s for ticket in self._waiting)
            due += [at_s for at_s in ripe if at_s > now_s]
        if self.size + len(self._starting) < self._target:
            due.append(self._retry_s)
        return min(due, default=None)

    def _grow(self, now_s: float) -> None:
        """One more worker for each unit that has waited long enough, as far as none is being started for it."""
        waiting, settings = self._waiting, self._settings
        ripe = sum(ticket.urgent or now_s - ticket.since_s >= settings.grow_after_s for ticket in waiting)
        coming = len(self._starting)
        below_size = min(len(waiting) - coming, settings.size - self.size - coming)
        target = min(self.size + coming + max(ripe - coming, below_size), settings.max_size)
        if target > self._target:
            self.counts.grown += target - self._target
            self._target = target
            self._fill()

    def _shrink(self, now_s: float) -> None:
        while (
            self._idle
            and self._target > self._settings.min_size
            and now_s - self._idle[0].idle_since_s >= self._settings.idle_s
        ):
            self.counts.shrunk += 1
            self._target -= 1
            self._end(self._idle.pop(0))

    def _check_health(self, now_s: float) -> None:
        for worker in [each for each in self._idle if now_s - each.checked_s >= self._settings.health_interval_s]:
            self._idle.remove(worker)
            _kept(self._checking, self._check(worker))

    async def _check(self, worker: Worker) -> None:
        try:
            await worker.ping(self._settings.health_timeout_s)
        except Lost:
            if self.serving:
                _log.warning("worker %d does not answer and is replaced", worker.pid)
                self.replace(worker)
        else:
            worker.checked_s = time.monotonic()
            if self.serving:
                self._hand_over(worker)


def _kept(tasks: set[asyncio.Task[_T]], work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """A task that is in `tasks` until it ends."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancels them and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
