"""Jobs over the wire: a real gRPC server, a real database, the real client; only the coordinator is played."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

from src.aggregator.servicers import jobs as jobs_servicer
from src.aggregator.servicers import operations as operations_servicer
from src.client import SottoClient, result_of
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.identity import Identity
from src.errors import (
    AbandonedError,
    AccessError,
    BudgetError,
    ConflictError,
    DeadlineError,
    DigestError,
    InvalidInput,
    JobFailed,
    NotFoundError,
    SottoError,
    StateError,
    UnavailableError,
)

ANN, BOB, OPERATOR = Identity("scientist", "ann"), Identity("scientist", "bob"), Identity("operator", "olga")
LONG_S = 30.0
"""Far beyond what any wait here takes; only a hang reaches it."""


def training(**fields: Any) -> jobs_pb2.FederatedTraining:
    return jobs_pb2.FederatedTraining(task="randhie", rounds=3, **fields)


async def test_submit_walk_away_and_come_back_to_a_verified_model(job_house: Any, tmp_path: Path) -> None:
    client = job_house.client()
    job = await client.submit(jobs_pb2.Job(display_name="mine", federated_training=training()))
    assert job.state in (jobs_pb2.PENDING, jobs_pb2.RUNNING)
    job = await client.get(job.job_id)
    assert (job.owner, job.display_name, job.kind) == ("scientist/ann", "mine", "federated_training")
    assert job.federated_training.local_training.epsilon == 1.0
    job_house.permit(3)
    job = await client.wait(job.job_id, timeout_s=LONG_S)
    assert job.state == jobs_pb2.SUCCEEDED
    assert job.end_time.seconds == 10**9
    progress = job.progress
    assert (progress.rounds_released, progress.rounds_planned, progress.rounds_failed) == (3, 3, 0)
    last = progress.rounds[-1]
    assert (last.metrics["auc"], last.epsilon_party, last.epsilon_party_against_aggregator) == (0.53, 30.0, math.inf)
    assert last.parties[0].example_epsilon_left == 3.5
    assert not last.parties[1].HasField("example_epsilon_left")
    files = await client.fetch_artifact(job.job_id, tmp_path / "out")
    assert files["model.safetensors"].read_bytes() == job_house.model
    assert result_of(job).metrics["auc"] == 0.625
    assert math.isinf(result_of(job).epsilon_party_against_aggregator)


async def test_the_same_request_is_the_same_job_and_not_for_another_one(job_house: Any) -> None:
    client = job_house.client()
    first = await client.submit(training(), "request 1")
    assert (await client.submit(training(), "request 1")).job_id == first.job_id
    with pytest.raises(ConflictError, match=first.job_id):
        await client.submit(training(seed=1), "request 1")
    assert (await job_house.client(BOB).submit(training(), "request 1")).job_id != first.job_id


async def test_a_refused_job_says_why_to_the_client_as_it_was_raised(job_house: Any) -> None:
    client = job_house.client()
    bad = training(local_training={"steps": -1}, quorum=-1)
    with pytest.raises(InvalidInput) as caught:
        await client.submit(bad)
    assert set(caught.value.violations) == {"federated_training.quorum", "federated_training.local_training.steps"}
    with pytest.raises(BudgetError, match=r"4 of 100\.5") as budget:
        await client.submit(training(local_training={"epsilon": 100.5}))
    assert budget.value.metadata["party"] == "a"
    assert await client.list() == []


async def test_a_watch_follows_until_rest_and_goes_on_where_it_was_left(job_house: Any) -> None:
    client = job_house.client()
    job = await client.submit(training())
    events = client.watch(job.job_id)
    seen = [await anext(events), await anext(events)]
    job_house.permit(1)
    seen.append(await anext(events))
    await events.aclose()
    job_house.permit(2)
    async with asyncio.timeout(LONG_S):
        seen += [event async for event in client.watch(job.job_id, after_sequence=seen[-1].sequence)]
    assert [event.sequence for event in seen] == [1, 2, 3, 4, 5, 6]
    assert [event.kind for event in seen] == ["submitted", "started", "round", "round", "round", "succeeded"]
    assert seen[2].round.round == 1
    assert seen[-1].state == jobs_pb2.SUCCEEDED


async def test_cancelling_a_waiting_and_a_running_job(job_house: Any) -> None:
    client = job_house.client()
    running = await client.submit(training())
    waiting = await client.submit(training())
    events = client.watch(running.job_id)
    while (await anext(events)).kind != "started":
        pass
    await events.aclose()
    queued = await client.get(waiting.job_id)
    assert (queued.progress.queue_position, list(queued.progress.waiting_for)) == (1, ["b", "c"])
    assert (await client.cancel(waiting.job_id)).state == jobs_pb2.CANCELLED
    assert (await client.cancel(running.job_id)).state == jobs_pb2.CANCELLING
    job_house.permit(1)
    job = await client.wait(running.job_id, timeout_s=LONG_S)
    with pytest.raises(AbandonedError):
        result_of(job)


async def test_a_failed_job_names_stage_party_and_cause(job_house: Any, tmp_path: Path) -> None:
    client = job_house.client()
    job = await client.submit(training(seed=13))
    with pytest.raises(StateError):
        await client.result(job.job_id)
    job_house.permit(1)
    assert (await client.wait(job.job_id, LONG_S)).state == jobs_pb2.FAILED
    with pytest.raises(JobFailed, match="round 1: party a refuses") as caught:
        await client.fetch_artifact(job.job_id, tmp_path)
    assert caught.value.metadata["reason"] == "BUDGET_EXCEEDED"


async def test_a_job_that_takes_too_long_is_left_running(job_house: Any) -> None:
    client = job_house.client()
    job = await client.submit(training())
    with pytest.raises(DeadlineError, match=job.job_id):
        await client.wait(job.job_id, timeout_s=0.05)
    assert (await client.get(job.job_id)).state in (jobs_pb2.PENDING, jobs_pb2.RUNNING)


async def test_jobs_are_listed_by_page_and_state_and_only_to_whom_they_belong(job_house: Any) -> None:
    ann, bob = job_house.client(), job_house.client(BOB)
    mine = [(await ann.submit(training())).job_id for _ in range(4)]
    await ann.cancel(mine[3])
    await bob.submit(training())
    assert [job.job_id for job in await ann.list(page_size=2)] == mine[::-1]
    assert [job.job_id for job in await ann.list(page_size=2, limit=3)] == mine[:0:-1]
    assert [job.job_id for job in await ann.list("state = CANCELLED")] == mine[3:]
    assert [job.job_id for job in await ann.list("NOT state = CANCELLED", "create_time")] == mine[:3]
    assert len(await job_house.client(OPERATOR).list()) == 5
    assert len(await bob.list()) == 1
    calls = (bob.get, bob.cancel, bob.delete, bob.wait, bob.result, bob.events)
    for refused in (call(mine[0]) for call in calls):
        with pytest.raises(NotFoundError):
            await refused
    with pytest.raises(InvalidInput) as caught:
        await ann.list("state = DONE")
    assert list(caught.value.violations) == ["filter"]
    with pytest.raises(InvalidInput) as caught:
        await ann.list(order_by="colour")
    assert list(caught.value.violations) == ["order_by"]


async def test_a_party_may_call_none_of_it(job_house: Any) -> None:
    party = job_house.client(Identity("party", "a"))
    for refused in (party.submit(training()), party.list(), party.status(), anext(party.watch("x"))):
        with pytest.raises(AccessError):
            await refused


async def test_status_answers(job_house: Any) -> None:
    client = job_house.client()
    await client.submit(training())
    status = await client.status()
    assert (status.federation, status.workers.busy, status.parties[0].waiting_for) == ("demo", 2, "an update")
    assert (status.start_time.seconds, status.stopping, status.workers.units[0].name) == (10**9, False, "fold")
    assert status.jobs_pending + status.jobs_running == 1
    job_house.service.close()
    assert (await client.status()).stopping


async def test_an_artifact_is_served_from_an_offset_and_not_beyond_its_end(job_house: Any, tmp_path: Path) -> None:
    client = job_house.client()
    job = await client.submit(training())
    job_house.permit(3)
    await client.wait(job.job_id, timeout_s=LONG_S)
    channel = connect(job_house.address, tls=None, insecure=True, identity=ANN)
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    request = jobs_pb2.DownloadArtifactRequest(
        job_id=job.job_id, file="model.safetensors", offset=len(job_house.model) - 7
    )
    chunks = [chunk async for chunk in stub.DownloadArtifact(request)]
    assert [chunk.data for chunk in chunks] == [job_house.model[-7:]]
    refusals: list[tuple[dict[str, Any], type[SottoError]]] = [
        ({"file": "model.safetensors", "offset": len(job_house.model) + 1}, InvalidInput),
        ({"file": "../jobs.db"}, NotFoundError),
        ({"file": ""}, NotFoundError),
    ]
    for fields, error in refusals:
        with pytest.raises(error):
            await anext(aiter(stub.DownloadArtifact(jobs_pb2.DownloadArtifactRequest(job_id=job.job_id, **fields))))
    await channel.close(None)


async def test_a_damaged_blob_is_noticed_by_who_downloads_it(job_house: Any, tmp_path: Path) -> None:
    client = job_house.client()
    job = await client.submit(training())
    job_house.permit(3)
    result = result_of(await client.wait(job.job_id, timeout_s=LONG_S))
    path = job_house.blobs.path(result.files[0].sha256.hex())
    path.chmod(0o600)
    path.write_bytes(job_house.model[:-1] + b"?")
    with pytest.raises(DigestError, match="model"):
        await client.fetch_artifact(job.job_id, tmp_path / "out")
    assert list((tmp_path / "out").glob("model*")) == []


async def test_the_blocking_client_does_the_same(job_house: Any, tmp_path: Path) -> None:
    job_house.permit(3)

    def scientist() -> tuple[list[str], dict[str, Path]]:
        with SottoClient(job_house.address, insecure=True, identity=ANN, roster=job_house.roster) as client:
            job = client.submit(training(), "blocking")
            kinds = [event.kind for event in client.watch(job.job_id)]
            assert client.wait(job.job_id, timeout_s=LONG_S).state == jobs_pb2.SUCCEEDED
            assert client.get(job.job_id).job_id == client.list(limit=1)[0].job_id == job.job_id
            assert client.cancel(job.job_id).state == jobs_pb2.SUCCEEDED
            assert client.result(job.job_id).metrics["auc"] == 0.625
            assert client.status().federation == "demo"
            with pytest.raises(NotFoundError):
                client.get("none")
            with pytest.raises(NotFoundError):
                next(client.watch("none"))
            return kinds, client.fetch_artifact(job.job_id, tmp_path)

    kinds, files = await asyncio.to_thread(scientist)
    assert kinds == ["submitted", "started", "round", "round", "round", "succeeded"]
    assert files["model.safetensors"].read_bytes() == job_house.model


# --- what a job can be ------------------------------------------------------------------------------------------------


async def test_priority_and_timeout_are_kept_and_shown(job_house: Any) -> None:
    client, stub = job_house.client(), job_house.stub()
    job = jobs_pb2.Job(federated_training=training(), priority=jobs_pb2.HIGH, timeout=Duration(seconds=90))
    operation = await stub.CreateJob(jobs_pb2.CreateJobRequest(request_id="r", job=job))
    metadata = jobs_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    assert (metadata.priority, metadata.kind, metadata.max_attempts) == (jobs_pb2.HIGH, "federated_training", 4)
    known = await client.get(metadata.job_id)
    assert (known.priority, known.timeout, known.deadline) == (jobs_pb2.HIGH, Duration(seconds=90), metadata.deadline)
    assert known.deadline.ToNanoseconds() - known.create_time.ToNanoseconds() == 90 * 10**9
    assert list(known.progress.parties) == list(metadata.progress.parties) != []
    assert (metadata.progress.bytes_received, metadata.progress.estimated_end_time.seconds) == (12_345, 10**9 + 60)
    job.priority = jobs_pb2.LOW
    with pytest.raises(ConflictError, match="another priority"):
        await stub.CreateJob(jobs_pb2.CreateJobRequest(request_id="r", job=job))
    job.priority = 77  # type: ignore[assignment]  # an enumeration is open
    with pytest.raises(InvalidInput) as caught:
        await stub.CreateJob(jobs_pb2.CreateJobRequest(request_id="other", job=job))
    assert list(caught.value.violations) == ["priority"]


async def test_a_job_that_is_done_in_time_comes_back_done(job_house: Any) -> None:
    stub = job_house.stub()
    job_house.permit(3)
    request = jobs_pb2.CreateJobRequest(
        request_id="r", job=jobs_pb2.Job(federated_training=training()), inline_wait_s=LONG_S
    )
    operation = await stub.CreateJob(request, timeout=LONG_S)
    result = jobs_pb2.JobResult()
    assert operation.done
    assert operation.response.Unpack(result)
    assert result.metrics["auc"] == 0.625
    assert await stub.CreateJob(request) == operation
    request.inline_wait_s = 60.5
    with pytest.raises(InvalidInput) as caught:
        await stub.CreateJob(request)
    assert list(caught.value.violations) == ["inline_wait_s"]


async def test_a_client_that_goes_away_while_it_waits_finds_its_job(job_house: Any) -> None:
    client, stub = job_house.client(), job_house.stub()
    job = jobs_pb2.Job(federated_training=training())
    call = stub.CreateJob(jobs_pb2.CreateJobRequest(request_id="r", job=job, inline_wait_s=LONG_S))
    while not (jobs := await client.list()):
        pass
    call.cancel()
    events = client.watch(jobs[0].job_id)
    while (await anext(events)).kind != "started":
        pass
    await events.aclose()
    assert (await client.submit(job, "r")).job_id == jobs[0].job_id


async def test_an_evaluation_and_an_export_are_jobs_with_files_of_their_own(job_house: Any, tmp_path: Path) -> None:
    """And wait for no training."""
    client = job_house.client()
    job_house.permit(3)
    source = await client.wait((await client.submit(training())).job_id, timeout_s=LONG_S)
    running = await client.submit(training())
    made = {
        "model.safetensors": (jobs_pb2.Evaluation(job_id=source.job_id), job_house.model),
        "model.npz": (jobs_pb2.Export(job_id=source.job_id), job_house.exported),
    }
    for name, (spec, content) in made.items():
        job = await client.submit(spec)
        events = client.watch(job.job_id)
        while (await anext(events)).kind != "started":
            pass
        job_house.permit(2)  # one for the training
        assert [event.kind async for event in events] == ["succeeded"]
        job = await client.get(job.job_id)
        assert (job.WhichOneof("spec"), job.timeout) == (job.kind, Duration(seconds=600))
        files = await client.fetch_artifact(job.job_id, tmp_path / job.kind)
        assert {*files} == {name, "manifest.json"}
        assert files[name].read_bytes() == content
        with pytest.raises(NotFoundError, match=f"no job '{source.job_id}'"):
            await job_house.client(BOB).submit(spec)
    kinds = [job.kind for job in await client.list('kind = "evaluation" OR kind = "export"', "kind desc")]
    assert kinds == ["export", "evaluation"]
    assert (await client.get(running.job_id)).state in (jobs_pb2.PENDING, jobs_pb2.RUNNING)


async def test_an_attempt_that_is_made_again_is_seen_by_everybody(job_house: Any) -> None:
    client = job_house.client()
    job = await client.submit(training(seed=17))
    job_house.permit(1)
    events = client.watch(job.job_id)
    while (event := await anext(events)).kind != "retrying":
        pass
    assert (event.state, event.attempt) == (jobs_pb2.RETRYING, 1)
    job = await client.get(job.job_id)
    assert (job.state, job.attempt, job.error.reason) == (jobs_pb2.RETRYING, 1, "WORKER_FAILED")
    assert (job.error.log_reference, job.retry_time.seconds) == ("incident 17", 10**9)
    request = operations_pb2.GetOperationRequest(name=f"operations/{job.job_id}")
    operation = await job_house.operations().GetOperation(request)
    assert (operation.done, operation.HasField("error")) == (False, False)
    assert (await client.status()).jobs_running == 1
    job_house.permit(4)
    assert [event.kind async for event in events][:2] == ["resumed", "round"]
    job = await client.get(job.job_id)
    assert (job.state, job.HasField("error"), job.HasField("retry_time")) == (jobs_pb2.SUCCEEDED, False, False)


async def test_a_job_is_cancelled_between_two_attempts(job_house: Any) -> None:
    client = job_house.client()
    job = await client.submit(training(seed=17))
    job_house.permit(1)
    events = client.watch(job.job_id)
    while (await anext(events)).kind != "retrying":
        pass
    assert (await client.cancel(job.job_id)).state == jobs_pb2.CANCELLING
    job_house.permit(1)
    assert [event.kind async for event in events] == ["cancelling", "cancelled"]


async def test_a_deleted_job_keeps_its_history_and_no_files(job_house: Any) -> None:
    client = job_house.client()
    job = await client.submit(training())
    with pytest.raises(StateError, match="cancel it first"):
        await client.delete(job.job_id)
    job_house.permit(3)
    await client.wait(job.job_id, timeout_s=LONG_S)
    job = await client.delete(job.job_id)
    assert (job.state, job.HasField("delete_time"), list(job.result.files)) == (jobs_pb2.SUCCEEDED, True, [])
    assert await client.get(job.job_id) == job == await client.delete(job.job_id)
    assert await client.list() == []
    assert [each.job_id for each in await client.list(show_deleted=True)] == [job.job_id]
    kinds = [event.kind for event in await client.events(job.job_id)]
    assert kinds == ["submitted", "started", "round", "round", "round", "succeeded", "deleted"]
    download = jobs_pb2.DownloadArtifactRequest(job_id=job.job_id, file="model.safetensors")
    with pytest.raises(NotFoundError, match="were deleted"):
        await anext(aiter(job_house.stub().DownloadArtifact(download)))


async def test_a_history_is_read_by_the_page(job_house: Any) -> None:
    client, stub = job_house.client(), job_house.stub()
    job = await client.submit(training())
    job_house.permit(3)
    await client.wait(job.job_id, timeout_s=LONG_S)
    seen, after = [], 0
    while True:
        request = jobs_pb2.ListJobEventsRequest(job_id=job.job_id, after_sequence=after, page_size=4)
        page = await stub.ListJobEvents(request)
        seen += [(event.sequence, event.cause) for event in page.events]
        after = page.next_after_sequence
        if not after:
            break
    assert [sequence for sequence, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0] == (1, "scientist/ann")


async def test_a_page_that_no_message_could_hold_comes_in_several(job_house: Any) -> None:
    options = Struct()
    options.update({"note": "x" * 60_000})
    rows = [job_house.row(training(task_options=options), number) for number in range(80)]
    await job_house.store_all(rows)
    jobs = await job_house.client().list(page_size=1000)
    assert [job.job_id for job in jobs] == [row.job_id for row in reversed(rows)]
    token, names = "", []
    while True:
        request = operations_pb2.ListOperationsRequest(page_size=1000, page_token=token, filter="state = PENDING")
        page = await job_house.operations().ListOperations(request)
        names += [each.name for each in page.operations]
        token = page.next_page_token
        if not token:
            break
    assert names == [f"operations/{row.job_id}" for row in reversed(rows)]


async def test_a_stopping_aggregator_takes_no_jobs_and_sends_watchers_on(job_house: Any) -> None:
    stub = job_house.stub()
    job = await job_house.client().submit(training())
    events = stub.WatchJob(jobs_pb2.WatchJobRequest(job_id=job.job_id, after_sequence=9))
    job_house.service.close()
    with pytest.raises(UnavailableError, match="is being stopped"):
        await anext(aiter(events))
    with pytest.raises(UnavailableError, match="is being stopped"):
        await stub.CreateJob(jobs_pb2.CreateJobRequest(request_id="r", job=jobs_pb2.Job(federated_training=training())))


def test_every_method_has_its_row_in_the_table_of_roles() -> None:
    (service,) = jobs_pb2.DESCRIPTOR.services_by_name.values()
    assert set(jobs_servicer.ROLES) == {f"/{service.full_name}/{method.name}" for method in service.methods}
    (service,) = operations_pb2.DESCRIPTOR.services_by_name.values()
    assert set(operations_servicer.ROLES) == {f"/{service.full_name}/{method.name}" for method in service.methods}
