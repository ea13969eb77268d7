"""Creating jobs: what is asked for, waiting inline, idempotency, limits, jobs about jobs."""

from __future__ import annotations

import asyncio
import hashlib
import math
from typing import Any

import pytest

from src.communication.identity import Identity
from src.errors import BudgetError, ConflictError, InvalidInput, LimitError, NotFoundError, UnavailableError
from src.jobs.computations import EvaluationSpec, ExportSpec
from src.jobs.service import JobView
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import JobSpec
from src.jobs.states import Event, EventKind, JobState, Priority, seconds, succeeded_event

House = Any
ANN, BOB, OPERATOR = Identity("scientist", "ann"), Identity("scientist", "bob"), Identity("operator", "olga")
STARTED = Event(kind=EventKind.STARTED, message="started")
LONG_S = 30.0
"""Far beyond what any wait here takes; only a hang reaches it."""
TRAINING = FederatedTrainingSpec.from_json({"task": "t"})
EXPORT = ExportSpec.from_json({"job_id": "none"})


async def create(house: House, spec: JobSpec = TRAINING, request_id: str = "r", **fields: Any) -> JobView:
    view: JobView = await house.service.create(fields.pop("caller", ANN), request_id, spec=spec, **fields)
    return view


async def jobs(house: House) -> list[JobView]:
    views, _ = await house.service.list_jobs(OPERATOR, show_deleted=True)
    return list(views)


# --- what is asked for ------------------------------------------------------------------------------------------------


async def test_a_job_has_the_priority_deadline_and_attempts_it_was_given(house: House) -> None:
    row = (await create(house, priority=Priority.HIGH, timeout_s=90.0, display_name="mine")).row
    assert (row.priority, row.max_attempts, row.display_name) == (Priority.HIGH, 3, "mine")
    assert seconds(row.deadline_at) - seconds(row.created_at) == 90


async def test_without_a_timeout_a_training_never_expires_and_a_computation_soon(house: House) -> None:
    training = (await create(house)).row
    assert (training.priority, training.deadline_at) == (Priority.NORMAL, "")
    row = (await create(house, ExportSpec.from_json({"job_id": training.job_id}), "e")).row
    assert (row.kind, seconds(row.deadline_at) - seconds(row.created_at)) == ("export", 500)


REFUSED: list[dict[str, Any]] = [
    {"request_id": ""},
    {"request_id": "x" * 101},
    {"request_id": "a\0b"},
    {"timeout_s": 0.0},
    {"timeout_s": -1.0},
    {"timeout_s": math.inf},
    {"timeout_s": math.nan},
    {"timeout_s": 367 * 86_400.0},
    {"inline_wait_s": -0.1},
    {"inline_wait_s": 60.1},
    {"inline_wait_s": math.nan},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
async def test_an_argument_out_of_range_is_named_and_nothing_is_stored(house: House, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        await create(house, **fields)
    assert list(caught.value.violations) == [next(iter(fields)).replace("timeout_s", "timeout")]
    assert await jobs(house) == []


async def test_a_model_that_comes_with_an_evaluation_is_a_blob(house: House) -> None:
    spec = EvaluationSpec.from_json({"task": "t", "model_sha256": hashlib.sha256(b"weights").hexdigest()})
    row = (await create(house, spec, model=b"weights")).row
    assert (row.kind, house.blobs.read(row.spec["model_sha256"])) == ("evaluation", b"weights")


# --- waiting for the answer -------------------------------------------------------------------------------------------


async def test_a_job_that_is_at_rest_in_time_comes_back_so(house: House) -> None:
    creating = asyncio.create_task(create(house, inline_wait_s=LONG_S))
    while not (views := await jobs(house)):
        pass
    await house.happen(views[0].row.job_id, STARTED, succeeded_event({}))
    assert (await creating).row.state is JobState.SUCCEEDED


async def test_a_job_that_is_not_comes_back_as_it_is(house: House) -> None:
    assert (await create(house, inline_wait_s=0.01)).row.state is JobState.PENDING


async def test_a_repeated_request_waits_too(house: House) -> None:
    job_id = (await create(house)).row.job_id
    creating = asyncio.create_task(create(house, inline_wait_s=LONG_S))
    await house.happen(job_id, STARTED, succeeded_event({}))
    view = await creating
    assert (view.row.job_id, view.row.state) == (job_id, JobState.SUCCEEDED)


async def test_a_caller_that_goes_away_while_waiting_changes_nothing(house: House) -> None:
    creating = asyncio.create_task(create(house, inline_wait_s=LONG_S))
    while not (views := await jobs(house)):
        pass
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert (await house.service.get(ANN, views[0].row.job_id)).row.state is JobState.PENDING
    assert (await create(house)).row.job_id == views[0].row.job_id


@pytest.mark.parametrize("steps", range(12))
async def test_a_caller_that_goes_away_at_any_step_leaves_no_job_that_nobody_was_told_of(
    house: House, steps: int
) -> None:
    """However far it got: a job that is stored was put before the coordinator, and one that is not was not."""
    creating = asyncio.create_task(create(house))
    for _ in range(steps):
        await asyncio.sleep(0)
        await house.database.run(lambda connection: None)
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    await house.database.run(lambda connection: None)
    stored = await jobs(house)
    assert house.coordinator.woken == len(stored)
    assert (await create(house)).row.job_id in {view.row.job_id for view in await jobs(house)}
    assert len(await jobs(house)) == 1


async def test_a_stored_job_is_not_denied_by_a_process_that_stops_meanwhile(house: House) -> None:
    creating = asyncio.create_task(create(house, inline_wait_s=LONG_S))
    while not await jobs(house):
        pass
    house.service.close()
    assert (await creating).row.state is JobState.PENDING


async def test_a_stopping_process_takes_no_jobs(house: House) -> None:
    await create(house)
    house.service.close()
    for request_id in ("r", "another"):
        with pytest.raises(UnavailableError, match="is being stopped"):
            await create(house, request_id=request_id)
    assert (len(await jobs(house)), (await house.service.status()).stopping) == (1, True)


async def test_whoever_waits_for_admission_when_the_process_stops_is_refused(house: House) -> None:
    creating = [asyncio.create_task(create(house, request_id=str(number))) for number in range(3)]
    await asyncio.sleep(0)
    house.service.close()
    done = await asyncio.gather(*creating, return_exceptions=True)
    refused = [each for each in done if isinstance(each, UnavailableError)]
    assert len(refused) >= 2
    assert len(await jobs(house)) == len(done) - len(refused)


# --- the same request -------------------------------------------------------------------------------------------------


async def test_a_repeated_request_may_leave_open_what_it_said_and_say_another_name(house: House) -> None:
    job_id = (await create(house, priority=Priority.LOW, timeout_s=90.0, display_name="a")).row.job_id
    for again in ({}, {"priority": Priority.LOW}, {"timeout_s": 90.0}, {"display_name": "b"}):
        view = await create(house, **again)
        assert (view.row.job_id, view.row.display_name) == (job_id, "a")


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"spec": FederatedTrainingSpec.from_json({"task": "t", "seed": 1})}, "specification"),
    ({"spec": EXPORT}, "specification"),
    ({"priority": Priority.HIGH}, "priority"),
    ({"timeout_s": 91.0}, "timeout"),
    ({"timeout_s": 91.0, "priority": Priority.HIGH}, "priority and timeout"),
]


