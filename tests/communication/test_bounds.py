"""What one caller may hold of a server: over real servers, by callers who go over it, and beside callers who do not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from src.communication import grpc_server, options
from src.communication.bounds import Bounds
from src.communication.calls import Call, CallCounts, current_call
from src.communication.generated import federation_pb2, federation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from src.communication.identity import Identity
from src.errors import AbandonedError, BusyError, DeadlineError, StateError, UnavailableError
from tests.communication.raw_http2 import RawCaller

SHORT_S: Final = 0.5
PATIENCE_S: Final = 30.0  # only a hang reaches it
GET: Final = "/sotto.v1.JobService/GetJob"
DOWNLOAD: Final = "/sotto.v1.JobService/DownloadArtifact"
UPLOAD: Final = "/sotto.v1.FederationService/UploadUpdate"
WATCH: Final = "/grpc.health.v1.Health/Watch"


def jobs(channel: grpc.aio.Channel) -> Any:
    return jobs_pb2_grpc.JobServiceStub(channel)


async def get(channel: grpc.aio.Channel) -> str:
    return str((await jobs(channel).GetJob(jobs_pb2.GetJobRequest(), timeout=PATIENCE_S)).owner)


async def download(channel: grpc.aio.Channel, pause_s: float = 0.0) -> bytes:
    found = b""
    async for chunk in jobs(channel).DownloadArtifact(jobs_pb2.DownloadArtifactRequest()):
        found += chunk.data
        await asyncio.sleep(pause_s)
    return found


async def raises(call: Awaitable[Any]) -> BaseException:
    """What a call ends with."""
    async with asyncio.timeout(PATIENCE_S):
        found: Any = (await asyncio.gather(call, return_exceptions=True))[0]
    assert isinstance(found, BaseException), f"it went well: {found!r}"
    return found


class Held:
    """What the servicer does when it is called: counts, and waits until it is let go."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self.go_on = asyncio.Event()

    async def act(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.go_on.wait()
        finally:
            self.now -= 1

    async def until(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.now != number:  # noqa: ASYNC110  # what changes it is a servicer, with no event to set
                await asyncio.sleep(0.005)


@pytest.fixture
async def raw() -> AsyncIterator[Callable[..., Awaitable[RawCaller]]]:
    """Callers over a connection of their own, closed after the test."""
    made: list[RawCaller] = []

    async def connect(port: int, **settings: Any) -> RawCaller:
        made.append(await RawCaller.connect(port, **settings))
        return made[-1]

    yield connect
    for each in made:
        await each.close()


Start = Callable[..., Awaitable[Any]]


@pytest.fixture
def bounded(start_server: Any) -> Start:
    """A server without TLS that lets everybody have what the test says."""

    async def start(**bounds: Any) -> Any:
        return await start_server(tls=None, insecure=True, bounds=Bounds(**bounds))

    return start


def as_(open_channel: Any, running: Any, name: str, role: str = "scientist") -> grpc.aio.Channel:
    channel = open_channel(running.address, insecure=True, identity=Identity(role, name))  # type: ignore[arg-type]
    assert isinstance(channel, grpc.aio.Channel)
    return channel


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "call"), [("streams", download), ("requests", get)])
async def test_a_caller_with_as_many_calls_as_allowed_is_told_so_and_nobody_else_notices(
    bounded: Start, open_channel: Any, raw: Any, what: str, call: Callable[[grpc.aio.Channel], Awaitable[Any]]
) -> None:
    """Over any number of connections; what has ended makes room again."""
    running, held = await bounded(streams=3, requests=3), Held()
    running.behaviour.act = held.act
    elsewhere = await raw(running.port, identity="scientist/eve")
    elsewhere.call({"streams": DOWNLOAD, "requests": GET}[what], b"")
    channel = as_(open_channel, running, "eve")
    first = [asyncio.ensure_future(call(channel)) for _ in range(2)]
    await held.until(3)
    error = await raises(call(channel))
    assert isinstance(error, BusyError)
    assert error.metadata == {"limit": "3", "what": what}
    assert f"scientist/eve has 3 {what} under way" in error.message
    assert held.most == 3

    other = asyncio.ensure_future(call(as_(open_channel, running, "ada")))
    await held.until(4)
    held.go_on.set()
    await asyncio.gather(*first, other)
    assert await call(channel)


