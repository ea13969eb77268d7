"""Which limits a party holds its rows to: every one that anything states, and none is taken away by another."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Engine, MetaData

from src.config import PartyConfig, load_party_config
from src.config_budgets import apart, party_limits
from src.encryption.scheme import Scheme
from src.errors import BudgetError, ConfigError, PlanError, PolicyError
from src.party.accounts import PartyAccounts
from src.party.app import App
from src.party.rules import CheckedPlan, check_plan
from src.privacy.accounting import epsilon
from src.privacy.budget import balance
from src.privacy.ledger import Limit
from src.protocol.derive import derive_again, example_event
from src.protocol.plan import PLAN_KIND, RoundPlan
from src.protocol.roster import Roster
from src.protocol.signing import SigningKey
from src.storage.ledger import LedgerStore

MakeConfig = Callable[..., PartyConfig]
MakePlan = Callable[..., RoundPlan]
FREE = {"max_rounds": 99, "epsilon": None}
"""No limit in ε: said in so many words."""


class Party:
    """A party's ledger in a database; each start is of another configuration."""

    def __init__(self, engine: Engine, scheme: Scheme, make_config: MakeConfig) -> None:
        self.engine, self.scheme, self.make_config = engine, scheme, make_config
        metadata = MetaData()
        self.store = LedgerStore(metadata)
        metadata.create_all(engine)

    def start(
        self, datasets: dict[str, Any], *, policy: dict[str, Any] | None = None, **budgets: Any
    ) -> tuple[PartyAccounts, list[str]]:
        config = self.make_config(
            datasets={task: {"declared_rows": 100, **values} for task, values in datasets.items()},
            policy={"allow_plaintext_scheme": True, **(policy or {})},
            privacy={"budgets": {"party": {"max_rounds": 99}, **budgets}},
        )
        accounts = PartyAccounts(self.store, config)
        with self.engine.begin() as connection:
            return accounts, accounts.open(connection, now=0.0)

    def reserve(self, accounts: PartyAccounts, plan: RoundPlan) -> None:
        checked = CheckedPlan(plan, "d" * 64, derive_again(self.scheme, plan).noise_plan)
        with self.engine.begin() as connection:
            accounts.reserve(connection, checked, now=0.0)

    def said(self, accounts: PartyAccounts) -> tuple[list[str], list[str]]:
        with self.engine.begin() as connection:
            return accounts.in_force(connection)

    def spent(self, accounts: PartyAccounts, task: str) -> float:
        with self.engine.begin() as connection:
            return accounts.example_balance(connection, task, delta=1e-5).spent

    def charged(self) -> list[tuple[str, str]]:
        """Subject and reason of every charge of rows."""
        with self.engine.begin() as connection:
            entries = self.store.entries(connection)
        return [(e.subject, e.reason) for e in entries if e.unit == "example" and e.kind == "reservation"]


@pytest.fixture
def party(engine: Engine, scheme: Scheme, make_config: MakeConfig) -> Party:
    return Party(engine, scheme, make_config)


def job(make_plan: MakePlan, name: str, *, task: str = "randhie", noise: str = "1.1", rate: str = "0.05") -> RoundPlan:
    """One round of a job of one round."""
    plan = make_plan(job_id=name, priced_rounds=1, task=task)
    return replace(plan, local=replace(plan.local, noise_multiplier=noise, sampling_rate=rate))


def cost(*plans: RoundPlan) -> float:
    return epsilon([example_event(plan) for plan in plans], delta=1e-5)


