"""The scheme `plaintext`: no protection at all, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import CiphertextError, KnowledgeError, ShareError, TooFewSharesError
from .batch import counted, read_blocks
from .integers import Entropy, digest_parts
from .keys import KeyShare, PrivateKey, check_counts
from .packing import check_values, regroup, unpack
from .paillier_scheme import check_contributions, read_together
from .scheme import Layout, LayoutRequest, Prover, check_layout
from .threshold import wrong_share

WORD_BITS: Final = 64
WORD_BYTES: Final = 8


class _NothingToProve:
    def add(self, block: bytes, plaintexts: Sequence[int], exponents: Sequence[int]) -> None:
        pass

    def proof(self) -> bytes:
        return b""


class PlaintextScheme:
    """FOR TESTS AND BENCHMARKS ONLY: values travel in the clear, and a share is a receipt that protects nothing.

    Each value is a 64-bit big-endian word, value + offset; sums are taken modulo 2^64. Everything else (layout, batch
    format, offsets, thresholds, errors) is as in the schemes that protect, so that what is around them can be tested
    without their cost.

    Args:
        threshold: receipts that `combine` asks for, as a real opening would.
        holders: holders whose receipts count.

    Raises:
        KeyMaterialError: counts that no deal has.
    """

    name: Final = "plaintext"
    key_id: Final = ""

    def __init__(self, threshold: int = 2, holders: int = 3) -> None:
        check_counts(threshold, holders)
        self.threshold = threshold
        self.holders = holders

    def deal(self) -> list[KeyShare]:
        """Shares that open nothing, one for each holder."""
        return [KeyShare(index, 1, self.key_id) for index in range(1, self.holders + 1)]

    def _check(self, layout: Layout) -> None:
        check_layout(layout, name=self.name, key_id=self.key_id, modulus_bits=WORD_BITS, ciphertext_bytes=WORD_BYTES)

    def plan(self, request: LayoutRequest) -> Layout:
        """One word for each value; see `Scheme.plan`."""
        return Layout(
            scheme=self.name,
            key_id=self.key_id,
            modulus_bits=WORD_BITS,
            parameter_count=request.parameter_count,
            slot_bits=request.slot_bits,
            offset=request.offset,
            slots_per_ciphertext=1,
            ciphertext_count=request.parameter_count,
            ciphertext_bytes=WORD_BYTES,
            contributions=request.contributions,
        )

    def prepare(self, layout: Layout, *, entropy: Entropy) -> AbstractContextManager[object]:
        """There is nothing to prepare."""
        self._check(layout)
        return nullcontext()

    def protect(
        self,
        layout: Layout,
        blocks: Iterable[NDArray[np.int64]],
        *,
        entropy: Entropy,
        prepared: object = None,
        prover: Prover | None = None,
    ) -> Iterator[bytes]:
        """See `Scheme.protect`. Draws nothing from `entropy`, and has nothing to prove."""
        self._check(layout)
        first = 0
        for values in regroup(blocks, layout):
            check_values(values, layout, first=first)
            first += len(values)
            yield (values + np.int64(layout.offset)).astype(">u8").tobytes()

    def check(self, layout: Layout, body: Iterable[bytes]) -> Iterator[bytes]:
        """See `Scheme.check`: refuses words that no planned sum reaches."""
        self._check(layout)
        limit = np.uint64(layout.contributions * 2 * layout.offset)
        for position, block in counted(body, WORD_BYTES, layout.ciphertext_count):
            outside = np.frombuffer(block, dtype=">u8") > limit
            if outside.any():
                index = position + int(outside.argmax())
                raise CiphertextError(f"word {index} is out of range", index=index)
            yield block

    def check_body(self, layout: Layout, body: BinaryIO) -> None:
        """See `Scheme.check_body`."""
        for _ in self.check(layout, read_blocks(body, layout)):
            pass

    def prover(self, layout: Layout, *, binding: bytes, entropy: Entropy) -> Prover:
        """Everybody sees what is inside: the proof is empty."""
        self._check(layout)
        return _NothingToProve()

    def check_knowledge(self, layout: Layout, body: BinaryIO, *, proof: bytes, binding: bytes) -> None:
        """See `Scheme.check_knowledge`: the empty proof, and no other."""
        self._check(layout)
        if proof:
            raise KnowledgeError("this scheme proves nothing, and a proof came")

    def fold(self, layout: Layout, bodies: Sequence[BinaryIO]) -> Iterator[bytes]:
        """See `Scheme.fold`: sums modulo 2^64."""
        self._check(layout)
        for blocks in read_together(layout, bodies):
            total = np.frombuffer(next(blocks), dtype=">u8").astype(np.uint64)
            for block in blocks:
                total += np.frombuffer(block, dtype=">u8")
            yield total.astype(">u8").tobytes()

    def opening_material(self, layout: Layout, aggregate: BinaryIO) -> Iterator[bytes]:
        """The aggregate itself."""
        self._check(layout)
        yield from read_blocks(aggregate, layout)

    def _receipt(self, index: int, material: bytes, binding: bytes) -> bytes:
        return digest_parts(b"sotto/plaintext-receipt/1", index.to_bytes(2, "big"), binding, material)

    def open_share(
        self, layout: Layout, share: KeyShare, material: Iterable[bytes], *, binding: bytes, entropy: Entropy
    ) -> bytes:
        """A receipt of 32 bytes over holder, binding and material."""
        return self._receipt(share.index, b"".join(self.check(layout, material)), binding)

    def verify_share(self, layout: Layout, material: bytes, share_batch: bytes, *, index: int, binding: bytes) -> None:
        """See `Scheme.verify_share`."""
        self._check(layout)
        if not 1 <= index <= self.holders or share_batch != self._receipt(index, material, binding):
            raise wrong_share(index, "it is not the receipt of this holder for this material")

    def combine(self, layout: Layout, material: bytes, shares: Mapping[int, bytes]) -> Iterator[bytes]:
        """The material, once there are `threshold` receipts."""
        if len(shares) < self.threshold:
            raise TooFewSharesError(
                f"{len(shares)} shares, and an opening needs {self.threshold}",
                shares=len(shares),
                threshold=self.threshold,
            )
        if not all(1 <= index <= self.holders and len(receipt) == 32 for index, receipt in shares.items()):
            raise ShareError("a receipt is malformed: verify each one")
        yield from self.check(layout, [material])

    def open_with_key(self, layout: Layout, private: PrivateKey, material: Iterable[bytes]) -> Iterator[bytes]:
        """The material: there is no key."""
        yield from self.check(layout, material)

    def decode(self, layout: Layout, opened: Iterable[bytes], *, contributions: int) -> Iterator[NDArray[np.int64]]:
        """See `Scheme.decode`."""
        self._check(layout)
        check_contributions(layout, contributions)
        for position, block in counted(opened, WORD_BYTES, layout.ciphertext_count, name="opened"):
            yield unpack(block, layout, contributions=contributions, first_ciphertext=position)
