"""What may be asked about jobs, by whom. Knows neither gRPC nor how a job is executed: that is the `Coordinator`.

Everything durable is in the store; the `Notifier` only says "look again". So a watcher that reads slowly misses
nothing: it asks the database for what came after the last event it passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy import Connection

from ..communication.identity import Identity
from ..errors import InvalidInput, LimitError, NotFoundError, StateError, UnavailableError
from ..storage.blobs import Blobs
from ..storage.database import Database
from .spec import FederatedTrainingSpec
from .states import Event, EventKind, JobRow, JobState, utc
from .store import JobStore, StoredEvent, same_request

T = TypeVar("T")

MAX_REQUEST_ID_CHARACTERS: Final = 100
OPERATOR: Final = "operator"
"""The role that sees every job; anybody else sees their own. A job's owner is the caller as "role/name", which keeps
namesakes of different roles apart."""
EVENTS_A_READ: Final = 200
"""So that the history of a long job never blocks the database's one thread for long."""


class Limits(Protocol):
    """What one job and all jobs together may ask for (`config.AggregatorLimits`)."""

    @property
    def max_jobs_pending(self) -> int: ...
    @property
    def max_rounds(self) -> int: ...
    @property
    def max_parties(self) -> int: ...
    @property
    def max_round_timeout_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Activity:
    """What a job is doing now, in words, and for which parties it waits."""

    stage: str = ""
    waiting_for: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PartyStatus:
    """Whether a party is reachable, and what is expected of it (empty: nothing)."""

    party: str
    connected: bool
    waiting_for: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the aggregator is."""

    federation: str
    software_version: str
    key_id: str
    custody: str
    parties: tuple[PartyStatus, ...]
    workers_busy: int
    workers_idle: int
    jobs_pending: int
    jobs_running: int


class Coordinator(Protocol):
    """Executes jobs. It writes what happens through `JobStore` and then calls `JobService.notify`."""

    async def price(self, spec: FederatedTrainingSpec) -> None:
        """Raises BudgetError, PlanError, PolicyError or InvalidInput when the job cannot be accepted."""
        ...

    def wake(self) -> None:
        """A job became PENDING, CANCELLING or CANCELLED."""
        ...

    def progress(self, job_id: str) -> Activity | None:
        """What the job is doing; None when nothing is known of it."""
        ...

    def status(self) -> Status:
        """`jobs_pending` and `jobs_running` are filled in by the service."""
        ...


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is shown. `rounds` are the round summaries, left out of listings."""

    row: JobRow
    activity: Activity
    queue_position: int
    rounds: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a finished job. `sha256` is hex."""

    name: str
    size: int
    sha256: str


class Notifier:
    """Rings everybody who follows a job. To be used from the event loop's thread only."""

    def __init__(self) -> None:
        self._bells: dict[str, set[asyncio.Event]] = {}
        self.closed = False

    def notify(self, job_id: str) -> None:
        """Something happened to a job and is committed."""
        for bell in self._bells.get(job_id, ()):
            bell.set()

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


