"""What an aggregator says is shown by `sotto`, and does not steer the terminal that it is shown on."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from src import cli
from src.cli import screen
from src.cli.jobs_view import event_line, job_lines, jobs_table, live_view, result_lines, rounds_table
from src.cli.screen import echo, echo_json
from src.cli.status import status_lines
from src.communication.errors import from_status, to_status
from src.communication.generated import jobs_pb2
from src.errors import InvalidInput, SottoError

ROOT = Path(__file__).resolve().parents[2]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=100)
FORGED = "sotto: all is well"
HOSTILE = f"x\n{FORGED}\r\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2028{FORGED}\x7f"
SKIPPED = {"google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.Struct"}


def say_everywhere(message: Message, text: str, *, depth: int = 0) -> Message:
    """Puts `text` into every text of a message that came over the wire, its lists and maps included."""
    for field in message.DESCRIPTOR.fields:
        of_texts = field.type == field.TYPE_STRING
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            if inner.fields_by_name["key"].type != field.TYPE_STRING:
                continue
            if inner.fields_by_name["value"].message_type is None:
                getattr(message, field.name)[text] = 1.0
            elif depth < 4:
                say_everywhere(getattr(message, field.name)[text], text, depth=depth + 1)
        elif field.is_repeated and of_texts:
            getattr(message, field.name).append(text)
        elif field.is_repeated and inner is not None and inner.full_name not in SKIPPED and depth < 4:
            say_everywhere(getattr(message, field.name).add(), text, depth=depth + 1)
        elif inner is not None and not field.is_repeated:
            if inner.full_name not in SKIPPED and depth < 4 and field.containing_oneof is None:
                say_everywhere(getattr(message, field.name), text, depth=depth + 1)
                getattr(message, field.name).SetInParent()
        elif of_texts:
            setattr(message, field.name, text)
    return message


def a_job() -> jobs_pb2.Job:
    job = jobs_pb2.Job(state=jobs_pb2.RUNNING)
    say_everywhere(job, HOSTILE)
    say_everywhere(job.federated_training, HOSTILE)
    return job


def a_round() -> jobs_pb2.RoundSummary:
    made = say_everywhere(jobs_pb2.RoundSummary(epsilon_party=1.0), HOSTILE)
    assert isinstance(made, jobs_pb2.RoundSummary)
    return made


def of(kind: type[Any]) -> Any:
    return say_everywhere(kind(), HOSTILE)


VIEWS: dict[str, Callable[[], None]] = {
    "jobs list": lambda: echo(jobs_table([a_job()]).split("\n"), styled=True),
    "jobs show": lambda: echo(job_lines(a_job())),
    "its rounds": lambda: echo(rounds_table([a_round()]).split("\n"), styled=True),
    "jobs watch": lambda: echo(event_line(of(jobs_pb2.JobEvent))),
    "jobs result": lambda: echo(result_lines(of(jobs_pb2.JobResult))),
    "status": lambda: echo(status_lines(of(jobs_pb2.Status)), styled=True),
    "json": lambda: echo_json({HOSTILE: [HOSTILE]}),
    "an error": lambda: cli._report(InvalidInput(HOSTILE, violations={HOSTILE: HOSTILE}), as_json=False),
    "an error as JSON": lambda: cli._report(InvalidInput(HOSTILE, violations={HOSTILE: HOSTILE}), as_json=True),
    "an unexpected error": lambda: cli._report_unexpected(ValueError(HOSTILE), as_json=False),
}


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_that_an_aggregator_says_steers_the_terminal_or_forges_a_line(
    view: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same hostile text in every text of every message that is shown."""
    VIEWS[view]()
    shown = "".join(capsys.readouterr())
    assert "x" in shown
    lines = shown.split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith(FORGED) for line in lines)


def test_nor_does_what_is_followed_live() -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(live_view(a_job(), [of(jobs_pb2.JobEvent)], trouble=HOSTILE))
    lines = stream.getvalue().split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.lstrip().startswith(FORGED) for line in lines)


@given(ANY_TEXT, st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_line_is_one_printable_line(capsys: pytest.CaptureFixture[str], text: str, styled: bool) -> None:
    echo(text, styled=styled)
    (line, after) = capsys.readouterr().out.split("\n")
    assert (line.isprintable(), after) == (True, "")


@given(st.recursive(ANY_TEXT, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(ANY_TEXT, inner, max_size=2)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_means_the_same_and_is_one_printable_line(capsys: pytest.CaptureFixture[str], value: object) -> None:
    echo_json(value)
    (line, after) = capsys.readouterr().out.split("\n")
    assert (line.isprintable(), after) == (True, "")
    assert json.loads(line) == value


@given(ANY_TEXT, ANY_TEXT)
def test_an_error_that_came_over_the_wire_is_printable_whoever_wrote_it(text: str, key: str) -> None:
    status = to_status(InvalidInput("x", violations={"a": "b"}, key="value"))
    status.message = text.encode("utf-8", "replace").decode()
    error = from_status(status)
    assert isinstance(error, SottoError)
    assert error.message.isprintable()


def test_on_a_terminal_colours_are_those_that_sotto_gave() -> None:
    """A real one: what is styled there goes through, a sequence that moves or clears does not."""
    controller, terminal = pty.openpty()
    code = "from src.cli.screen import echo; echo('\\x1b[1mbold\\x1b[0m \\x1b[2Jclear', styled=True)"
    with os.fdopen(controller, "rb", buffering=0) as reader:
        with os.fdopen(terminal, "wb") as writer:
            subprocess.run([sys.executable, "-c", code], stdout=writer, check=True, cwd=ROOT)
        assert reader.read(1000) == b"\x1b[1mbold\x1b[0m \\x1b[2Jclear\r\n"


def test_nobody_prints_past_the_screen() -> None:
    """Every line of a command goes through one place: whoever writes the next command cannot forget it."""
    found = []
    for path in Path(screen.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.search(r"(^|\.)(echo|secho|print|write|print_exc\w*)$", name) and name != "echo":
                found.append((path.name, name))
    elsewhere = [each for each in found if each[0] != "screen.py"]
    allowed = {("budget_ledger.py", "file.write"), ("train.py", "target.write")}  # files
    assert set(elsewhere) <= allowed
