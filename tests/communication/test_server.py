"""A server's life: ports, concurrency, and settings on which both ends agree."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.communication.options import client_options, server_options
from src.communication.tls import TlsFiles
from src.errors import ConfigError, SottoError, StateError


def _server(listen: str) -> GrpcServer:
    return GrpcServer(listen=listen, tls=None, insecure=True, federation="demo", roles={})


async def test_an_address_in_use_is_a_configuration_error_not_a_second_listener(plain: Any) -> None:
    with pytest.raises(ConfigError, match=f"server.listen: {plain.address} cannot be bound"):
        await _server(plain.address).start()


async def test_an_address_that_cannot_be_bound_is_known_before_anything_is_started(
    plain: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"{plain.address} cannot be bound: is another process listening there?"):
        _server(plain.address).try_address()
    files = TlsFiles(certificate=Path("cert.pem"), key=Path("key.pem"), ca=Path("ca.pem"))  # not read yet
    elsewhere = GrpcServer(listen="192.0.2.1:1", tls=files, insecure=False, federation="demo", roles={})  # RFC 5737
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:1 cannot be bound: (?!is another)"):
        elsewhere.try_address()
    _server("127.0.0.1:0").try_address()
    with pytest.raises(ConfigError):
        await _server(plain.address).start()
    assert capfd.readouterr().err == ""  # gRPC would write lines of its own


async def test_a_server_starts_once_and_takes_its_services_before() -> None:
    server = _server("127.0.0.1:0")
    await server.stop()
    assert await server.start() > 0
    with pytest.raises(StateError):
        await server.start()
    with pytest.raises(StateError):
        server.add(lambda servicer, server: None, object(), "x.Y")
    await server.stop(grace_s=0)


async def test_a_stopped_server_cannot_be_reached(open_channel: Any) -> None:
    server = _server("127.0.0.1:0")
    stub = health_pb2_grpc.HealthStub(open_channel(f"127.0.0.1:{await server.start()}", insecure=True))
    await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    await server.stop(grace_s=0)
    with pytest.raises(SottoError):
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
async def test_this_machine_is_reached_without_the_proxy_of_the_environment(
    plain: Any, open_channel: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    channel = open_channel(plain.address, insecure=True, identity=Identity("scientist", "ada"))
    found = await jobs_pb2_grpc.JobServiceStub(channel).GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    assert found.owner == "scientist/ada"


async def test_calls_that_wait_do_not_hold_up_others_and_each_knows_its_own_caller(
    plain: Any, open_channel: Any
) -> None:
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await go_on.wait()

    def stub(name: str) -> Any:
        channel = open_channel(plain.address, insecure=True, identity=Identity("scientist", name))
        return jobs_pb2_grpc.JobServiceStub(channel)

    plain.behaviour.act = wait
    first = asyncio.ensure_future(stub("ada").GetJob(jobs_pb2.GetJobRequest(), timeout=60))
    await arrived.wait()
    plain.behaviour.act = None
    assert (await stub("bob").GetJob(jobs_pb2.GetJobRequest(), timeout=60)).owner == "scientist/bob"
    go_on.set()
    assert (await first).owner == "scientist/ada"


async def test_a_client_that_stops_listening_hangs_up(plain: Any, scientist: grpc.aio.Channel) -> None:
    plain.behaviour.data = bytes(1_000_000)
    call: Any = jobs_pb2_grpc.JobServiceStub(scientist).DownloadArtifact(jobs_pb2.DownloadArtifactRequest())
    chunks = aiter(call)
    await anext(chunks)
    await chunks.aclose()
    assert call.cancelled()


def test_clients_ping_no_more_often_than_the_server_tolerates_and_nothing_is_retried() -> None:
    """Else the server ends the connection with GOAWAY "too_many_pings"."""
    client = dict(client_options(1000))
    server = dict(server_options(2000, ping_interval_s=7, max_concurrent_streams=5, max_connections=6))
    assert client["grpc.keepalive_time_ms"] >= 2 * server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1
    assert server["grpc.keepalive_time_ms"] == 7000
    assert client["grpc.enable_retries"] == 0
    assert (client["grpc.max_receive_message_length"], server["grpc.max_receive_message_length"]) == (1000, 2000)


async def test_whoever_watches_a_server_learns_that_it_ended() -> None:
    server = _server("127.0.0.1:0")
    await server.start()
    ended, leaves = asyncio.create_task(server.ended()), asyncio.create_task(server.ended())
    await asyncio.sleep(0.05)
    assert not ended.done()
    leaves.cancel()  # and takes nothing from whoever waits too, or stops it
    await asyncio.gather(leaves, return_exceptions=True)
    await server._server.stop(0)  # whoever did it
    await asyncio.wait_for(ended, 30)
    await server.stop(grace_s=0)
