"""What a manifest says of a model that is not the last of a job which came to its end, or that goes on from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Final

from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import JobRow
from ..privacy.accounting import epsilon
from ..protocol.canonical import number_or_inf, real
from ..protocol.derive import example_event
from .planning import plan_of
from .round_row import RoundRow, RoundState, SpentRounds, spent_through
from .steps import party_figures

CONTINUED: Final = (
    "this job goes on from a model of an earlier one: what the jobs in continued_from have cost comes on top of every "
    "epsilon here"
)


def predecessor(spec: FederatedTrainingSpec, history: Sequence[RoundRow]) -> dict[str, Any]:
    """What a job that goes on from another says of it.

    Args:
        spec: of the job that goes on.
        history: every round that was begun for the other one so far.
    """
    source = spec.continue_from
    if source is None:
        raise AssertionError("only a job that goes on from another has a predecessor")
    plans = [plan_of(row.plan) for row in history]
    delta = plans[-1].local.delta
    party_delta = plans[-1].noise.delta
    return {
        **source.model_dump(),
        "epsilon_example": real(epsilon(map(example_event, plans), delta=float(delta))),
        "delta": delta,
        "epsilon_party": real(figures_of_party(history, float(party_delta))["epsilon_party"]),
        "party_delta": party_delta,
    }


def figures_of_party(history: Sequence[RoundRow], delta: float) -> dict[str, Any]:
    """What all rounds of a job that were opened cost a party, whichever of them is looked at."""
    spent: tuple[SpentRounds, ...] = reduce(lambda before, row: spent_through(row, before), history, ())
    party, _, aggregator = party_figures(spent, delta)
    return {
        "epsilon_party": number_or_inf(party.epsilon),
        "epsilon_party_against_aggregator": number_or_inf(aggregator),
    }


def place_of(
    job: JobRow, spec: FederatedTrainingSpec, history: Sequence[RoundRow], meant: RoundRow
) -> dict[str, int | str]:
    """Of which round a model is, and how far its job had come."""
    return {
        "round": meant.number,
        "rounds_released": len([row for row in history if row.state is RoundState.RELEASED]),
        "rounds_begun": len(history),
        "rounds_planned": spec.rounds,
        "job_state": job.state.value,
    }


def said_first(place: Mapping[str, int | str], goes_on: Mapping[str, Any]) -> list[str]:
    """What has to be known of a model before the rest is read."""
    lines = []
    if place:
        lines.append(
            f"this is the model of round {place['round']}; the job has released {place['rounds_released']} of "
            f"{place['rounds_planned']} rounds and begun {place['rounds_begun']}: every epsilon is of all rounds "
            "begun, whichever model is taken"
        )
    return [*lines, CONTINUED] if goes_on else lines
