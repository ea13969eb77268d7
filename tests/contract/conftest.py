"""A new database for every test, once of SQLite and once of a real PostgreSQL server that this process starts."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import URL
from sqlalchemy.pool import NullPool

from src.storage.database import Database
from src.storage.schema import Schema

OpenDatabase = Callable[[Schema], Awaitable[Database]]

USER = "sotto"
TIMEOUT_S = 200
"""Only a hang reaches it."""

INITDB = ("--auth=trust", "--encoding=UTF8", "--no-sync", "--no-instructions", f"--username={USER}")
# A language's order of text ("a-b" after "ab"), not that of its bytes: what relies on order must ask for it.
LINGUISTIC = ("--locale-provider=icu", "--icu-locale=en-US")
SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off", "shared_buffers": "16MB"}
"""No TCP; and a test's data need not survive a power cut."""


class Server:
    """A PostgreSQL server of its own, in a directory of its own, reached through a socket in it."""

    def __init__(self, binaries: Path, **more: str) -> None:
        self._binaries = binaries
        # A socket's path has at most 107 bytes: below /tmp, whatever pytest's own directory is called.
        self.directory = Path(tempfile.mkdtemp(prefix="sotto-pg-", dir="/tmp"))
        # The server refuses to run as root.
        self._account = ("runuser", "-u", "nobody", "--") if os.geteuid() == 0 else ()
        if self._account:
            shutil.chown(self.directory, "nobody")
        try:
            self._command("initdb", "-D", str(self.directory / "data"), *INITDB, *LINGUISTIC)
        except RuntimeError:  # before version 15, or built without ICU
            self._command("initdb", "-D", str(self.directory / "data"), *INITDB)
        settings = {**SETTINGS, "unix_socket_directories": str(self.directory), **more}
        with (self.directory / "data" / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        """Returns when it accepts connections."""
        self._command("pg_ctl", "start", "-w", "-D", str(self.directory / "data"), "-l", str(self.directory / "log"))

    def stop(self) -> None:
        """Connections are cut; what was committed stays."""
        self._command("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self.directory / "data"))

    def remove(self) -> None:
        """Stops it if it runs, and deletes everything."""
        if (self.directory / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.directory)

    def url(self, database: str = "postgres") -> URL:
        """Of a database of this server."""
        return URL.create("postgresql+psycopg", username=USER, database=database, query={"host": str(self.directory)})

    def execute(self, statement: str, *, database: str = "postgres") -> list[tuple[object, ...]]:
        """Runs one statement, outside of any transaction, and returns its rows."""
        engine = sqlalchemy.create_engine(self.url(database), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []

    def _command(self, name: str, *arguments: str) -> None:
        # Not a pipe: the server would inherit it and keep it open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [*self._account, str(self._binaries / name), *arguments],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                check=False,
                env={**os.environ, "LC_ALL": "C", "PGCTLTIMEOUT": str(TIMEOUT_S)},
            )
            if done.returncode != 0:
                output.seek(0)
                raise RuntimeError(f"{name} failed: {output.read().decode(errors='replace')}")


@functools.cache
def _binaries() -> Path | None:
    """Where the server's programs are: beside `postgres` in PATH, or where Debian puts them (the newest)."""
    found = shutil.which("postgres")
    places = [Path(found).resolve().parent] if found else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(debian, key=lambda path: float(path.parent.name), reverse=True)
    return next((place for place in places if (place / "initdb").exists()), None)


def binaries_or_skip() -> Path:
    """The server's programs; where there are none, no test that needs them."""
    binaries = _binaries()
    if binaries is None:
        missing = "no PostgreSQL server is installed (looked in PATH and /usr/lib/postgresql/*/bin)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return binaries


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A running server, one for each process of the test run."""
    server = Server(binaries_or_skip())
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def postgresql(postgresql_server: Server) -> Iterator[tuple[Server, URL]]:
    """The server, and the URL of an empty database of this test's own."""
    name = f"test_{uuid.uuid4().hex}"
    postgresql_server.execute(f"CREATE DATABASE {name}")
    yield postgresql_server, postgresql_server.url(name)
    postgresql_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """The URL of a database of this test's own: empty, or a file that is not there yet."""
    if request.param == "sqlite":
        return URL.create("sqlite", database=str(tmp_path / "state" / "role.sqlite"))
    url: URL = request.getfixturevalue("postgresql")[1]
    return url


@pytest.fixture
async def open_database(database_url: URL) -> AsyncIterator[OpenDatabase]:
    """Opens the test's database with a schema; what is open at the end is closed."""
    opened: list[Database] = []

    async def open_(schema: Schema) -> Database:
        database = Database(database_url, schema)
        await database.open()
        opened.append(database)
        return database

    yield open_
    for database in opened:
        await database.close()
