"""What a role relies on in its database, whichever engine is behind it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import URL, Column, Connection, ForeignKey, Integer, MetaData, String, Table, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from src.aggregator.troubles import Troubles
from src.errors import ConfigError, ConflictError, SottoError, StateError, StorageError, UnavailableError
from src.storage.database import Database, read_only
from src.storage.postgresql import WRITER_TABLE
from src.storage.schema import FromMetadata, Schema

OpenDatabase = Callable[[Schema], Awaitable[Database]]
Postgresql = tuple[Any, URL]

METADATA = MetaData()
ROUNDS = Table("rounds", METADATA, Column("number", Integer, primary_key=True, autoincrement=False))
UPLOADS = Table(
    "uploads",
    METADATA,
    Column("round", ForeignKey("rounds.number"), primary_key=True, autoincrement=False),
    Column("party", String(8)),
)
SCHEMA = FromMetadata(METADATA)
ROOT = Path(__file__).parents[2]


def _numbers(connection: Connection) -> list[int]:
    return list(connection.scalars(select(ROUNDS.c.number).order_by(ROUNDS.c.number)))


def _add(connection: Connection, number: int) -> None:
    connection.execute(insert(ROUNDS).values(number=number))


def _adding(number: int) -> Callable[[Connection], None]:
    return lambda connection: _add(connection, number)


async def test_what_was_committed_is_there_after_reopening(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    await database.run(_adding(1))
    await database.close()
    again = await open_database(SCHEMA)
    assert await again.run(_numbers) == [1]


async def test_an_exception_rolls_back_everything_of_its_call_and_nothing_else(open_database: OpenDatabase) -> None:
    def fails(connection: Connection) -> None:
        _add(connection, 2)
        raise KeyError("on purpose")

    database = await open_database(SCHEMA)
    await database.run(_adding(1))
    with pytest.raises(KeyError):
        await database.run(fails)
    assert await database.run(_numbers) == [1]


async def test_calls_happen_one_after_the_other_in_their_order_and_in_one_thread(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    threads, order = set(), []

    def read_then_write(connection: Connection, number: int) -> None:
        threads.add(threading.current_thread().name)
        order.append(number)
        assert _numbers(connection) == list(range(number))
        _add(connection, number)

    await asyncio.gather(*(database.run(lambda c, n=n: read_then_write(c, n)) for n in range(10)))  # type: ignore[misc]
    assert order == list(range(10))
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


async def test_a_call_whose_caller_is_cancelled_is_finished_once_it_has_begun(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    begun, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        begun.set()
        go_on.wait()
        _add(connection, 1)

    task = asyncio.create_task(database.run(slow))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await database.run(_numbers) == [1]


async def test_a_second_opener_is_refused_by_name_of_the_first(open_database: OpenDatabase) -> None:
    first = await open_database(SCHEMA)
    with pytest.raises(ConflictError, match=rf"{first.name} is in use by another process \(.*pid {os.getpid()}"):
        await open_database(SCHEMA)
    await first.run(_adding(1))
    await first.close()
    second = await open_database(SCHEMA)
    assert await second.run(_numbers) == [1]


KILLED = """
import asyncio, os, sys
from sqlalchemy import Column, Integer, MetaData, Table, insert
from src.storage.database import Database
from src.storage.schema import FromMetadata
metadata = MetaData()
rounds = Table("rounds", metadata, Column("number", Integer, primary_key=True, autoincrement=False))
def die(connection):
    connection.execute(insert(rounds).values(number=2))
    os.kill(os.getpid(), 9)
async def main():
    database = Database(sys.argv[1], FromMetadata(metadata))
    await database.open()
    await database.run(lambda connection: connection.execute(insert(rounds).values(number=1)) and None)
    await database.run(die)
