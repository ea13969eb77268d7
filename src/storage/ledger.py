"""The privacy ledger as a table of the role's own database, so that a charge commits with what it is charged for.

A row is the entry's canonical line and nothing that could contradict it. Triggers make the table append-only; the chain
of digests (`privacy.ledger`) shows what got past them. The whole chain is verified by the first reading of a
connection, and by `verify`; a start may take over what the last one verified and signed (`checkpoints`). Nothing is
priced, reserved or released on top of a broken ledger.

What was verified stays verified: a later reading takes what came after it, as long as the database says that nobody
else has changed any row since, and the last row is the one that was last. Else all rows are read again, and those that
are not, letter for letter, what they were are verified again. So it is noticed at once if another process writes to the
ledger, cuts it, puts an old copy back or changes an entry; what PostgreSQL's superuser does with its triggers passed
over (session_replication_role), or a disk does, at the next start or `verify`. What is decided meanwhile rests on what
was verified.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from sqlalchemy import (
    DDL,
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    event,
    insert,
    select,
)

from ..errors import LedgerError
from ..privacy import ledger
from ..privacy.ledger import GENESIS, Entry, Replay
from ..privacy.standing import Standing
from .checkpoints import EVERY, Attester, Row, checkpoint, checkpoint_table, verified_before
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

_FUNCTIONS: Final = 2
"""Of the statements for PostgreSQL so many make no trigger."""
_TRIGGERS_IN_FORCE: Final = (
    "SELECT t.tgname, t.tgenabled, t.xmin::text AS version, c.relfilenode FROM pg_trigger t JOIN pg_class c "
    "ON c.oid = t.tgrelid WHERE c.oid = 'ledger'::regclass AND NOT t.tgisinternal ORDER BY t.tgname"
)


Judge = Callable[[Entry], None]
"""Raises LedgerError for an entry that is not signed as it must be; is called with each in order, once."""


class Signer(Attester, Protocol):
    """Whoever keeps the ledger, as `protocol.ledger.EntrySigner`."""

    def sign(self, entry: Entry) -> str:
        """The signature over the entry's digest."""

    def judge(self) -> Judge:
        """Of one reading of the whole ledger: refuses what this signer did not sign."""


Mark = tuple[object, ...]
"""What a database says of the ledger besides its rows: as long as it stays, nobody else has changed any."""


