"""From updates to an opened sum through the blob store: exact, and nobody's bytes change unnoticed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.encryption.batch import BatchHeader, read_blocks
from src.encryption.keys import KeyShare, PrivateKey
from src.encryption.scheme import Layout, Scheme
from src.errors import BatchError, DigestError, NotFoundError, SlotOverflowError
from src.privacy.entropy import DeterministicEntropy
from src.protocol.batches import (
    StoredBatch,
    check_batch_header,
    expected_header,
    fold_batches,
    write_batch,
)
from src.protocol.merkle import batch_root
from src.protocol.plan import RoundPlan, aggregate_header, share_binding
from src.storage.blobs import Blobs

MakePlan = Callable[..., RoundPlan]
Vector = NDArray[np.int64]
DIGEST = "ab" * 32
NAMES = ("party0", "party1", "party2", "aggregator")


class Round:
    """A plan, a store, and who wrote what into it."""

    def __init__(self, scheme: Scheme, plan: RoundPlan, blobs: Blobs, entropy: DeterministicEntropy) -> None:
        self.scheme, self.plan, self.blobs, self.entropy = scheme, plan, blobs, entropy
        self.layout = Layout.from_json(plan.layout)
        self.batches: dict[str, StoredBatch] = {}

    def write(self, name: str, values: Vector) -> StoredBatch:
        batch = write_batch(
            self.scheme,
            self.plan,
            values,
            plan_digest=DIGEST,
            contributor=name,
            blobs=self.blobs,
            entropy=self.entropy,
        )
        self.batches[name] = batch
        return batch

    def fold(self, **replaced: StoredBatch) -> StoredBatch:
        batches = {**self.batches, **replaced}
        return fold_batches(self.scheme, self.plan, batches, plan_digest=DIGEST, blobs=self.blobs)

    def open(self, aggregate: StoredBatch, shares: list[KeyShare]) -> list[int]:
        """By two holders, each share verified as the aggregator verifies it."""
        with self.blobs.open(aggregate.sha256) as file:
            material = b"".join(self.scheme.opening_material(self.layout, file))
        batches = {}
        for share in shares[:2]:
            own = KeyShare(share.index, share.value, self.layout.key_id)
            binding = share_binding(DIGEST, aggregate.root, f"party{share.index}")
            batches[share.index] = self.scheme.open_share(
                self.layout, own, [material], binding=binding, entropy=self.entropy
            )
            self.scheme.verify_share(self.layout, material, batches[share.index], index=share.index, binding=binding)
        opened = self.scheme.combine(self.layout, material, batches)
        return self.decode(opened)

    def decode(self, opened: Any) -> list[int]:
        parts = self.scheme.decode(self.layout, opened, contributions=len(self.batches))
        return [int(value) for part in parts for value in part]


@pytest.fixture
def played(scheme: Scheme, make_plan: MakePlan, blobs: Blobs, entropy: DeterministicEntropy) -> Round:
    """Three parties and the aggregator's noise, written down."""
    each = Round(scheme, make_plan(scheme, dimension=30), blobs, entropy)
    for index, name in enumerate(NAMES):
        each.write(name, np.arange(30, dtype=np.int64) * (2 * index - 3))
    return each


@settings(deadline=None, max_examples=12)
@given(data=st.data(), dimension=st.integers(1, 60), parties=st.integers(2, 4))
def test_the_opened_sum_is_the_sum_of_what_was_contributed(
    scheme: Scheme,
    make_plan: MakePlan,
    shares: list[KeyShare],
    entropy: DeterministicEntropy,
    data: st.DataObject,
    dimension: int,
    parties: int,
) -> None:
    plan = make_plan(scheme, dimension=dimension, parties=parties)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    with tempfile.TemporaryDirectory() as folder:
        each = Round(scheme, plan, Blobs(Path(folder)), entropy)
        names = data.draw(st.lists(st.sampled_from([*plan.cohort, "aggregator"]), min_size=1, unique=True))
        limit = each.layout.offset
        vectors = {name: rng.integers(-limit, limit, dimension, endpoint=True) for name in names}
        for name, vector in vectors.items():
            each.write(name, vector)
        expected = [sum(int(vector[j]) for vector in vectors.values()) for j in range(dimension)]
        assert each.open(each.fold(), shares) == expected


def test_the_owner_of_the_key_opens_the_same(
    paillier: Scheme,
    make_plan: MakePlan,
    blobs: Blobs,
    private: PrivateKey,
    shares: list[KeyShare],
    entropy: DeterministicEntropy,
) -> None:
    each = Round(paillier, make_plan(paillier, dimension=30), blobs, entropy)
    for name in NAMES:
        each.write(name, np.arange(30, dtype=np.int64))
    aggregate = each.fold()
    with blobs.open(aggregate.sha256) as file:
        opened = list(paillier.open_with_key(each.layout, private, [file.read()]))
    assert each.decode(opened) == each.open(aggregate, shares) == [4 * j for j in range(30)]


def test_everybody_who_multiplies_gets_the_same_aggregate(played: Round) -> None:
    again = fold_batches(
        played.scheme,
        played.plan,
        dict(reversed(played.batches.items())),
        plan_digest=DIGEST,
        blobs=played.blobs,
    )
    assert again == played.fold()


def test_the_aggregate_says_who_is_in_it_and_under_which_plan(played: Round) -> None:
    aggregate = played.fold()
    header = aggregate_header(DIGEST, tuple(sorted(NAMES)))
    body = played.blobs.read(aggregate.sha256)
    root, count, size = batch_root(header, [body], ciphertext_bytes=played.layout.ciphertext_bytes)
    assert (root, size) == (aggregate.root, aggregate.size)
    assert count == played.layout.ciphertext_count
    for left_out in NAMES:
        played.batches = {name: batch for name, batch in played.batches.items() if name != left_out} or played.batches
        assert played.fold().root != aggregate.root


