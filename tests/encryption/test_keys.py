"""Keys: strict to read, silent about secrets, named by their content."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from src.encryption.dealer import deal
from src.encryption.integers import Entropy, gcd, is_prime, small_primorial
from src.encryption.keys import (
    KeyShare,
    PrivateKey,
    PublicKey,
    ThresholdKey,
    check_kit,
    check_modulus_bits,
)
from src.errors import KeyMaterialError

Json = dict[str, Any]


def through_json(data: Json) -> Json:
    restored: Json = json.loads(json.dumps(data))
    return restored


def test_every_key_survives_json(key: ThresholdKey, private: PrivateKey, shares: list[KeyShare]) -> None:
    assert PublicKey.from_json(through_json(key.public.to_json()), insecure_small=True) == key.public
    assert ThresholdKey.from_json(through_json(key.to_json()), insecure_small=True) == key
    assert PrivateKey.from_json(through_json(private.to_json()), insecure_small=True) == private
    assert KeyShare.from_json(through_json(shares[0].to_json())) == shares[0]


def test_repr_shows_no_secret(private: PrivateKey, shares: list[KeyShare]) -> None:
    shown = repr(private) + str(private) + repr(shares)
    for secret in (private.p, private.q, private.h_p, private.p_inverse, shares[0].value):
        assert str(secret) not in shown
        assert f"{secret:x}" not in shown


def test_a_new_deal_with_the_same_primes_has_a_new_key_id(
    key: ThresholdKey, dealt_again: tuple[ThresholdKey, list[KeyShare]]
) -> None:
    assert key.public.n == dealt_again[0].public.n
    assert key.key_id != dealt_again[0].key_id
    assert len(key.key_id) == 32


def test_the_digest_of_a_deal_covers_v_and_every_v_i(key: ThresholdKey) -> None:
    n_squared = key.public.n_squared
    other_v = replace(key, v=key.v**2 % n_squared)
    last = (*key.verification[:-1], key.verification[-1] ** 2 % n_squared)
    digests = {key.digest, other_v.digest, replace(key, verification=last).digest}
    assert len(digests) == 3
    assert {other_v.key_id} == {key.key_id}


def test_2048_bits_pass_without_the_insecure_flag_and_512_do_not(
    primes_1024: tuple[int, int], public: PublicKey, seeded: Callable[[bytes], Entropy]
) -> None:
    large, shares = deal(*primes_1024, threshold=2, holders=2, entropy=seeded(b"2048"))
    assert ThresholdKey.from_json(large.to_json()) == large
    assert large.public.ciphertext_bytes == 512
    check_kit(large, shares[1])
    with pytest.raises(KeyMaterialError, match="too short"):
        PublicKey.from_json(public.to_json())


@pytest.mark.parametrize(
    ("modulus_bits", "insecure_small"),
    [(2047, False), (1024, False), (512, False), (192, True), (0, True), (2080, False), (3000, False)],
)
def test_modulus_lengths_that_are_refused(modulus_bits: int, insecure_small: bool) -> None:
    with pytest.raises(KeyMaterialError) as caught:
        check_modulus_bits(modulus_bits, insecure_small=insecure_small)
    assert caught.value.metadata["field"] == "modulus_bits"


@pytest.mark.parametrize(("modulus_bits", "insecure_small"), [(2048, False), (3072, False), (4096, False), (256, True)])
def test_modulus_lengths_that_are_accepted(modulus_bits: int, insecure_small: bool) -> None:
    check_modulus_bits(modulus_bits, insecure_small=insecure_small)


def hexadecimal(change: Callable[[Json, int], int], field: str) -> Callable[[Json], None]:
    def apply(data: Json) -> None:
        data[field] = f"{change(data, int(data['n'], 16)):x}"

    return apply


def setting(field: str, value: object) -> Callable[[Json], None]:
    return lambda data: data.__setitem__(field, value)


def rough(start: int, residue: int, *, prime: bool) -> int:
    """The first number from `start` on that is `residue` modulo 4, without small factors, and prime or not."""
    candidate = start - start % 4 + residue
    while gcd(candidate, small_primorial()) != 1 or is_prime(candidate) != prime:
        candidate += 4
    return candidate


PUBLIC_KEY_REFUSALS: list[tuple[str, Callable[[Json], None], str]] = [
    ("another kind", setting("kind", "private-key"), "kind"),
    ("no kind", lambda data: data.pop("kind") and None, "kind"),
    ("another version", setting("version", 2), "version"),
    ("a version that is text", setting("version", "1"), "version"),
    ("an unknown field", setting("g", "2"), "g"),
    ("no modulus", lambda data: data.pop("n") and None, "n"),
    ("no h", lambda data: data.pop("h") and None, "h"),
    ("modulus as a JSON integer", lambda data: data.update(n=int(data["n"], 16)), "n"),
    ("upper-case hexadecimal", lambda data: data.update(n=data["n"].upper()), "n"),
    ("leading zero", lambda data: data.update(n="0" + data["n"]), "n"),
    ("0x in front", lambda data: data.update(h="0x" + data["h"]), "h"),
    ("empty number", setting("h", ""), "h"),
    ("length as text", setting("modulus_bits", "512"), "modulus_bits"),
    ("length as a truth value", setting("modulus_bits", True), "modulus_bits"),
    ("length that the modulus does not have", setting("modulus_bits", 576), "n"),
    ("even modulus", hexadecimal(lambda _, n: n - 1, "n"), "n"),
    ("short modulus", hexadecimal(lambda _, n: n >> 3 | 1, "n"), "n"),
    ("modulus 0", setting("n", "0"), "n"),
    ("modulus divisible by 3", hexadecimal(lambda _, n: n - n % 12 + 9, "n"), "n"),
    ("modulus that is 3 modulo 4", hexadecimal(lambda _, n: rough(n, 3, prime=False), "n"), "n"),
    ("modulus that is prime", hexadecimal(lambda _, n: rough(n, 1, prime=True), "n"), "n"),
    ("modulus that is a square", hexadecimal(lambda _, n: rough(3 << 254, 3, prime=True) ** 2, "n"), "n"),
    ("h = 0", setting("h", "0"), "h"),
    ("h = 1", setting("h", "1"), "h"),
    ("h = n² − 1", hexadecimal(lambda _, n: n * n - 1, "h"), "h"),
    ("h = n²", hexadecimal(lambda _, n: n * n, "h"), "h"),
    ("h = n² + h", hexadecimal(lambda data, n: n * n + int(data["h"], 16), "h"), "h"),
    ("h a multiple of n", hexadecimal(lambda _, n: 5 * n, "h"), "h"),
]


@pytest.mark.parametrize(
    ("change", "field"), [row[1:] for row in PUBLIC_KEY_REFUSALS], ids=[r[0] for r in PUBLIC_KEY_REFUSALS]
)
def test_public_keys_that_are_refused(public: PublicKey, change: Callable[[Json], None], field: str) -> None:
    data = through_json(public.to_json())
    change(data)
    with pytest.raises(KeyMaterialError) as caught:
        PublicKey.from_json(data, insecure_small=True)
    assert caught.value.metadata["field"] == field


def test_h_that_shares_a_prime_with_n_is_refused(public: PublicKey, primes: tuple[int, int]) -> None:
    with pytest.raises(KeyMaterialError, match=r"h: not an element"):
        PublicKey(public.n, 6 * primes[0], public.modulus_bits)


def test_h_of_jacobi_symbol_minus_one_is_refused(public: PublicKey) -> None:
    def accepted(h: int) -> bool:
        try:
            PublicKey(public.n, h, public.modulus_bits)
        except KeyMaterialError:
            return False
        return True

    assert {accepted(h) for h in range(2, 40)} == {True, False}


def test_what_is_not_an_object_is_refused() -> None:
    things: list[object] = [None, [], "key", 7]
    for data in things:
        with pytest.raises(KeyMaterialError):
            PublicKey.from_json(data)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: data.update(p=data["q"]), "q"),
        (lambda data: data.update(p=f"{int(data['p'], 16) + 4:x}"), "p"),
        (lambda data: data.update(q=f"{int(data['q'], 16) * 2:x}"), "q"),
        (lambda data: data["public"].update(h="4"), "public.h"),
        (lambda data: data["public"].update(n="15"), "n"),
        (lambda data: data["public"].update(more=1), "public.more"),
        (lambda data: data.update(more=1), "more"),
    ],
)
def test_private_keys_that_are_refused(private: PrivateKey, change: Callable[[Json], None], field: str) -> None:
    data = through_json(private.to_json())
    change(data)
    with pytest.raises(KeyMaterialError) as caught:
        PrivateKey.from_json(data, insecure_small=True)
    assert caught.value.metadata["field"] == field
    assert f"{private.p:x}" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: data.update(threshold=1), "threshold"),
        (lambda data: data.update(threshold=0), "threshold"),
        (lambda data: data.update(threshold=6), "threshold"),
        (lambda data: data.update(holders=1), "holders"),
        (lambda data: data.update(holders=2000), "holders"),
        (lambda data: data.update(holders=4), "verification"),
        (lambda data: data.update(verification="12"), "verification"),
        (lambda data: data["verification"].pop(), "verification"),
        (lambda data: data["verification"].__setitem__(2, "0"), "verification[2]"),
        (lambda data: data["verification"].__setitem__(4, 7), "verification[4]"),
        (lambda data: data["verification"].__setitem__(0, "1"), "verification[0]"),
        (lambda data: data.update(v="0"), "v"),
        (lambda data: data.update(v="1"), "v"),
        (lambda data: data.update(v=data["public"]["n"]), "v"),
        (lambda data: data["public"].update(version=3), "public.version"),
        (lambda data: data.update(dealer="me"), "dealer"),
    ],
)
def test_threshold_keys_that_are_refused(key: ThresholdKey, change: Callable[[Json], None], field: str) -> None:
    data = through_json(key.to_json())
    change(data)
    with pytest.raises(KeyMaterialError) as caught:
        ThresholdKey.from_json(data, insecure_small=True)
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("index", 0), ("index", -1), ("index", 70_000), ("index", "1"), ("value", "0"), ("value", 12), ("key_id", 5)],
)
def test_key_shares_that_are_refused(shares: list[KeyShare], field: str, value: object) -> None:
    data = shares[0].to_json() | {field: value}
    with pytest.raises(KeyMaterialError) as caught:
        KeyShare.from_json(data)
    assert caught.value.metadata["field"] == field


def test_a_kit_is_checked_against_its_verification_key(
    key: ThresholdKey, shares: list[KeyShare], dealt_again: tuple[ThresholdKey, list[KeyShare]]
) -> None:
    for share in shares:
        check_kit(key, share)
    wrong = [
        (replace(shares[0], value=shares[0].value + 1), "value"),
        (replace(shares[0], index=2), "value"),
        (replace(shares[0], index=6), "index"),
        (replace(shares[0], value=shares[0].value + key.public.n_squared), "value"),
        (dealt_again[1][0], "key_id"),
        (replace(dealt_again[1][0], key_id=key.key_id), "value"),
    ]
    for share, field in wrong:
        with pytest.raises(KeyMaterialError) as caught:
            check_kit(key, share)
        assert caught.value.metadata["field"] == field
        assert str(share.value) not in str(caught.value)
