"""Plans of fedsgd: read strictly, derived alike at both ends, and what a round of them costs whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.plaintext import PlaintextScheme
from src.encryption.scheme import Layout, Scheme
from src.errors import InvalidInput, PlanError
from src.privacy.accounting import epsilon
from src.privacy.entropy import DeterministicEntropy
from src.privacy.events import NoisySum, NonPrivate, SampledNoisySum
from src.privacy.noise import discrete_gaussian
from src.privacy.noise_plan import fraction_from_json
from src.privacy.rounding import project, round_to_nearest
from src.protocol.canonical import canonical_bytes, parse_canonical, real
from src.protocol.derive import (
    contribution_bound,
    derive_again,
    derive_gradient_sum,
    example_event,
    example_multiplier,
    noise_of,
    party_event,
)
from src.protocol.plan import GradientSum, LocalPlan, RoundPlan

MakePlan = Callable[..., RoundPlan]
PLAIN = PlaintextScheme(2, 3)


@pytest.fixture(scope="module")
def make_sum(make_plan: MakePlan) -> MakePlan:
    """make_sum(…): a plan of fedsgd whose derived fields follow from these settings."""

    def make(
        scheme: Scheme = PLAIN,
        *,
        dimension: int = 50,
        max_grad_norm: float = 1.0,
        sampling_rate: float = 0.05,
        resolution_bits: int = 20,
        noise_by: str = "both",
        noise_multiplier: float = 1.5,
        rows: tuple[int, ...] = (1000, 1200, 800),
        quorum: int = 2,
        colluders: int = 0,
        priced_rounds: int = 5,
    ) -> RoundPlan:
        declared = {f"party{index}": count for index, count in enumerate(rows)}
        trusted = noise_by == "aggregator"
        derived = derive_gradient_sum(
            scheme,
            dimension=dimension,
            max_grad_norm=max_grad_norm,
            sampling_rate=sampling_rate,
            resolution_bits=resolution_bits,
            noise_by=noise_by,
            noise_multiplier=noise_multiplier,
            delta=1e-5,
            declared_rows=declared,
            trusted_aggregator=trusted,
            quorum=quorum,
            colluders=colluders,
            priced_rounds=priced_rounds,
        )
        multiplier = real(example_multiplier(derived.noise_plan))
        return replace(
            make_plan(scheme, parties=len(rows), quorum=quorum, colluders=colluders, priced_rounds=priced_rounds),
            dimension=dimension,
            local=LocalPlan(1, real(sampling_rate), "0.1", real(max_grad_norm), multiplier, "1e-05"),
            clipping_norm=real(derived.contribution_norm),
            resolution_bits=resolution_bits,
            rounded_bound=derived.rounded_bound,
            layout=derived.layout.to_json(),
            noise=derived.noise,
            gradient_sum=GradientSum(derived.cap, declared, trusted),
        )

    return make


# ------------------------------------------------------------------------------------------------------ the statement


def test_a_plan_of_fedavg_has_the_form_that_it_had_before_there_was_another_strategy(make_plan: MakePlan) -> None:
    statement = make_plan(PLAIN).to_statement()
    assert not {"strategy", "gradient_sum"} & set(statement)
    assert RoundPlan.from_statement(statement).strategy == "fedavg"


@settings(deadline=None, max_examples=40)
@given(
    dimension=st.integers(1, 500),
    max_grad_norm=st.floats(0.01, 100),
    sampling_rate=st.floats(1e-4, 1),
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    noise_multiplier=st.floats(0.1, 20),
    rows=st.lists(st.integers(1, 10**6), min_size=2, max_size=6).map(tuple),
    priced_rounds=st.integers(1, 10_000),
)
def test_a_plan_is_read_back_and_derived_again(make_sum: MakePlan, **settings_: Any) -> None:
    plan = make_sum(resolution_bits=24, **settings_)
    again = RoundPlan.from_statement(parse_canonical(canonical_bytes(plan.to_statement())))
    assert again == plan
    assert plan.strategy == "fedsgd"
    assert derive_again(PLAIN, again).cap == plan.gradient_sum.batch_cap  # type: ignore[union-attr]  # it is there


OTHER_TYPES: list[tuple[str, Any]] = [
    ("batch_cap", "7"),
    ("batch_cap", True),
    ("batch_cap", None),
    ("declared_rows", [1000]),
    ("declared_rows", {"party0": "1000"}),
    ("declared_rows", {"party0": True}),
    ("declared_rows", {"party0": 1.5}),
    ("trusted_aggregator", 0),
    ("trusted_aggregator", "no"),
    ("extra", 1),
]


@pytest.mark.parametrize(("name", "value"), OTHER_TYPES)
def test_a_field_of_another_type_is_refused(make_sum: MakePlan, name: str, value: Any) -> None:
    statement = make_sum().to_statement()
    statement["gradient_sum"] = {**statement["gradient_sum"], name: value}
    with pytest.raises(InvalidInput, match="malformed"):
        RoundPlan.from_statement(statement)


@pytest.mark.parametrize(
    "change",
    [
        {"strategy": "fedavg"},
        {"strategy": None},
        {"strategy": "fedprox"},
        {"gradient_sum": None},
        {"gradient_sum": {}},
        {"gradient_sum": {"batch_cap": 3}},
    ],
)
def test_strategy_and_fields_belong_together(make_sum: MakePlan, make_plan: MakePlan, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="malformed"):
        RoundPlan.from_statement({**make_sum().to_statement(), **change})
    for name in change:
        bare = {key: value for key, value in make_sum().to_statement().items() if key != name}
        with pytest.raises(InvalidInput, match="malformed"):
            RoundPlan.from_statement(bare)
    with pytest.raises(InvalidInput, match="malformed"):
        RoundPlan.from_statement({**make_plan(PLAIN).to_statement(), **change})


# ---------------------------------------------------------------------------------------------------- what is derived


def test_the_noise_is_that_of_one_dp_sgd_step_over_the_sensitivity_after_rounding(make_sum: MakePlan) -> None:
    plan = make_sum(dimension=10_000, max_grad_norm=0.5, noise_by="parties", noise_multiplier=2.0)
    assert plan.rounded_bound == 2**20 // 2 + 100  # 2^f·C + √d
    share = fraction_from_json(plan.noise.share_sigma2)
    assert 2 * share >= Fraction(2 * plan.rounded_bound) ** 2 > 2 * share * Fraction(999_999, 10**6)
    assert not plan.aggregator_adds_noise


@pytest.mark.parametrize(("dimension", "least"), [(1, 7), (177, 11), (10**6, 17)])
def test_a_grid_so_coarse_that_rounding_costs_noise_is_refused(make_sum: MakePlan, dimension: int, least: int) -> None:
    plan = make_sum(dimension=dimension, resolution_bits=least)
    assert math.sqrt(dimension) <= 0.01 * 2.0**least
    with pytest.raises(PlanError, match=f"at least {least} resolution bits"):
        make_sum(dimension=dimension, resolution_bits=least - 1)
    with pytest.raises(PlanError, match="resolution bits"):
        derive_again(PLAIN, replace(plan, resolution_bits=least - 1))


def test_all_parties_have_the_slots_of_the_one_with_the_most_rows(make_sum: MakePlan) -> None:
    plan, larger = make_sum(rows=(1000, 1200, 800)), make_sum(rows=(1200, 1200, 1200))
    assert (plan.gradient_sum and plan.gradient_sum.batch_cap) == (
        larger.gradient_sum and larger.gradient_sum.batch_cap
    )
    assert plan.layout == larger.layout


@settings(deadline=None, max_examples=30)
@given(
    direction=st.integers(0, 49),
    size=st.floats(0, 1e9),
    noise_by=st.sampled_from(["both", "parties"]),
    noise_multiplier=st.floats(0.1, 10),
    seed=st.binary(min_size=1, max_size=4),
)
def test_whatever_the_rows_are_a_contribution_fits_its_slots(
    make_sum: MakePlan, direction: int, size: float, seed: bytes, **settings_: Any
) -> None:
    """A sum of any size, along one axis, which is the worst: nothing that data does makes a party fail."""
    plan = make_sum(**settings_)
    total = np.zeros(50)
    total[direction] = size
    values = round_to_nearest(project(total, float(plan.clipping_norm)), resolution_bits=plan.resolution_bits)
    noise = discrete_gaussian(
        fraction_from_json(plan.noise.share_sigma2), 50, entropy=DeterministicEntropy(seed, purpose="noise")
    )
    assert np.abs(values + noise).max() <= Layout.from_json(plan.layout).offset
    assert math.sqrt(float(np.dot(values.astype(float), values.astype(float)))) <= contribution_bound(plan)


def test_an_aggregator_that_draws_all_the_noise_has_to_be_called_trusted(make_sum: MakePlan) -> None:
    settings_ = {
        "dimension": 10,
        "max_grad_norm": 1.0,
        "sampling_rate": 0.1,
        "resolution_bits": 16,
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "declared_rows": {"a": 10, "b": 10},
        "quorum": 2,
        "colluders": 0,
        "priced_rounds": 1,
    }
    for noise_by, trusted in (("aggregator", False), ("both", True), ("parties", True)):
        with pytest.raises(PlanError, match="trusted server"):
            derive_gradient_sum(PLAIN, noise_by=noise_by, trusted_aggregator=trusted, **settings_)  # type: ignore[arg-type]
    for rows in ({}, {"a": 0, "b": 10}):
        with pytest.raises(PlanError, match="at least one row"):
            derive_gradient_sum(
                PLAIN,
                noise_by="both",
                trusted_aggregator=False,
                **{**settings_, "declared_rows": rows},  # type: ignore[arg-type]
            )


# ------------------------------------------------------------------------------------------------------ what it costs


def test_a_row_is_charged_for_what_holds_against_the_aggregator(make_sum: MakePlan) -> None:
    """With both, that is the parties' half of the variance alone."""
    parties = example_event(make_sum(noise_by="parties", noise_multiplier=2.0))
    both = example_event(make_sum(noise_by="both", noise_multiplier=2.0))
    assert isinstance(parties, SampledNoisySum)
    assert isinstance(both, SampledNoisySum)
    assert (parties.noise_multiplier, parties.sampling_rate, parties.rounds, parties.dimension) == (2.0, 0.05, 1, 50)
    assert both.noise_multiplier == pytest.approx(2.0 * math.sqrt(0.5))
    assert both.noise_multiplier < 2.0 * math.sqrt(0.5)
    release = example_event(make_sum(noise_by="both", noise_multiplier=2.0), against="release")
    assert isinstance(release, SampledNoisySum)
    assert release.noise_multiplier == 2.0


