"""The log: text or JSON lines on stderr, times in UTC, loggers under the name "sotto".

    log = logs.get_logger(__name__)
    log.info("round committed", extra={"job": job_id, "round": number})

What is in `extra` becomes `key=value` in text and a field in JSON. Public text and the private text of a `SottoError`
belong here; keys, shares, updates and anything computed from private rows do not.

Whatever it is given, a record is one line of printable characters, and not a long one: names, reasons and versions come
from others, who choose their length and their characters. So this is done here and nowhere else (`text`), for message,
arguments, fields and exceptions alike, and before a huge value is rendered. What one caller causes is bounded as well:
see `on_behalf_of`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TextIO

from .errors import SottoError, meaning
from .terminals import make_legible, shows_everything
from .text import CUT, brief, printable

ROOT: Final = "sotto"

MAX_MESSAGE_CHARACTERS: Final = 2000
"""Of a record's message, its arguments filled in: the longest of our own, a budget's warning, has about 600."""
MAX_FIELD_CHARACTERS: Final = 1000
"""Of an argument, and of the value of a field."""
MAX_LINE_CHARACTERS: Final = 8000
"""Of a line without its traceback; fields that do not fit any more are left out."""
MAX_TRACE_CHARACTERS: Final = 16_000
"""Of a traceback, in all."""

REPEAT_S: Final = 60.0
"""What goes on being said is said once in so long: see `Seldom`."""

LINES_AT_ONCE: Final = 100
"""That one caller may cause, and as many errors: a party that joins and takes part in a round causes five."""
LINES_A_SECOND: Final = 2.0
"""That a caller may cause in the long run."""

_PACKAGE: Final = __name__.partition(".")[0]  # "sotto", or "src" in a checkout
_ORDINARY: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_MAX_NAME_CHARACTERS: Final = 100  # of a logger, a level, a field
_MAX_TRACE_LINE_CHARACTERS: Final = 500
_MAX_FIELDS: Final = 40
_MAX_FRAMES: Final = 15  # of each exception, the innermost ones
_MAX_CHAIN: Final = 4  # exceptions that led to one another, the last ones
_MAX_NOTES: Final = 4
_MAX_CALLERS: Final = 1024  # whose lines are counted at a time; without TLS anybody has as many names as they like
_MAX_NUMBER: Final = 2**63
_TRACE_MARGIN: Final = "  | "
_TRACE_FIELD: Final = "traceback"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `name` is its `__name__`; "src.jobs.store" and "sotto.jobs.store" are one logger."""
    return logging.getLogger(_canonical(name))


def configure(*, level: str = "INFO", format: Literal["text", "json"] = "text", stream: TextIO | None = None) -> None:
    """Send the log to `stream` (stderr). Called once by a process; called again, it replaces what it set up before.

    Args:
        level: of Sotto's own loggers; other libraries are heard from WARNING on.
        format: "text", one line a record for people; "json", one object a line for machines.
        stream: where to; stderr by default.
    """
    stream = stream or sys.stderr
    make_legible(stream)
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter(escaped=not shows_everything(stream)) if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, TextFormatter | JsonFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in {ROOT, _PACKAGE}:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def tidy_last_resort() -> None:
    """In a process without a log, a command say: what a library warns of on stderr becomes printable lines as well."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(TextFormatter())


def type_and_place(error: BaseException) -> str:
    """All that may be said of an error raised while private rows are at hand: its type, and where it was raised, as
    file names and lines from the second frame inwards. Never its text, which may hold values."""
    frames = traceback.extract_tb(error.__traceback__)[1:][-4:]
    place = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__} at {place}" if place else type(error).__name__


@contextmanager
def muted() -> Iterator[None]:
    """Around what computes on private rows: nobody in this process logs or warns meanwhile, at any level.

    What is computed on knows more than may be told, and tells it to whoever asks: torch, at DEBUG, the size of every
    batch. For a process, or a part of its life, that has nothing else to log meanwhile.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _canonical(name: str) -> str:
    root, dot, rest = name.partition(".")
    return printable(f"{ROOT}{dot}{rest}" if root == _PACKAGE else name, _MAX_NAME_CHARACTERS)


# --- whose lines ------------------------------------------------------------------------------------------------------

_caller: ContextVar[str] = ContextVar("sotto_log_caller", default="")


