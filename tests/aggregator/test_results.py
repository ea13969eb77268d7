"""A job that does not come to its end: every round that was released, and no other, is a result with a manifest."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.aggregator.early import CONTINUED
from src.aggregator.federation import Federation
from src.aggregator.pipeline import StoredModel
from src.aggregator.round_row import Batch, BatchStored, RoundState, ShareStored
from src.communication.identity import Identity
from src.errors import (
    BudgetError,
    InvalidInput,
    LimitError,
    NotFoundError,
    PolicyError,
    StateError,
    StorageFullError,
    WorkerError,
)
from src.jobs.admission import JobSettings
from src.jobs.artifact import verify_manifest
from src.jobs.computations import ExportSpec
from src.jobs.service import JobService
from src.jobs.spec import ContinuedFrom, FederatedTrainingSpec
from src.jobs.states import JobState
from src.learning.flatten import to_safetensors
from tests.aggregator.played import ANN, Place, digest

CALLER, STRANGER = Identity("scientist", "ann"), Identity("scientist", "bob")
SETTINGS = JobSettings(
    max_jobs_pending=4,
    max_pending_per_scientist=3,
    max_rounds=100_000,
    max_parties=3,
    max_round_timeout_s=1000.0,
    max_stored_bytes_per_scientist=1 << 20,
)

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


class Trained:
    """A training whose rounds release models as they are told to, and who asks for them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.service = JobService(
            place.database,
            place.store,
            blobs=place.blobs,
            coordinator=place.coordinator,
            settings=SETTINGS,
            leftovers=place.leftovers,
            clock=place.clock,
        )

    async def start(self, **fields: Any) -> str:
        known = {"rounds": 40, "spare_rounds": 3, "local_training": {"epsilon": 8.0}}
        spec = FederatedTrainingSpec.from_json({**self.place.training().to_json(), **known, **fields})
        job_id = await self.place.submit(spec)
        await self.place.turn()
        return job_id

    async def release(self, job_id: str, *numbers: int) -> None:
        for number in numbers:
            await self.open(job_id, number)

    async def open(self, job_id: str, number: int) -> None:
        """A round comes to its end with a model of its own."""
        model = self.place.blobs.write(model_of(number))
        self.place.work.opened = {"model_sha256": model.sha256, "model_bytes": model.size}
        await self.place.contribute(job_id, number)

    async def cancel(self, job_id: str, *, keep: bool = False) -> JobState:
        await self.service.cancel(CALLER, job_id, keep=keep)
        await self.place.turn()
        return await self.place.state(job_id)

    async def manifest(self, result: dict[str, Any]) -> dict[str, Any]:
        """As the aggregator signed it, its schema and signature checked."""
        files = {file["name"]: self.place.blobs.path(file["sha256"]) for file in result["files"]}
        return verify_manifest(files["manifest.json"], self.place.federation.roster, files=files)

    def model(self, result: dict[str, Any]) -> bytes:
        return self.place.blobs.read(result["files"][0]["sha256"])

    async def file(self, job_id: str, name: str, choice: str, **known: str) -> bytes:
        found = await self.service.artifact(CALLER, job_id, file=name, choice=choice, **known)
        return self.place.blobs.read(found.sha256)


def model_of(number: int) -> bytes:
    return to_safetensors({"w": np.full(60, number, np.float32)})


def statement_in(trained: Trained, result: dict[str, Any]) -> dict[str, Any]:
    readable: dict[str, Any] = json.loads(trained.place.blobs.read(result["files"][-1]["sha256"]))["readable"]
    return readable


@pytest.fixture
async def trained(federation: Federation, tmp_path: Path) -> AsyncIterator[Trained]:
    place = Place(federation, tmp_path)
    await place.database.open()
    yield Trained(place)
    await place.coordinator.stop()
    await place.leftovers.settled()
    await place.database.close()


