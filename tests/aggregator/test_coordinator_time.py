"""The driver of jobs, turn by turn: deadlines, leases, and jobs that another process took over."""

from __future__ import annotations

from typing import Any

import pytest

from src.aggregator.round_row import (
    RootCommitted,
    RoundState,
)
from src.errors import (
    SottoError,
    WorkerError,
)
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.states import JobRow, JobState
from tests.aggregator.played import EVALUATION, LEASE_S, Place

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


async def taken_by_another(place: Place, job_id: str) -> None:
    """A process that then does nothing."""
    take: dict[str, Any] = {"holder": "another", "now": place.clock(), "lease_s": LEASE_S, "seize": True}
    await place.database.run(lambda c: place.store.acquire(c, job_id, **take))


# ------------------------------------------------------------------------------------------------------------ deadlines


async def test_a_job_whose_deadline_passes_while_it_waits_has_failed(place: Place) -> None:
    place.work.hanging = {"evaluation"}
    for _ in range(2):  # as many as one scientist may have
        await place.submit()
    waiting = await place.submit(timeout_s=10)
    await place.turn()
    await place.turn(after_s=9.9)
    assert await place.state(waiting) is JobState.PENDING
    await place.turn(after_s=0.2)
    job = await place.job(waiting)
    assert (job.state, job.started_at) == (JobState.FAILED, "")
    assert job.error is not None
    assert job.error.reason == "DEADLINE_EXCEEDED"
    assert await place.kinds(waiting) == ["submitted", "expired"]


async def test_a_job_whose_deadline_passes_while_it_runs_is_stopped_and_has_failed(place: Place) -> None:
    place.work.hanging = {"evaluation"}
    job_id = await place.submit(timeout_s=10)
    await place.turn()
    await place.turn(after_s=10)
    job = await place.job(job_id)
    assert job.state is JobState.FAILED
    assert place.work.ended["evaluation"] == 1  # nobody goes on computing for it
    assert job.error is not None
    assert job.error.reason == "DEADLINE_EXCEEDED"
    assert await place.kinds(job_id) == ["submitted", "started", "expired", "failed"]


async def test_a_training_whose_deadline_passes_gives_back_what_was_not_spent(place: Place) -> None:
    job_id = await place.submit(place.training(), timeout_s=100)
    await place.turn()
    assert (await place.round(job_id)).state is RoundState.TRAINING
    await place.turn(after_s=100)
    job, row = await place.job(job_id), await place.round(job_id)
    assert (job.state, row.state, row.settled) == (JobState.FAILED, RoundState.CANCELLED, True)
    assert await place.charged(job_id) == ["returned"]
    assert await place.kinds(job_id) == ["submitted", "started", "expired", "round", "failed"]


async def test_a_job_whose_deadline_passes_between_two_attempts_has_failed_for_that(place: Place) -> None:
    place.work.failures["evaluation"] = [WorkerError("it died")] * 2
    job_id = await place.submit(timeout_s=30)
    await place.turn()
    assert await place.state(job_id) is JobState.RETRYING
    await place.turn(after_s=31)
    job = await place.job(job_id)
    assert (job.state, job.retry_at) == (JobState.FAILED, "")
    assert job.error is not None
    assert job.error.reason == "DEADLINE_EXCEEDED"
    assert place.work.asked["evaluation"] == 2


# --------------------------------------------------------------------------------------------------------------- leases


async def test_a_job_that_gets_nowhere_for_as_long_as_its_lease_lasts_is_ended_and_others_go_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = await place.submit(place.training())
    await place.turn()

    async def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(place.coordinator.trainings, "advance", fails)
    await place.turn(after_s=LEASE_S - 1)
    assert await place.state(stuck) is JobState.RUNNING
    await place.turn(after_s=2)
    assert await place.state(stuck) is JobState.CANCELLING  # it is given as long again to let go of what it holds
    other = await place.submit()
    await place.turn(after_s=1)
    assert (await place.state(stuck), await place.state(other)) == (JobState.CANCELLING, JobState.SUCCEEDED)
    await place.turn(after_s=LEASE_S)
    job = await place.job(stuck)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert "a mistake of ours" not in job.error.message
    assert not place.coordinator._held.holds(stuck)


