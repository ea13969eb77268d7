"""How far a role has verified its own ledger, signed by it, so that its next start verifies what came after.

A checkpoint is of the bytes of all rows up to an entry: where these are the same to the bit, they were verified by
whoever signed it; where one is not, everything is verified again, and the bad entry is named. Without one, or with one
that the role's own key did not sign, everything is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from sqlalchemy import Column, Connection, Integer, MetaData, Table, select

from .columns import text

EVERY: Final = 256
"""Entries between two checkpoints: to verify as many takes a tenth of a second."""

Row = tuple[int, str, str]
"""Sequence, digest, line."""


class Attester(Protocol):
    """Whoever keeps the ledger, as `protocol.ledger.EntrySigner`."""

    def attest(self, count: int, rows: str) -> str:
        """The signature, hex, on the first `count` rows having this digest (hex)."""

    def attested(self, count: int, rows: str, signature: str) -> bool:
        """Whether it is that."""


def checkpoint_table(metadata: MetaData) -> Table:
    """`ledger_checkpoint`: one row at most. `entries` is how many it is of, `digest` that of their rows."""
    return Table(
        "ledger_checkpoint",
        metadata,
        Column("entries", Integer, primary_key=True, autoincrement=False),
        Column("digest", text(), nullable=False),
        Column("signature", text(), nullable=False),
    )


def digest_of(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows, hex; no two lists of rows have the same text."""
    found = hashlib.sha256(b"sotto.v1.ledger-checkpoint\x00")
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()


def verified_before(connection: Connection, table: Table, rows: Sequence[Row], *, attester: Attester) -> int:
    """How many of a ledger's rows, from the first on, are what a checkpoint says; 0 without one that holds."""
    found = connection.execute(select(table)).all()
    if len(found) != 1 or not 0 < found[0].entries <= len(rows):
        return 0
    (checkpoint,) = found
    if not attester.attested(checkpoint.entries, checkpoint.digest, checkpoint.signature):
        return 0
    return int(checkpoint.entries) if digest_of(rows[: checkpoint.entries]) == checkpoint.digest else 0


def checkpoint(connection: Connection, table: Table, rows: Sequence[Row], *, attester: Attester) -> None:
    """These rows, all of them, were verified."""
    digest = digest_of(rows)
    connection.execute(table.delete())
    connection.execute(
        table.insert().values(entries=len(rows), digest=digest, signature=attester.attest(len(rows), digest))
    )
