"""What an honest party checks of a plan of fedsgd, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from src.config import PartyConfig
from src.encryption.scheme import Scheme
from src.errors import PlanError, PolicyError, SottoError
from src.jobs.executors.units import WorkContext
from src.learning import gradients
from src.learning.task import Dataset
from src.party import work
from src.party.rules import check_contribution, check_plan, describe
from src.privacy.entropy import SystemEntropy
from src.protocol.derive import own_batch_cap
from src.protocol.plan import GradientSum, RoundPlan
from src.protocol.roster import Roster
from src.protocol.signing import Signed, SigningKey

MakePlan = Callable[..., RoundPlan]
MakeConfig = Callable[..., PartyConfig]


@pytest.fixture
def check(
    keys: dict[str, SigningKey], roster: Roster, make_config: MakeConfig, scheme: Scheme
) -> Callable[..., RoundPlan]:
    """check(plan, **sections): the plan as the party accepts it, or its refusal."""

    def accept(plan: RoundPlan, **sections: Any) -> RoundPlan:
        signed: Signed = keys["aggregator"].sign("plan", plan.to_statement(), signer="aggregator")
        config = make_config(**sections)
        checked = check_plan(signed, roster, config=config, scheme=scheme, pinned=True)
        check_contribution(checked.plan, config)
        return checked.plan

    return accept


def summed(plan: RoundPlan, **changes: Any) -> RoundPlan:
    """The plan with another gradient sum."""
    assert isinstance(plan.gradient_sum, GradientSum)
    return replace(plan, gradient_sum=replace(plan.gradient_sum, **changes))


TRUSTING = {"allow_plaintext_scheme": True, "allow_trusted_aggregator": True}


@pytest.mark.parametrize("noise_by", ["both", "parties", "aggregator"])
def test_a_plan_that_follows_from_its_settings_is_accepted(
    check: Callable[..., RoundPlan], make_sum_plan: MakePlan, noise_by: str
) -> None:
    """With the aggregator's noise alone only as the job says that it is trusted, and the party trusts it too."""
    plan = make_sum_plan(noise_by=noise_by)
    assert check(plan, policy=TRUSTING) == plan
    assert describe(plan)["strategy"] == "fedsgd"


def test_an_aggregator_that_calls_itself_trusted_is_no_trusted_one_to_a_party_that_does_not_say_so(
    check: Callable[..., RoundPlan], make_sum_plan: MakePlan
) -> None:
    """A plan of the trusted server makes every party send its exact sum: who may see that is for each party to say."""
    with pytest.raises(PolicyError, match=r"exact sum of its gradients.*allow_trusted_aggregator"):
        check(make_sum_plan(noise_by="aggregator"))


