"""Relative paths in a task's options start from the configuration's directory, wherever Sotto was started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import src.aggregator.work as aggregator_work
import src.party.work as party_work
from src import cli
from src.config import load_party_config
from src.errors import WorkerError
from src.jobs.executors.units import WorkContext
from src.learning.flatten import model_to_tensors, to_safetensors
from src.learning.task import find_task
from src.storage.blobs import Blobs
from tests.learning.packages import GOOD, install

HOLDOUT = "    def load_holdout(self, options):\n        return self.load_data(options)\n"
PARTY = """
version: 1
federation: demo
name: a
state_dir: state
server: {insecure: true}
keys: {custody: aggregator}
datasets: {ward: {declared_rows: 40, options: {file: data/visits.csv}}}
privacy: {budgets: {example: {epsilon: 100}, default_user_epsilon: 100}}
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A party's directory, with its data in it; somebody works elsewhere."""
    monkeypatch.syspath_prepend(
        str(install(tmp_path / "site", {"ward": "ward_of_paths:Task"}, {"ward_of_paths.py": GOOD + HOLDOUT}))
    )
    kit = tmp_path / "kit"
    (kit / "data").mkdir(parents=True)
    (kit / "data" / "visits.csv").write_text("\n".join(f"{n},{n % 7},{-n},{n % 2}" for n in range(40)))
    (kit / "party.yaml").write_text(PARTY)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield kit
    sys.modules.pop("ward_of_paths", None)


def checked(kit: Path) -> int:
    return cli.run(["party", "--config", str(kit / "party.yaml"), "--check-data"])


def trained(kit: Path) -> int:
    job = kit / "job.json"
    job.write_text(json.dumps({"job_id": "j", "dataset": "ward", "dp": {"epsilon": 3.0, "delta": 1e-5}}))
    return cli.run(["train", str(job), "--user", "ada", "--config", str(kit / "party.yaml")])


def contributed(kit: Path) -> int:
    config = load_party_config(kit / "party.yaml")
    params = {"options": config.datasets["ward"].options, "directory": str(config.directory)}
    return len(party_work._rows(find_task("ward"), params, name="ward")) - 40


def evaluated(kit: Path) -> int:
    context = WorkContext(Blobs(kit / "blobs"), kit)
    model = context.blobs.write(to_safetensors(model_to_tensors(find_task("ward").build_model(0))))
    params = {"task": "ward", "options": {"file": "data/visits.csv"}, "directory": str(kit), "sha256": model.sha256}
    return int(aggregator_work.evaluate_model(params, context)["metrics"]["n"]) - 40


@pytest.mark.parametrize("way", [checked, trained, contributed, evaluated])
def test_a_relative_path_starts_from_the_configurations_directory(way: Callable[[Path], int], kit: Path) -> None:
    before = Path.cwd()
    assert way(kit) == 0
    assert Path.cwd() == before


def test_a_file_that_is_gone_is_named_to_the_owner_and_to_nobody_else(kit: Path) -> None:
    """In the log of the party, by the private text of the error; of a row nothing is said."""
    (kit / "data" / "visits.csv").unlink()
    params: dict[str, Any] = {"options": {"file": "data/visits.csv"}, "directory": str(kit)}
    with pytest.raises(WorkerError) as raised:
        party_work._rows(find_task("ward"), params, name="ward")
    assert raised.value.message == "the rows could not be loaded"
    (kit / "data" / "visits.csv").write_text("1,2,3,secret")
    with pytest.raises(WorkerError) as unreadable:
        party_work._rows(find_task("ward"), params, name="ward")
    assert "secret" not in str(vars(unreadable.value))


def test_check_data_says_where_it_looked_for_a_file(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kit / "data" / "visits.csv").unlink()
    assert checked(kit) != 0
    where = kit / "data" / "visits.csv"
    assert f"(datasets.ward.options.file: {where} is not there)" in capsys.readouterr().out


def test_check_data_names_an_installed_task_that_cannot_be_imported(
    kit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which this party does not list: its own data is fine."""
    text = "raise SystemExit('please set HOSPITAL_DB')"
    broken = install(
        tmp_path / "broken", {"broken": "broken_of_paths:Task"}, {"broken_of_paths.py": text}, name="broken"
    )
    monkeypatch.syspath_prepend(str(broken))
    assert checked(kit) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ward: 40 rows (40 declared): the task's model takes them")
    assert "broken: is installed and not listed here" in said[1]
    assert "SystemExit: please set HOSPITAL_DB" in said[1]