@pytest.mark.parametrize("end", ["running", "cancelled", "overdue", "failed"])
async def test_a_released_round_is_a_result_whatever_becomes_of_its_job(trained: Trained, end: str) -> None:
    place = trained.place
    job_id = await trained.start(keep="every:2", spare_rounds=0)
    await trained.release(job_id, 1, 2, 3)
    if end == "cancelled":
        assert await trained.cancel(job_id) is JobState.CANCELLED
    elif end == "overdue":
        place.clock.now += 1
        await place.database.run(lambda c: c.exec_driver_sql("UPDATE jobs SET deadline_at = '2000-01-01'").rowcount)
        await place.turn()
        assert await place.state(job_id) is JobState.FAILED
    elif end == "failed":
        await place.refuse(job_id, PolicyError, "a", number=4)
        assert await place.state(job_id) is JobState.FAILED
    last = await trained.service.round_result(CALLER, job_id, "last")
    second = await trained.service.round_result(CALLER, job_id, "2")
    assert (trained.model(last), trained.model(second)) == (model_of(3), model_of(2))
    assert (last["round"], second["round"], last["rounds_released"], last["rounds_planned"]) == (3, 2, 3, 40)
    assert await trained.file(job_id, "model.safetensors", "2") == model_of(2)
    assert (await trained.service.get(CALLER, job_id)).kept == (2, 3)
    with pytest.raises(NotFoundError, match="the model of round 1"):
        await trained.service.round_result(CALLER, job_id, "1")
    with pytest.raises(StateError, match="or last"):
        await trained.service.artifact(CALLER, job_id, file="manifest.json")


async def test_the_manifest_is_signed_and_states_what_all_rounds_cost_whichever_is_taken(trained: Trained) -> None:
    """The failed one among them too: its parties were charged, or may have been."""
    job_id = await trained.start(keep="every:1", party_privacy={"noise_multiplier": 5.0})
    await trained.release(job_id, 1)
    first = await trained.service.round_result(CALLER, job_id, "1")
    earlier = statement_in(trained, first)
    await trained.place.refuse(job_id, WorkerError, "a", number=2)
    await trained.place.turn(60)  # after a round that failed the next one waits
    await trained.release(job_id, 3)
    await trained.cancel(job_id)
    one, three = [await trained.service.round_result(CALLER, job_id, choice) for choice in ("1", "last")]
    statements = [earlier, *(statement_in(trained, each) for each in (one, three))]
    before, now, last = [each["privacy"] for each in statements]
    assert now == last != before
    assert float(now["example"]["epsilon"]) > float(before["example"]["epsilon"])
    assert float(now["party"]["epsilon"]) > float(before["party"]["epsilon"])
    assert statements[1]["of_round"] == {
        "round": 1,
        "rounds_released": 2,
        "rounds_begun": 4,  # the last one was cancelled
        "rounds_planned": 40,
        "job_state": "CANCELLED",
    }
    assert [each["state"] for each in statements[1]["rounds"]] == ["RELEASED", "FAILED", "RELEASED", "CANCELLED"]
    assert "this is the model of round 1" in statements[1]["statements"][0]
    assert "every epsilon is of all rounds begun" in statements[1]["statements"][0]
    assert one["epsilon_example"] == three["epsilon_example"]
    assert (await trained.manifest(one))["model"]["sha256"] == one["files"][0]["sha256"]
    again = await trained.service.round_result(CALLER, job_id, "1")
    assert again == one  # nothing has happened since
    await trained.place.leftovers.settled()
    assert not trained.place.blobs.exists(first["files"][-1]["sha256"])


async def test_a_manifest_that_somebody_knows_is_there_until_it_is_another(trained: Trained) -> None:
    job_id = await trained.start(keep="every:1")
    await trained.release(job_id, 1)
    known = (await trained.service.round_result(CALLER, job_id, "1"))["files"][-1]["sha256"]
    await trained.release(job_id, 2)
    content = await trained.file(job_id, "manifest.json", "1", sha256=known)
    assert json.loads(content)["readable"]["of_round"]["rounds_released"] == 1
    newer = json.loads(await trained.file(job_id, "manifest.json", "1"))["readable"]  # whoever names none gets it anew
    assert newer["of_round"]["rounds_released"] == 2
    with pytest.raises(NotFoundError, match="the job has moved on"):
        await trained.file(job_id, "manifest.json", "1", sha256=known)


