"""`sotto budget set | reset`: changes of a budget by its operator, each an entry with a reason in the ledger."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .budget_ledger import HANG, as_object, describe
from .budget_source import (
    SHOWN_KNOWN,
    AsJson,
    ConfigFile,
    PartyName,
    StateDir,
    account_of,
    as_entered,
    asked_for,
    is_known,
    load,
    read_entries,
)
from .plain import real
from .prose import counted, say, warn
from .screen import echo_json

if TYPE_CHECKING:
    from ..config import AggregatorConfig, PartyConfig
    from ..privacy.budget import Account, Budget, Limits
    from ..privacy.ledger import Action, Entry, Limit
    from .budget_source import Source

Reason = Annotated[str, typer.Option("--reason", help="Why: it stays in the ledger, for everybody who reads it.")]

UnitOption = Annotated[str | None, typer.Option("--unit", help="example or party.  [required]")]
SubjectOption = Annotated[
    str | None,
    typer.Option("--subject", help="Whose: dataset:, user:, federation:, party: or job:NAME.  [required]"),
]
"""Checked here, not by the parser: what is missing is answered with the accounts that there are."""

NO_LIMIT: Final = "none"
DEFAULT_DELTA: Final = 1e-5
"""Where neither ledger nor configuration names one: what a budget has by default."""


def set_(
    reason: Reason,
    config: ConfigFile = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    unit: UnitOption = None,
    subject: SubjectOption = None,
    epsilon: Annotated[str | None, typer.Option(help='ε, or "none" for no limit in ε.')] = None,
    max_rounds: Annotated[str | None, typer.Option(help='Rounds, or "none" for no limit in rounds.')] = None,
    delta: Annotated[float | None, typer.Option(help="The δ at which ε is measured.")] = None,
    as_json: AsJson = False,
) -> None:
    """Enter a budget into the ledger, which is the only way to raise one. The role must be stopped meanwhile.

    Without --epsilon, --max-rounds and --delta the configuration's value is entered. What is not said stays as it was.
    Where configuration and ledger differ afterwards, the smaller of both counts; without a configuration the ledger.
    """
    source = load(config, name=name, state_dir=state_dir)
    account = _account(source, unit, subject)
    check_enforced(source.config, account)
    given = {"epsilon": epsilon, "max_rounds": max_rounds, "delta": delta}

    def choose(entries: list[Entry]) -> Limit:
        return chosen(source.limits, entries, account, given=given)

    entry, entries = _correct(source, account, action="set", choose=choose, reason=reason)
    _report(source, account, entry=entry, entries=entries, as_json=as_json)


def reset(
    reason: Reason,
    config: ConfigFile = None,
    name: PartyName = None,
    state_dir: StateDir = None,
    unit: UnitOption = None,
    subject: SubjectOption = None,
    as_json: AsJson = False,
) -> None:
    """Begin a new accounting period: what was released before counts no longer. The role must be stopped meanwhile.

    What is reserved or final, and not yet released, counts on: it may still be shown. The history stays in the ledger,
    and the limit as it is. Whoever's data it is has been exposed to all periods together: that figure is shown from now
    on beside the new one.
    """
    source = load(config, name=name, state_dir=state_dir)
    account = _account(source, unit, subject, one=True)
    check_enforced(source.config, account)
    entry, entries = _correct(source, account, action="reset", choose=lambda _: None, reason=reason)
    _report(source, account, entry=entry, entries=entries, as_json=as_json)


def _account(source: Source, unit: str | None, subject: str | None, *, one: bool = False) -> Account:
    """Raises InvalidInput as `account_of`, and where unit or subject is missing, with the accounts that there are."""
    from ..config_budgets import enforced
    from ..errors import InvalidInput

    if unit is not None and subject is not None:
        return account_of(unit, as_entered(source, subject), one=one)
    options = []
    for each, kinds in enforced(source.config).items():
        names = [f"{kind}:{name}" for kind, known in kinds.items() for name in _names(known, one=one)]
        more = f" and {len(names) - SHOWN_KNOWN} more" if len(names) > SHOWN_KNOWN else ""
        options.append(f"--unit {each} --subject {', '.join(names[:SHOWN_KNOWN])}{more}")
    missing = {"unit": unit, "subject": subject}
    raise InvalidInput(
        f"both --unit and --subject are needed. What there is: {'; '.join(options)}",
        violations={name: "needed" for name, value in missing.items() if value is None},
    )


def _names(known: frozenset[str] | None, *, one: bool) -> list[str]:
    """Of a kind's subjects; NAME for any."""
    from ..privacy.budget import ANY

    return ["NAME"] if known is None else sorted(known - {ANY} if one else known)


