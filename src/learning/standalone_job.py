"""The job of `sotto train`: `schemas/train-job.schema.json` as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ..errors import InvalidInput, LimitError
from .standalone_json import load_schema, read_object, violations

SCHEMA: Final = load_schema("train-job")
SYNTHETIC: Final = "synthetic"
"""The dataset, and its task, that is generated."""
CLASSIFICATION: Final = "classification"
"""Another name of that task."""

MAX_JOB_BYTES: Final = 1 << 16
"""A job is a few hundred bytes; whatever is larger is something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What is to be trained. Ranges are those of the schema.

    Attributes:
        job_id: of the caller's choice.
        dataset, task: short names; `task` is None where the dataset decides.
        private: whether DP-SGD is used.
        epsilon, noise_multiplier: at least one of them where `private`, else neither.
        delta, clip: of DP-SGD.
        epochs, batch_size, learning_rate: of SGD; `batch_size` is None where the job does not say it.
        seed: of synthetic rows and initial model.
    """

    job_id: str
    dataset: str
    task: str | None
    private: bool
    epsilon: float | None
    noise_multiplier: float | None
    delta: float
    clip: float
    epochs: int
    batch_size: int | None
    learning_rate: float
    seed: int


def default(*path: str) -> Any:
    """The default that the schema gives for a field: `default("dp", "delta")`."""
    found: Any = SCHEMA
    for name in path:
        found = found["properties"][name]
    return found["default"]


def parse_job(data: bytes) -> TrainJob:
    """The job in `data`, one JSON object.

    Raises:
        LimitError: larger than `MAX_JOB_BYTES`.
        InvalidInput: it is not a JSON object, or breaks the schema; `violations` has every field, by its path.
    """
    if len(data) > MAX_JOB_BYTES:
        raise LimitError(f"a job has at most {MAX_JOB_BYTES} bytes", limit=MAX_JOB_BYTES)
    value = read_object(data, what="the job")
    problems = violations(SCHEMA, value)
    if problems:
        raise InvalidInput("the job cannot be used", violations=problems)
    dp = value["dp"]
    batch_size = value.get("batch_size")
    return TrainJob(
        job_id=value["job_id"],
        dataset=value.get("dataset", default("dataset")),
        task=value.get("task"),
        private=dp.get("enabled", default("dp", "enabled")),
        epsilon=_real(dp.get("epsilon")),
        noise_multiplier=_real(dp.get("noise_multiplier")),
        delta=float(dp.get("delta", default("dp", "delta"))),
        clip=float(dp.get("clip", default("dp", "clip"))),
        epochs=int(value.get("epochs", default("epochs"))),  # 5.0 is an integer to JSON Schema
        batch_size=None if batch_size is None else int(batch_size),
        learning_rate=float(value.get("learning_rate", default("learning_rate"))),
        seed=int(value.get("seed", default("seed"))),
    )


def _real(value: float | None) -> float | None:
    return None if value is None else float(value)
