"""The discrete Gaussian: its law, its exactness, its tail, and the divergence of sums of several."""

from __future__ import annotations

import decimal
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.privacy import noise
from src.privacy.entropy import DeterministicEntropy, SystemEntropy
from src.privacy.noise import discrete_gaussian, sum_divergence, tail_bound


def source(purpose: str) -> DeterministicEntropy:
    return DeterministicEntropy(b"noise tests", purpose=purpose)


def log_mass(sigma2: float, reach: int) -> NDArray[np.float64]:
    """ln P(z) for z = -reach … reach."""
    z = np.arange(-reach, reach + 1, dtype=np.float64)
    logs = -(z**2) / (2 * sigma2)
    return np.asarray(logs - np.logaddexp.reduce(logs))


def chi_squared_limit(degrees: int) -> float:
    """99.9 % quantile of χ² (Wilson & Hilferty 1931)."""
    return float(degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3)


@pytest.mark.parametrize(
    "sigma2", [Fraction(1, 10), Fraction(1, 4), Fraction(7, 9), 1, 2, Fraction(31, 7), 10, 1_000], ids=str
)
def test_draws_follow_the_exact_mass_function(sigma2: Fraction | int) -> None:
    """χ² over all cells with an expectation of at least ten; the tails on either side are pooled into one cell each."""
    count = 200_000
    draws = discrete_gaussian(sigma2, count, entropy=source(f"chi {sigma2}"))
    assert draws.dtype == np.int64
    reach = 400
    expected = np.exp(log_mass(float(sigma2), reach)) * count
    kept = np.flatnonzero(expected >= 10)
    low, high = int(kept[0]) - reach, int(kept[-1]) - reach
    cells = np.bincount(np.clip(draws, low, high) - low, minlength=high - low + 1)
    law = expected[kept[0] : kept[-1] + 1].copy()
    law[0] += expected[: kept[0]].sum()
    law[-1] += expected[kept[-1] + 1 :].sum()
    assert float(((cells - law) ** 2 / law).sum()) < chi_squared_limit(len(law) - 1)


def upper_half(sigma: float) -> NDArray[np.float64]:
    """P(0), P(1), P(2), … of the discrete Gaussian, up to 12 σ and 40."""
    mass = np.exp(-0.5 * (np.arange(int(12 * sigma) + 40, dtype=np.float64) / sigma) ** 2)
    return np.asarray(mass / (2 * mass.sum() - mass[0]))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 25.0, 1e3, 3e4, 1e6])
def test_draws_of_every_width_follow_the_exact_mass_function(sigma: float) -> None:
    """χ² on magnitude and sign, in up to 500 cells of equal mass whose expectations are sums of the mass function; and
    on the lowest bits, which a rounded continuous draw or a table of too few bits would get wrong first."""
    count = 400_000
    draws = discrete_gaussian(Fraction(sigma) ** 2, count, entropy=source(f"wide chi {sigma}"))
    half = upper_half(sigma)
    below = np.concatenate(([0.0], np.cumsum(half)))  # P(0 ≤ Z < k)
    edges = np.unique(np.searchsorted(below, np.linspace(half[0], below[-1], 251)))  # cells of |Z| ≥ 1
    edges = edges[edges >= 1]
    law = np.diff(below[np.append(edges, half.size)]) * count
    thin = int((law[::-1].cumsum() < 10).sum())  # cells at the end that hold less than ten together
    edges, law = edges[: edges.size - thin], np.append(law[: law.size - thin - 1], law[law.size - thin - 1 :].sum())
    expected = np.concatenate((law[::-1], [half[0] * count], law))
    places = np.searchsorted(edges, np.abs(draws), side="right") * np.sign(draws)
    cells = np.bincount(places + edges.size, minlength=expected.size)
    if half[0] * count < 10:  # zero joins the cell above it
        expected[edges.size + 1] += half[0] * count
        cells[edges.size + 1] += cells[edges.size]
        expected, cells = np.delete(expected, edges.size), np.delete(cells, edges.size)
    assert expected.sum() == pytest.approx(count)
    assert expected.min() >= 5
    assert float(((cells - expected) ** 2 / expected).sum()) < chi_squared_limit(len(expected) - 1)
    if sigma >= 25:  # then all residues modulo 16 have the same mass, to 1e-15
        residues = np.bincount(draws & 15, minlength=16)
        assert float(((residues - count / 16) ** 2 / (count / 16)).sum()) < chi_squared_limit(15)


