"""What a scientist may leave on the aggregator's disk: nothing of a refused job, and of the others so much."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import replace
from typing import Any, cast

import pytest

from src.communication.identity import Identity
from src.errors import BudgetError, ConflictError, InvalidInput, LimitError, StorageError
from src.jobs.computations import EvaluationSpec
from src.jobs.quotas import check_place
from src.jobs.specs import JobSpec
from src.jobs.states import Event, EventKind, JobState, succeeded_event
from src.jobs.tables import to_columns

House = Any
ANN, BOB = Identity("scientist", "ann"), Identity("scientist", "bob")
STARTED = Event(kind=EventKind.STARTED, message="started")
MODEL = b"weights" * 1000


def evaluation(model: bytes = MODEL) -> JobSpec:
    return EvaluationSpec.from_json({"task": "t", "model_sha256": hashlib.sha256(model).hexdigest()})


def files(house: House) -> list[str]:
    """Whatever lies in the blob store, whole or in part."""
    return sorted(path.name for path in house.blobs.root.rglob("*") if path.is_file())


async def submit(house: House, model: bytes, request_id: str, *, caller: Identity = ANN) -> str:
    view = await house.submit(evaluation(model), request_id, caller=caller, model=model)
    return str(view.row.job_id)


async def succeed(house: House, job_id: str, *sizes: int) -> None:
    made = [{"name": f"f{n}", "bytes": size, "sha256": f"{size:064x}"} for n, size in enumerate(sizes)]
    await house.happen(job_id, STARTED, succeeded_event({"files": made}))


# --- refused jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [BudgetError("nothing is left"), InvalidInput("it is no model")], ids=repr)
async def test_of_a_job_that_is_refused_no_byte_is_stored(house: House, refusal: Exception) -> None:
    """Not even for a moment: it is priced and checked by the bytes that came."""
    house.coordinator.refusal = refusal
    seen: list[list[str]] = []

    async def price(*_: Any, model: bytes, **__: Any) -> None:
        assert model == MODEL
        seen.append(files(house))
        raise refusal

    house.coordinator.price = price
    with pytest.raises(type(refusal)):
        await submit(house, MODEL, "r")
    with pytest.raises(type(refusal)):
        await house.create(request_id="s", model=MODEL)
    assert (seen, files(house)) == ([[], []], [])


async def test_what_a_job_stored_that_is_refused_in_the_last_moment_goes_at_once(house: House) -> None:
    """Others took the last place while it was priced."""
    real = house.coordinator.price

    async def slow(*args: Any, **fields: Any) -> tuple[str, ...]:
        house.coordinator.price = real
        for number in range(3):
            await house.create(BOB if number else ANN, request_id=f"other {number}")
        await house.create(Identity("scientist", "eve"), request_id="the last place")
        return cast(tuple[str, ...], await real(*args, **fields))

    house.coordinator.price = slow
    with pytest.raises(LimitError, match="waiting"):
        await submit(house, MODEL, "r")
    await house.service._leftovers.settled()
    assert files(house) == []


async def test_what_a_database_did_not_take_goes_at_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(house.store, "create", broken)
    with pytest.raises(StorageError):
        await submit(house, MODEL, "r")
    await house.service._leftovers.settled()
    assert files(house) == []


async def test_a_request_id_that_was_used_for_something_else_stores_nothing(house: House) -> None:
    await submit(house, MODEL, "r")
    with pytest.raises(ConflictError):
        await submit(house, MODEL * 2, "r")
    assert files(house) == [hashlib.sha256(MODEL).hexdigest()]


async def test_the_model_of_a_job_that_was_cancelled_before_it_began_goes_at_once_unless_another_has_it(
    house: House,
) -> None:
    first = await submit(house, MODEL, "1")
    second = await submit(house, MODEL, "2", caller=BOB)
    await house.service.cancel(ANN, first)
    await house.service._leftovers.settled()
    assert files(house) == [hashlib.sha256(MODEL).hexdigest()]
    await house.service.cancel(BOB, second)
    await house.service._leftovers.settled()
    assert files(house) == []


async def test_a_caller_that_goes_away_leaves_a_job_with_its_model_or_neither(house: House) -> None:
    for steps in range(20):
        model = MODEL + bytes([steps])
        creating = asyncio.create_task(submit(house, model, str(steps)))
        for _ in range(steps):
            await asyncio.sleep(0)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        while house.service._finishing:
            await asyncio.gather(*house.service._finishing, return_exceptions=True)
        await house.service._leftovers.settled()
        there = (await house.service.list_jobs(ANN))[0]
        digests = sorted(view.row.spec["model_sha256"] for view in there)
        assert files(house) == digests
        for view in there:
            await house.service.cancel(ANN, view.row.job_id)
            await house.service.delete(ANN, view.row.job_id)
        await house.service._leftovers.settled()
        assert files(house) == []


# --- quotas -----------------------------------------------------------------------------------------------------------


def allow(house: House, **limits: int) -> None:
    house.service._settings = replace(house.service._settings, **limits)


async def test_models_beyond_the_quota_are_refused_by_name_until_jobs_are_deleted(house: House) -> None:
    """Models of jobs that wait, and files of those that are done; of nobody else's, and the same bytes once."""
    allow(house, max_stored_bytes_per_scientist=2 * len(MODEL) + 100, max_pending_per_scientist=9, max_jobs_pending=9)
    await submit(house, MODEL, "1", caller=BOB)
    first = await submit(house, MODEL, "1")
    await submit(house, MODEL, "the same bytes")
    second = await submit(house, MODEL + b"2", "2")
    await succeed(house, second, len(MODEL) + 1, 50)
    with pytest.raises(LimitError, match=r"limits\.max_stored_bytes_per_scientist") as caught:
        await submit(house, MODEL + b"3", "3")
    assert caught.value.metadata["limit"] == "max_stored_bytes_per_scientist"
    assert hashlib.sha256(MODEL + b"3").hexdigest() not in files(house)
    await house.create(request_id="a training without a model is no matter of bytes")
    await house.service.delete(ANN, second)
    third = await submit(house, MODEL + b"3", "3")
    states = [(await house.service.get(ANN, each)).row.state for each in (first, third)]
    assert states == [JobState.PENDING, JobState.PENDING]