async def test_nobody_gets_what_was_opened_and_not_released(trained: Trained) -> None:
    """Its budget is spent, its shares are there: and still there is no such model for anybody."""
    job_id = await trained.start(keep="every:1")
    await trained.release(job_id, 1)
    place = trained.place
    place.work.failures["open_aggregate"] = [StateError("the disk does not take the model")] * 9
    await place.contribute(job_id, 2)
    failed = await place.round(job_id, 2)
    assert (failed.state, failed.spent) == (RoundState.FAILED, True)
    with pytest.raises(NotFoundError, match=r"round 2 of job .* was not released; released are 1"):
        await trained.service.round_result(CALLER, job_id, "2")
    assert (await trained.service.round_result(CALLER, job_id, "last"))["round"] == 1
    assert (await trained.service.get(CALLER, job_id)).kept == (1,)


async def test_nobody_else_gets_a_round_or_starts_from_it(trained: Trained) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1)
    result = await trained.service.round_result(CALLER, job_id, "1")
    for choice in ("1", "last"):
        with pytest.raises(NotFoundError, match=f"no job '{job_id}'"):
            await trained.service.round_result(STRANGER, job_id, choice)
        with pytest.raises(NotFoundError, match=f"no job '{job_id}'"):
            await trained.service.artifact(STRANGER, job_id, file="model.safetensors", choice=choice)
    source = ContinuedFrom(job_id=job_id, round=1, model_sha256=result["files"][0]["sha256"])
    with pytest.raises(NotFoundError, match=f"no job '{job_id}'"):
        await trained.service.create(STRANGER, "r", spec=FederatedTrainingSpec(task="t", continue_from=source))
    with pytest.raises(NotFoundError, match=f"no job '{job_id}'"):
        await trained.service.create(STRANGER, "r", spec=ExportSpec(job_id=job_id, round="1"))


@pytest.mark.parametrize("choice", ["0", "-1", "99999999999999999999", "best:nothing", "first", "1 OR 1=1"])
async def test_what_is_no_round_is_refused(trained: Trained, choice: str) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1)
    with pytest.raises(InvalidInput):
        await trained.service.round_result(CALLER, job_id, choice)


async def test_a_deleted_job_has_no_rounds_and_leaves_no_byte(trained: Trained) -> None:
    job_id = await trained.start(keep="every:1")
    await trained.release(job_id, 1, 2)
    result = await trained.service.round_result(CALLER, job_id, "1")
    await trained.cancel(job_id)
    await trained.service.delete(CALLER, job_id)
    await trained.service._to_its_end(trained.place.leftovers.settled())
    with pytest.raises(NotFoundError, match="were deleted"):
        await trained.service.round_result(CALLER, job_id, "1")
    source = ContinuedFrom(job_id=job_id, round=1, model_sha256=result["files"][0]["sha256"])
    with pytest.raises(NotFoundError, match="were deleted"):
        await trained.service.create(CALLER, "r", spec=FederatedTrainingSpec(task="t", continue_from=source))
    assert (await trained.service.get(CALLER, job_id)).kept == ()
    await trained.place.leftovers.collect()
    assert not {file["sha256"] for file in result["files"]} & trained.place.blobs.digests()


# --- stopping and keeping ---------------------------------------------------------------------------------------------


async def test_a_job_that_is_stopped_and_kept_ends_with_its_last_released_round(trained: Trained) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1, 2)
    assert await trained.cancel(job_id, keep=True) is JobState.SUCCEEDED
    job = await trained.place.job(job_id)
    assert job.result is not None
    assert trained.model(job.result) == model_of(2)
    assert (job.result["round"], job.result["rounds_released"], job.result["rounds_planned"]) == (2, 2, 40)
    kinds = await trained.place.kinds(job_id)
    assert kinds[-3:] == ["cancelling", "round", "succeeded"]
    assert statement_in(trained, job.result)["of_round"]["rounds_begun"] == 3
    assert await trained.service.round_result(CALLER, job_id, "last") == job.result
    assert (await trained.place.round(job_id, 3)).state is RoundState.CANCELLED
    assert await trained.place.charged(job_id) == ["final", "final", "returned"]


