"""What a federated training asks for: the wire's message with every default filled in, its ranges checked."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, ClassVar, Final, Literal, cast

from google.protobuf import json_format
from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from ..communication.generated import jobs_pb2
from ..privacy.clipping import MIN_NORM
from .keeping import LAST, check_keep
from .spec_base import JOB_ID_PATTERN, Name, Part, Sha256, Spec, set_fields

MAX_EXACT_INTEGER: Final = 2**53 - 1
"""Integers that every JSON library reads back exactly (RFC 7493, section 2.2)."""
MAX_TASK_OPTIONS_BYTES: Final = 64 << 10
"""Options are settings, not data; every party gets them with every round."""
MAX_RESOLUTION_BITS: Final = 32
"""A float32 has 24 significant bits: a finer grid than 2^-32 only costs slots."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delta = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class LocalTraining(Part):
    """DP-SGD at each party. `epsilon` and `delta` are the example-level target for all priced rounds together."""

    steps: int = Field(default=10, ge=1, le=1_000_000)
    sampling_rate: float = Field(default=0.05, gt=0, le=1, allow_inf_nan=False)
    learning_rate: Positive = 0.1  # as in common examples of DP-SGD under the same norm bound of 1
    max_grad_norm: float = Field(default=1.0, ge=MIN_NORM, allow_inf_nan=False)
    epsilon: Positive = 1.0  # a quarter of what a kit lets a row spend: a few jobs fit in
    delta: Delta = 1e-5


class AdaptiveClipping(Part):
    """A clipping norm that follows a quantile of the updates' norms; None: what follows from the rest of the job."""

    quantile: float = Field(default=0.5, gt=0, lt=1, allow_inf_nan=False)
    learning_rate: float = Field(default=0.2, gt=0, le=1, allow_inf_nan=False)
    bit_deviation: Positive | None = None
    smallest: Positive | None = None
    largest: Positive | None = None


ADAPTIVE_SPAN: Final = 2.0**10
"""By default the norm stays within this factor of where it starts: in steps of e^(±0.1) that is out of reach for the
first 69 rounds."""


class PartyPrivacy(Part):
    """Clipping of the update and noise on the sum; `noise_multiplier` 0 is no guarantee at all.

    With `adaptive_clipping`, `clipping_norm` is that of the first round.
    """

    clipping_norm: Positive = 1.0
    noise_multiplier: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    noise_by: Literal["both", "parties", "aggregator"] = "both"
    delta: Delta = 1e-5
    adaptive_clipping: AdaptiveClipping | None = None

    @property
    def norm_bounds(self) -> tuple[float, float]:
        """The smallest and the largest clipping norm that a round can have."""
        given = self.adaptive_clipping
        if given is None:
            return self.clipping_norm, self.clipping_norm
        return (
            self.clipping_norm / ADAPTIVE_SPAN if given.smallest is None else given.smallest,
            self.clipping_norm * ADAPTIVE_SPAN if given.largest is None else given.largest,
        )

    @model_validator(mode="after")
    def _starts_within(self) -> PartyPrivacy:
        smallest, largest = self.norm_bounds
        if not smallest <= self.clipping_norm <= largest:
            raise ValueError(
                f"adaptive clipping starts at clipping_norm {self.clipping_norm:g}, which has to lie between smallest "
                f"and largest (got {smallest:g} and {largest:g})"
            )
        return self


class Encryption(Part):
    """How updates are encoded and protected."""

    scheme: Literal["paillier", "plaintext"] = "paillier"
    resolution_bits: int = Field(default=16, ge=1, le=MAX_RESOLUTION_BITS)