# --- intersected ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_dataset", "of_all"),
    [
        ({"max_rounds": 10}, None),
        ({"max_rounds": 10, "epsilon": None}, None),
        ({"max_rounds": 10}, {"epsilon": 4.0}),
        (None, {"max_rounds": 10}),
        ({"epsilon": 8.0}, None),
        ({"epsilon": 8.0}, {"max_rounds": 10}),
        ({"max_rounds": 10}, {"max_rounds": 20, "delta": 1e-5}),
    ],
)
def test_a_limit_in_rounds_or_a_larger_one_takes_none_away_in_epsilon(
    party: Party, make_plan: MakePlan, of_dataset: dict[str, Any] | None, of_all: dict[str, Any] | None
) -> None:
    """The default of ε 4 for a row holds beside whatever else is written, of a dataset or of all; only
    `epsilon: null` of all ends it."""
    budgets = {} if of_all is None else {"example": of_all}
    accounts, _ = party.start({"randhie": {"budget": of_dataset}}, **budgets)
    *fitting, last = [job(make_plan, f"job-{number}", noise="0.8") for number in (1, 2)]
    assert cost(*fitting) < 4.0 < cost(*fitting, last)
    for plan in fitting:
        party.reserve(accounts, plan)
    with pytest.raises(BudgetError, match=r"epsilon budget at example level of dataset randhie.*limit 4"):
        party.reserve(accounts, last)
    assert party.spent(accounts, "randhie") == cost(*fitting)


def test_a_limit_in_epsilon_takes_none_away_in_rounds(party: Party, make_plan: MakePlan) -> None:
    accounts, _ = party.start({"randhie": {"budget": {"epsilon": 3.9}}}, example={"max_rounds": 1})
    party.reserve(accounts, job(make_plan, "one"))
    with pytest.raises(BudgetError, match=r"round budget at example level.*limit 1"):
        party.reserve(accounts, job(make_plan, "two"))


def test_limits_at_two_deltas_hold_each_by_itself(party: Party, make_plan: MakePlan) -> None:
    """Neither stands for the other: a large one at a large δ does not replace a small one at a small δ."""
    plan = job(make_plan, "one")
    small = epsilon([example_event(plan)], delta=1e-9)
    accounts, _ = party.start(
        {"randhie": {"budget": {"epsilon": small * 0.99, "delta": 1e-9}}}, example={"epsilon": 100.0, "delta": 1e-2}
    )
    with pytest.raises(BudgetError, match=r"delta 1e-09"):
        party.reserve(accounts, plan)
    lines, _ = party.said(accounts)
    assert "at δ 1e-09 (entered for dataset:randhie, datasets.randhie.budget)" in lines[0]
    assert "ε 100 at δ 0.01 (entered for dataset:*, privacy.budgets.example)" in lines[0]


def test_what_users_jobs_and_the_party_have_is_intersected_too(party: Party, make_plan: MakePlan) -> None:
    """A user's own row does not replace what holds for any user, nor a job's entry what holds for any job."""
    plan, again = job(make_plan, "one"), job(make_plan, "two")
    accounts, _ = party.start(
        {"randhie": {"user": "ada"}},
        example=FREE,
        users={"ada": {"max_rounds": 50}},
        default_user_epsilon=(cost(plan) + cost(plan, again)) / 2,
    )
    party.reserve(accounts, plan)
    with pytest.raises(BudgetError, match="epsilon budget at example level of the user"):
        party.reserve(accounts, again)
    limits = party_limits(party.make_config(privacy={"budgets": {"party": {"epsilon": 2.0}}}))
    (whole,) = limits.budgets([], ("party", "federation:demo"))
    assert (whole.max_rounds, whole.epsilon) == (10_000, 2.0)
    nothing = party_limits(party.make_config(privacy={"budgets": {"party": {"epsilon": 2.0, "max_rounds": None}}}))
    assert [each.max_rounds for each in nothing.budgets([], ("party", "federation:demo"))] == [None]


