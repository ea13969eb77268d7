"""What an honest party does accept, and that it is exactly what the rules say (refusals: tests/rejections)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config import PartyConfig
from src.encryption.scheme import Scheme
from src.errors import OpeningError, PlanError, PolicyError, SottoError
from src.party.rules import (
    check_contribution,
    check_list,
    check_opening,
    check_plan,
    check_reveal,
    describe,
    open_plan,
)
from src.party.store import PartyRound, Stage
from src.party.work import dataset_options
from src.protocol.derive import derive_again
from src.protocol.plan import OpeningStatement, RootStatement, RoundPlan, signed_digest
from src.protocol.roster import Roster
from src.protocol.signing import Signed, SigningKey

MakeConfig = Callable[..., PartyConfig]
MakePlan = Callable[..., RoundPlan]
PARTIES = ("a", "b", "c")


class Aggregator:
    """Signs whatever it is told to, with the key that the roster pins."""

    def __init__(self, keys: dict[str, SigningKey], plan: RoundPlan) -> None:
        self.keys = keys
        self.plan = plan
        self.signed = self.sign("plan", plan.to_statement())
        self.digest = signed_digest(self.signed, "plan")

    def sign(self, kind: str, statement: dict[str, Any], *, by: str = "aggregator") -> Signed:
        return self.keys[by].sign(kind, statement, signer=by)

    def root(self, name: str) -> Signed:
        statement = RootStatement(self.digest, name, f"root of {name}", 10, 80, "")
        return self.sign("root", statement.to_statement(), by=name)

    def list(self, names: tuple[str, ...]) -> Signed:
        roots = [self.root(name).to_json() for name in names]
        return self.sign("list", {"plan": self.digest, "roots": roots})

    def opening(self, listed: Signed, contributors: tuple[str, ...], root: str = "r" * 64) -> Signed:
        statement = OpeningStatement(self.digest, signed_digest(listed, "list"), contributors, root)
        return self.sign("opening", statement.to_statement())

    def row(self, stage: Stage, **changes: Any) -> PartyRound:
        batch = {"header": "", "sha256": "x", "size": 80, "root": "root of a"}
        row = PartyRound(
            job_id="job", number=1, plan=self.digest, stage=stage, batch=batch, root=self.root("a").to_json()
        )
        return replace(row, **changes)


@pytest.fixture
def aggregator(keys: dict[str, SigningKey], make_plan: MakePlan) -> Aggregator:
    return Aggregator(keys, make_plan())


# ------------------------------------------------------------------------------------------------------------- plans


@settings(deadline=None, max_examples=40)
@given(
    cohort=st.sampled_from([("a", "b"), ("a", "b", "c"), ("c", "a"), ("a", "b", "c", "d"), ("b", "c", "d")]),
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    noise_multiplier=st.floats(0.1, 3),
    priced_rounds=st.integers(1, 500),
    model_sha256=st.sampled_from(["a" * 64, "b" * 64]),
)
def test_a_plan_that_follows_from_kit_and_policy_is_accepted_with_what_follows_from_it(
    keys: dict[str, SigningKey],
    roster: Roster,
    make_plan: MakePlan,
    make_config: MakeConfig,
    scheme: Scheme,
    **chosen: Any,
) -> None:
    aggregator = Aggregator(keys, make_plan(**chosen))
    checked = check_plan(aggregator.signed, roster, config=make_config(), scheme=scheme, pinned=True)
    assert checked.plan == aggregator.plan
    assert checked.digest == aggregator.digest
    assert checked.noise == derive_again(scheme, aggregator.plan).noise_plan
    assert open_plan(aggregator.signed, roster) == (aggregator.plan, aggregator.digest)


def test_each_policy_is_met_at_its_limit(
    aggregator: Aggregator, roster: Roster, make_plan: MakePlan, make_config: MakeConfig, scheme: Scheme
) -> None:
    """Of a multiplier of 0.5 drawn by both, the parties' half of the variance is 0.5/√2 = 0.35355."""
    config = make_config(
        policy={"allow_plaintext_scheme": True, "min_quorum": 2, "min_parties_noise_multiplier": 0.3535},
        limits={"max_update_bytes": 100},
    )
    check_plan(aggregator.signed, roster, config=config, scheme=scheme, pinned=True)
    for policy in ({"min_quorum": 3}, {"min_parties_noise_multiplier": 0.3536}, {"allow_plaintext_scheme": False}):
        sections = {"policy": {**config.policy.model_dump(), **policy}}
        with pytest.raises(PolicyError):
            check_plan(aggregator.signed, roster, config=make_config(**sections), scheme=scheme, pinned=True)
    small = make_config(limits={"max_update_bytes": 99})
    with pytest.raises(PolicyError, match="a model of 100 bytes"):
        check_plan(aggregator.signed, roster, config=small, scheme=scheme, pinned=True)


def test_without_a_kit_in_custody_aggregator_the_aggregator_s_own_roster_is_taken(
    keys: dict[str, SigningKey], roster: Roster, make_plan: MakePlan, make_config: MakeConfig, scheme: Scheme
) -> None:
    """The classic set-up: others may have joined since this party saw the roster."""
    config = make_config(keys={"custody": "aggregator"})
    classic = replace(roster, custody="aggregator", threshold=0)
    plan = make_plan(custody="aggregator", threshold=0, roster_digest="0" * 64)
    signed = Aggregator(keys, plan).signed
    assert check_plan(signed, classic, config=config, scheme=scheme, pinned=False).plan == plan
    with pytest.raises(PlanError, match="roster_digest"):
        check_plan(signed, classic, config=config, scheme=scheme, pinned=True)


