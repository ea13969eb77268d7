"""The picture: it is one, and it says what is true of the party level."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.errors import InvalidInput
from src.learning.report import party_level_text, write_report

ROUNDS = [{"round": i, "auc": 0.6 + i / 200, "epsilon": i / 5} for i in range(1, 8)]
BUDGET = {"epsilon": 4.0, "delta": 1e-5}
PARTY = {"epsilon": 250.0, "delta": 1e-5, "parties": 3}


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_writes_a_png_over_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    path.write_text("old")
    comparison = {"central": 0.655, "central_dp": 0.65}
    write_report(path, ROUNDS, comparison=comparison, budget=BUDGET, party_level=PARTY)
    assert size(path) == (1500, 900)
    assert list(tmp_path.iterdir()) == [path]


def test_a_single_round_that_was_not_evaluated_has_a_picture_too(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    party = PARTY | {"epsilon": math.inf}
    write_report(path, [{"round": 1, "epsilon": 0.5}], comparison={}, budget=BUDGET, party_level=party)
    assert size(path) == (1500, 900)


@pytest.mark.parametrize(
    ("epsilon", "shown", "honest"),
    [(3.0, "3.00", False), (21.0, "21", True), (1234.4, "1,234", True), (math.inf, "∞", True)],
)
def test_a_large_party_level_epsilon_is_called_meaningless(epsilon: float, shown: str, honest: bool) -> None:
    text = party_level_text(PARTY | {"epsilon": epsilon})
    assert f"ε = {shown} at" in text
    assert ("no meaningful party-level guarantee with so few parties (3)" in text) is honest


REFUSED: dict[str, dict[str, Any]] = {
    "no rounds": {"rounds": []},
    "a round without epsilon": {"rounds": [{"round": 1}]},
    "a budget without delta": {"budget": {"epsilon": 1.0}},
    "a party level without parties": {"party_level": {"epsilon": 1.0, "delta": 1e-5}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rounds": ROUNDS, "budget": BUDGET, "party_level": PARTY} | REFUSED[what]
    with pytest.raises(InvalidInput):
        write_report(tmp_path / "x.png", comparison={}, **given)
    assert not list(tmp_path.iterdir())


def test_importing_it_loads_no_matplotlib() -> None:
    code = "import sys, src.learning.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=True, timeout=60)
