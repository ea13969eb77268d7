"""The pages in docs/schemas are what the schemas beside the code give."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    """scripts/generate_schemas.py as a module."""
    spec = spec_from_file_location("generate_schemas", ROOT / "scripts" / "generate_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(script: Any) -> None:
    assert script.check() == [], "run scripts/generate_schemas.py"


def test_every_schema_of_the_command_has_a_page(script: Any) -> None:
    assert {"train-job.md", "train-artifact.md"} <= set(script.pages())


def test_a_page_that_is_missing_edited_or_left_over_is_named(script: Any, tmp_path: Path) -> None:
    for name, text in script.pages().items():
        (tmp_path / name).write_text(text)
    (tmp_path / "old.md").write_text("left over")
    (tmp_path / "train-job.md").write_text("edited")
    (tmp_path / "train-artifact.md").unlink()
    assert script.check(tmp_path) == ["old.md", "train-artifact.md", "train-job.md"]
