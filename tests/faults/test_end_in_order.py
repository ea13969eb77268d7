"""SIGTERM, wherever a job is: the aggregator ends with 0 and in time, leaves nobody behind; the next one goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import psutil
import pytest

from src.jobs.computations import ExportSpec
from src.jobs.states import EventKind, JobState
from src.protocol.roster import AGGREGATOR

SHUTDOWN_S: Final = 0.5
PATIENCE_S: Final = 200.0
"""Only a hang reaches it."""
SLACK_S: Final = 60.0
"""For ending calls, workers and database: a second or two, on a machine that has nothing else to do."""


@pytest.fixture
def stopped_worker(_pair: Any, wait_until: Callable[..., Any]) -> Iterator[Callable[[], psutil.Process]]:
    """The worker that stands still, once one does."""

    processes = _pair.federation.processes
    yield lambda: wait_until(lambda: processes.stopped_worker(AGGREGATOR), "a worker stands still")
    _pair.stall_file.unlink(missing_ok=True)


def stop(pair: Any) -> None:
    """SIGTERM, and all that is promised of it."""
    began = time.monotonic()
    assert pair.federation.processes.stop(AGGREGATOR) == 0
    assert time.monotonic() - began < SHUTDOWN_S + SLACK_S
    assert pair.left_behind() == []


def test_a_round_that_does_not_end_in_time_is_left_and_done_by_the_next_process(
    pair: Any, stopped_worker: Callable[[], psutil.Process]
) -> None:
    pair.serve(stall="open_aggregate", SOTTO__SERVER__SHUTDOWN_S=str(SHUTDOWN_S))
    job_id = pair.submit()
    stopped_worker()
    stop(pair)
    left = pair.job(job_id)
    assert (left.state, left.attempt, left.error) == (JobState.RUNNING, 1, None)
    pair.serve()
    pair.federation.succeed(job_id)
    pair.check_trained(job_id)


def test_computations_that_run_and_that_wait_are_done_by_the_next_process(
    pair: Any, stopped_worker: Callable[[], psutil.Process]
) -> None:
    one = {"SOTTO__JOBS__MAX_COMPUTATIONS_RUNNING": "1", "SOTTO__SERVER__SHUTDOWN_S": str(SHUTDOWN_S)}
    pair.serve(stall="export_model", **one)
    client, spec = pair.federation.client, ExportSpec(job_id=pair.trained)
    running, waiting = (client.submit(spec).job_id for _ in range(2))
    stopped_worker()
    stop(pair)
    assert (pair.job(running).state, pair.job(waiting).state) == (JobState.RUNNING, JobState.PENDING)
    pair.serve()
    for job_id in (running, waiting):
        assert client.wait(job_id, PATIENCE_S).result.files
    kinds = [event.kind for event in pair.check_history(running)]
    assert kinds == [EventKind.SUBMITTED, EventKind.STARTED, EventKind.RESUMED, EventKind.SUCCEEDED]
    assert EventKind.RESUMED not in [event.kind for event in pair.check_history(waiting)]


def test_what_ends_in_time_is_written_down_before_the_process_ends(
    pair: Any, stopped_worker: Callable[[], psutil.Process], wait_until: Callable[..., Any]
) -> None:
    pair.serve(stall="make_noise", SOTTO__SERVER__SHUTDOWN_S="100")
    job_id = pair.submit()
    worker = stopped_worker()
    process = pair.federation.processes.running.pop(AGGREGATOR)
    process.terminate()
    wait_until(lambda: not accepts(pair), "it takes nothing more")
    worker.resume()
    assert process.wait(SLACK_S) == 0
    (row,) = pair.federation.rounds(job_id)
    assert AGGREGATOR in row.batches  # the noise that was being drawn is stored, and nothing was begun after it
    assert row.frozen_list is None
    pair.serve()
    pair.federation.succeed(job_id)
    (after,) = pair.check_trained(job_id)
    assert after.batches[AGGREGATOR] == row.batches[AGGREGATOR]


def accepts(pair: Any) -> bool:
    """Whether the aggregator still takes jobs."""
    return not pair.federation.client.status().stopping
