"""`sotto demo`, in a process of its own: what it prints, what it leaves, and what it says when a role dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from src.errors import CATALOGUE, JobFailed

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 240.0
ARGUMENTS = ("--json", "--rounds", "2", "--modulus-bits", "512", "--insecure-small-modulus", "--out")
KEYS = {
    "job_id",
    "rounds",
    "auc",
    "auc_central",
    "auc_central_dp",
    "epsilon_example",
    "epsilon_party",
    "epsilon_party_against_aggregator",
    "delta",
    "bytes_up",
    "peak_rss_mb",
    "seconds",
    "artifact",
}


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SOTTO__")}
    return subprocess.Popen(
        [sys.executable, "-m", "src", "demo", *ARGUMENTS, str(out), *more],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def roles_under(out: Path) -> dict[str, psutil.Process]:
    """The role processes of a demo that works below `out`, by kit."""
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        for argument in process.info["cmdline"] or ():
            match = re.fullmatch(re.escape(str(out)) + r"/\.work-\w+/kits/([\w-]+)/\w+\.yaml", argument)
            if match and process.info["status"] != psutil.STATUS_ZOMBIE:
                found[match[1]] = process
    return found


def test_the_demo_prints_one_json_object_and_leaves_model_manifest_and_picture(tmp_path: Path) -> None:
    process = start(tmp_path)
    stdout, stderr = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, stderr[-3000:]
    result = json.loads(stdout)
    assert set(result) >= KEYS
    assert [(each["round"], each["state"], each["contributions"]) for each in result["rounds"]] == [
        (1, "RELEASED", 3),
        (2, "RELEASED", 3),
    ]
    assert all(0 < result[key] < 1 for key in ("auc", "auc_central", "auc_central_dp"))
    assert 0 < result["epsilon_example"] < 20
    others = ("", "_against_aggregator", "_if_all_others_collude")
    assert [result[f"epsilon_party{name}"] for name in others] == ["inf"] * 3  # what a δ of 1e-5 leaves no room for
    assert (result["delta"], result["party_delta"]) == (1e-5, 1e-5)
    assert "no meaningful party-level guarantee with so few parties" in stderr
    assert result["bytes_up"] > 2 * 3 * 1000
    assert set(result["peak_rss_mb"]) == {"aggregator", "party-a", "party-b", "party-c"}
    assert all(megabytes > 50 for megabytes in result["peak_rss_mb"].values())
    artifact = Path(result["artifact"])
    assert artifact.parent == tmp_path
    assert {"model.safetensors", "manifest.json", "report.png"} <= {path.name for path in artifact.iterdir()}
    assert (artifact / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((artifact / "manifest.json").read_text())["readable"]["job_id"] == result["job_id"]
    assert not list(tmp_path.glob(".work-*"))  # keys and shares of a federation that is no more
    assert roles_under(tmp_path) == {}


def test_a_role_that_dies_ends_the_demo_which_shows_its_name_and_the_end_of_its_log(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    process = start(tmp_path, "--parties", "2")
    try:
        party = wait_until(lambda: process.poll() or roles_under(tmp_path).get("party-b"), "party b is started")
        log = Path(party.cmdline()[-1]).parents[2] / "party-b.log"
        said = wait_until(lambda: log.read_text(), "party b says something")
        party.kill()
        stdout, stderr = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
    assert process.returncode == CATALOGUE[JobFailed].exit_code
    assert stdout == ""
    assert "party-b has ended (exit code -9)" in stderr
    assert re.search(r"party-b, last \d+ lines of its log:", stderr)
    assert said.splitlines()[0] in stderr
    assert roles_under(tmp_path) == {}
