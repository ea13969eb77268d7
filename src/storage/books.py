"""A role's accounts: its ledger and its budgets together. Every method works inside the caller's transaction.

A charge is one entry, on the account of what is protected (a dataset, the party in its federation); it counts on the
quotas of its user and of its job as well. All of these are checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from ..errors import BudgetError, NotFoundError
from ..privacy import ledger
from ..privacy.budget import ANY, Account, Budget, Limits, binds, check_affordable, subject_of
from ..privacy.events import Event
from ..privacy.ledger import LONGEST_TEXT, Entry, Ledger, Limit
from ..privacy.moved import moved
from .ledger import LedgerStore

REFUSALS_A_DAY: Final = 50
"""As many are entered: whoever may ask could otherwise fill the ledger, which a role reads as a whole when it starts,
for nothing."""
RETURNS_A_DAY: Final = 100
"""Rounds that are given back; what is charged beyond is spent. To reserve and to give back costs nothing, and is at
least two entries for ever."""
RETURNS_OF_A_JOB_A_DAY: Final = 10
"""The same of one job: more than the spare rounds of most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one round costs one account.

    Attributes:
        account: of what is protected.
        event: what one round does.
        rounds: as many are priced: this one, and those of its job that are still to come.
        user: whose data it is; "" for nobody who is named.
        parties: whom the round invites; each has a budget of its own. Of a party's own ledger: nobody.
        scientist: who ordered it; "" where nobody signed an order.
        stated_delta: the δ that the job counts with; None: it names none at this unit.
        reason: of the charge, for who reads the ledger; what there is to say.
    """

    account: Account
    event: Event
    rounds: int = 1
    user: str = ""
    parties: tuple[str, ...] = ()
    scientist: str = ""
    stated_delta: float | None = None
    reason: str = ""


class Books:
    """A ledger with its budgets.

    Args:
        store: of the role's database.
        limits: of the role's configuration.
        name_users: refusals may name a user: whoever reads them keeps the ledger.
    """

    def __init__(self, store: LedgerStore, limits: Limits, *, name_users: bool = False) -> None:
        self.store = store
        self.limits = limits
        self.name_users = name_users

    # --- budgets ------------------------------------------------------------------------------------------------------

    def open(self, connection: Connection, *, at: str) -> list[str]:
        """Verify the ledger, enter the limits that it has seen none for, and what datasets were charged on accounts
        that they have no more; returns warnings for the operator.

        Raises:
            LedgerError: the chain is broken, or an entry is not signed as it must be; names the first bad entry.
        """
        self.store.start(connection)
        for (unit, subject), limit in self.limits.unentered(self.store.standing(connection)).items():
            self.correct(connection, (unit, subject), action="configured", limit=limit, at=at, reason="")
        found = self.limits.differences(self.store.standing(connection))
        warnings = [difference(account, *both, key=self.limits.key(account)) for account, both in found.items()]
        return [*warnings, *self._move(connection, at=at)]

    def _move(self, connection: Connection, *, at: str) -> list[str]:
        """Enter what datasets were charged on other accounts than theirs on theirs; says what."""
        said = []
        for each in list(moved(self.store.standing(connection), self.limits.datasets)):
            unit, subject = each.account
            entry = ledger.open_balance(
                self.store.standing(connection),
                at=at,
                unit=unit,
                subject=subject,
                reservation_id=each.reservation_id,
                event=each.event,
                charged_rounds=each.charged_rounds,
                reason=each.reason,
            )
            self.store.add(connection, entry)
            said.append(f"{each.charged_rounds} rounds count on {subject} from now on: {each.reason}")
        return said

    def correct(
        self,
        connection: Connection,
        account: Account,
        *,
        action: ledger.Action,
        limit: Limit | None,
        at: str,
        reason: str,
    ) -> Entry:
        """Enter a change of a budget. Raises InvalidInput as `privacy.ledger.correct`."""
        unit, subject = account
        entries = self.store.standing(connection)
        entry = ledger.correct(entries, at=at, unit=unit, subject=subject, action=action, limit=limit, reason=reason)
        return self.store.add(connection, entry)

    def budgets(self, entries: Ledger, cost: Cost, *, job_id: str) -> tuple[Budget, ...]:
        """All that a cost has to stay within.

        Raises:
            BudgetError: its user is not known here.
        """
        unit, _ = cost.account
        found = self.limits.budgets(entries, cost.account)
        if cost.user:
            owner: Account = (unit, subject_of("user", cost.user))
            if not self.limits.knows(entries, owner):
                named = f"user {cost.user}" if self.name_users else "the user whose data it is"
                raise BudgetError(
                    f"{named} has no budget here (privacy.budgets.users or default_user_epsilon)",
                    private=f"the budget of {owner[1]}",
                    unit=unit,
                )
            found += self.limits.budgets(entries, owner)
        for name in cost.parties:
            found += self.limits.budgets(entries, (unit, subject_of("party", name)))
        if job_id and job_id != ANY:
            found += self.limits.budgets(entries, (unit, subject_of("job", job_id)))
        return found

    def check(self, entries: Ledger, cost: Cost, *, job_id: str) -> None:
        """Raises BudgetError unless every budget allows all rounds that are priced."""
        for budget in self.budgets(entries, cost, job_id=job_id):
            planned = [(cost.rounds, cost.event)]
            check_affordable(entries, budget, planned, stated_delta=cost.stated_delta, name_user=self.name_users)

    # --- charges ------------------------------------------------------------------------------------------------------

    def reserve(self, connection: Connection, job_id: str, number: int, costs: Sequence[Cost], *, at: str) -> None:
        """Charge a round to every account, or to none. What is charged already is not charged again.

        Raises:
            BudgetError: some budget does not allow it; nothing is written.
            ConflictError: the round was charged with another content, or was given back.
        """
        entries = self.store.standing(connection)
        fresh = [cost for cost in costs if reservation_id(job_id, number, cost.account) not in entries.charges]
        for cost in fresh:
            self.check(entries, cost, job_id=job_id)
        for cost in costs:
            unit, subject = cost.account
            entry = ledger.reserve(
                self.store.standing(connection),
                at=at,
                job_id=job_id,
                round=number,
                unit=unit,
                subject=subject,
                reservation_id=reservation_id(job_id, number, cost.account),
                event=cost.event,
                reason=cost.reason,
                user=cost.user,
                parties=cost.parties,
                scientist=cost.scientist,
            )
            self.store.add(connection, entry)

    def spend(self, connection: Connection, job_id: str, number: int, *, at: str, reason: str) -> None:
        """From here on the round's charges are irrevocable. Raises NotFoundError when it was never charged."""
        for key in self._charged(connection, job_id, number):
            self.store.add(connection, ledger.finalise(self.store.standing(connection), key, at=at, reason=reason))

    def give_back(self, connection: Connection, job_id: str, number: int, *, at: str, reason: str) -> bool:
        """Give back what a round reserved, of which nothing was shown. Of more than `RETURNS_A_DAY`, or more than
        `RETURNS_OF_A_JOB_A_DAY` of its job, it is spent instead, and False comes back. Raises LedgerError once it is
        final."""
        standing = self.store.standing(connection)
        keys = standing.of_round(job_id, number)
        is_open = any(standing.charges[key].settled is None for key in keys)
        if is_open and (
            standing.returns(at) >= RETURNS_A_DAY or standing.returns_of_job(job_id, at) >= RETURNS_OF_A_JOB_A_DAY
        ):
            self.spend(connection, job_id, number, at=at, reason="not given back: too many rounds were, today")
            self.release(connection, job_id, number, figures={"shown": "nothing"}, at=at)  # a reset ends it
            return False
        for key in keys:
            entry = ledger.give_back(self.store.standing(connection), key, at=at, reason=reason[:LONGEST_TEXT])
            self.store.add(connection, entry)
        return True

    def release(self, connection: Connection, job_id: str, number: int, *, figures: Mapping[str, str], at: str) -> None:
        """Enter what was shown of a round. Raises LedgerError unless it is final, NotFoundError if never charged."""
        for key in self._charged(connection, job_id, number):
            self.store.add(connection, ledger.release(self.store.standing(connection), key, at=at, figures=figures))

    def refuse(
        self,
        connection: Connection,
        job_id: str,
        number: int | None,
        costs: Sequence[Cost],
        *,
        error: BudgetError,
        at: str,
        request: str = "",
    ) -> None:
        """Enter that `costs` were refused with `error`; in a transaction of its own, as that of the charge is undone.

        The same refusal is entered once a day, and no more than `REFUSALS_A_DAY` in all.

        Args:
            request: where there is no job yet: tells one that asks for something from others that ask for the same.
        """
        reason = error.message[:LONGEST_TEXT]
        for cost in costs:
            unit, subject = cost.account
            key = reservation_id(job_id or f"request:{request}", number or 0, cost.account)
            standing = self.store.standing(connection)
            today = standing.refused(at)
            again = (key, reason) in today
            if again or len(today) >= REFUSALS_A_DAY or error.metadata.get("unit", unit) != unit:
                continue
            entry = ledger.refuse(
                standing,
                at=at,
                job_id=job_id,
                round=number,
                unit=unit,
                subject=subject,
                reservation_id=key,
                event=cost.event,
                reason=reason,
                user=cost.user,
                parties=cost.parties,
                scientist=cost.scientist,
            )
            self.store.add(connection, entry)

    def charged(self, connection: Connection, job_id: str, account: Account) -> int:
        """How many rounds a job was charged on an account, given back or not."""
        return self.store.standing(connection).charged(job_id, account)

    def is_over(self, connection: Connection, job_id: str, number: int) -> bool:
        """Whether a round does not count any more on some account that it was charged to, since that was reset."""
        return self.store.standing(connection).over(job_id, number)

    def _charged(self, connection: Connection, job_id: str, number: int) -> tuple[str, ...]:
        keys = self.store.standing(connection).of_round(job_id, number)
        if not keys:
            raise NotFoundError(f"round {number} of job {job_id} was never charged")
        return keys


def reservation_id(job_id: str, number: int, account: Account) -> str:
    """Names the charge of a round on an account."""
    unit, subject = account
    return f"{job_id}/{number}/{unit}/{subject}"


def difference(account: Account, by_file: Limit | None, by_ledger: Limit, *, key: str = "") -> str:
    """A warning: the configuration says something else than the ledger, and how to change that.

    Args:
        key: where in the configuration; "" where that is not known.
    """
    unit, subject = account
    said = "nothing" if by_file is None else str(by_file)
    named, counts = subject, "the smaller of both counts"
    if by_file is None and subject.startswith("user:"):
        counts = "a user who is neither named there nor by an entry of `sotto budget set` is refused"
        named = "user:NAME" if subject == subject_of("user", ANY) else subject  # of all, only the configuration can
    elif by_file is None:
        counts = "what was entered counts"
    how = "To change what is entered"
    if by_file is not None and binds(by_file, by_ledger):
        how = f"To have more, raise {key or 'it'} in the configuration too. To enter what that says"
    return (
        f"the budget of {subject} at {unit} level was entered as {by_ledger}, the configuration says {said}: "
        f"{counts}. {how}, stop this role and run: "
        f"sotto budget set --config … --unit {unit} --subject {named!r} --reason …"
    )
