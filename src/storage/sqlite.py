"""SQLite: a file, a lock beside it, and transactions that are really `BEGIN IMMEDIATE`.

The driver's own idea of when a transaction begins is switched off (SQLAlchemy documentation, SQLite dialect,
"Serializable isolation / Savepoints / Transactional DDL"). With WAL and `synchronous=FULL` a committed transaction
survives a power cut, and readers in other processes are never in the way.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool

from ..errors import ConflictError, NotFoundError, SottoError, StorageError, StorageFullError, UnavailableError
from ..files import open_private, open_state_directory
from .schema import Schema

LOG: Final = logging.getLogger("sotto.storage")

BUSY_TIMEOUT_S: Final = 10
"""How long a statement waits for a lock. Only a checkpoint beside a reader holds one, for milliseconds."""

_PRAGMAS: Final = (
    "PRAGMA synchronous=FULL",
    "PRAGMA fullfsync=ON",  # macOS: fsync alone leaves the data in the drive's cache; nothing elsewhere
    # Else INSERT OR REPLACE would delete a row without firing the trigger that forbids it.
    "PRAGMA recursive_triggers=ON",
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}",
)


class SqliteAdapter:
    """A `database.Adapter` for the file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: int | None = None
        self._engine: Engine | None = None
        self._connection: Connection | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    def open(self, schema: Schema) -> None:
        """As `Adapter` says. Raises ConflictError, StorageError; ConfigError as `files.open_state_directory`."""
        for changed in open_state_directory(self._path.parent):
            LOG.warning("%s", changed)
        self._lock = _take_lock(self._path)
        _make_private(self._path)
        with self._translated():
            self._engine = _engine(URL.create("sqlite", database=str(self._path)), "BEGIN IMMEDIATE", pragmas=_PRAGMAS)
            self._connection = self._engine.connect()
            self._check_file(_driver(self._connection))
            # A table that others refer to is altered by making it anew, which foreign keys forbid; they can only be
            # switched outside of a transaction (https://www.sqlite.org/lang_altertable.html#otheralter).
            _driver(self._connection).execute("PRAGMA foreign_keys=OFF")
            with self._connection.begin():
                schema.prepare(self._connection)
            _driver(self._connection).execute("PRAGMA foreign_keys=ON")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """As `Adapter` says. Raises StorageError."""
        assert self._connection is not None
        with self._translated(), self._connection.begin():
            yield self._connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """As `Adapter` says. Raises NotFoundError, StorageError."""
        if not self._path.is_file():
            raise NotFoundError(f"there is no database {self.name}", private=str(self._path))
        url = URL.create("sqlite", database=self._path.resolve().as_uri(), query={"mode": "ro", "uri": "true"})
        engine = _engine(url, "BEGIN", pragmas=(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}", "PRAGMA query_only=ON"))
        try:
            with self._translated(), engine.connect() as connection, connection.begin():
                yield connection
        finally:
            engine.dispose()

    def close(self) -> None:
        """As `Adapter` says."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_file(self, driver: sqlite3.Connection) -> None:
        (mode,) = driver.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"the database {self.name} must lie on a local file system (no WAL: {mode})")
        (verdict,) = driver.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StorageError(f"the database {self.name} is damaged", private=str(verdict))

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns failures of the database itself into `StorageError`, and into `UnavailableError` while another process
        holds it; a violated constraint is the caller's business."""
        try:
            yield
        except IntegrityError:
            raise
        except (DatabaseError, sqlite3.DatabaseError) as error:
            cause = error.orig if isinstance(error, DatabaseError) else error
            code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            kind = (
                StorageError if code in _LASTING else _KINDS.get(code & 0xFF, StorageError)
            )  # without what extends it
            raise kind(f"the database {self.name} failed: {cause}", private=str(self._path)) from error


_KINDS: Final[dict[int, type[SottoError]]] = {
    sqlite3.SQLITE_FULL: StorageFullError,
    sqlite3.SQLITE_READONLY: StorageFullError,
    sqlite3.SQLITE_IOERR: StorageFullError,  # also a quota that is used up
    sqlite3.SQLITE_BUSY: UnavailableError,
    sqlite3.SQLITE_LOCKED: UnavailableError,
}
_LASTING: Final = frozenset(
    {
        sqlite3.SQLITE_READONLY_DBMOVED,
        sqlite3.SQLITE_IOERR_SHORT_READ,
        sqlite3.SQLITE_IOERR_CORRUPTFS,
        sqlite3.SQLITE_IOERR_DATA,
    }
)
"""Of these kinds what says that the file is another one, or damaged."""


def back_up(connection: Connection, suffix: str) -> Path:
    """Copies the database's last committed state to a file beside it, whole or not at all; an older copy is replaced.

    Args:
        connection: to an SQLite file; may be in a transaction that has written nothing yet.
        suffix: of the copy's name.
    """
    path = Path(connection.engine.url.database or "")
    copy, part = path.with_name(path.name + suffix), path.with_name(path.name + suffix + ".part")
    part.unlink(missing_ok=True)
    _make_private(part)
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(part)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")  # one file, to be moved as one
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(copy)
    return copy


def check_references(connection: Connection) -> None:
    """Verifies every foreign key: they are not enforced while a schema is prepared. Raises StorageError."""
    if (row := connection.exec_driver_sql("PRAGMA foreign_key_check").first()) is not None:
        raise StorageError(f"a row of the table {row[0]} refers to a row of {row[2]} that is not there")


def _engine(url: URL, begin: str, *, pragmas: tuple[str, ...]) -> Engine:
    engine = sqlalchemy.create_engine(
        url,
        poolclass=StaticPool,  # one connection, which stays in the thread that made it
        connect_args={"isolation_level": None, "check_same_thread": True},
        hide_parameters=True,  # values of rows do not belong into an error's text
    )

    @event.listens_for(engine, "connect")
    def _on_connect(driver: Any, _record: Any) -> None:
        for pragma in pragmas:
            driver.execute(pragma)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _driver(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def _make_private(path: Path) -> None:
    """Makes the file: SQLite would take the process's umask; WAL and shared memory take over this mode."""
    os.close(open_private(path, os.O_RDWR))


def _take_lock(path: Path) -> int:
    """The descriptor that holds `<database>.lock`; the kernel lets it go with the process, however that ends."""
    lock_path = path.with_name(path.name + ".lock")
    descriptor = open_private(lock_path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise ConflictError(
            f"the database {path.name} is in use by another process (pid {holder}); stop it first",
            private=str(path),
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor
