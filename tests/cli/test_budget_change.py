"""`sotto budget set | reset`: what an operator changes, with a reason, and what is refused."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from src.cli.budget_change import check_enforced
from src.config import load_aggregator_config
from src.errors import CATALOGUE, ConflictError, InvalidInput, NotFoundError
from src.privacy.accounting import epsilon
from src.privacy.events import NonPrivate
from src.storage.database import Database
from src.storage.migrations import Migrations
from tests.cli.spender import CONFIG, RANDHIE, STEPS, Role


def test_a_budget_grows_once_configuration_and_ledger_say_so(role: Role) -> None:
    role.file.write_text(CONFIG.replace("{epsilon: 4.0}", "{epsilon: 8.0}"))
    assert role.row()["epsilon_limit"] == 4.0
    (warning,) = role.read("show")["warnings"]
    assert "--unit example --subject 'dataset:*'" in warning
    changed = role.change("set", "--unit", "example", "--subject", "dataset:*")
    assert changed["warnings"] == []
    assert changed["entry"]["reason"] == "the ethics board, minutes of 3 May"
    assert role.row()["epsilon_limit"] == 8.0
    assert role.read("show")["warnings"] == []
    assert role.read("verify")["signed"] == 8


def test_a_budget_that_is_raised_in_the_ledger_alone_says_what_still_counts(role: Role) -> None:
    changed = role.change("set", *RANDHIE, "--epsilon", "8", "--max-rounds", "5")
    assert changed["in_force"] == [{"max_rounds": 5, "epsilon": 4.0, "delta": 1e-5, "rounds_left": 4}]
    (warning,) = changed["warnings"]
    assert "entered as 5 rounds, ε 8 at δ 1e-05, the configuration says no limit in rounds, ε 4" in warning
    code, out, err = role.run("set", "--config", str(role.file), *RANDHIE, "--max-rounds", "none", "--reason", "again")
    assert code == 0
    assert "in force: no limit in rounds, ε 4 at δ 1e-05; spent 1 round," in out
    told = " ".join(err.split())
    assert "the smaller of both counts. To have more, raise privacy.budgets.example in the configuration too." in told
    assert [line for line in err.splitlines() if len(line) > 100] == []
    assert "\n  sotto budget set --config … --unit example --subject 'dataset:randhie' --reason …\n" in err


def test_a_budget_that_is_lowered_in_the_ledger_says_so_once_and_not_after_changes_of_others(role: Role) -> None:
    (warning,) = role.change("set", *RANDHIE, "--epsilon", "3")["warnings"]
    assert "the smaller of both counts. To change what is entered, stop this role and run: sotto budget set" in warning
    assert role.change("set", "--unit", "party", "--subject", "federation:demo", "--max-rounds", "9")["warnings"] == []
    (mixed,) = role.change("set", *RANDHIE, "--epsilon", "8", "--delta", "1e-7")["warnings"]
    assert "raise privacy.budgets.example in the configuration too" in mixed


@pytest.mark.parametrize("command", ["set", "reset"])
def test_without_unit_or_subject_it_says_that_both_are_needed_and_which_there_are(role: Role, command: str) -> None:
    of_all = "dataset:*, " if command == "set" else ""
    for given in ((), RANDHIE[:2], RANDHIE[2:]):
        code, _, err = role.run(command, "--config", str(role.file), *given, "--reason", "more")
        assert code == CATALOGUE[InvalidInput].exit_code
        assert (
            f"both --unit and --subject are needed. What there is: --unit example --subject {of_all}dataset:randhie, "
            "user:NAME, job:NAME; --unit party --subject federation:demo, job:NAME" in err
        )
    code, out, _ = role.run(command, "--help")
    assert code == 0
    for option in ("--unit", "--subject"):
        _, _, told = out.partition(f"{option} <str>")
        assert "[required]" in told.partition(" --")[0], option


def test_an_infinity_is_the_same_sign_wherever_people_read_it(role: Role) -> None:
    role.spend(2, whole=NonPrivate(unit="party", reason="no noise"))
    demo = ("--config", str(role.file), "--unit", "party", "--subject", "federation:demo", "--reason", "x")
    for arguments in (
        ("set", *demo, "--max-rounds", "8"),
        ("reset", *demo),
        ("show", *demo[:2]),
        ("history", *demo[:2]),
    ):
        code, out, err = role.run(*arguments)
        assert code == 0
        assert ("∞" in out + err) == (arguments[0] != "history")
        assert not re.search(r"\binf\b", out + err)


def test_a_budget_at_another_delta_is_enforced_beside_the_first_and_not_mixed(role: Role) -> None:
    role.change("set", *RANDHIE, "--epsilon", "6", "--delta", "1e-7")
    rows = role.read("show", *RANDHIE)["budgets"]
    assert [(row["epsilon_limit"], row["delta"]) for row in rows] == [(6.0, 1e-7), (4.0, 1e-5)]
    assert [row["epsilon_spent"] for row in rows] == [epsilon([STEPS], delta=delta) for delta in (1e-7, 1e-5)]


def test_a_reset_begins_a_new_period_loudly_and_keeps_the_history(role: Role) -> None:
    role.release(1)
    before = role.read("history")["entries"]
    code, _, err = role.run("reset", "--config", str(role.file), *RANDHIE, "--reason", "consent was asked again")
    assert code == 0
    assert "A NEW ACCOUNTING PERIOD HAS BEGUN for dataset:randhie" in err
    spent = epsilon([STEPS], delta=1e-5)
    assert f"exposed to 1 round and ε {spent:.4g}" in err
    assert role.read("history")["entries"][: len(before)] == before
    row = role.row()
    assert (row["rounds_spent"], row["epsilon_spent"], row["epsilon_left"]) == (0, 0.0, 4.0)
    assert (row["periods"], row["rounds_ever"], row["epsilon_ever"]) == (2, 1, spent)
    assert role.row("user:ada")["rounds_spent"] == 1
    role.spend(2)
    assert (role.row()["rounds_spent"], role.row()["rounds_ever"]) == (1, 2)
    assert "accounting period 2; over all periods 2 rounds" in role.run("show", "--config", str(role.file))[1]


def test_a_reset_between_final_and_release_leaves_the_round_on_the_books(role: Role) -> None:
    changed = role.change("reset", *RANDHIE)
    assert "Rounds that are reserved or final, and not yet released, count on." in changed["warnings"][0]
    assert role.row()["rounds_spent"] == 1
    role.release(1)
    assert role.row()["rounds_spent"] == 1


def test_a_budget_is_not_changed_while_its_role_runs_and_the_refusal_says_what_to_do(role: Role) -> None:
    async def beside() -> tuple[int, str, str]:
        database = Database(role.config.database_path, Migrations("party"))
        await database.open()
        arguments = ("set", "--config", str(role.file), *RANDHIE, "--epsilon", "8", "--reason", "more")
        found = await asyncio.to_thread(role.run, *arguments)
        await database.close()
        return found

    head = role.read("show")["head"]
    code, _, err = asyncio.run(beside())
    assert code == CATALOGUE[ConflictError].exit_code
    assert "the party a of demo is running. Stop it, run this again, start it again" in err
    assert role.read("show")["head"] == head


WRONG: list[tuple[str, tuple[str, ...], type[Exception]]] = [
    ("no reason", ("set", *RANDHIE, "--epsilon", "8", "--reason", " "), InvalidInput),
    ("no unit", ("set", "--subject", "dataset:randhie", "--reason", "x"), InvalidInput),
    ("another unit", ("set", "--unit", "user", "--subject", "dataset:randhie", "--reason", "x"), InvalidInput),
    ("no subject", ("set", "--unit", "example", "--reason", "x"), InvalidInput),
    ("another kind", ("set", "--unit", "example", "--subject", "row:1", "--reason", "x"), InvalidInput),
    ("no name", ("set", "--unit", "example", "--subject", "dataset:", "--reason", "x"), InvalidInput),
    ("no number", ("set", *RANDHIE, "--epsilon", "much", "--reason", "x"), InvalidInput),
    ("ε out of range", ("set", *RANDHIE, "--epsilon", "-1", "--reason", "x"), InvalidInput),
    ("infinite ε", ("set", *RANDHIE, "--epsilon", "inf", "--reason", "x"), InvalidInput),
    ("δ out of range", ("set", *RANDHIE, "--delta", "1", "--reason", "x"), InvalidInput),
    ("no limit at all", ("set", *RANDHIE, "--epsilon", "none", "--reason", "x"), InvalidInput),
    ("nothing configured", ("set", "--unit", "party", "--subject", "job:j", "--reason", "x"), InvalidInput),
    ("a reset of all", ("reset", "--unit", "example", "--subject", "dataset:*", "--reason", "x"), InvalidInput),
    ("show at no δ", ("show", "--delta", "0"), InvalidInput),
    ("a head that is none", ("verify", "--head", "ABC"), InvalidInput),
    ("a key that is none", ("verify", "--verify-key", "ABC"), InvalidInput),
    ("a roster that is not there", ("verify", "--roster", "/nowhere"), NotFoundError),
    ("a file that is not there", ("verify", "/nowhere"), NotFoundError),
]


@pytest.mark.parametrize(("arguments", "error"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_refused_is(role: Role, arguments: tuple[str, ...], error: type[Exception]) -> None:
    head = role.read("show")["head"]
    code, out, err = role.run(arguments[0], "--config", str(role.file), *arguments[1:])
    assert (code, out) == (CATALOGUE[error].exit_code, "")  # type: ignore[index]  # all are of the catalogue
    assert err.startswith("sotto: ")
    assert role.read("show")["head"] == head


NOBODY = "here: such a budget would bind nobody. What is:"
BOUND_TO_NOBODY = [
    ("party", "federation:other", f"there is no federation 'other' {NOBODY} demo"),
    ("party", "federation:*", "there is no federation '*' here"),
    ("example", "dataset:randhi", f"there is no dataset 'randhi' {NOBODY} *, randhie"),
    (
        "party",
        "party:a",
        "What is: --unit example --subject dataset|user|job:…; --unit party --subject federation|job:…",
    ),
    ("party", "user:ada", "nothing is counted here on user at party level"),
    ("party", "dataset:randhie", "nothing is counted here on dataset at party level"),
]


@pytest.mark.parametrize(("unit", "subject", "said"), BOUND_TO_NOBODY)
def test_a_budget_that_would_bind_nobody_is_refused_with_what_can_be_set_here(
    role: Role, unit: str, subject: str, said: str
) -> None:
    for command in (("set", "--epsilon", "1"), *([("reset",)] if not subject.endswith("*") else [])):
        arguments = (*command[1:], "--unit", unit, "--subject", subject, "--reason", "x")
        code, _, err = role.run(command[0], "--config", str(role.file), *arguments)
        assert code == CATALOGUE[InvalidInput].exit_code
        assert said in err
    assert len(role.read("history")["entries"]) == 7


def test_a_user_whom_nobody_knew_is_admitted_with_a_warning_and_what_has_no_budget_is_not_reset(role: Role) -> None:
    """Whom a default gives a quota is known, as is whom the ledger or a dataset names."""
    eve = ("--unit", "example", "--subject", "user:eve")
    assert role.change("set", *eve, "--epsilon", "2")["in_force"][0]["epsilon"] == 2.0
    role.file.write_text(CONFIG.replace(", default_user_epsilon: 10.0", "").replace("100}", "100, user: bob}"))
    for name in ("ada", "bob", "eve"):
        role.change("set", "--unit", "example", "--subject", f"user:{name}", "--epsilon", "1")
        role.change("reset", "--unit", "example", "--subject", f"user:{name}")
    for subject in ("user:mallory", "job:i"):
        arguments = ("--unit", "example", "--subject", subject, "--reason", "x")
        code, _, err = role.run("reset", "--config", str(role.file), *arguments)
        assert code == CATALOGUE[InvalidInput].exit_code
        assert f"no subject {subject} here at example level" in err
        assert ("default_user_epsilon makes a user known" in err) == subject.startswith("user:")
    mallory = ("--unit", "example", "--subject", "user:mallory", "--epsilon", "1")
    for said in (True, False):
        warnings = role.change("set", *mallory)["warnings"]
        assert any(text.startswith("nothing has named user:mallory here before") for text in warnings) == said
    assert role.row("user:mallory")["epsilon_limit"] == 1.0


def test_the_aggregator_counts_on_its_federation_parties_and_jobs_and_on_nothing_else() -> None:
    config = load_aggregator_config(Path(__file__).parents[2] / "config/aggregator.yaml", environ={})
    for subject in ("federation:demo", "party:a", "party:*", "job:*", "job:5"):
        check_enforced(config, ("party", subject))
    for account in (("party", "user:ada"), ("party", "dataset:randhie"), ("party", "federation:other")):
        with pytest.raises(InvalidInput, match="would bind nobody"):
            check_enforced(config, account)
    for subject in ("dataset:randhie", "user:ada", "job:5", "party:a"):
        with pytest.raises(InvalidInput, match=r"at example level.*--unit party --subject federation\|party\|job:…"):
            check_enforced(config, ("example", subject))


def test_a_role_that_never_ran_has_nothing_to_change_and_no_database_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "party.yaml"
    file.write_text(CONFIG)
    role = Role(file, capsys)
    for command in (("set", *RANDHIE, "--epsilon", "8"), ("reset", *RANDHIE)):
        code, _, _ = role.run(command[0], "--config", str(file), *command[1:], "--reason", "x")
        assert code == CATALOGUE[NotFoundError].exit_code
    assert not (tmp_path / "state").exists()