def on_behalf_of(caller: str) -> None:
    """What this task logs from here on, and the tasks and threads that it starts, is counted as caused by `caller`.

    Who asks for refused things as fast as they can would fill a disk with lines, each of them short. So a caller has an
    allowance: `LINES_AT_ONCE`, and `LINES_A_SECOND` afterwards; errors (ERROR and above) have one of their own, so that
    refusals do not hide them. Of what goes beyond it is said that and how much is left out, until the half has come
    back.
    """
    _caller.set(caller)


@dataclass(slots=True)
class _Allowance:
    """Lines that are left to a caller, as of a time of the log's clock; how many were left out since they were used
    up."""

    lines: float
    at_s: float
    left_out: int = 0

    def take(self, now_s: float) -> bool:
        """Whether there is one more."""
        self.lines = min(float(LINES_AT_ONCE), self.lines + max(0.0, now_s - self.at_s) * LINES_A_SECOND)
        self.at_s = now_s
        if self.lines < (LINES_AT_ONCE / 2 if self.left_out else 1):
            self.left_out += 1
            return False
        self.lines -= 1
        return True


class _Handler(logging.StreamHandler[TextIO]):
    """Leaves out what a caller causes beyond their allowance, and says so."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._allowances: dict[tuple[str, bool], _Allowance] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it. Called under the handler's lock."""
        caller = _caller.get()
        if not caller:
            super().emit(record)
            return
        errors = record.levelno >= logging.ERROR
        allowance = self._allowance((caller, errors), record.created)
        before = allowance.left_out
        taken = allowance.take(record.created)
        if taken and before:
            self._say("%d %s on behalf of %s were left out", before, _kind(errors), caller)
            allowance.left_out = 0
        if taken:
            super().emit(record)
        elif not before:
            self._say("%s causes too many %s: more of them are left out for a while", caller, _kind(errors))

    def _allowance(self, key: tuple[str, bool], now_s: float) -> _Allowance:
        found = self._allowances.pop(key, None) or _Allowance(float(LINES_AT_ONCE), now_s)
        self._allowances[key] = found  # the one that was used last is the last: the first has rested longest
        if len(self._allowances) > _MAX_CALLERS:
            del self._allowances[next(iter(self._allowances))]
        return found

    def _say(self, text: str, *args: object) -> None:
        super().emit(logging.LogRecord(f"{ROOT}.logs", logging.WARNING, __file__, 0, text, args, None))


