"""From a job of fedsgd to its round plan: whose rows, how much noise by whom, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from src.aggregator.federation import Federation
from src.aggregator.planning import (
    Model,
    declarations,
    declared_rows_of,
    plan_of,
    plan_round,
    round_costs,
    undeclared,
)
from src.aggregator.pricing import Pricing
from src.aggregator.servicers.declared import MAX_DECLARED_ROWS, declared_rows
from src.communication.generated import federation_pb2
from src.errors import InvalidInput, LimitError, PlanError, StateError
from src.jobs.spec import FederatedTrainingSpec
from src.privacy.accounting import calibrate_dp_sgd, epsilon
from src.privacy.events import Event, NoisySum, NonPrivate, SampledNoisySum
from src.protocol.derive import derive_again, example_event
from src.protocol.plan import PLAN_KIND, RoundPlan
from src.protocol.roster import Roster

MODEL = Model("a" * 64, 4000, 177)
ROWS = {"a": 5000, "b": 5400, "c": 6000}


def make_spec(**fields: Any) -> FederatedTrainingSpec:
    noise_by = fields.get("party_privacy", {}).get("noise_by")
    standard = {
        "task": "randhie",
        "strategy": "fedsgd",
        "rounds": 40,
        "spare_rounds": 10,
        "trusted_aggregator": noise_by == "aggregator",
    }
    return FederatedTrainingSpec.from_json({**standard, **fields})


def make(federation: Federation, *, rows: dict[str, int] | None = None, **fields: Any) -> RoundPlan:
    spec = make_spec(**fields)
    scheme = federation.scheme(spec.encryption.scheme, allow_plaintext=True)
    return plan_round(
        spec,
        job_id="job",
        number=2,
        model=MODEL,
        roster=federation.roster,
        scheme=scheme,
        declared_rows=ROWS if rows is None else rows,
    )


# ----------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("noise_by", ["both", "parties", "aggregator"])
@pytest.mark.parametrize("name", ["paillier", "plaintext"])
def test_a_plan_fixes_all_and_a_party_derives_the_same(federation: Federation, noise_by: str, name: str) -> None:
    plan = make(federation, quorum=2, party_privacy={"noise_by": noise_by}, encryption={"scheme": name})
    derive_again(federation.scheme(name, allow_plaintext=True), plan)
    assert (plan.strategy, plan.local.steps, declared_rows_of(plan)) == ("fedsgd", 1, ROWS)
    assert plan.aggregator_adds_noise is (noise_by != "parties")
    assert plan.gradient_sum is not None
    assert plan.gradient_sum.trusted_aggregator is (noise_by == "aggregator")
    signed = federation.sign(PLAN_KIND, plan.to_statement())
    assert plan_of(signed.to_json()) == plan


@pytest.mark.parametrize("noise_by", ["both", "parties", "aggregator"])
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_what_a_row_is_charged_for_all_priced_rounds_is_the_jobs_target(
    federation: Federation, noise_by: str, target: float
) -> None:
    """Against the aggregator too; with both, what everybody else sees is noised once more."""
    plan = make(federation, local_training={"epsilon": target}, party_privacy={"noise_by": noise_by})
    charged = epsilon([example_event(plan).repeated(50)], delta=1e-5)
    assert 0.99 * target < charged <= target
    release = epsilon([example_event(plan, against="release").repeated(50)], delta=1e-5)
    assert release < 0.8 * charged if noise_by == "both" else release == charged


def test_the_noise_is_that_of_central_dp_sgd(federation: Federation) -> None:
    """To the accuracy of integer orders and failure terms: no more for there being no trusted server."""
    plan = make(federation, local_training={"epsilon": 2.0}, party_privacy={"noise_by": "parties"})
    central = calibrate_dp_sgd(epsilon=2.0, delta=1e-5, sampling_rate=0.05, steps=50)
    assert float(plan.noise.noise_multiplier) == pytest.approx(central, rel=0.01)


def test_the_grid_is_the_jobs_or_as_much_finer_as_it_has_to_be(federation: Federation) -> None:
    assert make(federation).resolution_bits == 16
    assert make(federation, encryption={"resolution_bits": 20}).resolution_bits == 20
    assert make(federation, encryption={"resolution_bits": 4}).resolution_bits == 11
    fine = make(federation, encryption={"resolution_bits": 4}, local_training={"max_grad_norm": 0.001})
    assert fine.resolution_bits == 21
    derive_again(federation.scheme("paillier", allow_plaintext=False), fine)


def test_what_a_round_costs_a_party_as_a_whole(federation: Federation) -> None:
    plan = make(federation)
    costs = round_costs(federation.scheme("paillier", allow_plaintext=False), plan)
    assert isinstance(costs["release"], NoisySum)
    assert isinstance(costs["aggregator"], NoisySum)
    assert costs["release"].noise_multiplier > costs["aggregator"].noise_multiplier
    assert costs["release"].noise_multiplier < 0.1
    charged = example_event(plan)
    assert isinstance(charged, SampledNoisySum)
    assert charged.rounds == costs["release"].rounds == 1


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("a party that declared nothing", {"rows": {"a": 5000, "b": 5400}}, "c has not yet"),
    ("nobody declared anything", {"rows": {}}, "a, b, c has not yet"),
    ("no rows at all", {"rows": {**ROWS, "c": 0}}, "at least one row"),
    ("slots that nothing fits", {"rows": {**ROWS, "c": 2**40}, "encryption": {"resolution_bits": 32}}, "slots"),
]


@pytest.mark.parametrize(("what", "fields", "match"), REFUSED, ids=[what for what, _, _ in REFUSED])
def test_what_cannot_be_planned_is_refused(
    federation: Federation, what: str, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises((PlanError, InvalidInput), match=match):
        make(federation, **fields)


def test_planning_refuses_a_server_that_the_job_does_not_call_trusted(federation: Federation) -> None:
    """Even of a specification that slipped through."""
    spec = make_spec(party_privacy={"noise_by": "aggregator"}).model_copy(update={"trusted_aggregator": False})
    with pytest.raises(PlanError, match="trusted server"):
        plan_round(
            spec,
            job_id="job",
            number=1,
            model=MODEL,
            roster=federation.roster,
            scheme=federation.scheme("paillier", allow_plaintext=False),
            declared_rows=ROWS,
        )


# ----------------------------------------------------------------------------------------------------- declared rows


def test_a_job_waits_for_the_rows_that_the_invited_declare(
    federation: Federation, make_roster: Callable[..., Roster]
) -> None:
    spec = make_spec(parties=["a", "c"])
    assert undeclared(spec, federation) == ("a", "c")
    federation.declare("a", {"randhie": 5000, "other": 3})
    federation.declare("b", {"randhie": 5400})
    federation.declare("c", {"other": 7})
    assert undeclared(spec, federation) == ("c",)
    assert declarations(spec, federation) == {"a": 5000}
    federation.declare("c", {"randhie": 6000})
    assert undeclared(spec, federation) == ()
    assert declarations(spec, federation) == {"a": 5000, "c": 6000}
    federation.declare("c", {"randhie": 6001})
    assert declarations(spec, federation)["c"] == 6001


def test_a_job_of_fedavg_asks_nobody(federation: Federation) -> None:
    spec = make_spec(strategy="fedavg")
    assert undeclared(spec, federation) == ()
    assert declarations(spec, federation) == {}
    plan = make(federation, strategy="fedavg", rows={})
    assert (plan.gradient_sum, declared_rows_of(plan)) == (None, {})


def test_a_job_that_cannot_be_planned_waits_for_nobody(federation: Federation) -> None:
    """It is planned, and fails with the reason, instead of waiting for ever."""
    assert undeclared(make_spec(parties=["a", "stranger"]), federation) == ()
    assert undeclared(replace_quorum(make_spec(), 1), federation) == ()


def replace_quorum(spec: FederatedTrainingSpec, quorum: int) -> FederatedTrainingSpec:
    return spec.model_copy(update={"quorum": quorum})


UNDECLARABLE: list[dict[str, int]] = [
    {"randhie": 0},
    {"randhie": -1},
    {"randhie": MAX_DECLARED_ROWS + 1},
    {"../x": 5},
    {"": 5},
    {"a" * 64: 5},
    {f"task{index}": 1 for index in range(1001)},
]


@pytest.mark.parametrize("declared", UNDECLARABLE)
def test_what_no_party_declares_is_refused_when_it_joins(declared: dict[str, int]) -> None:
    with pytest.raises(InvalidInput) as caught:
        declared_rows(federation_pb2.JoinRequest(declared_rows=declared))
    assert "declared_rows" in caught.value.violations
    assert declared_rows(federation_pb2.JoinRequest(declared_rows={"randhie": 1})) == {"randhie": 1}
    assert declared_rows(federation_pb2.JoinRequest()) == {}


def test_another_number_of_rows_is_another_plan(federation: Federation) -> None:
    plan, other = make(federation), make(federation, rows={**ROWS, "a": 5001})
    assert plan != other
    assert replace(plan, gradient_sum=other.gradient_sum) == other


class _Checked:
    """A pipeline that lets every job pass, and knows how large its model is."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def check(self, spec: FederatedTrainingSpec) -> None:
        pass

    def scheme(self, name: str) -> Any:
        return self._federation.scheme(name, allow_plaintext=True)

    async def dimension(self, spec: FederatedTrainingSpec, *, model: bytes = b"") -> int:
        return MODEL.dimension


