"""Primes for Paillier: safe primes for a deal, plain ones for a key pair.

A safe prime p = 2p' + 1 is searched from a random start by a sieve that strikes out p' and p together, then by
Fermat's test to base 2 on both, then by Miller–Rabin. A search is cut into segments, each a function of its start
alone: they run in this process or in several, and no randomness is drawn anywhere but here.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from functools import cache
from typing import Final

import numpy as np

from .integers import SMALL_PRIME_LIMIT, Entropy, gcd, is_prime, mpz, powmod, random_bits

SMALLEST_SEGMENT: Final = 1 << 11
SEGMENT_DIVISOR: Final = 36
"""A segment has bits²/36 candidates: about one in seven holds a safe prime, so it ends soon enough to be waited for."""
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
    for start, length in _segments(bits, entropy):
        prime = search_segment(start, length)
        if prime is not None:
            return prime
    raise AssertionError("the segments never end")


def generate_safe_primes(
    modulus_bits: int, *, entropy: Entropy, processes: int = 2, progress: Progress | None = None
) -> tuple[int, int]:
    """Two distinct safe primes whose product has exactly `modulus_bits` bits.

    Args:
        modulus_bits: length of the product.
        entropy: where the starting points come from.
        processes: worker processes; 1 searches in this one. Workers are started by `forkserver`, or `spawn`.
        progress: told in words when something has been found.

    Returns:
        (p, q), whose difference is not small.
    """
    tell = progress or _silent
    bits = modulus_bits // 2
    found: list[int] = []
    with closing(_stream(bits, entropy=entropy, processes=processes)) as primes:
        for prime in primes:
            if found and abs(found[0] - prime).bit_length() <= bits - min(CLOSE_PRIMES_BITS, bits // 2):
                continue
            found.append(prime)
            tell(f"safe prime {len(found)} of 2 found ({bits} bits)")
            if len(found) == 2:
                break
    return found[0], found[1]


def _stream(bits: int, *, entropy: Entropy, processes: int) -> Generator[int, None, None]:
    if processes <= 1:
        while True:
            yield safe_prime(bits, entropy=entropy)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    segments = _segments(bits, entropy)
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running: set[Future[int | None]] = set()
        try:
            while True:
                while len(running) < processes:
                    running.add(pool.submit(search_segment, *next(segments)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    prime = future.result()
                    if prime is not None:
                        yield prime
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
