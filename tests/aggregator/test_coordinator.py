"""The driver of jobs, turn by turn: attempts, rounds that cannot succeed, and what runs when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.aggregator.federation import Federation
from src.aggregator.round_row import (
    RoundState,
)
from src.aggregator.sessions import AWAY_S
from src.communication.identity import Identity
from src.config_sections import AggregatorPrivacy
from src.errors import (
    CATALOGUE,
    BudgetError,
    InvalidInput,
    PolicyError,
    SottoError,
    StorageError,
    UnavailableError,
    WorkerError,
)
from src.jobs.admission import JobSettings
from src.jobs.scheduler import Capacity
from src.jobs.service import JobService
from src.jobs.states import Event, EventKind, JobState, seconds
from tests.aggregator.played import ANN, BOB, EVALUATION, Place

SETTINGS = JobSettings(
    max_jobs_pending=4,
    max_pending_per_scientist=3,
    max_rounds=100,
    max_parties=3,
    max_round_timeout_s=1000.0,
    capacity=Capacity(max_trainings=1, max_computations=1, max_per_scientist=1),
)

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


# ------------------------------------------------------------------------------------------------------------- attempts


@pytest.mark.parametrize("error", [WorkerError("it died"), UnavailableError("it is away")])
async def test_what_another_attempt_may_mend_is_tried_again_at_once_after_a_minute_and_after_five(
    place: Place, error: SottoError
) -> None:
    place.work.failures["evaluation"] = [error] * 9
    job_id = await place.submit()
    await place.turn()
    job = await place.job(job_id)
    assert (place.work.asked["evaluation"], job.state, job.attempt) == (2, JobState.RETRYING, 2)
    assert seconds(job.retry_at) == pytest.approx(place.clock.now + 60)
    await place.turn(after_s=59)
    assert place.work.asked["evaluation"] == 2
    await place.turn(after_s=1.1)
    job = await place.job(job_id)
    assert (place.work.asked["evaluation"], job.state, job.attempt) == (3, JobState.RETRYING, 3)
    assert seconds(job.retry_at) == pytest.approx(place.clock.now + 300)
    await place.turn(after_s=301)
    job = await place.job(job_id)
    assert (place.work.asked["evaluation"], job.state, job.attempt, job.retry_at) == (4, JobState.FAILED, 4, "")
    assert job.error is not None
    assert (job.error.reason, job.error.stage) == (CATALOGUE[type(error)].reason, "evaluation")
    assert await place.kinds(job_id) == ["submitted", "started", *["retrying", "resumed"] * 3, "failed"]
    assert not place.coordinator._held.holds(job_id)


async def test_an_attempt_that_works_mends_the_job(place: Place) -> None:
    place.work.failures["evaluation"] = [WorkerError("it died")]
    job_id = await place.submit()
    await place.turn()
    job = await place.job(job_id)
    assert (job.state, job.attempt, job.error) == (JobState.SUCCEEDED, 2, None)
    assert await place.kinds(job_id) == ["submitted", "started", "retrying", "resumed", "succeeded"]


@pytest.mark.parametrize(
    "error",
    [InvalidInput("no model"), PolicyError("no"), BudgetError("no"), StorageError("gone"), RuntimeError("ours")],
)
async def test_what_no_attempt_would_mend_fails_at_once(place: Place, error: Exception) -> None:
    place.work.failures["evaluation"] = [error]
    job_id = await place.submit()
    await place.turn()
    job = await place.job(job_id)
    assert (place.work.asked["evaluation"], job.state, job.attempt) == (1, JobState.FAILED, 1)
    assert await place.kinds(job_id) == ["submitted", "started", "failed"]
    assert job.error is not None
    assert "ours" not in job.error.message  # what is not meant for everybody is in the log
    assert job.error.log_reference


async def test_a_round_goes_on_where_the_attempt_before_it_failed(place: Place) -> None:
    place.work.failures["fold"] = [WorkerError("it died")]
    job_id = await place.submit(place.training(rounds=2))
    await place.turn()
    await place.contribute(job_id)
    first = await place.round(job_id)
    assert first.state is RoundState.RELEASED
    assert place.work.asked["make_noise"] == 2  # of the first round, and of the second
    assert (await place.charged(job_id))[0] == "final"
    assert "retrying" in await place.kinds(job_id)


async def test_who_gets_on_does_not_run_out_of_attempts(place: Place) -> None:
    place.work.failures["make_noise"] = [WorkerError("it died")]
    job_id = await place.submit(place.training(rounds=2))
    await place.turn()
    assert (await place.job(job_id)).attempt == 2
    await place.contribute(job_id)
    job = await place.job(job_id)
    assert (job.rounds_released, job.attempt, job.state) == (1, 1, JobState.RUNNING)


async def test_a_round_whose_deadline_passes_between_two_attempts_fails_and_is_given_back(place: Place) -> None:
    place.work.failures["make_noise"] = [WorkerError("it died")] * 2
    job_id = await place.submit(place.training(spare_rounds=1, round_timeout_s=50.0))
    await place.turn()
    assert await place.state(job_id) is JobState.RETRYING
    await place.turn(after_s=51)
    assert (await place.round(job_id)).state is RoundState.FAILED
    assert await place.charged(job_id) == ["returned"]
    await place.turn(after_s=10)  # the minute is over: the next attempt begins with the next round
    assert await place.state(job_id) is JobState.RUNNING
    assert (await place.round(job_id, 2)).state is RoundState.TRAINING
    assert await place.charged(job_id) == ["returned", "open"]


async def test_a_step_that_no_attempt_mends_fails_the_round_and_a_spare_one_follows(place: Place) -> None:
    place.work.failures["make_noise"] = [StorageError("the disk is full")]
    job_id = await place.submit(place.training(spare_rounds=1))
    await place.turn()
    first, second = await place.round(job_id), await place.round(job_id, 2)
    assert (first.state, second.state) == (RoundState.FAILED, RoundState.TRAINING)
    assert first.reason == "could not make noise: the disk is full"


async def test_rounds_that_fail_one_after_the_other_wait_longer_and_longer(place: Place) -> None:
    """The second one comes at once, so that a fault of a moment that is over costs nothing; all five in no time would
    cost the job."""
    job_id = await place.submit(place.training(spare_rounds=5))
    await place.turn()
    await place.refuse(job_id, UnavailableError, "a")
    for number, pause_s in ((2, 5.0), (3, 10.0), (4, 20.0), (5, 40.0)):
        await place.refuse(job_id, UnavailableError, "a", number=number)
        assert len(await place.database.run(lambda c: place.rounds.of_job(c, job_id))) == number
        await place.turn(after_s=pause_s - 1)
        assert len(await place.database.run(lambda c: place.rounds.of_job(c, job_id))) == number
        await place.turn(after_s=2)
        assert len(await place.database.run(lambda c: place.rounds.of_job(c, job_id))) == number + 1
    await place.contribute(job_id, number=6)
    assert (await place.job(job_id)).rounds_failed == 5
    assert await place.state(job_id) is JobState.SUCCEEDED


# --------------------------------------------------------------------------------------------------- who is there, when


async def test_no_round_is_planned_while_too_few_are_there_to_open_it(place: Place) -> None:
    sessions = place.coordinator._sessions
    sessions._began -= 2 * AWAY_S
    job_id = await place.submit(place.training())
    await place.turn()
    if place.federation.roster.threshold:
        assert await place.database.run(lambda c: place.rounds.of_job(c, job_id)) == []
        (doing,) = [place.coordinator.trainings.progress(job_id, rounds=1)]
        assert doing is not None
        needed = "2 of 3 holders of key shares are needed to open a round"
        assert doing.stage == f"waiting for a, b, c to be connected: {needed}"
        sessions.open("b", "b's process")
        await place.turn()
        assert await place.database.run(lambda c: place.rounds.of_job(c, job_id)) == []
        sessions.open("c", "c's process")
        await place.turn()
    assert (await place.round(job_id)).state is RoundState.TRAINING


async def test_a_round_has_its_time_from_when_a_quorum_can_train_it_also_after_a_restart(place: Place) -> None:
    for name in "abc":
        place.coordinator._sessions.open(name, f"{name}'s process")
    job_id = await place.submit(place.training(round_timeout_s=1000.0))
    await place.turn()
    await place.turn(after_s=590)
    row, trainings = await place.round(job_id), place.coordinator.trainings
    assert not await trainings.quorum(row, "a", at_most_s=0.0)
    assert await trainings.quorum(row, "b", at_most_s=0.0)
    assert await trainings.quorum(row, "a", at_most_s=0.0)
    row = await place.round(job_id)
    assert (row.able_at, row.deadline) == (place.clock.now, place.clock.now + 1000)
    await place.turn(after_s=590)
    assert (await place.round(job_id)).state is RoundState.TRAINING
    restarted = place.another().trainings
    assert await restarted.quorum(await restarted.row(job_id, 1), "b", at_most_s=0.0)
    await place.turn(after_s=11)
    row = await place.round(job_id)
    assert (row.state, row.reason.partition(" (")[0]) == (
        RoundState.FAILED,
        "fewer than 2 parties contributed in time",
    )


# ------------------------------------------------------------------------------------------------------ hopeless rounds


@pytest.mark.parametrize("error", [BudgetError, PolicyError])
async def test_a_job_that_every_party_refuses_for_good_fails_at_once(place: Place, error: type[SottoError]) -> None:
    job_id = await place.submit(place.training(spare_rounds=5))
    await place.turn()
    await place.refuse(job_id, error, "a", "b")
    job = await place.job(job_id)
    assert (job.state, job.rounds_failed) == (JobState.FAILED, 1)
    assert job.error is not None
    assert (job.error.reason, job.error.stage, job.error.parties) == (
        CATALOGUE[error].reason,
        "round 1",
        ("a",),
    )
    assert await place.charged(job_id) == ["returned"]
    assert len(await place.database.run(lambda c: place.rounds.of_job(c, job_id))) == 1


async def test_a_party_that_may_be_back_costs_a_spare_round(place: Place) -> None:
    job_id = await place.submit(place.training(spare_rounds=1))
    await place.turn()
    await place.refuse(job_id, UnavailableError, "a")
    assert await place.state(job_id) is JobState.RUNNING
    await place.refuse(job_id, UnavailableError, "a", number=2)
    job = await place.job(job_id)
    assert (job.state, job.rounds_failed) == (JobState.FAILED, 2)
    assert job.error is not None
    assert (job.error.reason, job.error.parties) == ("JOB_FAILED", ("a",))
    assert await place.charged(job_id) == ["returned", "returned"]


# ------------------------------------------------------------------------------------------------------- what runs when


async def test_trainings_of_two_scientists_run_at_once_within_the_limits(
    federation: Federation, tmp_path: Path
) -> None:
    place = Place(federation, tmp_path, max_trainings_running=2, max_running_per_scientist=1)
    await place.database.open()
    first, second = [await place.submit(place.training(), owner=ANN) for _ in range(2)]
    other = await place.submit(place.training(), owner=BOB)
    await place.turn()
    states = [await place.state(each) for each in (first, second, other)]
    assert states == [JobState.RUNNING, JobState.PENDING, JobState.RUNNING]
    assert [(await place.round(each)).state for each in (first, other)] == [RoundState.TRAINING] * 2
    await place.contribute(first)
    assert await place.state(first) is JobState.SUCCEEDED
    assert [await place.state(each) for each in (second, other)] == [JobState.RUNNING] * 2
    await place.contribute(other)
    await place.contribute(second)
    for each in (first, second, other):
        assert await place.charged(each) == ["final"]
        assert await place.state(each) is JobState.SUCCEEDED
    await place.database.close()


async def test_a_computation_does_not_wait_behind_trainings(place: Place) -> None:
    for _ in range(3):
        await place.submit(place.training())
    evaluation = await place.submit()
    await place.turn()
    assert await place.state(evaluation) is JobState.SUCCEEDED


@pytest.mark.parametrize("spec", ["evaluation", "training"])
async def test_a_cancelled_job_ends_what_is_computed_for_it(place: Place, spec: str) -> None:
    place.work.hanging = {"evaluation", "make_noise"}
    job_id = await place.submit(EVALUATION if spec == "evaluation" else place.training())
    await place.turn()
    await place.cancel(job_id)
    await place.turn()
    assert await place.state(job_id) is JobState.CANCELLED
    assert sum(place.work.ended.values()) == 1
    assert await place.charged(job_id) == ([] if spec == "evaluation" else ["returned"])


# ------------------------------------------------------------------------------------------------------- deleted jobs


async def test_a_deleted_training_leaves_no_model_of_its_rounds_but_those_that_another_job_names(place: Place) -> None:
    deleted, other = await place.submit(place.training()), await place.submit(place.training())
    await place.turn()
    await place.contribute(deleted)
    # What workers make is named here, not stored: now it is.
    made = place.blobs.write(b"model").sha256
    assert made == (await place.round(deleted)).result["blobs"][0]  # type: ignore[index]
    began = place.training().initial_model_sha256
    service = JobService(
        place.database,
        place.store,
        blobs=place.blobs,
        coordinator=place.coordinator,
        settings=SETTINGS,
        leftovers=place.leftovers,
    )
    await service.delete(Identity("scientist", "ann"), deleted)
    await asyncio.gather(*service._finishing)
    assert (place.blobs.exists(made), place.blobs.exists(began)) == (False, True)
    assert await place.state(other) is JobState.RUNNING
    place.coordinator = place.another()
    await place.coordinator.restore()  # what is named at a start is the same
    assert place.blobs.exists(began)
    await place.cancel(other)
    await place.turn()
    await service.delete(Identity("scientist", "ann"), other)
    await asyncio.gather(*service._finishing)
    assert not place.blobs.exists(began)


async def test_what_a_task_that_runs_may_have_stored_is_not_dropped(place: Place) -> None:
    job_id = await place.submit()
    await place.turn()
    model = place.blobs.write(b"m").sha256
    place.work.hanging = {"evaluation"}
    await place.submit()
    await place.turn()
    await place.database.run(lambda c: place.store.apply(c, job_id, Event(kind=EventKind.DELETED), now=place.clock()))
    names = SimpleNamespace(blobs=lambda _, among: set(), blobs_of=lambda _, job_id: {model})
    place.leftovers._names = names
    dropping = asyncio.create_task(place.leftovers.drop(job_id))
    for _ in range(3):
        await place.database.run(lambda _: None)
        await asyncio.to_thread(lambda: None)
    assert place.blobs.exists(model)
    place.work.let_go.set()
    await dropping
    assert not place.blobs.exists(model)


# ------------------------------------------------------------------------------------------------------------- stopping


async def test_a_process_that_is_being_stopped_begins_nothing(place: Place) -> None:
    place.work.failures["evaluation"] = [WorkerError("it died")] * 2
    retrying = await place.submit()
    await place.turn()
    await place.coordinator.drain(0.0)
    waiting = await place.submit()
    await place.turn(after_s=1000)
    assert (await place.state(retrying), await place.state(waiting)) == (JobState.RETRYING, JobState.PENDING)
    assert place.work.asked["evaluation"] == 2
    place.coordinator = place.another()
    await place.coordinator.restore()
    await place.turn()
    assert (await place.state(retrying), await place.state(waiting)) == (JobState.SUCCEEDED, JobState.SUCCEEDED)


async def test_a_round_of_a_process_that_is_being_stopped_takes_in_what_parties_send_and_spends_nothing(
    place: Place,
) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    await place.coordinator.drain(0.0)
    await place.commit(job_id)
    await place.turn()
    row = await place.round(job_id)
    assert (row.state, row.frozen_list, row.committed) == (RoundState.COLLECTING, None, ("a", "b"))
    assert await place.charged(job_id) == ["open"]


# --- budgets of parties -----------------------------------------------------------------------------------------------


async def test_a_party_is_invited_as_often_as_its_budget_says_and_each_request_that_is_refused_is_entered(
    place: Place,
) -> None:
    privacy = AggregatorPrivacy.model_validate({"parties": {"a": {"max_rounds": 1}}})
    place.config = place.config.model_copy(update={"privacy": privacy})
    place.coordinator = place.another()
    spec = place.training()
    await place.coordinator.price(spec, owner=ANN)
    job_id = await place.submit(spec)
    with pytest.raises(BudgetError, match="of party a does not allow it: asked 2, spent 0, limit 1"):
        await place.coordinator.price(spec, owner=ANN)  # beside the one that waits
    await place.turn()
    await place.contribute(job_id)
    assert await place.state(job_id) is JobState.SUCCEEDED
    for owner, other in ((ANN, False), (ANN, False), (ANN, True), (BOB, False)):
        with pytest.raises(BudgetError, match=r"of party a does not allow it: asked [12], spent 1, limit 1"):
            await place.coordinator.price(place.training(rounds=2) if other else spec, owner=owner)
    await place.coordinator.price(place.training(parties=("b", "c")), owner=ANN)
    entries = await place.database.run(place.ledger.entries)
    assert [(entry.kind, entry.parties) for entry in entries] == [
        *[(kind, ("a", "b")) for kind in ("refusal", "reservation", "final", "release")],
        *[("refusal", ("a", "b"))] * 3,  # the same of the same owner twice on one day is one
    ]
    assert not any("ann" in entry.reservation_id for entry in entries)
