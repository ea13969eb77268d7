"""One SQLite database with one writer: a process that holds the lock, and in it one thread that owns the connection.

Transactions are really `BEGIN IMMEDIATE`: the driver's own idea of when a transaction begins is switched off
(SQLAlchemy documentation, SQLite dialect, "Serializable isolation / Savepoints / Transactional DDL"). With WAL and
`synchronous=FULL` a committed transaction survives a power cut, and readers in other processes are never in the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, MetaData, event
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool

from ..errors import ConflictError, NotFoundError, StateError, StorageError

T = TypeVar("T")

BUSY_TIMEOUT_S: Final = 10
"""How long a statement waits for a lock. Only a checkpoint beside a reader holds one, for milliseconds."""

_PRAGMAS: Final = (
    "PRAGMA synchronous=FULL",
    "PRAGMA fullfsync=ON",  # macOS: fsync alone leaves the data in the drive's cache; nothing elsewhere
    "PRAGMA foreign_keys=ON",
    # Else INSERT OR REPLACE would delete a row without firing the trigger that forbids it.
    "PRAGMA recursive_triggers=ON",
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}",
)


class Database:
    """A role's database. Only the thread of this object ever touches the connection; the event loop never runs SQL.

    Args:
        path: of the file; made with its directory on first open, readable by the owner alone.
        metadata: the tables, made on first open.
        schema_version: ≥ 1; kept in `PRAGMA user_version`.
    """

    def __init__(self, path: Path, metadata: MetaData, *, schema_version: int) -> None:
        if schema_version < 1:
            raise ValueError("schema_version starts at 1: 0 is what an empty file has")
        self._path = path
        self._metadata = metadata
        self._schema_version = schema_version
        self._thread: ThreadPoolExecutor | None = None
        self._lock: int | None = None
        self._engine: Engine | None = None
        self._connection: Connection | None = None

    async def open(self) -> None:
        """Takes the lock, opens the database, makes the tables of a new one and checks an old one.

        Raises:
            ConflictError: another process has it open.
            StorageError: it is damaged, is no database, or was written by another schema version.
        """
        if self._thread is not None:
            raise StateError(f"the database {self._path.name} is open already")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sotto-database")
        try:
            await self._in_thread(self._open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Waits for what is under way, closes, and lets the lock go. Does nothing when it is closed."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await asyncio.wrap_future(thread.submit(self._close))
            thread.shutdown()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Calls `work(connection)` in the database's thread, inside one transaction, and returns its result.

        Calls happen one after the other, in the order they were made. The transaction is committed before this returns
        and rolled back when `work` raises. Work that has begun is finished even if the caller is cancelled. Results
        must not hold open cursors.

        Raises:
            StateError: the database is not open.
            StorageError: the database itself fails (disk full, damaged); `IntegrityError` passes unchanged.
            Exception: whatever `work` raises.
        """
        return await self._in_thread(lambda: self._transact(work))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._thread is None:
            raise StateError(f"the database {self._path.name} is not open")
        return await asyncio.wrap_future(self._thread.submit(call))

    def _transact(self, work: Callable[[Connection], T]) -> T:
        assert self._connection is not None
        with _translated(self._path), self._connection.begin():
            return work(self._connection)

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take_lock(self._path)
        # SQLite would make it with the process's umask; its WAL and shared memory take over this mode.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with _translated(self._path):
            self._engine = _engine(URL.create("sqlite", database=str(self._path)), "BEGIN IMMEDIATE", pragmas=_PRAGMAS)
            self._connection = self._engine.connect()
            self._set_up(self._connection)

    def _set_up(self, connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        (mode,) = driver.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"the database {self._path.name} must lie on a local file system (no WAL: {mode})")
        (verdict,) = driver.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StorageError(f"the database {self._path.name} is damaged", private=str(verdict))
        with connection.begin():
            found = _schema_version(connection)
            if found == 0 and not _is_empty(connection):
                raise StorageError(f"{self._path.name} is a database of something else: it has tables and no version")
            if found not in (0, self._schema_version):
                raise _other_version(self._path, found, self._schema_version)
            if found == 0:
                self._metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version={self._schema_version:d}")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def read_only(path: Path, *, schema_version: int | None = None) -> Iterator[Connection]:
    """A connection that reads one consistent snapshot, beside a running role or without one.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it is no database, is damaged, or is not of `schema_version` (where given).
    """
    if not path.is_file():
        raise NotFoundError(f"there is no database {path.name}", private=str(path))
    url = URL.create("sqlite", database=path.resolve().as_uri(), query={"mode": "ro", "uri": "true"})
    engine = _engine(url, "BEGIN", pragmas=(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}", "PRAGMA query_only=ON"))
    try:
        with _translated(path), engine.connect() as connection, connection.begin():
            found = _schema_version(connection)
            if schema_version not in (None, found):
                raise _other_version(path, found, schema_version)
            yield connection
    finally:
        engine.dispose()


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


def _take_lock(path: Path) -> int:
    """The descriptor that holds `<database>.lock`; the kernel lets it go with the process, however that ends."""
    lock_path = path.with_name(path.name + ".lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turns failures of the database itself into `StorageError`; a violated constraint is the caller's business."""
    try:
        yield
    except IntegrityError:
        raise
    except (DatabaseError, sqlite3.DatabaseError) as error:
        cause = error.orig if isinstance(error, DatabaseError) else error
        raise StorageError(f"the database {path.name} failed: {cause}", private=str(path)) from error


def _schema_version(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def _is_empty(connection: Connection) -> bool:
    return connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1").first() is None


def _other_version(path: Path, found: int, expected: int | None) -> StorageError:
    return StorageError(
        f"the database {path.name} has schema version {found}, this software needs {expected}",
        found=found,
        expected=expected,
    )
