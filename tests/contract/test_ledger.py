"""The ledger's table: append-only, chained, and read only as a whole that verifies."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import URL, Connection, MetaData, text
from sqlalchemy.exc import IntegrityError

from src.errors import InvalidInput, LedgerError
from src.privacy import ledger
from src.privacy.events import DpSgdSteps, NoisySum
from src.privacy.ledger import GENESIS, Entry
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.checkpoints import digest_of
from src.storage.database import Database
from src.storage.ledger import TRIGGERS, LedgerStore
from src.storage.schema import FromMetadata, Schema

OpenDatabase = Callable[[Schema], Awaitable[Database]]

AT = "2025-06-01T12:00:00+00:00"
PARTY: dict[str, Any] = {"unit": "party", "subject": "federation:demo", "event": NoisySum(noise_multiplier=1.5)}
EXAMPLE: dict[str, Any] = {
    "unit": "example",
    "subject": "dataset:randhie",
    "event": DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=4),
}

METADATA = MetaData()
STORE = LedgerStore(METADATA)


SCHEMA = FromMetadata(METADATA)


@pytest.fixture
async def database(open_database: OpenDatabase) -> Database:
    """Three entries: two reservations of different units, and the end of the first."""
    database = await open_database(SCHEMA)
    await database.run(lambda connection: _reserve(connection, 1, **PARTY))
    await database.run(lambda connection: _reserve(connection, 2, **EXAMPLE))
    await database.run(_finalise_first)
    return database


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


async def test_an_empty_ledger_has_the_first_head(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)
    assert await database.run(STORE.head) == await database.run(STORE.verify) == GENESIS
    assert await database.run(STORE.entries) == []


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
    "INSERT INTO ledger (sequence, digest, line) VALUES (9, 'x', 'x')",
    "INSERT INTO ledger (sequence, digest, line) VALUES (4, 'x', 'x'), (6, 'y', 'y')",
    "INSERT INTO ledger (sequence, digest, line) VALUES (3, 'x', 'x') ON CONFLICT DO NOTHING",
    "INSERT INTO ledger (sequence, digest, line) VALUES (3, 'x', 'x') ON CONFLICT (sequence) DO UPDATE SET line = 'x'",
    "INSERT INTO ledger VALUES (4, <a digest>, 'x') ON CONFLICT (digest) DO UPDATE SET line = 'x'",
]
WRITES_OF_ITS_OWN = [
    ("sqlite", "INSERT OR REPLACE INTO ledger (sequence, digest, line) VALUES (3, 'x', 'x')"),
    ("postgresql", "TRUNCATE ledger"),
    ("postgresql", "TRUNCATE ledger CASCADE"),
]


async def _refused(database: Database, statement: str) -> None:
    before = await database.run(STORE.entries)
    statement = statement.replace("<a digest>", f"'{before[-1].digest}'")
    with pytest.raises(IntegrityError, match="append-only"):
        await database.run(lambda connection: connection.exec_driver_sql(statement) and None)
    assert await database.run(STORE.entries) == before


@pytest.mark.parametrize("statement", WRITES)
async def test_the_database_itself_refuses(database: Database, statement: str) -> None:
    await _refused(database, statement)


@pytest.mark.parametrize(("database_url", "statement"), WRITES_OF_ITS_OWN, indirect=["database_url"])
async def test_each_engine_refuses_its_own_ways(database: Database, statement: str) -> None:
    await _refused(database, statement)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_connection_that_is_not_ours_cannot_replace_an_entry_by_its_digest(
    database: Database, database_url: URL
) -> None:
    """INSERT OR REPLACE fires triggers on deletion only where a connection has asked for that."""
    before = await database.run(STORE.entries)
    await database.close()
    engine = sqlalchemy.create_engine(database_url)
    with engine.connect() as connection:
        with pytest.raises(IntegrityError, match="append-only"):
            connection.exec_driver_sql("INSERT OR REPLACE INTO ledger VALUES (4, ?, 'x')", (before[-1].digest,))
        connection.rollback()
        assert STORE.entries(connection) == before
    engine.dispose()


async def test_several_entries_in_one_statement_are_in_order_or_none_is_taken(open_database: OpenDatabase) -> None:
    database = await open_database(SCHEMA)

    def insert(numbers: tuple[int, ...], connection: Connection) -> int:
        rows = ", ".join(f"({number}, 'digest {number}', 'x')" for number in numbers)
        return connection.exec_driver_sql(f"INSERT INTO ledger (sequence, digest, line) VALUES {rows}").rowcount

    for wrong in ((0,), (2, 1), (1, 1), (1, 3)):
        with pytest.raises(IntegrityError):
            await database.run(lambda connection, wrong=wrong: insert(wrong, connection))  # type: ignore[misc]
    assert await database.run(lambda connection: insert((1, 2, 3), connection)) == 3


def _as_json(line: str, **changes: object) -> str:
    return json.dumps({**json.loads(line), **changes}, sort_keys=True, separators=(",", ":"))


TAMPERING = [
    ("a cheaper reason", 1, "UPDATE ledger SET line = :changed WHERE sequence = 1", "entry 1"),
    ("another digest in the row", 2, "UPDATE ledger SET digest = 'x' WHERE sequence = 2", "entry 2"),
    ("an entry gone", 2, "DELETE FROM ledger WHERE sequence = 2", "entry 2"),
    ("another order", 1, "UPDATE ledger SET sequence = -sequence", "entry 1"),
    ("no ledger line", 3, "UPDATE ledger SET line = '{}' WHERE sequence = 3", "line 3"),
]


def _tamper(url: URL, statement: str, **values: object) -> None:
    """Runs a statement as somebody does who owns the database and is not stopped by its triggers."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        if url.get_backend_name() == "postgresql":
            connection.exec_driver_sql("ALTER TABLE ledger DISABLE TRIGGER USER")
        else:
            for trigger in ("no_update", "no_delete", "in_order"):
                connection.exec_driver_sql(f"DROP TRIGGER ledger_{trigger}")
        connection.execute(text(statement), values)
    engine.dispose()


