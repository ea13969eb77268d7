"""Who gets in, and what they may call: over real servers, with real certificates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.identity import (
    METADATA_KEY,
    ROLES,
    Gate,
    Identity,
    caller,
    parse_spiffe_id,
    spiffe_id,
)
from src.communication.tls import TlsFiles, is_loopback
from src.errors import AccessError, AuthenticationError, ConfigError, InvalidInput, SottoError, UnavailableError

OpenChannel = Callable[..., grpc.aio.Channel]


async def _get_job(channel: grpc.aio.Channel, **kwargs: Any) -> jobs_pb2.Job:
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    job = await stub.GetJob(jobs_pb2.GetJobRequest(job_id="7"), timeout=60, **kwargs)
    assert isinstance(job, jobs_pb2.Job)
    return job


async def _cancel_job(channel: grpc.aio.Channel) -> None:
    await jobs_pb2_grpc.JobServiceStub(channel).CancelJob(jobs_pb2.CancelJobRequest(), timeout=60)


async def test_the_caller_is_who_the_certificate_says(
    server: Any, open_channel: OpenChannel, scientist_files: TlsFiles
) -> None:
    channel = open_channel(server.address, tls=scientist_files)
    assert (await _get_job(channel)).owner == "scientist/ada"
    liar = ((METADATA_KEY, "operator/eve"),)
    assert (await _get_job(channel, metadata=liar)).owner == "scientist/ada"


@pytest.mark.parametrize(
    ("uris", "error", "message"),
    [
        ([], AuthenticationError, "exactly one spiffe"),
        (["spiffe://demo/scientist/ada", "spiffe://demo/operator/ada"], AuthenticationError, "exactly one spiffe"),
        (["https://demo/scientist/ada"], AuthenticationError, "exactly one spiffe"),
        (["spiffe://other/scientist/ada"], AuthenticationError, "of another federation: other"),
        (["spiffe://demo/scientist"], AuthenticationError, "written role/name"),
        (["spiffe://demo/admin/ada"], AuthenticationError, "no such role"),
        (["spiffe://demo/scientist/a/b"], AuthenticationError, "not a name"),
        (["spiffe://demo/party/a"], AccessError, "a party may not call /sotto.v1.JobService/GetJob"),
        (["spiffe://demo/aggregator/aggregator"], AccessError, "an? aggregator may not call"),
    ],
)
async def test_a_certificate_of_our_ca_is_refused_when_it_names(
    server: Any, open_channel: OpenChannel, authority: Any, uris: list[str], error: type[SottoError], message: str
) -> None:
    files = authority.issue(*(x509.UniformResourceIdentifier(uri) for uri in uris))
    with pytest.raises(error, match=message):
        await _get_job(open_channel(server.address, tls=files))
    assert server.behaviour.callers == []


async def test_a_dns_name_that_looks_like_an_identity_names_nobody(
    server: Any, open_channel: OpenChannel, authority: Any
) -> None:
    files = authority.issue(x509.DNSName("spiffe://demo/operator/eve"))
    with pytest.raises(AuthenticationError):
        await _get_job(open_channel(server.address, tls=files))


async def test_a_method_without_a_row_is_for_nobody(server: Any, open_channel: OpenChannel, authority: Any) -> None:
    for role in sorted(ROLES):
        channel = open_channel(server.address, tls=authority.member(f"spiffe://demo/{role}/x"))
        with pytest.raises(AccessError, match=r"may not call .*CancelJob"):
            await _cancel_job(channel)


async def test_a_client_of_another_ca_does_not_get_through_the_handshake(
    server: Any, open_channel: OpenChannel, stranger: Any, authority: Any
) -> None:
    files = stranger.issue(x509.UniformResourceIdentifier("spiffe://demo/scientist/ada"), ca=authority.path)
    with pytest.raises(UnavailableError, match=server.address):
        await _get_job(open_channel(server.address, tls=files))


async def test_a_client_without_a_certificate_does_not_get_through_the_handshake(server: Any, authority: Any) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=authority.path.read_bytes())
    async with grpc.aio.secure_channel(server.address, credentials) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _get_job(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_plaintext_client_does_not_reach_a_server_with_tls(server: Any, open_channel: OpenChannel) -> None:
    with pytest.raises(UnavailableError):
        await _get_job(open_channel(server.address, insecure=True, identity=Identity("scientist", "ada")))


async def test_a_client_refuses_a_server_of_another_ca(
    server: Any, open_channel: OpenChannel, stranger: Any, scientist_files: TlsFiles
) -> None:
    files = TlsFiles(scientist_files.certificate, scientist_files.key, stranger.path)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await _get_job(open_channel(server.address, tls=files))


async def test_a_member_s_certificate_does_not_make_a_server(
    start_server: Any, open_channel: OpenChannel, authority: Any, scientist_files: TlsFiles
) -> None:
    """A party's certificate is for clients (extended key usage), whatever host names it may hold."""
    files = authority.issue(x509.DNSName("localhost"), x509.UniformResourceIdentifier("spiffe://demo/party/a"))
    impostor = await start_server(tls=files)
    with pytest.raises(UnavailableError):
        await _get_job(open_channel(f"localhost:{impostor.port}", tls=scientist_files))


