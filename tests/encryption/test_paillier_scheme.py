"""What `paillier` adds to the contract: secrecy of equal inputs, custody by the key owner, parts, the registry."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import phe
import psutil
import pytest

from src.encryption import parallel
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


@dataclass(frozen=True)
class Files:
    """Bodies as streams of three kinds: a file, one that begins in the middle of it, memory."""

    folder: Path

    def open(self, bodies: list[bytes]) -> list[BinaryIO]:
        streams: list[BinaryIO] = []
        for position, body in enumerate(bodies):
            before = bytes(position * 100)
            path = self.folder / str(position)
            path.write_bytes(before + body)
            stream: BinaryIO = path.open("rb") if position % 3 else io.BytesIO(before + body)
            stream.seek(len(before))
            streams.append(stream)
        return streams


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def together(key: ThresholdKey, monkeypatch: pytest.MonkeyPatch) -> PaillierScheme:
    """A scheme that forks three processes for whatever it does."""
    monkeypatch.setattr(parallel, "SMALLEST_PART_PRODUCTS", 1)
    monkeypatch.setattr("src.encryption.scheme.BLOCK_BYTES", 2 * 128)
    return PaillierScheme(key.public, key, processes=3)


def test_several_processes_do_what_one_does(
    scheme: PaillierScheme,
    together: PaillierScheme,
    layout: Layout,
    shares: list[KeyShare],
    private: PrivateKey,
    files: Files,
    seeded: Callable[[bytes], Entropy],
) -> None:
    """The same bytes at every step of a round, from files and from memory."""

    def steps(scheme: PaillierScheme) -> list[bytes]:
        bodies = [
            b"".join(scheme.protect(layout, [VALUES + shift], entropy=seeded(b"%d" % shift))) for shift in range(3)
        ]
        with ExitStack() as stack:
            for stream in files.open(bodies):
                scheme.check_body(layout, stack.enter_context(stream))
            aggregate = b"".join(scheme.fold(layout, list(map(stack.enter_context, files.open(bodies)))))
        share_batches = {}
        for share in shares[:3]:
            batch = scheme.open_share(layout, share, [aggregate], binding=b"round", entropy=seeded(b"share"))
            scheme.verify_share(layout, aggregate, batch, index=share.index, binding=b"round")
            share_batches[share.index] = batch
        opened = b"".join(scheme.combine(layout, aggregate, share_batches))
        assert b"".join(scheme.open_with_key(layout, private, [aggregate])) == opened
        decoded = np.concatenate(list(scheme.decode(layout, [opened], contributions=3)))
        assert decoded.tolist() == (3 * VALUES + 3).tolist()
        return [*bodies, aggregate, *share_batches.values(), opened]

    assert steps(together) == steps(scheme)
    assert psutil.Process().children() == []


@pytest.mark.parametrize("at", [0, 6, 10])
def test_several_processes_refuse_what_one_refuses_with_the_same_position(
    together: PaillierScheme, layout: Layout, body: bytes, files: Files, private: PrivateKey, at: int
) -> None:
    bad = body[: at * 128] + bytes(128) + body[(at + 1) * 128 :]
    for stream in files.open([bad, bad]):
        with stream, pytest.raises(CiphertextError) as caught:
            together.check_body(layout, stream)
        assert caught.value.metadata["index"] == str(at)
    with pytest.raises(CiphertextError) as caught:
        list(together.open_with_key(layout, private, [bad]))
    assert caught.value.metadata["index"] == str(at)


@pytest.mark.parametrize(
    ("change", "problem"),
    [(lambda body: body[:-1], "cut short, 1 of"), (lambda body: body + b"0", "longer"), (lambda _: b"", "cut short")],
)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("name", ["scheme", "together"])
def test_a_body_of_another_length_is_named_by_one_process_and_by_several(
    request: pytest.FixtureRequest,
    layout: Layout,
    body: bytes,
    files: Files,
    change: Callable[[bytes], bytes],
    problem: str,
    position: int,
    name: str,
) -> None:
    scheme: PaillierScheme = request.getfixturevalue(name)
    bodies = [change(body) if place == position else body for place in range(3)]
    with ExitStack() as stack, pytest.raises(BatchError, match=problem) as caught:
        list(scheme.fold(layout, list(map(stack.enter_context, files.open(bodies)))))
    assert caught.value.metadata["body"] == str(position)


def test_a_stream_that_cannot_be_read_anywhere_is_folded_all_the_same(
    together: PaillierScheme, layout: Layout, body: bytes, files: Files
) -> None:
    """A pipe, or a compressed file whose descriptor shows other bytes than it reads."""
    packed = io.BytesIO(gzip.compress(body))
    with gzip.open(packed) as unpacked, ExitStack() as stack:
        streams: list[BinaryIO] = [stack.enter_context(stream) for stream in files.open([body])]
        folded = b"".join(together.fold(layout, [*streams, cast(BinaryIO, unpacked)]))
    assert folded == b"".join(together.fold(layout, [io.BytesIO(body), io.BytesIO(body)]))


def test_folding_holds_one_block_however_many_bodies_there_are(scheme: PaillierScheme) -> None:
    """Python's own memory; the numbers themselves are as many as a block has ciphertexts."""
    layout = scheme.plan(replace(REQUEST, parameter_count=15_000, contributions=60))
    body = b"\1" * layout.body_bytes
    assert layout.ciphertext_count > layout.block_ciphertexts

    def peak(count: int) -> int:
        streams: list[BinaryIO] = [io.BytesIO(body) for _ in range(count)]
        tracemalloc.start()
        for _ in scheme.fold(layout, streams):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(2)
    assert peak(60) - peak(2) < 100_000  # a reader for each; the blocks would be 2.8 MB


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
