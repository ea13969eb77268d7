"""The command line: quick to answer, clear when it refuses, and the exit code that the catalogue gives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src import __version__, cli, provisioning
from src.errors import CATALOGUE, BudgetError, ConfigError, InvalidInput, LedgerError, NotFoundError
from src.privacy.accounting import epsilon
from src.privacy.events import NoisySum
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--party", "a", "--party", "b", "--modulus-bits", "512", "--insecure-small-modulus"]

COMMANDS = ("aggregator", "artifact", "audit", "budget", "demo", "jobs", "party", "provision", "status", "train")


def sotto(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real thing, in a process of its own."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SOTTO__")}
    environ["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "src", *arguments],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# -------------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = "import sys; from src import cli; code = cli.run(['--help']); print(code, *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *help_text, modules = done.stdout.splitlines()
    for command in (
        "aggregator",
        "party",
        "provision",
        "demo",
        "jobs",
        "status",
        "budget",
        "audit",
        "train",
        "artifact",
    ):
        assert any(line.startswith(f"  {command} ") for line in help_text)
    heavy = {"torch", "grpc", "numpy", "sqlalchemy", "pydantic", "yaml", "cryptography", "gmpy2", "rich", "google"}
    assert modules.startswith("0 ")
    assert heavy & set(modules.split()) == set()


def test_help_lists_every_exit_code_with_all_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    _, _, table = capsys.readouterr().out.partition("Exit codes")
    rows = " ".join(table.split())
    for code, meant in cli.exit_codes().items():
        assert f"{code} {meant}" in rows
    listed = {reason: code for code, meant in cli.exit_codes().items() for reason in meant.split(", ")}
    assert {row.reason: row.exit_code for row in CATALOGUE.values()}.items() <= listed.items()
    assert (listed["success"], listed[cli.USAGE_REASON], listed["interrupted"]) == (0, 2, 130)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"sotto {__version__}\n"


@pytest.mark.parametrize(
    "command", ["aggregator", "party", "provision", "budget", "audit", "train", "artifact", "jobs", "status", "demo"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    assert f"sotto {command}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: sotto"),
        (["provison"], "No such command 'provison'. Did you mean 'provision'?"),
        (["xyzzy"], "No such command 'xyzzy'. There are: demo, provision"),
        (["provision"], "Missing option '--out'"),
        (["budget", "show", "--colour"], "No such option: --colour"),
        (["provision", "--out", "x", "--party", "a", "--threshold", "two"], "Invalid value for '--threshold'"),
    ],
)
def test_wrong_usage_is_2_and_says_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_wrong_usage_is_json_too_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["provision", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["reason"] == "USAGE"


@pytest.mark.parametrize("role", ["aggregator", "party"])
def test_a_role_without_its_configuration_exits_with_3_and_one_line(role: str, tmp_path: Path) -> None:
    done = sotto(role, "--config", "nowhere.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"sotto: no such configuration file: {tmp_path / 'nowhere.yaml'}\n"


def test_an_address_in_use_is_said_once_and_before_workers_are_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = tmp_path / "aggregator.yaml"
        config.write_text(
            f"version: 1\nfederation: demo\nserver: {{insecure: true, listen: '{address}'}}\n"
            "keys: {custody: aggregator, modulus_bits: 512, insecure_small_modulus: true}\n"
        )
        done = sotto("aggregator", "--config", str(config))
    assert done.returncode == 3
    told = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert told == [f"sotto: server.listen: {address} cannot be bound: is another process listening there?"]
    assert not (tmp_path / "state/work").exists()


@pytest.mark.parametrize("command", [["budget", "show"], ["budget", "history"]], ids=" ".join)
def test_a_scientist_hears_where_budgets_are_shown(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "--config", str(ROOT / "config/client.yaml")]) == 3
    assert capsys.readouterr().err == (
        f"sotto: {ROOT / 'config/client.yaml'} is a scientist's or operator's configuration: budgets are shown at the "
        "aggregator, by its aggregator.yaml, or at a party, by its party.yaml\n"
    )


def test_the_configuration_of_another_role_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "config/aggregator.yaml"
    assert cli.run(["status", "--config", str(path)]) == 3
    assert capsys.readouterr().err == (
        f"sotto: {path} is an aggregator's configuration (aggregator.yaml): what is needed here is a scientist's or "
        "operator's configuration (client.yaml)\n"
    )


def test_a_configuration_is_refused_with_a_line_for_each_problem(tmp_path: Path) -> None:
    config = tmp_path / "aggregator.yaml"
    config.write_text(
        "version: 1\nfederation: Demo\nprivacy: {budget: {delta: 3, max_rounds: 1}}\nserver: {insecure: true}"
    )
    done = sotto("budget", "show", "--config", str(config))
    assert done.returncode == 3
    headline, *problems = done.stderr.splitlines()
    assert headline.startswith(f"sotto: {config} cannot be used (5 problems; what is missing is in the kit")
    assert "sotto:   privacy.budget.delta: must be > 0 and < 1 (got 3)" in problems
    assert len(problems) == 5


def test_an_error_is_one_json_object_where_json_is_asked_for(tmp_path: Path) -> None:
    done = sotto("provision", "--out", str(tmp_path / "kits"), "--party", "a", "--party", "A", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    error = json.loads(done.stderr)["error"]
    assert error["reason"] == "CONFIG_INVALID"
    assert error["problems"] == [
        "party: must be a lower-case letter, then up to 31 lower-case letters, digits or hyphens (got 'A')"
    ]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BudgetError("asked 5, left 3"), 6, "sotto: asked 5, left 3\n"),
        (NotFoundError("no such job"), 7, "sotto: no such job\n"),
        (
            InvalidInput("two fields are wrong", violations={"rounds": "must be > 0"}),
            4,
            "sotto:   rounds: must be > 0\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("division by zero"), 1, "sotto: unexpected error: ZeroDivisionError: division by zero\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_code_is_the_catalogues(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(provisioning, "provision", fail)
    assert cli.run(["provision", "--out", "x", "--party", "a"]) == code
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize("problems", [("a: is wrong",), ("a: is wrong", "b: too")])
def test_a_message_that_is_its_problems_gets_no_empty_headline(
    problems: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConfigError("; ".join(problems), problems=problems)

    monkeypatch.setattr(provisioning, "provision", fail)
    assert cli.run(["provision", "--out", "x", "--party", "a"]) == 3
    assert capsys.readouterr().err.splitlines() == [f"sotto: {problem}" for problem in problems]


PARTY = ["party", "--config", str(ROOT / "config/party.yaml")]


def needs(what: str, extra: str, lacking: str) -> str:
    return f"sotto: {what} needs the extra `{extra}`, and {lacking} is not installed: pip install 'sotto-fl[{extra}]'"


def test_an_installation_without_torch_says_what_to_install_whatever_is_asked_of_it() -> None:
    commands = [
        ["audit", "--epsilon", "1"],
        ["jobs", "submit", "--task", "randhie", "--build-initial-model"],
        PARTY,
        ["demo"],
    ]
    code = f"import sys; sys.modules['torch'] = None; from src import cli; print([cli.run(c) for c in {commands!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"{[3] * len(commands)}\n"
    assert done.stderr.splitlines() == [
        *[needs("this", "party", "torch")] * 2,
        needs("a party", "party", "torch"),
        needs("the demo", "demo", "torch"),
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(PARTY, needs("a party", "party", "torch")), (["demo"], needs("the demo", "demo", "torch"))],
    ids=["party", "demo"],
)
def test_nothing_is_started_where_a_package_of_the_extra_is_missing(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.run(arguments) == 3
    assert capsys.readouterr().err == told + "\n"


def test_a_module_that_no_extra_has_is_an_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'nonesuch'", name="nonesuch")

    monkeypatch.setattr(provisioning, "provision", fail)
    assert cli.run(["provision", "--out", "x", "--party", "a"]) == 1
    assert "unexpected error: ModuleNotFoundError" in capsys.readouterr().err


def test_private_text_is_not_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BudgetError("nothing left", private="row 7 of alice", limit=3)

    monkeypatch.setattr(provisioning, "provision", fail)
    for extra in ([], ["--json"]):
        assert cli.run(["provision", "--out", "x", "--party", "a", *extra]) == 6
        assert "alice" not in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_exits_with_130_and_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = ["provision", "--out", str(tmp_path / "kits"), "--party", "a", "--party", "b"]
    with subprocess.Popen(
        [sys.executable, "-m", "src", *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "sotto: searching two safe primes of 1536 bits\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- provision


def test_provision_prints_what_goes_to_whom_and_what_it_stands(tmp_path: Path) -> None:
    done = sotto("provision", "--out", "kits", *SMALL, "--party", "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 key shares open a sum" in done.stdout
    assert "stands a malicious aggregator alone" in done.stdout
    assert f"{tmp_path / 'kits/party-b'}     to party b, and nobody else" in done.stdout
    assert "sotto aggregator --config aggregator.yaml" in done.stdout
    assert done.stderr.splitlines()[-1] == "sotto: writing the kits"


def test_provision_prints_one_json_object_and_nothing_else(tmp_path: Path) -> None:
    done = sotto("provision", "--out", "kits", *SMALL, "--threshold", "2", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert (made["threshold"], made["parties"], made["tolerated_colluders"]) == (2, ["a", "b"], 1)
    assert [Path(kit["path"]).name for kit in made["kits"]] == [
        "aggregator",
        "party-a",
        "party-b",
        "operator",
        "scientist",
    ]


def test_the_threshold_rule_is_printed_when_it_is_violated(tmp_path: Path) -> None:
    done = sotto(
        "provision", "--out", "kits", *SMALL, "--party", "c", "--colluders", "1", "--threshold", "2", cwd=tmp_path
    )
    assert done.returncode == 3
    assert "2·threshold > parties + colluders" in done.stderr
    assert "at least 3 of 3 shares" in done.stderr


# ------------------------------------------------------------------------------------------------------------ budget


CONFIG = """
version: 1
federation: demo
server: {insecure: true}
keys: {custody: aggregator}
privacy: {budget: {max_rounds: 10, epsilon: 8.0, delta: 1e-6}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "aggregator.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def ledger(config: Path) -> Path:
    """An aggregator's database with two reservations, one of them given back."""
    path = config.parent / "state/aggregator.sqlite"
    metadata = MetaData()
    store = LedgerStore(metadata)
    common: dict[str, Any] = {
        "at": "2024-01-01T00:00:00Z",
        "job_id": "j",
        "unit": "party",
        "subject": "federation:demo",
    }

    def fill(connection: Connection) -> None:
        for number in (1, 2):
            fields = common | {"kind": "reservation", "round": number, "reservation_id": f"j/{number}"}
            store.append(connection, **fields, charged_rounds=1, event=NoisySum(noise_multiplier=4.0))
        fields = common | {"kind": "returned", "round": 2, "reservation_id": "j/2", "reason": "no quorum"}
        store.append(connection, **fields)

    async def make() -> None:
        database = Database(path, Migrations("aggregator"))
        await database.open()
        await database.run(fill)
        await database.close()

    asyncio.run(make())
    return path


@pytest.mark.usefixtures("ledger")
def test_the_budget_is_what_the_ledger_says(config: Path) -> None:
    done = sotto("budget", "show", "--config", str(config), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    (row,) = shown["budgets"]
    assert (shown["role"], shown["entries"], len(shown["head"])) == ("aggregator of demo", 3, 64)
    assert (row["unit"], row["subject"], row["entries"]) == ("party", "federation:demo", 3)
    assert (row["rounds_spent"], row["rounds_left"], row["delta"]) == (1, 9, 1e-6)
    assert row["epsilon_spent"] == pytest.approx(epsilon([NoisySum(noise_multiplier=4.0)], delta=1e-6))
    assert row["epsilon_left"] == pytest.approx(8.0 - row["epsilon_spent"])


@pytest.mark.usefixtures("ledger")
def test_the_budget_is_a_table_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["budget", "show", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "Privacy budget, aggregator of demo" in shown
    assert "3 entries, chain verified, head " in shown


def test_reading_the_budget_writes_nothing_and_needs_no_lock(config: Path, ledger: Path) -> None:
    before = ledger.read_bytes()

    async def read_beside() -> int:
        database = Database(ledger, Migrations("aggregator"))
        await database.open()  # the running role, which holds the lock
        code = await asyncio.to_thread(cli.run, ["budget", "show", "--config", str(config), "--json"])
        await database.close()
        return code

    assert asyncio.run(read_beside()) == 0
    assert ledger.read_bytes() == before


def test_a_party_sees_both_of_its_budgets_before_anything_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "party.yaml"
    config.write_text(CONFIG.partition("privacy")[0] + "name: a\nstate_dir: '{name}'\n")

    async def make() -> None:
        metadata = MetaData()
        LedgerStore(metadata)
        database = Database(tmp_path / "b/party.sqlite", Migrations("party"))
        await database.open()
        await database.close()

    asyncio.run(make())
    assert cli.run(["budget", "show", "--config", str(config), "--name", "b", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["role"] == "party b of demo"
    assert [(row["unit"], row["rounds_left"], row["epsilon_left"]) for row in shown["budgets"]] == [
        ("example", None, 4.0),
        ("party", 10_000, None),
    ]


def test_a_role_that_never_ran_has_no_budget_to_show(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["budget", "show", "--config", str(config)]) == CATALOGUE[NotFoundError].exit_code
    assert capsys.readouterr().err == "sotto: there is no database aggregator.sqlite\n"


def test_a_ledger_that_was_touched_is_named(config: Path, ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(ledger)
    triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for (name,) in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    connection.execute("UPDATE ledger SET line = replace(line, '\"round\":2', '\"round\":3') WHERE sequence = 2")
    connection.commit()
    connection.close()
    assert cli.run(["budget", "show", "--config", str(config)]) == CATALOGUE[LedgerError].exit_code
    assert "ledger entry 2" in capsys.readouterr().err
