"""Accounts in a real SQLite file under random operations, the process dying anywhere: never less than was shown."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import Connection, MetaData, event

from src.errors import BudgetError, ConflictError, LedgerError, NotFoundError
from src.privacy.budget import Account, Limits, balance
from src.privacy.events import NoisySum
from src.privacy.ledger import Charge, Entry, Limit, charges
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.books import Books, Cost
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations
from src.storage.sqlite import SqliteAdapter

AT = "2026-01-01T00:00:00Z"
KEY = SigningKey.from_bytes(b"machine".ljust(32, b"-"))
LIMIT = 3
FEDERATION: Account = ("party", "federation:demo")
OWN: Account = ("party", "federation:other")
COSTS = [Cost(account=account, event=NoisySum(noise_multiplier=4.0), user="ada") for account in (FEDERATION, OWN)]
ROUNDS = st.integers(1, 5)
DEATHS = st.one_of(st.none(), st.integers(0, 12))
"""Before which statement of a transaction the process dies; None: it lives. Beyond the last: after the COMMIT."""


class Died(Exception):
    """The process is gone."""


class Accounts(RuleBasedStateMachine):
    """What the world saw, beside what the ledger says."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="sotto-books-"))
        self.shown: set[int] = set()
        self.head = ""
        self._start()

    def _start(self) -> None:
        rounds = Limit(max_rounds=LIMIT, epsilon=None, delta=1e-5)
        many = Limit(max_rounds=2 * LIMIT, epsilon=None, delta=1e-5)
        limits = Limits({FEDERATION: rounds, OWN: rounds, ("party", "user:*"): many})
        self.books = Books(LedgerStore(MetaData(), signer=EntrySigner(KEY)), limits)
        self.adapter = SqliteAdapter(self.directory / "party.sqlite")
        self.adapter.open(Migrations("party"))
        with self.adapter.transaction() as connection:
            self.books.open(connection, at=AT)

    def _do(self, operation: str, number: int, death: int | None) -> bool:
        """Whether the role heard that it was done. A role that died starts again."""
        try:
            with self.adapter.transaction() as connection:
                if death is not None:
                    _die(connection, death)
                self._act(connection, operation, number)
            if death is not None:
                raise Died
        except (BudgetError, ConflictError, LedgerError, NotFoundError):
            if death is not None:
                self._restart()
            return False
        except Died:
            self._restart()
            return False
        return True

    def _restart(self) -> None:
        self.adapter.close()
        self._start()

    def _act(self, connection: Connection, operation: str, number: int) -> None:
        if operation == "reserve":
            self.books.reserve(connection, "j", number, COSTS, at=AT)
        elif operation == "spend":
            self.books.spend(connection, "j", number, at=AT, reason="sent")
        elif operation == "give_back":
            self.books.give_back(connection, "j", number, at=AT, reason="failed")
        else:
            self.books.release(connection, "j", number, figures={"root": "ab"}, at=AT)

    @rule(number=ROUNDS, death=DEATHS)
    def reserve(self, number: int, death: int | None) -> None:
        """What was given back is not charged again: whoever heard that it is charged may count on it."""
        if self._do("reserve", number, death):
            assert number in {each.entry.round for each in self._charges() if each.counts}

    @rule(number=ROUNDS, death=DEATHS)
    def send(self, number: int, death: int | None) -> None:
        """A byte leaves only once it is known to be paid for."""
        if self._do("spend", number, death):
            self.shown.add(number)

    @rule(number=ROUNDS, death=DEATHS)
    def give_back(self, number: int, death: int | None) -> None:
        self._do("give_back", number, death)

    @rule(number=ROUNDS, death=DEATHS)
    def release(self, number: int, death: int | None) -> None:
        if self._do("release", number, death):
            assert number in self._final()

    @rule()
    def restart(self) -> None:
        self._restart()

    def _entries(self) -> list[Entry]:
        with self.adapter.transaction() as connection:
            self.books.store.verify(connection, known_heads=[self.head] if self.head else [])
            return self.books.store.entries(connection)

    def _charges(self) -> list[Charge]:
        return list(charges(self._entries()).values())

    def _final(self) -> set[int | None]:
        return {each.entry.round for each in self._charges() if each.settled and each.settled.kind == "final"}

    @invariant()
    def never_less_is_on_the_books_than_was_shown(self) -> None:
        entries = self._entries()
        self.head = entries[-1].digest
        counted = [each for each in charges(entries).values() if each.counts]
        for account in (FEDERATION, OWN):
            mine = [each.entry.round for each in counted if (each.entry.unit, each.entry.subject) == account]
            assert self.shown <= set(mine)
            assert len(mine) <= LIMIT
        assert self.shown <= self._final()
        (budget,) = self.books.limits.budgets(entries, FEDERATION)
        assert balance(entries, budget).rounds_spent >= len(self.shown)

    def teardown(self) -> None:
        self.adapter.close()
        shutil.rmtree(self.directory)


def _die(connection: Connection, death: int) -> None:
    count = 0

    def look(*_: object) -> None:
        nonlocal count
        count += 1
        if count > death:
            raise Died

    event.listen(connection, "before_cursor_execute", look)


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(deadline=None, max_examples=15, stateful_step_count=20)