async def test_a_round_that_is_paid_for_is_brought_to_its_end_before(trained: Trained) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1)
    trained.place.work.failures["open_aggregate"] = []
    model = trained.place.blobs.write(model_of(2))
    trained.place.work.opened = {"model_sha256": model.sha256, "model_bytes": model.size}
    await trained.place.commit(job_id, 2)
    await trained.place.turn()
    await deliver(trained.place, job_id, 2)
    assert (await trained.place.round(job_id, 2)).spent
    assert await trained.cancel(job_id, keep=True) is JobState.CANCELLING
    await reveal(trained.place, job_id, 2)
    job = await trained.place.job(job_id)
    assert job.state is JobState.SUCCEEDED
    assert trained.model(job.result or {}) == model_of(2)


async def test_who_asks_to_keep_what_is_being_cancelled_already_is_told(trained: Trained) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1)
    await trained.service.cancel(CALLER, job_id)
    with pytest.raises(StateError, match=r"is being stopped already, without keeping its last round .* by its round"):
        await trained.service.cancel(CALLER, job_id, keep=True)
    await trained.place.turn()
    assert await trained.place.state(job_id) is JobState.CANCELLED
    kept = await trained.start()
    await trained.release(kept, 1)
    for _ in range(2):  # said again, it is the same
        await trained.service.cancel(CALLER, kept, keep=True)
    await trained.service.cancel(CALLER, kept)
    await trained.place.turn()
    assert await trained.place.state(kept) is JobState.SUCCEEDED


async def deliver(place: Place, job_id: str, number: int) -> None:
    for party in (await place.round(job_id, number)).cohort:
        await place.coordinator.trainings.happened(
            job_id, number, BatchStored(party, Batch("00", digest(f"{party} {number}"), 1), 1)
        )
    await place.turn()


async def reveal(place: Place, job_id: str, number: int) -> None:
    for party in (await place.round(job_id, number)).asked:
        await place.coordinator.trainings.happened(
            job_id, number, ShareStored(party, digest(f"share {party} {number}"))
        )
    await place.turn()


@pytest.mark.parametrize("meanwhile", ["", "the disk is full while it is opened"])
async def test_the_first_round_too_is_had_where_it_is_paid_for_when_its_job_is_stopped(
    trained: Trained, meanwhile: str
) -> None:
    job_id, place = await trained.start(), trained.place
    model = place.blobs.write(model_of(1))
    place.work.opened = {"model_sha256": model.sha256, "model_bytes": model.size}
    place.work.failures["open_aggregate"] = [StorageFullError(meanwhile)] if meanwhile else []
    await place.commit(job_id, 1)
    await place.turn()
    await deliver(place, job_id, 1)
    assert (await place.round(job_id, 1)).spent
    assert await trained.cancel(job_id, keep=True) is JobState.CANCELLING
    await reveal(place, job_id, 1)
    job = await place.job(job_id)
    assert job.state is JobState.SUCCEEDED
    assert trained.model(job.result or {}) == model_of(1)
    assert await place.charged(job_id) == ["final"]


async def test_no_round_begins_for_a_job_that_is_being_stopped_though_it_was_planned(trained: Trained) -> None:
    """Nobody would settle it: what it reserved would count for ever."""
    job_id, place = await trained.start(), trained.place
    row = await place.round(job_id, 1)
    await place.cancel(job_id)
    trainings = place.coordinator.trainings
    with pytest.raises(StateError, match="is being cancelled"):
        await place.database.run(lambda c: trainings._open_round(c, replace(row, number=2)))