@dataclass(slots=True)
class _Read:
    """What was read and verified last.

    Attributes:
        mark: when these rows were read; None: nothing is known.
    """

    rows: list[Row] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    replay: Replay = field(default_factory=Replay)
    mark: Mark | None = None

    def cut(self, count: int) -> _Read:
        """The first `count` rows of it."""
        entries = self.entries[:count]
        return _Read(self.rows[:count], entries, self.replay.cut(entries))


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
        self._judged = False
        """Whether signatures are checked of what is read: once `verify` has checked them."""
        self._table = Table(
            "ledger",
            metadata,
            Column("sequence", Integer, primary_key=True, autoincrement=False),
            Column("digest", text(), nullable=False, unique=True),
            Column("line", text(), nullable=False),
        )
        self._version_1 = version_1_table(metadata)
        self._checkpoint = checkpoint_table(metadata)
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
        entries = self._verified(connection).entries
        if 1 <= entry.sequence <= len(entries) and entries[entry.sequence - 1].digest == entry.digest:
            return entries[entry.sequence - 1]
        last = entries[-1] if entries else None
        if entry.sequence != len(entries) + 1 or entry.previous != (last.digest if last else GENESIS):
            raise LedgerError(f"ledger entry {entry.sequence} does not follow the last one", entry=entry.sequence)
        if self._signer is not None:
            entry = replace(entry, signature=self._signer.sign(entry))
        values = {"sequence": entry.sequence, "digest": entry.digest, "line": ledger.to_line(entry)}
        connection.execute(insert(self._table).values(**values))
        return entry

    def entries(self, connection: Connection, *, unit: str | None = None, subject: str | None = None) -> list[Entry]:
        """All entries in order, or those of one unit and subject, from a chain that was verified as a whole.

        Raises:
            LedgerError: the chain is broken; names the first bad entry.
        """
        entries = self._verified(connection).entries
        if unit is subject is None:
            return entries.copy()
        return [each for each in entries if unit in (None, each.unit) and subject in (None, each.subject)]

    def standing(self, connection: Connection) -> Standing:
        """What follows from all entries, from a chain that was verified as a whole; for this transaction alone.

        Raises:
            LedgerError: the chain is broken; names the first bad entry.
        """
        return self._verified(connection).replay.standing

    def head(self, connection: Connection) -> str:
        """The digest of the last entry, hex; `privacy.ledger.GENESIS` of an empty ledger."""
        last = self._last(connection)
        return last.digest if last else GENESIS

    def start(self, connection: Connection) -> str:
        """As `verify`, but for what is, to the bit, what this signer verified at an earlier start; returns the head.

        Raises:
            LedgerError: names the first bad entry.
        """
        if self._signer is None:
            return self.verify(connection)
        rows = self._rows(connection)
        count = verified_before(connection, self._checkpoint, rows, attester=self._signer)
        entries = [ledger.from_line(line, number=number) for number, _, line in rows[:count]]
        self._judged = True
        self._read = _Read(rows[:count], entries, Replay(self._signer.judge()).cut(entries))
        read = self._verified(connection)
        if len(read.rows) >= count + EVERY:
            checkpoint(connection, self._checkpoint, read.rows, attester=self._signer)
        return read.replay.head

    def verify(self, connection: Connection, *, known_heads: Iterable[str] = (), judge: Judge | None = None) -> str:
        """Verifies the whole chain, its signatures, and that each of `known_heads` was once its head; returns the head.
        Nothing of it is taken from a reading before.

        Args:
            judge: of the signatures; None: that of the signer, if there is one.

        Raises:
            LedgerError: names the first bad entry, or says that a known head is missing.
        """
        self._judged = judge is None and self._signer is not None
        if judge is None and self._signer is not None:
            judge = self._signer.judge()
        self._read = _Read(replay=Replay(judge))
        read = self._verified(connection)
        read.replay.check_heads(known_heads)
        return read.replay.head

    def _verified(self, connection: Connection) -> _Read:
        known, self._read = self._read, _Read()  # kept only once all of it is verified
        since = self._since(connection, known)
        read, rows = (known, since) if since is not None else self._anew(connection, known)
        pinned = since is None
        for row in rows:
            number = len(read.entries) + 1
            entry = ledger.from_line(row[2], number=number)
            read.replay.add(entry)
            if (row[0], row[1]) != (entry.sequence, entry.digest):
                raise LedgerError(f"ledger entry {entry.sequence}: its row says otherwise", entry=entry.sequence)
            read.rows.append(row)
            read.entries.append(entry)
            pinned = pinned or entry.version == 1
        if pinned:
            self._check_version_1(connection, read.entries)
        if rows or since is None:
            read.mark = self._mark(connection)
        self._read = read
        return read

    def _since(self, connection: Connection, known: _Read) -> list[Row] | None:
        """The rows after those that were verified; None where these are not sure to be there as they were."""
        if not known.rows or known.mark != self._mark(connection):
            return None
        rows = self._rows(connection, first=len(known.rows))
        return rows[1:] if rows[:1] == known.rows[-1:] else None

    def _anew(self, connection: Connection, known: _Read) -> tuple[_Read, list[Row]]:
        """Of all rows those that are, letter for letter, what was verified, and the others."""
        found, count = self._rows(connection), len(known.rows)
        if found[:count] == known.rows:
            return known, found[count:]
        if found and known.rows[: len(found)] == found:  # a transaction was undone
            return known.cut(len(found)), []
        return _Read(replay=Replay(self._signer.judge() if self._signer and self._judged else None)), found

    def _rows(self, connection: Connection, *, first: int = 0) -> list[Row]:
        table = self._table
        query = select(table).where(table.c.sequence >= first) if first else select(table)
        return [(row.sequence, row.digest, row.line) for row in connection.execute(query.order_by(table.c.sequence))]

    def _mark(self, connection: Connection) -> Mark:
        """Of the connection, and of what others wrote. SQLite counts their commits (PRAGMA data_version). PostgreSQL
        does not; there no row changes or goes while the triggers are there and enabled, and who switches one off and on
        again leaves a new version of its row (xmin). Neither takes longer as the ledger grows."""
        own = connection.info.setdefault("sotto.ledger", object())
        if connection.dialect.name == "sqlite":
            return own, connection.exec_driver_sql("PRAGMA data_version").scalar_one()
        found = connection.exec_driver_sql(_TRIGGERS_IN_FORCE).all()
        in_force = sum(row.tgenabled == "O" for row in found)
        if in_force < len(TRIGGERS["postgresql"]) - _FUNCTIONS:
            return (own, object())  # like no other: then every reading is of all rows
        return own, *map(tuple, found)

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
