"""The scientist's side: submit a job, walk away, come back to a model with a privacy receipt.

    with SottoClient.from_config("client.yaml") as client:
        job = client.submit(FederatedTraining(task="randhie", rounds=5))
        job = client.wait(job.job_id, timeout_s=3600)
        files = client.fetch_artifact(job.job_id, "out")

`AsyncSottoClient` is the same with `await`. Both survive a restart of the aggregator: calls are repeated for a while
(every one of them may be), a watch goes on after the last event it saw, a download after the last byte on disk.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from .communication.generated import jobs_pb2, jobs_pb2_grpc
from .communication.generated.jobs_pb2 import FederatedTraining, Job, JobEvent, JobResult, Status
from .communication.grpc_client import connect
from .communication.identity import Identity
from .communication.options import DEFAULT_MAX_MESSAGE_BYTES
from .communication.tls import TlsFiles
from .config import ClientConfig, load_client_config
from .errors import AbandonedError, DeadlineError, DigestError, JobFailed, SottoError, StateError, UnavailableError
from .jobs.artifact import Partial, keep, verify_manifest
from .jobs.spec import FederatedTrainingSpec, spec_to_proto
from .protocol.roster import Roster, load_roster

T = TypeVar("T")
JobLike = Job | FederatedTraining | FederatedTrainingSpec

RETRY_FOR_S: Final = 60.0
"""How long an aggregator may be away before a call gives up: a restart takes seconds."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0

AT_REST: Final = frozenset({jobs_pb2.SUCCEEDED, jobs_pb2.FAILED, jobs_pb2.CANCELLED})

__all__ = [
    "AT_REST",
    "AsyncSottoClient",
    "FederatedTraining",
    "FederatedTrainingSpec",
    "Job",
    "JobEvent",
    "JobResult",
    "SottoClient",
    "result_of",
    "verify_manifest",
]


def result_of(job: Job) -> JobResult:
    """What a job brought.

    Raises:
        JobFailed: it failed; message and metadata (reason, stage, parties) say why.
        AbandonedError: it was cancelled.
        StateError: it is not at rest yet.
    """
    if job.state == jobs_pb2.SUCCEEDED:
        return job.result
    if job.state == jobs_pb2.FAILED:
        known = {"reason": job.error.reason, "stage": job.error.stage, "parties": ", ".join(job.error.parties)}
        where = f" in {job.error.stage}" if job.error.stage else ""
        text = f"job {job.job_id} failed{where}: {job.error.message} [{job.error.reason}]"
        raise JobFailed(text, job_id=job.job_id, **{key: value for key, value in known.items() if value})
    if job.state == jobs_pb2.CANCELLED:
        raise AbandonedError(f"job {job.job_id} was cancelled", job_id=job.job_id)
    raise StateError(f"job {job.job_id} is {jobs_pb2.JobState.Name(job.state)}: it has no result yet")


class _Patience:
    """Growing pauses between attempts, bounded one by one and all together."""

    def __init__(self, retry_for_s: float) -> None:
        self._retry_for_s = retry_for_s
        self.reset()

    def reset(self) -> None:
        """Something came: the next failure is a first one again."""
        self._since = time.monotonic()
        self._pause_s = FIRST_PAUSE_S

    async def pause(self, error: SottoError) -> None:
        """Wait before the next attempt; raises `error` when the time is over."""
        if time.monotonic() + self._pause_s > self._since + self._retry_for_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


_AWAY: Final = (UnavailableError, AbandonedError)
"""What a call fails with when the aggregator goes away under it: a stopping server cancels the streams it still has."""


