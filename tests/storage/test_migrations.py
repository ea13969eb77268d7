"""SQLite's own part of an upgrade: databases of version 0.1, which kept no history, and the copy before an upgrade."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src.aggregator.store import EnrolmentStore, RoundStore
from src.errors import LedgerError, StorageError
from src.jobs.states import JobState
from src.jobs.store import JobQuery, JobStore
from src.party.store import RoundMemory
from src.privacy.ledger import entry_digest, from_line, to_line
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.database import Database, read_only
from src.storage.ledger import LedgerStore
from src.storage.migrations import HISTORIES, History, Migrations

ROOT = Path(__file__).parents[2]
AT = "2025-06-01T12:00:00+00:00"
VECTORS = ROOT / "tests" / "vectors"
FIRST: dict[History, str] = {"aggregator": "database_v1.sql", "party": "database_v1_party.sql"}
HEAD = "bb144c830e8d35256cd31ee64303e6f6248d9bcee60d7b911cab9c432e6fa222"
"""Of the aggregator's ledger, as its database's text has it."""
NEWEST = Migrations("aggregator").newest.rpartition("_")[2]


def _make(path: Path, history: History, *, more: str = "") -> Path:
    """A database as version 0.1 wrote it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((VECTORS / FIRST[history]).read_text("utf-8") + more)
        connection.execute("PRAGMA journal_mode=WAL")
    return path


async def _in(path: Path, history: History, work: Callable[[Connection], Any]) -> Any:
    database = Database(path, Migrations(history))
    await database.open()
    try:
        return await database.run(work)
    finally:
        await database.close()


async def test_an_aggregators_database_of_version_0_1_is_read(tmp_path: Path) -> None:
    path = _make(tmp_path / "aggregator.sqlite", "aggregator")
    metadata = MetaData()
    jobs, rounds, ledger, members = (
        JobStore(metadata),
        RoundStore(metadata),
        LedgerStore(metadata),
        EnrolmentStore(metadata),
    )

    def look(connection: Connection) -> None:
        listed = jobs.list_jobs(connection, query=JobQuery()).rows
        assert {row.display_name: row.state for row in listed} == {
            "job 1: Größe": JobState.SUCCEEDED,
            "job 2: Größe": JobState.PENDING,
            "job 3: Größe": JobState.FAILED,
        }
        (done,) = (row for row in listed if row.state is JobState.SUCCEEDED)
        assert done.result is not None
        assert (done.owner, done.rounds_released, done.result["metrics"]) == ("scientist/s", 1, {"auc": 0.61})
        kinds = connection.exec_driver_sql("SELECT DISTINCT kind, priority FROM jobs")
        assert kinds.all() == [("federated_training", "NORMAL")]
        attempts = connection.exec_driver_sql("SELECT state, attempt FROM jobs ORDER BY state")
        assert attempts.all() == [("FAILED", 1), ("PENDING", 0), ("SUCCEEDED", 1)]
        assert [event.sequence for event in jobs.events(connection, done.job_id)] == [1, 2, 3, 4]
        (round_,) = rounds.of_job(connection, done.job_id)
        assert (round_.number, round_.settled, round_.cohort) == (1, True, ("a", "b"))
        assert [name for name, _ in members.members(connection)] == ["a", "b"]
        assert ledger.verify(connection) == HEAD
        assert [entry.kind for entry in ledger.entries(connection)] == ["reservation", "final", "reservation"]

    await _in(path, "aggregator", look)
    await _in(path, "aggregator", look)


async def test_a_partys_database_of_version_0_1_is_read(tmp_path: Path) -> None:
    path = _make(tmp_path / "party.sqlite", "party")

    def look(connection: Connection) -> None:
        (open_round,) = RoundMemory(MetaData()).open_rounds(connection)
        assert open_round.number == 1
        assert len(LedgerStore(MetaData()).entries(connection)) == 2

    await _in(path, "party", look)
    with read_only(path, schema=Migrations("party")) as reader:
        look(reader)
        assert reader.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == Migrations("party").newest


async def test_before_an_upgrade_a_copy_is_laid_beside_the_database_and_never_after(tmp_path: Path) -> None:
    path = _make(tmp_path / "aggregator.sqlite", "aggregator")
    with closing(sqlite3.connect(path)) as before:
        expected = list(before.iterdump())
    await _in(path, "aggregator", lambda connection: None)
    copy = tmp_path / f"aggregator.sqlite.before-{NEWEST}"
    with closing(sqlite3.connect(copy)) as kept:
        assert list(kept.iterdump()) == expected
        assert kept.execute("PRAGMA user_version").fetchone() == (1,)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    copy.unlink()
    await _in(path, "aggregator", lambda connection: None)
    await _in(tmp_path / "new.sqlite", "aggregator", lambda connection: None)
    names = {each.name for each in tmp_path.iterdir()}  # noqa: ASYNC240  nothing else runs in this loop
    assert names == {"aggregator.sqlite", "aggregator.sqlite.lock", "new.sqlite", "new.sqlite.lock"}


