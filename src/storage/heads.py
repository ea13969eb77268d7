"""What one role knows of another's ledger: the last heads that it was told, kept so that a rolled-back one is found.

A ledger that was cut at its end, or put back to an old copy with the rest of its database, is whole in itself. Only who
remembers an entry that it once had can see it. So a party's head is kept by the aggregator, and the aggregator's by
every party, each in its own database; they are compared when they meet. Several, since trainings run beside each other:
the head that one of them tells last need not be the newest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, func, select

from ..errors import InvalidInput, LedgerError
from ..privacy.entries import Entry
from ..privacy.standing import Standing, standing_of
from .columns import text

HEADS_KEPT: Final = 64
"""Of a ledger: the last that each of so many jobs told, many more than run at a time."""
NAMED_DIGITS: Final = 16
MOST_NAMED: Final = 24
"""In one reason, which holds 500 characters."""
LONGEST_JOB_ID: Final = 64
_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Head:
    """A ledger once ended with the entry of this digest (64 hex digits); known since a round of a job.

    Raises:
        InvalidInput: `digest` is none, or `job_id` is not 1 to 64 printable characters.
    """

    digest: str
    job_id: str
    round: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise InvalidInput("the head of a ledger has 64 hex digits")
        if not (1 <= len(self.job_id) <= LONGEST_JOB_ID and self.job_id.isprintable()):
            raise InvalidInput("the head of a ledger names a job")


class HeadStore:
    """Adds the table `ledger_heads` to `metadata`: one row for each role and job, replaced by what it tells next."""

    def __init__(self, metadata: MetaData) -> None:
        self._table = Table(
            "ledger_heads",
            metadata,
            Column("name", text(64), primary_key=True),
            Column("job_id", text(LONGEST_JOB_ID), primary_key=True),
            Column("round", Integer, nullable=False),
            Column("digest", String(64), nullable=False),
            Column("told", Integer, nullable=False),
        )

    def remember(self, connection: Connection, name: str, head: Head) -> None:
        """Keep what a job told of the ledger of `name`, for what it told before; of too many jobs the first goes."""
        table = self._table
        mine, job = table.c.name == name, table.c.job_id == head.job_id
        if connection.execute(select(table.c.digest).where(mine, job)).scalar() == head.digest:
            return
        told = (connection.execute(select(func.max(table.c.told)).where(mine)).scalar() or 0) + 1
        connection.execute(table.delete().where(mine, job))
        others = select(table.c.told).where(mine).order_by(table.c.told.desc())
        oldest = connection.execute(others.offset(HEADS_KEPT - 2).limit(1)).scalar()
        if oldest is not None:
            connection.execute(table.delete().where(mine, table.c.told < oldest))
        connection.execute(
            table.insert().values(name=name, job_id=head.job_id, round=head.round, digest=head.digest, told=told)
        )

    def told(self, connection: Connection, name: str) -> tuple[Head, ...]:
        """The heads of the ledger of `name`, told last last; none before it told any."""
        table = self._table
        query = select(table.c.digest, table.c.job_id, table.c.round).where(table.c.name == name).order_by(table.c.told)
        return tuple(Head(row.digest, row.job_id, row.round) for row in connection.execute(query))


def check_heads(
    entries: Iterable[Entry] | Standing, heads: Sequence[Head], *, whose: str, told_by: str, account: tuple[str, str]
) -> None:
    """Fail closed unless a ledger once ended with each of `heads`, or its operator has answered for the loss.

    An operator answers by corrections (`sotto budget set | reset`) whose reasons name each that is missing, by its
    first `NAMED_DIGITS` digits.

    Args:
        entries: of this role's ledger, verified.
        heads: told last last.
        whose: this role, and told_by: the one that remembers the heads; as they stand in the message.
        account: (unit, subject) that the operator may correct, as it stands in the message.

    Raises:
        LedgerError: neither; names what is missing, as far as one reason can name it.
    """
    known = standing_of(entries)
    unknown = [head for head in heads if head.digest not in known.digests]
    missing = [head for head in unknown if not any(_name(head) in each for each in known.reasons)]
    if not missing:
        return
    last, (unit, subject) = missing[-1], account
    others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
    names = " ".join(map(_name, missing[-MOST_NAMED:]))
    again = f" ({MOST_NAMED} of {len(missing)}, and then again)" if len(missing) > MOST_NAMED else ""
    raise LedgerError(
        f"{whose} ledger lacks the entry {last.digest}{others}, which {told_by} knows as its head since round "
        f"{last.round} of job {last.job_id}: its database was rolled back to an old copy, or is another one, that of "
        "a second machine with the same kit for example. Put the newest copy back, and let one machine use it. "
        "Only if that is lost for good: stop the role and enter, with a limit that leaves room for what was spent "
        f"since, sotto budget set --config … --unit {unit} --subject {subject!r} --max-rounds … --epsilon … "
        f"--reason 'lost: {names}'{again}",
        job=last.job_id,
        round=last.round,
    )


def _name(head: Head) -> str:
    return head.digest[:NAMED_DIGITS]
