"""The sections that the configurations of aggregator, party and client are made of: what is allowed, and the defaults.

Field descriptions are the comments of the files that `sotto provision` writes: there is one place that explains a
setting.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from .config_reader import ConfigPath, finish, loading

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DEFAULT_MODULUS_BITS: Final = 3072  # 128-bit security (NIST SP 800-57 part 1 rev. 5, table 2)
SMALLEST_MODULUS_BITS: Final = 2048  # 112-bit security (same table)
_MODULUS_LIMITS: Final = {
    "ge": 256,
    "le": 8192,
    "multiple_of": 64,
}  # what the arithmetic works with; not: what is secure
NAME_PATTERN: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
NAME_RULE: Final = "a lower-case letter, then up to 31 lower-case letters, digits or hyphens"
RESERVED_NAMES: Final = frozenset({"aggregator", "operator"})
USER_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
USER_RULE: Final = "1 to 64 letters, digits and . _ @ -, the first a letter or digit"

DEFAULT_MAX_ROUNDS: Final = 10_000
"""Ten jobs of as many rounds as one may have (`limits.max_rounds`), or thirty of a few hundred steps of fedsgd. A limit
in rounds without one in ε is no guarantee: it stops a federation that nobody looks after, and no job that anybody
means. What protects a row is the ε of its budget; what protects a party is the noise on the sum, whose ε can be limited
where there is any."""
ROUNDS_RULE: Final = f"{DEFAULT_MAX_ROUNDS} rounds are ten of the longest jobs, and no guarantee: that is ε"

Custody = Literal["threshold", "aggregator"]
NoiseBy = Literal["both", "parties", "aggregator"]


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[IPv6]:port" → (host, port); ValueError when it is neither or the port is not 0 … 65535."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    plain = host and not {"[", "]"} & set(host)
    if not plain or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host) != bracketed:
        raise ValueError("must be host:port, such as 127.0.0.1:50051 or [::1]:50051")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _address(value: str) -> str:
    split_address(value)
    return value


MAX_OPTION_DEPTH: Final = 10
"""Lists and mappings inside each other, in an option of a task."""


def _peer_address(value: str) -> str:
    if split_address(value)[1] == 0:
        raise ValueError("must name the port of the aggregator, 1 to 65535")
    return value


def _name(value: str) -> str:
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(f"must be {NAME_RULE}")
    return value


def _party_name(value: str) -> str:
    if value in RESERVED_NAMES:
        raise ValueError(f"must not be {value!r}: that name is reserved")
    return _name(value)


def _user_name(value: str) -> str:
    if not USER_PATTERN.fullmatch(value):
        raise ValueError(f"must be {USER_RULE}")
    return value


def _option(value: object) -> object:
    if not _is_plain(value, MAX_OPTION_DEPTH):
        raise ValueError(
            "must be a text, a number, true, false, null, or lists and mappings of these, at most "
            f'{MAX_OPTION_DEPTH} inside each other (placeholders need quotes: "{{index}}")'
        )
    return value


def _is_plain(value: object, depth: int) -> bool:
    """Whether a value is what it was once it has been JSON; and no placeholder that YAML took for a mapping."""
    if isinstance(value, dict):
        texts = all(isinstance(key, str) for key in value) and value not in ({"name": None}, {"index": None})
        return depth > 0 and texts and all(_is_plain(each, depth - 1) for each in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    return value is None or isinstance(value, str | int | float)


Address = Annotated[str, AfterValidator(_address)]
PeerAddress = Annotated[str, AfterValidator(_peer_address)]
Name = Annotated[str, AfterValidator(_name)]
PartyName = Annotated[str, AfterValidator(_party_name)]
UserName = Annotated[str, AfterValidator(_user_name)]
"""Of a user: the person or group whose data is trained on."""
Option = Annotated[Any, AfterValidator(_option)]


class Section(BaseModel):
    """A part of a configuration: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )


def section(description: str, **defaults: object) -> Any:
    """A sub-section that may be left out. Its default is validated like anything written, so that paths resolve."""
    return Field(default_factory=lambda: dict(defaults), description=description)


def setting(default: object, description: str, **limits: Any) -> Any:
    """A key that may be left out; `limits` as pydantic names them (gt, ge, lt, le, multiple_of)."""
    return Field(default=default, description=description, **limits)


class TlsSection(Section):
    """Files of mutual TLS."""

    certificate: ConfigPath = setting(Path("tls/cert.pem"), "this node's certificate")
    key: ConfigPath = setting(Path("tls/key.pem"), "its private key")
    ca: ConfigPath = setting(Path("tls/ca.pem"), "the federation's certificate authority")


class _Transport(Section):
    insecure: bool = setting(False, "true: no TLS, identities are taken on trust; on loopback only")
    tls: TlsSection | None = setting(None, "mutual TLS; not read with insecure: true")

    @model_validator(mode="before")
    @classmethod
    def _place_tls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("insecure") is True:
            return {**data, "tls": None}
        return {**data, "tls": {} if data.get("tls") is None else data["tls"]}

    def _check_transport(self, info: ValidationInfo, key: str) -> None:
        state = loading(info)
        address = getattr(self, key)
        if self.insecure and not is_loopback(split_address(address)[0]):
            state.problems.append(
                f"server.insecure: must be false for {address}: without TLS only localhost, 127.0.0.0/8 and [::1] "
                "are allowed"
            )
        if self.tls is not None:
            for name in ("certificate", "key", "ca"):
                state.require_file(f"server.tls.{name}", getattr(self.tls, name))
        finish(info, state)


class AggregatorServer(_Transport):
    """Where the aggregator listens. `tls` is None exactly when `insecure`."""

    listen: Address = setting(DEFAULT_ADDRESS, "host:port; port 0 takes a free one (see address_file)")
    reflection: bool = setting(True, "answer gRPC server reflection, so that stock clients find the services")
    heartbeat_interval_s: float = setting(10, "how often a party's session shows it is there", gt=0, le=300)
    address_file: ConfigPath | None = setting(None, "write the bound host:port here once listening")
    shutdown_s: float = setting(10, "how long what is under way may take to end at SIGTERM", ge=0, le=600)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> AggregatorServer:
        self._check_transport(info, "listen")
        return self


class ClientServer(_Transport):
    """Where the aggregator is, seen from a party or scientist. `tls` is None exactly when `insecure`."""

    address: PeerAddress = setting(DEFAULT_ADDRESS, "host:port of the aggregator")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ClientServer:
        self._check_transport(info, "address")
        return self


class _Keys(Section):
    custody: Custody = setting("threshold", "who can decrypt: threshold of the parties, or the aggregator")
    public_key: ConfigPath = setting(Path("public_key.json"), "the federation's Paillier public key")
    roster: ConfigPath | None = setting(None, "who is in, signed by the operator and pinned here")
    signing_key: ConfigPath = setting(Path("signing.key"), "this node's Ed25519 key: secret")
    insecure_small_modulus: bool = setting(False, "true allows less than 2048 bits: tests only, breakable")

    def _check_files(self, info: ValidationInfo, *names: str) -> None:
        state = loading(info)
        if self.custody == "threshold":
            needed: tuple[str, ...] = ("public_key", "roster", "signing_key", *names)
        else:  # keys that are not there are made at first start; those that a signed roster names have to be there
            needed = ("roster", "signing_key") if self.roster is not None else ()
        for name in needed:
            state.require_file(f"keys.{name}", getattr(self, name))
        finish(info, state)


