"""The seam: what a scheme is to everybody outside this room.

`plan → layout; protect(blocks) → body blocks; check; fold; opening_material(aggregate); open_share; verify_share;
combine (or open_with_key); decode(blocks)`. A layout fixes every width; a body is `ciphertext_count` ciphertexts of
`ciphertext_bytes` each, back to back; every block that goes in or comes out holds whole ciphertexts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BatchError, SlotOverflowError
from .integers import Entropy
from .keys import KeyShare, PrivateKey

LAYOUT_VERSION: Final = 1
LARGEST_SLOT_BITS: Final = 62
"""A sum of slots, and the same minus its offset, fits an int64 with room to compare."""
LARGEST_PARAMETER_COUNT: Final = 1 << 40
LARGEST_CONTRIBUTIONS: Final = 1 << 24
BLOCK_BYTES: Final = 48 * 1024
"""Of a block, at most: 64 ciphertexts at 3072 bits, so that folding ten uploads keeps half a megabyte in memory."""


class SystemEntropy:
    """The operating system's generator: what protects somebody outside of tests."""

    __slots__ = ()

    def token(self, size: int) -> bytes:
        """`size` bytes of `os.urandom`."""
        return os.urandom(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRequest:
    """What a round knows before its slots have a width.

    Attributes:
        parameter_count: values in an update, at least 1.
        value_bound: largest |weight · encoded coordinate| of one update, at least 1.
        noise_bound: largest |noise| that one contribution adds to a coordinate: a party's share or the aggregator's
            batch, whichever is larger; at least 0.
        contributions: most contributions that one sum can hold: the cohort, and one more if the aggregator adds noise.

    Raises:
        BatchError: a value out of range; names it.
    """

    parameter_count: int
    value_bound: int
    noise_bound: int
    contributions: int

    def __post_init__(self) -> None:
        _within("parameter_count", self.parameter_count, 1, LARGEST_PARAMETER_COUNT)
        _within("value_bound", self.value_bound, 1, None)
        _within("noise_bound", self.noise_bound, 0, None)
        _within("contributions", self.contributions, 1, LARGEST_CONTRIBUTIONS)

    @property
    def offset(self) -> int:
        """What is added to a value to make its slot non-negative: the largest |value| of one contribution."""
        return self.value_bound + self.noise_bound

    @property
    def slot_bits(self) -> int:
        """The least width in which no sum inside the bounds overflows.

        Raises:
            SlotOverflowError: more than `LARGEST_SLOT_BITS`.
        """
        return slot_width(self.contributions, self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Every width of a batch: all that the two ends must agree on.

    Attributes:
        scheme: short name.
        key_id: of the key; empty for a scheme without one.
        modulus_bits: a plaintext has fewer bits than this.
        parameter_count: values, at least 1.
        slot_bits: width of a slot, bit_length(contributions · 2 · offset), at most 62.
        offset: added to each value of a contribution: values lie in [-offset, offset].
        slots_per_ciphertext: values in a ciphertext.
        ciphertext_count: ⌈parameter_count / slots_per_ciphertext⌉.
        ciphertext_bytes: fixed length of a ciphertext.
        contributions: most contributions that a sum can hold.

    Raises:
        BatchError: fields that contradict each other; names the field.
        SlotOverflowError: a slot of more than 62 bits.
    """

    scheme: str
    key_id: str
    modulus_bits: int
    parameter_count: int
    slot_bits: int
    offset: int
    slots_per_ciphertext: int
    ciphertext_count: int
    ciphertext_bytes: int
    contributions: int

    def __post_init__(self) -> None:
        _within("parameter_count", self.parameter_count, 1, LARGEST_PARAMETER_COUNT)
        _within("contributions", self.contributions, 1, LARGEST_CONTRIBUTIONS)
        _within("offset", self.offset, 1, None)
        _within("modulus_bits", self.modulus_bits, 1, None)
        _within("ciphertext_bytes", self.ciphertext_bytes, 1, None)
        if self.slot_bits != slot_width(self.contributions, self.offset):
            raise mismatch("slot_bits", "not the width that contributions and offset need")
        _within("slots_per_ciphertext", self.slots_per_ciphertext, 1, (self.modulus_bits - 1) // self.slot_bits)
        if self.ciphertext_count != -(-self.parameter_count // self.slots_per_ciphertext):
            raise mismatch("ciphertext_count", "not the number that the parameters fill")

    @property
    def body_bytes(self) -> int:
        """Length of a batch's body."""
        return self.ciphertext_count * self.ciphertext_bytes

    @property
    def block_ciphertexts(self) -> int:
        """Ciphertexts in a block, unless a caller asks for another number."""
        return max(1, BLOCK_BYTES // self.ciphertext_bytes)

    def part(self, first: int, count: int) -> Layout:
        """The layout of the ciphertexts first … first+count−1 alone: how a batch is divided among workers.

        Raises:
            BatchError: not a range of ciphertexts of this layout.
        """
        _within("first", first, 0, self.ciphertext_count - 1)
        _within("count", count, 1, self.ciphertext_count - first)
        values = min(self.parameter_count - first * self.slots_per_ciphertext, count * self.slots_per_ciphertext)
        return replace(self, parameter_count=values, ciphertext_count=count)

    def to_json(self) -> dict[str, int | str]:
        """All fields and a `version`: integers and strings only."""
        return {"version": LAYOUT_VERSION} | {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Layout:
        """Read `to_json`'s form.

        Raises:
            BatchError: another version, an unknown, missing or mistyped field, or fields that contradict each other.
        """
        left = dict(data)
        if left.pop("version", None) != LAYOUT_VERSION:
            raise mismatch("version", f"not {LAYOUT_VERSION}, the only version known here")
        values: dict[str, object] = {}
        for each in fields(cls):
            value = left.pop(each.name, None)
            expected = str if each.name in ("scheme", "key_id") else int
            if not isinstance(value, expected) or isinstance(value, bool):
                raise mismatch(each.name, f"missing, or not of type {expected.__name__}")
            values[each.name] = value
        for name in sorted(left):
            raise mismatch(name, "unknown field")
        return cls(**values)  # type: ignore[arg-type]  # types were checked one by one above


class Prover(Protocol):
    """Collects what `protect` encrypts, and proves at the end that it was known."""

    def add(self, block: bytes, plaintexts: Sequence[int], exponents: Sequence[int]) -> None:
        """The next ciphertexts (bytes), what is inside, and their randomness."""
        ...

    def proof(self) -> bytes:
        """The proof for the whole batch."""
        ...


class Scheme(Protocol):
    """Sums what nobody may see. Every method raises BatchError for a layout of another scheme or key.

    Methods that return iterators do their work as they are read, so errors come up while reading.
    """

    @property
    def name(self) -> str:
        """Short name in the registry, in layouts and in batch headers."""
        ...

    def plan(self, request: LayoutRequest) -> Layout:
        """The layout for a round; raises SlotOverflowError when a slot would exceed 62 bits."""
        ...

    def prepare(self, layout: Layout, *, entropy: Entropy) -> AbstractContextManager[object]:
        """Whatever one `protect` needs beside the values, computed on idle cores from now on.

        It is in memory alone and serves one batch. Leave its `with` block when it is not wanted any more.
        """
        ...

    def protect(
        self,
        layout: Layout,
        blocks: Iterable[NDArray[np.int64]],
        *,
        entropy: Entropy,
        prepared: object = None,
        prover: Prover | None = None,
    ) -> Iterator[bytes]:
        """Body blocks for the values in `blocks` (1-D int64 arrays of any lengths, parameter_count values in all).

        `prepared` is what `prepare` gave for this layout; without it everything is computed now. `prover` is told what
        is encrypted; once all blocks are read it has the proof.

        Raises:
            StateError: `prepared` was used before; `metadata["index"]` is the first ciphertext that it fails.
            SlotOverflowError: a value outside [-offset, offset]; `metadata["index"]` is its position.
            BatchError: more or fewer values than the layout has, or not int64.
        """
        ...

    def check(self, layout: Layout, body: Iterable[bytes]) -> Iterator[bytes]:
        """The same blocks, each passed on once every ciphertext in it has been validated.

        Raises:
            CiphertextError: not a ciphertext; `metadata["index"]` is its position in the batch.
            BatchError: too short, too long, or a block that cuts a ciphertext.
        """
        ...

    def check_body(self, layout: Layout, body: BinaryIO) -> None:
        """`check` a whole body, from where the stream stands; raises as it does."""
        ...

    def prover(self, layout: Layout, *, binding: bytes, entropy: Entropy) -> Prover:
        """For one batch: a proof, bound to `binding`, that its sender knows what is inside."""
        ...

    def check_knowledge(self, layout: Layout, body: BinaryIO, *, proof: bytes, binding: bytes) -> None:
        """Raises KnowledgeError unless `proof` shows that the body's sender knew what is inside, under `binding`.

        Raises what `check` raises too.
        """
        ...

    def fold(self, layout: Layout, bodies: Sequence[BinaryIO]) -> Iterator[bytes]:
        """Body blocks of the aggregate; memory O(block), however many bodies.

        Raises:
            BatchError: no body, more than `layout.contributions`, or one that is too short or too long.
        """
        ...

    def opening_material(self, layout: Layout, aggregate: BinaryIO) -> Iterator[bytes]:
        """What has to be opened to learn the aggregate."""
        ...

    def open_share(
        self, layout: Layout, share: KeyShare, material: Iterable[bytes], *, binding: bytes, entropy: Entropy
    ) -> bytes:
        """One holder's serialized share batch with its proof, bound to `binding`.

        Raises:
            CiphertextError, BatchError: the material is not one of this layout.
            KeyMaterialError: the share is not one of this key.
        """
        ...

    def verify_share(self, layout: Layout, material: bytes, share_batch: bytes, *, index: int, binding: bytes) -> None:
        """Raises ShareError (`metadata["index"]`) unless `share_batch` is holder `index`'s share of `material`."""
        ...

    def combine(self, layout: Layout, material: bytes, shares: Mapping[int, bytes]) -> Iterator[bytes]:
        """The opened plaintext blocks, from verified shares by holder index.

        Raises:
            TooFewSharesError: fewer than the threshold.
            ShareError: malformed, or shares that do not fit together.
        """
        ...

    def open_with_key(self, layout: Layout, private: PrivateKey, material: Iterable[bytes]) -> Iterator[bytes]:
        """The opened plaintext blocks, by the key owner (custody `aggregator`)."""
        ...

    def decode(self, layout: Layout, opened: Iterable[bytes], *, contributions: int) -> Iterator[NDArray[np.int64]]:
        """The sums, as int64 arrays with parameter_count values in all; `contributions` is how many were summed.

        Raises:
            SlotOverflowError: a slot that no sum of `contributions` contributions can hold.
            BatchError: too short, too long, or more contributions than planned.
        """
        ...


def slot_width(contributions: int, offset: int) -> int:
    """Bits of the largest slot sum, contributions · 2 · offset.

    Raises:
        SlotOverflowError: more than `LARGEST_SLOT_BITS`.
    """
    bits = (contributions * 2 * offset).bit_length()
    if bits > LARGEST_SLOT_BITS:
        raise SlotOverflowError(
            f"a sum of {contributions} contributions needs slots of {bits} bits, more than {LARGEST_SLOT_BITS}:"
            " lower the resolution, the clipping norm, the noise or the cohort",
            slot_bits=bits,
            limit=LARGEST_SLOT_BITS,
        )
    return bits


def check_layout(layout: Layout, *, name: str, key_id: str, modulus_bits: int, ciphertext_bytes: int) -> None:
    """Refuse a layout of another scheme or key. Raises BatchError, which names the field."""
    expected = {
        "scheme": name,
        "key_id": key_id,
        "modulus_bits": modulus_bits,
        "ciphertext_bytes": ciphertext_bytes,
    }
    for field, value in expected.items():
        found = getattr(layout, field)
        if found != value:
            raise mismatch(field, f"{found!r} instead of {value!r}")


def mismatch(field: str, problem: str) -> BatchError:
    """The error for a field of a layout or batch."""
    return BatchError(f"{field}: {problem}", violations={field: problem}, field=field)


def _within(field: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        raise mismatch(field, f"{value} is not " + (f"at least {least}" if most is None else f"in [{least}, {most}]"))