@pytest.mark.parametrize("sigma2", [Fraction(1, 2), 50, 10**4, 10**10, Fraction(10**12 + 1, 3), 10**18], ids=str)
def test_moments_and_tails(sigma2: Fraction | int) -> None:
    """Mean 0, variance that of the law (σ² from σ ≥ 1 up, to 1e-7), kurtosis 3, sign symmetric, no draw beyond T."""
    count = 200_000
    draws = discrete_gaussian(sigma2, count, entropy=source(f"moments {sigma2}")).astype(np.float64)
    variance = float(sigma2)
    if sigma2 < 1:
        mass = np.exp(log_mass(variance, 40))
        variance = float((mass * np.arange(-40, 41) ** 2).sum())
    scaled = draws / math.sqrt(variance)
    assert abs(scaled.mean()) < 4 / math.sqrt(count)
    assert abs((scaled**2).mean() - 1) < 5 * math.sqrt(2 / count)
    if sigma2 > 1:
        assert abs((scaled**4).mean() - 3) < 5 * math.sqrt(96 / count)
        for threshold, outside in ((1.0, 0.3173), (2.0, 0.0455), (3.0, 0.0027)):
            seen = (np.abs(scaled) > threshold).mean()
            # 0.1 for the step of the lattice at σ² = 50
            assert abs(seen - outside) < 0.1 * outside * (sigma2 == 50) + 5 * math.sqrt(outside / count)
    assert np.abs(draws).max() <= tail_bound(sigma2, log2_probability=20, draws=count)


def test_zero_variance_draws_nothing() -> None:
    class Forbidden(SystemEntropy):
        def words(self, count: int) -> NDArray[np.uint64]:
            raise AssertionError("nothing should be drawn")

    assert discrete_gaussian(0, 5, entropy=Forbidden()).tolist() == [0] * 5


@pytest.mark.parametrize("size", [0, 1, 7, 1_000])
def test_the_size_is_the_size_asked_for(size: int) -> None:
    assert discrete_gaussian(3, size, entropy=SystemEntropy()).shape == (size,)


def test_coordinates_are_independent() -> None:
    """Neighbours, magnitudes of neighbours, and the two ends of a batch are uncorrelated."""
    count = 400_000
    draws = discrete_gaussian(10**6, count, entropy=source("independence")) / 1e3
    for values in (draws, np.abs(draws) - np.abs(draws).mean(), draws**2 - 1):
        scaled = values / values.std()
        for lag in (1, 2, 7, 1 << 18):
            assert abs(float((scaled[lag:] * scaled[:-lag]).mean())) < 5 / math.sqrt(count - lag)


def test_two_streams_differ_and_one_repeats() -> None:
    first, again, other = (discrete_gaussian(100, 50, entropy=source(name)) for name in ("a", "a", "b"))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(("sigma2", "size"), [(Fraction(1, 4), 400), (Fraction(22, 7), 400), (10**12, 60)], ids=str)
