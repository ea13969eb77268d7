"""Standard normals for noise that is added to floats: none too large to be drawn, so that no δ is owed for a tail.

The radius of Box & Muller 1958 is sqrt(-2 ln U). Whoever takes U from 53 bits never draws one above 8.57; the rest of
the normal, 2⁻⁵³ a draw, is missing, which 10⁵ parameters and 1 000 steps add up to more than a δ of 10⁻⁵ bears at ε = 8
(docs/accounting.md). Here U has as many bits as it takes for the first that is set.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .entropy import Entropy

NORMALS_PER_DRAW: Final = 4
"""Normals summed for one noise value, so that its low bits tell nothing of it: Holohan & Braghin 2021, "Secure Random
Sampling in Differential Privacy", section 5.1, with n = 2 as Opacus has it in its secure mode."""

_CHUNK: Final = 4096
"""Values at a time: what they are made of stays in a core's cache, which is what makes large draws fast."""

_WORD: Final = 2.0**-64
"""Of a word's last bit, as a part of 1."""


def secure_normals(count: int, entropy: Entropy) -> NDArray[np.float64]:
    """`count` standard normals, float64, shape (count,).

    Each value is the sum of `NORMALS_PER_DRAW` normals over its root: both normals of two pairs of Box & Muller 1958.
    What floats make of one is within 2⁻²⁴ of what reals would, and but for the smallest radii within 2⁻⁴⁰. How long it
    takes depends on `count` alone, but for one pair in 2⁶⁴.
    """
    result = np.empty(count)
    for start in range(0, count, _CHUNK):
        result[start : start + _CHUNK] = _normals(min(_CHUNK, count - start), entropy)
    return result


def _normals(count: int, entropy: Entropy) -> NDArray[np.float64]:
    pairs = count * NORMALS_PER_DRAW // 2
    words = entropy.words(3 * pairs)
    radii = np.sqrt(_exponentials(words[:pairs], words[pairs : 2 * pairs], entropy) * (2.0 / NORMALS_PER_DRAW))
    angles = words[2 * pairs :] * (2.0 * math.pi * _WORD)
    sums = radii * np.cos(angles) + radii * np.sin(angles)
    total: NDArray[np.float64] = sums[:count] + sums[count:]
    return total


def _exponentials(first: NDArray[np.uint64], second: NDArray[np.uint64], entropy: Entropy) -> NDArray[np.float64]:
    """-ln U for uniform reals U in (0, 1) whose binary digits are `first`, then `second`, then what is drawn.

    A word that is not 0 and the one after it give U to a unit in the last place of a float64; more is drawn where the
    first word is 0.
    """
    uniforms = first * _WORD + second * (_WORD * _WORD)
    empty = np.flatnonzero(first == 0)
    uniforms[empty] = 1.0
    result: NDArray[np.float64] = -np.log(uniforms)
    for index in empty.tolist():
        result[index] = _beyond(int(second[index]), entropy)
    return result


def _beyond(word: int, entropy: Entropy) -> float:
    """-ln U, where 64 digits of U are 0 and `word` has the next 64."""
    zeros = 1
    while word == 0:
        zeros += 1
        word = int(entropy.words(1)[0])
    rest = int(entropy.words(1)[0])
    return 64.0 * zeros * math.log(2.0) - math.log(word * _WORD + rest * (_WORD * _WORD))
