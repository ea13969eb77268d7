"""The log: text or JSON lines on stderr, times in UTC, loggers under the name "sotto".

    log = logs.get_logger(__name__)
    log.info("round committed", extra={"job": job_id, "round": number})

What is in `extra` becomes `key=value` in text and a field in JSON. Public text and the private text of a `SottoError`
belong here; keys, shares, updates and anything computed from private rows do not.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TextIO

from .errors import SottoError, meaning

ROOT: Final = "sotto"
_PACKAGE: Final = __name__.partition(".")[0]  # "sotto", or "src" in a checkout
_ORDINARY: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_CONTROL: Final = {code: f"\\x{code:02x}" for code in [*range(32), 127]} | {10: "\\n", 13: "\\r", 9: "\\t"}


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
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, TextFormatter | JsonFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in {ROOT, _PACKAGE}:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


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
    return f"{ROOT}{dot}{rest}" if root == _PACKAGE else name


def _time(record: logging.LogRecord) -> str:
    """ISO 8601, UTC, milliseconds."""
    stamp = datetime.fromtimestamp(record.created, UTC)
    return stamp.strftime("%Y-%m-%dT%H:%M:%S.") + f"{stamp.microsecond // 1000:03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`, and what an error says about itself."""
    fields = {key: value for key, value in vars(record).items() if key not in _ORDINARY}
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, SottoError):
        fields |= {"reason": meaning(error).reason}
        fields |= {"private": error.private} if error.private else {}
    return fields


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "".join(traceback.format_exception(record.exc_info[1])).rstrip()


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; line breaks in the message are escaped, so that nobody can forge a line."""
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        text = f"{record.getMessage()}{fields}".translate(_CONTROL)
        line = f"{_time(record)} {record.levelname:<7} {_canonical(record.name)}: {text}"
        trace = _trace(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, what was passed as `extra`, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The object on one line."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": _canonical(record.name),
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in _fields(record).items() if key not in entry}
        trace = _trace(record)
        return json.dumps(entry | ({"traceback": trace} if trace else {}), ensure_ascii=False, default=str)
