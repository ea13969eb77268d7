"""The scientist's side: submit a job, walk away, come back to a model with a privacy receipt.

    with SottoClient.from_config("client.yaml") as client:
        job = client.submit(FederatedTraining(task="randhie", rounds=5))
        job = client.wait(job.job_id, timeout_s=3600)
        print(JobState.Name(job.state))
        files = client.fetch_artifact(job.job_id, "out")

`AsyncSottoClient` is the same with `await`. Both survive a restart of the aggregator: calls are repeated for a while
(every one of them may be), a watch goes on after the last event it saw, a download after the last byte on disk.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from .client_async import AT_REST, RETRY_FOR_S, AsyncSottoClient, Events, Jobs, result_of
from .client_config import connection_of
from .client_signing import JobSigner
from .communication.generated.jobs_pb2 import (
    ContinuedFrom,
    Evaluation,
    Export,
    FederatedTraining,
    Job,
    JobEvent,
    JobResult,
    JobState,
    Status,
)
from .errors import StateError
from .jobs.artifact import verify_manifest

if TYPE_CHECKING:
    from .jobs.computations import EvaluationSpec, ExportSpec
    from .jobs.spec import FederatedTrainingSpec
    from .jobs.specs import JobSpec

T = TypeVar("T")

__all__ = [
    "AT_REST",
    "RETRY_FOR_S",
    "AsyncSottoClient",
    "ContinuedFrom",
    "Evaluation",
    "EvaluationSpec",
    "Export",
    "ExportSpec",
    "FederatedTraining",
    "FederatedTrainingSpec",
    "Job",
    "JobEvent",
    "JobResult",
    "JobSigner",
    "JobState",
    "SottoClient",
    "Status",
    "result_of",
    "verify_manifest",
]

_SPECS: Final = frozenset({"EvaluationSpec", "ExportSpec", "FederatedTrainingSpec"})


def __getattr__(name: str) -> Any:
    """Specifications are imported when they are asked for (PEP 562): their models take longer than a call."""
    if name in _SPECS:
        from .jobs import specs

        return getattr(specs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        """As a client.yaml says, at `address` instead where it is given. Raises ConfigError: it cannot be used."""
        return cls(**connection_of(path, address=address), retry_for_s=retry_for_s)

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

    def submit(
        self,
        job: Job | FederatedTraining | Evaluation | Export | JobSpec,
        request_id: str | None = None,
        *,
        priority: str | None = None,
        timeout_s: float | None = None,
        inline_wait_s: float = 0.0,
    ) -> Job:
        """As `AsyncSottoClient.submit`."""
        return self._run(
            self._client.submit(job, request_id, priority=priority, timeout_s=timeout_s, inline_wait_s=inline_wait_s)
        )

    def upload_model(self, model: bytes | Path | str) -> str:
        """As `AsyncSottoClient.upload_model`."""
        return self._run(self._client.upload_model(model))

    def get(self, job_id: str) -> Job:
        """As `AsyncSottoClient.get`."""
        return self._run(self._client.get(job_id))

    def list(
        self,
        filter: str = "",
        order_by: str = "",
        *,
        page_size: int = 0,
        limit: int | None = None,
        show_deleted: bool = False,
    ) -> Jobs:
        """As `AsyncSottoClient.list`."""
        return self._run(
            self._client.list(filter, order_by, page_size=page_size, limit=limit, show_deleted=show_deleted)
        )

    def cancel(self, job_id: str, *, keep: bool = False) -> Job:
        """As `AsyncSottoClient.cancel`."""
        return self._run(self._client.cancel(job_id, keep=keep))

    def delete(self, job_id: str) -> Job:
        """As `AsyncSottoClient.delete`."""
        return self._run(self._client.delete(job_id))

    def status(self) -> Status:
        """As `AsyncSottoClient.status`."""
        return self._run(self._client.status())

    def events(self, job_id: str, after_sequence: int = 0) -> Events:
        """As `AsyncSottoClient.events`."""
        return self._run(self._client.events(job_id, after_sequence))

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

    def result(self, job_id: str, *, round: int | str = "", best: str = "") -> JobResult:
        """As `AsyncSottoClient.result`."""
        return self._run(self._client.result(job_id, round=round, best=best))

    def continued_from(self, job_id: str, *, round: int | str = "", best: str = "") -> ContinuedFrom:
        """As `AsyncSottoClient.continued_from`."""
        return self._run(self._client.continued_from(job_id, round=round, best=best))

    def fetch_artifact(
        self, job_id: str, directory: Path | str, *, round: int | str = "", best: str = ""
    ) -> dict[str, Path]:
        """As `AsyncSottoClient.fetch_artifact`."""
        return self._run(self._client.fetch_artifact(job_id, directory, round=round, best=best))

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
        """All in the loop's own thread: the one that closes may have a loop that runs, as in a notebook."""
        asyncio.run_coroutine_threadsafe(_wind_up(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_CLOSED: Final = "this client is closed"


async def _wind_up(last: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    await _cancel_others()
    await last
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


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
