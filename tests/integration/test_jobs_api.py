"""Jobs over the wire: a real gRPC server, a real database, the real client; only the coordinator is played."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2

from src.client import SottoClient, result_of
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.identity import Identity
from src.errors import (
    DOMAIN,
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
    VersionError,
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
    assert (job.owner, job.display_name) == ("scientist/ann", "mine")
    assert job.federated_training.local_training.epsilon == 4.0
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
    assert await client.list_jobs() == []


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
    assert [job.job_id for job in await ann.list_jobs(page_size=2)] == mine[::-1]
    assert [job.job_id for job in await ann.list_jobs(page_size=2, limit=3)] == mine[:0:-1]
    assert [job.job_id for job in await ann.list_jobs(state="CANCELLED")] == mine[3:]
    assert len(await job_house.client(OPERATOR).list_jobs()) == 5
    assert len(await bob.list_jobs()) == 1
    for refused in (bob.get(mine[0]), bob.cancel(mine[0]), bob.wait(mine[0]), bob.result(mine[0])):
        with pytest.raises(NotFoundError):
            await refused
    with pytest.raises(InvalidInput) as caught:
        await ann.list_jobs(state="DONE")
    assert list(caught.value.violations) == ["filter"]


async def test_a_party_may_call_none_of_it(job_house: Any) -> None:
    party = job_house.client(Identity("party", "a"))
    for refused in (party.submit(training()), party.list_jobs(), party.status(), anext(party.watch("x"))):
        with pytest.raises(AccessError):
            await refused


async def test_status_answers(job_house: Any) -> None:
    client = job_house.client()
    await client.submit(training())
    status = await client.status()
    assert (status.federation, status.workers_busy, status.parties[0].waiting_for) == ("demo", 2, "an update")
    assert status.jobs_pending + status.jobs_running == 1


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
            assert client.get(job.job_id).job_id == client.list_jobs(limit=1)[0].job_id == job.job_id
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


# --- google.longrunning -----------------------------------------------------------------------------------------------


async def test_stock_operation_stubs_get_wait_list_and_cancel(job_house: Any) -> None:
    client, stub = job_house.client(), job_house.operations()
    job = await client.submit(training())
    name = f"operations/{job.job_id}"
    operation = await stub.GetOperation(operations_pb2.GetOperationRequest(name=name))
    metadata = jobs_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    assert (operation.name, operation.done, metadata.job_id) == (name, False, job.job_id)
    request = operations_pb2.WaitOperationRequest(name=name, timeout=Duration(nanos=1))
    assert not (await stub.WaitOperation(request)).done
    job_house.permit(3)
    operation = await stub.WaitOperation(operations_pb2.WaitOperationRequest(name=name), timeout=LONG_S)
    result = jobs_pb2.JobResult()
    assert operation.done
    assert operation.response.Unpack(result)
    assert result.epsilon_example == 3.5

    other = await client.submit(training())
    await stub.CancelOperation(operations_pb2.CancelOperationRequest(name=f"operations/{other.job_id}"))
    job_house.permit(1)
    request = operations_pb2.WaitOperationRequest(name=f"operations/{other.job_id}")
    operation = await stub.WaitOperation(request, timeout=LONG_S)
    assert operation.error.code == code_pb2.CANCELLED

    listed = await stub.ListOperations(operations_pb2.ListOperationsRequest(name="operations", page_size=1))
    assert [each.name for each in listed.operations] == [f"operations/{other.job_id}"]
    token = listed.next_page_token
    listed = await stub.ListOperations(operations_pb2.ListOperationsRequest(page_size=1, page_token=token))
    assert ([each.name for each in listed.operations], listed.next_page_token) == ([name], "")


async def test_a_failed_operation_carries_the_status_that_an_rpc_would_have(job_house: Any) -> None:
    job = await job_house.client().submit(training(seed=13))
    job_house.permit(1)
    request = operations_pb2.WaitOperationRequest(name=f"operations/{job.job_id}")
    operation = await job_house.operations().WaitOperation(request, timeout=LONG_S)
    info = error_details_pb2.ErrorInfo()
    assert operation.error.code == code_pb2.FAILED_PRECONDITION
    assert operation.error.message == "party a refuses"
    assert operation.error.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["stage"]) == ("BUDGET_EXCEEDED", DOMAIN, "round 1")


@pytest.mark.parametrize("name", ["", "operations/", "operations/none", "jobs/x"])
async def test_other_names_are_no_operations(job_house: Any, name: str) -> None:
    with pytest.raises(NotFoundError):
        await job_house.operations().GetOperation(operations_pb2.GetOperationRequest(name=name))


async def test_operations_are_kept(job_house: Any) -> None:
    with pytest.raises(VersionError, match="jobs are kept"):  # UNIMPLEMENTED
        await job_house.operations().DeleteOperation(operations_pb2.DeleteOperationRequest(name="operations/x"))