async def test_without_tls_the_caller_is_who_the_metadata_says(plain: Any, open_channel: OpenChannel) -> None:
    channel = open_channel(plain.address, insecure=True, identity=Identity("operator", "olga"))
    assert (await _get_job(channel)).owner == "operator/olga"


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        ((METADATA_KEY, "nobody"),),
        ((METADATA_KEY, "root/x"),),
        ((METADATA_KEY, "scientist/ada"), (METADATA_KEY, "operator/olga")),
    ],
)
async def test_without_tls_a_caller_is_refused_whose_metadata_is(
    plain: Any, open_channel: OpenChannel, metadata: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(AuthenticationError):
        await _get_job(open_channel(plain.address, insecure=True), metadata=metadata)


async def test_health_is_for_anyone_who_got_through_the_handshake(
    server: Any, open_channel: OpenChannel, authority: Any
) -> None:
    stub = health_pb2_grpc.HealthStub(open_channel(server.address, tls=authority.issue()))
    for service in ("", "sotto.v1.JobService", "grpc.health.v1.Health"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="sotto.v1.JobService"), timeout=60)
    async for answer in watch:
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        break


@pytest.mark.parametrize("enabled", [True, False])
async def test_reflection_is_there_when_it_is_switched_on(
    start_server: Any, open_channel: OpenChannel, enabled: bool
) -> None:
    running = await start_server(tls=None, insecure=True, reflection=enabled)
    stub = reflection_pb2_grpc.ServerReflectionStub(open_channel(running.address, insecure=True))
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=60)
    if not enabled:
        with pytest.raises(SottoError):
            await call.read()
        return
    listed = {service.name for service in (await call.read()).list_services_response.service}
    assert {"sotto.v1.JobService", "sotto.v1.FederationService", "grpc.health.v1.Health"} <= listed


ADDRESSES = [
    ("127.0.0.1:0", True),
    ("127.9.9.9:1", True),
    ("[::1]:50051", True),
    ("localhost:50051", True),
    ("0.0.0.0:50051", False),
    ("[::]:50051", False),
    ("10.0.0.1:50051", False),
    ("aggregator.example:50051", False),
    ("localhost.example:50051", False),
    ("127.0.0.1.example:50051", False),
    ("localhost", False),
    ("", False),
]


@pytest.mark.parametrize(("address", "loopback"), ADDRESSES)
def test_plaintext_is_possible_on_loopback_only(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
    if not loopback:
        with pytest.raises(ConfigError, match="loopback"):
            GrpcServer(listen=address, tls=None, insecure=True, federation="demo", roles={})
        with pytest.raises(ConfigError, match="loopback"):
            connect(address, tls=None, insecure=True)


def test_neither_end_starts_without_tls_by_omission_nor_with_both(party_files: TlsFiles) -> None:
    for tls, insecure in ((None, False), (party_files, True)):
        with pytest.raises(ConfigError, match="tls"):
            GrpcServer(listen="127.0.0.1:0", tls=tls, insecure=insecure, federation="demo", roles={})
        with pytest.raises(ConfigError, match="tls"):
            connect("127.0.0.1:1", tls=tls, insecure=insecure)


def test_tls_files_that_cannot_work_are_refused_before_connecting(
    party_files: TlsFiles, scientist_files: TlsFiles, tmp_path: Any
) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    missing = tmp_path / "missing.pem"
    good = party_files
    rows = [
        (TlsFiles(missing, good.key, good.ca), "tls.certificate: .*missing.pem"),
        (TlsFiles(good.certificate, good.key, empty), "tls.ca: holds no PEM certificate"),
        (TlsFiles(good.certificate, empty, good.ca), "tls.key: holds no unencrypted PEM private key"),
        (TlsFiles(good.certificate, scientist_files.key, good.ca), "tls.key: is not the key of tls.certificate"),
    ]
    for files, message in rows:
        with pytest.raises(ConfigError, match=message):
            connect("localhost:1", tls=files)


def test_a_role_table_with_a_role_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="partys"):
        Gate("demo", {"/x/Y": frozenset({"partys"})}, insecure=False)


def test_outside_an_rpc_there_is_no_caller() -> None:
    with pytest.raises(AuthenticationError):
        caller()


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)


@given(federation=NAMES, role=st.sampled_from(sorted(ROLES)), name=NAMES)
def test_an_identity_survives_its_uri(federation: str, role: Any, name: str) -> None:
    identity = Identity(role, name)
    assert parse_spiffe_id(spiffe_id(federation, identity)) == (federation, identity)


def test_what_is_no_identity_is_refused() -> None:
    for text in ("", "demo", "spiffe:/demo/party/a", "http://demo/party/a", "spiffe:///party/a", "spiffe://d/party/"):
        with pytest.raises(InvalidInput):
            parse_spiffe_id(text)
    for role, name in itertools.product(("party",), ("", "a b", "../a", "é", "a" * 64, "a\n", "-a")):
        with pytest.raises(InvalidInput):
            Identity(role, name)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        spiffe_id("de/mo", Identity("party", "a"))
