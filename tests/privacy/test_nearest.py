"""Sums of examples, rounded to nearest, projected, sampled within a cap: what one example can change stays bounded."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from src.errors import InvalidInput
from src.privacy.entropy import SystemEntropy
from src.privacy.rounding import least_resolution_bits, nearest_bound, project, round_to_nearest, squared_norm
from src.privacy.sampling import batch_cap, poisson_sample

VECTORS = arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e6, 1e6))


def one_more(total: np.ndarray, example: np.ndarray, norm: float) -> np.ndarray:
    """The neighbouring sum: with one clipped example more."""
    size = float(np.linalg.norm(example))
    return np.asarray(total + example * min(1.0, norm / size if size else 1.0))


# -------------------------------------------------------------------------------------------------------- sensitivity


@settings(deadline=None, max_examples=200)
@given(VECTORS, st.data(), st.floats(0.01, 100), st.integers(0, 20), st.floats(0.1, 1e5))
def test_one_example_more_or_less_changes_the_integers_by_the_bound_at_most(
    total: np.ndarray, data: st.DataObject, norm: float, bits: int, radius: float
) -> None:
    """Projected or not, whatever the other examples are."""
    example = data.draw(arrays(np.float64, total.shape, elements=st.floats(-1e6, 1e6)))
    other = one_more(total, example, norm * (1 - 2.0**-20))  # the margin of learning.gradients, for float64's sake
    found = [round_to_nearest(project(each, radius), resolution_bits=bits) for each in (total, other)]
    bound = nearest_bound(norm, resolution_bits=bits, dimension=total.size)
    assert squared_norm(found[1] - found[0]) <= bound**2


def test_an_adversary_that_meets_every_half_gets_the_whole_bound_and_not_more() -> None:
    """Every coordinate just below a half, and a step along the diagonal that lifts all of them above it."""
    dimension, bits = 10_000, 7
    total = np.full(dimension, np.ldexp(0.5 - 1e-9, -bits))
    step = np.full(dimension, np.ldexp(2e-9, -bits))
    found = round_to_nearest(total + step, resolution_bits=bits) - round_to_nearest(total, resolution_bits=bits)
    assert squared_norm(found) == dimension  # √d of rounding alone, for a step of next to nothing
    norm = float(np.linalg.norm(step))
    assert math.sqrt(dimension) <= nearest_bound(norm, resolution_bits=bits, dimension=dimension)


@settings(deadline=None, max_examples=100)
@given(VECTORS, st.floats(0.01, 1e6))
def test_a_projection_stays_inside_and_moves_no_more_than_it_has_to(total: np.ndarray, radius: float) -> None:
    found = project(total, radius)
    assert np.linalg.norm(found) <= radius * (1 + 1e-12)
    if np.linalg.norm(total) <= radius:
        assert np.array_equal(found, total)
    else:
        np.testing.assert_allclose(found, total * radius / np.linalg.norm(total))


@settings(deadline=None, max_examples=100)
@given(VECTORS, st.integers(0, 20))
def test_rounding_is_to_the_nearest_integer(total: np.ndarray, bits: int) -> None:
    found = round_to_nearest(total, resolution_bits=bits)
    for value, integer in zip(total.tolist(), found.tolist(), strict=True):
        assert abs(Fraction(value) * 2**bits - integer) <= Fraction(1, 2)


@pytest.mark.parametrize("dimension", [1, 2, 177, 10**4, 10**6, 10**9])
@pytest.mark.parametrize("norm", [0.001, 0.5, 1.0, 37.5])
def test_the_grid_is_the_coarsest_in_which_rounding_adds_a_hundredth_at_most(dimension: int, norm: float) -> None:
    bits = least_resolution_bits(norm, dimension=dimension)
    assert math.sqrt(dimension) <= 0.01 * norm * 2**bits * (1 + 1e-12)
    assert bits == 0 or math.sqrt(dimension) > 0.01 * norm * 2 ** (bits - 1)
    assert nearest_bound(norm, resolution_bits=bits, dimension=dimension) <= 1.01 * norm * 2**bits + 2


@pytest.mark.parametrize(
    "refused",
    [
        lambda: least_resolution_bits(0.0, dimension=1),
        lambda: least_resolution_bits(math.inf, dimension=1),
        lambda: least_resolution_bits(1.0, dimension=0),
        lambda: least_resolution_bits(1e-12, dimension=1),
        lambda: nearest_bound(math.nan, resolution_bits=1, dimension=1),
        lambda: nearest_bound(1.0, resolution_bits=41, dimension=1),
        lambda: nearest_bound(2.0**40, resolution_bits=20, dimension=1),
        lambda: project(np.zeros(3), 0.0),
        lambda: project(np.zeros(3), math.nan),
        lambda: project(np.zeros(3, np.float32), 1.0),
        lambda: project(np.array([math.nan]), 1.0),
        lambda: project(np.zeros((1, 1)), 1.0),
        lambda: round_to_nearest(np.array([math.inf]), resolution_bits=3),
        lambda: round_to_nearest(np.array([math.nan]), resolution_bits=3),
        lambda: round_to_nearest(np.array([2.0**51]), resolution_bits=0),
        lambda: round_to_nearest(np.array([1.0]), resolution_bits=-1),
        lambda: batch_cap(-1, sampling_rate=0.5, draws=1, log2_probability=64),
        lambda: batch_cap(10, sampling_rate=0.0, draws=1, log2_probability=64),
        lambda: batch_cap(10, sampling_rate=1.1, draws=1, log2_probability=64),
        lambda: batch_cap(10, sampling_rate=0.5, draws=0, log2_probability=64),
        lambda: batch_cap(10, sampling_rate=0.5, draws=1, log2_probability=-1),
    ],
)
def test_what_is_out_of_range_is_refused(refused: object) -> None:
    with pytest.raises(InvalidInput):
        refused()  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------ the cap


def exact_tail(population: int, rate: float, cap: int) -> Fraction:
    """P(Bin(n, q) > K), exactly."""
    q = Fraction(rate)
    return sum(
        (math.comb(population, k) * q**k * (1 - q) ** (population - k) for k in range(cap + 1, population + 1)),
        start=Fraction(0),
    )


@settings(deadline=None, max_examples=60)
@given(
    population=st.integers(0, 150),
    rate=st.integers(1, 64).map(lambda n: n / 64),
    draws=st.integers(1, 10**6),
    bits=st.integers(0, 64),
)
def test_the_probability_of_a_larger_batch_is_what_the_cap_is_for(
    population: int, rate: float, draws: int, bits: int
) -> None:
    """Against the exact sum; and a cap that is much lower would not do, for the bound is within a factor of it."""
    cap = batch_cap(population, sampling_rate=rate, draws=draws, log2_probability=bits)
    assert 0 <= cap <= population
    assert draws * exact_tail(population, rate, cap) <= Fraction(1, 2**bits)
    if cap and bits > 8:
        wider = Fraction(1, 2**bits) / (draws * 4 * (population + 1))  # Chernoff loses a polynomial, ⌈log2⌉ a factor 2
        assert exact_tail(population, rate, cap - 1) > wider


@pytest.mark.parametrize(
    ("population", "rate", "expected"),
    [(0, 0.1, 0), (1, 0.1, 1), (100, 1.0, 100), (5400, 0.05, 445), (5400, 0.1, 774), (10**7, 0.001, 11022)],
)
def test_known_caps(population: int, rate: float, expected: int) -> None:
    """The same on every machine: the two ends of a federation must agree on them."""
    assert batch_cap(population, sampling_rate=rate, draws=300, log2_probability=64) == expected


def test_samples_stay_within_the_cap() -> None:
    cap = batch_cap(2000, sampling_rate=0.05, draws=500, log2_probability=64)
    sizes = [len(poisson_sample(2000, sampling_rate=0.05, entropy=SystemEntropy())) for _ in range(500)]
    assert max(sizes) <= cap < 2 * max(sizes)
