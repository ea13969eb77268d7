"""A party's memory: which rounds it took part in, what it sent, what it opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, Text, select

from ..errors import PlanError


class Stage(StrEnum):
    """How far a party is in a round."""

    WITNESS = "WITNESS"
    """It holds a key share, and was not invited to contribute."""
    RESERVED = "RESERVED"
    """Its budget is charged; it may train."""
    COMMITTED = "COMMITTED"
    """The batch is stored, its root signed; nothing has left."""
    REVEALED = "REVEALED"
    """A byte may have left: what was reserved is spent."""
    DELIVERED = "DELIVERED"
    """The aggregator said that the upload counts."""
    FAILED = "FAILED"
    """It refused or failed before anything left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartyRound:
    """One round as the party knows it.

    Attributes:
        plan: digest of the round plan: another plan under the same job and round is refused.
        batch: the stored batch (`protocol.batches.StoredBatch` as JSON) once committed.
        root: the signed root (`Signed.to_json`) once committed.
        list: digest of the frozen list once one was accepted: another one is refused.
        aggregate_root: what this party opened or is about to; another one is refused for ever.
        share: blob of the share batch that was sent.
        ended: the state in which the aggregator said the round ended; empty before.
        failure: (reason, public text) in FAILED.
    """

    job_id: str
    number: int
    plan: str
    stage: Stage
    batch: dict[str, Any] | None = None
    root: dict[str, str] | None = None
    list: str = ""
    aggregate_root: str = ""
    share: str = ""
    ended: str = ""
    failure: tuple[str, str] = ("", "")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PartyRound:
        """What `to_json` wrote."""
        reason, text = value["failure"]
        return cls(**{**value, "stage": Stage(value["stage"]), "failure": (reason, text)})


class RoundMemory:
    """The table `party_rounds`; methods work inside the caller's transaction. Rows are never deleted."""

    def __init__(self, metadata: MetaData) -> None:
        self._table = Table(
            "party_rounds",
            metadata,
            Column("job_id", String(64), primary_key=True),
            Column("number", Integer, primary_key=True),
            Column("ended", String(16), nullable=False),
            Column("content", Text, nullable=False),
        )

    def find(self, connection: Connection, job_id: str, number: int) -> PartyRound | None:
        """What is remembered of a round."""
        where = (self._table.c.job_id == job_id) & (self._table.c.number == number)
        content = connection.execute(select(self._table.c.content).where(where)).scalar()
        return None if content is None else PartyRound.from_json(json.loads(content))

    def put(self, connection: Connection, row: PartyRound) -> None:
        """Insert or replace; PlanError when the round is remembered under another plan, list or aggregate."""
        known = self.find(connection, row.job_id, row.number)
        if known is None:
            connection.execute(self._table.insert().values(job_id=row.job_id, number=row.number, **_columns(row)))
            return
        check_same(known, row)
        where = (self._table.c.job_id == row.job_id) & (self._table.c.number == row.number)
        connection.execute(self._table.update().where(where).values(**_columns(row)))

    def open_rounds(self, connection: Connection) -> list[PartyRound]:
        """Rounds of which the party does not know how they ended."""
        query = select(self._table.c.content).where(self._table.c.ended == "")
        return [PartyRound.from_json(json.loads(content)) for content in connection.execute(query).scalars()]

    def blobs(self, connection: Connection) -> set[str]:
        """Digests of the blobs that rounds not yet ended may still need."""
        rows = self.open_rounds(connection)
        return {row.batch["sha256"] for row in rows if row.batch} | {row.share for row in rows if row.share}


def check_same(known: PartyRound, row: PartyRound) -> None:
    """A round has one plan, one list, one aggregate: PlanError when `row` has another than is known."""
    for what in ("plan", "list", "aggregate_root"):
        before, now = getattr(known, what), getattr(row, what)
        if before and before != now:
            name = what.replace("_", " ")
            raise PlanError(
                f"round {row.number} of job {row.job_id} was shown to this party with another {name} before",
                job=row.job_id,
                round=row.number,
            )


def _columns(row: PartyRound) -> dict[str, str]:
    return {"ended": row.ended, "content": json.dumps(row.to_json())}
