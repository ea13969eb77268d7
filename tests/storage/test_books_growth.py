"""A ledger grows only by what is paid for, and so many rows a day; and what a charge takes does not grow with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.pool import StaticPool

from src.errors import BudgetError, LedgerError
from src.privacy.budget import Account, Limits, balance
from src.privacy.events import DpSgdSteps, NoisySum
from src.privacy.ledger import Entry, Limit, charges
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage import books as rules
from src.storage.books import Books, Cost
from src.storage.ledger import LedgerStore

KEY = SigningKey.from_bytes(b"growth".ljust(32, b"-"))
ROWS: Account = ("example", "dataset:t")
PARTY: Account = ("party", "federation:f")
COSTS = [
    Cost(account=ROWS, event=DpSgdSteps(sampling_rate=0.05, noise_multiplier=1.1, steps=10)),
    Cost(account=PARTY, event=NoisySum(noise_multiplier=0.1)),
]


class Ledger:
    """Books in a database in memory."""

    def __init__(self, engine: Engine, *, max_rounds: int = 10_000) -> None:
        metadata = MetaData()
        self.engine = engine
        self.store = LedgerStore(metadata, signer=EntrySigner(KEY))
        limits = {account: Limit(max_rounds=max_rounds, epsilon=None, delta=1e-5) for account in (ROWS, PARTY)}
        limits[ROWS] = Limit(max_rounds=None, epsilon=1e6, delta=1e-5)
        self.books = Books(self.store, Limits(limits))
        metadata.create_all(engine)

    def do(self, work: Callable[[Connection], Any]) -> Any:
        with self.engine.begin() as connection:
            return work(connection)

    def cycle(self, number: int, *, day: int = 0, job_id: str = "j") -> None:
        at = f"{2000 + day // 300}-{day // 25 % 12 + 1:02d}-{day % 25 + 1:02d}T00:00:00Z"
        self.do(lambda c: self.books.reserve(c, job_id, number, COSTS, at=at))
        self.do(lambda c: self.books.give_back(c, job_id, number, at=at, reason="ended"))

    def entries(self) -> list[Entry]:
        found: list[Entry] = self.do(self.store.entries)
        return found

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.entries()]


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    yield Ledger(engine)
    engine.dispose()


def calls(work: Callable[[], object]) -> int:
    """How many functions are called, in Python or C: the same in every run, on every machine."""
    count = 0

    def look(_frame: object, what: str, _arg: object) -> None:
        nonlocal count
        count += what in ("call", "c_call")

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("paid", [False, True], ids=["given back", "paid for"])
def test_what_a_charge_takes_does_not_grow_with_the_ledger(ledger: Ledger, paid: bool) -> None:
    """Neither to reserve nor to settle, whatever became of those before; all are of one job."""
    taken: dict[int, int] = {}
    for number in range(251):
        at = f"{2000 + number // 300}-{number // 25 % 12 + 1:02d}-{number % 25 + 1:02d}T00:00:00Z"

        def charge(number: int = number, at: str = at) -> None:
            ledger.do(lambda c: ledger.books.reserve(c, "j", number, COSTS, at=at))
            if paid:
                ledger.do(lambda c: ledger.books.spend(c, "j", number, at=at, reason="told"))
                ledger.do(lambda c: ledger.books.release(c, "j", number, figures={"root": "ab"}, at=at))
            else:
                ledger.do(lambda c: ledger.books.give_back(c, "j", number, at=at, reason="ended"))

        if number in (10, 250):
            taken[number] = calls(charge)
        else:
            charge()
    assert taken[250] <= 1.05 * taken[10]


def test_of_one_job_only_so_many_rounds_are_given_back_in_a_day_and_the_others_are_spent(ledger: Ledger) -> None:
    most = rules.RETURNS_OF_A_JOB_A_DAY
    for number in range(most + 3):
        ledger.cycle(number)
    settled = [each.settled.kind for each in charges(ledger.entries()).values() if each.settled]
    assert settled == ["returned"] * 2 * most + ["final"] * 2 * 3
    ledger.cycle(99, day=1)
    ledger.cycle(99, job_id="another")
    assert ledger.kinds().count("returned") == 2 * (most + 2)


def test_of_all_jobs_only_so_many_rounds_are_given_back_in_a_day(ledger: Ledger) -> None:
    """Whoever invents a job for each gets no more."""
    for number in range(rules.RETURNS_A_DAY + 5):
        ledger.cycle(1, job_id=f"j{number}")
    assert ledger.kinds().count("returned") == 2 * rules.RETURNS_A_DAY
    assert ledger.kinds().count("final") == 2 * 5


def test_a_round_that_is_not_given_back_counts_and_a_reset_ends_it(ledger: Ledger) -> None:
    """Nothing of it was shown, and nothing can be: it is not one of those that count for ever."""
    most = rules.RETURNS_OF_A_JOB_A_DAY
    for number in range(most + 2):
        ledger.cycle(number)
    (budget,) = ledger.books.limits.budgets([], PARTY)
    assert balance(ledger.entries(), budget).rounds_spent == 2
    ledger.do(
        lambda c: ledger.books.correct(
            c, PARTY, action="reset", limit=None, at="2000-01-01T00:00:00Z", reason="a new study"
        )
    )
    assert balance(ledger.entries(), budget).rounds_spent == 0
    assert balance(ledger.entries(), budget, ever=True).rounds_spent == 2


def test_what_was_given_back_can_be_asked_for_again_whatever_the_day_has_seen(ledger: Ledger) -> None:
    for number in range(rules.RETURNS_OF_A_JOB_A_DAY + 1):
        ledger.cycle(number)
    before = ledger.entries()
    ledger.do(lambda c: ledger.books.give_back(c, "j", 0, at="2000-01-01T00:00:00Z", reason="again"))
    assert ledger.entries() == before
    last = rules.RETURNS_OF_A_JOB_A_DAY
    with pytest.raises(LedgerError, match="is final and cannot become returned"):
        ledger.do(lambda c: ledger.books.give_back(c, "j", last, at="2000-01-01T00:00:00Z", reason="again"))


def test_whatever_is_asked_for_in_a_day_what_costs_nothing_is_so_many_rows(ledger: Ledger) -> None:
    """Charges that are given back, and refusals, of as many jobs and rounds as somebody likes."""
    error = BudgetError("no", unit="party")
    for number in range(3 * rules.RETURNS_A_DAY):
        ledger.cycle(number, job_id=f"j{number % 40}")
        ledger.do(
            lambda c, number=number: ledger.books.refuse(  # type: ignore[misc]
                c, f"r{number}", number, COSTS, error=error, at="2000-01-01T00:00:00Z"
            )
        )
    counted = {each.entry.reservation_id for each in charges(ledger.entries()).values() if each.counts}
    free = [entry for entry in ledger.entries() if entry.reservation_id not in counted]
    assert len(free) <= 4 * rules.RETURNS_A_DAY + rules.REFUSALS_A_DAY
