"""`google.longrunning.Operations` over the wire: the stock stub, a real gRPC server, a real database."""

from __future__ import annotations

from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2

from src.aggregator.servicers import operations as operations_module
from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.errors import DOMAIN, InvalidInput, NotFoundError, StateError

BOB = Identity("scientist", "bob")
LONG_S = 30.0
"""Far beyond what any wait here takes; only a hang reaches it."""


def training(**fields: Any) -> jobs_pb2.FederatedTraining:
    return jobs_pb2.FederatedTraining(task="randhie", rounds=3, **fields)


def name_of(job: jobs_pb2.Job) -> str:
    return f"operations/{job.job_id}"


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
    assert (info.reason, info.domain) == ("BUDGET_EXCEEDED", DOMAIN)
    known = {"job_id": job.job_id, "stage": "round 1", "parties": "a", "log_reference": "incident 13"}
    assert dict(info.metadata) == known


@pytest.mark.parametrize("name", ["", "operations/", "operations/none", "jobs/x"])
async def test_other_names_are_no_operations(job_house: Any, name: str) -> None:
    with pytest.raises(NotFoundError):
        await job_house.operations().GetOperation(operations_pb2.GetOperationRequest(name=name))


async def test_a_deleted_operation_is_gone_and_its_job_is_not(job_house: Any) -> None:
    client, stub = job_house.client(), job_house.operations()
    job = await client.submit(training())
    name = name_of(job)
    with pytest.raises(StateError, match="cancel it first"):
        await stub.DeleteOperation(operations_pb2.DeleteOperationRequest(name=name))
    job_house.permit(3)
    await client.wait(job.job_id, timeout_s=LONG_S)
    with pytest.raises(NotFoundError):
        await job_house.operations(BOB).DeleteOperation(operations_pb2.DeleteOperationRequest(name=name))
    await stub.DeleteOperation(operations_pb2.DeleteOperationRequest(name=name))
    gone = (
        stub.GetOperation(operations_pb2.GetOperationRequest(name=name)),
        stub.CancelOperation(operations_pb2.CancelOperationRequest(name=name)),
        stub.WaitOperation(operations_pb2.WaitOperationRequest(name=name)),
        stub.DeleteOperation(operations_pb2.DeleteOperationRequest(name=name)),
    )
    for call in gone:
        with pytest.raises(NotFoundError, match="was deleted"):
            await call
    assert not (await stub.ListOperations(operations_pb2.ListOperationsRequest())).operations
    assert (await client.get(job.job_id)).HasField("delete_time")


async def test_operations_are_filtered_as_jobs_are(job_house: Any) -> None:
    client, stub = job_house.client(), job_house.operations()
    jobs = [await client.submit(training()) for _ in range(2)]
    await client.cancel(jobs[1].job_id)
    listed = await stub.ListOperations(operations_pb2.ListOperationsRequest(filter="state = CANCELLED"))
    assert [each.name for each in listed.operations] == [name_of(jobs[1])]
    for request in (
        operations_pb2.ListOperationsRequest(filter="state ="),
        operations_pb2.ListOperationsRequest(name="jobs"),
        operations_pb2.ListOperationsRequest(page_size=-1),
    ):
        with pytest.raises(InvalidInput):
            await stub.ListOperations(request)
    backwards = operations_pb2.WaitOperationRequest(name=name_of(jobs[0]), timeout=Duration(seconds=-1))
    with pytest.raises(InvalidInput) as caught:
        await stub.WaitOperation(backwards)
    assert list(caught.value.violations) == ["timeout"]


async def test_a_wait_without_an_end_is_answered_in_time(job_house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AIP-151: who waits longer asks again."""
    monkeypatch.setattr(operations_module, "LONGEST_WAIT_S", 0.2)
    job = await job_house.client().submit(training())
    for timeout in (None, Duration(seconds=3600)):
        request = operations_pb2.WaitOperationRequest(name=name_of(job), timeout=timeout)
        operation = await job_house.operations().WaitOperation(request, timeout=LONG_S)
        assert not operation.done
    await job_house.client().cancel(job.job_id)
