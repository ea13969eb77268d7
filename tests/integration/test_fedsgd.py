"""fedsgd in a federation of real processes: one job of three rounds, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from src.aggregator.planning import plan_of
from src.client import verify_manifest
from src.communication.generated import jobs_pb2
from src.encryption.scheme import Layout
from src.errors import InvalidInput, PolicyError
from src.privacy.accounting import epsilon
from src.privacy.events import SampledNoisySum
from src.protocol.roster import AGGREGATOR, load_roster

ROUNDS, TARGET_EPSILON = 3, 3.0
PARTIES = ("a", "b", "c")
STEP: dict[str, Any] = {"sampling_rate": 0.1, "learning_rate": 4.0, "epsilon": TARGET_EPSILON}


@pytest.fixture(scope="module")
def federation(make_federation: Callable[..., Any]) -> Iterator[Any]:
    """One of its own: what a row spends under fedsgd is finite up to about 33, whatever limit it has."""
    loud = {name: {"SOTTO__LOGGING__LEVEL": "DEBUG"} for name in (AGGREGATOR, *PARTIES)}
    made = make_federation(parties=PARTIES, settings=loud)
    yield made
    made.close()


@pytest.fixture(scope="module")
def job(federation: Any) -> Any:
    """The job at rest, once all parties had joined."""
    federation.start(*PARTIES)
    return federation.succeed(submit(federation, rounds=ROUNDS))


def submit(federation: Any, **fields: Any) -> str:
    """A job of fedsgd; what is not named is left to its defaults."""
    training = jobs_pb2.FederatedTraining(
        **{
            "task": "randhie",
            "strategy": "fedsgd",
            "spare_rounds": 0,
            "local_training": jobs_pb2.LocalTraining(**STEP),
            "round_timeout_s": 150.0,
            **fields,
        }
    )
    return str(federation.client.submit(training).job_id)


def test_a_round_is_a_step_and_the_job_ends_with_a_model_better_than_a_coin(federation: Any, job: Any) -> None:
    assert job.state == jobs_pb2.SUCCEEDED
    rows = federation.rounds(job.job_id)
    assert [row.contributors for row in rows] == [("a", AGGREGATOR, "b", "c")] * ROUNDS
    plans = [plan_of(row.plan) for row in rows]
    declared = {plan.gradient_sum.batch_cap for plan in plans if plan.gradient_sum}
    assert len(declared) == 1
    assert {plan.local.steps for plan in plans} == {1}
    assert 0.5 < job.result.metrics["auc"] < 1


def test_every_upload_has_the_size_that_the_plan_gives_it(federation: Any, job: Any) -> None:
    for row in federation.rounds(job.job_id):
        size = Layout.from_json(plan_of(row.plan).layout).body_bytes
        assert {batch.size for batch in row.batches.values()} == {size}


def test_a_row_is_charged_for_the_parties_noise_and_stays_within_the_jobs_target(federation: Any, job: Any) -> None:
    expected = job.result.epsilon_example
    assert 0.95 * TARGET_EPSILON < expected <= TARGET_EPSILON
    for name in PARTIES:
        mine = [entry for entry in federation.ledger(name) if entry.job_id == job.job_id and entry.event is not None]
        sampled = [entry.event for entry in mine if isinstance(entry.event, SampledNoisySum)]
        assert len(sampled) == ROUNDS
        assert epsilon(sampled, delta=1e-5) == pytest.approx(expected, rel=1e-9)
        assert len(mine) == 2 * ROUNDS  # and the party as a whole


def test_the_manifest_says_against_whom_and_what_it_rests_on(
    federation: Any, job: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = federation.client.fetch_artifact(job.job_id, tmp_path_factory.mktemp("artifact"))
    _, roster = load_roster(federation.kits / "scientist" / "roster.json")
    manifest = verify_manifest(files["manifest.json"], roster, job_id=job.job_id)
    assert manifest["strategy"] == "fedsgd"
    row = manifest["privacy"]["example"]
    release, charged, alone = (
        float(row[name]) for name in ("epsilon_release", "epsilon", "epsilon_if_all_others_collude")
    )
    assert release < charged < alone
    assert "share" in row["assumption"]
    assert row["steps"] == ROUNDS
    assert float(manifest["privacy"]["party"]["epsilon"]) > 100
    assert (job.result.example_assumption, job.result.epsilon_example_if_all_others_collude) == (
        row["assumption"],
        pytest.approx(alone),
    )
    assert any("under fedsgd" in line for line in manifest["statements"])


def test_neither_sizes_nor_losses_of_batches_are_told_or_logged(federation: Any, job: Any) -> None:
    told = json.dumps([row.to_json() for row in federation.rounds(job.job_id)])
    logs = "".join(federation.processes.log(name).read_text() for name in (AGGREGATOR, *PARTIES))
    for word in ("loss", "batch_size", "sampled", "chosen", "grad_norm"):
        assert word not in logs
        assert word not in told.replace("max_grad_norm", "")
    assert all(each.party_assumption and each.party_delta == 1e-5 for each in job.progress.rounds)
    # nor how long a round took, which a larger sample makes longer
    assert len(job.progress.rounds) == ROUNDS
    assert not any(each.HasField("seconds") for each in job.progress.rounds)
    told_of = [event.round for event in federation.client.watch(job.job_id) if event.HasField("round")]
    assert [each.HasField("seconds") for each in told_of] == [False] * ROUNDS


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"local_training": jobs_pb2.LocalTraining(**STEP, steps=2)}, InvalidInput, "a round is one step"),
        ({"party_privacy": jobs_pb2.PartyPrivacy(noise_by="aggregator")}, InvalidInput, "trusted server"),
        (
            {"party_privacy": jobs_pb2.PartyPrivacy(noise_by="aggregator"), "trusted_aggregator": True},
            PolicyError,
            "noise_by: both",
        ),
        ({"party_privacy": jobs_pb2.PartyPrivacy(clipping_norm=0.5)}, InvalidInput, "leave clipping_norm"),
        ({"strategy": "fedprox"}, InvalidInput, "strategy"),
        ({"strategy": "fedavg", "trusted_aggregator": True}, InvalidInput, "only fedsgd"),
    ],
)
def test_what_fedsgd_does_not_do_is_refused_at_submission(
    federation: Any, job: Any, fields: dict[str, Any], error: Callable[..., Exception], match: str
) -> None:
    with pytest.raises(error, match=match):  # type: ignore[call-overload]  # an exception's class
        submit(federation, **fields)
