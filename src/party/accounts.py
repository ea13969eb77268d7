"""A party's own budgets: for each row of a dataset, for the party as a whole, and the quotas of users and jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, MetaData

from ..config import PartyConfig
from ..config_budgets import apart, party_limits
from ..errors import BudgetError
from ..jobs.states import utc
from ..privacy.budget import Account, epsilon_spent, subject_of
from ..privacy.guarantee import check_guarantee
from ..privacy.in_force import in_force, without_effect, without_epsilon
from ..privacy.moved import reason_of
from ..protocol.derive import example_event, party_event
from ..storage.books import Books, Cost
from ..storage.heads import Head, HeadStore, check_heads
from ..storage.ledger import LedgerStore
from .rules import CheckedPlan


class ExampleBalance(NamedTuple):
    """What a party may disclose of its example-level budget.

    Attributes:
        spent: ε at the δ that was asked for; may be infinite.
        left: ε at `left_delta`; None without a limit in ε, and with limits at two δ, which are not compared.
        left_delta: the limit's δ; None where `left` is.
    """

    spent: float
    left: float | None
    left_delta: float | None


class PartyAccounts:
    """The party's ledger. Every method works inside the caller's transaction."""

    def __init__(self, store: LedgerStore, config: PartyConfig) -> None:
        self._books = Books(store, party_limits(config))
        self._store = store
        self._heads = HeadStore(MetaData())
        self._config = config

    def open(self, connection: Connection, *, now: float) -> list[str]:
        """Before the first round: verify, and enter the limits that the ledger has seen none for; returns warnings.

        Raises:
            LedgerError: the chain is broken, or an entry is not signed by this party; names the first bad entry.
        """
        return self._books.open(connection, at=utc(now))

    def in_force(self, connection: Connection) -> tuple[list[str], list[str]]:
        """(which limits are in force for every dataset and for the party, warnings), in words."""
        entries, limits = self._store.standing(connection), self._books.limits
        rows: list[Account] = [*dict.fromkeys(limits.dataset(task) for task in self._config.datasets)]
        party: Account = ("party", subject_of("federation", self._config.federation))
        lines = [in_force(limits, entries, account) for account in (*rows, party)]
        return lines, [*without_epsilon(limits, entries, rows), *without_effect(limits), *apart(self._config)]

    def reserve(self, connection: Connection, checked: CheckedPlan, *, now: float) -> None:
        """Charge a round to every account, once the rounds that the job is still priced for are affordable.

        Raises:
            PolicyError: it would train without a guarantee for a row, and the policy does not allow that.
            BudgetError: one of the budgets does not allow the whole plan; nothing is charged. The transaction is
                undone: `refuse` enters it in another one.
        """
        plan, config = checked.plan, self._config
        check_guarantee(
            example_event(plan),
            delta=min(float(plan.local.delta), config.privacy.budgets.example.delta),
            allow_without_dp=config.policy.allow_without_dp,
        )
        self._books.reserve(connection, plan.job_id, plan.round, self._costs(connection, checked), at=utc(now))

    def refuse(self, connection: Connection, checked: CheckedPlan, error: BudgetError, *, now: float) -> None:
        """Enter that a round was refused."""
        plan, costs = checked.plan, self._costs(connection, checked)
        self._books.refuse(connection, plan.job_id, plan.round, costs, error=error, at=utc(now))

    def spend(
        self, connection: Connection, job_id: str, number: int, *, now: float, reason: str = "training begins"
    ) -> None:
        """Something of the data may be told, if only how long work on it takes: the round's charges are irrevocable."""
        self._books.spend(connection, job_id, number, at=utc(now), reason=reason)

    def return_(self, connection: Connection, job_id: str, number: int, *, now: float, reason: str) -> None:
        """Give back what a round reserved for which no data was touched; of too many a day it is spent."""
        self._books.give_back(connection, job_id, number, at=utc(now), reason=reason)

    def release(
        self, connection: Connection, job_id: str, number: int, *, figures: Mapping[str, str], now: float
    ) -> None:
        """Enter what is shown: the digests of what is delivered, say. Raises LedgerError unless the round is final."""
        self._books.release(connection, job_id, number, figures=figures, at=utc(now))

    def is_over(self, connection: Connection, job_id: str, number: int) -> bool:
        """Whether a budget that the round counts on was reset since the round was shown: it counts there no more."""
        return self._books.is_over(connection, job_id, number)

    def example_balance(self, connection: Connection, task: str, *, delta: float) -> ExampleBalance:
        """What a dataset's rows have spent, at `delta`, and what is left, at the δ of its limit."""
        entries, limits = self._store.standing(connection), self._books.limits
        account = limits.dataset(task)
        stated = [each for each in limits.budgets(entries, account) if each.epsilon is not None]
        spent = epsilon_spent(entries, account, delta=delta, against=limits.against)
        if len(stated) != 1 or stated[0].epsilon is None:
            return ExampleBalance(spent, None, None)
        left = stated[0].epsilon - epsilon_spent(entries, account, delta=stated[0].delta, against=limits.against)
        return ExampleBalance(spent, max(0.0, left), stated[0].delta)

    def verify(self, connection: Connection) -> None:
        """Raises LedgerError, which names the first bad entry, when the chain is broken."""
        self._store.verify(connection)

    def head(self, connection: Connection) -> str:
        """Digest of the ledger's last entry."""
        return self._store.head(connection)

    def check_heads(self, connection: Connection, heads: Sequence[Head]) -> None:
        """Raises LedgerError unless this ledger once had the heads that the aggregator remembers of it."""
        check_heads(
            self._store.standing(connection),
            heads,
            whose=f"party {self._config.name}'s",
            told_by="the aggregator",
            account=("party", subject_of("federation", self._config.federation)),
        )

    def remember(self, connection: Connection, head: Head, *, key: str) -> None:
        """Keep what a transcript says of the ledger of the aggregator with this key (64 hex digits)."""
        self._heads.remember(connection, key, head)

    def aggregator_heads(self, connection: Connection, *, key: str) -> tuple[Head, ...]:
        """Of the ledger of the aggregator with this key, as the last transcripts said them; none before the first."""
        return self._heads.told(connection, key)

    def _costs(self, connection: Connection, checked: CheckedPlan) -> list[Cost]:
        plan = checked.plan
        example = self._books.limits.dataset(plan.task)
        party: Account = ("party", subject_of("federation", plan.federation))
        dataset = self._config.datasets.get(plan.task)
        return [
            Cost(
                account=example,
                event=example_event(plan),
                rounds=self._rounds(connection, checked, example),
                user=(dataset.user or "") if dataset else "",
                reason=reason_of(plan.task, example),
                scientist=checked.scientist,
                stated_delta=float(plan.local.delta),
            ),
            Cost(
                account=party,
                event=party_event(plan, checked.noise),
                rounds=self._rounds(connection, checked, party),
                scientist=checked.scientist,
            ),
        ]

    def _rounds(self, connection: Connection, checked: CheckedPlan, account: Account) -> int:
        """That the job is still priced for."""
        charged = self._books.charged(connection, checked.plan.job_id, account)
        return max(1, checked.plan.priced_rounds - charged)
