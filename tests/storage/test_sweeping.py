"""What no row names and nobody uses leaves the disk without waiting for the next start, whoever left it there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Set
from pathlib import Path

import pytest
from sqlalchemy import Connection, MetaData

from src.errors import StorageError
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.leftovers import BlobUses
from src.storage.schema import FromMetadata
from src.storage.sweeping import Sweeper, trying

ROOT = Path(__file__).resolve().parents[2]


class Room:
    """Blobs, and who names them."""

    def __init__(self, directory: Path) -> None:
        self.database = Database(directory / "a.sqlite", FromMetadata(MetaData()))
        self.disk = Blobs(directory / "blobs")
        self.named: set[str] = set()
        self.broken = 0
        self.uses = BlobUses(self.database, self.disk, self)

    def blobs(self, _: Connection, *, among: Set[str] | None = None) -> set[str]:
        if self.broken:
            self.broken -= 1
            raise StorageError("the disk is full")
        return self.named

    def put(self, text: str) -> str:
        return self.disk.write(text.encode()).sha256

    def there(self, *digests: str) -> list[bool]:
        return [self.disk.exists(each) for each in digests]

    def parts(self) -> list[str]:
        return [path.name for path in self.disk.root.iterdir() if path.name.startswith(".incoming-")]


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    await room.database.open()
    yield room
    await room.database.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  a file that somebody else removes
            await asyncio.sleep(0.01)


# --- who stores something of which nothing comes ----------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), StorageError("full")], ids=repr)
async def test_what_was_stored_for_something_that_came_to_nothing_goes_at_once(
    room: Room, error: BaseException
) -> None:
    mine, shared = "", room.put("shared")
    room.named = {shared}
    with contextlib.suppress(type(error)), trying(room.uses) as kept:
        mine = room.put("mine")
        kept |= {mine, room.put("shared")}
        raise error
    await room.uses.settled()
    assert room.there(mine, shared) == [False, True]


async def test_what_a_row_names_stays_though_nobody_heard_that_it_was_written(room: Room) -> None:
    """The answer of a database can be lost, and a caller can go away while it writes."""
    mine = ""
    with contextlib.suppress(StorageError), trying(room.uses) as kept:
        mine = room.put("mine")
        kept.add(mine)
        room.named = {mine}
        raise StorageError("the answer was lost")
    await room.uses.settled()
    assert room.there(mine) == [True]


async def test_the_same_bytes_of_somebody_who_is_about_to_name_them_stay(room: Room) -> None:
    with trying(room.uses) as others:
        others.add(room.put("model"))
        with contextlib.suppress(ValueError), trying(room.uses) as kept:
            kept.add(room.put("model"))
            raise ValueError("refused")
        for _ in range(5):
            await room.database.run(lambda _: None)
        (model,) = kept
        assert room.there(model) == [True]
        room.named = {model}
    await room.uses.settled()
    assert room.there(model) == [True]


# --- what nobody lets go ----------------------------------------------------------------------------------------------


async def test_a_sweep_takes_what_nobody_names_uses_or_is_about_to_name(room: Room) -> None:
    named, orphan, used, stored = (room.put(text) for text in ("named", "orphan", "used", "stored"))
    room.named = {named}
    sweeper = Sweeper(room.uses, room.disk)
    with room.uses.using(used):
        with room.uses.storing():
            room.put("stored")
            sweeping = asyncio.create_task(sweeper.sweep())
            for _ in range(5):
                await room.database.run(lambda _: None)
            assert room.there(orphan, stored) == [True, True]  # whoever stores is waited for
            room.named |= {stored}
        await sweeping
        assert room.there(named, orphan, used, stored) == [True, False, True, True]
    await room.uses.settled()
    assert room.there(used) == [False]


async def test_half_written_files_of_processes_that_are_gone_go_and_those_that_are_written_stay(room: Room) -> None:
    """A worker killed in the middle of a batch, a request that went away while a file was opened for it."""
    writing = room.disk.writer()
    writing.write(b"on its way")
    lost = room.disk.writer()
    lost.write(b"nobody has this any more")
    part = lost._path
    lost._file.close()  # type: ignore[union-attr]
    del lost
    code = (
        "import os, sys, pathlib; from src.storage.blobs import Blobs\n"
        "writer = Blobs(pathlib.Path(sys.argv[1])).writer(); writer.write(b'x'); writer._file.flush()\n"
        "print(writer._path.name, flush=True); sys.stdin.read(); os._exit(9)"
    )
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", code, str(room.disk.root)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdout is not None
    theirs = (await worker.stdout.readline()).decode().strip()
    assert {theirs, part.name, writing._path.name} == set(room.parts())
    await Sweeper(room.uses, room.disk).sweep()
    assert {theirs, writing._path.name} == set(room.parts())
    await worker.communicate(b"")
    assert worker.returncode == 9
    await Sweeper(room.uses, room.disk).sweep()
    assert room.parts() == [writing._path.name]
    assert room.disk.read(writing.commit().sha256) == b"on its way"


async def test_a_part_whose_name_says_no_process_is_nobodys(room: Room) -> None:
    room.put("something")
    for name in (".incoming-0123abcd", f".incoming-{os.getpid()}-0123", ".incoming-99999999-0123"):
        (room.disk.root / name).touch()
    assert room.disk.remove_abandoned() == 3


async def test_sweeps_come_soon_after_somebody_ended_and_now_and_then_anyway_and_outlive_a_failure(room: Room) -> None:
    sweeper = Sweeper(room.uses, room.disk, every_s=3600.0, pause_s=0.0)
    running = asyncio.create_task(sweeper.run())
    first = room.put("first")
    sweeper.soon()
    await until(lambda: not room.disk.exists(first))
    room.broken = 1
    second = room.put("second")
    sweeper.soon()
    await until(lambda: not room.broken)
    sweeper.soon()
    await until(lambda: not room.disk.exists(second))
    running.cancel()
    now_and_then = asyncio.create_task(Sweeper(room.uses, room.disk, every_s=0.01, pause_s=0.0).run())
    third = room.put("third")
    await until(lambda: not room.disk.exists(third))
    now_and_then.cancel()
    await asyncio.gather(running, now_and_then, return_exceptions=True)