async def test_an_upgraded_database_enforces_references_and_its_ledger_again(tmp_path: Path) -> None:
    path = _make(tmp_path / "aggregator.sqlite", "aggregator")
    for statement in ("DELETE FROM jobs", "DELETE FROM ledger"):
        with pytest.raises(Exception, match=r"FOREIGN KEY|append-only"):
            await _in(path, "aggregator", lambda connection, do=statement: connection.exec_driver_sql(do) and None)  # type: ignore[misc]


async def test_version_0_1_refuses_what_was_upgraded(tmp_path: Path) -> None:
    path = _make(tmp_path / "aggregator.sqlite", "aggregator")
    await _in(path, "aggregator", lambda connection: None)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() != (1,)


WRONG: list[tuple[str, History, History, str, str]] = [
    ("a party's", "party", "aggregator", "", "something else"),
    ("an aggregator's", "aggregator", "party", "", "something else"),
    ("one with a table more", "aggregator", "aggregator", "CREATE TABLE recipes (name TEXT);", "something else"),
    ("one with a table less", "aggregator", "aggregator", "DROP TABLE enrolment;", "something else"),
    ("one of another version", "aggregator", "aggregator", "PRAGMA user_version=0;", "something else"),
    (
        "one with an event of no job",
        "aggregator",
        "aggregator",
        "INSERT INTO job_events VALUES ('none', 1, '', '', '', '', NULL);",
        "a row of the table job_events refers to a row of jobs",
    ),
]


@pytest.mark.parametrize(
    ("made", "opened", "more", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
async def test_what_is_not_such_a_database_is_refused_and_left_alone(
    tmp_path: Path, made: History, opened: History, more: str, message: str
) -> None:
    path = _make(tmp_path / "role.sqlite", made, more=more)
    with closing(sqlite3.connect(path)) as before:
        expected = list(before.iterdump())
    with pytest.raises(StorageError, match=message):
        await _in(path, opened, lambda connection: None)
    with closing(sqlite3.connect(path)) as after:
        assert list(after.iterdump()) == expected


OPEN_TWICE = """
import asyncio, sys
from src.storage.database import Database
from src.storage.migrations import Migrations
async def main():
    database = Database("sqlite:///" + sys.argv[1], Migrations("aggregator"))
    await database.open()
    await database.close()
asyncio.run(main())
print("alembic" in sys.modules)
"""


def test_alembic_is_only_loaded_when_there_is_something_to_upgrade(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN_TWICE, str(tmp_path / "aggregator.sqlite")]
    for loaded in ("True", "False"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == loaded


FORGED = {
    "another line of version 1": ("UPDATE ledger SET digest = :digest, line = :line WHERE sequence = 2", 2),
    "one line more": ("INSERT INTO ledger VALUES (3, :digest, :line)", 3),
    "one line less": ("DELETE FROM ledger WHERE sequence = 2", 2),
}


@pytest.mark.parametrize(("statement", "named"), FORGED.values(), ids=FORGED.keys())
async def test_no_lines_of_version_1_but_those_that_were_upgraded(tmp_path: Path, statement: str, named: int) -> None:
    """They are not signed, and the first signed entry after them would vouch for whatever stands there."""
    path = _make(tmp_path / "party.sqlite", "party")
    store = LedgerStore(MetaData(), signer=EntrySigner(SigningKey.generate()))
    assert len(await _in(path, "party", store.entries)) == 2
    with closing(sqlite3.connect(path)) as database:
        for trigger in ("no_update", "no_delete", "in_order"):
            database.execute(f"DROP TRIGGER ledger_{trigger}")
        line = database.execute("SELECT line FROM ledger WHERE sequence = 2").fetchone()[0]
        old = from_line(line)
        place = old.sequence + (named == 3)
        forged = replace(old, sequence=place, at=AT, previous=old.digest if named == 3 else old.previous, reason="x")
        if named == 3:
            forged = replace(forged, kind="refusal")
        forged = replace(forged, digest=entry_digest(forged))
        database.execute(statement, {"digest": forged.digest, "line": to_line(forged)} if ":" in statement else {})
        database.commit()
    for reading in (store.verify, LedgerStore(MetaData()).entries):
        with pytest.raises(LedgerError, match=f"entry {named}: the lines of version 1 are not those"):
            await _in(path, "party", reading)


async def test_a_database_at_the_revision_before_pins_its_lines_of_version_1_and_refuses_a_digest_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _make(tmp_path / "party.sqlite", "party")
    with monkeypatch.context() as patch:
        patch.setitem(HISTORIES, "party", HISTORIES["party"][:2])
        await _in(path, "party", lambda connection: None)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TRIGGER ledger_in_order")
        (as_it_was,) = [
            each for each in (VECTORS / FIRST["party"]).read_text("utf-8").splitlines() if "in_order" in each
        ]
        database.execute(as_it_was)
        database.commit()
    entries = await _in(path, "party", LedgerStore(MetaData()).entries)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT entries, head FROM ledger_version_1").fetchall() == [(2, entries[-1].digest)]
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute("INSERT OR REPLACE INTO ledger VALUES (3, ?, 'x')", (entries[-1].digest,))
