"""`google.longrunning.Operations` over the same jobs: "operations/{job id}" (https://google.aip.dev/151)."""

from __future__ import annotations

from typing import Any, Final

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2

from ...communication.identity import caller
from ...errors import InvalidInput, NotFoundError
from ...jobs import wire
from ...jobs.service import JobService
from ...jobs.views import JobView
from .jobs import build_page

SERVICE: Final = "google.longrunning.Operations"
_MAY: Final = frozenset({"scientist", "operator"})
ROLES: Final[dict[str, frozenset[str]]] = {
    f"/{SERVICE}/{method}": _MAY
    for method in ("ListOperations", "GetOperation", "DeleteOperation", "CancelOperation", "WaitOperation")
}
"""Who may call which method."""

COLLECTION: Final = "operations"
LONGEST_WAIT_S: Final = 300.0
"""Whoever waits longer asks again (AIP-151: a service may wait for less than it is asked to)."""


class OperationsServicer(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]  # ships no types
    """Every job of the caller is an operation until it is deleted; `Operation.response` is a `sotto.v1.JobResult`."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    async def GetOperation(  # noqa: N802  # named by the wire, as all methods here
        self, request: operations_pb2.GetOperationRequest, context: Any
    ) -> operations_pb2.Operation:
        return wire.operation_to_proto(await self._find(request.name))

    async def ListOperations(  # noqa: N802
        self, request: operations_pb2.ListOperationsRequest, context: Any
    ) -> operations_pb2.ListOperationsResponse:
        """Filter and pages are those of `ListJobs`."""
        if request.name not in ("", COLLECTION):
            raise InvalidInput(f"name: empty or {COLLECTION!r}", violations={"name": f"empty or {COLLECTION!r}"})
        page_size = request.page_size
        while True:
            views, token = await self._service.list_jobs(
                caller(), filter=request.filter, page_size=page_size, page_token=request.page_token
            )
            page = await build_page(wire.operations_page, views, token)
            if len(page.operations) == len(views):
                return page
            page_size = len(page.operations)

    async def CancelOperation(  # noqa: N802
        self, request: operations_pb2.CancelOperationRequest, context: Any
    ) -> empty_pb2.Empty:
        """One that is done stays as it is."""
        view = await self._find(request.name)
        await self._service.cancel(caller(), view.row.job_id)
        return empty_pb2.Empty()

    async def WaitOperation(  # noqa: N802
        self, request: operations_pb2.WaitOperationRequest, context: Any
    ) -> operations_pb2.Operation:
        """Until the job is at rest, the timeout is over, or `LONGEST_WAIT_S`: then as it is."""
        timeout_s = wire.seconds_of(request.timeout) if request.HasField("timeout") else None
        if timeout_s is not None and timeout_s < 0:
            raise InvalidInput("timeout is negative", violations={"timeout": f"at least 0 s (got {timeout_s:g})"})
        view = await self._find(request.name)
        if not view.row.at_rest:
            timeout_s = LONGEST_WAIT_S if timeout_s is None else min(timeout_s, LONGEST_WAIT_S)
            view = await self._service.wait(caller(), view.row.job_id, timeout_s=timeout_s)
        return wire.operation_to_proto(view)

    async def DeleteOperation(  # noqa: N802
        self, request: operations_pb2.DeleteOperationRequest, context: Any
    ) -> empty_pb2.Empty:
        """As `DeleteJob`: the operation is gone, the job and its history stay, without its files."""
        view = await self._find(request.name)
        await self._service.delete(caller(), view.row.job_id)
        return empty_pb2.Empty()

    async def _find(self, name: str) -> JobView:
        """Raises NotFoundError where there is no such operation (any more) for this caller."""
        view = await self._service.get(caller(), wire.job_id_of(name), rounds=False)
        if view.row.deleted_at:
            raise NotFoundError(f"operation {name!r} was deleted", job_id=view.row.job_id)
        return view
