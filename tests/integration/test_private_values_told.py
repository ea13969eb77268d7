"""Of planted rows nothing is found in what a federation of real processes logs, reports, records or shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from src import cli
from src.communication.generated import jobs_pb2
from src.party.rounds import NO_CONTRIBUTION
from src.privacy.ledger import to_line
from src.protocol.roster import AGGREGATOR

from .planted.search import ATTEMPTS, Planted

PARTIES = ("a", "b", "c")
FAILURES = {"fedavg": {"unreadable": "index"}, "fedsgd": {"unreadable": "leave"}}
"""What happens to b when its rows are read, by the job's strategy."""

RESOLUTION_BITS = 24
"""So fine that an integer of an update has enough digits to be known again."""


def submit(federation: Any, strategy: str) -> str:
    """A job of one round, of the two parties that can train."""
    local = jobs_pb2.LocalTraining(sampling_rate=0.06, learning_rate=1.0, epsilon=4.0)
    if strategy == "fedavg":
        local.steps = 2
    training = jobs_pb2.FederatedTraining(
        task="planted",
        strategy=strategy,
        rounds=1,
        spare_rounds=0,
        quorum=2,
        local_training=local,
        encryption=jobs_pb2.Encryption(resolution_bits=RESOLUTION_BITS),
        round_timeout_s=150.0,
    )
    training.task_options.update(FAILURES[strategy])
    return str(federation.client.submit(training).job_id)


def told(federation: Any, strategy: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """All that such a job says to anybody, by where it says so."""
    began = {name: federation.processes.log(name).stat().st_size for name in (AGGREGATOR, *PARTIES)}
    job = federation.succeed(submit(federation, strategy))
    (row,) = federation.rounds(job.job_id)
    assert row.contributors == ("a", AGGREGATOR, "c")
    assert (row.failures["b"].reason, row.failures["b"].message) == ("WORKER_FAILED", NO_CONTRIBUTION)
    said = {name: federation.processes.log(name).read_bytes()[at:].decode() for name, at in began.items()}
    assert NO_CONTRIBUTION in said["b"]
    ledgers = {name: [to_line(entry) for entry in federation.ledger(name)] for name in said}
    files = federation.client.fetch_artifact(job.job_id, folder)
    events = list(federation.client.watch(job.job_id))
    capfd.readouterr()
    scientist = ("--config", str(federation.kits / "scientist" / "client.yaml"))
    for command in (["show", job.job_id], ["show", job.job_id, "--json"], ["history", job.job_id], ["list"]):
        assert cli.run(["jobs", *command, *scientist]) == 0
    assert cli.run(["budget", "history", "--config", str(federation.kits / "party-b" / "party.yaml")]) == 0
    shown = capfd.readouterr()
    assert job.job_id in shown.out
    return {
        **said,
        "events": "\n".join(map(str, [job, federation.client.status(), *events])),
        "ledgers": json.dumps(ledgers),
        "manifest": files["manifest.json"].read_text(),
        "rows": json.dumps(row.to_json()),
        "shown": shown.out + shown.err,
    }


@pytest.mark.parametrize("strategy", FAILURES)
def test_a_federation_tells_nothing_of_its_rows_and_a_party_that_fails_says_only_that(
    strategy: str,
    federation: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    federation.start(*PARTIES)
    monkeypatch.setenv("SOTTO__SERVER__ADDRESS", federation.address)
    since = 0
    for attempt in range(ATTEMPTS):
        texts = told(federation, strategy, tmp_path / str(attempt), capfd)
        planted = Planted.read(federation.notebook, since=since)
        assert {"rows", "vector", "values", "count"} <= planted.kinds
        if not (found := {what: hits for what, text in texts.items() if (hits := planted.found(text))}):
            break
        since = federation.notebook.stat().st_size
    assert found == {}