async def test_a_result_that_cannot_be_written_at_the_moment_is_written_in_the_next(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1)
    results = trained.place.coordinator.trainings._results
    write, tries = results.write, []

    async def full_at_first(*given: Any, **known: Any) -> Any:
        tries.append(given)
        if len(tries) == 1:
            raise StorageFullError("no room")
        return await write(*given, **known)

    monkeypatch.setattr(results, "write", full_at_first)
    await trained.cancel(job_id, keep=True)
    await trained.place.turn()
    assert (await trained.place.job(job_id)).state is JobState.SUCCEEDED
    assert len(tries) == 2


async def test_without_a_released_round_there_is_nothing_to_keep(trained: Trained) -> None:
    job_id = await trained.start()
    assert await trained.cancel(job_id, keep=True) is JobState.CANCELLED
    with pytest.raises(NotFoundError, match="has released no round"):
        await trained.service.round_result(CALLER, job_id, "last")


async def test_where_no_artifact_can_be_written_it_ends_all_the_same(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1)

    async def full(*_: Any, **__: Any) -> None:
        raise StateError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(trained.place.coordinator.trainings._results, "write", full)
        assert await trained.cancel(job_id, keep=True) is JobState.CANCELLED
    assert (await trained.service.round_result(CALLER, job_id, "last"))["round"] == 1


# --- going on ---------------------------------------------------------------------------------------------------------


async def test_a_job_goes_on_from_a_released_round_with_a_charge_of_its_own(trained: Trained) -> None:
    """It starts from that very model, even when the job that made it is deleted then, and says what came before."""
    place = trained.place
    first = await trained.start(keep="every:1", local_training={"epsilon": 3.0})
    await trained.release(first, 1, 2)
    result = await trained.service.round_result(CALLER, first, "1")
    await trained.cancel(first)
    spec = place.training(rounds=1).to_json()
    sha256 = result["files"][0]["sha256"]
    del spec["initial_model_sha256"]
    goes_on = FederatedTrainingSpec.from_json(
        {**spec, "continue_from": {"job_id": first, "round": 1, "model_sha256": sha256}}
    )
    await trained.place.coordinator.results.check_continued(goes_on, await place.job(first), owner=ANN)
    second = await place.submit(goes_on)
    await trained.service.delete(CALLER, first)
    await place.leftovers.settled()
    assert place.blobs.read(sha256) == model_of(1)
    await place.turn()
    assert (await place.round(second, 1)).model_sha256 == sha256
    await trained.release(second, 1)
    job = await place.job(second)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    statement = statement_in(trained, job.result)
    (before,) = statement["continued_from"]
    assert (before["job_id"], before["round"], before["model_sha256"]) == (first, 1, sha256)
    assert float(before["epsilon_example"]) == result["epsilon_example"] > 0  # of all rounds, not of the first
    assert statement["statements"][0] == CONTINUED
    assert job.result["continued_from"] == statement["continued_from"]
    assert await place.charged(second) == ["final"]
    third = FederatedTrainingSpec.from_json(
        {**spec, "continue_from": {"job_id": second, "round": 1, "model_sha256": job.result["files"][0]["sha256"]}}
    )
    chain = await place.coordinator.results._continued(third)
    assert [each["job_id"] for each in chain] == [second, first]


async def test_a_job_goes_on_from_nothing_else(trained: Trained) -> None:
    job_id = await trained.start()
    await trained.release(job_id, 1, 2)
    sha256 = (await trained.service.round_result(CALLER, job_id, "2"))["files"][0]["sha256"]
    job, check = await trained.place.job(job_id), trained.place.coordinator.results.check_continued

    def going_on(task: str = "t", **changes: Any) -> FederatedTrainingSpec:
        source = ContinuedFrom(**{"job_id": job_id, "round": 2, "model_sha256": sha256, **changes})
        return FederatedTrainingSpec(task=task, continue_from=source)

    await check(going_on(), job, owner=ANN)
    for wrong, error, said in (
        (going_on(round=1), NotFoundError, "the model of round 1"),
        (going_on(round=7), NotFoundError, "was not released"),
        (going_on(model_sha256="a" * 64), InvalidInput, "has SHA-256"),
        (going_on(task="other"), InvalidInput, "trained task 't'"),
    ):
        with pytest.raises(error, match=said):
            await check(wrong, job, owner=ANN)
    for owner in ("scientist/bob", "operator/operator"):
        with pytest.raises(NotFoundError, match="no job"):
            await check(going_on(), job, owner=owner)


