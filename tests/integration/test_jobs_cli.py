"""`sotto jobs …` against a real server and a real job service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from src import cli


class CommandLine:
    """`sotto jobs …` in this process, with a client.yaml of its own."""

    def __init__(self, house: Any, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.config = house.write_config(directory)
        self._capture = capture

    async def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capture.readouterr()
        words = ["jobs", command, *arguments, "--config", str(self.config)]
        code = await asyncio.to_thread(cli.run, words)
        out, err = self._capture.readouterr()
        return code, out, err


@pytest.fixture
def sotto(job_house: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(job_house, tmp_path, capsys)


async def test_a_scientist_needs_only_the_command_line(job_house: Any, sotto: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "display_name: from a file\nfederated_training: {task: randhie, rounds: 9, local_training: {delta: 1e-6}}\n"
    )
    code, out, _ = await sotto("submit", str(tmp_path / "job.yaml"), "--rounds", "3", "--epsilon", "2")
    job_id = out.strip()
    assert code == 0
    job_house.permit(3)
    code, out, _ = await sotto("watch", job_id)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["1", "2", "3", "4", "5", "6"]
    assert "round 2 released (3 updates, auc 0.5200, party-level ε 20)" in out
    code, out, _ = await sotto("wait", job_id)
    assert (code, out.splitlines()[0]) == (0, f"job {job_id} succeeded")
    code, out, _ = await sotto("show", job_id)
    assert code == 0
    assert [word for word in ("from a file", "∞", "0.5300", "scientist/ann") if word not in out] == []
    code, out, _ = await sotto("list")
    assert job_id in out
    code, out, _ = await sotto("result", job_id, "--out", str(tmp_path / "out"))
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == job_house.model


async def test_with_json_every_command_prints_json(job_house: Any, sotto: CommandLine, tmp_path: Path) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "1", "--parties", "a, b", "--json")
    job = json.loads(out)
    assert job["federated_training"]["parties"] == ["a", "b"]
    job_house.permit(1)
    _, out, _ = await sotto("watch", job["job_id"], "--json")
    assert [json.loads(line)["sequence"] for line in out.splitlines()] == [1, 2, 3, 4]
    for command in ("wait", "show", "cancel"):
        _, out, _ = await sotto(command, job["job_id"], "--json")
        shown = json.loads(out)
        assert (shown["state"], shown["result"]["epsilon_party_against_aggregator"]) == ("SUCCEEDED", "inf")
        assert shown["progress"]["rounds"][0]["parties"][0]["bytes_up"] == 1000
    _, out, _ = await sotto("list", "--json", "--state", "succeeded")
    assert [each["job_id"] for each in json.loads(out)] == [job["job_id"]]
    _, out, _ = await sotto("result", job["job_id"], "--json", "--out", str(tmp_path / "out"))
    assert set(json.loads(out)["paths"]) == {"model.safetensors", "manifest.json"}
    again = {"federated_training": job["federated_training"]}
    (tmp_path / "again.json").write_text(json.dumps(again))
    _, out, _ = await sotto("submit", str(tmp_path / "again.json"), "--json")
    assert json.loads(out)["spec_digest"] == job["spec_digest"]


async def test_exit_codes_are_the_catalogues(job_house: Any, sotto: CommandLine, tmp_path: Path) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--seed", "13")
    failing = out.strip()
    code, _, err = await sotto("result", failing)
    assert (code, "no result yet" in err) == (8, True)
    assert (await sotto("wait", failing, "--timeout", "0.01"))[0] == 11
    job_house.permit(1)
    code, _, err = await sotto("wait", failing)
    assert (code, "party a refuses [BUDGET_EXCEEDED]" in err) == (13, True)
    code, out, _ = await sotto("show", failing)
    assert (code, "BUDGET_EXCEEDED in round 1: party a refuses (parties: a)" in out) == (0, True)
    assert (await sotto("show", "none"))[0] == 7
    assert (await sotto("submit", "--task", "randhie", "--epsilon", "101"))[0] == 6
    code, _, err = await sotto("submit", "--task", "randhie", "--epsilon", "-1")
    assert (code, "federated_training.local_training.epsilon" in err) == (4, True)
    assert (await sotto("submit"))[0] == 2
    assert (await sotto("submit", str(tmp_path / "none.yaml")))[0] == 3
    _, out, _ = await sotto("submit", "--task", "randhie")
    code, out, _ = await sotto("cancel", out.strip())
    assert (code, out.split()[1] in {"CANCELLED", "CANCELLING"}) == (0, True)


async def test_an_aggregator_that_is_not_there_is_told_soon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.cli.jobs.IMPATIENT_S", 0.0)
    config = tmp_path / "client.yaml"
    config.write_text("version: 1\nfederation: demo\nserver: {address: '127.0.0.1:1', insecure: true}\n")
    assert await asyncio.to_thread(cli.run, ["jobs", "list", "--config", str(config)]) == 10
    assert "127.0.0.1:1 cannot be reached" in capsys.readouterr().err
