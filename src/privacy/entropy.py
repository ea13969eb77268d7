"""Where randomness that protects somebody comes from: a port, the real source, and a repeatable one for tests.

Whoever draws noise, rounding, samples, masks or keys takes an `Entropy` and nothing else. `SystemEntropy` is what runs;
`DeterministicEntropy` is insecure by construction and exists for tests and the deterministic mode.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Final, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from ..errors import InvalidInput

WORD_BYTES: Final = 8
KEY_BYTES: Final = 32
"""AES-256."""

REKEY_BYTES: Final = 1 << 36
"""Keystream drawn from one key: 2^32 blocks, so that a permutation is told from a function with probability ≤ 2^-65
(PRP/PRF switching lemma, q²/2^129)."""

_HKDF_SALT: Final = b"sotto.v1.deterministic-entropy"


class Entropy(Protocol):
    """A source of uniformly random bits. A negative amount raises InvalidInput."""

    def token(self, size: int) -> bytes:
        """`size` ≥ 0 random bytes: keys, nonces, identifiers."""
        ...

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` ≥ 0 independent uniform words, shape (count,), dtype uint64, read-only."""
        ...


def _keystream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _draw(stream: CipherContext, size: int) -> bytes:
    return stream.update(bytes(size))


def _as_words(raw: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64, copy=False)


def _checked(size: int) -> int:
    if size < 0:
        raise InvalidInput("a negative amount of randomness was asked for")
    return size


_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class _Stream(threading.local):
    """One thread's keystream. `threading.local` runs `__init__` once in every thread."""

    def __init__(self) -> None:
        self.epoch: tuple[int, int] | None = None
        self.left = 0
        self.cipher: CipherContext | None = None


class SystemEntropy:
    """AES-256-CTR keyed by the operating system; the bulk source for noise, rounding, sampling and masks.

    Safe to share: every thread has its own keystream under its own key, and nothing is keyed before the first draw. A
    process that was forked takes a new key before it draws (noticed by a fork hook and, for forks that bypass Python's
    hooks, by the process id). `token` asks the operating system directly.
    """

    def __init__(self) -> None:
        self._local = _Stream()

    def token(self, size: int) -> bytes:
        """`size` bytes straight from the operating system."""
        return os.urandom(_checked(size))

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform words, shape (count,), dtype uint64, read-only."""
        size = WORD_BYTES * _checked(count)
        local = self._local
        epoch = (os.getpid(), _forks)
        if local.cipher is None or local.epoch != epoch or local.left < size:
            local.cipher = _keystream(os.urandom(KEY_BYTES))
            local.epoch, local.left = epoch, REKEY_BYTES
        local.left -= size
        return _as_words(_draw(local.cipher, size))


class DeterministicEntropy:
    """INSECURE: the same arguments give the same stream. For tests and the deterministic mode only.

    The stream is AES-256-CTR under HKDF-SHA256(`key`, (job, round, party, purpose)); different arguments give
    independent streams. Not to be shared between threads, or the order of draws is not repeatable.

    Args:
        key: the master key of the run, any length ≥ 1.
        purpose: what is drawn ("noise", "rounding", …); two purposes never share a stream.
        job, round_number, party: who draws and when.

    Raises:
        InvalidInput: an empty key.
    """

    def __init__(self, key: bytes, *, purpose: str, job: str = "", round_number: int = 0, party: str = "") -> None:
        if not key:
            raise InvalidInput("a deterministic source needs a key")
        info = json.dumps([job, round_number, party, purpose], separators=(",", ":")).encode()
        derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=_HKDF_SALT, info=info).derive(key)
        self._cipher = _keystream(derived)

    def token(self, size: int) -> bytes:
        """The next `size` bytes of the stream."""
        return _draw(self._cipher, _checked(size))

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` words of the stream, shape (count,), dtype uint64, read-only."""
        return _as_words(_draw(self._cipher, WORD_BYTES * _checked(count)))
