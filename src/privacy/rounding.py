"""From real updates to integers: conditional stochastic rounding (Kairouz, Liu & Steinke 2021, arXiv:2102.06387).

A coordinate x of an update becomes ⌊2^f·x⌋ or ⌈2^f·x⌉, at random with mean 2^f·x, and the whole vector is drawn again
until its L2 norm is within a bound (their Algorithm 1, Proposition 26). The bound, not the update, is the sensitivity
of the encoded sum. All lengths here are in integer units: one unit is the resolution 2^-f.

A sum over many examples, of which one more or less is to be hidden, is rounded to nearest instead: each of d
coordinates of two neighbouring sums moves by at most 1 on top of what they differ by: the sensitivity grows by √d.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .entropy import Entropy

BETA: Final = math.exp(-0.5)
"""Probability that one rounding misses the bound, at most: the choice of Kairouz, Liu & Steinke 2021."""

MAX_TRIES: Final = 128
"""Roundings tried before the deterministic one: with `BETA` it is reached with probability ≤ e^-64 per update."""

MAX_RESOLUTION_BITS: Final = 40
_MAX_NORM: Final = 2.0**50
"""Encoded norms stay exact in float64, and their sum over 2^12 parties in int64."""


def _check_resolution(resolution_bits: int) -> None:
    if not 0 <= resolution_bits <= MAX_RESOLUTION_BITS:
        raise InvalidInput(f"resolution_bits must lie in [0, {MAX_RESOLUTION_BITS}]")


def rounded_bound(clipping_norm: float, *, resolution_bits: int, dimension: int, beta: float = BETA) -> float:
    """L2 norm, in integer units, that a conditionally rounded update never exceeds.

    √min{ (c + √d)², c² + d/4 + √(2·ln(1/β))·(c + √d/2) } with c = 2^f·C (Kairouz, Liu & Steinke 2021, Proposition 26
    and Algorithm 1, with γ = 2^-f).

    Args:
        clipping_norm: C > 0, the L2 norm that updates are clipped to.
        resolution_bits: f in [0, 40].
        dimension: d ≥ 1.
        beta: in [0, 1); 0 asks for the bound that every rounding satisfies.

    Raises:
        InvalidInput: an argument out of its range, or a bound above 2^50.
    """
    _check_resolution(resolution_bits)
    if not (math.isfinite(clipping_norm) and clipping_norm > 0) or dimension < 1 or not 0.0 <= beta < 1.0:
        raise InvalidInput("a rounding bound needs a clipping norm > 0, a dimension ≥ 1 and beta in [0, 1)")
    scaled = math.ldexp(clipping_norm, resolution_bits)
    root = math.sqrt(dimension)
    squared = (scaled + root) ** 2
    if beta > 0.0:
        tail = math.sqrt(2.0 * math.log(1.0 / beta))
        squared = min(squared, scaled**2 + dimension / 4 + tail * (scaled + root / 2))
    bound = math.sqrt(squared)
    if bound > _MAX_NORM:
        raise InvalidInput("clipping norm, resolution and dimension give an encoded norm above 2^50")
    return bound


def coordinate_bound(clipping_norm: float, *, resolution_bits: int) -> int:
    """Largest |coordinate| of an encoded update, in integer units: ⌈2^f·C⌉, as no coordinate exceeds the norm."""
    _check_resolution(resolution_bits)
    if not (math.isfinite(clipping_norm) and clipping_norm > 0):
        raise InvalidInput("a coordinate bound needs a clipping norm > 0")
    return math.ceil(math.ldexp(clipping_norm, resolution_bits))


ROUNDING_SHARE: Final = 100
"""Rounding may add at most 1/100 to the sensitivity of a sum of examples: then it costs at most 1 % more noise."""


def least_resolution_bits(max_grad_norm: float, *, dimension: int) -> int:
    """Smallest f with √d ≤ 2^f·C / `ROUNDING_SHARE`: a coarser grid would cost noise.

    Args:
        max_grad_norm: C > 0, the L2 norm that each example's gradient is clipped to.
        dimension: d ≥ 1.

    Raises:
        InvalidInput: an argument out of its range, or none of [0, 40] is fine enough.
    """
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0) or dimension < 1:
        raise InvalidInput("a resolution needs a norm > 0 and a dimension ≥ 1")
    for bits in range(MAX_RESOLUTION_BITS + 1):
        if (Fraction(max_grad_norm) * 2**bits) ** 2 >= ROUNDING_SHARE**2 * dimension:
            return bits
    raise InvalidInput(f"{dimension} parameters under a norm of {max_grad_norm:g} need a finer grid than 2^-40")


def nearest_bound(max_grad_norm: float, *, resolution_bits: int, dimension: int) -> int:
    """L2 sensitivity, in integer units, of a sum rounded to nearest to one example more or less: ⌈2^f·C + √d⌉.

    Raises:
        InvalidInput: an argument out of its range, or a bound above 2^50.
    """
    _check_resolution(resolution_bits)
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0) or dimension < 1:
        raise InvalidInput("a rounding bound needs a norm > 0 and a dimension ≥ 1")
    root = math.isqrt(dimension - 1) + 1  # ⌈√d⌉
    bound = math.ceil(math.ldexp(max_grad_norm, resolution_bits)) + root
    if bound > _MAX_NORM:
        raise InvalidInput("norm, resolution and dimension give an encoded norm above 2^50")
    return bound


def project(total: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """The point of the ball of radius `bound` that is nearest to `total`: `total` itself inside, scaled down outside.

    A projection on a convex set brings no two points further apart: what one example changes in a sum, it changes by no
    more in the projected sum, however many examples there are.

    Args:
        total: shape (d,), dtype float64, finite.
        bound: > 0, finite.

    Raises:
        InvalidInput: wrong shape or dtype, a value that is not finite, or a bound out of range. No value is shown.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise InvalidInput("a ball has a positive radius")
    if total.ndim != 1 or total.dtype != np.float64 or not bool(np.isfinite(total).all()):
        raise InvalidInput("a sum of gradients must be a vector of finite float64")
    norm = math.sqrt(float(np.dot(total, total)))
    return total.copy() if norm <= bound else total * (bound / norm)


