"""One federation of four, dealt once: who cheats whom in it is up to the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from src.aggregator.servicers.federation import ROLES, SERVICE
from src.communication.generated import federation_pb2_grpc
from src.communication.grpc_server import GrpcServer
from src.communication.tls import TlsFiles
from src.provisioning import provision
from tests.rejections.cheating import CheatingAggregator, Meeting, PartyA
from tests.rejections.scripted import PARTIES, SCIENTISTS, House


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of parties a to d, any three of whom can open; the key is breakable and quick."""
    out = tmp_path_factory.mktemp("federation") / "kits"
    provision(
        out,
        federation="demo",
        parties=PARTIES,
        scientists=SCIENTISTS,
        modulus_bits=512,
        insecure_small=True,
        processes=1,
        aggregator_overrides={
            "server": {"listen": "127.0.0.1:0", "reflection": False},
            "limits": {"max_message_bytes": 65_536},
            "workers": {"size": 1, "nice": 0},
        },
        party_overrides={
            "datasets": {"scripted": {"declared_rows": 100}},
            "limits": {"max_update_bytes": 1 << 20},
            "privacy": {"budgets": {"example": {"epsilon": None, "max_rounds": 50}}},
        },
    )
    return out


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def house(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """One aggregator for a module."""
    house = House(kits, tmp_path_factory.mktemp("aggregator") / "state")
    await house.start()
    yield house
    await house.stop()


@pytest.fixture
async def meeting(kits: Path, tmp_path: Path) -> AsyncIterator[Meeting]:
    them = CheatingAggregator(kits, tmp_path)
    tls = kits / "aggregator" / "tls"
    server = GrpcServer(
        listen="127.0.0.1:0",
        tls=TlsFiles(tls / "cert.pem", tls / "key.pem", tls / "ca.pem"),
        insecure=False,
        federation="demo",
        roles=ROLES,
    )
    server.add(federation_pb2_grpc.add_FederationServiceServicer_to_server, them, SERVICE)
    a = PartyA(kits, tmp_path / "state", f"127.0.0.1:{await server.start()}")
    await a.start()
    them.settled = a.idle
    yield Meeting(them, a)
    await a.stop()
    await server.stop(0)