class AsyncSottoClient:
    """A connection to an aggregator. To be made inside a running event loop, and closed.

    Every method raises the error that the aggregator raised (`errors`), `UnavailableError` when it could not be reached
    for `retry_for_s`, and `AuthenticationError` or `AccessError` when it does not take this caller.

    Args:
        address: "host:port".
        tls: certificate, key and CA; None only with `insecure`.
        insecure: plaintext; loopback addresses only.
        identity: who calls, where `insecure`.
        roster: pinned; artifacts are then verified with the aggregator's key in it.
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
        roster: Roster | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        retry_for_s: float = RETRY_FOR_S,
    ) -> None:
        self._channel = connect(
            address, tls=tls, insecure=insecure, identity=identity, max_message_bytes=max_message_bytes
        )
        self._stub = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._roster = roster
        self._retry_for_s = retry_for_s

    @classmethod
    def from_config(cls, path: Path | str, *, address: str | None = None, retry_for_s: float = RETRY_FOR_S) -> Self:
        """As a client.yaml says, at `address` instead where it is given.

        Raises:
            ConfigError: the file cannot be used; KeyMaterialError or SignatureError for a bad roster.
        """
        arguments = _arguments(load_client_config(Path(path)))
        return cls(**{**arguments, "address": address or arguments["address"]}, retry_for_s=retry_for_s)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self, job: JobLike, request_id: str | None = None) -> Job:
        """Submit a job; with the same request_id the same job comes back, however often it is sent.

        Args:
            job: the wire's `Job` or `FederatedTraining`, or a `FederatedTrainingSpec`.
            request_id: a new UUID by default.

        Raises:
            InvalidInput: with every violation by its field's path.
            BudgetError, PlanError, PolicyError, LimitError: the aggregator does not accept it.
            ConflictError: the request_id was used for another job.
        """
        request = jobs_pb2.CreateJobRequest(request_id=request_id or str(uuid.uuid4()), job=_to_job(job))
        operation = await self._patiently(lambda: self._stub.CreateJob(request))
        return await self.get(operation.name.removeprefix("operations/"))

    async def get(self, job_id: str) -> Job:
        """A job with its progress. Raises NotFoundError."""
        return await self._patiently(lambda: self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id)))

    async def list_jobs(self, *, state: str = "", page_size: int = 0, limit: int | None = None) -> list[Job]:
        """Jobs, newest first, without round summaries.

        Args:
            state: only those in it, such as "RUNNING".
            page_size: of one call; 0 for the aggregator's default.
            limit: at most so many; all by default.
        """
        jobs: list[Job] = []
        token = ""
        while limit is None or len(jobs) < limit:
            wanted = f"state={state}" if state else ""
            request = jobs_pb2.ListJobsRequest(page_size=page_size, page_token=token, filter=wanted)
            page = await self._patiently(lambda request=request: self._stub.ListJobs(request))  # type: ignore[misc]
            jobs += page.jobs
            token = page.next_page_token
            if not token:
                break
        return jobs[:limit]

    async def cancel(self, job_id: str) -> Job:
        """Ask a job to stop. One at rest stays as it is. Raises NotFoundError."""
        return await self._patiently(lambda: self._stub.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id)))

    async def status(self) -> Status:
        """How the aggregator is."""
        return await self._patiently(lambda: self._stub.GetStatus(jobs_pb2.GetStatusRequest()))

    async def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncGenerator[JobEvent]:
        """The job's events after a sequence number, then each as it happens, until the job is at rest.

        Every event comes once, also when the connection is lost in between. Raises NotFoundError.
        """
        last = after_sequence
        patience = _Patience(self._retry_for_s)
        while True:
            try:
                request = jobs_pb2.WatchJobRequest(job_id=job_id, after_sequence=last)
                async for event in self._stub.WatchJob(request):
                    patience.reset()
                    if event.sequence > last:
                        last = event.sequence
                        yield event
                return
            except _AWAY as error:
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
        signed by the aggregator and speaks of this job and this model.

        Raises:
            JobFailed, AbandonedError, StateError: as `result_of`.
            DigestError: a file is not what was announced.
            SignatureError: the manifest is not what the aggregator signed.
            InvalidInput: a file's name is no plain name, or the manifest is malformed.
            StorageError: the directory cannot be written.
        """
        result = await self.result(job_id)
        folder = Path(directory)
        partials = [await asyncio.to_thread(Partial, folder, file) for file in result.files]
        for partial in partials:
            await self._complete(job_id, partial)
        await asyncio.to_thread(keep, partials, roster=self._roster, job_id=job_id)
        return {partial.name: partial.target for partial in partials}

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
        patience = _Patience(self._retry_for_s)
        while not partial.complete:
            request = jobs_pb2.DownloadArtifactRequest(job_id=job_id, file=partial.name, offset=partial.size)
            try:
                async for chunk in self._stub.DownloadArtifact(request):
                    await asyncio.to_thread(partial.write, chunk.data, offset=chunk.offset)
                    patience.reset()
                if not partial.complete:
                    raise DigestError(f"{partial.name} ended after {partial.size} of {partial.total} bytes")
            except _AWAY as error:
                await patience.pause(error)
        await asyncio.to_thread(partial.verify)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call while the aggregator is away. Every RPC here may be sent twice."""
        patience = _Patience(self._retry_for_s)
        while True:
            try:
                return await call()
            except UnavailableError as error:
                await patience.pause(error)


class SottoClient:
    """`AsyncSottoClient` for code without an event loop: the same methods, which block. Safe to use from threads.

    One thread of its own runs the connection; `close`, or leaving the `with` block, ends it. The arguments are those of
    `AsyncSottoClient`.
    """

    def __init__(self, address: str, **arguments: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="sotto-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(_make(address, arguments))
        except BaseException:
            self._stop(_nothing())
            raise

    @classmethod
    def from_config(cls, path: Path | str, *, address: str | None = None, retry_for_s: float = RETRY_FOR_S) -> Self:
        """As a client.yaml says, at `address` instead where it is given.

        Raises:
            ConfigError: the file cannot be used; KeyMaterialError or SignatureError for a bad roster.
        """
        arguments = _arguments(load_client_config(Path(path)))
        return cls(**{**arguments, "address": address or arguments["address"]}, retry_for_s=retry_for_s)

    def close(self) -> None:
        """Hang up and end the thread. Does nothing the second time."""
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            self._stop(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, job: JobLike, request_id: str | None = None) -> Job:
        """As `AsyncSottoClient.submit`."""
        return self._run(self._client.submit(job, request_id))

    def get(self, job_id: str) -> Job:
        """As `AsyncSottoClient.get`."""
        return self._run(self._client.get(job_id))

    def list_jobs(self, *, state: str = "", page_size: int = 0, limit: int | None = None) -> list[Job]:
        """As `AsyncSottoClient.list_jobs`."""
        return self._run(self._client.list_jobs(state=state, page_size=page_size, limit=limit))

    def cancel(self, job_id: str) -> Job:
        """As `AsyncSottoClient.cancel`."""
        return self._run(self._client.cancel(job_id))

    def status(self) -> Status:
        """As `AsyncSottoClient.status`."""
        return self._run(self._client.status())

    def watch(self, job_id: str, *, after_sequence: int = 0) -> Iterator[JobEvent]:
        """As `AsyncSottoClient.watch`; leaving the loop early hangs up."""
        heard: queue.SimpleQueue[JobEvent | Exception | None] = queue.SimpleQueue()
        listening = self._schedule(self._listen(job_id, after_sequence, into=heard))
        try:
            while (event := heard.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            listening.cancel()

    async def _listen(
        self, job_id: str, after_sequence: int, *, into: queue.SimpleQueue[JobEvent | Exception | None]
    ) -> None:
        try:
            async with aclosing(self._client.watch(job_id, after_sequence=after_sequence)) as events:
                async for event in events:
                    into.put(event)
            into.put(None)
        except asyncio.CancelledError:
            into.put(StateError(_CLOSED))
            raise
        except Exception as error:
            into.put(error)

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """As `AsyncSottoClient.wait`."""
        return self._run(self._client.wait(job_id, timeout_s))

    def result(self, job_id: str) -> JobResult:
        """As `AsyncSottoClient.result`."""
        return self._run(self._client.result(job_id))

    def fetch_artifact(self, job_id: str, directory: Path | str) -> dict[str, Path]:
        """As `AsyncSottoClient.fetch_artifact`."""
        return self._run(self._client.fetch_artifact(job_id, directory))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._schedule(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise StateError(_CLOSED) from None
        except BaseException:  # Ctrl-C reaches the waiting thread only
            future.cancel()
            raise

    def _schedule(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:  # so that whatever was scheduled before `close` is there for `_cancel_others` to see
            if self._closed:
                work.close()
                raise StateError(_CLOSED)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self, last: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        asyncio.run_coroutine_threadsafe(last, self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


_CLOSED: Final = "this client is closed"


async def _cancel_others() -> None:
    """Whoever waits in another thread is told that the client was closed."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _nothing() -> None:
    """There is no connection to end."""


async def _make(address: str, arguments: dict[str, Any]) -> AsyncSottoClient:
    """A channel belongs to the loop that runs when it is made."""
    return AsyncSottoClient(address, **arguments)


def _to_job(job: JobLike) -> Job:
    if isinstance(job, FederatedTrainingSpec):
        return Job(federated_training=spec_to_proto(job))
    return Job(federated_training=job) if isinstance(job, FederatedTraining) else job


def _arguments(config: ClientConfig) -> dict[str, Any]:
    server = config.server
    tls = None
    if server.tls is not None:
        tls = TlsFiles(certificate=server.tls.certificate, key=server.tls.key, ca=server.tls.ca)
    roster = None if config.keys.roster is None else load_roster(config.keys.roster)[1]
    identity = Identity(config.role, config.name) if server.insecure else None
    return {
        "address": server.address,
        "tls": tls,
        "insecure": server.insecure,
        "identity": identity,
        "roster": roster,
    }
