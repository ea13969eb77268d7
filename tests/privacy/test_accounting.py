"""ε: the known answers, the same as dp-accounting's, closed forms, and calibration that is safe and tight."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import dp_accounting as dp
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput
from src.privacy.accounting import (
    calibrate_dp_sgd,
    check_dp_sgd,
    epsilon,
    epsilon_estimates,
    merged,
    to_dp_event,
)
from src.privacy.events import DpSgdSteps, Event, NoisySum, NonPrivate, SampledNoisySum, Shares


def test_the_known_answer_of_dp_sgd() -> None:
    """q = 256/60000, σ = 1.1, 14 062 steps, δ = 1e-5: dp-accounting and Opacus (RDP) give 2.596556."""
    event = DpSgdSteps(sampling_rate=256 / 60000, noise_multiplier=1.1, steps=14_062)
    assert epsilon([event], delta=1e-5) == pytest.approx(2.596556, abs=5e-7)


PUBLISHED = DpSgdSteps(sampling_rate=256 / 60000, noise_multiplier=1.1, steps=14_062)


def test_the_known_answer_of_the_privacy_loss_distribution_stands_beside_it() -> None:
    """2.3817 by PLD with an interval of 1e-4; the central-limit accountant's 2.324, which is too small, nowhere."""
    charged, tighter = epsilon_estimates([PUBLISHED], delta=1e-5)
    assert charged.epsilon == pytest.approx(2.596556, abs=5e-7)
    assert charged.epsilon == epsilon([PUBLISHED], delta=1e-5)
    assert tighter.epsilon == pytest.approx(2.3817, abs=5e-5)
    assert (charged.standing, tighter.standing) == ("bound", "bound")
    assert "continuous" in tighter.note


@pytest.mark.parametrize(
    "event",
    [
        NoisySum(noise_multiplier=1.0, rounds=3),
        SampledNoisySum(sampling_rate=0.1, noise_multiplier=1.0, rounds=3),
        SampledNoisySum(sampling_rate=1.0, noise_multiplier=1.0, rounds=3, failure_probability=1e-12),
    ],
    ids=lambda event: f"{event.type}",
)
def test_beside_discrete_noise_a_privacy_loss_distribution_is_called_an_estimate(event: Event) -> None:
    charged, tighter = epsilon_estimates([event], delta=1e-5)
    assert (charged.standing, tighter.standing) == ("bound", "estimate")
    assert tighter.epsilon is not None
    assert charged.epsilon is not None
    assert 0.0 < tighter.epsilon < charged.epsilon


def test_why_it_is_an_estimate() -> None:
    """At its ε the true δ of discrete noise, from the mass function, is 1.6 times what was asked for at σ = 1; at the ε
    that is charged it never is."""

    def true_delta(sigma: float, value: float) -> float:
        weights = {z: math.exp(-(z**2) / (2 * sigma**2)) for z in range(-400, 401)}
        excess = (weight * max(0.0, -math.expm1(value - (1 - 2 * z) / (2 * sigma**2))) for z, weight in weights.items())
        return math.fsum(excess) / math.fsum(weights.values())

    for sigma, factor in ((1.0, 1.65), (8.0, 1.02)):
        charged, tighter = epsilon_estimates([NoisySum(noise_multiplier=sigma)], delta=1e-5)
        assert charged.epsilon is not None
        assert tighter.epsilon is not None
        assert true_delta(sigma, tighter.epsilon) == pytest.approx(factor * 1e-5, rel=0.02)
        assert true_delta(sigma, charged.epsilon) <= 1e-5


def test_a_privacy_loss_distribution_is_not_computed_where_it_takes_minutes() -> None:
    """20 rounds at z = 0.1: 36 seconds and 4.7 GB, for an ε of 1 200."""
    charged, tighter = epsilon_estimates([NoisySum(noise_multiplier=0.1, rounds=20)], delta=1e-5)
    assert charged.epsilon == pytest.approx(1200, rel=0.02)
    assert (tighter.standing, tighter.epsilon) == ("skipped", None)
    assert epsilon_estimates([NonPrivate(unit="party", reason="x")], delta=1e-5)[1].standing == "skipped"
    assert [each.epsilon for each in epsilon_estimates([], delta=1e-5)] == [0.0, 0.0]


