"""Blobs: bytes stored under their own SHA-256, whole or not at all.

A blob is written to a temporary file in the store's root, flushed, renamed to `<first two digits>/<digest>`, and the
directories that changed are flushed too: after `commit` returns, neither a crash nor a power cut takes it back. There
is no state beside the files, so that worker processes may use the same directory as the role that owns it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from ..errors import DigestError, InvalidInput, NotFoundError, StateError, StorageError, StorageFullError
from ..files import DIRECTORY_MODE, SECRET_MODE, make_private_directory

CHUNK_BYTES: Final = 1 << 20
"""How much is read at once where a whole blob is hashed: large enough that the system calls do not show."""

Mark = tuple[int, int, int]
"""Tells the file that a blob is from one that is put in its place."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_TEMPORARY: Final = ".incoming-"
_PASSES: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO})
"""What `StorageFullError` is raised for; `sqlite` and `postgresql` have the same in their own words."""
_FULL_SYNC: Final = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the data in the drive's cache


@dataclass(frozen=True, slots=True)
class BlobRef:
    """The name of a blob.

    Attributes:
        sha256: 64 lower-case hexadecimal digits.
        size: bytes, ≥ 0.
    """

    sha256: str
    size: int


def check_digest(sha256: str) -> str:
    """Returns `sha256` if it is 64 lower-case hexadecimal digits, so that no name can point outside a store.

    Raises:
        InvalidInput: otherwise.
    """
    if not _DIGEST.fullmatch(sha256):
        raise InvalidInput("a blob is named by 64 lower-case hexadecimal digits", violations={"sha256": "not a digest"})
    return sha256


def flush(descriptor: int) -> None:
    """Makes what was written to an open file or directory durable."""
    if _FULL_SYNC is not None:
        fcntl.fcntl(descriptor, _FULL_SYNC)
    else:
        os.fsync(descriptor)


def flush_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