@pytest.mark.parametrize(
    ("number", "statement", "named"), [row[1:] for row in TAMPERING], ids=[r[0] for r in TAMPERING]
)
async def test_what_gets_past_the_triggers_is_named_by_every_reading(
    database: Database, open_database: OpenDatabase, database_url: URL, number: int, statement: str, named: str
) -> None:
    entry = (await database.run(STORE.entries))[number - 1]
    await database.close()
    changed = {"changed": _as_json(ledger.to_line(entry), reason="free")} if ":changed" in statement else {}
    _tamper(database_url, statement, **changed)
    again = await open_database(SCHEMA)
    for reading in (STORE.entries, STORE.verify):
        with pytest.raises(LedgerError, match=named):
            await again.run(reading)


async def test_a_ledger_cut_at_its_end_is_noticed_by_a_head_that_was_signed(
    database: Database, open_database: OpenDatabase, database_url: URL
) -> None:
    head = await database.run(STORE.head)
    assert await database.run(lambda c: STORE.verify(c, known_heads=[head])) == head
    await database.close()
    _tamper(database_url, "DELETE FROM ledger WHERE sequence = 3")
    again = await open_database(SCHEMA)
    await again.run(STORE.verify)
    with pytest.raises(LedgerError, match="cut or rewritten"):
        await again.run(lambda c: STORE.verify(c, known_heads=[head]))


# --- what was verified stays verified ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "statement", "named"), [row[1:] for row in TAMPERING], ids=[r[0] for r in TAMPERING]
)
async def test_what_is_changed_behind_a_running_roles_back_is_named_by_its_next_reading(
    database: Database, database_url: URL, number: int, statement: str, named: str
) -> None:
    """It has read all of it, and the last row stays. Yet it takes nothing from memory once others have written."""
    entry = (await database.run(STORE.entries))[number - 1]
    await database.run(lambda connection: _reserve(connection, 4, **PARTY))
    changed = {"changed": _as_json(ledger.to_line(entry), reason="free")} if ":changed" in statement else {}
    _tamper(database_url, statement, **changed)
    for reading in (STORE.standing, STORE.entries, lambda c: _reserve(c, 5, **PARTY)):
        with pytest.raises(LedgerError, match=named):
            await database.run(reading)


