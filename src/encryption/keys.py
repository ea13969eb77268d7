"""Keys as values: what is public, what is secret, and the strict JSON in which each is stored.

JSON form: an object with `kind`, `version` and the fields of the class; big integers are lower-case hexadecimal strings
without leading zeros, small counts are JSON integers. Unknown, missing or malformed fields raise `KeyMaterialError`
whose `metadata["field"]` is the path of the field. No error message and no `repr` shows a secret value.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import factorial
from typing import Final

from ..errors import KeyMaterialError
from .integers import gcd, invert, is_power, is_prime, jacobi, mpz, powmod_sec, small_primorial

KEY_VERSION: Final = 1
DEFAULT_MODULUS_BITS: Final = 3072
"""128-bit security (NIST SP 800-57 part 1 rev. 5, table 2)."""
SMALLEST_MODULUS_BITS: Final = 2048
"""112-bit security (same table): allowed, and said so wherever the key is described."""
INSECURE_MODULUS_BITS: Final = 256
"""The smallest modulus that the arithmetic works with at all, for tests."""
MODULUS_STEP_BITS: Final = 64
"""Moduli are whole 64-bit words, so that slots are packed word by word and ciphertexts are whole bytes."""
LARGEST_HOLDERS: Final = 1024
"""Δ = holders! lengthens every exponent; 1024! has 8 770 bits, above which an opening would cost twice as much."""

_HEX: Final = re.compile(r"0|[1-9a-f][0-9a-f]*")


def invalid(name: str, problem: str) -> KeyMaterialError:
    """The error for a field of key material."""
    return KeyMaterialError(f"{name}: {problem}", violations={name: problem}, field=name)


def check_modulus_bits(modulus_bits: int, *, insecure_small: bool = False) -> None:
    """Refuse modulus lengths that are too short to protect anything.

    Args:
        modulus_bits: length of n: a multiple of 64, at least 2048.
        insecure_small: for tests: allow lengths from 256 bits.

    Raises:
        KeyMaterialError: too short, or not a multiple of 64.
    """
    least = INSECURE_MODULUS_BITS if insecure_small else SMALLEST_MODULUS_BITS
    if modulus_bits < least:
        raise invalid("modulus_bits", f"{modulus_bits} bits are too short, at least {least} are needed")
    if modulus_bits % MODULUS_STEP_BITS:
        raise invalid("modulus_bits", f"{modulus_bits} is not a multiple of {MODULUS_STEP_BITS}")


class _Reader:
    """Reads a JSON object field by field and remembers what nobody asked for."""

    def __init__(self, data: object, kind: str, *, path: str = "") -> None:
        self._path = path
        if not isinstance(data, Mapping):
            raise invalid(path or kind, "not a JSON object")
        self._left = dict(data)
        if self._take("kind") != kind:
            raise invalid(self._name("kind"), f"not {kind!r}")
        if self.count("version") != KEY_VERSION:
            raise invalid(self._name("version"), f"not {KEY_VERSION}, the only version known here")

    def _name(self, name: str) -> str:
        return f"{self._path}{name}"

    def _take(self, name: str) -> object:
        if name not in self._left:
            raise invalid(self._name(name), "missing")
        return self._left.pop(name)

    def _hex(self, value: object, name: str) -> int:
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise invalid(self._name(name), "not a lower-case hexadecimal number")
        return int(value, 16)

    def integer(self, name: str) -> int:
        return self._hex(self._take(name), name)

    def integers(self, name: str) -> tuple[int, ...]:
        values = self._take(name)
        if not isinstance(values, list):
            raise invalid(self._name(name), "not a list")
        return tuple(self._hex(value, f"{name}[{position}]") for position, value in enumerate(values))

    def count(self, name: str) -> int:
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid(self._name(name), "not an integer")
        return value

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise invalid(self._name(name), "not a string")
        return value

    def child(self, name: str) -> object:
        return self._take(name)

    def end(self) -> None:
        for name in sorted(map(str, self._left)):
            raise invalid(self._name(name), "unknown field")


def _header(kind: str) -> dict[str, object]:
    return {"kind": kind, "version": KEY_VERSION}


def _digest(content: Mapping[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_modulus(n: int, modulus_bits: int) -> None:
    """Refuse an n that is even, of another length, prime or trivially composite. Raises KeyMaterialError."""
    check_modulus_bits(modulus_bits, insecure_small=True)
    if n <= 0 or n.bit_length() != modulus_bits:
        raise invalid("n", f"the modulus does not have the {modulus_bits} bits it is said to have")
    if n % 2 == 0:
        raise invalid("n", "the modulus is even")
    if gcd(n, small_primorial()) != 1:
        raise invalid("n", "the modulus has a small factor")
    if n % 4 != 1:
        raise invalid("n", "the modulus is not a product of two primes that are 3 modulo 4")
    if is_power(n) or is_prime(n):
        raise invalid("n", "the modulus is a prime or a perfect power")


def _check_unit(name: str, value: int, n: int) -> None:
    """A generator that is published must be a non-trivial element of Z*_{n²} with Jacobi symbol 1."""
    n_squared = n * n
    if not 0 < value < n_squared or gcd(value, n) != 1:
        raise invalid(name, "not an element of Z*_{n²}")
    if value in (1, n_squared - 1) or jacobi(value, n) != 1:
        raise invalid(name, "does not generate what it should")


def _freeze(instance: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A Paillier public key with the base of Damgård–Jurik–Nielsen encryption.

    Attributes:
        n: the modulus, exactly `modulus_bits` bits, a product of two primes that are 3 modulo 4.
        h: h^n mod n² for h = -x² mod n with random x (Damgård, Jurik & Nielsen 2010, section 4.2, there h_s).
        modulus_bits: length of n, a multiple of 64; at least 256 here, at least 2048 wherever a key comes from outside.

    Raises:
        KeyMaterialError: even, short, prime or trivially composite n; h outside Z*_{n²} or trivial.
    """

    n: int
    h: int
    modulus_bits: int
    n_squared: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_modulus(self.n, self.modulus_bits)
        _check_unit("h", self.h, self.n)
        n = mpz(self.n)
        _freeze(self, n=n, h=mpz(self.h), n_squared=n * n)

    @property
    def ciphertext_bytes(self) -> int:
        """Length of a ciphertext: an element of Z*_{n²}, big-endian."""
        return 2 * self.modulus_bits // 8

    @property
    def plaintext_bytes(self) -> int:
        """Length of an opened plaintext: an element of Z_n, big-endian."""
        return self.modulus_bits // 8

    @property
    def key_id(self) -> str:
        """32 hexadecimal digits: the front of SHA-256 over the canonical JSON form."""
        return _digest(self.to_json())[:32]

    def to_json(self) -> dict[str, object]:
        """The strict JSON form (module docstring)."""
        return _header("public-key") | {"n": f"{self.n:x}", "h": f"{self.h:x}", "modulus_bits": self.modulus_bits}

    @classmethod
    def from_json(cls, data: object, *, insecure_small: bool = False, path: str = "") -> PublicKey:
        """Read and check a key.

        Raises:
            KeyMaterialError: anything that the class or `check_modulus_bits` refuses; names the field.
        """
        reader = _Reader(data, "public-key", path=path)
        n, h, modulus_bits = reader.integer("n"), reader.integer("h"), reader.count("modulus_bits")
        reader.end()
        check_modulus_bits(modulus_bits, insecure_small=insecure_small)
        return cls(n, h, modulus_bits)


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """The key pair of custody `aggregator`: both primes, with the constants of CRT decryption.

    Attributes:
        p, q: distinct primes of half the modulus length, 3 modulo 4, gcd(p−1, q−1) = 2; p·q = n.
        public: the public half.

    Raises:
        KeyMaterialError: the primes are not such primes, or do not belong to `public`.
    """

    p: int = field(repr=False)
    q: int = field(repr=False)
    public: PublicKey
    p_squared: int = field(init=False, repr=False, compare=False)
    q_squared: int = field(init=False, repr=False, compare=False)
    h_p: int = field(init=False, repr=False, compare=False)
    h_q: int = field(init=False, repr=False, compare=False)
    p_inverse: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        p, q = mpz(self.p), mpz(self.q)
        check_primes(p, q, self.public.modulus_bits)
        if p * q != self.public.n:
            raise invalid("p", "the primes are not the factors of the public modulus")
        if powmod_sec(self.public.h, (p - 1) * (q - 1), self.public.n_squared) != 1:
            raise invalid("public.h", "not an n-th residue: it would spoil what it encrypts")
        _freeze(self, p=p, q=q, p_squared=p * p, q_squared=q * q, p_inverse=invert(p, q))
        # Paillier 1999, section 7, with g = 1 + n: L_p(g^(p−1) mod p²) = (p−1)·q mod p.
        _freeze(self, h_p=invert((p - 1) * q % p, p), h_q=invert((q - 1) * p % q, q))

    def to_json(self) -> dict[str, object]:
        """The strict JSON form (module docstring). Secret."""
        return _header("private-key") | {"p": f"{self.p:x}", "q": f"{self.q:x}", "public": self.public.to_json()}

    @classmethod
    def from_json(cls, data: object, *, insecure_small: bool = False) -> PrivateKey:
        """Read and check a key pair; raises KeyMaterialError as `PublicKey.from_json` does."""
        reader = _Reader(data, "private-key")
        p, q, public = reader.integer("p"), reader.integer("q"), reader.child("public")
        reader.end()
        return cls(p, q, PublicKey.from_json(public, insecure_small=insecure_small, path="public."))


