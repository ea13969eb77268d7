"""The scheme `paillier`: packed DJN ciphertexts, opened by shares or by the key's owner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import BatchError, KeyMaterialError
from .batch import counted, read_blocks
from .integers import Entropy, join, split
from .keys import KeyShare, PrivateKey, PublicKey, ThresholdKey
from .packing import pack, regroup, unpack
from .paillier import MEMORY_LIMIT_MB, Encryptor, add, check_ciphertexts, decrypt
from .scheme import Layout, LayoutRequest, check_layout, mismatch
from .threshold import ShareBatch, combine, open_batch, partial_decrypt_all, prove, verify_share_batch

OUTGROWN_FACTOR: Final = 4
"""Tables are built anew when this many times more encryptions are to come than they were chosen for."""


class PaillierScheme:
    """`Scheme` over one Paillier key.

    One instance serves many rounds: the tables of its encryptor are built at the first `protect` or `prepare` and kept.

    Args:
        public: the key.
        threshold_key: the public values of its deal, for opening by shares; None in custody `aggregator`.
        expected_ciphertexts: encryptions to come over the life of this object; None: those of the first batch.
        memory_limit_mb: limit for the encryption tables, in 10^6 bytes.

    Raises:
        KeyMaterialError: `threshold_key` is a deal of another key.
    """

    name: Final = "paillier"

    def __init__(
        self,
        public: PublicKey,
        threshold_key: ThresholdKey | None = None,
        *,
        expected_ciphertexts: int | None = None,
        memory_limit_mb: int = MEMORY_LIMIT_MB,
    ) -> None:
        if threshold_key is not None and threshold_key.public != public:
            raise KeyMaterialError("threshold_key: it is a deal of another key", field="threshold_key")
        self.public = public
        self.key_id = public.key_id
        self._threshold_key = threshold_key
        self._expected = expected_ciphertexts
        self._memory_limit_mb = memory_limit_mb
        self._encryptor: Encryptor | None = None

    def _check(self, layout: Layout) -> None:
        check_layout(
            layout,
            name=self.name,
            key_id=self.key_id,
            modulus_bits=self.public.modulus_bits,
            ciphertext_bytes=self.public.ciphertext_bytes,
        )

    def _encryptor_for(self, layout: Layout) -> Encryptor:
        count = max(self._expected or 0, layout.ciphertext_count)
        if self._encryptor is None or count >= OUTGROWN_FACTOR * self._encryptor.expected_count:
            self._encryptor = Encryptor(self.public, expected_count=count, memory_limit_mb=self._memory_limit_mb)
        return self._encryptor

    def _shared(self) -> ThresholdKey:
        if self._threshold_key is None:
            raise KeyMaterialError("threshold_key: this key was not dealt out, it has no shares", field="threshold_key")
        return self._threshold_key

    def plan(self, request: LayoutRequest) -> Layout:
        """As many whole slots in a ciphertext as fit below n; see `Scheme.plan`."""
        slot_bits = request.slot_bits
        slots = (self.public.modulus_bits - 1) // slot_bits
        return Layout(
            scheme=self.name,
            key_id=self.key_id,
            modulus_bits=self.public.modulus_bits,
            parameter_count=request.parameter_count,
            slot_bits=slot_bits,
            offset=request.offset,
            slots_per_ciphertext=slots,
            ciphertext_count=-(-request.parameter_count // slots),
            ciphertext_bytes=self.public.ciphertext_bytes,
            contributions=request.contributions,
        )

    def prepare(self, layout: Layout, *, entropy: Entropy) -> None:
        """Compute the blinding factors of one batch ahead (see `Encryptor.prepare`)."""
        self._check(layout)
        encryptor = self._encryptor_for(layout)
        encryptor.prepare(max(0, layout.ciphertext_count - encryptor.prepared), entropy=entropy)

    def protect(self, layout: Layout, blocks: Iterable[NDArray[np.int64]], *, entropy: Entropy) -> Iterator[bytes]:
        """See `Scheme.protect`: fresh randomness for every ciphertext."""
        self._check(layout)
        encryptor = self._encryptor_for(layout)
        first = 0
        for values in regroup(blocks, layout):
            plaintexts = pack(values, layout, first=first)
            first += len(values)
            yield join(encryptor.encrypt(plaintexts, entropy=entropy), layout.ciphertext_bytes)

    def _ciphertexts(self, layout: Layout, blocks: Iterable[bytes]) -> Iterator[tuple[bytes, list[int]]]:
        self._check(layout)
        for position, block in counted(blocks, layout.ciphertext_bytes, layout.ciphertext_count):
            ciphertexts = split(block, layout.ciphertext_bytes)
            check_ciphertexts(self.public, ciphertexts, first=position)
            yield block, ciphertexts

    def check(self, layout: Layout, body: Iterable[bytes]) -> Iterator[bytes]:
        """See `Scheme.check`: every ciphertext is in Z*_{n²}."""
        for block, _ in self._ciphertexts(layout, body):
            yield block

    def fold(self, layout: Layout, bodies: Sequence[BinaryIO]) -> Iterator[bytes]:
        """See `Scheme.fold`: products modulo n²; the bodies have passed `check`, or their product will."""
        self._check(layout)
        width = layout.ciphertext_bytes
        for blocks in read_together(layout, bodies):
            columns = zip(*(split(block, width) for block in blocks), strict=True)
            yield join((add(self.public, column) for column in columns), width)

    def opening_material(self, layout: Layout, aggregate: BinaryIO) -> Iterator[bytes]:
        """The aggregate itself."""
        self._check(layout)
        yield from read_blocks(aggregate, layout)

    def _material(self, layout: Layout, material: Iterable[bytes]) -> list[int]:
        return [ciphertext for _, block in self._ciphertexts(layout, material) for ciphertext in block]

    def open_share(
        self, layout: Layout, share: KeyShare, material: Iterable[bytes], *, binding: bytes, entropy: Entropy
    ) -> bytes:
        """See `Scheme.open_share`: partial decryptions and one proof over all of them."""
        key, ciphertexts = self._shared(), self._material(layout, material)
        return open_batch(share, key, ciphertexts, binding=binding, entropy=entropy).encode(key)

    def open_part(self, layout: Layout, share: KeyShare, material: Iterable[bytes]) -> bytes:
        """The partial decryptions of a part of the material (`layout.part`), unproven: what workers do side by side."""
        values = partial_decrypt_all(share, self._shared(), self._material(layout, material))
        return join(values, layout.ciphertext_bytes)

    def prove_parts(
        self,
        layout: Layout,
        share: KeyShare,
        material: Iterable[bytes],
        *,
        parts: Iterable[bytes],
        binding: bytes,
        entropy: Entropy,
    ) -> bytes:
        """The share batch for the parts that `open_part` made of the whole material, in order, with their proof."""
        key, ciphertexts = self._shared(), self._material(layout, material)
        values = self._material(layout, parts)
        return prove(share, key, ciphertexts, values, binding=binding, entropy=entropy).encode(key)

    def verify_share(self, layout: Layout, material: bytes, share_batch: bytes, *, index: int, binding: bytes) -> None:
        """See `Scheme.verify_share`."""
        key, ciphertexts = self._shared(), self._material(layout, [material])
        batch = ShareBatch.decode(share_batch, key, count=layout.ciphertext_count, index=index)
        verify_share_batch(key, ciphertexts, batch, index=index, binding=binding)

    def combine(self, layout: Layout, material: bytes, shares: Mapping[int, bytes]) -> Iterator[bytes]:
        """See `Scheme.combine`; the partial decryptions alone decide, `material` is not needed."""
        self._check(layout)
        key, count = self._shared(), layout.ciphertext_count
        values = {i: ShareBatch.decode(data, key, count=count, index=i).values for i, data in shares.items()}
        step = layout.block_ciphertexts
        for first in range(0, count, step):
            plaintexts = combine(key, {i: value[first : first + step] for i, value in values.items()})
            yield join(plaintexts, self.public.plaintext_bytes)

    def open_with_key(self, layout: Layout, private: PrivateKey, material: Iterable[bytes]) -> Iterator[bytes]:
        """See `Scheme.open_with_key`. Raises KeyMaterialError for another key's private half."""
        if private.public != self.public:
            raise KeyMaterialError("private: it belongs to another key", field="private")
        for _, ciphertexts in self._ciphertexts(layout, material):
            plaintexts = (decrypt(private, ciphertext) for ciphertext in ciphertexts)
            yield join(plaintexts, self.public.plaintext_bytes)

    def decode(self, layout: Layout, opened: Iterable[bytes], *, contributions: int) -> Iterator[NDArray[np.int64]]:
        """See `Scheme.decode`."""
        self._check(layout)
        check_contributions(layout, contributions)
        width, count = self.public.plaintext_bytes, layout.ciphertext_count
        for position, block in counted(opened, width, count, name="opened"):
            yield unpack(block, layout, contributions=contributions, first_ciphertext=position)


def check_contributions(layout: Layout, contributions: int) -> None:
    """Refuse a number of contributions that the slots were not planned for. Raises BatchError."""
    if not 1 <= contributions <= layout.contributions:
        raise mismatch("contributions", f"{contributions} is not in [1, {layout.contributions}]")


def read_together(layout: Layout, bodies: Sequence[BinaryIO]) -> Iterator[tuple[bytes, ...]]:
    """The same block of every body, block after block.

    Raises:
        BatchError: no body, too many, or one cut short or too long; `metadata["body"]` is its position.
    """
    check_contributions(layout, len(bodies))
    readers = [_named(read_blocks(body, layout), position) for position, body in enumerate(bodies)]
    yield from zip(*readers, strict=True)


def _named(blocks: Iterator[bytes], position: int) -> Iterator[bytes]:
    try:
        yield from blocks
    except BatchError as error:
        error.metadata["body"] = str(position)
        raise
