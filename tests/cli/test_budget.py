"""`sotto budget show | history | export | verify`: what is shown, and what is exported and verified anywhere."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from src.cli import budget_source
from src.cli.budget_ledger import replay
from src.config import load_party_config
from src.config_budgets import party_limits
from src.errors import CATALOGUE, BudgetError, ConflictError, InvalidInput, LedgerError
from src.privacy.accounting import epsilon
from src.privacy.events import NoisySum
from src.privacy.figures import EVERYBODY, NOT_ONLY_THE_RELEASE, OWN_NOISE, UNKNOWN
from src.privacy.ledger import Limit
from src.privacy.noise_plan import plan_noise
from src.protocol.roster import Member, Roster, save_roster, sign_roster
from src.protocol.signing import SigningKey
from src.storage.books import Cost
from tests.cli.spender import AT, CONFIG, STEPS, Role


def test_the_shipped_party_gives_a_user_whom_it_does_not_know_ten_at_1e_5() -> None:
    shipped = load_party_config(Path(__file__).parents[2] / "config/party.yaml", environ={})
    assert party_limits(shipped).configured(("example", "user:user_456")) == Limit(
        max_rounds=None, epsilon=10.0, delta=1e-5
    )


# --- show, history --------------------------------------------------------------------------------------------------


def test_show_says_what_every_account_has_seen_and_converts_to_another_delta(role: Role) -> None:
    shown = role.read("show", "--delta", "1e-7")
    rows = {(row["unit"], row["subject"]): row for row in shown["budgets"]}
    assert list(rows) == [("example", "dataset:randhie"), ("example", "user:ada"), ("party", "federation:demo")]
    spent = epsilon([STEPS], delta=1e-5)
    for subject, limit in (("dataset:randhie", 4.0), ("user:ada", 10.0)):
        row = rows["example", subject]
        assert (row["epsilon_spent"], row["epsilon_limit"], row["epsilon_ever"]) == (spent, limit, spent)
        assert row["epsilon_at"] == epsilon([STEPS], delta=1e-7)
    assert (rows["party", "federation:demo"]["rounds_left"], shown["warnings"]) == (8, [])
    assert role.row("job:j")["rounds_spent"] == 1
    code, out, _ = role.run("show", "--config", str(role.file), "--delta", "1e-7")
    assert code == 0
    converted = f"ε {epsilon([STEPS], delta=1e-7):.4g} at δ 1e-07, converted from the mechanisms under the same"
    assert f"dataset:randhie (example level): {converted}" in out


@pytest.mark.parametrize("wide", [20, 60, 80])
def test_show_cuts_no_number_in_a_pipe_or_on_a_narrow_terminal(
    role: Role, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(wide))
    monkeypatch.setenv("LINES", "24")
    piped = role.run("show", "--config", str(role.file))[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    seen = role.run("show", "--config", str(role.file))[1]
    (row,) = [line for line in piped.splitlines() if line.startswith("example") and "dataset:randhie" in line]
    assert len(row.split("  ")) > 7  # the whole of it in one line
    assert [cell for cell in row.split() if cell not in seen] == []
    assert "…" not in piped + seen


def test_show_names_whom_each_figure_holds_against_and_what_it_assumes(role: Role) -> None:
    """Also where a ledger does not know it: entries of an earlier version count as nothing against others."""
    rows = {row["unit"]: row for row in role.read("show")["budgets"]}
    row = rows["example"]
    assert (row["against"], row["assumption"]) == (EVERYBODY, OWN_NOISE)
    assert row["epsilon_against_aggregator"] == row["epsilon_if_all_others_collude"] == row["epsilon_spent"]
    old = rows["party"]
    assert (old["against"], old["assumption"]) == (NOT_ONLY_THE_RELEASE, UNKNOWN)
    figures = ("epsilon_spent", "epsilon_against_aggregator", "epsilon_if_all_others_collude")
    assert [old[name] for name in figures] == [None] * 3
    plan = plan_noise(noise_by="both", noise_multiplier=4.0, sensitivity=1e4, quorum=5, colluders=1)
    role.release(1)
    role.change("reset", "--unit", "party", "--subject", "federation:demo")
    role.spend(2, whole=plan.event("release", dimension=9))
    (new,) = role.read("show", "--unit", "party")["budgets"]
    _, aggregator, others = plan.figures(dimension=9, rounds=1, delta=1e-5)
    assert (new["epsilon_spent"], new["assumption"]) == (pytest.approx(aggregator.epsilon), aggregator.assumes)
    assert new["epsilon_against_aggregator"] == new["epsilon_spent"]
    assert new["assumption_against_aggregator"] == aggregator.assumes
    assert new["epsilon_if_all_others_collude"] == pytest.approx(others.epsilon)
    code, out, _ = role.run("show", "--config", str(role.file))
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 100] == []
    told = " ".join(out.split())
    said = [
        f"federation:demo (party level): ε {aggregator.epsilon:.4g} at δ 1e-05 counts against {NOT_ONLY_THE_RELEASE}",
        f"assumes {aggregator.assumes}",
        f"against the aggregator ε {aggregator.epsilon:.4g}; if all others collude ε {others.epsilon:.4g}",
        "what it has been exposed to; if all others collude ε ∞ "
        f"assumes, by kind of events: - {UNKNOWN} - {aggregator.assumes}",
    ]
    assert [each for each in said if each not in told] == []
    assert "dataset:randhie (example level), user:ada (example level): ε " in out  # said once for both


def test_show_says_that_a_figure_means_nothing(role: Role) -> None:
    overflow = NoisySum(noise_multiplier=0.1, failure_probability=2.0**-64)
    role.spend(2, whole=overflow)
    assert role.read("show", "--unit", "party")["budgets"][0]["epsilon_spent"] is None
    _, out, _ = role.run("show", "--config", str(role.file), "--unit", "party")
    out = " ".join(out.split())
    assert f"ε ∞ at δ 1e-05 counts against {NOT_ONLY_THE_RELEASE}: no meaningful party-level guarantee" in out


def test_show_tells_what_other_accountants_make_of_it_only_when_asked_and_what_that_is_worth(role: Role) -> None:
    role.file.write_text(CONFIG.replace("budgets: {", "budgets: {against: release, "))
    assert {row["estimates"] for row in role.read("show")["budgets"]} == {None}
    for row in role.read("show", "--estimates")["budgets"]:
        charged, other = row["estimates"]
        assert (charged["epsilon"], charged["standing"]) == (row["epsilon_spent"], "bound")
        assert other["epsilon"] < charged["epsilon"]
        assert other["standing"] == ("bound" if row["unit"] == "example" else "estimate")
    role.spend(2, whole=NoisySum(noise_multiplier=0.1))
    _, out, _ = role.run("show", "--config", str(role.file), "--estimates")
    assert "  PLD (dp-accounting): ε " in out
    assert "  PLD (dp-accounting): skipped (not computed: epsilon is above 50)" in out


def test_history_is_narrowed_and_says_what_it_leaves_out(role: Role) -> None:
    role.spend(2, scientist="ann")
    kinds = [entry["kind"] for entry in role.read("history")["entries"]]
    assert kinds == [*["correction"] * 3, *["reservation"] * 2, *["final"] * 2, *["reservation"] * 2, *["final"] * 2]
    for arguments, count in (
        (("--kind", "final"), 4),
        (("--subject", "user:ada"), 4),
        (("--job", "j", "--unit", "party"), 4),
        (("--subject", "dataset:randhie", "--kind", "refusal"), 0),
    ):
        assert len(role.read("history", *arguments)["entries"]) == count
    code, out, _ = role.run("history", "--config", str(role.file), "--limit", "2")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 100] == []
    assert "the 2 newest of 11" in out
    entry = "   10  2026-01-01T00:00:00  final           example dataset:randhie  user ada  job j round 2"
    assert f'{entry}  "the\n       upload begins"\n' in out
    _, out, _ = role.run("history", "--config", str(role.file), "--job", "j", "--kind", "reservation", "--limit", "2")
    assert "user ada  ordered by ann  job j round 2" in " ".join(out.split("\n       "))
    charged = role.read("history", "--kind", "reservation")["entries"]
    assert [entry.get("scientist") for entry in charged] == [None, None, "ann", "ann"]
    _, out, _ = role.run("history", "--config", str(role.file), "--kind", "refusal")
    assert out.startswith("no entry is all that was asked for\n11 entries")


NOT_THERE = [
    (("--unit", "exmaple"), "--unit must be example or party"),
    (("--subject", "randhie"), "--subject must be one of dataset:NAME, user:NAME"),
    (("--subject", "data:randhie"), "--subject must be one of dataset:NAME, user:NAME"),
    (("--subject", "dataset:randhi"), "no subject dataset:randhi here: it has neither a limit nor an entry. Known: "
     "dataset:randhie"),
    (("--subject", "federation:dmo"), "Known: federation:demo"),
    (("--subject", "party:a"), "Known: federation:demo, job:j, dataset:randhie, user:ada"),
    (("--unit", "party", "--subject", "user:ada"), "no subject user:ada here at party level"),
    (("--subject", "job:i"), "no subject job:i here: it has neither a limit nor an entry. Known: job:j"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["show", "history"])
@pytest.mark.parametrize(("options", "said"), NOT_THERE, ids=[" ".join(options) for options, _ in NOT_THERE])
def test_what_is_asked_for_and_not_there_is_refused_with_what_there_is(
    role: Role, command: str, options: tuple[str, ...], said: str
) -> None:
    code, out, err = role.run(command, "--config", str(role.file), *options)
    assert (code, out) == (CATALOGUE[InvalidInput].exit_code, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_history_refuses_a_kind_or_job_that_there_is_not(role: Role) -> None:
    for option, said in (
        (
            ("--kind", "refused"),
            "--kind must be one of opening_balance, reservation, final, returned, refusal, release",
        ),
        (("--job", "i"), "no subject job:i here"),
    ):
        code, _, err = role.run("history", "--config", str(role.file), *option)
        assert (code, said in err) == (CATALOGUE[InvalidInput].exit_code, True)


def test_not_all_subjects_are_named_the_newest_jobs_first(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_source, "SHOWN_KNOWN", 2)
    for job_id in ("k", "l"):
        role.spend(1, job_id)
    _, _, err = role.run("show", "--config", str(role.file), "--subject", "job:i")
    assert "Known: job:l, job:k and 1 more" in err


def test_a_limit_of_which_nothing_is_spent_is_shown_and_a_stranger_is_said_to_be_one(role: Role) -> None:
    shown = role.read("show", "--subject", "user:eve")["budgets"]
    assert [(row["unit"], row["epsilon_left"], row["rounds_spent"]) for row in shown] == [("example", 10.0, 0)]
    _, out, _ = role.run("show", "--config", str(role.file), "--subject", "user:eve")
    assert "user:eve (example level): no entry of this ledger names it so far; its limit is that of user:*\n" in out
    assert role.read("history", "--subject", "user:eve")["entries"] == []
    assert [row["unit"] for row in role.read("show", "--subject", "job:j")["budgets"]] == ["example", "party"]
    assert role.read("show", "--subject", "dataset:*")["budgets"][0]["epsilon_limit"] == 4.0


def test_a_user_who_is_refused_is_not_shown_without_a_limit(role: Role) -> None:
    """Neither one of whom only a refusal tells, nor one whom the configuration named once."""
    ada = role.read("show", "--subject", "user:ada")["budgets"][0]
    role.file.write_text(CONFIG.replace(", default_user_epsilon: 10.0", ""))
    cost = Cost(account=("example", "dataset:randhie"), event=STEPS, user="mallory")
    role.write(lambda c: role.books().refuse(c, "k", 1, [cost], error=BudgetError("no budget here"), at=AT))
    for name in ("mallory", "ada"):
        row = role.row(f"user:{name}")
        assert (row["rounds_left"], row["epsilon_left"], row["epsilon_limit"]) == (0, 0.0, 0.0)
    assert role.row("user:ada")["epsilon_spent"] == ada["epsilon_spent"]
    _, out, _ = role.run("show", "--config", str(role.file), "--unit", "example")
    (line,) = (line for line in out.splitlines() if "user:mallory  " in line)
    assert line.split()[2:6] == ["0", "0", "0", "0"]
    assert "\nuser:ada, user:mallory: refused, as not known here (privacy.budgets.users or" in out


def test_show_says_that_more_may_fit_than_is_left_where_something_is_spent(role: Role) -> None:
    said = "may fit although it is above ε left"
    _, out, _ = role.run("show", "--config", str(role.file))
    assert " ".join(out.split()).count(said) == 1
    for unit_or_stranger in (("--unit", "party"), ("--subject", "user:eve")):  # no limit in ε; nothing spent
        assert said not in " ".join(role.run("show", "--config", str(role.file), *unit_or_stranger)[1].split())


# --- export, verify -------------------------------------------------------------------------------------------------


@pytest.fixture
def export(role: Role, tmp_path: Path) -> Path:
    """An exported ledger."""
    file = tmp_path / "ledger.jsonl"
    assert role.run("export", "--config", str(role.file), "--out", str(file))[0] == 0
    return file


def test_an_export_is_the_same_on_stdout_and_does_not_overwrite(role: Role, export: Path) -> None:
    assert role.run("export", "--config", str(role.file))[1] == export.read_text()
    assert export.stat().st_mode & 0o777 == 0o600
    before = export.read_bytes()
    assert role.run("export", "--config", str(role.file), "--out", str(export))[0] == CATALOGUE[ConflictError].exit_code
    assert export.read_bytes() == before


def test_an_export_verifies_without_a_server_a_configuration_or_the_key(role: Role, export: Path) -> None:
    code, out, _ = role.run("verify", str(export), "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["entries"], report["signed"], report["version_1"]) == (7, 7, 0)
    assert (report["signed_by"], report["whose_is_checked"]) == ([role.key.verify_key.hex()], False)
    code, out, _ = role.run("verify", str(export), "--verify-key", role.key.verify_key.hex(), "--head", report["head"])
    assert code == 0
    assert out.splitlines()[0] == f"7 entries, chain verified, head {report['head']}"
    assert "1 head recorded elsewhere is in it" in out
    assert "cut off" not in out


def test_verify_without_a_head_says_that_a_cut_end_was_not_looked_for(role: Role, export: Path) -> None:
    export.write_bytes(b"".join(export.read_bytes().splitlines(keepends=True)[:-1]))
    code, out, _ = role.run("verify", str(export))
    assert code == 0
    assert "whether its end was cut off was not checked: such a ledger is whole in itself" in " ".join(out.split())


def test_the_key_comes_from_a_roster_too_and_another_is_refused(role: Role, export: Path, tmp_path: Path) -> None:
    operator = SigningKey.generate()
    roster = Roster(
        federation="demo",
        key_id="",
        custody="aggregator",
        threshold=0,
        colluders=0,
        aggregator_verify_key=operator.verify_key,
        members=(Member("a", role.key.verify_key),),
        created_at=AT,
    )
    file = tmp_path / "roster.json"
    save_roster(file, sign_roster(roster, operator), operator_verify_key=operator.verify_key)
    assert role.run("verify", str(export), "--roster", str(file), "--signer", "a")[0] == 0
    code, _, err = role.run("verify", str(export), "--roster", str(file))
    assert code == CATALOGUE[LedgerError].exit_code
    assert (
        f"ledger entry 1: it is signed by another key ({role.key.verify_key.hex()[:16]}…), that of a: --signer a" in err
    )
    stranger = SigningKey.generate().verify_key.hex()
    code, _, err = role.run("verify", str(export), "--roster", str(file), "--verify-key", stranger)
    assert (code, "--signer" in err) == (CATALOGUE[LedgerError].exit_code, False)


def test_every_byte_of_an_export_that_changes_is_found_and_its_line_named(export: Path) -> None:
    content = export.read_bytes()
    lines = content.splitlines(keepends=True)
    content = b"".join(lines[:3])
    owner = [number for number, line in enumerate(lines[:3], start=1) for _ in line]
    for position, number in enumerate(owner):
        bent = bytearray(content)
        bent[position] ^= 1 << (position % 7)
        parts = bytes(bent).split(b"\n")
        with pytest.raises(LedgerError) as caught:
            replay(parts[:-1] if not parts[-1] else parts, key=None, heads=[])
        assert caught.value.metadata["entry"] == str(number)


def test_a_damaged_export_is_refused_by_the_command_with_its_line(role: Role, export: Path) -> None:
    export.write_bytes(export.read_bytes().replace(b'"round":1', b'"round":2', 1))
    code, _, err = role.run("verify", str(export), "--json")
    assert code == CATALOGUE[LedgerError].exit_code
    assert json.loads(err)["error"]["metadata"] == {"entry": "4"}


def test_of_a_broken_signature_and_a_broken_chain_the_first_is_named(role: Role, export: Path) -> None:
    """By the command, of a file and of the database, and by the role when it starts."""
    lines = [json.loads(line) for line in export.read_text().splitlines()]
    signature = lines[1]["signature"]
    lines[1]["signature"] = signature[:-1] + ("1" if signature[-1] == "0" else "0")
    lines[4]["job_id"] = "k"
    with closing(sqlite3.connect(role.config.database_path)) as database:
        database.execute("DROP TRIGGER ledger_no_update")
        for entry in lines:
            line = json.dumps(entry, sort_keys=True, separators=(",", ":"))
            database.execute("UPDATE ledger SET line = ? WHERE sequence = ?", (line, entry["sequence"]))
        database.commit()
        rows = database.execute("SELECT line FROM ledger ORDER BY sequence").fetchall()
    export.write_text("".join(f"{line}\n" for (line,) in rows))
    for arguments in (("--config", str(role.file)), (str(export),), (str(export), "--config", str(role.file))):
        code, _, err = role.run("verify", *arguments)
        assert code == CATALOGUE[LedgerError].exit_code
        assert "ledger entry 2: its signature does not verify" in err
    with pytest.raises(LedgerError, match="entry 2: its signature"):
        role.write(lambda c: role.books().open(c, at=AT))


def test_a_database_that_was_rolled_back_is_found_by_the_head_that_was_kept_elsewhere(
    role: Role, tmp_path: Path
) -> None:
    state = role.config.state_dir
    shutil.copytree(state, tmp_path / "backup")
    role.spend(2)
    head = role.read("show")["head"]
    assert role.read("verify", "--head", head)["heads"] == [head]
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    assert role.read("verify")["whose_is_checked"] is True  # by itself it is whole
    code, _, err = role.run("verify", "--config", str(role.file), "--head", head)
    assert code == CATALOGUE[LedgerError].exit_code
    assert "it was cut or rewritten" in err


def test_an_export_of_version_1_says_that_nothing_is_signed(role: Role, tmp_path: Path) -> None:
    vector = json.loads((Path(__file__).parents[1] / "vectors/ledger.json").read_text("utf-8"))
    file = tmp_path / "old.jsonl"
    file.write_text("\n".join(vector["lines"]))  # the last line feed is missing, and may be
    code, out, _ = role.run("verify", str(file))
    assert code == 0
    assert "0 signatures hold, by nobody" in out
    assert "the last entry is not signed" in out
