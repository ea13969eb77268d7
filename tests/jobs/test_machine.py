"""Jobs under every order of events that hypothesis thinks of: holders that crash, ghosts that do not know it, clocks.

The store, the scheduler and the rounds are the real ones, in a database in memory. The model beside them is small: what
was submitted, who holds what, and which rounds were opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Connection, MetaData, create_engine, select
from sqlalchemy.pool import StaticPool

from src.aggregator.round_row import RoundRow, RoundState
from src.aggregator.store import RoundStore
from src.errors import ConflictError, LeaseError, StateError
from src.jobs.scheduler import STRIDES, Capacity, Lane, lane_of, queue_name
from src.jobs.states import (
    Event,
    EventKind,
    JobError,
    JobRow,
    JobState,
    Priority,
    after_failure,
    expired_event,
    failed_event,
    replay,
    round_event,
    seconds,
    succeeded_event,
    utc,
)
from src.jobs.store import JobQuery, JobStore, Lease

METADATA = MetaData()
STORE = JobStore(METADATA)
ROUNDS = RoundStore(METADATA)

CAPACITY = Capacity(max_trainings=2, max_computations=2, max_per_scientist=1)
LEASE_S = 30.0
DELAYS_S = (0.0, 60.0)
OVERTAKING = sum(-(-STRIDES[Priority.LOW] // STRIDES[other]) + 1 for other in (Priority.HIGH, Priority.NORMAL))
"""Starts of the other classes between two of the lightest: a class serves until its pass is beyond that of LOW."""
ACTIVE = (JobState.RUNNING, JobState.RETRYING, JobState.CANCELLING)

STEPS = ("start", "start", "rounds", "rounds", "fail", "resume_and_stop", "succeed", "renew")
"""What a holder does; each does nothing where there is nothing to do."""

picks = st.integers(0, 30)
Submission = tuple[str, str, Priority, float | None]
"""Owner, kind, priority, seconds until the deadline."""
submissions = st.tuples(
    st.sampled_from(["scientist/a", "scientist/b", "scientist/c"]),
    st.sampled_from(["federated_training", "federated_training", "evaluation"]),
    st.sampled_from(Priority),
    st.sampled_from([None, None, 20.0, 300.0]),
)

P = ParamSpec("P")
T = TypeVar("T")


class Crash(Exception):
    """The process died in the middle of a transaction."""


@dataclass
class Holder:
    """A process that drives jobs: its name, its leases, and which round of each job it believes to be the last."""

    name: str
    leases: dict[str, Lease] = field(default_factory=dict)
    last_round: dict[str, int] = field(default_factory=dict)


@dataclass
class Wait:
    """How long a PENDING job has been overtaken: starts in its lane in a row while it could have been started."""

    ahead: int
    overtaken: int = 0


class Jobs(RuleBasedStateMachine):
    """One aggregator after another over one database."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = create_engine("sqlite://", poolclass=StaticPool)
        METADATA.create_all(self.engine)
        self.now = 1_000_000.0
        self.submitted: dict[str, JobRow] = {}
        self.ended: dict[str, JobRow] = {}
        self.opened: set[tuple[str, int]] = set()
        self.waits: dict[str, Wait] = {}
        self.holders = [Holder("holder 0")]
        self.tokens: dict[str, int] = {}
        self.touched: set[str] = set()

    @property
    def holder(self) -> Holder:
        return self.holders[-1]

    def transact(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self.engine.begin() as connection:
            return work(connection, *args, **kwargs)

    def row(self, job_id: str) -> JobRow:
        return self.transact(STORE.get, job_id)

    def rows(self, *states: JobState) -> list[JobRow]:
        everything = JobQuery(page_size=1000, show_deleted=True)
        return [row for row in self.transact(STORE.list_jobs, query=everything).rows if row.state in states]

    def held(self, *states: JobState) -> list[JobRow]:
        """The jobs in these states that the present holder drives."""
        return [row for row in self.rows(*states) if row.job_id in self.holder.leases]

    def apply(self, job_id: str, event: Event, lease: Lease | None = None) -> JobRow:
        row: JobRow = self.transact(
            lambda connection: STORE.apply(connection, job_id, event, now=self.now, lease=lease)
        )
        self.moved(row)
        return row

    def moved(self, row: JobRow) -> None:
        self.touched.add(row.job_id)
        if row.state is not JobState.PENDING:
            self.waits.pop(row.job_id, None)
        if row.at_rest:
            self.holder.leases.pop(row.job_id, None)
            self.ended.setdefault(row.job_id, row)

    # --- clients ------------------------------------------------------------------------------------------------------

    @initialize(jobs=st.lists(submissions, min_size=2, max_size=8))
    def begin(self, jobs: list[Submission]) -> None:
        for job in jobs:
            self.submit(job)

    @rule(job=submissions)
    def submit(self, job: Submission) -> None:
        owner, kind, priority, timeout_s = job
        number = len(self.submitted)
        row = JobRow(
            job_id=f"{number:04x}",
            request_id=f"request {number}",
            owner=owner,
            display_name="",
            kind=kind,
            spec={"number": number},
            spec_digest=f"digest {number}",
            priority=priority,
            max_attempts=3,
            created_at=utc(self.now),
            deadline_at=utc(self.now + timeout_s) if timeout_s is not None else "",
        )
        alike = [
            each
            for each in self.rows(JobState.PENDING)
            if (lane_of(each.kind), each.priority) == (lane_of(kind), priority)
        ]
        assert self.transact(STORE.create, row) == row
        self.submitted[row.job_id] = row
        self.waits[row.job_id] = Wait(ahead=len(alike))
        self.moved(row)

    @rule(asks=st.sampled_from(["cancel", "delete", "submit_again", "turn_pages"]), pick=picks)
    def ask(self, asks: str, pick: int) -> None:
        getattr(self, asks)(pick)

    def submit_again(self, pick: int) -> None:
        known = self.submitted[self.pick(pick, sorted(self.submitted))]
        again = replace(known, job_id="ffff", created_at=utc(self.now))
        if pick % 2:
            assert self.transact(STORE.create, again) == self.row(known.job_id)
        else:
            with pytest.raises(ConflictError):
                self.transact(STORE.create, replace(again, spec_digest="other"))

    def cancel(self, pick: int) -> None:
        row = self.row(self.pick(pick, sorted(self.submitted)))
        kind = EventKind.CANCELLED if row.state is JobState.PENDING else EventKind.CANCELLING
        event = Event(kind=kind, cause=row.owner)
        if row.state in (JobState.PENDING, JobState.RUNNING, JobState.RETRYING):
            self.apply(row.job_id, event)
        else:
            with pytest.raises(StateError):
                self.apply(row.job_id, event)

    def delete(self, pick: int) -> None:
        row = self.row(self.pick(pick, sorted(self.submitted)))
        if row.at_rest:
            deleted = self.apply(row.job_id, Event(kind=EventKind.DELETED, cause=row.owner))
            assert replace(deleted, deleted_at="") == replace(row, deleted_at="")  # there were no files
            self.ended[row.job_id] = deleted
        else:
            with pytest.raises(StateError):
                self.apply(row.job_id, Event(kind=EventKind.DELETED))

    def turn_pages(self, pick: int) -> None:
        size, owner = pick % 4 + 1, self.pick(pick, [None, "scientist/a"])
        seen: list[JobRow] = []
        token = None
        while token != "":
            query = JobQuery(page_size=size, page_token=token or "", owner=owner, show_deleted=True)
            page = self.transact(STORE.list_jobs, query=query)
            seen += page.rows
            token = page.next_page_token
        wanted = [row for row in self.rows(*JobState) if owner in (None, row.owner)]
        assert seen == sorted(wanted, key=lambda row: (row.created_at, row.job_id), reverse=True)

    # --- the clock ----------------------------------------------------------------------------------------------------

    @rule(passed_s=st.sampled_from([0.5, 10.0, 31.0, 61.0]))
    def time_passes(self, passed_s: float) -> None:
        self.now += passed_s

        self.expire()

    def expire(self) -> None:
        due = [
            row.job_id
            for row in self.rows(JobState.PENDING, JobState.RUNNING, JobState.RETRYING)
            if row.deadline_at and seconds(row.deadline_at) <= self.now
        ]
        found = self.transact(STORE.overdue, self.now)
        assert sorted(row.job_id for row in found) == sorted(due)
        for row in found:
            self.apply(row.job_id, expired_event(row))
        assert self.transact(STORE.overdue, self.now) == []

    # --- the process that drives --------------------------------------------------------------------------------------

    def take(self, connection: Connection) -> tuple[JobRow, Lease] | None:
        return STORE.take_next(connection, capacity=CAPACITY, holder=self.holder.name, now=self.now, lease_s=LEASE_S)

    @rule(steps=st.lists(st.tuples(st.sampled_from(STEPS), picks), min_size=1, max_size=8))
    def drive(self, steps: list[tuple[str, int]]) -> None:
        for step, pick in steps:
            getattr(self, step)(pick)

    def start(self, _pick: int) -> None:
        while self.take_next():
            pass

    def take_next(self) -> bool:
        before = self.rows(*JobState)
        places = Counter(lane_of(row.kind) for row in before if row.state in ACTIVE)
        taken = Counter((row.owner, lane_of(row.kind)) for row in before if row.state in ACTIVE)
        able = {
            row.job_id
            for row in before
            if row.state is JobState.PENDING
            and places[lane_of(row.kind)] < CAPACITY.places(lane_of(row.kind))
            and taken[row.owner, lane_of(row.kind)] < CAPACITY.max_per_scientist
        }
        first = [job_id for job_id, position in self.positions().items() if position == 1]
        started = self.transact(self.take)
        assert (started is None) == (not able)
        if started is None:
            return False
        row, lease = started
        assert row.job_id in able
        if not places[lane_of(row.kind)]:  # else it depends on who ends first
            assert row.job_id in first
        self.hold(lease)
        self.holder.last_round[row.job_id] = 0
        self.moved(row)
        for job_id, wait in self.waits.items():
            if lane_of(self.submitted[job_id].kind) is lane_of(row.kind):
                wait.overtaken = wait.overtaken + 1 if job_id in able else 0
                assert wait.overtaken <= (wait.ahead + 1) * (OVERTAKING + 1)
        return True

    def rounds(self, pick: int) -> None:
        for row in self.held(*ACTIVE):
            latest = self.transact(ROUNDS.latest, row.job_id)
            if latest is not None and not latest.at_rest:
                end = self.pick(pick, [RoundState.RELEASED, RoundState.FAILED, RoundState.CANCELLED])
                self.moved(self.transact(self.end_round, replace(latest, state=end)))
            elif row.state is JobState.RUNNING:
                number = latest.number + 1 if latest else 1
                self.transact(open_round, self.holder.leases[row.job_id], number)
                assert (row.job_id, number) not in self.opened
                self.opened.add((row.job_id, number))
                self.holder.last_round[row.job_id] = number

    def end_round(self, connection: Connection, ended: RoundRow) -> JobRow:
        ROUNDS.update(connection, ended)
        event = round_event({"round": ended.number, "state": ended.state.value})
        lease = self.holder.leases[ended.job_id]
        return STORE.apply(connection, ended.job_id, event, now=self.now, lease=lease)

    def fail(self, pick: int) -> None:
        reason = self.pick(pick, ["WORKER_FAILED", "UNAVAILABLE", "BUDGET_EXCEEDED"])
        for row in self.held(JobState.RUNNING)[:1]:
            self.attempt_fails(row, reason)

    def attempt_fails(self, row: JobRow, reason: str) -> None:
        event = after_failure(row, JobError(reason, "no"), delays_s=DELAYS_S, now=self.now)
        after = self.apply(row.job_id, event, self.holder.leases[row.job_id])
        again = reason != "BUDGET_EXCEEDED" and row.attempt < row.max_attempts
        assert after.state is (JobState.RETRYING if again else JobState.FAILED)

    def resume_and_stop(self, _pick: int) -> None:
        for row in self.held(JobState.RETRYING):
            if seconds(row.retry_at) <= self.now:
                after = self.apply(row.job_id, Event(kind=EventKind.RESUMED), self.holder.leases[row.job_id])
                assert (after.state, after.attempt) == (JobState.RUNNING, row.attempt + 1)
        for row in self.held(JobState.CANCELLING):
            event = failed_event(row.error) if row.error else Event(kind=EventKind.CANCELLED)
            self.apply(row.job_id, event, self.holder.leases[row.job_id])

    def succeed(self, pick: int) -> None:
        for row in self.held(JobState.RUNNING, JobState.CANCELLING)[: 1 + pick % 2]:
            self.apply(row.job_id, succeeded_event({"files": []}), self.holder.leases[row.job_id])

    def renew(self, _pick: int) -> None:
        for lease in self.holder.leases.values():
            self.transact(STORE.renew, lease, now=self.now, lease_s=LEASE_S)

    # --- crashes ------------------------------------------------------------------------------------------------------

    @rule(seize=st.booleans(), in_the_middle=st.booleans())
    def crash(self, seize: bool, in_the_middle: bool) -> None:
        if in_the_middle:

            def half(connection: Connection) -> None:
                self.take(connection)
                raise Crash

            with pytest.raises(Crash):
                self.transact(half)
        self.holders.append(Holder(f"holder {len(self.holders)}"))
        if seize:  # it starts where the old one certainly is gone, or at least cut off
            self.take_over(self.rows(*ACTIVE), seize=True)

    @rule()
    def find_lapsed(self) -> None:
        lapsed = self.transact(STORE.lapsed, self.now)
        for row in self.rows(*ACTIVE):
            if row not in lapsed and row.job_id not in self.holder.leases:
                with pytest.raises(LeaseError):
                    self.take_over([row], seize=False)
        self.take_over(lapsed, seize=False)

    def hold(self, lease: Lease) -> None:
        assert lease.token > self.tokens.get(lease.job_id, 0)
        self.tokens[lease.job_id] = lease.token
        self.holder.leases[lease.job_id] = lease

    def take_over(self, rows: Sequence[JobRow], *, seize: bool) -> None:
        for row in rows:
            options = {"now": self.now, "lease_s": LEASE_S}
            lease = self.transact(STORE.acquire, row.job_id, holder=self.holder.name, seize=seize, **options)
            latest = self.transact(ROUNDS.latest, row.job_id)
            self.hold(lease)
            self.holder.last_round[row.job_id] = latest.number if latest else 0
            if row.state is not JobState.RETRYING:
                self.apply(row.job_id, Event(kind=EventKind.RESUMED), lease)

    @precondition(lambda self: len(self.holders) > 1)
    @rule(pick=picks)
    def a_ghost_goes_on(self, pick: int) -> None:
        ghost = self.pick(pick, self.holders[:-1])
        for job_id, lease in ghost.leases.items():
            if self.present(job_id) == lease:
                continue  # nobody knows yet that it is gone
            with pytest.raises(LeaseError):
                self.transact(open_round, lease, ghost.last_round[job_id] + 1)
            with pytest.raises(LeaseError):
                self.transact(STORE.renew, lease, now=self.now, lease_s=LEASE_S)
            for kind in (EventKind.WAITING, EventKind.CANCELLED, EventKind.DELETED):
                with pytest.raises(LeaseError):
                    self.transact(STORE.apply, job_id, Event(kind=kind), now=self.now, lease=lease)

    def present(self, job_id: str) -> Lease | None:
        """Who holds a job, according to the table itself."""
        jobs = STORE.jobs.c
        query = select(jobs.lease_holder, jobs.fencing_token, jobs.lease_expires_at).where(jobs.job_id == job_id)
        holder, token, expires_at = self.transact(lambda connection: connection.execute(query).one())
        assert bool(holder) == bool(expires_at)
        return Lease(job_id, holder, token) if holder else None

    def positions(self) -> dict[str, int]:
        return self.transact(STORE.positions, CAPACITY)

    @staticmethod
    def pick(number: int, among: Sequence[Any]) -> Any:
        return among[number % len(among)]

    # --- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def what_moved_is_its_history(self) -> None:
        for job_id in self.touched:
            self.check_job(job_id)
        self.touched.clear()

    def check_job(self, job_id: str) -> None:
        row = self.row(job_id)
        events = self.transact(STORE.events, job_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.time for event in events] == sorted(event.time for event in events)
        history = [
            (Event(kind=each.kind, message=each.message, cause=each.cause, detail=each.detail), seconds(each.time))
            for each in events[1:]
        ]
        assert replay(self.submitted[job_id], history) == row
        if row.at_rest:
            assert self.ended[job_id] == row
        lease = self.present(job_id)
        assert (lease is not None) == (row.state in ACTIVE)
        if job_id in self.holder.leases:
            assert lease == self.holder.leases[job_id]

    @invariant()
    def no_job_is_lost_and_limits_are_kept(self) -> None:
        def look(connection: Connection) -> tuple[list[JobRow], set[str], dict[str, int]]:
            waiting = {each.job_id for each in STORE.waiting(connection)}
            return STORE.active(connection), waiting, STORE.passes(connection)

        active, waiting, passes = self.transact(look)
        assert waiting == set(self.waits)
        assert waiting | {row.job_id for row in active} | set(self.ended) == set(self.submitted)
        for lane in Lane:
            owners = Counter(row.owner for row in active if lane_of(row.kind) is lane)
            assert owners.total() <= CAPACITY.places(lane)
            assert max(owners.values(), default=0) <= CAPACITY.max_per_scientist
            ordered = {priority: passes.get(queue_name(lane, priority), 0) for priority in Priority}
            assert all(value - min(ordered.values()) <= STRIDES[each] for each, value in ordered.items())

    def teardown(self) -> None:
        for job_id in self.submitted:
            self.check_job(job_id)
        numbers = {
            (row.job_id, row.number) for job_id in self.submitted for row in self.transact(ROUNDS.of_job, job_id)
        }
        assert numbers == self.opened
        self.engine.dispose()


def open_round(connection: Connection, lease: Lease, number: int) -> None:
    """As whoever drives a job does it: the lease is checked in the transaction that writes."""
    STORE.check(connection, lease)
    row = RoundRow(
        job_id=lease.job_id,
        number=number,
        plan={},
        plan_digest="",
        model_sha256="",
        cohort=("a",),
        quorum=1,
        holders=("a",),
        threshold=1,
        noise_needed=False,
        started_at=0.0,
        timeout_s=1.0,
    )
    ROUNDS.insert(connection, row)


TestJobs = Jobs.TestCase
TestJobs.settings = settings(
    deadline=None, max_examples=30, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
