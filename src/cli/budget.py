"""`sotto budget`: a role's ledger and budgets. Here `show`; the others are in `budget_ledger` and `budget_change`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..text import printable
from . import budget_change, budget_ledger
from .budget_source import (
    MAKES_KNOWN,
    AsJson,
    ConfigFile,
    PartyName,
    StateDir,
    SubjectOption,
    UnitOption,
    as_entered,
    asked_for,
    head_of,
    load,
    read_entries,
)
from .plain import columns
from .prose import assuming, counted, prose, say, warn
from .screen import echo, echo_json

if TYPE_CHECKING:
    from ..privacy.accounting import Estimate
    from ..privacy.budget import Account, Budget, Ledger, Limits
    from ..privacy.events import Event, Unit
    from ..privacy.ledger import Entry, Limit
    from ..privacy.standing import Standing
    from .budget_source import Source

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="What was spent of a privacy budget, and what is left.",
)

ABOVE_LEFT: Final = (
    "ε does not add up: a request is composed with what was spent, and may fit although it is above ε left"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One budget of one subject.

    `…_left` and `…_limit` are None without a limit, ε is None where it is infinite. `…_ever` counts over all accounting
    periods; `epsilon_at` is the ε spent at the δ that was asked for, converted from the mechanisms. `against` is from
    whom `epsilon_spent` (and `epsilon_at`) protects, `assumption` what it rests on; the same events against the
    aggregator, and if all others collude, are beside it; so they are for all periods together. `estimates` are None
    unless they were asked for. `sources` are all limits that hold, by who says so.
    """

    unit: Unit
    subject: str
    rounds_spent: int
    rounds_left: int | None
    rounds_limit: int | None
    epsilon_spent: float | None
    epsilon_left: float | None
    epsilon_limit: float | None
    delta: float
    entries: int
    periods: int
    rounds_ever: int
    epsilon_ever: float | None
    assumption_ever: str
    epsilon_ever_if_all_others_collude: float | None
    epsilon_at: float | None
    epsilon_at_if_all_others_collude: float | None
    against: str
    assumption: str
    epsilon_against_aggregator: float | None
    assumption_against_aggregator: str
    epsilon_if_all_others_collude: float | None
    estimates: list[Estimate] | None
    sources: dict[str, Limit]


@app.callback()
def _group() -> None:
    """What was spent of a privacy budget, and what is left."""