def test_an_entry_that_limits_rounds_alone_leaves_the_epsilon_of_the_configuration_and_of_all_datasets(
    party: Party, make_plan: MakePlan
) -> None:
    accounts, _ = party.start({"randhie": {}})
    books = accounts._books
    with party.engine.begin() as connection:
        for subject in ("dataset:randhie", "job:one"):
            books.correct(
                connection,
                ("example", subject),
                action="set",
                limit=Limit(max_rounds=50, epsilon=None, delta=1e-5),
                at="2026-01-01T00:00:00Z",
                reason="rounds alone",
            )
    free, _ = party.start({"randhie": {}}, example=FREE)  # what the ledger has of all datasets holds even so
    for each in (accounts, free):
        with pytest.raises(BudgetError, match=r"limit 4"):
            party.reserve(each, job(make_plan, "one", noise="0.3", rate="1.0"))
    lines, warnings = party.said(free)
    assert lines[0] == (
        "dataset:randhie (example level): 50 rounds (entered for dataset:randhie), "
        "ε 4 at δ 1e-05 (entered for dataset:*)"
    )
    assert warnings == []


# --- without a guarantee ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["0.0", "1e-300", "1e-09", "1e-06", "0.001"])
@pytest.mark.parametrize("rate", ["1.0", "0.05"])
def test_no_noise_or_next_to_none_is_refused_where_nothing_limits_epsilon(
    party: Party, make_plan: MakePlan, noise: str, rate: str
) -> None:
    """It needs `policy.allow_without_dp`; and is charged as infinite then."""
    plan = job(make_plan, "one", noise=noise, rate=rate)
    accounts, _ = party.start({"randhie": {}}, example=FREE)
    with pytest.raises(PolicyError, match=r"policy\.allow_without_dp.*∞"):
        party.reserve(accounts, plan)
    assert party.charged() == []
    allowed, _ = party.start({"randhie": {}}, example=FREE, policy={"allow_without_dp": True})
    party.reserve(allowed, plan)
    assert party.spent(allowed, "randhie") > 700.0


def test_where_something_limits_epsilon_the_policy_does_not_take_the_limit_away(
    party: Party, make_plan: MakePlan
) -> None:
    accounts, _ = party.start({"randhie": {}}, policy={"allow_without_dp": True})
    with pytest.raises(BudgetError, match=r"asked ∞.*limit 4"):
        party.reserve(accounts, job(make_plan, "one", noise="0.0"))


