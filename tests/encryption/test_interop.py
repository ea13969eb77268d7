"""python-paillier and Sotto read each other's keys and ciphertexts."""

from __future__ import annotations

import phe
import pytest

from src.encryption.integers import Entropy
from src.encryption.interop import private_from_phe, public_from_phe, to_phe
from src.encryption.keys import PrivateKey, PublicKey
from src.encryption.paillier import Encryptor, add, check_ciphertexts, decrypt
from src.errors import KeyMaterialError


def test_phe_decrypts_what_we_encrypted(private: PrivateKey, entropy: Entropy) -> None:
    plaintexts = [0, 1, 10**100, int(private.public.n) - 1]
    secret = to_phe(private)
    for plaintext, ciphertext in zip(
        plaintexts, Encryptor(private.public, expected_count=4).encrypt(plaintexts, entropy=entropy), strict=True
    ):
        assert secret.raw_decrypt(int(ciphertext)) == plaintext


def test_we_sum_and_decrypt_what_phe_encrypted(private: PrivateKey, entropy: Entropy) -> None:
    theirs = [to_phe(private.public).raw_encrypt(value) for value in (20, 22, 10**50)]
    ours = Encryptor(private.public, expected_count=1).encrypt([5], entropy=entropy)
    check_ciphertexts(private.public, theirs)
    assert decrypt(private, add(private.public, [*theirs, *ours])) == 47 + 10**50


def test_phe_decodes_the_sum_of_its_own_and_our_encodings(private: PrivateKey, entropy: Entropy) -> None:
    """python-paillier's integers are encodings with exponent 0: negative numbers are n − |x| with us as with them."""
    public = to_phe(private.public)
    (ours,) = Encryptor(private.public, expected_count=1).encrypt([private.public.n - 100], entropy=entropy)
    total = public.encrypt(58) + phe.EncryptedNumber(public, int(ours), 0)
    assert to_phe(private).decrypt(total) == -42


def test_keys_survive_the_way_there_and_back(private: PrivateKey, entropy: Entropy) -> None:
    there = to_phe(private)
    back = private_from_phe(there, entropy=entropy)
    assert {back.p, back.q} == {private.p, private.q}
    assert to_phe(back) == there
    assert public_from_phe(there.public_key, entropy=entropy).n == private.public.n
    assert to_phe(public_from_phe(there.public_key, entropy=entropy)) == there.public_key


def test_a_converted_key_has_an_h_and_an_id_of_its_own(public: PublicKey, entropy: Entropy) -> None:
    there = to_phe(public)
    first, second = (public_from_phe(there, entropy=entropy) for _ in range(2))
    assert len({public.key_id, first.key_id, second.key_id}) == 3


def test_a_key_that_phe_made_is_taken_if_its_primes_suit_us(entropy: Entropy) -> None:
    for _ in range(100):
        _, theirs = phe.generate_paillier_keypair(n_length=256)
        try:
            ours = private_from_phe(theirs, entropy=entropy)
        except KeyMaterialError:
            continue
        (ciphertext,) = Encryptor(ours.public, expected_count=1).encrypt([7], entropy=entropy)
        assert theirs.raw_decrypt(int(ciphertext)) == 7
        return
    raise AssertionError("one pair of primes in five suits: a hundred that do not are a mistake")


ONE_MODULO_FOUR = (340282366920938463463374607431768211297, 340282366920938463463374607431768211181)
THREE_MODULO_FOUR = 340282366920938463463374607431768211283


@pytest.mark.parametrize(
    ("n", "field"),
    [(ONE_MODULO_FOUR[0] * THREE_MODULO_FOUR, "n"), (2**300 + 1, "modulus_bits"), (2**255 + 2, "n")],
    ids=["3 modulo 4", "a length that is not whole words", "even"],
)
def test_a_modulus_that_djn_cannot_use_is_refused_by_field(n: int, field: str, entropy: Entropy) -> None:
    with pytest.raises(KeyMaterialError) as caught:
        public_from_phe(phe.PaillierPublicKey(n), entropy=entropy)
    assert caught.value.metadata["field"] == field


def test_primes_that_djn_cannot_use_are_refused(entropy: Entropy) -> None:
    """Both 1 modulo 4: the modulus looks right, and only the owner of the primes can tell."""
    p, q = ONE_MODULO_FOUR
    private = phe.PaillierPrivateKey(phe.PaillierPublicKey(p * q), p, q)
    with pytest.raises(KeyMaterialError, match="3 modulo 4"):
        private_from_phe(private, entropy=entropy)
