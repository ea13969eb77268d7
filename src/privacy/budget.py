"""Budgets over a ledger: what is spent, what is left, what is refused, and which limit is in force. Pure.

An account is a unit and a subject: ("example", "dataset:randhie"), ("party", "federation:demo"). Budgets of datasets,
parties and federations are the guarantee; those of users ("user:ada", whose data is trained on) and of jobs ("job:…")
are quotas inside it: a charge is written once, and counts on every account that it concerns. In the aggregator's ledger
the charge of a round is the federation's, and counts on every party that the round invited ("party:a").

A limit comes from the configuration, and is entered into the ledger as a correction when it is first seen. From then on
only a correction by an operator changes it: where the configuration says something else, both hold. So do limits of one
subject and of all of its kind, in the ledger as in the configuration: whatever says something, no other takes it back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ..errors import BudgetError, InvalidInput
from .accounting import epsilon as composed_epsilon
from .entries import Entry, Limit
from .events import RELATIONS, Event, NonPrivate, Unit
from .figures import Against, counted
from .standing import Account, Standing, may_invite_anybody, standing_of

__all__ = [
    "ANY",
    "Account",
    "Balance",
    "Budget",
    "Ledger",
    "Limits",
    "any_of",
    "balance",
    "balance_of",
    "binds",
    "check_affordable",
    "concerns",
    "entered",
    "epsilon_spent",
    "period_start",
    "resets",
    "subject_of",
]

ANY: Final = "*"
"""The name in a subject that stands for all of its kind without a limit of their own: "dataset:*"."""

Ledger = Iterable[Entry] | Standing
"""All entries in order, or what follows from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on what one subject may spend at one unit.

    Attributes:
        unit, subject: which charges count against it.
        max_rounds: rounds, ≥ 0; None for no limit.
        epsilon: ε at `delta`, ≥ 0; None for no limit.
        delta: in (0, 1).
        against: whom ε is counted against (`figures.counted`): "release", or "aggregator", which it then holds
            against as well.
    """

    unit: Unit
    subject: str
    max_rounds: int | None
    epsilon: float | None
    delta: float
    against: Against = "release"

    def __post_init__(self) -> None:
        if self.unit not in RELATIONS:
            raise InvalidInput("the unit of a budget must be 'example' or 'party'")
        _ = self.limit  # checks the figures

    @property
    def limit(self) -> Limit:
        """Without whose it is."""
        return Limit(max_rounds=self.max_rounds, epsilon=self.epsilon, delta=self.delta)

    @classmethod
    def of(cls, account: Account, limit: Limit, *, against: Against = "release") -> Budget:
        """That limit on that account."""
        return cls(
            unit=account[0],
            subject=account[1],
            max_rounds=limit.max_rounds,
            epsilon=limit.epsilon,
            delta=limit.delta,
            against=against,
        )

    def counted(self, events: Iterable[Event]) -> list[Event]:
        """`events` as this budget counts them."""
        return [counted(event, self.against) for event in events]

    def cost(self, events: Iterable[Event]) -> float:
        """ε of `events` as this budget counts them; may be infinite."""
        return composed_epsilon(self.counted(events), delta=self.delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What a budget has seen. `…_left` is None without a limit, never negative; `epsilon_spent` may be infinite.
    Events are as they were charged."""

    rounds_spent: int
    epsilon_spent: float
    rounds_left: int | None
    epsilon_left: float | None
    events: tuple[Event, ...]


# --- accounts -------------------------------------------------------------------------------------------------------


def subject_of(kind: str, name: str) -> str:
    """ "dataset", "randhie" → "dataset:randhie"."""
    return f"{kind}:{name}"


def any_of(subject: str) -> str:
    """The subject that stands for all of this one's kind: "dataset:randhie" → "dataset:*"."""
    return subject_of(subject.partition(":")[0], ANY)


