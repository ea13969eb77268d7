"""The blinding factors of one batch: computed by one process or several, ahead of time or not, used once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from ..errors import StateError
from .integers import Entropy, join, split
from .paillier import Encryptor, Factor
from .parallel import AHEAD_BYTES, LARGEST_PIECE, Crew, pieces, worthwhile

WINDOW: Final = 16_384
"""Exponents that are drawn at once: 3 MB at 3072 bits, and a fork for every ten seconds of work."""
PREPARED_BYTES: Final = 64 * 1024 * 1024
"""Of factors prepared ahead, at most, in all children together: 130 000 ciphertexts of 2048 bits."""
AHEAD_NICENESS: Final = 5
"""Children that prepare ahead leave the cores to the training that they run beside."""


class Blinding:
    """The factors numbered 0 … count − 1 of one batch. Each is handed out once, to the process that owns them.

    Exponents are drawn here, so that the same entropy gives the same ciphertexts whatever `processes` is; children
    compute the powers. Everything is in memory alone: a crash forgets it, a fork does not inherit it. Close it, or use
    it as a context manager.

    Args:
        encryptor: of the key.
        count: ciphertexts in the batch.
        entropy: of the exponents.
        processes: children that compute; 1 computes here, when a factor is asked for.
    """

    def __init__(self, encryptor: Encryptor, count: int, *, entropy: Entropy, processes: int = 1) -> None:
        self.encryptor = encryptor
        self.count = count
        self._entropy = entropy
        self._processes = processes
        self._owner = os.getpid()
        self._next = 0
        self._drawn = 0
        self._closed = False
        self._ready: deque[Factor] = deque()
        self._exponents: deque[bytes] = deque()
        self._crew: Crew | None = None
        self._results: Iterator[bytes] = iter(())

    @classmethod
    def ahead(cls, encryptor: Encryptor, count: int, *, entropy: Entropy, processes: int) -> Blinding:
        """Children begin at once, at lower priority, while this process does something else.

        What would exceed `PREPARED_BYTES` is computed when it is asked for. Raises WorkerError.
        """
        blinding = cls(encryptor, count, entropy=entropy, processes=processes)
        limit = max(LARGEST_PIECE, PREPARED_BYTES // encryptor.public.ciphertext_bytes)
        blinding._start(min(count, limit), processes, ahead_bytes=PREPARED_BYTES, niceness=AHEAD_NICENESS)
        return blinding

    def take(self, first: int, count: int) -> list[Factor]:
        """Factors first … first + count − 1, in the order of their numbers.

        Raises:
            StateError: one that was handed out before, is not the next, or is another process's; `metadata["index"]`
                is its number.
            WorkerError: a child died.
        """
        if self._owner != os.getpid():
            raise StateError(f"blinding factor {first} belongs to the process that drew it", index=first)
        if first < self._next:
            raise StateError(f"blinding factor {first} was handed out already", index=first)
        if self._closed:
            raise StateError(f"blinding factor {first} was forgotten with its batch", index=first)
        if first > self._next or first + count > self.count:
            wrong = first if first > self._next else self.count
            raise StateError(f"blinding factor {wrong} is not the next one of {self.count}", index=wrong)
        self._next += count
        while len(self._ready) < count:
            self._more(count - len(self._ready))
        return [self._ready.popleft() for _ in range(count)]

    def _more(self, wanted: int) -> None:
        if self._crew is None:
            window = min(WINDOW, self.count - self._drawn)
            processes = worthwhile(self._processes, window * self.encryptor.products)
            if processes == 1:
                exponents = self.encryptor.draw(wanted, entropy=self._entropy)
                self._drawn += wanted
                self._ready.extend(self.encryptor.factors(exponents))
                return
            self._start(window, processes)
        frame = next(self._results, None)
        if frame is None:
            self._stop()
            return
        values = split(frame, self.encryptor.public.plaintext_bytes)
        exponents = [self._exponents.popleft() for _ in range(len(values) // 2)]
        self._ready.extend(map(Factor, values[::2], values[1::2], exponents))

    def _start(self, count: int, processes: int, *, ahead_bytes: int = AHEAD_BYTES, niceness: int = 0) -> None:
        encryptor, exponents = self.encryptor, self.encryptor.draw(count, entropy=self._entropy)
        parts = pieces(count, processes)

        def work(piece: int) -> bytes:
            part = parts[piece]
            factors = encryptor.factors(exponents[part.start : part.stop])
            return join((value for low, high, _ in factors for value in (low, high)), encryptor.public.plaintext_bytes)

        self._drawn += count
        self._exponents = deque(exponents)
        self._crew = Crew(work, len(parts), processes=processes, ahead_bytes=ahead_bytes, niceness=niceness)
        self._results = iter(self._crew)

    def _stop(self) -> None:
        if self._crew is not None:
            self._crew.close()
        self._crew, self._results = None, iter(())
        self._exponents.clear()

    def close(self) -> None:
        """End the children and forget every factor."""
        self._stop()
        self._ready.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> object:
        raise TypeError("blinding factors are used once and are not to be copied")
