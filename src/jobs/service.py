"""What may be asked about jobs, by whom. Knows neither gRPC nor how a job is executed: that is the `Coordinator`.

Rules of the API by their source: long-running operations https://google.aip.dev/151, request identification 155,
pagination 158, filtering 160, soft deletion 164.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Connection

from ..communication.identity import Identity
from ..errors import NotFoundError, UnavailableError
from ..protocol.signing import Signed
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.leftovers import Leftovers
from ..storage.sweeping import trying
from ..text import shown
from .admission import JobSettings, check_not_negative, check_request, check_same, check_size, new_row
from .driver import Coordinator
from .keeping import LAST, Keep
from .quotas import check_place
from .results import check_at_rest, check_has_one_coming, file_in, result_of
from .scheduler import Lane, lane_of
from .spec import FederatedTrainingSpec
from .specs import JobSpec
from .states import KEEP, Event, EventKind, JobRow, JobState, Priority
from .store import JobQuery, JobStore, StoredEvent
from .uploads import Uploads
from .views import Activity, Artifact, JobView, PartyStatus, Status
from .watching import Notifier

__all__ = [
    "EVENTS_A_READ",
    "MAX_EVENTS_A_PAGE",
    "OPERATOR",
    "Activity",
    "Artifact",
    "Coordinator",
    "JobService",
    "JobSettings",
    "JobView",
    "Notifier",
    "PartyStatus",
    "Status",
]

T = TypeVar("T")

OPERATOR: Final = "operator"
"""The role that sees every job; anybody else sees their own. A job's owner is the caller as "role/name", which keeps
namesakes of different roles apart."""
EVENTS_A_READ: Final = 200
"""So that the history of a long job never blocks the database's one thread for long."""
MAX_EVENTS_A_PAGE: Final = 1000
_UNDER_WAY: Final = (JobState.RUNNING, JobState.RETRYING, JobState.CANCELLING)
_STOPPING: Final = "the aggregator is being stopped"