class Seldom:
    """What goes on being wrong and is noticed again and again: one line in `REPEAT_S`, which counts those before it.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, logger: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._said: dict[Hashable, tuple[float, int]] = {}

    def log(
        self,
        level: int,
        key: Hashable,
        text: str,
        *args: object,
        exc_info: BaseException | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> bool:
        """Say it, unless the same was said a moment ago; whether it was said.

        Args:
            key: what makes it the same, whatever the text says in detail.
            exc_info: shown with its traceback the first time.
        """
        now, first = self._clock(), key not in self._said
        since, unsaid = self._said.pop(key, (0.0, 0))
        if not first and now - since < REPEAT_S:
            self._said[key] = since, unsaid + 1
            return False
        self._said[key] = now, 0
        if len(self._said) > _MAX_CALLERS:
            del self._said[next(iter(self._said))]
        if unsaid:
            text = f"{text} (and {unsaid} times since the last line)"
        self._logger.log(level, text, *args, exc_info=exc_info if first else None, extra=extra)
        return True


def _kind(errors: bool) -> str:
    return "errors" if errors else "lines"


# --- one record, one line ---------------------------------------------------------------------------------------------


def _time(record: logging.LogRecord) -> str:
    """ISO 8601, UTC, milliseconds."""
    stamp = datetime.fromtimestamp(record.created, UTC)
    return stamp.strftime("%Y-%m-%dT%H:%M:%S.") + f"{stamp.microsecond // 1000:03d}Z"


def _message(record: logging.LogRecord) -> str:
    """The message, its arguments filled in: none of them is rendered beyond what is left of it."""
    text = record.msg if isinstance(record.msg, str) else brief(record.msg, MAX_MESSAGE_CHARACTERS)
    args: Any = record.args
    if args:
        many = isinstance(args, tuple)
        given = tuple(map(_argument, args)) if many else {key: _argument(value) for key, value in args.items()}
        try:
            text = text[:MAX_MESSAGE_CHARACTERS] % given
        except Exception:  # a mistake of whoever logs must not cost the line
            text = f"{text[:MAX_MESSAGE_CHARACTERS]} {brief(given, MAX_FIELD_CHARACTERS)}"
    return printable(text, MAX_MESSAGE_CHARACTERS)


def _argument(value: object) -> object:
    """As `%d` and `%s` take it."""
    return value if _is_number(value) else brief(value, MAX_FIELD_CHARACTERS)


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return -_MAX_NUMBER < value < _MAX_NUMBER
    return isinstance(value, float)


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """What the caller passed as `extra`, and what an error says about itself: texts, numbers, truths and nothings."""
    given: dict[str, Any] = {key: value for key, value in vars(record).items() if key not in _ORDINARY}
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, SottoError):
        given |= {"reason": meaning(error).reason}
        given |= {"private": error.private} if error.private else {}
    for key, value in islice(given.items(), _MAX_FIELDS):
        finite = value is None or (_is_number(value) and math.isfinite(value))
        yield printable(key, _MAX_NAME_CHARACTERS), value if finite else brief(value, MAX_FIELD_CHARACTERS)


def _trace(record: logging.LogRecord) -> list[str]:
    """The exception of a record with what led to it, line by line; and the stack, where one was asked for."""
    lines: list[str] = []
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        lines += trace_lines(error)
    if record.stack_info:
        lines += record.stack_info[:MAX_TRACE_CHARACTERS].splitlines()
    kept: list[str] = []
    room = MAX_TRACE_CHARACTERS
    for line in lines:
        cut = printable(line, _MAX_TRACE_LINE_CHARACTERS)
        room -= len(cut) + 1
        if room <= 0:
            return [*kept, CUT]
        kept.append(cut)
    return kept


def trace_lines(error: BaseException) -> Iterator[str]:
    """An exception and what led to it, about as the interpreter shows it; the lines are not printable yet. (`traceback`
    would render the whole of what exceptions hold.)"""
    chain: list[tuple[BaseException, str]] = [(error, "")]
    while len(chain) < _MAX_CHAIN:
        last = chain[-1][0]
        if last.__cause__ is not None:
            chain.append((last.__cause__, "the exception above led to this one:"))
        elif last.__context__ is not None and not last.__suppress_context__:
            chain.append((last.__context__, "while the exception above was handled, this one happened:"))
        else:
            break
    for each, then in reversed(chain):
        yield from _lines_of(each)
        if then:
            yield then


def _lines_of(error: BaseException) -> Iterator[str]:
    yield "Traceback (most recent call last):"
    for frame in traceback.extract_tb(error.__traceback__, limit=-_MAX_FRAMES):
        yield f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}'
        if frame.line:
            yield f"    {frame.line}"
    kind = type(error)
    yield f"{kind.__module__}.{kind.__qualname__}: {brief(error, MAX_FIELD_CHARACTERS)}"
    for note in list(getattr(error, "__notes__", ()))[:_MAX_NOTES]:
        yield f"  {brief(note, MAX_FIELD_CHARACTERS)}"
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions[:_MAX_NOTES]:
            yield f"  of which: {type(each).__name__}: {brief(each, MAX_FIELD_CHARACTERS)}"


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value`, on one line. A traceback follows on lines of its own, each behind a bar,
    as no record begins."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines of a record with a traceback."""
        level, name = printable(record.levelname, _MAX_NAME_CHARACTERS), _canonical(record.name)
        line = f"{_time(record)} {level:<7} {name}: {_message(record)}"
        for key, value in _fields(record):
            field = f" {key}={_quoted(value)}"
            line += field if len(line) + len(field) <= MAX_LINE_CHARACTERS else ""
        return "\n".join([line, *(f"{_TRACE_MARGIN}{each}" for each in _trace(record))])


def _quoted(value: object) -> str:
    """As it is, or in quotes where it would not be seen where it ends."""
    text = str(value)
    plain = text and not any(each in text for each in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, what was passed as `extra`, and a traceback if any.

    Args:
        escaped: what is not ASCII is escaped as JSON has it, for a stream that cannot show it.
    """

    def __init__(self, *, escaped: bool = False) -> None:
        super().__init__()
        self._escaped = escaped

    def format(self, record: logging.LogRecord) -> str:
        """The object on one line."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": printable(record.levelname, _MAX_NAME_CHARACTERS),
            "logger": _canonical(record.name),
            "message": _message(record),
        }
        room = MAX_LINE_CHARACTERS - len(self._json(entry))
        for key, value in _fields(record):
            size = len(self._json({key: value}))
            if key not in entry and key != _TRACE_FIELD and size <= room:
                entry[key] = value
                room -= size
        trace = _trace(record)
        return self._json(entry | ({_TRACE_FIELD: "\n".join(trace)} if trace else {}))

    def _json(self, entry: Mapping[str, Any]) -> str:
        return json.dumps(entry, ensure_ascii=self._escaped)