async def test_who_follows_as_much_as_they_may_can_still_ask(bounded: Start, open_channel: Any) -> None:
    running, held = await bounded(streams=1, requests=1), Held()
    running.behaviour.act = held.act
    channel = as_(open_channel, running, "eve")
    following = asyncio.ensure_future(download(channel))
    await held.until(1)
    running.behaviour.act = None
    assert await get(channel) == "scientist/eve"
    held.go_on.set()
    await following


async def test_a_caller_that_goes_away_holds_nothing(bounded: Start, open_channel: Any) -> None:
    running, held = await bounded(requests=1), Held()
    running.behaviour.act = held.act
    channel = as_(open_channel, running, "eve")
    for _ in range(5):
        gone = asyncio.ensure_future(get(channel))
        await held.until(1)
        gone.cancel()
        await held.until(0)
    held.go_on.set()
    assert await get(channel) == "scientist/eve"


async def test_calls_are_counted_before_a_byte_of_their_request_has_come(
    bounded: Start, open_channel: Any, raw: Any
) -> None:
    """Headers are enough to hold a place; whoever sends nothing more loses it, and others never lacked it."""
    running = await bounded(requests=2, streams=2, silence_s=SHORT_S)
    eve = await raw(running.port)
    silent = [eve.call(GET), eve.call(GET)]
    refused = [eve.call(GET), eve.call(GET)]
    await eve.until_ended(*refused)
    assert eve.connected
    assert await get(as_(open_channel, running, "ada")) == "scientist/ada"
    await eve.until_ended(*silent)
    assert await get(as_(open_channel, running, "eve")) == "scientist/eve"
    assert running.behaviour.callers == ["scientist/ada", "scientist/eve"]


async def test_without_an_identity_all_count_as_one(bounded: Start, open_channel: Any) -> None:
    """Health answers everybody who got through the handshake: so many at a time, and members beside them."""
    running = await bounded(streams=2)

    def watch(channel: grpc.aio.Channel) -> Any:
        return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

    watches = []
    for _ in range(2):
        watches.append(watch(open_channel(running.address, insecure=True)))
        assert (await watches[-1].read()).status == health_pb2.HealthCheckResponse.SERVING
    error = await raises(watch(open_channel(running.address, insecure=True)).read())
    assert isinstance(error, BusyError)
    assert (await watch(as_(open_channel, running, "ada")).read()).status


async def test_more_calls_than_http2_lets_one_connection_have_are_refused_first(
    bounded: Start, open_channel: Any
) -> None:
    """What a client keeps back by itself would wait in silence, for as long as the others last: nobody is left to that.
    (Of so many at once gRPC itself turns some away, as a server that cannot be reached now: they may come again.)"""
    running, held = await bounded(streams=2, requests=2), Held()
    channel = as_(open_channel, running, "eve")
    assert await get(channel)  # it has heard how many it may send
    running.behaviour.act = held.act
    calls = [asyncio.ensure_future(download(channel)) for _ in range(50)]
    waiting = set(calls)
    async with asyncio.timeout(PATIENCE_S):
        while len(waiting) > 2:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    told = [each.exception() for each in calls if each.done()]
    assert {type(error) for error in told} <= {BusyError, UnavailableError}
    assert any(isinstance(error, BusyError) for error in told)
    held.go_on.set()
    await asyncio.gather(*waiting)


def test_counts_that_are_not_used_are_forgotten() -> None:
    counts = CallCounts(streams=1, requests=1)
    for number in range(1000):
        taken = [counts.take(str(number), streams=streams) for streams in (True, False)]
        with pytest.raises(BusyError):
            counts.take(str(number), streams=True)
        for give_back in taken:
            give_back()
    assert not counts._held