class ServerOptimizer(Part):
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
    def _only_of_fedavgm(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("name", "fedavgm") != "fedavgm":
            raise ValueError("only fedavgm takes a momentum")
        return value


class ContinuedFrom(Part):
    """A released round of an earlier job whose model this one starts from; `model_sha256` is that model's digest, so
    that whoever signs the specification signs the model."""

    job_id: str = Field(pattern=f"^{JOB_ID_PATTERN}$")
    round: int = Field(ge=1, le=1_000_000_000)
    model_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class FederatedTrainingSpec(Spec):
    """A model trained by rounds, in each of which the parties' contributions are added up.

    Attributes:
        task: short name of a registered task.
        strategy: `fedavg`: a party trains by itself with DP-SGD and contributes an update. `fedsgd`: a round is one
            step of DP-SGD over all parties' rows, its noise added once.
        trusted_aggregator: under fedsgd with noise_by aggregator, which without it is refused: who runs the aggregator
            is trusted with the exact sums.
        rounds: that release a model; spare_rounds: further ones that may replace failed rounds.
        parties: invited; empty means all that are enrolled. quorum: updates a round needs; 0 means all invited.
        seed: split, initialisation and public order only.
        round_timeout_s: seconds from a round's start to its deadline.
        initial_model_sha256: hex digest of the model to start from; empty: built from `seed`. Its bytes are a blob.
        task_options: public options of the task, plain JSON.
        keep: which models of released rounds stay beside the last: "last" (none), "best:METRIC", "every:K".
        continue_from: the released round of another job that gives the initial model; `initial_model_sha256` is then
            its digest.
    """

    kind: ClassVar[str] = "federated_training"
    model_field: ClassVar[str] = "initial_model"

    task: Name
    strategy: Literal["fedavg", "fedsgd"] = "fedavg"
    trusted_aggregator: bool = False
    rounds: int = Field(default=10, ge=1, le=1_000_000)
    spare_rounds: int = Field(default=2, ge=0, le=1_000_000)
    parties: tuple[Name, ...] = Field(default=(), max_length=10_000)
    quorum: int = Field(default=0, ge=0)
    local_training: LocalTraining = Field(default=LocalTraining(), validate_default=True)
    party_privacy: PartyPrivacy = PartyPrivacy()
    encryption: Encryption = Encryption()
    server_optimizer: ServerOptimizer = ServerOptimizer()
    seed: int = Field(default=0, ge=0, le=MAX_EXACT_INTEGER)
    round_timeout_s: Positive = 600.0
    continue_from: ContinuedFrom | None = None
    initial_model_sha256: Sha256 = Field(default="", validate_default=True)
    task_options: dict[str, JsonValue] = Field(default_factory=dict)
    keep: str = LAST

    @field_validator("keep")
    @classmethod
    def _kept(cls, value: str) -> str:
        return check_keep(value or LAST)  # empty, as the wire has it

    @field_validator("initial_model_sha256")
    @classmethod
    def _one_model(cls, value: str, info: ValidationInfo) -> str:
        """The model that a job goes on from is the one that it starts from."""
        continued: ContinuedFrom | None = info.data.get("continue_from")
        if continued is None:
            return value
        if value not in ("", continued.model_sha256):
            raise ValueError("continue_from says already which model the job starts from: give one of the two")
        return continued.model_sha256

    @field_validator("local_training", mode="before")
    @classmethod
    def _one_step(cls, value: Any, info: ValidationInfo) -> Any:
        """Of fedsgd: the default of `steps` is what a round is."""
        if info.data.get("strategy") != "fedsgd":
            return value
        if isinstance(value, LocalTraining) and "steps" not in value.model_fields_set:
            return value.model_copy(update={"steps": 1})
        return {"steps": 1, **value} if isinstance(value, dict) else value

    @field_validator("trusted_aggregator")
    @classmethod
    def _only_of_fedsgd(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("strategy", "fedsgd") != "fedsgd":
            raise ValueError("only fedsgd can have a trusted aggregator")
        return value

    @field_validator("local_training")
    @classmethod
    def _a_round_is_a_step(cls, value: LocalTraining, info: ValidationInfo) -> LocalTraining:
        if info.data.get("strategy") == "fedsgd" and value.steps != 1:
            raise ValueError(f"under fedsgd a round is one step (got steps {value.steps})")
        return value

    @field_validator("party_privacy")
    @classmethod
    def _noise_of_fedsgd(cls, value: PartyPrivacy, info: ValidationInfo) -> PartyPrivacy:
        if info.data.get("strategy") != "fedsgd":
            return value
        if value.adaptive_clipping is not None:
            raise ValueError("only fedavg has adaptive clipping: fedsgd clips each example")
        default = PartyPrivacy()
        if (value.clipping_norm, value.noise_multiplier) != (default.clipping_norm, default.noise_multiplier):
            raise ValueError(
                "fedsgd derives norm and noise from local_training: leave clipping_norm and noise_multiplier out"
            )
        if (value.noise_by == "aggregator") != info.data.get("trusted_aggregator", value.noise_by == "aggregator"):
            raise ValueError(
                "fedsgd with noise_by aggregator is a trusted server: it takes trusted_aggregator: true, and "
                "trusted_aggregator: true takes noise_by aggregator"
            )
        return value

    @field_validator("parties")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a party is named twice")
        return value

    @field_validator("quorum")
    @classmethod
    def _reachable(cls, value: int, info: ValidationInfo) -> int:
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it: every field, but those of strategies, adaptive clipping, keeping and going
        on only where one is chosen. So a job from before there were any has the form and the digest that it had."""
        content = super().to_json()
        if self.party_privacy.adaptive_clipping is None:
            del content["party_privacy"]["adaptive_clipping"]
        if self.strategy == "fedavg":
            del content["strategy"], content["trusted_aggregator"]
        if self.keep == LAST:
            del content["keep"]
        if self.continue_from is None:
            del content["continue_from"]
        return content

    @property
    def source_job_id(self) -> str:
        """The job that this one goes on from; empty where there is none."""
        return self.continue_from.job_id if self.continue_from else ""

    def _hashed(self) -> dict[str, Any]:
        return {**self.to_json(), "task_options": self.task_options_text}


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
        initial_model_sha256=b"" if initial_model or spec.continue_from else bytes.fromhex(spec.initial_model_sha256),
        strategy=spec.strategy,
        trusted_aggregator=spec.trusted_aggregator,
        keep="" if spec.keep == LAST else spec.keep,  # left out of an order too: as a party of before reads it
    )
    if spec.continue_from is not None:
        training.continue_from.CopyFrom(jobs_pb2.ContinuedFrom(**spec.continue_from.model_dump()))
    if spec.task_options:
        training.task_options.update(spec.task_options)
    return training


def training_to_json(training: jobs_pb2.FederatedTraining) -> dict[str, Any]:
    """The fields that are set, as `FederatedTrainingSpec.from_json` takes them: zero means the default, unless the
    field has presence."""
    content = set_fields(
        training, "task", "strategy", "trusted_aggregator", "rounds", "quorum", "seed", "round_timeout_s", "keep"
    )
    if training.HasField("continue_from"):
        content["continue_from"] = set_fields(training.continue_from, *ContinuedFrom.model_fields)
    content["parties"] = list(training.parties)
    if training.HasField("spare_rounds"):
        content["spare_rounds"] = training.spare_rounds
    content["local_training"] = set_fields(training.local_training, *LocalTraining.model_fields)
    privacy = set_fields(training.party_privacy, "clipping_norm", "noise_by", "delta")
    if training.party_privacy.HasField("noise_multiplier"):
        privacy["noise_multiplier"] = training.party_privacy.noise_multiplier
    if training.party_privacy.HasField("adaptive_clipping"):
        privacy["adaptive_clipping"] = set_fields(
            training.party_privacy.adaptive_clipping, *AdaptiveClipping.model_fields
        )
    content["party_privacy"] = privacy
    content["encryption"] = set_fields(training.encryption, "resolution_bits")
    scheme = training.encryption.WhichOneof("scheme")
    if scheme:
        content["encryption"]["scheme"] = scheme
    content["server_optimizer"] = set_fields(training.server_optimizer, "name", "learning_rate")
    if training.server_optimizer.HasField("momentum"):
        content["server_optimizer"]["momentum"] = training.server_optimizer.momentum
    if training.initial_model:
        content["initial_model_sha256"] = hashlib.sha256(training.initial_model).hexdigest()
    elif training.initial_model_sha256:
        content["initial_model_sha256"] = training.initial_model_sha256.hex()
    try:
        content["task_options"] = json_format.MessageToDict(training.task_options)
    except (ValueError, json_format.Error):  # a NaN, an infinity, or a value of no kind
        content["task_options"] = {"": math.nan}
    return content


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