class AggregatorKeys(_Keys):
    """The aggregator's keys.

    Custody `threshold`: all come from a kit, `private_key` is None. Custody `aggregator`: `public_key`, `private_key`
    and `signing_key` lie in the state directory unless said otherwise and are made there at first start; `roster` is
    None outside a kit.
    """

    modulus_bits: int = setting(
        DEFAULT_MODULUS_BITS,
        "made with custody aggregator: 3072 is 128-bit security, 2048 is 112-bit",
        **_MODULUS_LIMITS,
    )
    private_key: ConfigPath | None = setting(None, "with custody aggregator: the key pair, made at first start")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> AggregatorKeys:
        if self.modulus_bits < SMALLEST_MODULUS_BITS and not self.insecure_small_modulus:
            state = loading(info)
            state.problems.append(
                f"keys.modulus_bits: must be >= {SMALLEST_MODULUS_BITS} (got {self.modulus_bits}); less is breakable "
                "and needs keys.insecure_small_modulus: true"
            )
            finish(info, state)
        self._check_files(info)
        return self


class PartyKeys(_Keys):
    """A party's keys. Custody `aggregator`: no share; `signing_key` and the `public_key` it was shown lie in the state
    directory; `roster` is None outside a kit."""

    share: ConfigPath | None = setting(None, "this party's share of the decryption key: secret")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> PartyKeys:
        self._check_files(info, "share")
        return self


class ClientKeys(Section):
    """What a scientist verifies artifacts with, and signs jobs with."""

    roster: ConfigPath | None = setting(None, "to verify the signature on results; null: not verified")
    signing_key: ConfigPath | None = setting(
        None, "to sign jobs as yours, an Ed25519 key: secret; null: not signed, which only a classic set-up takes"
    )

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ClientKeys:
        state = loading(info)
        state.require_file("keys.roster", self.roster)
        state.require_file("keys.signing_key", self.signing_key)
        finish(info, state)
        return self


