"""L2 clipping of an update: what makes the sensitivity of a sum finite."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput

_MARGIN: Final = 1.0 - 2.0**-22
"""A float32 is off by at most 2^-24 of itself, so a vector scaled to `_MARGIN`·C stays within C after the cast."""


def _norm(update: NDArray[np.float32]) -> float:
    """L2 norm in double precision, safe for every finite float32 (the squares stay below 1e77 · d)."""
    wide = update.astype(np.float64)
    return math.sqrt(float(np.dot(wide, wide)))


def clip(update: NDArray[np.float32], clipping_norm: float) -> NDArray[np.float32]:
    """`update` scaled down, if need be, to an L2 norm of at most `clipping_norm`; else unchanged.

    Args:
        update: shape (d,), dtype float32, finite.
        clipping_norm: C > 0, finite.

    Returns:
        A new array, shape (d,), dtype float32; its norm is ≤ C as a real number, rounding to float32 included.

    Raises:
        InvalidInput: wrong shape or dtype, a value that is not finite, or C not positive and finite. No value is shown.
    """
    if not (math.isfinite(clipping_norm) and clipping_norm > 0):
        raise InvalidInput("the clipping norm must be positive and finite")
    if update.ndim != 1 or update.dtype != np.float32:
        raise InvalidInput("an update must be a vector of float32")
    if not bool(np.isfinite(update).all()):
        raise InvalidInput("the update holds a value that is not finite")
    norm = _norm(update)
    # The sum of squares is itself off by a few 2^-53; an update that close to the border is scaled too.
    if norm <= clipping_norm * (1.0 - 2.0**-40):
        return update.copy()
    scaled = update.astype(np.float64) * (clipping_norm / norm * _MARGIN)
    return scaled.astype(np.float32)
