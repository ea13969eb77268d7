"""What an evaluation and an export ask for: computations on a model that is there already."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..communication.generated import jobs_pb2
from .spec_base import NAME_PATTERN, Sha256, Spec, set_fields

JOB_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


class EvaluationSpec(Spec):
    """A model's metrics on the aggregator's public rows.

    Attributes:
        job_id: the federated training whose model is meant; empty: the model came with the job.
        model_sha256: hex digest of the model that came with the job; empty: that of `job_id`. Its bytes are a blob.
        task: whose public rows; empty: the task of `job_id`.
    """

    kind: ClassVar[str] = "evaluation"
    model_field: ClassVar[str] = "model"

    job_id: Annotated[str, Field(pattern=f"^({JOB_ID_PATTERN})?$")] = ""
    model_sha256: Sha256 = Field(default="", validate_default=True)
    task: Annotated[str, Field(pattern=f"^({NAME_PATTERN})?$")] = Field(default="", validate_default=True)

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

    @property
    def source_job_id(self) -> str:
        """The job whose model is meant; empty: the model came with the job."""
        return self.job_id


class ExportSpec(Spec):
    """A trained model in another format.

    Attributes:
        job_id: the federated training whose model is meant.
        format: npz, NumPy's archive of named arrays.
    """

    kind: ClassVar[str] = "export"

    job_id: Annotated[str, Field(pattern=f"^{JOB_ID_PATTERN}$")]
    format: Literal["npz"] = "npz"

    @property
    def source_job_id(self) -> str:
        """The job whose model is meant."""
        return self.job_id


def evaluation_to_json(evaluation: jobs_pb2.Evaluation) -> dict[str, Any]:
    """The fields that are set, as `EvaluationSpec.from_json` takes them."""
    content = set_fields(evaluation, "job_id", "task")
    if evaluation.model:
        content["model_sha256"] = hashlib.sha256(evaluation.model).hexdigest()
    return content


def export_to_json(export: jobs_pb2.Export) -> dict[str, Any]:
    """The fields that are set, as `ExportSpec.from_json` takes them."""
    return set_fields(export, "job_id", "format")
