"""Rounds and enrolled parties in the aggregator's database."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    select,
    true,
)

from ..errors import ConflictError, NotFoundError
from ..jobs.store import JobStore
from .round_row import RoundRow, RoundState, SpentRounds, blobs_of, check_follows, models_of, spent_through


class RoundStore:
    """The table `rounds`: one row a round, its content as JSON, with the columns that queries need; and `round_blobs`:
    which blobs each names, so that nobody has to read all rounds to know whether somebody needs one."""

    def __init__(self, metadata: MetaData) -> None:
        self._table = Table(
            "rounds",
            metadata,
            Column("job_id", String(64), primary_key=True),
            Column("number", Integer, primary_key=True),
            Column("state", String(16), nullable=False),
            Column("settled", Boolean, nullable=False),
            Column("content", Text, nullable=False),
        )
        self._blobs = Table(
            "round_blobs",
            metadata,
            Column("job_id", String(64), primary_key=True),
            Column("number", Integer, primary_key=True),
            Column("sha256", String(64), primary_key=True),
            Index("round_blobs_sha256", "sha256"),
        )

    def insert(self, connection: Connection, row: RoundRow) -> None:
        """Store a new round; a round number is used once (IntegrityError otherwise)."""
        connection.execute(self._table.insert().values(job_id=row.job_id, number=row.number, **_columns(row)))
        self._name(connection, row, _named(row))

    def update(self, connection: Connection, row: RoundRow) -> frozenset[str]:
        """Replace the content of a stored round; returns the blobs that it needs no more: once the ledger has the last
        word on it, all that was sent for it.

        Raises:
            NotFoundError: there is none.
            StateError: the row was made of an older one than is stored.
        """
        before = self.get(connection, row.job_id, row.number)
        check_follows(before, row)
        where = (self._table.c.job_id == row.job_id) & (self._table.c.number == row.number)
        connection.execute(self._table.update().where(where).values(**_columns(row)))
        known, named = _named(before), _named(row)
        self._name(connection, row, named - known)
        if gone := known - named:
            mine = (self._blobs.c.job_id == row.job_id) & (self._blobs.c.number == row.number)
            connection.execute(self._blobs.delete().where(mine, self._blobs.c.sha256.in_(sorted(gone))))
        return gone

    def _name(self, connection: Connection, row: RoundRow, blobs: frozenset[str]) -> None:
        named = [{"job_id": row.job_id, "number": row.number, "sha256": sha256} for sha256 in sorted(blobs)]
        if named:
            connection.execute(self._blobs.insert(), named)

    def get(self, connection: Connection, job_id: str, number: int) -> RoundRow:
        """One round; NotFoundError when there is none."""
        where = (self._table.c.job_id == job_id) & (self._table.c.number == number)
        content = connection.execute(select(self._table.c.content).where(where)).scalar()
        if content is None:
            raise NotFoundError(f"no round {number} of job {job_id}", job=job_id, round=number)
        return RoundRow.from_json(json.loads(content))

    def latest(self, connection: Connection, job_id: str, *, state: RoundState | None = None) -> RoundRow | None:
        """The newest round of a job, or the newest of those in a state; None before the first."""
        table = self._table
        query = select(table.c.content).where(table.c.job_id == job_id).order_by(table.c.number.desc()).limit(1)
        if state is not None:
            query = query.where(table.c.state == state.value)
        content = connection.execute(query).scalar()
        return None if content is None else RoundRow.from_json(json.loads(content))

    def of_job(self, connection: Connection, job_id: str) -> list[RoundRow]:
        """All rounds of a job, oldest first."""
        query = select(self._table.c.content).where(self._table.c.job_id == job_id).order_by(self._table.c.number)
        return [RoundRow.from_json(json.loads(content)) for content in connection.execute(query).scalars()]

    def spent_before(self, connection: Connection, row: RoundRow) -> tuple[SpentRounds, ...]:
        """Rounds of its job that count as spent before this one. A row of a version that did not keep them is asked
        for the last time: the next one keeps them."""
        if row.spent_before is not None:
            return row.spent_before
        spent: tuple[SpentRounds, ...] = ()
        for each in self.of_job(connection, row.job_id):
            spent = spent_through(each, spent) if each.number < row.number else spent
        return spent

    def blobs(
        self, connection: Connection, *, of: Select[Any] | None = None, among: Set[str] | None = None
    ) -> set[str]:
        """Digests of the blobs that rounds need, of the jobs `of` or of all: whatever one names that is not settled,
        and what the last one that was released has made, from which its job goes on.

        Args:
            among: at least those of these: the rounds that name one of them are read, and no others.
        """
        table, named = self._table, self._blobs
        wanted: ColumnElement[bool] = table.c.job_id.in_(of) if of is not None else true()
        if among is not None:
            wanted &= named.c.sha256.in_(sorted(among))
        same = (named.c.job_id == table.c.job_id) & (named.c.number == table.c.number)
        query = select(named.c.sha256, table.c.job_id, table.c.number, table.c.settled)
        rows = connection.execute(query.select_from(named.join(table, same)).where(wanted)).all()
        last = {job_id: self._last_released(connection, job_id) for job_id in {row.job_id for row in rows}}
        return {row.sha256 for row in rows if not row.settled or row.number == last[row.job_id]}

    def _last_released(self, connection: Connection, job_id: str) -> int | None:
        """The number of the newest round of a job that was released."""
        table = self._table
        query = select(table.c.number).where(table.c.job_id == job_id, table.c.state == RoundState.RELEASED.value)
        number: int | None = connection.execute(query.order_by(table.c.number.desc()).limit(1)).scalar()
        return number

    def models(self, connection: Connection, job_id: str) -> set[str]:
        """Digests of what a job's rounds began with and made; batches and shares went when a round was settled."""
        return {blob for row in self.of_job(connection, job_id) for blob in models_of(row)}