def check_primes(p: int, q: int, modulus_bits: int) -> None:
    """Whether DJN works with these primes (Damgård, Jurik & Nielsen 2010, section 4.2).

    Raises:
        KeyMaterialError: not distinct primes of half the length, 3 modulo 4, with gcd(p−1, q−1) = 2.
    """
    for name, prime in (("p", p), ("q", q)):
        if prime.bit_length() != modulus_bits // 2 or prime % 4 != 3 or not is_prime(prime):
            raise invalid(name, f"not a prime of {modulus_bits // 2} bits that is 3 modulo 4")
    if p == q or gcd(p - 1, q - 1) != 2:
        raise invalid("q", "gcd(p−1, q−1) is not 2")
    if (p * q).bit_length() != modulus_bits:
        raise invalid("q", f"the product does not have {modulus_bits} bits")


@dataclass(frozen=True, slots=True)
class ThresholdKey:
    """The public values of one deal (Damgård & Jurik 2001, section 4.1; Shoup 2000).

    Attributes:
        public: the public key; its `key_id` names the deal everywhere (each deal draws a fresh h).
        threshold: shares that an opening needs, 2 ≤ threshold ≤ holders.
        holders: key shares that were dealt, at most `LARGEST_HOLDERS`.
        v: a generator of the squares of Z*_{n²}, with overwhelming probability.
        verification: v_i = v^(Δ·s_i) mod n² for i = 1 … holders, Δ = holders!.

    Raises:
        KeyMaterialError: counts out of range, or v or a v_i that cannot be one.
    """

    public: PublicKey
    threshold: int
    holders: int
    v: int
    verification: tuple[int, ...]

    def __post_init__(self) -> None:
        check_counts(self.threshold, self.holders)
        if len(self.verification) != self.holders:
            raise invalid("verification", f"{len(self.verification)} values for {self.holders} holders")
        _check_unit("v", self.v, self.public.n)
        for position, value in enumerate(self.verification):
            _check_unit(f"verification[{position}]", value, self.public.n)
        _freeze(self, v=mpz(self.v), verification=tuple(mpz(value) for value in self.verification))

    @property
    def delta(self) -> int:
        """Δ = holders!."""
        return mpz(factorial(self.holders))

    @property
    def key_id(self) -> str:
        """The key id of `public`."""
        return self.public.key_id

    @property
    def digest(self) -> str:
        """SHA-256 (64 hexadecimal digits) over all public values of the deal, v and every v_i included."""
        return _digest(self.to_json())

    def to_json(self) -> dict[str, object]:
        """The strict JSON form (module docstring)."""
        return _header("threshold-key") | {
            "public": self.public.to_json(),
            "threshold": self.threshold,
            "holders": self.holders,
            "v": f"{self.v:x}",
            "verification": [f"{value:x}" for value in self.verification],
        }

    @classmethod
    def from_json(cls, data: object, *, insecure_small: bool = False) -> ThresholdKey:
        """Read and check the public values; raises KeyMaterialError as `PublicKey.from_json` does."""
        reader = _Reader(data, "threshold-key")
        public, v, verification = reader.child("public"), reader.integer("v"), reader.integers("verification")
        threshold, holders = reader.count("threshold"), reader.count("holders")
        reader.end()
        key = PublicKey.from_json(public, insecure_small=insecure_small, path="public.")
        return cls(key, threshold, holders, v, verification)


