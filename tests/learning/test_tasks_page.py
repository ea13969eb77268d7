"""docs/tasks.md, taken at its word: its Python runs as it stands, its configurations load, its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src import cli
from src.config import load_aggregator_config, load_party_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
COMMON = "version: 1\nfederation: demo\nserver: {insecure: true}\nkeys: {custody: aggregator}\n"


def fenced(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    code = "\n".join(fenced("python"))
    assert len(fenced("python")) >= 7
    (tmp_path / "sotto").symlink_to(ROOT / "src")  # whatever is installed: this checkout
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "page.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^best learning rate: .*\n\d+ of 600 are called sick$", ran.stdout, re.MULTILINE), ran.stdout


def test_the_configurations_of_the_page_load(tmp_path: Path) -> None:
    datasets, evaluation = fenced("yaml")
    (tmp_path / "party.yaml").write_text(f"{COMMON}name: a\n{datasets}", encoding="utf-8")
    options = load_party_config(tmp_path / "party.yaml", environ={}).datasets["triage"].options
    assert options == {"file": "data/a.npz", "columns": {"age": {"mean": 54, "scale": 18}}, "years": [2021, 2022]}
    (tmp_path / "aggregator.yaml").write_text(f"{COMMON}{evaluation}", encoding="utf-8")
    public = load_aggregator_config(tmp_path / "aggregator.yaml", environ={}).evaluation
    assert public == {"triage": {"file": "data/public.npz"}}


COMMANDS = sorted(set(re.findall(r"`sotto ([a-z]+(?: [a-z]+)?)\b", PAGE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    helped = capsys.readouterr().out
    said = set(re.findall(rf"`sotto {command}[^`]*?(--[a-z-]+)", PAGE))
    assert all(option in helped for option in said), (said, helped)


def test_readme_names_the_page() -> None:
    assert "docs/tasks.md" in (ROOT / "README.md").read_text(encoding="utf-8")
