"""Budgets over a ledger: what is spent, what is left, what is refused. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import BudgetError, InvalidInput
from .accounting import epsilon as composed_epsilon
from .events import RELATIONS, Event, Unit
from .ledger import Entry, charges


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on what one subject may spend at one unit.

    Attributes:
        unit, subject: which charges count against it.
        max_rounds: rounds, ≥ 0; None for no limit.
        epsilon: ε at `delta`, ≥ 0; None for no limit.
        delta: in (0, 1).
    """

    unit: Unit
    subject: str
    max_rounds: int | None
    epsilon: float | None
    delta: float

    def __post_init__(self) -> None:
        if self.unit not in RELATIONS:
            raise InvalidInput("the unit of a budget must be 'example' or 'party'")
        if self.max_rounds is not None and self.max_rounds < 0:
            raise InvalidInput("max_rounds must not be negative")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon >= 0.0):
            raise InvalidInput("the epsilon of a budget must be finite and not negative; leave it out for no limit")
        if not 0.0 < self.delta < 1.0:
            raise InvalidInput("the delta of a budget must lie strictly between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What a budget has seen. `…_left` is None without a limit, never negative; `epsilon_spent` may be infinite."""

    rounds_spent: int
    epsilon_spent: float
    rounds_left: int | None
    epsilon_left: float | None
    events: tuple[Event, ...]


def _spent(entries: Iterable[Entry], budget: Budget) -> tuple[int, tuple[Event, ...]]:
    """Rounds and events of every charge on `budget` that was not given back."""
    rounds = 0
    events: list[Event] = []
    for charge in charges(entries).values():
        entry = charge.entry
        if charge.counts and (entry.unit, entry.subject) == (budget.unit, budget.subject):
            rounds += entry.charged_rounds
            if entry.event is not None:
                events.append(entry.event)
    return rounds, tuple(events)


def balance(entries: Iterable[Entry], budget: Budget) -> Balance:
    """What is spent and left. Every reservation that was not given back counts, settled or not.

    ε left is the difference to the limit; because ε does not add up, more of a mechanism may fit than it suggests.

    Raises:
        LedgerError: `entries` break a rule.
    """
    rounds, events = _spent(entries, budget)
    spent = composed_epsilon(events, delta=budget.delta)
    return Balance(
        rounds_spent=rounds,
        epsilon_spent=spent,
        rounds_left=None if budget.max_rounds is None else max(0, budget.max_rounds - rounds),
        epsilon_left=None if budget.epsilon is None else max(0.0, budget.epsilon - spent),
        events=events,
    )


def _refuse(what: str, *, asked: object, spent: object, limit: object, left: object) -> BudgetError:
    return BudgetError(
        f"the {what} does not allow it: asked {asked}, spent {spent}, limit {limit}, left {left}",
        asked=asked,
        spent=spent,
        limit=limit,
        left=left,
    )


def check_affordable(entries: Iterable[Entry], budget: Budget, planned: Sequence[tuple[int, Event]]) -> None:
    """Return if `budget` allows all of `planned` on top of what is spent.

    Args:
        planned: (rounds, what one such round does).

    Raises:
        BudgetError: it does not; says asked, spent, limit and left, in the message and as metadata. For ε, asked is
            what the plan costs by itself; what counts is the composition of both.
        InvalidInput: a planned event of another unit, or fewer than one round of it.
        LedgerError: `entries` break a rule.
    """
    if any(event.unit != budget.unit for _, event in planned):
        raise InvalidInput("a planned event is of another unit than the budget")
    asked_rounds = sum(rounds for rounds, _ in planned)
    spent_rounds, events = _spent(entries, budget)
    if budget.max_rounds is not None and spent_rounds + asked_rounds > budget.max_rounds:
        raise _refuse(
            f"round budget at {budget.unit} level",
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
    if composed_epsilon([*events, *additional], delta=budget.delta) > budget.epsilon:
        spent = composed_epsilon(events, delta=budget.delta)
        asked = composed_epsilon(additional, delta=budget.delta)
        raise _refuse(
            f"epsilon budget at {budget.unit} level (delta {budget.delta!r})",
            asked=f"{asked:.6g}",
            spent=f"{spent:.6g}",
            limit=f"{budget.epsilon:.6g}",
            left=f"{max(0.0, budget.epsilon - spent):.6g}",
        )
