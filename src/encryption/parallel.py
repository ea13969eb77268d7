"""Work over cores: the pieces of one batch, computed side by side by forked children and handed back in order.

A child is a copy of this process: it finds keys, tables and inputs where they are, shared until somebody writes, so
nothing but results travels, through one pipe a child. It does arithmetic on integers and ends; it draws no randomness,
starts no threads, and touches no database, channel or tensor. When the reader goes away, however it ended, a child's
next write fails and the child ends too.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import struct
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from ..errors import BY_REASON, InvalidInput, SottoError, WorkerError, meaning

Work = Callable[[int], bytes]
"""Computes piece number i."""

SMALLEST_PART_PRODUCTS: Final = 8_000
"""Products modulo n² that a process must have to do before it is worth its fork: some 45 ms at 2048 bits. A fork of a
worker that has torch loaded costs 10 ms, and the pages that it copies while it reads the tables 10–20 ms more."""
PIECES_PER_PROCESS: Final = 8
"""So that a process that was slower than another leaves at most an eighth of its share undone when that one ends."""
LARGEST_PIECE: Final = 64
"""Items in a piece, at most: a result of 48 kB at 3072 bits, which fits a pipe."""
AHEAD_BYTES: Final = 256 * 1024
"""Of results that a child holds back for a reader who is busy, before it waits."""

_FRAME: Final = struct.Struct(">BI")
_RESULT: Final = 0
_ERROR: Final = 1


def worthwhile(processes: int, products: int) -> int:
    """How many of `processes` pay off for work that costs so many products modulo n²; at least 1."""
    if not hasattr(os, "fork"):
        return 1
    return max(1, min(processes, products // SMALLEST_PART_PRODUCTS))


def pieces(count: int, processes: int) -> list[range]:
    """0 … count − 1 cut into ranges of at most `LARGEST_PIECE`, enough of them for so many processes to share."""
    size = max(1, min(LARGEST_PIECE, -(-count // (processes * PIECES_PER_PROCESS))))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def fan_out(work: Work, count: int, *, processes: int, files: Iterable[int] = ()) -> Generator[bytes, None, None]:
    """work(0), work(1), …, work(count − 1), in order.

    Args:
        work: what to compute; with more than one process it runs in children, so that it changes nothing here.
        count: number of pieces.
        processes: children; 1 computes here. Memory: a few results for each.
        files: descriptors that `work` reads, by position only; a child closes all others.

    Raises:
        WorkerError: a child died, or failed for a reason of its own.
        SottoError: whatever `work` raised, as the same class.
    """
    if min(processes, count) <= 1:
        yield from map(work, range(count))
        return
    with Crew(work, count, processes=processes, files=files) as crew:
        yield from crew


class Crew:
    """Children at work: iterate once for the results in order, and `close` (or leave the `with` block) in any case.

    Child k computes pieces k, k + processes, …

    Args:
        work, count, processes, files: see `fan_out`; the children start at once.
        ahead_bytes: results that each child may compute and hold before anybody reads them.
        niceness: by how much the children yield to this process, 0 to 19.

    Raises:
        WorkerError: no process can be started.
    """

    def __init__(
        self,
        work: Work,
        count: int,
        *,
        processes: int,
        files: Iterable[int] = (),
        ahead_bytes: int = AHEAD_BYTES,
        niceness: int = 0,
    ) -> None:
        self._count = count
        self._owner = os.getpid()
        self._readers: list[int] = []
        self.pids: list[int] = []
        keep = set(files)
        try:
            for first in range(min(processes, count)):
                mine = range(first, count, min(processes, count))
                self._fork(work, mine, keep=keep, ahead_bytes=ahead_bytes, niceness=niceness)
        except BaseException:
            self.close()
            raise

    def _fork(self, work: Work, mine: range, *, keep: set[int], ahead_bytes: int, niceness: int) -> None:
        reader, writer = os.pipe()
        # A Ctrl-C between the fork and the child's own handling of it would print a traceback from the child.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                # Python warns of forks beside threads: a child may find a lock taken. It takes none: see above.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                _child(work, mine, writer, keep=keep, ahead_bytes=ahead_bytes, niceness=niceness)
        except OSError as error:
            os.close(reader)
            raise WorkerError("no process can be started to compute in", private=str(error)) from error
        finally:
            os.close(writer)
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        self._readers.append(reader)
        self.pids.append(pid)

    def __iter__(self) -> Iterator[bytes]:
        for index in range(self._count):
            yield self._receive(index % len(self._readers))

    def _receive(self, child: int) -> bytes:
        kind, length = _FRAME.unpack(self._exactly(child, _FRAME.size))
        data = self._exactly(child, length)
        if kind == _ERROR:
            raise _restored(data)
        return data

    def _exactly(self, child: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._readers[child], size)
            if not part:
                status = os.waitstatus_to_exitcode(os.waitpid(self.pids.pop(child), 0)[1])
                os.close(self._readers.pop(child))
                raise WorkerError("a process that computes a part of a batch died", private=f"exit status {status}")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """End the children, finished or not, and reap them. A copy of this object in a fork ends nobody."""
        readers, self._readers = self._readers, []
        for reader in readers:
            os.close(reader)
        pids, self.pids = self.pids, []
        if self._owner != os.getpid():
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _child(work: Work, mine: range, writer: int, *, keep: set[int], ahead_bytes: int, niceness: int) -> NoReturn:
    """Computes and sends its pieces. Never returns into the parent's code."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, who then ends its children
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        gc.disable()  # a collection would write to every shared page
        _close_all_but(keep | {0, 1, 2, writer})
        if niceness:
            os.nice(niceness)
        outbox = _Outbox(writer, ahead_bytes)
        for index in mine:
            try:
                kind, data = _RESULT, work(index)
            except BaseException as error:
                kind, data = _ERROR, _described(error)
            outbox.put(_FRAME.pack(kind, len(data)) + data)
            if kind == _ERROR:
                break
        outbox.flush()
        status = 0
    except BrokenPipeError:
        pass  # nobody wants the rest
    finally:
        os._exit(status)


