"""A role's accounts on either engine: whatever dies whenever, never less is on the books than was shown, and no two
ever spend the last of a budget."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import URL, Connection, MetaData, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from src.errors import BudgetError, ConflictError, LedgerError, NotFoundError
from src.privacy.budget import Account, Limits
from src.privacy.events import NoisySum
from src.privacy.ledger import Entry, Limit, charges
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.books import REFUSALS_A_DAY, Books, Cost
from src.storage.database import Database, read_only
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations
from src.storage.schema import Schema
from tests.protocol.signatures import check_signatures

OpenDatabase = Callable[[Schema], Awaitable[Database]]

ROOT = Path(__file__).parents[2]
AT = "2026-01-01T00:00:00Z"
KEY = SigningKey.from_bytes(b"books".ljust(32, b"-"))
OTHER = SigningKey.from_bytes(b"other".ljust(32, b"-"))
FEDERATION: Account = ("party", "federation:demo")
COST = Cost(account=FEDERATION, event=NoisySum(noise_multiplier=4.0))


def books(max_rounds: int = 10, *, key: SigningKey = KEY) -> Books:
    limit = Limit(max_rounds=max_rounds, epsilon=None, delta=1e-5)
    return Books(LedgerStore(MetaData(), signer=EntrySigner(key)), Limits({FEDERATION: limit}))


def reserve(connection: Connection, number: int, *, on: Books | None = None, job_id: str = "j") -> None:
    (on or books()).reserve(connection, job_id, number, [COST], at=AT)


def kinds(entries: list[Entry]) -> list[str]:
    return [entry.kind for entry in entries]


async def test_the_way_of_a_round_is_signed_entry_by_entry(open_database: OpenDatabase) -> None:
    database, own = await open_database(Migrations("party")), books()
    assert await database.run(lambda c: own.open(c, at=AT)) == []
    await database.run(lambda c: own.reserve(c, "j", 1, [COST], at=AT))
    with pytest.raises(LedgerError, match="is not final"):
        await database.run(lambda c: own.release(c, "j", 1, figures={}, at=AT))
    await database.run(lambda c: own.spend(c, "j", 1, at=AT, reason="sent"))
    for _ in range(2):
        await database.run(lambda c: own.release(c, "j", 1, figures={"root": "ab"}, at=AT))
    entries = await database.run(own.store.entries)
    assert kinds(entries) == ["correction", "reservation", "final", "release"]
    assert check_signatures(entries, verify_keys=[KEY.verify_key]) == 4
    assert await database.run(lambda c: own.open(c, at=AT)) == []
    assert await database.run(own.store.entries) == entries
    for call in (own.spend, own.release):
        fields: dict[str, Any] = {"reason": "x"} if call == own.spend else {"figures": {}}
        with pytest.raises(NotFoundError, match="never charged"):
            await database.run(lambda c, call=call, fields=fields: call(c, "j", 2, at=AT, **fields))  # type: ignore[misc]


async def test_a_ledger_that_another_signed_is_not_opened(open_database: OpenDatabase) -> None:
    database = await open_database(Migrations("party"))
    await database.run(lambda c: books(key=OTHER).open(c, at=AT))
    with pytest.raises(LedgerError, match="entry 1: it is signed by another key"):
        await database.run(lambda c: books().open(c, at=AT))


async def test_a_refusal_is_entered_once_and_only_so_many_a_day(open_database: OpenDatabase) -> None:
    database, own = await open_database(Migrations("party")), books(0)
    with pytest.raises(BudgetError) as caught:
        await database.run(lambda c: own.reserve(c, "j", 1, [COST], at=AT))
    assert await database.run(own.store.entries) == []

    def refuse(connection: Connection, number: int, at: str) -> None:
        own.refuse(connection, "j", number, [COST], error=caught.value, at=at)

    for number in (1, 1, *range(2, REFUSALS_A_DAY + 5)):
        await database.run(lambda c, number=number: refuse(c, number, AT))  # type: ignore[misc]
    entries = await database.run(own.store.entries)
    assert kinds(entries) == ["refusal"] * REFUSALS_A_DAY
    assert (entries[0].reason, entries[0].event) == (caught.value.message, COST.event)
    await database.run(lambda c: refuse(c, 999, "2026-01-02T00:00:00Z"))
    assert len(await database.run(own.store.entries)) == REFUSALS_A_DAY + 1


@pytest.mark.parametrize("given_back", [True, False])
async def test_a_round_is_not_charged_again_once_it_was_given_back_nor_at_another_price(
    open_database: OpenDatabase, given_back: bool
) -> None:
    database, own = await open_database(Migrations("party")), books()
    await database.run(lambda c: reserve(c, 1, on=own))
    if given_back:
        await database.run(lambda c: own.give_back(c, "j", 1, at=AT, reason="failed"))
    before = await database.run(own.store.entries)
    dear = Cost(account=FEDERATION, event=NoisySum(noise_multiplier=1.0))
    with pytest.raises(ConflictError, match="was given back" if given_back else "with another content"):
        await database.run(lambda c: own.reserve(c, "j", 1, [COST if given_back else dear], at=AT))
    assert await database.run(own.store.entries) == before


async def test_only_the_same_request_of_the_same_day_is_entered_once(open_database: OpenDatabase) -> None:
    """At submission there is no job yet: each is told from the others by who asked for what."""
    database, own = await open_database(Migrations("party")), books(0)
    error = BudgetError("no", unit="party")
    for request, at in (("ada's", AT), ("ada's", AT), ("bob's", AT), ("ada's", "2026-01-02T00:00:00Z")):
        await database.run(
            lambda c, request=request, at=at: own.refuse(c, "", None, [COST], error=error, at=at, request=request)  # type: ignore[misc]
        )
    entries = await database.run(own.store.entries)
    assert [(entry.job_id, entry.at[:10]) for entry in entries] == [("", AT[:10])] * 2 + [("", "2026-01-02")]
    assert len({entry.reservation_id for entry in entries}) == 2


# --- the last of a budget ---------------------------------------------------------------------------------------------

RACER = """
import asyncio, sys, time
from sqlalchemy import MetaData
from src.errors import BudgetError, ConflictError
from src.privacy.budget import Limits
from src.privacy.events import NoisySum
from src.privacy.ledger import Limit
from src.storage.books import Books, Cost
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations

