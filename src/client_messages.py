"""What a client's calls say on the wire."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Final

from .communication.generated import jobs_pb2
from .communication.generated.jobs_pb2 import Evaluation, Export, FederatedTraining, Job
from .communication.options import MAX_MODEL_BYTES
from .errors import InvalidInput, StorageError
from .jobs.keeping import check_choice

MAX_TIMEOUT_S: Final = 10_000 * 365.25 * 86_400
"""What google.protobuf.Duration holds: ±10 000 years."""


def choice_of(round: int | str, best: str) -> str:
    """As the wire has it. Raises InvalidInput for both at once, and for what is neither number nor word."""
    if best and round != "":
        raise InvalidInput("give a round or best, not both", violations={"best": "not beside round"})
    choice = f"best:{best}" if best else str(round)
    return check_choice(choice) if choice else ""


def job_of(job: Any, *, priority: str | None, timeout_s: float | None) -> Job:
    """The wire's message of whatever describes a job; what the caller holds is not changed."""
    if isinstance(job, Job):
        message = Job()
        message.CopyFrom(job)
    elif isinstance(job, FederatedTraining):
        message = Job(federated_training=job)
    elif isinstance(job, Evaluation):
        message = Job(evaluation=job)
    elif isinstance(job, Export):
        message = Job(export=job)
    else:
        from .jobs.specs import spec_into_proto

        message = Job()
        spec_into_proto(message, job)
    if priority is not None:
        if priority.upper() not in ("HIGH", "NORMAL", "LOW"):
            problem = f"must be high, normal or low (got {priority[:40]!r})"
            raise InvalidInput(f"priority {problem}", violations={"priority": problem})
        message.priority = jobs_pb2.JobPriority.Value(priority.upper())
    if timeout_s is not None:
        if not (math.isfinite(timeout_s) and 0 < timeout_s <= MAX_TIMEOUT_S):
            problem = f"must be a number of seconds above 0 (got {timeout_s:g})"
            raise InvalidInput(f"timeout {problem}", violations={"timeout": problem})
        message.timeout.FromNanoseconds(round(timeout_s * 1e9))
    return message


def model_of(job: Job) -> bytes:
    """The model that comes with a job, where it is too large for a message: its SHA-256 is put in its place."""
    for kind, field in (("federated_training", "initial_model"), ("evaluation", "model")):
        message = getattr(job, kind) if job.HasField(kind) else None  # type: ignore[arg-type]  # one of two names
        if message is not None and len(getattr(message, field)) > MAX_MODEL_BYTES:
            model = bytes(getattr(message, field))
            message.ClearField(field)
            setattr(message, f"{field}_sha256", hashlib.sha256(model).digest())
            return model
    return b""


def read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"the model {path} cannot be read: {error.strerror}") from error


def submitted(sent: Job, answer: jobs_pb2.OperationMetadata) -> Job:
    """What is known of a job after it was accepted: what was sent, but the bytes of a model, and what was answered."""
    job = Job()
    job.CopyFrom(sent)
    if job.HasField("federated_training"):
        job.federated_training.ClearField("initial_model")
    if job.HasField("evaluation"):
        job.evaluation.ClearField("model")
    for field, value in answer.ListFields():
        if field.message_type is None:
            setattr(job, field.name, value)
        else:
            getattr(job, field.name).CopyFrom(value)
    return job
