"""What right guesses prove, held against exact arithmetic and against mechanisms that are as bad as they may be."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput
from src.privacy.audit import (
    VARIANCE_P,
    VERDICT_P,
    correct_guesses,
    default_guesses,
    epsilon_lower_bound,
    p_value,
    variance_test,
    verdict_delta,
)


def exact_p_value(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> Fraction:
    """The slow oracle: Corollary 5.4 of the paper, term by term, in whole numbers, for e^ε = `odds`."""
    a, b = odds.numerator, odds.denominator
    mass = [math.comb(r, k) * a**k * b ** (r - k) for k in range(r + 1)]  # over (a + b)^r
    alpha, window = Fraction(0), 0
    for i in range(1, v + 1):  # for i > v the window grows no more, and is divided by more
        window += mass[v - i]
        if window * alpha.denominator > alpha.numerator * i:
            alpha = Fraction(window, i)
    whole: int = (a + b) ** r
    return min(Fraction(1), Fraction(sum(mass[v:]) + 2 * alpha * m * delta, whole))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_p_value_is_the_papers(data: st.DataObject) -> None:
    r = data.draw(st.integers(0, 40))
    m = data.draw(st.integers(max(1, r), 60))
    v = data.draw(st.integers(0, r))
    odds = Fraction(data.draw(st.integers(8, 200)), 8)
    delta = Fraction(data.draw(st.integers(0, 100)), 10_000)
    got = p_value(canaries=m, guesses=r, correct=v, epsilon=math.log(odds), delta=float(delta))
    assert got == pytest.approx(float(exact_p_value(m, r, v, odds, delta)), rel=1e-9)


def test_the_p_value_is_the_papers_for_many_guesses_too() -> None:
    exact = exact_p_value(1500, 1500, 1100, Fraction(5, 2), Fraction(1, 100_000))
    got = p_value(canaries=1500, guesses=1500, correct=1100, epsilon=math.log(2.5), delta=1e-5)
    assert got == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("guesses", "p", "expected"), [(10, 0.05, 1.0519), (100, 0.05, 3.4930), (1000, 0.05, 5.8091), (100, 1e-4, 2.3384)]
)
def test_known_answer_all_guesses_right(guesses: int, p: float, expected: float) -> None:
    """With δ = 0 the bound is where q^r = p: ε = ln(q/(1 - q)) with q = p^(1/r)."""
    q = p ** (1 / guesses)
    assert math.log(q / (1 - q)) == pytest.approx(expected, abs=1e-4)
    bound = epsilon_lower_bound(canaries=guesses, guesses=guesses, correct=guesses, delta=0.0, p=p)
    assert bound == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_epsilon_below_the_bound_is_refuted_and_the_bound_is_not(data: st.DataObject) -> None:
    """So bisection finds the end of an interval: the p-value does not fall below p again on the way."""
    r = data.draw(st.integers(1, 300))
    m = data.draw(st.integers(r, 400))
    v = data.draw(st.integers(0, r))
    delta = data.draw(st.sampled_from([0.0, 1e-6, 1e-4, 1e-3]))
    p = data.draw(st.sampled_from([0.3, 0.05, 1e-4]))
    bound = epsilon_lower_bound(canaries=m, guesses=r, correct=v, delta=delta, p=p)

    def at(epsilon: float) -> float:
        return p_value(canaries=m, guesses=r, correct=v, epsilon=epsilon, delta=delta)

    assert all(at(share * bound) < p for share in np.linspace(0.0, 0.999, 50)) or bound == 0.0
    assert at(bound + 1e-6) >= p


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_more_right_guesses_show_more_and_a_larger_delta_or_certainty_shows_less(data: st.DataObject) -> None:
    r = data.draw(st.integers(2, 200))
    v = data.draw(st.integers(1, r))

    def bound(correct: int = v, delta: float = 1e-5, p: float = 0.05, m: int = 500) -> float:
        return epsilon_lower_bound(canaries=m, guesses=r, correct=correct, delta=delta, p=p)

    assert bound(correct=v - 1) <= bound() <= bound(delta=0.0)
    assert bound(delta=1e-3) <= bound()
    assert bound(p=1e-3) <= bound()
    assert bound(m=5000) <= bound()


def right_guesses_of_randomized_response(m: int, q: Fraction) -> list[Fraction]:
    return [math.comb(m, k) * q**k * (1 - q) ** (m - k) for k in range(m + 1)]


@pytest.mark.parametrize("odds", [Fraction(1), Fraction(3, 2), Fraction(4)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000), Fraction(1, 20)])
@pytest.mark.parametrize("p", [0.3, 0.05, 1e-4])
def test_the_worst_mechanisms_are_refuted_no_more_often_than_promised(
    odds: Fraction, delta: Fraction, p: float
) -> None:
    """Randomized response that with probability δ tells all is (ε, δ)-DP. Exactly, with no simulation: the probability
    of a lower bound above the true ε is at most p."""
    m = 40
    mass = [(1 - delta) * share for share in right_guesses_of_randomized_response(m, odds / (1 + odds))]
    mass[m] += delta
    epsilon = math.log(odds)
    wrong = sum(
        share
        for v, share in enumerate(mass)
        if epsilon_lower_bound(canaries=m, guesses=m, correct=v, delta=float(delta), p=p) > epsilon
    )
    assert wrong <= p


def test_the_bound_is_close_to_the_truth_where_it_can_be() -> None:
    """Randomized response at ε = 1, with the expected number of right guesses of 100 000."""
    right = int(100_000 * math.e / (1 + math.e))
    bound = epsilon_lower_bound(canaries=100_000, guesses=100_000, correct=right, delta=0.0, p=0.05)
    assert 0.98 < bound < 1.0


@pytest.mark.parametrize("canaries", [1, 1000, 100_000, 1_000_000])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_default_guesses_can_refute_the_claim_or_all_canaries_could_not(canaries: int, epsilon: float) -> None:
    delta = verdict_delta(canaries, 1e-5)
    guesses = default_guesses(canaries, epsilon=epsilon)
    assert 1 <= guesses <= canaries
    all_right = {"canaries": canaries, "epsilon": epsilon, "delta": delta}
    refuted = p_value(guesses=guesses, correct=guesses, **all_right) <= VERDICT_P  # type: ignore[arg-type]
    assert refuted or p_value(guesses=canaries, correct=canaries, **all_right) > VERDICT_P  # type: ignore[arg-type]


def test_default_guesses_against_a_claim_that_nothing_refutes() -> None:
    assert default_guesses(100_000, epsilon=math.inf) == 2000


@pytest.mark.parametrize("correct", [0, 50, 90, 100])
@pytest.mark.parametrize("canaries", [100, 10_000, 1_000_000])
def test_at_the_verdicts_delta_delta_hardly_counts(canaries: int, correct: int) -> None:
    delta = verdict_delta(canaries, 1e-5)
    assert delta <= 1e-5
    with_it = p_value(canaries=canaries, guesses=100, correct=correct, epsilon=1.0, delta=delta)
    without = p_value(canaries=canaries, guesses=100, correct=correct, epsilon=1.0, delta=0.0)
    assert without <= with_it <= without + VERDICT_P / 10


# ----------------------------------------------------------------------------------------------------------- guessing


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=12), st.integers(0, 12))
def test_guesses_are_the_extremes(canaries: list[tuple[int, bool]], guesses: int) -> None:
    guesses = min(guesses, len(canaries))
    ranked = sorted(enumerate(canaries), key=lambda item: (item[1][0], item[0]))
    out, in_ = ranked[: guesses // 2], ranked[len(ranked) - (guesses - guesses // 2) :]
    expected = sum(not was_in for _, (_, was_in) in out) + sum(was_in for _, (_, was_in) in in_)
    scores = np.array([score for score, _ in canaries], dtype=np.float64)
    included = np.array([was_in for _, was_in in canaries], dtype=np.bool_)
    assert correct_guesses(scores, included, guesses=guesses) == expected


@pytest.mark.parametrize(
    ("scores", "included", "guesses"),
    [
        ([1.0, math.nan], [True, False], 1),
        ([1.0, math.inf], [True, False], 1),
        ([1.0, 2.0], [True], 1),
        ([1.0, 2.0], [True, False], 3),
        ([1.0, 2.0], [True, False], -1),
    ],
)
def test_refuses_scores_that_say_nothing(scores: list[float], included: list[bool], guesses: int) -> None:
    with pytest.raises(InvalidInput):
        correct_guesses(np.array(scores), np.array(included), guesses=guesses)


REFUSED = [
    {"canaries": 0, "guesses": 0, "correct": 0},
    {"guesses": 11},
    {"correct": 6},
    {"correct": -1},
    {"delta": -0.1},
    {"delta": 1.0},
    {"delta": math.nan},
]


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_refuses_counts_and_deltas_out_of_range(change: dict[str, float]) -> None:
    given_ = {"canaries": 10, "guesses": 5, "correct": 3, "delta": 1e-5} | change
    with pytest.raises(InvalidInput):
        p_value(**given_, epsilon=1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        epsilon_lower_bound(**given_, p=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_refuses_an_epsilon_out_of_range(epsilon: float) -> None:
    with pytest.raises(InvalidInput):
        p_value(canaries=10, guesses=5, correct=3, epsilon=epsilon, delta=0.0)


@pytest.mark.parametrize("p", [0.0, 0.31, 1.0, math.nan])
def test_refuses_a_confidence_at_which_bisection_might_err(p: float) -> None:
    with pytest.raises(InvalidInput):
        epsilon_lower_bound(canaries=10, guesses=5, correct=3, delta=0.0, p=p)


# ----------------------------------------------------------------------------------------------------------- variance


def normals(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=count)


@pytest.mark.parametrize("count", [1, 10, 1000, 65_536])
def test_noise_of_the_planned_variance_passes(count: int) -> None:
    """False alarm at most 1e-6 for each by the bound itself, and the draws are seeded."""
    found = variance_test(3.0 * normals(count, seed=count), variance=9.0)
    assert not found.flagged
    assert found.low < found.ratio < found.high
    assert found.count == count


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 1.05, 2.0])
def test_noise_of_another_size_is_flagged(factor: float) -> None:
    found = variance_test(factor * normals(65_536, seed=1), variance=1.0)
    assert found.flagged
    assert not found.low < found.ratio < found.high


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 65_536])
def test_the_interval_is_where_the_p_value_is_the_one_that_flags(count: int) -> None:
    edges = variance_test(normals(count, seed=2), variance=1.0)
    for edge in (edges.low, edges.high):
        assert variance_test(np.full(count, math.sqrt(edge)), variance=1.0).p_value == pytest.approx(
            VARIANCE_P, rel=1e-2
        )


@pytest.mark.parametrize("half", [1, 3, 20])
@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.0, 1.5, 3.0])
def test_the_p_value_is_never_below_the_exact_one(half: int, ratio: float) -> None:
    """χ² with 2k degrees of freedom exceeds 2x with the probability that a Poisson(x) variable is below k."""
    x = half * ratio
    above = sum(math.exp(-x) * x**j / math.factorial(j) for j in range(half))
    got = variance_test(np.full(2 * half, math.sqrt(ratio)), variance=1.0).p_value
    assert got >= (above if ratio >= 1 else 1 - above)


@pytest.mark.parametrize(
    ("values", "variance"), [([], 1.0), ([1.0, math.nan], 1.0), ([1.0], 0.0), ([1.0], math.inf), ([1.0], -1.0)]
)
def test_refuses_what_cannot_be_compared(values: list[float], variance: float) -> None:
    with pytest.raises(InvalidInput):
        variance_test(np.array(values), variance=variance)
