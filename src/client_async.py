"""The scientist's side with `await`; `client` is the module to import from, and has the same without an event loop."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from .client_config import connection_of
from .client_signing import JobSigner
from .communication.generated import jobs_pb2, jobs_pb2_grpc
from .communication.generated.jobs_pb2 import Evaluation, Export, FederatedTraining, Job, JobEvent, JobResult, Status
from .communication.grpc_client import connect
from .communication.identity import Identity
from .communication.options import CLIENT_PING_INTERVAL_S, DEFAULT_MAX_MESSAGE_BYTES, PING_TIMEOUT_S
from .communication.tls import TlsFiles
from .errors import (
    PASSING,
    AbandonedError,
    DeadlineError,
    DigestError,
    InvalidInput,
    JobFailed,
    NotFoundError,
    SottoError,
    StateError,
    UnavailableError,
)
from .jobs.artifact import Partial, keep

if TYPE_CHECKING:
    from .jobs.specs import JobSpec
    from .protocol.roster import Roster

T = TypeVar("T")
Jobs = list[Job]  # a method called `list` hides the builtin from the annotations below it
Events = list[JobEvent]

RETRY_FOR_S: Final = 60.0
"""How long an aggregator may be away before a call gives up: a restart takes seconds."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
NOTICED_S: Final = float(CLIENT_PING_INTERVAL_S + PING_TIMEOUT_S)
"""Within it a channel notices that nobody answers: what failed later was connected until then, however silent."""

AT_REST: Final = frozenset({jobs_pb2.SUCCEEDED, jobs_pb2.FAILED, jobs_pb2.CANCELLED})

MAX_TIMEOUT_S: Final = 10_000 * 365.25 * 86_400
"""What google.protobuf.Duration holds: ±10 000 years."""


def result_of(job: Job) -> JobResult:
    """What a job brought.

    Raises:
        JobFailed: it failed; message and metadata (reason, stage, parties, log_reference) say why.
        AbandonedError: it was cancelled.
        StateError: it is not at rest yet.
    """
    if job.state == jobs_pb2.SUCCEEDED:
        return job.result
    if job.state == jobs_pb2.FAILED:
        error = job.error
        known = {
            "reason": error.reason,
            "stage": error.stage,
            "parties": ", ".join(error.parties),
            "log_reference": error.log_reference,
        }
        where = f" in {error.stage}" if error.stage else ""
        text = f"job {job.job_id} failed{where}: {error.message} [{error.reason}]"
        raise JobFailed(text, job_id=job.job_id, **{key: value for key, value in known.items() if value})
    if job.state == jobs_pb2.CANCELLED:
        raise AbandonedError(f"job {job.job_id} was cancelled", job_id=job.job_id)
    raise StateError(f"job {job.job_id} is {jobs_pb2.JobState.Name(job.state)}: it has no result yet")


