"""Batches between the scheme and the blob store: written, checked against their roots, multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..encryption.batch import BatchHeader, check_header, read_blocks
from ..encryption.scheme import Layout, Scheme
from ..errors import DigestError
from ..privacy.entropy import Entropy
from .merkle import MerkleHasher, batch_root
from .plan import RoundPlan, aggregate_header

PIECE_BYTES: Final = 1 << 18
"""How much of a file is read at a time."""


class BlobRef(Protocol):
    """What a blob store says of what it stored."""

    @property
    def sha256(self) -> str: ...  # hex
    @property
    def size(self) -> int: ...  # bytes


class BlobStore(Protocol):
    """The part of the blob store that this module needs."""

    def write(self, data: bytes | Iterable[bytes]) -> BlobRef:
        """Store bytes under their digest."""
        ...

    def open(self, sha256: str) -> BinaryIO:
        """A stored blob."""
        ...


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch in the blob store: its encoded header (hex), its body's blob, and its Merkle root."""

    header: str
    sha256: str
    size: int
    root: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def expected_header(plan: RoundPlan, plan_digest: str, contributor: str) -> BatchHeader:
    """The only header that a contributor's batch may have under a plan."""
    return BatchHeader.of(
        Layout.from_json(plan.layout),
        job_id=plan.job_id,
        round_number=plan.round,
        contributor=contributor,
        plan_digest=bytes.fromhex(plan_digest),
    )


def check_batch_header(plan: RoundPlan, plan_digest: str, contributor: str, encoded: bytes) -> None:
    """Raises BatchError, which names the first field that is not the plan's."""
    check_header(BatchHeader.decode(encoded), expected_header(plan, plan_digest, contributor))


def write_batch(
    scheme: Scheme,
    plan: RoundPlan,
    values: NDArray[np.int64],
    *,
    plan_digest: str,
    contributor: str,
    blobs: BlobStore,
    entropy: Entropy,
) -> StoredBatch:
    """Protect `values` (int64, shape (dimension,)) and store the batch."""
    layout = Layout.from_json(plan.layout)
    header = expected_header(plan, plan_digest, contributor).encode()
    hasher = _RootOf(header, layout)
    ref = blobs.write(hasher.through(scheme.protect(layout, [values], entropy=entropy)))
    return StoredBatch(header.hex(), ref.sha256, ref.size, hasher.root)


def fold_batches(
    scheme: Scheme,
    plan: RoundPlan,
    batches: Mapping[str, StoredBatch],
    *,
    plan_digest: str,
    blobs: BlobStore,
) -> StoredBatch:
    """Multiply the contributors' batches and store the aggregate; its root names plan and contributors.

    Every batch is checked against its root as it is read.

    Raises:
        BatchError: a header that is not the plan's, or a body of another length.
        DigestError: a batch that does not have its root; `metadata["contributor"]` says whose.
    """
    layout = Layout.from_json(plan.layout)
    names = tuple(sorted(batches))
    with ExitStack() as stack:
        bodies = []
        for name in names:
            check_batch_header(plan, plan_digest, name, bytes.fromhex(batches[name].header))
            _check_root(layout, batches[name], name, stack.enter_context(blobs.open(batches[name].sha256)))
            bodies.append(stack.enter_context(blobs.open(batches[name].sha256)))
        hasher = _RootOf(aggregate_header(plan_digest, names), layout)
        ref = blobs.write(hasher.through(scheme.fold(layout, bodies)))
    return StoredBatch("", ref.sha256, ref.size, hasher.root)


def read_body(scheme_layout: Layout, file: BinaryIO) -> Iterator[bytes]:
    """A stored body, block by block."""
    return read_blocks(file, scheme_layout)


def _check_root(layout: Layout, batch: StoredBatch, contributor: str, file: BinaryIO) -> None:
    pieces = iter(lambda: file.read(PIECE_BYTES), b"")
    root, _, _ = batch_root(bytes.fromhex(batch.header), pieces, ciphertext_bytes=layout.ciphertext_bytes)
    if root != batch.root:
        raise DigestError(f"the batch of {contributor} does not have the root it committed to", contributor=contributor)


class _RootOf:
    """Hashes blocks of whole ciphertexts on their way to the store."""

    def __init__(self, header: bytes, layout: Layout) -> None:
        self._hasher = MerkleHasher()
        self._hasher.add(header)
        self._width = layout.ciphertext_bytes

    def through(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            for start in range(0, len(block), self._width):
                self._hasher.add(block[start : start + self._width])
            yield block

    @property
    def root(self) -> str:
        return self._hasher.root()
