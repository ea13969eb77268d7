"""What the commands of `sotto budget` share: whose ledger a configuration names, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

if TYPE_CHECKING:
    from ..config import AggregatorConfig, PartyConfig
    from ..privacy.budget import Account, Limits
    from ..privacy.events import Unit
    from ..privacy.ledger import Entry
    from ..storage.location import Location
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
    str | None, typer.Option("--subject", help="Whose: dataset:, user:, federation:, party: or job:NAME.")
]

KINDS = ("dataset", "user", "federation", "party", "job")
"""Of subjects."""
SHOWN_KNOWN: Final = 10
"""Subjects that are named to whoever asked for one that is not known."""
MAKES_KNOWN: Final = "privacy.budgets.users or default_user_epsilon makes a user known"


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
    location: Location
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
    from ..config import ClientConfig, load_aggregator_config, load_party_config, role_of
    from ..config_budgets import limits_of
    from ..config_database import located
    from ..config_yaml import read_document
    from ..errors import ConfigError

    config: AggregatorConfig | PartyConfig
    document = read_document(path)
    if role_of(document) is ClientConfig:
        raise ConfigError(
            f"{path} is a scientist's or operator's configuration: budgets are shown at the aggregator, by its "
            "aggregator.yaml, or at a party, by its party.yaml"
        )
    if name is not None or "name" in document:
        config = load_party_config(path, name=name)
        role, history = f"party {config.name} of {config.federation}", "party"
    else:
        config = load_aggregator_config(path)
        role, history = f"aggregator of {config.federation}", "aggregator"
    location = located(config)
    key = config.keys.signing_key
    return Source(role, cast("History", history), location, limits_of(config), signing_key=key, config=config)


def _without_configuration(state_dir: Path | None) -> Source:
    from .train_ledger import DATABASE_FILE, DEFAULT_LIMITS, KEY_FILE, default_state_dir

    place = default_state_dir() if state_dir is None else state_dir
    role, key = f"sotto train in {place}", place / KEY_FILE
    return Source(role, "party", place / DATABASE_FILE, DEFAULT_LIMITS, signing_key=key, config=None)


def as_entered(source: Source, subject: str | None) -> str | None:
    """A subject as this ledger has it: a dataset that spends another's budget stands for that one, and without a
    configuration job:ID is the job of that ID of `sotto train`."""
    from .train_ledger import ledger_job_id

    kind, colon, name = (subject or "").partition(":")
    if kind == "dataset" and name in source.limits.datasets:
        return source.limits.datasets[name]
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
    return _unit(unit), _subject(subject, one=one)


def _unit(unit: str | None) -> Unit:
    from ..errors import InvalidInput
    from ..privacy.events import RELATIONS

    if unit not in RELATIONS:
        raise InvalidInput("--unit must be example or party", violations={"unit": "example or party"})
    return unit


def _subject(subject: str | None, *, one: bool = False) -> str:
    from ..errors import InvalidInput
    from ..privacy.budget import ANY

    kind, colon, rest = (subject or "").partition(":")
    if kind not in KINDS or not colon or not rest or (one and rest == ANY):
        shown = ", ".join(f"{each}:NAME" for each in KINDS)
        raise InvalidInput(f"--subject must be one of {shown}", violations={"subject": shown})
    return f"{kind}:{rest}"


# --- who is known -----------------------------------------------------------------------------------------------------


def asked_for(
    source: Source, entries: Sequence[Entry], *, unit: str | None, subject: str | None
) -> list[Account] | None:
    """The accounts that options narrow a view to: a subject's at each unit at which it is known; None for all.

    Args:
        unit, subject: as typed; None where nothing was.

    Raises:
        InvalidInput: a unit or kind that there is not; a subject that is known at none of the units.
    """
    from ..errors import InvalidInput
    from ..privacy.events import RELATIONS

    units = list(RELATIONS) if unit is None else [_unit(unit)]
    if subject is None:
        return None
    whose = _subject(subject)
    found: list[Account] = [(each, whose) for each in units if is_known(source, entries, (each, whose))]
    if not found:
        level = "" if unit is None else f" at {unit} level"
        raise InvalidInput(
            f"there is no subject {whose} here{level}: it has neither a limit nor an entry. "
            f"{_known(source, entries, units, whose)}",
            violations={"subject": "has neither a limit nor an entry"},
        )
    return found


def is_known(source: Source, entries: Sequence[Entry], account: Account) -> bool:
    """Whether there is a limit for it or an entry about it, or (a user) the configuration names them as an owner."""
    from ..config_budgets import enforced

    unit, subject = account
    kind, _, name = subject.partition(":")
    if any(entry.unit == unit and subject in _subjects(entry) for entry in entries):
        return True
    kinds = enforced(source.config).get(unit, {})
    if kind not in kinds:
        return False
    if kind == "user":
        return source.limits.knows(entries, account) or name in _owners(source)
    names = kinds[kind]
    return (names is None or name in names) and bool(source.limits.budgets(entries, account))


def _subjects(entry: Entry) -> list[str]:
    """All that an entry names. (A charge that names no parties may concern any; it makes none of them known.)"""
    named = {"user": entry.user, "job": entry.job_id}
    found = [entry.subject, *(f"{kind}:{name}" for kind, name in named.items() if name)]
    return [*found, *(f"party:{name}" for name in entry.parties)]


def _owners(source: Source) -> set[str]:
    from ..config import PartyConfig

    if not isinstance(source.config, PartyConfig):
        return set()
    return {dataset.user for dataset in source.config.datasets.values() if dataset.user is not None}


def _known(source: Source, entries: Sequence[Entry], units: Sequence[Unit], subject: str) -> str:
    """Who is known at these units, those of the subject's kind if there are any; of jobs the newest first."""
    from ..config_budgets import enforced
    from ..privacy.budget import any_of

    found: dict[str, None] = {}
    for entry in reversed(entries):
        if entry.unit in units:
            found |= dict.fromkeys(_subjects(entry))
    for unit in units:
        found |= dict.fromkeys(each for its, each in source.limits.rows if its == unit)
        for kind, names in enforced(source.config).get(unit, {}).items():
            found |= dict.fromkeys(f"{kind}:{name}" for name in sorted(names or ()))
        found |= dict.fromkeys(f"user:{name}" for name in sorted(_owners(source)) if unit == "example")
    everybody = [each for each in found if each != any_of(each)]
    alike = [each for each in everybody if any_of(each) == any_of(subject)] or everybody
    more = f" and {len(alike) - SHOWN_KNOWN} more" if len(alike) > SHOWN_KNOWN else ""
    known = f"Known: {', '.join(alike[:SHOWN_KNOWN])}{more}" if alike else "Nobody is known yet"
    by_file = source.config is not None and subject.startswith("user:") and "example" in units
    return f"{known}; {MAKES_KNOWN}" if by_file else known