@pytest.mark.parametrize(("fields", "what"), OTHERS, ids=str)
async def test_another_job_under_the_same_request_is_refused(house: House, fields: dict[str, Any], what: str) -> None:
    job_id = (await create(house, priority=Priority.LOW, timeout_s=90.0)).row.job_id
    with pytest.raises(ConflictError, match=f"another {what}$") as caught:
        await create(house, **fields)
    assert caught.value.metadata == {"job_id": job_id}


async def test_a_repeated_request_is_answered_when_there_is_no_room_and_no_budget(house: House) -> None:
    job_id = (await create(house)).row.job_id
    for number in range(2):
        await create(house, request_id=str(number))
    house.coordinator.refusal = BudgetError("nothing is left")
    assert (await create(house)).row.job_id == job_id


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_one_scientist_does_not_fill_the_queue_and_all_together_do(house: House) -> None:
    mine = [(await create(house, request_id=str(number))).row.job_id for number in range(3)]
    priced = len(house.coordinator.priced)
    with pytest.raises(LimitError, match="3 of your jobs are waiting already; at most 3") as caught:
        await create(house, model=b"not even stored")
    assert caught.value.metadata == {"limit": "max_pending_per_scientist", "at_most": "3"}
    await create(house, caller=BOB)
    with pytest.raises(LimitError, match="4 jobs are waiting") as caught:
        await create(house, request_id="another", caller=BOB)
    assert caught.value.metadata["limit"] == "max_jobs_pending"
    assert (len(house.coordinator.priced), house.blobs.root.exists()) == (priced + 1, False)
    await house.happen(mine[0], STARTED)  # what runs does not wait
    assert (await create(house)).queue_position > 0


# --- jobs about jobs --------------------------------------------------------------------------------------------------


async def test_a_job_about_anothers_job_is_refused_as_if_that_did_not_exist(house: House) -> None:
    of_ann = (await create(house)).row.job_id
    kinds: list[ExportSpec | EvaluationSpec] = [
        ExportSpec.from_json({"job_id": of_ann}),
        EvaluationSpec.from_json({"job_id": of_ann, "task": "t"}),
    ]
    for spec in kinds:
        errors = []
        for asked in (spec, spec.model_copy(update={"job_id": "0" * 16})):
            with pytest.raises(NotFoundError) as caught:
                await create(house, asked, caller=BOB)
            job_id = asked.source_job_id
            errors.append((caught.value.message.replace(job_id, "?"), caught.value.metadata == {"job_id": job_id}))
        assert errors[0] == errors[1] == ("no job '?'", True)
    assert [kind for kind, _ in house.coordinator.priced] == ["federated_training"]
    for caller in (ANN, OPERATOR):
        assert (await create(house, kinds[0], "e", caller=caller)).row.owner == str(caller)


async def test_computations_wait_for_no_trainings_price_and_keep_to_the_rules_at_once(house: House) -> None:
    """While a training is priced, computations are created beside it and each other: a job a request, and no more
    than there is room for."""
    source = (await create(house)).row.job_id
    house.coordinator.pricing_allowed.clear()
    training = asyncio.create_task(create(house, request_id="slow"))
    while len(house.coordinator.priced) < 2:
        await jobs(house)
    spec = ExportSpec.from_json({"job_id": source})
    same = await asyncio.gather(*(create(house, spec, "same") for _ in range(5)))
    assert len({view.row.job_id for view in same}) == 1
    others = await asyncio.gather(*(create(house, spec, str(n)) for n in range(3)), return_exceptions=True)
    assert sorted(type(each).__name__ for each in others) == ["JobView", "LimitError", "LimitError"]
    house.coordinator.pricing_allowed.set()
    with pytest.raises(LimitError):  # there was room when it was priced
        await training
    assert len(await jobs(house)) == 3
