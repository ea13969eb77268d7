"""`sotto train` and `sotto artifact verify`: the real commands, what they charge, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData

from src import cli
from src.cli.train_ledger import DEFAULT_LIMITS, LedgerPurse, default_state_dir
from src.errors import CATALOGUE, BudgetError, ConfigError, InvalidInput, Refused, SignatureError
from src.learning.task import Dataset, Options
from src.learning.tasks.randhie import RandHieTask
from src.privacy.entries import Entry
from src.privacy.events import DpSgdSteps, NonPrivate
from src.privacy.ledger import from_line
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.database import read_only
from src.storage.ledger import LedgerStore

ROOT = Path(__file__).resolve().parents[2]
PARTY = """
version: 1
federation: demo
name: a
state_dir: state
server: {insecure: true}
keys: {custody: aggregator}
policy: {allow_without_dp: ALLOWED}
datasets:
  randhie: {declared_rows: 5000, user: ada, options: {party: 0, parties: 3, seed: null}}
privacy: {budgets: {example: {epsilon: 1.1}, users: {ada: {epsilon: 2.0}}}}
"""

DEAR = {"noise_multiplier": 0.64}
"""For one epoch: of a budget of 10 two such runs may spend, and no third."""
DEARER = {"noise_multiplier": 0.6}
"""ε = 8.69, and for two 10.6."""

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with no state yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MOCK_DP", raising=False)
    return tmp_path


@pytest.fixture
def train(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: its exit code, and the artifact or what was said on stderr."""

    def run(*arguments: str, user: str = "user_456", **fields: Any) -> tuple[int, Any]:
        job = home / "job.json"
        job.write_text(json.dumps({"job_id": "test_123", "dp": {"noise_multiplier": 3.0}, "epochs": 1, **fields}))
        code = cli.run(["train", str(job), "--user", user, *arguments])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.err

    return run


def party(home: Path, *, allowed: bool = False) -> str:
    path = home / "party.yaml"
    path.write_text(PARTY.replace("ALLOWED", str(allowed).lower()))
    return str(path)


def entries(database: Path) -> list[Entry]:
    with sqlite3.connect(database) as connection:
        found = [from_line(line) for (line,) in connection.execute("SELECT line FROM ledger ORDER BY sequence")]
    connection.close()
    return found


def own(home: Path) -> list[Entry]:
    """The ledger without a configuration."""
    return entries(home / "xdg/sotto/train/party.sqlite")


def kinds(found: list[Entry]) -> list[str]:
    return [entry.kind for entry in found if entry.kind != "correction"]


# -------------------------------------------------------------------------------------------- the command as it is


