"""The federation's party-level budget, and those of its parties and jobs inside it: reserved when a round is planned,
spent before the first share is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, MetaData

from ..config_budgets import aggregator_limits
from ..config_sections import AggregatorPrivacy
from ..errors import BudgetError
from ..jobs.states import utc
from ..privacy.budget import ANY, Account, check_affordable, subject_of
from ..privacy.events import Event
from ..privacy.in_force import in_force, without_effect
from ..privacy.standing import Standing
from ..storage.books import Books, Cost
from ..storage.heads import Head, HeadStore, check_heads
from ..storage.ledger import LedgerStore


class Planned(NamedTuple):
    """Rounds of a job that may still be charged, what one costs, and whom they invite."""

    rounds: int
    event: Event
    parties: tuple[str, ...] = ()


class Accounts:
    """The ledger of one federation. Every method works inside the caller's transaction."""

    def __init__(self, store: LedgerStore, privacy: AggregatorPrivacy, *, federation: str) -> None:
        self._store = store
        self._heads = HeadStore(MetaData())
        self.subject = subject_of("federation", federation)
        self._account: Account = ("party", self.subject)
        self._books = Books(store, aggregator_limits(privacy, federation=federation))

    def open(self, connection: Connection, *, now: float) -> list[str]:
        """Before the first round: verify, and enter the limits that the ledger has seen none for; returns warnings.

        Raises:
            LedgerError: the chain is broken, or an entry is not signed by this aggregator; names the first bad entry.
        """
        return self._books.open(connection, at=utc(now))

    def in_force(self, connection: Connection) -> tuple[list[str], list[str]]:
        """(which limits are in force for the federation, each party and job that has one, warnings), in words."""
        entries, limits = self._store.standing(connection), self._books.limits
        lines = [in_force(limits, entries, account) for account in dict.fromkeys((self._account, *limits.rows))]
        return lines, without_effect(limits)

    def check(self, connection: Connection, planned: Sequence[Planned]) -> None:
        """Raises BudgetError unless `planned` fits beside what is spent.

        Args:
            planned: of the jobs accepted before, and last of the one that is asked for: its quota is for it alone, and
                the budgets of parties that it does not invite are not its concern.
        """
        entries, asked = self._store.standing(connection), planned[-1]
        self._check(entries, self._account, planned)
        for name in asked.parties:
            inviting = [each for each in planned if name in each.parties]
            self._check(entries, ("party", subject_of("party", name)), inviting)
        self._check(entries, ("party", subject_of("job", ANY)), [asked])

    def _check(self, entries: Standing, account: Account, planned: Sequence[Planned]) -> None:
        for budget in self._books.limits.budgets(entries, account):
            check_affordable(entries, budget, [(each.rounds, each.event) for each in planned])

    def reserve(
        self,
        connection: Connection,
        job_id: str,
        number: int,
        *,
        event: Event,
        parties: tuple[str, ...] = (),
        now: float,
    ) -> None:
        """Charge a round that is being planned.

        Args:
            parties: that it invites.

        Raises:
            BudgetError: the budget, a party's, or the job's quota does not allow it; nothing is charged. The
                transaction is undone: `refuse` enters it in another one.
        """
        self._books.reserve(connection, job_id, number, [self._cost(event, parties)], at=utc(now))

    def refuse(
        self,
        connection: Connection,
        job_id: str,
        number: int | None,
        *,
        event: Event,
        error: BudgetError,
        now: float,
        parties: tuple[str, ...] = (),
        request: str = "",
    ) -> None:
        """Enter that a round was refused, or (job_id "", number None) a job that was asked for.

        Args:
            request: of a job that was asked for: who asked for what.
        """
        costs = [self._cost(event, parties)]
        self._books.refuse(connection, job_id, number, costs, error=error, at=utc(now), request=request)

    def spend(self, connection: Connection, job_id: str, number: int, *, now: float) -> None:
        """From here on the round's charge is irrevocable."""
        self._books.spend(connection, job_id, number, at=utc(now), reason="opening begins")

    def return_(self, connection: Connection, job_id: str, number: int, *, now: float, reason: str) -> None:
        """Give back what a round reserved, of which nothing was opened; of too many a day it is spent."""
        self._books.give_back(connection, job_id, number, at=utc(now), reason=reason)

    def release(
        self, connection: Connection, job_id: str, number: int, *, figures: Mapping[str, str], now: float
    ) -> None:
        """Enter what was shown: the transcript's digest, say. Raises LedgerError unless the round is final."""
        self._books.release(connection, job_id, number, figures=figures, at=utc(now))

    def head(self, connection: Connection) -> str:
        """Digest of the ledger's last entry."""
        return self._store.head(connection)

    def check_heads(self, connection: Connection, heads: Sequence[Head], *, party: str) -> None:
        """Raises LedgerError unless this ledger once had the heads that a party remembers of it."""
        check_heads(
            self._store.standing(connection),
            heads,
            whose="this aggregator's",
            told_by=f"party {party}",
            account=self._account,
        )

    def remember(self, connection: Connection, party: str, head: Head) -> None:
        """Keep what a party says of its own ledger."""
        self._heads.remember(connection, party, head)

    def heads_of(self, connection: Connection, party: str) -> tuple[Head, ...]:
        """Of a party's ledger, as its jobs told them, the last one last; none before the first time."""
        return self._heads.told(connection, party)

    def verify(self, connection: Connection) -> None:
        """Raises LedgerError, which names the first bad entry, when the chain is broken."""
        self._store.standing(connection)

    def _cost(self, event: Event, parties: tuple[str, ...]) -> Cost:
        return Cost(account=self._account, event=event, parties=parties)