async def test_a_job_that_gets_nowhere_and_then_can_be_stopped_lets_go_of_what_it_holds(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await place.submit(place.training())
    await place.turn()

    async def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("for a while")

    with monkeypatch.context() as broken:
        broken.setattr(place.coordinator.trainings, "advance", fails)
        await place.turn(after_s=LEASE_S)
        assert await place.state(job_id) is JobState.CANCELLING
    await place.turn(after_s=1)
    assert await place.state(job_id) is JobState.FAILED
    assert await place.charged(job_id) == ["returned"]


async def test_a_job_that_only_waits_keeps_its_lease(place: Place) -> None:
    job_id = await place.submit(place.training(round_timeout_s=10 * LEASE_S))
    await place.turn()
    for _ in range(20):
        await place.turn(after_s=LEASE_S / 4)
        assert await place.database.run(lambda c: place.store.lapsed(c, place.clock())) == []
    assert await place.state(job_id) is JobState.RUNNING


async def test_a_ghost_writes_nothing_about_a_job_that_another_process_took_over(place: Place) -> None:
    place.work.hanging = {"evaluation"}
    evaluation, training = await place.submit(), await place.submit(place.training())
    await place.turn()
    ghost, place.coordinator = place.coordinator, place.another()
    await place.coordinator.restore()
    before = [await place.events(evaluation), await place.events(training), await place.round(training)]
    place.work.hanging = set()
    place.work.let_go.set()  # the ghost's unit has its result now, and the ghost wants to say so
    assert await ghost._tasks.drain(30)
    for _ in range(3):
        place.clock.now += LEASE_S / 4  # the ghost wakes up, and wants to renew what it had
        await ghost._turn()
        assert await ghost._tasks.drain(30)
    assert place.work.asked["evaluation"] == 1  # it does not try again what is not its own
    assert before == [await place.events(evaluation), await place.events(training), await place.round(training)]
    assert not ghost._held.holds(evaluation)
    assert not ghost._held.holds(training)
    await place.turn()  # and who holds them ends them
    assert await place.state(evaluation) is JobState.SUCCEEDED
    await ghost.stop()


@pytest.mark.parametrize("why", ["its lease is to be renewed", "its deadline passes", "it is given up"])
async def test_a_job_that_was_lost_does_not_keep_others_from_being_driven(
    why: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.work.hanging = {"evaluation"}
    lost = await place.submit(timeout_s=10 if "deadline" in why else 0)
    other = await place.submit(place.training())
    await place.turn()
    place.clock.now += LEASE_S
    await taken_by_another(place, lost)
    if why == "it is given up":
        advance = place.coordinator._advance

        async def fails(job: JobRow) -> None:
            if job.job_id == lost:
                raise RuntimeError("a mistake of ours")
            await advance(job)

        monkeypatch.setattr(place.coordinator, "_advance", fails)
    before = await place.events(lost)
    await place.cancel(other)
    await place.turn()
    assert await place.state(other) is JobState.CANCELLED
    assert not place.coordinator._held.holds(lost)
    assert place.work.ended["evaluation"] == 1  # nobody computes for another process's job
    assert await place.events(lost) == before


@pytest.mark.parametrize("kind", ["evaluation", "federated_training"])
async def test_a_job_that_was_lost_to_a_process_that_is_gone_is_taken_up_when_its_lease_lapses(
    kind: str, place: Place
) -> None:
    place.work.hanging = {"evaluation"}
    job_id = await place.submit(place.training() if kind == "federated_training" else EVALUATION)
    await place.turn()
    await taken_by_another(place, job_id)
    await place.turn(after_s=LEASE_S / 2)  # by now it wants to renew its own, and hears that there is another
    assert not place.coordinator._held.holds(job_id)
    place.work.hanging = set()
    await place.turn(after_s=LEASE_S / 2 - 0.1)
    assert not place.coordinator._held.holds(job_id)
    before = await place.events(job_id)
    await place.turn(after_s=0.2)
    went_on = (await place.events(job_id))[len(before)]
    assert (went_on.kind.value, went_on.message) == ("resumed", "goes on after its lease had lapsed")
    if kind == "federated_training":
        await place.contribute(job_id)
    assert await place.state(job_id) is JobState.SUCCEEDED


async def test_nothing_that_was_begun_under_a_lost_lease_goes_on_when_the_job_is_taken_up(place: Place) -> None:
    place.work.hanging = {"evaluation"}
    job_id = await place.submit()
    await place.turn()
    place.coordinator._held.drop(job_id)  # as a task that hears of it does; others of the job may still run
    await place.turn(after_s=LEASE_S)
    assert (place.work.ended["evaluation"], place.work.asked["evaluation"]) == (1, 2)
    assert place.coordinator._held.holds(job_id)


async def test_a_process_that_is_being_stopped_takes_up_nothing(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    await taken_by_another(place, job_id)
    await place.turn(after_s=LEASE_S / 2)
    await place.coordinator.drain(0.0)
    await place.turn(after_s=LEASE_S)
    assert not place.coordinator._held.holds(job_id)


async def test_a_ghost_can_neither_plan_spend_nor_settle(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    ghost, place.coordinator = place.coordinator, place.another()
    await place.coordinator.restore()
    ledger = await place.database.run(place.ledger.entries)
    row = await place.round(job_id)
    root = RootCommitted("a", {"statement": "", "signer": "a", "signature": ""})
    spec = FederatedTrainingSpec.from_json((await place.job(job_id)).spec)
    with pytest.raises(SottoError, match="does not hold"):
        await ghost.trainings.happened(job_id, 1, root)
    with pytest.raises(SottoError, match="does not hold"):
        await ghost.trainings._settle(row)
    await ghost.trainings._plan(await place.job(job_id), spec, 2)
    assert await place.database.run(place.ledger.entries) == ledger
    assert await place.database.run(lambda c: place.rounds.of_job(c, job_id)) == [row]
    await ghost.stop()