async def test_a_model_larger_than_the_quota_is_refused_at_once(house: House) -> None:
    allow(house, max_stored_bytes_per_scientist=len(MODEL) - 1)
    with pytest.raises(LimitError, match="max_stored_bytes_per_scientist"):
        await submit(house, MODEL, "1")
    assert (files(house), house.coordinator.priced) == ([], [])


async def test_jobs_beyond_the_quota_of_a_day_are_refused_by_name_deleted_ones_counted(house: House) -> None:
    """Their rows stay for ever: whoever cancels and deletes at once may not submit more for it."""
    allow(house, max_jobs_a_day_per_scientist=5)
    for number in range(5):
        job_id = await house.create(request_id=str(number))
        await house.service.cancel(ANN, job_id)
        await house.service.delete(ANN, job_id)
    with pytest.raises(LimitError, match=r"limits\.max_jobs_a_day_per_scientist") as caught:
        await house.create(request_id="5")
    assert caught.value.metadata["limit"] == "max_jobs_a_day_per_scientist"
    await house.create(BOB, request_id="5")
    assert await house.create(request_id="4")  # said again, it is the job that is there
    house.now += 86_400
    await house.create(request_id="5")


async def test_ten_thousand_jobs_that_keep_files_are_counted_in_a_moment(house: House) -> None:
    """Asked for a model alone, in the database's one thread, which everybody waits for."""
    row = (await house.service.get(ANN, await submit(house, MODEL, "r"))).row
    done = {"state": JobState.SUCCEEDED, "result": {"files": [{"name": "m", "bytes": 7, "sha256": "1" * 64}]}}
    rows = [replace(row, job_id=f"{number:x}", request_id=f"{number}", **done) for number in range(10_000)]
    settings = replace(house.service._settings, max_jobs_a_day_per_scientist=10**9)

    def look(connection: Any) -> float:
        lease = {"fencing_token": 0, "lease_holder": "", "lease_expires_at": ""}
        connection.execute(house.store.jobs.insert(), [{**to_columns(each), **lease} for each in rows])
        began = time.perf_counter()
        brought = ("0" * 64, 1)
        check_place(connection, house.store, house.blobs, owner=str(ANN), model=brought, now=1e9, settings=settings)
        return time.perf_counter() - began

    assert await house.database.run(look) < 2.0  # some tens of milliseconds
