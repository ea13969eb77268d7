"""A certificate authority for tests, and one real server that answers with whatever it is asked to raise."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from src.communication.generated import common_pb2, federation_pb2, federation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity, caller
from src.communication.streams import receive_pieces, send_bytes
from src.communication.tls import TlsFiles
from src.storage.blobs import Blobs

FEDERATION = "demo"
_LIFETIME = datetime.timedelta(hours=1)


class Authority:
    """Issues certificates into a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, directory.name)])
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = directory / "ca.pem"
        self.path.write_bytes(certificate.public_bytes(Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _LIFETIME)
            .not_valid_after(now + _LIFETIME)
        )

    def issue(self, *names: x509.GeneralName, server: bool = False, ca: Path | None = None) -> TlsFiles:
        """Files of one end whose certificate has these alternative names; `ca` is whom it trusts, if not this."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = (
            self._builder(x509.Name([]), key)
            .add_extension(x509.SubjectAlternativeName(names or [x509.DNSName("nobody.invalid")]), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        stem = self._directory / f"{certificate.serial_number:x}"
        files = TlsFiles(stem.with_suffix(".pem"), stem.with_suffix(".key"), ca or self.path)
        files.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def member(self, uri: str) -> TlsFiles:
        """Files of a client whose certificate has this URI."""
        return self.issue(x509.UniformResourceIdentifier(uri))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "federation-ca")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "another-ca")


@pytest.fixture(scope="session")
def server_files(authority: Authority) -> TlsFiles:
    return authority.issue(
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.UniformResourceIdentifier(f"spiffe://{FEDERATION}/aggregator/aggregator"),
        server=True,
    )


@pytest.fixture(scope="session")
def party_files(authority: Authority) -> TlsFiles:
    return authority.member(f"spiffe://{FEDERATION}/party/a")


@pytest.fixture(scope="session")
def scientist_files(authority: Authority) -> TlsFiles:
    return authority.member(f"spiffe://{FEDERATION}/scientist/ada")


@dataclass
class Behaviour:
    """What the probe does when it is called: `act` runs first; then it answers with `data`."""

    act: Callable[[], Awaitable[None]] | None = None
    after_first: Exception | None = None
    data: bytes = b"0123456789" * 10
    callers: list[str] = field(default_factory=list)

    async def step(self) -> None:
        self.callers.append(str(caller()))
        if self.act is not None:
            await self.act()

    def raises(self, error: Exception) -> None:
        async def act() -> None:
            raise error

        self.act = act


class JobProbe(jobs_pb2_grpc.JobServiceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Any) -> jobs_pb2.Job:
        await self.behaviour.step()
        return jobs_pb2.Job(job_id=request.job_id, owner=str(caller()))

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Any) -> jobs_pb2.Job:
        raise AssertionError("has no row in the role table: never called")

    async def DownloadArtifact(
        self, request: jobs_pb2.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[common_pb2.DataChunk]:
        await self.behaviour.step()
        async for chunk in send_bytes(self.behaviour.data, offset=request.offset, chunk_bytes=10):
            yield chunk
            if self.behaviour.after_first is not None:
                raise self.behaviour.after_first


class FederationProbe(federation_pb2_grpc.FederationServiceServicer):
    def __init__(self, behaviour: Behaviour, blobs: Blobs) -> None:
        self.behaviour = behaviour
        self.blobs = blobs

    async def UploadUpdate(
        self, request_iterator: AsyncIterator[federation_pb2.UploadUpdateRequest], context: Any
    ) -> federation_pb2.UploadUpdateResponse:
        await self.behaviour.step()

        async def bodies() -> AsyncIterator[bytes]:
            async for request in request_iterator:
                yield request.body

        with self.blobs.writer() as writer:
            await receive_pieces(bodies(), writer, size=len(self.behaviour.data))
            ref = writer.commit()
        return federation_pb2.UploadUpdateResponse(accepted=self.blobs.exists(ref.sha256))


ROLES = {
    "/sotto.v1.JobService/GetJob": frozenset({"scientist", "operator"}),
    "/sotto.v1.JobService/DownloadArtifact": frozenset({"scientist"}),
    "/sotto.v1.FederationService/UploadUpdate": frozenset({"party"}),
}


@dataclass
class Running:
    """A started server, and how to reach it."""

    port: int
    behaviour: Behaviour
    server: GrpcServer

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class StartServer(Protocol):
    async def __call__(self, *, tls: TlsFiles | None, insecure: bool = False, **settings: Any) -> Running: ...


@pytest.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    servers: list[GrpcServer] = []

    async def start(*, tls: TlsFiles | None, insecure: bool = False, **settings: Any) -> Running:
        server = GrpcServer(
            listen="127.0.0.1:0", tls=tls, insecure=insecure, federation=FEDERATION, roles=ROLES, **settings
        )
        behaviour = Behaviour()
        blobs = Blobs(tmp_path / "blobs")
        jobs = JobProbe(behaviour)  # type: ignore[abstract]  # at run time every method has a default
        federation = FederationProbe(behaviour, blobs)  # type: ignore[abstract]
        server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, jobs, "sotto.v1.JobService")
        server.add(
            federation_pb2_grpc.add_FederationServiceServicer_to_server, federation, "sotto.v1.FederationService"
        )
        servers.append(server)
        return Running(await server.start(), behaviour, server)

    yield start
    for server in servers:
        await server.stop(grace_s=0)


@pytest.fixture
async def server(start_server: StartServer, server_files: TlsFiles) -> Running:
    """A server with mutual TLS."""
    return await start_server(tls=server_files)


@pytest.fixture
async def plain(start_server: StartServer) -> Running:
    """A server without TLS, on loopback."""
    return await start_server(tls=None, insecure=True)


@pytest.fixture
async def open_channel() -> AsyncIterator[Callable[..., grpc.aio.Channel]]:
    """`connect`, closing its channels after the test."""
    channels: list[grpc.aio.Channel] = []

    def open_(address: str, **settings: Any) -> grpc.aio.Channel:
        channels.append(connect(address, **{"tls": None, **settings}))
        return channels[-1]

    yield open_
    for channel in channels:
        await channel.close(None)


@pytest.fixture
def scientist(plain: Running, open_channel: Callable[..., grpc.aio.Channel]) -> grpc.aio.Channel:
    """A scientist's channel to `plain`."""
    return open_channel(plain.address, insecure=True, identity=Identity("scientist", "ada"))


@pytest.fixture
def party(plain: Running, open_channel: Callable[..., grpc.aio.Channel]) -> grpc.aio.Channel:
    """A party's channel to `plain`."""
    return open_channel(plain.address, insecure=True, identity=Identity("party", "a"))
