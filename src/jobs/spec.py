"""What a job asks for: `FederatedTraining` of the wire with every default filled in, its ranges checked.

The same model reads the wire, a job file and the database. A violation is reported by its field's path, all of them at
once. Defaults and ranges are documented in proto/sotto/v1/jobs.proto.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, cast

from google.protobuf import json_format
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from ..communication.generated import jobs_pb2
from ..config_reader import read_document
from ..errors import InvalidInput
from ..protocol.canonical import digest, real

SPEC_FIELD: Final = "federated_training"
MAX_INITIAL_MODEL_BYTES: Final = 3 << 20
"""A job travels in one message, and gRPC's default limit for a message is 4 MiB."""
MAX_EXACT_INTEGER: Final = 2**53 - 1
"""Integers that every JSON library reads back exactly (RFC 7493, section 2.2)."""
MAX_TASK_OPTIONS_BYTES: Final = 64 << 10
"""Options are settings, not data; every party gets them with every round."""
MAX_RESOLUTION_BITS: Final = 32
"""A float32 has 24 significant bits: a finer grid than 2^-32 only costs slots."""
MAX_DISPLAY_NAME_CHARACTERS: Final = 200

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delta = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LocalTraining(_Part):
    """DP-SGD at each party. `epsilon` and `delta` are the example-level target for all priced rounds together."""

    steps: int = Field(default=10, ge=1, le=1_000_000)
    sampling_rate: float = Field(default=0.05, gt=0, le=1, allow_inf_nan=False)
    learning_rate: Positive = 0.1  # Opacus' MNIST example trains with it under the same norm bound of 1
    max_grad_norm: Positive = 1.0
    epsilon: Positive = 4.0
    delta: Delta = 1e-5


class PartyPrivacy(_Part):
    """Clipping of the update and noise on the sum; `noise_multiplier` 0 is no guarantee at all."""

    clipping_norm: Positive = 1.0
    noise_multiplier: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    noise_by: Literal["both", "parties", "aggregator"] = "both"
    delta: Delta = 1e-5


class Encryption(_Part):
    """How updates are encoded and protected."""

    scheme: Literal["paillier", "plaintext"] = "paillier"
    resolution_bits: int = Field(default=16, ge=1, le=MAX_RESOLUTION_BITS)


