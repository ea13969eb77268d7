"""A party's own two budgets: for each row of a dataset, and for the party as a whole."""

from __future__ import annotations

import math

from sqlalchemy import Connection

from ..config import PartyConfig
from ..config_sections import Budget as BudgetSection
from ..jobs.states import utc
from ..privacy.budget import Budget, balance, check_affordable
from ..privacy.events import Event, Unit
from ..privacy.ledger import LONGEST_TEXT, charges, finalise, give_back, reserve
from ..protocol.derive import example_event, party_event
from ..storage.ledger import LedgerStore
from .rules import CheckedPlan


class PartyAccounts:
    """The party's ledger. Every method works inside the caller's transaction."""

    def __init__(self, store: LedgerStore, config: PartyConfig) -> None:
        self._store = store
        self._config = config

    def reserve(self, connection: Connection, checked: CheckedPlan, *, now: float) -> None:
        """Charge a round to both budgets, once the rounds that the job is still priced for are affordable.

        Raises:
            BudgetError: one of the budgets does not allow the whole plan; nothing is charged.
        """
        plan = checked.plan
        known = charges(self._store.entries(connection))
        for budget, event in self._costs(checked):
            key = _key(plan.job_id, plan.round, budget)
            if key in known:
                continue
            self._check_plan(connection, checked, budget, event)
            entry = reserve(
                self._store.entries(connection),
                at=utc(now),
                job_id=plan.job_id,
                round=plan.round,
                unit=budget.unit,
                subject=budget.subject,
                reservation_id=key,
                event=event,
            )
            self._store.add(connection, entry)

    def _check_plan(self, connection: Connection, checked: CheckedPlan, budget: Budget, event: Event) -> None:
        entries = self._store.entries(connection)
        mine = [charge for charge in charges(entries).values() if charge.entry.job_id == checked.plan.job_id]
        same = [charge for charge in mine if (charge.entry.unit, charge.entry.subject) == (budget.unit, budget.subject)]
        left = max(1, checked.plan.priced_rounds - len(same))
        check_affordable(entries, budget, [(left, event)])

    def spend(self, connection: Connection, job_id: str, number: int, *, now: float) -> None:
        """A byte may leave: both charges are irrevocable."""
        for key in self._keys(connection, job_id, number):
            entry = finalise(self._store.entries(connection), key, at=utc(now), reason="the upload begins")
            self._store.add(connection, entry)

    def return_(self, connection: Connection, job_id: str, number: int, *, now: float, reason: str) -> None:
        """Give back what a round reserved of which no byte left."""
        for key in self._keys(connection, job_id, number):
            entries = self._store.entries(connection)
            self._store.add(connection, give_back(entries, key, at=utc(now), reason=reason[:LONGEST_TEXT]))

    def example_balance(self, connection: Connection, task: str) -> tuple[float, float | None]:
        """ε spent and left of a dataset's rows; left is None without a limit in ε, spent may be infinite."""
        found = balance(self._store.entries(connection), self._example_budget(task))
        return found.epsilon_spent, found.epsilon_left

    def verify(self, connection: Connection) -> None:
        """Raises LedgerError, which names the first bad entry, when the chain is broken."""
        self._store.verify(connection)

    def _costs(self, checked: CheckedPlan) -> list[tuple[Budget, Event]]:
        plan, section = checked.plan, self._config.privacy.budgets.party
        party = _budget(section, unit="party", subject=f"federation:{plan.federation}")
        return [
            (self._example_budget(plan.task), example_event(plan)),
            (party, party_event(plan, checked.noise)),
        ]

    def _example_budget(self, task: str) -> Budget:
        return _budget(self._config.privacy.budgets.example, unit="example", subject=f"dataset:{task}")

    def _keys(self, connection: Connection, job_id: str, number: int) -> list[str]:
        books = charges(self._store.entries(connection))
        return [key for key, charge in books.items() if (charge.entry.job_id, charge.entry.round) == (job_id, number)]


def _key(job_id: str, number: int, budget: Budget) -> str:
    return f"{job_id}/{number}/{budget.unit}/{budget.subject}"


def _budget(section: BudgetSection, *, unit: Unit, subject: str) -> Budget:
    return Budget(
        unit=unit,
        subject=subject,
        max_rounds=section.max_rounds,
        epsilon=section.epsilon,
        delta=section.delta,
    )


def finite(value: float | None) -> float | None:
    """What the wire carries of an ε: nothing where it is infinite or unlimited."""
    return value if value is not None and math.isfinite(value) else None
