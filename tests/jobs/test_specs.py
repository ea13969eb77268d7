"""All kinds of jobs: over the wire, from the store, and from a file; and how each is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.communication.generated import jobs_pb2
from src.communication.options import MAX_MODEL_BYTES
from src.errors import ConfigError, InvalidInput
from src.jobs.computations import EvaluationSpec, ExportSpec
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import (
    KINDS,
    JobSpec,
    load_job_file,
    model_bytes,
    spec_from_proto,
    spec_into_proto,
    spec_of,
)

SHA256 = hashlib.sha256(b"weights").hexdigest()
SPECS: list[tuple[JobSpec, bytes]] = [
    (FederatedTrainingSpec(task="randhie"), b""),
    (FederatedTrainingSpec(task="randhie", initial_model_sha256=SHA256), b"weights"),
    (EvaluationSpec(job_id="a1"), b""),
    (EvaluationSpec(job_id="a1", task="randhie"), b""),
    (EvaluationSpec(model_sha256=SHA256, task="randhie"), b"weights"),
    (ExportSpec(job_id="a1"), b""),
]

EVALUATIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"evaluation.model"}),
    ({"task": "randhie"}, {"evaluation.model"}),
    ({"model": b"weights"}, {"evaluation.task"}),
    ({"model": b"weights", "job_id": "a", "task": "randhie"}, {"evaluation.model"}),
    ({"model": bytes(MAX_MODEL_BYTES + 1), "task": "randhie"}, {"evaluation.model"}),
    ({"job_id": "../a"}, {"evaluation.job_id"}),
    ({"job_id": "a" * 65}, {"evaluation.job_id"}),
    ({"job_id": "a", "task": "no name"}, {"evaluation.task"}),
    ({"job_id": "a b", "task": "no name"}, {"evaluation.job_id", "evaluation.task"}),
    ({"model": b"weights", "job_id": "a", "task": "no name"}, {"evaluation.model", "evaluation.task"}),
]
EXPORTS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"export.job_id"}),
    ({"job_id": "a\n"}, {"export.job_id"}),
    ({"job_id": "a", "format": "pickle"}, {"export.format"}),
    ({"format": "NPZ"}, {"export.job_id", "export.format"}),
]
# A job of one kind, and the paths that the refusal names.
REFUSED: list[tuple[jobs_pb2.Job, set[str]]] = [
    (jobs_pb2.Job(), {"spec"}),
    (jobs_pb2.Job(display_name="x" * 201), {"spec", "display_name"}),
    (jobs_pb2.Job(display_name="x" * 201, export=jobs_pb2.Export(job_id="a")), {"display_name"}),
    *((jobs_pb2.Job(evaluation=jobs_pb2.Evaluation(**fields)), paths) for fields, paths in EVALUATIONS),
    *((jobs_pb2.Job(export=jobs_pb2.Export(**fields)), paths) for fields, paths in EXPORTS),
]


@pytest.mark.parametrize(("job", "paths"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_with_a_job_is_told_by_its_fields_path(job: jobs_pb2.Job, paths: set[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_from_proto(job)
    assert set(caught.value.violations) == paths


@pytest.mark.parametrize(("spec", "model"), SPECS, ids=range(len(SPECS)))
def test_wire_and_store_give_back_every_kind_with_the_same_digest(spec: JobSpec, model: bytes) -> None:
    job = jobs_pb2.Job()
    spec_into_proto(job, spec, model)
    job = jobs_pb2.Job.FromString(job.SerializeToString())
    by_wire = spec_from_proto(job)
    by_store = spec_of(spec.kind, json.loads(json.dumps(spec.to_json())))
    assert by_wire == by_store == spec
    assert by_wire.digest == by_store.digest == spec.digest
    assert model_bytes(job) == model
    assert job.WhichOneof("spec") == spec.kind


def test_the_digests_are_fixed_ones_and_differ_between_kinds_and_fields() -> None:
    """Known answers: a stored job keeps its digest from version to version."""
    assert EvaluationSpec(job_id="a1").digest == "9b96122389147c562b7bd59b8aaa504316dccec3bbeb6d6bfb1ec1d1a4286f6b"
    assert ExportSpec(job_id="a1").digest == "3e93a55f5fc34d1f969a63044b08cefca7ccb413b2b36ba436f4ce7632b65cfd"
    assert len({spec.digest for spec, _ in SPECS}) == len(SPECS)


def test_the_kind_is_the_domain_of_the_digest() -> None:
    """The same fields under another kind are another specification."""

    class Other(ExportSpec):
        kind = "other"

    assert Other(job_id="a1").to_json() == ExportSpec(job_id="a1").to_json()
    assert Other(job_id="a1").digest != ExportSpec(job_id="a1").digest


def test_every_kind_of_the_wire_is_known() -> None:
    fields = {field.name for field in jobs_pb2.Job.DESCRIPTOR.oneofs_by_name["spec"].fields}
    assert set(KINDS) == fields


def test_a_specification_says_whose_result_it_is_about() -> None:
    assert [spec.source_job_id for spec, _ in SPECS] == ["", "", "a1", "a1", "", "a1"]


def test_no_specification_is_made_of_an_unknown_kind_or_of_contradictions() -> None:
    with pytest.raises(InvalidInput, match="no kind of job is called 'sum'"):
        spec_of("sum", {})
    with pytest.raises(InvalidInput) as caught:
        spec_of("evaluation", {"job_id": "a", "model_sha256": "no digest", "rows": 3})
    assert set(caught.value.violations) == {"evaluation.model", "evaluation.rows"}
    with pytest.raises(ValidationError):
        EvaluationSpec()
    with pytest.raises(ValueError, match="no model comes with a job of kind export"):
        spec_into_proto(jobs_pb2.Job(), ExportSpec(job_id="a"), b"weights")


# ---------------------------------------------------------------------------------------------------------- job files

JOB_FILE = """
display_name: first try
federated_training:
  task: randhie
  rounds: 3
  local_training: {delta: 1e-5, epsilon: 2}
  encryption: {scheme: plaintext}
  initial_model: start.safetensors
  task_options: {hidden: 16, dropout: 0.1}