def check_enforced(config: AggregatorConfig | PartyConfig | None, account: Account) -> None:
    """Raise InvalidInput for an account on which the role of this configuration never counts anything."""
    from ..config_budgets import enforced
    from ..errors import InvalidInput

    unit, subject = account
    kind, _, name = subject.partition(":")
    kinds = enforced(config)
    if kind not in kinds.get(unit, {}):
        here = "; ".join(f"--unit {each} --subject {'|'.join(found)}:…" for each, found in kinds.items())
        raise InvalidInput(
            f"nothing is counted here on {kind} at {unit} level: such a budget would bind nobody. What is: {here}",
            violations={"subject": here},
        )
    known = kinds[unit][kind]
    if known is not None and name not in known:
        raise InvalidInput(
            f"there is no {kind} {name!r} here: such a budget would bind nobody. What is: {', '.join(sorted(known))}",
            violations={"subject": f"a {kind} of the configuration"},
        )


def chosen(limits: Limits, entries: list[Entry], account: Account, *, given: dict[str, Any]) -> Limit:
    """The limit that the options ask for.

    Raises:
        InvalidInput: an option is out of range, nothing is limited, or no option is given and the configuration says
            nothing.
    """
    from ..errors import InvalidInput
    from ..privacy.budget import entered
    from ..privacy.ledger import Limit

    configured = limits.configured(account)
    if all(value is None for value in given.values()):
        if configured is None:
            raise InvalidInput(
                f"the configuration sets no budget for {account[1]} at {account[0]} level: "
                "say --epsilon or --max-rounds"
            )
        return configured
    known = entered(entries, account) or configured or Limit(max_rounds=None, epsilon=None, delta=DEFAULT_DELTA)
    values = asdict(known)
    for option, text in given.items():
        if text is not None:
            values[option] = _number(option, text)
    if values["max_rounds"] is None and values["epsilon"] is None:
        raise InvalidInput("a budget must limit something: --epsilon, --max-rounds or both")
    return Limit(**values)


def _number(option: str, text: str | float) -> float | int | None:
    from ..errors import InvalidInput

    if isinstance(text, float):
        return text
    if text.strip().lower() == NO_LIMIT:
        return None
    try:
        return int(text) if option == "max_rounds" else float(text)
    except ValueError:
        name = option.replace("_", "-")
        raise InvalidInput(f'--{name} must be a number or "none"', violations={option: "a number"}) from None


def _correct(
    source: Source, account: Account, *, action: Action, choose: Any, reason: str
) -> tuple[Entry, list[Entry]]:
    """Enter a correction, signed by the role's key, with the role's database locked.

    Raises:
        ConflictError: the role is running.
        InvalidInput: no reason, a reset of what has neither limit nor entry, or what `choose` raises.
        NotFoundError: the role has never run, or has no key.
        LedgerError: the ledger is broken.
    """
    from ..errors import InvalidInput, NotFoundError

    if not reason.strip():
        raise InvalidInput("a change of a budget needs a reason", violations={"reason": "must not be empty"})
    if not source.signing_key.is_file():
        raise NotFoundError("this role has no signing key yet: it has never run", private="keys.signing_key")
    entries = read_entries(source)  # a database that is not there is not made here
    if action == "reset":
        asked_for(source, entries, unit=account[0], subject=account[1])
    return asyncio.run(_write(source, account, action=action, choose=choose, reason=reason))


