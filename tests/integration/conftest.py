"""What tests over the wire stand on: a served job service whose coordinator is played, and a real federation."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2_grpc
from sqlalchemy import MetaData

from src.aggregator.servicers import jobs as jobs_servicer
from src.aggregator.servicers import operations as operations_servicer
from src.client import AsyncSottoClient
from src.communication.generated import jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.errors import (
    BudgetError,
)
from src.jobs.service import Activity, JobService, Notifier, PartyStatus, Status
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.states import Event, EventKind, failed_event, round_event, succeeded_event
from src.jobs.store import JobStore
from src.protocol.roster import Roster, save_roster, sign_roster
from src.protocol.signing import SigningKey
from src.storage.blobs import Blobs
from src.storage.database import Database

ANN = Identity("scientist", "ann")
RETRY_FOR_S = 30.0
MODEL = bytes(range(256)) * 3000  # two chunks
KEY = SigningKey.from_bytes(bytes(32))
ROSTER = Roster(
    federation="demo",
    key_id="k",
    custody="aggregator",
    threshold=0,
    colluders=0,
    aggregator_verify_key=KEY.verify_key,
    members=(),
    created_at="2025-01-01T00:00:00Z",
)


@dataclass(frozen=True)
class Limits:
    max_jobs_pending: int = 10
    max_rounds: int = 100
    max_parties: int = 3
    max_round_timeout_s: float = 1000.0


class PlayedCoordinator:
    """Runs the oldest job by a script: each round waits for a permit; a seed of 13 fails the job."""

    def __init__(self, database: Database, store: JobStore, *, blobs: Blobs, notifier: Notifier) -> None:
        self._database, self._store, self._blobs, self._notifier = database, store, blobs, notifier
        self.permits = asyncio.Semaphore(0)
        self._woken = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def price(self, spec: FederatedTrainingSpec) -> None:
        if spec.local_training.epsilon > 100:
            raise BudgetError("party a has 4 of 100.5 left", party="a")

    def wake(self) -> None:
        self._woken.set()

    def progress(self, job_id: str) -> Activity | None:
        return Activity("round 1: training", ("b", "c"))

    def status(self) -> Status:
        return Status(
            federation="demo",
            software_version="9.9",
            key_id="k",
            custody="threshold",
            parties=(PartyStatus("a", True, "an update"), PartyStatus("b", False)),
            workers_busy=2,
            workers_idle=1,
            jobs_pending=0,
            jobs_running=0,
        )

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            while job := await self._database.run(self._store.next_pending):
                await self._execute(job.job_id, FederatedTrainingSpec.from_json(job.spec))

    async def _execute(self, job_id: str, spec: FederatedTrainingSpec) -> None:
        await self._happen(job_id, Event(kind=EventKind.STARTED, message="started"))
        for number in range(1, spec.rounds + 1):
            await self.permits.acquire()
            if (await self._database.run(lambda c: self._store.get(c, job_id))).state == "CANCELLING":
                await self._happen(job_id, Event(kind=EventKind.CANCELLED, message="cancelled"))
                return
            if spec.seed == 13:
                event = failed_event("BUDGET_EXCEEDED", "party a refuses", stage=f"round {number}", parties=["a"])
                await self._happen(job_id, event)
                return
            await self._happen(job_id, round_event(summary(number)))
        await self._happen(job_id, succeeded_event(self._write_artifact(job_id)))

    async def _happen(self, job_id: str, event: Event) -> None:
        await self._database.run(lambda c: self._store.apply(c, job_id, event, now=1e9))
        self._notifier.notify(job_id)

    def _write_artifact(self, job_id: str) -> dict[str, Any]:
        model = self._blobs.write(MODEL)
        statement = {"job_id": job_id, "model": {"file": "model.safetensors", "sha256": model.sha256}}
        signed = KEY.sign("manifest", statement, signer="aggregator").to_json()
        manifest = self._blobs.write(json.dumps({"manifest": signed, "readable": statement}).encode())
        files = [("model.safetensors", model), ("manifest.json", manifest)]
        return {
            "files": [{"name": name, "bytes": blob.size, "sha256": blob.sha256} for name, blob in files],
            "metrics": {"auc": 0.625},
            "epsilon_example": 3.5,
            "epsilon_party": 40.0,
            "epsilon_party_against_aggregator": math.inf,
            "delta": 1e-5,
        }


def summary(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "state": "RELEASED",
        "contributions": 3,
        "metrics": {"auc": 0.5 + number / 100},
        "epsilon_party": 10.0 * number,
        "epsilon_party_against_aggregator": math.inf,
        "parties": [
            {"party": "a", "bytes_up": 1000, "example_epsilon_spent": 0.5, "example_epsilon_left": 3.5},
            {"party": "b", "bytes_up": 1001, "example_epsilon_spent": None, "example_epsilon_left": None},
        ],
        "seconds": 1.5,
        "reason": None,
    }


class House:
    """A served job service, and callers."""

    model = MODEL
    roster = ROSTER

    def __init__(self, directory: Path) -> None:
        self.metadata = MetaData()
        self.store = JobStore(self.metadata)
        self.database = Database(directory / "jobs.db", self.metadata, schema_version=1)
        self.blobs = Blobs(directory / "blobs")
        self.address = ""
        self._closing: list[Any] = []

    async def start(self) -> None:
        await self.database.open()
        notifier = Notifier()
        self.coordinator = PlayedCoordinator(self.database, self.store, blobs=self.blobs, notifier=notifier)
        service = JobService(
            self.database,
            self.store,
            blobs=self.blobs,
            coordinator=self.coordinator,
            limits=Limits(),
            notifier=notifier,
        )
        self.server = GrpcServer(
            listen="127.0.0.1:0",
            tls=None,
            insecure=True,
            federation="demo",
            roles={**jobs_servicer.ROLES, **operations_servicer.ROLES},
        )
        servicer = jobs_servicer.JobServicer(service, self.blobs)
        self.server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, servicer, jobs_servicer.SERVICE)
        operations = operations_servicer.OperationsServicer(service)
        add = operations_pb2_grpc.add_OperationsServicer_to_server
        self.server.add(add, operations, operations_servicer.SERVICE)
        self.address = f"127.0.0.1:{await self.server.start()}"

    def client(self, identity: Identity = ANN) -> AsyncSottoClient:
        client = AsyncSottoClient(
            self.address, insecure=True, identity=identity, roster=ROSTER, retry_for_s=RETRY_FOR_S
        )
        self._closing.append(client)
        return client

    def operations(self) -> Any:
        """The stock stub of google.longrunning."""
        channel = connect(self.address, tls=None, insecure=True, identity=ANN)
        self._closing.append(channel)
        return operations_pb2_grpc.OperationsStub(channel)

    def permit(self, rounds: int) -> None:
        for _ in range(rounds):
            self.coordinator.permits.release()

    def write_config(self, directory: Path) -> Path:
        """A client.yaml with a pinned roster."""
        save_roster(directory / "roster.json", sign_roster(ROSTER, KEY), operator_verify_key=KEY.verify_key)
        config = directory / "client.yaml"
        config.write_text(
            f"version: 1\nfederation: demo\nname: ann\nserver: {{address: '{self.address}', insecure: true}}\n"
            "keys: {roster: roster.json}\n"
        )
        return config

    async def stop(self) -> None:
        for one in self._closing:
            await one.close()
        await self.server.stop(0)
        self.coordinator.task.cancel()
        await asyncio.gather(self.coordinator.task, return_exceptions=True)
        await self.database.close()


@pytest.fixture
async def job_house(tmp_path: Path) -> AsyncIterator[House]:
    """A served job service: `.client(identity)`, `.operations()`, `.permit(rounds)`."""
    house = House(tmp_path / "aggregator")
    await house.start()
    yield house
    await house.stop()


SMALL_EPSILON = 40.0
"""Party c's budget for a row; the others allow 1000."""


@pytest.fixture(scope="session")
def federation(make_federation: Callable[..., Any]) -> Any:
    """Kits for parties a, b and c, any two of whom can open; nobody runs until `federation.start(…)`."""
    return make_federation(
        party={"privacy": {"budgets": {"example": {"epsilon": 1000.0}}}},
        settings={"c": {"SOTTO__PRIVACY__BUDGETS__EXAMPLE__EPSILON": str(SMALL_EPSILON)}},
    )
