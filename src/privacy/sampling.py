"""Poisson sampling from a secure source: which rows a DP-SGD step sees is part of what protects them."""

from __future__ import annotations

import decimal
from decimal import Decimal

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


def batch_cap(population: int, *, sampling_rate: float, draws: int, log2_probability: int) -> int:
    """The smallest K of which `draws` Poisson samples all stay within, by this bound, but for a chance of 2^-L.

    P(Bin(n, q) ≥ k) ≤ exp(-n·KL(k/n ‖ q)) for k ≥ nq (Chernoff's bound; Hoeffding 1963, "Probability Inequalities for
    Sums of Bounded Random Variables", Theorem 1). Two machines that disagreed on K could not work together, so it is
    computed in decimal arithmetic, whose logarithm is the same everywhere.

    Args:
        population: n ≥ 0 rows.
        sampling_rate: q in (0, 1].
        draws: samples taken in all, ≥ 1.
        log2_probability: L ≥ 0.

    Returns:
        K in [0, n]; n itself, which nothing exceeds, where no smaller one will do.

    Raises:
        InvalidInput: an argument out of its range.
    """
    if population < 0 or not 0.0 < sampling_rate <= 1.0 or draws < 1 or log2_probability < 0:
        raise InvalidInput("a batch cap needs a population ≥ 0, a rate in (0, 1], draws ≥ 1 and log2_probability ≥ 0")
    with decimal.localcontext(decimal.Context(prec=60)):
        rate, total = Decimal(sampling_rate), Decimal(population)
        needed = (log2_probability + (draws - 1).bit_length()) * Decimal(2).ln()  # ⌈log2 draws⌉ bits for the union

        def rare(k: int) -> bool:
            """Whether P(X ≥ k) is small enough, for k ≤ n."""
            if k <= total * rate:
                return False
            share = Decimal(k) / total
            divergence = share * (share / rate).ln()
            if k < population:
                divergence += (1 - share) * ((1 - share) / (1 - rate)).ln()
            return total * divergence >= needed

        low, high = 0, population  # K = n holds always; the bound grows with k above nq
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if rare(middle + 1) else (middle + 1, high)
        return high
