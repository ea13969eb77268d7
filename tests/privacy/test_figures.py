"""What a ledger's events come to against whom: what a plan says of its own noise, and never more."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings

from src.privacy.accounting import epsilon
from src.privacy.events import DpSgdSteps, Event, NoiseBy, NoisySum, NonPrivate, SampledNoisySum, Unit
from src.privacy.figures import (
    AGAINST,
    EVERYBODY,
    OWN_NOISE,
    TRUSTED,
    UNKNOWN,
    UNLESS_TRUSTED,
    Against,
    figures,
    left_against,
)
from src.privacy.noise_plan import NoisePlan, plan_noise
from tests.privacy.plans import WHO, noise_plans

ALL: tuple[Against, ...] = ("release", "aggregator", "all_others")
STEPS = DpSgdSteps(sampling_rate=0.05, noise_multiplier=1.0, steps=10)


def a_plan(noise_by: NoiseBy = "both", *, multiplier: float = 3.0, colluders: int = 1) -> NoisePlan:
    return plan_noise(noise_by=noise_by, noise_multiplier=multiplier, sensitivity=1000.0, quorum=5, colluders=colluders)


@settings(deadline=None, max_examples=60)
@given(plan=noise_plans())
def test_an_event_says_what_its_plan_says_and_never_more(plan: NoisePlan) -> None:
    """From what is charged against the release alone: the noise that is left against the aggregator and all others."""
    charged = plan.event("release", dimension=7)
    assert isinstance(charged, NoisySum)
    for against in ALL:
        planned, found = plan.event(against, dimension=7), left_against(charged, against)
        assert type(found) is type(planned)
        if isinstance(planned, NoisySum) and isinstance(found, NoisySum):
            assert found.noise_multiplier == pytest.approx(planned.noise_multiplier, rel=1e-3)
            assert found.noise_multiplier <= charged.noise_multiplier
            assert found.tau == planned.tau
            parties = plan.honest_shares * plan.share_sigma2
            there = {
                "release": plan.aggregator_sigma2 + parties,
                "aggregator": parties,
                "all_others": plan.share_sigma2,
            }
            assert (Fraction(found.noise_multiplier) * Fraction(plan.sensitivity)) ** 2 <= there[against]


def test_counted_against_the_release_the_aggregators_figure_stands_beside_it() -> None:
    """The same ε of the release, whoever draws; against the aggregator twice the ρ, or nothing at all."""
    found = {
        noise_by: figures([a_plan(noise_by).event("release", dimension=9, rounds=10)] * 2, unit="party", delta=1e-5)
        for noise_by in WHO
    }
    assert len({charged.epsilon for charged, _, _ in found.values()}) == 1
    for noise_by, (charged, aggregator, others) in found.items():
        plan = a_plan(noise_by)
        assert charged.against == AGAINST["release"]
        assert [each.assumes for each in (charged, aggregator, others)] == [plan.assumption(each) for each in ALL]
        events = [plan.event("aggregator", dimension=9, rounds=20)]
        assert aggregator.epsilon == pytest.approx(epsilon(events, delta=1e-5), rel=1e-6)
        assert charged.epsilon <= aggregator.epsilon <= others.epsilon
    assert found["aggregator"][1].epsilon == math.inf
    assert "trusted" in found["aggregator"][1].assumes


@pytest.mark.parametrize("noise_by", WHO)
def test_a_row_of_fedsgd_is_charged_against_the_aggregator_unless_that_is_trusted(noise_by: NoiseBy) -> None:
    plan = a_plan(noise_by, colluders=2)
    charged = "release" if noise_by == "aggregator" else "aggregator"
    event = plan.event(charged, dimension=9, rounds=10, sampling_rate=0.02)  # type: ignore[arg-type]
    first, aggregator, others = figures([event], unit="example", delta=1e-5)
    assert first.epsilon == epsilon([event], delta=1e-5) < others.epsilon
    assert "secret" in first.assumes
    if noise_by == "aggregator":
        assert (first.against, aggregator.epsilon, others.epsilon) == (TRUSTED, math.inf, math.inf)
    else:
        assert first.against == "everybody, the aggregator included, as long as at most 2 other parties collude"
        assert aggregator.epsilon == pytest.approx(first.epsilon, rel=1e-9)
        assert others.epsilon < math.inf


@pytest.mark.parametrize("noise_by", WHO)
@pytest.mark.parametrize("unit", ["party", "example"])
def test_counted_against_the_aggregator_its_own_noise_is_none(noise_by: NoiseBy, unit: Unit) -> None:
    plan = a_plan(noise_by)
    charged: Against = "aggregator" if unit == "example" and noise_by != "aggregator" else "release"
    event = plan.event(charged, dimension=9, rounds=10, sampling_rate=0.02 if unit == "example" else None)
    first, aggregator, _ = figures(
        [event, *([STEPS] if unit == "example" else [])], unit=unit, delta=1e-5, counts="aggregator"
    )
    assert first.epsilon == pytest.approx(aggregator.epsilon, rel=1e-9)
    assert (first.epsilon == math.inf) is (noise_by == "aggregator")
    assert first.assumes == aggregator.assumes
    assert "aggregator included" in first.against
    assert "trusted with" not in first.against


def test_an_entry_of_an_earlier_version_counts_as_unknown_and_so_as_infinite() -> None:
    for event in (NoisySum(noise_multiplier=3.0), SampledNoisySum(sampling_rate=0.1, noise_multiplier=3.0)):
        charged, aggregator, others = figures([event], unit=event.unit, delta=1e-5)
        assert charged.epsilon == epsilon([event], delta=1e-5) < math.inf
        assert aggregator.epsilon == others.epsilon == math.inf
        assert {charged.assumes, aggregator.assumes, others.assumes} == {UNKNOWN}
    mixed = [NoisySum(noise_multiplier=3.0), a_plan("parties").event("release", dimension=1)]
    assert figures(mixed, unit="party", delta=1e-5)[2].epsilon == math.inf


def test_a_partys_own_noise_protects_its_rows_from_everybody_alike() -> None:
    found = figures([STEPS, STEPS], unit="example", delta=1e-5)
    assert {each.epsilon for each in found} == {epsilon([STEPS, STEPS], delta=1e-5)}
    assert {each.assumes for each in found} == {OWN_NOISE}
    assert found[0].against == EVERYBODY


def rows(noise_by: NoiseBy, *, colluders: int = 0, known: bool = True) -> Event:
    shares = a_plan(noise_by, colluders=colluders).shares if known else None
    return SampledNoisySum(sampling_rate=0.02, noise_multiplier=3.0, shares=shares)


UNLESS = "as long as the other parties do not collude"
TOGETHER: list[tuple[str, list[Event], str]] = [
    ("fedavg, fedsgd of nobody colluding", [STEPS, rows("both")], f"everybody, the aggregator included, {UNLESS}"),
    ("fedsgd alone", [rows("parties")], f"everybody, the aggregator included, {UNLESS}"),
    (
        "the fewest colluders",
        [rows("both", colluders=2), STEPS, rows("both", colluders=1)],
        "everybody, the aggregator included, as long as at most 1 other party colludes",
    ),
    ("a trusted server", [rows("aggregator", colluders=1), STEPS], TRUSTED),
    ("a trusted server and a round without", [rows("aggregator"), rows("both")], f"{TRUSTED}, {UNLESS}"),
    ("an earlier version", [rows("both", known=False), STEPS], UNLESS_TRUSTED),
    ("an earlier version beside it", [rows("both", known=False), rows("both")], f"{UNLESS_TRUSTED}, {UNLESS}"),
]


@pytest.mark.parametrize(("events", "said"), [row[1:] for row in TOGETHER], ids=[row[0] for row in TOGETHER])
def test_the_figure_of_several_events_holds_only_against_whom_each_part_does(events: list[Event], said: str) -> None:
    """In one statement, whatever their order."""
    for order in (events, events[::-1]):
        assert figures(order, unit="example", delta=1e-5)[0].against == said


def test_nothing_spent_and_no_noise_say_so() -> None:
    for unit in ("example", "party"):
        assert [each.epsilon for each in figures([], unit=unit, delta=1e-5)] == [0.0] * 3
    silent: list[Event] = [NonPrivate(unit="party", reason="x"), replace(STEPS, noise_multiplier=0.0)]
    for event in silent:
        for each in figures([event], unit=event.unit, delta=1e-5):
            assert (each.epsilon, each.assumes) == (math.inf, "nothing: there is no noise")
