"""A role whose budgets are looked at and changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.spender import CONFIG, Role


@pytest.fixture
def role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Role:
    file = tmp_path / "party.yaml"
    file.write_text(CONFIG)
    made = Role(file, capsys)
    made.spend(1)
    return made
