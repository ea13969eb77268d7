"""A job is cancelled in every state that it can be in: it ends CANCELLED, nobody goes on computing, and the ledger says
what is true: given back as long as nobody was asked for a share, and final from then on.

A job is brought to a place by a worker that stands still when it is given the unit that comes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import psutil
import pytest

from src.jobs.computations import ExportSpec
from src.jobs.states import EventKind, JobState
from src.protocol.roster import AGGREGATOR

HOUR: Final = "[3600]"
ONE_AT_A_TIME: Final = "1"


class Stalled:
    """An aggregator, one of whose workers stands still when it is given the unit that a test says."""

    def __init__(self, pair: Any, until: Callable[..., Any]) -> None:
        self.pair = pair
        self.client = pair.federation.client
        self.until = until

    def at(self, unit: str) -> None:
        """From now on at this unit; at none where it is empty."""
        self.pair.stall_file.write_text(unit)

    def worker(self) -> psutil.Process:
        """The one that stands still, as soon as one does."""
        processes = self.pair.federation.processes
        found: psutil.Process = self.until(lambda: processes.stopped_worker(AGGREGATOR), "a worker stands still")
        return found

    def cancel(self, job_id: str) -> None:
        """Cancelled, and to its end; nothing in its name is computed any more."""
        self.client.cancel(job_id)
        self.pair.federation.end(job_id)
        assert self.pair.job(job_id).state is JobState.CANCELLED
        assert self.client.status().workers.busy == 0
        self.pair.check_history(job_id)

    def export(self) -> str:
        return str(self.client.submit(ExportSpec(job_id=self.pair.trained)).job_id)


def ended(process: psutil.Process) -> bool:
    """Computes nothing any more; that somebody has yet to reap it takes nothing from that."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def _stalled(_pair: Any, wait_until: Callable[..., Any]) -> Iterator[Stalled]:
    """With one place for a training and one for a computation, and an hour between two attempts."""
    _pair.federation.start("a", "b")
    _pair.serve(
        stall="",
        SOTTO__JOBS__RETRY_DELAYS_S=HOUR,
        SOTTO__JOBS__MAX_TRAININGS_RUNNING=ONE_AT_A_TIME,
        SOTTO__JOBS__MAX_COMPUTATIONS_RUNNING=ONE_AT_A_TIME,
    )
    yield Stalled(_pair, wait_until)
    _pair.stall_file.unlink()
    _pair.leave()


@pytest.fixture
def stalled(_stalled: Stalled, wait_until: Callable[..., Any]) -> Stalled:
    """With every worker at rest."""
    _stalled.at("")
    wait_until(lambda: _stalled.client.status().workers.busy == 0, "all workers are idle", every_s=0.25)
    return _stalled


@pytest.mark.parametrize(
    ("state", "unit", "ledger"),
    [
        ("PLANNED", "make_noise", "returned"),
        ("COLLECTING", "check_body", "returned"),
        ("AGGREGATING", "fold", "returned"),
        ("OPENING", "open_aggregate", "final"),
    ],
)
def test_a_training_cancelled_while_a_worker_computes_for_it(
    state: str, unit: str, ledger: str, stalled: Stalled
) -> None:
    pair = stalled.pair
    stalled.at(unit)
    job_id = pair.submit()
    worker = stalled.worker()
    (row,) = pair.federation.rounds(job_id)
    assert (row.state, row.spent) == (state, state == "OPENING")
    assert pair.settled(AGGREGATOR, job_id) == ["final" if row.spent else "open"]
    stalled.cancel(job_id)
    assert ended(worker)
    (row,) = pair.federation.rounds(job_id)
    assert (row.state, row.settled, row.result) == ("CANCELLED", True, None)
    assert pair.settled(AGGREGATOR, job_id) == [ledger]


@pytest.mark.parametrize(("state", "ledger"), [("TRAINING", "returned"), ("OPENING", "final")])
def test_a_training_cancelled_while_it_waits_for_parties(state: str, ledger: str, stalled: Stalled) -> None:
    pair = stalled.pair
    federation, processes = pair.federation, pair.federation.processes
    if state == "TRAINING":
        with processes.hold("a", "b"):
            job_id = pair.submit()
            federation.reached(job_id, lambda row: row.state == state, state)
            stalled.cancel(job_id)
    else:
        stalled.at("fold")
        job_id = pair.submit()
        worker = stalled.worker()
        with processes.hold("a", "b"):
            worker.resume()
            federation.reached(job_id, lambda row: set(row.asked) == {"a", "b"}, "shares are asked for")
            stalled.cancel(job_id)
    assert pair.settled(AGGREGATOR, job_id) == [ledger]
    (row,) = federation.rounds(job_id)
    assert (row.state, row.settled, row.result) == ("CANCELLED", True, None)


def test_a_training_cancelled_between_two_attempts(stalled: Stalled) -> None:
    pair = stalled.pair
    stalled.at("fold")
    job_id = pair.submit()
    stalled.worker().kill()  # as the kernel does when memory runs out
    stalled.until(lambda: pair.job(job_id).state is JobState.RETRYING, "an attempt that may be repeated fails")
    error = pair.job(job_id).error
    assert (error.reason, error.stage) == ("WORKER_FAILED", "round 1: multiply the contributions")
    stalled.cancel(job_id)
    assert pair.settled(AGGREGATOR, job_id) == ["returned"]


def test_computations_cancelled_while_they_run_wait_for_their_turn_and_between_two_attempts(stalled: Stalled) -> None:
    pair = stalled.pair
    stalled.at("export_model")
    running, waiting = stalled.export(), stalled.export()
    worker = stalled.worker()
    assert (pair.job(running).state, pair.job(waiting).state) == (JobState.RUNNING, JobState.PENDING)
    assert stalled.client.cancel(waiting) is not None
    assert [event.kind for event in pair.check_history(waiting)] == [EventKind.SUBMITTED, EventKind.CANCELLED]
    stalled.cancel(running)
    assert ended(worker)
    retrying = stalled.export()
    stalled.worker().kill()
    stalled.until(lambda: pair.job(retrying).state is JobState.RETRYING, "an attempt fails")
    stalled.cancel(retrying)


def test_a_training_cancelled_while_it_waits_for_its_turn_was_never_charged(stalled: Stalled) -> None:
    pair = stalled.pair
    stalled.at("make_noise")
    running = pair.submit()
    stalled.worker()
    waiting = pair.submit()
    assert pair.job(waiting).state is JobState.PENDING
    stalled.client.cancel(waiting)
    assert pair.job(waiting).state is JobState.CANCELLED
    assert pair.federation.charges(AGGREGATOR, waiting) == pair.federation.rounds(waiting) == []
    stalled.cancel(running)
