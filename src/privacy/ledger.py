"""The rules of the privacy ledger: what may follow what, and what is spent. Pure.

A ledger is a sequence of `Entry`. Each carries the digest of the one before, so that a changed, missing or moved entry
is noticed and named. A ledger that was cut at its end, or rewritten from some entry on, is noticed by the heads that
were recorded elsewhere (signed transcripts, manifests): pass them to `verify_lines`.

What is spent: a reservation counts from the moment it is written. `final` makes that irrevocable; `returned` gives it
back, and only before `final`. A reservation with neither counts as spent. A `release` says what was shown, and only of
what is final: nothing is shown that was not spent before.

`reserve`, `finalise`, `give_back`, `release`, `refuse`, `correct` and `open_balance` take the ledger as it is (its
entries, or a `standing.Standing` of them) and return the entry to append, or the entry already there when the call is a
repetition; they write nothing. One entry by itself, and its line, are in `entries`; what follows from all of them is
kept in `standing`; budgets are in `budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from ..errors import ConflictError, LedgerError, NotFoundError
from .entries import (
    GENESIS,
    LONGEST_TEXT,
    VERSION,
    Action,
    Correction,
    Entry,
    Figures,
    Kind,
    Limit,
    append,
    entry_digest,
    from_line,
    problem,
    to_line,
)
from .events import Event, Unit
from .standing import Charge, Standing, standing_of

__all__ = [
    "GENESIS",
    "LONGEST_TEXT",
    "VERSION",
    "Action",
    "Charge",
    "Correction",
    "Entry",
    "Figures",
    "Kind",
    "Ledger",
    "Limit",
    "Replay",
    "append",
    "charges",
    "correct",
    "entry_digest",
    "finalise",
    "from_line",
    "give_back",
    "open_balance",
    "refuse",
    "release",
    "reserve",
    "to_line",
    "verify_lines",
]

_CHARGE_CONTENT: Final = (
    *("kind", "job_id", "round", "unit", "subject", "charged_rounds", "event"),
    *("user", "parties", "scientist"),
)
"""What makes a repeated charge the same; time and reason may differ."""


def verify_lines(
    lines: Iterable[str | bytes], *, known_heads: Iterable[str] = (), judge: Callable[[Entry], None] | None = None
) -> list[Entry]:
    """Parse and verify an export; returns its entries.

    Every sound line before the first bad one is verified first, so the first bad entry is the one named.

    Args:
        lines: all of the ledger, in order, each with or without its line feed.
        known_heads: digests, hex, that this ledger had as head at some time; each must be there.
        judge: as `Replay` takes it: `protocol.ledger.Signatures`.

    Raises:
        LedgerError: as `from_line`, `Replay` and the judge; names the first bad entry.
    """
    replay = Replay(judge)
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        entries.append(from_line(line, number=number))
        replay.add(entries[-1])
    replay.check_heads(known_heads)
    return entries


# --- Rules ---------------------------------------------------------------------------------------------------------


Ledger = Sequence[Entry] | Standing
"""All entries in order, or what follows from them."""


def charges(entries: Iterable[Entry] | Standing) -> Mapping[str, Charge]:
    """Every charge by `reservation_id`, in order of charging.

    Raises:
        LedgerError: an entry breaks a rule; `metadata["entry"]` is its sequence.
    """
    return standing_of(entries).charges


class Replay:
    """A ledger verified entry by entry, from its first one on.

    Args:
        judge: what else each must pass, its signature say; raises LedgerError. So the first bad entry is named,
            whatever is wrong with it.
    """

    def __init__(self, judge: Callable[[Entry], None] | None = None) -> None:
        self._judge = judge
        self.head = GENESIS
        self.count = 0
        self.standing = Standing()
        """After what was added so far."""
        self._version = 1

    def cut(self, entries: Sequence[Entry]) -> Replay:
        """The same after the first of the entries that were added here, and verified then."""
        fewer = Replay(self._judge)
        fewer.standing = Standing.of(entries)
        fewer.head, fewer.count = (entries[-1].digest, len(entries)) if entries else (GENESIS, 0)
        fewer._version = entries[-1].version if entries else 1
        return fewer

    def add(self, entry: Entry) -> None:
        """The next one.

        Raises:
            LedgerError: names it, by the sequence that belongs at its place (also `metadata["entry"]`). What was added
                before stays verified; nothing can be added after that.
        """
        place = self.count + 1
        wrong = ""
        if entry.sequence != place:
            wrong = "it is missing, or another stands in its place"
        elif entry.previous != self.head:
            wrong = "it does not follow from the entry before it"
        elif entry.digest != entry_digest(entry):
            wrong = "its content does not match its digest"
        elif entry.version < self._version:
            wrong = "it is of an older version than the entry before it"
        wrong = wrong or problem(entry) or self.standing.apply(entry)
        if wrong:
            raise LedgerError(f"ledger entry {place}: {wrong}", entry=place)
        if self._judge is not None:
            self._judge(entry)
        self.head, self.count, self._version = entry.digest, place, entry.version

    def check_heads(self, known_heads: Iterable[str]) -> None:
        """Raises LedgerError unless each of these was once the head."""
        missing = sorted(set(known_heads) - self.standing.digests)
        if missing:
            raise LedgerError(
                f"the ledger lacks an entry that was once its last ({missing[0][:16]}…): it was cut or rewritten"
            )


def _head(entries: Ledger) -> Entry | None:
    if isinstance(entries, Standing):
        return entries.head
    return entries[-1] if entries else None


def _charge(entries: Ledger, entry: Entry) -> Entry:
    """`entry`, or the one that charged the same before."""
    known = charges(entries).get(entry.reservation_id)
    if known is None:
        return entry
    held = known.entry
    same = all(getattr(held, name) == getattr(entry, name) for name in _CHARGE_CONTENT)
    if not same:
        raise ConflictError("this reservation exists with another content", entry=held.sequence)
    if not known.counts:
        raise ConflictError("this reservation was given back: a new round has a new one", entry=held.sequence)
    return held


def reserve(
    entries: Ledger,
    *,
    at: str,
    job_id: str,
    round: int | None,
    unit: Unit,
    subject: str,
    reservation_id: str,
    event: Event,
    charged_rounds: int = 1,
    reason: str = "",
    user: str = "",
    parties: Iterable[str] = (),
    scientist: str = "",
) -> Entry:
    """A reservation to append; the one already there if the same was reserved before (at another time, say).

    Whether a budget allows it is `budget.check_affordable`'s to say, in the same transaction.

    Raises:
        ConflictError: `reservation_id` exists with another content, or was given back.
        InvalidInput: a field that no ledger accepts.
        LedgerError: `entries` break a rule.
    """
    entry = append(
        _head(entries),
        at=at,
        kind="reservation",
        job_id=job_id,
        round=round,
        unit=unit,
        subject=subject,
        reservation_id=reservation_id,
        charged_rounds=charged_rounds,
        event=event,
        reason=reason,
        user=user,
        parties=tuple(sorted(set(parties))),
        scientist=scientist,
    )
    return _charge(entries, entry)


def open_balance(
    entries: Ledger,
    *,
    at: str,
    unit: Unit,
    subject: str,
    reservation_id: str,
    event: Event,
    charged_rounds: int,
    reason: str,
    user: str = "",
) -> Entry:
    """An opening balance to append: what `subject` spent before this ledger; never given back. Raises as `reserve`."""
    entry = append(
        _head(entries),
        at=at,
        kind="opening_balance",
        job_id="",
        round=None,
        unit=unit,
        subject=subject,
        reservation_id=reservation_id,
        charged_rounds=charged_rounds,
        event=event,
        reason=reason,
        user=user,
    )
    return _charge(entries, entry)


def _known(entries: Ledger, reservation_id: str) -> Charge:
    known = charges(entries).get(reservation_id)
    if known is None:
        raise NotFoundError("no such reservation in this ledger")
    return known


def _follow(entries: Ledger, kind: Kind, held: Entry, *, at: str, reason: str = "", figures: Figures = ()) -> Entry:
    """An entry about what `held` charged."""
    return append(
        _head(entries),
        at=at,
        kind=kind,
        job_id=held.job_id,
        round=held.round,
        unit=held.unit,
        subject=held.subject,
        reservation_id=held.reservation_id,
        reason=reason,
        user=held.user,
        parties=held.parties,
        figures=figures,
    )


def _settle(entries: Ledger, kind: Kind, reservation_id: str, *, at: str, reason: str) -> Entry:
    known = _known(entries, reservation_id)
    if known.settled is not None and known.settled.kind == kind:
        return known.settled
    held = known.entry
    if known.settled is not None or held.kind == "opening_balance":
        state = known.settled.kind if known.settled else "an opening balance"
        raise LedgerError(f"ledger entry {held.sequence} is {state} and cannot become {kind}", entry=held.sequence)
    return _follow(entries, kind, held, at=at, reason=reason)


def finalise(entries: Ledger, reservation_id: str, *, at: str, reason: str = "") -> Entry:
    """The `final` entry to append for a reservation; the one already there on repetition.

    Raises:
        NotFoundError: no such reservation.
        LedgerError: it was given back, or is an opening balance; or `entries` break a rule.
    """
    return _settle(entries, "final", reservation_id, at=at, reason=reason)


def give_back(entries: Ledger, reservation_id: str, *, at: str, reason: str) -> Entry:
    """The `returned` entry to append for a reservation of which nothing left; the one already there on repetition.

    Raises:
        NotFoundError: no such reservation.
        LedgerError: it is final, or an opening balance; or `entries` break a rule.
    """
    return _settle(entries, "returned", reservation_id, at=at, reason=reason)


def release(entries: Ledger, reservation_id: str, *, at: str, figures: Mapping[str, str], reason: str = "") -> Entry:
    """The `release` entry to append once something was shown; the one already there on repetition.

    Args:
        figures: what was shown, in public words and digests: names in lower case, at most 32, values of at most 500
            characters.

    Raises:
        NotFoundError: no such reservation.
        LedgerError: it is not final; or `entries` break a rule.
        InvalidInput: figures that no ledger accepts.
    """
    known = _known(entries, reservation_id)
    if known.released is not None:
        return known.released
    held = known.entry
    if known.settled is None or known.settled.kind != "final":
        raise LedgerError(f"ledger entry {held.sequence} is not final: nothing of it is released", entry=held.sequence)
    return _follow(entries, "release", held, at=at, reason=reason, figures=tuple(sorted(figures.items())))


def refuse(
    entries: Ledger,
    *,
    at: str,
    job_id: str,
    round: int | None,
    unit: Unit,
    subject: str,
    reservation_id: str,
    event: Event | None,
    reason: str,
    user: str = "",
    parties: Iterable[str] = (),
    scientist: str = "",
) -> Entry:
    """A refusal to append: charges nothing. Raises InvalidInput for a field that no ledger accepts."""
    return append(
        _head(entries),
        at=at,
        kind="refusal",
        job_id=job_id,
        round=round,
        unit=unit,
        subject=subject,
        reservation_id=reservation_id,
        event=event,
        reason=reason,
        user=user,
        parties=tuple(sorted(set(parties))),
        scientist=scientist,
    )


def correct(
    entries: Ledger,
    *,
    at: str,
    unit: Unit,
    subject: str,
    action: Action,
    limit: Limit | None,
    reason: str,
) -> Entry:
    """A change of a budget to append; what it means is in `budget`.

    Args:
        subject: of one account, or of all of a kind that have no limit of their own: "dataset:*".
        limit: None only for a reset that leaves the limit as it is.
        reason: needed but for "configured".

    Raises:
        InvalidInput: a field that no ledger accepts.
    """
    return append(
        _head(entries),
        at=at,
        kind="correction",
        job_id="",
        round=None,
        unit=unit,
        subject=subject,
        reservation_id=f"budget/{unit}/{subject}",
        reason=reason,
        correction=Correction(action, limit),
    )
