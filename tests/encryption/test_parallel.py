"""Forked children: results in order, errors by name, and nothing left behind however it ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from src.encryption import parallel
from src.encryption.parallel import Crew, fan_out, pieces, worthwhile
from src.errors import BatchError, CiphertextError, ShareError, WorkerError

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def nothing_left() -> Iterator[None]:
    """Neither a descriptor nor a child, dead or alive."""
    process = psutil.Process()
    before = process.num_fds(), {child.pid for child in process.children()}
    yield
    assert (process.num_fds(), {child.pid for child in process.children()}) == before


def number(piece: int) -> bytes:
    return piece.to_bytes(4, "big")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 40])
def test_results_come_in_order_however_many_processes_there_are(processes: int, count: int) -> None:
    with nothing_left():
        assert list(fan_out(number, count, processes=processes)) == [number(piece) for piece in range(count)]


def test_the_work_is_done_by_others_side_by_side() -> None:
    pids = set(fan_out(lambda _: number(os.getpid()), 6, processes=3))
    assert len(pids) == 3
    assert number(os.getpid()) not in pids
    assert set(fan_out(lambda _: number(os.getpid()), 6, processes=1)) == {number(os.getpid())}


def test_results_larger_than_a_pipe_come_whole() -> None:
    results = list(fan_out(lambda piece: bytes([piece]) * 1_000_000, 5, processes=2))
    assert results == [bytes([piece]) * 1_000_000 for piece in range(5)]


def failing(error: Exception) -> Callable[[int], bytes]:
    def work(piece: int) -> bytes:
        if piece == 3:
            raise error
        return number(piece)

    return work


def test_an_error_comes_back_as_what_it_was_after_the_results_before_it() -> None:
    for error in (
        CiphertextError("ciphertext 7 is none", index=7, private="for the log"),
        BatchError("body: cut short", violations={"body": "cut short"}, field="body"),
        ShareError("the share of holder 2 is refused", index=2),
    ):
        seen: list[bytes] = []
        with nothing_left(), pytest.raises(type(error)) as caught:
            seen.extend(fan_out(failing(error), 9, processes=2))
        assert seen == [number(piece) for piece in range(3)]
        assert caught.value.message == error.message
        assert caught.value.private == error.private
        assert caught.value.metadata == error.metadata
        assert getattr(caught.value, "violations", None) == getattr(error, "violations", None)


def test_of_any_other_error_only_type_and_place_are_told() -> None:
    with nothing_left(), pytest.raises(WorkerError) as caught:
        list(fan_out(failing(ValueError("the secret is 42")), 9, processes=2))
    assert "ValueError at test_parallel.py:" in caught.value.private
    assert "42" not in caught.value.private + caught.value.message


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_child_that_dies_is_an_error_and_leaves_nothing(how: signal.Signals | None) -> None:
    def work(piece: int) -> bytes:
        if piece == 4:
            os._exit(3) if how is None else os.kill(os.getpid(), how)
        return number(piece)

    with nothing_left(), pytest.raises(WorkerError, match="died") as caught:
        list(fan_out(work, 9, processes=2))
    assert caught.value.private == f"exit status {3 if how is None else -how}"


def test_what_is_not_read_to_its_end_leaves_nothing() -> None:
    with nothing_left():
        results = fan_out(number, 1000, processes=3)
        assert next(results) == number(0)
        results.close()
    with nothing_left(), Crew(number, 1000, processes=3):
        pass


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_not_the_childrens_to_handle() -> None:
    def work(piece: int) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return number(piece)

    assert list(fan_out(work, 4, processes=2)) == [number(piece) for piece in range(4)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_child_holds_nothing_open_but_what_it_was_given() -> None:
    """Somebody may be waiting for the other end to close: a sibling's pipe, the channel of a worker."""
    reader, writer = os.pipe()

    def work(_: int) -> bytes:
        return ",".join(sorted(entry.name for entry in Path("/proc/self/fd").iterdir())).encode()

    try:
        for listing in fan_out(work, 3, processes=3, files=[writer]):
            descriptors = {int(name) for name in listing.decode().split(",")}
            assert writer in descriptors
            assert reader not in descriptors
            assert len(descriptors) <= 6  # standard streams, what was given, its pipe, the listing itself
    finally:
        os.close(reader)
        os.close(writer)


def test_children_work_ahead_of_a_reader_who_is_busy() -> None:
    reader, writer = os.pipe()

    def work(piece: int) -> bytes:
        os.write(writer, b".")
        return bytes(100_000)

    with Crew(work, 20, processes=2, files=[writer], ahead_bytes=2_000_000) as crew:
        os.close(writer)
        done = b""
        while part := os.read(reader, 20):  # until both have closed it: all is computed, nothing is read yet
            done += part
            if len(done) == 20:
                break
        assert len(done) == 20
        assert sum(map(len, crew)) == 2_000_000
    os.close(reader)


def test_children_wait_for_a_reader_who_never_comes_with_little_in_hand() -> None:
    """Memory: what the pipe takes, `ahead_bytes`, and the result that is one too many."""
    reader, writer = os.pipe()

    def work(piece: int) -> bytes:
        os.write(writer, b".")
        return bytes(100_000)

    with Crew(work, 1000, processes=1, files=[writer], ahead_bytes=300_000) as crew:
        os.close(writer)
        child = psutil.Process(crew.pids[0])
        done = len(os.read(reader, 1))
        # Half a second of nothing, and not because this machine is busy: it waits.
        while (found := select.select([reader], [], [], 0.5)[0]) or child.status() != psutil.STATUS_SLEEPING:
            done += len(os.read(reader, 1000)) if found else 0
        assert done <= 6
    os.close(reader)


def test_children_end_with_a_parent_that_was_killed() -> None:
    """They hold the only write end of a pipe that this test reads to its end."""
    reader, writer = os.pipe()
    code = (
        "import os, sys; from src.encryption.parallel import Crew\n"
        "crew = Crew(lambda piece: bytes(100_000), 10**9, processes=2, files=[int(sys.argv[1])])\n"
        "results = iter(crew); next(results); os.write(int(sys.argv[1]), b'x'); next(results)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(writer)], cwd=ROOT, pass_fds=[writer])
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert select.select([reader], [], [], 60)[0]
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_copy_in_a_fork_ends_nobodys_children() -> None:
    with Crew(number, 4, processes=2) as crew:
        pid = os.fork()
        if pid == 0:
            crew.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert list(crew) == [number(piece) for piece in range(4)]


def test_small_work_is_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    least = parallel.SMALLEST_PART_PRODUCTS
    assert worthwhile(4, 0) == worthwhile(4, 2 * least - 1) == 1
    assert worthwhile(4, 2 * least) == 2
    assert worthwhile(4, 100 * least) == 4
    monkeypatch.delattr(os, "fork")
    assert worthwhile(4, 100 * least) == 1


@pytest.mark.parametrize("count", [0, 1, 7, 64, 65, 1000, 100_000])
@pytest.mark.parametrize("processes", [1, 2, 16])
def test_pieces_cover_everything_once_and_are_neither_large_nor_few(count: int, processes: int) -> None:
    parts = pieces(count, processes)
    assert [item for part in parts for item in part] == list(range(count))
    assert all(0 < len(part) <= parallel.LARGEST_PIECE for part in parts)
    assert len(parts) >= min(count, 8 * processes) // 2