class BlobWriter:
    """A blob on its way in: `write` pieces, then `commit` or `abort`; leaving the `with` block uncommitted aborts.

    There is a file from the first byte on: whoever only waits for bytes holds none. `abort` may be called while another
    thread writes or commits: that one then leaves nothing.

    Raises:
        StorageError: of any method: the file system does not take it (full, read-only, …).
    """

    def __init__(self, store: Blobs) -> None:
        self._store = store
        self._hash = hashlib.sha256()
        self._size = 0
        self._path = store.root / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(16)}"
        with _WRITERS_LOCK:
            _WRITERS.add(self)
        self._file: BinaryIO | None = None
        self._over = self._abandoned = False
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Appends `chunk`."""
        with self._working():
            if chunk:
                self._open_file().write(chunk)
                self._hash.update(chunk)
                self._size += len(chunk)

    def commit(self, expected_sha256: str | None = None) -> BlobRef:
        """Stores what was written, durably, and returns its name. Storing the same bytes twice is one blob.

        Raises:
            DigestError: it is not `expected_sha256`; nothing is stored.
        """
        try:
            with self._working():
                digest = self._hash.hexdigest()
                if expected_sha256 is not None and digest != check_digest(expected_sha256):
                    text = "the bytes do not have the announced SHA-256"
                    raise DigestError(text, expected=expected_sha256, found=digest)
                file = self._open_file()
                file.flush()
                flush(file.fileno())
                file.close()
                self._store._adopt(self._path, digest)
                self._file, self._over = None, True
        except BaseException:
            self.abort()
            raise
        return BlobRef(digest, self._size)

    def abort(self) -> None:
        """Forgets what was written. Does nothing after `commit`."""
        self._abandoned = True
        if self._lock.acquire(blocking=False):  # else whoever holds it does this, once that is done
            try:
                self._discard()
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            with self._lock, _translated("stored"):
                if self._over:
                    raise StateError("this blob is committed or aborted already")
                yield
        finally:
            if self._abandoned:  # asked only now that whoever aborts would get the lock
                self.abort()

    def _discard(self) -> None:
        self._over = True
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes what is buffered: a full disk says so once more
                self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            make_private_directory(self._store.root)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, SECRET_MODE)
            self._file = os.fdopen(descriptor, "wb")
        return self._file


class Blobs:
    """A content-addressed directory. Directories are readable by the owner alone (0700), files too (0600).

    Args:
        root: the store's directory; made with the first blob.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def require_room(self, size: int) -> None:
        """Refuse to begin what ends in a blob of `size` bytes that the file system has no room for now.

        Raises:
            StorageFullError: it has not. (A quota is met when the blob is written.)
        """
        with _translated("stored"):
            directory = next(each for each in (self.root, *self.root.parents) if each.is_dir())
            free = shutil.disk_usage(directory).free
        if free < size:
            raise StorageFullError(f"there is no room for a blob of {size} bytes: {free} are free")

    def writer(self) -> BlobWriter:
        """Begins a blob whose digest is known when it ends."""
        return BlobWriter(self)

    def write(self, data: bytes | Iterable[bytes]) -> BlobRef:
        """Stores `data` (or the concatenation of its pieces), durably; writing the same bytes again is harmless.

        Raises:
            StorageError: the file system does not take it.
        """
        with self.writer() as writer:
            for chunk in (data,) if isinstance(data, bytes) else data:
                writer.write(chunk)
            return writer.commit()

    def path(self, sha256: str) -> Path:
        """Where the blob lies if it exists."""
        return self.root / check_digest(sha256)[:2] / sha256

    def exists(self, sha256: str) -> bool:
        """Whether there is such a blob."""
        return self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        """Its size in bytes.

        Raises:
            NotFoundError: no such blob.
        """
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            raise _missing(sha256) from None

    def open(self, sha256: str) -> BinaryIO:
        """Opens it for reading. What is read this way is not verified: see `read`.

        Raises:
            NotFoundError: no such blob.
        """
        try:
            return self.path(sha256).open("rb")
        except FileNotFoundError:
            raise _missing(sha256) from None

    def read(self, sha256: str) -> bytes:
        """The whole blob, verified.

        Raises:
            NotFoundError: no such blob.
            StorageError: its bytes do not have the digest they are stored under.
        """
        with _translated("read"), self.open(sha256) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _damaged(sha256)
        return data

    def verify(self, sha256: str) -> BlobRef:
        """Reads it piece by piece and returns its name and size; for blobs larger than memory.

        Raises:
            NotFoundError, StorageError: as `read`.
        """
        digest, size = hashlib.sha256(), 0
        with _translated("read"), self.open(sha256) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        if digest.hexdigest() != sha256:
            raise _damaged(sha256)
        return BlobRef(sha256, size)

    def collect(self, keep: Set[str]) -> int:
        """Removes every blob that is not in `keep`, and what interrupted writers left; returns how many files went.

        To be called while nobody writes: when a role starts, before its workers do. Files of other origin stay.
        """
        if not self.root.is_dir():
            return 0
        doomed = [path for path in self.root.iterdir() if path.name.startswith(_TEMPORARY)]
        for shard in self.root.iterdir():
            if len(shard.name) == 2 and shard.is_dir():
                doomed += [path for path in shard.iterdir() if _DIGEST.fullmatch(path.name) and path.name not in keep]
        for path in doomed:
            path.unlink(missing_ok=True)
        return len(doomed)

    def digests(self) -> set[str]:
        """Of all blobs there are."""
        shards = [path for path in self.root.iterdir() if len(path.name) == 2] if self.root.is_dir() else []
        return {path.name for shard in shards for path in shard.iterdir() if _DIGEST.fullmatch(path.name)}

    def remove_abandoned(self) -> int:
        """Removes what writers have left that are gone, of this process or of others, whoever writes meanwhile; returns
        how many files went."""
        parts = list(self.root.glob(f"{_TEMPORARY}*")) if self.root.is_dir() else []
        with _WRITERS_LOCK:  # looked at after the files: whoever began since has none among them
            own = {writer._path for writer in _WRITERS}
        gone = [path for path in parts if path not in own and not _is_written(path)]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    def mark(self, sha256: str) -> Mark | None:
        """Which file the blob is, None where there is none: storing the same bytes again makes it another one."""
        try:
            found = self.path(sha256).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns  # the number of a file that is gone is used again

    def remove(self, sha256: str, mark: Mark) -> bool:
        """Removes the blob if it is still the file of this mark, whoever stores meanwhile; returns whether it did."""
        path = self.path(sha256)
        with _locked(path.parent, fcntl.LOCK_EX):
            same = self.mark(sha256) == mark
            if same:
                path.unlink()
        return same

    def _adopt(self, temporary: Path, sha256: str) -> None:
        target = self.path(sha256)
        try:
            target.parent.mkdir(mode=DIRECTORY_MODE)
            flush_directory(self.root)
        except FileExistsError:
            pass
        with _locked(target.parent, fcntl.LOCK_SH) as directory:
            # Also where the blob exists: the bytes are the same, and a damaged copy is healed.
            temporary.replace(target)
            flush(directory)


def _is_written(path: Path) -> bool:
    """Whether the process that began a file may still be at it; not asked of a writer of this one."""
    pid = path.name.removeprefix(_TEMPORARY).partition("-")[0]
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's: a number that was used again
        return False
    return True


_WRITERS: Final[weakref.WeakSet[BlobWriter]] = weakref.WeakSet()
_WRITERS_LOCK: Final = threading.Lock()
"""Those of this process, as long as anybody has them."""


@contextlib.contextmanager
def _locked(directory: Path, lock: int) -> Iterator[int]:
    """The directory, open: nothing is removed from it while something is put there, in whatever process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, lock)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turns what the file system refuses into a `StorageError`; the path goes to the log only.

    Args:
        what: cannot be done with a blob.
    """
    try:
        yield
    except OSError as error:
        kind = StorageFullError if error.errno in _PASSES else StorageError
        raise kind(f"a blob cannot be {what}: {error.strerror}", private=str(error)) from error


def _missing(sha256: str) -> NotFoundError:
    return NotFoundError(f"there is no blob {sha256}")


def _damaged(sha256: str) -> StorageError:
    return StorageError(f"blob {sha256} is damaged: its bytes have another SHA-256", sha256=sha256)
