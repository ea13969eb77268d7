"""`sotto budget show`: a role's ledger, read beside the running role."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config import AggregatorConfig, PartyConfig
    from ..config_sections import Budget
    from ..privacy.events import Unit
    from ..privacy.ledger import Entry

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="What was spent of a privacy budget, and what is left.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One budget of one subject. `…_left` and `epsilon_limit` are None without a limit; `epsilon_spent` if infinite."""

    unit: str
    subject: str
    rounds_spent: int
    rounds_left: int | None
    epsilon_spent: float | None
    epsilon_left: float | None
    epsilon_limit: float | None
    delta: float
    entries: int


@app.callback()
def _group() -> None:
    """What was spent of a privacy budget, and what is left."""


@app.command()
def show(
    config: Annotated[Path, typer.Option("--config", "-c", help="aggregator.yaml or party.yaml.")],
    name: Annotated[str | None, typer.Option("--name", help="The party, where one file serves several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rounds and ε spent and left, from the role's own ledger, whose chain is verified first.

    Reads beside the running role and writes nothing.
    """
    role, head, count, rows = read(config, name=name)
    if as_json:
        body = {"role": role, "head": head, "entries": count, "budgets": [asdict(row) for row in rows]}
        typer.echo(json.dumps(body, ensure_ascii=False))
    else:
        _print_table(role, head, count, rows)


def read(path: Path, *, name: str | None = None) -> tuple[str, str, int, list[Row]]:
    """(whose ledger, its head, number of entries, one row for each budget).

    Raises:
        ConfigError: the file is no configuration of a role.
        NotFoundError: the role has no database yet.
        LedgerError: the ledger's chain is broken.
    """
    from sqlalchemy import MetaData

    from ..config import AggregatorConfig
    from ..config_yaml import read_document
    from ..storage.database import read_only
    from ..storage.ledger import LedgerStore
    from ..storage.location import database_location
    from ..storage.migrations import History, Migrations

    config = _load(path, party=name is not None or "name" in read_document(path), name=name)
    store = LedgerStore(MetaData())
    location = database_location(config.database_path, config.database.url, config.database.password_file)
    history: History = "aggregator" if isinstance(config, AggregatorConfig) else "party"
    with read_only(location, schema=Migrations(history)) as connection:
        head = store.verify(connection)
        entries = store.entries(connection)
    role, limits = _limits(config)
    rows = [row for unit, limit in limits.items() for row in _rows(entries, unit, limit)]
    return role, head, len(entries), rows


def _load(path: Path, *, party: bool, name: str | None) -> AggregatorConfig | PartyConfig:
    from ..config import load_aggregator_config, load_party_config

    return load_party_config(path, name=name) if party else load_aggregator_config(path)


def _limits(config: AggregatorConfig | PartyConfig) -> tuple[str, dict[Unit, Budget]]:
    """Who it is, and the limit at each unit."""
    from ..config import AggregatorConfig

    if isinstance(config, AggregatorConfig):
        return f"aggregator of {config.federation}", {"party": config.privacy.budget}
    budgets = config.privacy.budgets
    return f"party {config.name} of {config.federation}", {"example": budgets.example, "party": budgets.party}


def _rows(entries: list[Entry], unit: Unit, limit: Budget) -> list[Row]:
    """A row for each subject in the ledger; one without a subject where nothing was charged at this unit."""
    from ..privacy import budget

    subjects = list(dict.fromkeys(entry.subject for entry in entries if entry.unit == unit)) or ["-"]
    rows = []
    for subject in subjects:
        own = budget.Budget(
            unit=unit, subject=subject, max_rounds=limit.max_rounds, epsilon=limit.epsilon, delta=limit.delta
        )
        found = budget.balance(entries, own)
        rows.append(
            Row(
                unit=unit,
                subject=subject,
                rounds_spent=found.rounds_spent,
                rounds_left=found.rounds_left,
                epsilon_spent=found.epsilon_spent if math.isfinite(found.epsilon_spent) else None,
                epsilon_left=found.epsilon_left,
                epsilon_limit=limit.epsilon,
                delta=limit.delta,
                entries=sum(entry.unit == unit and entry.subject == subject for entry in entries),
            )
        )
    return rows


def _print_table(role: str, head: str, count: int, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Privacy budget, {role}", title_justify="left")
    for column in ("unit", "subject", "rounds spent", "rounds left", "ε spent", "ε left", "at δ", "entries"):
        table.add_column(column, justify="left" if column in {"unit", "subject"} else "right")
    for row in rows:
        table.add_row(
            row.unit,
            row.subject,
            str(row.rounds_spent),
            "no limit" if row.rounds_left is None else str(row.rounds_left),
            "∞" if row.epsilon_spent is None else f"{row.epsilon_spent:.4g}",
            "no limit" if row.epsilon_left is None else f"{row.epsilon_left:.4g}",
            f"{row.delta:g}",
            str(row.entries),
        )
    console = Console()
    console.print(table)
    console.print(f"{count} entries, chain verified, head {head}", soft_wrap=True, highlight=False)
