"""Following jobs: many watchers, reads shared by all of them, histories by the page, deletion."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.communication.identity import Identity
from src.errors import InvalidInput, NotFoundError, StateError, StorageError
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.states import (
    Event,
    EventKind,
    JobError,
    JobState,
    after_failure,
    failed_event,
    round_event,
    succeeded_event,
)
from src.jobs.watching import READS_KEPT, Notifier

House = Any
ANN, BOB, OPERATOR = Identity("scientist", "ann"), Identity("scientist", "bob"), Identity("operator", "olga")
STARTED = Event(kind=EventKind.STARTED, message="started")
FILES = [{"name": "model.safetensors", "bytes": 1, "sha256": "ab" * 32}]
SUCCEEDED = succeeded_event({"files": FILES, "metrics": {"auc": 0.5}})
LONG_S = 30.0
"""Far beyond what any wait here takes; only a hang reaches it."""
WATCHERS = 200


def rounds(*numbers: int) -> list[Event]:
    return [round_event({"round": number, "state": "FAILED"}) for number in numbers]


async def watch(house: House, job_id: str, after: int = 0) -> list[int]:
    async with asyncio.timeout(LONG_S):
        return [event.sequence async for event in house.service.watch(ANN, job_id, after_sequence=after)]


# --- watching ---------------------------------------------------------------------------------------------------------


async def test_two_hundred_watchers_see_everything_once_and_a_change_costs_about_one_read(house: House) -> None:
    job_id = await house.create()
    watchers = [asyncio.create_task(watch(house, job_id)) for _ in range(WATCHERS)]
    await house.asked_for("events", WATCHERS)  # each looks once for itself
    changes = [STARTED, *rounds(*range(30)), SUCCEEDED]
    await house.happen(job_id, *changes)
    assert await asyncio.gather(*watchers) == [list(range(1, len(changes) + 2))] * WATCHERS
    # A read that a change overtakes is made again, and those who shared the first one are a question of their own.
    assert house.store.asked["events"] - WATCHERS <= 4 * len(changes)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    plan=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=8),
    data=st.data(),
)
async def test_whenever_a_watcher_comes_goes_and_comes_back_it_misses_nothing(
    house: House, plan: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Watchers that begin anywhere, are slow or not, and leave after a few events, while rounds happen in bursts."""
    request_id = f"request {house.now}"
    job_id = await house.create(request_id=request_id)
    await house.happen(job_id, STARTED)
    seen: list[list[int]] = []

    async def hop(own: list[int], most: int, pauses: int) -> None:
        while True:
            left = most
            events = house.service.watch(ANN, job_id, after_sequence=own[-1] if own else 0)
            state = JobState.PENDING
            async for event in events:
                own.append(event.sequence)
                state = event.state
                for _ in range(pauses):
                    await asyncio.sleep(0)
                left -= 1
                if left == 0:
                    break
            await events.aclose()
            if state is JobState.SUCCEEDED:
                return

    tasks = []
    for burst, newcomers, pauses in plan:
        for _ in range(newcomers):
            own: list[int] = []
            seen.append(own)
            most = data.draw(st.integers(1, 5))
            tasks.append(asyncio.create_task(hop(own, most, pauses)))
        await house.happen(job_id, *rounds(*range(burst)))
    await house.happen(job_id, SUCCEEDED)
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*tasks)
    total = 3 + sum(burst for burst, _, _ in plan)
    assert seen == [list(range(1, total + 1))] * len(seen)


async def test_after_the_end_of_a_history_a_watch_waits_for_what_comes_later(house: House) -> None:
    job_id = await house.create()
    watching = asyncio.create_task(watch(house, job_id, after=3))
    await house.happen(job_id, STARTED, *rounds(1, 2), SUCCEEDED)
    assert await watching == [4, 5]
    assert await watch(house, job_id, after=10**12) == []


async def test_a_watch_goes_through_an_attempt_that_is_made_again(house: House) -> None:
    job_id = await house.create()
    await house.happen(job_id, STARTED)
    row = (await house.service.get(ANN, job_id)).row
    await house.happen(job_id, after_failure(row, JobError("WORKER_FAILED", "a worker died"), [0.0], house.now))
    view = await house.service.get(ANN, job_id)
    assert (view.row.state, view.row.attempt) == (JobState.RETRYING, 1)
    assert (await house.service.status()).jobs_running == 1
    await house.happen(job_id, Event(kind=EventKind.RESUMED), SUCCEEDED)
    kinds = [event.kind.value async for event in house.service.watch(ANN, job_id)]
    assert kinds == ["submitted", "started", "retrying", "resumed", "succeeded"]


