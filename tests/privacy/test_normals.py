"""Noise of floats: the law, its tail, and how far a float is from the real number that it stands for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import gmpy2  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pytest
from numpy.typing import NDArray

from src.privacy.entropy import DeterministicEntropy
from src.privacy.normals import secure_normals

OLD_LARGEST = math.sqrt(2 * 53 * math.log(2))
"""Radius of the smallest uniform of 53 bits: 8.57."""


def source(purpose: str) -> DeterministicEntropy:
    return DeterministicEntropy(b"tests of normals", purpose=purpose)


class Words:
    """An entropy that gives these words, in order, and notes how many were asked for."""

    def __init__(self, words: Iterable[int]) -> None:
        self.words_left = list(words)

    def token(self, size: int) -> bytes:
        raise AssertionError("normals draw no tokens")

    def words(self, count: int) -> NDArray[np.uint64]:
        given, self.words_left = self.words_left[:count], self.words_left[count:]
        assert len(given) == count
        return np.array(given, dtype=np.uint64)


def real_normal(radii: list[list[int]], angles: list[int]) -> float:
    """Σ √(-2 ln U)·(cos + sin) over both pairs, halved, of U = 0.(words…) in base 2⁶⁴: MPFR with 1 200 bits."""
    with gmpy2.context(precision=1200):
        total = gmpy2.mpfr(0)
        for digits, angle in zip(radii, angles, strict=True):
            numerator = sum(word << 64 * (len(digits) - place) for place, word in enumerate(digits, start=1))
            uniform = gmpy2.mpfr(numerator) / (1 << 64 * len(digits))
            turn = 2 * gmpy2.const_pi() * angle / (1 << 64)
            total += gmpy2.sqrt(-2 * gmpy2.log(uniform)) * (gmpy2.cos(turn) + gmpy2.sin(turn))
        return float(total / 2)


def test_normals_pass_a_distribution_test() -> None:
    """Kolmogorov–Smirnov against the normal, and lag-free: odd counts, neighbours and halves are uncorrelated."""
    values = np.sort(secure_normals(200_001, source("normals")))
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in values])
    ranks = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(cdf - ranks).max() < 2.2 / math.sqrt(len(values))  # K > 2.2 has probability 1.3e-4; seeded
    fresh = secure_normals(200_000, source("normals"))
    limit = 4.5 / math.sqrt(100_000)
    assert abs(np.mean(fresh[::2] * fresh[1::2])) < limit
    assert abs(np.mean(fresh[:100_000] * fresh[100_000:])) < limit
    assert secure_normals(0, source("none")).shape == (0,)


@pytest.mark.parametrize("zeros", [1, 2, 3, 7])
def test_no_normal_is_too_large_to_be_drawn(zeros: int) -> None:
    """However many bits of a uniform are 0, more are drawn until one is set: of the tail nothing is missing, and so no
    part of δ is owed for it. The uniform is 2^(-64·zeros - 1) here, whose radius an independent computation gives."""
    after = [0] * (zeros - 2) + [1 << 63, 0] if zeros > 1 else []
    second = 0 if zeros > 1 else 1 << 63
    [value] = secure_normals(1, Words([0, (1 << 64) - 1, second, 0, 1 << 61, 1 << 63, *after, 0]))
    expected = real_normal([[0] * zeros + [1 << 63], [(1 << 64) - 1, 0]], [1 << 61, 1 << 63])
    assert abs(value - expected) < 2.0**-24
    assert value > OLD_LARGEST / math.sqrt(2)  # the angle of 45° adds cosine and sine of one radius, halved
    assert value == pytest.approx(math.sqrt((64 * zeros + 1) * math.log(2)), abs=2.0**-20)


def test_a_float_is_close_to_the_real_normal_that_it_stands_for() -> None:
    """Against 1 200 bits, from the same words; what rounding leaves is far below what one row changes."""
    count = 2000
    words = source("against reals").words(6 * count)
    radii, angles = words[: 4 * count].reshape(2, 2, count), words[4 * count :].reshape(2, count)
    values = secure_normals(count, Words(words.tolist()))
    for place, value in enumerate(values.tolist()):
        digits = [[int(radii[0, pair, place]), int(radii[1, pair, place])] for pair in (0, 1)]
        expected = real_normal(digits, [int(angles[pair, place]) for pair in (0, 1)])
        assert abs(value - expected) < 2.0**-40


@pytest.mark.parametrize("first", [(1 << 64) - 1, (1 << 64) - (1 << 11), 1 << 63, 1, 2, 3], ids=hex)
@pytest.mark.parametrize("angle", [0, 1, (1 << 62) - 1, 1 << 62, (1 << 64) - 1], ids=hex)
def test_at_the_ends_too(first: int, angle: int) -> None:
    """Radii near 0, where a uniform near 1 is coarse, and far out; angles where sine or cosine vanish."""
    [value] = secure_normals(1, Words([first, 1 << 63, 12345, 67890, angle, 1 << 60]))
    expected = real_normal([[first, 12345], [1 << 63, 67890]], [angle, 1 << 60])
    assert math.isfinite(value)
    assert abs(value - expected) < 2.0**-24


def test_a_large_draw_is_the_same_as_several() -> None:
    """Values are made in parts, each from words of its own: none is left out, and none is drawn twice."""
    values = secure_normals(20_000, source("parts"))
    assert len(np.unique(values)) == 20_000
    again = source("parts")
    parts = [secure_normals(count, again) for count in (4096, 8192, 7712)]
    np.testing.assert_array_equal(values, np.concatenate(parts))
