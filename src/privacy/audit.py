"""How much a training run gave away, at least: the statistics of a one-run audit; and a test of the noise's variance.

An auditor puts each of m canaries into the training data with probability 1/2, trains once, and guesses of r canaries
whether they were in. If training is (ε, δ)-differentially private under the adding or removing of one example, v or
more of the guesses are right only with a small probability, which `p_value` bounds; the ε that are too small for what
was seen lie below `epsilon_lower_bound`. Source: Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1)
Training Run" (arXiv:2305.08846), Theorem 5.2, Corollary 5.4 and Appendix D.

The auditor may choose what to guess by all that training gave out, but r, and which δ, confidence and ε are asked for,
must be fixed beforehand. All bounds here err toward finding less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput

VERDICT_P: Final = 1e-4
"""A one-run audit flags a mechanism at this p-value: the right one in at most one of 10 000 audits."""

VARIANCE_P: Final = 1e-6
"""A variance test flags a mechanism at this p-value: the right one in at most one of a million tests."""

MAX_P: Final = 0.3
"""Largest p for a lower bound: below it `p_value` grows with ε up to where it crosses p, so bisection finds the end."""

_GUESSED: Final = 50
_MARGIN: Final = 1.1  # for the term of δ
_LARGE: Final = 100.0  # e^100 guesses are more than there are canaries
_MIN_GUESSES: Final = 100
_BISECTIONS: Final = 50


def default_guesses(canaries: int, *, epsilon: float) -> int:
    """How many guesses to make against a claim of `epsilon`: one for 50 canaries, or as many as it takes to refute it.

    Few guesses at the extremes show a large ε by luck, many show less surely: one in 50 finds halved noise most often
    (docs/audit.md). But r guesses, all of them right, refute ε at `VERDICT_P` only if r ≥ ln(1/p)·(1 + e^ε). Where
    that is beyond all canaries, nothing can be refuted, and one in 50 gives the best lower bound again.

    Args:
        canaries: ≥ 1; the result is at most this.
        epsilon: the claim at `verdict_delta`.
    """
    few = max(_MIN_GUESSES, canaries // _GUESSED)
    needed = math.ceil(_MARGIN * math.log(1.0 / VERDICT_P) * (1.0 + math.exp(min(epsilon, _LARGE))))
    return min(canaries, few if needed > canaries else max(few, needed))


def verdict_delta(canaries: int, delta: float) -> float:
    """The δ, at most `delta`, at which a verdict is sought: there δ itself adds at most a tenth of `VERDICT_P` to p.

    The term of δ in `p_value` is 2·m·δ·α with α ≤ 1. An accountant says for every δ what ε is, so whoever finds ε
    exceeded at this one has found the accountant, or what it was told, to be wrong.
    """
    return min(delta, VERDICT_P / (20.0 * canaries))


def _check(canaries: int, guesses: int, correct: int, delta: float) -> None:
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise InvalidInput("an audit needs 0 ≤ correct ≤ guesses ≤ canaries and at least one canary")
    if not 0.0 <= delta < 1.0:
        raise InvalidInput("delta must lie in [0, 1)")


def _tail(canaries: int, guesses: int, correct: int, delta: float) -> Callable[[float], float]:
    """ε → the p-value. W ~ Binomial(r, e^ε/(1 + e^ε)) has weights C(r, k)·e^{kε}, normalised here by their sum."""
    steps = np.arange(1, guesses + 1, dtype=np.float64)
    log_binomials = np.concatenate(([0.0], np.cumsum(np.log((guesses - steps + 1.0) / steps))))
    counts = np.arange(guesses + 1, dtype=np.float64)

    def p_of(epsilon: float) -> float:
        weights = log_binomials + epsilon * counts
        mass = np.exp(weights - weights.max())
        mass /= mass.sum()
        beta = float(mass[correct:].sum())  # P(W ≥ v)
        below = np.cumsum(mass[:correct][::-1]) / steps[:correct]  # P(v > W ≥ v - i)/i for i = 1, …, v
        alpha = float(below.max()) if correct else 0.0
        return min(1.0, beta + 2.0 * canaries * delta * alpha)

    return p_of


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of so many right guesses, or more, if training is (`epsilon`, `delta`)-DP.

    P(W ≥ v) + 2·m·δ·max_i P(v > W ≥ v - i)/i with W ~ Binomial(r, e^ε/(1 + e^ε)), at most 1.

    Args:
        canaries: m ≥ 1, each in the data with probability 1/2, independently.
        guesses: r ≤ m; for the others the auditor abstained.
        correct: v ≤ r.
        epsilon: ≥ 0, finite.
        delta: in [0, 1).

    Raises:
        InvalidInput: an argument out of range.
    """
    _check(canaries, guesses, correct, delta)
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise InvalidInput("epsilon must be finite and at least 0")
    return _tail(canaries, guesses, correct, delta)(epsilon)


