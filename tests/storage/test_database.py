"""The database: one writer, one thread, real transactions, one schema version."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import Column, Connection, ForeignKey, Integer, MetaData, Table, insert, select
from sqlalchemy.exc import IntegrityError

from src.errors import ConflictError, NotFoundError, StateError, StorageError
from src.storage.database import Database, read_only

METADATA = MetaData()
ROUNDS = Table("rounds", METADATA, Column("number", Integer, primary_key=True))
UPLOADS = Table("uploads", METADATA, Column("round", ForeignKey("rounds.number"), primary_key=True))
ROOT = Path(__file__).parents[2]


def _numbers(connection: Connection) -> list[int]:
    return list(connection.scalars(select(ROUNDS.c.number).order_by(ROUNDS.c.number)))


def _add(number: int, connection: Connection) -> None:
    connection.execute(insert(ROUNDS).values(number=number))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "role.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    database = Database(path, METADATA, schema_version=3)
    await database.open()
    yield database
    await database.close()


async def test_what_was_committed_is_there_after_reopening(database: Database, path: Path) -> None:
    await database.run(lambda connection: _add(1, connection))
    await database.close()
    again = Database(path, METADATA, schema_version=3)
    await again.open()
    assert await again.run(_numbers) == [1]
    await again.close()


async def test_an_exception_rolls_back_everything_of_its_call_and_nothing_else(database: Database) -> None:
    def fails(connection: Connection) -> None:
        _add(2, connection)
        raise KeyError("on purpose")

    await database.run(lambda connection: _add(1, connection))
    with pytest.raises(KeyError):
        await database.run(fails)
    assert await database.run(_numbers) == [1]


async def test_the_write_lock_is_taken_at_begin_not_at_the_first_write(database: Database, path: Path) -> None:
    def look(connection: Connection) -> None:
        other = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
        with other.connect() as outsider, pytest.raises(sqlalchemy.exc.OperationalError, match="locked"):
            outsider.exec_driver_sql("BEGIN IMMEDIATE")
        other.dispose()

    await database.run(look)


async def test_concurrent_calls_happen_one_after_the_other_in_their_order_and_in_one_thread(database: Database) -> None:
    threads, order = set(), []

    def read_then_write(number: int, connection: Connection) -> None:
        threads.add(threading.current_thread().name)
        order.append(number)
        assert _numbers(connection) == list(range(number))
        _add(number, connection)

    await asyncio.gather(*(database.run(lambda c, n=n: read_then_write(n, c)) for n in range(10)))  # type: ignore[misc]
    assert order == list(range(10))
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


async def test_a_call_whose_caller_is_cancelled_is_finished_once_it_has_begun(database: Database) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        begun.set()
        go_on.wait()
        _add(1, connection)

    task = asyncio.create_task(database.run(slow))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await database.run(_numbers) == [1]


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


async def test_a_second_opener_is_refused_by_name_of_the_first(database: Database, path: Path) -> None:
    with pytest.raises(ConflictError, match=r"role\.db is in use by another process \(pid \d+\)"):
        await Database(path, METADATA, schema_version=3).open()
    await database.close()
    second = Database(path, METADATA, schema_version=3)
    await second.open()
    await second.close()


def test_a_killed_process_leaves_the_lock_free_and_only_what_it_committed(path: Path) -> None:
    script = """
import asyncio, os, sys
from pathlib import Path
from sqlalchemy import Column, Integer, MetaData, Table, insert
from src.storage.database import Database
metadata = MetaData()
rounds = Table("rounds", metadata, Column("number", Integer, primary_key=True))
def die(connection):
    connection.execute(insert(rounds).values(number=2))
    os.kill(os.getpid(), 9)
async def main():
    database = Database(Path(sys.argv[1]), metadata, schema_version=3)
    await database.open()
    await database.run(lambda connection: connection.execute(insert(rounds).values(number=1)) and None)
    await database.run(die)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -9

    async def look() -> list[int]:
        database = Database(path, METADATA, schema_version=3)
        await database.open()
        try:
            return await database.run(_numbers)
        finally:
            await database.close()

    assert asyncio.run(look()) == [1]


async def test_another_schema_version_is_refused_naming_both(database: Database, path: Path) -> None:
    await database.close()
    with pytest.raises(StorageError, match="has schema version 3, this software needs 4"):
        await Database(path, METADATA, schema_version=4).open()
    with (
        pytest.raises(StorageError, match="has schema version 3, this software needs 2"),
        read_only(path, schema_version=2),
    ):
        pass


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as a header" * 20, b"short"])
async def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)  # noqa: ASYNC240  nothing else runs in this loop
    with pytest.raises(StorageError, match="not a database"):
        await Database(path, METADATA, schema_version=3).open()


async def test_a_database_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE recipes (name TEXT)")
    engine.dispose()
    with pytest.raises(StorageError, match="something else"):
        await Database(path, METADATA, schema_version=3).open()


async def test_a_database_damaged_on_disk_is_refused(database: Database, path: Path) -> None:
    rows = [{"number": number} for number in range(5000)]
    await database.run(lambda connection: connection.execute(insert(ROUNDS), rows) and None)
    await database.close()
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(range(256)) * 16)
    with pytest.raises(StorageError):
        await Database(path, METADATA, schema_version=3).open()


async def test_a_closed_database_runs_nothing_and_closes_again_in_peace(database: Database) -> None:
    await database.close()
    with pytest.raises(StateError):
        await database.run(_numbers)
    await database.close()


async def test_an_open_database_is_not_opened_twice(database: Database) -> None:
    with pytest.raises(StateError):
        await database.open()
    assert await database.run(_numbers) == []


async def test_a_reader_sees_a_snapshot_beside_the_running_role_and_cannot_write(
    database: Database, path: Path
) -> None:
    await database.run(lambda connection: _add(1, connection))
    with read_only(path, schema_version=3) as reader:
        assert _numbers(reader) == [1]
        await database.run(lambda connection: _add(2, connection))
        assert _numbers(reader) == [1]
        with pytest.raises(sqlalchemy.exc.OperationalError, match="readonly"):
            _add(3, reader)


async def test_a_reader_works_without_a_running_role(database: Database, path: Path) -> None:
    await database.run(lambda connection: _add(1, connection))
    await database.close()
    with read_only(path) as reader:
        assert _numbers(reader) == [1]
    with pytest.raises(NotFoundError), read_only(path.with_name("missing.db")):
        pass


async def test_values_of_rows_stay_out_of_error_texts(database: Database) -> None:
    await database.run(lambda connection: _add(424242, connection))
    with pytest.raises(IntegrityError) as caught:
        await database.run(lambda connection: _add(424242, connection))
    assert "424242" not in str(caught.value)
