"""What may be asked about the aggregator's ledger, by whom. Knows no gRPC."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import Connection, select

from ..communication.identity import Identity
from ..errors import AccessError, InvalidInput, NotFoundError
from ..jobs.store import JobStore
from ..privacy.accounting import epsilon
from ..privacy.budget import (
    Account,
    Balance,
    Budget,
    Limits,
    any_of,
    balance_of,
    concerns,
    subject_of,
)
from ..privacy.events import RELATIONS, Event
from ..privacy.figures import Figure, figures
from ..privacy.ledger import GENESIS, Entry, to_line
from ..privacy.standing import Standing
from ..storage.database import Database
from ..storage.ledger import LedgerStore

OPERATOR: Final = "operator"
PAGE: Final = 100
LARGEST_PAGE: Final = 1000
_COPIES: Final = 3
"""A message has an entry's line, its fields once more, and some room besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountView:
    """One budget with what it has seen, in this accounting period and ever.

    Attributes:
        epsilon_at: ε spent at the δ that was asked for; None where none was.
        figures: of `now`: as it is charged, against the aggregator, and if all others collude.
    """

    budget: Budget
    now: Balance
    ever: Balance
    periods: int
    epsilon_at: float | None
    figures: tuple[Figure, Figure, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What narrows a list of entries; each only where it is not empty."""

    unit: str = ""
    subject: str = ""
    job_id: str = ""
    kind: str = ""


class Budgets:
    """Answers from the ledger, each from one reading that was verified.

    Args:
        database: where the ledger and the jobs are.
        store, jobs: their tables.
        limits: of the aggregator's configuration.
        federation: its name.
        max_message_bytes: of one answer.
    """

    def __init__(
        self,
        database: Database,
        store: LedgerStore,
        *,
        jobs: JobStore,
        limits: Limits,
        federation: str,
        max_message_bytes: int,
    ) -> None:
        self._database = database
        self._store = store
        self._jobs = jobs
        self._limits = limits
        self._federation = subject_of("federation", federation)
        self._max_message_bytes = max_message_bytes

    async def budgets(
        self, caller: Identity, *, unit: str = "", subject: str = "", delta: float = 0.0
    ) -> tuple[list[AccountView], str, int]:
        """(the accounts asked for, the ledger's head, how many entries it has).

        Raises:
            InvalidInput: no such unit, or a δ out of range.
            AccessError: an account that is not this caller's to see.
            NotFoundError: a job that is none of a scientist's.
            LedgerError: the ledger is broken.
        """
        _check_unit(unit)
        if not 0.0 <= delta < 1.0:
            raise InvalidInput("delta must lie between 0 and 1", violations={"delta": "between 0 and 1"})

        def read(connection: Connection) -> tuple[list[_Spent], str, int]:
            if subject:
                self._check_subject(connection, caller, subject)
            standing = self._store.standing(connection)
            spent = [
                each
                for account in self._accounts(standing, subject)
                if unit in ("", account[0])
                and (subject or caller.role == OPERATOR or account[1] in self._seen_by(caller))
                for each in self._spent(standing, account)
            ]
            head = standing.head
            return spent, head.digest if head else GENESIS, head.sequence if head else 0

        spent, head, count = await self._database.run(read)
        views = await asyncio.to_thread(lambda: [_view(each, delta=delta) for each in spent])
        return views, head, count

    async def entries(
        self, caller: Identity, question: Question, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[Entry], str, str]:
        """(a page of the entries that the caller may see, the token of the next page, the ledger's head).

        Raises:
            InvalidInput: a size or unit that is none, or a token of another list.
            LedgerError: the ledger is broken.
        """
        _check_unit(question.unit)
        if page_size < 0:
            raise InvalidInput("page_size must not be negative", violations={"page_size": "0 or more"})
        listing = _listing(caller, question)
        after = _open_token(page_token, listing) if page_token else 0
        size = min(page_size or PAGE, LARGEST_PAGE)

        def read(connection: Connection) -> tuple[list[Entry], frozenset[str]]:
            entries = self._store.entries(connection)
            mine = self._own_jobs(connection, caller) if caller.role == "scientist" else frozenset()
            return entries, mine

        entries, mine = await self._database.run(read)
        head = entries[-1].digest if entries else GENESIS
        matching = (
            entry
            for entry in itertools.islice(entries, after, None)
            if self._may_see(caller, entry, own_jobs=mine) and _matches(entry, question)
        )
        found = list(itertools.islice(matching, size + 1))  # one more says that there are more
        page = self._fitting(found[:size])
        return page, _token(page[-1].sequence, listing) if len(found) > len(page) else "", head

    def _fitting(self, entries: list[Entry]) -> list[Entry]:
        """As many as fit into one message, at least one."""
        size = 0
        for count, entry in enumerate(entries):
            size += _COPIES * len(to_line(entry))
            if size > self._max_message_bytes and count:
                return entries[:count]
        return entries

    # --- who may see what ---------------------------------------------------------------------------------------------

    def _seen_by(self, caller: Identity) -> tuple[str, ...]:
        """Subjects that a scientist or party may see: what protects the parties, and a party's own."""
        own = (subject_of("party", caller.name),) if caller.role == "party" else ()
        return (self._federation, *own)

    def _may_see(self, caller: Identity, entry: Entry, *, own_jobs: frozenset[str]) -> bool:
        if caller.role == OPERATOR:
            return True
        if caller.role == "scientist":
            return entry.job_id in own_jobs
        return entry.subject in self._seen_by(caller)

    def _check_subject(self, connection: Connection, caller: Identity, subject: str) -> None:
        kind, _, name = subject.partition(":")
        if caller.role == OPERATOR or subject in self._seen_by(caller):
            return
        if caller.role == "scientist" and kind == "job":
            if name not in self._own_jobs(connection, caller):
                raise NotFoundError(f"there is no job {name[:64]}", job_id=name[:64])
            return
        raise AccessError(f"the budget of {subject[:100]!r} is not for a {caller.role} to see")

    def _own_jobs(self, connection: Connection, caller: Identity) -> frozenset[str]:
        jobs = self._jobs.jobs.c
        return frozenset(connection.scalars(select(jobs.job_id).where(jobs.owner == str(caller))))

    # --- figures ------------------------------------------------------------------------------------------------------

    def _accounts(self, standing: Standing, subject: str) -> list[Account]:
        if subject:
            return [(unit, subject) for unit in RELATIONS if unit == "party" or standing.knows((unit, subject))]
        seen: dict[Account, None] = dict.fromkeys(self._limits.rows)
        seen |= standing.subjects
        seen |= dict.fromkeys(self._limits.invited(standing))
        return [account for account in seen if account[1] != any_of(account[1])]

    def _spent(self, standing: Standing, account: Account) -> list[_Spent]:
        unit, subject = account
        nothing = Budget(unit=unit, subject=subject, max_rounds=None, epsilon=None, delta=self._delta)
        now, ever = standing.spent(account), standing.spent(account, ever=True)
        return [
            _Spent(budget, now, ever, standing.periods(account))
            for budget in self._limits.budgets(standing, account) or (nothing,)
        ]

    @property
    def _delta(self) -> float:
        """Of the federation's own budget, for accounts without one."""
        return self._limits.rows["party", self._federation].delta


class _Spent(NamedTuple):
    """What one budget has seen, as it is read in the database's one thread, before anything is computed of it."""

    budget: Budget
    now: tuple[int, Counter[Event]]
    ever: tuple[int, Counter[Event]]
    periods: int


def _view(spent: _Spent, *, delta: float) -> AccountView:
    budget = spent.budget
    now = balance_of(*spent.now, budget)
    return AccountView(
        budget=budget,
        now=now,
        ever=balance_of(*spent.ever, budget) if spent.periods > 1 else now,
        periods=spent.periods,
        epsilon_at=epsilon(now.events, delta=delta) if delta else None,
        figures=figures(now.events, unit=budget.unit, delta=budget.delta),
    )


def _check_unit(unit: str) -> None:
    if unit and unit not in RELATIONS:
        raise InvalidInput("unit must be 'example' or 'party'", violations={"unit": "'example' or 'party'"})


def _matches(entry: Entry, question: Question) -> bool:
    return (
        question.unit in ("", entry.unit)
        and (not question.subject or concerns(entry, (entry.unit, question.subject)))
        and question.job_id in ("", entry.job_id)
        and question.kind in ("", entry.kind)
    )


def _listing(caller: Identity, question: Question) -> str:
    """What a page token belongs to."""
    content = [str(caller), question.unit, question.subject, question.job_id, question.kind]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _token(sequence: int, listing: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([sequence, listing]).encode()).decode().rstrip("=")


def _open_token(token: str, listing: str) -> int:
    """The sequence that a page goes on behind."""
    try:
        sequence, of = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput("page_token is not of this service", violations={"page_token": "unknown"}) from error
    if of != listing or type(sequence) is not int or sequence < 1:
        raise InvalidInput("page_token was made for another list", violations={"page_token": "of another list"})
    return int(sequence)