def can_refute(*, canaries: int, guesses: int, epsilon: float, delta: float, p: float) -> bool:
    """Whether so many guesses, if all of them were right, would refute a claim at `p`; arguments as `p_value`.

    No number of guesses refutes an infinite ε.
    """
    if math.isinf(epsilon):
        return False
    return p_value(canaries=canaries, guesses=guesses, correct=guesses, epsilon=epsilon, delta=delta) <= p


def epsilon_lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, p: float) -> float:
    """ε below which `p_value` stays under `p`: training is not (ε', δ)-DP for any ε' below it, at confidence 1 - p.

    Args:
        canaries, guesses, correct, delta: as in `p_value`.
        p: in (0, `MAX_P`].

    Returns:
        ε ≥ 0; 0 where nothing is shown.

    Raises:
        InvalidInput: an argument out of range.
    """
    _check(canaries, guesses, correct, delta)
    if not 0.0 < p <= MAX_P:
        raise InvalidInput(f"p must lie in (0, {MAX_P}]")
    p_of = _tail(canaries, guesses, correct, delta)
    low, high = 0.0, 1.0
    if p_of(low) >= p:
        return 0.0
    while p_of(high) < p:
        low, high = high, 2.0 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_of(middle) < p else (low, middle)
    return low


def correct_guesses(scores: NDArray[np.float64], included: NDArray[np.bool_], *, guesses: int) -> int:
    """How many guesses are right: "in" for the highest scores, "out" for the lowest, half of `guesses` each.

    An odd number has one more "in". Equal scores go by their position, which says nothing of who was in.

    Args:
        scores: shape (m,), finite: the higher, the likelier in.
        included: shape (m,): who was in.
        guesses: 0 ≤ r ≤ m.

    Raises:
        InvalidInput: shapes differ, a score is not finite, or more guesses than canaries.
    """
    if scores.ndim != 1 or scores.shape != included.shape or not 0 <= guesses <= len(scores):
        raise InvalidInput("there is one score for each canary, and there are no more guesses than canaries")
    if not np.isfinite(scores).all():
        raise InvalidInput("a canary's score is not finite: the training diverged")
    order = np.argsort(scores, kind="stable")
    lowest = guesses // 2
    highest = guesses - lowest
    return int(included[order[len(order) - highest :]].sum() + (~included[order[:lowest]]).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceTest:
    """Whether noise has the variance it should have.

    Attributes:
        count: values seen.
        ratio: their mean square over the planned variance.
        low, high: where `ratio` lies with the right noise, but for a chance of at most `VARIANCE_P`.
        p_value: a bound on the probability of a ratio as far from 1 as this, with the right noise.
    """

    count: int
    ratio: float
    low: float
    high: float
    p_value: float

    @property
    def flagged(self) -> bool:
        """Whether this is not the planned noise."""
        return self.p_value <= VARIANCE_P


def _divergence(ratio: float) -> float:
    """t - 1 - ln t: P(χ²_n ≥ nt) for t ≥ 1, and P(χ²_n ≤ nt) for t ≤ 1, are at most exp(-n/2 of it)."""
    return math.inf if ratio == 0.0 else ratio - 1.0 - math.log(ratio)


def _crossing(inside: float, outside: float, level: float) -> float:
    """Where `_divergence` reaches `level` between 1 (`inside`) and a ratio that is beyond it (`outside`)."""
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2.0
        inside, outside = (inside, middle) if _divergence(middle) >= level else (middle, outside)
    return outside


def variance_test(values: NDArray[np.float64], *, variance: float) -> VarianceTest:
    """Compare the mean square of `values`, independent normals of mean 0 if all is right, with `variance`.

    By the Cramér-Chernoff bound of χ² with n degrees of freedom (Boucheron, Lugosi & Massart 2013, "Concentration
    Inequalities", section 2.4), on both sides: an upper bound on p for every n, with no approximation.

    Args:
        values: shape (n,), n ≥ 1.
        variance: planned, > 0, finite.

    Raises:
        InvalidInput: no values, one that is not finite, or `variance` out of range.
    """
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise InvalidInput("a variance test needs finite values, at least one")
    if not (math.isfinite(variance) and variance > 0.0):
        raise InvalidInput("the planned variance must be positive and finite")
    ratio = float(np.mean(np.square(values / math.sqrt(variance))))
    level = 2.0 * math.log(2.0 / VARIANCE_P) / values.size
    return VarianceTest(
        count=values.size,
        ratio=ratio,
        low=_crossing(1.0, 0.0, level),
        high=_crossing(1.0, 2.0 + 2.0 * level, level),  # at t = 2 + 2x: 1 + 2x - ln(2 + 2x) > x for x > 0
        p_value=min(1.0, 2.0 * math.exp(-values.size / 2.0 * _divergence(ratio))),
    )
