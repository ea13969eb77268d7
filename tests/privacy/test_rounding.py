"""Conditional stochastic rounding: the bound holds always, the mean is right, what is not clipped is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.privacy import rounding
from src.privacy.clipping import clip
from src.privacy.entropy import DeterministicEntropy
from src.privacy.rounding import conditional_round, coordinate_bound, rounded_bound, squared_norm


def source(purpose: str = "rounding") -> DeterministicEntropy:
    return DeterministicEntropy(b"rounding tests", purpose=purpose)


def test_the_bound_has_its_published_value() -> None:
    """Kairouz, Liu & Steinke 2021, Proposition 26, in numbers worked out by hand: c = 16, d = 4, β = e^(-1/2)."""
    # (16 + 2)² = 324;  256 + 1 + √(2 · 1/2) · (16 + 1) = 274
    assert rounded_bound(1.0, resolution_bits=4, dimension=4) == pytest.approx(math.sqrt(274), rel=1e-12)
    assert rounded_bound(1.0, resolution_bits=4, dimension=4, beta=0.0) == 18.0
    # Where every coordinate is certain to round within √d the first term is the smaller one: c = 1/4, d = 1.
    assert rounded_bound(0.25, resolution_bits=0, dimension=1) == pytest.approx(
        math.sqrt(min(1.25**2, 0.0625 + 0.25 + 0.75)), rel=1e-12
    )


ADVERSARIAL: dict[str, Callable[[int], NDArray[np.float64]]] = {
    "all half-integers": lambda d: np.full(d, 0.5),
    "half-integers of both signs": lambda d: np.where(np.arange(d) % 2 == 0, 0.5, -0.5),
    "just above an integer": lambda d: np.full(d, 3.0001),
    "just below an integer": lambda d: np.full(d, 2.9999),
    "one spike": lambda d: np.eye(1, d)[0] * 777.7,
    "a spike over half-integers": lambda d: np.full(d, 0.5) + np.eye(1, d)[0] * 40.0,
    "integers": lambda d: np.full(d, 4.0),
    "tiny": lambda d: np.full(d, 1e-30),
    "zero": lambda d: np.zeros(d),
}


@pytest.mark.parametrize("dimension", [1, 2, 100, 5_000])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_the_bound_holds_for_adversarial_vectors(case: str, dimension: int) -> None:
    """Each vector has exactly its clipping norm: nothing is left between the two."""
    bits = 8
    wide = ADVERSARIAL[case](dimension) / 2.0**bits
    norm = float(np.linalg.norm(wide)) or 1.0
    update = clip(wide.astype(np.float32), norm)
    bound = rounded_bound(norm, resolution_bits=bits, dimension=dimension)
    entropy = source(case)
    for _ in range(20):
        encoded = conditional_round(update, resolution_bits=bits, bound=bound, entropy=entropy)
        assert encoded.dtype == np.int64
        assert squared_norm(encoded) <= Fraction(bound) ** 2
        assert np.abs(encoded - np.ldexp(update.astype(np.float64), bits)).max() < 1.0


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30),
    bits=st.integers(0, 20),
    clipping_norm=st.floats(0.01, 10),
)
def test_rounding_lands_on_a_neighbour_and_within_the_bound(
    values: list[float], bits: int, clipping_norm: float
) -> None:
    update = clip(np.array(values, dtype=np.float32), clipping_norm)
    bound = rounded_bound(clipping_norm, resolution_bits=bits, dimension=len(values))
    encoded = conditional_round(update, resolution_bits=bits, bound=bound, entropy=source())
    scaled = np.ldexp(update.astype(np.float64), bits)
    assert ((encoded == np.floor(scaled)) | (encoded == np.ceil(scaled))).all()
    assert squared_norm(encoded) <= Fraction(bound) ** 2
    assert np.abs(encoded).max() <= coordinate_bound(clipping_norm, resolution_bits=bits)


def test_rounding_is_unbiased() -> None:
    """Mean of 4 000 roundings against the real value, coordinate by coordinate, within five standard errors."""
    update = np.array([0.1, -0.1, 0.5, 0.25, -0.75, 0.9999, 0.0, 3.3], dtype=np.float32)
    bound = rounded_bound(8.0, resolution_bits=0, dimension=update.size)
    entropy, count = source("bias"), 4_000
    total = np.zeros(update.size)
    for _ in range(count):
        total += conditional_round(update, resolution_bits=0, bound=bound, entropy=entropy)
    fraction = update - np.floor(update)
    error = np.sqrt(fraction * (1 - fraction) / count)
    assert (np.abs(total / count - update) <= 5 * error + 1e-12).all()


def test_at_least_the_promised_share_of_roundings_is_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """β = e^(-1/2): even on the border, four in ten roundings fit at the first try."""
    monkeypatch.setattr(rounding, "MAX_TRIES", 1)
    dimension = 2_000
    update = np.full(dimension, 0.5, dtype=np.float32)
    norm = float(np.linalg.norm(update))
    bound = rounded_bound(norm, resolution_bits=0, dimension=dimension)
    entropy = source("share")
    fitted = sum(
        bool(conditional_round(update, resolution_bits=0, bound=bound, entropy=entropy).any()) for _ in range(300)
    )
    assert fitted / 300 >= 1 - rounding.BETA


def test_the_last_resort_rounds_toward_zero_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MAX_TRIES", 0)
    update = np.array([1.5, -2.5, 0.5], dtype=np.float32)
    encoded = conditional_round(update, resolution_bits=0, bound=3.0, entropy=source())
    assert encoded.tolist() == [1, -2, 0]


def test_the_norm_is_exact_beyond_64_bits() -> None:
    values = np.array([2**50, -(2**50), 3], dtype=np.int64)
    assert squared_norm(values) == 2**101 + 9
    assert squared_norm(np.zeros(0, dtype=np.int64)) == 0


def vector(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


REJECTED = {
    "not clipped": (vector(3.0, 4.0), {"resolution_bits": 0, "bound": 4.0}),
    "one coordinate too long": (vector(1e30), {"resolution_bits": 10, "bound": 4.0}),
    "nan": (vector(float("nan")), {"resolution_bits": 0, "bound": 4.0}),
    "negative resolution": (vector(1.0), {"resolution_bits": -1, "bound": 4.0}),
    "resolution too fine": (vector(1.0), {"resolution_bits": 41, "bound": 4.0}),
    "no bound": (vector(1.0), {"resolution_bits": 0, "bound": 0.0}),
    "bound not a number": (vector(1.0), {"resolution_bits": 0, "bound": float("nan")}),
    "bound too large": (vector(1.0), {"resolution_bits": 0, "bound": 2.0**51}),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_rounded_is_refused(case: str) -> None:
    update, options = REJECTED[case]
    with pytest.raises(InvalidInput):
        conditional_round(update, entropy=source(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (0.0, {"resolution_bits": 4, "dimension": 4}),
        (float("inf"), {"resolution_bits": 4, "dimension": 4}),
        (1.0, {"resolution_bits": 4, "dimension": 0}),
        (1.0, {"resolution_bits": 41, "dimension": 4}),
        (1.0, {"resolution_bits": 4, "dimension": 4, "beta": 1.0}),
        (2.0**20, {"resolution_bits": 40, "dimension": 4}),
    ],
)
def test_a_bound_out_of_range_is_refused(norm: float, options: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        rounded_bound(norm, **options)  # type: ignore[arg-type]


def test_a_coordinate_bound_needs_a_norm() -> None:
    assert coordinate_bound(0.3, resolution_bits=4) == 5
    with pytest.raises(InvalidInput):
        coordinate_bound(0.0, resolution_bits=4)
