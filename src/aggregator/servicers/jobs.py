"""`sotto.v1.JobService` over `jobs.service.JobService`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

from google.longrunning import operations_pb2

from ...communication.generated import common_pb2, jobs_pb2, jobs_pb2_grpc
from ...communication.identity import caller
from ...communication.messages import signed_from_proto
from ...communication.streams import send_blob
from ...jobs import wire
from ...jobs.service import JobService
from ...jobs.specs import model_bytes, spec_from_proto
from ...jobs.views import JobView
from ...storage.blobs import Blobs
from ..orders import OrderDesk

M = TypeVar("M")

SERVICE: Final = "sotto.v1.JobService"
_MAY: Final = frozenset({"scientist", "operator"})
ROLES: Final[dict[str, frozenset[str]]] = {
    f"/{SERVICE}/{method}": _MAY
    for method in (
        "CreateJob",
        "GetJob",
        "ListJobs",
        "CancelJob",
        "DeleteJob",
        "WatchJob",
        "ListJobEvents",
        "GetRoundResult",
        "DownloadArtifact",
        "UploadModel",
        "GetStatus",
    )
}
"""Who may call which method."""

WATCH: Final = f"/{SERVICE}/WatchJob"
LONGEST_WATCH_S: Final = 3600.0
"""Whoever watches longer comes back after the last event seen, as after a lost connection; a watcher that is forgotten
does not."""
ENTRIES_AT_ONCE: Final = 100
"""More than that become messages in a thread: a thousand would keep everybody else waiting for tens of milliseconds."""


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Answers scientists and operators. Who calls is in `identity.caller`; what they may see is the service's rule.

    Args:
        service: answers.
        blobs: where artifacts are read from.
        desk: looks at the orders that jobs come with.
    """

    def __init__(self, service: JobService, blobs: Blobs, desk: OrderDesk) -> None:
        self._service = service
        self._blobs = blobs
        self._desk = desk

    async def CreateJob(  # noqa: N802  # named by the wire, as all methods here
        self, request: jobs_pb2.CreateJobRequest, context: Any
    ) -> operations_pb2.Operation:
        spec = spec_from_proto(request.job)
        order = signed_from_proto(request.order) if request.HasField("order") else None
        self._desk.check(order, spec=spec, caller=caller(), request_id=request.request_id)
        view = await self._service.create(
            caller(),
            request.request_id,
            spec=spec,
            display_name=request.job.display_name,
            model=model_bytes(request.job),
            priority=wire.priority_from_proto(request.job),
            timeout_s=wire.timeout_from_proto(request.job),
            inline_wait_s=request.inline_wait_s,
            order=order,
        )
        return wire.operation_to_proto(view)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Any) -> jobs_pb2.Job:  # noqa: N802
        view = await self._service.get(caller(), request.job_id)
        return await in_thread_if_many(wire.job_to_proto, view, count=len(view.rounds))

    async def ListJobs(  # noqa: N802
        self, request: jobs_pb2.ListJobsRequest, context: Any
    ) -> jobs_pb2.ListJobsResponse:
        page_size = request.page_size
        while True:
            views, token = await self._service.list_jobs(
                caller(),
                filter=request.filter,
                order_by=request.order_by,
                page_size=page_size,
                page_token=request.page_token,
                show_deleted=request.show_deleted,
            )
            page = await build_page(wire.jobs_page, views, token)
            if len(page.jobs) == len(views):
                return page
            page_size = len(page.jobs)  # as many as fit into a message: once more, for the token that belongs to it

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Any) -> jobs_pb2.Job:  # noqa: N802
        return wire.job_to_proto(await self._service.cancel(caller(), request.job_id, keep=request.keep))

    async def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: Any) -> jobs_pb2.Job:  # noqa: N802
        return wire.job_to_proto(await self._service.delete(caller(), request.job_id))

    async def WatchJob(  # noqa: N802
        self, request: jobs_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.JobEvent]:
        watch = self._service.watch(caller(), request.job_id, after_sequence=request.after_sequence)
        async with aclosing(watch) as events:
            async for event in events:
                yield wire.event_to_proto(event)

    async def ListJobEvents(  # noqa: N802
        self, request: jobs_pb2.ListJobEventsRequest, context: Any
    ) -> jobs_pb2.ListJobEventsResponse:
        events, following = await self._service.events(
            caller(), request.job_id, after=request.after_sequence, limit=request.page_size
        )
        return await in_thread_if_many(lambda found: wire.events_page(found, following), events, count=len(events))

    async def GetRoundResult(  # noqa: N802
        self, request: jobs_pb2.GetRoundResultRequest, context: Any
    ) -> jobs_pb2.JobResult:
        return wire.result_to_proto(await self._service.round_result(caller(), request.job_id, request.round))

    async def DownloadArtifact(  # noqa: N802
        self, request: jobs_pb2.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[common_pb2.DataChunk]:
        known = request.sha256.hex()
        artifact = await self._service.artifact(
            caller(), request.job_id, file=request.file, choice=request.round, sha256=known
        )
        async for chunk in send_blob(self._blobs, artifact.sha256, offset=request.offset):
            yield chunk

    async def UploadModel(  # noqa: N802
        self, request_iterator: AsyncIterator[common_pb2.DataChunk], context: Any
    ) -> jobs_pb2.UploadModelResponse:
        kept = await self._service.uploads.receive(str(caller()), request_iterator)
        answer = jobs_pb2.UploadModelResponse(sha256=bytes.fromhex(kept.sha256), bytes=kept.size)
        answer.expire_time.FromSeconds(int(kept.until))
        return answer

    async def GetStatus(self, request: jobs_pb2.GetStatusRequest, context: Any) -> jobs_pb2.Status:  # noqa: N802
        return wire.status_to_proto(await self._service.status())


async def build_page(build: Callable[[Sequence[JobView], str], M], views: Sequence[JobView], token: str) -> M:
    """The message of a page."""
    return await in_thread_if_many(lambda some: build(some, token), views, count=len(views))


async def in_thread_if_many(build: Callable[[Any], M], source: Any, *, count: int) -> M:
    """`build(source)`, in a thread where it makes more than `ENTRIES_AT_ONCE` entries."""
    if count > ENTRIES_AT_ONCE:
        return await asyncio.to_thread(build, source)
    return build(source)
