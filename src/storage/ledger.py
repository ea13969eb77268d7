"""The privacy ledger as a table of the role's own database, so that a charge commits with what it is charged for.

A row is the entry's canonical line and nothing that could contradict it. Triggers make the table append-only; the chain
of digests (`privacy.ledger`) shows what got past them. Every reading of entries verifies the whole chain: nothing is
priced, reserved or released on top of a broken ledger. (Lines that are, letter for letter, those of the reading before
were verified then.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from sqlalchemy import DDL, Column, Connection, Integer, MetaData, Table, event, insert, select

from ..errors import LedgerError
from ..privacy import ledger
from ..privacy.ledger import GENESIS, Entry, Replay
from .columns import text

TRIGGERS: Final[Mapping[str, tuple[str, ...]]] = {
    "sqlite": (
        "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
        "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
        # A gap or a second first entry would be seen by the chain too, but only later.
        # A second row of a digest, as INSERT OR REPLACE would make it, deletes the first unseen by the trigger above,
        # unless the connection has asked for recursive triggers.
        "CREATE TRIGGER ledger_in_order BEFORE INSERT ON ledger "
        "WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence), 0) + 1 FROM ledger) "
        "OR EXISTS (SELECT 1 FROM ledger WHERE digest = NEW.digest) "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ "
        "BEGIN RAISE EXCEPTION 'the ledger is append-only' "
        "USING ERRCODE = 'integrity_constraint_violation'; END $$",
        "CREATE OR REPLACE FUNCTION ledger_check_order() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.sequence IS DISTINCT FROM (SELECT COALESCE(MAX(sequence), 0) + 1 FROM ledger) THEN "
        "RAISE EXCEPTION 'the ledger is append-only' "
        "USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN NEW; END $$",
        *(
            f"CREATE TRIGGER ledger_no_{what.lower()} BEFORE {what} ON ledger "
            "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()"
            for what in ("UPDATE", "DELETE", "TRUNCATE")
        ),
        "CREATE TRIGGER ledger_in_order BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION ledger_check_order()",
    ),
}
"""What makes the table append-only, by SQLAlchemy's name of the dialect; run once the table is made."""


Judge = Callable[[Entry], None]
"""Raises LedgerError for an entry that is not signed as it must be; is called with each in order, once."""


class Signer(Protocol):
    """Whoever keeps the ledger, as `protocol.ledger.EntrySigner`."""

    def sign(self, entry: Entry) -> str:
        """The signature over the entry's digest."""

    def judge(self) -> Judge:
        """Of one reading of the whole ledger: refuses what this signer did not sign."""


