"""Jobs, their events, leases and queues in a relational database.

Every method works inside the caller's transaction, so that a job, its event and whatever else belongs to the same step
(a round, a ledger entry) are written together or not at all. The rules are those of `states`: a row changes by
`advance` alone. Which job is started next is for `scheduler` to say.

Whoever drives a job holds a lease on it. Each new lease carries a larger fencing token, and a driver shows its own with
every write: one that was slow, or that a restart overtook, is refused however late it wakes (Kleppmann, Designing
Data-Intensive Applications, 2017, "The truth is defined by the majority", fencing tokens).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import Connection, MetaData, Row, Select, false, func, insert, or_, select, update

from ..errors import ConflictError, InvalidInput, LeaseError, NotFoundError, StateError
from ..text import shown
from . import query as queries
from .released import ReleasedModels
from .scheduler import Capacity, RunningJob, Waiting, next_job, positions
from .states import KEEP, Event, EventKind, JobRow, JobState, Priority, advance, utc
from .tables import (
    MAX_CAUSE_CHARACTERS,
    ROW_COLUMNS,
    dump,
    events_table,
    from_record,
    jobs_table,
    load,
    queues_table,
    to_columns,
)

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
"""Larger requests are answered with a page of this size (https://google.aip.dev/158)."""

_ACTIVE: Final = (JobState.RUNNING.value, JobState.RETRYING.value, JobState.CANCELLING.value)
_MOVABLE: Final = (JobState.PENDING.value, *_ACTIVE)
_NUL_IN_JSON: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_NO_LEASE: Final = {"lease_holder": "", "lease_expires_at": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """One line of a job's history. `sequence` counts 1, 2, 3, … for each job; `state` is the one after the event."""

    job_id: str
    sequence: int
    time: str
    kind: EventKind
    state: JobState
    message: str
    cause: str
    detail: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drive a job: to write about it and to open rounds for it.

    Attributes:
        job_id: of the job.
        holder: names a process, never two of them; at most 64 characters.
        token: larger with each new lease on the job.
        expires_at: as the row has it; seconds since the epoch. A lease that is renewed is the same lease.
    """

    job_id: str
    holder: str
    token: int
    expires_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobQuery:
    """Which jobs to list.

    Attributes:
        filter, order_by: as `query.parse_filter` and `query.parse_order` read them.
        page_size: 0 for the default; more than `MAX_PAGE_SIZE` is that many.
        page_token: of the page before, asked for with the same of everything but `page_size`.
        owner: only theirs; None for everybody's.
        show_deleted: deleted jobs too.
    """

    filter: str = ""
    order_by: str = ""
    page_size: int = 0
    page_token: str = ""
    owner: str | None = None
    show_deleted: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs in order, and the token of the page after them (empty: there is none)."""

    rows: tuple[JobRow, ...]
    next_page_token: str


class JobStore:
    """Tables in `metadata`: `jobs`, `job_events`, `job_queues`, and that of `released`, what rounds have made."""

    def __init__(self, metadata: MetaData) -> None:
        self.jobs = jobs_table(metadata)
        self.events_table = events_table(metadata)
        self.queues_table = queues_table(metadata)
        self.released = ReleasedModels(metadata, self.jobs)
        self._row_columns = tuple(self.jobs.c[name] for name in ROW_COLUMNS)

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, connection: Connection, row: JobRow, *, said: Sequence[str] = ()) -> JobRow:
        """Store a PENDING job and its event "submitted", with what was `said`; of a repeated request the job there is.

        Raises:
            ConflictError: the owner used this request_id for another specification.
            InvalidInput: a text holds the character NUL, which no database keeps faithfully.
        """
        values = to_columns(row)
        for name, value in values.items():
            if isinstance(value, str) and ("\0" in value or (name == "spec" and _NUL_IN_JSON.search(value))):
                raise InvalidInput(f"{name} holds a NUL character", violations={name: "no NUL characters"})
        known = self.find_request(connection, row.owner, row.request_id)
        if known is not None:
            return same_request(known, row.spec_digest)
        connection.execute(insert(self.jobs).values(**values, fencing_token=0, **_NO_LEASE))
        submitted = Event(kind=EventKind.SUBMITTED, message="; ".join(("submitted", *said)), cause=row.owner)
        self._append(connection, row, submitted, time=row.created_at)
        return row

    def apply(
        self, connection: Connection, job_id: str, event: Event, *, now: float, lease: Lease | None = None
    ) -> JobRow:
        """Read the job, `advance` it by an event, write both; a job that comes to rest loses its lease.

        Args:
            now: seconds since the epoch.
            lease: of the caller, if it drives the job.

        Raises:
            LeaseError: as `check` does; before anything else that is wrong.
            NotFoundError, StateError: as `get` and `advance` do.
        """
        if lease is not None:
            self.check(connection, _of(lease, job_id))
        row = advance(self._locked(connection, job_id), event, now)
        values = to_columns(row) | (_NO_LEASE if row.at_rest else {})
        connection.execute(update(self.jobs).where(self.jobs.c.job_id == job_id).values(**values))
        self._append(connection, row, event, time=utc(now))
        return row

    def _append(self, connection: Connection, row: JobRow, event: Event, *, time: str) -> None:
        table = self.events_table
        last = connection.execute(select(func.max(table.c.sequence)).where(table.c.job_id == row.job_id)).scalar()
        connection.execute(
            insert(table).values(
                job_id=row.job_id,
                sequence=(last or 0) + 1,
                time=time,
                kind=event.kind.value,
                state=row.state.value,
                message=_without_nul(event.message),
                cause=_without_nul(event.cause)[:MAX_CAUSE_CHARACTERS],
                detail=dump(event.detail),
            )
        )

    # --- leases -------------------------------------------------------------------------------------------------------

    def acquire(
        self, connection: Connection, job_id: str, *, holder: str, now: float, lease_s: float, seize: bool = False
    ) -> Lease:
        """Take the lease on a job that is under way; whoever held it before can write no more.

        Args:
            now: seconds since the epoch; the lease expires `lease_s` (seconds) later.
            seize: take it even if it has not expired. Only for a caller that knows that nobody else is there.

        Raises:
            LeaseError: another holder's lease has not expired.
            NotFoundError: no such job.
            StateError: it is not under way.
        """
        jobs = self.jobs.c
        query = select(jobs.state, jobs.fencing_token, jobs.lease_holder, jobs.lease_expires_at)
        found = connection.execute(query.where(jobs.job_id == job_id).with_for_update()).one_or_none()
        if found is None:
            raise _missing(job_id)
        if found.state not in _ACTIVE:
            raise StateError(f"job {job_id} is {found.state}: there is nothing to drive", state=found.state)
        if not seize and found.lease_holder not in ("", holder) and found.lease_expires_at > utc(now):
            raise LeaseError(f"another process holds job {job_id} until {found.lease_expires_at}", job_id=job_id)
        lease = Lease(job_id, holder, found.fencing_token + 1, now + lease_s)
        values = {"fencing_token": lease.token, "lease_holder": holder, "lease_expires_at": utc(lease.expires_at)}
        connection.execute(update(self.jobs).where(jobs.job_id == job_id).values(**values))
        return lease

    def renew(self, connection: Connection, lease: Lease, *, now: float, lease_s: float) -> Lease:
        """The lease as it is now: it expires `lease_s` (seconds) from `now` (seconds since the epoch).

        Raises:
            LeaseError: as `check` does.
        """
        renewed = replace(lease, expires_at=now + lease_s)
        changed = update(self.jobs).where(*self._present(lease)).values(lease_expires_at=utc(renewed.expires_at))
        if connection.execute(changed).rowcount != 1:
            raise _lost(lease)
        return renewed

    def check(self, connection: Connection, lease: Lease) -> None:
        """Nothing changes this until the transaction ends. An expired lease is good until another one is taken.

        Raises:
            LeaseError: the job has another lease by now, or none: it is at rest, or not there.
        """
        query = select(self.jobs.c.job_id).where(*self._present(lease)).with_for_update()
        if connection.execute(query).one_or_none() is None:
            raise _lost(lease)

    def _present(self, lease: Lease) -> tuple[Any, ...]:
        jobs = self.jobs.c
        return jobs.job_id == lease.job_id, jobs.lease_holder == lease.holder, jobs.fencing_token == lease.token

    # --- the queue ----------------------------------------------------------------------------------------------------

    def take_next(
        self,
        connection: Connection,
        *,
        capacity: Capacity,
        holder: str,
        now: float,
        lease_s: float,
        ready: Callable[[JobRow], bool] | None = None,
    ) -> tuple[JobRow, Lease] | None:
        """Start the job whose turn it is, and take the lease on it; None when nothing can be started.

        Args:
            holder, now, lease_s: as for `acquire`.
            ready: a job of which it is false is passed over.
        """
        running, passes = self.running(connection), self.passes(connection)
        chosen = next_job(
            self.waiting(connection),
            running,
            passes=passes,
            capacity=capacity,
            ready=lambda job: ready is None or ready(self.get(connection, job.job_id)),
        )
        if chosen is None:
            return None
        job, after = chosen
        self._save_passes(connection, {queue: value for queue, value in after.items() if passes.get(queue) != value})
        started = Event(kind=EventKind.STARTED, message="started", cause="aggregator")
        row = self.apply(connection, job.job_id, started, now=now)
        return row, self.acquire(connection, job.job_id, holder=holder, now=now, lease_s=lease_s)

    def waiting(self, connection: Connection) -> list[Waiting]:
        """The PENDING jobs, who came first first."""
        jobs = self.jobs.c
        query = (
            select(jobs.job_id, jobs.owner, jobs.kind, jobs.priority, jobs.created_at)
            .where(jobs.state == JobState.PENDING.value)
            .order_by(jobs.created_at, jobs.job_id)
        )
        return [
            Waiting(job_id=job_id, owner=owner, kind=kind, priority=Priority(priority), created_at=created_at)
            for job_id, owner, kind, priority, created_at in connection.execute(query)
        ]

    def running(self, connection: Connection) -> list[RunningJob]:
        """What takes a place, oldest first."""
        jobs = self.jobs.c
        query = select(jobs.owner, jobs.kind).where(jobs.state.in_(_ACTIVE)).order_by(jobs.started_at, jobs.job_id)
        return [RunningJob(owner, kind) for owner, kind in connection.execute(query)]

    def passes(self, connection: Connection) -> dict[str, int]:
        """The pass of every class that was ever served."""
        return {queue: int(value) for queue, value in connection.execute(select(self.queues_table))}

    def positions(self, connection: Connection, capacity: Capacity) -> dict[str, int]:
        """The places of all PENDING jobs in the queues of their lanes, by job_id: 1 for the one that is started next.

        To be asked for once a listing, and only if it shows a PENDING job.
        """
        running, passes = self.running(connection), self.passes(connection)
        return positions(self.waiting(connection), running, passes=passes, capacity=capacity)

    def _save_passes(self, connection: Connection, passes: dict[str, int]) -> None:
        table = self.queues_table
        for queue, value in passes.items():
            changed = update(table).where(table.c.queue == queue).values(pass_value=value)
            if connection.execute(changed).rowcount == 0:
                connection.execute(insert(table).values(queue=queue, pass_value=value))

    # --- reading ------------------------------------------------------------------------------------------------------

    def get(self, connection: Connection, job_id: str) -> JobRow:
        """Raises NotFoundError when there is no such job."""
        found = self._select(connection, self.jobs.c.job_id == job_id)
        if not found:
            raise _missing(job_id)
        return found[0]

    def find_request(self, connection: Connection, owner: str, request_id: str) -> JobRow | None:
        """The job that an owner submitted under a request_id."""
        found = self._select(connection, self.jobs.c.owner == owner, self.jobs.c.request_id == request_id)
        return found[0] if found else None

    def active(self, connection: Connection) -> list[JobRow]:
        """The jobs that are RUNNING, RETRYING or CANCELLING, oldest first: what a restarted aggregator goes on with."""
        return self._select(connection, self.jobs.c.state.in_(_ACTIVE))

    def unfinished(self, connection: Connection, *, kind: str) -> list[JobRow]:
        """The jobs of a kind that are not at rest, oldest first."""
        return self._select(connection, self.jobs.c.state.in_(_MOVABLE), self.jobs.c.kind == kind)

    def overdue(self, connection: Connection, now: float) -> list[JobRow]:
        """The jobs whose deadline has passed, and that are not at rest or on their way there; oldest first."""
        jobs = self.jobs.c
        states = [state for state in _MOVABLE if state != JobState.CANCELLING.value]
        return self._select(connection, jobs.state.in_(states), jobs.deadline_at != "", jobs.deadline_at <= utc(now))

    def lapsed(self, connection: Connection, now: float) -> list[JobRow]:
        """The jobs under way that nobody drives: their lease has expired, or there is none; oldest first."""
        jobs = self.jobs.c
        return self._select(connection, jobs.state.in_(_ACTIVE), jobs.lease_expires_at <= utc(now))

    def count(self, connection: Connection, state: JobState) -> int:
        """How many jobs are in a state."""
        query = select(func.count()).where(self.jobs.c.state == state.value)
        return int(connection.execute(query).scalar_one())

    def pending_of(self, connection: Connection, owner: str) -> int:
        """How many jobs of an owner are PENDING."""
        jobs = self.jobs.c
        query = select(func.count()).where(jobs.state == JobState.PENDING.value, jobs.owner == owner)
        return int(connection.execute(query).scalar_one())

    def list_jobs(self, connection: Connection, *, query: JobQuery) -> Page:
        """A page of jobs. A job that is created while somebody turns pages, newest first, is neither skipped nor shown
        twice; nor is one that changes, unless it is sorted or filtered by what changes.

        Raises:
            InvalidInput: a filter, order or size that is none, or a token that is not of this listing.
        """
        if (size := query.page_size) < 0:
            raise InvalidInput("page_size is negative", violations={"page_size": f"at least 0 (got {size})"})
        size = min(size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        jobs, order = self.jobs, queries.parse_order(query.order_by)
        sorting = queries.ordering(order, jobs)
        conditions = [queries.condition(queries.parse_filter(query.filter), jobs)]
        if query.owner is not None:
            conditions.append(jobs.c.owner == query.owner)
        if not query.show_deleted:
            conditions.append(jobs.c.deleted_at == "")
        listing = (query.filter, query.order_by, query.owner, query.show_deleted)
        if query.page_token:
            conditions.append(queries.after(query.page_token, listing, order=order, jobs=jobs))
        wanted = select(*self._row_columns).order_by(*sorting)
        if query.filter or query.order_by:  # no index has this order: the keys are sorted, not the rows
            keys = select(jobs.c.job_id).where(*conditions).order_by(*sorting).limit(size + 1)
            wanted = wanted.where(jobs.c.job_id.in_(keys))
        else:
            wanted = wanted.where(*conditions).limit(size + 1)
        records = connection.execute(wanted).all()
        rows = tuple(from_record(record) for record in records[:size])
        more = len(records) > size
        return Page(rows, queries.page_token(rows[-1], listing, order=order) if more else "")

    def events(self, connection: Connection, job_id: str, *, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """A job's events after a sequence number, in order, at most `limit`; empty for a job that is not there."""
        table = self.events_table
        query = select(table).where(table.c.job_id == job_id, table.c.sequence > after).order_by(table.c.sequence)
        return [_event(record) for record in connection.execute(query.limit(limit))]

    def round_summaries(self, connection: Connection, job_id: str) -> list[dict[str, Any]]:
        """The details of a job's events of kind "round", in order."""
        return self._details(connection, EventKind.ROUND, (job_id,))

    def blobs(self, connection: Connection, *, among: Set[str] | None = None) -> set[str]:
        """SHA-256 (hex) of the blobs that jobs refer to: files and kept models of all not deleted, and of those not at
        rest the models that they begin with: their own, and the files of the job that they are about, even if that one
        has been deleted meanwhile. With `among` at least those of these: of others not all is read."""
        jobs = self.jobs.c
        kept = select(jobs.result).where(jobs.result.is_not(None), jobs.deleted_at == "")
        if among is not None:
            kept = kept.where(or_(false(), *(jobs.result.contains(sha256) for sha256 in sorted(among))))
        named = [load(result) for result in connection.scalars(kept)]
        specs = [load(spec) for spec in connection.scalars(select(jobs.spec).where(jobs.state.in_(_MOVABLE)))]
        sources = {spec["job_id"] for spec in specs if spec.get("job_id")}
        kept_for = [*named, *self._details(connection, EventKind.SUCCEEDED, sources)]
        return _blobs(specs, kept_for) | self.released.blobs(connection, among=among)

    def made_since(self, connection: Connection, owner: str, since: str) -> int:
        """How many jobs an owner has made since then (UTC, as `states.utc` writes it), deleted ones too."""
        jobs = self.jobs.c
        query = select(func.count()).where(jobs.owner == owner, jobs.created_at >= since)
        return int(connection.execute(query).scalar_one())

    def kept_for(self, connection: Connection, owner: str) -> tuple[dict[str, int], set[str]]:
        """What an owner's jobs keep on disk: the sizes (bytes), by SHA-256 (hex), of files and models of those that are
        not deleted; and the models that came with jobs which are not at rest, whose sizes nobody wrote down."""
        jobs = self.jobs.c
        kept = select(jobs.result).where(jobs.owner == owner, jobs.result.is_not(None), jobs.deleted_at == "")
        files = [file for result in connection.scalars(kept) for file in load(result).get("files", ())]
        brought = select(jobs.spec).where(jobs.owner == owner, jobs.state.in_(_MOVABLE))
        models = _blobs([load(spec) for spec in connection.scalars(brought)], [])
        sizes = {file["sha256"]: int(file["bytes"]) for file in files}
        return self.released.sizes_of(connection, owner) | sizes, models

    def blobs_of(self, connection: Connection, job_id: str) -> set[str]:
        """SHA-256 (hex) of what a job named, deleted or not: the model that it began with, its files, and those of the
        job that it is about."""
        spec = self.get(connection, job_id).spec
        made = self._details(connection, EventKind.SUCCEEDED, {job_id, spec.get("job_id") or job_id})
        return _blobs([spec], made) | self.released.blobs_of(connection, job_id)

    def keeps(self, connection: Connection, job_id: str) -> bool:
        """Whether a job that is being cancelled ends with what it has released."""
        return any(detail.get(KEEP) for detail in self._details(connection, EventKind.CANCELLING, (job_id,)))

    def under_way(self) -> Select[Any]:
        """A query for the jobs that are not at rest."""
        return select(self.jobs.c.job_id).where(self.jobs.c.state.in_(_MOVABLE))

    def _select(self, connection: Connection, *conditions: Any) -> list[JobRow]:
        """Jobs, who came first first."""
        jobs = self.jobs.c
        query = select(*self._row_columns).where(*conditions).order_by(jobs.created_at, jobs.job_id)
        return [from_record(record) for record in connection.execute(query)]

    def _locked(self, connection: Connection, job_id: str) -> JobRow:
        """The job, which nobody else changes until the transaction ends (SQLite has one writer anyway)."""
        query = select(*self._row_columns).where(self.jobs.c.job_id == job_id).with_for_update()
        record = connection.execute(query).one_or_none()
        if record is None:
            raise _missing(job_id)
        return from_record(record)

    def _details(self, connection: Connection, kind: EventKind, job_ids: Iterable[str]) -> list[dict[str, Any]]:
        """The details of the events of a kind, job by job, in order."""
        table = self.events_table
        query = (
            select(table.c.detail)
            .where(table.c.job_id.in_(sorted(job_ids)), table.c.kind == kind.value)
            .order_by(table.c.job_id, table.c.sequence)
        )
        return [load(detail) for detail in connection.scalars(query) if detail]


def same_request(known: JobRow, spec_digest: str) -> JobRow:
    """The job that a repeated request means; ConflictError when it asks for something else than the first time."""
    if known.spec_digest != spec_digest:
        raise ConflictError(
            f"request_id {known.request_id!r} was used for job {known.job_id}, which has another specification",
            job_id=known.job_id,
        )
    return known


def _blobs(specs: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]) -> set[str]:
    """What specifications and results name."""
    models = {spec.get(name, "") for spec in specs for name in ("initial_model_sha256", "model_sha256")}
    return (models | {file["sha256"] for result in results for file in result.get("files", ())}) - {""}


def _event(record: Row[Any]) -> StoredEvent:
    values = dict(record._mapping)
    values["kind"] = EventKind(values["kind"])
    values["state"] = JobState(values["state"])
    values["detail"] = load(values["detail"])
    return StoredEvent(**values)


def _of(lease: Lease, job_id: str) -> Lease:
    if lease.job_id != job_id:
        raise LeaseError(f"a lease on job {lease.job_id} is none on job {job_id}", job_id=job_id)
    return lease


def _missing(job_id: str) -> NotFoundError:
    return NotFoundError(f"no job {shown(job_id)}", job_id=job_id)


def _lost(lease: Lease) -> LeaseError:
    return LeaseError(f"this process does not hold job {lease.job_id} any more", job_id=lease.job_id)


def _without_nul(text: str) -> str:
    """PostgreSQL keeps no NUL; what some library said about a failure must not be what stops it from being recorded."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
