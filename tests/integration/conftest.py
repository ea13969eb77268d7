"""What tests over the wire stand on: a served job service whose coordinator is played, and a real federation."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2_grpc
from sqlalchemy import Connection, MetaData

from src.aggregator.orders import OrderDesk
from src.aggregator.servicers import jobs as jobs_servicer
from src.aggregator.servicers import operations as operations_servicer
from src.client import AsyncSottoClient
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.errors import BudgetError, NotFoundError
from src.jobs.computations import EvaluationSpec
from src.jobs.executors.stats import PoolStats, UnitStats
from src.jobs.scheduler import Capacity
from src.jobs.service import Activity, JobService, JobSettings, Notifier, PartyStatus, Status
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import JobSpec, spec_from_proto, spec_of
from src.jobs.states import (
    Event,
    EventKind,
    JobError,
    JobRow,
    after_failure,
    failed_event,
    round_event,
    succeeded_event,
    utc,
)
from src.jobs.store import JobStore, Lease
from src.protocol.roster import Roster, Scientist, save_roster, sign_roster
from src.protocol.signing import SigningKey
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.leftovers import Leftovers
from src.storage.schema import FromMetadata

ANN = Identity("scientist", "ann")
RETRY_FOR_S = 30.0
MODEL = bytes(range(256)) * 3000  # two chunks
EXPORTED = bytes(range(255, -1, -1))
KEY = SigningKey.from_bytes(bytes(32))
ANNS_KEY = SigningKey.from_bytes(bytes(31) + b"a")
ROSTER = Roster(
    federation="demo",
    key_id="k",
    custody="aggregator",
    threshold=0,
    colluders=0,
    aggregator_verify_key=KEY.verify_key,
    members=(),
    created_at="2025-01-01T00:00:00Z",
    scientists=(Scientist("ann", ANNS_KEY.verify_key),),
)
DESK = OrderDesk(lambda: ROSTER, allow_unsigned=True)
"""What comes signed is looked at all the same."""


NOW = 1e9
"""When everything happens to a job; it was created when the test ran."""
FAILING_SEED, RETRIED_SEED = 13, 17
SETTINGS = JobSettings(
    max_jobs_pending=12,
    max_pending_per_scientist=10,
    max_rounds=100,
    max_parties=3,
    max_round_timeout_s=1000.0,
    capacity=Capacity(max_trainings=1, max_computations=3, max_per_scientist=3),
)
WORKERS = PoolStats(
    size=3,
    min_size=1,
    max_size=4,
    busy=2,
    idle=1,
    waiting=5,
    started=9,
    replaced=1,
    recycled=3,
    grown=2,
    shrunk=0,
    tasks_done=70,
    tasks_refused=2,
    tasks_failed=1,
    tasks_cancelled=4,
    failure_rate=0.25,
    units=(UnitStats("fold", 70, 2, 1, 4, mean_s=0.5, p50_s=0.4, p95_s=1.5, longest_s=2.0),),
)


class PlayedResults:
    """Of no round."""

    async def of_round(self, job: JobRow, choice: str, *, as_known: str = "") -> dict[str, Any]:
        raise NotFoundError(f"round {choice} of job {job.job_id} was not released")


class PlayedCoordinator:
    """Runs jobs by a script: trainings one after the other, computations beside them.

    Each round waits for a permit, and so does each computation. A training of seed 13 fails in its first round. The
    first attempt of one of seed 17 fails with its first permit, and the second begins with its second.
    """

    def __init__(self, database: Database, store: JobStore, *, blobs: Blobs, notifier: Notifier) -> None:
        self._database, self._store, self._blobs, self._notifier = database, store, blobs, notifier
        self.said: tuple[str, ...] = ()
        self.permits = asyncio.Semaphore(0)
        self._woken = asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        tasks = [self._loop, *self._jobs]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def price(self, spec: JobSpec, *, owner: str, model: bytes = b"") -> tuple[str, ...]:
        if isinstance(spec, FederatedTrainingSpec) and spec.local_training.epsilon > 100:
            raise BudgetError("party a has 4 of 100.5 left", party="a")
        return self.said

    async def model_bytes(self, spec: FederatedTrainingSpec, *, model: bytes = b"") -> int:
        return 1000

    @property
    def results(self) -> PlayedResults:
        return PlayedResults()

    def wake(self) -> None:
        self._woken.set()

    def progress(self, job_id: str) -> Activity | None:
        return Activity(
            "round 1: training",
            ("b", "c"),
            parties=(("a", "DELIVERED"), ("b", "TRAINING"), ("c", "AWAY")),
            bytes_received=12_345,
            estimated_end_at=utc(NOW + 60),
        )

    def status(self) -> Status:
        return Status(
            federation="demo",
            software_version="9.9",
            key_id="k",
            custody="threshold",
            parties=(PartyStatus("a", True, "an update"), PartyStatus("b", False)),
            workers=WORKERS,
            started_at=utc(NOW),
        )

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            while taken := await self._database.run(self._take):
                task = asyncio.create_task(self._execute(*taken))
                self._jobs.add(task)
                task.add_done_callback(self._jobs.discard)

    def _take(self, connection: Connection) -> tuple[JobRow, Lease] | None:
        return self._store.take_next(
            connection, capacity=SETTINGS.capacity, holder="played", now=NOW, lease_s=RETRY_FOR_S
        )

    async def _execute(self, job: JobRow, lease: Lease) -> None:
        self._notifier.notify(job.job_id)
        spec = spec_of(job.kind, job.spec)
        if isinstance(spec, FederatedTrainingSpec):
            await self._train(job, spec, lease)
        elif await self._go_on(lease):
            await self._happen(lease, succeeded_event(self._computed(job, spec), message="the manifest is ready"))
        self.wake()

    async def _train(self, job: JobRow, spec: FederatedTrainingSpec, lease: Lease) -> None:
        if spec.seed == RETRIED_SEED:
            if not await self._go_on(lease):
                return
            error = JobError("WORKER_FAILED", "a worker died", "round 1", log_reference="incident 17")
            await self._happen(lease, after_failure(job, error, [0.0], NOW))
            if not await self._go_on(lease):
                return
            await self._happen(lease, Event(kind=EventKind.RESUMED, message="the second attempt", cause="aggregator"))
        for number in range(1, spec.rounds + 1):
            if not await self._go_on(lease):
                return
            if spec.seed == FAILING_SEED:
                error = JobError("BUDGET_EXCEEDED", "party a refuses", f"round {number}", ("a",), "incident 13")
                await self._happen(lease, failed_event(error))
                return
            await self._happen(lease, round_event(summary(number)))
        await self._happen(lease, succeeded_event(self._result(job.job_id, "model.safetensors", MODEL)))

    async def _go_on(self, lease: Lease) -> bool:
        """Waits for a permit; false where the job is to stop, which it then has done."""
        await self.permits.acquire()
        row = await self._database.run(lambda connection: self._store.get(connection, lease.job_id))
        if row.state == "CANCELLING":
            await self._happen(lease, Event(kind=EventKind.CANCELLED, message="cancelled", cause="aggregator"))
            return False
        return True

    async def _happen(self, lease: Lease, event: Event) -> None:
        await self._database.run(lambda c: self._store.apply(c, lease.job_id, event, now=NOW, lease=lease))
        self._notifier.notify(lease.job_id)

    def _computed(self, job: JobRow, spec: JobSpec) -> dict[str, Any]:
        if isinstance(spec, EvaluationSpec):
            return self._result(job.job_id, "model.safetensors", MODEL)
        return self._result(job.job_id, "model.npz", EXPORTED)

    def _result(self, job_id: str, name: str, content: bytes) -> dict[str, Any]:
        model = self._blobs.write(content)
        statement = {"job_id": job_id, "model": {"file": name, "sha256": model.sha256, "bytes": model.size}}
        signed = KEY.sign("manifest", statement, signer="aggregator").to_json()
        manifest = self._blobs.write(json.dumps({"manifest": signed, "readable": statement}).encode())
        files = [(name, model), ("manifest.json", manifest)]
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
    exported = EXPORTED
    roster = ROSTER

    def __init__(self, directory: Path, address: str) -> None:
        self.metadata = MetaData()
        self.store = JobStore(self.metadata)
        self.database = Database(directory / "jobs.db", FromMetadata(self.metadata))
        self.blobs = Blobs(directory / "blobs")
        self.address = address
        self._closing: list[Any] = []

    async def start(self) -> None:
        await self.database.open()
        notifier = Notifier()
        self.coordinator = PlayedCoordinator(self.database, self.store, blobs=self.blobs, notifier=notifier)
        self.service = JobService(
            self.database,
            self.store,
            blobs=self.blobs,
            coordinator=self.coordinator,
            settings=SETTINGS,
            leftovers=Leftovers(self.database, self.blobs, self.store),
            notifier=notifier,
        )
        self.server = GrpcServer(
            listen=self.address,
            tls=None,
            insecure=True,
            federation="demo",
            roles={**jobs_servicer.ROLES, **operations_servicer.ROLES},
        )
        servicer = jobs_servicer.JobServicer(self.service, self.blobs, DESK)
        self.server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, servicer, jobs_servicer.SERVICE)
        operations = operations_servicer.OperationsServicer(self.service)
        add = operations_pb2_grpc.add_OperationsServicer_to_server
        self.server.add(add, operations, operations_servicer.SERVICE)
        await self.server.start()

    def client(self, identity: Identity = ANN) -> AsyncSottoClient:
        client = AsyncSottoClient(
            self.address, insecure=True, identity=identity, roster=ROSTER, retry_for_s=RETRY_FOR_S
        )
        self._closing.append(client)
        return client

    def operations(self, identity: Identity = ANN) -> Any:
        """The stock stub of google.longrunning."""
        channel = connect(self.address, tls=None, insecure=True, identity=identity)
        self._closing.append(channel)
        return operations_pb2_grpc.OperationsStub(channel)

    def stub(self, identity: Identity = ANN) -> Any:
        """The stub of JobService, as any client has it: errors and repetitions are its own business."""
        channel = connect(self.address, tls=None, insecure=True, identity=identity)
        self._closing.append(channel)
        return jobs_pb2_grpc.JobServiceStub(channel)

    def row(self, training: jobs_pb2.FederatedTraining, number: int) -> JobRow:
        """A job of ann's that waits; a larger number is a later one."""
        spec = spec_from_proto(jobs_pb2.Job(federated_training=training))
        return JobRow(
            job_id=f"{number:016x}",
            request_id=str(number),
            owner=str(ANN),
            display_name="",
            kind=spec.kind,
            spec=spec.to_json(),
            spec_digest=spec.digest,
            created_at=utc(NOW + number),
        )

    async def store_all(self, rows: Sequence[JobRow]) -> None:
        """Behind the coordinator's back: they wait until it is woken."""

        def write(connection: Connection) -> None:
            for row in rows:
                self.store.create(connection, row)

        await self.database.run(write)

    def permit(self, rounds: int) -> None:
        """For so many rounds, computations or attempts that fail (`PlayedCoordinator`)."""
        for _ in range(rounds):
            self.coordinator.permits.release()

    def write_config(self, directory: Path) -> Path:
        """A client.yaml with a pinned roster."""
        save_roster(directory / "roster.json", sign_roster(ROSTER, KEY), operator_verify_key=KEY.verify_key)
        ANNS_KEY.save(directory / "signing.key")
        config = directory / "client.yaml"
        config.write_text(
            f"version: 1\nfederation: demo\nname: ann\nserver: {{address: '{self.address}', insecure: true}}\n"
            "keys: {roster: roster.json, signing_key: signing.key}\n"
        )
        return config

    async def stop(self) -> None:
        for one in self._closing:
            await one.close()
        await self.server.stop(0)
        await self.coordinator.stop()
        await self.database.close()


