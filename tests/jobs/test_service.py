"""What may be asked about jobs, over a real database and real blobs; only the coordinator is played."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from src.communication.identity import Identity
from src.errors import (
    BudgetError,
    ConflictError,
    InvalidInput,
    LimitError,
    NotFoundError,
    StateError,
    UnavailableError,
)
from src.jobs.service import EVENTS_A_READ, Activity
from src.jobs.states import Event, EventKind, JobState, Priority, round_event, succeeded_event
from src.jobs.store import StoredEvent

House = Any
ANN, BOB, OPERATOR = Identity("scientist", "ann"), Identity("scientist", "bob"), Identity("operator", "ann")
STARTED = Event(kind=EventKind.STARTED, message="started")
LONG_S = 30.0
"""Far beyond what any wait here takes; only a hang reaches it."""


async def follow(
    house: House, job_id: str, *, after: int = 0, until: Callable[[StoredEvent], bool] = lambda event: False
) -> list[StoredEvent]:
    """What a watch yields, up to the first event that `until` holds for."""
    seen: list[StoredEvent] = []
    async with asyncio.timeout(LONG_S):
        events = house.service.watch(ANN, job_id, after_sequence=after)
        async for event in events:
            seen.append(event)
            if until(event):
                break
    return seen


async def test_a_job_is_stored_priced_and_put_before_the_coordinator(house: House) -> None:
    job_id = await house.create()
    view = await house.service.get(ANN, job_id)
    assert (view.row.state, view.row.owner, view.queue_position) == (JobState.PENDING, "scientist/ann", 1)
    assert view.activity == Activity("training", ("b",))
    assert view.row.priority is Priority.NORMAL
    assert (view.row.attempt, view.row.max_attempts, view.row.kind) == (0, 3, "federated_training")
    assert (house.coordinator.priced, house.coordinator.woken) == ([("federated_training", "scientist/ann")], 1)


async def test_a_repeated_request_is_answered_with_the_job_even_when_the_budget_is_gone(house: House) -> None:
    job_id = await house.create()
    house.coordinator.refusal = BudgetError("nothing is left")
    assert await house.create() == job_id
    with pytest.raises(ConflictError):
        await house.create(rounds=3)
    with pytest.raises(BudgetError):
        await house.create(request_id="another")
    assert len((await house.service.list_jobs(ANN))[0]) == 1


async def test_requests_at_the_same_moment_make_one_job(house: House) -> None:
    assert len(set(await asyncio.gather(*(house.create() for _ in range(5))))) == 1


async def test_the_initial_model_is_a_blob_before_the_job_is_there(house: House) -> None:
    await house.create(model=b"weights")
    assert house.blobs.read(hashlib.sha256(b"weights").hexdigest()) == b"weights"


@pytest.mark.parametrize("request_id", ["", "x" * 101])
async def test_a_request_without_a_proper_id_is_refused(house: House, request_id: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await house.create(request_id=request_id)
    assert list(caught.value.violations) == ["request_id"]


async def test_what_is_beyond_the_limits_is_refused(house: House) -> None:
    beyond: list[dict[str, Any]] = [
        {"rounds": 99, "spare_rounds": 2},
        {"parties": ["a", "b", "c", "d"]},
        {"round_timeout_s": 1000.5},
    ]
    for fields in beyond:
        with pytest.raises(LimitError, match="at most"):
            await house.create(**fields)
    for number in range(3):
        await house.create(request_id=str(number))
    with pytest.raises(LimitError, match="waiting"):
        await house.create(request_id="one too many")
    assert len((await house.service.list_jobs(ANN))[0]) == 3


async def test_a_scientist_has_only_their_own_jobs_and_an_operator_all(house: House) -> None:
    of_ann, of_bob = await house.create(ANN), await house.create(BOB)
    await house.happen(of_ann, STARTED, succeeded_event({"files": [{"name": "m", "bytes": 1, "sha256": "ab"}]}))
    assert [view.row.job_id for view in (await house.service.list_jobs(BOB))[0]] == [of_bob]
    assert [view.row.job_id for view in (await house.service.list_jobs(OPERATOR))[0]] == [of_bob, of_ann]
    asked = [
        house.service.get(BOB, of_ann),
        house.service.cancel(BOB, of_ann),
        house.service.wait(BOB, of_ann, timeout_s=LONG_S),
        house.service.artifact(BOB, of_ann, file="m"),
        anext(house.service.watch(BOB, of_ann)),
    ]
    for question in asked:
        with pytest.raises(NotFoundError):
            await question
    assert (await house.service.get(OPERATOR, of_ann)).row.job_id == of_ann
    assert (await house.service.cancel(OPERATOR, of_bob)).row.state is JobState.CANCELLED


async def test_cancel_ends_what_waits_stops_what_runs_and_leaves_the_rest(house: House) -> None:
    waiting, running = await house.create(request_id="1"), await house.create(request_id="2")
    assert (await house.service.cancel(ANN, waiting)).row.state is JobState.CANCELLED
    assert (await house.service.cancel(ANN, waiting)).row.state is JobState.CANCELLED
    await house.happen(running, STARTED)
    assert (await house.service.cancel(ANN, running)).row.state is JobState.CANCELLING
    assert (await house.service.cancel(ANN, running)).row.state is JobState.CANCELLING
    await house.happen(running, Event(kind=EventKind.CANCELLED))
    kinds = [event.kind.value for event in await follow(house, running)]
    assert kinds == ["submitted", "started", "cancelling", "cancelled"]


async def test_a_watch_replays_then_follows_and_ends_at_rest(house: House) -> None:
    job_id = await house.create()
    await house.happen(job_id, STARTED)
    replayed = asyncio.Event()

    def heard(event: StoredEvent) -> bool:
        if event.kind is EventKind.STARTED:
            replayed.set()
        return False

    watching = asyncio.create_task(follow(house, job_id, until=heard))
    await replayed.wait()
    await house.happen(job_id, round_event({"round": 1, "state": "RELEASED"}), succeeded_event({}))
    events = await watching
    assert [event.kind.value for event in events] == ["submitted", "started", "round", "succeeded"]
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    assert await follow(house, job_id, after=4) == []


async def test_watchers_that_come_and_go_while_it_happens_miss_nothing(house: House) -> None:
    """Each watcher leaves after three events and comes back with the last number it saw."""
    job_id = await house.create()

    async def hop() -> list[int]:
        seen: list[int] = []
        while True:
            left = 3

            def enough(event: StoredEvent) -> bool:
                nonlocal left
                left -= 1
                return left == 0

            events = await follow(house, job_id, after=seen[-1] if seen else 0, until=enough)
            seen += [event.sequence for event in events]
            if events and events[-1].state is JobState.SUCCEEDED:
                return seen

    watchers = [asyncio.create_task(hop()) for _ in range(4)]
    rounds = [round_event({"round": n, "state": "RELEASED"}) for n in range(20)]
    await house.happen(job_id, STARTED, *rounds, succeeded_event({}))
    assert await asyncio.gather(*watchers) == [list(range(1, 24))] * 4


async def test_a_history_longer_than_one_read_comes_whole_and_to_a_slow_reader_too(house: House) -> None:
    job_id = await house.create()
    events = house.service.watch(ANN, job_id)
    seen = [(await anext(events)).sequence]  # now the reader rests while everything happens

    def much(connection: object) -> None:
        house.store.apply(connection, job_id, STARTED, now=1.0)
        for number in range(2 * EVENTS_A_READ - 3):
            house.store.apply(connection, job_id, round_event({"round": number, "state": "FAILED"}), now=1.0)
        house.store.apply(connection, job_id, succeeded_event({}), now=1.0)

    await house.database.run(much)
    house.service.notify(job_id)
    async with asyncio.timeout(LONG_S):
        seen += [event.sequence async for event in events]
    assert seen == list(range(1, 2 * EVENTS_A_READ + 1))


async def test_a_stopping_process_sends_its_watchers_elsewhere(house: House) -> None:
    job_id = await house.create()
    events = house.service.watch(ANN, job_id)
    await anext(events)
    waiting = asyncio.ensure_future(anext(events))
    house.service.close()
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await house.service.wait(ANN, job_id, timeout_s=LONG_S)


async def test_a_negative_sequence_number_is_refused(house: House) -> None:
    with pytest.raises(InvalidInput):
        await anext(house.service.watch(ANN, await house.create(), after_sequence=-1))


async def test_waiting_ends_with_the_job_or_with_the_time(house: House) -> None:
    job_id = await house.create()
    assert (await house.service.wait(ANN, job_id, timeout_s=0.0)).row.state is JobState.PENDING
    waiting = asyncio.create_task(house.service.wait(ANN, job_id, timeout_s=LONG_S))
    await house.happen(job_id, STARTED, succeeded_event({}))
    assert (await waiting).row.state is JobState.SUCCEEDED


async def test_progress_counts_rounds_and_holds_their_summaries(house: House) -> None:
    job_id = await house.create()
    rounds = [round_event({"round": n, "state": state}) for n, state in enumerate(("FAILED", "RELEASED", "RELEASED"))]
    await house.happen(job_id, STARTED, *rounds)
    view = await house.service.get(ANN, job_id)
    assert (view.row.rounds_released, view.row.rounds_failed) == (2, 1)
    assert [summary["round"] for summary in view.rounds] == [0, 1, 2]
    (listed,), _ = await house.service.list_jobs(ANN)
    assert (listed.row.rounds_released, listed.rounds) == (2, ())


async def test_an_artifact_is_of_a_job_that_succeeded_and_by_name(house: House) -> None:
    job_id = await house.create()
    with pytest.raises(StateError, match="PENDING"):
        await house.service.artifact(ANN, job_id, file="model.safetensors")
    blob = house.blobs.write(b"the model")
    files = [{"name": "model.safetensors", "bytes": blob.size, "sha256": blob.sha256}]
    await house.happen(job_id, STARTED, succeeded_event({"files": files}))
    artifact = await house.service.artifact(ANN, job_id, file="model.safetensors")
    assert house.blobs.read(artifact.sha256) == b"the model"
    assert artifact.size == len(b"the model")
    for name in ("", "manifest.json", "../jobs.db"):
        with pytest.raises(NotFoundError, match="it has: model"):
            await house.service.artifact(ANN, job_id, file=name)


async def test_status_counts_the_jobs(house: House) -> None:
    ids = [await house.create(request_id=str(number)) for number in range(3)]
    await house.happen(ids[0], STARTED)
    await house.happen(ids[1], STARTED, Event(kind=EventKind.CANCELLING))
    status = await house.service.status()
    assert (status.federation, status.jobs_pending, status.jobs_running) == ("demo", 1, 2)
