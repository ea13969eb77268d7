"""The histories of the two roles' databases, and what brings a database to the end of its history.

A revision is a module with `revision`, `down_revision` and `upgrade(op)`, alembic's form; it is never changed once it
was released. There is no way down: before an SQLite database is upgraded, a copy is laid beside it (of a PostgreSQL
database, its operator makes one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol, cast

from sqlalchemy import Connection, inspect

from ...errors import StorageError
from .. import sqlite
from ..schema import something_else
from .aggregator import v0001 as aggregator_v0001
from .aggregator import v0002 as aggregator_v0002
from .aggregator import v0003 as aggregator_v0003
from .aggregator import v0004 as aggregator_v0004
from .aggregator import v0005 as aggregator_v0005
from .aggregator import v0006 as aggregator_v0006
from .aggregator import v0007 as aggregator_v0007
from .aggregator import v0008 as aggregator_v0008
from .party import v0001 as party_v0001
from .party import v0002 as party_v0002
from .party import v0003 as party_v0003
from .party import v0004 as party_v0004
from .party import v0005 as party_v0005

if TYPE_CHECKING:
    from types import ModuleType

    from alembic.operations import Operations

History = Literal["aggregator", "party"]


class Revision(Protocol):
    """What a module of a revision has. Its identifier begins with the history's name: no role opens another's."""

    revision: str
    down_revision: str | None

    def upgrade(self, op: Operations) -> None:
        """Changes the tables of `down_revision` into those of `revision`."""


HISTORIES: Final[dict[History, tuple[Revision, ...]]] = {
    "aggregator": tuple(
        cast(Revision, each)
        for each in (
            aggregator_v0001,
            aggregator_v0002,
            aggregator_v0003,
            aggregator_v0004,
            aggregator_v0005,
            aggregator_v0006,
            aggregator_v0007,
            aggregator_v0008,
        )
    ),
    "party": tuple(cast(Revision, each) for each in (party_v0001, party_v0002, party_v0003, party_v0004, party_v0005)),
}
"""Revisions, oldest first."""

_FIRST_TABLES: Final[dict[History, frozenset[str]]] = {
    "aggregator": frozenset({"jobs", "job_events", "rounds", "ledger", "enrolment"}),
    "party": frozenset({"party_rounds", "ledger"}),
}
"""The tables of the first revision: what version 0.1 made, which kept no history."""

_WITHOUT_HISTORY: Final = 1
"""`PRAGMA user_version` of such a database."""
_WITH_HISTORY: Final = 2
"""Of every other one: version 0.1 refuses it."""


class Migrations:
    """A `schema.Schema` that follows a history to its end."""

    def __init__(self, history: History) -> None:
        self._history: Final = history
        self._revisions: Final = HISTORIES[history]
        self._names: Final = tuple(each.revision for each in self._revisions)

    @property
    def newest(self) -> str:
        """The revision that this software works with."""
        return self._names[-1]

    def prepare(self, connection: Connection) -> None:
        """As `Schema` says."""
        found = self._find(connection)
        if found is None and inspect(connection).get_table_names():
            raise something_else()
        if found is not None and found != self.newest and connection.dialect.name == "sqlite":
            sqlite.back_up(connection, f".before-{self.newest.rpartition('_')[2]}")
        if found is not None and not inspect(connection).has_table("alembic_version"):
            _stamp(connection, found)
        if found != self.newest:
            self._upgrade(connection, found)

    def check(self, connection: Connection) -> None:
        """As `Schema` says."""
        if (found := self._find(connection)) is None:
            raise something_else()
        if found != self.newest:
            raise StorageError(
                f"the database is at revision {found}, this software needs {self.newest}: "
                "the role's next start upgrades it",
                found=found,
                expected=self.newest,
            )

    def _find(self, connection: Connection) -> str | None:
        """The revision of the database; None when it has none. Read without alembic, which takes long to import."""
        tables = inspect(connection).get_table_names()
        if "alembic_version" in tables:
            heads = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
            found = str(heads[0]) if len(heads) == 1 else ""
        elif connection.dialect.name == "sqlite" and tables and _user_version(connection) == _WITHOUT_HISTORY:
            if set(tables) != _FIRST_TABLES[self._history]:
                raise something_else()
            found = self._names[0]
        else:
            return None
        if found in self._names:
            return found
        owner = found.rpartition("_")[0]
        if owner not in HISTORIES:
            raise something_else()
        if owner != self._history:
            raise StorageError(f"the database is that of another role: {owner}", found=found)
        raise StorageError(
            f"the database was written by a newer version of Sotto: it is at revision {found}, "
            f"the newest that this software knows is {self.newest}",
            found=found,
            expected=self.newest,
        )

    def _upgrade(self, connection: Connection, found: str | None) -> None:
        from alembic.operations import Operations
        from alembic.runtime.migration import MigrationContext, MigrationStep
        from alembic.script import Script
        from alembic.script.revision import RevisionMap

        scripts = [
            Script(cast("ModuleType", each), each.revision, each.__file__)  # type: ignore[attr-defined]
            for each in self._revisions
        ]
        known = RevisionMap(lambda: scripts)
        left = reversed([*known.iterate_revisions("head", found or "base")])
        steps = [MigrationStep.upgrade_from_script(known, cast("Script", script)) for script in left]
        context = MigrationContext.configure(connection, opts={"fn": lambda _heads, _context: steps})
        # Not through `alembic.op`: that one is a global, and roles of one process open their databases at once.
        context.run_migrations(op=Operations(context))
        if connection.dialect.name == "sqlite":
            sqlite.check_references(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={_WITH_HISTORY}")


def _stamp(connection: Connection, revision: str) -> None:
    """Begins the history of an SQLite database that has kept none, in alembic's form."""
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version "
        "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.exec_driver_sql("INSERT INTO alembic_version (version_num) VALUES (?)", (revision,))
    connection.exec_driver_sql(f"PRAGMA user_version={_WITH_HISTORY}")


def _user_version(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
