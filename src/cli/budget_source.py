"""What the commands of `sotto budget` share: whose ledger a configuration names, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from sqlalchemy import URL

    from ..config import AggregatorConfig, PartyConfig
    from ..privacy.budget import Account, Limits
    from ..privacy.ledger import Entry
    from ..storage.migrations import History

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="aggregator.yaml or party.yaml; without it, the ledger of --state-dir."),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir", help="Of `sotto train` without a configuration; by default where it keeps the user's own ledger."
    ),
]
PartyName = Annotated[str | None, typer.Option("--name", help="The party, where one file serves several.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
UnitOption = Annotated[str | None, typer.Option("--unit", help="example or party.")]
SubjectOption = Annotated[
    str | None, typer.Option("--subject", help="Whose: dataset:NAME, user:NAME, federation:NAME, job:ID.")
]

KINDS = ("dataset", "user", "federation", "party", "job")
"""Of subjects."""


@dataclass(frozen=True, slots=True)
class Source:
    """A role's ledger.

    Attributes:
        role: whose it is, for people.
        history, location: of the database.
        limits: what the configuration allows, or what holds without one.
        signing_key: the file with the key that signs the ledger.
        config: None where `sotto train` keeps it without one.
    """

    role: str
    history: History
    location: Path | str | URL
    limits: Limits
    signing_key: Path
    config: AggregatorConfig | PartyConfig | None


def load(path: Path | None, *, name: str | None = None, state_dir: Path | None = None) -> Source:
    """The role that a configuration describes, or `sotto train` on this node where there is none.

    Args:
        path: of the configuration; None for none.
        name: the party, where one file serves several.
        state_dir: where `sotto train` keeps its ledger without a configuration; None for where it does by default.

    Raises:
        ConfigError: the file is no configuration of a role.
        InvalidInput: options that do not go together.
    """
    from ..errors import InvalidInput

    if path is None and name is not None:
        raise InvalidInput("--name says which party of a configuration: it needs --config")
    if path is not None and state_dir is not None:
        raise InvalidInput("a ledger is that of --config or that of --state-dir, not of both")
    return _without_configuration(state_dir) if path is None else _configured(path, name=name)


def _configured(path: Path, *, name: str | None) -> Source:
    from ..config import load_aggregator_config, load_party_config
    from ..config_budgets import limits_of
    from ..config_yaml import read_document
    from ..storage.location import database_location

    config: AggregatorConfig | PartyConfig
    if name is not None or "name" in read_document(path):
        config = load_party_config(path, name=name)
        role, history = f"party {config.name} of {config.federation}", "party"
    else:
        config = load_aggregator_config(path)
        role, history = f"aggregator of {config.federation}", "aggregator"
    location = database_location(config.database_path, config.database.url, config.database.password_file)
    key = config.keys.signing_key
    return Source(role, cast("History", history), location, limits_of(config), signing_key=key, config=config)


def _without_configuration(state_dir: Path | None) -> Source:
    from .train_ledger import DATABASE_FILE, DEFAULT_LIMITS, KEY_FILE, default_state_dir

    place = default_state_dir() if state_dir is None else state_dir
    role, key = f"sotto train in {place}", place / KEY_FILE
    return Source(role, "party", place / DATABASE_FILE, DEFAULT_LIMITS, signing_key=key, config=None)


def as_entered(source: Source, subject: str | None) -> str | None:
    """A subject as this ledger has it: without a configuration job:ID is the job of that ID of `sotto train`."""
    from .train_ledger import ledger_job_id

    kind, colon, name = (subject or "").partition(":")
    if source.config is not None or kind != "job" or not colon or "/" in name or name in ("", "*"):
        return subject
    return f"job:{ledger_job_id(name)}"


def read_entries(source: Source) -> list[Entry]:
    """The whole ledger, its chain verified; read beside the running role, nothing is written.

    Raises:
        NotFoundError: the role has no database yet.
        LedgerError: the chain is broken; names the first bad entry.
    """
    from sqlalchemy import MetaData

    from ..errors import NotFoundError
    from ..storage.database import read_only
    from ..storage.ledger import LedgerStore
    from ..storage.migrations import Migrations

    try:
        with read_only(source.location, schema=Migrations(source.history)) as connection:
            return LedgerStore(MetaData()).entries(connection)
    except NotFoundError as error:
        if source.config is not None:
            raise
        text = f"{error.message}: `sotto train` has charged nothing there; a role's ledger is named by --config"
        raise NotFoundError(text) from error


def head_of(entries: list[Entry]) -> str:
    """The digest of the last entry."""
    from ..privacy.ledger import GENESIS

    return entries[-1].digest if entries else GENESIS


def verify_key_of(source: Source) -> bytes | None:
    """The key that signs this ledger: by the kit's roster, or else this node's own; None where there is neither."""
    from ..config import PartyConfig
    from ..protocol.roster import AGGREGATOR, load_roster
    from ..protocol.signing import SigningKey

    config = source.config
    if config is not None and config.keys.roster is not None:
        _, roster = load_roster(config.keys.roster)
        return roster.verify_key(config.name if isinstance(config, PartyConfig) else AGGREGATOR)
    return SigningKey.load(source.signing_key).verify_key if source.signing_key.is_file() else None


def account_of(unit: str | None, subject: str | None, *, one: bool = False) -> Account:
    """Unit and subject as they were typed.

    Args:
        one: a subject that stands for all of its kind will not do.

    Raises:
        InvalidInput: neither unit nor subject is one.
    """
    from ..errors import InvalidInput
    from ..privacy.budget import ANY
    from ..privacy.events import RELATIONS

    kind, colon, rest = (subject or "").partition(":")
    if unit not in RELATIONS:
        raise InvalidInput("--unit must be example or party", violations={"unit": "example or party"})
    if kind not in KINDS or not colon or not rest or (one and rest == ANY):
        shown = ", ".join(f"{each}:NAME" for each in KINDS)
        raise InvalidInput(f"--subject must be one of {shown}", violations={"subject": shown})
    return unit, f"{kind}:{rest}"
