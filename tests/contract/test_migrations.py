"""Every role's database is made and upgraded by its migrations alone, and is then what the role's stores expect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import URL, Connection, MetaData, inspect, text

from src.aggregator.store import EnrolmentStore, RoundStore
from src.errors import StorageError
from src.jobs.store import JobStore
from src.party.orders import OrderBook
from src.party.store import RoundMemory
from src.storage.database import Database, read_only
from src.storage.heads import HeadStore
from src.storage.ledger import LedgerStore
from src.storage.migrations import HISTORIES, History, Migrations
from src.storage.migrations.aggregator import v0002
from src.storage.postgresql import WRITER_TABLE
from src.storage.schema import Schema

OpenDatabase = Callable[[Schema], Awaitable[Database]]

STORES: dict[History, tuple[Callable[[MetaData], object], ...]] = {
    "aggregator": (JobStore, RoundStore, LedgerStore, EnrolmentStore, HeadStore),
    "party": (RoundMemory, LedgerStore, HeadStore, OrderBook),
}
ROLES: tuple[History, ...] = ("aggregator", "party")

OLD_JOB = (
    "INSERT INTO jobs (job_id, request_id, owner, display_name, spec, spec_digest, state, created_at, started_at, "
    "ended_at, rounds_released, rounds_failed) "
    "VALUES (:id, :id, 'scientist/s', '', '{}', '', :state, '2025', '', '', 0, 0)"
)
OLD_EVENT = (
    "INSERT INTO job_events (job_id, sequence, time, kind, state, message) "
    "VALUES (:id, 1, '2025', 'submitted', 'PENDING', '')"
)


def _differences(history: History) -> Callable[[Connection], list[Any]]:
    metadata = MetaData()
    for store in STORES[history]:
        store(metadata)

    def compare(connection: Connection) -> list[Any]:
        options = {
            "compare_server_default": True,
            "include_name": lambda name, kind, _parents: kind != "table" or name != WRITER_TABLE,
        }
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    return compare


def _triggers(connection: Connection) -> list[str]:
    catalogue = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger' ORDER BY name",
        "postgresql": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY tgname",
    }
    return list(connection.scalars(text(catalogue[connection.dialect.name])))


def _revision(connection: Connection) -> str:
    return str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one())


async def _old(open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """An aggregator's database at its first revision, with two jobs."""
    with monkeypatch.context() as patch:
        patch.setitem(HISTORIES, "aggregator", HISTORIES["aggregator"][:1])
        database = await open_database(Migrations("aggregator"))

    def fill(connection: Connection) -> None:
        for name, state in (("new", "PENDING"), ("old", "SUCCEEDED")):
            connection.execute(text(OLD_JOB), {"id": name, "state": state})
            connection.execute(text(OLD_EVENT), {"id": name})

    await database.run(fill)
    assert await database.run(_revision) == "aggregator_0001"
    await database.close()


@pytest.mark.parametrize("history", ROLES)
async def test_a_new_database_is_what_the_stores_define(open_database: OpenDatabase, history: History) -> None:
    database = await open_database(Migrations(history))
    assert await database.run(_differences(history)) == []
    assert await database.run(_revision) == HISTORIES[history][-1].revision == Migrations(history).newest
    triggers = await database.run(_triggers)
    assert {"ledger_in_order", "ledger_no_delete", "ledger_no_update"} <= set(triggers)
    assert (
        await database.run(lambda connection: connection.dialect.name == "sqlite") or "ledger_no_truncate" in triggers
    )


