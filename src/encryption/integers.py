"""The typed face of gmpy2: the only module here that imports it.

Every big integer in this room is a gmpy2 `mpz`, which acts as an `int` in arithmetic, comparison, hashing, `format` and
`to_bytes`; the signatures therefore say `int`. `mpz` is not an `int` to `isinstance`.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Final, Protocol, overload

import gmpy2  # type: ignore[import-untyped, unused-ignore]
import numpy as np

from .parallel import fan_out, worthwhile

mpz: Final[Callable[[int], int]] = gmpy2.mpz
powmod: Final[Callable[[int, int, int], int]] = gmpy2.powmod
"""base^exponent mod modulus, in time that depends on the exponent: for public exponents only."""
powmod_sec: Final[Callable[[int, int, int], int]] = gmpy2.powmod_sec
"""The same without branches or addresses that depend on the exponent; exponent > 0, modulus odd."""
invert: Final[Callable[[int, int], int]] = gmpy2.invert
"""The inverse modulo the second argument; ZeroDivisionError where there is none."""
divmod_floor: Final[Callable[[int, int], tuple[int, int]]] = gmpy2.f_divmod
gcd: Final[Callable[[int, int], int]] = gmpy2.gcd
jacobi: Final[Callable[[int, int], int]] = gmpy2.jacobi
is_power: Final[Callable[[int], bool]] = gmpy2.is_power
from_bytes: Final[Callable[[bytes], int]] = gmpy2.mpz.from_bytes
"""Big-endian, unsigned."""

PRIMALITY_ROUNDS: Final = 40
"""Miller–Rabin rounds: a composite passes with probability below 4^-40 = 2^-80 whatever it is, and far less often when
it was drawn at random (Damgård, Landrock & Pomerance 1993)."""

SMALL_PRIME_LIMIT: Final = 1 << 16
"""Moduli with a prime factor below this are refused as trivially composite; it also bounds the sieve for small keys."""


class Entropy(Protocol):
    """A source of secret random bytes: the operating system, or a cipher keyed by it."""

    def token(self, size: int) -> bytes:
        """`size` fresh uniform bytes."""
        ...


def is_prime(candidate: int) -> bool:
    """Whether `candidate` is prime, by trial division and `PRIMALITY_ROUNDS` of Miller–Rabin."""
    return bool(gmpy2.is_prime(candidate, PRIMALITY_ROUNDS))


@cache
def small_primorial() -> int:
    """The product of all primes below `SMALL_PRIME_LIMIT`: one gcd with it is a trial division by all of them."""
    return mpz(gmpy2.primorial(SMALL_PRIME_LIMIT))


def random_bits(entropy: Entropy, bits: int) -> int:
    """A uniform integer in [0, 2^bits)."""
    size = -(-bits // 8)
    return from_bytes(entropy.token(size)) >> (8 * size - bits)


def random_below(entropy: Entropy, limit: int) -> int:
    """A uniform integer in [0, limit), by rejection: no bias."""
    bits = (limit - 1).bit_length()
    while True:
        candidate = random_bits(entropy, bits)
        if candidate < limit:
            return candidate


def random_unit(entropy: Entropy, modulus: int) -> int:
    """A uniform element of Z*_modulus."""
    while True:
        candidate = random_below(entropy, modulus)
        if gcd(candidate, modulus) == 1:
            return candidate


LIMB_BYTES: Final[int] = gmpy2.mp_limbsize() // 8
"""GMP's machine word."""
SMALLEST_BULK: Final = 8
"""Integers from which a conversion by whole blocks is faster than one by one."""
LARGEST_BULK: Final = 128
"""Integers converted at once: with more, packing them into one number leaves the processor's cache."""