# --- for how long -----------------------------------------------------------------------------------------------------


async def _upload(channel: grpc.aio.Channel, pieces: list[bytes], *, pause_s: float, end: bool = True) -> Any:
    async def requests() -> AsyncIterator[Any]:
        for piece in pieces:
            yield federation_pb2.UploadUpdateRequest(body=piece)
            await asyncio.sleep(pause_s)
        if not end:
            await asyncio.sleep(PATIENCE_S)

    return await federation_pb2_grpc.FederationServiceStub(channel).UploadUpdate(requests())


async def test_an_upload_that_brings_nothing_more_ends_and_one_that_is_slow_does_not(
    bounded: Start, open_channel: Any
) -> None:
    """What counts is that something comes, not how long it takes altogether."""
    running = await bounded(silence_s=SHORT_S)
    data = running.behaviour.data
    slow = asyncio.ensure_future(
        _upload(as_(open_channel, running, "a", "party"), [data[at : at + 10] for at in range(0, 100, 10)], pause_s=0.2)
    )
    error = await raises(_upload(as_(open_channel, running, "b", "party"), [data[:50]], pause_s=0, end=False))
    assert isinstance(error, DeadlineError)
    assert "nothing came for 0.5 s" in error.message
    assert not slow.done()  # it takes two seconds
    assert (await slow).accepted


