"""What a job that does not come to its end gives, over the wire, every signature checked: real roles, real rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import cli
from src.client import Evaluation, Export, FederatedTraining, Job, JobState
from src.communication.generated import jobs_pb2
from src.errors import AbandonedError, InvalidInput, NotFoundError
from src.jobs.spec import FederatedTrainingSpec, LocalTraining, PartyPrivacy, spec_to_proto

PARTIES = ("a", "b", "c")
PLANNED = 60


@pytest.fixture(scope="module")
def stopped(federation: Any, wait_until: Callable[..., Any]) -> Any:
    """Of sixty rounds at least three were released when the job was cancelled; what was seen of it meanwhile."""
    federation.start(*PARTIES)
    job_id = federation.submit(rounds=PLANNED, epsilon=3.0, keep="every:1")
    client = federation.client
    wait_until(lambda: client.get(job_id).progress.rounds_released >= 2, "two rounds are released")
    running = client.result(job_id, round=2)
    wait_until(lambda: client.get(job_id).progress.rounds_released >= 3, "one more is released")
    client.cancel(job_id)
    return federation, client.wait(job_id, 60), running


@pytest.fixture
def sotto(stopped: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`sotto jobs …` of the scientist: exit code, stdout, stderr."""
    federation, _, _ = stopped
    folder = federation.kits / "scientist"
    content = yaml.safe_load((folder / "client.yaml").read_text())
    content["server"]["address"] = federation.address
    (folder / "here.yaml").write_text(yaml.safe_dump(content))

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["jobs", *words, "--config", str(folder / "here.yaml")])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def manifest_of(files: dict[str, Path]) -> dict[str, Any]:
    readable: dict[str, Any] = json.loads(files["manifest.json"].read_bytes())["readable"]
    return readable


@pytest.mark.slow
def test_every_released_round_of_a_cancelled_job_is_fetched_and_verified(stopped: Any, tmp_path: Path) -> None:
    federation, job, running = stopped
    client, job_id = federation.client, job.job_id
    assert job.state == jobs_pb2.CANCELLED
    assert list(job.kept_rounds) == list(range(1, job.progress.rounds_released + 1))
    assert (running.round, running.rounds_planned) == (2, PLANNED)
    with pytest.raises(AbandonedError):
        client.result(job_id)
    files = {number: client.fetch_artifact(job_id, tmp_path / str(number), round=number) for number in (1, 2)}
    one, two = (manifest_of(files[number]) for number in (1, 2))
    assert one["privacy"] == two["privacy"]
    assert one["model"]["sha256"] != two["model"]["sha256"]
    assert [each["of_round"]["round"] for each in (one, two)] == [1, 2]
    assert float(two["privacy"]["example"]["epsilon"]) >= running.epsilon_example
    assert float(one["privacy"]["example"]["epsilon"]) < 3.0  # not all rounds were begun
    scores = {each.round: each.metrics["auc"] for each in job.progress.rounds if each.state == "RELEASED"}
    best = client.result(job_id, best="auc")
    assert scores[best.round] == max(scores.values()) == best.metrics["auc"]
    assert client.result(job_id, round="last").round == max(scores)
    for wrong, error in (({"round": 59}, NotFoundError), ({"round": -1}, InvalidInput), ({"best": "n"}, InvalidInput)):
        with pytest.raises(error):
            client.result(job_id, **wrong)


@pytest.mark.slow
def test_a_round_is_downloaded_by_a_stub_measured_and_exported(stopped: Any, tmp_path: Path) -> None:
    federation, job, running = stopped
    client = federation.client
    request = jobs_pb2.DownloadArtifactRequest(job_id=job.job_id, file="model.safetensors", round="2")

    async def download() -> bytes:
        return b"".join([chunk.data async for chunk in client._client._stub.DownloadArtifact(request)])

    model = client._run(download())
    assert len(model) == running.files[0].bytes
    exported = federation.succeed(client.submit(Export(job_id=job.job_id, round="2")).job_id)
    manifest = manifest_of(client.fetch_artifact(exported.job_id, tmp_path / "exported"))
    assert manifest["exported_from"]["model_sha256"] == running.files[0].sha256.hex()
    assert manifest["of_round"]["round"] == exported.result.round == 2
    measured = federation.succeed(client.submit(Evaluation(job_id=job.job_id, round="2")).job_id)
    assert measured.result.metrics["auc"] == running.metrics["auc"]


