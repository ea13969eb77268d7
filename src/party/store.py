"""A party's memory: which rounds it took part in, what it sent, what it opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Column, Connection, Index, Integer, MetaData, String, Table, Text, select

from ..errors import PlanError, StateError

LONGEST_END: Final = 16
"""Characters of the state in which a round ended."""


class Stage(StrEnum):
    """How far a party is in a round."""

    WITNESS = "WITNESS"
    """It holds a key share, and was not invited to contribute."""
    RESERVED = "RESERVED"
    """Its budget is charged; it may train. Once a training has begun the charge is final."""
    COMMITTED = "COMMITTED"
    """The batch is stored, its root signed and perhaps told; no ciphertext has left."""
    REVEALED = "REVEALED"
    """A ciphertext may have left."""
    DELIVERED = "DELIVERED"
    """The aggregator said that the upload counts."""
    FAILED = "FAILED"
    """It refused or failed before anything left."""


_AFTER: Final[dict[Stage, frozenset[Stage]]] = {
    Stage.WITNESS: frozenset(),
    Stage.RESERVED: frozenset({Stage.COMMITTED, Stage.REVEALED, Stage.DELIVERED, Stage.FAILED}),
    Stage.COMMITTED: frozenset({Stage.REVEALED, Stage.DELIVERED}),
    Stage.REVEALED: frozenset({Stage.DELIVERED}),
    Stage.DELIVERED: frozenset(),
    Stage.FAILED: frozenset(),
}
"""What may come after a stage: none goes back."""
_SHOWN: Final = ("plan", "list", "aggregate_root")
"""What a round has one of, whoever shows it."""
_MADE: Final = ("batch", "root", "share", "ended", "failure")
"""What this party makes or hears once."""
_NOTHING: Final = (None, "", ("", ""))


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
        trainings: how often training began; from the first on the charge is final.
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
    trainings: int = 0

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
            Column("ended", String(LONGEST_END), nullable=False),
            Column("content", Text, nullable=False),
        )
        # Rows are never deleted: who looks for those that are open reads no others.
        Index("party_rounds_ended", self._table.c.ended)

    def find(self, connection: Connection, job_id: str, number: int) -> PartyRound | None:
        """What is remembered of a round."""
        where = (self._table.c.job_id == job_id) & (self._table.c.number == number)
        content = connection.execute(select(self._table.c.content).where(where)).scalar()
        return None if content is None else PartyRound.from_json(json.loads(content))

    def put(self, connection: Connection, row: PartyRound) -> None:
        """Insert, or replace what was read in this transaction. Nothing that is known is lost by it.

        Raises:
            PlanError: the round is remembered under another plan, list or aggregate.
            StateError: it is remembered as further than `row` says, or with something that `row` lacks: `row` is old.
        """
        known = self.find(connection, row.job_id, row.number)
        if known is None:
            connection.execute(self._table.insert().values(job_id=row.job_id, number=row.number, **_columns(row)))
            return
        check_same(known, row)
        check_follows(known, row)
        where = (self._table.c.job_id == row.job_id) & (self._table.c.number == row.number)
        connection.execute(self._table.update().where(where).values(**_columns(row)))

    def open_rounds(self, connection: Connection) -> list[PartyRound]:
        """Rounds of which the party does not know how they ended."""
        query = select(self._table.c.content).where(self._table.c.ended == "")
        return [PartyRound.from_json(json.loads(content)) for content in connection.execute(query).scalars()]

    def blobs(self, connection: Connection, *, among: Set[str] | None = None) -> set[str]:
        """Digests of the blobs that rounds not yet ended may still need, whichever are asked about: there are few."""
        rows = self.open_rounds(connection)
        return {row.batch["sha256"] for row in rows if row.batch} | {row.share for row in rows if row.share}


def check_same(known: PartyRound, row: PartyRound) -> None:
    """A round has one plan, one list, one aggregate: PlanError when `row` has another than is known."""
    for what in _SHOWN:
        before, now = getattr(known, what), getattr(row, what)
        if before and before != now:
            name = what.replace("_", " ")
            raise PlanError(
                f"round {row.number} of job {row.job_id} was shown to this party with another {name} before",
                job=row.job_id,
                round=row.number,
            )


def check_follows(known: PartyRound, row: PartyRound) -> None:
    """No stage goes back, and what is set once stays: StateError when `row` was made of an older one than is known."""
    forgotten = [
        what for what in _MADE if getattr(known, what) not in _NOTHING and getattr(known, what) != getattr(row, what)
    ]
    back = row.stage is not known.stage and row.stage not in _AFTER[known.stage]
    if forgotten or back or row.trainings < known.trainings:
        what = ", ".join(forgotten) or "trainings"
        text = f"from {known.stage.value} to {row.stage.value}" if back else f"with another {what} than before"
        raise StateError(
            f"round {row.number} of job {row.job_id} does not go on {text}", job=row.job_id, round=row.number
        )


def _columns(row: PartyRound) -> dict[str, str]:
    return {"ended": row.ended, "content": json.dumps(row.to_json())}
