"""Values ↔ slots ↔ big integers, by 64-bit words in numpy: no Python statement runs per value.

Slot j of a plaintext is its bits [j·w, (j+1)·w), w = slot_bits. A contribution's slot holds value + offset, in
[0, 2·offset]; the slots that the last plaintext does not need hold 0, and so do all bits above the last slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import SlotOverflowError
from .integers import split
from .scheme import Layout, mismatch

WORD_BITS: Final = 64


class _Grid:
    """Where each slot lies in the 64-bit words of a plaintext (little-endian words)."""

    def __init__(self, slots: int, slot_bits: int) -> None:
        bit = np.arange(slots, dtype=np.int64) * slot_bits
        self.word = bit // WORD_BITS
        self.shift = (bit % WORD_BITS).astype(np.uint64)
        # Slots are narrower than words, so every word up to the last one has a slot that begins in it ...
        self.first = np.flatnonzero(np.diff(self.word, prepend=-1))
        # ... and at most one slot that goes on in the next.
        self.spills = np.flatnonzero(self.shift.astype(np.int64) + slot_bits > WORD_BITS)
        self.spill_shift = np.uint64(WORD_BITS) - self.shift[self.spills]
        self.mask = np.uint64((1 << slot_bits) - 1)


def pack_words(slots: NDArray[np.uint64], slot_bits: int, words: int) -> NDArray[np.uint64]:
    """(k, s) slot values in [0, 2^slot_bits), slot_bits ≤ 62 → (k, words) little-endian words of k plaintexts."""
    grid = _Grid(slots.shape[1], slot_bits)
    packed = np.zeros((slots.shape[0], words), dtype=np.uint64)
    packed[:, : len(grid.first)] = np.bitwise_or.reduceat(slots << grid.shift, grid.first, axis=1)
    packed[:, grid.word[grid.spills] + 1] |= slots[:, grid.spills] >> grid.spill_shift
    return packed


def unpack_words(packed: NDArray[np.uint64], slot_bits: int, slots: int) -> NDArray[np.uint64]:
    """(k, words) little-endian words of k plaintexts → their (k, slots) slot values: the inverse of `pack_words`."""
    grid = _Grid(slots, slot_bits)
    values = packed[:, grid.word] >> grid.shift
    values[:, grid.spills] |= packed[:, grid.word[grid.spills] + 1] << grid.spill_shift
    return values & grid.mask


def check_values(values: NDArray[np.int64], layout: Layout, *, first: int = 0) -> None:
    """Refuse values that the slots do not hold.

    Args:
        values: int64, 1-D.
        layout: for its offset.
        first: position of `values[0]` in the batch.

    Raises:
        SlotOverflowError: a value outside [-offset, offset]; names its position, not the value.
    """
    outside = (values > layout.offset) | (values < -layout.offset)
    if outside.any():
        index = first + int(outside.argmax())
        raise SlotOverflowError(f"value {index} does not fit its slot", index=index, limit=layout.offset)


def pack(values: NDArray[np.int64], layout: Layout, *, first: int = 0) -> list[int]:
    """Plaintexts for `values`.

    Args:
        values: int64, 1-D, in [-offset, offset]; a multiple of slots_per_ciphertext unless they end the batch.
        layout: the layout.
        first: position of `values[0]` in the batch.

    Returns:
        ⌈len(values) / slots_per_ciphertext⌉ integers below 2^(modulus_bits − 1), hence below n.

    Raises:
        SlotOverflowError: a value outside [-offset, offset].
    """
    check_values(values, layout, first=first)
    per = layout.slots_per_ciphertext
    count = -(-len(values) // per)
    slots = np.zeros(count * per, dtype=np.uint64)
    slots[: len(values)] = values + np.int64(layout.offset)
    words = layout.modulus_bits // WORD_BITS
    packed = pack_words(slots.reshape(count, per), layout.slot_bits, words)
    return split(packed[:, ::-1].astype(">u8").tobytes(), words * WORD_BITS // 8)


def unpack(block: bytes, layout: Layout, *, contributions: int, first_ciphertext: int = 0) -> NDArray[np.int64]:
    """Sums from opened plaintexts.

    Args:
        block: plaintexts of modulus_bits/8 bytes, big-endian, back to back.
        layout: the layout.
        contributions: how many contributions were summed: that many offsets are subtracted.
        first_ciphertext: position of the block's first plaintext in the batch.

    Returns:
        int64, 1-D: the sums, without what the last plaintext does not need.

    Raises:
        SlotOverflowError: a slot above contributions · 2 · offset, or something in bits that no slot uses; names the
            position of the value.
    """
    per = layout.slots_per_ciphertext
    big_endian = np.frombuffer(block, dtype=">u8").reshape(-1, layout.modulus_bits // WORD_BITS)
    packed = np.ascontiguousarray(big_endian[:, ::-1]).astype(np.uint64)
    slots = unpack_words(packed, layout.slot_bits, per)
    first = first_ciphertext * per
    needed = min(slots.size, layout.parameter_count - first)
    limit = np.full(slots.size, contributions * 2 * layout.offset, dtype=np.uint64)
    limit[needed:] = 0
    wrong = slots > limit.reshape(slots.shape)
    # What lies above the last slot shows when the slots are packed again.
    wrong[:, -1] |= (pack_words(slots, layout.slot_bits, packed.shape[1]) != packed).any(axis=1)
    if wrong.any():
        index = first + min(int(wrong.argmax()), needed - 1)
        raise SlotOverflowError(f"no sum of {contributions} contributions opens to slot {index}", index=index)
    return slots.reshape(-1)[:needed].astype(np.int64) - np.int64(contributions * layout.offset)


def regroup(
    blocks: Iterable[NDArray[np.int64]], layout: Layout, *, block_ciphertexts: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """The values of `blocks` in arrays that fill `block_ciphertexts` ciphertexts each, the last one what is left.

    `block_ciphertexts` is the layout's by default.

    Raises:
        BatchError: not 1-D int64, or not parameter_count values in all.
    """
    size = (block_ciphertexts or layout.block_ciphertexts) * layout.slots_per_ciphertext
    held: list[NDArray[np.int64]] = []
    waiting = total = 0
    for block in blocks:
        if block.dtype != np.int64 or block.ndim != 1:
            raise mismatch("values", f"{block.dtype} with {block.ndim} dimensions instead of int64 with one")
        total += len(block)
        if total > layout.parameter_count:
            raise mismatch("parameter_count", f"more than the {layout.parameter_count} values of the layout")
        held.append(block)
        waiting += len(block)
        if waiting >= size:
            joined = np.concatenate(held)
            whole = waiting - waiting % size
            for start in range(0, whole, size):
                yield joined[start : start + size]
            held, waiting = [joined[whole:]], waiting - whole
    if total != layout.parameter_count:
        raise mismatch("parameter_count", f"{total} values instead of {layout.parameter_count}")
    if waiting:
        yield np.concatenate(held)
