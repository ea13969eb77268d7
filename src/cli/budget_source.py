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

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="aggregator.yaml or party.yaml.")]
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
    """A role's ledger: whose it is, where it lies, and what its configuration allows."""

    config: AggregatorConfig | PartyConfig
    role: str
    history: History
    location: Path | str | URL
    limits: Limits


def load(path: Path, *, name: str | None = None) -> Source:
    """The role that a configuration describes.

    Raises:
        ConfigError: the file is no configuration of a role.
    """
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
    return Source(config, role, cast("History", history), location, limits_of(config))


def read_entries(source: Source) -> list[Entry]:
    """The whole ledger, its chain verified; read beside the running role, nothing is written.

    Raises:
        NotFoundError: the role has no database yet.
        LedgerError: the chain is broken; names the first bad entry.
    """
    from sqlalchemy import MetaData

    from ..storage.database import read_only
    from ..storage.ledger import LedgerStore
    from ..storage.migrations import Migrations

    with read_only(source.location, schema=Migrations(source.history)) as connection:
        return LedgerStore(MetaData()).entries(connection)


def head_of(entries: list[Entry]) -> str:
    """The digest of the last entry."""
    from ..privacy.ledger import GENESIS

    return entries[-1].digest if entries else GENESIS


def verify_key_of(source: Source) -> bytes | None:
    """The key that signs this ledger: by the kit's roster, or else this role's own; None where there is neither."""
    from ..config import PartyConfig
    from ..protocol.roster import AGGREGATOR, load_roster
    from ..protocol.signing import SigningKey

    config, keys = source.config, source.config.keys
    if keys.roster is not None:
        _, roster = load_roster(keys.roster)
        return roster.verify_key(config.name if isinstance(config, PartyConfig) else AGGREGATOR)
    return SigningKey.load(keys.signing_key).verify_key if keys.signing_key.is_file() else None


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
