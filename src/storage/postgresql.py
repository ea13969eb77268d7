"""PostgreSQL: one session, which holds an advisory lock and does all writing.

One writer at a time, whatever fails:

- The lock belongs to the session that writes. A session that ends (server restarted, connection cut) loses both at
  once, so that no statement is ever sent without the lock; a new session takes the lock before anything else.
- Whoever opens the database writes a token of its own into the table `sotto_writer`, and every transaction begins by
  reading it: a process that was cut off while another one opened the database is refused until it is restarted, since
  what it remembers may be stale. This holds behind a pooler too, where a session is not what it seems.
- Transactions are SERIALIZABLE: if two of them were ever under way at once, they could not both commit on the strength
  of what the other one changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, RootTransaction, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.pool import NullPool

from ..errors import ConfigError, ConflictError, SottoError, StorageError, StorageFullError, UnavailableError
from .schema import Schema
from .transport import transport_of

if TYPE_CHECKING:
    import psycopg

WRITER_TABLE: Final = "sotto_writer"
"""One row: the token of the process that opened the database last."""

LOCK_WAIT_S: Final = 1
"""How long to wait for the session of a process that was just killed: the server ends it within milliseconds."""

STATEMENT_TIMEOUT_S: Final = 60
"""For one statement. Sotto's own take milliseconds; what takes longer waits for something that is broken."""

BUSY_TIMEOUT_S: Final = 10
"""How long a statement waits for a lock of somebody who works on the database by hand."""

SILENCE_S: Final = 30
"""A peer whose host vanished is noticed after about twice this, on either side: its lock is free then."""

_PROBES: Final = 3

_CLIENT: Final[Mapping[str, int]] = {
    # https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": SILENCE_S,
    "keepalives_interval": SILENCE_S // _PROBES,
    "keepalives_count": _PROBES,
    "tcp_user_timeout": SILENCE_S * 1000,
}

_SESSION: Final = (
    "SET client_min_messages = warning",
    # What a role was told to be committed has left the server's memory.
    "SET synchronous_commit = on",
    f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'",
    # The server's side of the same connection: without these it keeps the lock of a vanished host for two hours.
    f"SET tcp_keepalives_idle = {SILENCE_S}",
    f"SET tcp_keepalives_interval = {SILENCE_S // _PROBES}",
    f"SET tcp_keepalives_count = {_PROBES}",
    f"SET tcp_user_timeout = '{SILENCE_S}s'",
)

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_GAVE_UP: Final = {"40001": "another transaction", "40P01": "a deadlock", "55P03": "a lock", "57014": "a time limit"}
"""Failures that say nothing about the data: the same work may succeed later."""
_CANNOT_WRITE: Final = frozenset({"53100", "58030", "25006"})
"""A full disk, one that fails, a server that is read-only (a standby, say)."""

_HOLDER: Final = """
SELECT a.application_name, l.pid FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32) | l.objid::bigint = %s
"""


