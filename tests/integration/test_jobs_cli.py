"""`sotto jobs …` against a real server and a real job service."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src import cli
from src.aggregator.servicers import jobs as jobs_servicer
from src.cli.live import follow
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_server import GrpcServer
from tests.integration.conftest import DESK

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "alembic",
    "dp_accounting",
    "gmpy2",
    "jsonschema",
    "numpy",
    "psycopg",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "sqlalchemy",
    "torch",
}


class CommandLine:
    """`sotto jobs …` in this process, with a client.yaml of its own."""

    def __init__(self, house: Any, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.config = house.write_config(directory)
        self._capture = capture

    async def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capture.readouterr()
        words = [*(["jobs", command] if command != "status" else ["status"]), *arguments, "--config", str(self.config)]
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
    code, out, err = await sotto("submit", str(tmp_path / "job.yaml"), "--rounds", "3", "--epsilon", "2")
    job_id = out.strip()
    assert code == 0
    price = "ε ≤ 2 a row at δ = 1e-06: with all 5 rounds, spare ones included"
    assert f"asked: {price}" in " ".join(err.split())
    job_house.permit(3)
    code, out, _ = await sotto("watch", job_id)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["1", "2", "3", "4", "5", "6"]
    assert "round 2 released (3 updates, auc 0.5200, ε a row spent/left 0.5/3.5, party-level ε 20)" in out
    code, out, _ = await sotto("wait", job_id)
    assert (code, out.splitlines()[0]) == (0, f"job {job_id} succeeded")
    code, out, _ = await sotto("show", job_id)
    assert code == 0
    assert [word for word in ("from a file", "∞", "0.5300", "scientist/ann", price) if word not in out] == []
    code, out, _ = await sotto("list")
    assert job_id in out
    code, out, _ = await sotto("result", job_id, "--out", str(tmp_path / "out"))
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == job_house.model
    assert "signed by the aggregator, checked with" in out


async def test_what_is_said_of_a_job_s_parties_is_warned_of_and_stays_in_its_history(
    job_house: Any, sotto: CommandLine
) -> None:
    """So that whatever client submits it can see it: in the job's first event."""
    _, _, err = await sotto("submit", "--task", "randhie", "--rounds", "1")
    assert "warning" not in err
    job_house.coordinator.said = ("not connected when it was submitted: b, c", "a has no ε left for a row")
    code, out, err = await sotto("submit", "--task", "randhie", "--rounds", "1")
    said = "not connected when it was submitted: b, c; a has no ε left for a row"
    assert (code, f"warning: {said}" in " ".join(err.split())) == (0, True)
    job_house.permit(2)
    code, out, _ = await sotto("watch", out.strip())
    assert f"submitted; {said}" in out.splitlines()[0]


async def test_a_trusted_aggregator_is_one_option(job_house: Any, sotto: CommandLine) -> None:
    """Which says who draws the noise, too."""
    code, out, err = await sotto(
        "submit", "--task", "randhie", "--strategy", "fedsgd", "--trusted-aggregator", "--json"
    )
    assert (code, err) == (0, "")
    assert '"noise_by": "aggregator"' in out


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
    for form in ((), ("--json",), ("--after", "2")):
        code, out, err = await sotto("watch", failing, *form)
        assert (code, "party a refuses [BUDGET_EXCEEDED]" in err, "FAILED" in out) == (13, True, True)
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