def concerns(entry: Entry, account: Account) -> bool:
    """Whether an entry is about an account: by its subject, its user, its job, or whom its round invited.

    A charge of a federation that names no parties (before they were named, none did) may have invited any.
    """
    unit, subject = account
    kind, _, name = subject.partition(":")
    by_name = {
        "user": entry.user == name,
        "job": entry.job_id == name,
        "party": name in entry.parties or may_invite_anybody(entry),
    }
    return entry.unit == unit and (entry.subject == subject or (bool(name) and by_name.get(kind, False)))


def period_start(entries: Ledger, account: Account) -> int:
    """Sequence of the last reset of an account; 0 when there was none."""
    return standing_of(entries).period_start(account)


def resets(entry: Entry, account: Account) -> bool:
    """Whether with this entry a new period of the account begins."""
    corrected = entry.correction
    return corrected is not None and corrected.action == "reset" and (entry.unit, entry.subject) == account


def balance(entries: Ledger, budget: Budget, *, ever: bool = False) -> Balance:
    """What is spent and left. Every reservation that was not given back counts, settled or not.

    ε left is the difference to the limit; because ε does not add up, more of a mechanism may fit than it suggests.

    Args:
        ever: count over all accounting periods, whatever was reset: what the data has really been exposed to.

    Raises:
        LedgerError: `entries` break a rule.
    """
    rounds, events = standing_of(entries).spent((budget.unit, budget.subject), ever=ever)
    return balance_of(rounds, events, budget)


def balance_of(rounds: int, events: Counter[Event], budget: Budget) -> Balance:
    """The same of what a `Standing` says is spent."""
    spent = budget.cost(_together(events))
    return Balance(
        rounds_spent=rounds,
        epsilon_spent=spent,
        rounds_left=None if budget.max_rounds is None else max(0, budget.max_rounds - rounds),
        epsilon_left=None if budget.epsilon is None else max(0.0, budget.epsilon - spent),
        events=tuple(events.elements()),
    )


def epsilon_spent(entries: Ledger, account: Account, *, delta: float, against: Against = "release") -> float:
    """ε at `delta` of all that counts on an account now; a balance's, whose events are not asked for."""
    events = _together(standing_of(entries).spent(account)[1])
    return composed_epsilon([counted(event, against) for event in events], delta=delta)


def _together(events: Mapping[Event, int]) -> list[Event]:
    """Equal events as one, which composes to the same ε to the last bit (`accounting.merged`)."""
    return [event.repeated(count) for event, count in events.items()]


