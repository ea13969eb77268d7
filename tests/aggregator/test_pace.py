"""An opening of minutes says how far it is and how long it may take, and nothing that depends on a row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from src.aggregator.federation import Federation
from src.aggregator.pace import Pace
from src.aggregator.planning import Model, plan_round
from src.aggregator.round_row import RoundRow, RoundState
from src.jobs.spec import FederatedTrainingSpec
from src.protocol.plan import PLAN_KIND

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_round(federation: Federation, strategy: str = "fedavg", *, number: int = 1, dimension: int = 100_000) -> RoundRow:
    plan = plan_round(
        FederatedTrainingSpec.from_json({"task": "randhie", "strategy": strategy}),
        job_id="job",
        number=number,
        model=Model("a" * 64, 4 * dimension, dimension),
        roster=federation.roster,
        scheme=federation.scheme("paillier", allow_plaintext=False),
        declared_rows={"a": 5000, "b": 5400, "c": 6000},
    )
    return RoundRow(
        job_id="job",
        number=number,
        state=RoundState.AGGREGATING,
        plan=federation.sign(PLAN_KIND, plan.to_statement()).to_json(),
        plan_digest="",
        model_sha256="a" * 64,
        cohort=("a", "b", "c"),
        quorum=2,
        holders=("a", "b", "c"),
        threshold=2,
        noise_needed=True,
        started_at=900.0,
        timeout_s=600.0,
    )


def opened(pace: Pace, clock: Clock, row: RoundRow, *, takes_s: float) -> None:
    pace.seen(row)
    pace.seen(replace(row, state=RoundState.OPENING))
    clock.now += takes_s
    pace.seen(replace(row, state=RoundState.RELEASED))


def test_the_first_opening_says_what_is_there_since_when_and_roughly_what_it_takes(federation: Federation) -> None:
    clock = Clock()
    pace, row = Pace(clock), replace(a_round(federation), state=RoundState.OPENING)
    assert pace.words(a_round(federation)) == ""
    pace.seen(row)
    assert pace.words(row) == (
        " (0 of 2 shares are there, which takes roughly 50 s of one core at each party that opens)"
    )
    clock.now += 30
    row = replace(row, shares={"b": "1" * 64})
    pace.seen(row)  # that something happened does not begin it anew
    said = pace.words(row)
    assert said.startswith(" (1 of 2 shares are there, for 30 s so far, which takes roughly 50 s")


def test_the_next_one_is_measured_by_the_last_by_the_number_of_parameters(federation: Federation) -> None:
    clock = Clock()
    pace = Pace(clock)
    opened(pace, clock, a_round(federation), takes_s=60)
    row = replace(a_round(federation, number=2, dimension=200_000), state=RoundState.OPENING)
    pace.seen(row)
    clock.now += 50
    assert pace.words(row) == (
        " (0 of 2 shares are there, for 50 s so far, 2 min by what the last one took, about 70 s more)"
    )
    clock.now += 1000
    assert "more" not in pace.words(row)  # what is over its time promises nothing
    failed = replace(row, state=RoundState.FAILED)
    pace.seen(failed)
    assert pace.words(failed) == ""


def test_under_fedsgd_it_does_not_say_since_when(federation: Federation) -> None:
    """Which would be when training ended; how long an opening takes depends on the number of parameters alone."""
    clock = Clock()
    pace = Pace(clock)
    opened(pace, clock, a_round(federation, "fedsgd"), takes_s=60)
    row = replace(a_round(federation, "fedsgd", number=2), state=RoundState.OPENING)
    pace.seen(row)
    clock.now += 50
    assert pace.words(row) == " (0 of 2 shares are there, 60 s by what the last one took)"


def test_an_opening_of_a_moment_says_no_times(federation: Federation) -> None:
    row = replace(a_round(federation, dimension=100), state=RoundState.OPENING)
    pace = Pace(Clock())
    pace.seen(row)
    assert pace.words(row) == " (0 of 2 shares are there)"
