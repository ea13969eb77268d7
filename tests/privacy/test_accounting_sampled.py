"""Sampled integer noise: what docs/accounting.md argues, held against exact mass functions.

Each law below is computed from the mass function itself, on so wide a window that what is cut is below 1e-30, and knows
nothing of the formulas that it is compared with.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.privacy.accounting import SAMPLED_TAU_FACTOR, calibrate_sampled_sum, epsilon, to_dp_event
from src.privacy.events import DpSgdSteps, Event, NoisySum, SampledNoisySum
from src.privacy.noise import sum_divergence
from src.privacy.noise_plan import plan_noise

Law = NDArray[np.float64]


def law_of(sigma2: float, *, shift: int = 0, reach: int = 80) -> Law:
    """ln P(z), z = -reach … reach, of the discrete Gaussian around `shift`."""
    z = np.arange(-reach, reach + 1, dtype=np.float64) - shift
    logs = -(z**2) / (2 * sigma2)
    return np.asarray(logs - np.logaddexp.reduce(-(np.arange(-400.0, 401.0) ** 2) / (2 * sigma2)))


def sum_law(parts: list[float], *, shift: int = 0, reach: int = 80) -> Law:
    """ln of the mass function of a sum of independent discrete Gaussians, around `shift`."""

    def add(one: Law, other: Law) -> Law:
        table = np.stack([one + other[2 * reach + z - np.arange(-reach, reach + 1)] for z in range(-reach, reach + 1)])
        return np.asarray(np.logaddexp.reduce(table, axis=1))

    first = law_of(parts[0], reach=reach)
    logs = reduce(lambda whole, part: add(whole, law_of(part, reach=2 * reach)), parts[1:], first)
    shifted = np.full_like(logs, -np.inf)
    shifted[max(shift, 0) :] = logs[: logs.size - shift]
    return shifted


def mixed(rate: float, without: Law, added: Law) -> Law:
    return np.asarray(np.logaddexp(math.log1p(-rate) + without, math.log(rate) + added))


def divergence(p: Law, q: Law, order: float) -> float:
    """Rényi divergence of order α, over the part of the window where both are known."""
    known = np.isfinite(p) & np.isfinite(q)
    return float(np.logaddexp.reduce(order * p[known] + (1 - order) * q[known])) / (order - 1)


def binomial_bound(rate: float, multiplier: float, order: int) -> float:
    """Mironov, Talwar & Zhang 2019: ln Σ C(α,j)(1-q)^(α-j) q^j exp((j²-j)/(2z²)) / (α-1), from exact coefficients."""
    terms = [
        math.log(math.comb(order, j))
        + (order - j) * math.log1p(-rate)
        + j * math.log(rate)
        + (j * j - j) / (2 * multiplier**2)
        for j in range(order + 1)
    ]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


@pytest.mark.parametrize("sigma2", [0.09, 0.25, 0.7, 1.0, 4.0])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_moments_of_the_likelihood_ratio_are_those_of_the_continuous_gaussian(sigma2: float, shift: int) -> None:
    """E[(p(x - s)/p(x))^k] = exp((k² - k)s²/(2σ²)) for integers k and s: to the last digit, however small σ."""
    without, added = law_of(sigma2), law_of(sigma2, shift=shift)
    for power in range(9):
        moment = float(np.logaddexp.reduce(power * added + (1 - power) * without))
        assert moment == pytest.approx((power**2 - power) * shift**2 / (2 * sigma2), rel=1e-9, abs=1e-9)


def test_at_orders_that_are_not_integers_it_is_another_law() -> None:
    """Why integer orders: in between, the moments of a narrow discrete Gaussian are not those of the continuous one."""
    without, added = law_of(0.09), law_of(0.09, shift=1)
    moment = float(np.logaddexp.reduce(2.5 * added - 1.5 * without))
    assert abs(moment - (2.5**2 - 2.5) / (2 * 0.09)) > 0.1


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.8])
@pytest.mark.parametrize("sigma2", [0.25, 1.0, 6.0])
def test_one_example_more_costs_the_binomial_sum_and_one_less_no_more(rate: float, sigma2: float) -> None:
    for shift in (1, 2):
        without = law_of(sigma2)
        with_it = mixed(rate, without, law_of(sigma2, shift=shift))
        for order in (2, 3, 5, 8):
            bound = binomial_bound(rate, math.sqrt(sigma2) / shift, order)
            assert divergence(with_it, without, order) == pytest.approx(bound, rel=1e-9, abs=1e-12)
            assert divergence(without, with_it, order) <= bound * (1 + 1e-9) + 1e-12


def test_a_shorter_change_never_costs_more() -> None:
    """The bound grows with q and with s/σ, so the largest of each may stand for all."""
    for order in (2, 7, 33):
        costs = [binomial_bound(rate, z, order) for rate in (0.01, 0.1, 0.9) for z in (9.0, 3.0, 1.0)]
        assert costs[:3] == sorted(costs[:3])
        assert costs[::3] == sorted(costs[::3])


SHARES = [([0.25] * 2), ([0.25] * 4), ([0.5, 0.25, 0.25]), ([0.5] * 3), ([1.0] * 2)]


@pytest.mark.parametrize("parts", SHARES, ids=str)
def test_a_sum_of_shares_is_pointwise_within_half_tau_of_one_draw(parts: list[float]) -> None:
    tau = sum_divergence(Fraction(parts[-1]), len(parts) - 1, other_sigma2=Fraction(parts[0]))
    ratio = np.abs(sum_law(parts, reach=40) - law_of(sum(parts), reach=40))
    assert 0.0 < float(ratio.max()) <= tau / 2


@pytest.mark.parametrize("parts", SHARES, ids=str)
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_a_sampled_sum_of_shares_costs_what_is_charged_for_it(parts: list[float], rate: float) -> None:
    """Both directions, at shares so small that τ matters."""
    tau = sum_divergence(Fraction(parts[-1]), len(parts) - 1, other_sigma2=Fraction(parts[0]))
    without = sum_law(parts)
    with_it = mixed(rate, without, sum_law(parts, shift=1))
    for order in (2, 3, 6):
        charged = binomial_bound(rate, math.sqrt(sum(parts)), order) + SAMPLED_TAU_FACTOR * tau
        assert divergence(with_it, without, order) <= charged
        assert divergence(without, with_it, order) <= charged


def hockey_stick(p: Law, q: Law, value: float) -> float:
    """Smallest δ with P ≤ e^ε·Q + δ, summed over the window."""
    return float(np.maximum(np.exp(p) - np.exp(value + q), 0.0).sum())


@pytest.mark.parametrize(("sigma2", "rate", "rounds"), [(1.0, 0.2, 1), (0.5, 0.5, 3), (4.0, 0.1, 3), (2.0, 0.9, 2)])
def test_the_true_delta_at_the_claimed_epsilon_is_within_delta(sigma2: float, rate: float, rounds: int) -> None:
    """The slow oracle: all outcomes of all rounds, enumerated, in both directions."""
    delta, reach = 1e-4, 30
    claimed = epsilon(
        [SampledNoisySum(sampling_rate=rate, noise_multiplier=math.sqrt(sigma2), rounds=rounds)], delta=delta
    )
    one = law_of(sigma2, reach=reach)
    other = mixed(rate, one, law_of(sigma2, shift=1, reach=reach))

    def product(law: Law) -> Law:
        return reduce(lambda whole, part: np.add.outer(whole, part).ravel(), [law] * (rounds - 1), law)

    p, q = product(one), product(other)
    assert 0.0 < max(hockey_stick(p, q, claimed), hockey_stick(q, p, claimed)) <= delta


@pytest.mark.parametrize(("sigma2", "rate", "unsampled"), [(1.0, 0.2, 0.2), (0.25, 0.02, 0.3), (0.5, 0.01, 0.4)])
def test_the_true_delta_of_a_mixture_is_within_delta_at_fractional_orders(
    sigma2: float, rate: float, unsampled: float
) -> None:
    """A sampled sum beside one that is not sampled, and whose best order lies between 1 and 3."""
    delta, reach = 1e-4, 30
    sampled = SampledNoisySum(sampling_rate=rate, noise_multiplier=math.sqrt(sigma2))
    plain = SampledNoisySum(sampling_rate=1.0, noise_multiplier=unsampled)
    claimed = epsilon([sampled, plain], delta=delta)
    one = law_of(sigma2, reach=reach)
    p = np.add.outer(one, law_of(unsampled**2, reach=reach))
    with_it = mixed(rate, one, law_of(sigma2, shift=1, reach=reach))
    q = np.add.outer(with_it, law_of(unsampled**2, shift=1, reach=reach))
    assert 0.0 < max(hockey_stick(p, q, claimed), hockey_stick(q, p, claimed)) <= delta


INTEGERS = [float(order) for order in range(2, 65)]
SAMPLED = st.builds(
    SampledNoisySum,
    sampling_rate=st.sampled_from([0.001, 0.02, 0.3]),
    noise_multiplier=st.sampled_from([0.7, 1.1, 3.0]),
    rounds=st.integers(1, 300),
)


@settings(deadline=None, max_examples=10)
@given(events=st.lists(SAMPLED, min_size=1, max_size=4), delta=st.sampled_from([1e-5, 1e-8]))
def test_sampled_sums_cost_what_dp_accounting_says_at_integer_orders(
    events: list[SampledNoisySum], delta: float
) -> None:
    """Here never more than with the orders 2 … 64, and never less than with all orders up to 1024."""
    few = RdpAccountant(orders=INTEGERS)
    for event in events:
        few.compose(to_dp_event(event))
    ours = epsilon(events, delta=delta)
    assert ours <= few.get_epsilon(delta) * (1 + 1e-12)
    oracle = min(
        sum(event.rounds * binomial_bound(event.sampling_rate, event.noise_multiplier, order) for event in events)
        + math.log1p(-1 / order)
        - math.log(delta * order) / (order - 1)
        for order in (*range(2, 65), *(round(64 * 2 ** (step / 8)) for step in range(33)))
    )
    assert ours == pytest.approx(max(0.0, oracle), rel=1e-9, abs=1e-12)


def test_the_known_answer_holds_for_integer_noise_at_the_best_integer_order() -> None:
    """q = 256/60000, z = 1.1, 14 062 rounds, δ = 1e-5: 2.596556 at order 7.7, and 2.596981 at order 8."""
    event = SampledNoisySum(sampling_rate=256 / 60000, noise_multiplier=1.1, rounds=14_062)
    assert epsilon([event], delta=1e-5) == pytest.approx(2.596981, abs=5e-7)


@settings(deadline=None, max_examples=10)
@given(events=st.lists(SAMPLED, min_size=1, max_size=3), more=SAMPLED, steps=st.booleans())
def test_more_of_anything_never_costs_less(events: list[Event], more: SampledNoisySum, steps: bool) -> None:
    """Mixed with DP-SGD too, whose bounds are at other orders."""
    added: Event = more
    if steps:
        added = DpSgdSteps(sampling_rate=more.sampling_rate, noise_multiplier=more.noise_multiplier, steps=more.rounds)
    before = epsilon(events, delta=1e-6)
    after = epsilon([*events, added], delta=1e-6)
    assert after >= before
    assert epsilon([added, *events], delta=1e-6) == after


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.8])
@pytest.mark.parametrize("sigma2", [0.09, 0.25, 1.0, 6.0])
def test_between_whole_orders_it_costs_no_more_than_at_the_next(rate: float, sigma2: float) -> None:
    """Both directions; narrow noise too, for which no formula is known there."""
    without = law_of(sigma2)
    with_it = mixed(rate, without, law_of(sigma2, shift=1))
    for order in (1.01, 1.3, 1.9, 2.1, 2.5, 3.7, 6.2):
        charged = binomial_bound(rate, math.sqrt(sigma2), max(2, math.ceil(order))) * (1 + 1e-9) + 1e-12
        assert divergence(with_it, without, order) <= charged
        assert divergence(without, with_it, order) <= charged


@pytest.mark.parametrize(("rate", "multiplier", "excess"), [(0.02, 0.8, 2e-4), (0.3, 2.0, 0.009), (0.6, 8.0, 0.039)])
def test_fractional_orders_of_dp_sgd_are_never_too_low_and_sometimes_too_high(
    rate: float, multiplier: float, excess: float
) -> None:
    """By quadrature: dp-accounting adds absolute values where its series alternates."""
    orders = [1.1, 1.3, 1.5, 1.8, 2.0, 2.5, 3.0]
    accountant = RdpAccountant(orders=orders)
    accountant.compose(to_dp_event(DpSgdSteps(sampling_rate=rate, noise_multiplier=multiplier, steps=1)))
    x, step = np.linspace(-12 * multiplier, 12 * multiplier + 1, 100_001, retstep=True)
    without = -(x**2) / (2 * multiplier**2) - math.log(multiplier * math.sqrt(2 * math.pi)) + math.log(step)
    with_it = mixed(rate, without, without + (x - 0.5) / multiplier**2)
    above = [found - divergence(with_it, without, order) for found, order in zip(accountant.rdp, orders, strict=True)]
    assert min(above) > -1e-10
    assert max(value for value in above if math.isfinite(value)) == pytest.approx(excess, rel=0.1)


def test_where_an_order_is_overestimated_a_higher_one_is_charged() -> None:
    """Steps at q = 0.6 beside a sum whose best order is below 2: by dp-accounting's values there, ε would be 69.5."""
    steps = DpSgdSteps(sampling_rate=0.6, noise_multiplier=8.0, steps=300)
    plain = SampledNoisySum(sampling_rate=1.0, noise_multiplier=0.13)
    assert epsilon([steps, plain], delta=1e-5) == pytest.approx(66.456, rel=1e-5)


