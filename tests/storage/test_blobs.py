"""The blob store: whole or not at all, under its own digest, readable by its owner alone."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.errors import DigestError, InvalidInput, NotFoundError, SottoError, StateError, StorageError, StorageFullError
from src.storage import blobs as blobs_module
from src.storage.blobs import BlobRef, Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def _files(blobs: Blobs) -> list[Path]:
    return [path for path in blobs.root.rglob("*") if path.is_file()]


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(pieces=st.lists(st.binary(max_size=200), max_size=6))
def test_what_is_written_in_pieces_is_read_back_whole_under_its_sha256(blobs: Blobs, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    ref = blobs.write(iter(pieces))
    assert ref == BlobRef(hashlib.sha256(data).hexdigest(), len(data))
    assert blobs.read(ref.sha256) == data
    assert blobs.verify(ref.sha256) == ref
    assert blobs.size(ref.sha256) == len(data)


def test_writing_the_same_bytes_twice_is_one_blob(blobs: Blobs) -> None:
    assert blobs.write(b"model") == blobs.write(b"model")
    assert len(_files(blobs)) == 1


def test_another_store_over_the_same_directory_sees_the_blob(blobs: Blobs) -> None:
    ref = blobs.write(b"model")
    with Blobs(blobs.root).open(ref.sha256) as file:
        assert file.read() == b"model"


def test_blobs_lie_in_shards_that_only_the_owner_can_enter(blobs: Blobs) -> None:
    path = blobs.path(blobs.write(b"private").sha256)
    assert path.parent.name == path.name[:2]
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (blobs.root, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_commit_against_another_digest_stores_nothing(blobs: Blobs) -> None:
    with blobs.writer() as writer:
        writer.write(b"tampered")
        with pytest.raises(DigestError):
            writer.commit(hashlib.sha256(b"original").hexdigest())
    assert _files(blobs) == []


def test_leaving_a_writer_uncommitted_leaves_nothing(blobs: Blobs) -> None:
    with blobs.writer() as writer:
        writer.write(b"half")
    assert _files(blobs) == []
    with pytest.raises(StateError):
        writer.write(b"more")


def test_a_blob_whose_bytes_changed_on_disk_is_not_returned_and_heals_when_written_again(blobs: Blobs) -> None:
    ref = blobs.write(b"a model of some bytes")
    blobs.path(ref.sha256).write_bytes(b"a model of same bytes")
    for verified in (blobs.read, blobs.verify):
        with pytest.raises(StorageError, match=ref.sha256):
            verified(ref.sha256)
    blobs.write(b"a model of some bytes")
    assert blobs.read(ref.sha256) == b"a model of some bytes"


REJECTIONS: list[tuple[str, Callable[[Blobs, str], object], type[SottoError]]] = [
    ("read of a missing blob", lambda blobs, _: blobs.read("0" * 64), NotFoundError),
    ("size of a missing blob", lambda blobs, _: blobs.size("0" * 64), NotFoundError),
    ("open of a missing blob", lambda blobs, _: blobs.open("0" * 64), NotFoundError),
    ("a name that climbs out of the store", lambda blobs, _: blobs.read("../../../etc/passwd"), InvalidInput),
    ("upper case", lambda blobs, digest: blobs.path(digest.upper()), InvalidInput),
    ("a digest and a newline", lambda blobs, digest: blobs.exists(digest + "\n"), InvalidInput),
]


@pytest.mark.parametrize(("call", "error"), [row[1:] for row in REJECTIONS], ids=[row[0] for row in REJECTIONS])
def test_refused(blobs: Blobs, call: Callable[[Blobs, str], object], error: type[SottoError]) -> None:
    with pytest.raises(error):
        call(blobs, hashlib.sha256(b"x").hexdigest())


def test_a_store_that_cannot_be_written_says_so_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        Blobs(tmp_path / "file" / "blobs").write(b"x")
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("name", ["fsync", "open"])
def test_what_somebody_may_mend_under_it_passes_and_is_named(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def fails(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, name, fails)
        with pytest.raises(StorageFullError, match=os.strerror(number)):
            blobs.write(b"x")
    kept = blobs.write(b"x")
    with monkeypatch.context() as broken:
        broken.setattr(Blobs, "open", fails)
        with pytest.raises(StorageFullError, match=f"read: {os.strerror(number)}"):
            blobs.read(kept.sha256)
    assert blobs.read(kept.sha256) == b"x"


def test_a_writer_killed_before_its_commit_leaves_no_blob_and_its_remains_are_collected(blobs: Blobs) -> None:
    script = (
        "import os, sys; from pathlib import Path; from src.storage.blobs import Blobs\n"
        "writer = Blobs(Path(sys.argv[1])).writer(); writer.write(b'x' * 100_000); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(blobs.root)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    assert len(_files(blobs)) == 1
    kept = blobs.write(b"kept")
    assert blobs.collect({kept.sha256}) == 1
    assert _files(blobs) == [blobs.path(kept.sha256)]


def test_collect_removes_orphans_and_nothing_of_other_origin(blobs: Blobs) -> None:
    assert blobs.collect(set()) == 0
    kept, orphan = blobs.write(b"kept"), blobs.write(b"orphan")
    (blobs.root / "README").write_text("not ours")
    assert blobs.collect({kept.sha256}) == 1
    assert blobs.exists(kept.sha256)
    assert not blobs.exists(orphan.sha256)
    assert (blobs.root / "README").exists()


def test_file_then_directories_are_flushed_before_commit_returns(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that makes a blob durable: its bytes, its name; then whoever refers to it."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        steps.append("flush directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr("src.storage.blobs._FULL_SYNC", None)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    blobs.write(b"durable")
    assert steps == ["flush file", "flush directory", "rename", "flush directory"]


def test_a_writer_has_no_file_before_its_first_byte(blobs: Blobs) -> None:
    with blobs.writer() as writer:
        writer.write(b"")
        assert not blobs.root.exists() or not any(blobs.root.iterdir())
        writer.write(b"x")
        assert len(list(blobs.root.iterdir())) == 1
    assert not any(blobs.root.iterdir())
    with blobs.writer() as writer:
        empty = writer.commit()
    assert blobs.read(empty.sha256) == b""


@pytest.mark.parametrize("when", ["flush", "first byte"])
def test_a_writer_that_is_given_up_while_a_thread_works_on_it_leaves_nothing(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The caller of an upload leaves; whoever writes for it is in a thread that nobody can stop, wherever it is."""
    at_work, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any, **options: Any) -> Any:
        at_work.set()
        assert go_on.wait(60)
        return original(*arguments, **options)

    writer = blobs.writer()
    if when == "flush":
        writer.write(b"x" * 1000)
        original: Any = blobs_module.flush
        monkeypatch.setattr(blobs_module, "flush", held)
        work: Callable[[], object] = writer.commit
    else:
        original = os.open
        monkeypatch.setattr(os, "open", held)
        work = partial(writer.write, b"x")
    thread = threading.Thread(target=work)
    thread.start()
    assert at_work.wait(60)
    writer.abort()  # at once, not after the thread
    go_on.set()
    thread.join(60)
    left = [path.name for path in blobs.root.iterdir() if path.name.startswith(".incoming")]
    assert left == []
    with pytest.raises(StateError):
        writer.write(b"more")
