"""A batch is accepted only from somebody who knows what is inside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.integers import Entropy, join, powmod, random_below, random_bits
from src.encryption.keys import PublicKey
from src.encryption.knowledge import KnowledgeProver, KnowledgeVerifier, proof_bytes
from src.errors import KnowledgeError

BINDING = b"plan and sender"


class Batch:
    """Ciphertexts with what is inside them."""

    def __init__(self, public: PublicKey, count: int, entropy: Entropy) -> None:
        self.public = public
        self.plaintexts = [random_below(entropy, public.n) for _ in range(count)]
        self.exponents = [random_bits(entropy, public.modulus_bits // 2) for _ in range(count)]
        self.ciphertexts = [
            (1 + public.n * m) * powmod(public.h, r, public.n_squared) % public.n_squared
            for m, r in zip(self.plaintexts, self.exponents, strict=True)
        ]

    def prove(self, entropy: Entropy, *, binding: bytes = BINDING) -> bytes:
        prover = KnowledgeProver(self.public, binding=binding, entropy=entropy)
        prover.add(join(self.ciphertexts, self.public.ciphertext_bytes), self.plaintexts, self.exponents)
        return prover.proof()


def verify(
    public: PublicKey, ciphertexts: list[int], proof: bytes, *, binding: bytes = BINDING, block: int = 3
) -> None:
    verifier = KnowledgeVerifier(public, proof, binding=binding)
    for start in range(0, len(ciphertexts), block):
        part = ciphertexts[start : start + block]
        verifier.add(join(part, public.ciphertext_bytes), part)
    verifier.finish()


@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 20), block=st.integers(1, 25))
def test_whoever_encrypted_can_prove_it_however_the_batch_is_cut(
    public: PublicKey, entropy: Entropy, count: int, block: int
) -> None:
    batch = Batch(public, count, entropy)
    verify(public, batch.ciphertexts, batch.prove(entropy), block=block)


def _power(batch: Batch) -> list[int]:
    return [powmod(c, 8, batch.public.n_squared) for c in batch.ciphertexts]


def _shifted(batch: Batch) -> list[int]:
    n, n_squared = batch.public.n, batch.public.n_squared
    return [c * (1 + n) % n_squared for c in batch.ciphertexts]


def _rerandomised(batch: Batch) -> list[int]:
    n_squared = batch.public.n_squared
    return [c * powmod(batch.public.h, 12345, n_squared) % n_squared for c in batch.ciphertexts]


COPIES: dict[str, Callable[[Batch], list[int]]] = {
    "raised to a power": _power,
    "with something added": _shifted,
    "re-randomised": _rerandomised,
    "in another order": lambda batch: batch.ciphertexts[::-1],
    "without the last": lambda batch: batch.ciphertexts[:-1],
    "with the first twice": lambda batch: [batch.ciphertexts[0], *batch.ciphertexts],
}


@pytest.mark.parametrize("how", COPIES)
def test_the_proof_of_a_batch_is_none_for_what_was_made_of_it(public: PublicKey, entropy: Entropy, how: str) -> None:
    batch = Batch(public, 5, entropy)
    proof = batch.prove(entropy)
    with pytest.raises(KnowledgeError, match="not proven"):
        verify(public, COPIES[how](batch), proof)


def test_a_proof_holds_for_one_plan_and_sender_only(public: PublicKey, entropy: Entropy) -> None:
    batch = Batch(public, 4, entropy)
    with pytest.raises(KnowledgeError, match="not proven"):
        verify(public, batch.ciphertexts, batch.prove(entropy), binding=b"another round, or another sender")


def test_every_part_of_a_proof_matters(public: PublicKey, entropy: Entropy) -> None:
    batch = Batch(public, 2, entropy)
    proof = batch.prove(entropy)
    for position in range(0, len(proof), 3):
        changed = bytearray(proof)
        changed[position] ^= 1
        with pytest.raises(KnowledgeError):
            verify(public, batch.ciphertexts, bytes(changed))


@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_proof_has_one_length(public: PublicKey, entropy: Entropy, length: int) -> None:
    proof = Batch(public, 1, entropy).prove(entropy)
    wrong = proof[:length] if length <= 0 else proof + bytes(length)
    with pytest.raises(KnowledgeError, match=f"has {proof_bytes(public)} bytes"):
        KnowledgeVerifier(public, wrong, binding=BINDING)


def test_two_proofs_of_one_batch_share_no_answer(public: PublicKey, entropy: Entropy) -> None:
    """With the same mask twice the difference of two answers would show what is inside."""
    batch = Batch(public, 3, entropy)
    first, second = batch.prove(entropy), batch.prove(entropy)
    assert first[:32] != second[:32]
    assert first[32:] != second[32:]


def test_the_answer_hides_what_it_adds_up(public: PublicKey, seeded: Callable[[bytes], Entropy]) -> None:
    """z is z_mask + Σ e·m mod n with a uniform mask: over many proofs of one batch its top bit is balanced."""
    entropy = seeded(b"hides")
    batch = Batch(public, 1, entropy)
    tops = [batch.prove(entropy)[32] >> 7 for _ in range(200)]
    assert 60 < sum(tops) < 140  # n is 0.87·2^512: 85 expected, standard deviation 7


def test_weights_depend_on_the_position_of_a_ciphertext(public: PublicKey, entropy: Entropy) -> None:
    """Equal weights would let two wrong ciphertexts cancel out."""
    batch = Batch(public, 2, entropy)
    proof = batch.prove(entropy)
    n_squared = public.n_squared
    factor = powmod(public.h, 99, n_squared)
    swapped = [batch.ciphertexts[0] * factor % n_squared, batch.ciphertexts[1] * powmod(factor, -1, n_squared)]
    with pytest.raises(KnowledgeError, match="not proven"):
        verify(public, [c % n_squared for c in swapped], proof)