def _close_all_but(keep: set[int]) -> None:
    """A child must not hold open what others wait to see closed: channels, lifelines, its siblings' pipes."""
    listing = Path("/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd")
    for descriptor in [int(entry.name) for entry in listing.iterdir()]:
        if descriptor not in keep:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(descriptor)


class _Outbox:
    """Writes what the pipe takes, and holds up to `ahead_bytes` more."""

    def __init__(self, descriptor: int, ahead_bytes: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._ahead_bytes = ahead_bytes
        self._waiting: deque[memoryview] = deque()
        self._bytes = 0
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)

    def put(self, frame: bytes) -> None:
        self._waiting.append(memoryview(frame))
        self._bytes += len(frame)
        self._send(self._ahead_bytes)

    def flush(self) -> None:
        self._send(0)

    def _send(self, leave: int) -> None:
        while self._waiting:
            try:
                written = os.write(self._descriptor, self._waiting[0])
            except BlockingIOError:
                if self._bytes <= leave:
                    return
                self._room.poll()
                continue
            self._bytes -= written
            if written == len(self._waiting[0]):
                self._waiting.popleft()
            else:
                self._waiting[0] = self._waiting[0][written:]


def _described(error: BaseException) -> bytes:
    """An error as JSON; of one that nobody raised on purpose only type and place, its text may show a secret."""
    if isinstance(error, SottoError):
        description: dict[str, object] = {
            "reason": meaning(error).reason,
            "message": error.message,
            "private": error.private,
            "metadata": error.metadata,
        }
        if isinstance(error, InvalidInput):
            description["violations"] = error.violations
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        description = {"private": f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"}
    return json.dumps(description).encode()


def _restored(data: bytes) -> SottoError:
    description = json.loads(data)
    if "reason" not in description:
        return WorkerError("a part of a batch could not be computed", private=description["private"])
    cls = BY_REASON.get(description["reason"], SottoError)
    error = cls(description["message"], private=description["private"])
    error.metadata = description["metadata"]
    if isinstance(error, InvalidInput):
        error.violations = description["violations"]
    return error
