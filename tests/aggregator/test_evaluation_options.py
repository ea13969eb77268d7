"""Which public rows a model is measured on is the operator's to say: a job sets what the configuration leaves open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.aggregator.federation import Federation
from src.aggregator.pipeline import AggregatorPipeline
from src.aggregator.planning import Model, plan_round
from src.aggregator.round_row import Evaluated
from src.aggregator.steps import RoundSteps
from src.config import AggregatorConfig, load_aggregator_config
from src.config_sections import AggregatorPrivacy
from src.errors import PolicyError
from src.jobs.spec import FederatedTrainingSpec
from src.learning.task import chosen_options
from src.protocol.plan import PLAN_KIND

MODEL = Model("ab" * 32, 1, 60)
OWN = {"file": "/srv/public.csv", "rows": None, "seed": 0}


class Pool:
    """Remembers with which options a model was to be evaluated."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    async def run(self, name: str, params: dict[str, Any], **_: Any) -> dict[str, Any]:
        assert name == "evaluate_model"
        self.options.append(params["options"])
        return {"metrics": {"auc": 0.5}, "rows": "some"}


def pipeline(federation: Federation, pool: Pool, **evaluation: Any) -> AggregatorPipeline:
    config = AggregatorConfig.model_construct(evaluation=evaluation, privacy=AggregatorPrivacy())
    return AggregatorPipeline(cast(Any, pool), federation, config, cast(Any, None))


def training(**options: Any) -> FederatedTrainingSpec:
    return FederatedTrainingSpec(task="randhie", initial_model_sha256=MODEL.sha256, task_options=options)


CLOSED: list[dict[str, Any]] = [
    {"file": "/etc/shadow"},
    {"url": "http://10.0.0.1/"},
    {"rows": 5, "seed": 1},
    {"seed": None},
]


@pytest.mark.parametrize("options", CLOSED, ids=str)
async def test_a_training_that_sets_what_is_not_open_is_refused_before_it_costs_anything(
    federation: Federation, options: dict[str, Any]
) -> None:
    pool = Pool()
    with pytest.raises(PolicyError, match=r"evaluation has not left open: .*\(evaluation\.randhie: null leaves"):
        pipeline(federation, pool, randhie=OWN).check(training(**options))
    pipeline(federation, pool).check(training(**options))  # who evaluates nothing loads nothing
    assert pool.options == []


async def test_what_is_open_is_the_jobs_and_the_rest_the_operators(federation: Federation) -> None:
    pool = Pool()
    with_rows = pipeline(federation, pool, randhie=OWN)
    for options, loaded in (
        ({"rows": 5}, {**OWN, "rows": 5}),
        ({"seed": 0}, {"file": OWN["file"], "seed": 0}),
        ({}, {"file": OWN["file"], "seed": 0}),
    ):
        with_rows.check(training(**options))
        found = await with_rows.evaluate("randhie", options, {"sha256": "cd" * 32}, timeout_s=1.0)
        assert found == Evaluated({"auc": 0.5})
        assert pool.options[-1] == loaded


async def test_a_job_that_was_accepted_before_an_option_was_closed_goes_on_without_being_evaluated(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rounds are paid for."""
    pool = Pool()
    steps = RoundSteps(pipeline(federation, pool, randhie=OWN), federation, clock=lambda: 0.0)
    row = _released(federation, CLOSED[0])
    found = await steps.evaluate(row)
    assert isinstance(found, Evaluated)
    assert found.metrics == {}
    assert found.without.startswith("the job sets options")
    assert pool.options == []
    assert "is not evaluated: the job sets options" in caplog.text
    assert (await steps.try_evaluation("j", training(**CLOSED[0]), MODEL)).startswith("the job sets options")


def _released(federation: Federation, options: dict[str, Any]) -> Any:
    plan = plan_round(
        training(**options),
        job_id="j",
        number=1,
        model=MODEL,
        roster=federation.roster,
        scheme=federation.scheme("paillier", allow_plaintext=False),
        local_noise=1.0,
    )
    return SimpleNamespace(
        plan=federation.sign(PLAN_KIND, plan.to_statement()).to_json(),
        result={"model_sha256": "cd" * 32},
        timeout_s=1.0,
        number=1,
        job_id="j",
    )


VALUES = st.none() | st.integers(0, 3) | st.sampled_from(["/a", "/b"])
SETTINGS = st.dictionaries(st.sampled_from("abcd"), VALUES)


@given(SETTINGS, SETTINGS)
def test_no_job_changes_what_an_owner_has_set_or_adds_to_it(own: dict[str, Any], asked: dict[str, Any]) -> None:
    """Of parties and of the aggregator alike."""
    try:
        found = chosen_options(own, asked, task="t", owner="this one", key="k")
    except PolicyError:
        assert any(name not in own or own[name] not in (None, value) for name, value in asked.items())
        return
    assert set(found) <= set(own)
    assert all(found[name] == value for name, value in own.items() if value is not None)
    assert all(found.get(name) == asked.get(name) for name, value in own.items() if value is None)


def test_a_configuration_can_leave_one_open(tmp_path: Any) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text(
        "version: 1\nfederation: demo\nserver: {insecure: true}\nkeys: {custody: aggregator}\n"
        "evaluation: {randhie: {seed: null, parties: 3}}\n"
    )
    assert load_aggregator_config(file, environ={}).evaluation == {"randhie": {"seed": None, "parties": 3}}