async def test_an_evaluation_and_an_export_are_submitted_awaited_and_fetched(
    job_house: Any, sotto: CommandLine, tmp_path: Path
) -> None:
    job_house.permit(2)
    code, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "1", "--wait")
    trained = out.split()[0]
    assert (code, f"job {trained} succeeded" in out) == (0, True)
    code, out, err = await sotto("export", trained, "--priority", "high", "--out", str(tmp_path / "out"), "--wait")
    assert code == 0, err
    assert (tmp_path / "out" / "model.npz").read_bytes() == job_house.exported
    assert f"wrote {tmp_path / 'out' / 'model.npz'}" in out
    job_house.permit(2)
    code, out, _ = await sotto("evaluate", trained, "--json", "--wait", "--name", "again")
    shown = json.loads(out)
    assert (code, shown["state"], shown["kind"], shown["display_name"]) == (0, "SUCCEEDED", "evaluation", "again")
    assert shown["evaluation"]["job_id"] == trained
    (tmp_path / "model").write_bytes(b"weights")
    code, out, _ = await sotto("evaluate", "--model", str(tmp_path / "model"), "--task", "randhie", "--timeout-s", "60")
    evaluated = out.strip()
    _, out, _ = await sotto("wait", evaluated, "--json")
    shown = json.loads(out)
    assert (code, shown["evaluation"]["task"], shown["timeout_s"]) == (0, "randhie", 60.0)
    _, out, _ = await sotto("list", "--filter", 'kind = "evaluation" OR kind = "export"', "--order-by", "kind desc")
    assert [line.split()[3] for line in out.splitlines()[1:]] == ["export", "evaluation", "evaluation"]
    _, out, _ = await sotto("list", "--filter", 'kind = "export"', "--state", "pending", "--json")
    assert json.loads(out) == []


async def test_a_deleted_job_keeps_its_record(job_house: Any, sotto: CommandLine, tmp_path: Path) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "1", "--request-id", "once")
    job_id = out.strip()
    assert (await sotto("delete", job_id))[0] == 8
    job_house.permit(1)
    await sotto("wait", job_id)
    code, out, _ = await sotto("delete", job_id)
    assert (code, out) == (0, f"{job_id} SUCCEEDED (deleted)\n")
    assert job_id not in (await sotto("list"))[1]
    assert job_id in (await sotto("list", "--all"))[1]
    code, out, _ = await sotto("history", job_id)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["1", "2", "3", "4", "5"]
    assert "[scientist/ann]" in out.splitlines()[-1]
    _, out, _ = await sotto("history", job_id, "--after", "3", "--json")
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["succeeded", "deleted"]
    assert (await sotto("result", job_id, "--out", str(tmp_path / "out")))[0] == 7
    _, out, _ = await sotto("delete", job_id, "--json")
    assert json.loads(out)["delete_time"]


async def test_a_job_that_is_tried_again_shows_it(job_house: Any, sotto: CommandLine) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--seed", "17", "--rounds", "1", "--priority", "low")
    job_id = out.strip()
    job_house.permit(1)
    async with job_house.client() as client:
        async for event in client.watch(job_id):
            if event.kind == "retrying":
                break
        _, out, _ = await sotto("show", job_id)
        assert [word for word in ("RETRYING", "1 of 4; the next one", "low", "WORKER_FAILED") if word not in out] == []
        code, _, err = await sotto("result", job_id)
        assert (code, "RETRYING" in err) == (8, True)
        job_house.permit(2)
        code, out, _ = await sotto("watch", job_id, "--after", "3")
        assert (code, out.splitlines()[-1].split()[4]) == (0, "SUCCEEDED")