"""


def test_a_job_file_in_yaml_is_read_with_numbers_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "start.safetensors").write_bytes(b"weights")
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE)
    job = load_job_file(path)
    spec = spec_from_proto(job)
    assert isinstance(spec, FederatedTrainingSpec)
    assert job.display_name == "first try"
    assert job.federated_training.initial_model == b"weights"
    assert (spec.rounds, spec.local_training.delta, spec.local_training.epsilon) == (3, 1e-5, 2.0)
    assert spec.encryption.scheme == "plaintext"
    assert spec.task_options == {"hidden": 16, "dropout": 0.1}


def test_a_job_file_may_be_json_and_hold_the_model_itself(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    model = "base64:" + base64.b64encode(b"weights").decode()
    path.write_text(json.dumps({"federated_training": {"task": "randhie", "initial_model": model}}))
    assert load_job_file(path).federated_training.initial_model == b"weights"


def test_a_job_file_may_ask_for_any_kind_with_priority_and_deadline(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    path = tmp_path / "job.yaml"
    path.write_text("priority: High\ntimeout_s: 90.5\nevaluation: {task: randhie, model: m.safetensors}")
    job = load_job_file(path)
    assert spec_from_proto(job) == EvaluationSpec(model_sha256=SHA256, task="randhie")
    assert model_bytes(job) == b"weights"
    assert job.priority == jobs_pb2.HIGH
    assert job.timeout.ToTimedelta() == timedelta(seconds=90.5)
    path.write_text("evaluation: {job_id: a1}\npriority: low")
    assert spec_from_proto(load_job_file(path)) == EvaluationSpec(job_id="a1")
    assert load_job_file(path).priority == jobs_pb2.LOW
    path.write_text("export: {job_id: a1, format: npz}")
    job = load_job_file(path)
    assert spec_from_proto(job) == ExportSpec(job_id="a1")
    assert (job.priority, job.HasField("timeout")) == (jobs_pb2.JOB_PRIORITY_UNSPECIFIED, False)


TRAIN = "federated_training: {task: t}"
EXPORT = "export: {job_id: a}"
FILES_REFUSED: list[tuple[str, list[str]]] = [
    ("federated_training: {task: t, rouns: 3}", ["federated_training.rouns"]),
    ("federated_training: {task: t, rounds: '3'}", ["federated_training.rounds"]),
    ("federated_training: {task: t, rounds: 0}", ["federated_training.rounds"]),
    ("federated_training: {task: t, local_training: {epsilon: four}}", ["federated_training.local_training.epsilon"]),
    (
        f"federated_training: {{task: t, initial_model: 'base64:bQ==', initial_model_sha256: {'0' * 63}a}}",
        ["federated_training.initial_model_sha256"],
    ),
    ("federated_training: {task: t, initial_model: none.bin}", ["federated_training.initial_model"]),
    ("federated_training: {task: t, initial_model: 'base64:?'}", ["federated_training.initial_model"]),
    (
        "federated_training: {rounds: 0, seed: -1}",
        [f"federated_training.{name}" for name in ("rounds", "seed", "task")],
    ),
    ("federated_training:", ["federated_training"]),
    (f"{TRAIN}\nstate: RUNNING", ["state"]),
    (f"{TRAIN}\ndisplay_name: 3", ["display_name"]),
    (f"{TRAIN}\ndisplay_name: {'x' * 201}", ["display_name"]),
    (f"{TRAIN}\npriority: urgent", ["priority"]),
    (f"{TRAIN}\npriority: 1", ["priority"]),
    (f"{TRAIN}\ntimeout_s: 0", ["timeout_s"]),
    (f"{TRAIN}\ntimeout_s: -1", ["timeout_s"]),
    (f"{TRAIN}\ntimeout_s: 1e9", ["timeout_s"]),
    (f"{TRAIN}\ntimeout_s: 10s", ["timeout_s"]),
    (f"{TRAIN}\ntimeout_s: true", ["timeout_s"]),
    (f"{TRAIN}\n{EXPORT}", ["spec"]),
    ("display_name: nothing to do", ["spec"]),
    ("display_name: 3\npriority: 3\ntimeout_s: 0", ["spec", "display_name", "priority", "timeout_s"]),
    ("evaluation: {}", ["evaluation.model"]),
    ("evaluation: {model: none.bin, task: t}", ["evaluation.model"]),
    ("evaluation: {model: [1], task: t}", ["evaluation.model"]),
    ("evaluation: {model: 'base64:d2VpZ2h0cw=='}", ["evaluation.task"]),
    ("evaluation: {job_id: a, model: 'base64:d2VpZ2h0cw=='}", ["evaluation.model"]),
    ("evaluation: {task: t, model_sha256: a}", ["evaluation.model"]),
    ("evaluation: {job_id: a, rows: 3}", ["evaluation.rows"]),
    ("export: {}", ["export.job_id"]),
    ("export: {job_id: a, model: m.bin}", ["export.model"]),
    ("export: {job_id: 3, format: 4}", ["export.job_id", "export.format"]),
]


def test_a_file_may_name_a_model_that_the_aggregator_has_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"federated_training: {{task: t, initial_model_sha256: {SHA256}}}")
    job = load_job_file(path)
    assert (job.federated_training.initial_model_sha256.hex(), job.federated_training.initial_model) == (SHA256, b"")
    path.write_text(f"evaluation: {{task: t, model_sha256: {SHA256}}}")
    assert load_job_file(path).evaluation.model_sha256.hex() == SHA256


def test_what_a_section_may_hold_is_told_in_the_words_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("evaluation: {job_id: a, rows: 3}")
    with pytest.raises(InvalidInput, match=r"unknown field; allowed here: job_id, model, task, round$"):
        load_job_file(path)


@pytest.mark.parametrize(("text", "paths"), FILES_REFUSED)
def test_what_is_wrong_with_a_job_file_is_told_by_path(tmp_path: Path, text: str, paths: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        load_job_file(path)
    assert sorted(caught.value.violations) == sorted(paths)


def test_a_job_file_that_is_not_there_or_not_yaml_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(ConfigError, match="no such"):
        load_job_file(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not YAML"):
        load_job_file(path)
