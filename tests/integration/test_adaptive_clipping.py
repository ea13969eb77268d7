"""Adaptive clipping in a federation of twenty real parties: the norm moves from round to round, at no extra cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.aggregator.planning import plan_of
from src.client import verify_manifest
from src.communication.generated import jobs_pb2
from src.errors import PlanError
from src.privacy.accounting import epsilon
from src.privacy.events import NoisySum
from src.protocol.roster import load_roster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PARTIES = tuple(f"p{index:02}" for index in range(20))
ROUNDS, MULTIPLIER, START = 3, 0.8, 0.01


@pytest.fixture(scope="module")
def twenty(make_federation: Callable[..., Any]) -> Any:
    federation = make_federation(parties=PARTIES)
    federation.start_aggregator()
    for first in range(0, len(PARTIES), 4):  # a few at a time: each imports torch
        federation.start(*PARTIES[first : first + 4])
    return federation


def submit(federation: Any, **fields: Any) -> str:
    training = jobs_pb2.FederatedTraining(
        task="randhie",
        rounds=ROUNDS,
        spare_rounds=0,
        local_training=jobs_pb2.LocalTraining(steps=3, sampling_rate=0.05, learning_rate=1.0),
        party_privacy=jobs_pb2.PartyPrivacy(
            clipping_norm=START, noise_multiplier=MULTIPLIER, adaptive_clipping=jobs_pb2.AdaptiveClipping()
        ),
        round_timeout_s=300.0,
        **fields,
    )
    return str(federation.client.submit(training).job_id)


def test_a_norm_that_is_far_too_small_grows_and_a_party_pays_what_it_pays_without(twenty: Any, tmp_path: Path) -> None:
    """Every update is longer than 0.01: each round the norm grows by e^0.1, up to the noise on the count."""
    job = twenty.succeed(submit(twenty))
    rows = twenty.rounds(job.job_id)
    norms = [float(plan_of(row.plan).clipping_norm) for row in rows]
    assert norms[0] == START
    assert (
        norms[0] < norms[1] < norms[2] < START * 1.4
    )  # e^0.2 is 1.22; the noise on two counts has a tenth of the rest
    cost = NoisySum(noise_multiplier=MULTIPLIER, rounds=ROUNDS, dimension=plan_of(rows[0].plan).dimension)
    assert job.result.epsilon_party == pytest.approx(epsilon([cost], delta=1e-5), rel=1e-6)
    files = twenty.client.fetch_artifact(job.job_id, tmp_path)
    _, roster = load_roster(twenty.kits / "scientist" / "roster.json")
    statement = verify_manifest(files["manifest.json"], roster, job_id=job.job_id)
    assert [float(each["clipping_norm"]) for each in statement["rounds"]] == norms
    assert float(statement["privacy"]["party"]["adaptive_clipping"]["next_clipping_norm"]) > norms[2]


def test_nineteen_of_them_are_too_few(twenty: Any) -> None:
    with pytest.raises(PlanError, match="quorum of at least 20"):
        submit(twenty, parties=PARTIES[:19])
