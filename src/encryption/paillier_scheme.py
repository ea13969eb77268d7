"""The scheme `paillier`: packed DJN ciphertexts, opened by shares or by the key's owner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import BatchError, KeyMaterialError, StateError
from .batch import Body, counted, random_access, read_blocks
from .blinding import Blinding
from .integers import Entropy, PackedIntegers, join, split
from .keys import KeyShare, PrivateKey, PublicKey, ThresholdKey
from .knowledge import KnowledgeProver, KnowledgeVerifier
from .packing import pack, regroup, unpack
from .paillier import MEMORY_LIMIT_MB, Encryptor, add_batches, check_ciphertexts, decrypt, encryptor_for
from .parallel import fan_out, pieces, worthwhile
from .scheme import Layout, LayoutRequest, Prover, check_layout, mismatch
from .threshold import ShareBatch, combine, open_batch, verify_share_batch

PREPARING_PAYS: Final = 200
"""Ciphertexts in a batch from which preparing ahead pays: 100 ms of encryption at 2048 bits, for which training starts
20 ms later (two forks of a worker that has torch loaded)."""
OPENING_WINDOW: Final = 4096
"""Ciphertexts that the key's owner opens side by side: ten seconds of work and 3 MB at 3072 bits."""


class PaillierScheme:
    """`Scheme` over one Paillier key.

    The tables of its encryptor are built once a key and process, at the first `protect` or `prepare`.

    Args:
        public: the key.
        threshold_key: the public values of its deal, for opening by shares; None in custody `aggregator`.
        expected_ciphertexts: encryptions to come over the life of this object; None: those of the first batch.
        memory_limit_mb: limit for the encryption tables, in 10^6 bytes.
        processes: forked children that may share the work of one call; 1 forks nothing.

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
        processes: int = 1,
    ) -> None:
        if threshold_key is not None and threshold_key.public != public:
            raise KeyMaterialError("threshold_key: it is a deal of another key", field="threshold_key")
        self.public = public
        self.key_id = public.key_id
        self._threshold_key = threshold_key
        self._expected = expected_ciphertexts
        self._memory_limit_mb = memory_limit_mb
        self._processes = processes

    def _check(self, layout: Layout) -> None:
        check_layout(
            layout,
            name=self.name,
            key_id=self.key_id,
            modulus_bits=self.public.modulus_bits,
            ciphertext_bytes=self.public.ciphertext_bytes,
        )

    def _encryptor(self, layout: Layout) -> Encryptor:
        count = max(self._expected or 0, layout.ciphertext_count)
        return encryptor_for(self.public, expected_count=count, memory_limit_mb=self._memory_limit_mb)

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

    def prepare(self, layout: Layout, *, entropy: Entropy) -> Blinding:
        """See `Scheme.prepare`: blinding factors, by children that begin now, where there are enough to be worth it."""
        self._check(layout)
        encryptor, count = self._encryptor(layout), layout.ciphertext_count
        if self._processes > 1 and count >= PREPARING_PAYS:
            return Blinding.ahead(encryptor, count, entropy=entropy, processes=self._processes)
        return Blinding(encryptor, count, entropy=entropy, processes=self._processes)

    def protect(
        self,
        layout: Layout,
        blocks: Iterable[NDArray[np.int64]],
        *,
        entropy: Entropy,
        prepared: object = None,
        prover: Prover | None = None,
    ) -> Iterator[bytes]:
        """See `Scheme.protect`: fresh randomness for every ciphertext; raises WorkerError when a child dies."""
        self._check(layout)
        if prepared is None:
            encryptor = self._encryptor(layout)
            prepared = Blinding(encryptor, layout.ciphertext_count, entropy=entropy, processes=self._processes)
        elif not isinstance(prepared, Blinding) or prepared.encryptor.public != self.public:
            raise StateError("what was prepared is for another scheme or key", index=0)
        first = done = 0
        with prepared as blinding:
            for values in regroup(blocks, layout):
                plaintexts = pack(values, layout, first=first)
                factors = blinding.take(done, len(plaintexts))
                first, done = first + len(values), done + len(plaintexts)
                block = join(blinding.encryptor.blind(plaintexts, factors), layout.ciphertext_bytes)
                if prover is not None:
                    prover.add(block, plaintexts, [int.from_bytes(factor.exponent, "little") for factor in factors])
                yield block

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

    def check_body(self, layout: Layout, body: BinaryIO) -> None:
        """See `Scheme.check_body`."""
        self._check(layout)
        processes = worthwhile(self._processes, layout.ciphertext_count // 2)
        whole = random_access(body, layout) if processes > 1 else None
        if whole is None:
            for _ in self.check(layout, read_blocks(body, layout)):
                pass
            return
        parts = _blocks(layout)

        def work(piece: int) -> bytes:
            ciphertexts = split(whole.ciphertexts(parts[piece]), layout.ciphertext_bytes)
            check_ciphertexts(self.public, ciphertexts, first=parts[piece].start)
            return b""

        for _ in fan_out(work, len(parts), processes=processes, files=whole.files):
            pass

    def prover(self, layout: Layout, *, binding: bytes, entropy: Entropy) -> KnowledgeProver:
        """See `Scheme.prover`."""
        self._check(layout)
        return KnowledgeProver(self.public, binding=binding, entropy=entropy)

    def check_knowledge(self, layout: Layout, body: BinaryIO, *, proof: bytes, binding: bytes) -> None:
        """See `Scheme.check_knowledge`."""
        verifier = KnowledgeVerifier(self.public, proof, binding=binding)
        for block, ciphertexts in self._ciphertexts(layout, read_blocks(body, layout)):
            verifier.add(block, ciphertexts)
        verifier.finish()

    def fold(self, layout: Layout, bodies: Sequence[BinaryIO]) -> Iterator[bytes]:
        """See `Scheme.fold`: products modulo n²; the bodies have passed `check`, or their product will."""
        self._check(layout)
        check_contributions(layout, len(bodies))
        processes = worthwhile(self._processes, layout.ciphertext_count * (len(bodies) - 1))
        whole = _all_random_access(bodies, layout) if processes > 1 else None
        if whole is None:
            for blocks in read_together(layout, bodies):
                yield self._product(blocks)
            return
        parts = _blocks(layout)

        def work(piece: int) -> bytes:
            return self._product(body.ciphertexts(parts[piece]) for body in whole)

        yield from fan_out(work, len(parts), processes=processes, files=[file for body in whole for file in body.files])

    def _product(self, blocks: Iterable[bytes]) -> bytes:
        width = self.public.ciphertext_bytes
        return join(add_batches(self.public, (split(block, width) for block in blocks)), width)

    def opening_material(self, layout: Layout, aggregate: BinaryIO) -> Iterator[bytes]:
        """The aggregate itself."""
        self._check(layout)
        yield from read_blocks(aggregate, layout)

    def _material(self, layout: Layout, material: Iterable[bytes]) -> PackedIntegers:
        """All of it, checked and held as bytes."""
        data = b"".join(block for block, _ in self._ciphertexts(layout, material))
        return PackedIntegers(data, layout.ciphertext_bytes)

    def open_share(
        self, layout: Layout, share: KeyShare, material: Iterable[bytes], *, binding: bytes, entropy: Entropy
    ) -> bytes:
        """See `Scheme.open_share`: partial decryptions and one proof over all of them."""
        key, ciphertexts = self._shared(), self._material(layout, material)
        batch = open_batch(share, key, ciphertexts, binding=binding, entropy=entropy, processes=self._processes)
        return batch.encode(key)

    def verify_share(self, layout: Layout, material: bytes, share_batch: bytes, *, index: int, binding: bytes) -> None:
        """See `Scheme.verify_share`."""
        key, ciphertexts = self._shared(), self._material(layout, [material])
        batch = ShareBatch.decode(share_batch, key, count=layout.ciphertext_count, index=index)
        verify_share_batch(key, ciphertexts, batch, index=index, binding=binding, processes=self._processes)

    def combine(self, layout: Layout, material: bytes, shares: Mapping[int, bytes]) -> Iterator[bytes]:
        """See `Scheme.combine`; the partial decryptions alone decide, `material` is not needed."""
        self._check(layout)
        key, count = self._shared(), layout.ciphertext_count
        values = {i: ShareBatch.decode(data, key, count=count, index=i).values for i, data in shares.items()}
        # A partial decryption is raised to 2λ, which is about as long as Δ.
        processes = worthwhile(self._processes, count * len(values) * key.delta.bit_length())
        parts = pieces(count, processes)

        def work(piece: int) -> bytes:
            part = slice(parts[piece].start, parts[piece].stop)
            plaintexts = combine(key, {i: value[part] for i, value in values.items()})
            return join(plaintexts, self.public.plaintext_bytes)

        yield from fan_out(work, len(parts), processes=processes)

    def open_with_key(self, layout: Layout, private: PrivateKey, material: Iterable[bytes]) -> Iterator[bytes]:
        """See `Scheme.open_with_key`. Raises KeyMaterialError for another key's private half."""
        if private.public != self.public:
            raise KeyMaterialError("private: it belongs to another key", field="private")
        window: list[int] = []
        for _, ciphertexts in self._ciphertexts(layout, material):
            window += ciphertexts
            if self._processes == 1 or len(window) >= OPENING_WINDOW:
                yield from self._opened(private, window)
                window = []
        yield from self._opened(private, window)

    def _opened(self, private: PrivateKey, ciphertexts: Sequence[int]) -> Iterator[bytes]:
        # Two powers with exponents and moduli of half the length: a quarter of a full one.
        processes = worthwhile(self._processes, len(ciphertexts) * self.public.modulus_bits // 4)
        parts = pieces(len(ciphertexts), processes)

        def work(piece: int) -> bytes:
            part = ciphertexts[parts[piece].start : parts[piece].stop]
            return join((decrypt(private, ciphertext) for ciphertext in part), self.public.plaintext_bytes)

        yield from fan_out(work, len(parts), processes=processes)

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


def read_together(layout: Layout, bodies: Sequence[BinaryIO]) -> Iterator[Iterator[bytes]]:
    """The same block of every body, block after block; each to be read to its end before the next.

    One block is in memory, however many bodies there are.

    Raises:
        BatchError: no body, too many, or one cut short or too long; `metadata["body"]` is its position.
    """
    check_contributions(layout, len(bodies))
    readers = [_named(read_blocks(body, layout), position) for position, body in enumerate(bodies)]
    for _ in _blocks(layout):
        yield map(next, readers)
    for reader in readers:
        next(reader, None)  # finds what is too long


def _named(blocks: Iterator[bytes], position: int) -> Iterator[bytes]:
    try:
        yield from blocks
    except BatchError as error:
        error.metadata["body"] = str(position)
        raise


def _all_random_access(bodies: Sequence[BinaryIO], layout: Layout) -> list[Body] | None:
    whole: list[Body] = []
    for position, stream in enumerate(bodies):
        try:
            body = random_access(stream, layout)
        except BatchError as error:
            error.metadata["body"] = str(position)
            raise
        if body is None:
            return None
        whole.append(body)
    return whole


def _blocks(layout: Layout) -> list[range]:
    size = layout.block_ciphertexts
    return [
        range(first, min(first + size, layout.ciphertext_count)) for first in range(0, layout.ciphertext_count, size)
    ]