def sotto(*arguments: str, home: Path, job: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """The real thing, in a process of its own; the job on its stdin."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SOTTO__") and key != "MOCK_DP"}
    return subprocess.run(
        [sys.executable, "-m", "src", *arguments],
        cwd=ROOT,
        env={**clean, "XDG_STATE_HOME": str(home / "xdg"), **environ},
        input=job,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_piped_job_prints_an_artifact_that_verifies_until_the_budget_is_gone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = sotto("train", "--user", "user_456", home=home, job='{"job_id": "test_123", "dp": {"epsilon": 6.0}}')
    assert done.returncode == 0, done.stderr
    artifact = json.loads(done.stdout)
    assert artifact["job_id"] == "test_123"
    assert 5.9 < artifact["epsilon"] <= 6.0
    assert artifact["accuracy"] > 0.8
    assert done.stderr == "sotto: user:user_456: ε = 5.999 of 10 spent at δ = 1e-05\n"
    assert kinds(own(home)) == ["reservation", "final", "release"]
    assert own(home)[-1].digest == artifact["privacy"]["ledger_head"]
    assert dict(own(home)[-1].figures) == {"model_sha256": artifact["model"]["sha256"]}

    file = home / "artifact.json"
    file.write_text(done.stdout)
    assert cli.run(["artifact", "verify", str(file)]) == 0
    said = capsys.readouterr().out
    assert "job test_123: ε = 5.99" in said
    assert "signed by 'standalone' with this node's key" in said

    job = '{"job_id": "more", "dp": {"noise_multiplier": 0.73}}'
    refused = sotto("train", "--user", "user_456", home=home, job=job)
    assert (refused.returncode, refused.stdout) == (6, "")
    assert "epsilon budget at example level of user user_456 (delta 1e-05) does not allow it" in refused.stderr
    assert "asked 9.15" in refused.stderr
    assert kinds(own(home)) == ["reservation", "final", "release", "refusal"]


def test_a_mock_trains_nothing_costs_nothing_and_never_passes(home: Path) -> None:
    job = '{"job_id": "test_123", "dp": {"noise_multiplier": 2.6}}'
    done = sotto("train", "--user", "user_456", home=home, job=job, MOCK_DP="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "sotto: MOCK: nothing was trained and nothing charged\n"
    artifact = json.loads(done.stdout)
    assert (artifact["mock"], artifact["model"], artifact["epsilon"]) == (True, None, 0)
    assert not (home / "xdg").exists()

    refused = sotto("artifact", "verify", "-", home=home, job=done.stdout)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert refused.stderr == ("sotto: this artifact is a MOCK: nothing was trained, and it stands for nothing\n")


# --------------------------------------------------------------------------------------------------------- charges


def test_what_a_task_prints_is_no_part_of_the_artifact(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RandHieTask.load_data

    def prints(self: RandHieTask, options: Options) -> Dataset:
        print("reading rows …")
        return real(self, options)

    monkeypatch.setattr(RandHieTask, "load_data", prints)
    code, artifact = train()
    assert (code, artifact["job_id"]) == (0, "test_123")


def test_each_run_of_a_job_is_charged(train: Run, home: Path) -> None:
    assert [train(dp=DEAR)[0] for _ in range(3)] == [0, 0, 6]
    charged = [entry for entry in own(home) if entry.kind == "reservation"]
    assert [(entry.job_id, entry.round, entry.user) for entry in charged] == [
        ("train/test_123", 1, "user_456"),
        ("train/test_123", 2, "user_456"),
    ]


def test_budgets_of_users_are_separate(train: Run) -> None:
    assert [train(user=user, dp=DEARER)[0] for user in ("ada", "bob", "ada")] == [0, 0, 6]


def test_a_training_that_dies_counts_as_spent(train: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.learning import dpsgd

    def dies(*_: object, **__: object) -> None:
        raise OSError("the machine is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(dpsgd, "train_dpsgd", dies)
        code, said = train(dp=DEARER)
    assert (code, "OSError at " in said, "on fire" in said) == (13, True, False)
    assert kinds(own(home)) == ["reservation", "final", "release"]
    assert dict(own(home)[-1].figures) == {"failure": "JOB_FAILED"}  # which is all that can ever come of it
    assert own(home)[-2].reason == "the training ended"  # true of those that show no model too
    code, said = train(job_id="another", dp=DEARER)
    assert code == 6
    assert "spent 8.6" in said


def test_of_two_that_race_for_the_last_of_a_budget_one_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.cli.train_ledger.BUSY_FOR_S", 100.0)  # however busy this machine is
    key, event = SigningKey.generate(), DpSgdSteps(sampling_rate=1 / 16, noise_multiplier=0.6, steps=16)
    outcomes: list[str] = []

    def race(number: int) -> None:
        purse = LedgerPurse(
            home / "party.sqlite",
            key=key,
            limits=DEFAULT_LIMITS,
            account=("example", "user:ada"),
            user="ada",
            stated_delta=1e-5,
        )
        try:
            purse.reserve(f"j{number}", event)
            outcomes.append("charged")
        except BudgetError:
            outcomes.append("refused")

    threads = [threading.Thread(target=race, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["charged", "refused", "refused"]


# ------------------------------------------------------------------------------------------------ a configured node


def test_a_configured_dataset_spends_its_own_budget_and_the_users_in_the_partys_ledger(train: Run, home: Path) -> None:
    config = party(home)
    code, artifact = train("--config", config, user="ada", dataset="randhie", dp={"epsilon": 1.0})
    assert code == 0, artifact
    assert (artifact["n"], artifact["provenance"]["n"]) == (5000, "declared by the owner")
    assert artifact["provenance"]["accuracy"] == "public rows, exact"
    assert "held-out person-years" in artifact["evaluation"]["description"]
    charge = next(entry for entry in entries(home / "state/party.sqlite") if entry.kind == "reservation")
    assert (charge.subject, charge.user, charge.unit) == ("dataset:randhie", "ada", "example")

    key = SigningKey.load(home / "state/signing.key")
    assert artifact["signature"]["verify_key"] == key.verify_key.hex()
    with read_only(home / "state/party.sqlite") as connection:
        LedgerStore(MetaData(), signer=EntrySigner(key)).verify(connection)

    code, said = train("--config", config, user="ada", dataset="randhie", dp={"epsilon": 1.0})
    assert code == 6
    assert "limit 1.1" in said
    assert train("--config", config, user="ada", dp={"epsilon": 1.9})[0] == 6  # of her 2, one is spent on randhie
    assert train("--config", config, user="ada", dp={"epsilon": 1.2})[0] == 0


def test_without_dp_only_where_the_policy_allows_it_and_then_nothing_is_left(train: Run, home: Path) -> None:
    code, said = train("--config", party(home), user="ada", dp={"enabled": False})
    assert (code, "policy.allow_without_dp" in said) == (5, True)
    config = party(home, allowed=True)
    code, artifact = train("--config", config, user="ada", dp={"enabled": False})
    assert (code, artifact["epsilon"], artifact["dp"]["enabled"]) == (0, "inf", False)
    charge = next(entry for entry in entries(home / "state/party.sqlite") if entry.kind == "reservation")
    assert charge.event == NonPrivate(unit="example", reason="dp.enabled: false")
    code, said = train("--config", config, user="ada")
    assert (code, "spent ∞" in said) == (6, True)


REFUSED: list[tuple[list[str], dict[str, Any], int, str]] = [
    ([], {"dp": {"epsilon": 0}, "epochs": 0}, 4, "dp.epsilon: 0 is less than or equal to the minimum of 0"),
    ([], {"dataset": "randhie"}, 4, "dataset: this node has no dataset 'randhie'; it has: synthetic"),
    ([], {"dp": {"epsilon": 1.0, "noise_multiplier": 0.5}}, 5, "more than dp.epsilon 1"),
    (["--name", "b"], {}, 4, "it needs --config"),
    (["--json-file", "job.json"], {}, 4, "not from both"),
    (["--config", "nowhere.yaml"], {}, 3, "no such configuration file"),
    (["--user", "../x"], {}, 4, "--user: must be 1 to 64 letters"),
]


@pytest.mark.parametrize(("arguments", "fields", "code", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_cannot_be_done_is_refused_before_it_costs_anything(
    train: Run, home: Path, arguments: list[str], fields: dict[str, Any], code: int, message: str
) -> None:
    found, said = train(*arguments, **fields)
    assert (found, message in said) == (code, True), said
    assert not (home / "xdg").exists()


def test_the_job_of_the_first_design_is_taken_and_said_what_it_comes_to_where_its_noise_is_too_little(
    train: Run, home: Path
) -> None:
    """With both ε and noise: what it costs, and which noise that ε takes, which then is enough."""
    first = {"dataset": "synthetic", "task": "classification", "epochs": 1, "batch_size": 64}
    code, said = train(
        **first, dp={"enabled": True, "epsilon": 1.0, "delta": 1e-5, "clip": 1.0, "noise_multiplier": 1.1}
    )
    assert code == CATALOGUE[Refused].exit_code
    costs, needed = re.search(r"costs epsilon ([\d.]+) at .* takes a noise_multiplier of ([\d.]+)", said).groups()  # type: ignore[union-attr]
    assert float(costs) > 1.0
    assert not (home / "xdg").exists()
    enough = float(needed) * 1.001  # four digits are shown
    code, artifact = train("--mock", **first, dp={"epsilon": 1.0, "noise_multiplier": enough})
    assert (code, artifact["task"]) == (0, "synthetic")
    code, said = train("--mock", **{**first, "task": "regression"})
    assert (code, "task: dataset 'synthetic' is for task" in said) == (CATALOGUE[InvalidInput].exit_code, True)


def test_a_user_whom_the_node_does_not_know_is_refused(train: Run, home: Path) -> None:
    code, said = train("--config", party(home), user="bob")
    assert code == 6
    assert "has no budget here" in said
    assert kinds(entries(home / "state/party.sqlite")) == ["refusal"]


def test_a_dataset_is_trained_on_only_as_its_owners(train: Run, home: Path) -> None:
    code, said = train("--config", party(home), user="bob", dataset="randhie")
    assert (code, "the data of 'ada'" in said) == (4, True)


def test_every_violation_is_reported_as_json_where_json_is_asked_for(train: Run) -> None:
    code, said = train("--json", dp={"epsilon": -1, "clip": 0}, seed="x")
    error = json.loads(said)["error"]
    assert (code, error["reason"]) == (4, "INVALID_INPUT")
    assert set(error["violations"]) == {"dp.epsilon", "dp.clip", "seed"}


# ---------------------------------------------------------------------------------------------------------- files


def test_with_out_the_model_lies_beside_and_nothing_is_overwritten(train: Run, home: Path) -> None:
    out = home / "runs" / "one"
    code, artifact = train("--out", str(out))
    assert (code, artifact["model"]["file"]) == (0, "model.safetensors")
    assert sorted(path.name for path in out.iterdir()) == ["artifact.json", "model.safetensors"]
    assert json.loads((out / "artifact.json").read_text()) == artifact
    key = artifact["signature"]["verify_key"]
    assert cli.run(["artifact", "verify", str(out / "artifact.json"), "--verify-key", key, "--json"]) == 0
    before = len(own(home))
    code, said = train("--out", str(out))
    assert (code, "is there already" in said) == (8, True)
    assert len(own(home)) == before


def test_verifying_says_whose_signature_it_is_or_that_nobody_vouches_for_it(
    train: Run, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = train()
    file = home / "artifact.json"
    file.write_text(json.dumps(made))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "elsewhere"))
    assert cli.run(["artifact", "verify", str(file)]) == 4
    captured = capsys.readouterr()
    assert (captured.out, "for which nobody vouches here" in captured.err) == ("", True)
    assert cli.run(["artifact", "verify", str(file), "--allow-unknown-key"]) == 0
    assert "NOBODY VOUCHES FOR THIS KEY" in capsys.readouterr().out
    assert cli.run(["artifact", "verify", str(file), "--allow-unknown-key", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vouched_by"] is None
    assert cli.run(["artifact", "verify", str(file), "--verify-key", "0" * 64]) == 4
    assert capsys.readouterr().out == ""
    del made["signature"]
    file.write_text(json.dumps(made))
    assert cli.run(["artifact", "verify", str(file)]) == 4
    captured = capsys.readouterr()
    assert (captured.out, "not signed" in captured.err) == ("", True)
    assert cli.run(["artifact", "verify", str(file), "--allow-unsigned"]) == 0
    assert "NOT SIGNED" in capsys.readouterr().out


def test_the_partys_own_key_is_found_by_its_configuration(
    train: Run, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = party(home)
    _, made = train("--config", config, user="ada")
    file = home / "artifact.json"
    file.write_text(json.dumps(made))
    assert cli.run(["artifact", "verify", str(file), "--config", config]) == 0
    assert "signed by 'a' with this node's key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "code"),
    [("{", [], 4), ("{}", [], 4), ("{}", ["--verify-key", "x"], 4), (None, [], 7)],
    ids=["no JSON", "no artifact", "no key", "no file"],
)
def test_what_is_no_artifact_does_not_verify(
    tmp_path: Path, content: str | None, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "artifact.json"
    if content is not None:
        file.write_text(content)
    assert cli.run(["artifact", "verify", str(file), *arguments]) == code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("found", "place"),
    [("/var/state", "/var/state/sotto/train"), ("", "~/.local/state/sotto/train"), ("x", "~/.local/state/sotto/train")],
)
def test_the_state_is_the_users_wherever_the_command_is_run(found: str, place: str) -> None:
    assert default_state_dir({"XDG_STATE_HOME": found}) == Path(place).expanduser()


@pytest.mark.parametrize("home_is", ["a file", "nothing"])
def test_without_a_place_for_its_state_it_says_so_and_what_to_do(
    home_is: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A home that cannot be written to (of root neither, so it is a file), and none at all."""
    (home / "file").write_text("")
    job = home / "job.json"
    job.write_text(json.dumps({"job_id": "t", "dp": {"noise_multiplier": 3.0}, "epochs": 1}))
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(home / "file"))
    if home_is == "nothing":

        def nowhere() -> Path:
            raise RuntimeError("Could not determine home directory.")  # for a uid that is in no /etc/passwd

        monkeypatch.setattr(Path, "home", nowhere)
    for line in (["train", str(job), "--user", "u"], ["train", str(job), "--user", "u", "--out", str(home / "out")]):
        assert cli.run(line) == CATALOGUE[ConfigError].exit_code
        said = capsys.readouterr().err
        assert ("--state-dir" in said, "XDG_STATE_HOME" in said, "Traceback" in said) == (True, True, False)
    for line in (["budget", "show"], ["budget", "history"], ["artifact", "verify", str(job)], ["train", "--help"]):
        cli.run(line)
        said = capsys.readouterr().err
        assert ("Traceback" in said, "unexpected" in said) == (False, False)


