"""From a job to a round plan: who is invited, which quorum is allowed, and that a party derives the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.aggregator.federation import Federation
from src.aggregator.planning import Model, check_noise_by, invited, plan_of, plan_round, round_costs
from src.encryption.dealer import check_threshold
from src.errors import InvalidInput, KeyMaterialError, PlanError, PolicyError
from src.jobs.spec import FederatedTrainingSpec
from src.privacy.accounting import epsilon
from src.privacy.events import NoisySum, NonPrivate
from src.protocol.derive import derive_again, example_event
from src.protocol.plan import PLAN_KIND
from src.protocol.roster import Roster

MakeRoster = Callable[..., Roster]
MODEL = Model("a" * 64, 4000, 97)


def make_spec(**fields: Any) -> FederatedTrainingSpec:
    return FederatedTrainingSpec.from_json({"task": "randhie", "rounds": 2, "spare_rounds": 1, **fields})


# ----------------------------------------------------------------------------------------------- cohort and quorum


def test_without_names_everybody_is_invited_and_needed(make_roster: MakeRoster) -> None:
    assert invited(make_spec(), make_roster("abc")) == (("a", "b", "c"), 3)


def test_the_cohort_is_in_the_order_of_the_roster(make_roster: MakeRoster) -> None:
    assert invited(make_spec(parties=["c", "a"]), make_roster("abc")) == (("a", "c"), 2)


def test_a_smaller_quorum_is_a_wish(make_roster: MakeRoster) -> None:
    assert invited(make_spec(quorum=2), make_roster("abc")) == (("a", "b", "c"), 2)


def test_strangers_are_named(make_roster: MakeRoster) -> None:
    with pytest.raises(InvalidInput, match="not enrolled in federation demo: y, z \\(enrolled: a, b, c\\)") as caught:
        invited(make_spec(parties=["a", "z", "y"]), make_roster("abc"))
    assert caught.value.violations == {"federated_training.parties": "not enrolled: y, z"}


def test_a_sum_over_one_party_is_never_planned(make_roster: MakeRoster) -> None:
    for names, parties in (("abc", ["a"]), ("a", []), ("", [])):
        roster = make_roster(names, custody="aggregator")
        with pytest.raises(InvalidInput, match="at least 2 parties"):
            invited(make_spec(parties=parties), roster)
    with pytest.raises(PlanError, match="a quorum of 1 does not fit 3 invited parties"):
        invited(make_spec(quorum=1), make_roster("abc"))
    with pytest.raises(PlanError, match="a quorum of 4 does not fit 3"):
        invited(make_spec(quorum=4), make_roster("abc"))


def test_two_sums_that_differ_by_one_party_could_not_both_be_opened(make_roster: MakeRoster) -> None:
    """2 of 4: two pairs of holders could open two sums, unless everybody has to be in both."""
    roster = make_roster("abcd", threshold=2)
    with pytest.raises(PlanError, match="do not allow a quorum of 3: 2·threshold > holders \\+ colluders"):
        invited(make_spec(quorum=3), roster)
    assert invited(make_spec(quorum=4), roster) == (("a", "b", "c", "d"), 4)
    assert invited(make_spec(quorum=3), make_roster("abcd", threshold=3))[1] == 3


def test_with_colluders_more_is_asked(make_roster: MakeRoster) -> None:
    """2 of 3 stands against a malicious aggregator alone; with one colluding party it needs everybody.

    A quorum of 2 with one colluder would be a sum over one honest party, whatever the threshold.
    """
    for threshold in (2, 3):
        with pytest.raises(PlanError, match="colluders"):
            invited(make_spec(quorum=2), make_roster("abc", threshold=threshold, colluders=1))
        assert invited(make_spec(quorum=3), make_roster("abc", threshold=threshold, colluders=1))[1] == 3
    with pytest.raises(PlanError, match="do not allow a quorum"):
        invited(make_spec(quorum=3), make_roster("abcd", threshold=2, colluders=1))


def test_with_custody_aggregator_no_threshold_is_asked_for(make_roster: MakeRoster) -> None:
    assert invited(make_spec(quorum=2), make_roster("abcd", custody="aggregator"))[1] == 2


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(2, 7),
    chosen=st.integers(2, 7),
    quorum=st.integers(2, 7),
    holders=st.integers(2, 7),
    threshold=st.integers(2, 7),
    colluders=st.integers(0, 3),
)
def test_what_check_threshold_allows_with_two_honest_updates_is_planned(
    make_roster: MakeRoster, size: int, chosen: int, quorum: int, holders: int, threshold: int, colluders: int
) -> None:
    names = "abcdefg"[:size]
    holders = min(holders, size)
    roster = make_roster(names, threshold=threshold, colluders=colluders, holders=holders)
    parties = list(names[: min(chosen, size)])
    spec = make_spec(parties=parties, quorum=min(quorum, len(parties)))
    try:
        check_threshold(threshold, holders, colluders=colluders, quorum=spec.quorum, parties=len(parties))
        honest_alone = spec.quorum - colluders < 2
    except KeyMaterialError:
        honest_alone = True
    if honest_alone:
        with pytest.raises(PlanError, match="quorum"):
            invited(spec, roster)
    else:
        assert invited(spec, roster) == (tuple(parties), spec.quorum)


@pytest.mark.parametrize("configured", ["both", "parties", "aggregator"])
def test_the_noise_is_drawn_by_whom_the_aggregator_is_configured_for(configured: str) -> None:
    for asked in ("both", "parties", "aggregator"):
        spec = make_spec(party_privacy={"noise_by": asked})
        if asked == configured:
            check_noise_by(spec, configured)
        else:
            with pytest.raises(PolicyError, match=f"noise_by: {configured}; the job asks for {asked}"):
                check_noise_by(spec, configured)


# ----------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("noise_by", ["both", "parties", "aggregator"])
@pytest.mark.parametrize("name", ["paillier", "plaintext"])
def test_a_plan_fixes_all_and_a_party_derives_the_same(federation: Federation, noise_by: str, name: str) -> None:
    spec = make_spec(
        quorum=2, party_privacy={"noise_by": noise_by, "noise_multiplier": 1.0}, encryption={"scheme": name}
    )
    scheme = federation.scheme(name, allow_plaintext=True)
    plan = plan_round(spec, job_id="job", number=2, model=MODEL, roster=federation.roster, scheme=scheme)
    derive_again(scheme, plan)
    roster = federation.roster
    assert (plan.federation, plan.roster_digest, plan.key_id) == (roster.federation, roster.digest, roster.key_id)
    assert (plan.threshold, plan.custody, plan.colluders) == (roster.threshold, roster.custody, roster.colluders)
    assert (plan.job_id, plan.round, plan.priced_rounds, plan.spec_digest) == ("job", 2, 3, spec.digest)
    assert (plan.cohort, plan.quorum, plan.dimension) == (("a", "b", "c"), 2, 97)
    assert (plan.model_sha256, plan.model_bytes) == (MODEL.sha256, MODEL.size)
    assert plan.aggregator_adds_noise is (noise_by != "parties")
    signed = federation.sign(PLAN_KIND, plan.to_statement())
    assert plan_of(signed.to_json()) == plan


def test_the_local_noise_is_as_much_as_all_priced_rounds_together_need(federation: Federation) -> None:
    spec = make_spec(local_training={"epsilon": 2.0})
    scheme = federation.scheme("paillier", allow_plaintext=False)
    plan = plan_round(spec, job_id="job", number=1, model=MODEL, roster=federation.roster, scheme=scheme)
    spent = epsilon([example_event(plan).repeated(spec.priced_rounds)], delta=1e-5)
    assert 1.9 < spent <= 2.0


def test_what_a_round_costs_against_whom(federation: Federation) -> None:
    scheme = federation.scheme("paillier", allow_plaintext=False)

    def costs(**privacy: Any) -> dict[str, Any]:
        spec = make_spec(party_privacy=privacy)
        plan = plan_round(spec, job_id="j", number=1, model=MODEL, roster=federation.roster, scheme=scheme)
        return dict(round_costs(scheme, plan))

    both = costs(noise_multiplier=2.0, noise_by="both")
    assert both["release"].noise_multiplier == 2.0
    assert both["aggregator"].noise_multiplier == pytest.approx(math.sqrt(2.0))
    parties = costs(noise_multiplier=2.0, noise_by="parties")
    assert parties["release"].noise_multiplier == parties["aggregator"].noise_multiplier == 2.0
    alone = costs(noise_multiplier=2.0, noise_by="aggregator")
    assert isinstance(alone["release"], NoisySum)
    assert isinstance(alone["aggregator"], NonPrivate)
    none = costs(noise_multiplier=0.0)
    assert isinstance(none["release"], NonPrivate)
    assert isinstance(none["aggregator"], NonPrivate)


@pytest.mark.parametrize(
    ("privacy", "why"),
    [
        ({"clipping_norm": 2.0**20, "noise_multiplier": 0.0}, "encoded norm above 2\\^50"),
        ({"clipping_norm": 2.0**17, "noise_multiplier": 1.0}, "noise variance exceeds 2\\^80: lower the resolution"),
        ({"clipping_norm": 2.0**-32, "noise_multiplier": 0.01}, "at least 1/4 in integer units: raise the resolution"),
    ],
    ids=["updates", "noise", "noise too fine"],
)
def test_what_cannot_be_encoded_is_not_planned(federation: Federation, privacy: dict[str, Any], why: str) -> None:
    scheme = federation.scheme("paillier", allow_plaintext=False)
    spec = make_spec(encryption={"resolution_bits": 32}, party_privacy=privacy)
    with pytest.raises(InvalidInput, match=why):
        plan_round(spec, job_id="j", number=1, model=MODEL, roster=federation.roster, scheme=scheme)


def test_plaintext_is_planned_only_where_it_is_allowed(federation: Federation) -> None:
    with pytest.raises(PolicyError, match="allow_plaintext_scheme"):
        federation.scheme("plaintext", allow_plaintext=False)
    assert federation.scheme("plaintext", allow_plaintext=True).name == "plaintext"