async def test_going_on_is_no_way_round_a_budget(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is priced as any other job, beside what was spent."""
    job_id = await trained.start()
    await trained.release(job_id, 1)
    sha256 = (await trained.service.round_result(CALLER, job_id, "1"))["files"][0]["sha256"]
    source = ContinuedFrom(job_id=job_id, round=1, model_sha256=sha256)

    async def refuse(*_: Any, **__: Any) -> None:
        raise BudgetError("nothing is left")

    monkeypatch.setattr(trained.place.coordinator._pricing, "check", refuse)
    with pytest.raises(BudgetError):
        await trained.service.create(CALLER, "r", spec=FederatedTrainingSpec(task="t", continue_from=source))


# --- room -------------------------------------------------------------------------------------------------------------


async def test_more_than_a_scientist_may_leave_is_not_promised(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def priced(*_: Any, **__: Any) -> str:
        """Any budget would do."""
        return ""

    monkeypatch.setattr(trained.place.coordinator._pricing, "check", priced)
    known = trained.place.training(rounds=10_000, spare_rounds=0).to_json()  # 240 bytes a model
    create = partial(trained.service.create, model=to_safetensors({"w": np.zeros(60, np.float32)}))
    with pytest.raises(LimitError, match="the models of rounds that it is to keep have 2400000") as caught:
        await create(CALLER, "all", spec=FederatedTrainingSpec.from_json({**known, "keep": "every:1"}))
    assert caught.value.metadata["limit"] == "max_stored_bytes_per_scientist"
    for number, keep in enumerate(("every:10", "best:auc", "last")):
        await create(CALLER, f"{number}", spec=FederatedTrainingSpec.from_json({**known, "keep": keep}))


async def test_what_has_no_room_in_the_end_goes_and_the_history_says_so(trained: Trained) -> None:
    trained.place.coordinator.results._most_bytes = 5 * len(model_of(1)) // 2
    job_id = await trained.start(keep="every:1")
    await trained.release(job_id, 1, 2, 3, 4)
    assert (await trained.service.get(CALLER, job_id)).kept == (3, 4)
    said = [event.message for event in await trained.place.events(job_id) if event.kind.value == "round"]
    assert said[1] == "round 2 released"
    assert said[2].startswith("round 3 released; no room is left for what your jobs keep")
    assert said[2].endswith("the model of round 1 went")
    await trained.place.leftovers.settled()
    models = {trained.place.blobs.write(model_of(number)).sha256 for number in (3, 4)}
    assert models <= trained.place.blobs.digests()


async def test_all_of_a_model_is_had_within_what_its_scientist_may_leave(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of it is not trained, and was not counted when its round was kept. The last is had in any case."""

    async def whole(spec: object, plan: object, model: StoredModel) -> StoredModel:
        blob = trained.place.blobs.write(model.sha256.encode() * 1000)
        return StoredModel(blob.sha256, blob.size)

    results = trained.place.coordinator.results
    monkeypatch.setattr(results._pipeline, "whole_model", whole)
    job_id = await trained.start(keep="every:1")
    await trained.release(job_id, 1, 2, 3)
    results._most_bytes = 100_000
    await trained.service.round_result(CALLER, job_id, "1")
    before = trained.place.blobs.digests()
    with pytest.raises(LimitError, match=r"all of the model of round 2 has 64000 more; at most 100000") as caught:
        await trained.service.round_result(CALLER, job_id, "2")
    assert caught.value.metadata["limit"] == "max_stored_bytes_per_scientist"
    await trained.place.leftovers.settled()
    assert trained.place.blobs.digests() == before
    assert (await trained.service.round_result(CALLER, job_id, "1"))["round"] == 1
    assert (await trained.service.round_result(CALLER, job_id, "last"))["round"] == 3
