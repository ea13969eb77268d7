"""`sotto budget show` and `set` say which limits are in force, and by whom: of every dataset, seen or not."""

from __future__ import annotations

import pytest

from src.errors import CATALOGUE, InvalidInput
from tests.cli.spender import CONFIG, RANDHIE, Role

TWO = CONFIG.replace(
    "{randhie: {declared_rows: 100}}",
    "{randhie: {declared_rows: 100}, other: {declared_rows: 9, budget: {max_rounds: 7}}}",
)
SHARED = TWO.replace("budget: {max_rounds: 7}", "budget_of: randhie")


def told(role: Role, *arguments: str) -> tuple[str, str]:
    """What is printed, and what is warned of, each as one line."""
    code, out, err = role.run(*arguments, "--config", str(role.file))
    assert code == 0
    assert [line for line in (out + err).splitlines() if len(line) > 100 and "sotto budget set" not in line] == []
    return " ".join(out.split()), " ".join(err.split())


def test_show_says_of_every_dataset_and_of_the_party_what_is_in_force_and_by_whom(role: Role) -> None:
    role.file.write_text(TWO)
    out, err = told(role, "show")
    everybody = "ε 4 at δ 1e-05 (entered for dataset:*, privacy.budgets.example)"
    assert f"in force for dataset:randhie (example level): no limit in rounds, {everybody}" in out
    assert f"in force for dataset:other (example level): 7 rounds (datasets.other.budget), {everybody}" in out
    assert "in force for federation:demo (party level): 9 rounds (entered for federation:demo, " in out
    assert "no limit in ε is in force" not in err
    assert "datasets other, randhie have a budget each" in err
    rows = {row["subject"]: row for row in role.read("show")["budgets"]}
    assert rows["dataset:other"]["sources"] == {
        "entered for dataset:*": {"max_rounds": None, "epsilon": 4.0, "delta": 1e-5},
        "datasets.other.budget": {"max_rounds": 7, "epsilon": None, "delta": 1e-5},
        "privacy.budgets.example": {"max_rounds": None, "epsilon": 4.0, "delta": 1e-5},
    }
    assert (rows["dataset:other"]["rounds_limit"], rows["dataset:other"]["epsilon_limit"]) == (7, 4.0)


def test_show_and_set_warn_where_no_limit_in_epsilon_is_in_force(role: Role) -> None:
    """It takes the configuration and the ledger of all datasets to have none."""
    role.file.write_text(CONFIG.replace("{epsilon: 4.0}", "{epsilon: null, max_rounds: 50}"))
    assert "no limit in ε is in force" not in told(role, "show")[1]
    changed = role.change("set", "--unit", "example", "--subject", "dataset:*")
    assert "no limit in ε is in force for dataset:* (example level)" in changed["warnings"][0]
    out, err = told(role, "show")
    assert "in force for dataset:randhie (example level): 50 rounds (entered for dataset:*, privacy" in out
    assert "no limit in ε is in force for dataset:randhie (example level)" in err
    assert not any(
        "no limit in ε is in force" in each for each in role.change("set", *RANDHIE, "--epsilon", "3")["warnings"]
    )


def test_setting_one_number_leaves_the_other_wherever_it_came_from(role: Role) -> None:
    """Rounds that are set leave ε, of the configuration, of all datasets, and of the entry before; ε leaves rounds."""
    first = role.change("set", *RANDHIE, "--max-rounds", "50")
    assert first["entry"]["correction"]["limit"] == {"max_rounds": 50, "epsilon": "4.0", "delta": "1e-05"}
    second = role.change("set", *RANDHIE, "--epsilon", "2")
    assert [second["in_force"][0][name] for name in ("max_rounds", "epsilon")] == [50, 2.0]
    none = role.change("set", *RANDHIE, "--epsilon", "none")
    assert [none["in_force"][0][name] for name in ("max_rounds", "epsilon")] == [50, 4.0]
    out, _ = told(role, "set", *RANDHIE, "--max-rounds", "40", "--reason", "fewer")
    assert (
        "by dataset:randhie (example level): 40 rounds (entered for dataset:randhie), ε 4 at δ 1e-05 (entered for "
        "dataset:*, privacy.budgets.example)" in out
    )


def test_zero_is_a_limit_and_none_is_none(role: Role) -> None:
    zero = role.change("set", *RANDHIE, "--max-rounds", "0", "--epsilon", "0")
    assert zero["in_force"] == [{"max_rounds": 0, "epsilon": 0.0, "delta": 1e-5, "rounds_left": 0}]
    out, err = told(role, "show")
    assert "in force for dataset:randhie (example level): 0 rounds (entered for dataset:randhie), ε 0 at δ" in out
    assert "no limit in ε is in force" not in err
    with pytest.raises(Exception, match="does not allow it"):
        role.spend(2)


@pytest.mark.parametrize("wrong", ["nan", "inf", "-1", "1e400"])
def test_what_is_no_number_is_no_limit_in_epsilon(role: Role, wrong: str) -> None:
    code, _, err = role.run("set", "--config", str(role.file), *RANDHIE, f"--epsilon={wrong}", "--reason", "more")
    assert code == CATALOGUE[InvalidInput].exit_code
    assert "finite and not negative" in " ".join(err.split())


def test_a_dataset_that_spends_anothers_budget_is_shown_and_changed_by_either_name(role: Role) -> None:
    role.file.write_text(SHARED)
    out, err = told(role, "show")
    assert "in force for dataset:randhie (example level), datasets randhie and other together: " in out
    assert "dataset:other" not in out
    assert "a budget each" not in err
    by_name = [role.read("show", "--subject", f"dataset:{name}")["budgets"] for name in ("other", "randhie")]
    assert by_name[0] == by_name[1]
    assert by_name[0][0]["rounds_spent"] == 1
    changed = role.change("set", "--unit", "example", "--subject", "dataset:other", "--max-rounds", "3")
    assert changed["entry"]["subject"] == "dataset:randhie"


def test_an_aggregator_s_parties_have_what_all_parties_have_and_their_own(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from src.config_budgets import aggregator_limits
    from src.config_sections import AggregatorPrivacy
    from src.privacy.in_force import in_force, without_effect

    made = AggregatorPrivacy.model_validate(
        {
            "budget": {"epsilon": 50.0},
            "per_party": {"max_rounds": 20},
            "parties": {"a": {"epsilon": 8.0}, "b": {"max_rounds": 30}},
        }
    )
    limits = aggregator_limits(made, federation="demo")
    said = [
        in_force(limits, [], ("party", subject)) for subject in ("federation:demo", "party:a", "party:b", "party:c")
    ]
    assert said == [
        "federation:demo (party level): 10000 rounds (privacy.budget), ε 50 at δ 1e-05 (privacy.budget)",
        "party:a (party level): 20 rounds (privacy.per_party), ε 8 at δ 1e-05 (privacy.parties.a)",
        "party:b (party level): 20 rounds (privacy.per_party), no limit in ε",
        "party:c (party level): 20 rounds (privacy.per_party), no limit in ε",
    ]
    assert without_effect(limits) == [
        "privacy.parties.b allows 30 rounds, privacy.per_party does not: the smaller holds. To allow more, raise "
        "privacy.per_party"
    ]