@dataclass(frozen=True, slots=True)
class KeyShare:
    """One holder's share of the decryption exponent: secret.

    Attributes:
        index: 1 … holders.
        value: the polynomial of the deal at `index`, modulo n·m; not shown by `repr`.
        key_id: the deal it belongs to.
    """

    index: int
    value: int = field(repr=False)
    key_id: str

    def __post_init__(self) -> None:
        if not 1 <= self.index <= LARGEST_HOLDERS:
            raise invalid("index", f"not between 1 and {LARGEST_HOLDERS}")
        if self.value <= 0:
            raise invalid("value", "not positive")
        _freeze(self, value=mpz(self.value))

    def to_json(self) -> dict[str, object]:
        """The strict JSON form (module docstring). Secret."""
        return _header("key-share") | {"index": self.index, "value": f"{self.value:x}", "key_id": self.key_id}

    @classmethod
    def from_json(cls, data: object) -> KeyShare:
        """Read a share; whether it is a good one only `check_kit` can tell. Raises KeyMaterialError."""
        reader = _Reader(data, "key-share")
        index, value, key_id = reader.count("index"), reader.integer("value"), reader.text("key_id")
        reader.end()
        return cls(index, value, key_id)


def check_counts(threshold: int, holders: int) -> None:
    """Refuse a threshold of one, and counts that no deal can have. Raises KeyMaterialError."""
    if not 2 <= holders <= LARGEST_HOLDERS:
        raise invalid("holders", f"{holders} is not between 2 and {LARGEST_HOLDERS}")
    if threshold < 2:
        raise invalid("threshold", f"{threshold} would let one holder open alone; at least 2")
    if threshold > holders:
        raise invalid("threshold", f"{threshold} is more than the {holders} holders")


def check_share(key: ThresholdKey, share: KeyShare) -> None:
    """Whether `share` claims to be one of this deal and could be one, without the exponentiation of `check_kit`.

    Raises:
        KeyMaterialError: another key id, an index beyond the holders, or a value that is too large.
    """
    if share.key_id != key.key_id:
        raise invalid("key_id", f"the share belongs to key {share.key_id}, not to {key.key_id}")
    if share.index > key.holders:
        raise invalid("index", f"share {share.index} of {key.holders} holders")
    if share.value >= key.public.n_squared:
        raise invalid("value", "too large for a share of this key")


def check_kit(key: ThresholdKey, share: KeyShare) -> None:
    """Whether a kit's share is the one that its public values commit to: v_i = v^(Δ·s_i) mod n².

    Raises:
        KeyMaterialError: another key id, index or value.
    """
    check_share(key, share)
    if powmod_sec(key.v, key.delta * share.value, key.public.n_squared) != key.verification[share.index - 1]:
        raise invalid("value", f"share {share.index} does not match its verification key")
