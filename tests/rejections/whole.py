"""A whole federation in one process: a real aggregator, and the real nodes of its parties."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from src.aggregator.app import App
from src.aggregator.sessions import Session
from src.client import AsyncSottoClient, JobSigner
from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.communication.tls import TlsFiles
from src.config import load_aggregator_config, load_party_config
from src.learning.flatten import to_safetensors
from src.provisioning import provision
from tests.rejections.cheating import DIMENSION, PATIENCE_S, PartyNode

NAMES: Final = ("a", "b")
SET_UPS: Final = ("kit, custody threshold", "kit, custody aggregator", "classic")
AGGREGATOR: Final[dict[str, Any]] = {
    "server": {"listen": "127.0.0.1:0", "reflection": False},
    "workers": {"size": 1, "nice": 0},
    "keys": {"modulus_bits": 512, "insecure_small_modulus": True},
}
PARTY: Final[dict[str, Any]] = {
    "keys": {"insecure_small_modulus": True},
    "datasets": {"scripted": {"declared_rows": 100}},
    "privacy": {"budgets": {"example": {"epsilon": None, "max_rounds": 50}}},
}


class Whole:
    """A real aggregator and the real nodes of a and b, in this process, each of which can be started again."""

    def __init__(self, place: Path, address: str, *, set_up: str, **server: Any) -> None:
        self._server = server
        self.place, self.address, self.pinned = place, address, set_up != "classic"
        if self.pinned:
            custody = set_up.rpartition(" ")[2]
            provision(
                place / "kits",
                federation="demo",
                parties=NAMES,
                modulus_bits=512,
                insecure_small=True,
                processes=1,
                custody=custody,
                aggregator_overrides=AGGREGATOR if custody == "aggregator" else {**AGGREGATOR, "keys": {}},
                party_overrides=PARTY,
            )
        else:
            self._write_classic()
        self.parties = {name: PartyNode(self._party(name), address) for name in NAMES}
        self._seen: list[Session] = []

    def _write_classic(self) -> None:
        classic = {"version": 1, "federation": "demo"}
        roles = {"aggregator": AGGREGATOR, **{f"party-{name}": PARTY | {"name": name} for name in NAMES}}
        for role, values in roles.items():
            keys = {**values.get("keys", {}), "custody": "aggregator"}
            server = {**values.get("server", {}), "insecure": True}
            content = {**classic, **values, "keys": keys, "server": server, "policy": {"allow_unsigned_jobs": True}}
            kit = self.place / "kits" / role
            kit.mkdir(parents=True)
            (kit / f"{role.partition('-')[0]}.yaml").write_text(yaml.safe_dump(content))

    def _party(self, name: str) -> Any:
        return load_party_config(self.place / "kits" / f"party-{name}" / "party.yaml", environ={})

    async def start_aggregator(self) -> None:
        kit = self.place / "kits" / "aggregator"
        config = load_aggregator_config(kit / "aggregator.yaml", environ={"SOTTO__SERVER__LISTEN": self.address})
        server = config.server.model_copy(update=self._server)
        self.app = App(config.model_copy(update={"evaluation": {}, "server": server}))
        await self.app.start()

    @contextlib.asynccontextmanager
    async def scientist(self) -> AsyncIterator[AsyncSottoClient]:
        if not self.pinned:
            client = AsyncSottoClient(self.address, insecure=True, identity=Identity("scientist", "ann"))
        else:
            kit = self.place / "kits" / "scientist"
            tls = TlsFiles(kit / "tls" / "cert.pem", kit / "tls" / "key.pem", kit / "tls" / "ca.pem")
            signer = JobSigner("demo", "scientist", kit / "signing.key")
            client = AsyncSottoClient(self.address, tls=tls, signer=signer)
        async with client:
            yield client

    async def works(self) -> None:
        """Both come, each by a stream that was not there when this was last said, and a round comes to its end."""
        sessions = self.app._sessions
        async with asyncio.timeout(PATIENCE_S):
            while sessions.connected != set(NAMES) or any(each in self._seen for each in sessions._open.values()):
                ended = [party._task for party in self.parties.values() if party._task.done()]
                assert not ended, ended
                await asyncio.sleep(0.02)
        self._seen += sessions._open.values()
        training = jobs_pb2.FederatedTraining(
            task="scripted",
            rounds=1,
            spare_rounds=0,
            parties=NAMES,
            initial_model=to_safetensors({"w": np.zeros(DIMENSION, np.float32)}),
            party_privacy=jobs_pb2.PartyPrivacy(noise_multiplier=0.5),
            round_timeout_s=PATIENCE_S,
        )
        async with self.scientist() as client:
            job = await client.wait((await client.submit(training)).job_id, timeout_s=PATIENCE_S)
        assert job.state == jobs_pb2.SUCCEEDED, job.error
