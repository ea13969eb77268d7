"""The exact discrete Gaussian, its tail, and what adding several of them costs.

Sampling is Canonne, Kamath & Steinke 2020 (arXiv:2004.00010), Algorithm 3: a discrete Laplace proposal, accepted with
probability exp(-(|y| - σ²/t)²/(2σ²)). Both steps ask whether a uniform real U lies below exp(-r) for a rational r. That
question is answered for whole arrays from the first 64 bits of every U in float64 with an error bound; only where the
bound does not decide (one draw in 10^7 at σ = 10^6) are further bits of that U drawn and the question decided in
directed decimal arithmetic. So every answer is the one infinite precision would give: nothing is approximated, no table
is cut.

How long a batch takes depends on the draws that were rejected, not on data.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .entropy import Entropy

MAX_SIGMA2: Final = 1 << 80
"""σ ≤ 2^40: proposals stay below 2^46, exact in float64; the sum of 2^17 draws stays in int64."""

MIN_SHARE_SIGMA2: Final = Fraction(1, 4)
"""σ ≥ 1/2, the condition of Kairouz, Liu & Steinke 2021, Proposition 14, for sums of discrete Gaussians."""

_CHUNK: Final = 1 << 18
"""Draws per batch: bounds memory to some ten MiB whatever the size asked for."""

_LOG_ERROR: Final = 2.0**-44
"""Bound on the float64 error of -ln(w/2^64) ≤ 45: eight units in the last place of a number near 45. Conversion,
constant and subtraction take one and a half together; the rest is for a `log` that is not correctly rounded."""

_LN2_UPPER: Final = Fraction(6931471806, 10**10)
"""ln 2 = 0.69314718055994… from above."""


class _LazyUniform:
    """A uniform real in [0, 1) of which the first 64 bits are known; the rest is drawn when a question needs it."""

    def __init__(self, word: int, entropy: Entropy) -> None:
        self._numerator = word
        self._bits = 64
        self._entropy = entropy

    def below_exp(self, rate: Fraction) -> bool:
        """Whether U < exp(-rate), exactly; `rate` ≥ 0."""
        if rate == 0:
            return True  # U < 1 always
        while True:
            scale = 1 << self._bits
            if rate >= self._bits:  # then exp(-rate) < 2^-bits: only U's leading zeros leave the question open
                if self._numerator:
                    return False
            else:
                low, high = _exp_bounds(rate, self._bits)
                if Fraction(self._numerator + 1, scale) <= low:
                    return True
                if Fraction(self._numerator, scale) >= high:
                    return False
            self._numerator = self._numerator << 64 | int(self._entropy.words(1)[0])
            self._bits += 64


def _exp_bounds(rate: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Rationals around exp(-rate), relative distance far below 2^-bits; `decimal` rounds exp correctly."""
    digits = bits // 3 + 20 + len(str(int(rate)))
    context = decimal.Context(prec=digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
    numerator, denominator = decimal.Decimal(rate.numerator), decimal.Decimal(rate.denominator)
    context.rounding = decimal.ROUND_CEILING
    upper_rate = context.divide(numerator, denominator)
    context.rounding = decimal.ROUND_FLOOR
    lower_rate = context.divide(numerator, denominator)
    low = context.next_minus(context.exp(upper_rate.copy_negate()))
    high = context.next_plus(context.exp(lower_rate.copy_negate()))
    return Fraction(low), Fraction(high)


def _exponentials(words: NDArray[np.uint64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """-ln U for the uniform reals that start with `words`, and a bound on the error that covers every continuation."""
    middle = words.astype(np.float64) + 0.5
    error = 1.0 / middle + _LOG_ERROR  # |ln(w + 1/2) - ln(w + θ)| ≤ 1/(w + 1/2) for w ≥ 1, θ in [0, 1]
    error[words == 0] = np.inf
    return 64.0 * math.log(2.0) - np.log(middle), error


def _geometric(scale: int, words: NDArray[np.uint64], *, entropy: Entropy) -> NDArray[np.int64]:
    """Integers X ≥ 0 with P(X ≥ k) = exp(-k/scale): X = ⌊scale · -ln U⌋, exactly."""
    exponential, error = _exponentials(words)
    value = exponential * scale
    slack = error * scale + value * 2.0**-50
    low, high = np.floor(value - slack), np.floor(value + slack)
    result = np.maximum(low, 0.0).astype(np.int64)  # low = -inf where the error is infinite
    for index in np.flatnonzero(low != high).tolist():
        uniform = _LazyUniform(int(words[index]), entropy)
        reached, step = int(result[index]), 1  # X ≥ reached is certain
        while uniform.below_exp(Fraction(reached + step, scale)):
            reached, step = reached + step, 2 * step
        while step > 1:  # reached ≤ X < reached + step
            step //= 2
            if uniform.below_exp(Fraction(reached + step, scale)):
                reached += step
        result[index] = reached
    return result


def _accepted(
    rates: NDArray[np.float64],
    rate_errors: NDArray[np.float64],
    *,
    exact_rate: Callable[[int], Fraction],
    entropy: Entropy,
) -> NDArray[np.bool_]:
    """For every i whether a fresh U lies below exp(-rate_i); `exact_rate(i)` is rate_i without error."""
    words = entropy.words(rates.size)
    exponential, error = _exponentials(words)
    gap = exponential - rates
    result = gap > 0.0
    for index in np.flatnonzero(np.abs(gap) <= error + rate_errors).tolist():
        result[index] = _LazyUniform(int(words[index]), entropy).below_exp(exact_rate(index))
    return result


def _batch(sigma2: Fraction, count: int, *, entropy: Entropy) -> NDArray[np.int64]:
    """Draws that survive out of `count` proposals (Canonne, Kamath & Steinke 2020, Algorithms 2 and 3)."""
    scale = math.isqrt(int(sigma2)) + 1  # t = ⌊σ⌋ + 1
    magnitude = _geometric(scale, entropy.words(count), entropy=entropy)
    signs = np.unpackbits(entropy.words(-(-count // 64)).view(np.uint8), count=count).astype(np.bool_)
    keep = ~(signs & (magnitude == 0))  # zero must not be counted twice
    magnitude, signs = magnitude[keep], signs[keep]
    centre = sigma2 / scale
    centre_float, variance = float(centre), float(sigma2)
    wide = magnitude.astype(np.float64)
    rates = (wide - centre_float) ** 2 / (2.0 * variance)
    # |y| - σ²/t is off by 2^-52 of |y| + σ²/t at most; its square over 2σ² by less than 2^-49 of the term below.
    rate_errors = (wide + centre_float) ** 2 / variance * 2.0**-46

    def exact_rate(index: int) -> Fraction:
        return (int(magnitude[index]) - centre) ** 2 / (2 * sigma2)

    keep = _accepted(rates, rate_errors, exact_rate=exact_rate, entropy=entropy)
    result: NDArray[np.int64] = magnitude[keep]
    result[signs[keep]] *= -1
    return result


def discrete_gaussian(sigma2: Fraction | int, size: int, *, entropy: Entropy) -> NDArray[np.int64]:
    """Independent exact draws of N_Z(0, σ²): P(z) ∝ exp(-z²/(2σ²)) over the integers.

    Args:
        sigma2: σ² as an exact rational in [0, 2^80]; 0 gives zeros and draws nothing.
        size: number of draws, ≥ 0.

    Returns:
        shape (size,), dtype int64.

    Raises:
        InvalidInput: `sigma2` or `size` out of range.
    """
    variance = Fraction(sigma2)
    if not 0 <= variance <= MAX_SIGMA2 or size < 0:
        raise InvalidInput("a discrete Gaussian needs σ² in [0, 2^80] and a size ≥ 0")
    if 0 < variance < Fraction(1, MAX_SIGMA2):
        raise InvalidInput("a discrete Gaussian with σ² below 2^-80 is not supported: use 0")
    result = np.zeros(size, dtype=np.int64)
    if variance == 0:
        return result
    filled = 0
    while filled < size:
        # About two proposals in three survive; a few more than needed spare a second batch.
        drawn = _batch(variance, min(_CHUNK, (size - filled) * 3 // 2 + 32), entropy=entropy)[: size - filled]
        result[filled : filled + drawn.size] = drawn
        filled += drawn.size
    return result


def tail_bound(sigma2: Fraction | int, *, log2_probability: int, draws: int) -> int:
    """Smallest convenient T with draws · P(|Z| > T) ≤ 2^-log2_probability.

    From P(|Z| ≥ λ) ≤ 2·exp(-λ²/(2σ²)): a discrete Gaussian is σ²-sub-Gaussian (Canonne, Kamath & Steinke 2020; E e^{tZ}
    is e^{σ²t²/2} times a ratio of theta sums that is largest, 1, at t = 0), and so is a sum of independent ones with
    the sum of their variances, which may be passed as `sigma2`. Computed in integers.

    Args:
        sigma2: σ² ≥ 0, in squared integer units.
        log2_probability: ≥ 0.
        draws: ≥ 1.

    Returns:
        T ≥ 0, in integer units; 0 without noise.

    Raises:
        InvalidInput: `sigma2` negative, `log2_probability` negative or `draws` below 1.
    """
    variance = Fraction(sigma2)
    if variance < 0 or log2_probability < 0 or draws < 1:
        raise InvalidInput("a tail bound needs σ² ≥ 0, log2_probability ≥ 0 and draws ≥ 1")
    if variance == 0:
        return 0
    exponent = log2_probability + 1 + (draws - 1).bit_length()  # bit_length(draws - 1) = ⌈log2 draws⌉
    return math.isqrt(math.ceil(2 * variance * _LN2_UPPER * exponent)) + 1


def sum_divergence(share_sigma2: Fraction, shares: int, *, other_sigma2: Fraction | int = 0) -> float:
    """τ: how far a sum of independent discrete Gaussians is from one discrete Gaussian, per coordinate.

    Each convolution of N_Z(0, a) with N_Z(0, b) is within a factor exp(±5·exp(-2π²/(1/a + 1/b))) of N_Z(0, a + b); τ is
    twice the sum over all convolutions. For n equal shares this is 10·Σ_{k<n} exp(-2π²σ²·k/(k+1)) (Kairouz, Liu &
    Steinke 2021, Theorem 1). `other_sigma2` is one further draw, the aggregator's. In d dimensions with total variance
    S and L2 sensitivity Δ the Rényi divergence of order α is at most αΔ²/(2S) + τd and at most (α/2)(Δ/√S + τ√d)²
    (ibid., Proposition 14).

    Args:
        share_sigma2: σ² of one share.
        shares: number of shares, ≥ 0.

    Returns:
        τ ≥ 0; 0 where nothing is convolved (and where τ is below the smallest float, about 1e-308).

    Raises:
        InvalidInput: a variance below 1/4 takes part in a convolution, where the theorem says nothing.
    """
    parts = [Fraction(other_sigma2)] if other_sigma2 else []
    parts += [Fraction(share_sigma2)] * shares
    if len(parts) < 2:
        return 0.0
    if min(parts) < MIN_SHARE_SIGMA2:
        raise InvalidInput("noise shares need a variance of at least 1/4 in integer units: raise the resolution")
    tau = 0.0
    total = parts[0]
    for part in parts[1:]:
        tau += 10.0 * math.exp(-2.0 * math.pi**2 * float(total * part / (total + part)))
        total += part
    return tau