def test_a_sum_of_gradients_without_noise_is_refused_too(party: Party, make_sum_plan: MakePlan) -> None:
    accounts, _ = party.start({"randhie": {}}, example=FREE)
    with pytest.raises(PolicyError, match="allow_without_dp"):
        party.reserve(accounts, make_sum_plan(noise_multiplier=0.0, noise_by="parties"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", "-1.0"), ("noise_multiplier", "-0.5"), ("delta", "0.0"), ("delta", "1.0"), ("delta", "-0.1")],
)
def test_a_plan_with_negative_noise_or_no_delta_is_out_of_range(
    make_plan: MakePlan,
    make_config: MakeConfig,
    roster: Roster,
    scheme: Scheme,
    keys: dict[str, SigningKey],
    field: str,
    value: str,
) -> None:
    plan, changed = make_plan(), cast("dict[str, Any]", {field: value})
    plan = replace(plan, local=replace(plan.local, **changed))
    signed = keys["aggregator"].sign(PLAN_KIND, plan.to_statement(), signer="aggregator")
    with pytest.raises(PlanError, match=f"local.{field} is out of range"):
        check_plan(signed, roster, config=make_config(), scheme=scheme, pinned=True)


def test_a_plan_whose_noise_is_not_a_number_is_no_plan(make_plan: MakePlan) -> None:
    for value in ("nan", "inf", "-inf", "1e400", "0x1p0", ""):
        plan = make_plan()
        statement = replace(plan, local=replace(plan.local, noise_multiplier=value)).to_statement()
        with pytest.raises(Exception, match="not a decimal number"):
            RoundPlan.from_statement(statement)


# --- what a start says ------------------------------------------------------------------------------------------------


def test_a_start_says_of_every_dataset_and_of_the_party_what_is_in_force_and_by_whom(party: Party) -> None:
    accounts, _ = party.start({"randhie": {"budget": {"max_rounds": 10}}, "other": {"budget": {"epsilon": 9.0}}})
    lines, warnings = party.said(accounts)
    everybody = "ε 4 at δ 1e-05 (entered for dataset:*, privacy.budgets.example)"
    assert lines == [
        "dataset:randhie (example level): 10 rounds (entered for dataset:randhie, datasets.randhie.budget), "
        + everybody,
        f"dataset:other (example level): no limit in rounds, {everybody}",
        "federation:demo (party level): 99 rounds (entered for federation:demo, privacy.budgets.party), no limit in ε",
    ]
    assert warnings[0] == (
        "datasets.other.budget allows ε 9 at δ 1e-05, privacy.budgets.example does not: the smaller holds. "
        "To allow more, raise privacy.budgets.example"
    )


def test_a_start_warns_of_every_dataset_whose_epsilon_nothing_limits(party: Party) -> None:
    accounts, _ = party.start({"randhie": {}, "other": {"budget": {"epsilon": 1.0}}}, example=FREE)
    _, warnings = party.said(accounts)
    assert [each for each in warnings if "no limit in ε" in each] == [
        "no limit in ε is in force for dataset:randhie (example level): in time, what is trained may give a row away "
        "entirely. To have one, set privacy.budgets.example.epsilon in the configuration, or stop this role and run: "
        "sotto budget set --config … --unit example --subject 'dataset:randhie' --epsilon … --reason …"
    ]


PARTY_FILE = """
version: 1
name: a
federation: demo
state_dir: state
server: {insecure: true, address: "127.0.0.1:PORT"}
keys: {custody: aggregator}
policy: {allow_without_dp: true}
datasets: {randhie: {declared_rows: 100}, synthetic: {declared_rows: 100}}
privacy: {budgets: {example: {max_rounds: 7, epsilon: null}}}
workers: {size: 1}
"""


async def test_a_party_that_starts_logs_its_limits_and_what_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unused_tcp_port: int
) -> None:
    file = tmp_path / "party.yaml"
    file.write_text(PARTY_FILE.replace("PORT", str(unused_tcp_port)))
    caplog.set_level(logging.INFO, "sotto.party")
    started = asyncio.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "allow_without_dp" in record.getMessage():  # the last that is said of limits
                started.set()

    watch, log = Watch(), logging.getLogger("sotto.party")
    log.addHandler(watch)
    task = asyncio.create_task(App(load_party_config(file)).run())
    try:
        await asyncio.wait_for(started.wait(), 30)
    finally:
        log.removeHandler(watch)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    limit = "7 rounds (entered for dataset:*, privacy.budgets.example), no limit in ε"
    assert ("INFO", f"in force for dataset:randhie (example level): {limit}") in said
    assert ("INFO", f"in force for dataset:synthetic (example level): {limit}") in said
    warned = [text for level, text in said if level == "WARNING"]
    assert sum("no limit in ε is in force for dataset:" in text for text in warned) == 2
    assert any("rows may be trained on without differential privacy" in text for text in warned)
    assert any("datasets randhie, synthetic have a budget each" in text for text in warned)


# --- one row under two tasks ------------------------------------------------------------------------------------------


def test_datasets_that_share_a_budget_spend_it_together_and_one_by_one_they_would_not(
    party: Party, make_plan: MakePlan
) -> None:
    first, second = job(make_plan, "one"), job(make_plan, "two", task="other")
    limit = {"epsilon": (cost(first) + cost(first, second)) / 2}
    accounts, _ = party.start({"randhie": {"budget": limit}, "other": {"budget_of": "randhie"}})
    party.reserve(accounts, first)
    with pytest.raises(BudgetError, match="epsilon budget at example level of dataset randhie"):
        party.reserve(accounts, second)
    party.reserve(accounts, job(make_plan, "three", task="other", noise="40.0"))
    assert party.spent(accounts, "other") == party.spent(accounts, "randhie") > cost(first)
    assert party.charged() == [("dataset:randhie", ""), ("dataset:randhie", "rows of dataset other")]
    lines, warnings = party.said(accounts)
    assert lines[0].startswith("dataset:randhie (example level), datasets randhie and other together: ")
    assert len(lines) == 2
    assert warnings == []


