"""Federated trainings: drives the rounds of the jobs that the coordinator hands over.

Loads rows, asks the rules (`rounds`) what to do, does it, and writes down what came of it. In a turn a job moves as far
as it can without waiting; what takes time is a task beside it. A killed process goes on from its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from sqlalchemy import Connection

from ..errors import BY_REASON, PASSING, BudgetError, NotFoundError, RoundFailed, SottoError
from ..jobs.service import Activity
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import Event as JobEvent
from ..jobs.states import EventKind, JobRow, JobState, round_event, succeeded_event, utc
from ..privacy.events import event_to_json
from ..protocol.plan import PLAN_KIND, signed_digest
from ..protocol.signing import Signed
from ..storage.database import Database
from ..storage.heads import Head
from ..storage.leftovers import BlobUses
from . import rounds as rules
from .accounts import Accounts
from .federation import Federation
from .held import AGGREGATOR_CAUSE, HeldJobs, ending, public_reason
from .orders import order_in_force
from .pace import Pace
from .pipeline import AggregatorPipeline
from .planning import Model, plan_of, plan_round, round_costs, undeclared
from .quorums import Quorums
from .readiness import asked_of, holders_awaited
from .results import Results
from .round_row import (
    AT_REST,
    BudgetSpent,
    Cancel,
    Evaluated,
    Event,
    QuorumReached,
    Released,
    RootCommitted,
    RoundRow,
    Settled,
    Step,
    StepFailed,
    Tick,
    is_older,
)
from .sessions import Sessions
from .so_far import Standing, history, so_far
from .steps import RoundSteps, costs_of, lacking
from .store import RoundStore
from .summary import Tally, round_summary
from .tasks import Tasks

LOG = logging.getLogger("sotto.aggregator")

ROOTS_SHOWN: Final = 8
"""To a party that joins: one that it signed is proof enough, and each may have some kilobytes."""
WAIT_NOTICE_S: Final = 10.0
"""A round that has waited this long says for whom."""


@dataclass(frozen=True, slots=True)
class _Awaited:
    """For whom a round waits, since when, and whether that was said."""

    names: tuple[str, ...]
    since: float
    said: bool = False


class Trainings:
    """Runs the rounds of federated trainings."""

    def __init__(
        self,
        *,
        database: Database,
        held: HeldJobs,
        rounds: RoundStore,
        accounts: Accounts,
        results: Results,
        pipeline: AggregatorPipeline,
        federation: Federation,
        sessions: Sessions,
        tasks: Tasks,
        leftovers: BlobUses,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._held = held
        self._rounds = rounds
        self._accounts = accounts
        self._results = results
        self._pipeline = pipeline
        self._federation = federation
        self._sessions = sessions
        self._tasks = tasks
        self._leftovers = leftovers
        self._clock = clock
        self._pace = Pace(clock)
        self.quorums = Quorums(lambda: sessions.connected)
        self._steps = RoundSteps(pipeline, federation, clock=clock)
        self._recent: dict[tuple[str, int], RoundRow] = {}
        self._stage: dict[str, str] = {}
        self._awaited: dict[str, _Awaited] = {}
        self._tallies: dict[str, Tally] = {}

    # --- a turn -------------------------------------------------------------------------------------------------------

    def can_start(self, job: JobRow) -> bool:
        """Whether enough parties are ready; without a pinned roster not before they joined, fedsgd not before every one
        that is invited has declared its rows."""
        spec = FederatedTrainingSpec.from_json(job.spec)
        if not self._federation.pinned:
            joined = self._sessions.connected
            missing = sorted(set(spec.parties) - joined)
            waiting = f"waiting for {', '.join(missing) or 'at least two parties'} to join"
            self._stage[job.job_id] = self._with_refusals(waiting, missing)
            if missing or len(joined) < 2:  # a sum over one party is that party's update
                return False
        return self._all_declared(job, spec) and self._enough_ready(job, spec)

    def _enough_ready(self, job: JobRow, spec: FederatedTrainingSpec) -> bool:
        roster = self._federation.roster
        waiting = self._federation.readiness.waits_for(spec, roster) or holders_awaited(roster, self._sessions.away)
        if waiting:
            self._stage[job.job_id] = waiting
        return not waiting

    def _all_declared(self, job: JobRow, spec: FederatedTrainingSpec) -> bool:
        missing = undeclared(spec, self._federation)
        if missing:
            waiting = f"waiting for {', '.join(missing)} to join and declare their rows"
            self._stage[job.job_id] = self._with_refusals(waiting, missing)
        return not missing

    async def advance(self, job: JobRow, *, paused: bool) -> None:
        """Move a job as far as it can go now.

        Args:
            paused: begin nothing: the job waits for its next attempt, or the process is being stopped. What parties
                send is still taken in, and deadlines still count.
        """
        row = await self._database.run(partial(self._rounds.latest, job_id=job.job_id))
        if row is not None:
            self._remember(row)
        spec = FederatedTrainingSpec.from_json(job.spec)
        keeps = job.state is JobState.CANCELLING and await self._database.run(
            partial(self._results.keeps, job_id=job.job_id)
        )
        if row is not None and not (row.at_rest and row.settled):
            stops = job.state is JobState.CANCELLING and not (keeps and row.spent)  # what is paid for is had
            await self._advance_round(row, spec, paused=paused, stops=stops)
        elif job.state is JobState.CANCELLING and row is not None and keeps and job.rounds_released:
            await self._tasks.cancel(job.job_id, row.number + 1)  # that may be planned already
            self._tasks.spawn((job.job_id, row.number, "finish"), partial(self._finish, job))
        elif job.state is JobState.CANCELLING:
            await self._tasks.cancel(job.job_id)
            await self._end(job.job_id, ending(job))
        elif not paused:
            await self._next_round(job, row, spec)

    async def _next_round(self, job: JobRow, row: RoundRow | None, spec: FederatedTrainingSpec) -> None:
        number = row.number + 1 if row else 1
        if job.rounds_released >= spec.rounds:
            self._tasks.spawn((job.job_id, number, "finish"), partial(self._finish, job))
            return
        lasting = rules.hopeless(row) if row else ""
        if row is not None and (lasting or job.rounds_failed > spec.spare_rounds):
            error = BY_REASON.get(lasting, RoundFailed)(row.reason)
            await self._held.failed(job.job_id, error, stage=f"round {row.number}", parties=self._lacking(row))
        elif row and self._clock() < row.ended_at + (pause_s := self._tallies.get(job.job_id, Tally()).pause_s):
            self._stage[job.job_id] = f"round {row.number} failed: waiting {pause_s:g} s before the next one"
        elif self._enough_ready(job, spec) and (row is not None or self._all_declared(job, spec)):
            self._stage[job.job_id] = f"planning round {number}"
            self._tasks.spawn((job.job_id, number, "plan"), partial(self._plan, job, spec, number))

    async def _advance_round(self, row: RoundRow, spec: FederatedTrainingSpec, *, paused: bool, stops: bool) -> None:
        now = self._clock()
        event = Cancel() if stops else Tick(self._sessions.away(row.cohort))
        if rules.advance(row, event, now, ready=self.quorums.waiting(row.job_id, row.number)) != row:
            row = await self.happened(row.job_id, row.number, event)
        self.quorums.changed(row)  # for lack of holders, of whom one may have come
        await self._say_who_is_awaited(row, now)
        step = rules.next_step(row, now, connected=self._sessions.connected)
        if step is Step.SETTLE:
            await self._settle(row)
        elif step is Step.EVALUATE and stops:
            await self._settle(row)  # what comes of it is not waited for; the model is there
        elif step is Step.SPEND and not paused:
            await self.happened(row.job_id, row.number, BudgetSpent())
        elif step is not None and not paused:
            self._tasks.spawn((row.job_id, row.number, step.value), partial(self._perform, row, step, spec))

    async def quorum(self, row: RoundRow, party: str, *, at_most_s: float) -> bool:
        """Wait, as `Quorums.wait`. From when it is reached the round has its time: that is stored before anybody hears
        of it, so that whoever begins has all of it, and goes on after a restart."""
        reached = await self.quorums.wait(row, party, at_most_s=at_most_s)
        known = self._recent.get((row.job_id, row.number), row)
        if reached and not known.able_at:
            await self.happened(row.job_id, row.number, QuorumReached(self._clock()))
        return reached

    # --- what happens to a round --------------------------------------------------------------------------------------

    async def happened(self, job_id: str, number: int, event: Event) -> RoundRow:
        """Apply an event to a stored round, with its ledger entry, in one transaction; raises what the rules refuse."""
        now, gone, ready = self._clock(), frozenset[str](), self.quorums.waiting(job_id, number)

        def write(connection: Connection) -> RoundRow:
            nonlocal gone
            before = self._rounds.get(connection, job_id, number)
            after = rules.advance(before, event, now, ready=ready)
            if isinstance(event, BudgetSpent):
                self._accounts.spend(connection, job_id, number, now=now)
            if isinstance(event, Released):
                figures = {"plan": after.plan_digest, "model_sha256": str((after.result or {})["model_sha256"])}
                self._accounts.release(connection, job_id, number, figures=figures, now=now)
                self._results.released(connection, after)
            if after != before:
                self._held.guard(connection, job_id)
                gone = self._rounds.update(connection, after)
            return after

        row = await self._database.run(write)
        self._leftovers.let_go(gone)
        self._remember(row)
        if isinstance(event, RootCommitted):
            self._federation.disclosed.tell(row, event, plan=plan_of(row.plan), beside=self.rows())
        if row.at_rest and not row.settled and not isinstance(event, Evaluated):
            LOG.info("round %d of job %s: %s %s", number, job_id, row.state.value, row.reason)
        self._held.wake()
        return row

    async def _perform(self, row: RoundRow, step: Step, spec: FederatedTrainingSpec) -> None:
        try:
            for event in await self._do(row, step, spec):
                await self.happened(row.job_id, row.number, event)
        except Exception as error:
            if not isinstance(error, SottoError):
                LOG.exception("step %r of round %d of job %s failed", step.value, row.number, row.job_id)
            stage = f"round {row.number}: {step.value}"
            if not await self._held.failed(row.job_id, error, stage=stage, last=False):
                if isinstance(error, PASSING) and row.spent and await self._held.is_cancelling(row.job_id):
                    raise  # what is paid for is had: it is tried again in a moment
                why = public_reason(error)
                over = Evaluated({}, why) if step is Step.EVALUATE else StepFailed(step, why)
                await self.happened(row.job_id, row.number, over)

    async def _do(self, row: RoundRow, step: Step, spec: FederatedTrainingSpec) -> list[Event]:
        if step is Step.MAKE_NOISE:
            return [await self._steps.make_noise(row)]
        if step is Step.FREEZE_LIST:
            return [await self._steps.freeze_list(row)]
        if step is Step.FOLD:
            return [await self._steps.fold(row)]
        if step is Step.ASK_SHARES:
            return [await self._steps.ask_shares(row, connected=self._sessions.connected)]
        if step is Step.EVALUATE:
            self._stage[row.job_id] = f"evaluating the model of round {row.number}"
            return [await self._steps.evaluate(row)]
        before = await self._database.run(partial(history, row=row, rounds=self._rounds, accounts=self._accounts))
        return await self._steps.release(row, spec=spec, history=before)

    async def _settle(self, row: RoundRow) -> None:
        """The ledger's last word on a round at rest, and the job's event, in one transaction."""
        await self._tasks.cancel(row.job_id, row.number)  # of a round at rest nothing is computed any more
        now, gone = self._clock(), frozenset[str]()

        def write(connection: Connection) -> JobRow:
            nonlocal gone
            row_now = self._rounds.get(connection, row.job_id, row.number)
            if not row_now.spent:
                reason = f"round {row_now.state.value.lower()} before a share was asked for"
                self._accounts.return_(connection, row.job_id, row.number, now=now, reason=reason)
            unkept, said = self._results.settled(connection, row_now)
            gone = self._rounds.update(connection, rules.advance(row_now, Settled(), now)) | unkept
            return self._held.write(connection, row.job_id, round_event(round_summary(row_now), also=said))

        job = await self._database.run(write)
        self._tallies[row.job_id] = self._tallies.get(row.job_id, Tally()).after(row)
        self._leftovers.let_go(gone)  # opened or failed: the round needs it no more
        self._held.told(job)

    # --- the next round, and the end ----------------------------------------------------------------------------------

    async def _plan(self, job: JobRow, spec: FederatedTrainingSpec, number: int) -> None:
        try:
            known = partial(so_far, job_id=job.job_id, spec=spec, rounds=self._rounds, federation=self._federation)
            standing = await self._database.run(known)
            model = standing.model or await self._pipeline.initial_model(spec)
            if number == 1:
                await self._try_evaluation(job.job_id, spec, model)
            row = await asyncio.to_thread(self._new_row, job, number, spec, model=model, standing=standing)
            try:
                await self._database.run(partial(self._open_round, row=row))
            except BudgetError as error:
                refuse = partial(self._accounts.refuse, job_id=job.job_id, number=number, event=costs_of(row.costs)[0])
                await self._database.run(partial(refuse, parties=row.cohort, error=error, now=self._clock()))
                raise
        except Exception as error:
            if not isinstance(error, SottoError):
                LOG.exception("planning a round of job %s failed", job.job_id)
            await self._held.failed(job.job_id, error, stage="planning a round")
            return
        self._stage[job.job_id] = f"round {row.number} of {spec.rounds}"
        self._remember(row)
        LOG.info("round %d of job %s is planned (plan %s)", row.number, job.job_id, row.plan_digest[:16])
        self._held.wake()

    async def _try_evaluation(self, job_id: str, spec: FederatedTrainingSpec, model: Model) -> None:
        self._stage[job_id] = "evaluating the initial model"
        doubt = await self._steps.try_evaluation(job_id, spec, model)
        if doubt:
            text = f"the initial model is not evaluated: {doubt}; the job goes on"
            await self._held.happen(job_id, JobEvent(kind=EventKind.WARNING, message=text, cause=AGGREGATOR_CAUSE))

    def _new_row(
        self, job: JobRow, number: int, spec: FederatedTrainingSpec, *, model: Model, standing: Standing
    ) -> RoundRow:
        roster = self._federation.roster
        order, digest = order_in_force(job, roster, now=self._clock())
        scheme = self._pipeline.scheme(spec.encryption.scheme)
        plan = plan_round(
            spec,
            job_id=job.job_id,
            number=number,
            model=model,
            roster=roster,
            scheme=scheme,
            declared_rows=standing.declared_rows,
            clipping_norm=standing.clipping_norm,
            order=digest,
        )
        signed = self._federation.sign(PLAN_KIND, plan.to_statement())
        costs = {name: dict(event_to_json(event)) for name, event in round_costs(scheme, plan).items()}
        row = RoundRow(
            job_id=job.job_id,
            number=number,
            plan=signed.to_json(),
            plan_digest=signed_digest(signed, PLAN_KIND),
            order=order.to_json() if order else None,
            costs=costs,
            spent_before=standing.spent,
            model_sha256=model.sha256,
            cohort=plan.cohort,
            quorum=plan.quorum,
            holders=tuple(member.name for member in roster.holders),
            threshold=roster.threshold,
            noise_needed=plan.aggregator_adds_noise,
            started_at=self._clock(),
            timeout_s=spec.round_timeout_s,
        )
        return self._federation.readiness.begin(row, spec.task)

    def _open_round(self, connection: Connection, row: RoundRow) -> None:
        """Reserve, then store: a round that the budget does not allow never exists."""
        self._held.guard_running(connection, row.job_id)
        cost, now = costs_of(row.costs)[0], self._clock()
        self._accounts.reserve(connection, row.job_id, row.number, event=cost, parties=asked_of(row), now=now)
        self._rounds.insert(connection, row)

    async def _finish(self, job: JobRow) -> None:
        """The last released round becomes the job's result: of a job that was to be stopped and kept as well."""
        self._stage[job.job_id] = "writing the artifact"
        try:
            result = await self._results.write(job)
            stopped = f"stopped with the model of round {result['round']}" if "rounds_planned" in result else ""
            await self._end(job.job_id, succeeded_event(result, stopped))
        except Exception as error:
            if job.state is JobState.CANCELLING and isinstance(error, PASSING):
                raise  # it is tried again in a moment
            LOG.exception("writing the artifact of job %s failed", job.job_id)
            if job.state is JobState.CANCELLING:  # its rounds can be had all the same
                await self._end(job.job_id, ending(job))
            else:
                await self._held.failed(job.job_id, error, stage="writing the artifact")

    async def _end(self, job_id: str, event: JobEvent) -> None:
        await self._held.happen(job_id, event)
        self._stage.pop(job_id, None)
        self._awaited.pop(job_id, None)
        self._tallies.pop(job_id, None)
        self._steps.ended(job_id)

    def _lacking(self, row: RoundRow) -> tuple[str, ...]:
        waited = self.quorums.waited_in_vain(row)
        return tuple(name for name in lacking(row) if name not in waited)

    # --- rounds at hand -----------------------------------------------------------------------------------------------

    async def restore(self, job: JobRow) -> None:
        """Of a job that is taken up: what its rounds so far brought."""
        for known in [key for key in self._recent if key[0] == job.job_id]:  # another process may have moved them
            del self._recent[known]
        rows = await self._database.run(partial(self._rounds.of_job, job_id=job.job_id))
        tally = Tally()
        for row in rows:
            tally = tally.after(row) if row.settled else tally
        self._tallies[job.job_id] = tally

    def _remember(self, row: RoundRow) -> None:
        """Rounds that parties may still ask about: the latest of each job, and the latest that is known of each. What
        flows for one that moved on ends."""
        known = self._recent.get((row.job_id, row.number))
        if known is None or not is_older(row, known):
            self._recent[(row.job_id, row.number)] = row
            self._pace.seen(row)
            self.quorums.changed(row)
            self._sessions.flows.changed(row)
        for key in [key for key in self._recent if key[0] == row.job_id and key[1] < row.number - 1]:
            del self._recent[key]
        done = [key for key, each in self._recent.items() if each.state in AT_REST and key[0] != row.job_id]
        for key in done[:-4]:
            del self._recent[key]

    def offer(self) -> None:
        """Push to each connected party what it is wanted for now."""
        for party in self._sessions.connected:
            self._sessions.offer(party, self.rows())

    def rows(self) -> list[RoundRow]:
        """Rounds that somebody may still have to do something for."""
        return list(self._recent.values())

    async def row(self, job_id: str, number: int) -> RoundRow:
        """A stored round; NotFoundError when there is none."""
        known = self._recent.get((job_id, number))
        if known is not None:
            return known
        return await self._database.run(partial(self._rounds.get, job_id=job_id, number=number))

    async def roots_of(self, party: str, heads: Sequence[Head]) -> dict[Head, Signed]:
        """The roots by which a party told the last of these heads of its ledger, as far as they are at hand."""

        def read(connection: Connection) -> dict[Head, Signed]:
            found: dict[Head, Signed] = {}
            for head in heads[-ROOTS_SHOWN:]:
                with contextlib.suppress(NotFoundError):
                    root = self._rounds.get(connection, head.job_id, head.round).roots.get(party)
                    if root is not None:
                        found[head] = Signed.from_json(root)
            return found

        return await self._database.run(read)

    async def _say_who_is_awaited(self, row: RoundRow, now: float) -> None:
        ready = self.quorums.waiting(row.job_id, row.number)
        names = rules.waiting_for(row, ready)
        known = self._awaited.get(row.job_id)
        if known is None or known.names != names:
            self._awaited[row.job_id] = _Awaited(names, now)
        elif names and not known.said and now - known.since >= WAIT_NOTICE_S:
            self._awaited[row.job_id] = _Awaited(names, known.since, said=True)
            text = f"round {row.number} waits for {', '.join(names)} ({rules.phase(row, ready)})"
            text = self._with_refusals(text, names)
            await self._held.happen(row.job_id, JobEvent(kind=EventKind.WAITING, message=text, cause=AGGREGATOR_CAUSE))

    def progress(self, job_id: str, *, rounds: int) -> Activity | None:
        """What a job is doing and has received, with `rounds` still to be released; None where nothing is known."""
        tally = self._tallies.get(job_id, Tally())
        rows = [row for key, row in self._recent.items() if key[0] == job_id and not row.at_rest]
        if not rows:
            stage = self._stage.get(job_id, "")
            return Activity(stage, bytes_received=tally.bytes_up) if stage or tally.bytes_up else None
        row = rows[-1]
        ready = self.quorums.waiting(job_id, row.number)
        awaited = rules.waiting_for(row, ready)
        end = tally.estimate(rounds, since=row.started_at, now=self._clock())
        return Activity(
            stage=self._with_refusals(f"round {row.number}: {rules.phase(row, ready)}{self._pace.words(row)}", awaited),
            waiting_for=awaited,
            parties=rules.party_states(row, self._sessions.connected, ready),
            bytes_received=tally.bytes_up + sum(row.bytes_up.values()),
            estimated_end_at=utc(end) if end else "",
        )

    def awaited(self) -> dict[str, str]:
        """What is expected of each party now; of one that was turned away, why."""
        rows = [row for row in self._recent.values() if not row.at_rest]
        expected: dict[str, str] = {}
        for row in rows:
            expected |= rules.expected(row, self.quorums.waiting(row.job_id, row.number))
        return expected | {name: f"refused: {why}" for name, why in self._sessions.refused.items()}

    def _with_refusals(self, text: str, awaited: Sequence[str]) -> str:
        """`text`, and of those for whom something waits who was turned away, and why."""
        refused = self._sessions.refused
        return "; ".join([text, *(f"{name} was refused: {refused[name]}" for name in awaited if name in refused)])
