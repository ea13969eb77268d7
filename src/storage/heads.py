"""What one role knows of another's ledger: the last head that it was told, kept so that a rolled-back one is found.

A ledger that was cut at its end, or put back to an old copy with the rest of its database, is whole in itself. Only who
remembers an entry that it once had can see it. So a party's head is kept by the aggregator, and the aggregator's by
every party, each in its own database; they are compared when they meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, select

from ..errors import InvalidInput, LedgerError
from ..privacy.ledger import GENESIS, Entry
from .columns import text

_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Head:
    """A ledger once ended with the entry of this digest (64 hex digits); known since a round of a job.

    Raises:
        InvalidInput: `digest` is none.
    """

    digest: str
    job_id: str
    round: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise InvalidInput("the head of a ledger has 64 hex digits")


class HeadStore:
    """Adds the table `ledger_heads` to `metadata`: one row for each role, replaced by what it tells next."""

    def __init__(self, metadata: MetaData) -> None:
        self._table = Table(
            "ledger_heads",
            metadata,
            Column("name", text(64), primary_key=True),
            Column("digest", String(64), nullable=False),
            Column("job_id", text(64), nullable=False),
            Column("round", Integer, nullable=False),
        )

    def remember(self, connection: Connection, name: str, head: Head) -> None:
        """Keep the newest head of the ledger of `name`; what is known already is not written again."""
        if self.last(connection, name) == head:
            return
        values = {"digest": head.digest, "job_id": head.job_id, "round": head.round}
        where = self._table.c.name == name
        if not connection.execute(self._table.update().where(where).values(**values)).rowcount:
            connection.execute(self._table.insert().values(name=name, **values))

    def last(self, connection: Connection, name: str) -> Head | None:
        """The newest head of the ledger of `name`; None before it told any."""
        table = self._table
        query = select(table.c.digest, table.c.job_id, table.c.round).where(table.c.name == name)
        row = connection.execute(query).first()
        return None if row is None else Head(row.digest, row.job_id, row.round)


def check_head(entries: Iterable[Entry], head: Head, *, whose: str, told_by: str, account: tuple[str, str]) -> None:
    """Fail closed unless a ledger once ended with `head`, or its operator has answered for the loss.

    An operator answers by a correction (`sotto budget set | reset`) whose reason names the digest in full.

    Args:
        entries: of this role's ledger, verified.
        whose: this role, and told_by: the one that remembers the head; as they stand in the message.
        account: (unit, subject) that the operator may correct, as it stands in the message.

    Raises:
        LedgerError: neither.
    """
    entries = list(entries)
    if head.digest == GENESIS or any(entry.digest == head.digest for entry in entries):
        return
    if any(entry.kind == "correction" and head.digest in entry.reason for entry in entries):
        return
    unit, subject = account
    raise LedgerError(
        f"{whose} ledger lacks the entry {head.digest}, which {told_by} knows as its head since round {head.round} of "
        f"job {head.job_id}: its database was rolled back to an old copy, or is another one. Put the newest copy back. "
        "Only if that is lost for good: stop the role and enter, with a limit that leaves room for what was spent "
        f"since, sotto budget set --config … --unit {unit} --subject {subject!r} --max-rounds … --epsilon … "
        f"--reason 'lost: {head.digest}'",
        job=head.job_id,
        round=head.round,
    )
