"""An aggregator to be measured: `jobs_server.py SETTINGS.json` serves until standard input closes.

A line of JSON on standard input is a command, a line on standard output its answer: `saturate` keeps every worker busy
with sums from then on, `fill` puts jobs into the store, `begin` and `play` let many things happen to a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs_specs import training
from src.aggregator.app import App
from src.config import load_aggregator_config
from src.jobs.executors.stats import PoolStats
from src.jobs.states import Event, EventKind, JobError, JobRow, failed_event, round_event, succeeded_event, utc
from src.jobs.store import JobStore
from src.storage.blobs import CHUNK_BYTES, Blobs

OWNER: Final = "scientist/scientist"
"""As the kit of the scientist has it."""
MAX_ATTEMPTS: Final = 4
DAY_S: Final = 86_400.0
SUCCEEDED_OF_TEN: Final = 8
"""Of ten jobs at rest; of the others one has failed and one was cancelled."""
ROUNDS: Final = 2
QUEUED_A_WORKER: Final = 2
"""Units: one that it computes and one that waits for it, so that no worker is ever idle between two."""
LOOK_S: Final = 0.1


class Bench:
    """The aggregator, and what is done beside it.

    It reaches into the aggregator's own pool, database and service: the sums compete with what the aggregator does, and
    what happens to a played job takes the way of everything that happens to one.
    """

    def __init__(self, app: App, load: dict[str, Any] | None) -> None:
        self._app = app
        self._pool = app._pool
        self._database = app._database
        self._service = app._service
        self._store: JobStore = app._service._store
        self._load = load
        self._sums: set[asyncio.Task[None]] = set()

    async def saturate(self) -> dict[str, Any]:
        """Sums on all workers, and as many that wait; answers once the pool has grown to its largest."""
        if self._load is None:
            raise RuntimeError("there is nothing to compute")
        # Only now: at its start an aggregator drops blobs that no job names.
        kept, own = Blobs(Path(self._load["blobs"])), Blobs(self._app.config.blobs_dir)
        for batch in self._load["params"]["batches"].values():
            with kept.open(batch["sha256"]) as file:
                own.write(iter(lambda file=file: file.read(CHUNK_BYTES), b""))  # type: ignore[misc]
        most = self._pool.settings.max_size
        await self._look_until(lambda stats: stats.tasks_done > 0)  # it measures its models, before anybody asks
        self._sums = {asyncio.create_task(self._sum_for_ever()) for _ in range(QUEUED_A_WORKER * most)}
        await self._look_until(lambda stats: stats.busy == most)
        return {"workers": most}

    async def _look_until(self, condition: Callable[[PoolStats], bool]) -> None:
        while not condition(self._pool.stats()):
            await self.check()
            await asyncio.sleep(LOOK_S)

    async def check(self) -> dict[str, Any]:
        """Raises what a sum raised, if one has failed."""
        for task in self._sums:
            if task.done():
                task.result()
        return {}

    async def _sum_for_ever(self) -> None:
        assert self._load is not None
        while True:
            # As the aggregator's own pipeline asks for it.
            params = {**self._load["params"], "processes": self._pool.cores_for_a_unit()}
            await self._pool.run("fold", params)

    async def fill(self, waiting: int, at_rest: int) -> dict[str, Any]:
        """Jobs of one scientist, as the store keeps them after a day."""
        await self._database.run(partial(self._fill, waiting=waiting, at_rest=at_rest))
        return {}

    def _fill(self, connection: Connection, waiting: int, at_rest: int) -> None:
        begin = time.time() - DAY_S
        for number in range(at_rest + waiting):
            now = begin + number
            job_id = self._store.create(connection, new_row(number, now=now)).job_id
            for event in history(number) if number < at_rest else ():
                now += 0.1
                self._store.apply(connection, job_id, event, now=now)

    async def begin(self) -> dict[str, Any]:
        """A running job that nobody drives: this holds its lease, so that the coordinator does not take it up."""
        row = replace(new_row(0, now=time.time()), job_id="a" * 16, request_id="played")

        def begin(connection: Connection) -> None:
            self._store.create(connection, row)
            now = time.time()
            self._store.apply(connection, row.job_id, Event(kind=EventKind.STARTED), now=now)
            self._store.acquire(connection, row.job_id, holder="played", now=now, lease_s=DAY_S)

        await self._database.run(begin)
        return {"job_id": row.job_id, "events": 2}

    async def play(self, job_id: str, events: int) -> dict[str, Any]:
        """Lets `events` events and its end happen to the job that `begin` began, one upon the other.

        They take the way of all events: written by the store, each in a transaction, and told by the service.
        """
        happening = [Event(kind=EventKind.WAITING, message=f"waiting, {number}") for number in range(events)]
        happening += [Event(kind=EventKind.CANCELLING), Event(kind=EventKind.CANCELLED)]
        begun_s = time.monotonic()
        for event in happening:
            await self._database.run(partial(self._apply, job_id=job_id, event=event))
            self._service.notify(job_id)
        return {"events": len(happening), "seconds": time.monotonic() - begun_s}

    def _apply(self, connection: Connection, job_id: str, event: Event) -> JobRow:
        return self._store.apply(connection, job_id, event, now=time.time())

    async def stop(self) -> None:
        """End the sums."""
        for task in self._sums:
            task.cancel()
        await asyncio.gather(*self._sums, return_exceptions=True)


def new_row(number: int, *, now: float) -> JobRow:
    """A federated training as it is submitted; each has a specification of its own."""
    spec = training(number)
    return JobRow(
        job_id=f"{number:016x}",
        request_id=f"filled {number}",
        owner=OWNER,
        display_name=f"training {number}",
        kind=spec.kind,
        spec=spec.to_json(),
        spec_digest=spec.digest,
        max_attempts=MAX_ATTEMPTS,
        created_at=utc(now),
    )


def history(number: int) -> list[Event]:
    """What happened to a job until it came to rest."""
    begun = Event(kind=EventKind.STARTED, message="started", cause="aggregator")
    which = number % 10
    if which > SUCCEEDED_OF_TEN:
        return [Event(kind=EventKind.CANCELLED, message=f"cancelled by {OWNER}", cause=OWNER)]
    if which == SUCCEEDED_OF_TEN:
        return [begun, failed_event(JobError("BUDGET_EXCEEDED", "party a refuses", "round 1", ("a",), "incident 1"))]
    rounds = [round_event({"round": each + 1, "state": "RELEASED", "contributions": 2}) for each in range(ROUNDS)]
    files = [
        {"name": name, "bytes": 10_000, "sha256": f"{number:064x}"} for name in ("model.safetensors", "manifest.json")
    ]
    result = {
        "files": files,
        "metrics": {"auc": 0.75, "accuracy": 0.7},
        "epsilon_example": 4.0,
        "epsilon_party": 40.0,
        "epsilon_party_against_aggregator": float("inf"),
        "delta": 1e-5,
    }
    return [begun, *rounds, succeeded_event(result)]


async def serve(settings: dict[str, Any]) -> None:
    """Until standard input closes."""
    app = App(load_aggregator_config(Path(settings["config"]), environ={}))
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    bench = Bench(app, settings["load"])
    try:
        print(json.dumps({"address": await app.start()}), flush=True)
        while line := await commands.readline():
            given = json.loads(line)
            print(json.dumps(await getattr(bench, given.pop("command"))(**given)), flush=True)
    finally:
        await bench.stop()
        await app.stop()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
