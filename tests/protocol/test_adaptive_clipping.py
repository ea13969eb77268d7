"""Plans with adaptive clipping: one value more, derived alike at both ends, and no dearer than without."""

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

from src.encryption.scheme import Layout, Scheme
from src.errors import InvalidInput, PlanError
from src.party.work import encode
from src.privacy.clipping import AdaptiveClipping
from src.privacy.entropy import DeterministicEntropy
from src.privacy.events import NoisySum
from src.privacy.noise import discrete_gaussian
from src.privacy.noise_plan import fraction_from_json
from src.protocol.canonical import canonical_bytes, parse_canonical
from src.protocol.derive import adaptation_of, derive_again, noise_of, party_event
from src.protocol.plan import GradientSum, RoundPlan

MakePlan = Callable[..., RoundPlan]

RULE = AdaptiveClipping(bit_deviation=2.0, smallest=0.01, largest=100.0)
SETTINGS = st.fixed_dictionaries(
    {
        "dimension": st.integers(1, 3000),
        "clipping_norm": st.floats(0.01, 100),
        "resolution_bits": st.integers(14, 20),
        "noise_by": st.sampled_from(["both", "parties", "aggregator"]),
        "noise_multiplier": st.floats(0.05, 3.9),
        "parties": st.integers(21, 40),
        "quorum": st.integers(20, 21),
        "colluders": st.integers(0, 1),
        "priced_rounds": st.integers(1, 1000),
    }
)


@settings(deadline=None, max_examples=40)
@given(chosen=SETTINGS)
def test_the_party_derives_what_the_aggregator_planned(
    make_plan: MakePlan, scheme: Scheme, chosen: dict[str, Any]
) -> None:
    plan = make_plan(scheme, adaptive=RULE, **chosen)
    derived = derive_again(scheme, plan)
    layout = Layout.from_json(plan.layout)
    assert plan.adaptive_clipping is not None
    assert derived.bit_unit == plan.bit_unit == plan.adaptive_clipping.bit_unit >= 1
    assert layout.parameter_count == plan.value_count == plan.dimension + 1
    assert layout.offset >= plan.bit_unit + plan.noise.bound
    assert adaptation_of(plan) == RULE


@settings(deadline=None, max_examples=40)
@given(chosen=SETTINGS)
def test_it_costs_a_party_what_the_same_round_costs_without(
    make_plan: MakePlan, paillier: Scheme, chosen: dict[str, Any]
) -> None:
    """Update and bit together at the job's noise multiplier: the update alone gets the more noise that pays for it."""
    plain, plan = make_plan(paillier, **chosen), make_plan(paillier, adaptive=RULE, **chosen)
    event, before = party_event(plan, noise_of(plan)), party_event(plain, noise_of(plain))
    assert isinstance(event, NoisySum)
    assert isinstance(before, NoisySum)
    assert (event.noise_multiplier, event.dimension) == (before.noise_multiplier, plan.dimension + 1)
    assert event.tau <= before.tau
    total = [fraction_from_json(each.noise.share_sigma2) * (each.quorum - each.colluders) for each in (plan, plain)]
    total[0] += fraction_from_json(plan.noise.aggregator_sigma2)
    total[1] += fraction_from_json(plain.noise.aggregator_sigma2)
    both = plan.rounded_bound**2 + plan.bit_unit**2
    assert total[0] >= Fraction(chosen["noise_multiplier"]) ** 2 * both
    assert total[0] > total[1]


def test_the_statement_reads_back_and_a_plan_without_is_what_it_was(make_plan: MakePlan, paillier: Scheme) -> None:
    plan = make_plan(paillier, parties=20, quorum=20, adaptive=RULE)
    statement = parse_canonical(canonical_bytes(plan.to_statement()))
    assert RoundPlan.from_statement(statement) == plan
    assert statement["adaptive_clipping"]["quantile"] == "0.5"
    assert "adaptive_clipping" not in make_plan(paillier).to_statement()


MALFORMED: dict[str, dict[str, Any]] = {
    "a setting missing": {"bit_unit": None},
    "a float": {"quantile": 0.5},
    "a number in another form": {"quantile": ".5"},
    "not a number": {"largest": "inf"},
    "a unit that is a text": {"bit_unit": "7"},
    "a field too many": {"momentum": "0.9"},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_adaptation_is_refused(make_plan: MakePlan, paillier: Scheme, case: str) -> None:
    statement = make_plan(paillier, parties=20, quorum=20, adaptive=RULE).to_statement()
    changed = {**statement["adaptive_clipping"], **MALFORMED[case]}
    content = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(InvalidInput, match="malformed"):
        RoundPlan.from_statement({**statement, "adaptive_clipping": content})


def test_what_does_not_follow_from_the_settings_is_refused_by_name(make_plan: MakePlan, paillier: Scheme) -> None:
    plan = make_plan(paillier, parties=20, quorum=20, adaptive=RULE)
    adaptation = plan.adaptive_clipping
    assert adaptation is not None
    changed = {
        "bit_unit": replace(adaptation, bit_unit=adaptation.bit_unit + 1),
        "bit_unit ": replace(adaptation, bit_deviation="3.0"),
        "clipping_norm": replace(adaptation, largest="0.5"),
    }
    for field, value in changed.items():
        with pytest.raises(PlanError) as caught:
            derive_again(paillier, replace(plan, adaptive_clipping=value))
        assert caught.value.metadata["field"] == field.strip()
    with pytest.raises(PlanError) as caught:
        derive_again(paillier, replace(plan, adaptive_clipping=None))
    assert caught.value.metadata["field"] in ("noise", "layout")
    fedsgd = replace(plan, gradient_sum=GradientSum(1, dict.fromkeys(plan.cohort, 1), False))
    with pytest.raises(PlanError, match="only fedavg"):
        derive_again(paillier, fedsgd)


def test_with_fewer_than_twenty_or_too_little_noise_on_the_count_there_is_no_such_plan(
    make_plan: MakePlan, paillier: Scheme
) -> None:
    with pytest.raises(PlanError, match="quorum of at least 20"):
        make_plan(paillier, parties=25, quorum=19, adaptive=RULE)
    with pytest.raises(InvalidInput, match="noise on the count of bits is too small"):
        make_plan(paillier, parties=20, quorum=20, noise_multiplier=4.0, adaptive=RULE)


@pytest.mark.parametrize(("norm", "sign"), [(0.5, 1), (1.0, 1), (1.01, -1), (1e6, -1)])
def test_a_party_adds_one_bit_after_its_update(make_plan: MakePlan, paillier: Scheme, norm: float, sign: int) -> None:
    """The last value, before noise: whether the update was within the norm when it came out of training."""
    plan = make_plan(paillier, dimension=4, parties=20, quorum=20, noise_by="parties", adaptive=RULE)
    update = np.array([norm, 0, 0, 0], np.float32)

    def source() -> DeterministicEntropy:
        return DeterministicEntropy(bytes(32), purpose="bit")

    values = encode(update, plan, entropy=source())
    assert values.shape == (5,)
    silent = replace(plan, noise=replace(plan.noise, share_sigma2="0/1"))
    plain = encode(update, silent, entropy=source())
    assert plain[-1] == sign * plan.bit_unit
    assert math.sqrt(float(np.dot(plain[:4].astype(float), plain[:4].astype(float)))) <= plan.rounded_bound
    drawn = source()
    drawn.words(4)
    noise = discrete_gaussian(fraction_from_json(plan.noise.share_sigma2), 5, entropy=drawn)
    assert np.array_equal(values - plain, noise)
