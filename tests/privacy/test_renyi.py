"""Divergences that are small, or of a large order: held against exact sums, an integral, and a release's true δ."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput
from src.privacy.accounting import calibrate_dp_sgd, calibrate_sampled_sum, check_dp_sgd, epsilon
from src.privacy.events import DpSgdSteps, Event, SampledNoisySum
from src.privacy.renyi import loses_digits, sampled_gaussian


def exact_moment(rate: float, multiplier: float, order: int) -> float:
    """ln Σ_j C(k,j)(1-q)^(k-j) q^j e^(c_j), c_j = (j²-j)/2z²: rationals, and e^c_j - 1 from its series, where that is
    short. The slow oracle: it knows no logarithm of a binomial, and leaves no term out."""
    q, square = Fraction(rate), Fraction(multiplier) ** 2
    total, mass = 0.0, (1 - q) ** order
    for place in range(order + 1):
        exponent = (place * place - place) / (2 * square)
        total += float(mass * Fraction(math.expm1(float(exponent))))
        mass *= Fraction(order - place, place + 1) * q / (1 - q)
        mass = Fraction(int(mass * (1 << 5000)), 1 << 5000)  # 1 500 digits: exact would have as many as the order
    return math.log1p(total)


def integral_moment(rate: float, multiplier: float, order: float) -> float:
    """ln E[(1 - q + q·e^((2x-1)/2z²))^α] over x ~ N(0, z²), by quadrature: another formula, for any α."""
    span = np.linspace(-14.0, 14.0, 400_001) * multiplier
    # The power moves the weight of x by up to α: the window covers both ends.
    x = np.concatenate((span, np.linspace(span[-1], span[-1] + 3.0 * order, 200_001)[1:]))
    log_power = order * np.log1p(rate * np.expm1((2.0 * x - 1.0) / (2.0 * multiplier**2)))
    log_density = -(x**2) / (2.0 * multiplier**2) - math.log(multiplier * math.sqrt(2.0 * math.pi))
    log_all = float(np.logaddexp.reduce(log_density + log_power + np.log(np.gradient(x))))
    if log_all > 1.0:
        return log_all
    part = np.exp(log_density) * np.expm1(np.minimum(log_power, 1.0))
    far = log_power > 1.0
    part[far] = np.exp(log_density[far] + log_power[far]) - np.exp(log_density[far])
    return math.log1p(float(np.trapezoid(part, x)))


@pytest.mark.parametrize("rate", [1e-6, 0.001, 0.02, 0.3, 0.9])
@pytest.mark.parametrize(
    ("multiplier", "orders"), [(1.0, (2, 5, 30)), (12.0, (2, 64, 300)), (90.0, (1024, 1117, 1448))]
)
def test_a_bound_is_the_exact_sum_and_never_below_it(rate: float, multiplier: float, orders: tuple[int, ...]) -> None:
    for order in orders:
        [found] = sampled_gaussian(rate, multiplier, [float(order)])
        exact = exact_moment(rate, multiplier, order) / (order - 1)
        assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-6)


@pytest.mark.parametrize(
    ("rate", "multiplier"), [(0.01, 800.0), (0.3, 4000.0), (0.9, 1500.0), (1e-4, 100.0), (0.02, 200.0), (0.5, 2.0**12)]
)
def test_at_large_orders_a_bound_is_the_integral(rate: float, multiplier: float) -> None:
    """Up to 2¹⁷, on and between the orders of which sums are made; there the chord is a little above."""
    for order in (1024.0, 1500.5, 2048.0, 6000.25, 16384.0, 131072.0):
        [found] = sampled_gaussian(rate, multiplier, [order])
        if order / (2 * multiplier**2) > 1 - math.log(rate):
            assert found * (order - 1) == pytest.approx(order * (order - 1) / (2 * multiplier**2), rel=2e-2)
            continue
        exact = integral_moment(rate, multiplier, order) / (order - 1)
        assert exact * (1 - 1e-7) <= found <= exact * (1 + 5e-3)


@settings(deadline=None, max_examples=60)
@given(
    rate=st.floats(1e-12, 1.0, exclude_max=True),
    multiplier=st.floats(-20, 40).map(lambda power: 2.0**power),
    orders=st.lists(st.floats(1.001, 2.0**20), min_size=2, max_size=12, unique=True),
)
def test_bounds_are_positive_grow_with_the_order_and_stay_below_those_without_sampling(
    rate: float, multiplier: float, orders: list[float]
) -> None:
    """Whatever the sampling rate and the noise: no digit is lost in rounding, which could make one negative, and the
    work is bounded."""
    begun = time.process_time()
    orders.sort()
    found = sampled_gaussian(rate, multiplier, orders)
    assert time.process_time() - begun < 2.0
    assert (found > 0.0).all()
    assert (np.diff(found) >= -1e-9 * found[:-1]).all()
    assert (found <= np.array(orders) / (2 * multiplier**2) * (1 + 5e-3) + (np.array(orders) < 2) / multiplier**2).all()


def test_a_second_peak_far_above_the_first_is_counted() -> None:
    """At q = 10⁻⁶, z = 20 the terms near the mean are dwarfed from order 11 000 on by those near the last: a window
    around the mean alone would be too low by all of it."""
    rate, multiplier = 1e-6, 20.0
    last_alone = [
        (order * math.log(rate) + (order * order - order) / (2 * multiplier**2)) / (order - 1)
        for order in (1024, 4096, 8192, 10240, 11585, 16384, 65536)
    ]
    found = sampled_gaussian(rate, multiplier, [1024.0, 4096.0, 8192.0, 10240.0, 11585.0, 16384.0, 65536.0])
    assert (found >= np.array(last_alone)).all()
    assert found[1] < 1e-8
    assert last_alone[-1] > 50.0


def upper_tail(value: float) -> float:
    return 0.5 * math.erfc(value / math.sqrt(2.0))


def true_delta(rate: float, multiplier: float, value: float) -> float:
    """The smallest δ at ε = `value` of one release, one row more or less, in closed form (for q = 1 Balle & Wang 2018,
    arXiv:1805.06530, Theorem 8): where the likelihood ratio exceeds e^(±ε), integrated."""
    grown = multiplier**2 * math.log1p(math.expm1(value) / rate) + 0.5  # where M = e^ε·P
    more = rate * (upper_tail((grown - 1) / multiplier) - upper_tail(grown / multiplier))
    more -= math.expm1(value) * upper_tail(grown / multiplier)
    if math.exp(-value) <= 1 - rate:
        return more
    shrunk = multiplier**2 * math.log1p(math.expm1(-value) / rate) + 0.5  # where P = e^ε·M
    below, below_moved = upper_tail(-shrunk / multiplier), upper_tail(-(shrunk - 1) / multiplier)
    less = below - math.exp(value) * ((1 - rate) * below + rate * below_moved)
    return max(more, less)


@pytest.mark.parametrize("target", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_an_epsilon_far_below_a_hundredth_is_reached_and_holds(target: float, rate: float) -> None:
    """One release at δ = 10⁻⁵: the noise found keeps the true δ below δ, and is at most twice what would do."""
    found = calibrate_dp_sgd(epsilon=target, delta=1e-5, sampling_rate=rate, steps=1)
    check_dp_sgd(epsilon=target, delta=1e-5, sampling_rate=rate, steps=1)
    assert true_delta(rate, found, target) <= 1e-5 < true_delta(rate, found / 2, target)


def test_a_noise_multiplier_of_about_800_gives_an_epsilon_of_3_in_1000() -> None:
    found = calibrate_dp_sgd(epsilon=0.003, delta=1e-5, sampling_rate=1.0, steps=1)
    assert 700 < found < 900


def test_sampled_sums_reach_as_far() -> None:
    found = calibrate_sampled_sum(
        epsilon=1e-4, delta=1e-5, sampling_rate=0.02, rounds=1, dimension=10, tau_of=None, failure_probability=2.0**-64
    )
    assert true_delta(0.02, found, 1e-4) <= 1e-5 < true_delta(0.02, found / 2, 1e-4)


@pytest.mark.parametrize("kind", [DpSgdSteps, SampledNoisySum])
def test_many_steps_of_much_noise_cost_what_one_gaussian_costs(kind: type[DpSgdSteps] | type[SampledNoisySum]) -> None:
    """2⁵³ steps at q = ½, z = 10¹² are nearly one Gaussian of z = 2·10¹²/√2⁵³: 21 000. An accountant of fewer digits
    takes each step for a divergence of nothing, or less than nothing, and says ε = 0."""
    steps, multiplier = 2**53, 1e12
    assert loses_digits(0.5, multiplier)
    event: Event = (
        DpSgdSteps(sampling_rate=0.5, noise_multiplier=multiplier, steps=steps)
        if kind is DpSgdSteps
        else SampledNoisySum(sampling_rate=0.5, noise_multiplier=multiplier, rounds=steps)
    )
    one = DpSgdSteps(sampling_rate=1.0, noise_multiplier=2 * multiplier / math.sqrt(steps), steps=1)
    assert epsilon([event], delta=1e-5) == pytest.approx(epsilon([one], delta=1e-5), rel=1e-3)
    assert epsilon([event], delta=1e-5) > 4e-5


def test_where_digits_are_lost_is_where_they_are() -> None:
    """Just below the switch dp-accounting's figure has at least 28 bits; so the switch moves no figure visibly."""
    from dp_accounting.rdp import RdpAccountant

    from src.privacy.accounting import to_dp_event

    rate = 0.25
    multiplier = math.sqrt(2.0**22 * rate) * 0.999
    assert not loses_digits(rate, multiplier)
    accountant = RdpAccountant(orders=[2.0, 3.0, 32.0, 512.0])
    accountant.compose(to_dp_event(DpSgdSteps(sampling_rate=rate, noise_multiplier=multiplier, steps=1)))
    ours = sampled_gaussian(rate, multiplier, [2.0, 3.0, 32.0, 512.0])
    np.testing.assert_allclose(accountant.rdp, ours, rtol=2.0**-23)


def test_no_target_is_given_up_for_too_little_noise() -> None:
    """What is beyond ten million is still refused, in words."""
    with pytest.raises(InvalidInput, match="no noise multiplier up to 10 000 000"):
        calibrate_dp_sgd(epsilon=1e-6, delta=1e-9, sampling_rate=1.0, steps=10**9)