def test_what_was_spent_before_datasets_shared_a_budget_counts_on_it_and_is_entered_once(
    party: Party, make_plan: MakePlan
) -> None:
    """Whatever their owner makes of the configuration later: joined, parted, and joined again."""
    parting: dict[str, Any]
    joined: dict[str, Any]
    parting, joined = {"randhie": {}, "other": {}}, {"randhie": {}, "other": {"budget_of": "randhie"}}
    accounts, _ = party.start(parting)
    of_other = [job(make_plan, "one", task="other"), job(make_plan, "two", task="other", noise="2.0")]
    for plan in of_other:
        party.reserve(accounts, plan)
    assert party.spent(accounts, "randhie") == 0.0
    both, said = party.start(joined)
    assert [each.partition(": ")[2] for each in said] == [
        "rows of dataset other, charged before on another account"
    ] * 2
    assert party.spent(both, "randhie") == party.spent(both, "other") == cost(*of_other)
    assert party.start(joined)[1] == []
    more = job(make_plan, "three", task="other", noise="3.0")
    party.reserve(both, more)
    assert party.spent(both, "randhie") == cost(*of_other, more)
    parted, _ = party.start(parting)
    assert party.spent(parted, "other") == cost(*of_other, more)
    assert party.spent(parted, "randhie") == cost(*of_other, more)
    last = job(make_plan, "four", task="other", noise="4.0")
    party.reserve(parted, last)
    again, _ = party.start(joined)
    assert party.spent(again, "randhie") == cost(*of_other, more, last)
    assert party.start(joined)[1] == []


def test_a_shared_budget_counts_rounds_quotas_and_refusals_once(party: Party, make_plan: MakePlan) -> None:
    shared = {"randhie": {"user": "ada"}, "other": {"user": "ada", "budget_of": "randhie"}}
    accounts, _ = party.start(
        shared, example={"max_rounds": 2, "epsilon": None}, users={"ada": {"max_rounds": 3}}, per_job={}
    )
    party.reserve(accounts, job(make_plan, "one"))
    party.reserve(accounts, job(make_plan, "two", task="other"))
    with pytest.raises(BudgetError, match=r"round budget at example level of dataset randhie.*spent 2, limit 2"):
        party.reserve(accounts, job(make_plan, "three", task="other"))
    with party.engine.begin() as connection:
        entries = party.store.entries(connection)
        (quota,) = party_limits(accounts._config).budgets(entries, ("example", "user:ada"))
        assert balance(entries, quota).rounds_spent == 2


OPTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"file": "/srv/a.npz"}, {"file": "/srv/a.npz"}, "options"),
    ({"file": "/srv/a.npz", "table": 1}, {"file": "/srv/a.npz", "table": 2}, "file (file)"),
    ({"file": "/srv/a.npz", "table": 1}, {"path": "/srv/./x/../a.npz"}, "file (file, path)"),
    ({"seed": 0}, {"seed": 0}, "options"),
    ({"tables": {"rows": ["/srv/a.npz"]}}, {"file": "/srv/a.npz"}, "file (tables.rows.0, file)"),
    ({"columns": {"age": "a"}}, {"columns": {"age": "a"}, "file": "x"}, ""),
    ({"file": "/srv/a.npz"}, {"file": "/srv/b.npz"}, ""),
    ({}, {}, ""),
    ({"kind": "a"}, {"kind": "a", "seed": 1}, ""),
]


