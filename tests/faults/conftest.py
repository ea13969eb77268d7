"""A small federation for crashes: two parties, both of whom must open; an aggregator that starts in a moment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import sqlalchemy

from src.aggregator.round_row import RoundRow
from src.hardening import INSPECTION
from src.jobs.states import Event, EventKind, JobRow, JobState, replay, seconds
from src.jobs.store import JobStore, StoredEvent
from src.protocol.canonical import parse_canonical
from src.protocol.roster import AGGREGATOR
from src.protocol.signing import Signed
from src.storage.database import read_only

FAULTY: Final = "tests.faults.faulty_aggregator"
PARTIES: Final = ("a", "b")
OWNER: Final = "scientist/scientist"
JOBS: Final = JobStore(sqlalchemy.MetaData())
PATIENCE_S: Final = 200.0
"""Only a hang reaches it."""
LOOK_S: Final = 0.2
MARK: Final = "FAULTY_FEDERATION"
"""In the environment of an aggregator and of all that it starts: by it those are found that outlived it."""


@dataclass
class Pair:
    """A federation of a and b that has run a job.

    Attributes:
        federation: aggregator and parties.
        model: what the first job released: later jobs start from it, so that the aggregator needs no torch.
        trained: the first job.
        mark: of everything that this aggregator started, in any of its lives.
    """

    federation: Any
    model: bytes
    trained: str
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def submit(self, **fields: Any) -> str:
        return str(self.federation.submit(initial_model=self.model, **fields))

    # --- lives of the aggregator --------------------------------------------------------------------------------------

    @property
    def stall_file(self) -> Path:
        return Path(self.federation.processes.directory / "stall")

    @property
    def config(self) -> str:
        return str(self.federation.kits / AGGREGATOR / "aggregator.yaml")

    def environ(self, **settings: str) -> dict[str, str]:
        """Of an aggregator that misbehaves, at the address that the parties know."""
        own = {"SOTTO__SERVER__LISTEN": self.federation.address, "SOTTO__EVALUATION": "{}"}
        return {**own, MARK: self.mark, INSPECTION: "1", "STALL": str(self.stall_file), **settings}

    def serve(self, *, stall: str = "", **settings: str) -> None:
        """The aggregator, once it serves and both parties are back; workers that are given this unit stand still."""
        self.leave()
        self.stall_file.write_text(stall)
        environ = self.environ(**settings)
        self.federation.processes.start(AGGREGATOR, self.config, module=FAULTY, settings=environ)
        self.federation.joined(*PARTIES)

    def leave(self) -> None:
        """The aggregator ends in order, if it runs."""
        if AGGREGATOR in self.federation.processes.running:
            assert self.federation.processes.stop(AGGREGATOR) == 0

    def left_behind(self) -> list[psutil.Process]:
        """What was started by an aggregator that is gone, and is not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    # --- what lies on disk --------------------------------------------------------------------------------------------

    def _read(self, read: Callable[[JobStore, Any], Any]) -> Any:
        with read_only(self.federation.state(AGGREGATOR) / "aggregator.sqlite") as connection:
            return read(JOBS, connection)

    def job(self, job_id: str) -> JobRow:
        """A job as it lies on disk, whether somebody runs it or not."""
        row: JobRow = self._read(lambda store, connection: store.get(connection, job_id))
        return row

    def requested(self, request_id: str) -> JobRow | None:
        """What became of a request."""
        row: JobRow | None = self._read(lambda store, connection: store.find_request(connection, OWNER, request_id))
        return row

    def token(self, job_id: str) -> int:
        """The fencing token of the job's newest lease."""

        def read(store: JobStore, connection: Any) -> int:
            jobs = store.jobs.c
            query = sqlalchemy.select(jobs.fencing_token).where(jobs.job_id == job_id)
            return int(connection.execute(query).scalar_one())

        return int(self._read(read))

    def history(self, job_id: str) -> list[StoredEvent]:
        """All events of a job."""
        events: list[StoredEvent] = self._read(lambda store, connection: store.events(connection, job_id))
        return events

    def settled(self, name: str, job_id: str) -> list[str]:
        """How each charge of the job was settled; exactly one charge a round and subject."""
        charges = self.federation.charges(name, job_id)
        assert len({(each.entry.round, each.entry.subject) for each in charges}) == len(charges)
        return [each.settled.kind if each.settled else "open" for each in charges]

    # --- what always holds --------------------------------------------------------------------------------------------

    def check_history(self, job_id: str) -> list[StoredEvent]:
        """Events are numbered without a gap, and give the job as it lies on disk when they are replayed."""
        row, events = self.job(job_id), self.history(job_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.time for event in events] == sorted(event.time for event in events)
        submitted = JobRow(
            **{name: getattr(row, name) for name in ("job_id", "request_id", "owner", "display_name", "kind")},
            **{
                name: getattr(row, name) for name in ("spec", "spec_digest", "signed_order", "priority", "max_attempts")
            },
            created_at=row.created_at,
            deadline_at=row.deadline_at,
        )
        told = [
            (Event(kind=each.kind, message=each.message, cause=each.cause, detail=each.detail), seconds(each.time))
            for each in events
        ]
        assert events[0].kind is EventKind.SUBMITTED
        assert replay(submitted, told[1:]) == row
        return events

    def check_trained(self, job_id: str, *, rounds: int = 1) -> list[RoundRow]:
        """The job succeeded; each of its rounds was released once, and everybody was charged for it once."""
        job = self.job(job_id)
        assert (job.state, job.error) == (JobState.SUCCEEDED, None)
        rows: list[RoundRow] = self.federation.rounds(job_id)
        assert [row.number for row in rows] == list(range(1, rounds + 1))
        told = [event.detail or {} for event in self.check_history(job_id) if event.kind is EventKind.ROUND]
        assert [(each["round"], each["state"]) for each in told] == [(row.number, "RELEASED") for row in rows]
        assert self.settled(AGGREGATOR, job_id) == ["final"] * rounds
        for row in rows:
            assert row.contributors == ("a", AGGREGATOR, "b")
            for party in PARTIES:
                memory = self.federation.memory(party, job_id, row.number)
                assert parse_canonical(Signed.from_json(row.roots[party]).statement)["root"] == memory.batch["root"]
        for party in PARTIES:  # its own examples, and itself as a party of the federation
            assert self.settled(party, job_id) == ["final", "final"] * rounds
        return rows


