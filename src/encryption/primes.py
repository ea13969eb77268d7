"""Primes for Paillier: safe primes for a deal, plain ones for a key pair.

A safe prime p = 2p' + 1 is searched from a random start by a sieve that strikes out p' and p together, then by
Fermat's test to base 2 on both, then by Miller–Rabin. A search is cut into segments, each a function of its start
alone: they run in this process or in several forked ones, and no randomness is drawn anywhere but here, so that the
same entropy gives the same primes whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cache
from itertools import islice
from typing import Final

import numpy as np

from .integers import SMALL_PRIME_LIMIT, Entropy, from_bytes, gcd, is_prime, join, mpz, powmod, random_bits
from .parallel import fan_out

SMALLEST_SEGMENT: Final = 1 << 11
SEGMENT_DIVISOR: Final = 36
"""A segment has bits²/36 candidates: about one in seven holds a safe prime, so it ends soon enough to be waited for."""
SEGMENTS_AT_ONCE: Final = 64
"""Starts that are drawn before processes are forked for them: nine primes' worth."""
SEGMENTS_A_LINE: Final = 4
"""Segments between two lines of progress: a few seconds at 3072 bits."""
CLOSE_PRIMES_BITS: Final = 100
"""Primes that agree in this many leading bits are refused (FIPS 186-5, A.1.3), Fermat's factorisation being cheap."""

Progress = Callable[[str], None]


@cache
def _odd_primes(limit: int) -> tuple[int, ...]:
    sieve = np.ones(limit, dtype=bool)
    sieve[:3] = False
    sieve[4::2] = False
    for divisor in range(3, int(limit**0.5) + 1, 2):
        if sieve[divisor]:
            sieve[divisor * divisor :: divisor] = False
    return tuple(int(prime) for prime in np.flatnonzero(sieve))


def search_segment(start: int, length: int) -> int | None:
    """The first safe prime p = 2p' + 1 with p' in {start, start + 2, …, start + 2·(length − 1)}, start odd, or None.

    p' must be larger than `SMALL_PRIME_LIMIT`.
    """
    half = mpz(start)
    alive = np.ones(length, dtype=bool)
    for prime in _odd_primes(min(length, SMALL_PRIME_LIMIT)):
        rest, inverse = int(half % prime), (prime + 1) // 2
        # start + 2k ≡ 0, and 2·(start + 2k) + 1 ≡ 0, modulo the small prime.
        alive[-rest * inverse % prime :: prime] = False
        alive[-(2 * rest + 1) * inverse * inverse % prime :: prime] = False
    for step in np.flatnonzero(alive).tolist():
        candidate = half + 2 * step
        prime = 2 * candidate + 1
        if powmod(2, candidate - 1, candidate) != 1 or powmod(2, prime - 1, prime) != 1:
            continue
        if is_prime(candidate) and is_prime(prime):
            return prime
    return None


def _segments(bits: int, entropy: Entropy) -> Iterator[tuple[int, int]]:
    """Random starts for p', each with the two top bits of p set, and the segment's length."""
    length = max(SMALLEST_SEGMENT, bits * bits // SEGMENT_DIVISOR)
    while True:
        start = random_bits(entropy, bits - 3) | (3 << (bits - 3)) | 1
        if (start + 2 * length).bit_length() == bits - 1:
            yield start, length


def safe_prime(bits: int, *, entropy: Entropy) -> int:
    """A safe prime of exactly `bits` bits (at least 64), the two top bits set; 3 modulo 4, as every safe prime is.

    The incremental search (Brandt & Damgård 1992) favours primes after long gaps by a negligible amount.
    """
    with closing(_stream(bits, entropy=entropy, processes=1, tell=_silent)) as primes:
        return next(primes)


def generate_safe_primes(
    modulus_bits: int, *, entropy: Entropy, processes: int | None = None, progress: Progress | None = None
) -> tuple[int, int]:
    """Two distinct safe primes whose product has exactly `modulus_bits` bits.

    Args:
        modulus_bits: length of the product.
        entropy: where the starting points come from.
        processes: that search side by side; None: one for each CPU, 1: this one. Ctrl-C ends them with this one.
        progress: told in words how far the search is, every few seconds.

    Returns:
        (p, q), whose difference is not small.

    Raises:
        WorkerError: a process died.
    """
    tell = progress or _silent
    bits = modulus_bits // 2
    found: list[int] = []
    with closing(_stream(bits, entropy=entropy, processes=processes or os.cpu_count() or 1, tell=tell)) as primes:
        for prime in primes:
            if found and abs(found[0] - prime).bit_length() <= bits - min(CLOSE_PRIMES_BITS, bits // 2):
                continue
            found.append(prime)
            tell(f"safe prime {len(found)} of 2 found ({bits} bits)")
            if len(found) == 2:
                break
    return found[0], found[1]


def _stream(bits: int, *, entropy: Entropy, processes: int, tell: Progress) -> Generator[int, None, None]:
    segments, searched = _segments(bits, entropy), 0
    width = -(-bits // 8)
    while True:
        batch = list(islice(segments, SEGMENTS_AT_ONCE))

        def work(index: int, batch: list[tuple[int, int]] = batch) -> bytes:
            return join([search_segment(*batch[index]) or 0], width)

        with closing(fan_out(work, len(batch), processes=processes if hasattr(os, "fork") else 1)) as results:
            for result in results:
                searched += 1
                if searched % SEGMENTS_A_LINE == 0:
                    tell(f"{searched} segments searched, about one in seven holds a safe prime")
                prime = from_bytes(result)
                if prime:
                    yield prime


def generate_primes(modulus_bits: int, *, entropy: Entropy) -> tuple[int, int]:
    """Two primes as DJN asks for: half the length, 3 modulo 4, gcd(p−1, q−1) = 2, a product of `modulus_bits` bits.

    Cheaper than safe primes by two orders of magnitude: enough for a key pair that is never dealt out.
    """
    bits = modulus_bits // 2
    while True:
        p, q = _blum_prime(bits, entropy), _blum_prime(bits, entropy)
        distant = abs(p - q).bit_length() > bits - min(CLOSE_PRIMES_BITS, bits // 2)
        if distant and gcd(p - 1, q - 1) == 2:
            return p, q


def _blum_prime(bits: int, entropy: Entropy) -> int:
    while True:
        candidate = random_bits(entropy, bits - 2) | (3 << (bits - 2)) | 3
        if powmod(2, candidate - 1, candidate) == 1 and is_prime(candidate):
            return candidate


def _silent(_: str) -> None:
    """Tells nobody."""