account = ("party", "federation:demo")
books = Books(LedgerStore(MetaData()), Limits({account: Limit(max_rounds=1, epsilon=None, delta=1e-5)}))
cost = Cost(account=account, event=NoisySum(noise_multiplier=4.0))

async def main():
    url, job = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()  # both begin at once
    until, turned_away = time.monotonic() + 60, 0
    while True:
        database = Database(url, Migrations("party"))
        try:
            await database.open()
            break
        except ConflictError:  # the other one holds the lock
            turned_away += 1
            assert time.monotonic() < until
    try:
        await database.run(lambda c: books.reserve(c, job, 1, [cost], at="2026-01-01T00:00:00Z"))
        print("won", flush=True)
    except BudgetError:
        print("refused", flush=True)
    await database.close()

asyncio.run(main())
"""


def test_of_two_processes_that_race_for_the_last_round_one_wins(database_url: URL) -> None:
    url = database_url.render_as_string(hide_password=False)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, f"job{number}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = sorted(racer.communicate(timeout=120)[0].strip() for racer in racers)
    assert [racer.returncode for racer in racers] == [0, 0]
    assert results == ["refused", "won"]
    with read_only(database_url) as connection:
        assert kinds(LedgerStore(MetaData()).entries(connection)) == ["reservation"]


async def test_of_two_sessions_that_get_past_the_lock_one_wins(open_database: OpenDatabase, database_url: URL) -> None:
    """What is behind the lock of the role: both read that a round is left, and only one can write the next entry."""
    await (await open_database(Migrations("party"))).close()
    together = threading.Barrier(2, timeout=60)
    ends: dict[str, str] = {}

    def race(name: str) -> None:
        sqlite = database_url.get_backend_name() == "sqlite"
        options: dict[str, Any] = {} if sqlite else {"isolation_level": "SERIALIZABLE"}
        engine = sqlalchemy.create_engine(database_url, poolclass=NullPool, **options)
        try:
            with engine.connect() as connection:
                if sqlite:
                    connection.exec_driver_sql("PRAGMA busy_timeout=30000")
                    connection.rollback()
                together.wait()
                with connection.begin():
                    reserve(connection, 1, on=books(1), job_id=name)
                ends[name] = "won"
        except (BudgetError, LedgerError, DBAPIError) as error:  # whichever of them sees first that it lost
            ends[name] = type(error).__name__
        finally:
            engine.dispose()

    threads = [threading.Thread(target=race, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert sorted(ends) == ["one", "two"]
    assert list(ends.values()).count("won") == 1
    database = await open_database(Migrations("party"))
    assert kinds(await database.run(LedgerStore(MetaData()).entries)) == ["reservation"]


async def test_while_a_role_runs_nobody_else_spends(open_database: OpenDatabase, database_url: URL) -> None:
    await open_database(Migrations("party"))
    with pytest.raises(ConflictError):
        await Database(database_url, Migrations("party")).open()


# --- a crash between any two writes -----------------------------------------------------------------------------------


class Died(Exception):
    """The process is gone: what was not committed is lost, and nobody hears of what was."""


@contextmanager
def dying(connection: Connection, after: int) -> Iterator[Callable[[], int]]:
    """The process dies before its statement number `after` + 1 in this transaction."""
    count = 0

    def look(*_: object) -> None:
        nonlocal count
        if count == after:
            raise Died
        count += 1

    event.listen(connection, "before_cursor_execute", look)
    try:
        yield lambda: count
    finally:
        event.remove(connection, "before_cursor_execute", look)


SCRIPT: list[tuple[str, int]] = [("reserve", 1), ("reserve", 2), ("spend", 1), ("give_back", 2), ("release", 1)]


def act(own: Books, connection: Connection, operation: str, number: int) -> None:
    if operation == "reserve":
        example = Cost(account=("party", "party:a"), event=COST.event)
        own.reserve(connection, "j", number, [COST, example], at=AT)
    elif operation == "spend":
        own.spend(connection, "j", number, at=AT, reason="sent")
    elif operation == "give_back":
        own.give_back(connection, "j", number, at=AT, reason="failed")
    else:
        own.release(connection, "j", number, figures={"root": "ab"}, at=AT)


async def test_wherever_the_process_dies_a_round_is_charged_whole_or_not_at_all_and_what_was_shown_is_spent(
    open_database: OpenDatabase,
) -> None:
    """A fixed script, which dies at every statement of every step once; each step is then asked for again."""
    database = await open_database(Migrations("party"))
    shown: set[int] = set()
    deaths = 0
    for operation, number in SCRIPT:
        after, done = 0, False
        while not done:

            def work(connection: Connection, after: int = after, step: tuple[str, int] = (operation, number)) -> None:
                with dying(connection, after):
                    act(books(), connection, *step)

            try:
                await database.run(work)
                done = True
            except Died:
                deaths += 1
                after += 1
                await database.close()
                await database.open()
            entries = await database.run(books().store.entries)
            await database.run(books().store.verify)
            counted: dict[int | None, set[str]] = {}
            for charge in charges(entries).values():
                if charge.counts:
                    counted.setdefault(charge.entry.round, set()).add(charge.entry.subject)
            assert all(len(subjects) == 2 for subjects in counted.values())
            assert shown <= set(counted)
        shown |= {number} if operation == "spend" else set()
    assert shown == {1}
    assert deaths > 20
    assert len(kinds(entries)) == 2 * len(SCRIPT)


DIES = """
import os, sys
from pathlib import Path
from sqlalchemy import MetaData, event
from src.privacy.budget import Limits
from src.privacy.events import NoisySum
from src.storage.books import Books, Cost
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations
from src.storage.sqlite import SqliteAdapter

adapter = SqliteAdapter(Path(sys.argv[1]))
adapter.open(Migrations("party"))
books = Books(LedgerStore(MetaData()), Limits({}))
costs = [Cost(account=("party", f"party:{name}"), event=NoisySum(noise_multiplier=4.0)) for name in "ab"]
with adapter.transaction() as connection:
    books.reserve(connection, "j", 1, costs, at="2026-01-01T00:00:00Z")
with adapter.transaction() as connection:
    books.spend(connection, "j", 1, at="2026-01-01T00:00:00Z", reason="sent")
    if sys.argv[2] == "before":
        os._exit(9)
os._exit(9)
"""


@pytest.mark.parametrize(("when", "expected"), [("before", 2), ("after", 4)])
def test_a_process_that_is_killed_before_or_after_its_commit(tmp_path: Path, when: str, expected: int) -> None:
    path = tmp_path / "party.sqlite"
    done = subprocess.run([sys.executable, "-c", DIES, str(path), when], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 9
    with read_only(path) as connection:
        entries = LedgerStore(MetaData()).entries(connection)
    assert len(entries) == expected
    assert sum(charge.counts for charge in charges(entries).values()) == 2