class Life:
    """An aggregator from its start to its end."""

    def __init__(self, mother: subprocess.Popen[str], order: dict[str, Any]) -> None:
        assert mother.stdin is not None
        assert mother.stdout is not None
        self._answers = mother.stdout
        mother.stdin.write(json.dumps(order) + "\n")
        mother.stdin.flush()
        self.pid = int(self._answers.readline())

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None while it lives."""
        ready, _, _ = select.select([self._answers], [], [], timeout_s)
        return int(self._answers.readline()) if ready else None


@dataclass
class Lives:
    """Runs a job through one life of the aggregator after the other.

    Attributes:
        count: of lives that ended in a crash.
        noise: the aggregator's own batches as they lay on disk after each life, by round.
    """

    pair: Pair
    mother: subprocess.Popen[str]
    until: Callable[..., Any]
    count: int = 0
    noise: dict[int, set[str]] = field(default_factory=dict)

    def begin(self, crash: str) -> Life:
        """An aggregator that will die so."""
        return Life(self.mother, {"config": self.pair.config, "environ": self.pair.environ(CRASH=crash)})

    def live(self, crashes: Iterator[str], ask: Callable[[str], str], request_id: str = "") -> str:
        """Ask for something, and let each life of the aggregator end as the next of `crashes` says, until the job is
        at rest.

        Args:
            ask: (request_id) → job_id; called from a thread, to which an aggregator that is away means: wait.
            request_id: of a job that is there already.
        """
        pair, request_id = self.pair, request_id or str(uuid.uuid4())
        pair.leave()
        with ThreadPoolExecutor(1) as threads:
            asked: Future[str] = threads.submit(ask, request_id)
            while not self._done(request_id):
                self.count += self._end(self.begin(next(crashes)), request_id)
                self._look(request_id)
            pair.serve()
            job_id = asked.result()
        assert job_id == getattr(pair.requested(request_id), "job_id", None)
        return job_id

    def _done(self, request_id: str) -> bool:
        row = self.pair.requested(request_id)
        return row is not None and row.at_rest

    def _end(self, life: Life, request_id: str) -> bool:
        """Wait until it crashed, or has nothing more to do. Either way nobody of its family is left."""
        deadline = time.monotonic() + PATIENCE_S
        while (code := life.wait(LOOK_S)) is None:
            assert time.monotonic() < deadline, "a life without an end"
            if self._done(request_id):
                with contextlib.suppress(ProcessLookupError):  # its last commit was the one to die of
                    os.kill(life.pid, signal.SIGTERM)
                code = life.wait(PATIENCE_S)
                break
        assert code in (-signal.SIGKILL, 0)
        self.until(lambda: not self.pair.left_behind(), "the end of everything that the aggregator started")
        return bool(code)

    def _look(self, request_id: str) -> None:
        row = self.pair.requested(request_id)
        for each in self.pair.federation.rounds(row.job_id) if row else ():
            if AGGREGATOR in each.batches:
                self.noise.setdefault(each.number, set()).add(each.batches[AGGREGATOR].sha256)


@pytest.fixture(scope="session")
def _pair(make_federation: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    one = {"nice": 0, "size": 1, "min_size": 1, "max_size": 1, "health_interval_s": 3600.0}
    federation = make_federation(
        parties=PARTIES,
        party={"workers": one, "privacy": {"budgets": {"example": {"epsilon": 1000.0}}}},
        settings={AGGREGATOR: {"SOTTO__EVALUATION": "{}"}},  # nothing to load before it serves
    )
    federation.start(*PARTIES)
    job_id = federation.submit()
    federation.succeed(job_id)
    files = federation.client.fetch_artifact(job_id, tmp_path_factory.mktemp("artifact"))
    return Pair(federation, files["model.safetensors"].read_bytes(), job_id)


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Everybody is there, whatever the test before did to them."""
    _pair.federation.start(*PARTIES)
    return _pair


@pytest.fixture(scope="session")
def _mother(_pair: Pair) -> Iterator[subprocess.Popen[str]]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SOTTO__")}
    with _pair.federation.processes.log("lives").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", FAULTY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
            env=environ,
        )
    with process:
        yield process
        process.kill()


@pytest.fixture
def lives(pair: Pair, _mother: subprocess.Popen[str], wait_until: Callable[..., Any]) -> Lives:
    return Lives(pair, _mother, wait_until)
