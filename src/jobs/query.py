"""Which jobs a listing shows and in which order: filters after AIP-160, `order_by` after AIP-132, pages after AIP-158.

A filter joins comparisons by AND, OR, NOT and parentheses; as AIP-160 has it, OR binds tighter than AND. It is parsed
into plain data, which becomes an SQL expression with bound parameters: no text of a caller is ever part of SQL.

A page token holds the sort key of the last job shown, so that the next page goes on behind it whatever was inserted
meanwhile (keyset pagination), and the fingerprint of the listing that it belongs to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, String, Table, and_, case, func, not_, or_, true, tuple_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from ..errors import InvalidInput
from .states import JobRow, JobState, Priority

MAX_FILTER_CHARACTERS: Final = 1000
MAX_DEPTH: Final = 20
"""Of parentheses and NOTs within each other: the parser recurses."""
MAX_INTEGER: Final = 2**31 - 1
"""What an INTEGER column holds."""

_RANKS: Final[Mapping[str, Mapping[str, int]]] = {
    "priority": {name: rank for rank, name in enumerate((Priority.LOW, Priority.NORMAL, Priority.HIGH), 1)},
    "state": {name: rank for rank, name in enumerate(JobState, 1)},
}
"""What is sorted by meaning, not by name: the more urgent is the greater; a state is greater than those before it."""

_TIMES: Final = {"create_time": "created_at", "start_time": "started_at", "end_time": "ended_at"}
_EQUALITY: Final = ("=", "!=")
_COMPARISONS: Final = (*_EQUALITY, "<", "<=", ">", ">=")
_OPERATORS: Final[Mapping[str, tuple[str, ...]]] = {
    "state": _EQUALITY,
    "priority": _COMPARISONS,
    "kind": (*_EQUALITY, ":"),
    "owner": (*_COMPARISONS, ":"),
    "display_name": (*_COMPARISONS, ":"),
    "task": (*_EQUALITY, ":"),
    "attempt": _COMPARISONS,
    **dict.fromkeys(_TIMES, (*_COMPARISONS, ":")),
}
"""Field of a filter → what it may be compared by."""

_SORTABLE: Final = ("create_time", "start_time", "end_time", "priority", "state", "kind", "owner", "display_name")

_PYTHON: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """`field operator value`. A time is UTC, ISO 8601, as in `JobRow`; of ":" on a time, the value is "*"."""

    field: str
    operator: str
    value: str | int


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite."""

    of: Filter


@dataclass(frozen=True, slots=True)
class And:
    """All of them; of none: everything."""

    of: tuple[Filter, ...] = ()


@dataclass(frozen=True, slots=True)
class Or:
    """At least one of two or more."""

    of: tuple[Filter, ...]


Filter = Comparison | Not | And | Or


@dataclass(frozen=True, slots=True)
class Order:
    """A field to sort by."""

    field: str
    descending: bool = False


NEWEST_FIRST: Final = (Order("create_time", descending=True),)


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_filter(text: str) -> Filter:
    """A filter; an empty one is of everything.

    A value is a word or stands in quotes of either kind, in which a backslash makes the next character mean itself.
    Times are RFC 3339 with an offset. ":" means "contains", upper and lower case of ASCII letters alike; `field:*` that
    there is something, e.g. `start_time:*`. A time that has not come yet is before and after nothing.

    Raises:
        InvalidInput: with what is wrong and where ("at character N", from 1).
    """
    if len(text) > MAX_FILTER_CHARACTERS:
        raise _refused("filter", f"at most {MAX_FILTER_CHARACTERS} characters (got {len(text)})")
    parser = _Parser(text)
    if parser.at_end():
        return And()
    found = parser.conjunction(0)
    if not parser.at_end():
        raise parser.wrong("AND, OR or the end expected")
    return found


def parse_order(text: str) -> tuple[Order, ...]:
    """Fields joined by commas, each ascending unless "desc" follows; none: newest first.

    Raises:
        InvalidInput: a field that nothing is sorted by, or one that is there twice.
    """
    if not text.strip():
        return NEWEST_FIRST
    orders = []
    for part in text.split(",", len(_SORTABLE)):
        name, *direction = part.split() or [""]
        if name not in _SORTABLE:
            raise _refused("order_by", f"{_shown(name)} is none of {', '.join(_SORTABLE)}")
        if direction not in ([], ["asc"], ["desc"]):
            raise _refused("order_by", f'after {name}: "desc", "asc" or a comma expected')
        orders.append(Order(name, descending=direction == ["desc"]))
    if len({order.field for order in orders}) != len(orders):
        raise _refused("order_by", "a field is there twice")
    return tuple(orders)