async def test_a_watcher_that_is_cancelled_takes_nothing_from_those_who_share_its_read(house: House) -> None:
    job_id = await house.create()
    first, second = (asyncio.create_task(watch(house, job_id, after=1)) for _ in range(2))
    await house.asked_for("events", 2)
    notified = asyncio.create_task(house.happen(job_id, STARTED))
    await house.asked_for("events", 3)
    first.cancel()
    await notified
    await house.happen(job_id, SUCCEEDED)
    assert await second == [2, 3]
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_what_is_read_together_is_forgotten_with_the_next_change_and_when_nobody_follows() -> None:
    notifier, asked = Notifier(), []

    async def read(question: int) -> int:
        asked.append(question)
        return len(asked)

    with notifier.subscribe("a"):
        same = [notifier.shared("a", 1, lambda: read(1)) for _ in range(3)]
        assert await asyncio.gather(*same) == [1, 1, 1]
        notifier.notify("a")
        assert await notifier.shared("a", 1, lambda: read(1)) == 2
        for question in range(2 * READS_KEPT):  # a slow watcher is another question
            await notifier.shared("a", question, lambda question=question: read(question))  # type: ignore[misc]
        assert len(notifier._reads["a"]) == READS_KEPT
    assert (notifier._reads, notifier._bells) == ({}, {})


async def test_a_read_that_fails_fails_for_those_who_shared_it_and_is_made_again_for_others() -> None:
    notifier = Notifier()

    async def fails() -> int:
        raise StorageError("the disk is gone")

    async def works() -> int:
        return 1

    with notifier.subscribe("a"):
        failed = await asyncio.gather(*(notifier.shared("a", 1, fails) for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in failed] == [StorageError] * 2
        assert await notifier.shared("a", 1, works) == 1


# --- listing ----------------------------------------------------------------------------------------------------------


async def test_a_listing_asks_for_the_queue_once_and_only_where_somebody_waits(house: House) -> None:
    ids = [await house.create(request_id=str(number)) for number in range(3)]
    views, _ = await house.service.list_jobs(ANN)
    assert {view.row.job_id: view.queue_position for view in views} == dict(zip(ids, (1, 2, 3), strict=True))
    assert house.store.asked["positions"] == 1 + len(ids)  # each was created and looked at
    await house.happen(ids[0], STARTED)
    views, _ = await house.service.list_jobs(ANN, filter="state = RUNNING")
    assert [view.queue_position for view in views] == [0]
    assert house.store.asked["positions"] == 1 + len(ids)


async def test_a_listing_is_filtered_ordered_and_paged(house: House) -> None:
    ids = [await house.create(request_id=str(number)) for number in range(3)]
    await house.create(BOB)
    await house.happen(ids[1], STARTED)
    first, token = await house.service.list_jobs(ANN, filter="state = PENDING", order_by="create_time", page_size=1)
    second, end = await house.service.list_jobs(
        ANN, filter="state = PENDING", order_by="create_time", page_size=1, page_token=token
    )
    assert [view.row.job_id for view in (*first, *second)] == [ids[0], ids[2]]
    assert end == ""
    with pytest.raises(InvalidInput):
        await house.service.list_jobs(ANN, filter="state = ")


# --- histories by the page --------------------------------------------------------------------------------------------


async def test_a_history_comes_by_the_page_and_without_a_gap(house: House) -> None:
    job_id = await house.create()
    await house.happen(job_id, STARTED, *rounds(1, 2, 3))
    pages, after = [], 0
    while True:
        events, after = await house.service.events(ANN, job_id, after=after, limit=2)
        pages.append([event.sequence for event in events])
        if not after:
            break
    assert pages == [[1, 2], [3, 4], [5]]
    assert await house.service.events(ANN, job_id, after=5) == ([], 0)
    events, after = await house.service.events(ANN, job_id, after=1, limit=5000)
    assert ([event.sequence for event in events], after) == ([2, 3, 4, 5], 0)
    for wrong in ({"after": -1}, {"limit": -1}):
        with pytest.raises(InvalidInput, match="negative"):
            await house.service.events(ANN, job_id, **wrong)
    with pytest.raises(NotFoundError):
        await house.service.events(BOB, job_id)


# --- deleting ---------------------------------------------------------------------------------------------------------


async def test_a_deleted_job_has_no_files_and_stays_with_its_history(house: House) -> None:
    job_id = await house.create()
    await house.happen(job_id, STARTED, SUCCEEDED)
    row = (await house.service.delete(ANN, job_id)).row
    assert (row.state, row.deleted_at != "", (row.result or {})["files"]) == (JobState.SUCCEEDED, True, [])
    assert (row.result or {})["metrics"] == {"auc": 0.5}
    with pytest.raises(NotFoundError, match="were deleted"):
        await house.service.artifact(ANN, job_id, file="model.safetensors")
    assert (await house.service.list_jobs(ANN))[0] == []
    ((view,), _) = await house.service.list_jobs(ANN, show_deleted=True)
    assert view.row == row
    assert (await house.service.delete(ANN, job_id)).row == row  # once is as good as twice
    events, _ = await house.service.events(ANN, job_id)
    assert [event.kind.value for event in events] == ["submitted", "started", "succeeded", "deleted"]
    assert events[-1].cause == "scientist/ann"
    assert await watch(house, job_id) == [1, 2, 3, 4]
    spec = FederatedTrainingSpec.from_json({"task": "t"})
    assert (await house.service.create(ANN, "r", spec=spec)).row == row


async def dropped(house: House) -> None:
    """Once nothing goes on beside the calls."""
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*house.service._finishing)