def test_nor_of_more_releases_than_it_ends_with() -> None:
    """A ledger may hold 2⁵³; whoever asks for estimates gets the bound at once, and why there is no more."""
    begun = time.process_time()
    bound, other = epsilon_estimates([DpSgdSteps(sampling_rate=1e-6, noise_multiplier=1.0, steps=2**53)], delta=1e-5)
    assert time.process_time() - begun < 20.0
    assert bound.epsilon is not None
    assert (other.epsilon, other.standing, other.note) == (
        None,
        "skipped",
        "not computed: more than 1048576 sampled releases",
    )


def test_many_small_releases_are_one_to_a_privacy_loss_distribution() -> None:
    """1 000 rounds at z = 40 and one at z = 2 are one at z = (1000/1600 + 1/4)^(-1/2)."""
    many: list[Event] = [NoisySum(noise_multiplier=40.0, rounds=1000), NoisySum(noise_multiplier=2.0)]
    one: list[Event] = [NoisySum(noise_multiplier=(1000 / 1600 + 1 / 4) ** -0.5)]
    seen, wanted = epsilon_estimates(many, delta=1e-6)[1], epsilon_estimates(one, delta=1e-6)[1]
    assert seen.epsilon == pytest.approx(wanted.epsilon, rel=1e-9)


def test_epsilon_at_another_delta_comes_from_the_events() -> None:
    """It falls as δ grows, and at each δ it is what dp-accounting says there of the same events."""
    deltas = [1e-4, 1e-6, 1e-9]
    events: list[Event] = [PUBLISHED, DpSgdSteps(sampling_rate=1.0, noise_multiplier=30.0, steps=7)]
    found = [epsilon(events, delta=delta) for delta in deltas]
    accountant = RdpAccountant()
    for event in events:
        accountant.compose(to_dp_event(event))
    assert found == sorted(found)
    assert found == pytest.approx([accountant.get_epsilon(delta) for delta in deltas], rel=1e-9)


REALS = st.floats(0, 1e300, allow_subnormal=True)
COUNTS = st.integers(1, 2**53)


@settings(deadline=None, max_examples=25)
@given(
    event=st.one_of(
        st.builds(DpSgdSteps, sampling_rate=st.floats(1e-300, 1.0), noise_multiplier=REALS, steps=COUNTS),
        st.builds(NoisySum, noise_multiplier=REALS, rounds=COUNTS, tau=REALS, dimension=COUNTS),
        st.builds(
            SampledNoisySum,
            sampling_rate=st.floats(1e-300, 1.0),
            noise_multiplier=REALS,
            rounds=COUNTS,
            tau=REALS,
            dimension=COUNTS,
        ),
    )
)
def test_every_event_that_a_ledger_can_hold_has_an_epsilon(event: Event) -> None:
    """The most extreme ones too: a number or infinity, and no error."""
    assert epsilon([event], delta=1e-5) >= 0.0
    to_dp_event(event)


STEPS = st.builds(
    DpSgdSteps,
    sampling_rate=st.sampled_from([0.001, 0.02, 0.1, 1.0]),
    noise_multiplier=st.sampled_from([0.8, 1.3, 4.0]),
    steps=st.integers(1, 500),
)
SUMS = st.builds(NoisySum, noise_multiplier=st.floats(0.05, 50), rounds=st.integers(1, 30))


