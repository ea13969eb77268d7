"""What `paillier` adds to the contract: secrecy of equal inputs, custody by the key owner, parts, the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import phe
import pytest

from src.encryption.dealer import make_key_pair
from src.encryption.integers import Entropy, split
from src.encryption.keys import KeyShare, PrivateKey, ThresholdKey
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.plaintext import PlaintextScheme
from src.encryption.registry import SCHEME_NAMES, scheme_for
from src.encryption.scheme import Layout, LayoutRequest
from src.errors import BatchError, CiphertextError, ConfigError, KeyMaterialError, ShareError

REQUEST = LayoutRequest(parameter_count=400, value_bound=900, noise_bound=100, contributions=3)
VALUES = np.arange(-200, 200, dtype=np.int64)


@pytest.fixture(scope="module")
def scheme(key: ThresholdKey) -> PaillierScheme:
    return PaillierScheme(key.public, key)


@pytest.fixture(scope="module")
def layout(scheme: PaillierScheme) -> Layout:
    return scheme.plan(REQUEST)


@pytest.fixture(scope="module")
def body(scheme: PaillierScheme, layout: Layout, entropy: Entropy) -> bytes:
    return b"".join(scheme.protect(layout, [VALUES], entropy=entropy))


def test_a_layout_that_is_known(layout: Layout) -> None:
    """3 contributions · 2 · 1000 need 13 bits; 511 bits hold 39 slots; 400 values fill 11 ciphertexts of 128 bytes."""
    assert layout.slot_bits == 13
    assert layout.offset == 1000
    assert layout.slots_per_ciphertext == 39
    assert layout.ciphertext_count == 11
    assert layout.body_bytes == 11 * 128


def test_equal_inputs_give_ciphertexts_that_all_differ(
    scheme: PaillierScheme, layout: Layout, entropy: Entropy
) -> None:
    zeros = np.zeros(400, dtype=np.int64)
    seen: list[bytes] = []
    for _ in range(5):
        protected = b"".join(scheme.protect(layout, [zeros], entropy=entropy))
        seen += [protected[at : at + 128] for at in range(0, len(protected), 128)]
    assert len(set(seen)) == len(seen) == 55


def test_prepared_randomness_serves_the_next_batch_alone(key: ThresholdKey, layout: Layout, entropy: Entropy) -> None:
    class Counting:
        drawn = 0

        def token(self, size: int) -> bytes:
            self.drawn += 1
            return entropy.token(size)

    scheme = PaillierScheme(key.public, key)
    scheme.prepare(layout, entropy=entropy)
    now = Counting()
    list(scheme.protect(layout, [VALUES], entropy=now))
    assert now.drawn == 0
    list(scheme.protect(layout, [VALUES], entropy=now))
    assert now.drawn == layout.ciphertext_count


def test_the_key_owner_opens_what_the_holders_open(
    scheme: PaillierScheme, layout: Layout, body: bytes, private: PrivateKey
) -> None:
    opened = scheme.open_with_key(layout, private, [body])
    assert np.concatenate(list(scheme.decode(layout, opened, contributions=1))).tolist() == VALUES.tolist()


def test_a_fresh_key_pair_serves_custody_aggregator(entropy: Entropy) -> None:
    private = make_key_pair(512, entropy=entropy, insecure_small=True)
    scheme = PaillierScheme(private.public)
    layout = scheme.plan(REQUEST)
    opened = scheme.open_with_key(layout, private, scheme.protect(layout, [VALUES], entropy=entropy))
    assert np.concatenate(list(scheme.decode(layout, opened, contributions=1))).tolist() == VALUES.tolist()


def test_another_key_owner_opens_nothing(scheme: PaillierScheme, layout: Layout, body: bytes, entropy: Entropy) -> None:
    private = make_key_pair(512, entropy=entropy, insecure_small=True)
    with pytest.raises(KeyMaterialError):
        list(scheme.open_with_key(layout, private, [body]))


def test_without_a_deal_there_are_no_shares(
    key: ThresholdKey, shares: list[KeyShare], layout: Layout, body: bytes, entropy: Entropy
) -> None:
    alone = PaillierScheme(key.public)
    with pytest.raises(KeyMaterialError, match="not dealt out"):
        alone.open_share(layout, shares[0], [body], binding=b"", entropy=entropy)


def test_phe_opens_a_batch_of_ours(scheme: PaillierScheme, layout: Layout, body: bytes, private: PrivateKey) -> None:
    secret = phe.PaillierPrivateKey(phe.PaillierPublicKey(int(private.public.n)), int(private.p), int(private.q))
    opened = b"".join(secret.raw_decrypt(int(c)).to_bytes(64, "big") for c in split(body, 128))
    assert np.concatenate(list(scheme.decode(layout, [opened], contributions=1))).tolist() == VALUES.tolist()


def test_an_opening_in_parts_is_the_opening_of_the_whole(
    scheme: PaillierScheme, layout: Layout, body: bytes, shares: list[KeyShare], entropy: Entropy
) -> None:
    parts = [
        scheme.open_part(layout.part(0, 4), shares[0], [body[: 4 * 128]]),
        scheme.open_part(layout.part(4, 7), shares[0], [body[4 * 128 :]]),
    ]
    batch = scheme.prove_parts(layout, shares[0], [body], parts=parts, binding=b"round", entropy=entropy)
    scheme.verify_share(layout, body, batch, index=1, binding=b"round")
    with pytest.raises(BatchError):
        scheme.prove_parts(layout, shares[0], [body], parts=parts[:1], binding=b"round", entropy=entropy)


def replaced(number: Callable[[int, int], int]) -> Callable[[bytes, int, int], bytes]:
    def apply(body: bytes, n: int, p: int) -> bytes:
        return body[: 7 * 128] + number(n, p).to_bytes(128, "big") + body[8 * 128 :]

    return apply


@pytest.mark.parametrize(
    "change",
    [
        replaced(lambda n, p: 0),
        replaced(lambda n, p: n),
        replaced(lambda n, p: n * n),
        replaced(lambda n, p: n * n + 1),
        replaced(lambda n, p: 2**1024 - 1),
        replaced(lambda n, p: 10 * p),
        replaced(lambda n, p: n * n - n),
    ],
    ids=["0", "n", "n²", "n² + 1", "all ones", "a multiple of p", "n² − n"],
)
def test_a_ciphertext_outside_the_group_is_refused_by_whoever_touches_it(
    scheme: PaillierScheme,
    layout: Layout,
    body: bytes,
    private: PrivateKey,
    shares: list[KeyShare],
    entropy: Entropy,
    change: Callable[[bytes, int, int], bytes],
) -> None:
    bad = change(body, int(private.public.n), int(private.p))
    uses: list[Callable[[], object]] = [
        lambda: list(scheme.check(layout, [bad])),
        lambda: scheme.open_share(layout, shares[0], [bad], binding=b"", entropy=entropy),
        lambda: list(scheme.open_with_key(layout, private, [bad])),
    ]
    for use in uses:
        with pytest.raises(CiphertextError) as caught:
            use()
        assert caught.value.metadata["index"] == "7"


def test_shares_of_another_deal_are_refused(
    scheme: PaillierScheme,
    layout: Layout,
    body: bytes,
    dealt_again: tuple[ThresholdKey, list[KeyShare]],
    entropy: Entropy,
) -> None:
    other_key, other_shares = dealt_again
    with pytest.raises(KeyMaterialError):
        scheme.open_share(layout, other_shares[0], [body], binding=b"", entropy=entropy)
    other = PaillierScheme(other_key.public, other_key)
    foreign = other.open_share(other.plan(REQUEST), other_shares[0], [body], binding=b"", entropy=entropy)
    with pytest.raises(ShareError, match="key id"):
        scheme.verify_share(layout, body, foreign, index=1, binding=b"")
    with pytest.raises(ShareError):
        list(scheme.combine(layout, body, dict.fromkeys((1, 2, 3), foreign)))


def test_schemes_are_found_by_short_name(key: ThresholdKey) -> None:
    assert SCHEME_NAMES == ("paillier", "plaintext")
    assert isinstance(scheme_for("paillier", key.public), PaillierScheme)
    assert scheme_for("paillier", threshold_key=key).plan(REQUEST).key_id == key.key_id
    plain = scheme_for("plaintext", threshold_key=key)
    assert isinstance(plain, PlaintextScheme)
    assert (plain.threshold, plain.holders) == (3, 5)
    assert scheme_for("plaintext").name == "plaintext"


def test_schemes_that_are_refused(key: ThresholdKey, dealt_again: tuple[ThresholdKey, list[KeyShare]]) -> None:
    with pytest.raises(ConfigError, match="not one of"):
        scheme_for("ckks", key.public)
    with pytest.raises(KeyMaterialError):
        scheme_for("paillier")
    with pytest.raises(KeyMaterialError, match="another key"):
        scheme_for("paillier", dealt_again[0].public, threshold_key=key)
    with pytest.raises(KeyMaterialError, match="another key"):
        PaillierScheme(key.public, replace(dealt_again[0]))


def test_the_scheme_without_protection_says_so() -> None:
    assert "TESTS AND BENCHMARKS ONLY" in (PlaintextScheme.__doc__ or "")