async def test_a_change_is_noticed_at_once_though_the_triggers_are_back_in_force(
    database: Database, database_url: URL
) -> None:
    """Whoever switches them off and on again leaves no row of the ledger that says so."""
    await database.run(STORE.standing)
    engine = sqlalchemy.create_engine(database_url)
    name = database_url.get_backend_name()
    with engine.begin() as connection:
        switch = {
            "postgresql": [f"ALTER TABLE ledger {each} TRIGGER USER" for each in ("DISABLE", "ENABLE")],
            "sqlite": ["DROP TRIGGER ledger_no_update", TRIGGERS["sqlite"][0]],
        }[name]
        connection.exec_driver_sql(switch[0])
        connection.execute(text("UPDATE ledger SET digest = 'x' WHERE sequence = 1"))
        connection.exec_driver_sql(switch[1])
    engine.dispose()
    with pytest.raises(LedgerError, match="entry 1"):
        await database.run(STORE.standing)


async def test_no_reading_of_a_ledger_that_nobody_else_wrote_asks_about_all_its_rows(database: Database) -> None:
    """Neither for the rows nor for who wrote them: the engine itself would read them all."""
    await database.run(STORE.standing)
    asked: list[str] = []

    def reading(connection: Connection) -> None:
        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            asked.append(statement)

        sqlalchemy.event.listen(connection, "before_cursor_execute", note)
        try:
            STORE.standing(connection)
        finally:
            sqlalchemy.event.remove(connection, "before_cursor_execute", note)

    await database.run(reading)
    of_the_table = [each for each in asked if "FROM ledger" in each.replace("\n", "")]
    assert len(of_the_table) == 1
    assert "sequence >= " in of_the_table[0]


async def test_what_another_process_adds_is_verified_and_goes_on(database: Database, database_url: URL) -> None:
    """As when a lock was overcome: what is right is taken, what is not is named."""
    last = (await database.run(STORE.entries))[-1]
    fields: dict[str, Any] = {"at": AT, "kind": "reservation", "job_id": "j", "round": 4, "charged_rounds": 1, **PARTY}
    right = ledger.append(last, reservation_id="r4", **fields)
    wrong = replace(right, sequence=5, previous=right.digest)  # its digest is another's
    for entry, digest in ((right, right.digest), (wrong, "x")):
        insert = "INSERT INTO ledger VALUES (:sequence, :digest, :line)"
        line = ledger.to_line(entry)
        engine = sqlalchemy.create_engine(database_url)
        with engine.begin() as connection:
            connection.execute(text(insert), {"sequence": entry.sequence, "digest": digest, "line": line})
        engine.dispose()
        if entry is right:
            assert (await database.run(STORE.standing)).head == right
    with pytest.raises(LedgerError, match="entry 5"):
        await database.run(STORE.standing)


async def test_a_transaction_that_is_undone_leaves_nothing_of_it_behind(database: Database) -> None:
    def charge_and_fail(connection: Connection) -> None:
        for number in (4, 5):
            _reserve(connection, number, **PARTY)
            assert f"r{number}" in STORE.standing(connection).charges
        raise KeyError("the round could not be stored")

    before = await database.run(STORE.entries)
    with pytest.raises(KeyError):
        await database.run(charge_and_fail)
    assert set((await database.run(STORE.standing)).charges) == {"r1", "r2"}
    assert await database.run(STORE.entries) == before
    await database.run(lambda connection: _reserve(connection, 6, **PARTY))
    assert set((await database.run(STORE.standing)).charges) == {"r1", "r2", "r6"}
    assert len(await database.run(STORE.entries)) == 4


async def test_a_reading_of_a_ledger_that_nobody_else_wrote_takes_what_is_new_alone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    rows = LedgerStore._rows

    def counting(*args: Any, **more: Any) -> Any:
        found = rows(*args, **more)
        read.append(len(found))
        return found

    await database.run(STORE.standing)
    monkeypatch.setattr(LedgerStore, "_rows", counting)
    for number in range(4, 10):
        await database.run(lambda connection, number=number: _reserve(connection, number, **PARTY))  # type: ignore[misc]
        await database.run(STORE.entries)
    assert max(read) <= 2  # the last that is known, and what came after it


# --- checkpoints ------------------------------------------------------------------------------------------------------

KEY = SigningKey.from_bytes(b"checkpoints".ljust(32, b"-"))