class ServerOptimizer(_Part):
    """What the aggregator does with the mean update; `momentum` is of fedavgm, and None for the others."""

    name: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    learning_rate: Positive = 1.0
    momentum: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _default_momentum(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") == "fedavgm" and data.get("momentum") is None:
            return {**data, "momentum": 0.9}  # Hsu, Qi & Brown 2019, section 4.3
        return data

    @field_validator("momentum")
    @classmethod
    def _only_of_fedavgm(cls, value: float | None, info: Any) -> float | None:
        if value is not None and info.data.get("name", "fedavgm") != "fedavgm":
            raise ValueError("only fedavgm takes a momentum")
        return value


class FederatedTrainingSpec(_Part):
    """A model trained by rounds of federated averaging.

    Attributes:
        task: short name of a registered task.
        rounds: that release a model; spare_rounds: further ones that may replace failed rounds.
        parties: invited; empty means all that are enrolled. quorum: updates a round needs; 0 means all invited.
        seed: split, initialisation and public order only.
        round_timeout_s: seconds from a round's start to its deadline.
        initial_model_sha256: hex digest of the model to start from; empty: built from `seed`. Its bytes are a blob.
        task_options: public options of the task, plain JSON.
    """

    task: Name
    rounds: int = Field(default=10, ge=1, le=1_000_000)
    spare_rounds: int = Field(default=2, ge=0, le=1_000_000)
    parties: tuple[Name, ...] = Field(default=(), max_length=10_000)
    quorum: int = Field(default=0, ge=0)
    local_training: LocalTraining = LocalTraining()
    party_privacy: PartyPrivacy = PartyPrivacy()
    encryption: Encryption = Encryption()
    server_optimizer: ServerOptimizer = ServerOptimizer()
    seed: int = Field(default=0, ge=0, le=MAX_EXACT_INTEGER)
    round_timeout_s: Positive = 600.0
    initial_model_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    task_options: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("parties")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a party is named twice")
        return value

    @field_validator("quorum")
    @classmethod
    def _reachable(cls, value: int, info: Any) -> int:
        invited = info.data.get("parties", ())
        if invited and value > len(invited):
            raise ValueError(f"{value} updates cannot come from {len(invited)} parties")
        return value

    @field_validator("task_options")
    @classmethod
    def _plain_and_small(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        options = cast("dict[str, JsonValue]", _whole_numbers(value))
        try:
            size = len(_compact(options).encode())
        except ValueError as error:
            raise ValueError("holds a number that is not finite") from error
        if size > MAX_TASK_OPTIONS_BYTES:
            raise ValueError(f"{size} bytes of options; at most {MAX_TASK_OPTIONS_BYTES}")
        return options

    @property
    def priced_rounds(self) -> int:
        """Rounds and spare rounds: what budgets are checked against."""
        return self.rounds + self.spare_rounds

    @property
    def task_options_text(self) -> str:
        """The options as one JSON text (sorted keys, no white space): the form in which statements carry them."""
        return _compact(self.task_options)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form; reals as decimal strings, the options as one text."""
        content = self.to_json()
        content["task_options"] = self.task_options_text
        return digest(cast("dict[str, Any]", _reals_as_text(content)), domain=SPEC_FIELD)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with every field, as the store keeps it."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` wrote, or any object of some of its fields.

        Raises:
            InvalidInput: with every violation by its field's path.
        """
        spec, violations = _read(value)
        if spec is None:
            raise _invalid(violations)
        return cast(Self, spec)


def spec_from_proto(job: jobs_pb2.Job) -> FederatedTrainingSpec:
    """The specification of a job as it came over the wire; zero and unset fields get their defaults.

    Raises:
        InvalidInput: with every violation by its field's path.
    """
    violations: dict[str, str] = {}
    if len(job.display_name) > MAX_DISPLAY_NAME_CHARACTERS:
        violations["display_name"] = f"{len(job.display_name)} characters; at most {MAX_DISPLAY_NAME_CHARACTERS}"
    if not job.HasField("federated_training"):
        raise _invalid({**violations, SPEC_FIELD: "required: what the job is to do"})
    training = job.federated_training
    if len(training.initial_model) > MAX_INITIAL_MODEL_BYTES:
        size = len(training.initial_model)
        violations[f"{SPEC_FIELD}.initial_model"] = f"{size} bytes; at most {MAX_INITIAL_MODEL_BYTES}"
    spec, found = _read(_training_to_json(training))
    violations.update(found)
    if spec is None or violations:
        raise _invalid(violations)
    return spec


def spec_to_proto(spec: FederatedTrainingSpec, initial_model: bytes = b"") -> jobs_pb2.FederatedTraining:
    """The wire's form, every field set; `initial_model` are the bytes, which a specification only knows by digest."""
    encryption = jobs_pb2.Encryption(resolution_bits=spec.encryption.resolution_bits)
    getattr(encryption, spec.encryption.scheme).SetInParent()
    training = jobs_pb2.FederatedTraining(
        task=spec.task,
        rounds=spec.rounds,
        spare_rounds=spec.spare_rounds,
        parties=spec.parties,
        quorum=spec.quorum,
        local_training=jobs_pb2.LocalTraining(**spec.local_training.model_dump()),
        party_privacy=jobs_pb2.PartyPrivacy(**spec.party_privacy.model_dump()),
        encryption=encryption,
        server_optimizer=jobs_pb2.ServerOptimizer(**spec.server_optimizer.model_dump()),
        seed=spec.seed,
        round_timeout_s=spec.round_timeout_s,
        initial_model=initial_model,
    )
    if spec.task_options:
        training.task_options.update(spec.task_options)
    return training


def load_job_file(path: Path) -> jobs_pb2.Job:
    """A job from a YAML or JSON file: `display_name`, and `federated_training` with the fields of
    `FederatedTrainingSpec`. `initial_model` is a path relative to the file, or "base64:" and the bytes.

    Raises:
        ConfigError: no such file, or neither YAML nor JSON.
        InvalidInput: with every violation by its field's path.
    """
    document = read_document(path)
    violations = dict.fromkeys(document, "unknown field; allowed here: display_name, federated_training")
    violations.pop("display_name", None)
    violations.pop(SPEC_FIELD, None)
    display_name = document.get("display_name", "")
    if not isinstance(display_name, str):
        violations["display_name"] = "must be a text"
    training = document.get(SPEC_FIELD)
    if not isinstance(training, dict):
        raise _invalid({**violations, SPEC_FIELD: "required: a section that says what the job is to do"})
    fields = dict(training)
    model = b""
    try:
        model = _initial_model(fields.pop("initial_model", ""), path.parent)
    except ValueError as error:
        violations[f"{SPEC_FIELD}.initial_model"] = str(error)
    if fields.pop("initial_model_sha256", ""):
        violations[f"{SPEC_FIELD}.initial_model_sha256"] = "a digest is no model: give initial_model"
    spec, found = _read(fields)
    violations.update(found)
    if spec is None or violations:
        raise _invalid(violations)
    return jobs_pb2.Job(display_name=display_name, federated_training=spec_to_proto(spec, model))


def _initial_model(value: object, base: Path) -> bytes:
    """Raises ValueError with the public reason."""
    if not isinstance(value, str):
        raise ValueError("must be a path, or a text that starts with 'base64:'")
    if not value:
        return b""
    try:
        if value.startswith("base64:"):
            data = base64.b64decode(value.removeprefix("base64:"), validate=True)
        else:
            data = (base / Path(value).expanduser()).read_bytes()
    except binascii.Error as error:
        raise ValueError("is not base64") from error
    except OSError as error:
        raise ValueError(f"cannot read {value}: {error.strerror}") from error
    if len(data) > MAX_INITIAL_MODEL_BYTES:
        raise ValueError(f"{len(data)} bytes; at most {MAX_INITIAL_MODEL_BYTES}")
    return data


def _training_to_json(training: jobs_pb2.FederatedTraining) -> dict[str, Any]:
    """The fields that are set: zero means the default, except where the field has presence."""
    content = _set_fields(training, "task", "rounds", "quorum", "seed", "round_timeout_s")
    content["parties"] = list(training.parties)
    if training.HasField("spare_rounds"):
        content["spare_rounds"] = training.spare_rounds
    content["local_training"] = _set_fields(training.local_training, *LocalTraining.model_fields)
    privacy = _set_fields(training.party_privacy, "clipping_norm", "noise_by", "delta")
    if training.party_privacy.HasField("noise_multiplier"):
        privacy["noise_multiplier"] = training.party_privacy.noise_multiplier
    content["party_privacy"] = privacy
    content["encryption"] = _set_fields(training.encryption, "resolution_bits")
    scheme = training.encryption.WhichOneof("scheme")
    if scheme:
        content["encryption"]["scheme"] = scheme
    content["server_optimizer"] = _set_fields(training.server_optimizer, "name", "learning_rate")
    if training.server_optimizer.HasField("momentum"):
        content["server_optimizer"]["momentum"] = training.server_optimizer.momentum
    if training.initial_model:
        content["initial_model_sha256"] = hashlib.sha256(training.initial_model).hexdigest()
    try:
        content["task_options"] = json_format.MessageToDict(training.task_options)
    except (ValueError, json_format.Error):  # a NaN, an infinity, or a value of no kind
        content["task_options"] = {"": math.nan}
    return content


def _set_fields(message: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if getattr(message, name)}


def _read(value: Mapping[str, Any]) -> tuple[FederatedTrainingSpec | None, dict[str, str]]:
    """By way of JSON text: there a list is a tuple and a text is a literal, and still no text is a number."""
    try:
        return FederatedTrainingSpec.model_validate_json(json.dumps(value, default=str)), {}
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, {".".join((SPEC_FIELD, *map(str, detail["loc"]))): _sentence(detail) for detail in details}


def _sentence(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "missing":
        return "required"
    if kind == "extra_forbidden":
        model: Any = FederatedTrainingSpec
        for part in detail["loc"][:-1]:
            model = model.model_fields[str(part)].annotation
        return f"unknown field; allowed here: {', '.join(model.model_fields)}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    given = detail["input"]
    shown = f" (got {given!r})" if isinstance(given, int | float | str) and len(str(given)) <= 40 else ""
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}{shown}"


def _invalid(violations: dict[str, str]) -> InvalidInput:
    listed = "; ".join(f"{path}: {text}" for path, text in violations.items())
    return InvalidInput(f"the job cannot be accepted: {listed}", violations=violations)


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _whole_numbers(value: object) -> object:
    """The wire's Struct knows doubles only: 3.0 becomes 3 again, whichever way the options came."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_INTEGER:
        return int(value)
    return value


def _reals_as_text(value: object) -> object:
    if isinstance(value, dict):
        return {key: _reals_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_reals_as_text(item) for item in value]
    return real(value) if isinstance(value, float) else value
