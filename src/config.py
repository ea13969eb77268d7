"""Configuration: three YAML files (aggregator, party, client) as frozen models.

A model is what is allowed; `load_aggregator_config`, `load_party_config` and `load_client_config` read a file, let
`SOTTO__SECTION__KEY` override it, resolve paths against the file's directory, and either return the model or raise one
`ConfigError` that lists every problem with its path. Field descriptions are the comments of the files that
`sotto provision` writes: there is one place that explains a setting.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from .config_reader import ConfigPath, Loading, Model, finish, loading, override, read_document, unusable, validate

CONFIG_VERSION: Final = 1
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
PROVISION_EXAMPLE: Final = "sotto provision --out kits --federation demo --party a --party b --party c --threshold 2"

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


def _option(value: object) -> object:
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, str | int | float) for item in items):
        raise ValueError(
            'must be a text, a number, true, false, null or a list of these (placeholders need quotes: "{index}")'
        )
    return value


Address = Annotated[str, AfterValidator(_address)]
PeerAddress = Annotated[str, AfterValidator(_peer_address)]
Name = Annotated[str, AfterValidator(_name)]
PartyName = Annotated[str, AfterValidator(_party_name)]
Option = Annotated[Any, AfterValidator(_option)]


class Section(BaseModel):
    """A part of a configuration: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )


def _section(description: str, **defaults: object) -> Any:
    """A sub-section that may be left out. Its default is validated like anything written, so that paths resolve."""
    return Field(default_factory=lambda: dict(defaults), description=description)


def _value(default: object, description: str, **limits: Any) -> Any:
    """A key that may be left out; `limits` as pydantic names them (gt, ge, lt, le, multiple_of)."""
    return Field(default=default, description=description, **limits)


class TlsSection(Section):
    """Files of mutual TLS."""

    certificate: ConfigPath = _value(Path("tls/cert.pem"), "this node's certificate")
    key: ConfigPath = _value(Path("tls/key.pem"), "its private key")
    ca: ConfigPath = _value(Path("tls/ca.pem"), "the federation's certificate authority")


class _Transport(Section):
    insecure: bool = _value(False, "true: no TLS, identities are taken on trust; on loopback only")
    tls: TlsSection | None = _value(None, "mutual TLS; not read with insecure: true")

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

    listen: Address = _value(DEFAULT_ADDRESS, "host:port; port 0 takes a free one (see address_file)")
    reflection: bool = _value(True, "answer gRPC server reflection, so that stock clients find the services")
    heartbeat_interval_s: float = _value(10, "how often a party's session shows it is there", gt=0, le=300)
    address_file: ConfigPath | None = _value(None, "write the bound host:port here once listening")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> AggregatorServer:
        self._check_transport(info, "listen")
        return self


class ClientServer(_Transport):
    """Where the aggregator is, seen from a party or scientist. `tls` is None exactly when `insecure`."""

    address: PeerAddress = _value(DEFAULT_ADDRESS, "host:port of the aggregator")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ClientServer:
        self._check_transport(info, "address")
        return self


class _Keys(Section):
    custody: Custody = _value("threshold", "who can decrypt: threshold of the parties, or the aggregator")
    public_key: ConfigPath = _value(Path("public_key.json"), "the federation's Paillier public key")
    roster: ConfigPath | None = _value(None, "who is in, signed by the operator and pinned here")
    signing_key: ConfigPath = _value(Path("signing.key"), "this node's Ed25519 key: secret")
    insecure_small_modulus: bool = _value(False, "true allows less than 2048 bits: tests only, breakable")

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

    modulus_bits: int = _value(
        DEFAULT_MODULUS_BITS,
        "made with custody aggregator: 3072 is 128-bit security, 2048 is 112-bit",
        **_MODULUS_LIMITS,
    )
    private_key: ConfigPath | None = _value(None, "with custody aggregator: the key pair, made at first start")

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

    share: ConfigPath | None = _value(None, "this party's share of the decryption key: secret")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> PartyKeys:
        self._check_files(info, "share")
        return self


class ClientKeys(Section):
    """What a scientist verifies artifacts with."""

    roster: ConfigPath | None = _value(None, "to verify the signature on results; null: not verified")

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ClientKeys:
        state = loading(info)
        state.require_file("keys.roster", self.roster)
        finish(info, state)
        return self