class Budget(Section):
    """A limit in rounds, in ε at a fixed δ, or both; at least one of them."""

    max_rounds: int | None = setting(None, "rounds, ever; null: no limit in rounds", ge=1)
    epsilon: float | None = setting(None, "ε at this δ, ever; null: no limit in ε", gt=0)
    delta: float = setting(1e-5, "the δ at which ε is measured", gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.max_rounds is None and self.epsilon is None:
            raise ValueError("must limit something: epsilon: null means no limit in ε, and then max_rounds is required")
        return self


def _with_default(kind: type[Section], name: str | None, data: Any) -> Any:
    """A budget as written, with its default for what is not: a limit in rounds takes away none in ε, only null does.

    What limits nothing is left as it is, to be refused.
    """
    if not isinstance(data, dict) or all(data.get(quantity) is None for quantity in ("max_rounds", "epsilon")):
        return data
    return {**kind.model_fields[name or ""].get_default(call_default_factory=True), **data}


class AggregatorPrivacy(Section):
    """The aggregator's rules about noise, and the federation's party-level budget."""

    noise_by: NoiseBy = setting("both", "who adds the party-level noise: both, parties or aggregator")
    colluders: int = setting(0, "corrupt parties that noise shares and thresholds must stand", ge=0)
    allow_plaintext_scheme: bool = setting(False, "true lets jobs ask for no encryption: tests, benchmarks")
    budget: Budget = section(
        f"the party-level budget of this federation; {ROUNDS_RULE}",
        max_rounds=DEFAULT_MAX_ROUNDS,
    )
    per_job: Budget | None = setting(
        None, "quota of any one job inside that budget, such as {max_rounds: 50}; null: none of its own"
    )
    per_party: Budget | None = setting(
        None,
        "of any one party inside that budget, such as {max_rounds: 100}: counts rounds that invite it; null: none",
    )
    parties: dict[PartyName, Budget] = Field(
        default_factory=dict, description="of single parties inside per_party, by name, such as a: {max_rounds: 50}"
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _keep_default(cls, data: Any, info: ValidationInfo) -> Any:
        return _with_default(cls, info.field_name, data)


class AggregatorPolicy(Section):
    """Whose jobs this aggregator takes."""

    allow_unsigned_jobs: bool = setting(False, "true takes jobs that no scientist of the roster signed")


class JobQuotas(Section):
    """What any one job may spend, inside the budgets of the data and of the party."""

    example: Budget | None = setting(None, "of a row's budget, such as {epsilon: 1.0}; null: no quota")
    party: Budget | None = setting(None, "of the party's budget, such as {max_rounds: 50}; null: no quota")


class PartyBudgets(Section):
    """A party's own budgets; it refuses what any of them does not allow.

    `example` and `party` are the guarantee; users and jobs have quotas inside it.
    """

    example: Budget = section(
        "for one row of any dataset, spent by DP-SGD; a dataset may have a budget of its own inside it", epsilon=4.0
    )
    party: Budget = section(
        f"for this party as a whole, spent by every sum it contributes to; {ROUNDS_RULE}",
        max_rounds=DEFAULT_MAX_ROUNDS,
    )
    against: Literal["aggregator", "release"] = setting(
        "aggregator",
        "whom every ε here counts against: aggregator, whose own noise is none, or only who sees the release",
    )
    per_job: JobQuotas = section("quotas of any one job inside these")
    users: dict[UserName, Budget] = Field(
        default_factory=dict,
        description="quotas of users (whose data is trained on), by name, such as ada: {epsilon: 2.0}",
    )
    default_user_epsilon: float | None = setting(
        None, "of any user, named above or not; null: one who is not named is refused", gt=0
    )
    default_user_delta: float = setting(1e-5, "the δ at which that ε is measured", gt=0, lt=1)

    @field_validator("example", "party", mode="before")
    @classmethod
    def _keep_default(cls, data: Any, info: ValidationInfo) -> Any:
        return _with_default(cls, info.field_name, data)


class PartyPrivacy(Section):
    """A party's own view of collusion and its own budgets."""

    colluders: int = setting(0, "corrupt parties a plan must stand; one that stands fewer is refused", ge=0)
    budgets: PartyBudgets = section("enforced here, whatever the aggregator says")


class PartyPolicy(Section):
    """What this party takes part in."""

    allow_plaintext_scheme: bool = setting(False, "true takes part in rounds without encryption")
    allow_trusted_aggregator: bool = setting(
        False,
        "true takes part in fedsgd with noise by the aggregator alone, or a key that it holds; see budgets.against",
    )
    allow_unsigned_jobs: bool = setting(
        False, "true takes part in jobs that no scientist of the roster signed: the aggregator can then make up any"
    )
    min_quorum: int = setting(2, "smallest number of updates in a sum that hides this party's", ge=2)
    min_parties_noise_multiplier: float = setting(0.0, "least multiplier of the noise that the parties draw", ge=0)
    max_declared_rows_factor: float = setting(
        10.0, "fedsgd: most rows that another party may declare, over this one's; they slow the model down", ge=1
    )
    disclose_epsilon: bool = setting(True, "tell the aggregator the ε spent here; it depends on no data")
    allow_without_dp: bool = setting(
        False, "true allows training whose ε for a row is infinite: without noise, or with next to none; budgets hold"
    )


class DatasetSection(Section):
    """The data that this party brings to a task."""

    declared_rows: int = Field(ge=1, description="a number of rows this party is willing to make public")
    user: UserName | None = setting(None, "whose data it is: it counts against their quota too; null: nobody's")
    budget: Budget | None = setting(
        None, "of its rows, such as {epsilon: 2.0}, inside privacy.budgets.example; null: that alone"
    )
    budget_of: str | None = setting(
        None, "another dataset, which has the same rows or people: both spend the budget of that one; null: its own"
    )
    options: dict[str, Option] = Field(default_factory=dict, description="passed to the task as they are")


class AggregatorLimits(Section):
    """What one caller may ask for."""

    max_update_bytes: int = setting(268_435_456, "of one upload", ge=1)
    max_message_bytes: int = setting(4_194_304, "of one gRPC message", ge=65_536, le=2**31 - 1)
    max_parties: int = setting(100, "enrolled, with or without a session", ge=1)
    max_declared_rows: int = setting(10_000_000, "that a party may declare for a task (fedsgd divides by them)", ge=1)
    max_jobs_pending: int = setting(100, "jobs that wait; another is refused", ge=1)
    max_jobs_a_day_per_scientist: int = setting(1000, "that one scientist may submit within 24 hours", ge=1)
    max_stored_bytes_per_scientist: int = setting(
        2_147_483_648,
        "models of one scientist's jobs, until they are deleted; with another model a job is refused",
        ge=1,
    )
    max_rounds: int = setting(1000, "of one job", ge=1)
    max_round_timeout_s: float = setting(86_400, "longest round deadline a job may set", gt=0)
    max_streams_per_caller: int = setting(64, "uploads, downloads and watches of one caller at a time", ge=8)
    max_requests_per_caller: int = setting(64, "other calls of one caller at a time", ge=8)
    idle_timeout_s: float = setting(60, "how long a stream may bring nothing, or an answer go unread", ge=1, le=3600)


class PartyLimits(Section):
    """What the aggregator may ask of this party."""

    max_update_bytes: int = setting(268_435_456, "of a model, a contribution or what is to be opened", ge=1)
    max_message_bytes: int = setting(4_194_304, "of one gRPC message", ge=65_536, le=2**31 - 1)


class WorkersSection(Section):
    """Warm processes for CPU work. Their number follows the load between two limits."""

    size: int = setting(3, "worker processes at the start", ge=1, le=256)
    min_size: int = setting(1, "kept warm when there is nothing to do", ge=1, le=256)
    max_size: int = setting(6, "at most, while units of work wait", ge=1, le=256)
    nice: int = setting(10, "their lower priority", ge=0, le=19)
    recycle_after: int = setting(200, "units of work, after which a worker makes room for a fresh one", ge=1)
    idle_s: float = setting(60, "how long a worker beyond min_size may have nothing to do", gt=0)
    health_interval_s: float = setting(30, "how often an idle worker is asked whether it answers", ge=0.01)
    memory_limit_mb: int | None = setting(8192, "of one worker; null: no limit (Linux only)", ge=256)
    cpu_limit_s: float | None = setting(3600, "CPU seconds of one unit of work; null: no limit", gt=0)

    @model_validator(mode="after")
    def _check(self) -> WorkersSection:
        if not self.min_size <= self.size <= self.max_size:
            raise ValueError(
                f"must have min_size <= size <= max_size (got {self.min_size}, {self.size}, {self.max_size})"
            )
        return self


class DatabaseSection(Section):
    """Where jobs, rounds and the ledger are kept."""

    url: str | None = setting(
        None,
        "null: SQLite in state_dir; or postgresql+psycopg://user@host/database, by TLS (verify-full) to another host",
    )
    password_file: ConfigPath | None = setting(None, "the database's password, where it takes one")
    insecure_transport: bool = setting(False, "true: to another host as the URL says, though others could listen in")


class JobsSection(Section):
    """How jobs are scheduled, tried again and ended."""

    max_trainings_running: int = setting(2, "federated trainings at the same time", ge=1)
    max_computations_running: int = setting(3, "evaluations and exports at the same time", ge=1)
    max_running_per_scientist: int = setting(2, "of each of the two", ge=1)
    max_pending_per_scientist: int = setting(50, "jobs of one scientist that wait; another is refused", ge=1)
    retry_delays_s: tuple[Annotated[float, Field(ge=0, le=86_400)], ...] = setting(
        (0.0, 60.0, 300.0),
        "before each further attempt, for causes that it may mend; []: no retries",
        max_length=20,
        strict=False,  # YAML has lists only
    )
    computation_timeout_s: float = setting(600, "deadline of an evaluation or export that sets none", gt=0)
    lease_s: float = setting(60, "a job that gets nowhere for so long is taken from whoever holds it", ge=1, le=3600)


class LoggingSection(Section):
    """The log on stderr."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", "DEBUG, INFO, WARNING or ERROR")
    format: Literal["text", "json"] = setting("text", "text, or json: one object a line")
