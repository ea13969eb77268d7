"""Where `sotto train` pays: the ledger of the party on this machine, or of the user's own state directory."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import Connection, MetaData

from ..errors import BudgetError, ConfigError, ConflictError, StateError
from ..jobs.states import utc
from ..privacy import ledger
from ..privacy.budget import ANY, Account, Ledger, Limits, balance, check_affordable, subject_of
from ..privacy.events import Event, NonPrivate
from ..privacy.in_force import limits_epsilon, without_epsilon
from ..privacy.ledger import Limit
from ..privacy.moved import reason_of
from ..protocol.ledger import EntrySigner
from ..protocol.signing import SigningKey
from ..storage.books import Books, Cost, reservation_id
from ..storage.database import Database
from ..storage.ledger import LedgerStore
from ..storage.location import Location
from ..storage.migrations import Migrations

T = TypeVar("T")

DEFAULT_USER_LIMIT: Final = Limit(max_rounds=None, epsilon=10.0, delta=1e-5)
"""A user's budget on a node without a configuration: what the shipped config/party.yaml gives."""


class DefaultLimits(Limits):
    """What holds on a node without a configuration: what the ledger says, and these where it says nothing.

    There is nothing for an operator to change but the ledger, so that what `sotto budget set` enters is what counts.
    """

    __slots__ = ()

    def sources(self, entries: Ledger, account: Account) -> dict[str, Limit]:
        """The first of them alone: its own entry, that of all of its kind, the default."""
        return dict(itertools.islice(super().sources(entries, account).items(), 1))

    def differences(self, entries: Ledger) -> dict[Account, tuple[Limit | None, Limit]]:
        """None: nothing else says anything."""
        return {}


_ANY_USER: Final[Account] = ("example", subject_of("user", ANY))
DEFAULT_LIMITS: Final = DefaultLimits({_ANY_USER: DEFAULT_USER_LIMIT}, keys={_ANY_USER: "the default"})

DATABASE_FILE: Final = "party.sqlite"
KEY_FILE: Final = "signing.key"
ANOTHER_PLACE: Final = "say where with --state-dir, or with XDG_STATE_HOME in the environment"
"""To whoever has no place of their own that can be written to."""
BUSY_FOR_S: Final = 5.0
"""How long another `sotto train`, which holds the database for milliseconds, is waited for."""
_RETRY_S: Final = 0.05


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """`$XDG_STATE_HOME/sotto/train`, by default ~/.local/state/sotto/train.

    The user's, whatever the working directory: a budget that begins anew in another directory is none. A relative
    `$XDG_STATE_HOME` is ignored (XDG Base Directory Specification 0.8).

    Raises:
        ConfigError: this user has no home directory, and nothing else says where.
    """
    found = Path((os.environ if environ is None else environ).get("XDG_STATE_HOME", ""))
    try:
        base = found if found.is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ConfigError(f"there is no home directory to keep a ledger in: {ANOTHER_PLACE}") from error
    return base / "sotto" / "train"


def ledger_job_id(job_id: str) -> str:
    """What the ledger calls a job: no job of a federation, whose ids have no slash, is ever taken for one of these."""
    return f"train/{job_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a budget has seen so far. `epsilon` may be infinite; `limit` is None without one in ε."""

    subject: str
    epsilon: float
    limit: float | None
    delta: float