@pytest.mark.parametrize("method", [DOWNLOAD, GET])
async def test_a_caller_that_does_not_take_its_answer_is_hung_up_on_and_holds_nothing(
    bounded: Start, open_channel: Any, raw: Any, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its windows are shut, so that not even the end of its calls would reach it."""
    running = await bounded(streams=2, requests=2, silence_s=SHORT_S)
    running.behaviour.data = bytes(1000)
    eve = await raw(running.port)
    for _ in range(2):
        eve.call(method, b"")
    await eve.until_hung_up()
    assert "scientist/eve at ipv4:127.0.0.1:" in caplog.text
    for _ in range(3):  # two at a time would be too many if one were still held
        assert await get(as_(open_channel, running, "eve")) == "scientist/eve"
        assert await download(as_(open_channel, running, "eve"))


async def test_a_slow_reader_gets_everything(bounded: Start, open_channel: Any) -> None:
    running = await bounded(silence_s=SHORT_S)
    running.behaviour.data = bytes(120)
    began = time.monotonic()
    assert await download(as_(open_channel, running, "ada"), pause_s=0.1) == bytes(120)
    assert time.monotonic() - began > 2 * SHORT_S


async def test_a_watch_of_the_server_s_health_lasts_only_so_long(
    start_server: Any, open_channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "OPEN_STREAM_S", SHORT_S)
    running = await start_server(tls=None, insecure=True)
    watch = health_pb2_grpc.HealthStub(as_(open_channel, running, "eve")).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    error = await raises(watch.read())
    assert isinstance(error, UnavailableError)
    assert "open it again" in error.message


async def test_a_question_about_services_that_does_not_come_ends_the_stream(
    start_server: Any, open_channel: Any
) -> None:
    running = await start_server(tls=None, insecure=True, reflection=True, bounds=Bounds(silence_s=SHORT_S))
    stub = reflection_pb2_grpc.ServerReflectionStub(as_(open_channel, running, "eve"))
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await call.read()).list_services_response.service
    error = await raises(call.read())
    assert isinstance(error, DeadlineError)


async def test_who_watches_health_and_does_not_read_does_not_keep_a_server_from_stopping(
    start_server: Any, raw: Any
) -> None:
    running = await start_server(tls=None, insecure=True)
    eve = await raw(running.port)
    await eve.until_answered(eve.call(WATCH, b""))
    began = time.monotonic()
    await running.server.stop(0)
    assert time.monotonic() - began < 10  # not the minute after which it would be hung up on


# --- one call, ended by others ----------------------------------------------------------------------------------------


async def test_a_call_can_be_ended_from_outside_and_says_why(bounded: Start, open_channel: Any) -> None:
    running, held = await bounded(), Held()
    calls: list[Call] = []

    async def act() -> None:
        calls.append(current_call())
        await held.act()

    running.behaviour.act = act
    asked = asyncio.ensure_future(get(as_(open_channel, running, "ada")))
    await held.until(1)
    calls[0].end(StateError("the round is over"))
    calls[0].end(AbandonedError("too late: it ends once"))
    error = await raises(asked)
    assert (type(error), str(error)) == (StateError, "the round is over")
    assert held.now == 0
    calls[0].end(StateError("over already"))  # and nothing happens to whoever runs in that task's place
    running.behaviour.act = None
    assert await get(as_(open_channel, running, "ada"))


async def test_what_a_caller_is_being_sent_arrives_whole_before_its_call_is_ended() -> None:
    """A message that is cut short would stay in a full window together with the reason."""

    async def answer(taken: asyncio.Event, sent: list[str]) -> None:
        call = Call()
        calls.append(call)
        with call.running(), call.writing():
            await taken.wait()
            sent.append("whole")

    calls: list[Call] = []
    taken, sent = asyncio.Event(), list[str]()
    task = asyncio.create_task(answer(taken, sent))
    await asyncio.sleep(0)
    calls[0].end(StateError("over"))
    await asyncio.sleep(0.01)
    assert not task.done()
    taken.set()
    with pytest.raises(StateError):
        await task
    assert sent == ["whole"]


async def test_a_caller_that_leaves_while_its_call_is_ended_is_no_error() -> None:
    async def answer() -> None:
        call = Call()
        with call.running():
            call.end(StateError("over"))
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(PATIENCE_S)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(answer())


# --- connections ------------------------------------------------------------------------------------------------------


async def _closed(connection: socket.socket) -> None:
    """Until the other end has closed it."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while await loop.sock_recv(connection, 1000):
                pass


@pytest.mark.parametrize("tls", [True, False])
async def test_who_connects_and_says_nothing_does_not_stay(
    start_server: Any,
    server_files: Any,
    scientist_files: Any,
    open_channel: Any,
    tls: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And does not keep those out who speak."""
    monkeypatch.setattr(options, "HANDSHAKE_S", 1)
    running = await start_server(tls=server_files if tls else None, insecure=not tls)
    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(50)]
    try:
        known = {"tls": scientist_files} if tls else {"insecure": True, "identity": Identity("scientist", "ada")}
        assert await get(open_channel(running.address, **known)) == "scientist/ada"
        await asyncio.gather(*map(_closed, silent))
    finally:
        for each in silent:
            each.close()


async def test_a_server_takes_so_many_connections_and_those_that_are_there_stay(
    start_server: Any, open_channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "HANDSHAKE_S", 1)
    monkeypatch.setattr(grpc_server, "room_for_connections", lambda: 4)
    running = await start_server(tls=None, insecure=True)
    there = as_(open_channel, running, "ada")
    assert await get(there) == "scientist/ada"
    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    try:
        await asyncio.gather(*map(_closed, silent[3:]))  # at once: there is no room for them
        assert await get(there) == "scientist/ada"
        await asyncio.gather(*map(_closed, silent))
        assert await get(as_(open_channel, running, "bob")) == "scientist/bob"
    finally:
        for each in silent:
            each.close()


async def test_a_connection_without_a_call_is_let_go_and_its_client_dials_again(
    start_server: Any, open_channel: Any, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with a stream stays for as long as that lasts."""
    monkeypatch.setattr(options, "IDLE_CONNECTION_S", 1)
    running, held = await start_server(tls=None, insecure=True), Held()
    running.behaviour.act = held.act
    bob = await raw(running.port)  # over a connection of its own: channels to one address share theirs
    bob.call(DOWNLOAD, b"")
    await held.until(1)
    running.behaviour.act = None
    channel = as_(open_channel, running, "ada")
    assert await get(channel) == "scientist/ada"
    async with asyncio.timeout(PATIENCE_S):
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    assert await get(channel) == "scientist/ada"
    assert bob.connected
    assert held.now == 1