def _pricing(federation: Federation, *, max_update_bytes: int) -> Pricing:
    """Of jobs that nobody has accepted yet."""
    nothing: Any = None
    return Pricing(
        database=nothing,
        jobs=nothing,
        rounds=nothing,
        accounts=nothing,
        pipeline=_Checked(federation),  # type: ignore[arg-type]  # as much of one as pricing asks
        federation=federation,
        max_update_bytes=max_update_bytes,
    )


async def test_a_job_is_not_priced_before_all_the_invited_have_declared_and_then_by_what_they_declared(
    federation: Federation,
) -> None:
    pricing = _pricing(federation, max_update_bytes=1 << 20)
    for name in ("a", "b"):
        federation.declare(name, {"randhie": 5000})
    with pytest.raises(StateError, match="c has declared none for task 'randhie'"):
        await pricing.check(make_spec(), owner="scientist/s")
    spec = make_spec()

    async def cost() -> Event:
        return (await pricing._price(spec.digest, federation.roster.digest, lambda: spec))[1]

    assert await cost() == NonPrivate(
        unit="party", reason="not every invited party has declared its rows yet"
    )  # of a job that waits since before a restart: its ε is not known, and counts as infinite
    rows = {"a": 5000, "b": 5000, "c": 5000}
    known = await pricing._price(spec.digest, federation.roster.digest, lambda: spec, planned_rows=rows)
    federation.declare("c", {"randhie": 5000})
    small = await cost()
    assert known.event == small  # of a job under way its last plan says what they declared
    federation.declare("c", {"randhie": 50_000})
    large = await cost()
    assert isinstance(small, NoisySum)
    assert isinstance(large, NoisySum)
    assert large.noise_multiplier < small.noise_multiplier


@pytest.mark.parametrize("most", [100, 1 << 20])
async def test_a_job_whose_contributions_this_aggregator_would_not_take_is_refused_beforehand(
    federation: Federation, most: int
) -> None:
    pricing = _pricing(federation, max_update_bytes=most)
    spec = FederatedTrainingSpec.from_json({"task": "randhie"})
    price = pricing._price(spec.digest, federation.roster.digest, lambda: spec)
    if most > 100:
        assert (await price).parties == ("a", "b", "c")
    else:
        with pytest.raises(PlanError, match=r"may take \d+ bytes; this aggregator takes 100 "):
            await price


def test_an_operator_says_how_many_rows_a_party_may_declare() -> None:
    request = federation_pb2.JoinRequest(declared_rows={"randhie": 1001})
    assert declared_rows(request, most=1001) == {"randhie": 1001}
    with pytest.raises(LimitError, match=r"1001 rows are declared for task randhie; at most 1000 .*max_declared_rows"):
        declared_rows(request, most=1000)