async def test_an_upgraded_database_is_what_the_stores_define_and_keeps_its_rows(
    open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _old(open_database, monkeypatch)
    database = await open_database(Migrations("aggregator"))
    assert await database.run(_differences("aggregator")) == []
    assert "ledger_in_order" in await database.run(_triggers)

    def rows(connection: Connection) -> list[Any]:
        query = (
            "SELECT job_id, jobs.kind, priority, attempt, max_attempts, retry_at, deadline_at, deleted_at, "
            "fencing_token, lease_holder, lease_expires_at, cause "
            "FROM jobs JOIN job_events USING (job_id) ORDER BY job_id"
        )
        return [tuple(row) for row in connection.exec_driver_sql(query)]

    rest = (4, "", "", "", 0, "", "", "")
    assert await database.run(rows) == [
        ("new", "federated_training", "NORMAL", 0, *rest),
        ("old", "federated_training", "NORMAL", 1, *rest),
    ]


async def test_an_upgrade_leaves_no_defaults_behind(
    open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _old(open_database, monkeypatch)
    database = await open_database(Migrations("aggregator"))

    def defaults(connection: Connection) -> list[str]:
        tables = ("jobs", "job_events", "rounds", "ledger", "enrolment", "job_queues")
        columns = (column for table in tables for column in inspect(connection).get_columns(table))
        return [column["name"] for column in columns if column["default"] is not None]

    assert await database.run(defaults) == []


async def test_an_upgrade_that_fails_changes_nothing(
    open_database: OpenDatabase, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _old(open_database, monkeypatch)
    upgrade = v0002.upgrade

    def fails(op: Any) -> None:
        upgrade(op)
        raise KeyError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(v0002, "upgrade", fails)
        with pytest.raises(KeyError):
            await open_database(Migrations("aggregator"))
    with read_only(database_url) as reader:
        assert _revision(reader) == "aggregator_0001"
        assert "kind" not in {column["name"] for column in inspect(reader).get_columns("jobs")}
    database = await open_database(Migrations("aggregator"))
    assert await database.run(_revision) == Migrations("aggregator").newest


async def test_a_reader_refuses_what_is_not_upgraded_yet(
    open_database: OpenDatabase, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _old(open_database, monkeypatch)
    with (
        pytest.raises(
            StorageError,
            match=f"aggregator_0001, this software needs {Migrations('aggregator').newest}: the role's next start",
        ),
        read_only(database_url, schema=Migrations("aggregator")),
    ):
        pass
    await open_database(Migrations("aggregator"))
    with read_only(database_url, schema=Migrations("aggregator")) as reader:
        assert LedgerStore(MetaData()).entries(reader) == []


REVISIONS = [
    ("aggregator_9999", "written by a newer version of Sotto: it is at revision aggregator_9999"),
    ("party_0001", "that of another role: party"),
    ("deadbeef", "something else"),
]


@pytest.mark.parametrize(("revision", "message"), REVISIONS)
async def test_a_revision_that_is_not_known_is_refused_and_left_alone(
    open_database: OpenDatabase, database_url: URL, revision: str, message: str
) -> None:
    database = await open_database(Migrations("aggregator"))
    await database.run(
        lambda connection: (
            connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision}) and None
        )
    )
    await database.close()
    with pytest.raises(StorageError, match=message):
        await open_database(Migrations("aggregator"))
    with pytest.raises(StorageError, match=message), read_only(database_url, schema=Migrations("aggregator")):
        pass
    with read_only(database_url) as reader:
        assert _revision(reader) == revision


async def test_one_role_does_not_open_the_database_of_another(open_database: OpenDatabase) -> None:
    database = await open_database(Migrations("party"))
    await database.close()
    with pytest.raises(StorageError, match="that of another role: party"):
        await open_database(Migrations("aggregator"))


async def test_text_is_in_the_order_of_its_characters_whatever_the_servers_locale(open_database: OpenDatabase) -> None:
    database = await open_database(Migrations("aggregator"))
    store = EnrolmentStore(MetaData())
    names = ["ab", "a-c", "B", "a", "ä"]

    def enrol(connection: Connection) -> None:
        for name in names:
            store.enrol(connection, name, bytes(32))

    await database.run(enrol)
    assert [name for name, _ in await database.run(store.members)] == sorted(names)


@pytest.mark.parametrize("history", ROLES)
def test_a_history_is_one_line_of_revisions(history: History) -> None:
    names = [each.revision for each in HISTORIES[history]]
    assert names == [f"{history}_{number:04}" for number in range(1, len(names) + 1)]
    assert [each.down_revision for each in HISTORIES[history]] == [None, *names[:-1]]
