"""Numbers that are nobody's secret: from SHAKE-256 and a public purpose, the same on every machine, with any numpy.

For generated rows, and for the rows on which a model is tried. What protects somebody never comes from here.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

_WORD_BITS: Final = 64
_MANTISSA_BITS: Final = 53


def public_uniforms(count: int, purpose: str) -> NDArray[np.float64]:
    """`count` numbers in (0, 1), shape (count,); another purpose, other numbers."""
    raw = hashlib.shake_256(f"sotto/{purpose}".encode()).digest(count * _WORD_BITS // 8)
    words = np.frombuffer(raw, dtype="<u8") >> np.uint64(_WORD_BITS - _MANTISSA_BITS)
    values: NDArray[np.float64] = (words.astype(np.float64) + 0.5) * 2.0**-_MANTISSA_BITS
    return values


def public_normals(count: int, purpose: str) -> NDArray[np.float64]:
    """`count` standard normals by Box & Muller 1958, shape (count,)."""
    uniforms = public_uniforms(2 * count, purpose)
    values: NDArray[np.float64] = np.sqrt(-2.0 * np.log(uniforms[:count])) * np.cos(2.0 * np.pi * uniforms[count:])
    return values
