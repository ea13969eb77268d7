"""The ledger's table: append-only, chained, and read only as a whole that verifies."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData
from sqlalchemy.exc import IntegrityError

from src.errors import InvalidInput, LedgerError
from src.privacy import ledger
from src.privacy.events import DpSgdSteps, NoisySum
from src.privacy.ledger import GENESIS, Entry
from src.storage.database import Database
from src.storage.ledger import LedgerStore

AT = "2025-06-01T12:00:00+00:00"
PARTY: dict[str, Any] = {"unit": "party", "subject": "federation:demo", "event": NoisySum(noise_multiplier=1.5)}
EXAMPLE: dict[str, Any] = {
    "unit": "example",
    "subject": "dataset:randhie",
    "event": DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=4),
}

METADATA = MetaData()
STORE = LedgerStore(METADATA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "role.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    """Three entries: two reservations of different units, and the end of the first."""
    database = Database(path, METADATA, schema_version=1)
    await database.open()
    await database.run(lambda connection: _reserve(connection, 1, **PARTY))
    await database.run(lambda connection: _reserve(connection, 2, **EXAMPLE))
    await database.run(_finalise_first)
    yield database
    await database.close()


def _reserve(connection: Connection, number: int, **fields: Any) -> Entry:
    return STORE.append(
        connection,
        at=AT,
        kind="reservation",
        job_id="job-1",
        round=number,
        reservation_id=f"r{number}",
        charged_rounds=1,
        **fields,
    )


def _finalise_first(connection: Connection) -> Entry:
    return STORE.add(connection, ledger.finalise(STORE.entries(connection), "r1", at=AT))


async def test_entries_are_read_as_they_were_written_and_by_unit_and_subject(database: Database) -> None:
    entries = await database.run(STORE.entries)
    assert [(entry.sequence, entry.kind, entry.unit) for entry in entries] == [
        (1, "reservation", "party"),
        (2, "reservation", "example"),
        (3, "final", "party"),
    ]
    assert entries[1].event == EXAMPLE["event"]
    assert await database.run(lambda c: STORE.entries(c, unit="example")) == entries[1:2]
    assert await database.run(lambda c: STORE.entries(c, subject="federation:demo")) == [entries[0], entries[2]]
    assert await database.run(STORE.head) == await database.run(STORE.verify) == entries[-1].digest


async def test_an_empty_ledger_has_the_first_head(tmp_path: Path) -> None:
    database = Database(tmp_path / "new.db", METADATA, schema_version=1)
    await database.open()
    assert await database.run(STORE.head) == await database.run(STORE.verify) == GENESIS
    assert await database.run(STORE.entries) == []
    await database.close()


async def test_a_charge_is_rolled_back_with_what_it_is_charged_for(database: Database) -> None:
    def charge_and_fail(connection: Connection) -> None:
        _reserve(connection, 3, **PARTY)
        raise KeyError("the round could not be stored")

    head = await database.run(STORE.head)
    with pytest.raises(KeyError):
        await database.run(charge_and_fail)
    assert await database.run(STORE.head) == head


async def test_adding_an_entry_that_is_there_changes_nothing(database: Database) -> None:
    entries = await database.run(STORE.entries)
    for entry in entries:
        assert await database.run(lambda c, entry=entry: STORE.add(c, entry)) == entry  # type: ignore[misc]
    assert await database.run(STORE.entries) == entries


async def test_an_entry_that_does_not_follow_is_refused(database: Database) -> None:
    last = (await database.run(STORE.entries))[-1]
    fields: dict[str, Any] = {
        "at": AT,
        "kind": "reservation",
        "job_id": "job-1",
        "round": 9,
        "reservation_id": "r9",
        "charged_rounds": 1,
        **PARTY,
    }
    first = ledger.append(None, **fields)
    fitting = ledger.append(last, **fields)
    for entry in (first, replace(fitting, sequence=5), replace(fitting, previous=GENESIS)):
        with pytest.raises(LedgerError, match="does not follow the last one"):
            await database.run(lambda c, entry=entry: STORE.add(c, entry))  # type: ignore[misc]
    with pytest.raises(InvalidInput):
        await database.run(lambda c: STORE.append(c, **{**fields, "charged_rounds": 0}))


WRITES = [
    "UPDATE ledger SET line = 'x' WHERE sequence = 1",
    "UPDATE ledger SET sequence = 9 WHERE sequence = 3",
    "DELETE FROM ledger WHERE sequence = 3",
    "DELETE FROM ledger",
    "INSERT OR REPLACE INTO ledger (sequence, digest, line) VALUES (3, 'x', 'x')",
    "INSERT INTO ledger (sequence, digest, line) VALUES (9, 'x', 'x')",
]


@pytest.mark.parametrize("statement", WRITES)
async def test_the_database_itself_refuses(database: Database, statement: str) -> None:
    before = await database.run(STORE.entries)
    with pytest.raises(IntegrityError, match="append-only"):
        await database.run(lambda connection: connection.exec_driver_sql(statement) and None)
    assert await database.run(STORE.entries) == before


def _as_json(line: str, **changes: object) -> str:
    return json.dumps({**json.loads(line), **changes}, sort_keys=True, separators=(",", ":"))


TAMPERING = [
    ("a cheaper reason", 1, "UPDATE ledger SET line = :changed WHERE sequence = 1", "entry 1"),
    ("another digest in the row", 2, "UPDATE ledger SET digest = 'x' WHERE sequence = 2", "entry 2"),
    ("an entry gone", 2, "DELETE FROM ledger WHERE sequence = 2", "entry 2"),
    ("another order", 1, "UPDATE ledger SET sequence = -sequence", "entry 1"),
    ("no ledger line", 3, "UPDATE ledger SET line = '{}' WHERE sequence = 3", "line 3"),
]


@pytest.mark.parametrize(
    ("number", "statement", "named"), [row[1:] for row in TAMPERING], ids=[r[0] for r in TAMPERING]
)
async def test_what_gets_past_the_triggers_is_named_by_every_reading(
    database: Database, path: Path, number: int, statement: str, named: str
) -> None:
    await database.close()
    with sqlite3.connect(path) as connection:
        for trigger in ("no_update", "no_delete", "in_order"):
            connection.execute(f"DROP TRIGGER ledger_{trigger}")
        (line,) = connection.execute("SELECT line FROM ledger WHERE sequence = ?", (number,)).fetchone()
        connection.execute(statement, {"changed": _as_json(line, reason="free")} if ":changed" in statement else {})
    connection.close()
    again = Database(path, METADATA, schema_version=1)
    await again.open()
    try:
        for reading in (STORE.entries, STORE.verify):
            with pytest.raises(LedgerError, match=named):
                await again.run(reading)
    finally:
        await again.close()


async def test_a_ledger_cut_at_its_end_is_noticed_by_a_head_that_was_signed(database: Database, path: Path) -> None:
    head = await database.run(STORE.head)
    assert await database.run(lambda c: STORE.verify(c, known_heads=[head])) == head
    await database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER ledger_no_delete")
        connection.execute("DELETE FROM ledger WHERE sequence = 3")
    connection.close()
    again = Database(path, METADATA, schema_version=1)
    await again.open()
    try:
        await again.run(STORE.verify)
        with pytest.raises(LedgerError, match="cut or rewritten"):
            await again.run(lambda c: STORE.verify(c, known_heads=[head]))
    finally:
        await again.close()
