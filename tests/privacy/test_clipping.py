"""Clipping: never longer than C, direction kept, short updates untouched; and a norm that follows a quantile."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.privacy.accounting import epsilon
from src.privacy.clipping import AdaptiveClipping, clip, joint_sensitivity, l2_norm
from src.privacy.entropy import DeterministicEntropy
from src.privacy.events import NoisySum
from src.privacy.noise import discrete_gaussian
from src.privacy.noise_plan import plan_noise

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
VECTORS = arrays(np.float32, st.integers(1, 40), elements=FINITE)


def exact_squared_norm(vector: NDArray[np.float32]) -> Fraction:
    return sum((Fraction(float(value)) ** 2 for value in vector), Fraction(0))


@settings(deadline=None, max_examples=150)
@given(update=VECTORS, clipping_norm=st.floats(1e-3, 1e6))
def test_a_clipped_update_is_never_longer_than_the_clipping_norm(
    update: NDArray[np.float32], clipping_norm: float
) -> None:
    """In exact arithmetic: rounding to float32 must not push it over."""
    clipped = clip(update, clipping_norm)
    assert clipped.dtype == np.float32
    assert exact_squared_norm(clipped) <= Fraction(clipping_norm) ** 2


@settings(deadline=None, max_examples=60)
@given(update=arrays(np.float32, 20, elements=st.floats(-1, 1, width=32)), scale=st.floats(1.5, 1e3))
def test_clipping_keeps_the_direction_and_loses_almost_nothing(update: NDArray[np.float32], scale: float) -> None:
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm < 1e-3:
        return
    clipped = clip(update, norm / scale).astype(np.float64)
    assert np.allclose(clipped, update / scale, rtol=1e-6, atol=1e-9)


def test_a_short_update_comes_back_equal_and_as_a_copy() -> None:
    update = np.array([0.3, -0.4], dtype=np.float32)
    clipped = clip(update, 1.0)
    assert (clipped == update).all()
    assert clipped is not update
    assert clip(np.zeros(3, dtype=np.float32), 1.0).tolist() == [0.0, 0.0, 0.0]
    assert clip(np.zeros(0, dtype=np.float32), 1.0).shape == (0,)


REJECTED = {
    "nan": (np.array([1.0, 123456.0, np.nan], dtype=np.float32), 1.0),
    "infinity": (np.array([123456.0, np.inf], dtype=np.float32), 1.0),
    "float64": (np.array([1.0]), 1.0),
    "matrix": (np.ones((2, 2), dtype=np.float32), 1.0),
    "norm zero": (np.ones(2, dtype=np.float32), 0.0),
    "norm negative": (np.ones(2, dtype=np.float32), -1.0),
    "norm infinite": (np.ones(2, dtype=np.float32), float("inf")),
    "norm nan": (np.ones(2, dtype=np.float32), float("nan")),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_clipped_is_refused_without_showing_a_value(case: str) -> None:
    update, clipping_norm = REJECTED[case]
    with pytest.raises(InvalidInput) as caught:
        clip(update, clipping_norm)
    assert "123456" not in str(caught.value) + caught.value.private + str(caught.value.metadata)


RULE = AdaptiveClipping(bit_deviation=5.0, smallest=1e-3, largest=1e3)


@settings(deadline=None, max_examples=100)
@given(multiplier=st.floats(0.01, 9.9), deviation=st.floats(5.0, 500.0))
def test_bit_and_update_together_cost_one_release(multiplier: float, deviation: float) -> None:
    """z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2), and the noise for both together is at least that for each alone."""
    rule = AdaptiveClipping(bit_deviation=deviation, smallest=1.0, largest=1.0)
    update, sensitivity = rule.update_multiplier(multiplier), 1 << 20
    assert update == pytest.approx((multiplier**-2 - (2 * deviation) ** -2) ** -0.5, rel=1e-9)
    unit = rule.bit_unit(multiplier, sensitivity)
    assert unit > 1
    both = joint_sensitivity(sensitivity, unit)
    assert both**2 >= sensitivity**2 + unit**2 > (both - 1) ** 2
    noise = multiplier * both
    assert noise / sensitivity == pytest.approx(update, rel=1 / unit)
    assert deviation <= noise / (2 * unit) * (1 + 1e-12)  # of the count: a party moves its slot by one unit, up or down
    assert noise / (2 * unit) == pytest.approx(deviation, rel=2 / unit)


def test_the_ledger_may_charge_both_as_one() -> None:
    parts = [
        NoisySum(noise_multiplier=RULE.update_multiplier(1.3), rounds=40, dimension=99),
        NoisySum(noise_multiplier=2.0 * RULE.bit_deviation, rounds=40, dimension=1),
    ]
    whole = epsilon([NoisySum(noise_multiplier=1.3, rounds=40, dimension=100)], delta=1e-6)
    assert epsilon(parts, delta=1e-6) == pytest.approx(whole, rel=1e-12)


def test_one_step_by_hand() -> None:
    """20 parties, 15 within the norm: b̃ = 3/4, so C falls by e^(-0.2 · 0.25)."""
    bits = 15 * RULE.bit(1.0, 2.0, unit=64) + 4 * RULE.bit(3.0, 2.0, unit=64) + RULE.bit(2.001, 2.0, unit=64)
    assert bits == 10 * 64
    moved = RULE.next_norm(2.0, noisy_bits=bits, unit=64, contributions=20)
    assert moved == pytest.approx(2.0 * math.exp(-0.05), rel=1e-15)
    assert RULE.next_norm(2.0, noisy_bits=0, unit=64, contributions=20) == 2.0
    assert RULE.bit(2.0, 2.0, unit=7) == 7


@settings(deadline=None, max_examples=60)
@given(multiplier=st.floats(1e-4, 1.9), sensitivity=st.integers(1, 1 << 20), deviation=st.floats(1.0, 50.0))
def test_on_any_grid_the_sensitivity_counts_the_bit(multiplier: float, sensitivity: int, deviation: float) -> None:
    """Coarse or fine: a contribution that is replaced by zeros moves the slots by no more than is accounted for."""
    unit = AdaptiveClipping(bit_deviation=deviation, smallest=1.0, largest=1.0).bit_unit(multiplier, sensitivity)
    assert unit >= 1
    assert joint_sensitivity(sensitivity, unit) ** 2 >= sensitivity**2 + unit**2


def test_without_noise_a_bit_is_one_unit() -> None:
    assert RULE.bit_unit(0.0, 1 << 20) == 1


def test_a_norm_is_that_of_exact_arithmetic() -> None:
    assert l2_norm(np.array([3e30, -4e30], dtype=np.float32)) == pytest.approx(5e30, rel=1e-6)


def test_noise_moves_the_norm_by_one_bounded_step_and_never_past_its_bounds() -> None:
    assert RULE.next_norm(2.0, noisy_bits=10**9, unit=64, contributions=20) == pytest.approx(2.0 * math.exp(-0.1))
    assert RULE.next_norm(2.0, noisy_bits=-(10**9), unit=64, contributions=20) == pytest.approx(2.0 * math.exp(0.1))
    assert RULE.next_norm(1e3, noisy_bits=-(10**9), unit=64, contributions=20) == 1e3
    assert RULE.next_norm(1e-3, noisy_bits=10**9, unit=64, contributions=20) == 1e-3


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_norm_finds_the_quantile_through_the_noise_of_shares(quantile: float) -> None:
    """100 parties with norms e^0 … e^3 in equal steps; the noise is drawn as shares of a plan for the slot."""
    rule = AdaptiveClipping(quantile=quantile, bit_deviation=5.0, smallest=1e-3, largest=1e6)
    unit = rule.bit_unit(1.0, 1 << 16)
    plan = plan_noise(
        noise_by="parties",
        noise_multiplier=1.0,
        sensitivity=float(joint_sensitivity(1 << 16, unit)),
        quorum=100,
        colluders=5,
    )
    norms = np.exp(np.linspace(0.0, 3.0, 100))
    entropy = DeterministicEntropy(b"adaptive clipping", purpose=str(quantile))
    current, tail = 0.1, []
    for _ in range(200):
        noise = int(discrete_gaussian(plan.share_sigma2, 100, entropy=entropy).sum())
        bits = sum(rule.bit(float(norm), current, unit=unit) for norm in norms)
        current = rule.next_norm(current, noisy_bits=bits + noise, unit=unit, contributions=100)
        tail.append(math.log(current) / 3.0)
    assert float(np.mean(tail[100:])) == pytest.approx(quantile, abs=0.03)


ADAPTIVE: dict[str, object] = {"bit_deviation": 1.0, "smallest": 0.1, "largest": 10.0}
REJECTED_RULES: dict[str, dict[str, object]] = {
    "quantile zero": {"quantile": 0.0},
    "quantile one": {"quantile": 1.0},
    "learning rate zero": {"learning_rate": 0.0},
    "learning rate above one": {"learning_rate": 1.5},
    "learning rate nan": {"learning_rate": math.nan},
    "no noise on the bits": {"bit_deviation": 0.0},
    "noise infinite": {"bit_deviation": math.inf},
    "smallest zero": {"smallest": 0.0},
    "bounds crossed": {"smallest": 20.0},
    "largest infinite": {"largest": math.inf},
    "bounds too far apart": {"smallest": 1e-12, "largest": 1e12},
}


@pytest.mark.parametrize("case", REJECTED_RULES)
def test_a_rule_out_of_range_is_refused(case: str) -> None:
    AdaptiveClipping(**ADAPTIVE)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        AdaptiveClipping(**{**ADAPTIVE, **REJECTED_RULES[case]})  # type: ignore[arg-type]


def test_too_few_parties_too_little_noise_and_a_norm_out_of_bounds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="20"):
        RULE.next_norm(1.0, noisy_bits=0, unit=64, contributions=19)
    for norm in (1e-4, 1e4, math.nan):
        with pytest.raises(InvalidInput):
            RULE.next_norm(norm, noisy_bits=0, unit=64, contributions=20)
    for multiplier in (10.0, 11.0, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput):
            RULE.update_multiplier(multiplier)
    for multiplier in (10.0, 11.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput):
            RULE.bit_unit(multiplier, 1 << 16)
