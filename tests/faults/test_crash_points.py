"""The aggregator is killed at every boundary of an effect, life after life, while one job lives through it all.

A life gets one commit further than the one before it: it dies right after that commit, or right before the next one,
when what lies between the two has been done and not been written down.
"""

from __future__ import annotations

import itertools
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from src.jobs.computations import ExportSpec
from src.jobs.states import EventKind, JobState
from src.protocol.roster import AGGREGATOR

AFTER_EACH_COMMIT = "after 1"
BEFORE_EACH_SECOND_COMMIT = "before 2"
COMMITS_OF_A_ROUND = 18
"""Plan, noise, two roots, list, two uploads, product, budget, opening, two shares, release, settling; and with each
root and upload where the party's ledger is."""
COMMITS_BESIDE = 3
"""The job is stored, started, and has succeeded."""
PATIENCE_S = 200.0
"""Only a hang reaches it."""
LONG_ROUND_S = 3000.0
"""A round that dozens of restarts interrupt has no deadline to meet."""


def training(pair: Any, **fields: Any) -> Callable[[str], str]:
    return lambda request_id: str(pair.submit(request_id=request_id, round_timeout_s=LONG_ROUND_S, **fields))


def export(pair: Any) -> Callable[[str], str]:
    spec = ExportSpec(job_id=pair.trained)
    return lambda request_id: str(pair.federation.client.submit(spec, request_id).job_id)


def check_model(pair: Any, job_id: str, folder: Path) -> None:
    """A scientist gets the model of the last round, and can verify it."""
    files = pair.federation.client.fetch_artifact(job_id, folder)
    model = load(files["model.safetensors"].read_bytes())
    assert all(np.isfinite(each).all() for each in model.values())
    assert files["model.safetensors"].read_bytes() != pair.model


@pytest.mark.slow
def test_a_training_lives_through_a_crash_right_before_each_of_its_commits(
    lives: Any, pair: Any, tmp_path: Path
) -> None:
    job_id = lives.live(itertools.repeat(BEFORE_EACH_SECOND_COMMIT), training(pair))
    # The last life dies before it writes that the job has succeeded, or has nothing more to write.
    assert lives.count >= COMMITS_BESIDE + COMMITS_OF_A_ROUND - 1
    (row,) = pair.check_trained(job_id)
    assert lives.noise == {1: {row.batches[AGGREGATOR].sha256}}  # once stored, never drawn again
    check_model(pair, job_id, tmp_path)


@pytest.mark.slow
def test_a_training_of_two_rounds_lives_through_a_crash_right_after_each_of_its_commits(
    lives: Any, pair: Any, tmp_path: Path
) -> None:
    job_id = lives.live(itertools.repeat(AFTER_EACH_COMMIT), training(pair, rounds=2))
    assert lives.count >= COMMITS_BESIDE + 2 * COMMITS_OF_A_ROUND - 1
    first, second = pair.check_trained(job_id, rounds=2)
    assert lives.noise == {row.number: {row.batches[AGGREGATOR].sha256} for row in (first, second)}
    check_model(pair, job_id, tmp_path)


@pytest.mark.slow
def test_a_training_lives_through_crashes_around_every_blob_that_the_aggregator_itself_stores(
    lives: Any, pair: Any, tmp_path: Path
) -> None:
    # A life that dies at a blob has not always come further: every second one makes the commits that it would repeat.
    points = itertools.cycle(["before-blob 1", "after 3", "after-blob 1", "after 3"])
    job_id = lives.live(points, training(pair))
    assert lives.count >= 4
    pair.check_trained(job_id)
    check_model(pair, job_id, tmp_path)


@pytest.mark.parametrize(
    ("point", "least"),
    [
        (AFTER_EACH_COMMIT, 3),
        (BEFORE_EACH_SECOND_COMMIT, 2),
    ],
)
def test_an_export_lives_through_a_crash_at_each_of_its_commits_and_comes_out_alike(
    point: str, least: int, lives: Any, pair: Any, tmp_path: Path
) -> None:
    job_id = lives.live(itertools.repeat(point), export(pair))
    assert lives.count >= least
    kinds = [event.kind for event in pair.check_history(job_id)]
    assert [kinds.count(kind) for kind in (EventKind.STARTED, EventKind.SUCCEEDED)] == [1, 1]
    files = pair.federation.client.fetch_artifact(job_id, tmp_path)
    exported, model = np.load(files["model.npz"]), load(pair.model)
    assert set(exported) == set(model)
    assert all(np.array_equal(exported[name], model[name]) for name in model)


@pytest.mark.slow
def test_a_job_survives_aggregators_that_die_while_they_take_it_up_again(
    lives: Any, pair: Any, wait_until: Callable[..., Any]
) -> None:
    pair.serve(stall="export_model")
    job_id = export(pair)(str(uuid.uuid4()))
    wait_until(lambda: pair.job(job_id).state is JobState.RUNNING, "the job runs")
    pair.federation.processes.kill(AGGREGATOR)
    token = pair.token(job_id)
    for point, taken in (("start: before 1", 0), ("start: after 1", 1), ("start: before 1", 1), ("start: after 1", 2)):
        assert lives.begin(point).wait(PATIENCE_S) == -signal.SIGKILL
        assert pair.token(job_id) == token + taken  # each taking has a token of its own
    pair.serve()
    assert pair.federation.client.wait(job_id, PATIENCE_S).result.files
    kinds = [event.kind for event in pair.check_history(job_id)]
    assert kinds.count(EventKind.RESUMED) == 3


@pytest.mark.slow
def test_a_cancellation_lives_through_a_crash_right_after_each_of_its_commits(lives: Any, pair: Any) -> None:
    federation = pair.federation
    with federation.processes.hold("a", "b"):
        request_id = str(uuid.uuid4())
        job_id = training(pair)(request_id)
        federation.reached(job_id, lambda row: row.state == "TRAINING", "parties are awaited")
        lives.live(itertools.repeat(AFTER_EACH_COMMIT), lambda _: federation.client.cancel(job_id).job_id, request_id)
    assert lives.count >= 3  # it is wanted, the round is cancelled, the charge is given back; and it is done
    assert pair.job(job_id).state is JobState.CANCELLED
    assert pair.settled(AGGREGATOR, job_id) == ["returned"]
    kinds = [event.kind for event in pair.check_history(job_id)]
    ends = (EventKind.CANCELLING, EventKind.ROUND, EventKind.CANCELLED)
    assert [kinds.count(kind) for kind in ends] == [1, 1, 1]
