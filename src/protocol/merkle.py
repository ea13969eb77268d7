"""Merkle roots of batches (RFC 9162, section 2.1: leaves and nodes hashed under different prefixes).

A leaf is one ciphertext, so that a single changed ciphertext changes the root. The first leaf is the batch header, so
that the root also fixes the layout, job, round and contributor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

LEAF: Final = b"\x00"
NODE: Final = b"\x01"


class MerkleHasher:
    """The root of leaves given one at a time; memory O(log leaves)."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, bytes]] = []
        self.leaves = 0

    def add(self, leaf: bytes) -> None:
        """Append a leaf."""
        size, node = 1, hashlib.sha256(LEAF + leaf).digest()
        while self._stack and self._stack[-1][0] == size:
            size, node = size * 2, hashlib.sha256(NODE + self._stack.pop()[1] + node).digest()
        self._stack.append((size, node))
        self.leaves += 1

    def root(self) -> str:
        """Hex; of no leaves: the hash of the empty string, as in RFC 9162."""
        if not self._stack:
            return hashlib.sha256().hexdigest()
        node = self._stack[-1][1]
        for _, left in reversed(self._stack[:-1]):
            node = hashlib.sha256(NODE + left + node).digest()
        return node.hex()


def batch_root(header: bytes, body: Iterable[bytes], *, ciphertext_bytes: int) -> tuple[str, int, int]:
    """The root of a batch, the number of its ciphertexts, and the bytes of its body.

    Args:
        header: the encoded batch header.
        body: pieces of any length whose concatenation is whole ciphertexts; a last part that is cut short becomes a
            leaf of its own, so that it can match no root of a well-formed batch.
        ciphertext_bytes: the fixed length of one ciphertext.
    """
    hasher = MerkleHasher()
    hasher.add(header)
    pending = b""
    total = 0
    for piece in body:
        total += len(piece)
        pending += piece
        whole = len(pending) - len(pending) % ciphertext_bytes
        for start in range(0, whole, ciphertext_bytes):
            hasher.add(pending[start : start + ciphertext_bytes])
        pending = pending[whole:]
    if pending:
        hasher.add(pending)
    return hasher.root(), hasher.leaves - 1, total
