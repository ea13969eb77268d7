"""The rules of the privacy ledger: hash-chained entries, what may follow what, and their export. Pure.

A ledger is a sequence of `Entry`. Each carries the digest of the one before, so that a changed, missing or moved entry
is noticed and named. A ledger that was cut at its end, or rewritten from some entry on, is noticed by the heads that
were recorded elsewhere (signed transcripts, manifests): pass them to `verify_chain`.

What is spent: a reservation counts from the moment it is written. `final` makes that irrevocable; `returned` gives it
back, and only before `final`. A reservation with neither counts as spent.

`reserve`, `finalise`, `give_back`, `refuse` and `open_balance` take the ledger as it is and return the entry to append,
or the entry already there when the call is a repetition; they write nothing. Budgets are in `budget`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal, TypeVar, get_args

from ..errors import ConflictError, InvalidInput, LedgerError, NotFoundError
from .events import RELATIONS, Event, Unit, event_from_json, event_to_json

Kind = Literal["opening_balance", "reservation", "final", "returned", "refusal"]

VERSION: Final = 1
GENESIS: Final = "0" * 64
"""`previous` of the first entry."""

_DOMAIN: Final = b"sotto.v1.ledger-entry\x00"
LONGEST_TEXT: Final = 500
_CHARGES: Final = frozenset({"opening_balance", "reservation"})
_CHARGE_CONTENT: Final = ("kind", "job_id", "round", "unit", "subject", "charged_rounds", "event")
"""What makes a repeated charge the same; time and reason may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger.

    Attributes:
        sequence: 1, 2, 3, …
        at: when it was written: UTC, ISO 8601.
        kind: "reservation" charges; "final" and "returned" settle one; "refusal" records that a charge was not
            affordable; "opening_balance" charges what was spent before this ledger began.
        job_id: the job it belongs to; "" for an opening balance.
        round: the job's round, or None.
        unit, subject: whose budget: ("example", "dataset:randhie"), ("party", "federation:demo").
        reservation_id: names the charge; "final" and "returned" repeat it.
        charged_rounds: rounds that it charges; 0 unless it charges.
        event: the mechanism that it charges (for a refusal: that was asked for); None for "final" and "returned".
        reason: public text, may be empty.
        previous: digest of the entry before, hex; `GENESIS` for the first.
        digest: SHA-256 over a domain and the canonical JSON of all the above, hex.
    """

    sequence: int
    at: str
    kind: Kind
    job_id: str
    round: int | None
    unit: Unit
    subject: str
    reservation_id: str
    charged_rounds: int
    event: Event | None
    reason: str
    previous: str
    digest: str


def _body(entry: Entry) -> dict[str, object]:
    return {
        "version": VERSION,
        "sequence": entry.sequence,
        "at": entry.at,
        "kind": entry.kind,
        "job_id": entry.job_id,
        "round": entry.round,
        "unit": entry.unit,
        "subject": entry.subject,
        "reservation_id": entry.reservation_id,
        "charged_rounds": entry.charged_rounds,
        "event": None if entry.event is None else event_to_json(entry.event),
        "reason": entry.reason,
        "previous": entry.previous,
    }


_FIELDS: Final = frozenset({*Entry.__dataclass_fields__, "version"})


def _canonical(fields: dict[str, object]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def entry_digest(entry: Entry) -> str:
    """The digest that `entry` must carry, hex."""
    return hashlib.sha256(_DOMAIN + _canonical(_body(entry)).encode("ascii")).hexdigest()


def _is_utc(text: str) -> bool:
    try:
        return text.isascii() and datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _problem(entry: Entry) -> str:
    """What is wrong with the fields of `entry` on their own; "" if nothing."""
    charges = entry.kind in _CHARGES
    texts = (entry.job_id, entry.subject, entry.reservation_id, entry.reason)
    checks = {
        "the kind is unknown": entry.kind in get_args(Kind),
        "the unit is unknown": entry.unit in RELATIONS,
        "the time is not UTC in ISO 8601": _is_utc(entry.at),
        "the round is negative": entry.round is None or entry.round >= 0,
        "a text is too long": all(len(text) <= LONGEST_TEXT for text in texts),
        "subject or reservation_id is empty": bool(entry.subject and entry.reservation_id),
        "only a charge has charged_rounds": entry.charged_rounds >= 0 and (charges or entry.charged_rounds == 0),
        "a reservation must charge a round": entry.kind != "reservation" or entry.charged_rounds >= 1,
        "a charge must have an event": not charges or entry.event is not None,
        "only a charge or a refusal has an event": charges or entry.kind == "refusal" or entry.event is None,
        "the event is of another unit": entry.event is None or entry.event.unit == entry.unit,
    }
    return next((text for text, holds in checks.items() if not holds), "")


def append(
    head: Entry | None,
    *,
    at: str,
    kind: Kind,
    job_id: str,
    round: int | None,
    unit: Unit,
    subject: str,
    reservation_id: str,
    charged_rounds: int = 0,
    event: Event | None = None,
    reason: str = "",
) -> Entry:
    """The entry that follows `head` (None: the first) with these fields; numbers and chains it, knows no other rule.

    Raises:
        InvalidInput: a field that no ledger accepts.
    """
    entry = Entry(
        sequence=head.sequence + 1 if head else 1,
        at=at,
        kind=kind,
        job_id=job_id,
        round=round,
        unit=unit,
        subject=subject,
        reservation_id=reservation_id,
        charged_rounds=charged_rounds,
        event=event,
        reason=reason,
        previous=head.digest if head else GENESIS,
        digest="",
    )
    problem = _problem(entry)
    if problem:
        raise InvalidInput(f"not a ledger entry: {problem}")
    return replace(entry, digest=entry_digest(entry))


# --- Lines ---------------------------------------------------------------------------------------------------------


def to_line(entry: Entry) -> str:
    """`entry` as one line of canonical JSON (sorted keys, no spaces, ASCII), without the line feed."""
    return _canonical({**_body(entry), "digest": entry.digest})


_T = TypeVar("_T")


def _typed(fields: dict[str, object], name: str, kind: type[_T]) -> _T:
    value = fields[name]
    if type(value) is not kind:
        raise LedgerError(f"{name} has another type")
    return value


def _parse(line: str) -> Entry:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LedgerError("it is not JSON") from error
    if not isinstance(fields, dict) or set(fields) != _FIELDS or fields["version"] != VERSION:
        raise LedgerError("it does not have the fields of this version")
    try:
        event = None if fields["event"] is None else event_from_json(fields["event"])
    except InvalidInput as error:
        raise LedgerError(error.message) from error
    entry = Entry(
        sequence=_typed(fields, "sequence", int),
        at=_typed(fields, "at", str),
        kind=_typed(fields, "kind", str),  # type: ignore[arg-type]  # _problem checks it
        job_id=_typed(fields, "job_id", str),
        round=None if fields["round"] is None else _typed(fields, "round", int),
        unit=_typed(fields, "unit", str),  # type: ignore[arg-type]  # _problem checks it
        subject=_typed(fields, "subject", str),
        reservation_id=_typed(fields, "reservation_id", str),
        charged_rounds=_typed(fields, "charged_rounds", int),
        event=event,
        reason=_typed(fields, "reason", str),
        previous=_typed(fields, "previous", str),
        digest=_typed(fields, "digest", str),
    )
    if to_line(entry) != line:
        raise LedgerError("it is not in canonical form")
    return entry


def from_line(line: str | bytes, *, number: int = 1) -> Entry:
    """The entry on `line`, which may end in one line feed. The chain is not checked here.

    Raises:
        LedgerError: not canonical JSON of an entry; the message names line `number`.
    """
    try:
        text = line.decode("ascii") if isinstance(line, bytes) else line
        return _parse(text.removesuffix("\n"))
    except UnicodeDecodeError as error:
        raise LedgerError(f"ledger line {number}: it is not ASCII", entry=number) from error
    except LedgerError as error:
        raise LedgerError(f"ledger line {number}: {error.message}", entry=number) from error


def verify_lines(lines: Iterable[str | bytes], *, known_heads: Iterable[str] = ()) -> list[Entry]:
    """Parse and verify an export; returns its entries.

    Every sound line before the first bad one is verified first, so the first bad entry is the one named.

    Raises:
        LedgerError: as `from_line` and `verify_chain`.
    """
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(from_line(line, number=number))
        except LedgerError:
            verify_chain(entries)
            raise
    verify_chain(entries, known_heads=known_heads)
    return entries


# --- Rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Charge:
    """One charge and what became of it; `settled` is the `final` or `returned` entry, or None while open."""

    entry: Entry
    settled: Entry | None

    @property
    def counts(self) -> bool:
        """Whether it is spent: everything that was not given back."""
        return self.settled is None or self.settled.kind != "returned"


def _apply(charges: dict[str, Charge], entry: Entry) -> str:
    """Put `entry` on the books; returns what rule it breaks, "" if none."""
    if entry.kind == "refusal":
        return ""
    known = charges.get(entry.reservation_id)
    if entry.kind in _CHARGES:
        if known is not None:
            return "it charges a reservation_id a second time"
        charges[entry.reservation_id] = Charge(entry, None)
        return ""
    if known is None:
        return "it settles a reservation that does not exist"
    if known.settled is not None or known.entry.kind == "opening_balance":
        return "it settles a charge that is settled already"
    if _owner(entry) != _owner(known.entry):
        return "it settles a reservation of another job, round, unit or subject"
    charges[entry.reservation_id] = Charge(known.entry, entry)
    return ""


def _owner(entry: Entry) -> tuple[str, int | None, str, str]:
    return entry.job_id, entry.round, entry.unit, entry.subject


def charges(entries: Iterable[Entry]) -> dict[str, Charge]:
    """Every charge by `reservation_id`, in order of charging.

    Raises:
        LedgerError: an entry breaks a rule; `metadata["entry"]` is its sequence.
    """
    books: dict[str, Charge] = {}
    for entry in entries:
        problem = _apply(books, entry)
        if problem:
            raise LedgerError(f"ledger entry {entry.sequence}: {problem}", entry=entry.sequence)
    return books


def verify_chain(entries: Iterable[Entry], *, known_heads: Iterable[str] = ()) -> str:
    """Check a whole ledger; returns its head, the digest of the last entry (`GENESIS` if there is none).

    Args:
        entries: all of them, in order.
        known_heads: digests that this ledger had as head at some time; each must be there.

    Raises:
        LedgerError: names the first bad entry, by the sequence that belongs at its place (also `metadata["entry"]`), or
            says that a known head is missing.
    """
    books: dict[str, Charge] = {}
    head = GENESIS
    seen = {GENESIS}
    for place, entry in enumerate(entries, start=1):
        problem = ""
        if entry.sequence != place:
            problem = "it is missing, or another stands in its place"
        elif entry.previous != head:
            problem = "it does not follow from the entry before it"
        elif entry.digest != entry_digest(entry):
            problem = "its content does not match its digest"
        problem = problem or _problem(entry) or _apply(books, entry)
        if problem:
            raise LedgerError(f"ledger entry {place}: {problem}", entry=place)
        head = entry.digest
        seen.add(head)
    if not seen.issuperset(known_heads):
        raise LedgerError("the ledger lacks an entry that was once its last: it was cut or rewritten")
    return head


def _head(entries: Sequence[Entry]) -> Entry | None:
    return entries[-1] if entries else None


def _charge(entries: Sequence[Entry], entry: Entry) -> Entry:
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
    entries: Sequence[Entry],
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
    )
    return _charge(entries, entry)


def open_balance(
    entries: Sequence[Entry],
    *,
    at: str,
    unit: Unit,
    subject: str,
    reservation_id: str,
    event: Event,
    charged_rounds: int,
    reason: str,
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
    )
    return _charge(entries, entry)


def _settle(entries: Sequence[Entry], kind: Kind, reservation_id: str, *, at: str, reason: str) -> Entry:
    known = charges(entries).get(reservation_id)
    if known is None:
        raise NotFoundError("no such reservation in this ledger")
    if known.settled is not None and known.settled.kind == kind:
        return known.settled
    held = known.entry
    if known.settled is not None or held.kind == "opening_balance":
        state = known.settled.kind if known.settled else "an opening balance"
        raise LedgerError(f"ledger entry {held.sequence} is {state} and cannot become {kind}", entry=held.sequence)
    return append(
        _head(entries),
        at=at,
        kind=kind,
        job_id=held.job_id,
        round=held.round,
        unit=held.unit,
        subject=held.subject,
        reservation_id=reservation_id,
        reason=reason,
    )


def finalise(entries: Sequence[Entry], reservation_id: str, *, at: str, reason: str = "") -> Entry:
    """The `final` entry to append for a reservation; the one already there on repetition.

    Raises:
        NotFoundError: no such reservation.
        LedgerError: it was given back, or is an opening balance; or `entries` break a rule.
    """
    return _settle(entries, "final", reservation_id, at=at, reason=reason)


def give_back(entries: Sequence[Entry], reservation_id: str, *, at: str, reason: str) -> Entry:
    """The `returned` entry to append for a reservation of which nothing left; the one already there on repetition.

    Raises:
        NotFoundError: no such reservation.
        LedgerError: it is final, or an opening balance; or `entries` break a rule.
    """
    return _settle(entries, "returned", reservation_id, at=at, reason=reason)


def refuse(
    entries: Sequence[Entry],
    *,
    at: str,
    job_id: str,
    round: int | None,
    unit: Unit,
    subject: str,
    reservation_id: str,
    event: Event | None,
    reason: str,
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
    )
