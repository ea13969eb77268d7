"""What no row names leaves the disk, and nothing that somebody stored a moment ago and is about to name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Set
from pathlib import Path

import pytest
from sqlalchemy import Connection, MetaData

from src.errors import StorageError
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.leftovers import Leftovers
from src.storage.schema import FromMetadata


class Room:
    """Blobs, and who names them."""

    def __init__(self, directory: Path) -> None:
        self.database = Database(directory / "a.sqlite", FromMetadata(MetaData()))
        self.disk = Blobs(directory / "blobs")
        self.named: set[str] = set()
        self.of: dict[str, set[str]] = {}
        self.broken = False
        self.leftovers = Leftovers(self.database, self.disk, self)

    def blobs(self, _: Connection, *, among: Set[str] | None = None) -> set[str]:
        if self.broken:
            raise StorageError("the disk is full")
        return self.named

    def blobs_of(self, _: Connection, job_id: str) -> set[str]:
        return self.of[job_id]

    def put(self, text: str) -> str:
        return self.disk.write(text.encode()).sha256

    async def looked(self) -> None:
        """Once whoever drops has looked at the files and waits for nothing but those who store."""
        while not any(f._callbacks for f in self.leftovers._storing):  # noqa: ASYNC110  # who waits has one with each
            await asyncio.sleep(0)


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    await room.database.open()
    yield room
    await room.database.close()


async def test_what_a_deleted_job_alone_named_goes_and_what_others_name_stays(room: Room) -> None:
    mine, shared, others = room.put("mine"), room.put("shared"), room.put("others")
    room.of, room.named = {"j": {mine, shared, "0" * 64}}, {shared}
    await room.leftovers.drop("j")
    assert [room.disk.exists(each) for each in (mine, shared, others)] == [False, True, True]
    await room.leftovers.drop("j")  # once is as good as twice
    assert await room.leftovers.collect() == 1  # whatever is named by nothing, as at a start
    assert [room.disk.exists(each) for each in (shared, others)] == [True, False]


@pytest.mark.parametrize("names", [True, False])
async def test_what_somebody_stored_who_has_not_named_it_yet_is_not_touched_before_they_ended(
    names: bool, room: Room
) -> None:
    model = room.put("model")
    room.of = {"j": {model}}
    with room.leftovers.storing():
        room.put("model")
        dropping = asyncio.create_task(room.leftovers.drop("j"))
        await room.looked()
        assert room.disk.exists(model)
        assert not dropping.done()
        if names:
            room.named = {model}
    await dropping
    assert room.disk.exists(model) == names


async def test_whoever_begins_to_store_later_is_not_waited_for_and_keeps_what_they_stored(room: Room) -> None:
    model, mine = room.put("model"), room.put("mine")
    room.of = {"j": {model, mine}}
    with room.leftovers.storing():
        dropping = asyncio.create_task(room.leftovers.drop("j"))
        await room.looked()
        later = room.leftovers.storing()
        later.__enter__()
        room.put("model")  # as another worker does it, whom nobody asks
    await dropping
    assert [room.disk.exists(each) for each in (model, mine)] == [True, False]
    later.__exit__(None, None, None)


async def test_a_failure_leaves_everything_to_the_next_start_and_breaks_nothing(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    model = room.put("model")
    room.of, room.broken = {"j": {model}}, True
    await room.leftovers.drop("j")
    assert room.disk.exists(model)
    assert "collected at the next start" in caplog.text


async def test_what_several_use_goes_when_the_last_of_them_lets_go(room: Room) -> None:
    model = room.put("model")
    with room.leftovers.using(model):
        with room.leftovers.using(model, model):
            pass
        await room.leftovers.settled()
        assert room.disk.exists(model)
    await room.leftovers.settled()
    assert not room.disk.exists(model)


async def test_what_a_row_names_stays_when_whoever_used_it_lets_go(room: Room) -> None:
    batch = room.put("batch")
    room.named = {batch}
    with room.leftovers.using(batch):
        pass
    await room.leftovers.settled()
    assert room.disk.exists(batch)
    room.named = set()
    room.leftovers.let_go([batch, "", "0" * 64])
    await room.leftovers.settled()
    assert not room.disk.exists(batch)


async def test_what_is_stored_again_and_used_while_somebody_lets_go_of_it_stays(room: Room) -> None:
    """Between the look at the file and its removal."""
    model = room.put("model")
    with room.leftovers.storing():
        room.leftovers.let_go([model])
        await room.looked()
        using = room.leftovers.using(model)
        using.__enter__()
        room.put("model")
    await room.leftovers.settled()
    assert room.disk.exists(model)
    using.__exit__(None, None, None)
    await room.leftovers.settled()
    assert not room.disk.exists(model)


async def test_what_a_worker_is_storing_for_another_is_not_taken_from_it(room: Room) -> None:
    """Its digest is known to nobody yet, and may be that of what is let go."""
    model = room.put("model")
    with room.leftovers.storing():
        room.leftovers.let_go([model])
        await room.looked()
        assert room.disk.exists(model)
        room.named = {room.put("model")}
    await room.leftovers.settled()
    assert room.disk.exists(model)


def test_a_file_is_removed_only_as_the_one_that_was_looked_at(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    sha256 = blobs.write(b"x").sha256
    mark = blobs.mark(sha256)
    assert mark is not None
    blobs.write(b"x")
    assert not blobs.remove(sha256, mark)
    again = blobs.mark(sha256)
    assert again is not None
    assert blobs.remove(sha256, again)
    assert not blobs.remove(sha256, again)
    assert (blobs.mark(sha256), blobs.exists(sha256)) == (None, False)