@app.command()
def show(
    config: ConfigFile = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    unit: UnitOption = None,
    subject: SubjectOption = None,
    delta: Annotated[float | None, typer.Option(help="Also say the ε spent at this δ.")] = None,
    estimates: Annotated[
        bool, typer.Option("--estimates", help="Also say what other accountants make of it, and what that is worth.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rounds and ε spent and left, from the role's own ledger, whose chain is verified first.

    Reads beside the running role and writes nothing. A job's quota is shown when it is asked for: --subject job:ID.
    """
    from ..privacy.in_force import in_force

    source = load(config, name=name, state_dir=state_dir)
    subject = as_entered(source, subject)
    role, entries, rows, warnings = read(source, unit=unit, subject=subject, delta=delta, estimates=estimates)
    if as_json:
        body = {
            "role": role,
            "head": head_of(entries),
            "entries": len(entries),
            "budgets": [asdict(row) for row in rows],
            "delta": delta,
            "warnings": warnings,
        }
        echo_json(body)
        return
    _print_table(role, rows, delta=delta)
    accounts: list[Account] = [*dict.fromkeys((row.unit, row.subject) for row in rows)]
    for account in accounts:
        say(f"in force for {in_force(source.limits, entries, account)}", hang="    ")
    if strangers := [account[1] for account in accounts if _is_stranger(source.limits, entries, account)]:
        say(f"{', '.join(strangers)}: refused, as not known here ({MAKES_KNOWN})")
    if subject is not None:
        for line in dict.fromkeys(_never_entered(source.limits, row) for row in rows if not row.entries):
            say(line)
    say(f"{counted(len(entries), 'entry', 'entries')}, chain verified, head {head_of(entries)}")
    for warning in warnings:
        warn(warning)


def read(
    source: Source,
    *,
    unit: str | None = None,
    subject: str | None = None,
    delta: float | None = None,
    estimates: bool = False,
) -> tuple[str, list[Entry], list[Row], list[str]]:
    """(whose ledger, its entries, one row for each budget, warnings).

    Raises:
        InvalidInput: a δ out of range, a unit that there is not, or a subject that nobody knows here.
        NotFoundError: the role has no database yet.
        LedgerError: the ledger's chain is broken.
    """
    from ..errors import InvalidInput
    from ..privacy.standing import standing_of
    from ..storage.books import difference

    if delta is not None and not 0.0 < delta < 1.0:
        raise InvalidInput("--delta must lie strictly between 0 and 1", violations={"delta": "in (0, 1)"})
    entries = read_entries(source)
    standing = standing_of(entries)
    asked = asked_for(source, entries, unit=unit, subject=subject)
    if asked is None:
        asked = [account for account in _accounts(source.limits, entries, standing) if unit in (None, account[0])]
    rows = [
        replace(
            _row(entries, budget, standing=standing, delta=delta, estimates=estimates),
            sources=source.limits.sources(standing, account),
        )
        for account in asked
        for budget in _in_force(source.limits, standing, account)
    ]
    differ = source.limits.differences(standing)
    warnings = [difference(each, *both, key=source.limits.key(each)) for each, both in differ.items()]
    return source.role, entries, rows, [*warnings, *_cautions(source, standing, asked)]


def _cautions(source: Source, standing: Standing, asked: Sequence[Account]) -> list[str]:
    """What a start would warn of: rows whose ε nothing limits, limits without effect, datasets that share no budget."""
    from ..config import PartyConfig
    from ..config_budgets import apart
    from ..privacy.in_force import without_effect, without_epsilon

    kind = "user:" if source.config is None else "dataset:"
    of_rows = [account for account in asked if account[1].startswith(kind)]
    shared = apart(source.config) if isinstance(source.config, PartyConfig) else []
    return [*without_epsilon(source.limits, standing, of_rows), *without_effect(source.limits), *shared]


def _accounts(limits: Limits, entries: list[Entry], standing: Standing) -> Iterator[Account]:
    """Every account that has a limit of its own or an entry, and that of every dataset of the configuration; "kind:*"
    only where it stands for datasets not seen yet.

    Those at example level first.
    """
    from ..privacy.budget import any_of

    seen: dict[Account, None] = dict.fromkeys(limits.rows)
    seen |= dict.fromkeys(limits.dataset(name) for name in limits.datasets)
    for entry in entries:
        seen[entry.unit, entry.subject] = None
        if entry.user:
            seen[entry.unit, f"user:{entry.user}"] = None
    seen |= dict.fromkeys(limits.invited(standing))
    single = [account for account in seen if account[1] != any_of(account[1])]
    if not any(account[1].startswith("dataset:") for account in single):
        single += [account for account in seen if account[1] == "dataset:*"]
    yield from sorted(single, key=lambda account: account[0])


def _in_force(limits: Limits, standing: Standing, account: Account) -> tuple[Budget, ...]:
    """The account's budgets; one without limits where there is none any more, and of a user who is not known, whom
    everything is refused, one that allows nothing."""
    from ..privacy.budget import Budget
    from ..privacy.entries import Limit

    stranger = _is_stranger(limits, standing, account)
    found = limits.budgets(standing, account)
    if found and not stranger:
        return found
    delta = next((limit.delta for (unit, _), limit in limits.rows.items() if unit == account[0]), 1e-5)
    rounds, epsilon = (0, 0.0) if stranger else (None, None)
    return (Budget.of(account, Limit(max_rounds=rounds, epsilon=epsilon, delta=delta), against=limits.against),)


def _row(entries: list[Entry], budget: Budget, *, standing: Standing, delta: float | None, estimates: bool) -> Row:
    from ..privacy.budget import balance, concerns
    from ..privacy.figures import figures
    from ..protocol.canonical import finite

    account = (budget.unit, budget.subject)
    found = balance(standing, budget)
    periods = standing.periods(account)
    ever = balance(standing, budget, ever=True) if periods > 1 else found
    ask = partial(figures, unit=budget.unit, delta=budget.delta, counts=budget.against)
    charged, aggregator, others = ask(found.events)
    charged_ever, _, others_ever = ask(ever.events)
    others_at = None if delta is None else figures(found.events, unit=budget.unit, delta=delta)[2]
    return Row(
        unit=budget.unit,
        subject=budget.subject,
        rounds_spent=found.rounds_spent,
        rounds_left=found.rounds_left,
        rounds_limit=budget.max_rounds,
        epsilon_spent=finite(found.epsilon_spent),
        epsilon_left=found.epsilon_left,
        epsilon_limit=budget.epsilon,
        delta=budget.delta,
        entries=sum(concerns(entry, account) for entry in entries),
        periods=periods,
        rounds_ever=ever.rounds_spent,
        epsilon_ever=finite(ever.epsilon_spent),
        assumption_ever=charged_ever.assumes,
        epsilon_ever_if_all_others_collude=finite(others_ever.epsilon),
        epsilon_at=None if delta is None else finite(replace(budget, delta=delta).cost(found.events)),
        epsilon_at_if_all_others_collude=None if others_at is None else finite(others_at.epsilon),
        against=charged.against,
        assumption=charged.assumes,
        epsilon_against_aggregator=finite(aggregator.epsilon),
        assumption_against_aggregator=aggregator.assumes,
        epsilon_if_all_others_collude=finite(others.epsilon),
        estimates=_estimates(budget.counted(found.events), budget.delta) if estimates else None,
        sources={},
    )


def _estimates(events: Sequence[Event], delta: float) -> list[Estimate]:
    from ..privacy.accounting import epsilon_estimates
    from ..protocol.canonical import finite

    found = epsilon_estimates(events, delta=delta)
    return [replace(each, epsilon=finite(each.epsilon)) for each in found]


def _print_table(role: str, rows: list[Row], *, delta: float | None) -> None:
    header = ("unit", "subject", "rounds spent", "rounds left", "ε spent", "ε left", "at δ", "entries")
    cells = [
        (
            row.unit,
            printable(row.subject),
            str(row.rounds_spent),
            "no limit" if row.rounds_left is None else str(row.rounds_left),
            _epsilon(row.epsilon_spent),
            "no limit" if row.epsilon_left is None else f"{row.epsilon_left:.4g}",
            f"{row.delta:g}",
            str(row.entries),
        )
        for row in rows
    ]
    echo(f"Privacy budget, {role}")
    echo(columns(header, cells, right=header[2:]).split("\n"), styled=True)
    if any(row.epsilon_left and row.epsilon_spent for row in rows):
        say(ABOVE_LEFT)
    echo([*_what_they_say(rows), *(line for row in rows for line in _further(row, delta=delta))])


def _is_stranger(limits: Limits, ledger: Ledger, account: Account) -> bool:
    """A user who is not known here, to whom everything is refused."""
    return account[1].startswith("user:") and not limits.knows(ledger, account)


def _never_entered(limits: Limits, row: Row) -> str:
    """Of a subject that was asked for by name: perhaps it is not the name that was meant."""
    from ..privacy.budget import any_of

    of_all = any_of(row.subject)
    rows = {subject for unit, subject in limits.rows if unit == row.unit}
    whose = f"; its limit is that of {of_all}" if of_all in rows and row.subject not in rows else ""
    return f"{row.subject} ({row.unit} level): no entry of this ledger names it so far{whose}"


def _further(row: Row, *, delta: float | None) -> Iterator[str]:
    """What was asked for at another δ, and what there was before a reset."""
    if delta is not None:
        at = f"ε {_epsilon(row.epsilon_at)} at δ {delta:g}"
        others = f"if all others collude ε {_epsilon(row.epsilon_at_if_all_others_collude)}"
        whose = f"{row.subject} ({row.unit} level)"
        text = f"{whose}: {at}, converted from the mechanisms under the same assumption; {others}"
        yield from prose(text, hang="    ")
    if row.periods > 1:
        others = f"if all others collude ε {_epsilon(row.epsilon_ever_if_all_others_collude)}"
        yield from prose(
            f"{row.subject}: accounting period {row.periods}; over all periods {counted(row.rounds_ever, 'round')} and "
            f"ε {_epsilon(row.epsilon_ever)} at δ {row.delta:g}, which is what it has been exposed to; {others}",
            hang="    ",
        )
        yield from assuming("assumes", row.assumption_ever)


def _what_they_say(rows: list[Row]) -> Iterator[str]:
    """Of each budget that has spent anything its `_figures`; said once for all that have the same."""
    said: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in rows:
        if row.rounds_spent:
            said.setdefault((_spent(row), tuple(_figures(row))), []).append(f"{row.subject} ({row.unit} level)")
    for (spent, others), subjects in said.items():
        yield from prose(f"{', '.join(subjects)}: {spent}", hang="    ")
        yield from others


def _spent(row: Row) -> str:
    """The ε spent, and from whom it protects."""
    from ..privacy.accounting import MEANINGLESS_EPSILON

    spent = row.epsilon_spent
    worth = f": no meaningful {row.unit}-level guarantee" if spent is None or spent > MEANINGLESS_EPSILON else ""
    return f"ε {_epsilon(spent)} at δ {row.delta:g} counts against {row.against}{worth}"


def _figures(row: Row) -> Iterator[str]:
    """What it rests on, and what is left against others."""
    yield from assuming("assumes", row.assumption)
    against = f"against the aggregator ε {_epsilon(row.epsilon_against_aggregator)}"
    others = f"if all others collude ε {_epsilon(row.epsilon_if_all_others_collude)}"
    yield from prose(f"{against}; {others}", indent="  ", hang="    ")
    if row.assumption_against_aggregator != row.assumption:
        yield from assuming("against the aggregator assumes", row.assumption_against_aggregator)
    for each in row.estimates or ():
        value = "" if each.standing == "skipped" else f"ε {_epsilon(each.epsilon)}, "
        yield from prose(f"{each.accountant}: {value}{each.standing} ({each.note})", indent="  ", hang="    ")


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"


for command in (budget_ledger.history, budget_ledger.export, budget_ledger.verify):
    app.command()(command)
app.command("set")(budget_change.set_)
app.command()(budget_change.reset)
