"""A pool of warm worker processes for units of CPU work.

The role process never forks itself: it starts a zygote (see `worker`), which does. Everything here is driven by the
event loop; no thread waits for a worker.

This is `multiprocessing`'s forkserver in what it does, without three things that come with it: a main module that is
imported again in every child, one forkserver a process that outlives the pool, and pickled arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...errors import AbandonedError, DeadlineError, SottoError, StateError, UnavailableError, WorkerError
from .fleet import Fleet
from .limits import cores
from .processes import Lost
from .settings import PoolSettings
from .stats import Outcome, PoolStats, Tally
from .units import decode_reply, encode_unit, exhausted_memory

_log = logging.getLogger("sotto.jobs.pool")

_REPORT_S: Final = 300.0
"""Between two lines in the log about the pool's state."""


class WorkerPool:
    """Runs units of work in processes: urgent ones first, otherwise first come, first served.

    A worker that dies fails its unit and is replaced; so is one whose unit takes too long or too much, or is no longer
    wanted. The number of workers follows the work, see `PoolSettings`. The worker that was used last is used next, so
    that those that are not needed can end.

    Args:
        settings: how many, and what each may use.
        handlers: short name of the module with the table `HANDLERS` ("party.work").
        blobs_root: the role's blob store.
        workspace: directory for scratch files, the pool's own; what an earlier run left there is removed.
        preload: further modules to import once in the zygote, by short name.
        prepare: short name of a module → names for which its function `prepare` is called there after that.
    """

    def __init__(
        self,
        settings: PoolSettings,
        *,
        handlers: str,
        blobs_root: Path,
        workspace: Path,
        preload: tuple[str, ...] = (),
        prepare: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.settings = settings
        boot = {
            "handlers": handlers,
            "blobs_root": str(blobs_root.absolute()),
            "nice": settings.nice,
            "memory_limit_mb": settings.memory_limit_mb,
            "cpu_limit_s": settings.cpu_limit_s,
            "preload": list(preload),
            "prepare": {name: list(arguments) for name, arguments in (prepare or {}).items()},
        }
        self._fleet = Fleet(settings, boot=boot, workspace=workspace, chore=self._report_in_time)
        self._tally = Tally()
        self._draining = False
        self._active = 0
        self._alone = asyncio.Semaphore(1)
        self._quiet = asyncio.Event()
        self._reported = 0
        self._reported_s = 0.0

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the processes and waits until they answer.

        Raises:
            StateError: it is started already.
            WorkerError: they cannot be started; the log says which import failed.
            AbandonedError: it was closed meanwhile.
        """
        self._reported_s = time.monotonic()
        await self._fleet.start()
        self._draining = False

    async def drain(self, timeout_s: float) -> bool:
        """Takes no more units and waits for those it has taken, also those that wait for a worker. It does not close.

        Returns:
            Whether all have ended within `timeout_s`.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._active:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends every process, whatever it is doing, and waits until they are gone. Units under way are abandoned.

        It can be started again. Cancelling the caller does not stop it half-way.
        """
        if self._fleet.serving:
            self._report(time.monotonic())
        await self._fleet.close()

    # --- units --------------------------------------------------------------------------------------------------------

    async def run(
        self,
        name: str,
        params: Mapping[str, Any],
        *,
        version: int = 1,
        timeout_s: float | None = None,
        urgent: bool = False,
        alone: bool = False,
    ) -> dict[str, Any]:
        """Runs one unit in the next free worker and returns its result. Cancelling the caller kills the worker.

        Args:
            name: of the handler.
            params: JSON values; blobs by digest.
            version: of the unit; the handler must have the same.
            timeout_s: how long it may compute, not counting the wait for a worker; None: as long as it likes.
            urgent: it goes before all others that wait, and does not wait to have a worker forked where one may be.
            alone: in a worker beside the others that has computed nothing before and ends with it; one at a time.

        Raises:
            SottoError: whatever the handler raised, as the same class.
            WorkerError: it raised something else, its worker died, or it used more memory or CPU time than allowed.
            DeadlineError: it took longer than `timeout_s`.
            AbandonedError: the pool was closed meanwhile.
            UnavailableError: the pool is being drained.
            StateError: the pool is not started.
            InvalidInput, LimitError: the parameters are not JSON, or too large.
        """
        if not self._fleet.serving:
            raise StateError("the worker pool is not started, or closed")
        if self._draining:
            raise UnavailableError("the worker pool is being stopped")
        frame = encode_unit(name, params, version=version)
        self._active += 1
        try:
            async with self._alone if alone else contextlib.nullcontext():
                result = await self._run(name, frame, timeout_s=timeout_s, urgent=urgent, alone=alone)
        except (asyncio.CancelledError, AbandonedError):
            self._tally.record(name, Outcome.CANCELLED)
            raise
        except (DeadlineError, WorkerError):
            self._tally.record(name, Outcome.FAILED)
            raise
        except SottoError:
            self._tally.record(name, Outcome.REFUSED)
            raise
        finally:
            self._active -= 1
            self._quiet.set()
            self._fleet.nudge()
        return result

    async def _run(
        self, name: str, frame: bytes, *, timeout_s: float | None, urgent: bool, alone: bool
    ) -> dict[str, Any]:
        worker = await (self._fleet.add_beside() if alone else self._fleet.acquire(urgent=urgent))
        worker.units += 1
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                reply = await worker.ask(frame)
        except TimeoutError:
            self._fleet.replace(worker)
            raise DeadlineError(f"unit {name} did not end within {timeout_s} s", unit=name) from None
        except Lost:
            raise await self._death(name, self._fleet.replace(worker)) from None
        except BaseException:
            self._fleet.replace(worker)
            raise
        duration_s = time.monotonic() - began_s
        try:
            result = decode_reply(reply)
        except SottoError as error:
            if exhausted_memory(error):
                self._fleet.replace(worker)
            else:
                self._fleet.release(worker)
            raise
        self._fleet.release(worker)
        self._tally.record(name, Outcome.DONE, duration_s)
        return result

    async def _death(self, name: str, ending: asyncio.Task[int | None] | None) -> AbandonedError | WorkerError:
        if ending is None:
            return AbandonedError(f"unit {name} was abandoned: the worker pool is closed", unit=name)
        status = await asyncio.shield(ending)
        private = f"exit status {status}"
        if status == -signal.SIGXCPU:
            limit_s = self.settings.cpu_limit_s
            text = f"unit {name} used more CPU time than its limit of {limit_s} s"
            return WorkerError(text, private=private, unit=name, exhausted="cpu")
        return WorkerError(f"the worker of unit {name} died", private=private, unit=name)

    def cores_for_a_unit(self) -> int:
        """How many processes a unit that is about to be started may compute with: this machine's cores, shared with the
        units that run and wait now, as far as there can be workers for them; at least 1."""
        units = min(self._fleet.busy + self._fleet.waiting + 1, self.settings.max_size)
        return max(1, cores() // units)

    def stats(self) -> PoolStats:
        """How busy it is, and what it has done."""
        fleet, total = self._fleet, self._tally.total
        return PoolStats(
            size=fleet.size,
            min_size=self.settings.min_size,
            max_size=self.settings.max_size,
            busy=fleet.busy,
            idle=fleet.size - fleet.busy,
            waiting=fleet.waiting,
            started=fleet.counts.started,
            replaced=fleet.counts.replaced,
            recycled=fleet.counts.recycled,
            grown=fleet.counts.grown,
            shrunk=fleet.counts.shrunk,
            tasks_done=total[Outcome.DONE],
            tasks_refused=total[Outcome.REFUSED],
            tasks_failed=total[Outcome.FAILED],
            tasks_cancelled=total[Outcome.CANCELLED],
            failure_rate=self._tally.failure_rate,
            units=self._tally.units(),
        )

    def _report_in_time(self, now_s: float) -> float | None:
        """Writes the log's line when it is time; returns when it will be, if anything has happened since the last."""
        if self._tally.total.total() == self._reported:
            return None
        if now_s >= self._reported_s + _REPORT_S:
            self._report(now_s)
            return None
        return self._reported_s + _REPORT_S

    def _report(self, now_s: float) -> None:
        self._reported, self._reported_s = self._tally.total.total(), now_s
        _log.info("%s", self.stats().line())
