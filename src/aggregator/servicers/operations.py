"""`google.longrunning.Operations` over the same jobs: "operations/{job id}" (https://google.aip.dev/151)."""

from __future__ import annotations

from typing import Any, Final, NoReturn

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2

from ...communication.identity import caller
from ...errors import InvalidInput
from ...jobs import wire
from ...jobs.service import JobService

SERVICE: Final = "google.longrunning.Operations"
_MAY: Final = frozenset({"scientist", "operator"})
ROLES: Final[dict[str, frozenset[str]]] = {
    f"/{SERVICE}/{method}": _MAY
    for method in ("ListOperations", "GetOperation", "DeleteOperation", "CancelOperation", "WaitOperation")
}
"""Who may call which method."""

COLLECTION: Final = "operations"


class OperationsServicer(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]  # ships no types
    """Every job of the caller is an operation; `Operation.response` is a `sotto.v1.JobResult`."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    async def GetOperation(  # noqa: N802  # named by the wire, as all methods here
        self, request: operations_pb2.GetOperationRequest, context: Any
    ) -> operations_pb2.Operation:
        view = await self._service.get(caller(), wire.job_id_of(request.name))
        return wire.operation_to_proto(view)

    async def ListOperations(  # noqa: N802
        self, request: operations_pb2.ListOperationsRequest, context: Any
    ) -> operations_pb2.ListOperationsResponse:
        if request.name not in ("", COLLECTION):
            raise InvalidInput(f"name: empty or {COLLECTION!r}", violations={"name": f"empty or {COLLECTION!r}"})
        views, token = await self._service.list_jobs(
            caller(),
            page_size=request.page_size,
            page_token=request.page_token,
            state=wire.state_of_filter(request.filter),
        )
        return operations_pb2.ListOperationsResponse(
            operations=[wire.operation_to_proto(view) for view in views], next_page_token=token
        )

    async def CancelOperation(  # noqa: N802
        self, request: operations_pb2.CancelOperationRequest, context: Any
    ) -> empty_pb2.Empty:
        await self._service.cancel(caller(), wire.job_id_of(request.name))
        return empty_pb2.Empty()

    async def WaitOperation(  # noqa: N802
        self, request: operations_pb2.WaitOperationRequest, context: Any
    ) -> operations_pb2.Operation:
        """Without a timeout until the job is at rest, or the call's own deadline."""
        timeout_s = request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else None
        view = await self._service.wait(caller(), wire.job_id_of(request.name), timeout_s=timeout_s)
        return wire.operation_to_proto(view)

    async def DeleteOperation(  # noqa: N802
        self, request: operations_pb2.DeleteOperationRequest, context: Any
    ) -> NoReturn:
        """A job is the record of what was spent on it, so none is ever deleted."""
        text = "jobs are kept: they are the record of the privacy budget that they spent"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
        raise AssertionError("abort raises")