@pytest.mark.slow
def test_a_job_goes_on_from_a_released_round_and_parties_take_part(stopped: Any, tmp_path: Path) -> None:
    federation, job, running = stopped
    client = federation.client
    source = client.continued_from(job.job_id, round=2)
    assert source.model_sha256 == running.files[0].sha256.hex()
    training = spec_to_proto(
        FederatedTrainingSpec(
            task="randhie",
            rounds=1,
            spare_rounds=0,
            local_training=LocalTraining(steps=5, sampling_rate=0.02, learning_rate=1.5, epsilon=3.0),
            party_privacy=PartyPrivacy(clipping_norm=0.5, noise_multiplier=0.2),
        )
    )
    training.continue_from.CopyFrom(source)
    going_on = federation.succeed(client.submit(training).job_id)
    manifest = manifest_of(client.fetch_artifact(going_on.job_id, tmp_path))
    (before,) = manifest["continued_from"]
    assert (before["job_id"], before["round"]) == (job.job_id, 2)
    assert going_on.result.continued_from[0].epsilon_example > 0
    assert federation.rounds(going_on.job_id)[0].model_sha256 == source.model_sha256
    wrong = FederatedTraining()
    wrong.CopyFrom(training)
    wrong.continue_from.model_sha256 = "ab" * 32
    with pytest.raises(InvalidInput, match="has SHA-256"):
        client.submit(wrong)


@pytest.mark.slow
def test_a_job_that_is_stopped_and_kept_succeeds_with_what_it_has(
    stopped: Any, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    federation, _, _ = stopped
    client = federation.client
    job_id = federation.submit(rounds=PLANNED, epsilon=3.0)
    wait_until(lambda: client.get(job_id).progress.rounds_released >= 1, "a round is released")
    client.cancel(job_id, keep=True)
    job: Job = federation.succeed(job_id)
    assert JobState.Name(job.state) == "SUCCEEDED"
    assert job.result.round == job.progress.rounds_released == job.result.rounds_released
    files = client.fetch_artifact(job_id, tmp_path)
    assert manifest_of(files)["of_round"]["rounds_planned"] == PLANNED


@pytest.mark.slow
def test_the_command_line_does_all_of_it(
    stopped: Any, sotto: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    federation, job, _ = stopped
    released = job.progress.rounds_released
    code, out, err = sotto("result", job.job_id, "--out", str(tmp_path / "last"))
    assert code == 0
    assert f"the model of round {released}; {released} of {PLANNED} rounds were released" in out
    assert "is CANCELLED: this is what it had released" in err
    assert manifest_of({"manifest.json": tmp_path / "last" / "manifest.json"})["of_round"]["round"] == released
    code, out, _ = sotto("result", job.job_id, "--round", "2", "--out", str(tmp_path / "2"), "--json")
    assert (code, json.loads(out)["round"], json.loads(out)["signature_checked"]) == (0, 2, True)
    assert sotto("result", job.job_id, "--best", "auc")[0] == 0
    assert f"--round {released}" in sotto("show", job.job_id)[1]
    for wrong in (("--round", "59"), ("--round", "-1"), ("--best", "epsilon_party"), ("--round", "1", "--best", "auc")):
        code, out, err = sotto("result", job.job_id, *wrong)
        assert code != 0
        assert not out
        assert "Traceback" not in err
    options = ("--task", "randhie", "--rounds", "1", "--spare-rounds", "0", "--epsilon", "3", "--keep", "best:auc")
    code, out, err = sotto("submit", *options, "--continue", f"{job.job_id}:2")
    assert code == 0, err
    assert f"from round 2 of job {job.job_id}, whose cost comes on top" in " ".join(err.split())
    federation.succeed(out.split()[0])
    assert "comes on top" in " ".join(sotto("result", out.split()[0])[1].split())
    assert sotto("cancel", out.split()[0], "--keep")[0] == 0  # at rest: it stays as it is
