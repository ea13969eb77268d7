"""A job service over a real database and real blobs, whose coordinator is played."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src.communication.identity import Identity
from src.errors import NotFoundError, SottoError
from src.jobs.executors.stats import PoolStats
from src.jobs.scheduler import Capacity
from src.jobs.service import Activity, JobService, JobSettings, JobView, Notifier, Status
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import JobSpec
from src.jobs.states import Event, JobRow
from src.jobs.store import JobStore, StoredEvent
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.leftovers import Leftovers
from src.storage.schema import FromMetadata

ANN = Identity("scientist", "ann")
SETTINGS = JobSettings(
    max_jobs_pending=4,
    max_pending_per_scientist=3,
    max_rounds=100,
    max_parties=3,
    max_round_timeout_s=1000.0,
    capacity=Capacity(max_trainings=1, max_computations=1, max_per_scientist=1),
    max_attempts=3,
    computation_timeout_s=500.0,
)


class CountingStore(JobStore):
    """Says how often it was asked for what."""

    def __init__(self, metadata: MetaData) -> None:
        super().__init__(metadata)
        self.asked: Counter[str] = Counter()

    def events(self, connection: Connection, job_id: str, *, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        self.asked["events"] += 1
        return super().events(connection, job_id, after=after, limit=limit)

    def positions(self, connection: Connection, capacity: Capacity) -> dict[str, int]:
        self.asked["positions"] += 1
        return super().positions(connection, capacity)


class PlayedResults:
    """Of no round."""

    async def of_round(self, job: JobRow, choice: str, *, as_known: str = "") -> dict[str, Any]:
        raise NotFoundError(f"round {choice} of job {job.job_id} was not released")


class PlayedCoordinator:
    """Accepts what its `refusal` allows, and trainings when `pricing_allowed` is set; counts how often it was woken."""

    def __init__(self) -> None:
        self.refusal: SottoError | None = None
        self.priced: list[tuple[str, str]] = []
        self.woken = 0
        self.pricing_allowed = asyncio.Event()
        self.pricing_allowed.set()

    async def price(self, spec: JobSpec, *, owner: str, model: bytes = b"") -> tuple[str, ...]:
        self.priced.append((spec.kind, owner))
        if isinstance(spec, FederatedTrainingSpec):
            await self.pricing_allowed.wait()
        if self.refusal:
            raise self.refusal
        return ()

    async def model_bytes(self, spec: FederatedTrainingSpec, *, model: bytes = b"") -> int:
        return 1000

    @property
    def results(self) -> PlayedResults:
        return PlayedResults()

    def wake(self) -> None:
        self.woken += 1

    def progress(self, job_id: str) -> Activity | None:
        return Activity("training", ("b",))

    def status(self) -> Status:
        return Status(
            federation="demo",
            software_version="1",
            key_id="k",
            custody="threshold",
            parties=(),
            workers=PoolStats(3, 1, 4, 2, 1, 0, 5, 0, 1, 1, 0, 9, 0, 0, 0, 0.0, ()),
            started_at="2025-01-01T00:00:00.000000Z",
        )


class House:
    """A service and what stands around it."""

    def __init__(self, directory: Path) -> None:
        metadata = MetaData()
        self.store = CountingStore(metadata)
        self.database = Database(directory / "jobs.db", FromMetadata(metadata))
        self.blobs = Blobs(directory / "blobs")
        self.coordinator = PlayedCoordinator()
        self.now = 1_000.0
        self.service = JobService(
            self.database,
            self.store,
            blobs=self.blobs,
            coordinator=self.coordinator,
            settings=SETTINGS,
            leftovers=Leftovers(self.database, self.blobs, self.store),
            notifier=Notifier(),
            clock=self._clock,
        )

    def _clock(self) -> float:
        self.now += 1
        return self.now

    async def create(
        self, caller: Identity = ANN, request_id: str = "r", *, model: bytes = b"", **fields: object
    ) -> str:
        digest = hashlib.sha256(model).hexdigest() if model else ""
        spec = FederatedTrainingSpec.from_json({"task": "t", "initial_model_sha256": digest, **fields})
        view = await self.service.create(caller, request_id, spec=spec, display_name="x", model=model)
        return view.row.job_id

    async def submit(self, spec: JobSpec, request_id: str = "r", *, caller: Identity = ANN, **fields: Any) -> JobView:
        return await self.service.create(caller, request_id, spec=spec, **fields)

    async def asked_for(self, what: str, times: int) -> None:
        """Returns when the store has been asked so often; the database's thread is given the time to be."""
        while self.store.asked[what] < times:
            await self.database.run(lambda connection: None)

    async def happen(self, job_id: str, *events: Event) -> None:
        for event in events:
            await self.database.run(lambda c, e=event: self.store.apply(c, job_id, e, now=self._clock()))  # type: ignore[misc]
            self.service.notify(job_id)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """`.service` and what stands around it: `.store`, `.database`, `.blobs`, `.coordinator`."""
    house = House(tmp_path)
    await house.database.open()
    yield house
    await house.database.close()