class JobService:
    """Create, look at, follow and cancel jobs; fetch what they made.

    Args:
        database: where `store`'s tables are.
        store: of the jobs.
        blobs: holds initial models and artifacts.
        coordinator: executes jobs.
        limits: checked when a job is created.
        notifier: shared with whoever else follows jobs; a new one by default.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        database: Database,
        store: JobStore,
        *,
        blobs: Blobs,
        coordinator: Coordinator,
        limits: Limits,
        notifier: Notifier | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._store = store
        self._blobs = blobs
        self._coordinator = coordinator
        self._limits = limits
        self._notifier = notifier or Notifier()
        self._clock = clock
        # One at a time: two jobs priced beside each other would both count on the same budget.
        self._admission = asyncio.Lock()

    def notify(self, job_id: str) -> None:
        """The coordinator committed an event of this job."""
        self._notifier.notify(job_id)

    def close(self) -> None:
        """End every watch with UnavailableError, so that clients come back to the next process."""
        self._notifier.close()

    async def create(
        self, caller: Identity, request_id: str, *, spec: FederatedTrainingSpec, display_name: str, initial_model: bytes
    ) -> JobView:
        """Check, price and store a job. The same request_id of the same caller gives the same job.

        Raises:
            InvalidInput: no request_id, or one that is too long.
            ConflictError: the request_id was used for another specification.
            LimitError: more rounds, parties or time than a job may ask for, or too many jobs waiting already.
            BudgetError, PlanError, PolicyError, InvalidInput: what `Coordinator.price` refuses.
        """
        if not 0 < len(request_id) <= MAX_REQUEST_ID_CHARACTERS:
            violation = f"1 to {MAX_REQUEST_ID_CHARACTERS} characters (got {len(request_id)})"
            raise InvalidInput(f"request_id: {violation}", violations={"request_id": violation})
        async with self._admission:
            known = await self._run(lambda c: self._store.find_request(c, str(caller), request_id))
            if known is not None:  # a repeated request is answered even when the budget is gone by now
                return await self._view(same_request(known, spec.digest))
            self._check_limits(spec)
            if initial_model:  # pricing looks at it; of a refused job it is an orphan, collected at the next start
                await asyncio.to_thread(self._blobs.write, initial_model)
            await self._coordinator.price(spec)
            stored = await self._store_new(caller, request_id, spec=spec, display_name=display_name)
        self._coordinator.wake()
        return await self._view(stored)

    async def _store_new(
        self, caller: Identity, request_id: str, *, spec: FederatedTrainingSpec, display_name: str
    ) -> JobRow:
        row = JobRow(
            job_id=secrets.token_hex(8),
            request_id=request_id,
            owner=str(caller),
            display_name=display_name,
            spec=spec.to_json(),
            spec_digest=spec.digest,
            created_at=utc(self._clock()),
        )
        return await self._run(lambda connection: self._insert(connection, row))

    async def get(self, caller: Identity, job_id: str) -> JobView:
        """Raises NotFoundError when there is no such job for this caller."""
        return await self._view(await self._run(lambda connection: self._visible(connection, caller, job_id)))

    async def list_jobs(
        self, caller: Identity, *, page_size: int = 0, page_token: str = "", state: JobState | None = None
    ) -> tuple[list[JobView], str]:
        """A page of the caller's jobs, newest first, without round summaries; and the token of the next page.

        Raises:
            InvalidInput: as `JobStore.list_jobs`.
        """
        owner = None if caller.role == OPERATOR else str(caller)

        def read(connection: Connection) -> tuple[list[tuple[JobRow, int]], str]:
            page = self._store.list_jobs(
                connection, page_size=page_size, page_token=page_token, state=state, owner=owner
            )
            return [(row, self._store.queue_position(connection, row)) for row in page.rows], page.next_page_token

        rows, token = await self._run(read)
        return [JobView(row, self._activity(row), position) for row, position in rows], token

    async def cancel(self, caller: Identity, job_id: str) -> JobView:
        """Ask a job to stop. One that waits is CANCELLED at once; one at rest, or being cancelled, stays as it is.

        Raises:
            NotFoundError: no such job for this caller.
        """

        def stop(connection: Connection) -> JobRow:
            row = self._visible(connection, caller, job_id)
            if row.at_rest or row.state is JobState.CANCELLING:
                return row
            kind = EventKind.CANCELLED if row.state is JobState.PENDING else EventKind.CANCELLING
            event = Event(kind=kind, message=f"cancelled by {caller}")
            return self._store.apply(connection, job_id, event, now=self._clock())

        row = await self._run(stop)
        self._coordinator.wake()
        self.notify(job_id)
        return await self._view(row)

    async def watch(self, caller: Identity, job_id: str, *, after_sequence: int = 0) -> AsyncGenerator[StoredEvent]:
        """The job's events after a sequence number, then each as it happens, until the job is at rest.

        Raises:
            NotFoundError: no such job for this caller.
            InvalidInput: a negative sequence number.
            UnavailableError: this process is being stopped; go on with the last sequence number elsewhere.
        """
        if after_sequence < 0:
            violation = {"after_sequence": f"at least 0 (got {after_sequence})"}
            raise InvalidInput("after_sequence is negative", violations=violation)
        last = after_sequence
        with self._notifier.subscribe(job_id) as bell:
            while True:
                bell.clear()
                row, events = await self._run(partial(self._history, caller=caller, job_id=job_id, after=last))
                for event in events:
                    last = event.sequence
                    yield event
                if len(events) == EVENTS_A_READ:
                    continue
                if row.at_rest:
                    return
                if self._notifier.closed:
                    raise UnavailableError("the aggregator is being stopped")
                await bell.wait()

    async def wait(self, caller: Identity, job_id: str, *, timeout_s: float | None) -> JobView:
        """The job once it is at rest, or as it is when the time is over (https://google.aip.dev/151, WaitOperation).

        Raises:
            NotFoundError: no such job for this caller.
            UnavailableError: this process is being stopped.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                with self._notifier.subscribe(job_id) as bell:
                    while True:
                        bell.clear()
                        row = await self._run(lambda connection: self._visible(connection, caller, job_id))
                        if row.at_rest:
                            break
                        if self._notifier.closed:
                            raise UnavailableError("the aggregator is being stopped")
                        await bell.wait()
        return await self.get(caller, job_id)

    async def artifact(self, caller: Identity, job_id: str, *, file: str) -> Artifact:
        """A file of a job that succeeded.

        Raises:
            NotFoundError: no such job for this caller, or no such file in it.
            StateError: the job has no result (yet).
        """
        row = await self._run(lambda connection: self._visible(connection, caller, job_id))
        if row.state is not JobState.SUCCEEDED:
            raise StateError(
                f"job {job_id} is {row.state.value}: only a SUCCEEDED job has an artifact", state=row.state.value
            )
        files = {entry["name"]: entry for entry in (row.result or {}).get("files", ())}
        if file not in files:
            raise NotFoundError(f"job {job_id} has no file {file!r}; it has: {', '.join(sorted(files))}", file=file)
        return Artifact(file, int(files[file]["bytes"]), str(files[file]["sha256"]))

    async def status(self) -> Status:
        """How the aggregator is, with the counts of jobs."""

        def count(connection: Connection) -> tuple[int, int]:
            running = self._store.count(connection, JobState.RUNNING)
            cancelling = self._store.count(connection, JobState.CANCELLING)
            return self._store.count(connection, JobState.PENDING), running + cancelling

        pending, running = await self._run(count)
        return replace(self._coordinator.status(), jobs_pending=pending, jobs_running=running)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[Connection], T]) -> T:
        return await self._database.run(work)

    def _check_limits(self, spec: FederatedTrainingSpec) -> None:
        limits = self._limits
        checks = {
            "rounds": (spec.priced_rounds, limits.max_rounds, "rounds and spare rounds"),
            "parties": (len(spec.parties), limits.max_parties, "parties"),
            "round_timeout_s": (spec.round_timeout_s, limits.max_round_timeout_s, "seconds for a round"),
        }
        problems = [f"{given:g} {what}; at most {most:g}" for given, most, what in checks.values() if given > most]
        if problems:
            raise LimitError(f"the job asks for more than this aggregator allows: {'; '.join(problems)}")

    def _insert(self, connection: Connection, row: JobRow) -> JobRow:
        stored = self._store.create(connection, row)
        waiting = self._store.count(connection, JobState.PENDING)
        if stored.job_id == row.job_id and waiting > self._limits.max_jobs_pending:
            raise LimitError(f"{waiting - 1} jobs are waiting already; at most {self._limits.max_jobs_pending} may")
        return stored

    def _visible(self, connection: Connection, caller: Identity, job_id: str) -> JobRow:
        row = self._store.get(connection, job_id)
        if not _may_see(caller, row):
            raise NotFoundError(f"no job {job_id!r}", job_id=job_id)
        return row

    def _history(
        self, connection: Connection, caller: Identity, *, job_id: str, after: int
    ) -> tuple[JobRow, list[StoredEvent]]:
        row = self._visible(connection, caller, job_id)
        return row, self._store.events(connection, job_id, after=after, limit=EVENTS_A_READ)

    def _activity(self, row: JobRow) -> Activity:
        if row.at_rest:
            return Activity(row.state.value.lower())
        return self._coordinator.progress(row.job_id) or Activity(row.state.value.lower())

    async def _view(self, row: JobRow) -> JobView:
        def read(connection: Connection) -> tuple[int, list[dict[str, Any]]]:
            return self._store.queue_position(connection, row), self._store.round_summaries(connection, row.job_id)

        position, rounds = await self._run(read)
        return JobView(row, self._activity(row), position, tuple(rounds))


def _may_see(caller: Identity, row: JobRow) -> bool:
    return caller.role == OPERATOR or row.owner == str(caller)
