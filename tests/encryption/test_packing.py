"""Packing: slots where a slow Python loop puts them, and nothing lost at any width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.encryption.packing import pack, pack_words, regroup, unpack, unpack_words
from src.encryption.scheme import Layout, LayoutRequest
from src.errors import BatchError, SlotOverflowError


def layout_of(parameter_count: int, *, offset: int, contributions: int = 1, modulus_bits: int = 256) -> Layout:
    slot_bits = (contributions * 2 * offset).bit_length()
    slots = (modulus_bits - 1) // slot_bits
    return Layout(
        scheme="paillier",
        key_id="test",
        modulus_bits=modulus_bits,
        parameter_count=parameter_count,
        slot_bits=slot_bits,
        offset=offset,
        slots_per_ciphertext=slots,
        ciphertext_count=-(-parameter_count // slots),
        ciphertext_bytes=modulus_bits // 4,
        contributions=contributions,
    )


@settings(deadline=None, max_examples=80)
@given(data=st.data(), slot_bits=st.integers(2, 62), words=st.integers(1, 8))
def test_packed_words_are_what_shifting_big_integers_gives(data: st.DataObject, slot_bits: int, words: int) -> None:
    slots = (64 * words - 1) // slot_bits
    seed = data.draw(st.integers(0, 2**32))
    values = np.random.default_rng(seed).integers(0, 1 << slot_bits, size=(3, slots), dtype=np.uint64)
    packed = pack_words(values, slot_bits, words)
    for row, packed_row in zip(values.tolist(), packed, strict=True):
        slow = sum(value << (slot_bits * j) for j, value in enumerate(row))
        assert int.from_bytes(packed_row.astype("<u8").tobytes(), "little") == slow
    assert (unpack_words(packed, slot_bits, slots) == values).all()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), offset=st.integers(1, 2**60), parameter_count=st.integers(1, 120))
def test_values_come_back_from_their_plaintexts(data: st.DataObject, offset: int, parameter_count: int) -> None:
    layout = layout_of(parameter_count, offset=offset)
    values = data.draw(st.lists(st.integers(-offset, offset), min_size=parameter_count, max_size=parameter_count))
    plaintexts = pack(np.array(values, dtype=np.int64), layout)
    assert len(plaintexts) == layout.ciphertext_count
    assert all(0 <= plaintext < 1 << 255 for plaintext in plaintexts)
    block = b"".join(plaintext.to_bytes(32, "big") for plaintext in plaintexts)
    assert unpack(block, layout, contributions=1).tolist() == values


def test_a_plaintext_that_is_known() -> None:
    """Offset 5, slots of 4 bits, slot 0 lowest: values −5, 0, 5 are slots 0, 5, 10."""
    layout = layout_of(3, offset=5)
    assert layout.slot_bits == 4
    assert pack(np.array([-5, 0, 5], dtype=np.int64), layout) == [0xA50]


@pytest.mark.parametrize("value", [6, -6, 2**63 - 1, -(2**63)])
def test_a_value_beyond_the_offset_is_refused_with_its_position_and_not_shown(value: int) -> None:
    values = np.array([0, 5, -5, value, 7], dtype=np.int64)
    with pytest.raises(SlotOverflowError) as caught:
        pack(values, layout_of(5, offset=5), first=100)
    assert caught.value.metadata == {"index": "103", "limit": "5"}
    assert str(value) not in str(caught.value).replace("103", "")


@pytest.mark.parametrize(
    ("name", "plaintext", "index"),
    [
        ("a slot above 2·offset", 0x0B0, "1"),
        ("a slot full of ones", 0xF00, "2"),
        ("something in a slot that is not needed", 0x1000, "2"),
        ("something in the bit above the last slot", 1 << 255, "2"),
    ],
)
def test_impossible_plaintexts_are_detected(name: str, plaintext: int, index: str) -> None:
    with pytest.raises(SlotOverflowError) as caught:
        unpack(plaintext.to_bytes(32, "big"), layout_of(3, offset=5), contributions=1)
    assert caught.value.metadata["index"] == index, name


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 50), max_size=12), block_ciphertexts=st.integers(1, 4))
def test_regrouping_changes_the_cuts_and_nothing_else(sizes: list[int], block_ciphertexts: int) -> None:
    values = np.arange(sum(sizes), dtype=np.int64)
    if not len(values):
        return
    layout = layout_of(len(values), offset=1000, modulus_bits=64)
    cuts = np.split(values, np.cumsum(sizes)[:-1])
    groups = list(regroup(cuts, layout, block_ciphertexts=block_ciphertexts))
    size = block_ciphertexts * layout.slots_per_ciphertext
    assert all(len(group) == size for group in groups[:-1])
    assert 0 < len(groups[-1]) <= size
    assert np.concatenate(groups).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("blocks", "field"),
    [
        ([np.zeros(9, dtype=np.int64)], "parameter_count"),
        ([np.zeros(10, dtype=np.int64), np.zeros(1, dtype=np.int64)], "parameter_count"),
        ([], "parameter_count"),
        ([np.zeros(10, dtype=np.int32)], "values"),
        ([np.zeros(10, dtype=np.float64)], "values"),
        ([np.zeros((2, 5), dtype=np.int64)], "values"),
    ],
)
def test_blocks_that_are_refused(blocks: list[NDArray[Any]], field: str) -> None:
    with pytest.raises(BatchError) as caught:
        list(regroup(blocks, layout_of(10, offset=5)))
    assert caught.value.metadata["field"] == field


@settings(deadline=None, max_examples=60)
@given(value_bound=st.integers(1, 2**40), noise_bound=st.integers(0, 2**40), contributions=st.integers(1, 1000))
def test_the_slot_is_the_narrowest_that_holds_the_largest_sum(
    value_bound: int, noise_bound: int, contributions: int
) -> None:
    request = LayoutRequest(
        parameter_count=1, value_bound=value_bound, noise_bound=noise_bound, contributions=contributions
    )
    largest = contributions * 2 * (value_bound + noise_bound)
    assert largest < 1 << request.slot_bits
    assert largest >= 1 << (request.slot_bits - 1)


def test_slots_wider_than_62_bits_are_refused() -> None:
    fits = LayoutRequest(parameter_count=1, value_bound=2**60, noise_bound=2**60 - 1, contributions=1)
    assert fits.slot_bits == 62
    wide = LayoutRequest(parameter_count=1, value_bound=2**60, noise_bound=2**60, contributions=1)
    with pytest.raises(SlotOverflowError, match="63 bits, more than 62"):
        _ = wide.slot_bits


@pytest.mark.parametrize("field", ["parameter_count", "value_bound", "noise_bound", "contributions"])
def test_requests_that_are_refused(field: str) -> None:
    values = {"parameter_count": 5, "value_bound": 5, "noise_bound": 5, "contributions": 5} | {field: -1}
    with pytest.raises(BatchError) as caught:
        LayoutRequest(**values)
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, "version"),
        ({"more": 1}, "more"),
        ({"scheme": 5}, "scheme"),
        ({"offset": "5"}, "offset"),
        ({"offset": 5.0}, "offset"),
        ({"offset": True}, "offset"),
        ({"offset": None}, "offset"),
        ({"offset": 0}, "offset"),
        ({"offset": 50}, "slot_bits"),
        ({"slot_bits": 5}, "slot_bits"),
        ({"slots_per_ciphertext": 64}, "slots_per_ciphertext"),
        ({"slots_per_ciphertext": 0}, "slots_per_ciphertext"),
        ({"ciphertext_count": 2}, "ciphertext_count"),
        ({"parameter_count": 0}, "parameter_count"),
        ({"contributions": 0}, "contributions"),
        ({"ciphertext_bytes": 0}, "ciphertext_bytes"),
        ({"modulus_bits": 12}, "slots_per_ciphertext"),
    ],
)
def test_layouts_that_are_refused(change: dict[str, object], field: str) -> None:
    layout = layout_of(10, offset=5)
    assert Layout.from_json(layout.to_json()) == layout
    with pytest.raises(BatchError) as caught:
        Layout.from_json(dict(layout.to_json()) | change)
    assert caught.value.metadata["field"] == field


def test_a_layout_divides_into_parts() -> None:
    layout = layout_of(200, offset=1000)
    assert (layout.slots_per_ciphertext, layout.ciphertext_count) == (23, 9)
    parts = [layout.part(0, 4), layout.part(4, 4), layout.part(8, 1)]
    assert [part.parameter_count for part in parts] == [92, 92, 16]
    for first, count in ((-1, 2), (9, 1), (0, 10), (8, 2), (3, 0)):
        with pytest.raises(BatchError):
            layout.part(first, count)
