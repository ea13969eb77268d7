"""What follows from a round's settings follows at both ends, and no sum inside the bounds overflows."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.keys import KeyShare
from src.encryption.scheme import Layout, Scheme
from src.errors import InvalidInput, PlanError, SlotOverflowError
from src.privacy.accounting import epsilon
from src.privacy.entropy import DeterministicEntropy
from src.privacy.events import DpSgdSteps, NoisySum, NonPrivate
from src.privacy.figures import Against
from src.privacy.noise_plan import fraction_from_json
from src.protocol.derive import OVERFLOW_LOG2, derive_again, example_event, noise_of, party_event
from src.protocol.plan import RoundPlan

MakePlan = Callable[..., RoundPlan]

SETTINGS = st.fixed_dictionaries(
    {
        "dimension": st.integers(1, 3000),
        "clipping_norm": st.floats(0.05, 50),
        "resolution_bits": st.integers(14, 20),
        "noise_by": st.sampled_from(["both", "parties", "aggregator"]),
        "noise_multiplier": st.floats(0.05, 4),
        "parties": st.integers(3, 12),
        "quorum": st.integers(2, 3),
        "colluders": st.integers(0, 1),
        "priced_rounds": st.integers(1, 1000),
    }
)


@settings(deadline=None, max_examples=60)
@given(chosen=SETTINGS)
def test_the_party_derives_what_the_aggregator_planned(
    make_plan: MakePlan, scheme: Scheme, chosen: dict[str, Any]
) -> None:
    plan = make_plan(scheme, **chosen)
    derived = derive_again(scheme, plan)
    assert derived.layout.to_json() == plan.layout
    assert derived.noise == plan.noise
    assert derived.rounded_bound == plan.rounded_bound >= math.ldexp(chosen["clipping_norm"], plan.resolution_bits)


@settings(deadline=None, max_examples=60)
@given(chosen=SETTINGS)
def test_the_planned_bounds_hold_what_contributors_may_send(
    make_plan: MakePlan, paillier: Scheme, chosen: dict[str, Any]
) -> None:
    """The offset covers an update of the whole clipping norm in one coordinate, and noise but with 2^-64 a job."""
    plan = make_plan(paillier, **chosen)
    layout = Layout.from_json(plan.layout)
    largest = max(fraction_from_json(text) for text in (plan.noise.share_sigma2, plan.noise.aggregator_sigma2))
    draws = plan.dimension * (len(plan.cohort) + 1) * plan.priced_rounds
    # P(|Z| ≥ t) ≤ 2·exp(-t²/(2σ²)) for one draw of a discrete Gaussian (Canonne, Kamath & Steinke 2020, Corollary 17).
    log2_tail = 1 - plan.noise.bound**2 / (2 * float(largest)) / math.log(2)
    assert log2_tail + math.log2(draws) <= -OVERFLOW_LOG2
    assert layout.offset == plan.noise.bound + math.ceil(chosen["clipping_norm"] * 2**plan.resolution_bits)
    assert layout.contributions == len(plan.cohort) + plan.aggregator_adds_noise
    assert layout.contributions * 2 * layout.offset < 1 << layout.slot_bits


def _tampered(plan: RoundPlan) -> dict[str, list[RoundPlan]]:
    layouts = [
        {**plan.layout, name: value + 1 if isinstance(value, int) else value + "x"}
        for name, value in plan.layout.items()
    ]
    layouts += [{k: v for k, v in plan.layout.items() if k != name} for name in plan.layout]
    layouts.append({**plan.layout, "extra": 1})
    noise = plan.noise
    noises = [
        replace(noise, share_sigma2="0/1"),
        replace(noise, share_sigma2=noise.share_sigma2 + "0"),
        replace(noise, aggregator_sigma2="0/1"),
        replace(noise, aggregator_sigma2="1/1"),
        replace(noise, bound=noise.bound - 1),
        replace(noise, bound=noise.bound + 1),
        replace(noise, bound=0),
    ]
    bounds = [plan.rounded_bound - 1, plan.rounded_bound + 1, 0, -1]
    return {
        "layout": [replace(plan, layout=each) for each in layouts],
        "noise": [replace(plan, noise=each) for each in noises],
        "rounded_bound": [replace(plan, rounded_bound=each) for each in bounds],
    }


@pytest.mark.parametrize("field", ["layout", "noise", "rounded_bound"])
def test_a_derived_field_that_does_not_follow_is_refused_by_name(
    make_plan: MakePlan, scheme: Scheme, field: str
) -> None:
    plan = make_plan(scheme)
    derive_again(scheme, plan)
    for tampered in _tampered(plan)[field]:
        with pytest.raises(PlanError, match=field) as caught:
            derive_again(scheme, tampered)
        assert caught.value.metadata["field"] == field


def test_a_setting_changed_without_what_follows_from_it_is_refused(make_plan: MakePlan, scheme: Scheme) -> None:
    """More noise shares counted on, a smaller cohort, a longer update: the derived fields give it away."""
    plan = make_plan(scheme, parties=4, quorum=2)
    changed = [
        replace(plan, quorum=3),
        replace(plan, colluders=1),
        replace(plan, clipping_norm="2.0"),
        replace(plan, resolution_bits=17),
        replace(plan, dimension=11),
        replace(plan, dimension=1 << 30),
        replace(plan, cohort=plan.cohort[:2]),
        replace(plan, priced_rounds=plan.priced_rounds * 2**20),
        replace(plan, noise=replace(plan.noise, noise_multiplier="5.0")),
        replace(plan, noise=replace(plan.noise, noise_by="parties")),
        replace(plan, noise=replace(plan.noise, noise_by="aggregator")),
    ]
    for each in changed:
        with pytest.raises(PlanError, match="does not follow"):
            derive_again(scheme, each)


def test_settings_that_no_round_can_have_are_refused(make_plan: MakePlan, scheme: Scheme) -> None:
    plan = make_plan(scheme)
    impossible = [
        replace(plan, quorum=0),
        replace(plan, colluders=2),
        replace(plan, colluders=-1),
        replace(plan, dimension=0),
        replace(plan, dimension=-5),
        replace(plan, priced_rounds=0),
        replace(plan, clipping_norm="0.0"),
        replace(plan, clipping_norm="-1.0"),
        replace(plan, resolution_bits=1000),
        replace(plan, noise=replace(plan.noise, noise_multiplier="-1.0")),
        replace(plan, noise=replace(plan.noise, noise_multiplier="1e+300")),
        replace(plan, noise=replace(plan.noise, noise_by="nobody")),
    ]
    for each in impossible:
        with pytest.raises(InvalidInput):
            derive_again(scheme, each)


def test_a_sum_that_no_slot_can_hold_is_refused(make_plan: MakePlan, scheme: Scheme) -> None:
    with pytest.raises(SlotOverflowError):
        make_plan(scheme, clipping_norm=2.0**29, resolution_bits=20, noise_multiplier=0.0, parties=4096)


@settings(deadline=None, max_examples=8)
@given(
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    noise_multiplier=st.sampled_from([0.0, 0.5, 3.0]),
    parties=st.integers(2, 5),
    dimension=st.integers(1, 40),
    signs=st.lists(st.sampled_from([-1, 0, 1]), min_size=6, max_size=6),
)
def test_the_most_extreme_contributions_decode_exactly(
    make_plan: MakePlan,
    scheme: Scheme,
    shares: list[KeyShare],
    entropy: DeterministicEntropy,
    parties: int,
    dimension: int,
    signs: list[int],
    **noise: Any,
) -> None:
    """Every contributor at its bound in every coordinate, the fullest cohort: the sum is exact, no slot spills over."""
    plan = make_plan(scheme, parties=parties, dimension=dimension, **noise)
    layout = Layout.from_json(plan.layout)
    chosen = signs[: layout.contributions]
    bodies = [
        b"".join(scheme.protect(layout, [np.full(dimension, sign * layout.offset)], entropy=entropy)) for sign in chosen
    ]
    material = b"".join(scheme.fold(layout, [io.BytesIO(body) for body in bodies]))
    batches = {
        share.index: scheme.open_share(
            layout, KeyShare(share.index, share.value, layout.key_id), [material], binding=b"x", entropy=entropy
        )
        for share in shares[1:]
    }
    opened = scheme.combine(layout, material, batches)
    decoded = np.concatenate(list(scheme.decode(layout, opened, contributions=len(chosen))))
    assert decoded.tolist() == [sum(chosen) * layout.offset] * dimension


def test_what_a_round_costs(make_plan: MakePlan, paillier: Scheme) -> None:
    plan = make_plan(paillier, noise_by="both", noise_multiplier=2.0)
    noise = derive_again(paillier, plan).noise_plan
    assert example_event(plan) == DpSgdSteps(sampling_rate=0.05, noise_multiplier=1.1, steps=10)
    release, against = party_event(plan, noise), party_event(plan, noise, against="aggregator")
    assert isinstance(release, NoisySum)
    assert isinstance(against, NoisySum)
    assert (release.noise_multiplier, release.rounds, release.dimension) == (2.0, 1, 10)
    assert against.noise_multiplier == pytest.approx(math.sqrt(2))
    guaranteed = fraction_from_json(plan.noise.aggregator_sigma2) + 2 * fraction_from_json(plan.noise.share_sigma2)
    assert guaranteed >= Fraction(2 * plan.rounded_bound) ** 2

    assert release.shares == against.shares == noise.shares
    alone = make_plan(paillier, noise_by="aggregator", noise_multiplier=2.0)
    noise = derive_again(paillier, alone).noise_plan
    assert isinstance(party_event(alone, noise), NoisySum)
    assert isinstance(party_event(alone, noise, against="aggregator"), NonPrivate)


@pytest.mark.parametrize("against", ["release", "aggregator", "all_others"])
def test_an_overflow_is_taken_from_the_delta_of_a_party(
    make_plan: MakePlan, paillier: Scheme, against: Against
) -> None:
    """2^-64 a job, whatever it is priced for: beyond the ε that leaves no δ for it, nothing is claimed."""
    for priced_rounds in (1, 10, 1000):
        for multiplier, meaningful in ((20.0, True), (0.1, False)):
            plan = make_plan(paillier, noise_by="both", noise_multiplier=multiplier, priced_rounds=priced_rounds)
            event = party_event(plan, noise_of(plan), against=against)
            assert isinstance(event, NoisySum)
            assert event.failure_probability * priced_rounds == pytest.approx(2.0**-OVERFLOW_LOG2)
            bare, charged = (epsilon([each], delta=1e-5) for each in (replace(event, failure_probability=0.0), event))
            assert bare < charged
            assert (charged < bare * (1 + 1e-6)) if meaningful else (bare > 33 and charged == math.inf)
