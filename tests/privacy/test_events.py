"""Events: canonical, versioned, strict."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput
from src.privacy.events import (
    DpSgdSteps,
    Event,
    NoisySum,
    NonPrivate,
    SampledNoisySum,
    Shares,
    event_from_json,
    event_to_json,
)

REALS = st.floats(0, 1e300, allow_subnormal=True)
COUNTS = st.integers(1, 2**53)
SHARES = st.none() | st.builds(
    lambda noise_by, quorum, missing, multiplier, tau: Shares(
        noise_by=noise_by,
        quorum=quorum,
        colluders=max(0, quorum - 1 - missing),
        share_multiplier=0.0 if noise_by == "aggregator" else multiplier,
        shares_tau=0.0 if noise_by == "aggregator" else tau,
    ),
    st.sampled_from(["both", "parties", "aggregator"]),
    COUNTS,
    st.integers(0, 9),
    st.floats(1e-300, 1e300),
    REALS,
)
EVENTS = st.one_of(
    st.builds(DpSgdSteps, sampling_rate=st.floats(1e-300, 1.0), noise_multiplier=REALS, steps=COUNTS),
    st.builds(
        NoisySum,
        noise_multiplier=REALS,
        rounds=COUNTS,
        tau=REALS,
        dimension=COUNTS,
        failure_probability=st.floats(0.0, 1.0),
        shares=SHARES,
    ),
    st.builds(
        SampledNoisySum,
        sampling_rate=st.floats(1e-300, 1.0),
        noise_multiplier=REALS,
        rounds=COUNTS,
        tau=REALS,
        dimension=COUNTS,
        failure_probability=st.floats(0.0, 1.0),
        shares=SHARES,
    ),
    st.builds(
        NonPrivate,
        unit=st.sampled_from(["example", "party"]),
        reason=st.text(st.characters(codec="ascii"), min_size=1, max_size=200),
    ),
)


@settings(deadline=None, max_examples=200)
@given(event=EVENTS)
def test_an_event_survives_json_unchanged_and_holds_only_strings_and_integers(event: Event) -> None:
    fields = event_to_json(event)
    assert all(type(value) in (str, int) for value in fields.values())
    assert event_from_json(json.loads(json.dumps(fields))) == event


def test_the_json_of_an_event_is_a_promise() -> None:
    """What ledgers hold today must be readable for ever."""
    assert event_to_json(DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=40)) == {
        "type": "dp_sgd_steps",
        "version": 1,
        "sampling_rate": "0.01",
        "noise_multiplier": "1.1",
        "steps": 40,
    }
    assert event_to_json(NoisySum(noise_multiplier=0.5, rounds=2, tau=1e-30, dimension=9)) == {
        "type": "noisy_sum",
        "version": 1,
        "noise_multiplier": "0.5",
        "rounds": 2,
        "tau": "1e-30",
        "dimension": 9,
        "failure_probability": "0.0",
    }
    sampled = SampledNoisySum(sampling_rate=0.02, noise_multiplier=1.5, rounds=3, tau=0.0, dimension=7)
    assert event_to_json(sampled) == {
        "type": "sampled_noisy_sum",
        "version": 1,
        "sampling_rate": "0.02",
        "noise_multiplier": "1.5",
        "rounds": 3,
        "tau": "0.0",
        "dimension": 7,
        "failure_probability": "0.0",
    }
    assert event_to_json(NonPrivate(unit="party", reason="no noise")) == {
        "type": "non_private",
        "version": 1,
        "unit": "party",
        "reason": "no noise",
    }


def test_an_event_that_says_of_whose_hands_its_noise_is_has_a_version_of_its_own() -> None:
    """The old version is read for ever, as one that does not say."""
    shares = Shares(noise_by="both", quorum=4, colluders=1, share_multiplier=0.25, shares_tau=1e-30)
    old = event_to_json(NoisySum(noise_multiplier=0.5))
    new = event_to_json(NoisySum(noise_multiplier=0.5, shares=shares))
    said = {"noise_by": "both", "quorum": 4, "colluders": 1, "share_multiplier": "0.25", "shares_tau": "1e-30"}
    assert new == {**old, "version": 2, **said}
    assert event_from_json(old) == NoisySum(noise_multiplier=0.5)
    alone = Shares(noise_by="aggregator", quorum=4, colluders=1, share_multiplier=0.0, shares_tau=0.0)
    sampled = SampledNoisySum(sampling_rate=0.5, noise_multiplier=0.5, shares=alone)
    assert not {"share_multiplier", "shares_tau"} & set(event_to_json(sampled))
    assert event_from_json(event_to_json(sampled)) == sampled


def test_unit_and_relation_belong_to_the_mechanism() -> None:
    steps = DpSgdSteps(sampling_rate=0.5, noise_multiplier=1.0, steps=1)
    assert (steps.unit, steps.relation) == ("example", "ADD_OR_REMOVE_ONE")
    total = NoisySum(noise_multiplier=1.0)
    assert (total.unit, total.relation) == ("party", "REPLACE_SPECIAL")
    sampled = SampledNoisySum(sampling_rate=0.5, noise_multiplier=1.0)
    assert (sampled.unit, sampled.relation) == ("example", "ADD_OR_REMOVE_ONE")
    assert NonPrivate(unit="example", reason="x").relation == "ADD_OR_REMOVE_ONE"


def test_repetition_multiplies_counts() -> None:
    assert DpSgdSteps(sampling_rate=0.5, noise_multiplier=1.0, steps=3).repeated(4).steps == 12
    assert NoisySum(noise_multiplier=1.0, rounds=2).repeated(3).rounds == 6
    assert SampledNoisySum(sampling_rate=0.5, noise_multiplier=1.0, rounds=2).repeated(3).rounds == 6
    for event in (NoisySum(noise_multiplier=1.0), NonPrivate(unit="party", reason="x")):
        with pytest.raises(InvalidInput):
            event.repeated(0)


GOOD: dict[str, object] = dict(event_to_json(DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=40)))
NON_PRIVATE: dict[str, object] = dict(event_to_json(NonPrivate(unit="party", reason="no noise")))
SAMPLED: dict[str, object] = dict(event_to_json(SampledNoisySum(sampling_rate=0.01, noise_multiplier=1.1)))
SHARED: dict[str, object] = dict(
    event_to_json(
        NoisySum(
            noise_multiplier=1.0,
            shares=Shares(noise_by="both", quorum=3, colluders=1, share_multiplier=0.5, shares_tau=0.0),
        )
    )
)
REJECTED: dict[str, object] = {
    "shares in version 1": {**SHARED, "version": 1},
    "no shares in version 2": {**event_to_json(NoisySum(noise_multiplier=1.0)), "version": 2},
    "shares, later version": {**SHARED, "version": 3},
    "shares of nobody": {**SHARED, "noise_by": "nobody"},
    "shares, one colluder too many": {**SHARED, "colluders": 3},
    "shares, colluders negative": {**SHARED, "colluders": -1},
    "shares, quorum zero": {**SHARED, "quorum": 0, "colluders": 0},
    "shares, quorum as string": {**SHARED, "quorum": "3"},
    "shares that are none": {**SHARED, "share_multiplier": "0.0"},
    "shares, real as number": {**SHARED, "share_multiplier": 0.5},
    "shares, tau missing": {key: value for key, value in SHARED.items() if key != "shares_tau"},
    "shares though the aggregator drew all": {**SHARED, "noise_by": "aggregator"},
    "not an object": [],
    "nothing": None,
    "no type": {key: value for key, value in GOOD.items() if key != "type"},
    "unknown type": {**GOOD, "type": "laplace"},
    "type not a string": {**GOOD, "type": ["dp_sgd_steps"]},
    "unknown version": {**GOOD, "version": 2},
    "version as bool": {**GOOD, "version": True},
    "version as real": {**GOOD, "version": 1.0},
    "field missing": {key: value for key, value in GOOD.items() if key != "steps"},
    "field unknown": {**GOOD, "note": "x"},
    "real as number": {**GOOD, "noise_multiplier": 1.1},
    "real not canonical": {**GOOD, "noise_multiplier": "1.10"},
    "real with a sign": {**GOOD, "noise_multiplier": "+1.1"},
    "real with a space": {**GOOD, "noise_multiplier": " 1.1"},
    "real with an underscore": {**GOOD, "noise_multiplier": "1_1.0"},
    "integer for a real": {**GOOD, "noise_multiplier": "1"},
    "nan": {**GOOD, "noise_multiplier": "nan"},
    "infinity": {**GOOD, "noise_multiplier": "inf"},
    "negative": {**GOOD, "noise_multiplier": "-1.1"},
    "not a real": {**GOOD, "noise_multiplier": "much"},
    "rate zero": {**GOOD, "sampling_rate": "0.0"},
    "rate above one": {**GOOD, "sampling_rate": "1.5"},
    "no steps": {**GOOD, "steps": 0},
    "steps as string": {**GOOD, "steps": "40"},
    "steps as bool": {**GOOD, "steps": True},
    "steps too many": {**GOOD, "steps": 2**53 + 1},
    "sampled, rate zero": {**SAMPLED, "sampling_rate": "0.0"},
    "sampled, rate above one": {**SAMPLED, "sampling_rate": "1.5"},
    "sampled, tau negative": {**SAMPLED, "tau": "-1.0"},
    "sampled, dimension zero": {**SAMPLED, "dimension": 0},
    "sampled, failure above one": {**SAMPLED, "failure_probability": "1.5"},
    "unknown unit": {**NON_PRIVATE, "unit": "user"},
    "reason empty": {**NON_PRIVATE, "reason": ""},
    "reason too long": {**NON_PRIVATE, "reason": "x" * 201},
    "reason not ASCII": {**NON_PRIVATE, "reason": "ε"},
}


@pytest.mark.parametrize("case", REJECTED)
def test_everything_else_is_refused(case: str) -> None:
    with pytest.raises(InvalidInput):
        event_from_json(REJECTED[case])
