"""A ledger as it stands after its last entry: its charges, what each account has spent, the limits that were entered.

Kept up to date entry by entry, with equal events counted together, so that a charge costs as much on a long ledger as
on a short one. What it says is what the rules in `ledger` and `budget` define over all entries. Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from ..errors import LedgerError
from .entries import CHARGES, GENESIS, Entry, Limit
from .events import Event, Unit

Account = tuple[Unit, str]
"""Unit and subject."""

_DAY: Final = 10
"""Characters of a time in ISO 8601."""
_ANYBODY: Final = ""
"""Stands for the parties of a charge that names none: no ledger has an empty subject."""


@dataclass(frozen=True, slots=True)
class Charge:
    """One charge and what became of it.

    Attributes:
        entry: that charged.
        settled: the `final` or `returned` entry; None while open.
        released: the entry that says what was shown; None where nothing says so.
    """

    entry: Entry
    settled: Entry | None
    released: Entry | None = None

    @property
    def counts(self) -> bool:
        """Whether it is spent: everything that was not given back."""
        return self.settled is None or self.settled.kind != "returned"

    @property
    def over(self) -> bool:
        """Whether a reset ends it: what was released, and opening balances.

        What is merely final may be shown after the reset. A round that is final and never released counts on for ever:
        that nothing of it was seen is more than a ledger can know. (Version 1 entered no releases: there, final is
        over.)
        """
        final = self.settled is not None and self.settled.version == 1
        return self.entry.kind == "opening_balance" or self.released is not None or final

    @property
    def last(self) -> int:
        """Sequence of the last entry about it."""
        return (self.released or self.settled or self.entry).sequence


def may_invite_anybody(entry: Entry) -> bool:
    """Whether it charges a federation and names no parties: before they were named, none did."""
    return not entry.parties and entry.kind in CHARGES and entry.subject.startswith("federation:")


@dataclass(slots=True)
class _Tally:
    """What counts on an account: how many rounds, each event so many times, and by which charges."""

    rounds: int = 0
    events: Counter[Event] = field(default_factory=Counter)
    inside: set[str] = field(default_factory=set)

    def put(self, charge: Charge, *, counts: bool) -> None:
        """From now on it counts here, or does not."""
        entry, known = charge.entry, charge.entry.reservation_id in self.inside
        if counts == known:
            return
        sign = 1 if counts else -1
        self.rounds += sign * entry.charged_rounds
        if entry.event is not None:
            self.events[entry.event] += sign
            if not self.events[entry.event]:
                del self.events[entry.event]
        (self.inside.add if counts else self.inside.remove)(entry.reservation_id)


class Standing:
    """All that later entries and decisions need to know of the entries so far."""

    def __init__(self) -> None:
        self.head: Entry | None = None
        """The last entry."""
        self.digests: set[str] = {GENESIS}
        """Every digest that was once the head."""
        self.limits: dict[Account, Limit] = {}
        """The last limit that was entered for each subject, those that stand for a kind included."""
        self.set_by_hand: set[Account] = set()
        """Subjects for which an operator entered a limit."""
        self.reasons: list[str] = []
        """Of all corrections, in order."""
        self.invited: set[str] = set()
        """Parties that rounds have invited."""
        self.subjects: dict[Account, None] = {}
        """Of all entries, who was first first; the values mean nothing."""
        self._named: set[Account] = set()
        self._charges: dict[str, Charge] = {}
        self._of_round: defaultdict[tuple[str, int | None], list[str]] = defaultdict(list)
        self._of_job: Counter[tuple[str, Account]] = Counter()
        self._members: defaultdict[Account, list[str]] = defaultdict(list)
        self._ever: defaultdict[Account, _Tally] = defaultdict(_Tally)
        self._period: dict[Account, _Tally] = {}
        self._resets: defaultdict[Account, list[int]] = defaultdict(list)
        self._refusals: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        self._returned: defaultdict[str, set[tuple[str, int | None]]] = defaultdict(set)
        self._returned_of_job: Counter[tuple[str, str]] = Counter()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Standing:
        """After `entries`, all of a ledger in order.

        Raises:
            LedgerError: one breaks a rule; `metadata["entry"]` is its sequence.
        """
        standing = cls()
        for entry in entries:
            wrong = standing.apply(entry)
            if wrong:
                raise LedgerError(f"ledger entry {entry.sequence}: {wrong}", entry=entry.sequence)
        return standing

    # --- one entry more -----------------------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> str:
        """The next one; returns what rule it breaks, and then nothing has changed, or "" if none."""
        if entry.kind == "correction":
            self._correct(entry)
        elif entry.kind == "refusal":
            self._refusals[entry.at[:_DAY]].add((entry.reservation_id, entry.reason))
        else:
            charge = self._charged(entry)
            if isinstance(charge, str):
                return charge
            self._keep(charge, entry)
        self.invited.update(entry.parties)
        self.subjects.setdefault((entry.unit, entry.subject))
        self._named.update(_accounts(entry))
        self.digests.add(entry.digest)
        self.head = entry
        return ""

    def _charged(self, entry: Entry) -> Charge | str:
        """The charge after an entry about it, or the rule that this breaks."""
        known = self._charges.get(entry.reservation_id)
        if entry.kind in CHARGES:
            return Charge(entry, None) if known is None else "it charges a reservation_id a second time"
        if known is None:
            return "it settles or releases a reservation that does not exist"
        if _owner(entry) != _owner(known.entry):
            return "it settles or releases a reservation of another job, round, unit, subject, user or parties"
        if entry.kind == "release":
            if known.settled is None or known.settled.kind != "final" or known.released is not None:
                return "it releases what is not final, or was released before"
            return replace(known, released=entry)
        if known.settled is not None or known.entry.kind == "opening_balance":
            return "it settles a charge that is settled already"
        return replace(known, settled=entry)

    def _keep(self, charge: Charge, entry: Entry) -> None:
        key, accounts = entry.reservation_id, _accounts(charge.entry)
        self._charges[key] = charge
        if entry.kind in CHARGES:
            self._of_round[entry.job_id, entry.round].append(key)
            self._of_job[entry.job_id, (entry.unit, entry.subject)] += 1
            for account in accounts:
                self._members[account].append(key)
        if entry.kind == "returned":
            self._note_return(entry)
        for account in accounts:
            self._ever[account].put(charge, counts=charge.counts)
        for account in self._with_periods(charge.entry, accounts):
            start = self._resets[account][-1]
            counts = charge.counts and (charge.last > start or not charge.over)
            self._period[account].put(charge, counts=counts)

    def _with_periods(self, entry: Entry, accounts: Iterable[Account]) -> list[Account]:
        """Accounts that were reset and that a charge concerns."""
        found = [account for account in accounts if account in self._period]
        if may_invite_anybody(entry):
            found += [each for each in self._period if each[0] == entry.unit and each[1].startswith("party:")]
        return found

    def _note_return(self, entry: Entry) -> None:
        day, round_ = entry.at[:_DAY], (entry.job_id, entry.round)
        if round_ not in self._returned[day]:
            self._returned[day].add(round_)
            self._returned_of_job[day, entry.job_id] += 1

    def _correct(self, entry: Entry) -> None:
        corrected, account = entry.correction, (entry.unit, entry.subject)
        self.reasons.append(entry.reason)
        if corrected is None:
            return
        if corrected.limit is not None:
            self.limits[account] = corrected.limit
        if corrected.action == "set":
            self.set_by_hand.add(account)
        if corrected.action == "reset":
            self._resets[account].append(entry.sequence)
            self._period[account] = _Tally()
            for key in self._keys(account):
                charge = self._charges[key]
                self._period[account].put(charge, counts=charge.counts and not charge.over)

    def _keys(self, account: Account) -> list[str]:
        """Of all charges that concern an account."""
        unit, subject = account
        anybody: Account = (unit, _ANYBODY)
        found = self._members.get(account, [])
        return [*found, *self._members.get(anybody, [])] if _is_party(subject) else found

    # --- what is asked ------------------------------------------------------------------------------------------------

    @property
    def charges(self) -> Mapping[str, Charge]:
        """Every charge by `reservation_id`, in order of charging."""
        return MappingProxyType(self._charges)

    def of_round(self, job_id: str, number: int | None) -> tuple[str, ...]:
        """The `reservation_id`s that a round was charged under, in order."""
        return tuple(self._of_round.get((job_id, number), ()))

    def charged(self, job_id: str, account: Account) -> int:
        """How many charges of a job are on an account, given back or not."""
        return self._of_job[job_id, account]

    def spent(self, account: Account, *, ever: bool = False) -> tuple[int, Counter[Event]]:
        """Rounds, and events by how often, of all charges that count on an account.

        Args:
            ever: over all accounting periods; else in the present one.
        """
        unit, subject = account
        if account in self._period and not ever:
            tallies = [self._period[account]]
        else:
            names = [subject, _ANYBODY] if _is_party(subject) else [subject]
            tallies = [tally for name in names if (tally := self._ever.get((unit, name))) is not None]
        events: Counter[Event] = Counter()
        for tally in tallies:
            events.update(tally.events)
        return sum(tally.rounds for tally in tallies), events

    def knows(self, account: Account) -> bool:
        """Whether some entry is about an account (`budget.concerns`)."""
        unit, subject = account
        anybody: Account = (unit, _ANYBODY)
        return account in self._named or (_is_party(subject) and anybody in self._named)

    def period_start(self, account: Account) -> int:
        """Sequence of the last reset of an account; 0 when there was none."""
        return self._resets[account][-1] if account in self._period else 0

    def periods(self, account: Account) -> int:
        """How many accounting periods it has had, the present one included."""
        return 1 + len(self._resets.get(account, ()))

    def over(self, job_id: str, number: int) -> bool:
        """Whether some charge of a round does not count any more on an account that it was charged to."""
        charges = [self._charges[key] for key in self.of_round(job_id, number)]
        return any(
            each.entry.reservation_id not in self._period[account].inside
            for each in charges
            for account in self._with_periods(each.entry, _accounts(each.entry))
        )

    def refused(self, day: str) -> frozenset[tuple[str, str]]:
        """(reservation_id, reason) of the refusals of a day (its ISO 8601 date, or a time in it)."""
        return frozenset(self._refusals.get(day[:_DAY], ()))

    def returns(self, day: str) -> int:
        """Rounds that were given back on a day."""
        return len(self._returned.get(day[:_DAY], ()))

    def returns_of_job(self, job_id: str, day: str) -> int:
        """Rounds of a job that were given back on a day."""
        return self._returned_of_job[day[:_DAY], job_id]


def standing_of(ledger: Iterable[Entry] | Standing) -> Standing:
    """Of a ledger that is given either way. Raises LedgerError when its entries break a rule."""
    return ledger if isinstance(ledger, Standing) else Standing.of(ledger)


def _owner(entry: Entry) -> tuple[object, ...]:
    return entry.job_id, entry.round, entry.unit, entry.subject, entry.user, entry.parties


def _accounts(entry: Entry) -> tuple[Account, ...]:
    """Those that an entry is about, each once."""
    named = [f"user:{entry.user}"] if entry.user else []
    named += [f"job:{entry.job_id}"] if entry.job_id else []
    named += [f"party:{name}" for name in entry.parties]
    named += [_ANYBODY] if may_invite_anybody(entry) else []
    return tuple(dict.fromkeys((entry.unit, subject) for subject in (entry.subject, *named)))


def _is_party(subject: str) -> bool:
    kind, _, name = subject.partition(":")
    return kind == "party" and bool(name)
