"""Paillier on raw integers: encrypt as Damgård, Jurik & Nielsen 2010 do, add, validate, decrypt.

Ranges: plaintexts in [0, n), ciphertexts in Z*_{n²} as integers in [1, n²). Encodings live in `packing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CiphertextError
from .integers import Entropy, divmod_floor, gcd, mpz, powmod_sec
from .keys import PrivateKey, PublicKey

MEMORY_LIMIT_MB: Final = 64
"""Default limit for the tables of one key. More gains little: 128 MB save 3–7 % of a 3072-bit encryption."""
ENTRY_OVERHEAD_BYTES: Final = 112
"""Of a table entry beside its digits: two mpz objects, their limb blocks' headers and two list slots."""
LARGEST_TEETH: Final = 16


@dataclass(frozen=True, slots=True)
class Comb:
    """The shape of a fixed-base comb (Lim & Lee, CRYPTO '94) for exponents of `exponent_bits` bits.

    The exponent is cut into `teeth` rows of `tables`·`columns` bits. Table j holds the 2^teeth products of the bases
    h^(2^(row·i + columns·j)); a power costs tables·columns − 1 products and columns − 1 squarings.
    """

    exponent_bits: int
    teeth: int
    tables: int
    columns: int

    @property
    def row_bits(self) -> int:
        """Bits of the exponent that one tooth covers."""
        return self.tables * self.columns

    @property
    def entries(self) -> int:
        """Table entries in all."""
        return self.tables << self.teeth

    def cost(self, expected_count: int) -> int:
        """Products and squarings to build the tables and to compute `expected_count` powers."""
        return self.exponent_bits + self.entries + expected_count * (self.row_bits + self.columns - 2)


