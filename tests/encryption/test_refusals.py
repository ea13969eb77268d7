"""What this room refuses, as one list: each with an error of its own kind that names the field or the position."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from src.encryption.batch import BatchHeader, check_header
from src.encryption.blinding import Blinding
from src.encryption.integers import Entropy
from src.encryption.keys import KeyShare, PrivateKey, PublicKey, ThresholdKey, check_kit
from src.encryption.paillier import encryptor_for
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.scheme import Layout, LayoutRequest
from src.errors import (
    BatchError,
    CiphertextError,
    KeyMaterialError,
    ShareError,
    SlotOverflowError,
    SottoError,
    StateError,
    TooFewSharesError,
)

WIDTH = 128
BINDING = b"job 1, round 2"


@dataclass(frozen=True)
class Round:
    """A round that went well, of which the list below spoils one thing at a time."""

    scheme: PaillierScheme
    layout: Layout
    private: PrivateKey
    key: ThresholdKey
    shares: list[KeyShare]
    values: Any
    body: bytes
    header: BatchHeader
    opened: dict[int, bytes]
    other: tuple[ThresholdKey, list[KeyShare]]
    entropy: Entropy

    @property
    def n(self) -> int:
        return int(self.key.public.n)

    def public_json(self, **changes: object) -> object:
        return PublicKey.from_json(self.key.public.to_json() | changes, insecure_small=True)

    def with_ciphertext(self, position: int, value: int) -> bytes:
        return self.body[: position * WIDTH] + value.to_bytes(WIDTH, "big") + self.body[(position + 1) * WIDTH :]

    def check(self, body: bytes) -> object:
        return list(self.scheme.check(self.layout, [body]))

    def fold(self, *bodies: bytes) -> object:
        return list(self.scheme.fold(self.layout, [io.BytesIO(body) for body in bodies]))

    def verify(self, batch: bytes, *, index: int = 1, binding: bytes = BINDING) -> None:
        self.scheme.verify_share(self.layout, self.body, batch, index=index, binding=binding)

    def protect(self, values: Any) -> object:
        return list(self.scheme.protect(self.layout, [values], entropy=self.entropy))

    def accept(self, **changes: Any) -> None:
        check_header(replace(self.header, **changes), self.header)

    def blinding(self) -> Blinding:
        encryptor = encryptor_for(self.key.public, expected_count=11)
        return Blinding(encryptor, 11, entropy=self.entropy)


@pytest.fixture(scope="module")
def done(
    key: ThresholdKey,
    shares: list[KeyShare],
    private: PrivateKey,
    dealt_again: tuple[ThresholdKey, list[KeyShare]],
    entropy: Entropy,
) -> Round:
    scheme = PaillierScheme(key.public, key)
    layout = scheme.plan(LayoutRequest(parameter_count=400, value_bound=900, noise_bound=100, contributions=3))
    values = np.arange(-200, 200, dtype=np.int64)
    body = b"".join(scheme.protect(layout, [values], entropy=entropy))
    header = BatchHeader.of(layout, job_id="job", round_number=2, contributor="a", plan_digest=bytes(32))
    opened = {
        share.index: scheme.open_share(layout, share, [body], binding=BINDING, entropy=entropy) for share in shares[:3]
    }
    return Round(scheme, layout, private, key, shares, values, body, header, opened, dealt_again, entropy)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def twice(done: Round) -> object:
    with done.blinding() as factors:
        factors.take(0, 7)
        return factors.take(6, 1)


def same_preparation_twice(done: Round) -> object:
    with done.scheme.prepare(done.layout, entropy=done.entropy) as prepared:
        for _ in range(2):
            list(done.scheme.protect(done.layout, [done.values], entropy=done.entropy, prepared=prepared))
    return None


def value_at(done: Round, position: int, value: int) -> Any:
    values = done.values.copy()
    values[position] = value
    return values


Row = tuple[str, type[SottoError], dict[str, str], Callable[[Round], object]]

REFUSED: list[Row] = [
    # Moduli.
    ("an even modulus", KeyMaterialError, {"field": "n"}, lambda d: d.public_json(n=f"{d.n + 1:x}")),
    (
        "a short modulus",
        KeyMaterialError,
        {"field": "modulus_bits"},
        lambda d: PublicKey.from_json(d.key.public.to_json()),
    ),
    (
        "a modulus shorter than it says",
        KeyMaterialError,
        {"field": "n"},
        lambda d: d.public_json(modulus_bits=576),
    ),
    (
        "a modulus with a small factor",
        KeyMaterialError,
        {"field": "n"},
        lambda d: d.public_json(n=f"{3 * ((1 << 511) // 3 | 1):x}"),
    ),
    ("a prime modulus", KeyMaterialError, {"field": "n"}, lambda d: d.public_json(n=f"{2**512 - 875:x}")),
    ("a square modulus", KeyMaterialError, {"field": "n"}, lambda d: d.public_json(n=f"{int(d.private.q) ** 2:x}")),
    ("h outside the group", KeyMaterialError, {"field": "h"}, lambda d: d.public_json(h=f"{d.n:x}")),
    ("a trivial h", KeyMaterialError, {"field": "h"}, lambda d: d.public_json(h="1")),
    # Ciphertexts.
    ("a ciphertext of 0", CiphertextError, {"index": "3"}, lambda d: d.check(d.with_ciphertext(3, 0))),
    ("a ciphertext of n", CiphertextError, {"index": "10"}, lambda d: d.check(d.with_ciphertext(10, d.n))),
    ("a ciphertext of n²", CiphertextError, {"index": "0"}, lambda d: d.check(d.with_ciphertext(0, d.n**2))),
    (
        "a multiple of a prime",
        CiphertextError,
        {"index": "7"},
        lambda d: d.check(d.with_ciphertext(7, 6 * int(d.private.p))),
    ),
    (
        "a wrong ciphertext in the aggregate, by a holder",
        CiphertextError,
        {"index": "5"},
        lambda d: d.scheme.open_share(
            d.layout, d.shares[0], [d.with_ciphertext(5, 0)], binding=BINDING, entropy=d.entropy
        ),
    ),
    (
        "a wrong ciphertext in the aggregate, by the key's owner",
        CiphertextError,
        {"index": "5"},
        lambda d: list(d.scheme.open_with_key(d.layout, d.private, [d.with_ciphertext(5, 0)])),
    ),
    # Shares and their proofs.
    ("a share for another key", ShareError, {"index": "1"}, lambda d: d.verify(flipped(d.opened[1], 6))),
    ("a share of another holder", ShareError, {"index": "1"}, lambda d: d.verify(d.opened[2])),
    ("a share under another index", ShareError, {"index": "2"}, lambda d: d.verify(d.opened[1], index=2)),
    (
        "a share for another round",
        ShareError,
        {"index": "1"},
        lambda d: d.verify(d.opened[1], binding=b"job 1, round 3"),
    ),
    ("a wrong value in a share", ShareError, {"index": "1"}, lambda d: d.verify(flipped(d.opened[1], 700))),
    (
        "a proof with another challenge",
        ShareError,
        {"index": "1"},
        lambda d: d.verify(flipped(d.opened[1], 36 + 11 * WIDTH + 5)),
    ),
    (
        "a proof with another response",
        ShareError,
        {"index": "1"},
        lambda d: d.verify(flipped(d.opened[1], len(d.opened[1]) - 1)),
    ),
    ("a share cut short", ShareError, {"index": "1"}, lambda d: d.verify(d.opened[1][:-1])),
    ("a share that is too long", ShareError, {"index": "1"}, lambda d: d.verify(d.opened[1] + b"\0")),
    (
        "too few shares",
        TooFewSharesError,
        {"shares": "2", "threshold": "3"},
        lambda d: list(d.scheme.combine(d.layout, d.body, {i: d.opened[i] for i in (1, 2)})),
    ),
    (
        "another deal's share, before it is used",
        KeyMaterialError,
        {"field": "key_id"},
        lambda d: d.scheme.open_share(d.layout, d.other[1][0], [d.body], binding=BINDING, entropy=d.entropy),
    ),
    (
        "a kit whose share is not the committed one",
        KeyMaterialError,
        {"field": "value"},
        lambda d: check_kit(d.key, replace(d.shares[0], value=d.shares[1].value)),
    ),
    # Batches.
    ("a batch cut short", BatchError, {"field": "body"}, lambda d: d.check(d.body[:-WIDTH])),
    ("a batch cut within a ciphertext", BatchError, {"field": "body"}, lambda d: d.check(d.body[:-1])),
    ("a batch too long", BatchError, {"field": "body"}, lambda d: d.check(d.body + d.body[:WIDTH])),
    ("an upload cut short", BatchError, {"field": "body", "body": "1"}, lambda d: d.fold(d.body, d.body[:-1])),
    ("an upload too long", BatchError, {"field": "body", "body": "0"}, lambda d: d.fold(d.body + b"\0", d.body)),
    ("more uploads than planned", BatchError, {"field": "contributions"}, lambda d: d.fold(*[d.body] * 4)),
    (
        "a header of another version",
        BatchError,
        {"field": "version"},
        lambda d: BatchHeader.decode(flipped(d.header.encode(), 5)),
    ),
    ("a header cut short", BatchError, {"field": "plan_digest"}, lambda d: BatchHeader.decode(d.header.encode()[:-1])),
    ("a header too long", BatchError, {"field": "header"}, lambda d: BatchHeader.decode(d.header.encode() + b"\0")),
    ("another slot width", BatchError, {"field": "slot_bits"}, lambda d: d.accept(slot_bits=14)),
    ("another key", BatchError, {"field": "key_id"}, lambda d: d.accept(key_id="0" * 32)),
    ("another count", BatchError, {"field": "ciphertext_count"}, lambda d: d.accept(ciphertext_count=12)),
    ("another round", BatchError, {"field": "round_number"}, lambda d: d.accept(round_number=3)),
    ("another job", BatchError, {"field": "job_id"}, lambda d: d.accept(job_id="another")),
    (
        "a layout of another key",
        BatchError,
        {"field": "key_id"},
        lambda d: list(PaillierScheme(d.other[0].public).check(d.layout, [d.body])),
    ),
    # Slots.
    (
        "a value above its slot",
        SlotOverflowError,
        {"index": "123", "limit": "1000"},
        lambda d: d.protect(value_at(d, 123, 1001)),
    ),
    ("a value below its slot", SlotOverflowError, {"index": "399"}, lambda d: d.protect(value_at(d, 399, -1001))),
    ("too few values", BatchError, {"field": "parameter_count"}, lambda d: d.protect(d.values[:-1])),
    (
        "a sum that overflows",
        SlotOverflowError,
        {"index": "39"},
        lambda d: list(d.scheme.decode(d.layout, [(b"\0" * 64 + b"\xff" * 64).ljust(11 * 64, b"\0")], contributions=3)),
    ),
    (
        "slots that are too wide",
        SlotOverflowError,
        {"slot_bits": "63"},
        lambda d: d.scheme.plan(LayoutRequest(parameter_count=1, value_bound=2**60, noise_bound=0, contributions=2)),
    ),
    # Prepared randomness.
    ("prepared randomness asked for twice", StateError, {"index": "6"}, twice),
    ("one preparation for two batches", StateError, {"index": "0"}, same_preparation_twice),
    ("more randomness than prepared", StateError, {"index": "11"}, lambda d: d.blinding().take(0, 12)),
]


@pytest.mark.parametrize(("error", "said", "attempt"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(
    done: Round, error: type[SottoError], said: dict[str, str], attempt: Callable[[Round], object]
) -> None:
    with pytest.raises(error) as caught:
        attempt(done)
    assert type(caught.value) is error
    assert said.items() <= caught.value.metadata.items()


def test_what_is_spoilt_above_is_accepted_whole(done: Round) -> None:
    assert done.public_json() == done.key.public
    done.check(done.body)
    done.fold(done.body, done.body, done.body)
    done.accept()
    assert BatchHeader.decode(done.header.encode()) == done.header
    for index, batch in done.opened.items():
        done.verify(batch, index=index)
    opened = done.scheme.combine(done.layout, done.body, done.opened)
    decoded = np.concatenate(list(done.scheme.decode(done.layout, opened, contributions=1)))
    assert decoded.tolist() == done.values.tolist()
