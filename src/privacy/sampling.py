"""Poisson sampling from a secure source: which rows a DP-SGD step sees is part of what protects them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .entropy import Entropy


def poisson_sample(population: int, *, sampling_rate: float, entropy: Entropy) -> NDArray[np.int64]:
    """Each of `population` rows independently with probability `sampling_rate`.

    The probability is exactly ⌊2^64·rate⌋/2^64 ≤ rate: never above what the accountant charges.

    Args:
        population: number of rows, ≥ 0.
        sampling_rate: in [0, 1].

    Returns:
        The chosen rows in increasing order, shape (k,), dtype int64; k is random and may be 0.

    Raises:
        InvalidInput: `population` is negative or `sampling_rate` outside [0, 1].
    """
    if population < 0 or not 0.0 <= sampling_rate <= 1.0:
        raise InvalidInput("Poisson sampling needs a population ≥ 0 and a sampling rate in [0, 1]")
    if sampling_rate == 1.0:
        return np.arange(population, dtype=np.int64)
    threshold = np.uint64(int(sampling_rate * 2.0**64))
    return np.flatnonzero(entropy.words(population) < threshold).astype(np.int64, copy=False)