@cache
def plan_comb(exponent_bits: int, *, expected_count: int, entry_bytes: int, memory_limit_mb: int) -> Comb:
    """The cheapest comb for `expected_count` powers whose tables stay within `memory_limit_mb` megabytes."""
    limit = max(memory_limit_mb * 1_000_000 // entry_bytes, 2)
    best = Comb(exponent_bits, 1, 1, exponent_bits)
    for teeth in range(1, LARGEST_TEETH + 1):
        row = -(-exponent_bits // teeth)
        for columns in range(1, row + 1):
            comb = Comb(exponent_bits, teeth, -(-row // columns), columns)
            if comb.entries <= limit and comb.cost(expected_count) < best.cost(expected_count):
                best = comb
    return best


class Factor(NamedTuple):
    """A blinding factor h^r mod n² = low + high·n, for one ciphertext and never another.

    Attributes:
        low, high: in [0, n).
        exponent: r as little-endian bytes: what a proof about the ciphertext needs.
    """

    low: int
    high: int
    exponent: bytes


class Encryptor:
    """Encrypts under one public key: (1 + n·m)·h^r mod n² with fresh r of modulus_bits/2 bits.

    Residues modulo n² are kept as pairs x₀ + x₁·n: a product is then one division by n and one reduction modulo n,
    a fifth cheaper than one reduction modulo n², and the factor 1 + n·m costs a single product.

    Table look-ups depend on secret exponents, as in every comb: whoever shares this machine's caches is not kept out.

    Args:
        public: the key.
        expected_count: encryptions to come, for the choice of the tables (1 makes it as cheap as one power).
        memory_limit_mb: limit for the tables, in 10^6 bytes.
    """

    def __init__(self, public: PublicKey, *, expected_count: int, memory_limit_mb: int = MEMORY_LIMIT_MB) -> None:
        self.public = public
        self.expected_count = expected_count
        self.memory_limit_mb = memory_limit_mb
        self._n = public.n
        self.comb = plan_comb(
            public.modulus_bits // 2,
            expected_count=expected_count,
            entry_bytes=public.ciphertext_bytes + ENTRY_OVERHEAD_BYTES,
            memory_limit_mb=memory_limit_mb,
        )
        self._low, self._high = self._tables()

    def _times(self, x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
        carry, low = divmod_floor(x[0] * y[0], self._n)
        return low, (x[0] * y[1] + x[1] * y[0] + carry) % self._n

    def _tables(self) -> tuple[list[list[int]], list[list[int]]]:
        comb = self.comb
        high, low = divmod_floor(self.public.h, self._n)
        power = (low, high)
        bases: list[list[tuple[int, int]]] = [[] for _ in range(comb.tables)]
        for bit in range(comb.teeth * comb.row_bits):
            tooth, column = divmod(bit, comb.row_bits)
            if column % comb.columns == 0:
                bases[column // comb.columns].append(power)
            if tooth == comb.teeth - 1 and column == comb.row_bits - comb.columns:
                break
            power = self._times(power, power)
        lows, highs = [], []
        for table in bases:
            entries = [(mpz(1), mpz(0))]
            for base in table:
                entries += [base, *(self._times(entry, base) for entry in entries[1:])]
            lows.append([entry[0] for entry in entries])
            highs.append([entry[1] for entry in entries])
        return lows, highs

    def _digits(self, exponent: bytes) -> list[int]:
        """The comb's digit for every column of a row: bit i of digit k is bit i·row_bits + k of the exponent."""
        comb = self.comb
        bits = np.zeros(comb.teeth * comb.row_bits, dtype=np.int64)
        bits[: comb.exponent_bits] = np.unpackbits(np.frombuffer(exponent, dtype=np.uint8), bitorder="little")
        weights: NDArray[np.int64] = np.int64(1) << np.arange(comb.teeth, dtype=np.int64)
        digits: list[int] = (weights @ bits.reshape(comb.teeth, comb.row_bits)).tolist()
        return digits

    def _power(self, exponent: bytes) -> tuple[int, int]:
        """h^exponent (little-endian bytes) as a pair; the number of products does not depend on the exponent."""
        n, comb, digits = self._n, self.comb, self._digits(exponent)
        low, high = mpz(1), mpz(0)
        for column in reversed(range(comb.columns)):
            if column != comb.columns - 1:
                carry, square = divmod_floor(low * low, n)
                low, high = square, (2 * low * high + carry) % n
            for table in range(comb.tables):
                digit = digits[table * comb.columns + column]
                factor = self._low[table][digit]
                carry, product = divmod_floor(low * factor, n)
                low, high = product, (low * self._high[table][digit] + high * factor + carry) % n
        return low, high

    @property
    def exponent_bytes(self) -> int:
        """Length of an exponent r."""
        return self.comb.exponent_bits // 8

    @property
    def products(self) -> int:
        """Products and squarings of an encryption."""
        return self.comb.row_bits + self.comb.columns - 2

    def draw(self, count: int, *, entropy: Entropy) -> list[bytes]:
        """`count` fresh exponents."""
        return [entropy.token(self.exponent_bytes) for _ in range(count)]

    def factors(self, exponents: Iterable[bytes]) -> list[Factor]:
        """h^r for every r: nearly all of the work of an encryption, and none of it needs the plaintext."""
        return [Factor(*self._power(exponent), exponent) for exponent in exponents]

    def blind(self, plaintexts: Sequence[int], factors: Sequence[Factor]) -> list[int]:
        """(1 + n·m)·h^r for each plaintext m in [0, n) and its own factor."""
        n = self._n
        return [
            low + n * ((high + low * plaintext) % n)
            for plaintext, (low, high, _) in zip(plaintexts, factors, strict=True)
        ]

    def encrypt(self, plaintexts: Sequence[int], *, entropy: Entropy) -> list[int]:
        """One ciphertext for each plaintext in [0, n), each under a fresh factor."""
        return self.blind(plaintexts, self.factors(self.draw(len(plaintexts), entropy=entropy)))


OUTGROWN_FACTOR: Final = 4
"""Tables are built anew when this many times more encryptions are to come than they were chosen for."""

_latest: list[Encryptor] = []


def encryptor_for(public: PublicKey, *, expected_count: int, memory_limit_mb: int = MEMORY_LIMIT_MB) -> Encryptor:
    """This process's encryptor for a key: tables are built once a key and serve every batch after that.

    Only those of the latest key are kept, and they are replaced when they are too small for what is to come or larger
    than allowed. They hold powers of a public number, nothing secret.
    """
    for encryptor in _latest:
        large_enough = expected_count < OUTGROWN_FACTOR * encryptor.expected_count
        if encryptor.public == public and large_enough and encryptor.memory_limit_mb <= memory_limit_mb:
            return encryptor
    _latest.clear()
    _latest.append(Encryptor(public, expected_count=expected_count, memory_limit_mb=memory_limit_mb))
    return _latest[0]


def add(public: PublicKey, ciphertexts: Sequence[int]) -> int:
    """The ciphertext of the sum: the product modulo n², reduced after every factor. 1 (a sum of nothing) for none."""
    n_squared = public.n_squared
    product = mpz(1)
    for ciphertext in ciphertexts:
        product = product * ciphertext % n_squared
    return product


def add_batches(public: PublicKey, batches: Iterable[Sequence[int]]) -> list[int]:
    """The ciphertexts of the sums, place by place; one batch and the product are in memory. None for no batch."""
    n_squared = public.n_squared
    total: Sequence[int] | None = None
    for batch in batches:
        total = batch if total is None else [x * y % n_squared for x, y in zip(total, batch, strict=True)]
    return list(total or ())


def check_ciphertexts(public: PublicKey, ciphertexts: Sequence[int], *, first: int = 0) -> None:
    """Refuse what is not in Z*_{n²}: one gcd for all, and a second look only when it fails.

    Args:
        public: the key.
        ciphertexts: integers.
        first: position of the first one in its batch.

    Raises:
        CiphertextError: outside [1, n² − 1] or not coprime to n; `metadata["index"]` is the position of the first.
    """
    n, n_squared = public.n, public.n_squared
    product = mpz(1)
    in_range = True
    for ciphertext in ciphertexts:
        in_range = in_range and 0 < ciphertext < n_squared
        product = product * ciphertext % n
    if in_range and gcd(product, n) == 1:
        return
    for index, ciphertext in enumerate(ciphertexts, first):
        if not 0 < ciphertext < n_squared or gcd(ciphertext, n) != 1:
            raise CiphertextError(f"ciphertext {index} is not an element of Z*_{{n²}}", index=index)


def decrypt(private: PrivateKey, ciphertext: int) -> int:
    """The plaintext in [0, n) of a checked ciphertext, by the Chinese remainder theorem (Paillier 1999, section 7)."""
    p, q = private.p, private.q
    power_p = powmod_sec(ciphertext % private.p_squared, p - 1, private.p_squared)
    power_q = powmod_sec(ciphertext % private.q_squared, q - 1, private.q_squared)
    m_p = (power_p - 1) // p * private.h_p % p
    m_q = (power_q - 1) // q * private.h_q % q
    return m_p + p * ((m_q - m_p) * private.p_inverse % q)