def _named(row: RoundRow) -> frozenset[str]:
    """What a round keeps: once the ledger has the last word on it, nothing that was sent for it."""
    return models_of(row) if row.settled else blobs_of(row)


def _columns(row: RoundRow) -> dict[str, object]:
    return {"state": row.state.value, "settled": row.settled, "content": json.dumps(row.to_json())}


class BlobNames:
    """Which blobs jobs and their rounds name (`storage.leftovers.JobNames`): rounds as long as their job is under way,
    then its files until it is deleted, and of a deleted one what another is about."""

    def __init__(self, jobs: JobStore, rounds: RoundStore) -> None:
        self._jobs = jobs
        self._rounds = rounds

    def blobs(self, connection: Connection, *, among: Set[str] | None = None) -> set[str]:
        """Digests of all that are needed, or at least those of these."""
        under_way = self._rounds.blobs(connection, of=self._jobs.under_way(), among=among)
        return self._jobs.blobs(connection, among=among) | under_way

    def blobs_of(self, connection: Connection, job_id: str) -> set[str]:
        """Digests of those that a job named."""
        return self._jobs.blobs_of(connection, job_id) | self._rounds.models(connection, job_id)


class EnrolmentStore:
    """The table `enrolment`: parties that joined a federation without a pinned roster (the classic set-up)."""

    def __init__(self, metadata: MetaData) -> None:
        self._table = Table(
            "enrolment",
            metadata,
            Column("name", String(64), primary_key=True),
            Column("verify_key", LargeBinary(32), nullable=False),
        )

    def enrol(self, connection: Connection, name: str, verify_key: bytes) -> None:
        """Remember a party by its first key; another key under the same name is a ConflictError."""
        known = connection.execute(select(self._table.c.verify_key).where(self._table.c.name == name)).scalar()
        if known is None:
            connection.execute(self._table.insert().values(name=name, verify_key=verify_key))
        elif known != verify_key:
            raise ConflictError(f"party {name!r} joined before with another signing key", party=name)

    def members(self, connection: Connection) -> Sequence[tuple[str, bytes]]:
        """(name, verification key) of everyone enrolled, by name."""
        query = select(self._table.c.name, self._table.c.verify_key).order_by(self._table.c.name)
        return [(str(name), bytes(key)) for name, key in connection.execute(query)]