async def test_watching_a_job_that_is_cancelled_ends_as_waiting_for_it(
    job_house: Any, sotto: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe and on a terminal."""
    _, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "2")
    job_id = out.strip()
    await sotto("cancel", job_id)
    job_house.permit(2)
    waited, _, _ = await sotto("wait", job_id, "--timeout", "20")
    code, _, err = await sotto("watch", job_id)
    assert (code, "was cancelled" in err) == (waited, True)
    assert waited not in (0, 1)
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    line = ["jobs", "watch", job_id, "--config", str(sotto.config)]
    assert await asyncio.to_thread(cli.run, line) == waited


async def test_the_status_is_a_page_for_people_and_an_object_for_machines(sotto: CommandLine) -> None:
    code, out, _ = await sotto("status")
    assert (code, "2 of 3 busy (1 to 4), 5 units waiting" in out, "connected" in out) == (0, True, True)
    _, out, _ = await sotto("status", "--json")
    shown = json.loads(out)
    assert (shown["workers"]["units"][0]["name"], shown["parties"][0]["party"]) == ("fold", "a")


class Terminal(io.StringIO):
    """A stdout that somebody looks at."""

    def isatty(self) -> bool:
        return True


async def test_on_a_terminal_a_job_is_followed_live(
    job_house: Any, sotto: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "2")
    job_id = out.strip()
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    waiting = asyncio.create_task(asyncio.to_thread(cli.run, ["jobs", "wait", job_id, "--config", str(sotto.config)]))
    job_house.permit(2)
    assert await waiting == 0
    shown = terminal.getvalue()
    assert [word for word in ("2 of 2 rounds", "SUCCEEDED", "auc 0.5200") if word not in shown] == []
    assert f"job {job_id} succeeded" in shown


async def test_a_live_view_outlives_a_restart(job_house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so while the aggregator is away, and goes on with what it missed."""
    monkeypatch.setattr("src.cli.live.AWAY_AFTER_S", 0.01)
    client = job_house.client()
    job = await client.submit(jobs_pb2.FederatedTraining(task="randhie", rounds=2))
    troubles: list[str] = []
    seen: list[list[int]] = []
    started, away = asyncio.Event(), asyncio.Event()

    def show(job: Any, events: list[Any], trouble: str) -> None:
        troubles.append(trouble)
        seen.append([event.sequence for event in events])
        if trouble:
            away.set()
        if seen[-1] == [1, 2]:
            started.set()

    following = asyncio.create_task(follow(client, job.job_id, show, look_every_s=0.01))
    await started.wait()
    await job_house.server.stop(0)
    told = asyncio.create_task(away.wait())
    await asyncio.wait({told, following}, return_when=asyncio.FIRST_COMPLETED)
    assert told.done(), following  # a view that ended by itself says nothing more
    job_house.permit(2)
    job_house.server = GrpcServer(
        listen=job_house.address, tls=None, insecure=True, federation="demo", roles=jobs_servicer.ROLES
    )
    servicer = jobs_servicer.JobServicer(job_house.service, job_house.blobs, DESK)
    job_house.server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, servicer, jobs_servicer.SERVICE)
    await job_house.server.start()
    assert (await following).state == jobs_pb2.SUCCEEDED
    assert seen[-1] == [1, 2, 3, 4, 5]
    assert troubles[-1] == ""


USAGE: dict[str, list[str]] = {
    "an evaluation of nothing": ["evaluate"],
    "an evaluation of a job and a model": ["evaluate", "j", "--model", "m"],
    "an evaluation of a model without a task": ["evaluate", "--model", "m"],
    "a model that is not there": ["evaluate", "--model", "none", "--task", "t"],
    "an export of nothing": ["export"],
    "no such priority": ["export", "j", "--priority", "urgent"],
    "no such state": ["list", "--state", "DONE"],
    "no jobs": ["list", "--limit", "0"],
    "nothing to submit": ["submit"],
    "a model to start from that is not there": ["submit", "--task", "t", "--initial-model", "none"],
    "two models to start from": ["submit", "--task", "t", "--initial-model", __file__, "--build-initial-model"],
}


@pytest.mark.parametrize("words", USAGE.values(), ids=USAGE)
def test_a_line_that_means_nothing_is_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["jobs", *words, "--config", "/nowhere.yaml"]) == 2
    assert "Traceback" not in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "a filter that is none": (["list", "--filter", "state = "], 4, "filter"),
    "an order that is none": (["list", "--order-by", "colour"], 4, "order_by"),
    "a format that is none": (["export", "abc", "--format", "zip"], 4, "export.format"),
    "an export of no job": (["export", "abc"], 7, "abc"),
    "a history of no job": (["history", "abc"], 7, "abc"),
    "no time at all": (["export", "abc", "--timeout-s", "0"], 4, "timeout"),
}


