"""The driver of jobs: starts those whose turn it is, moves those under way, tries again what may be mended, and ends
what has run out of time.

One loop turns whenever something happened or a second has passed. What a job of a kind does in a turn is that kind's
business: `Trainings` for the rounds of a federation, `Computations` for what is computed here alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from sqlalchemy import Connection

from .. import __version__
from ..communication.validity import warnings_of
from ..config import AggregatorConfig
from ..errors import LeaseError, LedgerError, LimitError, SottoError, StorageFullError, UnavailableError
from ..jobs.scheduler import Capacity
from ..jobs.service import Activity, PartyStatus, Status
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.specs import JobSpec, spec_of
from ..jobs.states import Event as JobEvent
from ..jobs.states import EventKind, JobRow, JobState, expired_event, seconds, succeeded_event, utc
from ..jobs.store import JobStore
from ..storage.database import Database
from ..storage.heads import Head
from ..storage.leftovers import Leftovers
from .accounts import Accounts
from .computations import Computations, may_see, round_of
from .federation import Federation
from .held import AGGREGATOR_CAUSE, HeldJobs, ending
from .pipeline import AggregatorPipeline
from .pricing import Pricing
from .readiness import who_is_away
from .results import Results
from .sessions import Sessions
from .store import EnrolmentStore, RoundStore
from .tasks import Tasks
from .trainings import Trainings
from .troubles import Troubles

LOG = logging.getLogger("sotto.aggregator")

PARAMETER_BYTES: Final = 4
"""float32"""
TURN_S: Final = 1.0
"""Deadlines are met to the second."""
_ROOMLESS: Final = (StorageFullError, UnavailableError)
"""Of a full disk, or a database that is away, no job is to blame: none is given up for it, and its end could not be
written anyway."""


class Coordinator:
    """Runs jobs; wires what drives their kinds."""

    def __init__(
        self,
        *,
        config: AggregatorConfig,
        database: Database,
        jobs: JobStore,
        rounds: RoundStore,
        accounts: Accounts,
        results: Results,
        pipeline: AggregatorPipeline,
        computations: Computations,
        federation: Federation,
        sessions: Sessions,
        enrolments: EnrolmentStore,
        leftovers: Leftovers,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._database = database
        self._jobs = jobs
        self._accounts = accounts
        self._pipeline = pipeline
        self._computations = computations
        self._federation = federation
        self._sessions, self._enrolments = sessions, enrolments
        self._leftovers = leftovers
        self._clock = clock
        self._capacity = capacity_of(config)
        self._woken = asyncio.Event()
        self._tasks, self._troubles = Tasks(self.wake, leftovers.storing), Troubles()
        self._held = HeldJobs(
            database, jobs, lease_s=config.jobs.lease_s, retry_delays_s=config.jobs.retry_delays_s, clock=clock
        )
        self._held.wake = self.wake
        self.results = results
        self.trainings = Trainings(
            database=database,
            held=self._held,
            rounds=rounds,
            accounts=accounts,
            results=results,
            pipeline=pipeline,
            federation=federation,
            sessions=sessions,
            tasks=self._tasks,
            leftovers=leftovers,
            clock=clock,
        )
        self._pricing = Pricing(
            database=database,
            jobs=jobs,
            rounds=rounds,
            accounts=accounts,
            pipeline=pipeline,
            federation=federation,
            max_update_bytes=config.limits.max_update_bytes,
        )
        self._left: dict[str, int] = {}
        self._started_at, self._stopping, self._uncertain = "", False, False
        """The last: something may have been committed of which nobody was told, as a database's answer can be lost."""

    def on_event(
        self, notify: Callable[[str], None], notify_all: Callable[[], None], *, ended: Callable[[], None] | None = None
    ) -> None:
        """Whom to tell that something happened to a job, or may have happened to any; and that one came to rest."""
        self._held.notify = notify
        self._held.notify_all = notify_all
        self._held.ended = ended or self._held.ended

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Before the first turn: enrolled parties back into the roster, blobs that nobody names out of the store, and
        the jobs that were under way into this process's hands."""

        def read(connection: Connection) -> list[tuple[str, bytes]]:
            self._accounts.verify(connection)
            return list(self._enrolments.members(connection))

        members = await self._database.run(read)
        if not self._federation.pinned and members:
            self._federation.enrol(members, created_at=utc(self._clock()))
        await self._leftovers.collect()
        for job in await self._held.seize_all():
            await self._restore_job(job)
        self._started_at = utc(self._clock())

    async def _restore_job(self, job: JobRow) -> None:
        if job.kind == FederatedTrainingSpec.kind:
            await self.trainings.restore(job)

    async def run(self) -> None:
        """Turn until cancelled."""
        self._tasks.spawn(("", 0, "warm"), self._pipeline.warm)
        while True:
            self._woken.clear()
            if await self._turn() and self._uncertain:
                self._uncertain = False
                self._held.notify_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):  # wait_for of Python 3.11 loses a cancellation beside a wake-up
                    await self._woken.wait()

    async def drain(self, timeout_s: float) -> None:
        """Begin nothing more, and let what runs come to its end, as far as it does in time."""
        self._stopping = True
        if not await self._tasks.drain(timeout_s):
            LOG.info("not everything came to its end in %g s; the next process goes on from what is stored", timeout_s)

    async def stop(self) -> None:
        """Cancel what runs beside the loop; the rows stay as they are."""
        await self._tasks.stop()

    def wake(self) -> None:
        """Something happened: turn now."""
        self._woken.set()

    async def _turn(self) -> bool:
        """Every part, whatever becomes of the others; whether all went well."""
        parts = (
            ("starting jobs", self._start_jobs),
            ("ending what is overdue", self._expire),
            ("taking up what lapsed", self._take_up_lapsed),
            ("moving jobs", self._advance_all),
            ("telling parties", self._offer),
        )
        return all([await self._tried(what, work) for what, work in parts])

    async def _tried(self, what: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Whatever fails: the rows are as they were, and the next turn reads them again."""
        try:
            await work()
        except Exception as error:
            self._troubles.note(what, error)
            self._uncertain = True
            return False
        self._troubles.over(what)
        return True

    async def _start_jobs(self) -> None:
        while not self._stopping and await self._held.take_next(self._capacity, self._ready) is not None:
            pass

    async def _advance_all(self) -> None:
        for job in await self._database.run(self._jobs.active):
            if self._held.holds(job.job_id):
                await self._advance_held(job)

    async def _offer(self) -> None:
        self.trainings.offer()

    async def _take_up_lapsed(self) -> None:
        """Jobs under way that nobody drives: as at a start. One that is held and gets nowhere is given up instead."""
        if self._stopping:
            return
        for job_id in await self._held.lapsed_elsewhere():
            await self._tasks.cancel(job_id)  # whatever was begun under a lease that was lost
            try:
                await self._restore_job(await self._held.take_up(job_id))
            except SottoError as error:  # somebody was faster; else the next turn tries again
                LOG.warning("job %s is not taken up: %s", job_id, error.message)

    def _ready(self, job: JobRow) -> bool:
        return job.kind != FederatedTrainingSpec.kind or self.trainings.can_start(job)

    async def _expire(self) -> None:
        """Jobs whose deadline has passed: one that waits has failed, one under way is stopped first."""
        for job in await self._database.run(partial(self._jobs.overdue, now=self._clock())):
            await self._tried(f"ending job {job.job_id}, which is overdue,", partial(self._expire_job, job))

    async def _expire_job(self, job: JobRow) -> None:
        if job.state is JobState.PENDING:
            self._held.told(await self._database.run(partial(self._expire_waiting, job=job)))
        elif self._held.holds(job.job_id):
            try:
                await self._held.happen(job.job_id, expired_event(job))
            except LeaseError as error:
                await self._let_go(job.job_id, error)

    def _expire_waiting(self, connection: Connection, job: JobRow) -> JobRow:
        return self._jobs.apply(connection, job.job_id, expired_event(job), now=self._clock())

    async def _advance_held(self, job: JobRow) -> None:
        """One job; what becomes of it is not the others' business."""
        try:
            await self._advance_or_give_up(job)
        except LeaseError as error:
            await self._let_go(job.job_id, error)
        except Exception as error:  # not even its end could be written
            self._troubles.note(f"the end of job {job.job_id}", error)

    async def _advance_or_give_up(self, job: JobRow) -> None:
        what = f"job {job.job_id}"
        try:
            await self._advance(job)
            if self._held.holds(job.job_id):
                await self._held.renew(job.job_id)
        except LeaseError:
            raise
        except Exception as error:
            self._troubles.note(what, error)
            self._uncertain = True
            if self._held.lapsed(job.job_id) and not isinstance(error, _ROOMLESS):
                await self._held.give_up(job, error)
        else:
            self._troubles.over(what)

    async def _let_go(self, job_id: str, error: LeaseError) -> None:
        """A job that is at rest by now, or somebody else's."""
        LOG.error("job %s: %s", job_id, error.message)
        await self._tasks.cancel(job_id)
        self._held.drop(job_id)

    async def _advance(self, job: JobRow) -> None:
        if job.state is JobState.RETRYING and self._clock() >= seconds(job.retry_at) and not self._stopping:
            text = f"attempt {job.attempt + 1} of {job.max_attempts}"
            detail = {"attempt": job.attempt + 1}
            event = JobEvent(kind=EventKind.RESUMED, message=text, cause=AGGREGATOR_CAUSE, detail=detail)
            job = await self._held.happen(job.job_id, event)
        paused = self._stopping or job.state is JobState.RETRYING
        if job.kind == FederatedTrainingSpec.kind:
            self._left[job.job_id] = int(job.spec["rounds"]) - job.rounds_released
            await self.trainings.advance(job, paused=paused)
        elif job.state is JobState.CANCELLING:
            await self._tasks.cancel(job.job_id)
            await self._held.happen(job.job_id, ending(job))
        elif not paused:
            self._tasks.spawn((job.job_id, 0, "compute"), partial(self._compute, job))

    async def _compute(self, job: JobRow) -> None:
        try:
            spec = spec_of(job.kind, job.spec)
            source = await self._database.run(partial(self._source, spec=spec))
            if source is not None and (choice := round_of(spec)):
                source = replace(source, result=await self.results.of_round(source, choice))
            result = await self._computations.run(job, source, now=self._clock())
            await self._held.happen(job.job_id, succeeded_event(result, "done"))
        except Exception as error:
            if not isinstance(error, SottoError):
                LOG.exception("job %s failed", job.job_id)
            await self._held.failed(job.job_id, error, stage=job.kind)

    def _source(self, connection: Connection, spec: JobSpec) -> JobRow | None:
        """The job whose model is meant."""
        return self._jobs.get(connection, spec.source_job_id) if spec.source_job_id else None

    # --- what the service asks ----------------------------------------------------------------------------------------

    async def price(self, spec: JobSpec, *, owner: str, model: bytes = b"") -> tuple[str, ...]:
        """Refuse a job that could not be run to its end. Of a training: within the budget, before anybody trains.

        Args:
            model: the bytes of the model that comes with it, which is stored once the job is accepted.

        Returns:
            What whoever submits a training should know of its parties, a sentence each.
        """
        source = await self._database.run(partial(self._source, spec=spec))
        if isinstance(spec, FederatedTrainingSpec):
            await self.results.check_continued(spec, source, owner=owner)
            said = await self._pricing.check(spec, owner=owner, model=model)
            away = who_is_away(spec, self._federation.roster, connected=self._sessions.connected)
            return tuple(filter(None, (away, said)))
        if spec.round and source is not None and may_see(source, owner):
            await self.results.find(source, spec.round)
        await asyncio.to_thread(self._computations.check, spec, source, owner=owner, model=model)
        return ()

    async def model_bytes(self, spec: FederatedTrainingSpec, *, model: bytes = b"") -> int:
        """About how large each model of a training is: its parameters alone are counted."""
        return PARAMETER_BYTES * await self._pipeline.dimension(spec, model=model)

    def progress(self, job_id: str) -> Activity | None:
        """What a job is doing, in words, and for whom it waits; None when nothing is known of it."""
        return self.trainings.progress(job_id, rounds=self._left.get(job_id, 1))

    def status(self) -> Status:
        """How the aggregator is; the service adds the counts of jobs."""
        connected, awaited = self._sessions.connected, self.trainings.awaited()
        tls = self._config.server.tls
        return Status(
            federation=self._federation.roster.federation,
            software_version=__version__,
            key_id=self._federation.keyring.key_id,
            custody=self._federation.custody,
            parties=tuple(
                PartyStatus(
                    name,
                    name in connected,
                    awaited.get(name, ""),
                    self._sessions.warnings(name),
                    self._federation.readiness.of(name),
                )
                for name in self._federation.roster.names
            ),
            tasks=self._federation.readiness.own,
            workers=self._pipeline.stats(),
            jobs_pending=0,
            jobs_running=0,
            started_at=self._started_at,
            stopping=self._stopping,
            warnings=tuple(warnings_of(tls.certificate, tls.ca) if tls else ()),
        )

    async def enrol(self, name: str, verify_key: bytes) -> None:
        """Take a party into a federation without a pinned roster; ConflictError when its key changed."""
        most = self._config.limits.max_parties

        def write(connection: Connection) -> list[tuple[str, bytes]]:
            known = {member.name for member in self._federation.roster.members}
            if name not in known and len(known) >= most:
                raise LimitError(f"{len(known)} parties have joined; at most {most} may")
            self._enrolments.enrol(connection, name, verify_key)
            return list(self._enrolments.members(connection))

        members = await self._database.run(write)
        self._federation.enrol(members, created_at=utc(self._clock()))
        self.wake()

    async def meet(self, party: str, seen: Sequence[Head]) -> tuple[Head, ...]:
        """What this aggregator remembers of a party's ledger, told last last; nothing before it told anything.

        Args:
            seen: what the party remembers of this aggregator's ledger, seen last last.

        Raises:
            LedgerError: this ledger never had one of these entries: the database was rolled back.
        """

        def read(connection: Connection) -> tuple[Head, ...]:
            self._accounts.check_heads(connection, seen, party=party)
            return self._accounts.heads_of(connection, party)

        try:
            return await self._database.run(read)
        except LedgerError as error:
            LOG.error("%s", error.message)
            raise

    async def told(self, party: str, head: Head) -> None:
        """Remember what a party says of its own ledger, to tell it again when it joins."""
        await self._database.run(lambda connection: self._accounts.remember(connection, party, head))


def capacity_of(config: AggregatorConfig) -> Capacity:
    """How many jobs may be under way at a time."""
    return Capacity(
        max_trainings=config.jobs.max_trainings_running,
        max_computations=config.jobs.max_computations_running,
        max_per_scientist=config.jobs.max_running_per_scientist,
    )