@dataclass(slots=True)
class _Read:
    """What was read and verified last."""

    rows: list[tuple[int, str, str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    replay: Replay = field(default_factory=Replay)


def version_1_table(metadata: MetaData) -> Table:
    """How many lines of version 1 the ledger begins with, and their head: one row, written by the upgrade that made the
    table. Such lines are not signed; others than these cannot be put before those that are."""
    return Table(
        "ledger_version_1",
        metadata,
        Column("entries", Integer, primary_key=True, autoincrement=False),
        Column("head", text(), nullable=False),
    )


class LedgerStore:
    """Adds the table `ledger` to `metadata`; its methods take the connection of the caller's transaction.

    Args:
        metadata: of the role's database.
        signer: signs what is written, and checks on `verify` that it signed all of it. None: entries are not signed.
    """

    def __init__(self, metadata: MetaData, *, signer: Signer | None = None) -> None:
        self._signer = signer
        self._read = _Read()
        self._table = Table(
            "ledger",
            metadata,
            Column("sequence", Integer, primary_key=True, autoincrement=False),
            Column("digest", text(), nullable=False, unique=True),
            Column("line", text(), nullable=False),
        )
        self._version_1 = version_1_table(metadata)
        for dialect, statements in TRIGGERS.items():
            for statement in statements:
                ddl = DDL(statement).execute_if(dialect=dialect)  # type: ignore[no-untyped-call]
                event.listen(self._table, "after_create", ddl)

    def append(self, connection: Connection, **fields: Any) -> Entry:
        """Appends the entry with these fields (those of `privacy.ledger.append`), chained to the last one.

        Raises:
            InvalidInput: fields that no ledger accepts.
            LedgerError: the last entry is damaged.
        """
        return self.add(connection, ledger.append(self._last(connection), **fields))

    def add(self, connection: Connection, entry: Entry) -> Entry:
        """Writes what the rules of `privacy.ledger` returned: a new entry, or one that is there. Returns it, signed.

        Raises:
            LedgerError: it is neither the ledger's next entry nor one of its entries.
        """
        table = self._table
        held = connection.execute(select(table).where(table.c.sequence == entry.sequence)).first()
        if held is not None and held.digest == entry.digest:
            return ledger.from_line(held.line, number=entry.sequence)
        last = self._last(connection)
        follows = entry.sequence == (last.sequence + 1 if last else 1)
        if held is not None or not follows or entry.previous != (last.digest if last else GENESIS):
            raise LedgerError(f"ledger entry {entry.sequence} does not follow the last one", entry=entry.sequence)
        if self._signer is not None:
            entry = replace(entry, signature=self._signer.sign(entry))
        connection.execute(
            insert(table).values(sequence=entry.sequence, digest=entry.digest, line=ledger.to_line(entry))
        )
        return entry

    def entries(self, connection: Connection, *, unit: str | None = None, subject: str | None = None) -> list[Entry]:
        """All entries in order, or those of one unit and subject, from a chain that was verified as a whole.

        Raises:
            LedgerError: the chain is broken; names the first bad entry.
        """
        return [
            entry
            for entry in self._verified(connection).entries
            if unit in (None, entry.unit) and subject in (None, entry.subject)
        ]

    def head(self, connection: Connection) -> str:
        """The digest of the last entry, hex; `privacy.ledger.GENESIS` of an empty ledger."""
        last = self._last(connection)
        return last.digest if last else GENESIS

    def verify(self, connection: Connection, *, known_heads: Iterable[str] = (), judge: Judge | None = None) -> str:
        """Verifies the whole chain, its signatures, and that each of `known_heads` was once its head; returns the head.
        Nothing of it is taken from a reading before.

        Args:
            judge: of the signatures; None: that of the signer, if there is one.

        Raises:
            LedgerError: names the first bad entry, or says that a known head is missing.
        """
        if judge is None and self._signer is not None:
            judge = self._signer.judge()
        self._read = _Read(replay=Replay(judge))
        read = self._verified(connection)
        read.replay.check_heads(known_heads)
        return read.replay.head

    def _verified(self, connection: Connection) -> _Read:
        table = self._table
        rows: Sequence[Any] = connection.execute(select(table).order_by(table.c.sequence)).all()
        found = [(row.sequence, row.digest, row.line) for row in rows]
        read, self._read = self._read, _Read()
        if found[: len(read.rows)] != read.rows:
            read = _Read()
        for row in found[len(read.rows) :]:
            number = len(read.entries) + 1
            entry = ledger.from_line(row[2], number=number)
            read.replay.add(entry)
            if (row[0], row[1]) != (entry.sequence, entry.digest):
                raise LedgerError(f"ledger entry {entry.sequence}: its row says otherwise", entry=entry.sequence)
            read.entries.append(entry)
        if len(found) > len(read.rows) or not found:
            self._check_version_1(connection, read.entries)
        read.rows = found
        self._read = read  # only once all of it is verified
        return read

    def _check_version_1(self, connection: Connection, entries: Sequence[Entry]) -> None:
        """Raises LedgerError unless the lines of version 1 are those that were there at the upgrade."""
        row = connection.execute(select(self._version_1)).first()
        count, head = (row.entries, row.head) if row else (0, GENESIS)  # a new database, of no upgrade
        old = list(itertools.takewhile(lambda entry: entry.version == 1, entries))
        if (len(old), old[-1].digest if old else GENESIS) != (count, head):
            place = min(len(old), count) + (len(old) != count)
            raise LedgerError(
                f"ledger entry {place}: the lines of version 1 are not those that were upgraded", entry=place
            )

    def _last(self, connection: Connection) -> Entry | None:
        table = self._table
        row = connection.execute(select(table).order_by(table.c.sequence.desc()).limit(1)).first()
        if row is None:
            return None
        entry = ledger.from_line(row.line, number=row.sequence)
        if row.digest != entry.digest or entry.digest != ledger.entry_digest(entry):
            raise LedgerError(f"ledger entry {row.sequence}: its content does not match its digest", entry=row.sequence)
        return entry
