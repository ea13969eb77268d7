"""Paillier on integers: against the definition, against python-paillier, and at the limits of every range."""

from __future__ import annotations

from dataclasses import replace

import phe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.integers import Entropy, gcd, multi_power, powmod
from src.encryption.keys import KeyShare, PrivateKey, PublicKey, ThresholdKey
from src.encryption.paillier import Comb, Encryptor, add, check_ciphertexts, decrypt, encryptor_for, plan_comb
from src.errors import CiphertextError


@pytest.fixture(scope="module")
def encryptor(public: PublicKey) -> Encryptor:
    return Encryptor(public, expected_count=100)


class FixedToken:
    """One token, for a look into the arithmetic."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    def token(self, size: int) -> bytes:
        assert size == len(self._token)
        return self._token


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_was_encrypted_is_decrypted(
    data: st.DataObject, encryptor: Encryptor, private: PrivateKey, entropy: Entropy
) -> None:
    n = int(private.public.n)
    plaintexts = data.draw(st.lists(st.sampled_from([0, 1, n - 1, n // 2]) | st.integers(0, n - 1), max_size=5))
    ciphertexts = encryptor.encrypt(plaintexts, entropy=entropy)
    check_ciphertexts(private.public, ciphertexts)
    assert [decrypt(private, ciphertext) for ciphertext in ciphertexts] == plaintexts
    assert decrypt(private, add(private.public, ciphertexts)) == sum(plaintexts) % n


@pytest.mark.parametrize("expected_count", [1, 7, 100, 10_000])
@pytest.mark.parametrize("token", [bytes(32), b"\xff" * 32, bytes(range(32)), b"\x01" + bytes(31)])
def test_a_ciphertext_is_the_textbook_formula(public: PublicKey, expected_count: int, token: bytes) -> None:
    """(1 + n·m)·h^r mod n², whatever the comb looks like."""
    plaintext = public.n - 12345
    encryptor = Encryptor(public, expected_count=expected_count, memory_limit_mb=2)
    (ciphertext,) = encryptor.encrypt([plaintext], entropy=FixedToken(token))
    exponent = int.from_bytes(token, "little")
    n_squared = public.n * public.n
    assert ciphertext == (1 + public.n * plaintext) * powmod(public.h, exponent, n_squared) % n_squared


def test_equal_plaintexts_have_different_ciphertexts(encryptor: Encryptor, entropy: Entropy) -> None:
    assert len(set(encryptor.encrypt([5] * 200, entropy=entropy))) == 200


def test_the_comb_obeys_its_memory_limit_and_pays_off() -> None:
    for expected_count in (1, 10, 1_000, 100_000):
        for memory_limit_mb in (1, 8, 64):
            comb = plan_comb(1536, expected_count=expected_count, entry_bytes=880, memory_limit_mb=memory_limit_mb)
            assert comb.entries * 880 <= memory_limit_mb * 1_000_000
            assert comb.teeth * comb.row_bits >= 1536
            assert comb.cost(expected_count) <= Comb(1536, 1, 1, 1536).cost(expected_count)
    few, many = (plan_comb(1536, expected_count=n, entry_bytes=880, memory_limit_mb=64) for n in (1, 6579))
    assert few.entries < 1000
    assert many.row_bits + many.columns < 150  # fixed windows of 8 bits need 192 products


def test_tables_are_built_once_a_key_until_they_are_outgrown_or_too_large(
    public: PublicKey, dealt_again: tuple[ThresholdKey, list[KeyShare]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.encryption.paillier._latest", [])
    first = encryptor_for(public, expected_count=100)
    assert encryptor_for(public, expected_count=399) is first
    assert encryptor_for(public, expected_count=1) is first
    larger = encryptor_for(public, expected_count=400)
    assert larger is not first
    assert encryptor_for(public, expected_count=1000, memory_limit_mb=1).memory_limit_mb == 1
    assert encryptor_for(dealt_again[0].public, expected_count=1).public == dealt_again[0].public


def refused(public: PublicKey, p: int) -> list[tuple[str, int]]:
    n = public.n
    return [
        ("0", 0),
        ("n", n),
        ("a multiple of n", 7 * n),
        ("n²", n * n),
        ("n² + 1", n * n + 1),
        ("negative", -1),
        ("p", p),
        ("a multiple of p", 6 * p),
        ("2·n²", 2 * n * n),
    ]


def test_what_is_not_a_ciphertext_is_refused_with_its_position(
    public: PublicKey, primes: tuple[int, int], encryptor: Encryptor, entropy: Entropy
) -> None:
    good = encryptor.encrypt([1, 2, 3], entropy=entropy)
    check_ciphertexts(public, good)
    check_ciphertexts(public, [1, public.n_squared - 1])
    check_ciphertexts(public, [])
    for name, wrong in refused(public, primes[0]):
        with pytest.raises(CiphertextError) as caught:
            check_ciphertexts(public, [*good, wrong, *good, wrong], first=40)
        assert caught.value.metadata["index"] == "43", name


def test_two_wrongs_do_not_make_a_right(public: PublicKey, primes: tuple[int, int]) -> None:
    """A multiple of p beside a multiple of q, and a zero beside anything, are refused as a batch."""
    with pytest.raises(CiphertextError):
        check_ciphertexts(public, [primes[0], primes[1]])


def test_phe_decrypts_ours(encryptor: Encryptor, private: PrivateKey, entropy: Entropy) -> None:
    theirs = phe.PaillierPublicKey(int(private.public.n))
    secret = phe.PaillierPrivateKey(theirs, int(private.p), int(private.q))
    for plaintext in (0, 1, 123456789, int(private.public.n) - 1):
        (ciphertext,) = encryptor.encrypt([plaintext], entropy=entropy)
        assert secret.raw_decrypt(int(ciphertext)) == plaintext


def test_we_sum_phe_ciphertexts_with_ours(encryptor: Encryptor, private: PrivateKey, entropy: Entropy) -> None:
    theirs = phe.PaillierPublicKey(int(private.public.n))
    ciphertexts = [theirs.raw_encrypt(plaintext) for plaintext in (10, 200, 3000)]
    ciphertexts += encryptor.encrypt([40_000], entropy=entropy)
    check_ciphertexts(private.public, ciphertexts)
    assert decrypt(private, add(private.public, ciphertexts)) == 43_210


def test_a_key_pair_decrypts_when_its_primes_are_swapped(
    private: PrivateKey, encryptor: Encryptor, entropy: Entropy
) -> None:
    swapped = replace(private, p=private.q, q=private.p)
    (ciphertext,) = encryptor.encrypt([77], entropy=entropy)
    assert decrypt(swapped, ciphertext) == 77


def test_h_blinds_with_an_nth_residue(private: PrivateKey) -> None:
    """Decrypting h gives 0: it carries no plaintext of its own."""
    assert decrypt(private, private.public.h) == 0
    assert gcd(private.public.h, private.public.n) == 1


@settings(deadline=None, max_examples=30)
@given(pairs=st.lists(st.tuples(st.integers(1, 10**40), st.integers(0, 2**128 - 1)), max_size=12))
def test_products_of_powers_by_buckets_equal_the_powers_one_by_one(pairs: list[tuple[int, int]]) -> None:
    modulus = 10**41 + 9
    expected = 1
    for base, exponent in pairs:
        expected = expected * pow(base, exponent, modulus) % modulus
    bases, exponents = [base for base, _ in pairs], [exponent for _, exponent in pairs]
    assert multi_power(bases, exponents, modulus, exponent_bits=128) == expected
