"""Arguments that are converted without pydantic become what typer makes of them; wrong ones are refused by typer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from src.cli.quick import quicken

ROOT = Path(__file__).resolve().parents[2]
SEEN: list[Any] = []

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    text: str,
    number: Annotated[int, typer.Option(min=1, max=9)] = 5,
    clamped: Annotated[int, typer.Option(max=9, clamp=True)] = 5,
    real: Annotated[float | None, typer.Option(min=0)] = None,
    flag: Annotated[bool, typer.Option("--flag/--no-flag", envvar="SOTTO_TEST_FLAG")] = False,
    path: Annotated[Path, typer.Option(envvar="SOTTO_TEST_PATH")] = Path("here"),
    there: Annotated[Path | None, typer.Option(exists=True)] = None,
    folder: Annotated[Path | None, typer.Option(file_okay=False)] = None,
    many: Annotated[list[str] | None, typer.Option()] = None,
    parsed: Annotated[str | None, typer.Option(parser=str.upper)] = None,
) -> None:
    SEEN.append((text, number, clamped, real, flag, path, there, folder, many, parsed))


LINES = [
    [],
    ["x"],
    ["7"],
    ["x", "--number", "9"],
    ["x", "--number", "10"],
    ["x", "--number", "0"],
    ["x", "--number", "-1"],
    ["x", "--number", "two"],
    ["x", "--number", "²"],
    ["x", "--number", "1.0"],
    ["x", "--number", "007"],
    ["x", "--clamped", "12"],
    ["x", "--real", "0.5"],
    ["x", "--real", "-0.5"],
    ["x", "--real", "many"],
    ["x", "--flag"],
    ["x", "--no-flag"],
    ["x", "--path", "a/../b"],
    ["x", "--path", ""],
    ["x", "--there", str(ROOT)],
    ["x", "--there", "nowhere-at-all"],
    ["x", "--folder", str(Path(__file__))],
    ["x", "--folder", str(ROOT)],
    ["x", "--many", "a", "--many", "b"],
    ["x", "--parsed", "abc"],
    ["x", "--none"],
    ["x", "y"],
]


def outcome(parser: Any, line: list[str]) -> Any:
    """What the command got, or what it was told."""
    SEEN.clear()
    try:
        parser.main(args=line, prog_name="test", standalone_mode=False)
    except Exception as error:
        return type(error).__name__, getattr(error, "message", str(error))
    return [*SEEN, *(type(value) for values in SEEN for value in values)]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_line_means_the_same_with_and_without(line: list[str]) -> None:
    assert outcome(quicken(typer.main.get_command(app)), line) == outcome(typer.main.get_command(app), line)


@pytest.mark.parametrize("value", ["1", "0", "true", "no", "maybe", ""])
def test_a_variable_means_the_same_with_and_without(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOTTO_TEST_FLAG", "SOTTO_TEST_PATH"):
        monkeypatch.setenv(name, value)
        assert outcome(quicken(typer.main.get_command(app)), ["x"]) == outcome(typer.main.get_command(app), ["x"])
        monkeypatch.delenv(name)


def test_a_command_line_that_is_right_imports_no_pydantic() -> None:
    code = (
        "import sys; from src import cli; "
        "code = cli.run(['jobs', 'list', '--limit', '5', '--json', '--config', '/nowhere.yaml']); "
        "print(code, 'pydantic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "3 False\n"