def test_an_aggregator_that_holds_the_key_is_a_trusted_one(
    keys: dict[str, SigningKey],
    roster: Roster,
    make_config: MakeConfig,
    make_sum_plan: MakePlan,
    scheme: Scheme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It can open what a party contributed by itself, in which there is one share of the noise."""
    monkeypatch.setattr(type(scheme), "name", "paillier")
    plan = replace(make_sum_plan(), custody="aggregator", scheme="paillier")
    roster = replace(roster, custody="aggregator", threshold=0, colluders=0)
    signed = keys["aggregator"].sign("plan", plan.to_statement(), signer="aggregator")

    def check(**policy: bool) -> None:
        config = make_config(keys={"custody": "aggregator"}, policy=policy)
        check_plan(signed, roster, config=config, scheme=scheme, pinned=False)

    with pytest.raises(PolicyError, match=r"a key that the aggregator holds.*allow_trusted_aggregator"):
        check()
    check(allow_trusted_aggregator=True)


REFUSED: list[tuple[str, Callable[[RoundPlan], RoundPlan], str]] = [
    ("strategy fedavg under the numbers of fedsgd", lambda p: replace(p, gradient_sum=None), "does not follow"),
    ("several steps", lambda p: replace(p, local=replace(p.local, steps=2)), "local.steps"),
    ("a coarser grid", lambda p: replace(p, resolution_bits=8), "at least 9 resolution bits"),
    ("another grid", lambda p: replace(p, resolution_bits=17), "does not follow"),
    ("a smaller cap", lambda p: summed(p, batch_cap=20), "batch_cap"),
    ("a larger cap", lambda p: summed(p, batch_cap=100), "batch_cap"),
    ("another norm", lambda p: replace(p, clipping_norm="1.0"), "clipping_norm"),
    ("another gradient norm", lambda p: replace(p, local=replace(p.local, max_grad_norm="2.0")), "does not follow"),
    (
        "a gradient norm of next to nothing",
        lambda p: replace(p, local=replace(p.local, max_grad_norm="1e-45")),
        "max_grad_norm",
    ),
    ("no gradient norm", lambda p: replace(p, local=replace(p.local, max_grad_norm="0.0")), "max_grad_norm"),
    ("a larger rate", lambda p: replace(p, local=replace(p.local, sampling_rate="0.1")), "does not follow"),
    ("a rate of none", lambda p: replace(p, local=replace(p.local, sampling_rate="0.0")), "sampling_rate"),
    ("a rate above one", lambda p: replace(p, local=replace(p.local, sampling_rate="1.5")), "sampling_rate"),
    ("a flattering multiplier", lambda p: replace(p, local=replace(p.local, noise_multiplier="9.0")), "local.noise"),
    ("less noise", lambda p: replace(p, noise=replace(p.noise, share_sigma2="1/1")), "noise"),
    ("more rows of this party", lambda p: summed(p, declared_rows={"a": 101, "b": 120, "c": 80}), "declares 100"),
    ("rows of a stranger", lambda p: summed(p, declared_rows={"a": 100, "b": 120, "d": 80}), "declared rows"),
    ("rows of nobody", lambda p: summed(p, declared_rows={"a": 100, "b": 120}), "declared rows"),
    ("rows below one", lambda p: summed(p, declared_rows={"a": 100, "b": 120, "c": 0}), "at least one row"),
    ("more rows of another", lambda p: summed(p, declared_rows={"a": 100, "b": 999, "c": 80}), "does not follow"),
    ("a trusted server for nothing", lambda p: summed(p, trusted_aggregator=True), "trusted"),
    ("a smaller quorum for the shares", lambda p: replace(p, quorum=3), "noise"),
]


@pytest.mark.parametrize(("what", "change", "match"), REFUSED, ids=[what for what, _, _ in REFUSED])
def test_what_does_not_follow_is_refused(
    check: Callable[..., RoundPlan],
    make_sum_plan: MakePlan,
    what: str,
    change: Callable[[RoundPlan], RoundPlan],
    match: str,
) -> None:
    with pytest.raises(PlanError, match=match):
        check(change(make_sum_plan()))


def test_a_server_that_the_job_does_not_call_trusted_is_refused(
    check: Callable[..., RoundPlan], make_sum_plan: MakePlan
) -> None:
    """By the party itself, whatever the aggregator planned."""
    with pytest.raises(PlanError, match="trusted server"):
        make_sum_plan(noise_by="aggregator", trusted_aggregator=False)
    plan = summed(make_sum_plan(noise_by="aggregator"), trusted_aggregator=False)
    with pytest.raises(PlanError, match="trusted server"):
        check(plan, policy=TRUSTING)


def test_a_party_that_wants_noise_for_itself_refuses_noise_that_hides_a_row(
    check: Callable[..., RoundPlan], make_sum_plan: MakePlan
) -> None:
    """`min_parties_noise_multiplier` is of what a party contributes, which is many times what a row does."""
    policy = {"allow_plaintext_scheme": True, "min_parties_noise_multiplier": 0.5}
    with pytest.raises(PolicyError, match="min_parties_noise_multiplier"):
        check(make_sum_plan(noise_multiplier=2.0), policy=policy)
    check(make_sum_plan(noise_multiplier=2.0), policy={**policy, "min_parties_noise_multiplier": 0.01})


def test_a_party_that_declares_other_rows_refuses_to_contribute_and_still_opens_for_others(
    make_sum_plan: MakePlan, check: Callable[..., RoundPlan], make_config: MakeConfig
) -> None:
    other = {"randhie": {"declared_rows": 99}}
    with pytest.raises(PlanError, match="declares 99") as caught:
        check(make_sum_plan(), datasets=other)
    assert isinstance(caught.value, SottoError)
    assert caught.value.metadata["field"] == "declared_rows"


# --- what others declare ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1001, 10**7, 10**9])
def test_a_party_that_declares_rows_without_end_is_refused_by_the_others(
    check: Callable[..., RoundPlan], make_sum_plan: MakePlan, rows: int
) -> None:
    """The sum is divided by them: the model would stand still. How many more are fine is this party's to say."""
    plan = make_sum_plan(declared_rows={"a": 100, "b": rows, "c": 80})
    with pytest.raises(PolicyError, match=rf"b {rows} \(policy.max_declared_rows_factor\)") as caught:
        check(plan)
    assert "10 times this party's 100 rows" in caught.value.message
    own = {"allow_plaintext_scheme": True, "max_declared_rows_factor": rows / 100}
    assert check(plan, policy=own) == plan
    check(make_sum_plan(declared_rows={"a": 100, "b": 1000, "c": 1}))


@pytest.mark.parametrize("rows", [100, 1000, 10**6])
def test_what_others_declare_costs_a_party_no_work(
    make_sum_plan: MakePlan, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes for as many rows as its own number has room for, and pads to no more."""
    computed: list[int] = []

    def sums(*_: Any, padded_to: int, **__: Any) -> Any:
        computed.append(padded_to)
        return np.zeros(10)

    dataset = Dataset(np.zeros((100, 1), np.float32), np.zeros(100, np.int64), "none")
    task = SimpleNamespace(name="none", load_data=lambda _: dataset)
    monkeypatch.setattr(gradients, "clipped_gradient_sum", sums)
    monkeypatch.setattr("src.learning.task.loss_of", lambda _: None)
    monkeypatch.setattr(work, "_model", lambda *_: (task, None, None))
    plan = make_sum_plan(declared_rows={"a": 100, "b": rows, "c": 80})
    context = WorkContext(cast(Any, None), Path())
    values = work.contribution(plan, {"options": {}, "declared_rows": 100}, context, entropy=SystemEntropy())
    assert values.shape == (10,)
    alone = make_sum_plan(declared_rows={"a": 100, "b": 100, "c": 80})
    assert alone.gradient_sum is not None
    assert computed == [alone.gradient_sum.batch_cap]


def test_no_cap_of_its_own_is_above_the_plans_so_that_every_slot_holds_what_a_party_sends(
    make_sum_plan: MakePlan,
) -> None:
    rows = {"a": 100, "b": 5000, "c": 1}
    plan = make_sum_plan(declared_rows=rows)
    assert plan.gradient_sum is not None
    caps = {name: own_batch_cap(plan, count) for name, count in rows.items()}
    assert caps["c"] <= caps["a"] <= caps["b"] == plan.gradient_sum.batch_cap
    steps = [own_batch_cap(plan, count) for count in range(1, 5001, 97)]
    assert steps == sorted(steps)