# --- which limit is in force ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What a role's configuration says. A subject "kind:*" stands for all of that kind.

    Attributes:
        keys: where in the configuration each row is, for people: "privacy.budgets.party".
        datasets: on which subject the rows of each dataset of the configuration are charged, by its name.
        against: whom every ε is counted against (`Budget.against`).
    """

    rows: Mapping[Account, Limit]
    keys: Mapping[Account, str] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    against: Against = "release"

    def dataset(self, name: str) -> Account:
        """On which the rows of a dataset are charged: its own, or that of another whose budget it shares."""
        return "example", self.datasets.get(name, subject_of("dataset", name))

    def configured(self, account: Account) -> Limit | None:
        """By the configuration; None where it says nothing about it."""
        unit, subject = account
        return self.rows.get(account) or self.rows.get((unit, any_of(subject)))

    def key(self, account: Account) -> str:
        """Where in the configuration its limit is; "" where that is not known."""
        unit, subject = account
        return self.keys.get(account if account in self.rows else (unit, any_of(subject)), "")

    def knows(self, entries: Ledger, account: Account) -> bool:
        """Whether somebody is known here: by the configuration, or by name, by an operator's entry.

        What the ledger once took over from the configuration makes nobody known whom that no longer names.
        """
        if self.configured(account) is not None:
            return True
        by_name = account[1] != any_of(account[1])
        return by_name and account in standing_of(entries).set_by_hand

    def sources(self, entries: Ledger, account: Account) -> dict[str, Limit]:
        """Every limit that an account has to stay within, by who says so, for people."""
        unit, subject = account
        kind: Account = (unit, any_of(subject))
        by_ledger = standing_of(entries).limits
        found = {f"entered for {each[1]}": by_ledger.get(each) for each in (account, kind)}
        found |= {self.keys.get(each) or f"configured for {each[1]}": self.rows.get(each) for each in (account, kind)}
        return {source: limit for source, limit in found.items() if limit is not None}

    def budgets(self, entries: Ledger, account: Account) -> tuple[Budget, ...]:
        """What an account has to stay within: of each quantity the smallest limit that anything says.

        Several, where there is ε at several δ, which cannot be compared: each holds by itself. None where nothing says
        anything.
        """
        limits = self.sources(entries, account).values()
        return tuple(Budget.of(account, limit, against=self.against) for limit in intersected(limits))

    def invited(self, entries: Ledger) -> list[Account]:
        """The parties with a budget that rounds have invited so far."""
        standing = standing_of(entries)
        accounts: list[Account] = [("party", subject_of("party", name)) for name in sorted(standing.invited)]
        return [account for account in accounts if self.budgets(standing, account)]

    def unentered(self, entries: Ledger) -> dict[Account, Limit]:
        """What the ledger has seen no limit for yet."""
        standing = standing_of(entries)
        return {account: limit for account, limit in self.rows.items() if entered(standing, account) is None}

    def differences(self, entries: Ledger) -> dict[Account, tuple[Limit | None, Limit]]:
        """Accounts for which the configuration (first; None: nothing) says something else than the ledger."""
        standing, found = standing_of(entries), {}
        for account in dict.fromkeys([*self.rows, *standing.limits]):
            by_ledger, by_file = entered(standing, account), self.configured(account)
            kind, _, name = account[1].partition(":")
            of_one_job = kind == "job" and name != ANY  # over by the time somebody reads the warning
            if by_ledger is not None and by_ledger != by_file and not of_one_job:
                found[account] = (by_file, by_ledger)
        return found


def entered(entries: Ledger, account: Account) -> Limit | None:
    """By the ledger: the last limit entered for an account, or else for all of its kind; None: none ever."""
    unit, subject = account
    found = standing_of(entries).limits
    return found.get(account) or found.get((unit, any_of(subject)))


def binds(one: Limit, other: Limit) -> bool:
    """Whether `one` may refuse what `other` allows."""
    if one.epsilon is not None and other.epsilon is not None and one.delta != other.delta:
        return True
    pairs = ((one.max_rounds, other.max_rounds), (one.epsilon, other.epsilon))
    return any(mine is not None and (theirs is None or mine < theirs) for mine, theirs in pairs)


def intersected(limits: Iterable[Limit]) -> tuple[Limit, ...]:
    """What all of these allow: the fewest rounds, and at each δ the smallest ε. None of no limits."""
    given = list(limits)
    rounds = min((limit.max_rounds for limit in given if limit.max_rounds is not None), default=None)
    epsilons: dict[float, float] = {}
    for limit in given:
        if limit.epsilon is not None:
            epsilons[limit.delta] = min(limit.epsilon, epsilons.get(limit.delta, math.inf))
    if not epsilons:
        return tuple(Limit(max_rounds=rounds, epsilon=None, delta=limit.delta) for limit in given[-1:])
    return tuple(
        Limit(max_rounds=rounds if number == 0 else None, epsilon=epsilon, delta=delta)
        for number, (delta, epsilon) in enumerate(epsilons.items())
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def _whose(budget: Budget, *, name_user: bool) -> str:
    """At which unit, and of whom: "at example level of dataset randhie"."""
    kind, _, name = budget.subject.partition(":")
    whose = f"{kind} {name}"
    if kind == "user" and not name_user:
        whose = "the user whose data it is"
    if kind == "job" and name == ANY:
        whose = "one job"
    return f"at {budget.unit} level of {whose}"


def _refuse(what: str, budget: Budget, *, name_user: bool, said: str = "", **figures: object) -> BudgetError:
    """Args: said: after the figures. figures: by name, for people and as metadata."""
    named = name_user or not budget.subject.startswith("user:")
    shown = ", ".join(f"{name} {'∞' if value == 'inf' else value}" for name, value in figures.items())
    return BudgetError(
        f"the {what} does not allow it: {shown}{said}",
        private="" if named else f"the budget of {budget.subject}",
        unit=budget.unit,
        **({"subject": budget.subject} if named else {}),
        **figures,
    )


def check_affordable(
    entries: Ledger,
    budget: Budget,
    planned: Sequence[tuple[int, Event]],
    *,
    stated_delta: float | None = None,
    name_user: bool = False,
) -> None:
    """Return if `budget` allows all of `planned` on top of what is spent.

    Args:
        planned: (rounds, what one such round does).
        stated_delta: the δ that whoever asks counts with. Where it is not the budget's, a refusal says what is asked
            at either; what counts is the budget's.
        name_user: a refusal may name the user whose quota it is. Not where it goes to others than who keeps the ledger.

    Raises:
        BudgetError: it does not; says unit, subject, asked, spent, limit and left, in the message and as metadata. For
            ε, asked is what the plan costs by itself; what counts, and is said beside it, is the composition of both.
        InvalidInput: a planned event of another unit, or fewer than one round of it.
        LedgerError: `entries` break a rule.
    """
    if any(event.unit != budget.unit for _, event in planned):
        raise InvalidInput("a planned event is of another unit than the budget")
    asked_rounds = sum(rounds for rounds, _ in planned)
    spent_rounds, spent_events = standing_of(entries).spent((budget.unit, budget.subject))
    events = _together(spent_events)
    if budget.max_rounds is not None and spent_rounds + asked_rounds > budget.max_rounds:
        raise _refuse(
            f"round budget {_whose(budget, name_user=name_user)}",
            budget,
            name_user=name_user,
            asked=asked_rounds,
            spent=spent_rounds,
            limit=budget.max_rounds,
            left=max(0, budget.max_rounds - spent_rounds),
        )
    if budget.epsilon is None:
        if any(rounds < 1 for rounds, _ in planned):
            raise InvalidInput("a planned event of fewer than one round")
        return
    additional = [event.repeated(rounds) for rounds, event in planned]
    together = budget.cost([*events, *additional])
    if not together <= budget.epsilon:
        spent, asked = budget.cost(events), budget.cost(additional)
        elsewhere = ""
        if stated_delta is not None and stated_delta != budget.delta:
            elsewhere = f"; asked at the job's own delta {stated_delta!r}: "
            elsewhere += _figure(replace(budget, delta=stated_delta).cost(additional))
        raise _refuse(
            f"epsilon budget {_whose(budget, name_user=name_user)} (delta {budget.delta!r}{elsewhere})",
            budget,
            name_user=name_user,
            asked=f"{asked:.6g}",
            spent=f"{spent:.6g}",
            limit=f"{budget.epsilon:.6g}",
            left=f"{max(0.0, budget.epsilon - spent):.6g}",
            said=f"; with it epsilon would be {_figure(together)}{_because(budget, [*events, *additional])}",
        )


def _because(budget: Budget, events: Sequence[Event]) -> str:
    """Why ε is infinite, where that is for whom it is counted against."""
    pairs = zip(events, budget.counted(events), strict=True)
    trusted = any(isinstance(left, NonPrivate) and not isinstance(event, NonPrivate) for event, left in pairs)
    return ": it counts against the aggregator, whose own noise is none (privacy.budgets.against)" if trusted else ""


def _figure(value: float) -> str:
    return "∞" if value == math.inf else f"{value:.6g}"
