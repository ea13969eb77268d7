"""Batches between the scheme and the blob store: written, checked against their roots, multiplied."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..encryption.batch import BatchHeader, check_header
from ..encryption.parallel import fan_out, worthwhile
from ..encryption.scheme import Layout, Scheme
from ..errors import DigestError, KnowledgeError
from ..privacy.entropy import Entropy
from .merkle import MerkleHasher, batch_root
from .plan import RoundPlan, aggregate_header, knowledge_binding

PIECE_BYTES: Final = 1 << 18
"""How much of a file is read at a time."""
PRODUCTS_PER_PROOF: Final = 25
"""Products modulo n² that checking a proof costs for each ciphertext."""
LEAVES_PER_PRODUCT: Final = 2
"""Ciphertexts that are hashed in the time in which two are multiplied."""


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
    """A batch in the blob store: its encoded header (hex), its body's blob, its Merkle root, and its sender's proof of
    knowing what is inside (hex; empty for an aggregate, and for a scheme without encryption)."""

    header: str
    sha256: str
    size: int
    root: str
    proof: str = ""

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
    prepared: object = None,
) -> StoredBatch:
    """Protect `values` (int64, shape (dimension,)) and store the batch; `prepared`: see `Scheme.prepare`."""
    layout = Layout.from_json(plan.layout)
    header = expected_header(plan, plan_digest, contributor).encode()
    hasher = _RootOf(header, layout)
    prover = scheme.prover(layout, binding=knowledge_binding(plan_digest, contributor), entropy=entropy)
    body = scheme.protect(layout, [values], entropy=entropy, prepared=prepared, prover=prover)
    ref = blobs.write(hasher.through(body))
    return StoredBatch(header.hex(), ref.sha256, ref.size, hasher.root, prover.proof().hex())


def fold_batches(
    scheme: Scheme,
    plan: RoundPlan,
    batches: Mapping[str, StoredBatch],
    *,
    plan_digest: str,
    blobs: BlobStore,
    unproven: Collection[str] = (),
    processes: int = 1,
) -> StoredBatch:
    """Multiply the contributors' batches and store the aggregate; its root names plan and contributors.

    Every batch is checked against its root before it is multiplied, and of the contributors in `unproven` the proof
    that they know what is inside; `processes` may share that.

    Raises:
        KnowledgeError: a contributor has not proven it; CiphertextError: what should be a ciphertext is none.
        BatchError: a header that is not the plan's, or a body of another length.
        DigestError: a batch that does not have its root; `metadata["contributor"]` says whose.
    """
    layout = Layout.from_json(plan.layout)
    names = tuple(sorted(batches))
    with ExitStack() as stack:
        for name in names:
            check_batch_header(plan, plan_digest, name, bytes.fromhex(batches[name].header))
        _check_roots(layout, batches, names, blobs=blobs, processes=processes)
        _check_knowledge(
            scheme,
            layout,
            {name: batches[name] for name in names if name in unproven},
            plan_digest=plan_digest,
            blobs=blobs,
            processes=processes,
        )
        bodies = [stack.enter_context(blobs.open(batches[name].sha256)) for name in names]
        hasher = _RootOf(aggregate_header(plan_digest, names), layout)
        ref = blobs.write(hasher.through(scheme.fold(layout, bodies)))
    return StoredBatch("", ref.sha256, ref.size, hasher.root)


def _check_roots(
    layout: Layout, batches: Mapping[str, StoredBatch], names: Sequence[str], *, blobs: BlobStore, processes: int
) -> None:
    def work(position: int) -> bytes:
        batch = batches[names[position]]
        with blobs.open(batch.sha256) as file:
            pieces = iter(lambda: file.read(PIECE_BYTES), b"")
            root, _, _ = batch_root(bytes.fromhex(batch.header), pieces, ciphertext_bytes=layout.ciphertext_bytes)
        return root.encode("ascii")

    processes = worthwhile(processes, len(names) * layout.ciphertext_count // LEAVES_PER_PRODUCT)
    for name, root in zip(names, fan_out(work, len(names), processes=processes), strict=True):
        if root.decode("ascii") != batches[name].root:
            raise DigestError(f"the batch of {name} does not have the root it committed to", contributor=name)


def _check_knowledge(
    scheme: Scheme,
    layout: Layout,
    batches: Mapping[str, StoredBatch],
    *,
    plan_digest: str,
    blobs: BlobStore,
    processes: int,
) -> None:
    names = sorted(batches)

    def work(position: int) -> bytes:
        name = names[position]
        with blobs.open(batches[name].sha256) as file:
            check_knowledge(scheme, layout, batches[name].proof, file, plan_digest=plan_digest, contributor=name)
        return b""

    processes = worthwhile(processes, len(names) * layout.ciphertext_count * PRODUCTS_PER_PROOF)
    for _ in fan_out(work, len(names), processes=processes):
        pass


def check_knowledge(
    scheme: Scheme, layout: Layout, proof: str, body: BinaryIO, *, plan_digest: str, contributor: str
) -> None:
    """Raises KnowledgeError, which names the contributor, unless `proof` (hex) shows that they know what is inside."""
    try:
        binding = knowledge_binding(plan_digest, contributor)
        scheme.check_knowledge(layout, body, proof=bytes.fromhex(proof), binding=binding)
    except (ValueError, KnowledgeError) as error:
        raise KnowledgeError(
            f"{contributor} has not proven to know what is inside its ciphertexts", contributor=contributor
        ) from error


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