_SPACE: Final = re.compile(r"\s*")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_OPERATOR: Final = re.compile(r"!=|<=|>=|=|<|>|:")
_BARE: Final = re.compile(r"""[^\s()"',=<>!]+""")
_QUOTED: Final = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""", re.DOTALL)


class _Parser:
    """Recursive descent over the grammar of https://google.aip.dev/assets/misc/ebnf-filtering.txt, without functions,
    members and bare values."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.at_end()

    def wrong(self, what: str, at: int | None = None) -> InvalidInput:
        return _refused("filter", f"{what} at character {(self._at if at is None else at) + 1}")

    def at_end(self) -> bool:
        match = _SPACE.match(self._text, self._at)
        assert match
        self._at = match.end()
        return self._at == len(self._text)

    def conjunction(self, depth: int) -> Filter:
        terms = [self.disjunction(depth)]
        while self._word("AND"):
            terms.append(self.disjunction(depth))
        return terms[0] if len(terms) == 1 else And(tuple(terms))

    def disjunction(self, depth: int) -> Filter:
        terms = [self.term(depth)]
        while self._word("OR"):
            terms.append(self.term(depth))
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def term(self, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise self.wrong(f"more than {MAX_DEPTH} parentheses and NOTs within each other")
        if self._word("NOT") or self._character("-"):
            return Not(self.term(depth + 1))
        if self._character("("):
            inner = self.conjunction(depth + 1)
            if not self._character(")"):
                raise self.wrong("AND, OR or a closing parenthesis expected")
            return inner
        return self._comparison()

    def _comparison(self) -> Comparison:
        start = self._at
        name = self._take(_NAME)
        if name is None or name in ("AND", "OR", "NOT"):
            raise self.wrong("a comparison expected", start)
        if name not in _OPERATORS:
            raise self.wrong(f"{_shown(name)} is none of {', '.join(_OPERATORS)}", start)
        at = self._at
        found = self._take(_OPERATOR)
        if found is None or found not in _OPERATORS[name]:
            raise self.wrong(f"{name} is compared by {' '.join(_OPERATORS[name])}: one of these expected", at)
        at = self._at
        return Comparison(name, found, self._value(name, found, at))

    def _value(self, name: str, comparison: str, at: int) -> str | int:
        if (quoted := _QUOTED.match(self._text, self._at)) is not None:
            self._at = quoted.end()
            self.at_end()
            value = re.sub(r"\\(.)", r"\1", quoted[1] if quoted[1] is not None else quoted[2], flags=re.DOTALL)
        elif (bare := self._take(_BARE)) is not None:
            value = bare
        else:
            raise self.wrong("a value expected, in quotes or a word", at)
        try:
            return _VALUES.get(name, _text_value)(name, value, comparison)
        except ValueError as error:
            raise self.wrong(f"{name}: {error}", at) from None

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        self.at_end()
        return match[0]

    def _character(self, character: str) -> bool:
        return self._take(re.compile(re.escape(character))) is not None

    def _word(self, word: str) -> bool:
        return self._take(re.compile(rf"{word}(?![A-Za-z0-9_.])")) is not None


def _text_value(_name: str, value: str, _comparison: str) -> str:
    if not _storable(value):
        raise ValueError("no NUL characters")
    return value


def _name_value(name: str, value: str, _comparison: str) -> str:
    if value not in _RANKS[name]:
        raise ValueError(f"one of {', '.join(_RANKS[name])} expected")
    return value


def _integer_value(_name: str, value: str, _comparison: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) > MAX_INTEGER:
        raise ValueError(f"an integer from 0 to {MAX_INTEGER} expected")
    return int(value)


_RFC_3339: Final = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _time_value(_name: str, value: str, comparison: str) -> str:
    if comparison == ":":
        if value != "*":
            raise ValueError('only "*" can be contained in a time')
        return value
    match = _RFC_3339.fullmatch(value)
    if match is None:
        raise ValueError("a time such as 2026-01-31T12:00:00Z expected")
    date, time, fraction, offset = match.groups()
    text = f"{date}T{time}.{(fraction or '0')[:6]:0<6}{offset.upper()}"
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise ValueError("no such time") from None
    return moment.isoformat(timespec="microseconds") + "Z"


_VALUES: Final[Mapping[str, Callable[[str, str, str], str | int]]] = {
    "state": _name_value,
    "priority": _name_value,
    "attempt": _integer_value,
    **dict.fromkeys(_TIMES, _time_value),
}


def _storable(text: str) -> bool:
    """Whether a database takes it: PostgreSQL has no NUL, and half of a surrogate pair is no character."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(name: str) -> str:
    return repr(name[:40])


def _refused(field: str, what: str) -> InvalidInput:
    return InvalidInput(f"{field}: {what}", violations={field: what})


# --- SQL --------------------------------------------------------------------------------------------------------------


class _Task(FunctionElement[str]):
    """The `task` at the top of the JSON text in a column; NULL where there is none."""

    type = String()
    inherit_cache = True


@compiles(_Task)
def _task_of_json(element: _Task, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_extract({compiler.process(element.clauses, **options)}, '$.task')"


@compiles(_Task, "postgresql")
def _task_of_json_in_postgresql(element: _Task, compiler: SQLCompiler, **options: Any) -> str:
    return f"(CAST({compiler.process(element.clauses, **options)} AS JSON) ->> 'task')"


def condition(wanted: Filter, jobs: Table) -> ColumnElement[bool]:
    """What holds of the jobs that pass a filter."""
    match wanted:
        case And(parts):
            return and_(true(), *(condition(part, jobs) for part in parts))
        case Or(parts):
            return or_(*(condition(part, jobs) for part in parts))
        case Not(part):
            return not_(condition(part, jobs))
        case Comparison(name, comparison, value):
            return _compared(jobs, name, comparison=comparison, value=value)


def _compared(jobs: Table, name: str, *, comparison: str, value: str | int) -> ColumnElement[bool]:
    column: ColumnElement[Any] = (
        jobs.c[_TIMES.get(name, name)] if name != "task" else func.coalesce(_Task(jobs.c.spec), "")
    )
    if comparison == ":" and value == "*":
        return column != ""
    if comparison == ":":
        return func.lower(column).contains(_lower(str(value)), autoescape=True)
    compare = _PYTHON[comparison]
    if name in _RANKS and comparison not in _EQUALITY:
        return or_(
            *(column == other for other, rank in _RANKS[name].items() if compare(rank, _RANKS[name][str(value)]))
        )
    found: ColumnElement[bool] = compare(column, value)
    return and_(column != "", found) if name in _TIMES and comparison in ("<", "<=") else found


def _lower(text: str) -> str:
    """As SQLite's `lower`, and PostgreSQL's under the collation "C", do it: ASCII letters only."""
    return "".join(character.lower() if character.isascii() else character for character in text)


def ordering(order: Sequence[Order], jobs: Table) -> list[ColumnElement[Any]]:
    """What to sort by; the job_id decides between jobs that are alike in the rest."""
    return [column.desc() if descending else column.asc() for column, descending in _keys(order, jobs)]


def _keys(order: Sequence[Order], jobs: Table) -> list[tuple[ColumnElement[Any], bool]]:
    keys: list[tuple[ColumnElement[Any], bool]] = []
    for each in order:
        column = jobs.c[_TIMES.get(each.field, each.field)]
        ranked = case(_RANKS[each.field], value=column, else_=0) if each.field in _RANKS else column
        keys.append((ranked, each.descending))
    return [*keys, (jobs.c.job_id, order[-1].descending)]


def _sort_key(row: JobRow, order: Sequence[Order]) -> list[str | int]:
    """What `_keys` are for a row."""
    values = [getattr(row, _TIMES.get(each.field, each.field)) for each in order]
    ranked = [
        _RANKS[each.field][value] if each.field in _RANKS else value for each, value in zip(order, values, strict=True)
    ]
    return [*ranked, row.job_id]


# --- pages ------------------------------------------------------------------------------------------------------------

Listing = tuple[str, str, str | None, bool]
"""Filter, order, owner, whether deleted jobs are shown: what a page token belongs to."""


def page_token(last: JobRow, listing: Listing, *, order: Sequence[Order]) -> str:
    """The token of the page after the one that ends with `last`."""
    content = json.dumps([_fingerprint(listing), *_sort_key(last, order)])
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def after(token: str, listing: Listing, *, order: Sequence[Order], jobs: Table) -> ColumnElement[bool]:
    """What holds of the jobs behind the one that a page token was made of.

    Raises:
        InvalidInput: it was not made by `page_token`, or for another listing.
    """
    values = _open_token(token, listing, order)
    keys = _keys(order, jobs)
    columns, descending = [column for column, _ in keys], [down for _, down in keys]
    if len(set(descending)) == 1:  # a comparison of rows, which an index answers
        here, there = tuple_(*columns), tuple_(*values)
        return here < there if descending[0] else here > there
    ways = []
    for number, (column, down) in enumerate(keys):
        alike = [columns[index] == values[index] for index in range(number)]
        ways.append(and_(*alike, column < values[number] if down else column > values[number]))
    return or_(*ways)


def _open_token(token: str, listing: Listing, order: Sequence[Order]) -> list[str | int]:
    try:
        content = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (ValueError, RecursionError) as error:
        raise _refused("page_token", "not of this service") from error
    if not isinstance(content, list) or not content:
        raise _refused("page_token", "not of this service")
    found, *values = content
    if found != _fingerprint(listing):
        raise _refused("page_token", "made for another filter, order or caller")
    fits = [_is_rank if each.field in _RANKS else _is_text for each in order] + [_is_text]
    if len(values) != len(fits) or not all(fit(value) for fit, value in zip(fits, values, strict=True)):
        raise _refused("page_token", "not of this service")
    return values


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _storable(value)


def _fingerprint(listing: Listing) -> str:
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
