"""One entry of the privacy ledger: what it says, its canonical line, its digest. Pure.

Version 3 is what is written. Lines of earlier versions are read as they are: version 2 has no `scientist`, version 1
also no `relation`, `user`, `parties`, `figures`, `correction` and `signature`. What may follow what is in `ledger`; who
signs, in `protocol.ledger`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal, TypeVar, get_args

from ..errors import InvalidInput, LedgerError
from .events import RELATIONS, Event, Relation, Unit, event_from_json, event_to_json

Kind = Literal["opening_balance", "reservation", "final", "returned", "refusal", "release", "correction"]

Action = Literal["configured", "set", "reset"]
"""What a correction does: enters the configuration's limit at first sight of it, changes a limit, or begins a new
accounting period."""

VERSION: Final = 3
"""Of what is written; those before are still read."""
GENESIS: Final = "0" * 64
"""`previous` of the first entry."""

LONGEST_TEXT: Final = 500
MOST_FIGURES: Final = 32
CHARGES: Final = frozenset({"opening_balance", "reservation"})
"""Kinds that charge."""

_DOMAIN: Final = b"sotto.v1.ledger-entry\x00"
_SIGNATURE: Final = re.compile(r"(?:[0-9a-f]{192})?")
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")

Figures = tuple[tuple[str, str], ...]
"""(name, value) by name, each once: public figures about what was shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one subject may spend at one unit.

    Attributes:
        max_rounds: rounds, ≥ 0; None for no limit.
        epsilon: ε at `delta`, ≥ 0; None for no limit.
        delta: in (0, 1).

    Raises:
        InvalidInput: a value out of range.
    """

    max_rounds: int | None
    epsilon: float | None
    delta: float

    def __post_init__(self) -> None:
        if self.max_rounds is not None and (type(self.max_rounds) is not int or self.max_rounds < 0):
            raise InvalidInput("max_rounds must be a whole number, and not negative")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon >= 0.0):
            raise InvalidInput("the epsilon of a budget must be finite and not negative; leave it out for no limit")
        if not 0.0 < self.delta < 1.0:
            raise InvalidInput("the delta of a budget must lie strictly between 0 and 1")

    def __str__(self) -> str:
        rounds = "no limit in rounds" if self.max_rounds is None else f"{self.max_rounds} rounds"
        epsilon = "no limit in ε" if self.epsilon is None else f"ε {self.epsilon:g} at δ {self.delta:g}"
        return f"{rounds}, {epsilon}"


@dataclass(frozen=True, slots=True)
class Correction:
    """What an entry of kind "correction" does; `limit` is None where a reset leaves the limit as it is."""

    action: Action
    limit: Limit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger.

    Attributes:
        sequence: 1, 2, 3, …
        at: when it was written: UTC, ISO 8601.
        kind: "reservation" charges; "final" and "returned" settle one; "release" says what was shown of a final one;
            "refusal" records that a charge was not affordable; "opening_balance" charges what was spent before this
            ledger began; "correction" changes a budget.
        job_id: the job it belongs to; "" where there is none.
        round: the job's round, or None.
        unit, subject: whose budget: ("example", "dataset:randhie"), ("party", "federation:demo"). Of a correction the
            subject may be that of a whole kind: "dataset:*".
        reservation_id: names the charge; "final", "returned" and "release" repeat it.
        charged_rounds: rounds that it charges; 0 unless it charges.
        event: the mechanism that it charges (for a refusal: that was asked for); None for all other kinds.
        reason: public text, may be empty except in a correction by hand.
        previous: digest of the entry before, hex; `GENESIS` for the first.
        digest: SHA-256 over a domain and the canonical JSON of all but itself and the signature, hex.
        version: of its line.
        user: whose data it is about ("" where nobody is named): it counts against their quota as well.
        parties: whom the round invited, by name, sorted: it counts on their budgets as well. Empty where nobody is
            named; then the line has no such field.
        scientist: who ordered what it charges, or what was refused; never the `user`, whose data it is about. "" where
            nobody signed an order; then the line has no such field.
        figures: of a release, what was shown.
        correction: of a correction, what it does.
        signature: 192 hex digits, the public key and its Ed25519 signature over the digest (`protocol.ledger`); "" for
            an entry that nobody signed.
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
    version: int = VERSION
    user: str = ""
    parties: tuple[str, ...] = ()
    scientist: str = ""
    figures: Figures = ()
    correction: Correction | None = None
    signature: str = ""

    @property
    def relation(self) -> Relation:
        """The neighbouring relation of its unit."""
        return RELATIONS[self.unit]


def _limit_to_json(limit: Limit) -> dict[str, object]:
    epsilon = None if limit.epsilon is None else repr(float(limit.epsilon))
    return {"max_rounds": limit.max_rounds, "epsilon": epsilon, "delta": repr(float(limit.delta))}


def _body(entry: Entry) -> dict[str, object]:
    """What the digest is over."""
    body: dict[str, object] = {
        "version": entry.version,
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
    if entry.version == 1:
        return body
    corrected = entry.correction
    named: dict[str, object] = {"parties": [*entry.parties]} if entry.parties else {}
    named |= {"scientist": entry.scientist} if entry.scientist else {}
    return body | {
        "relation": RELATIONS.get(entry.unit),
        "user": entry.user,
        **named,
        "figures": dict(entry.figures),
        "correction": None
        if corrected is None
        else {
            "action": corrected.action,
            "limit": None if corrected.limit is None else _limit_to_json(corrected.limit),
        },
    }


_OPTIONAL: Final[dict[int, frozenset[str]]] = {
    3: frozenset({"parties", "scientist"}),
    2: frozenset({"parties"}),
    1: frozenset(),
}
"""Fields that a line has only where they name somebody, by its version."""
_ADDED: Final = frozenset({"relation", "user", "figures", "correction", "signature"}) | _OPTIONAL[VERSION]
_NEWER: Final = frozenset({*Entry.__dataclass_fields__, "relation"}) - _OPTIONAL[VERSION]
_FIELDS: Final = {3: _NEWER, 2: _NEWER, 1: frozenset({*Entry.__dataclass_fields__}) - _ADDED}
"""Of every line, by its version."""


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


def _are_figures(figures: Figures) -> bool:
    names = [name for name, _ in figures]
    fits = all(_NAME.fullmatch(name) and len(value) <= LONGEST_TEXT for name, value in figures)
    return fits and names == sorted(set(names)) and len(names) <= MOST_FIGURES


def _are_parties(parties: tuple[str, ...]) -> bool:
    return list(parties) == sorted(set(parties)) and all(0 < len(name) <= LONGEST_TEXT for name in parties)


def _correction_problem(entry: Entry) -> str:
    corrected = entry.correction
    if corrected is None or entry.kind != "correction":
        return "" if corrected is None and entry.kind != "correction" else "only a correction has a correction"
    checks = {
        "the action is unknown": corrected.action in get_args(Action),
        "only a reset leaves the limit as it is": corrected.action == "reset" or corrected.limit is not None,
        "a correction by hand must have a reason": corrected.action == "configured" or bool(entry.reason.strip()),
        "a reset is of one subject": corrected.action != "reset" or not entry.subject.endswith(":*"),
    }
    return next((text for text, holds in checks.items() if not holds), "")


def problem(entry: Entry) -> str:
    """What is wrong with the fields of `entry` on their own; "" if nothing."""
    charges = entry.kind in CHARGES
    texts = (entry.job_id, entry.subject, entry.reservation_id, entry.reason, entry.user, entry.scientist)
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
        "the version is unknown": entry.version in _FIELDS,
        "version 1 has no such entry": entry.version > 1 or entry.kind not in {"release", "correction"},
        "version 2 names no scientist": entry.version > 2 or not entry.scientist,
        "only a charge or a refusal names a scientist": charges or entry.kind == "refusal" or not entry.scientist,
        "only a release has figures": _are_figures(entry.figures) and (not entry.figures or entry.kind == "release"),
        "the parties are not sorted names": _are_parties(entry.parties),
        "a correction names no parties": entry.kind != "correction" or not entry.parties,
        "the signature has another form": _SIGNATURE.fullmatch(entry.signature) is not None,
    }
    return next((text for text, holds in checks.items() if not holds), "") or _correction_problem(entry)


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
    user: str = "",
    parties: tuple[str, ...] = (),
    scientist: str = "",
    figures: Figures = (),
    correction: Correction | None = None,
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
        user=user,
        parties=parties,
        scientist=scientist,
        figures=figures,
        correction=correction,
    )
    wrong = problem(entry)
    if wrong:
        raise InvalidInput(f"not a ledger entry: {wrong}")
    return replace(entry, digest=entry_digest(entry))


# --- Lines ---------------------------------------------------------------------------------------------------------


def to_line(entry: Entry) -> str:
    """`entry` as one line of canonical JSON (sorted keys, no spaces, ASCII), without the line feed."""
    signed = {} if entry.version == 1 else {"signature": entry.signature}
    return _canonical({**_body(entry), "digest": entry.digest, **signed})


_T = TypeVar("_T")


def _typed(fields: dict[str, object], name: str, kind: type[_T]) -> _T:
    value = fields[name]
    if type(value) is not kind:
        raise LedgerError(f"{name} has another type")
    return value


def _real(value: object) -> float:
    """What `_limit_to_json` wrote; whether it is in its shortest form the whole line's comparison tells."""
    try:
        return float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return math.nan