class Counting(EntrySigner):
    """Counts the entries whose signatures are verified."""

    def __init__(self, key: SigningKey = KEY) -> None:
        super().__init__(key)
        self.judged = 0

    def judge(self) -> Any:
        checks = super().judge()

        def count(entry: Entry) -> None:
            self.judged += 1
            checks(entry)

        return count


def _role(key: SigningKey = KEY) -> tuple[LedgerStore, Counting]:
    """As a process that has just begun has it."""
    signer = Counting(key)
    return LedgerStore(MetaData(), signer=signer), signer


def _fill(count: int) -> Callable[[Connection], None]:
    def fill(connection: Connection) -> None:
        store, _ = _role()
        for _ in range(count):
            number = len(store.entries(connection))
            fields: dict[str, Any] = {"at": AT, "kind": "reservation", "job_id": "j", "round": number, **PARTY}
            store.append(connection, reservation_id=f"r{number}", charged_rounds=1, **fields)

    return fill


@pytest.fixture
async def long(open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Seven signed entries; five are enough for a checkpoint."""
    monkeypatch.setattr("src.storage.ledger.EVERY", 5)
    database = await open_database(SCHEMA)
    await database.run(_fill(7))
    return database


async def test_a_start_verifies_what_came_since_the_last_one_and_a_verification_all_of_it(long: Database) -> None:
    judged = []
    for more in (0, 0, 3, 4, 0):
        await long.run(_fill(more))
        store, signer = _role()
        head = await long.run(store.start)
        judged.append(signer.judged)
        assert head == await long.run(store.head)
        entries = await long.run(store.entries)
        assert len((await long.run(store.standing)).charges) == len(entries) == entries[-1].sequence
    assert judged == [7, 0, 3, 7, 0]  # of fewer than five no new checkpoint is made
    assert await long.run(store.verify) == head
    assert signer.judged == 14


@pytest.mark.parametrize("number", [1, 4, 7])
@pytest.mark.parametrize("column", ["line", "digest", "sequence"])
async def test_a_checkpoint_hides_no_row_that_has_changed_since(
    long: Database, open_database: OpenDatabase, database_url: URL, number: int, column: str
) -> None:
    store, _ = _role()
    await long.run(store.start)
    await long.close()
    changes = {"line": "replace(line, '\"round\":', '\"round\": ')", "digest": "'x'", "sequence": "sequence + 100"}
    _tamper(database_url, f"UPDATE ledger SET {column} = {changes[column]} WHERE sequence = {number}")
    again, (fresh, _) = await open_database(SCHEMA), _role()
    with pytest.raises(LedgerError, match=f"(entry|line) {number}"):
        await again.run(fresh.start)


FORGED = {
    "signed by another key": lambda rows: EntrySigner(SigningKey.from_bytes(b"other".ljust(32, b"-"))).attest(7, rows),
    "of fewer rows": lambda rows: EntrySigner(KEY).attest(6, rows),
    "of other rows": lambda _rows: EntrySigner(KEY).attest(7, "0" * 64),
    "of no form": lambda _rows: "not hex",
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
async def test_a_checkpoint_that_this_roles_key_did_not_sign_for_these_rows_is_not_believed(
    long: Database, forge: Callable[[str], str]
) -> None:
    """Whoever can write to the database and has no key: everything is verified, and the bad entry named."""

    def put(connection: Connection) -> None:
        connection.exec_driver_sql("DELETE FROM ledger_checkpoint")
        table = METADATA.tables["ledger"]
        rows = [tuple(row) for row in connection.execute(table.select().order_by(table.c.sequence))]
        digest = digest_of(rows)
        values = {"entries": 7, "digest": digest, "signature": forge(digest)}
        connection.execute(METADATA.tables["ledger_checkpoint"].insert().values(**values))

    await long.run(put)
    store, signer = _role()
    await long.run(store.start)
    assert signer.judged == 7


async def test_entries_that_another_key_signed_stop_a_start_checkpoint_or_not(long: Database) -> None:
    await long.run(_role()[0].start)
    stranger, _ = _role(SigningKey.from_bytes(b"other".ljust(32, b"-")))
    with pytest.raises(LedgerError, match="entry 1: it is signed by another key"):
        await long.run(stranger.start)