class JobService:
    """Create, look at, follow, cancel and delete jobs; fetch what they made.

    Args:
        database: where `store`'s tables are.
        store: of the jobs.
        blobs: holds models that come with jobs, and artifacts.
        coordinator: executes jobs.
        settings: checked when a job is created.
        leftovers: removes what a deleted job alone named; shared with whoever else stores blobs.
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
        settings: JobSettings,
        leftovers: Leftovers,
        notifier: Notifier | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._store = store
        self._blobs = blobs
        self._coordinator = coordinator
        self._settings = settings
        self._leftovers = leftovers
        self._notifier = notifier or Notifier()
        self._clock = clock
        self.uploads = Uploads(database, store, blobs=blobs, uses=leftovers, settings=settings, clock=clock)
        # One at a time: two trainings priced beside each other would both count on the same budget. A computation
        # spends nothing, and waits for no training's price.
        self._admission = asyncio.Lock()
        self._finishing: set[asyncio.Task[Any]] = set()

    def notify(self, job_id: str) -> None:
        """The coordinator committed an event of this job."""
        self._notifier.notify(job_id)

    def notify_all(self) -> None:
        """The coordinator does not know which of its events were committed."""
        self._notifier.notify_all()

    def close(self) -> None:
        """Take no more jobs, and end every watch with UnavailableError: clients come back to the next process."""
        self._notifier.close()

    # --- creating -----------------------------------------------------------------------------------------------------

    async def create(
        self,
        caller: Identity,
        request_id: str,
        *,
        spec: JobSpec,
        display_name: str = "",
        model: bytes = b"",
        priority: Priority | None = None,
        timeout_s: float | None = None,
        inline_wait_s: float = 0.0,
        order: Signed | None = None,
    ) -> JobView:
        """Check, price and store a job. The same request_id of the same caller gives the same job.

        Args:
            caller: owns the job.
            request_id: 1 to 100 characters.
            spec: what it is to do. display_name: a label.
            model: the bytes of the model that comes with it, of which `spec` has the digest.
            priority: None: NORMAL.
            timeout_s: from now to its deadline; None: as usual for its kind.
            inline_wait_s: how long to wait for it to be at rest, 0 to `JobSettings.max_inline_wait_s`. A caller that
                goes away meanwhile changes nothing.
            order: that its scientist signed, verified; None: nobody did. Of a repeated request the first one stays.

        Raises:
            InvalidInput: an argument out of its range.
            ConflictError: the request_id was used for something else (`admission.check_same`).
            LimitError: more than a job may ask for, or too many jobs waiting already.
            NotFoundError: the job it is about is none of the caller's, or the model that it names was not uploaded.
            UnavailableError: this process is being stopped; nothing was stored.
            BudgetError, PlanError, PolicyError, InvalidInput, StateError: what `Coordinator.price` refuses.
        """
        check_request(request_id, timeout_s=timeout_s, inline_wait_s=inline_wait_s, settings=self._settings)
        same = partial(check_same, spec=spec, priority=priority, timeout_s=timeout_s)
        async with self._admission if lane_of(spec.kind) is Lane.TRAINING else contextlib.nullcontext():
            if self._notifier.closed:
                raise UnavailableError(_STOPPING)
            known = await self._run(lambda c: self._look(c, caller, request_id, spec=spec, model=model))
            if known is not None:  # a repeated request is answered even when the budget is gone by now
                row, position = same(known), None
            else:
                check_size(spec, self._settings)
                model = model or await self.uploads.model_of(spec, owner=str(caller))
                said = await self._coordinator.price(spec, owner=str(caller), model=model)
                new = partial(new_row, str(caller), request_id, spec, timeout_s=timeout_s, settings=self._settings)
                row = replace(new(now=self._clock()), display_name=display_name, priority=priority or Priority.NORMAL)
                row = replace(row, signed_order=order.to_text() if order else "")
                keeps = await self._kept_bytes(spec, model)
                storing = self._store_new(caller, row, spec, model=model, keeps=keeps, said=said)
                stored, position = await self._to_its_end(storing)
                row = same(stored)
        if inline_wait_s > 0:
            with contextlib.suppress(UnavailableError):  # it is stored: stopping is no reason to say it is not
                return await self.wait(caller, row.job_id, timeout_s=inline_wait_s)
        if position is None:
            return await self.get(caller, row.job_id, rounds=False)
        return JobView(row, self._activity(row), position)

    def _look(
        self, connection: Connection, caller: Identity, request_id: str, *, spec: JobSpec, model: bytes, keeps: int = 0
    ) -> JobRow | None:
        """The job of this request, if there is one; else whether there is a place for it, its model and the bytes that
        it `keeps`, and it is about a job of the caller's."""
        known, owner = self._store.find_request(connection, str(caller), request_id), str(caller)
        if known is None:
            brought = (str(getattr(spec, spec.digest_field())), len(model)) if model else None
            place = partial(check_place, owner=owner, model=brought, keeps=keeps, now=self._clock())
            place(connection, self._store, self._blobs, settings=self._settings)
            if spec.source_job_id:
                self._visible(connection, caller, spec.source_job_id)
        return known

    async def _kept_bytes(self, spec: JobSpec, model: bytes) -> int:
        """About what the models take that a training is to keep beside its last, which it has in any case."""
        if not isinstance(spec, FederatedTrainingSpec) or spec.keep == LAST:
            return 0
        size = await self._coordinator.model_bytes(spec, model=model)
        return size * (Keep.from_text(spec.keep).most(spec.rounds) - 1)

    async def _store_new(
        self, caller: Identity, row: JobRow, spec: JobSpec, *, model: bytes, keeps: int, said: Sequence[str]
    ) -> tuple[JobRow, int]:
        """The job, with what was `said` of it, and its place in the queue, read now: later it would wait for what the
        coordinator wakes up for. Of a model nothing is stored before the job is accepted, nor stays if it is not."""

        def store(connection: Connection) -> tuple[JobRow, int]:
            # Looks again: pricing takes time, and computations come at once.
            known = self._look(connection, caller, row.request_id, spec=spec, model=model, keeps=keeps)
            if known is None and isinstance(spec, FederatedTrainingSpec) and spec.continue_from:
                self._store.released.find(connection, spec.continue_from.job_id, str(spec.continue_from.round))
            stored = self._store.create(connection, row, said=said) if known is None else known
            return stored, self._positions(connection, [stored]).get(stored.job_id, 0)

        with trying(self._leftovers) as kept:
            if model:
                kept.add((await asyncio.to_thread(self._blobs.write, model)).sha256)
            stored, position = await self._run(store)
        self._coordinator.wake()
        return stored, position

    # --- looking ------------------------------------------------------------------------------------------------------

    async def get(self, caller: Identity, job_id: str, *, rounds: bool = True) -> JobView:
        """A job, with its round summaries if asked for. Raises NotFoundError when there is none for this caller."""

        def read(connection: Connection) -> JobView:
            row = self._visible(connection, caller, job_id)
            summaries = self._store.round_summaries(connection, job_id) if rounds else []
            kept = self._store.released.kept(connection, job_id) if rounds and not row.deleted_at else ()
            position = self._positions(connection, [row]).get(job_id, 0)
            return JobView(row, Activity(), position, tuple(summaries), kept)

        view = await self._run(read)
        return replace(view, activity=self._activity(view.row))

    async def list_jobs(
        self,
        caller: Identity,
        *,
        filter: str = "",
        order_by: str = "",
        page_size: int = 0,
        page_token: str = "",
        show_deleted: bool = False,
    ) -> tuple[list[JobView], str]:
        """A page of the caller's jobs, without round summaries; and the token of the next page.

        Args:
            caller: an operator sees everybody's.
            filter, order_by, page_size, page_token, show_deleted: as proto/sotto/v1/jobs.proto has them.

        Raises:
            InvalidInput: as `JobStore.list_jobs`.
        """
        query = JobQuery(
            filter=filter,
            order_by=order_by,
            page_size=page_size,
            page_token=page_token,
            owner=None if caller.role == OPERATOR else str(caller),
            show_deleted=show_deleted,
        )

        def read(connection: Connection) -> tuple[tuple[JobRow, ...], str, dict[str, int]]:
            page = self._store.list_jobs(connection, query=query)
            return page.rows, page.next_page_token, self._positions(connection, page.rows)

        rows, token, positions = await self._run(read)
        return [JobView(row, self._activity(row), positions.get(row.job_id, 0)) for row in rows], token

    async def events(
        self, caller: Identity, job_id: str, *, after: int = 0, limit: int = 0
    ) -> tuple[list[StoredEvent], int]:
        """A page of a job's history.

        Args:
            after: sequence number of the last event that is known.
            limit: at most so many; 0, or more than `MAX_EVENTS_A_PAGE`: that many.

        Returns:
            The events, in order, and the `after` of the next page, 0 when there is none (yet).

        Raises:
            NotFoundError: no such job for this caller.
            InvalidInput: a negative number.
        """
        check_not_negative(after_sequence=after, page_size=limit)
        size = min(limit or MAX_EVENTS_A_PAGE, MAX_EVENTS_A_PAGE)

        def read(connection: Connection) -> list[StoredEvent]:
            self._visible(connection, caller, job_id)
            return self._store.events(connection, job_id, after=after, limit=size + 1)

        found = await self._run(read)
        return found[:size], found[size - 1].sequence if len(found) > size else 0

    async def artifact(
        self, caller: Identity, job_id: str, *, file: str, choice: str = "", sha256: str = ""
    ) -> Artifact:
        """A file of a job's result, or of a released round's (`round_result`).

        Args:
            choice: which round is meant; empty: the job's own result.
            sha256: of the file (hex), as the caller knows it; empty: whatever it is now.

        Raises:
            NotFoundError: no such job for this caller, no such round or file in it, or its files were deleted.
            StateError: the job has no result (yet).
        """
        if choice:
            return file_in(job_id, await self.round_result(caller, job_id, choice, known=sha256), file, sha256=sha256)
        row = await self._run(lambda connection: self._visible(connection, caller, job_id))
        return file_in(job_id, result_of(row), file, sha256=sha256)

    async def round_result(self, caller: Identity, job_id: str, choice: str, *, known: str = "") -> dict[str, Any]:
        """A released round of a job in any state as a result (`JobRow.result`).

        Args:
            choice: as `keeping.CHOICE_PATTERN` has it.
            known: SHA-256 (hex) of a file of it: as `driver.Results.of_round`.

        Raises:
            NotFoundError: no such job for this caller, or that round cannot be had.
            InvalidInput: it is no choice, or the job is no training.
        """
        row = await self._run(lambda connection: self._visible(connection, caller, job_id))
        return await self._to_its_end(self._coordinator.results.of_round(row, choice, as_known=known))

    async def status(self) -> Status:
        """How the aggregator is, with the counts of jobs."""

        def count(connection: Connection) -> tuple[int, int]:
            under_way = sum(self._store.count(connection, state) for state in _UNDER_WAY)
            return self._store.count(connection, JobState.PENDING), under_way

        pending, running = await self._run(count)
        status = self._coordinator.status()
        stopping = status.stopping or self._notifier.closed
        return replace(status, jobs_pending=pending, jobs_running=running, stopping=stopping)

    # --- stopping and deleting ----------------------------------------------------------------------------------------

    async def cancel(self, caller: Identity, job_id: str, *, keep: bool = False) -> JobView:
        """Ask a job to stop. One that waits is CANCELLED at once; one at rest, or being cancelled, stays as it is.

        Args:
            keep: it ends with its last released round as its result, if it has one.

        Raises:
            NotFoundError: no such job for this caller.
            StateError: it is being stopped already, and will have no result, as `keep` asks for.
        """
        named: set[str] = set()

        def stop(connection: Connection) -> None:
            row = self._visible(connection, caller, job_id)
            if keep and row.state is JobState.CANCELLING:
                check_has_one_coming(row, kept=self._store.keeps(connection, job_id))
            if row.at_rest or row.state is JobState.CANCELLING:
                return
            waits = row.state is JobState.PENDING
            named.update(self._store.blobs_of(connection, job_id) if waits else ())
            kind = EventKind.CANCELLED if waits else EventKind.CANCELLING
            word, detail = ("stopped", {KEEP: True}) if keep else ("cancelled", None)
            event = Event(kind=kind, message=f"{word} by {caller}", cause=str(caller), detail=detail)
            self._store.apply(connection, job_id, event, now=self._clock())

        await self._to_its_end(self._change(job_id, stop))
        self._leftovers.let_go(named)
        return await self.get(caller, job_id)

    async def delete(self, caller: Identity, job_id: str) -> JobView:
        """Drop the files of a job at rest; the job stays, with its history and what it spent. Once is as good as twice.
        Bytes that no other job names leave the disk as soon as nobody who is storing could be about to name them.

        Raises:
            NotFoundError: no such job for this caller.
            StateError: it is not at rest.
        """

        def drop(connection: Connection) -> None:
            row = self._visible(connection, caller, job_id)
            if row.deleted_at:
                return
            check_at_rest(row)
            event = Event(kind=EventKind.DELETED, message=f"files deleted by {caller}", cause=str(caller))
            self._store.apply(connection, job_id, event, now=self._clock())

        await self._to_its_end(self._delete(job_id, drop))
        return await self.get(caller, job_id)

    async def _delete(self, job_id: str, drop: Callable[[Connection], None]) -> None:
        await self._change(job_id, drop)
        self._beside(self._leftovers.drop(job_id))

    async def _change(self, job_id: str, change: Callable[[Connection], None]) -> None:
        await self._run(change)
        self._coordinator.wake()
        self.notify(job_id)

    # --- following ----------------------------------------------------------------------------------------------------

    async def watch(self, caller: Identity, job_id: str, *, after_sequence: int = 0) -> AsyncGenerator[StoredEvent]:
        """The job's events after a sequence number, then each as it happens, until the job is at rest.

        Raises:
            NotFoundError: no such job for this caller.
            InvalidInput: a negative sequence number.
            UnavailableError: this process is being stopped; go on with the last sequence number elsewhere.
        """
        check_not_negative(after_sequence=after_sequence)
        last = after_sequence
        first = partial(self._first_look, caller=caller, job_id=job_id, after=last)
        with self._notifier.subscribe(job_id) as bell:
            at_rest, events = await self._run(first)  # its own: whether the job is to be seen depends on who asks
            while True:
                for event in events:
                    last = event.sequence
                    yield event
                if len(events) < EVENTS_A_READ:
                    if at_rest:
                        return
                    if self._notifier.closed:
                        raise UnavailableError(_STOPPING)
                    await bell.wait()
                bell.clear()
                read = partial(self._run, partial(self._history, job_id=job_id, after=last))
                at_rest, events = await self._notifier.shared(job_id, last, read)

    async def wait(self, caller: Identity, job_id: str, *, timeout_s: float | None) -> JobView:
        """The job once it is at rest, or as it is when the time is over; without round summaries.

        Raises:
            NotFoundError: no such job for this caller.
            UnavailableError: this process is being stopped.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._rest(caller, job_id)
        return await self.get(caller, job_id, rounds=False)

    async def _rest(self, caller: Identity, job_id: str) -> None:
        read = partial(self._run, lambda connection: self._store.get(connection, job_id).at_rest)
        with self._notifier.subscribe(job_id) as bell:
            at_rest = (await self._run(lambda connection: self._visible(connection, caller, job_id))).at_rest
            while not at_rest:
                if self._notifier.closed:
                    raise UnavailableError(_STOPPING)
                await bell.wait()
                bell.clear()
                at_rest = await self._notifier.shared(job_id, "at rest", read)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[Connection], T]) -> T:
        return await self._database.run(work)

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """A caller that goes away in the middle does not keep a change from being told to those who wait for it."""
        return await asyncio.shield(self._beside(work))

    def _beside(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _visible(self, connection: Connection, caller: Identity, job_id: str) -> JobRow:
        if "\0" in job_id:  # PostgreSQL has none, not even in a question
            raise NotFoundError(f"no job {shown(job_id)}", job_id=job_id)
        row = self._store.get(connection, job_id)
        if caller.role != OPERATOR and row.owner != str(caller):
            raise NotFoundError(f"no job {shown(job_id)}", job_id=job_id)
        return row

    def _first_look(
        self, connection: Connection, caller: Identity, *, job_id: str, after: int
    ) -> tuple[bool, list[StoredEvent]]:
        self._visible(connection, caller, job_id)
        return self._history(connection, job_id, after=after)

    def _history(self, connection: Connection, job_id: str, *, after: int) -> tuple[bool, list[StoredEvent]]:
        """Whether nothing more will happen, and what did."""
        at_rest = self._store.get(connection, job_id).at_rest
        return at_rest, self._store.events(connection, job_id, after=after, limit=EVENTS_A_READ)

    def _positions(self, connection: Connection, rows: Sequence[JobRow]) -> dict[str, int]:
        """Of the jobs that wait: computed once for all of them, and not at all where none does."""
        if not any(row.state is JobState.PENDING for row in rows):
            return {}
        return self._store.positions(connection, self._settings.capacity)

    def _activity(self, row: JobRow) -> Activity:
        now = None if row.at_rest else self._coordinator.progress(row.job_id)
        return now or Activity(row.state.value.lower())
