"""Threshold opening: any `threshold` shares open, fewer do not, a wrong share is named by one proof for the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest

from src.encryption.integers import Entropy, invert, powmod
from src.encryption.keys import KeyShare, PrivateKey, ThresholdKey
from src.encryption.paillier import Encryptor, decrypt
from src.encryption.threshold import (
    ShareBatch,
    combine,
    open_batch,
    partial_decrypt,
    partial_decrypt_all,
    prove,
    response_bytes,
    verify_share_batch,
)
from src.errors import CiphertextError, KeyMaterialError, ShareError, TooFewSharesError

BINDING = b"job 1, round 2, party 3"
PLAINTEXTS = [0, 1, 2, 10**100, 424242]


@pytest.fixture(scope="module")
def ciphertexts(key: ThresholdKey, entropy: Entropy) -> list[int]:
    encryptor = Encryptor(key.public, expected_count=len(PLAINTEXTS) + 1)
    return encryptor.encrypt([*PLAINTEXTS, key.public.n - 1], entropy=entropy)


@pytest.fixture(scope="module")
def batches(
    key: ThresholdKey, shares: list[KeyShare], ciphertexts: list[int], entropy: Entropy
) -> dict[int, ShareBatch]:
    return {s.index: open_batch(s, key, ciphertexts, binding=BINDING, entropy=entropy) for s in shares}


def test_a_partial_decryption_is_the_formula(key: ThresholdKey, shares: list[KeyShare], ciphertexts: list[int]) -> None:
    """c^(2·5!·s_i) mod n²."""
    expected = powmod(ciphertexts[0], 2 * 120 * shares[1].value, key.public.n_squared)
    assert partial_decrypt(shares[1], key, ciphertexts[0]) == expected
    assert partial_decrypt_all(shares[1], key, ciphertexts[:1]) == [expected]


def test_any_threshold_of_shares_open_the_same(key: ThresholdKey, batches: dict[int, ShareBatch]) -> None:
    expected = [*PLAINTEXTS, key.public.n - 1]
    for size in range(key.threshold, key.holders + 1):
        for group in combinations(batches, size):
            assert combine(key, {index: batches[index].values for index in group}) == expected


def test_fewer_shares_open_nothing(key: ThresholdKey, batches: dict[int, ShareBatch]) -> None:
    for group in [(), (1,), (2, 5)]:
        with pytest.raises(TooFewSharesError) as caught:
            combine(key, {index: batches[index].values for index in group})
        assert caught.value.metadata == {"shares": str(len(group)), "threshold": "3"}


def test_the_arithmetic_of_fewer_shares_opens_nothing(key: ThresholdKey, batches: dict[int, ShareBatch]) -> None:
    """Two of three, combined as if two were enough, do not even give a power of 1 + n."""
    with pytest.raises(ShareError, match="do not fit together"):
        combine(replace(key, threshold=2), {index: batches[index].values for index in (1, 2)})


def test_every_honest_share_verifies(key: ThresholdKey, ciphertexts: list[int], batches: dict[int, ShareBatch]) -> None:
    for index, batch in batches.items():
        verify_share_batch(key, ciphertexts, batch, index=index, binding=BINDING)


def test_an_empty_batch_is_proven_too(key: ThresholdKey, shares: list[KeyShare], entropy: Entropy) -> None:
    batch = open_batch(shares[0], key, [], binding=BINDING, entropy=entropy)
    verify_share_batch(key, [], batch, index=1, binding=BINDING)


Change = Callable[[ShareBatch, ThresholdKey], ShareBatch]


def with_value(position: int, change: Callable[[int, int], int]) -> Change:
    def apply(batch: ShareBatch, key: ThresholdKey) -> ShareBatch:
        values = list(batch.values)
        values[position] = change(values[position], key.public.n)
        return replace(batch, values=values)

    return apply


def swapped(batch: ShareBatch, _: ThresholdKey) -> ShareBatch:
    values = list(batch.values)
    values[0], values[1] = values[1], values[0]
    return replace(batch, values=values)


WRONG_SHARES: list[tuple[str, Change]] = [
    ("a value that is one too large", with_value(0, lambda d, n: d + 1)),
    ("a value times 1 + n", with_value(4, lambda d, n: d * (1 + n) % (n * n))),
    ("a value squared", with_value(2, lambda d, n: d * d % (n * n))),
    ("a value of 0", with_value(1, lambda d, n: 0)),
    ("a value of n", with_value(1, lambda d, n: n)),
    ("a value not reduced", with_value(1, lambda d, n: d + n * n)),
    ("a value negated after the proof", with_value(1, lambda d, n: n * n - d)),
    ("two values swapped", swapped),
    ("a value missing", lambda batch, _: replace(batch, values=list(batch.values)[:-1])),
    ("a value too many", lambda batch, _: replace(batch, values=[*batch.values, 1])),
    ("another challenge", lambda batch, _: replace(batch, challenge=batch.challenge ^ 1)),
    ("challenge 0", lambda batch, _: replace(batch, challenge=0)),
    ("another response", lambda batch, _: replace(batch, response=batch.response + 1)),
    ("response 0", lambda batch, _: replace(batch, response=0)),
    ("another holder's index", lambda batch, _: replace(batch, index=3)),
    ("another key id", lambda batch, _: replace(batch, key_id="0" * 32)),
]


@pytest.mark.parametrize("change", [row[1] for row in WRONG_SHARES], ids=[row[0] for row in WRONG_SHARES])
def test_a_wrong_share_is_refused_and_its_holder_named(
    key: ThresholdKey, ciphertexts: list[int], batches: dict[int, ShareBatch], change: Change
) -> None:
    with pytest.raises(ShareError) as caught:
        verify_share_batch(key, ciphertexts, change(batches[2], key), index=2, binding=BINDING)
    assert caught.value.metadata["index"] == "2"


def test_a_proof_holds_for_its_ciphertexts_binding_holder_and_deal_alone(
    key: ThresholdKey,
    ciphertexts: list[int],
    batches: dict[int, ShareBatch],
    dealt_again: tuple[ThresholdKey, list[KeyShare]],
) -> None:
    batch = batches[1]
    others = [ciphertexts[1], ciphertexts[0], *ciphertexts[2:]]
    committed = list(key.verification)
    committed[4] = committed[3]
    attempts = [
        (key, others, batch, 1, BINDING),
        (key, ciphertexts, batch, 1, b"job 1, round 3, party 3"),
        (key, ciphertexts, batch, 1, b""),
        (key, ciphertexts, batch, 2, BINDING),
        (key, ciphertexts, replace(batch, index=2), 2, BINDING),
        (key, ciphertexts, replace(batch, index=6), 6, BINDING),
        (key, ciphertexts, replace(batch, index=0), 0, BINDING),
        (dealt_again[0], ciphertexts, batch, 1, BINDING),
        (dealt_again[0], ciphertexts, replace(batch, key_id=dealt_again[0].key_id), 1, BINDING),
        (replace(key, verification=tuple(committed)), ciphertexts, batch, 1, BINDING),
    ]
    for at_key, at_ciphertexts, at_batch, index, binding in attempts:
        with pytest.raises(ShareError):
            verify_share_batch(at_key, at_ciphertexts, at_batch, index=index, binding=binding)


def test_a_holder_who_shifts_plaintext_between_two_ciphertexts_is_caught(
    key: ThresholdKey, shares: list[KeyShare], ciphertexts: list[int], entropy: Entropy
) -> None:
    """d_0·g and d_1/g leave the product of all d_j as it was: only the weights see it, with the share known."""
    n_squared = key.public.n_squared
    g = 1 + key.public.n
    values = list(partial_decrypt_all(shares[0], key, ciphertexts))
    values[0] = values[0] * g % n_squared
    values[1] = values[1] * invert(g, n_squared) % n_squared
    forged = prove(shares[0], key, ciphertexts, values, binding=BINDING, entropy=entropy)
    with pytest.raises(ShareError, match="proof does not hold"):
        verify_share_batch(key, ciphertexts, forged, index=1, binding=BINDING)


def test_a_holder_with_another_share_is_caught(
    key: ThresholdKey, shares: list[KeyShare], ciphertexts: list[int], entropy: Entropy
) -> None:
    forged = open_batch(replace(shares[0], value=shares[1].value), key, ciphertexts, binding=BINDING, entropy=entropy)
    with pytest.raises(ShareError):
        verify_share_batch(key, ciphertexts, forged, index=1, binding=BINDING)


def test_values_times_elements_of_order_two_verify_when_proven_so_and_are_harmless(
    key: ThresholdKey,
    shares: list[KeyShare],
    ciphertexts: list[int],
    batches: dict[int, ShareBatch],
    private: PrivateKey,
    entropy: Entropy,
) -> None:
    """The proof is over squares and cannot see d_j → −d_j (nor the other roots of 1, which give away the primes); the
    opening raises every d_j to an even power, so the plaintexts stay what they were."""
    n_squared = key.public.n_squared
    p_squared, q_squared = private.p_squared, private.q_squared
    root = (p_squared * invert(p_squared, q_squared) - q_squared * invert(q_squared, p_squared)) % n_squared
    assert root * root % n_squared == 1
    assert root not in (1, n_squared - 1)
    honest = list(batches[1].values)
    for element, positions in ((n_squared - 1, (0,)), (n_squared - 1, (0, 1)), (root, (2,)), (root, (0, 1, 4))):
        values = [d * element % n_squared if j in positions else d for j, d in enumerate(honest)]
        assert values != honest
        tampered = prove(shares[0], key, ciphertexts, values, binding=BINDING, entropy=entropy)
        verify_share_batch(key, ciphertexts, tampered, index=1, binding=BINDING)
        opened = combine(key, {1: values, 3: batches[3].values, 4: batches[4].values})
        assert opened == [*PLAINTEXTS, key.public.n - 1]


def test_no_share_is_made_of_what_is_no_ciphertext_or_with_another_keys_share(
    key: ThresholdKey, shares: list[KeyShare], dealt_again: tuple[ThresholdKey, list[KeyShare]], ciphertexts: list[int]
) -> None:
    for wrong in (0, key.public.n, key.public.n_squared):
        with pytest.raises(CiphertextError) as caught:
            partial_decrypt_all(shares[0], key, [ciphertexts[0], wrong])
        assert caught.value.metadata["index"] == "1"
    with pytest.raises(KeyMaterialError):
        partial_decrypt_all(dealt_again[1][0], key, ciphertexts)


def test_shares_and_the_key_owner_open_the_same(
    key: ThresholdKey, private: PrivateKey, ciphertexts: list[int], batches: dict[int, ShareBatch]
) -> None:
    assert combine(key, {i: batches[i].values for i in (1, 2, 3)}) == [decrypt(private, c) for c in ciphertexts]


def test_unverified_rubbish_does_not_open(key: ThresholdKey, batches: dict[int, ShareBatch]) -> None:
    honest = {i: batches[i].values for i in (1, 2)}
    for rubbish in (7, key.public.n, 0):
        with pytest.raises(ShareError):
            combine(key, honest | {3: [rubbish] * len(honest[1])})


def test_two_proofs_of_the_same_share_differ(
    key: ThresholdKey, shares: list[KeyShare], ciphertexts: list[int], batches: dict[int, ShareBatch], entropy: Entropy
) -> None:
    again = open_batch(shares[0], key, ciphertexts, binding=BINDING, entropy=entropy)
    assert again.values == batches[1].values
    assert again.response != batches[1].response


def test_a_response_hides_the_share_by_128_bits(key: ThresholdKey) -> None:
    largest = (2**256 - 1) * key.delta * key.public.n_squared
    assert 8 * response_bytes(key) >= largest.bit_length() + 128


def test_a_share_batch_survives_its_bytes(key: ThresholdKey, batches: dict[int, ShareBatch]) -> None:
    data = batches[4].encode(key)
    assert data[:6] == b"SOTS\x00\x01"
    assert data[22:36] == b"\x00\x04" + b"\x00" * 7 + b"\x06" + b"\x00\x00\x00\x80"
    assert ShareBatch.decode(data, key, count=6, index=4) == batches[4]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("magic", lambda data: b"SOTB" + data[4:]),
        ("version", lambda data: data[:5] + b"\x02" + data[6:]),
        ("key id", lambda data: data[:6] + bytes(16) + data[22:]),
        ("index", lambda data: data[:22] + b"\x00\x03" + data[24:]),
        ("count", lambda data: data[:31] + b"\x05" + data[32:]),
        ("width", lambda data: data[:35] + b"\x40" + data[36:]),
        ("length", lambda data: data[:-1]),
        ("length", lambda data: data + b"\x00"),
        ("magic", lambda data: b""),
        ("width", lambda data: data[:34]),
        ("length", lambda data: data[:40]),
    ],
)
def test_malformed_share_batches_are_refused_by_name(
    key: ThresholdKey, batches: dict[int, ShareBatch], name: str, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(ShareError, match=name) as caught:
        ShareBatch.decode(change(batches[4].encode(key)), key, count=6, index=4)
    assert caught.value.metadata["index"] == "4"
