"""What a job's history tells of its rounds, and what it keeps to itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from src.aggregator.federation import Federation
from src.aggregator.planning import Model, plan_of, plan_round, round_costs
from src.aggregator.round_row import RoundRow, RoundState, SpentRounds
from src.aggregator.steps import party_figures
from src.aggregator.summary import Tally, round_summary
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.wire import round_to_proto
from src.privacy.accounting import epsilon
from src.privacy.events import event_to_json
from src.protocol.plan import PLAN_KIND

ROWS = {"a": 5000, "b": 5400, "c": 6000}
RESULT = {
    "epsilon_party": 3.5,
    "epsilon_party_against_aggregator": 5.0,
    "epsilon_party_if_all_others_collude": "inf",
    "party_assumption": "honest shares",
    "party_delta": 1e-5,
}


def a_round(federation: Federation, strategy: str, *, spec: dict[str, Any] | None = None, **fields: Any) -> RoundRow:
    """Released after four seconds."""
    plan = plan_round(
        FederatedTrainingSpec.from_json({"task": "randhie", "strategy": strategy, **(spec or {})}),
        job_id="job",
        number=1,
        model=Model("a" * 64, 4000, 97),
        roster=federation.roster,
        scheme=federation.scheme("paillier", allow_plaintext=False),
        declared_rows=ROWS,
    )
    given: dict[str, Any] = {"started_at": 10.0, "ended_at": 14.0, "state": RoundState.RELEASED, "result": RESULT}
    return RoundRow(
        job_id="job",
        number=1,
        plan=federation.sign(PLAN_KIND, plan.to_statement()).to_json(),
        plan_digest="",
        model_sha256="a" * 64,
        cohort=("a", "b"),
        quorum=2,
        holders=(),
        threshold=0,
        noise_needed=True,
        timeout_s=99.0,
        **{**given, **fields},
    )


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_how_long_a_round_took_is_told_under_fedavg_alone(federation: Federation) -> None:
    told, silent = a_round(federation, "fedavg"), a_round(federation, "fedsgd")
    assert round_to_proto(round_summary(told)).seconds == 4.0
    assert "seconds" not in round_summary(silent)
    assert not round_to_proto(round_summary(silent)).HasField("seconds")
    assert Tally().after(told).estimate(3, since=20.0, now=0.0) == 32.0
    tally = Tally().after(silent)
    assert (tally.released, tally.estimate(3, since=20.0, now=0.0)) == (1, 0.0)


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_a_summary_has_what_each_figure_rests_on_and_at_which_delta(federation: Federation) -> None:
    """Rounds of an earlier version, which know neither, are told as they were."""
    row = a_round(federation, "fedavg", budgets={"a": (1.5, 2.5, 1e-3), "b": (1.5, 2.5)})
    assert RoundRow.from_json(row.to_json()) == row
    message = round_to_proto(round_summary(row))
    assert message.epsilon_party_if_all_others_collude == float("inf")
    assert (message.party_assumption, message.party_delta) == ("honest shares", 1e-5)
    first, second = message.parties
    assert (first.example_epsilon_spent, first.example_epsilon_left) == (1.5, 2.5)
    assert first.example_epsilon_left_delta == 1e-3
    assert not second.HasField("example_epsilon_left_delta")
    old = round_to_proto(round_summary(a_round(federation, "fedavg", result={"epsilon_party": 1.0})))
    assert not old.HasField("epsilon_party_if_all_others_collude")
    assert not old.HasField("party_delta")


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_what_a_party_has_spent_grows_by_the_round_and_is_more_against_the_aggregator_and_all_others(
    federation: Federation,
) -> None:
    row = a_round(federation, "fedavg", spec={"party_privacy": {"noise_multiplier": 2.0}})
    events = round_costs(federation.scheme("paillier", allow_plaintext=False), plan_of(row.plan))
    row = replace(row, costs={name: dict(event_to_json(event)) for name, event in events.items()})
    spent = []
    for rounds in (1, 2, 3):
        party, others, aggregator = party_figures([SpentRounds(row.costs, rounds)], 1e-5)
        assert aggregator == epsilon([events["aggregator"]] * rounds, delta=1e-5)
        assert party.epsilon < aggregator < others.epsilon < float("inf")
        assert "3 carry an honest noise share" in party.assumes
        spent.append(party.epsilon)
    assert spent == sorted(set(spent))