class Patience:
    """Growing pauses between attempts, bounded one by one and, as long as nobody is there, all together."""

    def __init__(self, retry_for_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry_for_s = retry_for_s
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Something came: the next failure is a first one again."""
        self._since = self._began = self._clock()
        self._pause_s = FIRST_PAUSE_S

    async def pause(self, error: SottoError) -> None:
        """Wait before the next attempt; raises `error` when the time is over."""
        if self._clock() - self._began > NOTICED_S:
            self.reset()
        if self._clock() + self._pause_s > self._since + self._retry_for_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._began = self._clock()


class AsyncSottoClient:
    """A connection to an aggregator. To be made inside a running event loop, and closed.

    A call is repeated for `retry_for_s` while it fails with what may pass (`errors.PASSING`: the aggregator is away or
    stopping, its disk is full, the caller has too many calls under way). Every method raises the error that the
    aggregator raised (`errors`), `UnavailableError` when it could not be reached, and `AuthenticationError` or
    `AccessError` when it does not take this caller.

    Args:
        address: "host:port".
        tls: certificate, key and CA; None only with `insecure`.
        insecure: plaintext; loopback addresses only.
        identity: who calls, where `insecure`.
        roster: pinned, or the file that it is pinned in, read when it is needed; artifacts are then verified with the
            aggregator's key in it.
        signer: signs the jobs that are submitted; None: they are not signed, which few aggregators take.
        max_message_bytes: of one message.
        retry_for_s: how long the aggregator may be away.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: TlsFiles | None = None,
        insecure: bool = False,
        identity: Identity | None = None,
        roster: Roster | Path | None = None,
        signer: JobSigner | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        retry_for_s: float = RETRY_FOR_S,
    ) -> None:
        self._channel = connect(
            address, tls=tls, insecure=insecure, identity=identity, max_message_bytes=max_message_bytes
        )
        self._stub = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._roster = roster
        self._signer = signer
        self._retry_for_s = retry_for_s

    @classmethod
    def from_config(cls, path: Path | str, *, address: str | None = None, retry_for_s: float = RETRY_FOR_S) -> Self:
        """As a client.yaml says, at `address` instead where it is given. Raises ConfigError: it cannot be used."""
        return cls(**connection_of(path, address=address), retry_for_s=retry_for_s)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(
        self,
        job: Job | FederatedTraining | Evaluation | Export | JobSpec,
        request_id: str | None = None,
        *,
        priority: str | None = None,
        timeout_s: float | None = None,
        inline_wait_s: float = 0.0,
    ) -> Job:
        """Submit a job; with the same request_id the same job comes back, however often it is sent.

        One call. The job that comes back has what the aggregator answers at once (id, state, progress, times, attempt)
        and what was sent; `get` adds owner, digest, and the defaults that the aggregator filled in. A job that is at
        rest when the answer comes is whole. What is sent is signed, if this client has a key: whoever trains for it
        sees that it is this scientist's.

        Args:
            job: the wire's `Job`, `FederatedTraining`, `Evaluation` or `Export`, or a specification.
            request_id: a new UUID by default.
            priority: "high", "normal" or "low"; by default as `job` says, else normal.
            timeout_s: seconds from now within which it is to be at rest; by default as `job` says, else none for a
                training and 10 minutes for the others.
            inline_wait_s: how long the answer may wait for the job to be at rest, 0 to 60.

        Raises:
            InvalidInput: with every violation by its field's path.
            KeyMaterialError: the signing key cannot be used.
            BudgetError, PlanError, PolicyError, LimitError: the aggregator does not accept it.
            ConflictError: the request_id was used for another job.
        """
        request = jobs_pb2.CreateJobRequest(
            request_id=request_id or str(uuid.uuid4()),
            job=_to_job(job, priority=priority, timeout_s=timeout_s),
            inline_wait_s=inline_wait_s,
        )
        if self._signer is not None:
            request.order.CopyFrom(await asyncio.to_thread(self._signer.sign, request.job, request.request_id))
        operation = await self._patiently(lambda: self._stub.CreateJob(request))
        metadata = jobs_pb2.OperationMetadata()
        if operation.done or not operation.metadata.Unpack(metadata):
            return await self.get(operation.name.removeprefix("operations/"))
        return _submitted(request.job, metadata)

    async def get(self, job_id: str) -> Job:
        """A job with its progress. Raises NotFoundError."""
        return await self._patiently(lambda: self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id)))

    async def list(
        self,
        filter: str = "",
        order_by: str = "",
        *,
        page_size: int = 0,
        limit: int | None = None,
        show_deleted: bool = False,
    ) -> Jobs:
        """Jobs, newest first unless asked otherwise, without round summaries.

        Args:
            filter: such as 'state = RUNNING AND priority = HIGH'; proto/sotto/v1/jobs.proto has the grammar.
            order_by: such as "priority desc, create_time".
            page_size: of one call; 0 for the aggregator's default.
            limit: at most so many; all by default.
            show_deleted: deleted ones too.

        Raises:
            InvalidInput: a filter or order that cannot be understood; says where.
        """
        jobs: Jobs = []
        token = ""
        while limit is None or len(jobs) < limit:
            request = jobs_pb2.ListJobsRequest(
                page_size=page_size,
                page_token=token,
                filter=filter,
                order_by=order_by,
                show_deleted=show_deleted,
            )
            page = await self._patiently(lambda request=request: self._stub.ListJobs(request))  # type: ignore[misc]
            jobs += page.jobs
            token = page.next_page_token
            if not token:
                break
        return jobs[:limit]

    async def cancel(self, job_id: str) -> Job:
        """Ask a job to stop. One at rest stays as it is. Raises NotFoundError."""
        return await self._patiently(lambda: self._stub.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id)))

    async def delete(self, job_id: str) -> Job:
        """Drop the files of a job at rest; the job itself stays, with its history and what it spent.

        Raises:
            NotFoundError: no such job.
            StateError: it is not at rest.
        """
        return await self._patiently(lambda: self._stub.DeleteJob(jobs_pb2.DeleteJobRequest(job_id=job_id)))

    async def status(self) -> Status:
        """How the aggregator is."""
        return await self._patiently(lambda: self._stub.GetStatus(jobs_pb2.GetStatusRequest()))

    async def events(self, job_id: str, after_sequence: int = 0) -> Events:
        """The job's history so far after a sequence number, without following it. Raises NotFoundError."""
        events: Events = []
        while True:
            request = jobs_pb2.ListJobEventsRequest(job_id=job_id, after_sequence=after_sequence)
            page = await self._patiently(lambda request=request: self._stub.ListJobEvents(request))  # type: ignore[misc]
            events += page.events
            if page.next_after_sequence <= after_sequence:
                return events
            after_sequence = page.next_after_sequence

    async def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncGenerator[JobEvent]:
        """The job's events after a sequence number, then each as it happens, until the job is at rest.

        Every event comes once, also when the connection is lost in between. Raises NotFoundError.
        """
        last = after_sequence
        state = jobs_pb2.JOB_STATE_UNSPECIFIED
        patience = Patience(self._retry_for_s)
        while True:
            try:
                request = jobs_pb2.WatchJobRequest(job_id=job_id, after_sequence=last)
                async for event in self._stub.WatchJob(request):
                    patience.reset()
                    if event.sequence > last:
                        last, state = event.sequence, event.state
                        yield event
                if not state or state in AT_REST:
                    return
                raise UnavailableError(f"the aggregator ended the watch of job {job_id}, which goes on")
            except PASSING as error:
                await patience.pause(error)

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it is at rest, in whichever state; `result_of` turns it into its result or an error.

        Raises:
            DeadlineError: it was not at rest in time; it goes on.
            NotFoundError: no such job.
        """
        try:
            async with asyncio.timeout(timeout_s), aclosing(self.watch(job_id)) as events:
                async for _ in events:
                    pass
        except TimeoutError:
            raise DeadlineError(f"job {job_id} is not at rest after {timeout_s:g} s", job_id=job_id) from None
        return await self.get(job_id)

    async def result(self, job_id: str) -> JobResult:
        """The result of a job that succeeded; raises as `result_of`."""
        return result_of(await self.get(job_id))

    async def fetch_artifact(self, job_id: str, directory: Path | str) -> dict[str, Path]:
        """Fetch the files of a job that succeeded into a directory; returns their paths by name.

        What is there already and whole is not fetched again; what is there in part (`….part`) is continued. Files get
        their names only when all of them have the announced SHA-256 and, where a roster is pinned, the manifest is
        signed by the aggregator, speaks of this job, and vouches for every other file.

        Raises:
            JobFailed, AbandonedError, StateError: as `result_of`.
            NotFoundError: its files were deleted.
            DigestError: a file is not what was announced.
            SignatureError: the manifest is not what the aggregator signed.
            KeyMaterialError: the pinned roster cannot be used.
            InvalidInput: a file's name is no plain name, or the manifest is malformed.
            StorageError: the directory cannot be written.
        """
        job = await self.get(job_id)
        result = result_of(job)
        if job.HasField("delete_time"):
            raise NotFoundError(f"the files of job {job_id} were deleted", job_id=job_id)
        roster = await self._pinned()
        folder = Path(directory)
        partials = [await asyncio.to_thread(Partial, folder, file) for file in result.files]
        for partial in partials:
            await self._complete(job_id, partial)
        await asyncio.to_thread(keep, partials, roster=roster, job_id=job_id)
        return {partial.name: partial.target for partial in partials}

    async def _pinned(self) -> Roster | None:
        if isinstance(self._roster, Path):
            from .protocol.roster import load_roster

            self._roster = (await asyncio.to_thread(load_roster, self._roster))[1]
        return self._roster

    async def _complete(self, job_id: str, partial: Partial) -> None:
        """Fetch what is missing. A part that turns out wrong is fetched once more from its beginning."""
        try:
            await self._append(job_id, partial)
        except DigestError:
            if not partial.resumed:
                raise
            await asyncio.to_thread(partial.restart)
            await self._append(job_id, partial)

    async def _append(self, job_id: str, partial: Partial) -> None:
        patience = Patience(self._retry_for_s)
        while not partial.complete:
            request = jobs_pb2.DownloadArtifactRequest(job_id=job_id, file=partial.name, offset=partial.size)
            try:
                async for chunk in self._stub.DownloadArtifact(request):
                    await asyncio.to_thread(partial.write, chunk.data, offset=chunk.offset)
                    patience.reset()
                if not partial.complete:
                    raise DigestError(f"{partial.name} ended after {partial.size} of {partial.total} bytes")
            except PASSING as error:
                await patience.pause(error)
        await asyncio.to_thread(partial.verify)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call while what keeps it may pass. Every RPC here may be sent twice."""
        patience = Patience(self._retry_for_s)
        while True:
            try:
                return await call()
            except PASSING as error:
                await patience.pause(error)


