"""A role's database: one writer, one thread that owns the connection, SQLite by default and PostgreSQL by its URL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol, TypeVar

from sqlalchemy import Connection, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import ConfigError, StateError
from .location import Insecure, Location
from .postgresql import PostgresqlAdapter
from .schema import Schema
from .sqlite import SqliteAdapter

T = TypeVar("T")

_SQLITE: Final = "sqlite"
_POSTGRESQL: Final = "postgresql+psycopg"


class Adapter(Protocol):
    """What an engine does for `Database`. All calls come from one thread."""

    @property
    def name(self) -> str:
        """For messages; without user, host and password."""

    def open(self, schema: Schema) -> None:
        """Takes the lock that makes this the only writer, connects, prepares the schema."""

    def transaction(self) -> AbstractContextManager[Connection]:
        """The connection, in a transaction that is committed at the end and rolled back by an exception."""

    def snapshot(self) -> AbstractContextManager[Connection]:
        """A connection of its own that reads one consistent state; needs neither `open` nor the lock."""

    def close(self) -> None:
        """Closes what is open and lets the lock go; also after an `open` that failed."""


class Database:
    """A role's database. Only the thread of this object ever touches the connection; the event loop never runs SQL.

    Args:
        location: a file's path, or a URL (SQLAlchemy's form): `sqlite:////absolute/path` or
            `postgresql+psycopg://user@host/database` (a Unix socket: `?host=/directory`). An SQLite file is made with
            its directory on first open, readable by the owner alone. PostgreSQL: the tables live in the first schema of
            the search path; they have one writer whatever the role. The connection must reach the server itself or a
            pooler that keeps one session for it, and to another host it is TLS to a server that proves its name
            (`transport`), unless the URL comes as `Insecure`.
        schema: what it contains.

    Raises:
        ConfigError: the URL cannot be used, or its driver is not installed.
    """

    def __init__(self, location: Location, schema: Schema) -> None:
        self._adapter = _adapter(location)
        self._schema = schema
        self._thread: ThreadPoolExecutor | None = None

    @property
    def name(self) -> str:
        """The file's or database's name, as messages say it."""
        return self._adapter.name

    async def open(self) -> None:
        """Takes the lock, connects, makes the tables of a new database and upgrades those of an old one.

        Raises:
            ConflictError: another process has it open.
            UnavailableError: the server cannot be reached.
            StorageError: it is damaged, is no database, is of something else, or was written by a newer version.
        """
        if self._thread is not None:
            raise StateError(f"the database {self.name} is open already")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sotto-database")
        try:
            await self._in_thread(lambda: self._adapter.open(self._schema))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Waits for what is under way, closes, and lets the lock go. Does nothing when it is closed."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await asyncio.wrap_future(thread.submit(self._adapter.close))
            thread.shutdown()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Calls `work(connection)` in the database's thread, inside one transaction, and returns its result.

        Calls happen one after the other, in the order they were made. The transaction is committed before this returns
        and rolled back when `work` raises. Work that has begun is finished even if the caller is cancelled. Results
        must not hold open cursors.

        Raises:
            StateError: the database is not open.
            UnavailableError: the server was lost or gave up. `metadata["committed"]` is "no", or "unknown" when the
                answer to COMMIT was lost: read again before deciding anything. The next call connects again.
            ConflictError: while the server was lost, another process opened the database; this one must be restarted.
            StorageError: the database itself fails (disk full, damaged); `IntegrityError` passes unchanged.
            Exception: whatever `work` raises.
        """
        return await self._in_thread(lambda: self._transact(work))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._thread is None:
            raise StateError(f"the database {self.name} is not open")
        return await asyncio.wrap_future(self._thread.submit(call))

    def _transact(self, work: Callable[[Connection], T]) -> T:
        with self._adapter.transaction() as connection:
            return work(connection)


@contextlib.contextmanager
def read_only(location: Location, *, schema: Schema | None = None) -> Iterator[Connection]:
    """A connection that reads one consistent snapshot, beside a running role or without one.

    Args:
        location: as for `Database`.
        schema: what the database must be.

    Raises:
        NotFoundError: there is no such file.
        UnavailableError: the server cannot be reached.
        StorageError: it is no database, is damaged, or is not of `schema`'s version.
        ConfigError: as for `Database`.
    """
    with _adapter(location).snapshot() as connection:
        if schema is not None:
            schema.check(connection)
        yield connection


def _adapter(location: Location) -> Adapter:
    if isinstance(location, Path):
        return SqliteAdapter(location)
    insecure = isinstance(location, Insecure)
    try:
        url = make_url(location.url if isinstance(location, Insecure) else location)
    except (ArgumentError, ValueError):
        # Their texts quote the URL, and with it the password.
        raise ConfigError(
            "the database's URL cannot be read; it looks like postgresql+psycopg://user@host/name"
        ) from None
    if url.drivername == _SQLITE and url.database and url.database != ":memory:" and not url.query:
        return SqliteAdapter(Path(url.database))
    if url.drivername == _POSTGRESQL and url.database:
        return PostgresqlAdapter(url, insecure=insecure)
    # Of the URL only its beginning: options after the ? may hold a password too.
    raise ConfigError(
        f"a database URL that begins with {url.drivername}:// cannot be used so: "
        "write sqlite:////absolute/path or postgresql+psycopg://user@host/name"
    )
