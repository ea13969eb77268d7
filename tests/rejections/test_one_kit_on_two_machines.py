"""One kit on two machines: the first process stays and works, the second is refused by name and told what to do, and
takes over as soon as the first one is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from src.aggregator import sessions as sessions_module
from src.aggregator.sessions import Sessions
from src.cli.status import status_lines
from src.communication import options
from src.errors import TwinError
from src.party import standing
from tests.rejections.cheating import PATIENCE_S, PartyNode
from tests.rejections.whole import Whole

MANY = 20
"""Attempts of a second process: each would have thrown the first one out."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(standing, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(standing, "QUIET_S", 0.1)


@pytest.fixture
async def whole(tmp_path: Path, reserved_address: Callable[[], AbstractContextManager[str]]) -> AsyncIterator[Whole]:
    """a and b are at work."""
    with reserved_address() as address:
        whole = Whole(tmp_path, address, set_up="kit, custody aggregator")
        await whole.start_aggregator()
        async with contextlib.AsyncExitStack() as ends:
            ends.push_async_callback(whole.app.stop)
            for party in whole.parties.values():
                await party.start()
                ends.push_async_callback(party.stop)
            await until(lambda: whole.app._sessions.connected == {"a", "b"})
            yield whole


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what happens is another role's, which has no event to show
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def second(whole: Whole, state: Path, address: str = "") -> AsyncIterator[PartyNode]:
    """Another process with the kit of a."""
    node = PartyNode(whole.parties["a"].config.model_copy(update={"state_dir": state}), address or whole.address)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


def refused(whole: Whole) -> int:
    twin = whole.app._sessions._twins.get("a")
    return twin.times if twin else 0


@pytest.mark.parametrize("copied", [False, True], ids=["a kit", "a kit with its state"])
async def test_the_first_process_works_on_and_the_second_waits_and_says_what_to_do(
    whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture, copied: bool
) -> None:
    caplog.set_level(logging.INFO, "sotto.party")
    first = whole.app._sessions._open["a"]
    if copied:
        await whole.parties["a"].stop()
        shutil.copytree(whole.parties["a"].config.state_dir, tmp_path / "second")
        await whole.parties["a"].start()
        await until(lambda: whole.app._sessions._open.get("a", first) is not first)
        first = whole.app._sessions._open["a"]
    async with second(whole, tmp_path / "second") as twin:
        await until(lambda: refused(whole) >= MANY)
        assert whole.app._sessions._open["a"] is first
        await whole.works()
        async with whole.scientist() as client:
            (line,) = [each for each in status_lines(await client.status()) if each.startswith("warning")]
        assert "a: another process uses the same kit: refused" in line
        said = [record.getMessage() for record in caplog.records if "KIT_IN_USE" in record.getMessage()]
        assert len(said) == 1
        assert "another process uses the kit of party a (at 127.0.0.1 since" in said[0]
        assert "stop one of the two" in said[0]
        warned = [
            each
            for each in caplog.records
            if each.levelno == logging.WARNING and "kit of party a" in each.msg % each.args
        ]
        assert len([each for each in warned if each.name == "sotto.aggregator"]) == 1
        assert not twin._task.done()


async def test_a_process_that_went_silent_keeps_its_place_until_its_connection_is_known_to_be_dead(
    tmp_path: Path, reserved_address: Callable[[], AbstractContextManager[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut of power, or a machine that was put to sleep: nothing says that it is gone."""
    monkeypatch.setattr(options, "PING_TIMEOUT_S", 1)
    with reserved_address() as address:
        whole = Whole(tmp_path, address, set_up="kit, custody aggregator", heartbeat_interval_s=1)
        await whole.start_aggregator()
        ends = contextlib.AsyncExitStack()
        ends.push_async_callback(whole.app.stop)
        async with ends, silenced(address) as (door, silence), second(whole, tmp_path / "first", door) as first:
            await until(lambda: "a" in whole.app._sessions.connected)
            before = whole.app._sessions._open["a"]
            silence()
            async with second(whole, tmp_path / "second"):
                await until(lambda: refused(whole) > 0)
                await until(lambda: whole.app._sessions._open.get("a", before) is not before)
                assert not first._task.done()


@contextlib.asynccontextmanager
async def silenced(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A way to an address that passes nothing on any more once it is told so, and ends no connection."""
    passing, pipes = asyncio.Event(), set[asyncio.Task[None]]()
    passing.set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await passing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        there = await asyncio.open_connection(host, int(port))
        for pipe in (pass_on(reader, there[1]), pass_on(there[0], writer)):
            pipes.add(asyncio.ensure_future(pipe))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", passing.clear
    finally:
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)
        server.close()


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_a_newer_stream_of_the_same_process_ends_the_older_at_once() -> None:
    sessions = Sessions()
    older = sessions.open("a", "one")
    newer = sessions.open("a", "one")
    assert older.queue.get_nowait() is None
    assert newer.queue.empty()
    sessions.close(older)
    assert sessions.connected == {"a"}


def test_another_process_is_refused_while_the_first_lives_whoever_says_it_first() -> None:
    now = [1_800_000_000.0]
    sessions = Sessions(clock=lambda: now[0])
    first = sessions.open("a", "one", host="10.0.0.1")
    for ask in (sessions.check_place, sessions.open):
        with pytest.raises(TwinError, match=r"at 10\.0\.0\.1 since 2027-01-15 08:00:00 UTC"):
            ask("a", "two", host="10.0.0.2")
    sessions.open("b", "two")  # of another party it is none of their business
    assert first.queue.empty()
    assert sessions.warnings("a") == (
        "another process uses the same kit: refused 2 times, last at 2027-01-15 08:00:00 UTC",
    )
    assert sessions.refused == {}, "a itself is not refused: it works"
    now[0] += sessions_module.TWIN_SHOWN_S + 1
    assert sessions.warnings("a") == ()
    sessions.close(first)
    sessions.open("a", "two")
