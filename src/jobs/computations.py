"""What an evaluation and an export ask for: computations on a model that is there already."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from ..communication.generated import jobs_pb2
from .keeping import checked_choice
from .spec_base import JOB_ID_PATTERN, NAME_PATTERN, Sha256, Spec, set_fields


def _as_text(value: Any) -> Any:
    """A number is how a job file says which round."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_choice(value: str) -> str:
    return checked_choice(value) if value else ""


Choice = Annotated[str, BeforeValidator(_as_text), AfterValidator(_as_choice)]


class EvaluationSpec(Spec):
    """A model's metrics on the aggregator's public rows.

    Attributes:
        job_id: the federated training whose model is meant; empty: the model came with the job.
        model_sha256: hex digest of the model that came with the job; empty: that of `job_id`. Its bytes are a blob.
        task: whose public rows; empty: the task of `job_id`.
        round: which released round of `job_id` is meant (`keeping`); empty: its result.
    """

    kind: ClassVar[str] = "evaluation"
    model_field: ClassVar[str] = "model"

    job_id: Annotated[str, Field(pattern=f"^({JOB_ID_PATTERN})?$")] = ""
    model_sha256: Sha256 = Field(default="", validate_default=True)
    task: Annotated[str, Field(pattern=f"^({NAME_PATTERN})?$")] = Field(default="", validate_default=True)
    round: Choice = ""

    @field_validator("model_sha256")
    @classmethod
    def _exactly_one(cls, value: str, info: ValidationInfo) -> str:
        job_id = info.data.get("job_id")
        if job_id and value:
            raise ValueError("job_id says already whose model is meant: give one of the two")
        if job_id == "" and not value:
            raise ValueError("required, unless job_id says whose model is meant")
        return value

    @field_validator("task")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.data.get("model_sha256"):
            raise ValueError("required with a model: it says on which rows")
        return value

    @field_validator("round")
    @classmethod
    def _of_a_job(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("job_id"):
            raise ValueError("is of a job: give job_id")
        return value

    def to_json(self) -> dict[str, Any]:
        """As for any; without `round` where none is meant, as it was before there was any."""
        return _without_round(super().to_json())

    @property
    def source_job_id(self) -> str:
        """The job whose model is meant; empty: the model came with the job."""
        return self.job_id


class ExportSpec(Spec):
    """A trained model in another format.

    Attributes:
        job_id: the federated training whose model is meant.
        format: npz, NumPy's archive of named arrays.
        round: which of its released rounds is meant (`keeping`); empty: its result.
    """

    kind: ClassVar[str] = "export"

    job_id: Annotated[str, Field(pattern=f"^{JOB_ID_PATTERN}$")]
    format: Literal["npz"] = "npz"
    round: Choice = ""

    def to_json(self) -> dict[str, Any]:
        """As for any; without `round` where none is meant, as it was before there was any."""
        return _without_round(super().to_json())

    @property
    def source_job_id(self) -> str:
        """The job whose model is meant."""
        return self.job_id


def evaluation_to_json(evaluation: jobs_pb2.Evaluation) -> dict[str, Any]:
    """The fields that are set, as `EvaluationSpec.from_json` takes them."""
    content = set_fields(evaluation, "job_id", "task", "round")
    if evaluation.model:
        content["model_sha256"] = hashlib.sha256(evaluation.model).hexdigest()
    elif evaluation.model_sha256:
        content["model_sha256"] = evaluation.model_sha256.hex()
    return content


def export_to_json(export: jobs_pb2.Export) -> dict[str, Any]:
    """The fields that are set, as `ExportSpec.from_json` takes them."""
    return set_fields(export, "job_id", "format", "round")


def _without_round(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "round" or value}