asyncio.run(main())
"""


async def test_a_killed_process_leaves_the_lock_free_and_only_what_it_committed(database_url: URL) -> None:
    metadata = MetaData()
    Table("rounds", metadata, Column("number", Integer, primary_key=True, autoincrement=False))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(database_url), cwd=ROOT, stdin=subprocess.DEVNULL
    )
    assert await process.wait() == -9
    database = Database(database_url, FromMetadata(metadata))
    await database.open()
    try:
        assert await database.run(_numbers) == [1]
    finally:
        await database.close()


async def test_a_violated_constraint_is_the_callers_and_tells_no_values(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    await database.run(_adding(424242))
    for wrong in (insert(ROUNDS).values(number=424242), insert(UPLOADS).values(round=434343)):
        with pytest.raises(IntegrityError) as caught:
            await database.run(lambda connection, wrong=wrong: connection.execute(wrong) and None)  # type: ignore[misc]
        shown = f"{caught.value} {caught.value.orig}"
        assert "424242" not in shown
        assert "434343" not in shown
    assert await database.run(_numbers) == [424242]


async def test_a_statement_that_the_database_cannot_run_is_a_storage_error(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    with pytest.raises(StorageError, match="nowhere"):
        await database.run(lambda connection: connection.exec_driver_sql("SELECT * FROM nowhere") and None)
    assert await database.run(_numbers) == []


async def test_a_database_of_something_else_is_refused_and_left_alone(
    open_database: OpenDatabase, database_url: URL
) -> None:
    recipes = MetaData()
    Table("recipes", recipes, Column("name", String))
    other = await open_database(FromMetadata(recipes))
    await other.close()
    with pytest.raises(StorageError, match="something else"):
        await open_database(SCHEMA)
    with (
        pytest.raises(StorageError, match="something else"),
        read_only(database_url, schema=SCHEMA),
    ):
        pass
    with read_only(database_url) as reader:
        assert set(sqlalchemy.inspect(reader).get_table_names()) - {WRITER_TABLE} == {"recipes"}


async def test_a_closed_database_runs_nothing_and_closes_again_in_peace(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    await database.close()
    with pytest.raises(StateError):
        await database.run(_numbers)
    await database.close()


async def test_an_open_database_is_not_opened_twice(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    with pytest.raises(StateError):
        await database.open()
    assert await database.run(_numbers) == []


async def test_a_reader_sees_a_snapshot_beside_the_running_role_and_cannot_write(
    open_database: OpenDatabase, database_url: URL
) -> None:
    database = await open_database(SCHEMA)
    await database.run(_adding(1))
    with read_only(database_url, schema=SCHEMA) as reader:
        assert _numbers(reader) == [1]
        await database.run(_adding(2))
        assert _numbers(reader) == [1]
    with (
        pytest.raises((StorageError, DBAPIError), match=r"read-?only"),
        read_only(database_url) as reader,
    ):
        _add(reader, 3)
    assert await database.run(_numbers) == [1, 2]


async def test_a_reader_works_without_a_running_role(open_database: OpenDatabase, database_url: URL) -> None:
    database = await open_database(SCHEMA)
    await database.run(_adding(1))
    await database.close()
    with read_only(database_url) as reader:
        assert _numbers(reader) == [1]


# --- PostgreSQL: a server that goes away ------------------------------------------------------------------------------


@pytest.fixture
async def database(postgresql: Postgresql) -> AsyncIterator[Database]:
    """An open database with one round."""
    database = Database(postgresql[1], SCHEMA)
    await database.open()
    await database.run(_adding(1))
    yield database
    await database.close()


def _cut(postgresql: Postgresql) -> None:
    """Ends all sessions of the test's database, as a restart or a failing network does."""
    server, url = postgresql
    server.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        f"WHERE datname = '{url.database}' AND pid <> pg_backend_pid()"
    )


async def test_a_stopped_server_is_unavailable_and_after_its_restart_all_goes_on(
    database: Database, postgresql: Postgresql
) -> None:
    server, url = postgresql
    server.stop()
    try:
        for _ in range(2):
            with pytest.raises(UnavailableError, match="cannot be reached") as caught:
                await database.run(_adding(2))
            assert caught.value.metadata["committed"] == "no"
            assert str(server.directory) not in caught.value.message
        with pytest.raises(UnavailableError, match=r"cannot be reached: .*socket"):
            await Database(url, SCHEMA).open()
        with pytest.raises(UnavailableError, match="cannot be reached"), read_only(url):
            pass
    finally:
        server.start()
    await database.run(_adding(2))
    assert await database.run(_numbers) == [1, 2]
    with pytest.raises(ConflictError, match="in use by another process"):
        await Database(url, SCHEMA).open()


async def test_sessions_cut_between_two_calls_are_not_noticed(database: Database, postgresql: Postgresql) -> None:
    _cut(postgresql)
    await database.run(_adding(2))
    assert await database.run(_numbers) == [1, 2]


@pytest.mark.parametrize("when", ["while work is under way", "before COMMIT"])
async def test_a_call_under_way_when_the_session_is_cut_says_what_became_of_it(
    database: Database, postgresql: Postgresql, when: str
) -> None:
    def work(connection: Connection) -> None:
        _add(connection, 2)
        _cut(postgresql)
        if when == "while work is under way":
            _add(connection, 3)

    with pytest.raises(UnavailableError, match="was lost") as caught:
        await database.run(work)
    assert caught.value.metadata["committed"] == ("no" if when == "while work is under way" else "unknown")
    assert await database.run(_numbers) == [1]