def round_to_nearest(total: NDArray[np.float64], *, resolution_bits: int) -> NDArray[np.int64]:
    """`total`, shape (d,), in units of 2^-f, each coordinate rounded to the nearest integer (halves to even), as int64.

    Raises:
        InvalidInput: a value that is not finite, or above 2^50 units. No value is shown.
    """
    _check_resolution(resolution_bits)
    scaled = np.ldexp(total, resolution_bits)
    if not bool((np.abs(scaled) <= _MAX_NORM).all()):  # false for NaN too
        raise InvalidInput("a sum of gradients must stay below 2^50 units")
    return np.rint(scaled).astype(np.int64)


def squared_norm(values: NDArray[np.int64]) -> int:
    """Exact Σ v² of an int64 vector, as a Python integer."""
    if values.size == 0:
        return 0
    largest = max(int(values.max()), -int(values.min()))
    if largest * largest * values.size < 1 << 63:
        return int(np.dot(values, values))
    return sum(value * value for value in values.tolist())


def conditional_round(
    update: NDArray[np.float32], *, resolution_bits: int, bound: float, entropy: Entropy
) -> NDArray[np.int64]:
    """`update` as integers in units of 2^-f, unbiased up to the conditioning, with L2 norm ≤ `bound`.

    The norm is checked in exact integer arithmetic. Should `MAX_TRIES` roundings all miss the bound, every coordinate
    is rounded toward zero: the norm then is that of the update at most, so the bound holds without exception.

    Args:
        update: shape (d,), dtype float32, finite, clipped.
        resolution_bits: f in [0, 40].
        bound: `rounded_bound(…)` for the clipping norm of `update`.

    Returns:
        shape (d,), dtype int64.

    Raises:
        InvalidInput: wrong shape or dtype, a value that is not finite, or an update too long for `bound`, which means
            that it was not clipped. No value is shown.
    """
    _check_resolution(resolution_bits)
    if update.ndim != 1 or update.dtype != np.float32 or not bool(np.isfinite(update).all()):
        raise InvalidInput("an update must be a vector of finite float32")
    if not 0.0 < bound <= _MAX_NORM:
        raise InvalidInput("the rounding bound must lie in (0, 2^50]")
    scaled = np.ldexp(update.astype(np.float64), resolution_bits)
    if update.size and float(np.abs(scaled).max()) > bound:
        raise InvalidInput("the update is longer than its rounding bound allows: it was not clipped")
    limit = int(Fraction(bound) ** 2)
    toward_zero = np.trunc(scaled).astype(np.int64)
    if squared_norm(toward_zero) > limit:
        raise InvalidInput("the update is longer than its rounding bound allows: it was not clipped")
    floor = np.floor(scaled)
    fraction = scaled - floor
    base = floor.astype(np.int64)
    for _ in range(MAX_TRIES):
        uniform = (entropy.words(update.size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rounded = base + (uniform < fraction)
        if squared_norm(rounded) <= limit:
            return rounded
    return toward_zero