def _read_limit(value: object) -> Limit | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"max_rounds", "epsilon", "delta"}:
        raise LedgerError("a limit has other fields")
    rounds, epsilon = value["max_rounds"], value["epsilon"]
    if rounds is not None and type(rounds) is not int:
        raise LedgerError("max_rounds has another type")
    try:
        return Limit(
            max_rounds=rounds, epsilon=None if epsilon is None else _real(epsilon), delta=_real(value["delta"])
        )
    except InvalidInput as error:
        raise LedgerError(error.message) from error


def _read_added(fields: dict[str, object]) -> dict[str, object]:
    """What version 2 added, and version 3."""
    figures = _typed(fields, "figures", dict)
    if not all(type(value) is str for value in figures.values()):
        raise LedgerError("a figure has another type")
    parties = fields.get("parties", [])
    if type(parties) is not list or not all(type(name) is str for name in parties):
        raise LedgerError("parties has another type")
    scientist = fields.get("scientist", "")
    if type(scientist) is not str:
        raise LedgerError("scientist has another type")
    corrected = fields["correction"]
    if corrected is not None and (not isinstance(corrected, dict) or set(corrected) != {"action", "limit"}):
        raise LedgerError("correction has other fields")
    return {
        "user": _typed(fields, "user", str),
        "parties": tuple(parties),
        "scientist": scientist,
        "figures": tuple(sorted(figures.items())),
        # The action is checked by `problem`, the relation by the comparison of the whole line.
        "correction": corrected and Correction(corrected["action"], _read_limit(corrected["limit"])),
        "signature": _typed(fields, "signature", str),
    }


def _parse(line: str) -> Entry:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LedgerError("it is not JSON") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is not int or frozenset(fields) - _OPTIONAL.get(version, frozenset()) != _FIELDS.get(version):
        raise LedgerError("it does not have the fields of its version, or the version is unknown")
    try:
        event = None if fields["event"] is None else event_from_json(fields["event"])
    except InvalidInput as error:
        raise LedgerError(error.message) from error
    entry = Entry(
        version=version,
        sequence=_typed(fields, "sequence", int),
        at=_typed(fields, "at", str),
        kind=_typed(fields, "kind", str),  # type: ignore[arg-type]  # `problem` checks it
        job_id=_typed(fields, "job_id", str),
        round=None if fields["round"] is None else _typed(fields, "round", int),
        unit=_typed(fields, "unit", str),  # type: ignore[arg-type]  # `problem` checks it
        subject=_typed(fields, "subject", str),
        reservation_id=_typed(fields, "reservation_id", str),
        charged_rounds=_typed(fields, "charged_rounds", int),
        event=event,
        reason=_typed(fields, "reason", str),
        previous=_typed(fields, "previous", str),
        digest=_typed(fields, "digest", str),
        **(_read_added(fields) if version > 1 else {}),  # type: ignore[arg-type]  # typed there
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