async def _write(
    source: Source, account: Account, *, action: Action, choose: Any, reason: str
) -> tuple[Entry, list[Entry]]:
    from sqlalchemy import Connection, MetaData

    from ..errors import ConflictError
    from ..jobs.states import utc
    from ..protocol.ledger import EntrySigner
    from ..protocol.signing import SigningKey
    from ..storage.books import Books
    from ..storage.database import Database
    from ..storage.ledger import LedgerStore
    from ..storage.migrations import Migrations

    store = LedgerStore(MetaData(), signer=EntrySigner(SigningKey.load(source.signing_key)))
    books = Books(store, source.limits)

    def work(connection: Connection) -> tuple[Entry, list[Entry]]:
        at = utc(time.time())
        books.open(connection, at=at)
        limit = choose(store.entries(connection))
        entry = books.correct(connection, account, action=action, limit=limit, at=at, reason=reason.strip())
        return entry, store.entries(connection)

    database = Database(source.location, Migrations(source.history))
    try:
        await database.open()
    except ConflictError as error:
        raise ConflictError(
            f"a budget is changed while its role is stopped, and the {source.role} is running. Stop it, run this "
            f"again, start it again: what was under way goes on from there. ({error.message})"
        ) from error
    try:
        return await database.run(work)
    finally:
        await database.close()


def _report(source: Source, account: Account, *, entry: Entry, entries: list[Entry], as_json: bool) -> None:
    from ..privacy.budget import balance, resets
    from ..privacy.in_force import in_force, without_epsilon
    from ..storage.books import difference

    budgets = source.limits.budgets(entries, account)
    differs = source.limits.differences(entries)
    key = source.limits.key(account)
    warnings = [difference(each, *both, key=key) for each, both in differs.items() if each == account]
    warnings += _what_a_reset_means(entries, account, budgets) if resets(entry, account) else []
    warnings += _whom_it_admits(source, account, entry=entry, entries=entries)
    if account[1].startswith(("dataset:", "user:" if source.config is None else "dataset:")):
        warnings += without_epsilon(source.limits, entries, [account])
    if as_json:
        left = [{**asdict(budget.limit), "rounds_left": _left(entries, budget)} for budget in budgets]
        body = {"role": source.role, "entry": as_object(entry), "in_force": left, "warnings": warnings}
        echo_json(body)
        return
    say(describe(entry), hang=HANG)
    for budget in budgets:
        found = balance(entries, budget)
        say(f"in force: {budget.limit}; spent {counted(found.rounds_spent, 'round')}, ε {real(found.epsilon_spent)}")
    say(f"by {in_force(source.limits, entries, account)}", hang=HANG)
    for warning in warnings:
        warn(warning)


def _whom_it_admits(source: Source, account: Account, *, entry: Entry, entries: list[Entry]) -> list[str]:
    """Nobody, unless a user is known by this entry alone: that may be a name that was misspelt."""
    from ..privacy.budget import any_of

    subject = account[1]
    before = [each for each in entries if each.digest != entry.digest]
    if not subject.startswith("user:") or subject == any_of(subject) or is_known(source, before, account):
        return []
    return [f"nothing has named {subject} here before: by this entry they are known, and may spend what it allows"]


def _left(entries: list[Entry], budget: Budget) -> int | None:
    from ..privacy.budget import balance

    return balance(entries, budget).rounds_left


def _what_a_reset_means(entries: list[Entry], account: Account, budgets: tuple[Budget, ...]) -> list[str]:
    from ..privacy.budget import Budget as PureBudget
    from ..privacy.budget import balance

    some = budgets or (
        PureBudget(unit=account[0], subject=account[1], max_rounds=None, epsilon=None, delta=DEFAULT_DELTA),
    )
    ever = balance(entries, some[0], ever=True)
    exposed = f"{counted(ever.rounds_spent, 'round')} and ε {real(ever.epsilon_spent)}"
    return [
        f"A NEW ACCOUNTING PERIOD HAS BEGUN for {account[1]} at {account[0]} level. What was released before is not "
        f"undone: so far it has been exposed to {exposed} at δ "
        f"{some[0].delta:g}, and all that is spent from here on comes on top of that. The budget no longer bounds the "
        "whole, only this period. Rounds that are reserved or final, and not yet released, count on. The history "
        "stays in the ledger, and `sotto budget show` says both figures."
    ]