@pytest.mark.parametrize(("one", "other", "alike"), OPTIONS)
def test_a_start_warns_of_datasets_without_a_common_budget_and_says_what_they_have_alike(
    make_config: MakeConfig, one: dict[str, Any], other: dict[str, Any], alike: str
) -> None:
    """By the names of options, never by their values."""
    datasets = {
        "a": {"declared_rows": 9, "options": one},
        "b": {"declared_rows": 9, "options": other},
    }
    (warning,) = apart(make_config(datasets=datasets))
    if alike:
        assert f"datasets a and b have the same {alike}" in warning
    else:
        assert "datasets a, b have a budget each" in warning
    assert "datasets.b.budget_of: a" in warning
    assert "srv" not in warning
    datasets["b"]["budget_of"] = "a"
    assert apart(make_config(datasets=datasets)) == []
    assert apart(make_config(datasets={"a": datasets["a"]})) == []


def test_the_same_file_by_another_name_is_the_same_file(make_config: MakeConfig, tmp_path: Path) -> None:
    rows, link = tmp_path / "rows.npz", tmp_path / "link.npz"
    rows.touch()
    link.symlink_to(rows)
    datasets = {
        name: {"declared_rows": 9, "options": {"file": str(path), "of": name}}
        for name, path in (("a", rows), ("b", link), ("c", tmp_path / "else.npz"))
    }
    (warning,) = apart(make_config(datasets=datasets))
    assert "datasets a and b have the same file (file)" in warning


WRONG: Sequence[tuple[dict[str, Any], str]] = [
    ({"a": {"budget_of": "a"}}, r"datasets\.a\.budget_of: must name another dataset of this file \(there is none\)"),
    ({"a": {"budget_of": "z"}, "b": {}}, r"datasets\.a\.budget_of: must name another dataset of this file \(b\)"),
    ({"a": {"budget_of": "b"}, "b": {"budget_of": "c"}, "c": {}}, r"datasets\.a\.budget_of: .* b spends another's"),
    ({"a": {"budget_of": "b"}, "b": {"budget_of": "a"}}, r"datasets\.b\.budget_of: .* a spends another's"),
    ({"a": {"budget_of": "b", "budget": {"epsilon": 1.0}}, "b": {}}, r"datasets\.a\.budget_of: must not stand beside"),
]


@pytest.mark.parametrize(("datasets", "problem"), WRONG)
def test_a_budget_can_only_be_that_of_another_dataset_with_one_of_its_own(
    tmp_path: Path, datasets: dict[str, Any], problem: str
) -> None:
    file = tmp_path / "party.yaml"
    rows = {name: {"declared_rows": 1, **values} for name, values in datasets.items()}
    text = PARTY_FILE.replace("PORT", "50051").replace(
        "{randhie: {declared_rows: 100}, synthetic: {declared_rows: 100}}", repr(rows)
    )
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_party_config(file, environ={})


def test_a_variable_of_the_environment_that_limits_rounds_leaves_the_default_in_epsilon(tmp_path: Path) -> None:
    file = tmp_path / "party.yaml"
    file.write_text(
        PARTY_FILE.replace("PORT", "50051").replace("privacy: {budgets: {example: {max_rounds: 7, epsilon: null}}}", "")
    )
    config = load_party_config(file, environ={"SOTTO__PRIVACY__BUDGETS__EXAMPLE__MAX_ROUNDS": "7"})
    assert (config.privacy.budgets.example.max_rounds, config.privacy.budgets.example.epsilon) == (7, 4.0)
    null = {
        "SOTTO__PRIVACY__BUDGETS__EXAMPLE__MAX_ROUNDS": "7",
        "SOTTO__PRIVACY__BUDGETS__EXAMPLE__EPSILON": "null",
    }
    assert load_party_config(file, environ=null).privacy.budgets.example.epsilon is None
    assert math.isclose(load_party_config(file, environ={}).privacy.budgets.example.delta, 1e-5)