def test_an_invited_party_with_data_contributes(aggregator: Aggregator, make_config: MakeConfig) -> None:
    check_contribution(aggregator.plan, make_config())


@pytest.mark.parametrize(
    ("own", "asked", "merged"),
    [
        ({}, {}, {}),
        ({"party": 0}, {}, {"party": 0}),
        ({"party": 0}, {"party": 0}, {"party": 0}),
        ({"columns": None}, {"columns": 3}, {"columns": 3}),
        ({"columns": None, "party": 1}, {}, {"party": 1}),
        ({"columns": None}, {"columns": None}, {}),
    ],
)
def test_a_job_sets_only_what_a_party_leaves_open(
    make_plan: MakePlan, own: dict[str, Any], asked: dict[str, Any], merged: dict[str, Any]
) -> None:
    assert dataset_options(own, make_plan(task_options=json.dumps(asked))) == merged


def test_what_a_party_logs_of_a_plan_are_public_settings(aggregator: Aggregator) -> None:
    assert describe(aggregator.plan) == {
        "job": "job",
        "round": 1,
        "task": "randhie",
        "quorum": "2/3",
        "scheme": "plaintext",
        "strategy": "fedavg",
        "steps": 10,
        "noise_multiplier": "1.1",
    }


# --------------------------------------------------------------------------------------------------- lists, openings

NAMES = st.lists(st.sampled_from(["a", "aggregator", "b", "c", "d", "z"]), max_size=6)


@settings(deadline=None, max_examples=80)
@given(names=NAMES, noise_by=st.sampled_from(["both", "parties"]))
def test_a_list_is_accepted_exactly_if_it_is_a_quorum_of_the_invited_once_each(
    keys: dict[str, SigningKey], roster: Roster, make_plan: MakePlan, names: list[str], noise_by: str
) -> None:
    aggregator = Aggregator(keys, make_plan(noise_by=noise_by))
    parties = [name for name in names if name != "aggregator"]
    right = (
        len(set(names)) == len(names)
        and set(parties) <= set(PARTIES)
        and len(parties) >= 2
        and ("aggregator" in names) == (noise_by == "both")
    )
    listed = aggregator.list(tuple(names))
    try:
        roots = check_list(listed, roster, plan=aggregator.plan, plan_digest=aggregator.digest)
    except SottoError:
        assert not right
    else:
        assert right
        assert {name: root.root for name, root in roots.items()} == {name: f"root of {name}" for name in names}


def test_a_party_reveals_for_the_list_with_its_root_again_and_again(aggregator: Aggregator, roster: Roster) -> None:
    listed = aggregator.list(("a", "aggregator", "b"))
    roots = check_list(listed, roster, plan=aggregator.plan, plan_digest=aggregator.digest)
    digest = check_reveal(aggregator.row(Stage.COMMITTED), listed, roots, name="a")
    assert digest == signed_digest(listed, "list")
    for stage in (Stage.REVEALED, Stage.DELIVERED):
        assert check_reveal(aggregator.row(stage, list=digest), listed, roots, name="a") == digest


@settings(deadline=None, max_examples=120)
@given(
    contributors=NAMES,
    in_order=st.booleans(),
    stage=st.sampled_from(Stage),
    opened_before=st.sampled_from(["", "r" * 64, "s" * 64]),
)
def test_an_opening_is_accepted_exactly_if_it_is_a_listed_quorum_with_all_that_belongs_to_it(
    keys: dict[str, SigningKey],
    roster: Roster,
    make_plan: MakePlan,
    contributors: list[str],
    in_order: bool,
    stage: Stage,
    opened_before: str,
) -> None:
    aggregator = Aggregator(keys, make_plan())
    listed = aggregator.list(("a", "aggregator", "b", "c"))
    roots = check_list(listed, roster, plan=aggregator.plan, plan_digest=aggregator.digest)
    names = tuple(sorted(contributors) if in_order else contributors)
    parties = [name for name in names if name != "aggregator"]
    right = (
        names == tuple(sorted(set(names)))
        and set(parties) <= set(PARTIES)
        and len(parties) >= 2
        and "aggregator" in names
        and ("a" in names or stage is not Stage.DELIVERED)
        and opened_before in ("", "r" * 64)
    )
    try:
        opening = check_opening(
            aggregator.opening(listed, names),
            roster,
            row=aggregator.row(stage, aggregate_root=opened_before),
            plan=aggregator.plan,
            listed=listed,
            roots=roots,
            name="a",
        )
    except OpeningError:
        assert not right
    else:
        assert right
        assert (opening.contributors, opening.aggregate_root) == (names, "r" * 64)


def test_a_holder_that_was_not_invited_opens_what_others_contributed(
    keys: dict[str, SigningKey], roster: Roster, make_plan: MakePlan
) -> None:
    aggregator = Aggregator(keys, make_plan(cohort=("b", "c")))
    listed = aggregator.list(("aggregator", "b", "c"))
    roots = check_list(listed, roster, plan=aggregator.plan, plan_digest=aggregator.digest)
    row = PartyRound(job_id="job", number=1, plan=aggregator.digest, stage=Stage.WITNESS)
    signed = aggregator.opening(listed, ("aggregator", "b", "c"))
    opening = check_opening(signed, roster, row=row, plan=aggregator.plan, listed=listed, roots=roots, name="a")
    assert opening.contributors == ("aggregator", "b", "c")
