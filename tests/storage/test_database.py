"""What is SQLite's own: its file, its lock, its pragmas. What both engines do is held by tests/contract."""

from __future__ import annotations

import resource
import sqlite3
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import URL, Column, Connection, ForeignKey, Integer, MetaData, Table, insert, select
from sqlalchemy.exc import IntegrityError

from src.errors import ConflictError, NotFoundError, SottoError, StorageError, StorageFullError, UnavailableError
from src.storage.database import Database, read_only
from src.storage.schema import FromMetadata

METADATA = MetaData()
ROUNDS = Table("rounds", METADATA, Column("number", Integer, primary_key=True))
UPLOADS = Table("uploads", METADATA, Column("round", ForeignKey("rounds.number"), primary_key=True))
SCHEMA = FromMetadata(METADATA)


def _numbers(connection: Connection) -> list[int]:
    return list(connection.scalars(select(ROUNDS.c.number).order_by(ROUNDS.c.number)))


def _add(number: int, connection: Connection) -> None:
    connection.execute(insert(ROUNDS).values(number=number))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "role.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    database = Database(path, SCHEMA)
    await database.open()
    yield database
    await database.close()


async def test_the_write_lock_is_taken_at_begin_not_at_the_first_write(database: Database, path: Path) -> None:
    def look(connection: Connection) -> None:
        other = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
        with other.connect() as outsider, pytest.raises(sqlalchemy.exc.OperationalError, match="locked"):
            outsider.exec_driver_sql("BEGIN IMMEDIATE")
        other.dispose()

    await database.run(look)


async def test_while_another_process_holds_it_it_is_away_and_not_broken(database: Database, path: Path) -> None:
    """What is away is waited for; a round that met what is broken was lost."""
    await database.run(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout=0"))
    other = sqlalchemy.create_engine(f"sqlite:///{path}")
    with other.connect() as outsider:
        outsider.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="database is locked"):
            await database.run(lambda connection: _add(1, connection))
    other.dispose()
    await database.run(lambda connection: _add(1, connection))


async def test_a_file_that_cannot_grow_for_a_moment_is_written_to_after_it(database: Database, path: Path) -> None:
    """As of a quota that is used up, or a disk that fails: SQLite calls all of them an I/O error."""
    await database.run(lambda connection: _add(1, connection))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(StorageFullError, match="disk I/O error"):
            await database.run(lambda connection: _add(2, connection))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    await database.run(lambda connection: _add(3, connection))
    assert await database.run(_numbers) == [1, 3]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, StorageFullError),
        (sqlite3.SQLITE_READONLY, StorageFullError),
        (sqlite3.SQLITE_IOERR_FSYNC, StorageFullError),
        (sqlite3.SQLITE_READONLY_DBMOVED, StorageError),
        (sqlite3.SQLITE_IOERR_SHORT_READ, StorageError),
        (sqlite3.SQLITE_IOERR_CORRUPTFS, StorageError),
        (sqlite3.SQLITE_CORRUPT, StorageError),
        (sqlite3.SQLITE_BUSY, UnavailableError),
    ],
)
async def test_what_passes_is_told_from_a_file_that_is_damaged_or_another_one(
    database: Database, code: int, kind: type[SottoError]
) -> None:
    def fail(_: Connection) -> None:
        error = sqlite3.OperationalError("no")
        error.sqlite_errorcode = code
        raise error

    with pytest.raises(kind) as caught:
        await database.run(fail)
    assert type(caught.value) is kind


async def test_pragmas_hold(database: Database) -> None:
    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert await database.run(pragmas) == ["wal", 2, 1, 1]
    with pytest.raises(IntegrityError):
        await database.run(lambda connection: connection.execute(insert(UPLOADS).values(round=99)))


async def test_only_the_owner_can_read_the_files(database: Database, path: Path) -> None:
    await database.run(lambda connection: _add(1, connection))
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert {"role.db", "role.db-wal", "role.db-shm", "role.db.lock"} <= set(modes)
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as a header" * 20, b"short"])
async def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)  # noqa: ASYNC240  nothing else runs in this loop
    with pytest.raises(StorageError, match="not a database"):
        await Database(path, SCHEMA).open()


async def test_a_database_damaged_on_disk_is_refused(database: Database, path: Path) -> None:
    rows = [{"number": number} for number in range(5000)]
    await database.run(lambda connection: connection.execute(insert(ROUNDS), rows) and None)
    await database.close()
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(range(256)) * 16)
    with pytest.raises(StorageError):
        await Database(path, SCHEMA).open()


async def test_a_file_that_is_not_there_is_not_read(path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no database role\.db"), read_only(path):
        pass
    assert not path.parent.exists()


@pytest.mark.parametrize("form", ["path", "text", "URL"])
async def test_a_path_and_its_url_mean_the_same_file(database: Database, path: Path, form: str) -> None:
    url = URL.create("sqlite", database=str(path))
    forms: dict[str, Path | str | URL] = {"path": path, "text": str(url), "URL": url}
    location = forms[form]
    await database.run(lambda connection: _add(1, connection))
    with read_only(location, schema=SCHEMA) as reader:
        assert _numbers(reader) == [1]
    with pytest.raises(ConflictError):
        await Database(location, SCHEMA).open()
