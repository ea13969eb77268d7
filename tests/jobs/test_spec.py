"""What a federated training may ask for, and how it is told what it may not."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.communication.generated import jobs_pb2
from src.communication.options import MAX_MODEL_BYTES
from src.errors import InvalidInput
from src.jobs.spec import AdaptiveClipping, FederatedTrainingSpec, spec_to_proto
from src.jobs.specs import spec_from_proto

NAN, INF = float("nan"), float("inf")

# A change to a job that is otherwise fine, and the path that the refusal names.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task": ""}, "task"),
    ({"task": "../../etc/passwd"}, "task"),
    ({"task": "a" * 64}, "task"),
    ({"rounds": -1}, "rounds"),
    ({"rounds": 1_000_001}, "rounds"),
    ({"spare_rounds": -1}, "spare_rounds"),
    ({"parties": ["a", "a"]}, "parties"),
    ({"parties": ["a", ""]}, "parties.1"),
    ({"parties": ["a", "b"], "quorum": 3}, "quorum"),
    ({"quorum": -1}, "quorum"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**53}, "seed"),
    ({"round_timeout_s": -1.0}, "round_timeout_s"),
    ({"round_timeout_s": NAN}, "round_timeout_s"),
    ({"initial_model": bytes(MAX_MODEL_BYTES + 1)}, "initial_model"),
    ({"task_options": {"x": NAN}}, "task_options"),
    ({"task_options": {"x": {"y": [INF]}}}, "task_options"),
    ({"task_options": {"x": "x" * (64 << 10)}}, "task_options"),
    ({"local_training": {"steps": -1}}, "local_training.steps"),
    ({"local_training": {"sampling_rate": 1.01}}, "local_training.sampling_rate"),
    ({"local_training": {"sampling_rate": -0.1}}, "local_training.sampling_rate"),
    ({"local_training": {"learning_rate": -0.1}}, "local_training.learning_rate"),
    ({"local_training": {"learning_rate": INF}}, "local_training.learning_rate"),
    ({"local_training": {"max_grad_norm": -1.0}}, "local_training.max_grad_norm"),
    ({"local_training": {"max_grad_norm": 9e-7}}, "local_training.max_grad_norm"),
    ({"local_training": {"epsilon": -1.0}}, "local_training.epsilon"),
    ({"local_training": {"epsilon": INF}}, "local_training.epsilon"),
    ({"local_training": {"delta": 1.0}}, "local_training.delta"),
    ({"party_privacy": {"clipping_norm": -1.0}}, "party_privacy.clipping_norm"),
    ({"party_privacy": {"noise_multiplier": -0.1}}, "party_privacy.noise_multiplier"),
    ({"party_privacy": {"noise_multiplier": NAN}}, "party_privacy.noise_multiplier"),
    ({"party_privacy": {"noise_by": "nobody"}}, "party_privacy.noise_by"),
    ({"party_privacy": {"delta": -1e-5}}, "party_privacy.delta"),
    ({"encryption": {"resolution_bits": 33}}, "encryption.resolution_bits"),
    ({"encryption": {"resolution_bits": -1}}, "encryption.resolution_bits"),
    ({"server_optimizer": {"name": "adam"}}, "server_optimizer.name"),
    ({"strategy": "fedprox"}, "strategy"),
    ({"trusted_aggregator": True}, "trusted_aggregator"),
    ({"strategy": "fedsgd", "local_training": {"steps": 10}}, "local_training"),
    ({"strategy": "fedsgd", "party_privacy": {"clipping_norm": 0.5}}, "party_privacy"),
    ({"strategy": "fedsgd", "party_privacy": {"noise_multiplier": 0.0}}, "party_privacy"),
    ({"strategy": "fedsgd", "party_privacy": {"noise_by": "aggregator"}}, "party_privacy"),
    ({"strategy": "fedsgd", "trusted_aggregator": True}, "party_privacy"),
    ({"strategy": "fedsgd", "party_privacy": {"adaptive_clipping": {}}}, "party_privacy"),
    ({"party_privacy": {"adaptive_clipping": {"smallest": 2.0}}}, "party_privacy"),
    ({"party_privacy": {"adaptive_clipping": {"largest": 0.5}}}, "party_privacy"),
    *(
        ({"party_privacy": {"adaptive_clipping": {field: value}}}, f"party_privacy.adaptive_clipping.{field}")
        for field, values in {
            "quantile": (-0.1, 1.0, NAN),
            "learning_rate": (-0.1, 1.1),
            "bit_deviation": (-1.0, INF),
            "smallest": (-1.0,),
            "largest": (INF,),
        }.items()
        for value in values
    ),
    ({"server_optimizer": {"learning_rate": -1.0}}, "server_optimizer.learning_rate"),
    ({"server_optimizer": {"name": "fedavgm", "momentum": 1.0}}, "server_optimizer.momentum"),
    ({"server_optimizer": {"name": "fedavg", "momentum": 0.5}}, "server_optimizer.momentum"),
]


def make_job(**changes: Any) -> jobs_pb2.Job:
    """A job with a task, and these fields set; `task_options` is a dictionary."""
    options = changes.pop("task_options", {})
    training = jobs_pb2.FederatedTraining(**{"task": "randhie", **changes})
    if options:
        training.task_options.update(options)
    return jobs_pb2.Job(federated_training=training)


def read(**changes: Any) -> FederatedTrainingSpec:
    """The specification of such a job."""
    spec = spec_from_proto(make_job(**changes))
    assert isinstance(spec, FederatedTrainingSpec)
    return spec


@pytest.mark.parametrize(("changes", "path"), REFUSED, ids=[f"{path}-{n}" for n, (_, path) in enumerate(REFUSED)])
def test_what_is_out_of_range_is_refused_by_its_fields_path(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_from_proto(make_job(**changes))
    assert list(caught.value.violations) == [f"federated_training.{path}"]


def test_all_violations_are_told_at_once() -> None:
    job = make_job(task="", rounds=-1, local_training={"steps": -3}, initial_model=bytes(MAX_MODEL_BYTES + 1))
    job.display_name = "x" * 201
    with pytest.raises(InvalidInput) as caught:
        spec_from_proto(job)
    assert set(caught.value.violations) == {
        "display_name",
        "federated_training.initial_model",
        "federated_training.task",
        "federated_training.rounds",
        "federated_training.local_training.steps",
    }


def test_a_job_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="spec: required: one of federated_training, evaluation, export"):
        spec_from_proto(jobs_pb2.Job())


def test_zero_and_unset_fields_take_the_documented_defaults() -> None:
    spec = read()
    assert spec.to_json() == {
        "task": "randhie",
        "rounds": 10,
        "spare_rounds": 2,
        "parties": [],
        "quorum": 0,
        "local_training": {
            "steps": 10,
            "sampling_rate": 0.05,
            "learning_rate": 0.1,
            "max_grad_norm": 1.0,
            "epsilon": 1.0,
            "delta": 1e-5,
        },
        "party_privacy": {"clipping_norm": 1.0, "noise_multiplier": 0.1, "noise_by": "both", "delta": 1e-5},
        "encryption": {"scheme": "paillier", "resolution_bits": 16},
        "server_optimizer": {"name": "fedavg", "learning_rate": 1.0, "momentum": None},
        "seed": 0,
        "round_timeout_s": 600.0,
        "initial_model_sha256": "",
        "task_options": {},
    }
    assert read(server_optimizer={"name": "fedavgm"}).server_optimizer.momentum == 0.9


def test_a_round_of_fedsgd_is_one_step_whether_the_job_says_so_or_not() -> None:
    for local in ({}, {"epsilon": 2.0}, {"steps": 1, "epsilon": 2.0}):
        spec = read(strategy="fedsgd", local_training=local)
        assert (spec.strategy, spec.trusted_aggregator, spec.local_training.steps) == ("fedsgd", False, 1)
        assert spec.local_training.epsilon == local.get("epsilon", 1.0)
    trusted = read(strategy="fedsgd", trusted_aggregator=True, party_privacy={"noise_by": "aggregator"})
    assert trusted.trusted_aggregator


def test_a_job_of_fedavg_has_the_form_that_it_had_before_there_was_another_strategy() -> None:
    """So that a stored job keeps its digest, and a request that is sent again still gives the same job."""
    assert not {"strategy", "trusted_aggregator"} & set(read(strategy="fedavg").to_json())
    assert read(strategy="fedavg").digest == read().digest
    assert read(strategy="fedsgd").to_json()["strategy"] == "fedsgd"


def test_adaptive_clipping_is_there_where_it_is_asked_for_and_starts_in_the_middle_of_its_bounds() -> None:
    assert read(party_privacy={"noise_multiplier": 0.5}).party_privacy.adaptive_clipping is None
    assert "adaptive_clipping" not in read(party_privacy={"noise_multiplier": 0.5}).to_json()["party_privacy"]
    privacy = read(party_privacy={"clipping_norm": 2.0, "adaptive_clipping": {}}).party_privacy
    assert privacy.adaptive_clipping == AdaptiveClipping(quantile=0.5, learning_rate=0.2)
    assert privacy.norm_bounds == (2.0 / 1024, 2048.0)
    given = {"quantile": 0.9, "smallest": 1.0, "largest": 3.0, "bit_deviation": 4.0}
    assert read(party_privacy={"adaptive_clipping": given}).party_privacy.norm_bounds == (1.0, 3.0)
    assert read(party_privacy={"clipping_norm": 2.0}).party_privacy.norm_bounds == (2.0, 2.0)


def test_a_zero_that_means_something_is_kept() -> None:
    spec = read(
        spare_rounds=0,
        party_privacy={"noise_multiplier": 0.0},
        server_optimizer={"name": "fedavgm", "momentum": 0.0},
    )
    assert (spec.spare_rounds, spec.party_privacy.noise_multiplier, spec.server_optimizer.momentum) == (0, 0.0, 0.0)


NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
REALS = st.floats(1e-6, 1e6)
OPTIONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e9, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SPECS = st.builds(
    lambda **fields: FederatedTrainingSpec.from_json(fields),
    task=NAMES,
    rounds=st.integers(1, 1000),
    spare_rounds=st.integers(0, 9),
    parties=st.lists(NAMES, max_size=4, unique=True),
    local_training=st.fixed_dictionaries({"steps": st.integers(1, 99), "learning_rate": REALS, "epsilon": REALS}),
    party_privacy=st.fixed_dictionaries(
        {"noise_multiplier": st.floats(0, 10), "noise_by": st.sampled_from(["both", "parties", "aggregator"])},
        optional={
            "adaptive_clipping": st.fixed_dictionaries(
                {}, optional={"quantile": st.floats(0.01, 0.99), "bit_deviation": REALS, "smallest": st.just(0.5)}
            )
        },
    ),
    encryption=st.fixed_dictionaries({"scheme": st.sampled_from(["paillier", "plaintext"])}),
    server_optimizer=st.fixed_dictionaries({"name": st.sampled_from(["fedavg", "fedavgm", "fedadam"])}),
    seed=st.integers(0, 2**53 - 1),
    task_options=st.dictionaries(st.text(max_size=4), OPTIONS, max_size=3),
)


SUMS = st.builds(
    lambda noise_by, **fields: FederatedTrainingSpec.from_json(
        {
            **fields,
            "strategy": "fedsgd",
            "trusted_aggregator": noise_by == "aggregator",
            "party_privacy": {"noise_by": noise_by},
        }
    ),
    task=NAMES,
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    local_training=st.fixed_dictionaries({"learning_rate": REALS, "epsilon": REALS}),
)


@settings(deadline=None, max_examples=60)
@given(SPECS | SUMS)
def test_wire_and_store_give_back_the_same_specification_and_digest(spec: FederatedTrainingSpec) -> None:
    training = jobs_pb2.FederatedTraining.FromString(spec_to_proto(spec).SerializeToString())
    by_wire = spec_from_proto(jobs_pb2.Job(federated_training=training))
    by_store = FederatedTrainingSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert by_wire == by_store == spec
    assert by_wire.digest == by_store.digest == spec.digest


def test_the_digest_is_a_fixed_one() -> None:
    """A known answer: a stored job keeps its digest from version to version, also where a default has changed since."""
    assert (
        read(local_training={"epsilon": 4.0}).digest
        == "1eb2222404f33852aab1dfea198d1c5a4cb9386164c06fe1fb0437ba648fddaf"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 11},
        {"strategy": "fedsgd"},
        {"seed": 1},
        {"local_training": {"epsilon": 1.0000000000000002}},
        {"party_privacy": {"adaptive_clipping": {}}},
        {"encryption": {"plaintext": {}}},
        {"initial_model": b"model"},
        {"task_options": {"x": 1}},
        {"task_options": {"x": "1"}},
        {"task_options": {"x": 1.5}},
        {"task_options": {"x": "1.5"}},
    ],
)
def test_another_specification_has_another_digest(changes: dict[str, Any]) -> None:
    digests = {read(**row).digest for row in ({}, changes, {"task_options": {"y": 1}})}
    assert len(digests) == 3


def test_only_the_digest_of_the_initial_model_is_kept() -> None:
    spec = read(initial_model=b"weights")
    assert spec.initial_model_sha256 == hashlib.sha256(b"weights").hexdigest()
    assert spec_to_proto(spec).initial_model == b""
    assert spec_to_proto(spec, b"weights").initial_model == b"weights"