@settings(deadline=None, max_examples=10)
@given(events=st.lists(STEPS, min_size=1, max_size=4), delta=st.sampled_from([1e-5, 1e-8]))
def test_dp_sgd_costs_what_dp_accounting_says(events: list[DpSgdSteps], delta: float) -> None:
    accountant = RdpAccountant()
    for event in events:
        sampled = dp.PoissonSampledDpEvent(event.sampling_rate, dp.GaussianDpEvent(event.noise_multiplier))
        accountant.compose(dp.SelfComposedDpEvent(sampled, event.steps))
    assert epsilon(events, delta=delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(events=st.lists(SUMS, min_size=1, max_size=5))
def test_noisy_sums_cost_what_dp_accounting_says_for_one_gaussian(events: list[NoisySum]) -> None:
    """1/z² adds, so the composition is one Gaussian; a finer grid of orders may only lower ε, and hardly does."""
    combined = 1 / math.sqrt(sum(event.rounds / event.noise_multiplier**2 for event in events))
    ours = epsilon(events, delta=1e-6)
    coarse = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL)
    coarse.compose(dp.GaussianDpEvent(combined))
    assert ours <= coarse.get_epsilon(1e-6) * (1 + 2e-3) + 1e-9
    rho = 1 / (2 * combined**2)
    finest = min(
        rho * order + math.log1p(-1 / order) - math.log(1e-6 * order) / (order - 1)
        for order in (1 + 10 ** (exponent / 400) for exponent in range(-780, 2_400))
    )
    assert ours == pytest.approx(max(0.0, finest), rel=2e-3, abs=1e-6)


def test_party_level_at_the_noise_of_small_federations() -> None:
    """20 rounds at z = 0.1 cost about 1 200, at z = 0.3 about 180."""
    assert epsilon([NoisySum(noise_multiplier=0.1, rounds=20)], delta=1e-5) == pytest.approx(1200, rel=0.02)
    assert epsilon([NoisySum(noise_multiplier=0.3, rounds=20)], delta=1e-5) == pytest.approx(180, rel=0.02)


@settings(deadline=None, max_examples=15)
@given(events=st.lists(SUMS, min_size=1, max_size=6), data=st.data())
def test_neither_order_nor_splitting_changes_a_bit_of_epsilon(events: list[NoisySum], data: st.DataObject) -> None:
    whole = epsilon(events, delta=1e-6)
    split: list[Event] = [
        one for event in events for one in [NoisySum(noise_multiplier=event.noise_multiplier)] * event.rounds
    ]
    assert epsilon(data.draw(st.permutations(split)), delta=1e-6) == whole


def test_merging_counts_equal_mechanisms_together() -> None:
    steps = DpSgdSteps(sampling_rate=0.1, noise_multiplier=1.0, steps=3)
    other = DpSgdSteps(sampling_rate=0.1, noise_multiplier=2.0, steps=5)
    assert merged([steps, other, steps]) == [steps.repeated(2), other]
    shares = [Shares(noise_by="both", quorum=3, colluders=0, share_multiplier=z, shares_tau=0.0) for z in (0.4, 0.41)]
    rounds = [NoisySum(noise_multiplier=1.0, shares=each) for each in shares]  # as a clipping norm that moves has it
    assert merged(rounds) == [NoisySum(noise_multiplier=1.0, rounds=2)]


@settings(deadline=None, max_examples=15)
@given(events=st.lists(SUMS, min_size=1, max_size=4), more=SUMS)
def test_more_events_and_a_smaller_delta_never_cost_less(events: list[NoisySum], more: NoisySum) -> None:
    before = epsilon(events, delta=1e-6)
    assert epsilon([*events, more], delta=1e-6) >= before
    assert epsilon(events, delta=1e-9) >= before


def test_the_divergence_of_summed_shares_is_paid_for() -> None:
    """Both forms of the bound: at α = 2 the smaller of τd and the stretched sensitivity is charged."""
    plain = epsilon([NoisySum(noise_multiplier=1.0)], delta=1e-6)
    previous = plain
    for tau in (1e-9, 1e-6, 1e-3, 1e-1):
        cost = epsilon([NoisySum(noise_multiplier=1.0, tau=tau, dimension=100)], delta=1e-6)
        assert previous < cost <= plain + tau * 100 + 1e-9
        previous = cost


