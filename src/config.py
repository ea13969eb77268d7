"""Configuration: three YAML files (aggregator, party, client) as frozen models.

A model is what is allowed; `load_aggregator_config`, `load_party_config` and `load_client_config` read a file, let
`SOTTO__SECTION__KEY` override it, resolve paths against the file's directory, and either return the model or raise one
`ConfigError` that lists every problem with its path. The sections are in `config_sections`.
"""

from __future__ import annotations

import os
import re
import stat
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, ValidationInfo, model_validator

from .config_reader import ConfigPath, Loading, Model, finish, loading, override, validate
from .config_sections import (
    MAX_OPTION_DEPTH,
    AggregatorKeys,
    AggregatorLimits,
    AggregatorPolicy,
    AggregatorPrivacy,
    AggregatorServer,
    ClientKeys,
    ClientServer,
    DatabaseSection,
    DatasetSection,
    JobsSection,
    LoggingSection,
    Name,
    Option,
    PartyKeys,
    PartyLimits,
    PartyName,
    PartyPolicy,
    PartyPrivacy,
    Section,
    WorkersSection,
    section,
    setting,
)
from .config_yaml import read_document, unusable
from .errors import ConfigError
from .files import expanded

CONFIG_VERSION: Final = 1


class _Document(Section):
    version: Literal[1] = Field(description="version of this file's format")
    federation: Name = Field(description="name of the federation, as in the certificates")


class _RoleDocument(_Document):
    _directory: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _note_directory(self, info: ValidationInfo) -> Self:
        self._directory = loading(info).base
        return self

    @property
    def directory(self) -> Path:
        """That of the file: relative paths start there, those in options of tasks too. Of a model that was built by
        hand, the working directory at that time."""
        return self._directory

    state_dir: ConfigPath = setting(Path("state"), "database, blobs and what is made at first start")
    database: DatabaseSection = section("jobs, rounds and the ledger; SQLite in state_dir unless said otherwise")

    @property
    def blobs_dir(self) -> Path:
        """The content-addressed store."""
        return self.state_dir / "blobs"

    @property
    @abstractmethod
    def _secret_files(self) -> tuple[Path | None, ...]: ...

    def exposed(self) -> list[str]:
        """A sentence for each secret file that others than its owner can read or change, by its mode (nothing without
        POSIX), and for a database that others can read on its way."""
        found = []
        for path in self._secret_files if os.name == "posix" else ():
            mode = stat.S_IMODE(path.stat().st_mode) if path is not None and path.is_file() else 0
            can = {"read": stat.S_IRGRP | stat.S_IROTH, "change": stat.S_IWGRP | stat.S_IWOTH}
            what = " and ".join(word for word, bits in can.items() if mode & bits)
            if what:
                found.append(f"{path} is secret, and others than its owner can {what} it (mode {mode:04o}): chmod 600")
        if self.database.url is not None and self.database.insecure_transport:
            found.append("INSECURE: database.insecure_transport: whoever is between can read and change the ledger")
        return found


class AggregatorConfig(_RoleDocument):
    """config/aggregator.yaml."""

    server: AggregatorServer = section("where the parties and scientists reach the aggregator")
    keys: AggregatorKeys = section("custody, keys and the roster")
    privacy: AggregatorPrivacy = section("noise and the budget that cannot be overspent")
    policy: AggregatorPolicy = section("whose jobs it takes")
    limits: AggregatorLimits = section("what one caller may ask for")
    jobs: JobsSection = section("how jobs are scheduled, tried again and ended")
    workers: WorkersSection = section("processes for CPU work")
    logging: LoggingSection = section("the log on stderr")
    evaluation: dict[str, dict[str, Option]] = Field(
        default_factory=dict,
        description="public hold-out rows, by task: options of its load_holdout; null leaves one to the job",
    )

    @property
    def database_path(self) -> Path:
        """Jobs, rounds, ledger, transcript."""
        return self.state_dir / "aggregator.sqlite"

    @property
    def _secret_files(self) -> tuple[Path | None, ...]:
        tls = self.server.tls.key if self.server.tls else None
        return (self.keys.signing_key, self.keys.private_key, tls, self.database.password_file)


