"""What a round costs a role after ten rounds and after ten thousand: the books of both ends, without any training.

The two roles are those that `sotto aggregator` and `sotto party` wire, with their own databases, keys and ledgers; no
server listens and no worker starts. The history is of several jobs, each with noise of its own, and was laid down
through the ledger's and the stores' own methods: signed and chained. The last of these jobs is under way, and the
rounds that are timed are its next ones: planned, charged, committed to, delivered, spent, opened, released and settled,
each step in the transactions that it takes in a federation. What encrypts, trains and multiplies is left out, which is
most of a real round: so the ratio here is the larger one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

from src.aggregator.app import App as Aggregator
from src.aggregator.planning import Model, plan_of
from src.aggregator.round_row import (
    Batch,
    BatchStored,
    BudgetSpent,
    Evaluated,
    Folded,
    RootCommitted,
    RoundRow,
    RoundState,
    Step,
    spent_through,
)
from src.aggregator.rounds import next_step
from src.aggregator.so_far import Standing, history, so_far
from src.aggregator.steps import costs_of
from src.aggregator.summary import round_summary
from src.communication.generated import federation_pb2
from src.config import load_aggregator_config, load_party_config
from src.jobs.spec import FederatedTrainingSpec, LocalTraining, PartyPrivacy
from src.jobs.states import Event, EventKind, JobRow, round_event, succeeded_event, utc
from src.party.app import App as Party
from src.party.orders import Ordered
from src.party.rules import CheckedPlan
from src.party.store import PartyRound, Stage
from src.privacy.noise_plan import NoisePlan
from src.protocol.batches import StoredBatch
from src.protocol.derive import derive_again
from src.protocol.order import Order, order_time
from src.protocol.plan import ROOT_KIND, RootStatement
from src.provisioning import provision
from src.storage.heads import Head

from .jobs_kit import environment
from .measure import REPEATS, Figures, say

SHORT: Final = 10
LONG: Final = int(os.environ.get("SOTTO_BENCH_ROUNDS", "10000"))
JOBS: Final = 10
"""That a long history is of; none has ended, as far as the store knows, but only the last goes on."""
MEASURED: Final = 20
"""Rounds in each of `REPEATS` runs; their median counts."""
AT_ONCE: Final = 100
"""Rounds of the history that are written in one transaction."""
PARTIES: Final = ("a", "b")
MODEL: Final = Model("0" * 64, 4096, 1000)
PLENTY: Final = 10**7
DAY_S: Final = 86_400.0
MOST_ROUNDS: Final = 20_000
"""Of one job."""
WITHOUT_LIMIT: Final = {"max_rounds": PLENTY, "epsilon": 1e9, "delta": 1e-5}
"""Of no effect, and computed at every charge."""

REACH: Final[dict[str, tuple[str, float]]] = {"round_10000_vs_10": ("≤", 1.2)}
"""A round after 10 000 over one after 10: CPU time of the role's process, its database's included."""


def digest(text: str) -> str:
    """Stands for the digest of something."""
    return hashlib.sha256(text.encode()).hexdigest()


def training(number: int) -> FederatedTrainingSpec:
    """A job of the history: noise of its own at either level."""
    return FederatedTrainingSpec(
        task="randhie",
        rounds=MOST_ROUNDS,
        round_timeout_s=DAY_S,
        parties=PARTIES,
        seed=number,
        local_training=LocalTraining(epsilon=4.0 + number),
        party_privacy=PartyPrivacy(noise_by="parties", noise_multiplier=256.0 + number),
    )


class _Played:
    """What the workers would compute, at once."""

    async def open(self, row: RoundRow, **_: Any) -> dict[str, Any]:
        """A model of its own in each round."""
        return {"model_sha256": digest(row.plan_digest), "model_bytes": MODEL.size, "state_sha256": ""}

    async def evaluate(self, *_: Any, **__: Any) -> Evaluated:
        """Nothing is measured."""
        return Evaluated({}, "")


class Federation:
    """Both roles on kits of their own, and so many rounds behind them."""

    def __init__(self, folder: Path) -> None:
        provision(
            folder,
            federation="bench",
            parties=PARTIES,
            custody="aggregator",
            modulus_bits=512,
            insecure_small=True,
            aggregator_overrides={"privacy": {"noise_by": "parties", "budget": WITHOUT_LIMIT}},
            party_overrides={
                "privacy": {"budgets": {"example": WITHOUT_LIMIT, "party": WITHOUT_LIMIT, "against": "release"}},
                "datasets": {"randhie": {"declared_rows": 1000}},
            },
        )
        self.party_config = folder / "party-a" / "party.yaml"
        self._aggregator_config = folder / "aggregator" / "aggregator.yaml"
        self._derived: tuple[str, NoisePlan] | None = None
        self.begin()

    def begin(self) -> None:
        """As processes that have just begun have it; what they have opened is closed by `end`."""
        self.aggregator = Aggregator(load_aggregator_config(self._aggregator_config, environ={}))
        self.trainings = self.aggregator._coordinator.trainings
        self.trainings._steps._pipeline = _Played()  # type: ignore[assignment]
        self.party = Party(load_party_config(self.party_config, environ={}))
        self.worker, self.database = self.party._worker, self.aggregator._database

    async def open(self) -> None:
        """Open both databases and ledgers, as a start does."""
        for role in (self.aggregator, self.party):
            await role._database.open()
            await role._database.run(partial(role._accounts.open, now=time.time()))

    async def end(self) -> None:
        """Close them."""
        await self.aggregator._leftovers.settled()
        for role in (self.aggregator, self.party):
            await role._database.close()

    async def verify(self) -> None:
        """Both chains, from the first entry on."""
        for role in (self.aggregator, self.party):
            await role._database.run(role._accounts.verify)

    # --- the history --------------------------------------------------------------------------------------------------

    async def lay(self, rounds: int) -> None:
        """`rounds` rounds of `JOBS` jobs, of which all but the last are over."""
        store = self.aggregator._service._store
        for number in range(JOBS):
            self.spec = training(number)
            self.job = await self.database.run(partial(self._create, number=number))
            standing = await self.database.run(self._so_far)
            self.row = self._with_roots(self.trainings._new_row(self.job, 1, self.spec, model=MODEL, standing=standing))
            share = rounds // JOBS
            for start in range(1, share + 1, AT_ONCE):
                numbers = range(start, min(start + AT_ONCE, share + 1))
                self.row = await self.database.run(partial(self._lay_rounds, numbers=numbers))
                await self.party._database.run(partial(self._lay_at_party, numbers=numbers))
            if number < JOBS - 1:
                over = succeeded_event({"files": [], "metrics": {}})
                await self.database.run(partial(store.apply, job_id=self.job.job_id, event=over, now=time.time()))
        await self.drive()

    def _create(self, connection: Connection, number: int) -> JobRow:
        now = time.time()
        row = JobRow(
            job_id=f"{number:016x}",
            request_id=f"job {number}",
            owner="scientist/scientist",
            display_name="",
            kind=self.spec.kind,
            spec=self.spec.to_json(),
            spec_digest=self.spec.digest,
            max_attempts=4,
            created_at=utc(now),
        )
        self.aggregator._service._store.create(connection, row)
        started = Event(kind=EventKind.STARTED, message="started", cause="aggregator")
        return self.aggregator._service._store.apply(connection, row.job_id, started, now=now)

    async def drive(self) -> None:
        """Take the lease on the job that is under way, as a start does."""
        for job in await self.aggregator._coordinator._held.seize_all():
            await self.trainings.restore(job)

    def _so_far(self, connection: Connection) -> Standing:
        job_id, federation = self.job.job_id, self.aggregator.federation
        return so_far(connection, job_id, self.spec, rounds=self.trainings._rounds, federation=federation)

    def _with_roots(self, row: RoundRow) -> RoundRow:
        return replace(row, roots={name: self._root(row, name).root for name in row.cohort})

    def _root(self, row: RoundRow, name: str) -> RootCommitted:
        root = RootStatement(row.plan_digest, name, digest(name), 1, 1, "00", digest(f"ledger of {name}"))
        signed = self.aggregator.federation.sign(ROOT_KIND, root.to_statement())
        return RootCommitted(name, signed.to_json())

    def _lay_rounds(self, connection: Connection, numbers: range) -> RoundRow:
        """At the aggregator: each released and settled; returns the last."""
        accounts, rounds, store = self.aggregator._accounts, self.trainings._rounds, self.aggregator._service._store
        job_id, row, before = self.job.job_id, self.row, self.row.spent_before or ()
        now, cost = time.time(), costs_of(self.row.costs)[0]
        for number in numbers:
            before = spent_through(row, before) if number > 1 else ()
            model = digest(f"{job_id} {number}")
            result = {"model_sha256": model, "model_bytes": MODEL.size, "state_sha256": "", "blobs": [model]}
            row = replace(self.row, number=number, spent_before=before, state=RoundState.RELEASED, spent=True)
            row = replace(row, result=result, settled=True, ended_at=now)
            accounts.reserve(connection, job_id, number, event=cost, parties=row.cohort, now=now)
            accounts.spend(connection, job_id, number, now=now)
            accounts.release(connection, job_id, number, figures={"model_sha256": model}, now=now)
            rounds.insert(connection, row)
            store.apply(connection, job_id, round_event(round_summary(row)), now=now)
        return row

    def _lay_at_party(self, connection: Connection, numbers: range) -> None:
        """At the party: each delivered and ended."""
        for number in numbers:
            checked, ordered = self._checked(number)
            self.worker._begin(connection, checked, ordered)
            row = self.worker._begin_training(connection, checked.plan)
            row = replace(row, stage=Stage.COMMITTED, batch=_batch(row).to_json(), root={})
            self.worker._enter_shown(connection, row, reason="the upload begins")
            self.worker._memory.put(connection, replace(row, stage=Stage.DELIVERED, ended="RELEASED"))

    def _checked(self, number: int) -> tuple[CheckedPlan, Ordered]:
        """The plan of a round as this party has checked it, and the order that it rests on."""
        plan = replace(plan_of(self.row.plan), round=number)
        scheme = self.aggregator.federation.scheme(plan.scheme, allow_plaintext=False)
        order = Order(
            federation="bench",
            scientist="scientist",
            request_id=self.job.request_id,
            expires_at=order_time(time.time() + DAY_S),
            job=self.spec.kind,
            spec="{}",
            model_sha256="",
            most_rounds=MOST_ROUNDS,
        )
        if self._derived is None or self._derived[0] != plan.job_id:  # alike in all rounds of a job
            self._derived = plan.job_id, derive_again(scheme, plan).noise_plan
        noise = self._derived[1]
        plan_digest = digest(f"{plan.job_id} {number}")
        return CheckedPlan(plan, plan_digest, noise, "scientist"), Ordered(order, digest(plan.job_id), self.spec)

    # --- a round ------------------------------------------------------------------------------------------------------

    async def round(self) -> None:
        """One more, from its plan to its end, at both ends."""
        job_id, trainings = self.job.job_id, self.trainings
        standing = await self.database.run(self._so_far)
        number = self.row.number + 1
        row = trainings._new_row(self.job, number, self.spec, model=standing.model or MODEL, standing=standing)
        await self.database.run(partial(trainings._open_round, row=row))
        checked, ordered = self._checked(number)
        at_party = self.party._database.run
        await at_party(lambda c: self.worker._begin(c, checked, ordered))
        kept = await at_party(lambda c: self.worker._begin_training(c, checked.plan))
        batch = _batch(kept)
        await at_party(lambda c: self.worker._commit(c, checked.plan, batch))
        name = federation_pb2.RoundName(job_id=job_id, round=number)
        await at_party(lambda c: self.worker._about_to_tell(c, name, checked.plan))
        for party in row.cohort:
            head = Head(digest(f"{party} {number}"), job_id, number)
            await self.aggregator._coordinator.told(party, head)
            row = await trainings.happened(job_id, number, self._root(row, party))
        while not row.settled:
            row = await self._step(row, next_step(row, time.time()))
        await at_party(lambda c: self._reveal(c, number))
        await self.worker.ended(name, federation_pb2.RoundEnded(state="RELEASED"))
        await self.worker.uses.settled()
        await self.aggregator._leftovers.settled()
        self.row = row

    async def _step(self, row: RoundRow, step: Step | None) -> RoundRow:
        trainings, steps = self.trainings, self.trainings._steps
        if step is Step.SETTLE:
            await trainings._settle(row)
            return await self.database.run(lambda c: trainings._rounds.get(c, row.job_id, row.number))
        if step is None:
            sent = [name for name in row.cohort if name not in row.batches]
            event: Any = BatchStored(sent[0], Batch("00", digest(f"{sent[0]} {row.number}"), 1), 1)
        elif step is Step.FREEZE_LIST:
            event = await steps.freeze_list(row)
        elif step is Step.FOLD:
            event = Folded(Batch("00", digest(f"sum {row.number}"), 1), digest("root"))
        elif step is Step.SPEND:
            event = BudgetSpent()
        elif step is Step.EVALUATE:
            event = await steps.evaluate(row)
        else:
            stores = {"rounds": trainings._rounds, "accounts": trainings._accounts}
            before = await self.database.run(lambda c: history(c, row, **stores))
            (event,) = await steps.release(row, spec=self.spec, history=before)
        return await trainings.happened(row.job_id, row.number, event)

    def _reveal(self, connection: Connection, number: int) -> None:
        """As an accepted list and a delivered upload do it."""
        memory = self.worker._memory
        row = memory.find(connection, self.job.job_id, number)
        assert row is not None
        self.worker._enter_shown(connection, row, reason="the upload begins")
        memory.put(connection, replace(row, stage=Stage.REVEALED))
        self.worker._delivered(connection, federation_pb2.RoundName(job_id=row.job_id, round=number))


def _batch(row: PartyRound) -> StoredBatch:
    return StoredBatch("00", digest(f"batch {row.job_id} {row.number}"), 1, digest("root"), "00")


def run() -> Figures:
    """Milliseconds a round; seconds that a start, verifying, and `sotto budget show` take after many."""
    with tempfile.TemporaryDirectory(prefix="sotto-bench-") as name:
        return asyncio.run(_run(Path(name)))


async def _run(folder: Path) -> Figures:
    federations = {rounds: Federation(folder / str(rounds)) for rounds in (SHORT, LONG)}
    for rounds, federation in federations.items():
        await federation.open()
        say(f"{rounds} rounds of {JOBS} jobs are laid down")
        await federation.lay(rounds)
    say("rounds after them, in turn")
    taken: dict[int, float] = {}
    for _ in range(REPEATS):
        for rounds, federation in federations.items():
            times = [await _cpu_ms(federation.round) for _ in range(MEASURED)]
            taken[rounds] = min(taken.get(rounds, float("inf")), statistics.median(times))
    long = federations[LONG]
    say("starts, and looking at the ledger")
    await federations[SHORT].end()
    first, again = await _restart_s(long), await _restart_s(long)
    verify = await _cpu_ms(long.verify) / 1e3
    await long.end()
    begun = time.perf_counter()
    show = [str(Path(sys.executable).with_name("sotto")), "budget", "show", "--config", str(long.party_config)]
    await asyncio.to_thread(subprocess.run, show, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return {
        f"round_after_{SHORT}_ms": taken[SHORT],
        f"round_after_{LONG}_ms": taken[LONG],
        "round_10000_vs_10": taken[LONG] / taken[SHORT],
        f"start_after_{LONG}_s": first,
        f"start_after_{LONG}_with_checkpoint_s": again,
        f"verify_after_{LONG}_s": verify,
        f"budget_show_after_{LONG}_s": time.perf_counter() - begun,
    }


async def _cpu_ms(work: Callable[[], Awaitable[None]]) -> float:
    begun = time.process_time()
    await work()
    return (time.process_time() - begun) * 1e3


async def _restart_s(federation: Federation) -> float:
    """Both roles, from their kits to the rounds at hand; without their workers."""
    await federation.end()
    begun = time.perf_counter()
    federation.begin()
    await federation.open()
    await federation.drive()
    return time.perf_counter() - begun