def test_float_shortcuts_agree_with_exact_arithmetic_draw_by_draw(
    sigma2: Fraction | int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow oracle: with an error bound that never decides, every comparison goes the decimal way; the draws from
    the same stream must be the same."""
    quick = discrete_gaussian(sigma2, size, entropy=source("oracle"))
    monkeypatch.setattr(noise, "_LOG_ERROR", 1e3)
    slow = discrete_gaussian(sigma2, size, entropy=source("oracle"))
    assert (quick == slow).all()


class Scripted(SystemEntropy):
    """Hands out the given words, then fails."""

    def __init__(self, *words: int) -> None:
        super().__init__()
        self._left = list(words)

    def words(self, count: int) -> NDArray[np.uint64]:
        taken, self._left = self._left[:count], self._left[count:]
        assert len(taken) == count, "drew more bits than needed"
        return np.array(taken, dtype=np.uint64)


@pytest.mark.parametrize("rate", [Fraction(1), Fraction(1, 3), Fraction(355, 113), Fraction(40)], ids=str)
def test_a_comparison_is_decided_by_as_many_bits_as_it_takes(rate: Fraction) -> None:
    """U agrees with exp(-rate) in 64, then in 128 bits, and differs in the last of 192: the answer is still right."""
    with decimal.localcontext(prec=120):
        digits = int((-decimal.Decimal(rate.numerator) / rate.denominator).exp() * 2**192)
    first, second, third = digits >> 128, (digits >> 64) & (2**64 - 1), digits & (2**64 - 1)
    below = noise._LazyUniform(first, Scripted(second, third - 1)).below_exp(rate)
    above = noise._LazyUniform(first, Scripted(second, third + 1)).below_exp(rate)
    assert below
    assert not above


def test_extreme_words_and_rates_are_decided_too() -> None:
    assert noise._LazyUniform(2**64 - 1, Scripted()).below_exp(Fraction(0))
    assert not noise._LazyUniform(1, Scripted()).below_exp(Fraction(10**30))
    assert not noise._LazyUniform(0, Scripted(0, 1)).below_exp(Fraction(10**30))
    assert noise._LazyUniform(0, Scripted()).below_exp(Fraction(44))
    zeros = np.zeros(1, dtype=np.uint64)
    # U = 2^-128: X = ⌊1000 · 128 ln 2⌋
    drawn = noise._geometric(1_000, zeros, entropy=Scripted(1, 0, 0))
    assert drawn.tolist() == [math.floor(1_000 * 128 * math.log(2))]


def test_a_million_draws_take_seconds_not_minutes() -> None:
    """Process time, so that a busy machine does not matter; about 0.2 s were measured."""
    start = time.process_time()
    draws = discrete_gaussian(10**12, 1_000_000, entropy=SystemEntropy())
    assert time.process_time() - start < 3.0
    assert draws.shape == (1_000_000,)


@pytest.mark.parametrize(
    ("sigma2", "size"), [(-1, 5), (Fraction(-1, 2), 5), (2**81, 5), (1, -1), (Fraction(1, 2**81), 1)], ids=str
)
def test_draws_out_of_range_are_refused(sigma2: Fraction | int, size: int) -> None:
    with pytest.raises(InvalidInput):
        discrete_gaussian(sigma2, size, entropy=SystemEntropy())


@settings(deadline=None, max_examples=80)
@given(sigma2=st.fractions(Fraction(1, 20), 200, max_denominator=50), bits=st.integers(0, 40), draws=st.integers(1, 99))
def test_the_tail_bound_holds_against_the_mass_function(sigma2: Fraction, bits: int, draws: int) -> None:
    bound = tail_bound(sigma2, log2_probability=bits, draws=draws)
    logs = log_mass(float(sigma2), bound + 400)
    tail = np.logaddexp.reduce(logs[-400:]) + math.log(2)
    assert math.log(draws) + tail <= -bits * math.log(2)


def test_the_tail_bound_is_not_wasteful() -> None:
    """2^-64 over 2^30 draws: within 1 % of √(2·95·ln 2) σ."""
    bound = tail_bound(10**12, log2_probability=64, draws=2**30)
    assert bound == pytest.approx(1e6 * math.sqrt(2 * 95 * math.log(2)), rel=1e-6)
    assert tail_bound(0, log2_probability=64, draws=5) == 0
    for refused in ({"log2_probability": -1, "draws": 1}, {"log2_probability": 1, "draws": 0}):
        with pytest.raises(InvalidInput):
            tail_bound(1, **refused)


def test_divergence_of_equal_shares_has_its_published_form() -> None:
    """τ = 10 Σ_{k<n} exp(-2π²σ²k/(k+1)) (Kairouz, Liu & Steinke 2021, Theorem 1)."""
    for sigma2, shares in ((Fraction(1, 4), 2), (Fraction(1, 2), 5), (Fraction(2), 7)):
        published = 10 * sum(math.exp(-2 * math.pi**2 * float(sigma2) * k / (k + 1)) for k in range(1, shares))
        assert sum_divergence(sigma2, shares) == pytest.approx(published, rel=1e-12)
    assert sum_divergence(Fraction(1, 100), 1) == 0.0
    assert sum_divergence(Fraction(0), 0, other_sigma2=5) == 0.0
    with pytest.raises(InvalidInput):
        sum_divergence(Fraction(1, 5), 2)


def log_convolution(parts: list[float], reach: int) -> NDArray[np.float64]:
    """ln of the mass function of the sum of independent discrete Gaussians, on -reach … reach."""
    result = log_mass(parts[0], reach)
    for part in parts[1:]:
        other = log_mass(part, 2 * reach)
        table = np.stack(
            [result + other[2 * reach + z - np.arange(-reach, reach + 1)] for z in range(-reach, reach + 1)]
        )
        result = np.logaddexp.reduce(table, axis=1)
    return np.asarray(result)


@pytest.mark.parametrize(
    ("share", "shares", "other"), [(0.25, 2, 0.0), (0.25, 4, 0.0), (0.5, 3, 0.0), (0.25, 2, 0.5), (1.0, 2, 0.0)]
)
def test_renyi_divergence_of_a_sum_stays_below_what_tau_allows(share: float, shares: int, other: float) -> None:
    """Against the exact mass function of the sum, where shares are so small that τ matters."""
    parts = [share] * shares + ([other] if other else [])
    total, reach = sum(parts), 60
    tau = sum_divergence(Fraction(share), shares, other_sigma2=Fraction(other))
    logs = log_convolution(parts, reach)
    for shift in (1, 2):
        p, q = logs[shift:], logs[:-shift]
        for order in (1.1, 1.5, 2.0, 4.0, 8.0):
            divergence = np.logaddexp.reduce(order * p + (1 - order) * q) / (order - 1)
            assert divergence <= order * shift**2 / (2 * total) + tau + 1e-9
            assert divergence <= order / 2 * (shift / math.sqrt(total) + tau) ** 2 + 1e-9