async def test_work_that_goes_on_after_the_loss_changes_nothing(database: Database, postgresql: Postgresql) -> None:
    def work(connection: Connection) -> None:
        _cut(postgresql)
        with pytest.raises(DBAPIError):
            _add(connection, 2)

    with pytest.raises(UnavailableError, match="was lost"):
        await database.run(work)
    assert await database.run(_numbers) == [1]


async def test_a_process_that_was_cut_off_while_another_one_opened_the_database_is_refused_until_restarted(
    database: Database, postgresql: Postgresql
) -> None:
    _cut(postgresql)
    other = Database(postgresql[1], SCHEMA)
    await other.open()
    try:
        with pytest.raises(ConflictError, match="in use by another process"):
            await database.run(_adding(2))
        await other.run(_adding(3))
    finally:
        await other.close()
    for _ in range(2):
        with pytest.raises(ConflictError, match="restart this one"):
            await database.run(_adding(2))
    # It keeps nobody out.
    again = Database(postgresql[1], SCHEMA)
    await again.open()
    try:
        assert await again.run(_numbers) == [1, 3]
    finally:
        await again.close()


async def test_a_statement_that_takes_too_long_is_given_up_and_changes_nothing(database: Database) -> None:
    def work(connection: Connection) -> None:
        _add(connection, 2)
        connection.exec_driver_sql("SET LOCAL statement_timeout = '10ms'")
        connection.exec_driver_sql("SELECT pg_sleep(60)")

    with pytest.raises(UnavailableError, match="gave up because of a time limit"):
        await database.run(work)
    assert await database.run(_numbers) == [1]


async def test_what_is_committed_is_on_disk_and_transactions_are_serializable(database: Database) -> None:
    def settings(connection: Connection) -> dict[str, str]:
        names = ("synchronous_commit", "transaction_isolation", "statement_timeout", "lock_timeout")
        return {name: connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names}

    assert await database.run(settings) == {
        "synchronous_commit": "on",
        "transaction_isolation": "serializable",
        "statement_timeout": "1min",
        "lock_timeout": "10s",
    }


async def test_a_password_never_shows(postgresql: Postgresql) -> None:
    url = postgresql[1]
    secret = url.set(username="mallory", password="hunter2")
    with pytest.raises(UnavailableError) as refused:
        await Database(secret, SCHEMA).open()
    assert "mallory" in refused.value.message
    shown = f"{refused.value} {refused.value.private} {refused.value.__cause__}"
    database = Database(url.set(password="hunter2"), SCHEMA)
    await database.open()
    try:
        with pytest.raises(StorageError) as failed:
            await database.run(lambda connection: connection.exec_driver_sql("SELECT * FROM nowhere") and None)
    finally:
        await database.close()
    assert "hunter2" not in f"{shown} {failed.value} {failed.value.private}"


WRONG_URLS = [
    "postgresql+psycopg://user:hunter2@host:port/name",
    "postgresql+psycopg://user:hunter2@host",
    "postgresql+psycopg://user@host/name?password=hunter2",
    "postgresql+psycopg2://user:hunter2@host/name",
    "postgresql+psycopg://user@host/name?sslpassword=hunter2",
    "mysql://user:hunter2@host/name",
    "mysql://user@host/name?password=hunter2",
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite:///file.sqlite?mode=ro",
    "hunter2",
]


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_url_that_cannot_be_used_is_a_configuration_error_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(url, SCHEMA)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_an_unknown_option_of_a_url_is_a_configuration_error(postgresql: Postgresql) -> None:
    url = postgresql[1].update_query_dict({"colour": "blue"})
    with pytest.raises(ConfigError, match="colour"), read_only(url):
        pass


def test_without_its_driver_postgresql_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'sotto-fl\[postgres\]'"):
        Database("postgresql+psycopg://user@host/name", SCHEMA)


async def test_a_restart_of_the_server_is_one_line_in_the_log_however_much_it_keeps_from_getting_on(
    database: Database, postgresql: Postgresql, caplog: pytest.LogCaptureFixture
) -> None:
    """As the aggregator notes what fails in each of its turns; and one line when it is over."""
    server, _ = postgresql
    troubles = Troubles()
    caplog.set_level("INFO")

    async def turn() -> None:
        for what in ("starting jobs", "moving jobs", "telling parties"):
            try:
                await database.run(_numbers)
            except SottoError as error:
                troubles.note(what, error)
            else:
                troubles.over(what)

    _cut(postgresql)
    server.stop()
    try:
        await turn()
        await turn()
    finally:
        server.start()
    assert len(caplog.text.splitlines()) == 1
    assert "starting jobs does not get on, and is tried again: UNAVAILABLE" in caplog.text
    await turn()
    assert [record.message for record in caplog.records][1:] == ["telling parties gets on again"]
    assert len(caplog.text.splitlines()) == 2
