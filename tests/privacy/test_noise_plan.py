"""The noise plan: shares add up to what is claimed, and no more is claimed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput
from src.privacy.accounting import epsilon
from src.privacy.events import NoiseBy, NoisySum, NonPrivate, SampledNoisySum
from src.privacy.noise_plan import NoisePlan, fraction_from_json, fraction_to_json, plan_noise
from tests.privacy.plans import WHO, noise_plans


@settings(deadline=None, max_examples=150)
@given(plan=noise_plans())
def test_any_admissible_set_of_honest_contributors_carries_the_planned_noise(plan: NoisePlan) -> None:
    wanted = (Fraction(plan.noise_multiplier) * Fraction(plan.sensitivity)) ** 2
    honest = plan.quorum - plan.colluders
    parties = honest * plan.share_sigma2
    assert wanted <= plan.aggregator_sigma2 + parties <= wanted + Fraction(honest + 1, 2**20)
    halves = {"both": wanted / 2, "parties": wanted, "aggregator": Fraction(0)}
    assert halves[plan.noise_by] <= parties <= halves[plan.noise_by] + Fraction(honest, 2**20)
    claimed = plan.multiplier_against_aggregator
    if plan.noise_by == "aggregator":
        assert claimed is None
    else:
        assert claimed is not None
        assert (Fraction(claimed) * Fraction(plan.sensitivity)) ** 2 <= parties
        assert claimed == pytest.approx(plan.noise_multiplier * (math.sqrt(0.5) if plan.noise_by == "both" else 1.0))
    assert plan.multiplier_release == plan.noise_multiplier


def test_half_the_variance_is_not_rounded_up() -> None:
    """z·√½ as floats multiply it is too large by two units in the last place here."""
    plan = plan_noise(noise_by="both", noise_multiplier=5.330078125, sensitivity=100.0, quorum=1, colluders=0)
    claimed = plan.multiplier_against_aggregator
    assert claimed is not None
    assert (Fraction(claimed) * 100) ** 2 <= plan.share_sigma2


def test_a_plan_by_hand() -> None:
    """z = 2, sensitivity 10: variance 400; half from the aggregator, half from 5 - 1 honest parties."""
    plan = plan_noise(noise_by="both", noise_multiplier=2.0, sensitivity=10.0, quorum=5, colluders=1)
    assert plan.honest_shares == 4
    assert plan == NoisePlan(
        noise_by="both",
        noise_multiplier=2.0,
        sensitivity=10.0,
        quorum=5,
        colluders=1,
        aggregator_sigma2=Fraction(200),
        share_sigma2=Fraction(50),
    )


def test_events_say_what_holds_and_against_whom() -> None:
    both = plan_noise(noise_by="both", noise_multiplier=2.0, sensitivity=10.0, quorum=4, colluders=0)
    release = both.event("release", dimension=7, rounds=3)
    assert isinstance(release, NoisySum)
    assert release == NoisySum(noise_multiplier=2.0, rounds=3, tau=release.tau, dimension=7, shares=both.shares)
    against = both.event("aggregator", dimension=7)
    assert isinstance(against, NoisySum)
    assert against.noise_multiplier < 2.0 * math.sqrt(0.5) + 1e-12
    alone = plan_noise(noise_by="aggregator", noise_multiplier=0.01, sensitivity=1.0, quorum=4, colluders=0)
    assert alone.event("release", dimension=7) == NoisySum(noise_multiplier=0.01, dimension=7, shares=alone.shares)
    assert alone.event("aggregator", dimension=7) == NonPrivate(
        unit="party", reason="the aggregator can know the exact sum"
    )


@settings(deadline=None, max_examples=100)
@given(plan=noise_plans())
def test_what_is_left_if_all_others_collude_is_one_share(plan: NoisePlan) -> None:
    own = plan.multiplier_against_all_others
    if plan.noise_by == "aggregator":
        assert own is None
        return
    assert own is not None
    assert (Fraction(own) * Fraction(plan.sensitivity)) ** 2 <= plan.share_sigma2
    parts = 2 if plan.noise_by == "both" else 1
    wanted = plan.noise_multiplier / math.sqrt(parts * plan.honest_shares)
    assert wanted * (1 - 1e-12) <= own <= wanted * (1 + 1e-3)


def test_every_figure_names_what_it_rests_on() -> None:
    plan = plan_noise(noise_by="both", noise_multiplier=4.0, sensitivity=1e4, quorum=5, colluders=1)
    release, aggregator, others = plan.figures(dimension=10, rounds=3, delta=1e-5)
    assert (release.epsilon, aggregator.epsilon) == (
        epsilon([plan.event("release", dimension=10, rounds=3)], delta=1e-5),
        epsilon([plan.event("aggregator", dimension=10, rounds=3)], delta=1e-5),
    )
    assert release.epsilon < aggregator.epsilon < others.epsilon < math.inf
    alone = NoisySum(noise_multiplier=4.0 / math.sqrt(8), rounds=3)  # half the variance, a fourth of that
    assert others.epsilon == pytest.approx(epsilon([alone], delta=1e-5), rel=1e-4)
    for figure, against, words in (
        (release, "whoever sees the release", ("5 contributions", "4 carry", "1 of them", "the aggregator added")),
        (aggregator, "the aggregator", ("5 contributions", "4 carry", "1 of them")),
        (others, "the aggregator and all other parties together", ("own noise share",)),
    ):
        assert (figure.against, figure.delta, figure.unit) == (against, 1e-5, "party")
        assert all(word in figure.assumes for word in words)
    assert "the aggregator added" not in aggregator.assumes


def test_figures_of_sampled_sums_are_of_examples_and_rest_on_secret_samples() -> None:
    plan = plan_noise(noise_by="both", noise_multiplier=1.5, sensitivity=1e4, quorum=4, colluders=0)
    figures = plan.figures(dimension=10, rounds=30, delta=1e-5, sampling_rate=0.02, failure_probability=1e-25)
    for figure, against in zip(figures, ("release", "aggregator", "all_others"), strict=True):
        event = plan.event(
            against,  # type: ignore[arg-type]  # a tuple of three literals
            dimension=10,
            rounds=30,
            sampling_rate=0.02,
            failure_probability=1e-25,
        )
        assert isinstance(event, SampledNoisySum)
        assert (event.sampling_rate, event.rounds, event.failure_probability) == (0.02, 30, 1e-25)
        assert figure.epsilon == epsilon([event], delta=1e-5)
        assert figure.unit == "example"
        assert "secret" in figure.assumes
    assert figures[0].epsilon < figures[1].epsilon < figures[2].epsilon


def test_where_the_aggregator_draws_everything_it_is_trusted_and_that_is_said() -> None:
    plan = plan_noise(noise_by="aggregator", noise_multiplier=4.0, sensitivity=1e4, quorum=5, colluders=0)
    for rate in (None, 0.02):
        release, aggregator, others = plan.figures(dimension=10, rounds=3, delta=1e-5, sampling_rate=rate)
        assert release.epsilon < math.inf
        assert aggregator.epsilon == others.epsilon == math.inf
        assert "trusted" in aggregator.assumes
        assert others.assumes.startswith("nothing")


def test_extra_answers_and_honest_colluders_gain_nothing() -> None:
    """What is claimed is a function of the plan: the cohort and who answered do not enter."""
    plan = plan_noise(noise_by="parties", noise_multiplier=4.0, sensitivity=1e4, quorum=5, colluders=2)
    assert plan.honest_shares == 3
    event = plan.event("release", dimension=10)
    assert isinstance(event, NoisySum)
    assert (Fraction(event.noise_multiplier) * Fraction(plan.sensitivity)) ** 2 <= 3 * plan.share_sigma2


@pytest.mark.parametrize("noise_by", WHO)
def test_no_noise_is_a_plan_that_claims_nothing(noise_by: NoiseBy) -> None:
    plan = plan_noise(noise_by=noise_by, noise_multiplier=0.0, sensitivity=10.0, quorum=3, colluders=0)
    assert plan.aggregator_sigma2 == plan.share_sigma2 == 0
    assert plan.multiplier_release is None
    assert plan.multiplier_against_aggregator is None
    for event in (plan.event("release", dimension=1), plan.event("aggregator", dimension=1)):
        assert event == NonPrivate(unit="party", reason="no noise at party level")
    sampled = plan.event("release", dimension=1, sampling_rate=0.1)
    assert sampled == NonPrivate(unit="example", reason="no noise in the sum")
    for figure in plan.figures(dimension=1, rounds=1, delta=0.1):
        assert (figure.epsilon, figure.assumes) == (math.inf, "nothing: there is no noise")


GOOD: dict[str, object] = {
    "noise_by": "both",
    "noise_multiplier": 1.0,
    "sensitivity": 10.0,
    "quorum": 3,
    "colluders": 0,
}
REJECTED: dict[str, dict[str, object]] = {
    "unknown drawer": {"noise_by": "nobody"},
    "negative multiplier": {"noise_multiplier": -1.0},
    "multiplier not a number": {"noise_multiplier": float("nan")},
    "sensitivity zero": {"sensitivity": 0.0},
    "sensitivity infinite": {"sensitivity": float("inf")},
    "nobody honest": {"colluders": 3},
    "colluders negative": {"colluders": -1},
    "quorum zero": {"quorum": 0},
    "shares too small for the theory": {"sensitivity": 1.0, "noise_multiplier": 0.5},
    "variance too large": {"sensitivity": 2.0**41},
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_plan_that_cannot_hold_is_refused(case: str) -> None:
    plan_noise(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        plan_noise(**{**GOOD, **REJECTED[case]})  # type: ignore[arg-type]


@given(value=st.fractions(0))
@settings(deadline=None, max_examples=50)
def test_rationals_survive_as_text(value: Fraction) -> None:
    assert fraction_from_json(fraction_to_json(value)) == value


@pytest.mark.parametrize(
    "text", ["", "1", "1/0", "2/4", "-1/2", "1/-2", "01/2", "1/2/3", " 1/2", "a/b", "0/5", "1.0/2"]
)
def test_other_spellings_of_a_rational_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        fraction_from_json(text)
