"""A played job service for the client: it goes away, sends half, or lies, as the test has it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from src.client import AsyncSottoClient, JobSigner
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.generated.common_pb2 import DataChunk
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.errors import NotFoundError
from src.protocol.roster import Roster

SERVICE = "sotto.v1.JobService"
ROLES = {
    f"/{SERVICE}/{method.name}": frozenset({"scientist"})
    for method in jobs_pb2.DESCRIPTOR.services_by_name["JobService"].methods
}
ANN = Identity("scientist", "ann")
RETRY_FOR_S = 20.0


class PlayedService(jobs_pb2_grpc.JobServiceServicer):
    """Answers as the test has it; remembers what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.announced: dict[str, bytes] = {}
        self.breaks = 0
        self.download_breaks = 0
        self.break_after = 10**9
        self.code = grpc.StatusCode.UNAVAILABLE
        self.lie: Callable[[DataChunk], list[DataChunk]] = lambda chunk: [chunk]
        self.asked: list[Any] = []
        self.operation = operations_pb2.Operation(name="operations/0123456789abcdef")
        self.deleted = False
        self.errors: list[Exception] = []
        self.moved_on: dict[str, int] = {}
        self.ends_early = False

    async def _break(self, context: Any) -> None:
        self.breaks = max(0, self.breaks - 1)
        await context.abort(self.code, "gone")

    async def CreateJob(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        if self.errors:
            raise self.errors.pop(0)
        if self.breaks:
            await self._break(context)
        return self.operation

    async def GetJob(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        if self.errors:
            raise self.errors.pop(0)
        if self.breaks:
            await self._break(context)
        files = [
            jobs_pb2.ArtifactFile(
                name=name, bytes=len(data), sha256=hashlib.sha256(self.announced.get(name, data)).digest()
            )
            for name, data in self.files.items()
        ]
        job = jobs_pb2.Job(job_id=request.job_id, state=jobs_pb2.SUCCEEDED, result=jobs_pb2.JobResult(files=files))
        if self.deleted:
            job.delete_time.GetCurrentTime()
        return job

    async def ListJobs(self, request: Any, context: Any) -> Any:
        """Pages of two, of five jobs."""
        self.asked.append(request)
        first = int(request.page_token or 0)
        following = str(first + 2) if first + 2 < 5 else ""
        jobs = [jobs_pb2.Job(job_id=str(number)) for number in range(first, min(first + 2, 5))]
        return jobs_pb2.ListJobsResponse(jobs=jobs, next_page_token=following)

    async def GetRoundResult(self, request: Any, context: Any) -> Any:
        """The same files, of whichever round is asked for; of "last" the seventh."""
        self.asked.append(request)
        result = (await self.GetJob(jobs_pb2.GetJobRequest(job_id=request.job_id), context)).result
        result.round, result.rounds_released, result.rounds_planned = (
            int(request.round) if request.round.isdecimal() else 7,
            7,
            40,
        )
        return result

    async def DeleteJob(self, request: Any, context: Any) -> Any:
        raise AssertionError("not asked for here")

    async def ListJobEvents(self, request: Any, context: Any) -> Any:
        """Pages of three, of seven events."""
        self.asked.append(request)
        last = min(request.after_sequence + 3, 7)
        events = [jobs_pb2.JobEvent(sequence=number) for number in range(request.after_sequence + 1, last + 1)]
        return jobs_pb2.ListJobEventsResponse(events=events, next_after_sequence=last if last < 7 else 0)

    async def CancelJob(self, request: Any, context: Any) -> Any:
        raise AssertionError("not asked for here")

    async def GetStatus(self, request: Any, context: Any) -> Any:
        raise AssertionError("not asked for here")

    async def UploadModel(self, request_iterator: Any, context: Any) -> Any:
        data = b"".join([chunk.data async for chunk in request_iterator])
        self.asked.append(data)
        if self.breaks:
            await self._break(context)
        return jobs_pb2.UploadModelResponse(sha256=hashlib.sha256(data).digest(), bytes=len(data))

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        first = max(1, request.after_sequence)  # the last one known once more, as after a lost acknowledgement
        for sequence in range(first, 8):
            if self.breaks and sequence >= first + self.break_after:
                await self._break(context)
            yield jobs_pb2.JobEvent(
                sequence=sequence, kind="round", state=jobs_pb2.RUNNING if sequence < 7 else jobs_pb2.SUCCEEDED
            )
            if self.ends_early and sequence == first + 1 and sequence < 7:
                return

    async def DownloadArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        if self.moved_on.get(request.file):
            self.moved_on[request.file] -= 1
            raise NotFoundError("it is another one by now: the job has moved on")
        data = self.files[request.file]
        for sent, begin in enumerate(range(request.offset, len(data), 1000)):
            if self.download_breaks and sent >= self.break_after:
                self.download_breaks -= 1
                await self._break(context)
            for chunk in self.lie(DataChunk(data=data[begin : begin + 1000], offset=begin)):
                yield chunk


class House:
    """A played service, served, and callers of it."""

    def __init__(self, address: str) -> None:
        self.service = PlayedService()
        self.address = address
        self.roster: Roster | None = None
        self.clients: list[AsyncSottoClient] = []

    async def start(self) -> None:
        """Always at the same address."""
        self.server = GrpcServer(listen=self.address, tls=None, insecure=True, federation="demo", roles=ROLES)
        self.server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, self.service, SERVICE)
        await self.server.start()

    def client(
        self, *, pinned: bool = True, retry_for_s: float = RETRY_FOR_S, signer: JobSigner | None = None
    ) -> AsyncSottoClient:
        client = AsyncSottoClient(
            self.address,
            insecure=True,
            identity=ANN,
            roster=self.roster if pinned else None,
            signer=signer,
            retry_for_s=retry_for_s,
        )
        self.clients.append(client)
        return client


@pytest.fixture
async def house(reserved_address: Callable[[], AbstractContextManager[str]]) -> AsyncIterator[House]:
    with reserved_address() as address:
        house = House(address)
        await house.start()
        yield house
        for client in house.clients:
            await client.close()
        await house.server.stop(0)