@pytest.fixture
async def job_house(
    tmp_path: Path, reserved_address: Callable[[], AbstractContextManager[str]]
) -> AsyncIterator[House]:
    """A served job service: `.client(identity)`, `.stub(identity)`, `.operations(identity)`, `.permit(rounds)`."""
    with reserved_address() as address:
        house = House(tmp_path / "aggregator", address)
        await house.start()
        yield house
        await house.stop()


SMALL_EPSILON = 40.0
"""Party c's budget for a row; the others allow 1000."""


@pytest.fixture(scope="session")
def planted_package(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The import path of `planted/planted_rows.py`, installed as any package of tasks is."""
    place = tmp_path_factory.mktemp("installed")
    about = place / "planted_rows-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-rows\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[sotto.tasks]\nplanted = planted_rows:PlantedTask\n")
    return [Path(__file__).parent / "planted", place]


@pytest.fixture(scope="session")
def federation(
    make_federation: Callable[..., Any], planted_package: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Kits for parties a, b and c, any two of whom can open; nobody runs until `federation.start(…)`.

    Each party has planted rows too, which b cannot train on if a job says how to `fail`; what is computed from them is
    noted in the file `federation.notebook`. All log at DEBUG.
    """
    notebook = tmp_path_factory.mktemp("notebook") / "notebook"
    common = {
        "SOTTO__LOGGING__LEVEL": "DEBUG",
        "PYTHONPATH": os.pathsep.join([*map(str, planted_package), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "PLANTED_NOTEBOOK": str(notebook),
        "PLANTED_WATCHED": "1",
    }
    planted = {
        "declared_rows": 150_000,
        "options": {"who": "{name}", "fails_at": "b", "fail": None, "unreadable": None},
    }
    made = make_federation(
        party={"privacy": {"budgets": {"example": {"epsilon": 1000.0}}}, "datasets": {"planted": planted}},
        settings={
            **dict.fromkeys(("aggregator", "a", "b"), common),
            "c": {**common, "SOTTO__PRIVACY__BUDGETS__EXAMPLE__EPSILON": str(SMALL_EPSILON)},
        },
    )
    made.notebook = notebook
    return made
