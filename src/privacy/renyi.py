"""Rényi divergence of one Poisson-sampled Gaussian, small or of a large order, from sums in which nothing cancels.

With b_j the mass of Binomial(k, q) at j, and c_j = (j² - j)/2z², E_P[(M/P)^k] = Σ b_j·e^(c_j) (Mironov, Talwar & Zhang
2019; docs/accounting.md). Since Σ b_j = 1 and c_0 = c_1 = 0, that is 1 + Σ_{j ≥ 2} b_j·(e^(c_j) - 1): terms above 0, so
that the logarithm keeps its digits however small it is. dp-accounting adds up the b_j·e^(c_j), and of a figure that
comes to 1 + 10⁻¹⁶ rounding is left, which may be negative.

Every figure is an upper bound: what is left out of a sum is bounded and added, and so is what doubles lose.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LARGEST_ORDER: Final = 2.0**21

_WHOLE_SUMS: Final = 1024
"""Up to this order all terms are added up; above it those near the largest, and a bound on the others."""

_FAR: Final = tuple(round(_WHOLE_SUMS * 2.0 ** (step / 8.0)) for step in range(89))
"""Orders above `_WHOLE_SUMS` of which a sum is made, eight to the octave: on the chords between them a divergence that
grows with the order is at most 0.2 % too high."""

_LOST: Final = 2.0**-24
"""What doubles may lose of a sum, as a part of it: the logarithm of a binomial coefficient of 2^21 is near 10^7, and so
is good to 10^-8."""

_NEGLIGIBLE: Final = 24.0
"""What is bounded, not added up, is e^-24 of the sum or less, unless there is a second peak."""

_MOST_TERMS: Final = 1 << 18
"""That are added up at one order; where these do not do, the divergence without sampling stands for it."""


def sampled_gaussian(sampling_rate: float, noise_multiplier: float, orders: Sequence[float]) -> Array:
    """Upper bounds on the divergence of one release, one at each order, shape (len(orders),).

    Between the orders of which sums are made (all whole ones up to 1024) the bound lies on the chord: (α - 1)·D is
    convex in α (van Erven & Harremoës 2014, Corollary 2), and 0 at α = 1.

    Args:
        sampling_rate: q in (0, 1).
        noise_multiplier: z in [2^-20, 2^40].
        orders: above 1, at most `LARGEST_ORDER`.
    """
    known = {1: 0.0}

    def moment(order: int) -> float:
        if order not in known:
            known[order] = _log_moment(sampling_rate, noise_multiplier, order)
        return known[order]

    found = []
    for order in orders:
        high = math.ceil(order) if order <= _WHOLE_SUMS else _FAR[bisect_left(_FAR, order)]
        low = high - 1 if order <= _WHOLE_SUMS else _FAR[bisect_left(_FAR, order) - 1]
        part = (order - low) / (high - low)
        chord = moment(high) if part == 1.0 else (1.0 - part) * moment(low) + part * moment(high)
        found.append(chord / (order - 1.0))
    return np.array(found)


def loses_digits(sampling_rate: float, noise_multiplier: float) -> bool:
    """Whether a sum of the b_j·e^(c_j) themselves has less than 30 bits of the divergence.

    The logarithm of what it begins with is near -kq, of which a double keeps 53 bits; the divergence is k²q²/2z².
    """
    return noise_multiplier * noise_multiplier > 2.0**22 * sampling_rate


def _log_moment(rate: float, multiplier: float, order: int) -> float:
    """ln E_P[(M/P)^k] for a whole k ≥ 2, at most."""
    unsampled = order * (order - 1) / (2.0 * multiplier * multiplier)
    # The last term alone is q^k·e^(c_k), to the power 1/k: where that is above e there is nothing left to be had.
    if order > _WHOLE_SUMS and order / (2.0 * multiplier * multiplier) > 1.0 - math.log(rate):
        return unsampled
    sums = _Terms(rate, multiplier, order)
    log_sum = sums.all() if order <= _WHOLE_SUMS else sums.most()
    return min(unsampled, float(np.logaddexp(0.0, log_sum)) * (1.0 + _LOST))


class _Terms:
    """Those of one order k: b_j·(e^(c_j) - 1), j = 2 … k, none of which exceeds e^f(j) = b_j·e^(c_j).

    f is concave, but for one interval around k/2 at most, where it bends up.
    """

    def __init__(self, rate: float, multiplier: float, order: int) -> None:
        self._rate, self._order = rate, order
        self._square = multiplier * multiplier
        self._log_odds = math.log(rate) - math.log1p(-rate)

    def all(self) -> float:
        """ln of the sum."""
        return _log_sum(self._terms(2, self._order))

    def most(self) -> float:
        """ln of the sum, at most: of the terms around the first peak of f, and as far up as they matter.

        Below, f grows, and a term by no less: e^(c_j) - 1 grows by e^(c_j - c_(j-1)) at least. Infinite where this
        takes too many terms.
        """
        order, peak = self._order, self._first_peak()
        bend = 1.0 / (peak + 1.0) + 1.0 / (order - peak) - 1.0 / self._square
        deviation = 1.0 / math.sqrt(max(bend, 1.0 / order))
        step = int(4.0 * deviation) + 32
        first, last = max(2, peak - 2 * step), min(order, peak + 2 * step)
        terms = self._terms(first, last)
        total = _log_sum(terms)
        if first > 2:
            total = float(np.logaddexp(total, math.log(first) + terms[0]))
        while last < order:
            if self._growth(last) < 0.0 and self._exponent(last) + math.log(order) < total - _NEGLIGIBLE:
                return float(np.logaddexp(total, math.log(order) + self._largest_from(last)))
            if last - first > _MOST_TERMS:
                return math.inf
            terms = self._terms(last + 1, min(order, last + step))
            total, last = float(np.logaddexp(total, _log_sum(terms))), last + len(terms)
        return total

    def _terms(self, first: int, last: int) -> Array:
        places = np.arange(float(first), last + 1.0)
        ratios = np.log((self._order - places[:-1]) / (places[:-1] + 1.0)) + self._log_odds
        exponents = places * (places - 1.0) / (2.0 * self._square)
        result: Array = exponents + np.log(-np.expm1(-exponents)) + self._log_mass(first)
        result[1:] += np.cumsum(ratios)
        return result

    def _log_mass(self, place: int) -> float:
        """ln b_j."""
        order = self._order
        coefficient = math.lgamma(order + 1.0) - math.lgamma(place + 1.0) - math.lgamma(order - place + 1.0)
        return coefficient + place * math.log(self._rate) + (order - place) * math.log1p(-self._rate)

    def _exponent(self, place: int) -> float:
        """f(j)."""
        return self._log_mass(place) + place * (place - 1.0) / (2.0 * self._square)

    def _growth(self, place: int) -> float:
        """f(j + 1) - f(j), for j < k."""
        return math.log((self._order - place) / (place + 1.0)) + self._log_odds + place / self._square

    def _bends_up(self, place: int) -> bool:
        """Whether that grows from j to j + 1. By how much is concave in j, and symmetric: so in one interval only."""
        left, right = self._order - place, place + 2.0
        return left > 1 and math.log1p(-1.0 / left) + math.log1p(-1.0 / right) + 1.0 / self._square > 0.0

    def _first_peak(self) -> int:
        """The last j up to which f grows while it does not bend up; it grows up to the mean of the binomial."""
        mean, middle, end = int(self._order * self._rate), self._order // 2 - 1, self._order - 1
        start = max(1, mean - 1)
        if start < middle and self._bends_up(middle):
            end = _last(start, middle, holds=lambda at: not self._bends_up(at))
        return _last(start, end, holds=lambda at: self._growth(at) > 0.0)

    def _largest_from(self, place: int) -> float:
        """The largest f(i), i = j … k, if f falls at j.

        It falls on until it bends up; there it is below its ends; and behind that there is one peak.
        """
        middle, end = self._order // 2 - 1, self._order - 1
        if place < middle and not self._bends_up(middle):
            return self._exponent(place)
        bent = _last(max(place, middle), end, holds=self._bends_up)
        behind = min(bent + 1, end)
        peak = _last(behind, end, holds=lambda at: self._growth(at) > 0.0) + 1
        return max(self._exponent(at) for at in (place, behind, peak))


def _last(low: int, high: int, *, holds: Callable[[int], bool]) -> int:
    """The last integer in [low, high] up to which it holds; `low` where it holds nowhere."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _log_sum(terms: Array) -> float:
    largest = float(terms.max())
    return largest + math.log(float(np.exp(terms - largest).sum()))