def test_failure_terms_are_taken_from_delta() -> None:
    delta, failure = 1e-6, 1e-11
    with_failure = NoisySum(noise_multiplier=2.0, rounds=4, failure_probability=failure)
    without = NoisySum(noise_multiplier=2.0, rounds=4)
    cost = epsilon([with_failure], delta=delta)
    assert cost > epsilon([without], delta=delta)
    remaining = delta - (1 + math.exp(cost)) * 4 * failure
    assert epsilon([without], delta=remaining) <= cost
    assert cost == pytest.approx(epsilon([without], delta=remaining), rel=1e-6)
    too_much = NoisySum(noise_multiplier=2.0, rounds=4, failure_probability=1e-6)
    assert epsilon([too_much], delta=delta) == math.inf


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], delta=1e-6) == 0.0
    for event in (
        NoisySum(noise_multiplier=0.0),
        DpSgdSteps(sampling_rate=0.1, noise_multiplier=0.0, steps=1),
        NonPrivate(unit="party", reason="no noise"),
    ):
        assert epsilon([event], delta=1e-6) == math.inf
    assert epsilon([NoisySum(noise_multiplier=9.0), NonPrivate(unit="party", reason="x")], delta=1e-6) == math.inf


def test_guarantees_of_different_units_are_never_added() -> None:
    with pytest.raises(InvalidInput):
        epsilon(
            [NoisySum(noise_multiplier=1.0), DpSgdSteps(sampling_rate=0.1, noise_multiplier=1.0, steps=1)], delta=0.1
        )


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(InvalidInput):
        epsilon([], delta=delta)


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(0.5, 0.02, 300), (8.0, 256 / 20_000, 1_500), (60.0, 0.05, 100), (2.0, 1.0, 10)]
)
def test_a_calibrated_multiplier_stays_within_the_target_and_is_tight(target: float, rate: float, steps: int) -> None:
    found = calibrate_dp_sgd(epsilon=target, delta=1e-5, sampling_rate=rate, steps=steps)
    assert found == round(found, 4)

    def cost(multiplier: float) -> float:
        return epsilon([DpSgdSteps(sampling_rate=rate, noise_multiplier=multiplier, steps=steps)], delta=1e-5)

    assert cost(found) <= target < cost(round(found - 1e-4, 4))


def test_calibration_refuses_what_cannot_be_reached() -> None:
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput):
            calibrate_dp_sgd(epsilon=target, delta=1e-5, sampling_rate=0.1, steps=10)
    with pytest.raises(InvalidInput):
        calibrate_dp_sgd(epsilon=1e-9, delta=1e-300, sampling_rate=1.0, steps=2**50)


def test_dp_accounting_is_imported_late() -> None:
    """It takes most of a second, which `--help` and a refused configuration must not wait for."""
    code = "import sys, src.privacy.accounting, src.privacy.budget; sys.exit('dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("epsilon_target", "sampling_rate", "steps"), [(1.0, 0.1, 100), (0.05, 0.1, 10), (8.0, 1.0, 1)]
)
def test_a_target_that_calibration_reaches_passes_the_quick_check(
    epsilon_target: float, sampling_rate: float, steps: int
) -> None:
    check_dp_sgd(epsilon=epsilon_target, delta=1e-5, sampling_rate=sampling_rate, steps=steps)
    calibrate_dp_sgd(epsilon=epsilon_target, delta=1e-5, sampling_rate=sampling_rate, steps=steps)


def test_a_target_beyond_every_noise_fails_the_quick_check_as_it_fails_calibration() -> None:
    for reach in (check_dp_sgd, calibrate_dp_sgd):
        with pytest.raises(InvalidInput, match="no noise multiplier"):
            reach(epsilon=1e-6, delta=1e-9, sampling_rate=1.0, steps=1_000_000)
