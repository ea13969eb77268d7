"""Jobs and their events in a relational database.

Every method works inside the caller's transaction, so that a job, its event and whatever else belongs to the same step
(a round, a ledger entry) are written together or not at all. The rules are those of `states`: the store refuses a row
that the table of transitions does not lead to.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    func,
    insert,
    or_,
    select,
)
from sqlalchemy import update as sql_update

from ..errors import ConflictError, InvalidInput, NotFoundError, StateError
from .states import AT_REST, TRANSITIONS, Event, EventKind, JobError, JobRow, JobState, advance, utc

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
"""Larger requests are answered with a page of this size (https://google.aip.dev/158)."""

_MOVABLE: Final = tuple(state.value for state in JobState if state not in AT_REST)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """One line of a job's history. `sequence` counts 1, 2, 3, … for each job; `state` is the one after the event."""

    job_id: str
    sequence: int
    time: str
    kind: EventKind
    state: JobState
    message: str
    detail: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs, newest first, and the token of the page after them (empty: there is none)."""

    rows: tuple[JobRow, ...]
    next_page_token: str


class JobStore:
    """Two tables in `metadata`: `jobs` and `job_events`."""

    def __init__(self, metadata: MetaData) -> None:
        self.jobs = Table(
            "jobs",
            metadata,
            Column("job_id", String(64), primary_key=True),
            Column("request_id", String(100), nullable=False),
            Column("owner", String(300), nullable=False),
            Column("display_name", Text, nullable=False),
            Column("spec", Text, nullable=False),
            Column("spec_digest", String(64), nullable=False),
            Column("state", String(16), nullable=False),
            Column("created_at", String(32), nullable=False),
            Column("started_at", String(32), nullable=False),
            Column("ended_at", String(32), nullable=False),
            Column("rounds_released", Integer, nullable=False),
            Column("rounds_failed", Integer, nullable=False),
            Column("error", Text),
            Column("result", Text),
            UniqueConstraint("owner", "request_id", name="jobs_request"),
            Index("jobs_newest", "created_at", "job_id"),
            Index("jobs_state", "state", "created_at"),
        )
        self.events_table = Table(
            "job_events",
            metadata,
            Column("job_id", String(64), ForeignKey("jobs.job_id"), primary_key=True),
            Column("sequence", Integer, primary_key=True, autoincrement=False),
            Column("time", String(32), nullable=False),
            Column("kind", String(16), nullable=False),
            Column("state", String(16), nullable=False),
            Column("message", Text, nullable=False),
            Column("detail", Text),
        )

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, connection: Connection, row: JobRow) -> JobRow:
        """Store a PENDING job and its event "submitted"; of a repeated request the job that is there already.

        Raises:
            ConflictError: the owner used this request_id for another specification.
        """
        known = self.find_request(connection, row.owner, row.request_id)
        if known is not None:
            return same_request(known, row.spec_digest)
        connection.execute(insert(self.jobs).values(**_to_columns(row)))
        self._append(connection, row, Event(kind=EventKind.SUBMITTED, message="submitted"), row.created_at)
        return row

    def apply(self, connection: Connection, job_id: str, event: Event, *, now: float) -> JobRow:
        """Read the job, `advance` it by an event, write both.

        Args:
            now: seconds since the epoch.

        Raises:
            NotFoundError, StateError: as `get` and `advance` do.
        """
        row = advance(self.get(connection, job_id), event, now)
        self._write(connection, row, event, utc(now))
        return row

    def update(
        self,
        connection: Connection,
        row: JobRow,
        kind: EventKind,
        *,
        now: float,
        message: str = "",
        detail: dict[str, Any] | None = None,
    ) -> JobRow:
        """Write a row that `advance` made, and its event.

        Raises:
            NotFoundError: no such job.
            StateError: the stored state does not lead to the row's by this event.
        """
        stored = self.get(connection, row.job_id)
        if TRANSITIONS.get((stored.state, kind)) is not row.state:
            raise StateError(
                f"job {row.job_id} does not go from {stored.state.value} to {row.state.value} by {kind.value!r}",
                state=stored.state.value,
            )
        self._write(connection, row, Event(kind=kind, message=message, detail=detail), utc(now))
        return row

    def _write(self, connection: Connection, row: JobRow, event: Event, time: str) -> None:
        connection.execute(sql_update(self.jobs).where(self.jobs.c.job_id == row.job_id).values(**_to_columns(row)))
        self._append(connection, row, event, time)

    def _append(self, connection: Connection, row: JobRow, event: Event, time: str) -> None:
        table = self.events_table
        last = connection.execute(select(func.max(table.c.sequence)).where(table.c.job_id == row.job_id)).scalar()
        connection.execute(
            insert(table).values(
                job_id=row.job_id,
                sequence=(last or 0) + 1,
                time=time,
                kind=event.kind.value,
                state=row.state.value,
                message=event.message,
                detail=_dump(event.detail),
            )
        )

    # --- reading ------------------------------------------------------------------------------------------------------

    def get(self, connection: Connection, job_id: str) -> JobRow:
        """Raises NotFoundError when there is no such job."""
        record = connection.execute(select(self.jobs).where(self.jobs.c.job_id == job_id)).one_or_none()
        if record is None:
            raise NotFoundError(f"no job {job_id!r}", job_id=job_id)
        return _from_record(record)

    def find_request(self, connection: Connection, owner: str, request_id: str) -> JobRow | None:
        """The job that an owner submitted under a request_id."""
        query = select(self.jobs).where(self.jobs.c.owner == owner, self.jobs.c.request_id == request_id)
        record = connection.execute(query).one_or_none()
        return None if record is None else _from_record(record)

    def list_jobs(
        self,
        connection: Connection,
        *,
        page_size: int = 0,
        page_token: str = "",
        state: JobState | None = None,
        owner: str | None = None,
    ) -> Page:
        """Jobs, newest first. A job that is created while somebody turns pages is neither skipped nor shown twice.

        Args:
            page_size: 0 for the default; more than `MAX_PAGE_SIZE` is that many.
            page_token: of the page before, asked for with the same state and owner.
            state: only jobs in it. owner: only theirs.

        Raises:
            InvalidInput: a negative size, or a token that is not of this listing.
        """
        if page_size < 0:
            raise InvalidInput("page_size is negative", violations={"page_size": f"at least 0 (got {page_size})"})
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        jobs = self.jobs.c
        query = select(self.jobs).order_by(jobs.created_at.desc(), jobs.job_id.desc()).limit(size + 1)
        if state is not None:
            query = query.where(jobs.state == state.value)
        if owner is not None:
            query = query.where(jobs.owner == owner)
        if page_token:
            created_at, job_id = _open_token(page_token, state)
            before = and_(jobs.created_at == created_at, jobs.job_id < job_id)
            query = query.where(or_(jobs.created_at < created_at, before))
        rows = [_from_record(record) for record in connection.execute(query)]
        more = len(rows) > size
        rows = rows[:size]
        return Page(tuple(rows), _make_token(rows[-1], state) if more else "")

    def events(self, connection: Connection, job_id: str, *, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """A job's events after a sequence number, in order, at most `limit`; empty for a job that is not there."""
        table = self.events_table
        query = (
            select(table)
            .where(table.c.job_id == job_id, table.c.sequence > after)
            .order_by(table.c.sequence)
            .limit(limit)
        )
        return [_event_from_record(record) for record in connection.execute(query)]

    def round_summaries(self, connection: Connection, job_id: str) -> list[dict[str, Any]]:
        """The details of a job's events of kind "round", in order."""
        table = self.events_table
        query = (
            select(table.c.detail)
            .where(table.c.job_id == job_id, table.c.kind == EventKind.ROUND.value)
            .order_by(table.c.sequence)
        )
        return [json.loads(detail) for detail in connection.scalars(query) if detail]

    def next_pending(self, connection: Connection) -> JobRow | None:
        """The job that has waited longest."""
        jobs = self.jobs.c
        query = (
            select(self.jobs)
            .where(jobs.state == JobState.PENDING.value)
            .order_by(jobs.created_at, jobs.job_id)
            .limit(1)
        )
        record = connection.execute(query).one_or_none()
        return None if record is None else _from_record(record)

    def active(self, connection: Connection) -> list[JobRow]:
        """The jobs that are RUNNING or CANCELLING, oldest first: what a restarted aggregator goes on with."""
        jobs = self.jobs.c
        moving = (JobState.RUNNING.value, JobState.CANCELLING.value)
        query = select(self.jobs).where(jobs.state.in_(moving)).order_by(jobs.created_at, jobs.job_id)
        return [_from_record(record) for record in connection.execute(query)]

    def count(self, connection: Connection, state: JobState) -> int:
        """How many jobs are in a state."""
        query = select(func.count()).select_from(self.jobs).where(self.jobs.c.state == state.value)
        return int(connection.execute(query).scalar_one())

    def queue_position(self, connection: Connection, row: JobRow) -> int:
        """1 for the pending job that is started next; 0 for one that does not wait."""
        if row.state is not JobState.PENDING:
            return 0
        jobs = self.jobs.c
        tied = and_(jobs.created_at == row.created_at, jobs.job_id < row.job_id)
        earlier = or_(jobs.created_at < row.created_at, tied)
        query = select(func.count()).select_from(self.jobs).where(jobs.state == JobState.PENDING.value).where(earlier)
        return int(connection.execute(query).scalar_one()) + 1

    def blobs(self, connection: Connection) -> set[str]:
        """SHA-256 (hex) of the blobs that jobs refer to: artifacts of any job, initial models of those not at rest."""
        jobs = self.jobs.c
        names: set[str] = set()
        for result in connection.scalars(select(jobs.result).where(jobs.result.is_not(None))):
            names.update(file["sha256"] for file in json.loads(result).get("files", ()))
        for spec in connection.scalars(select(jobs.spec).where(jobs.state.in_(_MOVABLE))):
            names.add(json.loads(spec).get("initial_model_sha256", ""))
        return names - {""}


def same_request(known: JobRow, spec_digest: str) -> JobRow:
    """The job that a repeated request means; ConflictError when it asks for something else than the first time."""
    if known.spec_digest != spec_digest:
        raise ConflictError(
            f"request_id {known.request_id!r} was used for job {known.job_id}, which has another specification",
            job_id=known.job_id,
        )
    return known


def _dump(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _to_columns(row: JobRow) -> dict[str, Any]:
    return {
        "job_id": row.job_id,
        "request_id": row.request_id,
        "owner": row.owner,
        "display_name": row.display_name,
        "spec": _dump(row.spec),
        "spec_digest": row.spec_digest,
        "state": row.state.value,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "ended_at": row.ended_at,
        "rounds_released": row.rounds_released,
        "rounds_failed": row.rounds_failed,
        "error": _dump(row.error.to_json() if row.error else None),
        "result": _dump(row.result),
    }


def _from_record(record: Row[Any]) -> JobRow:
    values = dict(record._mapping)
    values["spec"] = json.loads(values["spec"])
    values["state"] = JobState(values["state"])
    values["error"] = JobError.from_json(json.loads(values["error"])) if values["error"] else None
    values["result"] = json.loads(values["result"]) if values["result"] else None
    return JobRow(**values)


def _event_from_record(record: Row[Any]) -> StoredEvent:
    values = dict(record._mapping)
    values["kind"] = EventKind(values["kind"])
    values["state"] = JobState(values["state"])
    values["detail"] = json.loads(values["detail"]) if values["detail"] else None
    return StoredEvent(**values)


def _make_token(row: JobRow, state: JobState | None) -> str:
    content = json.dumps([row.created_at, row.job_id, state.value if state else ""])
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def _open_token(token: str, state: JobState | None) -> tuple[str, str]:
    try:
        content = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        created_at, job_id, of_state = map(str, content)
    except (ValueError, TypeError) as error:
        raise InvalidInput("page_token is not one", violations={"page_token": "not of this service"}) from error
    if of_state != (state.value if state else ""):
        raise InvalidInput("page_token is of another listing", violations={"page_token": "made for another filter"})
    return created_at, job_id