def _to_job(job: Any, *, priority: str | None, timeout_s: float | None) -> Job:
    """The wire's message of whatever describes a job; what the caller holds is not changed."""
    if isinstance(job, Job):
        message = Job()
        message.CopyFrom(job)
    elif isinstance(job, FederatedTraining):
        message = Job(federated_training=job)
    elif isinstance(job, Evaluation):
        message = Job(evaluation=job)
    elif isinstance(job, Export):
        message = Job(export=job)
    else:
        from .jobs.specs import spec_into_proto

        message = Job()
        spec_into_proto(message, job)
    if priority is not None:
        if priority.upper() not in ("HIGH", "NORMAL", "LOW"):
            problem = f"must be high, normal or low (got {priority[:40]!r})"
            raise InvalidInput(f"priority {problem}", violations={"priority": problem})
        message.priority = jobs_pb2.JobPriority.Value(priority.upper())
    if timeout_s is not None:
        if not (math.isfinite(timeout_s) and 0 < timeout_s <= MAX_TIMEOUT_S):
            problem = f"must be a number of seconds above 0 (got {timeout_s:g})"
            raise InvalidInput(f"timeout {problem}", violations={"timeout": problem})
        message.timeout.FromNanoseconds(round(timeout_s * 1e9))
    return message


def _submitted(sent: Job, answer: jobs_pb2.OperationMetadata) -> Job:
    """What is known of a job after it was accepted: what was sent, but the bytes of a model, and what was answered."""
    job = Job()
    job.CopyFrom(sent)
    if job.HasField("federated_training"):
        job.federated_training.ClearField("initial_model")
    if job.HasField("evaluation"):
        job.evaluation.ClearField("model")
    for field, value in answer.ListFields():
        if field.message_type is None:
            setattr(job, field.name, value)
        else:
            getattr(job, field.name).CopyFrom(value)
    return job
