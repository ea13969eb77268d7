"""The jobs that this process holds: their leases, and what it writes about them.

A lease says who drives a job and carries a fencing token that grows whenever the job changes hands. Every event of the
driver is written together with a check of that token, so that a process that lost a job, however late it wakes up, can
write nothing about it. Leases are renewed by progress: a job whose turns fail is not renewed, and when its lease has
lapsed the attempt counts as failed. A job whose lease has lapsed elsewhere is taken up again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from sqlalchemy import Connection

from ..errors import JobFailed, LeaseError, RoundFailed, SottoError, StateError, meaning
from ..jobs.scheduler import Capacity
from ..jobs.states import Event, EventKind, JobError, JobRow, JobState, after_failure
from ..jobs.store import JobStore, Lease
from ..storage.database import Database

LOG = logging.getLogger("sotto.aggregator")

AGGREGATOR_CAUSE: Final = "aggregator"
RENEWALS: Final = 3
"""A lease is renewed when a third of it has passed."""


class HeldJobs:
    """Leases by job, and the one way to write about a job that is held.

    Args:
        lease_s: how long a lease lasts without progress.
        retry_delays_s: before the second attempt, the third, ….
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        database: Database,
        store: JobStore,
        *,
        lease_s: float,
        retry_delays_s: Sequence[float],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._store = store
        self._lease_s = lease_s
        self._delays_s = tuple(retry_delays_s)
        self._clock = clock
        self._holder = secrets.token_hex(8)
        self._leases: dict[str, Lease] = {}
        self.notify: Callable[[str], None] = lambda _job_id: None
        self.notify_all: Callable[[], None] = lambda: None
        self.wake: Callable[[], None] = lambda: None
        self.ended: Callable[[], None] = lambda: None

    # --- leases -------------------------------------------------------------------------------------------------------

    def holds(self, job_id: str) -> bool:
        """Whether this process drives the job."""
        return job_id in self._leases

    def guard(self, connection: Connection, job_id: str) -> None:
        """Raises LeaseError unless this process holds the job; in the transaction of what is written about it."""
        self._store.check(connection, self._lease(job_id))

    def guard_running(self, connection: Connection, job_id: str) -> None:
        """As `guard`; StateError also where the job is being cancelled: nobody would settle what begins then."""
        self.guard(connection, job_id)
        if self._is_cancelling(connection, job_id):
            raise StateError(f"job {job_id} is being cancelled: nothing begins for it", job_id=job_id)

    async def is_cancelling(self, job_id: str) -> bool:
        """Whether the job is to be stopped, and this process still has something to do for it."""
        return await self._database.run(partial(self._is_cancelling, job_id=job_id))

    def _is_cancelling(self, connection: Connection, job_id: str) -> bool:
        return self._store.get(connection, job_id).state is JobState.CANCELLING

    async def take_next(self, capacity: Capacity, ready: Callable[[JobRow], bool]) -> JobRow | None:
        """Start the job whose turn it is, if one may start."""
        taken = await self._database.run(
            partial(
                self._store.take_next,
                capacity=capacity,
                holder=self._holder,
                now=self._clock(),
                lease_s=self._lease_s,
                ready=ready,
            )
        )
        if taken is None:
            return None
        row, lease = taken
        self._leases[row.job_id] = lease
        LOG.info("job %s starts (%s, priority %s)", row.job_id, row.kind, row.priority.value)
        self.notify(row.job_id)
        return row

    async def seize_all(self) -> list[JobRow]:
        """At start: every job that was under way. The database's own lock proves that nobody else writes."""
        rows = [row.job_id for row in await self._database.run(self._store.active)]
        return [await self._take_up(job_id, "goes on after a restart", seize=True) for job_id in rows]

    async def lapsed_elsewhere(self) -> list[str]:
        """The jobs under way that nobody drives and this process does not hold: it lost them to one that is gone, or
        took them and never heard that this was committed."""
        rows = await self._database.run(partial(self._store.lapsed, now=self._clock()))
        return [row.job_id for row in rows if not self.holds(row.job_id)]

    async def take_up(self, job_id: str) -> JobRow:
        """Drive a job whose lease has lapsed.

        Raises:
            LeaseError: another process was faster.
            StateError: it is not under way any more.
        """
        return await self._take_up(job_id, "goes on after its lease had lapsed", seize=False)

    async def _take_up(self, job_id: str, why: str, *, seize: bool) -> JobRow:
        row, lease = await self._database.run(partial(self._acquire, job_id=job_id, why=why, seize=seize))
        self._leases[job_id] = lease
        LOG.info("job %s %s (%s, attempt %d)", job_id, why, row.state.value, row.attempt)
        self.notify(job_id)
        return row

    def _acquire(self, connection: Connection, job_id: str, *, why: str, seize: bool) -> tuple[JobRow, Lease]:
        now = self._clock()
        lease = self._store.acquire(
            connection, job_id, holder=self._holder, now=now, lease_s=self._lease_s, seize=seize
        )
        row = self._store.get(connection, job_id)
        if row.state is JobState.RUNNING:
            detail = {"attempt": row.attempt}
            event = Event(kind=EventKind.RESUMED, message=why, cause=AGGREGATOR_CAUSE, detail=detail)
            row = self._store.apply(connection, job_id, event, now=now, lease=lease)
        return row, lease

    async def renew(self, job_id: str) -> None:
        """The job gets on: its lease is made good again when a part of it has passed."""
        if self._clock() >= self._lease(job_id).expires_at - self._lease_s * (1 - 1 / RENEWALS):
            await self._renew_now(job_id)

    async def _renew_now(self, job_id: str) -> None:
        renew = partial(self._store.renew, lease=self._lease(job_id), now=self._clock(), lease_s=self._lease_s)
        self._leases[job_id] = await self._database.run(renew)

    def lapsed(self, job_id: str) -> bool:
        """Whether the job got nowhere for as long as its lease lasts."""
        return self._clock() >= self._lease(job_id).expires_at

    def drop(self, job_id: str) -> None:
        """The job is at rest, or somebody else's."""
        self._leases.pop(job_id, None)

    def _lease(self, job_id: str) -> Lease:
        lease = self._leases.get(job_id)
        if lease is None:
            raise LeaseError(f"this process does not hold job {job_id}", job_id=job_id)
        return lease

    # --- events -------------------------------------------------------------------------------------------------------

    def write(self, connection: Connection, job_id: str, event: Event) -> JobRow:
        """Write an event in the caller's transaction; `told` is to be called once that is committed."""
        return self._store.apply(connection, job_id, event, now=self._clock(), lease=self._lease(job_id))

    def told(self, row: JobRow) -> None:
        """Tell everybody what was committed."""
        if row.at_rest:
            self.drop(row.job_id)
            self.ended()
        self.notify(row.job_id)
        self.wake()

    async def happen(self, job_id: str, event: Event) -> JobRow:
        """Write an event and tell everybody, also if the caller is cancelled meanwhile: what is being written is."""
        return await asyncio.shield(self._happen(job_id, event))

    async def _happen(self, job_id: str, event: Event) -> JobRow:
        row = await self._database.run(lambda connection: self.write(connection, job_id, event))
        LOG.info("job %s: %s", job_id, event.kind.value)
        self.told(row)
        return row

    async def failed(
        self, job_id: str, error: BaseException, *, stage: str, parties: Sequence[str] = (), last: bool = True
    ) -> bool:
        """An attempt failed: the job is tried again if that may help, or ends.

        Args:
            stage: what it was doing; parties: whose part in it is known.
            last: False where the caller has another way on than the end of the job: then nothing is written but a
                retry.

        Returns:
            Whether another attempt follows.
        """
        if isinstance(error, LeaseError):  # somebody else drives it by now, and goes on
            LOG.error("job %s: %s", job_id, error.message)
            self.drop(job_id)
            return True
        reference = secrets.token_hex(4)
        found = job_error(error, stage=stage, parties=parties, reference=reference)
        private = getattr(error, "private", "")
        LOG.warning("job %s: %s failed [%s]: %s %s", job_id, stage, reference, found.message, private)

        def write(connection: Connection) -> JobRow | None:
            row = self._store.get(connection, job_id)
            if row.state is not JobState.RUNNING:
                return None  # it is being stopped, or waits already
            event = after_failure(row, found, self._delays_s, self._clock())
            if event.kind is not EventKind.RETRYING and not last:
                return None
            return self.write(connection, job_id, event)

        return await asyncio.shield(self._write_failure(job_id, write))

    async def _write_failure(self, job_id: str, write: Callable[[Connection], JobRow | None]) -> bool:
        row = await self._database.run(write)
        if row is None:
            self.notify(job_id)  # it may have ended by a commit whose answer was lost
            return False
        self.told(row)
        return row.state is JobState.RETRYING

    async def give_up(self, job: JobRow, error: BaseException) -> None:
        """A job got nowhere for as long as its lease lasts: it is stopped, and if even that gets nowhere, ended."""
        found = job_error(error, stage="driving the job", parties=(), reference=secrets.token_hex(4))
        LOG.error("job %s got nowhere for %g s [%s]", job.job_id, self._lease_s, found.log_reference)
        kind = EventKind.FAILED if job.state is JobState.CANCELLING else EventKind.EXPIRED
        await self.happen(
            job.job_id, Event(kind=kind, message=found.message, cause=AGGREGATOR_CAUSE, detail=found.to_json())
        )
        if self.holds(job.job_id):  # as long again to let go of what it holds
            await self._renew_now(job.job_id)


def job_error(error: BaseException, *, stage: str, parties: Sequence[str], reference: str) -> JobError:
    """What a failure looks like from outside."""
    reason = meaning(JobFailed("")).reason if isinstance(error, RoundFailed) else meaning(error).reason
    parties = parties or tuple(filter(None, getattr(error, "metadata", {}).get("parties", "").split(",")))
    return JobError(reason, public_reason(error), stage, tuple(parties), reference)


def public_reason(error: BaseException) -> str:
    """What an error may say to anybody: its public message, or that it was unexpected."""
    return error.message if isinstance(error, SottoError) else f"internal error ({meaning(error).reason})"


def ending(row: JobRow) -> Event:
    """How a job that is CANCELLING ends, once all that it held is let go."""
    if row.error is not None:  # it expired
        error = row.error
        return Event(kind=EventKind.FAILED, message=error.message, cause=AGGREGATOR_CAUSE, detail=error.to_json())
    return Event(kind=EventKind.CANCELLED, message="cancelled", cause=AGGREGATOR_CAUSE)
