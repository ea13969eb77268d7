"""The driver: loads rows, asks the rules what to do, does it, and writes down what came of it.

One loop turns whenever something happened or a second has passed. In a turn every active job moves as far as it can
without waiting; what takes time runs beside it as a task, at most one of a kind for each round. Everything that matters
is in the database: a killed process goes on from its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from sqlalchemy import Connection

from .. import __version__
from ..config import AggregatorConfig
from ..errors import JobFailed, LimitError, RoundFailed, SottoError, StateError, meaning
from ..jobs.service import Activity, PartyStatus, Status
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import Event as JobEvent
from ..jobs.states import EventKind, JobRow, JobState, failed_event, round_event, succeeded_event, utc
from ..jobs.store import JobStore
from ..privacy.events import Event as Mechanism
from ..privacy.events import event_to_json
from ..protocol.plan import PLAN_KIND, signed_digest
from ..storage.blobs import Blobs
from ..storage.database import Database
from . import rounds as rules
from .accounts import Accounts
from .artifact import write_artifact
from .federation import Federation
from .pipeline import AggregatorPipeline
from .planning import Model, plan_of, plan_round, round_costs
from .round_row import (
    AT_REST,
    BudgetSpent,
    Cancel,
    Event,
    RoundRow,
    RoundState,
    Settled,
    Step,
    StepFailed,
    Tick,
)
from .sessions import Sessions
from .steps import History, RoundSteps, costs_of, lacking, public_reason
from .store import EnrolmentStore, RoundStore
from .summary import round_summary

LOG = logging.getLogger("sotto.aggregator")

TURN_S: Final = 1.0
"""Deadlines are met to the second."""
WAIT_NOTICE_S: Final = 10.0
"""A round that has waited this long says for whom."""


class Coordinator:
    """Runs jobs, one after another, round by round."""

    def __init__(
        self,
        *,
        config: AggregatorConfig,
        database: Database,
        jobs: JobStore,
        rounds: RoundStore,
        accounts: Accounts,
        blobs: Blobs,
        pipeline: AggregatorPipeline,
        federation: Federation,
        sessions: Sessions,
        enrolments: EnrolmentStore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._database = database
        self._jobs = jobs
        self._rounds = rounds
        self._accounts = accounts
        self._blobs = blobs
        self._pipeline = pipeline
        self._federation = federation
        self._sessions = sessions
        self._enrolments = enrolments
        self._clock = clock
        self._steps = RoundSteps(pipeline, federation, clock=clock)
        self._tasks: dict[tuple[str, int, str], asyncio.Task[None]] = {}
        self._recent: dict[tuple[str, int], RoundRow] = {}
        self._stage: dict[str, str] = {}
        self._noticed: dict[tuple[str, int], tuple[tuple[str, ...], float, bool]] = {}
        self._woken = asyncio.Event()
        self.notify: Callable[[str], None] = lambda _job_id: None

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Turn until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self._turn()
            except Exception:  # whatever it is: the rows are as they were, and the next turn reads them again
                LOG.exception("a turn of the coordinator failed; the next one tries again")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):  # wait_for of Python 3.11 loses a cancellation beside a wake-up
                    await self._woken.wait()

    async def stop(self) -> None:
        """Cancel what runs beside the loop; the rows stay as they are."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Something happened: turn now."""
        self._woken.set()

    async def _turn(self) -> None:
        jobs, started = await self._database.run(self._active_jobs)
        if started:
            self.notify(jobs[0].job_id)
        for job in jobs:
            latest = await self._database.run(partial(self._rounds.latest, job_id=job.job_id))
            if latest is not None:
                self._remember(latest)
            await self._advance_job(job, latest)
        self._offer()

    def _active_jobs(self, connection: Connection) -> tuple[list[JobRow], bool]:
        """The jobs under way, or the next one, started now."""
        active = self._jobs.active(connection)
        if active:
            return active, False
        pending = self._jobs.next_pending(connection)
        if pending is None or not self._can_start(pending):
            return [], False
        event = JobEvent(kind=EventKind.STARTED, message="started")
        LOG.info("job %s starts", pending.job_id)
        return [self._jobs.apply(connection, pending.job_id, event, now=self._clock())], True

    def _can_start(self, job: JobRow) -> bool:
        """With a pinned roster at once: the round has a deadline. Without one, once the parties have joined."""
        if self._federation.pinned:
            return True
        spec = FederatedTrainingSpec.from_json(job.spec)
        joined = self._sessions.connected
        missing = sorted(set(spec.parties) - joined)
        self._stage[job.job_id] = f"waiting for {', '.join(missing) or 'at least two parties'} to join"
        return not missing and len(joined) >= 2  # a sum over one party is that party's update

    async def _advance_job(self, job: JobRow, row: RoundRow | None) -> None:
        spec = FederatedTrainingSpec.from_json(job.spec)
        if row is not None and not (row.at_rest and row.settled):
            await self._advance_round(job, row, spec)
            return
        if job.state is JobState.CANCELLING:
            await self._end_job(job.job_id, JobEvent(kind=EventKind.CANCELLED, message="cancelled"))
            return
        number = row.number + 1 if row else 1
        if job.rounds_released >= spec.rounds:
            self._spawn((job.job_id, number, "finish"), partial(self._finish, job, spec))
        elif row is not None and job.rounds_failed > spec.spare_rounds:
            failed = RoundFailed(row.reason)
            await self._fail_job(job.job_id, failed, stage=f"round {row.number}", parties=lacking(row))
        else:
            self._stage[job.job_id] = f"planning round {number}"
            self._spawn((job.job_id, number, "plan"), partial(self._plan, job, spec, number))

    async def _advance_round(self, job: JobRow, row: RoundRow, spec: FederatedTrainingSpec) -> None:
        now = self._clock()
        event = Cancel() if job.state is JobState.CANCELLING else Tick()
        if rules.advance(row, event, now) != row:
            row = await self.happened(row.job_id, row.number, event)
        await self._say_who_is_awaited(row, now)
        step = rules.next_step(row, now)
        if step is Step.SPEND:
            await self.happened(row.job_id, row.number, BudgetSpent())
        elif step is Step.SETTLE:
            await self._settle(row)
        elif step is not None:
            self._spawn((row.job_id, row.number, step.value), partial(self._perform, row, step, spec))

    # --- what happens to a round --------------------------------------------------------------------------------------

    async def happened(self, job_id: str, number: int, event: Event) -> RoundRow:
        """Apply an event to a stored round, with its ledger entry, in one transaction; raises what the rules refuse."""
        now = self._clock()

        def write(connection: Connection) -> RoundRow:
            before = self._rounds.get(connection, job_id, number)
            after = rules.advance(before, event, now)
            if isinstance(event, BudgetSpent):
                self._accounts.spend(connection, job_id, number, now=now)
            if after != before:
                self._rounds.update(connection, after)
            return after

        row = await self._database.run(write)
        self._remember(row)
        if row.at_rest and not row.settled:
            LOG.info("round %d of job %s: %s %s", number, job_id, row.state.value, row.reason)
        self.wake()
        return row

    async def _perform(self, row: RoundRow, step: Step, spec: FederatedTrainingSpec) -> None:
        try:
            for event in await self._do(row, step, spec):
                await self.happened(row.job_id, row.number, event)
        except Exception as error:
            if not isinstance(error, SottoError):
                LOG.exception("step %r of round %d of job %s failed", step.value, row.number, row.job_id)
            LOG.warning("could not %s: %s %s", step.value, public_reason(error), getattr(error, "private", ""))
            await self.happened(row.job_id, row.number, StepFailed(step, public_reason(error)))

    async def _do(self, row: RoundRow, step: Step, spec: FederatedTrainingSpec) -> list[Event]:
        if step is Step.MAKE_NOISE:
            return [await self._steps.make_noise(row)]
        if step is Step.FREEZE_LIST:
            return [await self._steps.freeze_list(row)]
        if step is Step.FOLD:
            return [await self._steps.fold(row)]
        if step is Step.ASK_SHARES:
            return [await self._steps.ask_shares(row, connected=self._sessions.connected)]
        history = await self._database.run(partial(self._history, job_id=row.job_id))
        return await self._steps.release(row, spec=spec, history=history)

    async def _settle(self, row: RoundRow) -> None:
        """The ledger's last word on a round at rest, and the job's event, in one transaction."""
        now = self._clock()

        def write(connection: Connection) -> None:
            if not row.spent:
                reason = f"round {row.state.value.lower()} before a share was asked for"
                self._accounts.return_(connection, row.job_id, row.number, now=now, reason=reason)
            self._rounds.update(connection, rules.advance(row, Settled(), now))
            self._jobs.apply(connection, row.job_id, round_event(round_summary(row)), now=now)

        await self._database.run(write)
        batches = [*row.batches.values(), *([row.aggregate] if row.aggregate else [])]
        for sha256 in [*(batch.sha256 for batch in batches), *row.shares.values()]:
            self._blobs.path(sha256).unlink(missing_ok=True)  # opened or failed: nobody needs it any more
        self.notify(row.job_id)
        self.wake()

    def _history(self, connection: Connection, job_id: str) -> History:
        rows = self._rounds.of_job(connection, job_id)
        released = [row for row in rows if row.state is RoundState.RELEASED and row.result]
        state = (released[-1].result or {})["state_sha256"] if released else ""
        # A round whose shares were asked for counts as shown, whatever became of it; the present one comes on top.
        costs = tuple(costs_of(row) for row in rows if row.spent and row.at_rest)
        return History(costs, state, self._accounts.head(connection))

    # --- what happens to a job ----------------------------------------------------------------------------------------

    async def price(self, spec: FederatedTrainingSpec) -> None:
        """Refuse a job that could not be run to its end within the budget, before anybody trains."""
        cost = await self._cost(spec)
        others = [(await self._cost(other), left) for other, left in await self._database.run(self._committed)]
        planned = [(left, each) for each, left in others if left] + [(spec.priced_rounds, cost)]
        await self._database.run(partial(self._accounts.check, planned=planned))

    async def _cost(self, spec: FederatedTrainingSpec) -> Mechanism:
        scheme = self._pipeline.scheme(spec.encryption.scheme)
        self._pipeline.check(spec)
        if not self._federation.pinned and not self._federation.roster.members:
            raise StateError("no party has joined yet: a job can be priced only for parties that are known")
        model = await self._pipeline.initial_model(spec)
        plan = await asyncio.to_thread(
            plan_round, spec, job_id="priced", number=1, model=model, roster=self._federation.roster, scheme=scheme
        )
        return round_costs(scheme, plan)["release"]

    def _committed(self, connection: Connection) -> list[tuple[FederatedTrainingSpec, int]]:
        """The jobs already accepted, with the rounds that each may still be charged for."""
        pending = self._jobs.list_jobs(connection, state=JobState.PENDING, page_size=1000).rows
        jobs = [*self._jobs.active(connection), *pending]
        specs = [FederatedTrainingSpec.from_json(job.spec) for job in jobs]
        used = [latest.number if latest else 0 for latest in (self._rounds.latest(connection, j.job_id) for j in jobs)]
        return [(spec, max(0, spec.priced_rounds - count)) for spec, count in zip(specs, used, strict=True)]

    async def _plan(self, job: JobRow, spec: FederatedTrainingSpec, number: int) -> None:
        try:
            model = await self._database.run(partial(self._last_model, job_id=job.job_id))
            row = await asyncio.to_thread(
                self._new_row, job.job_id, number, spec, model or await self._pipeline.initial_model(spec)
            )
            await self._database.run(partial(self._open_round, row=row))
        except Exception as error:
            if not isinstance(error, SottoError):
                LOG.exception("planning a round of job %s failed", job.job_id)
            await self._fail_job(job.job_id, error, stage="planning a round")
            return
        self._stage[job.job_id] = f"round {row.number} of {spec.rounds}"
        self._remember(row)
        LOG.info("round %d of job %s is planned (plan %s)", row.number, job.job_id, row.plan_digest[:16])
        self.wake()

    def _last_model(self, connection: Connection, job_id: str) -> Model | None:
        """What the last released round of a job gave; None before the first."""
        released = [row for row in self._rounds.of_job(connection, job_id) if row.state is RoundState.RELEASED]
        if not released:
            return None
        result = released[-1].result or {}
        return Model(result["model_sha256"], result["model_bytes"], plan_of(released[-1].plan).dimension)

    def _new_row(self, job_id: str, number: int, spec: FederatedTrainingSpec, model: Model) -> RoundRow:
        roster = self._federation.roster
        scheme = self._pipeline.scheme(spec.encryption.scheme)
        plan = plan_round(spec, job_id=job_id, number=number, model=model, roster=roster, scheme=scheme)
        signed = self._federation.sign(PLAN_KIND, plan.to_statement())
        costs = {name: dict(event_to_json(event)) for name, event in round_costs(scheme, plan).items()}
        row = RoundRow(
            job_id=job_id,
            number=number,
            plan=signed.to_json(),
            plan_digest=signed_digest(signed, PLAN_KIND),
            costs=costs,
            model_sha256=model.sha256,
            cohort=plan.cohort,
            quorum=plan.quorum,
            holders=tuple(member.name for member in roster.holders),
            threshold=roster.threshold,
            noise_needed=plan.aggregator_adds_noise,
            started_at=self._clock(),
            timeout_s=spec.round_timeout_s,
        )
        return rules.advance(row, Tick(), row.started_at)

    def _open_round(self, connection: Connection, row: RoundRow) -> None:
        """Reserve, then store: a round that the budget does not allow never exists."""
        self._accounts.reserve(connection, row.job_id, row.number, event=costs_of(row)[0], now=self._clock())
        self._rounds.insert(connection, row)

    async def _finish(self, job: JobRow, spec: FederatedTrainingSpec) -> None:
        self._stage[job.job_id] = "writing the artifact"
        try:
            history = await self._database.run(partial(self._rounds.of_job, job_id=job.job_id))
            head = await self._database.run(self._accounts.head)
            result = await asyncio.to_thread(
                write_artifact,
                job,
                spec,
                history,
                federation=self._federation,
                blobs=self._blobs,
                ledger_head=head,
                created_at=utc(self._clock()),
            )
        except Exception as error:
            LOG.exception("writing the artifact of job %s failed", job.job_id)
            await self._fail_job(job.job_id, error, stage="writing the artifact")
            return
        await self._end_job(job.job_id, succeeded_event(result))

    async def _fail_job(self, job_id: str, error: BaseException, *, stage: str, parties: Sequence[str] = ()) -> None:
        row = meaning(error)
        reason = meaning(JobFailed("")).reason if isinstance(error, RoundFailed) else row.reason
        LOG.warning("job %s failed (%s): %s", job_id, stage, public_reason(error))
        await self._end_job(job_id, failed_event(reason, public_reason(error), stage=stage, parties=parties))

    async def _end_job(self, job_id: str, event: JobEvent) -> None:
        await self._database.run(lambda c: self._jobs.apply(c, job_id, event, now=self._clock()))
        LOG.info("job %s: %s", job_id, event.kind.value)
        self._stage.pop(job_id, None)
        self.notify(job_id)
        self.wake()

    # --- tasks, offers, notices ---------------------------------------------------------------------------------------

    def _spawn(self, key: tuple[str, int, str], work: Callable[[], Awaitable[None]]) -> None:
        if key in self._tasks:
            return

        async def run() -> None:
            try:
                await work()
            except Exception:  # the rows are as they were: the next turn begins the same work again
                LOG.exception("task %s failed", key)
            finally:
                self._tasks.pop(key, None)
                self.wake()

        self._tasks[key] = asyncio.get_running_loop().create_task(run())

    def _remember(self, row: RoundRow) -> None:
        """Rounds that parties may still ask about: the latest of each job."""
        self._recent[(row.job_id, row.number)] = row
        for key in [key for key in self._recent if key[0] == row.job_id and key[1] < row.number - 1]:
            del self._recent[key]
        done = [key for key, each in self._recent.items() if each.state in AT_REST and key[0] != row.job_id]
        for key in done[:-4]:
            del self._recent[key]

    def _offer(self) -> None:
        for party in self._sessions.connected:
            self._sessions.offer(party, list(self._recent.values()))

    async def _say_who_is_awaited(self, row: RoundRow, now: float) -> None:
        key = (row.job_id, row.number)
        names = rules.waiting_for(row)
        known, since, said = self._noticed.get(key, ((), now, False))
        if names != known:
            self._noticed = {key: (names, now, False)}
        elif names and not said and now - since >= WAIT_NOTICE_S:
            self._noticed = {key: (names, since, True)}
            text = f"round {row.number} waits for {', '.join(names)} ({row.state.value.lower()})"
            LOG.info("job %s: %s", row.job_id, text)
            event = JobEvent(kind=EventKind.WAITING, message=text)
            await self._database.run(lambda c: self._jobs.apply(c, row.job_id, event, now=now))
            self.notify(row.job_id)

    # --- what others ask ----------------------------------------------------------------------------------------------

    async def row(self, job_id: str, number: int) -> RoundRow:
        """A stored round; NotFoundError when there is none."""
        known = self._recent.get((job_id, number))
        if known is not None:
            return known
        return await self._database.run(partial(self._rounds.get, job_id=job_id, number=number))

    def current(self, job_id: str) -> RoundRow | None:
        """The job's round that is under way, if it is."""
        rows = [row for key, row in self._recent.items() if key[0] == job_id and not row.at_rest]
        return rows[-1] if rows else None

    def progress(self, job_id: str) -> Activity | None:
        """What a job is doing, in words, and for whom its round waits; None when nothing is known of it."""
        row = self.current(job_id)
        stage = self._stage.get(job_id, "")
        if row is None:
            return Activity(stage) if stage else None
        return Activity(f"round {row.number}: {row.state.value.lower()}", rules.waiting_for(row))

    def status(self) -> Status:
        """How the aggregator is; the service adds the counts of jobs."""
        rows = [row for row in self._recent.values() if not row.at_rest]
        awaited = {name: row.state.value.lower() for row in rows for name in rules.waiting_for(row)}
        connected = self._sessions.connected
        workers = self._pipeline.stats()
        return Status(
            federation=self._federation.roster.federation,
            software_version=__version__,
            key_id=self._federation.keyring.key_id,
            custody=self._federation.custody,
            parties=tuple(
                PartyStatus(name, name in connected, awaited.get(name, "")) for name in self._federation.roster.names
            ),
            workers_busy=workers.busy,
            workers_idle=workers.idle,
            jobs_pending=0,
            jobs_running=0,
        )

    async def enrol(self, name: str, verify_key: bytes) -> None:
        """Take a party into a federation without a pinned roster; ConflictError when its key changed."""

        def write(connection: Connection) -> list[tuple[str, bytes]]:
            if (
                self._federation.roster.members
                and len(self._federation.roster.members) >= self._config.limits.max_parties
            ):
                known = {member.name for member in self._federation.roster.members}
                if name not in known:
                    raise LimitError(f"{len(known)} parties have joined; at most {self._config.limits.max_parties} may")
            self._enrolments.enrol(connection, name, verify_key)
            return list(self._enrolments.members(connection))

        members = await self._database.run(write)
        self._federation.enrol(members, created_at=utc(self._clock()))
        self.wake()

    async def restore(self) -> None:
        """Before the first turn: enrolled parties back into the roster, blobs that nobody names out of the store."""

        def read(connection: Connection) -> tuple[list[tuple[str, bytes]], set[str]]:
            named = self._rounds.blobs(connection) | self._jobs.blobs(connection)
            self._accounts.verify(connection)
            return list(self._enrolments.members(connection)), named

        members, named = await self._database.run(read)
        if not self._federation.pinned and members:
            self._federation.enrol(members, created_at=utc(self._clock()))
        await asyncio.to_thread(self._blobs.collect, named)

    def rows(self) -> list[RoundRow]:
        """Rounds that somebody may still have to do something for."""
        return list(self._recent.values())
