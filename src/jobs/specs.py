"""The kinds of jobs: one table, and the ways in and out of the wire, the store and a job file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from ..communication.generated import jobs_pb2
from ..communication.options import MAX_MODEL_BYTES, MAX_UPLOAD_BYTES
from ..config_yaml import read_document
from ..errors import ConfigError
from ..files import expanded
from .computations import EvaluationSpec, ExportSpec, evaluation_to_json, export_to_json
from .spec import FederatedTrainingSpec, spec_to_proto, training_to_json
from .spec_base import Spec, read_spec, refused
from .states import Priority

JobSpec: TypeAlias = FederatedTrainingSpec | EvaluationSpec | ExportSpec

KINDS: Final[Mapping[str, type[Spec]]] = {cls.kind: cls for cls in (FederatedTrainingSpec, EvaluationSpec, ExportSpec)}
"""By the name that the kind has in the wire's `oneof spec`, in a job file and in `JobRow.kind`."""

MAX_TIMEOUT_S: Final = 366 * 86_400.0
"""A year: whoever wants more wants no deadline."""
MAX_DISPLAY_NAME_CHARACTERS: Final = 200

_SPEC_FIELD: Final = "spec"
_FROM_WIRE: Final[Mapping[str, Callable[[Any], dict[str, Any]]]] = {
    FederatedTrainingSpec.kind: training_to_json,
    EvaluationSpec.kind: evaluation_to_json,
    ExportSpec.kind: export_to_json,
}


def spec_of(kind: str, value: Mapping[str, Any]) -> JobSpec:
    """What a specification's `to_json` wrote, or any object of some of its fields.

    Raises:
        InvalidInput: no such kind, or every violation by its field's path.
    """
    if kind not in KINDS:
        raise refused({_SPEC_FIELD: f"no kind of job is called {kind!r}; there are {', '.join(KINDS)}"})
    return cast(JobSpec, KINDS[kind].from_json(value))


def spec_from_proto(job: jobs_pb2.Job, *, model_sha256: str = "", most_bytes: int = MAX_MODEL_BYTES) -> JobSpec:
    """The specification of a job as it came over the wire; zero and unset fields get their defaults.

    Args:
        model_sha256: hex digest of the model that comes with it, where its bytes do not; empty: by its bytes.
        most_bytes: of that model.

    Raises:
        InvalidInput: with every violation by its field's path.
    """
    violations: dict[str, str] = {}
    if len(job.display_name) > MAX_DISPLAY_NAME_CHARACTERS:
        violations["display_name"] = f"{len(job.display_name)} characters; at most {MAX_DISPLAY_NAME_CHARACTERS}"
    kind = job.WhichOneof("spec")
    if kind is None:
        raise refused({**violations, _SPEC_FIELD: f"required: one of {', '.join(KINDS)}"})
    cls = KINDS[kind]
    size = len(model_bytes(job))
    if size > most_bytes:
        violations[f"{kind}.{cls.model_field}"] = f"{size} bytes; at most {most_bytes}, or uploaded before"
    if size and getattr(getattr(job, kind), cls.digest_field()):
        violations[f"{kind}.{cls.digest_field()}"] = f"{cls.model_field} is there itself: give one of the two"
    fields = _FROM_WIRE[kind](getattr(job, kind))
    if model_sha256:
        fields[cls.digest_field()] = model_sha256
    spec, found = read_spec(cls, fields)
    violations.update(found)
    if spec is None or violations:
        raise refused(violations)
    return cast(JobSpec, spec)


def spec_into_proto(job: jobs_pb2.Job, spec: JobSpec, model: bytes = b"") -> None:
    """Set a job's specification, every field of it; `model` are the bytes, which a specification only knows by digest.

    Raises:
        ValueError: a model for a kind that takes none.
    """
    if model and not spec.model_field:
        raise ValueError(f"no model comes with a job of kind {spec.kind}")
    if isinstance(spec, FederatedTrainingSpec):
        job.federated_training.CopyFrom(spec_to_proto(spec, model))
    elif isinstance(spec, EvaluationSpec):
        sha256 = b"" if model else bytes.fromhex(spec.model_sha256)
        evaluation = jobs_pb2.Evaluation(job_id=spec.job_id, model=model, task=spec.task, model_sha256=sha256)
        evaluation.round = spec.round
        job.evaluation.CopyFrom(evaluation)
    else:
        job.export.CopyFrom(jobs_pb2.Export(job_id=spec.job_id, format=spec.format, round=spec.round))