def test_with_a_trusted_server_a_row_is_protected_from_everybody_else(make_sum: MakePlan) -> None:
    plan = make_sum(noise_by="aggregator", noise_multiplier=2.0)
    charged = example_event(plan)
    assert isinstance(charged, SampledNoisySum)
    assert charged.noise_multiplier == 2.0
    assert isinstance(example_event(plan, against="aggregator"), NonPrivate)
    assert isinstance(example_event(plan, against="all_others"), NonPrivate)


@pytest.mark.parametrize("noise_by", ["both", "parties"])
def test_against_all_others_together_one_share_is_left(make_sum: MakePlan, noise_by: str) -> None:
    plan = make_sum(noise_by=noise_by, noise_multiplier=2.0, rows=(1000,) * 5, quorum=5, colluders=1)
    charged, alone = example_event(plan), example_event(plan, against="all_others")
    assert isinstance(charged, SampledNoisySum)
    assert isinstance(alone, SampledNoisySum)
    assert alone.noise_multiplier == pytest.approx(charged.noise_multiplier / 2, rel=1e-6)  # √(quorum - colluders) = 2
    assert alone.noise_multiplier**2 * plan.rounded_bound**2 <= fraction_from_json(plan.noise.share_sigma2)
    assert epsilon([alone], delta=1e-5) > epsilon([charged], delta=1e-5)