class Budget(Section):
    """A limit in rounds, in ε at a fixed δ, or both; at least one of them."""

    max_rounds: int | None = _value(None, "rounds, ever; null: no limit in rounds", ge=1)
    epsilon: float | None = _value(None, "ε at this δ, ever; null: no limit in ε", gt=0)
    delta: float = _value(1e-5, "the δ at which ε is measured", gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.max_rounds is None and self.epsilon is None:
            raise ValueError("must limit something: epsilon: null means no limit in ε, and then max_rounds is required")
        return self


class AggregatorPrivacy(Section):
    """The aggregator's rules about noise, and the federation's party-level budget."""

    noise_by: NoiseBy = _value("both", "who adds the party-level noise: both, parties or aggregator")
    colluders: int = _value(0, "corrupt parties that noise shares and thresholds must stand", ge=0)
    allow_plaintext_scheme: bool = _value(False, "true lets jobs ask for no encryption: tests, benchmarks")
    budget: Budget = _section("the party-level budget of this federation", max_rounds=200)


class PartyBudgets(Section):
    """A party's own two budgets; it refuses what either does not allow."""

    example: Budget = _section("for one row of this party's data, spent by DP-SGD", epsilon=4.0)
    party: Budget = _section("for this party as a whole, spent by every sum it contributes to", max_rounds=200)


class PartyPrivacy(Section):
    """A party's own view of collusion and its own budgets."""

    colluders: int = _value(0, "corrupt parties a plan must stand; one that stands fewer is refused", ge=0)
    budgets: PartyBudgets = _section("enforced here, whatever the aggregator says")


class PartyPolicy(Section):
    """What this party takes part in."""

    allow_plaintext_scheme: bool = _value(False, "true takes part in rounds without encryption")
    min_quorum: int = _value(2, "smallest number of updates in a sum that hides this party's", ge=2)
    min_parties_noise_multiplier: float = _value(0.0, "least multiplier of the noise that the parties draw", ge=0)
    disclose_epsilon: bool = _value(True, "tell the aggregator the ε spent here; it depends on no data")


class DatasetSection(Section):
    """The data that this party brings to a task."""

    declared_rows: int = Field(ge=1, description="a number of rows this party is willing to make public")
    options: dict[str, Option] = Field(default_factory=dict, description="passed to the task as they are")


class AggregatorLimits(Section):
    """What one caller may ask for."""

    max_update_bytes: int = _value(268_435_456, "of one upload", ge=1)
    max_message_bytes: int = _value(4_194_304, "of one gRPC message", ge=65_536, le=2**31 - 1)
    max_parties: int = _value(100, "enrolled, with or without a session", ge=1)
    max_jobs_pending: int = _value(100, "jobs that wait; another is refused", ge=1)
    max_rounds: int = _value(1000, "of one job", ge=1)
    max_round_timeout_s: float = _value(86_400, "longest round deadline a job may set", gt=0)


class PartyLimits(Section):
    """What the aggregator may ask of this party."""

    max_update_bytes: int = _value(268_435_456, "of a model, a contribution or what is to be opened", ge=1)
    max_message_bytes: int = _value(4_194_304, "of one gRPC message", ge=65_536, le=2**31 - 1)


class WorkersSection(Section):
    """Processes for CPU work."""

    count: int = _value(1, "worker processes", ge=1, le=256)
    nice: int = _value(10, "their lower priority", ge=0, le=19)

    @property
    def cores_each(self) -> int:
        """Cores that one worker may use for a large batch: this machine's, shared evenly; at least 1."""
        return max(1, (os.cpu_count() or 1) // self.count)


class LoggingSection(Section):
    """The log on stderr."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _value("INFO", "DEBUG, INFO, WARNING or ERROR")
    format: Literal["text", "json"] = _value("text", "text, or json: one object a line")


class _Document(Section):
    version: Literal[1] = Field(description="version of this file's format")
    federation: Name = Field(description="name of the federation, as in the certificates")


class _RoleDocument(_Document):
    state_dir: ConfigPath = _value(Path("state"), "database, blobs and what is made at first start")

    @property
    def blobs_dir(self) -> Path:
        """The content-addressed store."""
        return self.state_dir / "blobs"


class AggregatorConfig(_RoleDocument):
    """config/aggregator.yaml."""

    server: AggregatorServer = _section("where the parties and scientists reach the aggregator")
    keys: AggregatorKeys = _section("custody, keys and the roster")
    privacy: AggregatorPrivacy = _section("noise and the budget that cannot be overspent")
    limits: AggregatorLimits = _section("what one caller may ask for")
    workers: WorkersSection = _section("processes for CPU work", count=2)
    logging: LoggingSection = _section("the log on stderr")
    evaluation: dict[str, dict[str, Option]] = Field(
        default_factory=dict, description="public hold-out rows, by task: options of the task's load_holdout"
    )

    @property
    def database_path(self) -> Path:
        """Jobs, rounds, ledger, transcript."""
        return self.state_dir / "aggregator.sqlite"


class PartyConfig(_RoleDocument):
    """config/party.yaml."""

    name: PartyName = Field(description="of this party, as in its certificate")
    server: ClientServer = _section("how to reach the aggregator")
    keys: PartyKeys = _section("custody, keys and the roster")
    policy: PartyPolicy = _section("what this party takes part in")
    datasets: dict[str, DatasetSection] = Field(default_factory=dict, description="this party's data, by task")
    privacy: PartyPrivacy = _section("this party's own budgets")
    limits: PartyLimits = _section("what the aggregator may ask of this party")
    workers: WorkersSection = _section("processes for CPU work")
    logging: LoggingSection = _section("the log on stderr")

    @property
    def database_path(self) -> Path:
        """Assignments, rounds opened, updates kept, ledger."""
        return self.state_dir / "party.sqlite"


class ClientConfig(_Document):
    """client.yaml of a scientist or an operator."""

    role: Literal["scientist", "operator"] = _value("scientist", "used when insecure: who is calling")
    name: Name = _value("scientist", "used when insecure: else the certificate says it")
    server: ClientServer = _section("how to reach the aggregator")
    keys: ClientKeys = _section("what results are verified with")


def load_aggregator_config(path: Path, *, environ: Mapping[str, str] | None = None) -> AggregatorConfig:
    """The aggregator's configuration.

    Args:
        path: the YAML file.
        environ: where `SOTTO__SECTION__KEY` is looked up; the process's environment by default.

    Raises:
        ConfigError: every problem in `problems`.
    """
    return _load(AggregatorConfig, path, environ)


def load_party_config(path: Path, *, name: str | None = None, environ: Mapping[str, str] | None = None) -> PartyConfig:
    """A party's configuration.

    `{name}` in `state_dir` and in dataset options stands for the party's name; a dataset option that is "{index}"
    becomes the position of a one-letter name in the alphabet (a is 0). So one file serves several parties on one
    machine.

    Args:
        path: the YAML file.
        name: replaces the file's `name`.
        environ: as in `load_aggregator_config`.

    Raises:
        ConfigError: every problem in `problems`.
    """
    return _load(PartyConfig, path, environ, name=name)


def load_client_config(path: Path, *, environ: Mapping[str, str] | None = None) -> ClientConfig:
    """A scientist's or operator's configuration; raises ConfigError as `load_aggregator_config` does."""
    return _load(ClientConfig, path, environ)


def _load(model: type[Model], path: Path, environ: Mapping[str, str] | None, *, name: str | None = None) -> Model:
    path = path.expanduser().absolute()
    data = read_document(path)
    version = data.get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION or isinstance(version, bool):  # another version has other keys: no more is said
        raise unusable(path, [f"version: must be {CONFIG_VERSION}: this Sotto reads no other version of the file"])
    state = Loading(path.parent)
    data = override(data, model, environ=os.environ if environ is None else environ, state=state)
    if name is not None:
        data["name"] = name
    if model is PartyConfig:
        _fill_placeholders(data, state)
    if model in (AggregatorConfig, PartyConfig):
        _place_keys(data, party=model is PartyConfig)
    result = validate(model, data, state=state)
    if result is None:
        problems = [*state.problems, *(f"{where}: no such file: {file}" for where, file in state.missing)]
        if state.missing:
            problems.append(f"these files belong to a kit; kits are made by: {PROVISION_EXAMPLE}")
        raise unusable(path, problems)
    return result


def _fill_placeholders(data: dict[str, Any], state: Loading) -> None:
    """Replace {name} and {index}, in place; `data` is this load's own copy."""
    name = data.get("name")
    if not isinstance(name, str):
        return  # reported as a missing or wrong `name`
    if isinstance(data.get("state_dir"), str):
        data["state_dir"] = data["state_dir"].replace("{name}", name)
    for task, options in _dataset_options(data):
        for key, value in options.items():
            if value == "{index}":
                if not re.fullmatch(r"[a-z]", name):
                    where = f"datasets.{task}.options.{key}"
                    state.problems.append(f'{where}: "{{index}}" needs a one-letter name (a is 0); write the number')
                options[key] = ord(name[:1] or "a") - ord("a")
            elif isinstance(value, str):
                options[key] = value.replace("{name}", name)


def _dataset_options(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of every dataset, as far as the data has the right shape; validation reports the rest."""
    datasets = data.get("datasets")
    for task, dataset in datasets.items() if isinstance(datasets, dict) else ():
        options = dataset.get("options") if isinstance(dataset, dict) else None
        if isinstance(options, dict):
            yield task, options


def _place_keys(data: dict[str, Any], *, party: bool) -> None:
    """Say where key files are that the file does not place: in the kit, or with custody aggregator in the state."""
    keys = data.setdefault("keys", {})
    state_dir = data.get("state_dir", "state")
    if not isinstance(keys, dict) or not isinstance(state_dir, str):
        return  # reported as a wrong type
    if keys.get("custody", "threshold") == "aggregator":
        own = ["public_key.json", "signing.key"] if party else ["public_key.json", "signing.key", "private_key.json"]
        for name, file in zip(("public_key", "signing_key", "private_key"), own, strict=False):
            keys.setdefault(name, f"{state_dir}/{file}")
    else:
        keys.setdefault("roster", "roster.json")
        if party:
            keys.setdefault("share", "share.json")