async def test_what_a_deleted_job_alone_named_leaves_the_disk_and_what_another_names_stays(house: House) -> None:
    files = {name: house.blobs.write(name.encode()) for name in ("mine", "shared")}
    first, second = await house.create(request_id="1", model=b"m"), await house.create(request_id="2", model=b"m")
    for job_id, names in ((first, ("mine", "shared")), (second, ("shared",))):
        made = [{"name": name, "bytes": files[name].size, "sha256": files[name].sha256} for name in names]
        await house.happen(job_id, STARTED, succeeded_event({"files": made}))
    await house.service.delete(ANN, first)
    await dropped(house)
    assert [house.blobs.exists(file.sha256) for file in files.values()] == [False, True]
    await house.service.delete(ANN, second)
    await dropped(house)
    assert [path for path in house.blobs.root.rglob("*") if path.is_file()] == []  # the model of both included


async def test_a_model_that_comes_with_a_new_job_stays_though_a_job_with_the_same_one_is_deleted_meanwhile(
    house: House,
) -> None:
    old = await house.create(request_id="1", model=b"m")
    await house.happen(old, STARTED, failed_event(JobError("INTERNAL", "broken")))
    house.coordinator.pricing_allowed.clear()
    creating = asyncio.create_task(house.create(request_id="2", model=b"m"))
    while len(house.coordinator.priced) < 2:  # the model is stored, and no row names it
        await house.database.run(lambda connection: None)
    await house.service.delete(ANN, old)
    for _ in range(3):  # time enough for whoever would not wait
        await house.database.run(lambda connection: None)
        await asyncio.to_thread(lambda: None)
    house.coordinator.pricing_allowed.set()
    row = (await house.service.get(ANN, await creating)).row
    await dropped(house)
    assert house.blobs.read(row.spec["initial_model_sha256"]) == b"m"


async def test_only_a_job_at_rest_is_deleted_and_only_by_whom_it_belongs_to(house: House) -> None:
    job_id = await house.create()
    for state, events in (("PENDING", []), ("RUNNING", [STARTED]), ("CANCELLING", [Event(kind=EventKind.CANCELLING)])):
        await house.happen(job_id, *events)
        with pytest.raises(StateError, match="cancel it first") as caught:
            await house.service.delete(ANN, job_id)
        assert caught.value.metadata == {"state": state}
    await house.happen(job_id, failed_event(JobError("INTERNAL", "broken")))
    with pytest.raises(NotFoundError):
        await house.service.delete(BOB, job_id)
    assert (await house.service.delete(OPERATOR, job_id)).row.deleted_at


async def test_a_name_that_no_database_could_ask_for_is_no_job(house: House) -> None:
    with pytest.raises(NotFoundError):
        await house.service.get(OPERATOR, "a\0b")
