"""Budgets: k rounds allow exactly k, by count and by ε; a refusal says by how much."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import BudgetError, InvalidInput
from src.privacy import ledger
from src.privacy.accounting import epsilon
from src.privacy.budget import Budget, balance, check_affordable
from src.privacy.events import DpSgdSteps, Event, NoisySum, NonPrivate, Unit
from src.privacy.ledger import Entry

AT = "2025-06-01T12:00:00Z"
DELTA = 1e-6
SUM = NoisySum(noise_multiplier=4.0, dimension=10)
STEPS = DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=20)


def budget(
    *, max_rounds: int | None = None, epsilon: float | None = None, unit: Unit = "party", subject: str = "s"
) -> Budget:
    return Budget(unit=unit, subject=subject, max_rounds=max_rounds, epsilon=epsilon, delta=DELTA)


def spend(entries: list[Entry], limit: Budget, event: Event) -> None:
    """Check, then reserve one round: what a role does in one transaction."""
    check_affordable(entries, limit, [(1, event)])
    number = len(entries) + 1
    entries.append(
        ledger.reserve(
            entries,
            at=AT,
            job_id="j",
            round=number,
            unit=limit.unit,
            subject=limit.subject,
            reservation_id=f"j/{number}",
            event=event,
        )
    )


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_a_budget_of_k_rounds_allows_exactly_k(rounds: int) -> None:
    limit, entries = budget(max_rounds=rounds), list[Entry]()
    for _ in range(rounds):
        spend(entries, limit, SUM)
    with pytest.raises(BudgetError):
        spend(entries, limit, SUM)
    left = balance(entries, limit)
    assert (left.rounds_spent, left.rounds_left) == (rounds, 0)
    assert left.epsilon_left is None
    check_affordable([], limit, [(rounds, SUM)] if rounds else [])
    with pytest.raises(BudgetError):
        check_affordable([], limit, [(rounds + 1, SUM)])


@pytest.mark.parametrize(("event", "unit"), [(SUM, "party"), (STEPS, "example")])
def test_an_epsilon_that_k_rounds_cost_allows_exactly_k(event: Event, unit: Unit) -> None:
    """To the last bit: planned as one, or spent one by one."""
    cost = epsilon([event.repeated(5)], delta=DELTA)
    limit, entries = budget(epsilon=cost, unit=unit), list[Entry]()
    check_affordable(entries, limit, [(5, event)])
    for _ in range(5):
        spend(entries, limit, event)
    with pytest.raises(BudgetError):
        spend(entries, limit, event)
    seen = balance(entries, limit)
    assert (seen.epsilon_spent, seen.epsilon_left) == (cost, 0.0)
    with pytest.raises(BudgetError):
        check_affordable([], limit, [(6, event)])


def test_a_refusal_says_asked_spent_limit_and_left() -> None:
    limit, entries = budget(max_rounds=3), list[Entry]()
    spend(entries, limit, SUM)
    with pytest.raises(BudgetError) as caught:
        check_affordable(entries, limit, [(2, SUM), (1, SUM)])
    assert caught.value.metadata == {"asked": "3", "spent": "1", "limit": "3", "left": "2"}
    assert "asked 3, spent 1, limit 3, left 2" in caught.value.message
    with pytest.raises(BudgetError) as caught:
        check_affordable(entries, budget(epsilon=1.5), [(1, NonPrivate(unit="party", reason="no noise"))])
    assert caught.value.metadata["asked"] == "inf"
    assert caught.value.metadata["limit"] == "1.5"
    assert float(caught.value.metadata["spent"]) == pytest.approx(epsilon([SUM], delta=DELTA), rel=1e-5)


def test_only_charges_of_the_same_unit_and_subject_count() -> None:
    entries: list[Entry] = []
    spend(entries, budget(), SUM)
    spend(entries, budget(subject="other"), SUM)
    spend(entries, budget(unit="example"), STEPS)
    assert balance(entries, budget()).rounds_spent == 1
    assert balance(entries, budget()).events == (SUM,)
    assert balance(entries, budget(unit="example")).events == (STEPS,)


def test_what_is_open_counts_what_is_final_counts_and_what_is_returned_does_not() -> None:
    entries: list[Entry] = []
    limit = budget(max_rounds=3)
    for _ in range(3):
        spend(entries, limit, SUM)
    entries.append(ledger.finalise(entries, "j/1", at=AT))
    assert balance(entries, limit).rounds_spent == 3
    entries.append(ledger.give_back(entries, "j/2", at=AT, reason="cancelled"))
    assert balance(entries, limit).rounds_spent == 2
    assert balance(entries, limit).rounds_left == 1


def test_an_opening_balance_and_a_round_without_noise_count() -> None:
    entries = [
        ledger.open_balance(
            [], at=AT, unit="party", subject="s", reservation_id="old", event=SUM, charged_rounds=4, reason="before"
        )
    ]
    limit = budget(max_rounds=5, epsilon=50.0)
    assert balance(entries, limit).rounds_spent == 4
    spend(entries, budget(), NonPrivate(unit="party", reason="no noise"))
    seen = balance(entries, limit)
    assert seen.epsilon_spent == math.inf
    assert (seen.epsilon_left, seen.rounds_left) == (0.0, 0)


@settings(deadline=None, max_examples=25)
@given(
    multipliers=st.lists(st.floats(1.0, 40.0), min_size=1, max_size=12),
    limit=st.floats(0.1, 10),
    rounds=st.integers(0, 9),
)
def test_a_budget_is_never_overspent(multipliers: list[float], limit: float, rounds: int) -> None:
    both, entries = budget(max_rounds=rounds, epsilon=limit), list[Entry]()
    for multiplier in multipliers:
        event = NoisySum(noise_multiplier=multiplier)
        try:
            spend(entries, both, event)
        except BudgetError:
            planned = [*balance(entries, both).events, event]
            assert len(planned) > rounds or epsilon(planned, delta=DELTA) > limit
    seen = balance(entries, both)
    assert seen.rounds_spent <= rounds
    assert seen.epsilon_spent <= limit


@pytest.mark.parametrize(
    "fields",
    [
        {"unit": "user"},
        {"max_rounds": -1},
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_a_budget_out_of_range_is_refused(fields: dict[str, object]) -> None:
    good: dict[str, object] = {"unit": "party", "subject": "s", "max_rounds": None, "epsilon": None, "delta": DELTA}
    with pytest.raises(InvalidInput):
        Budget(**{**good, **fields})  # type: ignore[arg-type]


def test_a_plan_of_another_unit_or_of_no_rounds_is_refused() -> None:
    with pytest.raises(InvalidInput):
        check_affordable([], budget(), [(1, STEPS)])
    with pytest.raises(InvalidInput):
        check_affordable([], budget(), [(0, SUM)])
