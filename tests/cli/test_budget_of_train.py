"""`sotto budget` on a node without a configuration: the ledger that `sotto train` keeps there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src import cli
from src.cli.train_ledger import DATABASE_FILE, DEFAULT_LIMITS, KEY_FILE, LedgerPurse
from src.errors import CATALOGUE, BudgetError, ConflictError, InvalidInput, LedgerError, NotFoundError
from src.privacy.accounting import epsilon
from src.privacy.events import DpSgdSteps
from src.protocol.signing import SigningKey
from src.storage.books import RETURNS_OF_A_JOB_A_DAY
from src.storage.database import Database
from src.storage.migrations import Migrations

STEPS = DpSgdSteps(sampling_rate=1 / 16, noise_multiplier=0.64, steps=16)
"""Of a budget of 10 two such runs may spend, and no third."""
ADA = ("--unit", "example", "--subject", "user:ada")
Run = Callable[..., tuple[int, str, str]]


def spend(place: Path, job_id: str = "j") -> None:
    """What a run of `sotto train` does to its ledger."""
    purse = LedgerPurse(
        place / DATABASE_FILE,
        key=SigningKey.load_or_make(place / KEY_FILE),
        limits=DEFAULT_LIMITS,
        account=("example", "user:ada"),
        user="ada",
        stated_delta=1e-5,
    )
    purse.reserve(job_id, STEPS)
    purse.finalise({"model_sha256": "ab" * 32})


def test_what_is_given_back_is_not_spent_and_of_too_many_a_day_it_is(place: Path) -> None:
    def purse(job_id: str) -> LedgerPurse:
        made = LedgerPurse(
            place / DATABASE_FILE,
            key=SigningKey.load(place / KEY_FILE),
            limits=DEFAULT_LIMITS,
            account=("example", "user:ada"),
            user="ada",
            stated_delta=1e-5,
        )
        made.reserve(job_id, STEPS)
        return made

    for _ in range(RETURNS_OF_A_JOB_A_DAY):
        run = purse("k")
        (charged,) = run.spent()
        assert run.give_back("not ready")
        (left,) = run.spent()
        assert left.epsilon < charged.epsilon
    run = purse("k")
    assert not run.give_back("not ready")
    assert run.spent() == [charged]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ledger lies by default, once a run was charged."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    found = tmp_path / "xdg/sotto/train"
    found.mkdir(parents=True)
    spend(found)
    return found


@pytest.fixture
def budget(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `sotto budget …`: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(["budget", *arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


def read(budget: Run, *arguments: str) -> dict[str, Any]:
    code, out, err = budget(*arguments, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize("by", ["default", "--state-dir"])
def test_the_ledger_of_train_is_shown_listed_exported_and_verified(
    by: str, place: Path, tmp_path: Path, budget: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: tuple[str, ...] = ()
    if by == "--state-dir":
        where = (by, str(place))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    shown = read(budget, "show", *where)
    (row,) = shown["budgets"]
    assert shown["role"] == f"sotto train in {place}"
    assert (row["subject"], row["rounds_spent"], row["epsilon_limit"]) == ("user:ada", 1, 10.0)
    assert row["epsilon_spent"] == epsilon([STEPS], delta=1e-5)
    kinds = [entry["kind"] for entry in read(budget, "history", *where)["entries"]]
    assert kinds == ["correction", "reservation", "final", "release"]

    file = tmp_path / "ledger.jsonl"
    assert budget("export", "--out", str(file), *where)[0] == 0
    report = read(budget, "verify", *where, "--head", shown["head"])
    assert (report["signed"], report["whose_is_checked"]) == (4, True)
    assert read(budget, "verify", str(file), "--state-dir", str(place))["whose_is_checked"] is True
    assert read(budget, "verify", str(file))["whose_is_checked"] is False


def test_the_table_says_whose_it_is(place: Path, budget: Run) -> None:
    code, out, _ = budget("show")
    assert code == 0
    assert "Privacy budget, sotto train in" in out
    assert "4 entries, chain verified" in out


def test_a_ledger_signed_by_another_key_does_not_verify(place: Path, budget: Run) -> None:
    (place / KEY_FILE).unlink()
    SigningKey.load_or_make(place / KEY_FILE)
    code, _, err = budget("verify")
    assert code == CATALOGUE[LedgerError].exit_code
    assert "ledger entry 1: it is signed by another key" in err


def test_what_is_set_is_what_counts_as_nothing_else_says_anything(place: Path, budget: Run) -> None:
    spend(place, "second")
    with pytest.raises(BudgetError):
        spend(place, "third")
    changed = read(budget, "set", *ADA, "--epsilon", "20", "--reason", "she agreed, 3 May")
    assert (changed["in_force"][0]["epsilon"], changed["warnings"]) == (20.0, [])
    spend(place, "third")
    assert read(budget, "show")["warnings"] == []
    read(budget, "set", *ADA, "--epsilon", "1", "--reason", "she thought better of it")
    with pytest.raises(BudgetError):
        spend(place, "fourth")
    assert read(budget, "show")["budgets"][0]["epsilon_left"] == 0.0


def test_a_reset_begins_a_new_period(place: Path, budget: Run) -> None:
    spend(place, "second")
    code, _, err = budget("reset", *ADA, "--reason", "consent was asked again")
    assert code == 0
    assert "A NEW ACCOUNTING PERIOD HAS BEGUN for user:ada" in err
    spend(place, "third")
    (row,) = read(budget, "show", *ADA)["budgets"]
    assert (row["rounds_spent"], row["rounds_ever"], row["periods"]) == (1, 3, 2)


def test_a_budget_is_not_changed_while_a_run_writes(place: Path, budget: Run) -> None:
    async def beside() -> tuple[int, str, str]:
        database = Database(place / DATABASE_FILE, Migrations("party"))
        await database.open()
        found = await asyncio.to_thread(budget, "set", *ADA, "--epsilon", "8", "--reason", "more")
        await database.close()
        return found

    code, _, err = asyncio.run(beside())
    assert code == CATALOGUE[ConflictError].exit_code
    assert "is running. Stop it" in err


COMMANDS: list[tuple[str, ...]] = [
    ("show",),
    ("history",),
    ("export",),
    ("verify",),
    ("set", *ADA, "--epsilon", "8", "--reason", "x"),
    ("reset", *ADA, "--reason", "x"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_where_nothing_was_trained_there_is_nothing_and_nothing_is_made(
    command: tuple[str, ...], tmp_path: Path, budget: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    for where in ((), ("--state-dir", str(tmp_path / "nowhere"))):
        code, out, err = budget(*command, *where)
        assert (code, out) == (CATALOGUE[NotFoundError].exit_code, "")
        assert err.startswith("sotto: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--name", "b"), "it needs --config"), (("--config", "party.yaml", "--state-dir", "."), "not of both")],
)
def test_options_that_do_not_go_together_are_refused(
    command: tuple[str, ...], arguments: tuple[str, ...], says: str, place: Path, budget: Run
) -> None:
    code, out, err = budget(*command, *arguments)
    assert (code, out, says in err) == (CATALOGUE[InvalidInput].exit_code, "", True)


def test_a_limit_on_a_job_of_train_is_named_as_train_names_it_and_holds(place: Path, budget: Run) -> None:
    job = ("--unit", "example", "--subject", "job:zz")
    assert read(budget, "set", *job, "--epsilon", "0.1", "--reason", "a cap")["in_force"][0]["epsilon"] == 0.1
    with pytest.raises(BudgetError, match=r"limit 0\.1"):
        spend(place, "zz")
    spend(place, "yy")
    (row,) = [each for each in read(budget, "show", "--subject", "job:yy")["budgets"] if each["unit"] == "example"]
    assert row["rounds_spent"] == 1
    assert read(budget, "history", "--job", "yy")["found"] == 3
