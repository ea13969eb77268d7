"""The scientist's side with `await`; `client` is the module to import from, and has the same without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from .client_config import connection_of
from .client_messages import choice_of, job_of, model_of, read_model, submitted
from .client_patience import Patience
from .client_signing import JobSigner
from .communication.generated import jobs_pb2, jobs_pb2_grpc
from .communication.generated.jobs_pb2 import (
    ContinuedFrom,
    Evaluation,
    Export,
    FederatedTraining,
    Job,
    JobEvent,
    JobResult,
    Status,
)
from .communication.grpc_client import connect
from .communication.identity import Identity
from .communication.options import DEFAULT_MAX_MESSAGE_BYTES
from .communication.streams import send_bytes
from .communication.tls import TlsFiles
from .errors import (
    PASSING,
    AbandonedError,
    DeadlineError,
    DigestError,
    JobFailed,
    NotFoundError,
    StateError,
    UnavailableError,
)
from .jobs.artifact import MANIFEST_FILE, Partial, keep
from .jobs.keeping import LAST

if TYPE_CHECKING:
    from .jobs.specs import JobSpec
    from .protocol.roster import Roster

T = TypeVar("T")
Jobs = list[Job]  # a method called `list` hides the builtin from the annotations below it
Events = list[JobEvent]

RETRY_FOR_S: Final = 60.0
"""How long an aggregator may be away before a call gives up: a restart takes seconds."""
AT_REST: Final = frozenset({jobs_pb2.SUCCEEDED, jobs_pb2.FAILED, jobs_pb2.CANCELLED})


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
        sees that it is this scientist's. A model that is too large for one message is uploaded before.

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
            job=job_of(job, priority=priority, timeout_s=timeout_s),
            inline_wait_s=inline_wait_s,
        )
        model = model_of(request.job)
        if model:
            await self.upload_model(model)
        if self._signer is not None:
            request.order.CopyFrom(await asyncio.to_thread(self._signer.sign, request.job, request.request_id))
        try:
            operation = await self._patiently(lambda: self._stub.CreateJob(request))
        except NotFoundError as error:
            if not model or "sha256" not in error.metadata:
                raise
            await self.upload_model(model)  # the aggregator was restarted in between
            operation = await self._patiently(lambda: self._stub.CreateJob(request))
        metadata = jobs_pb2.OperationMetadata()
        if operation.done or not operation.metadata.Unpack(metadata):
            return await self.get(operation.name.removeprefix("operations/"))
        return submitted(request.job, metadata)

    async def upload_model(self, model: bytes | Path | str) -> str:
        """Hand in a model by itself, as jobs name it then: `FederatedTraining(initial_model_sha256=…)`. `submit` does
        so where it has to. Kept for an hour; once more is no harm.

        Args:
            model: safetensors, at most 256 MiB: the bytes, or a file.

        Returns:
            Its SHA-256 (hex).

        Raises:
            StorageError: the file cannot be read.
            LimitError: it is too large, or too much of this scientist's is kept already.
        """
        data = model if isinstance(model, bytes) else await asyncio.to_thread(read_model, Path(model))
        answer = await self._patiently(lambda: self._stub.UploadModel(send_bytes(data)))
        return bytes(answer.sha256).hex()

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

    async def cancel(self, job_id: str, *, keep: bool = False) -> Job:
        """Ask a job to stop. One at rest stays as it is. Raises NotFoundError.

        Args:
            keep: it ends in order, with its last released round as its result, if it has one.
        """
        request = jobs_pb2.CancelJobRequest(job_id=job_id, keep=keep)
        return await self._patiently(lambda: self._stub.CancelJob(request))

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

    async def result(self, job_id: str, *, round: int | str = "", best: str = "") -> JobResult:
        """The result of a job that succeeded; or a released round of a training, in whatever state that is, as one.

        Args:
            round: its number, or "last"; by default the job's own result.
            best: instead of `round`: the best one by a metric of public rows, such as "auc"; "max:NAME" or "min:NAME"
                of a metric that is not well known.

        Raises:
            JobFailed, AbandonedError, StateError: as `result_of`, where no round is meant.
            NotFoundError: no such job; or that round was not released, or its model was not kept.
            InvalidInput: that is no round.
        """
        choice = choice_of(round, best)
        if not choice:
            return result_of(await self.get(job_id))
        request = jobs_pb2.GetRoundResultRequest(job_id=job_id, round=choice)
        result = await self._patiently(lambda: self._stub.GetRoundResult(request))
        if choice.isdecimal() and result.round not in (0, int(choice)):
            raise DigestError(f"asked for round {choice} of job {job_id}, got {result.round}", job_id=job_id)
        return result

    async def continued_from(self, job_id: str, *, round: int | str = "", best: str = "") -> ContinuedFrom:
        """What `FederatedTraining.continue_from` says, to start from a released round of an earlier job, the last one
        unless it is said. Where a roster is pinned, its files are fetched first, and the manifest checked: what is
        signed then is its model.

        Args and errors: as of `result` and `fetch_artifact`.
        """
        choice = choice_of(round, best) or LAST
        if await self._pinned() is None:
            result = await self.result(job_id, round=choice)
        else:
            with tempfile.TemporaryDirectory() as folder:
                result, _ = await self._fetch_round(job_id, choice, Path(folder))
        (model,) = (file for file in result.files if file.name != MANIFEST_FILE)
        number = result.round or max(each.round for each in (await self.get(job_id)).progress.rounds)
        return ContinuedFrom(job_id=job_id, round=number, model_sha256=model.sha256.hex())

    async def fetch_artifact(
        self, job_id: str, directory: Path | str, *, round: int | str = "", best: str = ""
    ) -> dict[str, Path]:
        """Fetch the files of a job that succeeded, or of a released round of a training, into a directory; returns
        their paths by name.

        What is there already and whole is not fetched again; what is there in part (`….part`) is continued. Files get
        their names only when all of them have the announced SHA-256 and, where a roster is pinned, the manifest is
        signed by the aggregator, speaks of this job, and vouches for every other file.

        Args:
            round, best: which round is meant, as of `result`.

        Raises:
            JobFailed, AbandonedError, StateError: as `result_of`, where no round is meant.
            NotFoundError: its files were deleted, or that round cannot be had.
            DigestError: a file is not what was announced.
            SignatureError: the manifest is not what the aggregator signed.
            KeyMaterialError: the pinned roster cannot be used.
            InvalidInput: a file's name is no plain name, or the manifest is malformed.
            StorageError: the directory cannot be written.
        """
        choice = choice_of(round, best)
        if not choice:
            job = await self.get(job_id)
            result = result_of(job)
            if job.HasField("delete_time"):
                raise NotFoundError(f"the files of job {job_id} were deleted", job_id=job_id)
            return await self._fetch(job_id, result, Path(directory))
        return (await self._fetch_round(job_id, choice, Path(directory)))[1]

    async def _fetch_round(self, job_id: str, choice: str, folder: Path) -> tuple[JobResult, dict[str, Path]]:
        """A released round and its files, as they are together."""
        for _ in range(MOVED_ON_TIMES):
            result = await self.result(job_id, round=choice)
            with contextlib.suppress(_MovedOn):
                return result, await self._fetch(job_id, result, folder, choice=choice)
        raise NotFoundError(f"job {job_id} moves on faster than its manifest is fetched", job_id=job_id)

    async def _fetch(self, job_id: str, result: JobResult, folder: Path, *, choice: str = "") -> dict[str, Path]:
        """Raises _MovedOn where what a round's manifest states has changed since, as further rounds were charged."""
        roster = await self._pinned()
        of = choice and (str(result.round) if result.round else choice)
        partials = [(file, await asyncio.to_thread(Partial, folder, file)) for file in result.files]
        for file, partial in partials:
            try:
                await self._complete(job_id, partial, of=of, sha256=file.sha256 if of else b"")
            except NotFoundError as error:
                await asyncio.to_thread(partial.discard)
                if of and file.name == MANIFEST_FILE:
                    raise _MovedOn(error.message) from error
                raise
        found = [partial for _, partial in partials]
        await asyncio.to_thread(keep, found, roster=roster, job_id=job_id, number=result.round if of else 0)
        return {partial.name: partial.target for _, partial in partials}

    async def _pinned(self) -> Roster | None:
        if isinstance(self._roster, Path):
            from .protocol.roster import load_roster

            self._roster = (await asyncio.to_thread(load_roster, self._roster))[1]
        return self._roster

    async def _complete(self, job_id: str, partial: Partial, *, of: str, sha256: bytes) -> None:
        """Fetch what is missing. A part that turns out wrong is fetched once more from its beginning."""
        try:
            await self._append(job_id, partial, of=of, sha256=sha256)
        except DigestError:
            if not partial.resumed:
                raise
            await asyncio.to_thread(partial.restart)
            await self._append(job_id, partial, of=of, sha256=sha256)

    async def _append(self, job_id: str, partial: Partial, *, of: str, sha256: bytes) -> None:
        patience = Patience(self._retry_for_s)
        while not partial.complete:
            request = jobs_pb2.DownloadArtifactRequest(
                job_id=job_id, file=partial.name, offset=partial.size, round=of, sha256=sha256
            )
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


MOVED_ON_TIMES: Final = 5
"""So often the manifest of a round is fetched again, where the job goes on meanwhile."""


class _MovedOn(NotFoundError):
    """What a round's manifest states is more by now."""