class LedgerPurse:
    """A `learning.standalone.Purse` on a party's database, which is open only while something is written.

    Args:
        location: as for `storage.database.Database`.
        key: of the role; signs every entry.
        limits: of the node.
        account: that is charged: of a dataset, or of the user where the rows are nobody's.
        dataset: whose rows are trained on; "" where they are nobody's.
        user: whose data it is; their quota counts as well.
        stated_delta: the job's δ.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        location: Location,
        *,
        key: SigningKey,
        limits: Limits,
        account: Account,
        user: str,
        stated_delta: float,
        dataset: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._location = location
        self._books = Books(LedgerStore(MetaData(), signer=EntrySigner(key)), limits, name_users=True)
        self._account = account
        self._user = user
        self._dataset = dataset
        self._stated_delta = stated_delta
        self._clock = clock
        self._charged: tuple[str, int] | None = None
        self.warnings: list[str] = []
        """Where configuration and ledger say something else of a budget, or nothing limits ε."""

    def reserve(self, job_id: str, event: Event) -> None:
        """As `Purse` says. A job_id that ran before is charged again, as another of its rounds.

        Raises:
            BudgetError: a budget does not allow it; the ledger has a refusal, and no charge.
            ConflictError: a running party, or another process, holds the database.
            LedgerError: the chain is broken, or an entry is not signed by this node.
        """
        asyncio.run(self._reserve(ledger_job_id(job_id), event))

    def give_back(self, reason: str) -> bool:
        """As `Purse` says."""
        charged, at = self._reserved(), self._now()
        return self._run(lambda connection: self._books.give_back(connection, *charged, at=at, reason=reason))

    def finalise(self, figures: Mapping[str, str]) -> str:
        """As `Purse` says."""
        charged = self._reserved()
        return self._run(lambda connection: self._finalise(connection, *charged, figures=figures))

    def _reserved(self) -> tuple[str, int]:
        if self._charged is None:
            raise StateError("nothing was reserved")
        return self._charged

    def spent(self) -> list[Spent]:
        """What each budget that the run concerns has seen so far."""
        return self._run(self._spent)

    async def _reserve(self, job_id: str, event: Event) -> None:
        cost = Cost(
            account=self._account,
            event=event,
            user=self._user,
            stated_delta=self._stated_delta,
            reason=self._reason("" if not isinstance(event, NonPrivate) else "policy.allow_without_dp"),
        )
        database = await self._open()
        try:
            self.warnings = await database.run(lambda connection: self._books.open(connection, at=self._now()))
            self.warnings += await database.run(self._without_limit)
            number = await database.run(lambda connection: self._next_run(connection, job_id))
            try:
                await database.run(lambda connection: self._charge(connection, job_id, number, cost=cost))
            except BudgetError as refused:
                error = refused  # the name of an except clause ends with it
                await database.run(
                    lambda connection: self._books.refuse(
                        connection, job_id, number, [cost], error=error, at=self._now()
                    )
                )
                raise
        finally:
            await database.close()
        self._charged = (job_id, number)

    def _reason(self, further: str) -> str:
        return reason_of(self._dataset, self._account, further=further) if self._dataset else further

    def _without_limit(self, connection: Connection) -> list[str]:
        """A warning where neither what is charged nor the user has a limit in ε."""
        entries, limits = self._books.store.standing(connection), self._books.limits
        owner: Account = (self._account[0], subject_of("user", self._user))
        if any(limits_epsilon(limits, entries, account) for account in (self._account, owner)):
            return []
        return without_epsilon(limits, entries, [self._account])

    def _charge(self, connection: Connection, job_id: str, number: int, *, cost: Cost) -> None:
        if not isinstance(cost.event, NonPrivate):
            self._books.reserve(connection, job_id, number, [cost], at=self._now())
            return
        # No limit in ε allows that one: the node's policy did. Limits in rounds hold, and the user must be known.
        entries = self._books.store.standing(connection)
        for budget in self._books.budgets(entries, cost, job_id=job_id):
            check_affordable(entries, replace(budget, epsilon=None), [(cost.rounds, cost.event)], name_user=True)
        unit, subject = cost.account
        entry = ledger.reserve(
            entries,
            at=self._now(),
            job_id=job_id,
            round=number,
            unit=unit,
            subject=subject,
            reservation_id=reservation_id(job_id, number, cost.account),
            event=cost.event,
            reason=cost.reason,
            user=cost.user,
        )
        self._books.store.add(connection, entry)

    def _next_run(self, connection: Connection, job_id: str) -> int:
        """1 for the first run of a job; refused ones are not counted."""
        held = [charge.entry for charge in self._books.store.standing(connection).charges.values()]
        return 1 + max((entry.round or 0 for entry in held if entry.job_id == job_id), default=0)

    def _finalise(self, connection: Connection, job_id: str, number: int, *, figures: Mapping[str, str]) -> str:
        self._books.spend(connection, job_id, number, at=self._now(), reason="the training ended")
        self._books.release(connection, job_id, number, figures=figures, at=self._now())
        return self._books.store.head(connection)

    def _spent(self, connection: Connection) -> list[Spent]:
        entries = self._books.store.standing(connection)
        unit, _ = self._account
        accounts = dict.fromkeys([(unit, subject_of("user", self._user)), self._account])
        return [
            Spent(
                subject=budget.subject,
                epsilon=balance(entries, budget).epsilon_spent,
                limit=budget.epsilon,
                delta=budget.delta,
            )
            for account in accounts
            for budget in self._books.limits.budgets(entries, account)
        ]

    def _now(self) -> str:
        return utc(self._clock())

    def _run(self, work: Callable[[Connection], T]) -> T:
        async def run() -> T:
            database = await self._open()
            try:
                return await database.run(work)
            finally:
                await database.close()

        return asyncio.run(run())

    async def _open(self) -> Database:
        deadline = time.monotonic() + BUSY_FOR_S
        while True:
            database = Database(self._location, Migrations("party"))
            try:
                await database.open()
                return database
            except ConflictError:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_RETRY_S)