def test_a_state_directory_of_ones_own_holds_ledger_and_key(train: Run, home: Path) -> None:
    place = ("--state-dir", str(home / "own"))
    code, artifact = train(*place)
    assert (code, artifact["job_id"]) == (0, "test_123")
    assert {each.name for each in (home / "own").iterdir()} >= {"party.sqlite", "signing.key"}
    assert not (home / "xdg").exists()
    (home / "artifact.json").write_text(json.dumps(artifact))
    assert cli.run(["artifact", "verify", str(home / "artifact.json"), *place]) == 0
    assert cli.run(["artifact", "verify", str(home / "artifact.json")]) == CATALOGUE[SignatureError].exit_code
    assert cli.run(["budget", "show", *place]) == 0
    code, said = train(*place, "--config", party(home))
    assert (code, "--state-dir" in said) == (CATALOGUE[InvalidInput].exit_code, True)


def test_a_dataset_that_shares_a_budget_is_charged_to_it_here_too(train: Run, home: Path) -> None:
    """And what it had spent by itself counts on that, once the configuration says so."""
    rows = "randhie: {declared_rows: 5000, user: ada, options: {party: 0, parties: 3, seed: null}}"
    config = party(home)
    assert train("--config", config, user="ada", dataset="randhie", dp={"epsilon": 0.7})[0] == 0
    shared = f"{rows.replace('options', 'budget_of: people, options')}\n  people: {{declared_rows: 5000}}"
    Path(config).write_text(Path(config).read_text().replace(rows, shared))
    code, said = train("--config", config, user="ada", dataset="randhie", dp={"epsilon": 1.0})
    assert (code, "at example level of dataset people" in said, "limit 1.1" in said) == (6, True, True)
    assert train("--config", config, user="ada", dataset="randhie", dp={"epsilon": 0.5})[0] == 0
    found = [entry for entry in entries(home / "state/party.sqlite") if entry.event is not None]
    assert [(entry.kind, entry.subject, entry.reason.partition(",")[0]) for entry in found] == [
        ("reservation", "dataset:randhie", ""),
        ("opening_balance", "dataset:people", "rows of dataset randhie"),
        ("refusal", "dataset:people", found[2].reason.partition(",")[0]),
        ("reservation", "dataset:people", "rows of dataset randhie"),
    ]


def test_a_run_that_nothing_limits_in_epsilon_is_warned_of(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a configuration that takes an entry which says none, in so many words: rounds alone leave ε its limit."""
    job = home / "job.json"
    job.write_text(json.dumps({"job_id": "j", "dp": {"noise_multiplier": 3.0}, "epochs": 1}))
    change = ["budget", "set", "--unit", "example", "--subject", "user:bob", "--reason", "why not"]
    assert cli.run(["train", str(job), "--user", "bob"]) == 0
    assert "no limit in ε" not in capsys.readouterr().err
    assert cli.run([*change, "--max-rounds", "9"]) == 0
    assert "in force: 9 rounds, ε 10 at δ 1e-05" in capsys.readouterr().out
    assert cli.run([*change, "--epsilon", "none"]) == 0
    assert cli.run(["train", str(job), "--user", "bob"]) == 0
    assert "no limit in ε is in force for user:bob (example level)" in capsys.readouterr().err