WHOLE = sorted({*range(2, 64), 128, 256, 512, 1024})
MIXED = st.lists(
    st.one_of(
        SAMPLED,
        st.builds(SampledNoisySum, sampling_rate=st.just(1.0), noise_multiplier=st.floats(0.1, 20)),
        st.builds(
            DpSgdSteps,
            sampling_rate=st.sampled_from([0.02, 0.3, 1.0]),
            noise_multiplier=st.sampled_from([0.4, 0.8, 2.0]),
            steps=st.integers(1, 60),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=15)
@given(events=MIXED, delta=st.sampled_from([1e-5, 1e-8]))
def test_a_mixture_never_costs_more_than_at_whole_orders_nor_less_than_a_part(
    events: list[Event], delta: float
) -> None:
    """At the whole orders that every kind of event is bounded at, dp-accounting says what they cost together."""
    whole = RdpAccountant(orders=WHOLE)
    for event in events:
        whole.compose(to_dp_event(event))
    ours = epsilon(events, delta=delta)
    assert ours <= whole.get_epsilon(delta) * (1 + 1e-12)
    kinds = {(type(event), isinstance(event, SampledNoisySum) and event.sampling_rate < 1.0) for event in events}
    for kind, sampled in kinds:
        part = [
            event
            for event in events
            if type(event) is kind and (isinstance(event, SampledNoisySum) and event.sampling_rate < 1.0) == sampled
        ]
        assert ours >= epsilon(part, delta=delta)


FEW_SUMS = SampledNoisySum(sampling_rate=0.01, noise_multiplier=1.5, rounds=50)


@pytest.mark.parametrize(
    ("sums", "other", "before", "after"),
    [
        (SampledNoisySum(sampling_rate=0.02, noise_multiplier=1.1, rounds=300), (0.05, 0.8, 60), 6.2270, 5.9330),
        (FEW_SUMS, (1.0, 0.25, 4), 74.129, 68.627),
        (FEW_SUMS, (0.3, 0.3, 20), 184.196, 105.295),
    ],
    ids=["a short fedavg job", "full batches near 70", "sampled batches near 105"],
)
def test_a_sampled_sum_leaves_other_events_their_fractional_orders(
    sums: SampledNoisySum, other: tuple[float, float, int], before: float, after: float
) -> None:
    """What whole orders alone would charge, and what is charged."""
    rate, multiplier, count = other
    steps = DpSgdSteps(sampling_rate=rate, noise_multiplier=multiplier, steps=count)
    whole = RdpAccountant(orders=WHOLE)
    for event in (sums, steps):
        whole.compose(to_dp_event(event))
    assert whole.get_epsilon(1e-5) == pytest.approx(before, rel=1e-5)
    together = epsilon([sums, steps], delta=1e-5)
    assert together == pytest.approx(after, rel=1e-5)
    assert together - epsilon([steps], delta=1e-5) <= epsilon([sums], delta=1e-5)


def test_rounds_split_over_jobs_and_restarts_cost_the_same_to_the_last_bit() -> None:
    whole = SampledNoisySum(sampling_rate=0.02, noise_multiplier=1.3, rounds=120, tau=1e-7, dimension=10)
    parts = [SampledNoisySum(sampling_rate=0.02, noise_multiplier=1.3, tau=1e-7, dimension=10)] * 120
    assert epsilon(parts, delta=1e-6) == epsilon([whole], delta=1e-6)


def test_tau_is_paid_for_in_every_round() -> None:
    free = SampledNoisySum(sampling_rate=0.02, noise_multiplier=1.3, rounds=50)
    paid = SampledNoisySum(sampling_rate=0.02, noise_multiplier=1.3, rounds=50, tau=1e-4, dimension=10)
    difference = epsilon([paid], delta=1e-6) - epsilon([free], delta=1e-6)
    assert difference == pytest.approx(50 * 1.5 * 1e-3, rel=1e-9)


def test_without_sampling_it_is_a_noisy_sum_and_adds_up_in_closed_form() -> None:
    """3 rounds at z = 3 and 4 steps of full-batch DP-SGD at z = 2 are one release at z = (1/3 + 1)^(-1/2)."""
    sums = SampledNoisySum(sampling_rate=1.0, noise_multiplier=3.0, rounds=3)
    steps = DpSgdSteps(sampling_rate=1.0, noise_multiplier=2.0, steps=4)
    one = DpSgdSteps(sampling_rate=1.0, noise_multiplier=(1 / 3 + 1) ** -0.5, steps=1)
    assert epsilon([sums, steps], delta=1e-6) == pytest.approx(epsilon([one], delta=1e-6), rel=1e-12)
    summed = NoisySum(noise_multiplier=3.0, rounds=3, tau=1e-3, dimension=4)
    same = SampledNoisySum(sampling_rate=1.0, noise_multiplier=3.0, rounds=3, tau=1e-3, dimension=4)
    assert epsilon([same], delta=1e-6) == epsilon([summed], delta=1e-6)


def test_failures_of_sampled_sums_are_taken_from_delta() -> None:
    plain = SampledNoisySum(sampling_rate=0.05, noise_multiplier=1.5, rounds=8)
    failing = SampledNoisySum(sampling_rate=0.05, noise_multiplier=1.5, rounds=8, failure_probability=1e-9)
    cost = epsilon([failing], delta=1e-6)
    left = 1e-6 - (1 + math.exp(cost)) * 8e-9
    assert cost == pytest.approx(epsilon([plain], delta=left), rel=1e-6)
    too_often = SampledNoisySum(sampling_rate=0.05, noise_multiplier=1.5, rounds=8, failure_probability=1e-7)
    assert epsilon([too_often], delta=1e-6) == math.inf


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_a_calibrated_sum_stays_within_the_target_and_is_tight(target: float) -> None:
    found = calibrate_sampled_sum(
        epsilon=target, delta=1e-5, sampling_rate=0.02, rounds=200, dimension=10, tau_of=None, failure_probability=1e-20
    )
    assert found == round(found, 4)

    def cost(multiplier: float) -> float:
        event = SampledNoisySum(
            sampling_rate=0.02, noise_multiplier=multiplier, rounds=200, dimension=10, failure_probability=1e-20
        )
        return epsilon([event], delta=1e-5)

    assert cost(found) <= target < cost(round(found - 1e-4, 4))


def test_calibration_minds_the_shares_that_the_noise_comes_in() -> None:
    """Coarse integers: where shares would be too narrow for theory, or τ costs too much, more noise is asked for."""

    def tau_of(multiplier: float) -> float:
        plan = plan_noise(noise_by="parties", noise_multiplier=multiplier, sensitivity=1.0, quorum=8, colluders=0)
        event = plan.event("release", dimension=5, sampling_rate=0.02)
        assert isinstance(event, SampledNoisySum)
        return event.tau

    def calibrated(tau: object) -> float:
        return calibrate_sampled_sum(
            epsilon=4.0, delta=1e-5, sampling_rate=0.02, rounds=20, dimension=5, tau_of=tau_of if tau else None
        )

    whole, shared = calibrated(None), calibrated(tau_of)
    assert shared > max(whole, math.sqrt(8 / 4))
    event = SampledNoisySum(sampling_rate=0.02, noise_multiplier=shared, rounds=20, tau=tau_of(shared), dimension=5)
    assert epsilon([event], delta=1e-5) <= 4.0


def test_what_cannot_be_calibrated_is_refused() -> None:
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput):
            calibrate_sampled_sum(epsilon=target, delta=1e-5, sampling_rate=0.1, rounds=10, dimension=1, tau_of=None)
    with pytest.raises(InvalidInput):
        calibrate_sampled_sum(
            epsilon=1.0, delta=1e-5, sampling_rate=0.1, rounds=10, dimension=10, tau_of=lambda _multiplier: 1.0
        )