class PartyConfig(_RoleDocument):
    """config/party.yaml."""

    name: PartyName = Field(description="of this party, as in its certificate")
    server: ClientServer = section("how to reach the aggregator")
    keys: PartyKeys = section("custody, keys and the roster")
    policy: PartyPolicy = section("what this party takes part in")
    datasets: dict[str, DatasetSection] = Field(default_factory=dict, description="this party's data, by task")
    privacy: PartyPrivacy = section("this party's own budgets")
    limits: PartyLimits = section("what the aggregator may ask of this party")
    workers: WorkersSection = section("processes for CPU work")
    logging: LoggingSection = section("the log on stderr")

    @model_validator(mode="after")
    def _check_shared(self, info: ValidationInfo) -> PartyConfig:
        state = loading(info)
        for name, dataset in self.datasets.items():
            other = self.datasets.get(dataset.budget_of or name)
            problem = ""
            if dataset.budget_of is not None and (other is None or other is dataset):
                others = ", ".join(sorted(set(self.datasets) - {name})) or "there is none"
                problem = f"must name another dataset of this file ({others})"
            elif dataset.budget_of is not None and other is not None and other.budget_of is not None:
                problem = f"must name a dataset with a budget of its own; {dataset.budget_of} spends another's"
            elif dataset.budget_of is not None and dataset.budget is not None:
                problem = f"must not stand beside a budget of its own: set that of {dataset.budget_of}"
            if problem:
                state.problems.append(f"datasets.{name}.budget_of: {problem}")
        finish(info, state)
        return self

    @property
    def database_path(self) -> Path:
        """Assignments, rounds opened, updates kept, ledger."""
        return self.state_dir / "party.sqlite"

    @property
    def _secret_files(self) -> tuple[Path | None, ...]:
        tls = self.server.tls.key if self.server.tls else None
        return (self.keys.signing_key, self.keys.share, tls, self.database.password_file)


class ClientConfig(_Document):
    """client.yaml of a scientist or an operator."""

    role: Literal["scientist", "operator"] = setting("scientist", "used when insecure: who is calling")
    name: Name = setting("scientist", "as in the certificate: who signs jobs and, when insecure, who is calling")
    server: ClientServer = section("how to reach the aggregator")
    keys: ClientKeys = section("what results are verified with, and jobs signed")


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
    path = expanded(path).absolute()
    data = read_document(path)
    version = data.get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION or isinstance(version, bool):  # another version has other keys: no more is said
        raise unusable(path, [f"version: must be {CONFIG_VERSION}: this Sotto reads no other version of the file"])
    found = role_of(data)
    if found not in (None, model):
        raise ConfigError(f"{path} is {_WHOSE[found]}: what is needed here is {_WHOSE[model]}")
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
        raise unusable(path, problems, advice=_KIT_ADVICE[model] if state.missing else "")
    return result


_WHOSE: Final[dict[Any, str]] = {
    AggregatorConfig: "an aggregator's configuration (aggregator.yaml)",
    PartyConfig: "a party's configuration (party.yaml)",
    ClientConfig: "a scientist's or operator's configuration (client.yaml)",
}
_KIT_ADVICE: Final[dict[Any, str]] = {  # not how kits are made: those of another making fit nobody's
    model: f"what is missing is in the kit that the federation's operator made for {whom}"
    for model, whom in ((AggregatorConfig, "the aggregator"), (PartyConfig, "this party"), (ClientConfig, "you"))
}


def role_of(data: Mapping[str, Any]) -> type[_Document] | None:
    """Whose configuration a document plainly is: it has keys that no other has, and none that only another has."""
    written = _paths(data)
    of_each = {model: _model_paths(model) for model in (AggregatorConfig, PartyConfig, ClientConfig)}
    found: list[type[_Document]] = []
    for model, paths in of_each.items():
        others = set().union(*(each for other, each in of_each.items() if other is not model))
        if written & (paths - others):
            found.append(model)
    return found[0] if len(found) == 1 else None


def _paths(data: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """Keys of the first two levels."""
    inner = {(key, name) for key, value in data.items() if isinstance(value, dict) for name in value}
    return {(key,) for key in data} | inner


def _model_paths(model: type[BaseModel]) -> set[tuple[str, ...]]:
    sections = {name: field.annotation for name, field in model.model_fields.items()}
    inner = {
        (name, key)
        for name, kind in sections.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for key in kind.model_fields
    }
    return {(name,) for name in sections} | inner


def _fill_placeholders(data: dict[str, Any], state: Loading) -> None:
    """Replace {name} and {index}, in place; `data` is this load's own copy."""
    name = data.get("name")
    if not isinstance(name, str):
        return  # reported as a missing or wrong `name`
    if isinstance(data.get("state_dir"), str):
        data["state_dir"] = data["state_dir"].replace("{name}", name)
    for task, options in _dataset_options(data):
        for key, value in options.items():
            options[key] = _filled(value, name, where=f"datasets.{task}.options.{key}", state=state)


def _filled(value: object, name: str, *, where: str, state: Loading, depth: int = MAX_OPTION_DEPTH) -> object:
    """An option with its placeholders replaced, in lists and mappings too."""
    if isinstance(value, list | dict) and depth > 0:
        inner = list(enumerate(value)) if isinstance(value, list) else list(value.items())
        filled = [
            (key, _filled(each, name, where=f"{where}.{key}", state=state, depth=depth - 1)) for key, each in inner
        ]
        return [each for _, each in filled] if isinstance(value, list) else dict(filled)
    if value == "{index}":
        if not re.fullmatch(r"[a-z]", name):
            state.problems.append(f'{where}: "{{index}}" needs a one-letter name (a is 0); write the number')
        return ord(name[:1] or "a") - ord("a")
    return value.replace("{name}", name) if isinstance(value, str) else value


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