def model_bytes(job: jobs_pb2.Job) -> bytes:
    """The model that came with a job (safetensors); empty where none did."""
    kind = job.WhichOneof("spec")
    if kind is None or not KINDS[kind].model_field:
        return b""
    return bytes(getattr(getattr(job, kind), KINDS[kind].model_field))


def load_job_file(path: Path) -> jobs_pb2.Job:
    """A job from a YAML or JSON file: one section named by the kind, with the fields of its specification, and beside
    it `display_name`, `priority` (high, normal or low) and `timeout_s`. A model (`initial_model` of a training, `model`
    of an evaluation) is a path relative to the file, or "base64:" and the bytes; or there is the SHA-256 (hex) of one
    that the aggregator has (`initial_model_sha256`, `model_sha256`).

    Raises:
        ConfigError: no such file, or neither YAML nor JSON.
        InvalidInput: with every violation by its field's path.
    """
    document = read_document(path)
    job = jobs_pb2.Job()
    allowed = ("display_name", "priority", "timeout_s", *KINDS)
    violations = {key: f"unknown field; allowed here: {', '.join(allowed)}" for key in document if key not in allowed}
    violations.update(_read_terms(document, job))
    kinds = [kind for kind in KINDS if kind in document]
    if len(kinds) != 1:
        given = f"there are {' and '.join(kinds)}" if kinds else "there is none"
        violations[_SPEC_FIELD] = f"one section says what the job is to do, of {', '.join(KINDS)}; {given}"
    for kind in kinds:
        violations.update(_read_section(KINDS[kind], document[kind], path.parent, job))
    if violations:
        raise refused(violations)
    return job


def _read_terms(document: Mapping[str, Any], job: jobs_pb2.Job) -> dict[str, str]:
    """What stands beside the specification, into `job`; returns what is wrong with it."""
    violations: dict[str, str] = {}
    display_name = document.get("display_name", "")
    if isinstance(display_name, str) and len(display_name) <= MAX_DISPLAY_NAME_CHARACTERS:
        job.display_name = display_name
    else:
        violations["display_name"] = f"must be a text of at most {MAX_DISPLAY_NAME_CHARACTERS} characters"
    if "priority" in document:
        priority = document["priority"]
        if isinstance(priority, str) and priority.upper() in Priority.__members__:
            job.priority = jobs_pb2.JobPriority.Value(priority.upper())
        else:
            violations["priority"] = "must be high, normal or low"
    if "timeout_s" in document:
        timeout_s = document["timeout_s"]
        number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
        if number and math.isfinite(timeout_s) and 0 < timeout_s <= MAX_TIMEOUT_S:
            job.timeout.FromNanoseconds(max(1, round(timeout_s * 1e9)))
        else:
            violations["timeout_s"] = f"must be a number of seconds above 0 and up to {MAX_TIMEOUT_S:.0f}"
    return violations


def _read_section(cls: type[Spec], section: object, base: Path, job: jobs_pb2.Job) -> dict[str, str]:
    """A specification and its model, into `job`; returns what is wrong with it."""
    if not isinstance(section, dict):
        return {cls.kind: "must be a section that says what the job is to do"}
    fields: dict[str, Any] = dict(section)
    violations: dict[str, str] = {}
    model = b""
    if cls.model_field:
        try:
            model = _model(fields.pop(cls.model_field, ""), base)
        except ValueError as error:
            violations[f"{cls.kind}.{cls.model_field}"] = str(error)
    if model and fields.get(cls.digest_field()):
        violations[f"{cls.kind}.{cls.digest_field()}"] = f"{cls.model_field} is there itself: give one of the two"
    if model:
        fields[cls.digest_field()] = hashlib.sha256(model).hexdigest()
    spec, found = read_spec(cls, fields)
    violations = {**found, **violations}  # of a model that cannot be read this is said, not that there is none
    if spec is not None:
        spec_into_proto(job, cast(JobSpec, spec), model)
    return violations


def _model(value: object, base: Path) -> bytes:
    """Raises ValueError with the public reason."""
    if not isinstance(value, str):
        raise ValueError("must be a path, or a text that starts with 'base64:'")
    if not value:
        return b""
    try:
        if value.startswith("base64:"):
            data = base64.b64decode(value.removeprefix("base64:"), validate=True)
        else:
            data = (base / expanded(Path(value))).read_bytes()
    except binascii.Error as error:
        raise ValueError("is not base64") from error
    except ConfigError as error:
        raise ValueError(error.message) from error
    except OSError as error:
        raise ValueError(f"cannot read {value}: {error.strerror}") from error
    if len(data) > MAX_UPLOAD_BYTES:
        raise ValueError(f"{len(data)} bytes; at most {MAX_UPLOAD_BYTES}")
    return data
