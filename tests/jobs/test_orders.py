"""What a job order asks for is the job that comes with it, or it is refused; made from the proto alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.errors import InvalidInput
from src.jobs.orders import caller_of, check_order, order_of, rounds_of, spec_of_order
from src.jobs.specs import JobSpec, spec_from_proto, spec_into_proto
from src.protocol.order import Order, order_time
from tests.jobs.test_specs import SPECS

NOW = 1_800_000_000.0
ANN = Identity("scientist", "ann")


def make(job: jobs_pb2.Job, **changes: Any) -> Order:
    fields = {"federation": "demo", "scientist": "ann", "request_id": "r", "expires_at": order_time(NOW + 60)}
    return order_of(job, **{**fields, **changes})


def training(**fields: Any) -> jobs_pb2.Job:
    return jobs_pb2.Job(federated_training=jobs_pb2.FederatedTraining(**{"task": "randhie", **fields}))


@pytest.mark.parametrize(("spec", "model"), SPECS)
def test_of_every_kind_of_job_the_order_is_the_job(spec: JobSpec, model: bytes) -> None:
    job = jobs_pb2.Job()
    spec_into_proto(job, spec, model)
    order = make(job)
    assert spec_of_order(order) == spec_from_proto(job) == spec
    assert (order.job, order.most_rounds) == (spec.kind, rounds_of(spec))
    assert order.model_sha256 == (hashlib.sha256(model).hexdigest() if model else "")
    assert model == b"" or model.decode() not in order.spec
    check_order(order, spec=spec, caller=ANN, request_id="r", now=NOW)


@settings(deadline=None, max_examples=40)
@given(
    rounds=st.integers(0, 10**6),
    spare=st.none() | st.integers(0, 10**6),
    epsilon=st.floats(1e-3, 1e3),
    options=st.dictionaries(
        st.text(max_size=5), st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=5), max_size=3
    ),
)
def test_reals_and_options_come_back_to_the_last_bit(
    rounds: int, spare: int | None, epsilon: float, options: dict[str, Any]
) -> None:
    job = training(rounds=rounds, spare_rounds=spare, local_training=jobs_pb2.LocalTraining(epsilon=epsilon))
    job.federated_training.task_options.update(options)
    order = make(job)
    assert spec_of_order(order) == spec_from_proto(job)
    assert order.most_rounds == (rounds or 10) + (2 if spare is None else spare)


BY_HAND: list[tuple[str, str]] = [
    ("fields as in the proto", '{"task":"randhie","rounds":3,"spare_rounds":0,"local_training":{"sampling_rate":0.5}}'),
    ("fields in camel case", '{"task":"randhie","rounds":3,"spareRounds":0,"localTraining":{"samplingRate":0.5}}'),
    (
        "integers as texts",
        '{"task":"randhie","rounds":"3","spare_rounds":"0","local_training":{"sampling_rate":"0.5"}}',
    ),
    (
        "white space and order",
        ' { "local_training":{"sampling_rate":5e-1}, "spare_rounds":0,"rounds":3,\n"task":"randhie"}',
    ),
]


@pytest.mark.parametrize("text", [row[1] for row in BY_HAND], ids=[row[0] for row in BY_HAND])
def test_any_json_of_the_message_will_do(text: str) -> None:
    """As libraries of Protocol Buffers write it, in whatever language, or as somebody writes it by hand."""
    job = training(rounds=3, spare_rounds=0, local_training=jobs_pb2.LocalTraining(sampling_rate=0.5))
    order = replace(make(job), spec=text)
    check_order(order, spec=spec_from_proto(job), caller=ANN, request_id="r", now=NOW)


NO_SPECIFICATION: list[tuple[str, dict[str, Any], str]] = [
    ("no kind of job", {"job": "evil"}, "no kind of job"),
    ("not JSON", {"spec": "task: randhie"}, "no FederatedTraining in JSON"),
    ("nothing", {"spec": ""}, "no FederatedTraining in JSON"),
    ("an unknown field", {"spec": '{"task":"randhie","epsilon":1}'}, "no FederatedTraining in JSON"),
    ("a field twice", {"spec": '{"task":"randhie","task":"other"}'}, "no FederatedTraining in JSON"),
    ("something behind it", {"spec": '{"task":"randhie"}{}'}, "no FederatedTraining in JSON"),
    ("nested without end", {"spec": '{"task_options":' + '{"a":' * 5000}, "no FederatedTraining in JSON"),
    ("a value out of its range", {"spec": '{"task":"randhie","quorum":-1}'}, "federated_training.quorum"),
    ("a real that is none", {"spec": '{"task":"randhie","local_training":{"epsilon":"NaN"}}'}, "epsilon"),
    ("the model itself", {"spec": '{"task":"randhie","initial_model":"YWJj"}'}, "model_sha256 stands for it"),
    ("the fields of another kind", {"job": "export"}, "no Export in JSON"),
    (
        "a model of a kind without",
        {"job": "export", "spec": '{"job_id":"j"}', "model_sha256": "ab" * 32},
        "unknown field",
    ),
    ("more rounds than it says", {"most_rounds": 13}, "for 13 rounds, its specification for 12"),
    ("fewer rounds than it says", {"most_rounds": 11}, "for 11 rounds, its specification for 12"),
]


@pytest.mark.parametrize(
    ("changes", "said"), [row[1:] for row in NO_SPECIFICATION], ids=[row[0] for row in NO_SPECIFICATION]
)
def test_a_text_that_is_no_specification_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        spec_of_order(replace(make(training()), **changes))


UNFIT: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("handed in by somebody else", {}, {"caller": Identity("scientist", "bob")}, "order.scientist"),
    ("handed in by an operator", {}, {"caller": Identity("operator", "operator")}, "order.scientist"),
    ("handed in by a namesake", {}, {"caller": Identity("operator", "ann")}, "order.scientist"),
    ("the operator's, by a scientist", {"scientist": "operator"}, {}, "order.scientist"),
    ("of another request", {}, {"request_id": "s"}, "order.request_id"),
    ("too late", {}, {"now": NOW + 61}, "order.expires_at"),
    ("of another job", {}, {"spec": spec_from_proto(training(rounds=9))}, "order.spec"),
    ("of another kind", {}, {"spec": spec_from_proto(jobs_pb2.Job(export=jobs_pb2.Export(job_id="j")))}, "order.spec"),
    (
        "with another model",
        {},
        {"spec": spec_from_proto(training(initial_model=b"x"))},
        "order.spec",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("own", "asked", "path"), [row[1:] for row in UNFIT], ids=[row[0] for row in UNFIT])
def test_an_order_that_is_not_for_this_job_says_why(own: dict[str, Any], asked: dict[str, Any], path: str) -> None:
    order = make(training(), **own)
    given = {"spec": spec_from_proto(training()), "caller": ANN, "request_id": "r", "now": NOW, **asked}
    with pytest.raises(InvalidInput) as caught:
        check_order(order, **given)
    assert list(caught.value.violations) == [path]


def test_at_its_last_second_an_order_is_good_and_all_that_is_wrong_is_said_at_once() -> None:
    order, spec = make(training()), spec_from_proto(training())
    check_order(order, spec=spec, caller=ANN, request_id="r", now=NOW + 60)
    other = spec_from_proto(training(rounds=9, seed=4))
    with pytest.raises(InvalidInput, match=r"other than there: rounds, seed") as caught:
        check_order(order, spec=other, caller=Identity("scientist", "bob"), request_id="s", now=NOW + 61)
    assert len(caught.value.violations) == 4


def test_the_operator_is_one_of_those_who_order() -> None:
    assert caller_of(make(training(), scientist="operator")) == Identity("operator", "operator")


def test_a_job_that_would_be_refused_is_not_signed() -> None:
    with pytest.raises(InvalidInput) as caught:
        make(training(quorum=-1, strategy="other"))
    assert set(caught.value.violations) == {"federated_training.quorum", "federated_training.strategy"}


def test_the_text_is_the_message_as_it_was_set() -> None:
    order = make(training(rounds=3, strategy="fedsgd"))
    assert json.loads(order.spec) == {"task": "randhie", "rounds": "3", "strategy": "fedsgd"}