@pytest.mark.parametrize(("words", "code", "word"), REFUSED.values(), ids=REFUSED)
async def test_what_is_refused_says_what_and_why(sotto: CommandLine, words: list[str], code: int, word: str) -> None:
    exit_code, out, err = await sotto(words[0], *words[1:], "--json")
    assert (exit_code, out) == (code, "")
    error = json.loads(err)["error"]
    assert word in json.dumps([error.get("violations", {}), error["message"]])


async def test_a_file_of_an_evaluation_takes_no_options_of_a_training(sotto: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("priority: high\nevaluation: {job_id: abc}\n")
    assert (await sotto("submit", str(tmp_path / "job.yaml"), "--rounds", "3"))[0] == 2
    assert (await sotto("submit", str(tmp_path / "job.yaml"), "--build-initial-model"))[0] == 2
    assert (await sotto("submit", str(tmp_path / "job.yaml"), "--initial-model", __file__))[0] == 2
    assert (await sotto("submit", str(tmp_path / "job.yaml")))[0] == 7


async def test_listing_jobs_imports_nothing_heavy(job_house: Any, sotto: CommandLine) -> None:
    """The whole command is to take less than half a second."""
    await job_house.client().submit(jobs_pb2.FederatedTraining(task="randhie"))
    code = "import sys; from src import cli; code = cli.run(sys.argv[1:]); print(code, *sys.modules)"
    words = [sys.executable, "-c", code, "jobs", "list", "--config", str(sotto.config)]
    done = await asyncio.to_thread(
        subprocess.run, words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *table, modules = done.stdout.splitlines()
    assert (len(table), modules.split()[0]) == (2, "0")
    assert HEAVY & set(modules.split()) == set()


async def test_an_aggregator_that_is_not_there_is_told_soon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.cli.connection.IMPATIENT_S", 0.0)
    config = tmp_path / "client.yaml"
    config.write_text("version: 1\nfederation: demo\nserver: {address: '127.0.0.1:1', insecure: true}\n")
    assert await asyncio.to_thread(cli.run, ["jobs", "list", "--config", str(config)]) == 10
    assert "127.0.0.1:1 cannot be reached" in capsys.readouterr().err


async def test_a_model_that_is_too_large_for_a_message_comes_with_a_job_file_all_the_same(
    job_house: Any, sotto: CommandLine, tmp_path: Path
) -> None:
    """It is uploaded by itself, and the job names it; said again with the digest alone it is the same specification."""
    model = bytes(range(256)) * (20 << 10)  # 5 MiB
    (tmp_path / "model.safetensors").write_bytes(model)
    (tmp_path / "job.yaml").write_text("federated_training: {task: randhie, initial_model: model.safetensors}\n")
    code, out, err = await sotto("submit", str(tmp_path / "job.yaml"), "--rounds", "1", "--json")
    assert (code, err) == (0, "")
    job = json.loads(out)
    assert job["federated_training"]["initial_model_sha256"] == hashlib.sha256(model).hexdigest()
    (tmp_path / "again.json").write_text(json.dumps({"federated_training": job["federated_training"]}))
    code, out, _ = await sotto("submit", str(tmp_path / "again.json"), "--json")
    assert (code, json.loads(out)["spec_digest"]) == (0, job["spec_digest"])
    code, out, err = await sotto("evaluate", "--model", str(tmp_path / "model.safetensors"), "--task", "randhie")
    assert (code, err) == (0, "")
    (tmp_path / "empty").touch()
    assert (await sotto("submit", "--task", "randhie", "--initial-model", str(tmp_path / "empty")))[0] == 2
    given = ("--initial-model", str(tmp_path / "model.safetensors"))
    code, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "1", *given, "--json")
    assert (code, json.loads(out)["spec_digest"]) == (0, job["spec_digest"])
    code, _, err = await sotto("submit", "--task", "randhie", *given, "--continue", "abc")
    assert (code, "takes the place of an initial model" in " ".join(err.split())) == (2, True)
