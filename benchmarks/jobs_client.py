"""A scientist who measures: `jobs_client.py OPERATION CLIENT.YAML …` prints one line of JSON, times in milliseconds.

In a process of its own, as scientists are: what the client computes does not stand in the way of the aggregator's loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs_specs import training
from src.client import AsyncSottoClient
from src.client_config import connection_of
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect

PAUSE_S: Final = 0.01
"""Between two calls, so that what they started is over."""
CUT_EVERY: Final = 4
"""Of so many watchers one hangs up again and again, and of twice as many one loses its whole connection."""
CUT_AFTER: Final = 40
"""Events, and one more for each watcher that is cut, until it hangs up."""
WATCH_TIMEOUT_S: Final = 120.0
FIRST_EVENTS: Final = 2
"""Submitted, started: the watchers have them before the rest begins."""


async def timed(call: Callable[[], Awaitable[Any]]) -> float:
    """How long a call takes."""
    begun_s = time.perf_counter()
    await call()
    return (time.perf_counter() - begun_s) * 1e3


async def submit(config: Path, first: str, count: str) -> list[float]:
    """CreateJob, one after the other, each with a specification that the aggregator has not seen."""
    async with AsyncSottoClient.from_config(config) as client:
        await client.status()  # dials
        times = []
        for seed in range(int(first), int(first) + int(count)):
            spec = training(seed)
            times.append(await timed(lambda spec=spec: client.submit(spec)))  # type: ignore[misc]
            await asyncio.sleep(PAUSE_S)
    return times


async def page(config: Path, size: str, count: str) -> list[float]:
    """ListJobs, one page; the first time is the first of this aggregator."""
    connection = connection_of(config)
    times = []
    async with AsyncSottoClient.from_config(config) as client:
        await client.status()
        for _ in range(int(count)):
            times.append(await timed(lambda: client.list(page_size=int(size), limit=int(size))))
            await asyncio.sleep(PAUSE_S)
        found = await client.list(page_size=int(size), limit=int(size))
    if len(found) != int(size):
        raise RuntimeError(f"{connection['address']} lists {len(found)} jobs, not {size}")
    return times


async def status(config: Path, count: str) -> dict[str, Any]:
    """GetStatus, and of how many workers it said that they were busy."""
    times, busy = [], []
    async with AsyncSottoClient.from_config(config) as client:
        await client.status()
        for _ in range(int(count)):
            begun_s = time.perf_counter()
            answer = await client.status()
            times.append((time.perf_counter() - begun_s) * 1e3)
            busy.append(answer.workers.busy)
            await asyncio.sleep(PAUSE_S)
    return {"ms": times, "busy": busy}


class Watchers:
    """Many streams of one job's events. Some are cut, and come back with the number of the last event they saw.

    They use the stub, not the client's `watch`, which would leave out an event that came twice.
    """

    def __init__(self, connection: dict[str, Any], job_id: str, count: int) -> None:
        connection.pop("roster")
        connection.pop("signer")
        self._connection = connection
        self._job_id = job_id
        self._seen: list[list[int]] = [[] for _ in range(count)]
        self._ready = 0
        self._all_ready = asyncio.Event()
        self._cuts = 0

    async def run(self) -> dict[str, Any]:
        """Until all streams have ended; the line `{}` is printed once everybody listens."""
        shared = connect(**self._connection)
        try:
            async with asyncio.timeout(WATCH_TIMEOUT_S), asyncio.TaskGroup() as group:
                for index in range(len(self._seen)):
                    group.create_task(self._watch(index, shared))
                await self._all_ready.wait()
                print("{}", flush=True)
            stub = jobs_pb2_grpc.JobServiceStub(shared)
            history = await stub.ListJobEvents(jobs_pb2.ListJobEventsRequest(job_id=self._job_id))
        finally:
            await shared.close(None)
        there = {event.sequence for event in history.events}
        return {
            "events": len(there),
            "missing": sum(len(there.difference(seen)) for seen in self._seen),
            "double": sum(len(seen) - len(set(seen)) for seen in self._seen),
            "out_of_order": sum(seen != sorted(seen) for seen in self._seen),
            "cuts": self._cuts,
        }

    async def _watch(self, index: int, shared: Any) -> None:
        seen = self._seen[index]
        cut = index % CUT_EVERY == 0
        alone = index % (2 * CUT_EVERY) == 0
        at_rest = False
        while not at_rest:
            channel = connect(**self._connection) if alone else shared
            try:
                at_rest = await self._stream(channel, seen, room=CUT_AFTER + index if cut else sys.maxsize)
            finally:
                if alone:
                    await channel.close(None)

    async def _stream(self, channel: Any, seen: list[int], *, room: int) -> bool:
        """One call, given up after so many events; whether the job is at rest."""
        request = jobs_pb2.WatchJobRequest(job_id=self._job_id, after_sequence=seen[-1] if seen else 0)
        call = jobs_pb2_grpc.JobServiceStub(channel).WatchJob(request)
        try:
            async for event in call:
                seen.append(event.sequence)
                room -= 1
                if len(seen) == FIRST_EVENTS:
                    self._listens()
                if not room:
                    self._cuts += 1
                    return False
        finally:
            call.cancel()
        return True

    def _listens(self) -> None:
        self._ready += 1
        if self._ready == len(self._seen):
            self._all_ready.set()


async def watch(config: Path, job_id: str, count: str) -> dict[str, Any]:
    """What so many watchers missed, or saw twice."""
    return await Watchers(connection_of(config), job_id, int(count)).run()


OPERATIONS: Final[dict[str, Callable[..., Awaitable[Any]]]] = {
    "submit": submit,
    "page": page,
    "status": status,
    "watch": watch,
}


async def main() -> None:
    """As the command line says."""
    operation, config, *arguments = sys.argv[1:]
    print(json.dumps(await OPERATIONS[operation](Path(config), *arguments)))


if __name__ == "__main__":
    asyncio.run(main())
