"""Leases that a process holds: who may write about a job, and what is written when an attempt fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src.aggregator.held import RENEWALS, HeldJobs, ending, job_error, public_reason
from src.errors import BudgetError, LeaseError, RoundFailed, StateError, WorkerError
from src.jobs.computations import EvaluationSpec
from src.jobs.scheduler import Capacity
from src.jobs.states import Event, EventKind, JobError, JobRow, JobState, failed_event, succeeded_event, utc
from src.jobs.store import JobStore
from src.storage.database import Database
from src.storage.schema import FromMetadata

LEASE_S, DELAYS_S = 60.0, (0.0, 60.0)
CAPACITY = Capacity(max_trainings=9, max_computations=9, max_per_scientist=9)
WAITING = Event(kind=EventKind.WAITING, message="for nobody")


class Place:
    """A store in a database, and as many holders as a test makes."""

    def __init__(self, directory: Path) -> None:
        metadata = MetaData()
        self.store = JobStore(metadata)
        self.database = Database(directory / "jobs.sqlite", FromMetadata(metadata))
        self.now = 1.8e9
        self.told: list[str] = []

    def holder(self) -> HeldJobs:
        held = HeldJobs(self.database, self.store, lease_s=LEASE_S, retry_delays_s=DELAYS_S, clock=lambda: self.now)
        held.notify = self.told.append
        return held

    async def submit(self, name: str = "j1") -> None:
        spec = EvaluationSpec(model_sha256="0" * 64, task="t")
        row = JobRow(
            job_id=name,
            request_id=name,
            owner="scientist/ann",
            display_name="",
            kind=spec.kind,
            spec=spec.to_json(),
            spec_digest=spec.digest,
            max_attempts=3,
            created_at=utc(self.now),
        )
        await self.database.run(lambda c: self.store.create(c, row))

    async def taken(self, name: str = "j1") -> HeldJobs:
        """A job, and who holds it."""
        await self.submit(name)
        held = self.holder()
        assert await held.take_next(CAPACITY, lambda _: True) is not None
        return held

    async def job(self, name: str = "j1") -> JobRow:
        return await self.database.run(lambda c: self.store.get(c, name))

    async def kinds(self, name: str = "j1") -> list[str]:
        return [each.kind.value for each in await self.database.run(lambda c: self.store.events(c, name))]

    async def guarded(self, held: HeldJobs, name: str = "j1") -> None:
        await self.database.run(lambda c: held.guard(c, name))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    await place.database.open()
    yield place
    await place.database.close()


async def test_who_took_a_job_may_write_about_it_until_it_is_at_rest(place: Place) -> None:
    held = await place.taken()
    assert held.holds("j1")
    await place.guarded(held)
    assert (await held.happen("j1", WAITING)).state is JobState.RUNNING
    await held.happen("j1", succeeded_event({}))
    assert not held.holds("j1")
    with pytest.raises(LeaseError):
        await place.guarded(held)
    with pytest.raises(LeaseError):
        await held.happen("j1", WAITING)
    assert place.told == ["j1"] * 3


async def test_a_job_that_is_not_ready_is_passed_over(place: Place) -> None:
    await place.submit("j1")
    place.now += 1
    await place.submit("j2")
    held = place.holder()
    row = await held.take_next(CAPACITY, lambda job: job.job_id != "j1")
    assert row is not None
    assert row.job_id == "j2"
    assert await held.take_next(CAPACITY, lambda job: job.job_id != "j1") is None


@pytest.mark.parametrize("write", ["happen", "renew", "guard", "failed"])
async def test_after_a_take_over_the_first_holder_writes_nothing(place: Place, write: str) -> None:
    first = await place.taken()
    second = place.holder()
    (row,) = await second.seize_all()
    assert (row.job_id, row.state) == ("j1", JobState.RUNNING)
    before = await place.kinds()
    assert before[-1] == "resumed"
    place.now += LEASE_S
    writes: dict[str, Callable[[], Awaitable[Any]]] = {
        "happen": lambda: first.happen("j1", failed_event(JobError("INTERNAL", "no"))),
        "renew": lambda: first.renew("j1"),
        "guard": lambda: place.guarded(first),
        "failed": lambda: first.failed("j1", WorkerError("it died"), stage="s"),
    }
    with pytest.raises(LeaseError):
        await writes[write]()
    assert await place.kinds() == before
    await second.happen("j1", WAITING)


async def test_only_what_was_under_way_is_taken_over_and_only_what_ran_is_said_to_go_on(place: Place) -> None:
    for name in ("pending", "running", "retrying", "cancelling", "done"):
        await place.submit(name)
    held = place.holder()
    while await held.take_next(CAPACITY, lambda job: job.job_id != "pending"):
        pass
    await held.failed("retrying", WorkerError("it died"), stage="s")
    await held.happen("cancelling", Event(kind=EventKind.CANCELLING))
    await held.happen("done", succeeded_event({}))
    rows = await place.holder().seize_all()
    assert {row.job_id: row.state.value for row in rows} == {
        "running": "RUNNING",
        "retrying": "RETRYING",
        "cancelling": "CANCELLING",
    }
    assert {row.job_id for row in rows if (await place.kinds(row.job_id))[-1] == "resumed"} == {"running"}


async def test_an_attempt_that_failed_because_the_job_is_anothers_is_no_failure_of_the_job(place: Place) -> None:
    first = await place.taken()
    second = place.holder()
    await second.seize_all()
    assert await first.failed(
        "j1", LeaseError("lost"), stage="s", last=False
    )  # another attempt follows: not by this one
    assert (first.holds("j1"), second.holds("j1")) == (False, True)
    assert await place.kinds() == ["submitted", "started", "resumed"]


async def test_a_lease_is_renewed_when_a_third_of_it_has_passed_and_lapses_without(place: Place) -> None:
    held = await place.taken()

    async def lapsed() -> bool:
        return bool(await place.database.run(lambda c: place.store.lapsed(c, place.now)))

    place.now += LEASE_S / RENEWALS - 1
    await held.renew("j1")  # too early: nothing is written
    place.now += LEASE_S - LEASE_S / RENEWALS + 1.1
    assert (held.lapsed("j1"), await lapsed()) == (True, True)
    await held.renew("j1")
    assert (held.lapsed("j1"), await lapsed()) == (False, False)


async def test_attempts_follow_each_other_as_configured_and_then_the_job_ends(place: Place) -> None:
    held = await place.taken()
    for attempt, delay_s in enumerate(DELAYS_S, start=1):
        assert await held.failed("j1", WorkerError("it died", private="secret"), stage="s", parties=("a",))
        job = await place.job()
        assert (job.state, job.attempt, job.retry_at) == (JobState.RETRYING, attempt, utc(place.now + delay_s))
        await held.happen("j1", Event(kind=EventKind.RESUMED))
    assert not await held.failed("j1", WorkerError("it died", private="secret"), stage="s", parties=("a",))
    job = await place.job()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.reason, job.error.message, job.error.stage) == ("WORKER_FAILED", "it died", "s")
    assert job.error.parties == ("a",)
    assert not held.holds("j1")


async def test_a_caller_with_another_way_on_hears_that_there_is_no_retry_and_nothing_is_written(place: Place) -> None:
    held = await place.taken()
    assert not await held.failed("j1", BudgetError("no"), stage="s", last=False)
    assert await place.kinds() == ["submitted", "started"]
    assert await held.failed("j1", WorkerError("it died"), stage="s", last=False)
    assert (await place.kinds())[-1] == "retrying"


async def test_a_failure_of_a_job_that_is_being_stopped_or_waits_already_changes_nothing(place: Place) -> None:
    held = await place.taken()
    await held.failed("j1", WorkerError("it died"), stage="s")
    assert not await held.failed("j1", BudgetError("no"), stage="s")
    await held.happen("j1", Event(kind=EventKind.CANCELLING))
    assert not await held.failed("j1", BudgetError("no"), stage="s")
    assert await place.kinds() == ["submitted", "started", "retrying", "cancelling"]


async def test_a_job_that_is_given_up_is_stopped_first_and_ended_then(place: Place) -> None:
    held = await place.taken()
    await held.give_up(await place.job(), RuntimeError("secret"))
    job = await place.job()
    assert (job.state, held.holds("j1"), held.lapsed("j1")) == (JobState.CANCELLING, True, False)
    await held.give_up(job, RuntimeError("secret"))
    job = await place.job()
    assert (job.state, held.holds("j1")) == (JobState.FAILED, False)
    assert job.error is not None
    assert "secret" not in str(job.error)


async def test_what_was_committed_is_told_also_when_the_caller_was_cancelled_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await place.taken()
    place.told.clear()
    began, may_end = asyncio.Event(), threading.Event()
    loop, write = asyncio.get_running_loop(), held.write

    def slow(connection: Connection, job_id: str, event: Event) -> JobRow:
        loop.call_soon_threadsafe(began.set)
        assert may_end.wait(60)
        return write(connection, job_id, event)

    monkeypatch.setattr(held, "write", slow)
    task = asyncio.create_task(held.happen("j1", succeeded_event({})))
    await began.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    may_end.set()
    assert (await place.job()).state is JobState.SUCCEEDED
    for _ in range(9):  # turns of the event loop: the commit was before that of reading the job
        await asyncio.sleep(0)
    assert place.told == ["j1"]
    assert not held.holds("j1")


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (BudgetError("asked 3, left 2"), "BUDGET_EXCEEDED", "asked 3, left 2"),
        (RoundFailed("fewer than 2"), "JOB_FAILED", "fewer than 2"),
        (KeyError("secret"), "INTERNAL", "internal error (INTERNAL)"),
    ],
)
def test_what_a_failure_looks_like_from_outside(error: Exception, reason: str, message: str) -> None:
    found = job_error(error, stage="s", parties=(), reference="r")
    assert found == JobError(reason, message, "s", (), "r")
    assert public_reason(error) == message


def test_parties_that_an_error_names_are_its_parties() -> None:
    assert job_error(StateError("no", parties="a,b"), stage="", parties=(), reference="").parties == ("a", "b")


def test_a_job_that_is_being_stopped_ends_as_what_stopped_it_says() -> None:
    fields: dict[str, Any] = {"request_id": "", "owner": "", "display_name": "", "kind": "", "spec": {}}
    row = JobRow(job_id="j", spec_digest="", created_at="", state=JobState.CANCELLING, **fields)
    assert ending(row).kind is EventKind.CANCELLED
    error = JobError("DEADLINE_EXCEEDED", "too late")
    late = ending(replace(row, error=error))
    assert (late.kind, late.detail) == (EventKind.FAILED, error.to_json())
