"""The federation's party-level budget: reserved when a round is planned, spent before the first share is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from ..config_sections import AggregatorPrivacy
from ..jobs.states import utc
from ..privacy.budget import Budget, check_affordable
from ..privacy.events import Event
from ..privacy.ledger import LONGEST_TEXT, charges, finalise, give_back, reserve
from ..storage.ledger import LedgerStore


class Accounts:
    """The ledger of one federation. Every method works inside the caller's transaction."""

    def __init__(self, store: LedgerStore, privacy: AggregatorPrivacy, *, federation: str) -> None:
        self._store = store
        self.subject = f"federation:{federation}"
        limit = privacy.budget
        self.budget = Budget(
            unit="party",
            subject=self.subject,
            max_rounds=limit.max_rounds,
            epsilon=limit.epsilon,
            delta=limit.delta,
        )

    def check(self, connection: Connection, planned: Sequence[tuple[int, Event]]) -> None:
        """Raises BudgetError unless `planned` (rounds, what one costs) fits beside what is spent."""
        check_affordable(self._store.entries(connection), self.budget, planned)

    def reserve(self, connection: Connection, job_id: str, number: int, *, event: Event, now: float) -> None:
        """Charge a round that is being planned; BudgetError when the budget does not allow it."""
        entries = self._store.entries(connection)
        key = self._key(job_id, number)
        if key not in charges(entries):
            check_affordable(entries, self.budget, [(1, event)])
        entry = reserve(
            entries,
            at=utc(now),
            job_id=job_id,
            round=number,
            unit="party",
            subject=self.subject,
            reservation_id=key,
            event=event,
        )
        self._store.add(connection, entry)

    def spend(self, connection: Connection, job_id: str, number: int, *, now: float) -> None:
        """From here on the round's charge is irrevocable."""
        entries = self._store.entries(connection)
        key = self._key(job_id, number)
        self._store.add(connection, finalise(entries, key, at=utc(now), reason="opening begins"))

    def return_(self, connection: Connection, job_id: str, number: int, *, now: float, reason: str) -> None:
        """Give back what a round reserved, of which nothing was opened."""
        entries = self._store.entries(connection)
        key = self._key(job_id, number)
        self._store.add(connection, give_back(entries, key, at=utc(now), reason=reason[:LONGEST_TEXT]))

    def head(self, connection: Connection) -> str:
        """Digest of the ledger's last entry."""
        return self._store.head(connection)

    def verify(self, connection: Connection) -> None:
        """Raises LedgerError, which names the first bad entry, when the chain is broken."""
        self._store.verify(connection)

    def _key(self, job_id: str, number: int) -> str:
        return f"{job_id}/{number}/party/{self.subject}"
