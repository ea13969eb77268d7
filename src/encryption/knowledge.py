"""A proof that whoever sends a batch knows what is inside: one for a whole batch.

Paillier ciphertexts can be multiplied and raised to powers by anybody, so a sender without such a proof could hand in
somebody else's ciphertexts of an earlier round, changed so that the opened sum shows them. The proof is bound to round
plan and sender: for what one has only copied, or computed from copies, it cannot be made.

Statement: ciphertexts c_1 … c_k. Witness: m_j in Z_n and r_j with c_j = (1 + n)^m_j · h^r_j mod n². The prover commits
to a = (1 + n)^u · h^s; a hash of everything, a included, gives 128-bit weights e_j; the answer is z = u + Σ e_j·m_j
mod n and w = s + Σ e_j·r_j over the integers; the verifier checks (1 + n)^z · h^w = a · ∏ c_j^e_j. It is the proof of
plaintext knowledge of Cramer, Damgård & Nielsen (Eurocrypt 2001, section 6.1) made non-interactive after Fiat & Shamir,
with one weight a ciphertext so that k of them cost one answer (as Gennaro, Leigh, Sundaram & Yerazunis, Asiacrypt 2004,
batch Schnorr's). From k + 1 accepting answers to independent weights the m_j follow by linear algebra modulo n.

Zero knowledge: z is uniform because u is; s is 128 bits longer than the sum that it hides. What stays open is a factor
of order 2 in a c_j (its sign), which no opening sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from ..errors import KnowledgeError
from .integers import (
    Entropy,
    digest_parts,
    from_bytes,
    invert,
    join,
    mpz,
    multi_power,
    powmod,
    powmod_sec,
    random_below,
    random_bits,
)
from .keys import PublicKey

WEIGHT_BITS: Final = 128
"""Somebody who does not know what is inside passes with probability 2^-128 a try."""
HIDING_BITS: Final = 128
COUNT_BITS: Final = 40
"""At most 2^40 ciphertexts in a batch."""
SEED_BYTES: Final = 32
VERIFY_TOGETHER: Final = 2048
"""Ciphertexts whose powers are taken at once: with fewer a product of powers costs more for each."""
_DOMAIN: Final = b"sotto/knowledge/"


def proof_bytes(public: PublicKey) -> int:
    """Length of a proof: seed (32), z (length of n), w (fixed by the key); integers big-endian."""
    return SEED_BYTES + public.plaintext_bytes + _response_bytes(public)


def _mask_bits(public: PublicKey) -> int:
    return public.modulus_bits // 2 + WEIGHT_BITS + COUNT_BITS + HIDING_BITS


def _response_bytes(public: PublicKey) -> int:
    return -(-(_mask_bits(public) + 1) // 8)


def _weight(seed: bytes, index: int) -> int:
    stream = hashlib.sha256(_DOMAIN + b"weight/1" + seed + index.to_bytes(8, "big")).digest()
    return from_bytes(stream[: WEIGHT_BITS // 8])


def _seed(public: PublicKey, binding: bytes, ciphertexts: bytes, commitment: int) -> bytes:
    return digest_parts(
        _DOMAIN + b"challenge/1",
        public.key_id.encode("ascii"),
        join([public.n, public.h], public.ciphertext_bytes),
        binding,
        ciphertexts,
        join([commitment], public.ciphertext_bytes),
    )


class KnowledgeProver:
    """Collects what is encrypted, and proves it at the end.

    Args:
        public: the key.
        binding: what the proof is bound to: the round plan and who sends.
        entropy: of the mask.
    """

    def __init__(self, public: PublicKey, *, binding: bytes, entropy: Entropy) -> None:
        self._public = public
        self._binding = binding
        self._entropy = entropy
        self._ciphertexts = hashlib.sha256()
        self._plaintexts: list[int] = []
        self._exponents: list[int] = []

    def add(self, block: bytes, plaintexts: Sequence[int], exponents: Sequence[int]) -> None:
        """The next ciphertexts (their bytes, back to back), what is inside, and the r of each h^r."""
        self._ciphertexts.update(block)
        self._plaintexts += plaintexts
        self._exponents += exponents

    def proof(self) -> bytes:
        """The proof for all that was added; what was collected is forgotten."""
        public = self._public
        n, n_squared = public.n, public.n_squared
        z, w = random_below(self._entropy, n), random_bits(self._entropy, _mask_bits(public)) + 1
        commitment = (1 + n * z) * powmod_sec(public.h, w, n_squared) % n_squared
        seed = _seed(public, self._binding, self._ciphertexts.digest(), commitment)
        for index, (plaintext, exponent) in enumerate(zip(self._plaintexts, self._exponents, strict=True)):
            weight = _weight(seed, index)
            z += weight * plaintext
            w += weight * exponent
        self._plaintexts, self._exponents = [], []
        response = w.to_bytes(_response_bytes(public), "big")
        return seed + (z % n).to_bytes(public.plaintext_bytes, "big") + response


class KnowledgeVerifier:
    """Checks a proof against ciphertexts that come block by block.

    Raises:
        KnowledgeError: the proof does not have its length.
    """

    def __init__(self, public: PublicKey, proof: bytes, *, binding: bytes) -> None:
        if len(proof) != proof_bytes(public):
            raise KnowledgeError(f"a proof of knowledge has {proof_bytes(public)} bytes, not {len(proof)}")
        self._public = public
        self._binding = binding
        self._seed = proof[:SEED_BYTES]
        self._z = from_bytes(proof[SEED_BYTES : SEED_BYTES + public.plaintext_bytes])
        self._w = from_bytes(proof[SEED_BYTES + public.plaintext_bytes :])
        self._ciphertexts = hashlib.sha256()
        self._pending: list[int] = []
        self._product = mpz(1)
        self._count = 0

    def add(self, block: bytes, ciphertexts: Sequence[int]) -> None:
        """The next ciphertexts: their bytes, and as integers that were found to be in Z*_{n²}."""
        self._ciphertexts.update(block)
        self._pending += ciphertexts
        if len(self._pending) >= VERIFY_TOGETHER:
            self._fold()

    def _fold(self) -> None:
        weights = [_weight(self._seed, self._count + index) for index in range(len(self._pending))]
        n_squared = self._public.n_squared
        power = multi_power(self._pending, weights, n_squared, exponent_bits=WEIGHT_BITS)
        self._product = self._product * power % n_squared
        self._count += len(self._pending)
        self._pending = []

    def finish(self) -> None:
        """Raises KnowledgeError unless the proof holds for all that was added."""
        self._fold()
        public = self._public
        n, n_squared = public.n, public.n_squared
        if self._z >= n or self._w.bit_length() > _mask_bits(public) + 1:
            raise KnowledgeError("a proof of knowledge is out of range")
        answer = (1 + n * self._z) * powmod(public.h, self._w, n_squared) % n_squared
        commitment = answer * invert(self._product, n_squared) % n_squared
        if _seed(public, self._binding, self._ciphertexts.digest(), commitment) != self._seed:
            raise KnowledgeError("the sender has not proven to know what is inside the ciphertexts")