def split(block: bytes, width: int) -> list[int]:
    """The big-endian integers of `width` bytes that lie back to back in `block` (whose length is a multiple of it).

    Blocks go through GMP's words (limbs): gmpy2 reads bytes one at a time, which would cost a third of a product.
    """
    step = LARGEST_BULK * width
    if width % LIMB_BYTES or LIMB_BYTES != 8 or len(block) < SMALLEST_BULK * width:
        return [from_bytes(block[start : start + width]) for start in range(0, len(block), width)]
    if len(block) > step:
        return [value for start in range(0, len(block), step) for value in split(block[start : start + step], width)]
    words = np.frombuffer(block, dtype=">u8").reshape(-1, width // LIMB_BYTES)
    limbs = words[:, ::-1].astype(np.uint64, order="C")
    whole = gmpy2.xmpz()
    ctypes.memmove(whole.limbs_write(limbs.size), limbs.ctypes.data, limbs.nbytes)
    whole.limbs_finish(limbs.size)
    values: list[int] = gmpy2.unpack(mpz(whole), 8 * width)
    return values + [mpz(0)] * (len(words) - len(values))  # zeros at the end are zeros at the top of the whole


class PackedIntegers(Sequence[int]):
    """Integers in [0, 256^width) as big-endian words of `width` bytes, back to back: converted as they are read.

    Args:
        data: the words; its length is a multiple of `width`.
        width: bytes of a word.
    """

    __slots__ = ("data", "width")

    def __init__(self, data: bytes, width: int) -> None:
        self.data = data
        self.width = width

    def __len__(self) -> int:
        return len(self.data) // self.width

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> PackedIntegers: ...
    def __getitem__(self, at: int | slice) -> int | PackedIntegers:
        width = self.width
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                raise ValueError("packed integers are cut into ranges, not strides")
            return PackedIntegers(self.data[first * width : last * width], width)
        position = range(len(self))[at]
        return from_bytes(self.data[position * width : (position + 1) * width])

    def __iter__(self) -> Iterator[int]:
        step = LARGEST_BULK * self.width
        for start in range(0, len(self.data), step):
            yield from split(self.data[start : start + step], self.width)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def __repr__(self) -> str:
        return f"<{len(self)} integers of {self.width} bytes>"


def join(values: Iterable[int], width: int) -> bytes:
    """Integers in [0, 256^width) as big-endian words of `width` bytes, back to back: the inverse of `split`."""
    if isinstance(values, PackedIntegers) and values.width == width:
        return values.data
    values = list(values)
    if width % LIMB_BYTES or LIMB_BYTES != 8 or len(values) < SMALLEST_BULK:
        return b"".join([value.to_bytes(width, "big") for value in values])
    return b"".join(_join(values[at : at + LARGEST_BULK], width) for at in range(0, len(values), LARGEST_BULK))


def _join(values: list[int], width: int) -> bytes:
    limbs = np.zeros((len(values), width // LIMB_BYTES), dtype=np.uint64)
    whole = gmpy2.xmpz(gmpy2.pack(values, 8 * width))
    ctypes.memmove(limbs.ctypes.data, whole.limbs_read(), LIMB_BYTES * whole.num_limbs())
    return limbs[:, ::-1].astype(">u8").tobytes()


MULTI_POWER_BASES: Final = 8192
"""Bases whose buckets are filled together: with more a base costs hardly less, and they would be held all at once."""


def multi_power(
    bases: Sequence[int], exponents: Sequence[int], modulus: int, *, exponent_bits: int, processes: int = 1
) -> int:
    """∏ bases[j]^exponents[j] mod modulus for public exponents in [0, 2^exponent_bits), by buckets.

    Pippenger 1976 as told by Bernstein, Doumen, Lange & Oosterwijk (Indocrypt 2012): with 128-bit exponents a base
    costs some 16–25 products instead of the 150 of its own exponentiation. `processes`: see `parallel.fan_out`.
    """
    if len(bases) != len(exponents):
        raise ValueError("as many exponents as bases")
    count = len(bases)
    processes = worthwhile(processes, count * exponent_bits // 8)
    size = max(1, min(MULTI_POWER_BASES, -(-count // processes)))
    width = -(-modulus.bit_length() // 8)

    def work(piece: int) -> bytes:
        part = slice(piece * size, (piece + 1) * size)
        return join([_buckets(list(bases[part]), exponents[part], modulus, exponent_bits)], width)

    result = mpz(1)
    for power in fan_out(work, -(-count // size), processes=processes):
        result = result * from_bytes(power) % modulus
    return result


def _buckets(bases: list[int], exponents: Sequence[int], modulus: int, exponent_bits: int) -> int:
    def cost(width: int) -> int:
        return -(-exponent_bits // width) * (len(bases) + (2 << width))

    window = min(range(1, 17), key=cost)
    mask = (1 << window) - 1
    result = mpz(1)
    for shift in reversed(range(0, exponent_bits, window)):
        result = powmod(result, 1 << window, modulus)
        buckets = [mpz(1)] * (mask + 1)
        for base, exponent in zip(bases, exponents, strict=True):
            digit = (exponent >> shift) & mask
            buckets[digit] = buckets[digit] * base % modulus
        running = total = mpz(1)
        for bucket in reversed(buckets[1:]):
            running = running * bucket % modulus
            total = total * running % modulus
        result = result * total % modulus
    return result


def digest_parts(domain: bytes, *parts: bytes) -> bytes:
    """SHA-256 over `domain` and `parts`, each preceded by its length in 8 bytes: no two lists hash alike."""
    state = hashlib.sha256()
    for part in (domain, *parts):
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()