class PostgresqlAdapter:
    """A `database.Adapter` for the first schema of the search path in the database that `url` names.

    Args:
        insecure: see `transport_of`.

    Raises:
        ConfigError: the driver is not installed, or the URL is not to be used so.
    """

    def __init__(self, url: URL, *, insecure: bool = False) -> None:
        try:
            import psycopg  # noqa: F401  an extra; SQLAlchemy would only say which module is missing
        except ImportError as error:
            raise ConfigError(
                "a PostgreSQL database needs the extra sotto-fl[postgres]: pip install 'sotto-fl[postgres]'",
                private=str(error),
            ) from error
        if {"password", "sslpassword"} & set(url.query):
            raise ConfigError("a password in a database URL stands before the @; after the ? it would be printed")
        self._url = url
        self._transport = transport_of(url, insecure=insecure)
        self._token = ""
        self._engine: Engine | None = None
        self._connection: Connection | None = None

    @property
    def name(self) -> str:
        """The database's name."""
        return str(self._url.database)

    def open(self, schema: Schema) -> None:
        """As `Adapter` says. Raises ConflictError, UnavailableError, StorageError."""
        self._token = secrets.token_hex(16)
        self._engine = self._make_engine(writes=True)
        try:
            self._connection = self._connect(self._engine, say_why=True)
            with self._connection.begin():
                self._connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # an upgrade may take its time
                schema.prepare(self._connection)
                self._become_writer(self._connection)
        except DBAPIError as error:
            raise self._failure(error, "unknown") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """As `Adapter` says. Raises ConflictError, UnavailableError, StorageError."""
        committed = "no"
        try:
            transaction = self._begin()
            with transaction:
                yield transaction.connection
                # From here COMMIT may have reached a server whose answer did not reach us.
                committed = "unknown"
        except IntegrityError:
            raise
        except (DBAPIError, PendingRollbackError) as error:
            raise self._failure(error, committed) from error
        finally:
            # SQLAlchemy would connect again by itself, in the midst of things; here that is done by `_begin`.
            if self._connection is not None and self._connection.invalidated:
                self._disconnect()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """As `Adapter` says. Raises UnavailableError, StorageError."""
        engine = self._make_engine(writes=False)
        with contextlib.closing(self._connect(engine, say_why=True)) as connection:
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            try:
                with connection.begin():
                    yield connection
            except (DBAPIError, PendingRollbackError) as error:
                raise self._failure(error, "no") from error

    def close(self) -> None:
        """As `Adapter` says."""
        self._disconnect()
        self._engine = None

    def _begin(self) -> RootTransaction:
        """A transaction of the session that holds the lock, and whose process is the last that opened the database."""
        if self._connection is not None:
            try:
                return self._fenced(self._connection)
            except DBAPIError:
                if not self._connection.invalidated:
                    raise
                # The server was lost between two calls: nothing of this one was sent.
                self._disconnect()
        assert self._engine is not None
        self._connection = self._connect(self._engine, say_why=False)
        return self._fenced(self._connection)

    def _fenced(self, connection: Connection) -> RootTransaction:
        transaction = connection.begin()
        try:
            found = connection.exec_driver_sql(f"SELECT token FROM {WRITER_TABLE}").scalar()  # noqa: S608  a constant
        except BaseException:
            transaction.close()
            raise
        if found != self._token:
            transaction.close()
            self._disconnect()  # and with it the lock, which is somebody else's business now
            raise ConflictError(
                f"the database {self.name} was opened by another process while this one had lost it; restart this one"
            )
        return transaction

    def _become_writer(self, connection: Connection) -> None:
        connection.exec_driver_sql(
            f"CREATE TABLE IF NOT EXISTS {WRITER_TABLE} "
            "(singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton), token text NOT NULL)"
        )
        connection.exec_driver_sql(
            f"INSERT INTO {WRITER_TABLE} (token) VALUES (%s) "  # noqa: S608  a constant
            "ON CONFLICT (singleton) DO UPDATE SET token = EXCLUDED.token",
            (self._token,),
        )

    def _connect(self, engine: Engine, *, say_why: bool) -> Connection:
        """A new session. The server's reason is for the operator who starts a role, not for those who call it."""
        try:
            return engine.connect()
        except OperationalError as error:
            why = " ".join(str(error.orig).split())
            raise UnavailableError(
                f"the database {self.name} cannot be reached" + (f": {why}" if say_why else ""),
                private=why,
                committed="no",
            ) from error
        except DBAPIError as error:
            why = " ".join(str(error.orig).split())
            raise ConfigError(f"the URL of the database {self.name} cannot be used: {why}") from error

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(DBAPIError):  # the server may be gone
                connection.close()

    def _make_engine(self, *, writes: bool) -> Engine:
        defaults: dict[str, Any] = {
            **_CLIENT,
            "application_name": f"sotto pid {os.getpid()} on {socket.gethostname()}",
            # Where the URL names several hosts, the one that accepts writing.
            "target_session_attrs": "read-write" if writes else "any",
        }
        engine = sqlalchemy.create_engine(
            self._url,
            poolclass=NullPool,  # a session is used by who made it, and ends with them
            isolation_level="SERIALIZABLE",
            connect_args={
                **{name: value for name, value in defaults.items() if name not in self._url.query},
                **self._transport,
            },
            hide_parameters=True,  # values of rows do not belong into an error's text
        )
        event.listen(engine, "handle_error", _without_values)

        # On every session of the engine, so that there is none without the lock.
        @event.listens_for(engine, "connect")
        def _on_connect(driver: psycopg.Connection[Any], _record: Any) -> None:
            try:
                driver.autocommit = True
                for setting in _SESSION:
                    driver.execute(setting)
                if writes:
                    self._take_lock(driver)
                driver.execute(f"SET lock_timeout = '{BUSY_TIMEOUT_S}s'")
                driver.autocommit = False
            except BaseException:
                driver.close()
                raise

        return engine

    def _take_lock(self, driver: psycopg.Connection[Any]) -> None:
        """The lock of this schema in this database, until the session ends."""
        from psycopg import errors

        (schema,) = driver.execute("SELECT current_schema()").fetchone() or (None,)
        if schema is None:
            raise ConfigError(f"no schema of the search path exists in the database {self.name}")
        # Locks belong to a database and are numbered: a hash keeps out of the way of other software's numbers.
        digest = hashlib.sha256(f"sotto writer\0{schema}".encode()).digest()
        # Its top bit is 0: the two halves are put together again in pg_locks without a sign.
        key = int.from_bytes(digest[:8], "big") >> 1
        driver.execute(f"SET lock_timeout = '{LOCK_WAIT_S}s'")
        try:
            driver.execute("SELECT pg_advisory_lock(%s)", (key,))
        except errors.LockNotAvailable:
            holder, pid = driver.execute(_HOLDER, (key,)).fetchone() or ("", "unknown")
            raise ConflictError(
                f"the database {self.name} is in use by another process ({holder or 'unknown'}, "
                f"PostgreSQL backend {pid}); stop it first"
            ) from None

    def _failure(self, error: DBAPIError | PendingRollbackError, committed: str) -> SottoError:
        """What a failed transaction means to its caller."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        url = self._url.render_as_string(hide_password=True)
        lost = isinstance(error, PendingRollbackError) or error.connection_invalidated
        if lost:
            outcome = {"no": "nothing was changed", "unknown": "whether it was committed is not known: read again"}
            return UnavailableError(
                f"the connection to the database {self.name} was lost; {outcome[committed]}",
                private=f"{url}: {cause}",
                committed=committed,
            )
        if (state := getattr(cause, "sqlstate", None)) in _GAVE_UP:
            return UnavailableError(
                f"the database {self.name} gave up because of {_GAVE_UP[state]}; nothing was changed",
                private=f"{url}: {cause}",
                committed="no",
            )
        kind = StorageFullError if state in _CANNOT_WRITE else StorageError
        return kind(f"the database {self.name} failed: {cause}", private=url)


def _without_values(context: ExceptionContext) -> None:
    """Leaves the first line of a server's message: the others (DETAIL, CONTEXT) quote values of rows."""
    primary = getattr(getattr(context.original_exception, "diag", None), "message_primary", None)
    if primary and context.sqlalchemy_exception is not None:
        context.original_exception.args = (primary,)
        name = type(context.original_exception)
        context.sqlalchemy_exception.args = (f"({name.__module__}.{name.__qualname__}) {primary}",)