def test_a_batch_commits_to_its_header_and_every_ciphertext(played: Round) -> None:
    for name, batch in played.batches.items():
        body = played.blobs.read(batch.sha256)
        header = expected_header(played.plan, DIGEST, name).encode()
        assert batch.header == header.hex()
        assert batch.size == len(body) == played.layout.body_bytes
        root = batch_root(header, [body], ciphertext_bytes=played.layout.ciphertext_bytes)[0]
        assert batch.root == root
        with played.blobs.open(batch.sha256) as file:
            assert b"".join(read_blocks(file, played.layout)) == body
    assert StoredBatch(**batch.to_json()) == batch


def test_an_equal_update_is_never_an_equal_batch(
    paillier: Scheme, make_plan: MakePlan, blobs: Blobs, entropy: DeterministicEntropy
) -> None:
    each = Round(paillier, make_plan(paillier), blobs, entropy)
    values = np.zeros(10, dtype=np.int64)
    one, two = each.write("party0", values), each.write("party0", values)
    assert one.sha256 != two.sha256
    assert one.root != two.root


@pytest.mark.parametrize("contributor", NAMES)
def test_a_batch_whose_stored_bytes_change_is_named(played: Round, contributor: str) -> None:
    batch = played.batches[contributor]
    path = played.blobs.path(batch.sha256)
    body = path.read_bytes()
    for position in (0, len(body) // 2, len(body) - 1):
        path.write_bytes(body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])
        with pytest.raises(DigestError, match=contributor) as caught:
            played.fold()
        assert caught.value.metadata["contributor"] == contributor
    width = played.layout.ciphertext_bytes
    for changed in (b"", body[:-1], body[:-width], body + body[:width], body[width:] + body[:width]):
        path.write_bytes(changed)
        with pytest.raises(DigestError, match=contributor):
            played.fold()
    path.write_bytes(body)
    played.fold()


def test_another_stored_batch_in_the_place_of_one_is_named(played: Round) -> None:
    """The same root, another blob: of another contributor, or of the same one encrypted again."""
    mine = played.batches["party1"]
    theirs = replace(mine, sha256=played.batches["party0"].sha256)
    with pytest.raises(DigestError, match="party1"):
        played.fold(party1=theirs)
    again = replace(played.write("party1", np.ones(30, dtype=np.int64)), root=mine.root)
    with pytest.raises(DigestError, match="party1"):
        played.fold(party1=again)


def test_a_batch_of_another_contributor_does_not_pass_for_ones_own(played: Round) -> None:
    with pytest.raises(BatchError) as caught:
        played.fold(party1=played.batches["party0"])
    assert caught.value.metadata["field"] == "contributor"


def test_a_batch_that_is_not_there_is_not_summed(played: Round) -> None:
    played.blobs.path(played.batches["party2"].sha256).unlink()
    with pytest.raises(NotFoundError):
        played.fold()


def test_a_header_of_anything_else_is_refused_by_field(played: Round) -> None:
    right = expected_header(played.plan, DIGEST, "party0")
    check_batch_header(played.plan, DIGEST, "party0", right.encode())
    others: dict[str, Any] = {
        "scheme": "other",
        "key_id": "other",
        "modulus_bits": right.modulus_bits + 64,
        "slot_bits": right.slot_bits + 1,
        "offset": right.offset - 1,
        "parameter_count": right.parameter_count + 1,
        "ciphertext_count": right.ciphertext_count + 1,
        "ciphertext_bytes": right.ciphertext_bytes + 1,
        "job_id": "job2",
        "round_number": 2,
        "contributor": "party1",
        "plan_digest": bytes(32),
    }
    assert set(others) == set(BatchHeader.__slots__)
    for field, value in others.items():
        with pytest.raises(BatchError) as caught:
            check_batch_header(played.plan, DIGEST, "party0", replace(right, **{field: value}).encode())
        assert caught.value.metadata["field"] == field


def test_a_header_with_any_byte_changed_is_refused(played: Round) -> None:
    encoded = expected_header(played.plan, DIGEST, "party0").encode()
    for position in range(len(encoded)):
        changed = encoded[:position] + bytes([encoded[position] ^ 1]) + encoded[position + 1 :]
        with pytest.raises(BatchError):
            check_batch_header(played.plan, DIGEST, "party0", changed)
    for changed in (b"", encoded[:-1], encoded + b"\0"):
        with pytest.raises(BatchError):
            check_batch_header(played.plan, DIGEST, "party0", changed)


def test_a_value_outside_the_planned_bounds_is_never_stored(played: Round) -> None:
    values = np.zeros(30, dtype=np.int64)
    values[17] = played.layout.offset + 1
    before = sorted(played.blobs.root.rglob("*"))
    with pytest.raises(SlotOverflowError) as caught:
        played.write("party0", values)
    assert caught.value.metadata["index"] == "17"
    assert sorted(played.blobs.root.rglob("*")) == before


@pytest.mark.parametrize("size", [0, 29, 31])
def test_an_update_of_another_dimension_is_refused(played: Round, size: int) -> None:
    with pytest.raises(BatchError):
        played.write("party0", np.zeros(size, dtype=np.int64))


def test_more_contributions_than_were_planned_are_refused(played: Round) -> None:
    played.write("party3", np.zeros(30, dtype=np.int64))
    with pytest.raises(BatchError):
        played.fold()
