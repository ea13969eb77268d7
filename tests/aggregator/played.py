"""A coordinator over a real database, whose workers, parties and clock are played."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from sqlalchemy import MetaData

from src.aggregator.accounts import Accounts
from src.aggregator.computations import Computations
from src.aggregator.coordinator import Coordinator
from src.aggregator.federation import Federation
from src.aggregator.pipeline import AggregatorPipeline
from src.aggregator.results import Results
from src.aggregator.round_row import (
    Batch,
    BatchStored,
    Failure,
    PartyFailed,
    RootCommitted,
    RoundRow,
    ShareStored,
    Work,
)
from src.aggregator.sessions import Sessions
from src.aggregator.store import BlobNames, EnrolmentStore, RoundStore
from src.config import AggregatorConfig
from src.config_sections import AggregatorLimits, AggregatorPrivacy, JobsSection
from src.errors import (
    CATALOGUE,
    SottoError,
)
from src.jobs.computations import EvaluationSpec
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import JobSpec
from src.jobs.states import Event, EventKind, JobRow, JobState, utc
from src.jobs.store import JobStore, StoredEvent
from src.learning.flatten import to_safetensors
from src.privacy.ledger import charges
from src.protocol.plan import ROOT_KIND, RootStatement
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.leftovers import Leftovers
from src.storage.migrations import Migrations

START = 1.8e9
LEASE_S = 60.0
ANN, BOB = "scientist/ann", "scientist/bob"
EVALUATION = EvaluationSpec(model_sha256="0" * 64, task="t")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Played:
    """What does the work: answers at once, fails as often as it is told to, or does not answer at all.

    Attributes:
        asked: units, and jobs by their kind, how often.
        failures: what is raised next, by unit.
        hanging: units that do not end by themselves.
        ended: how often a unit that hung was cancelled.
        opened: what opening an aggregate gives besides a model; evaluated: what measuring one gives besides an AUC.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.failures: defaultdict[str, list[Exception]] = defaultdict(list)
        self.hanging: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.opened: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.let_go = asyncio.Event()

    async def _play(self, name: str) -> None:
        self.asked[name] += 1
        if self.failures[name]:
            raise self.failures[name].pop(0)
        if name in self.hanging:
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.ended[name] += 1
                raise

    # the pool
    async def run(self, name: str, params: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        await self._play(name)
        if name == "open_aggregate":
            return {"model_sha256": digest("model"), "model_bytes": 1, "state_sha256": "", **self.opened}
        if name == "evaluate_model":
            return {"rows": "played", "without": "", "metrics": {"auc": 0.5}, **self.evaluated}
        number = f"{name} {params['plan_digest']} {self.asked[name]}"
        return {"header": "00", "sha256": digest(number), "size": 1, "root": digest(number), "proof": "00"}

    def cores_for_a_unit(self) -> int:
        return 1


class Runner:
    """Computations, of which nothing but their end is of interest."""

    def __init__(self, played: Played) -> None:
        self._played = played

    async def run(self, job: JobRow, _source: JobRow | None, **_: Any) -> dict[str, Any]:
        await self._played._play(job.kind)
        return {"files": [], "metrics": {}}


class Place:
    """A coordinator in its place."""

    def __init__(self, federation: Federation, directory: Path, **jobs: Any) -> None:
        metadata = MetaData()
        self.store, self.rounds = JobStore(metadata), RoundStore(metadata)
        self.ledger, self.enrolments = LedgerStore(metadata), EnrolmentStore(metadata)
        self.database = Database(directory / "aggregator.sqlite", Migrations("aggregator"))
        self.federation = federation
        self.blobs = Blobs(directory / "blobs")
        self.leftovers = Leftovers(self.database, self.blobs, BlobNames(self.store, self.rounds))
        self.clock, self.work = Clock(), Played()
        self.config = AggregatorConfig.model_construct(
            federation="demo",
            jobs=JobsSection(**{"lease_s": LEASE_S, **jobs}),
            limits=AggregatorLimits(),
            privacy=AggregatorPrivacy(),
            keys=SimpleNamespace(private_key=None),
            server=SimpleNamespace(tls=None),
            evaluation={},
        )
        self.coordinator = self.another()

    def another(self) -> Coordinator:
        """As another process would have one, on the same database."""
        accounts = Accounts(self.ledger, self.config.privacy, federation="demo")
        pipeline = AggregatorPipeline(cast(Any, self.work), self.federation, self.config, self.blobs)
        results = Results(
            database=self.database,
            jobs=self.store,
            rounds=self.rounds,
            accounts=accounts,
            blobs=self.blobs,
            pipeline=pipeline,
            federation=self.federation,
            leftovers=self.leftovers,
            most_bytes=self.config.limits.max_stored_bytes_per_scientist,
            clock=self.clock,
        )
        return Coordinator(
            config=self.config,
            database=self.database,
            jobs=self.store,
            rounds=self.rounds,
            accounts=accounts,
            results=results,
            pipeline=pipeline,
            computations=cast(Computations, Runner(self.work)),
            federation=self.federation,
            sessions=Sessions(),
            enrolments=self.enrolments,
            leftovers=self.leftovers,
            clock=self.clock,
        )

    # --- time ---------------------------------------------------------------------------------------------------------

    async def turn(self, after_s: float = 0.0) -> None:
        """Turn until nothing happens any more but what hangs."""
        self.clock.now += after_s
        coordinator = self.coordinator
        while True:
            coordinator._woken.clear()
            await coordinator._turn()
            await self._quiet()
            if not coordinator._woken.is_set():
                return

    async def _quiet(self) -> None:
        """Until every task has ended or hangs."""
        hangs = {"compute": "evaluation", "make noise": "make_noise", "multiply the contributions": "fold"}
        hangs |= {"evaluate": "evaluate_model"}
        while any(hangs.get(what) not in self.work.hanging for _, _, what in self.coordinator._tasks._running):
            await self.database.run(lambda _: None)
            await asyncio.sleep(0)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    async def submit(self, spec: JobSpec = EVALUATION, *, owner: str = ANN, timeout_s: float = 0.0) -> str:
        """A PENDING job."""
        self.clock.now += 0.001
        number = len(await self.database.run(lambda c: self.store.waiting(c))) + int((self.clock.now - START) * 1e6)
        job_id = digest(str(number))[:16]
        now = self.clock.now
        row = JobRow(
            job_id=job_id,
            request_id=job_id,
            owner=owner,
            display_name="",
            kind=spec.kind,
            spec=spec.to_json(),
            spec_digest=spec.digest,
            max_attempts=1 + len(self.config.jobs.retry_delays_s),
            created_at=utc(now),
            deadline_at=utc(now + timeout_s) if timeout_s else "",
        )
        await self.database.run(lambda c: self.store.create(c, row))
        return job_id

    def training(self, **fields: Any) -> FederatedTrainingSpec:
        """One that a and b contribute to."""
        model = self.blobs.write(to_safetensors({"w": np.zeros(60, np.float32)}))
        known = {"task": "t", "rounds": 1, "spare_rounds": 0, "parties": ("a", "b"), "round_timeout_s": 1000.0}
        return FederatedTrainingSpec(**{**known, "initial_model_sha256": model.sha256, **fields})

    async def job(self, job_id: str) -> JobRow:
        return await self.database.run(lambda c: self.store.get(c, job_id))

    async def state(self, job_id: str) -> JobState:
        return (await self.job(job_id)).state

    async def events(self, job_id: str) -> list[StoredEvent]:
        return await self.database.run(lambda c: self.store.events(c, job_id))

    async def kinds(self, job_id: str) -> list[str]:
        return [event.kind.value for event in await self.events(job_id)]

    async def cancel(self, job_id: str) -> None:
        """As the service does it for a job under way."""
        event = Event(kind=EventKind.CANCELLING, message="asked for", cause=ANN)
        await self.database.run(lambda c: self.store.apply(c, job_id, event, now=self.clock()))

    async def charged(self, job_id: str) -> list[str]:
        """What became of each of the job's charges."""
        entries = await self.database.run(self.ledger.entries)
        mine = [each for each in charges(entries).values() if each.entry.job_id == job_id]
        return [each.settled.kind if each.settled else "open" for each in mine]

    # --- parties ------------------------------------------------------------------------------------------------------

    async def round(self, job_id: str, number: int = 1) -> RoundRow:
        return await self.database.run(lambda c: self.rounds.get(c, job_id, number))

    async def refuse(self, job_id: str, error: type[SottoError], *parties: str, number: int = 1) -> None:
        for party in parties:
            failure = Failure(Work.CONTRIBUTE.value, CATALOGUE[error].reason, "no")
            await self.coordinator.trainings.happened(job_id, number, PartyFailed(party, failure))
        await self.turn()

    async def commit(self, job_id: str, number: int = 1) -> None:
        """Roots of everybody invited."""
        row = await self.round(job_id, number)
        for party in row.cohort:
            head = digest(f"ledger of {party}")
            root = RootStatement(row.plan_digest, party, digest(party), 1, 1, "00", head).to_statement()
            signed = self.federation.sign(ROOT_KIND, root).to_json()
            await self.coordinator.trainings.happened(job_id, number, RootCommitted(party, signed))

    async def contribute(self, job_id: str, number: int = 1) -> None:
        """Roots, updates and shares of everybody invited: the round has all that it needs."""
        happened = self.coordinator.trainings.happened
        await self.commit(job_id, number)
        await self.turn()
        for party in (await self.round(job_id, number)).cohort:
            await happened(job_id, number, BatchStored(party, Batch("00", digest(f"{party} {number}"), 1), 1))
        await self.turn()
        for party in (await self.round(job_id, number)).asked:
            await happened(job_id, number, ShareStored(party, digest(f"share {party} {number}")))
        await self.turn()