def test_a_party_as_a_whole_is_hidden_hardly_at_all_and_the_figure_says_so(make_sum: MakePlan) -> None:
    plan = make_sum(noise_multiplier=2.0)
    assert plan.gradient_sum is not None
    event = party_event(plan, noise_of(plan))
    assert isinstance(event, NoisySum)
    assert event.noise_multiplier == pytest.approx(2.0 / plan.gradient_sum.batch_cap, rel=1e-3)
    assert event.noise_multiplier * contribution_bound(plan) <= 2.0 * plan.rounded_bound
    against = party_event(plan, noise_of(plan), against="aggregator")
    assert isinstance(against, NoisySum)
    assert against.noise_multiplier < event.noise_multiplier
    assert event.shares is not None
    assert event.shares.share_multiplier <= against.noise_multiplier  # over the same bound
    assert epsilon([event], delta=1e-5) > 20
    silent = make_sum(noise_multiplier=0.0)
    assert isinstance(party_event(silent, noise_of(silent)), NonPrivate)
    assert isinstance(example_event(silent), NonPrivate)


def test_what_can_go_wrong_once_in_a_job_is_charged(make_sum: MakePlan) -> None:
    for priced_rounds in (1, 5, 1000):
        event = example_event(make_sum(priced_rounds=priced_rounds))
        assert isinstance(event, SampledNoisySum)
        assert event.failure_probability * priced_rounds == pytest.approx(2.0**-63)
        plan = make_sum(priced_rounds=priced_rounds)
        whole = party_event(plan, noise_of(plan))  # a batch above the cap is projected: it costs a party nothing
        assert isinstance(whole, NoisySum)
        assert whole.failure_probability * priced_rounds == pytest.approx(2.0**-64)
