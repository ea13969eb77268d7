"""README, taken at its word: every command in it is run as it stands, where nothing of the checkout can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from scripts.newcomer_check import (
    SECTION,
    fenced,
    in_python,
    indented,
    looks,
    on_one_node,
    section,
    task_of_ones_own,
    walk,
)

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_commands_are_found_in_the_order_in_which_they_stand() -> None:
    kinds = [" ".join(command.split()[:2]) for command in indented(section(README, SECTION))]
    assert kinds[:3] == ["sotto provision", "sotto aggregator", "sotto party"]
    assert set(kinds[3:]) == {"sotto jobs"}
    assert [len(fenced(section(README, "## A task of your own"), kind)) for kind in ("python", "toml", "yaml")] == [
        1
    ] * 3


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_what_a_newcomer_is_told_to_type_works_in_a_fresh_environment(tmp_path: Path) -> None:
    with walk(tmp_path) as day:
        told = looks(day)
        for part in (in_python, on_one_node, task_of_ones_own):
            part(day)
    scientist = day.scientist
    model = load_file(scientist / "result" / "model.safetensors")
    with np.load(next((scientist / "exported").glob("*.npz"))) as exported:
        assert sum(values.size for values in exported.values()) == sum(values.size for values in model.values())
    assert any("budget show" in command for command in told)
    assert any("status" in command for command in told)
    assert (
        sum(values.size for values in load_file(scientist / "triage" / "model.safetensors").values())
        == 12 * 32 + 32 + 32 * 3 + 3
    )
