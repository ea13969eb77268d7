"""On a terminal that is not UTF-8, or in a pipe of a C locale, every command says what it has to say, and none ends in
a traceback over a character."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from src import cli, logs
from src.cli.jobs_view import event_line, job_lines, jobs_table, live_view, result_lines, rounds_table
from src.cli.status import status_lines
from src.communication.generated import jobs_pb2
from src.errors import ConfigError, meaning
from src.terminals import as_shown, make_legible, shows_everything
from tests.cli.spender import CONFIG, Role

ROOT = Path(__file__).resolve().parents[1]

RUN_THEM = r"""
import sys, traceback
from src import cli

def run(*line):
    try:
        cli.main(line)
    except SystemExit as end:
        codes.append((line, end.code))

def helps(path, command):
    run(*path, "--help")
    for name in getattr(command, "commands", {}):
        helps((*path, name), command.commands[name])

codes, (config,) = [], sys.argv[1:]
run("--help"); run("nosuch"); run("jobs", "list", "--config", "Zo\u00eb-\u03b5.yaml")
for name in cli.COMMANDS:
    helps((name,), cli.LazyGroup(name="x").get_command(None, name))
run("budget", "show", "--config", config, "--estimates", "--delta", "1e-6")
run("budget", "show", "--config", config, "--json")
run("budget", "set", "--config", config, "--unit", "example", "--subject", "dataset:randhie", "--epsilon", "12",
    "--reason", "g\u00e9n\u00e9reux: \u03b5 \u2192 \u221e")
run("budget", "history", "--config", config)
run("budget", "history", "--config", config, "--json")
assert not [line for line, code in codes if code == 1], codes
print(len(codes))
"""


def of_encoding(encoding: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    other = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONPATH": str(ROOT)}
    other |= {"PYTHONIOENCODING": encoding} if encoding else {}
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONIOENCODING", "LANG")}
    command = [sys.executable, "-c", RUN_THEM, *arguments]
    return subprocess.run(command, env=environ | other, cwd=ROOT, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("encoding", ["", "ascii", "latin-1", "utf-8"])
def test_every_command_speaks_in_any_encoding(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All helps, a ledger for people and machines, errors; "" is what a C locale makes of it."""
    file = tmp_path / "party.yaml"
    file.write_text(CONFIG)
    Role(file, capsys).spend(1)
    done = of_encoding(encoding, str(file))
    said = (done.stdout + done.stderr).decode(encoding or "ascii")
    assert "Traceback" not in said
    assert done.returncode == 0, said[-2000:]
    assert int(done.stdout.split()[-1]) > 25
    assert ("eps spent" if encoding != "utf-8" else "ε spent") in said
    (row,) = [json.loads(line) for line in said.splitlines() if line.startswith('{"role"') and "budgets" in line]
    assert row["budgets"][0]["unit"] == "example"
    (history,) = [json.loads(line) for line in said.splitlines() if line.startswith('{"role"') and "found" in line]
    assert any("généreux: ε → ∞" in json.dumps(entry, ensure_ascii=False) for entry in history["entries"])


@pytest.mark.parametrize(
    "command", ["jobs show", "jobs cancel", "jobs watch", "jobs result", "jobs submit --task randhie --name"]
)
def test_an_argument_that_is_no_text_is_said_to_be_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the shell hands over bytes that are not of the locale's encoding."""
    code = cli.run([*command.split(), "\udcff", "--config", str(ROOT / "config" / "client.yaml")])
    assert code == meaning(ConfigError("")).exit_code
    assert capsys.readouterr().err.startswith("sotto: an argument cannot be used: it has '\\udcff', which the locale's")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis"])
def test_what_an_aggregator_says_is_shown_in_any_encoding(encoding: str) -> None:
    """Jobs, rounds, results, a live view, the demonstration's lines, the log: what the stream lacks is replaced."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    make_legible(stream)
    name = "ε ≤ ∞ ✓ Zoë \u65e5 \udc80"
    job = jobs_pb2.Job(job_id="0", display_name="Zoë 日", state=jobs_pb2.RUNNING)
    job.progress.rounds.add(state="RELEASED", epsilon_party=float("inf"), party_assumption="ε ≤ 1 …")
    job.progress.rounds_planned = 10
    event = jobs_pb2.JobEvent(message="ε → ∞")
    result = jobs_pb2.JobResult(epsilon_example=1.0, epsilon_party=float("inf"), delta=1e-5)
    for lines in ([jobs_table([job])], job_lines(job), [rounds_table(job.progress.rounds)], [event_line(event)]):
        stream.write("\n".join(lines))
    stream.write("\n".join([*result_lines(result), *status_lines(jobs_pb2.Status())]))
    Console(file=stream, force_terminal=True, width=60).print(live_view(job, [event], trouble="… ✗"))
    stream.write(name)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert "Zo" in shown
    assert "\\udc80" in shown


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_is_written_in_any_encoding_and_json_keeps_what_it_says(form: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    try:
        logs.configure(format=form, stream=stream)  # type: ignore[arg-type]  # one of two
        logs.get_logger("sotto.test").info("ε ≤ %s", "∞", extra={"who": "Zoë"})
    finally:
        logs.configure()
    stream.flush()
    line = stream.buffer.getvalue().decode("ascii")
    if form == "json":
        found = json.loads(line)
        assert (found["message"], found["who"]) == ("ε ≤ ∞", "Zoë")
    else:
        assert "eps <= inf" in line
        assert "who=Zoe" in line


@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp437", "utf-8", "utf-16"]))
def test_any_text_can_be_shown_in_any_encoding(text: str, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    make_legible(stream)
    shown = as_shown(text, stream)
    stream.write(text)
    stream.flush()
    assert shown == text if shows_everything(stream) else shown.encode(encoding).decode(encoding) == shown


def test_what_has_the_shape_of_a_table_keeps_it() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    make_legible(stream)
    assert as_shown("┌─┬─┐│x│└─┴─┘ ⠋ █ ━", stream) == "+-+-+|x|+-+-+ # # -"
