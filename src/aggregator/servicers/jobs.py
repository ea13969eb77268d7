"""`sotto.v1.JobService` over `jobs.service.JobService`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from google.longrunning import operations_pb2

from ...communication.generated import common_pb2, jobs_pb2, jobs_pb2_grpc
from ...communication.identity import caller
from ...communication.streams import send_blob
from ...jobs import wire
from ...jobs.service import JobService
from ...jobs.spec import spec_from_proto
from ...storage.blobs import Blobs

SERVICE: Final = "sotto.v1.JobService"
_MAY: Final = frozenset({"scientist", "operator"})
ROLES: Final[dict[str, frozenset[str]]] = {
    f"/{SERVICE}/{method}": _MAY
    for method in ("CreateJob", "GetJob", "ListJobs", "CancelJob", "WatchJob", "DownloadArtifact", "GetStatus")
}
"""Who may call which method."""


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Answers scientists and operators. Who calls is in `identity.caller`; what they may see is the service's rule.

    Args:
        service: answers.
        blobs: where artifacts are read from.
    """

    def __init__(self, service: JobService, blobs: Blobs) -> None:
        self._service = service
        self._blobs = blobs

    async def CreateJob(  # noqa: N802  # named by the wire, as all methods here
        self, request: jobs_pb2.CreateJobRequest, context: Any
    ) -> operations_pb2.Operation:
        view = await self._service.create(
            caller(),
            request.request_id,
            spec=spec_from_proto(request.job),
            display_name=request.job.display_name,
            initial_model=request.job.federated_training.initial_model,
        )
        return wire.operation_to_proto(view)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Any) -> jobs_pb2.Job:  # noqa: N802
        return wire.job_to_proto(await self._service.get(caller(), request.job_id))

    async def ListJobs(  # noqa: N802
        self, request: jobs_pb2.ListJobsRequest, context: Any
    ) -> jobs_pb2.ListJobsResponse:
        views, token = await self._service.list_jobs(
            caller(),
            page_size=request.page_size,
            page_token=request.page_token,
            state=wire.state_of_filter(request.filter),
        )
        return jobs_pb2.ListJobsResponse(jobs=[wire.job_to_proto(view) for view in views], next_page_token=token)

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Any) -> jobs_pb2.Job:  # noqa: N802
        return wire.job_to_proto(await self._service.cancel(caller(), request.job_id))

    async def WatchJob(  # noqa: N802
        self, request: jobs_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.JobEvent]:
        watch = self._service.watch(caller(), request.job_id, after_sequence=request.after_sequence)
        async with aclosing(watch) as events:
            async for event in events:
                yield wire.event_to_proto(event)

    async def DownloadArtifact(  # noqa: N802
        self, request: jobs_pb2.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[common_pb2.DataChunk]:
        artifact = await self._service.artifact(caller(), request.job_id, file=request.file)
        async for chunk in send_blob(self._blobs, artifact.sha256, offset=request.offset):
            yield chunk

    async def GetStatus(self, request: jobs_pb2.GetStatusRequest, context: Any) -> jobs_pb2.Status:  # noqa: N802
        return wire.status_to_proto(await self._service.status())
