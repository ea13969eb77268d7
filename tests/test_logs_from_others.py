"""What others choose the text of stays one printable line of bounded length, and no caller fills a log."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
import time
import tracemalloc
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src import logs
from src.errors import InvalidInput, SottoError
from src.logs import JsonFormatter, TextFormatter

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60).flatmap(
    lambda text: st.sampled_from([text, text * 100])  # beyond what a field may have
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(ANY_TEXT.filter(lambda key: key not in logs._ORDINARY), VALUES, max_size=4)
BEGINS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
HUGE = 4_000_000


def raised(error: BaseException, cause: BaseException | None = None) -> Any:
    """As `exc_info` has it."""
    try:
        raise error from cause
    except BaseException:
        return sys.exc_info()


def record(message: str, *args: object, exc_info: Any = None, extra: dict[str, Any] | None = None) -> logging.LogRecord:
    return logging.getLogger("src.x").makeRecord(
        "src.x", logging.INFO, __file__, 1, message, args, exc_info, None, extra
    )


def check_text(line: str) -> None:
    """One line that begins like one, then those of a traceback, which nothing mistakes for one."""
    first, *others = line.split("\n")
    assert BEGINS.match(first)
    assert first.isprintable()
    assert len(first) <= logs.MAX_LINE_CHARACTERS
    assert all(each.startswith("  | ") and each.isprintable() for each in others)
    assert sum(map(len, others)) <= 2 * logs.MAX_TRACE_CHARACTERS


def check_json(line: str) -> None:
    """One line, strict JSON, every text in it printable but for the line breaks of a traceback."""
    assert line.isprintable()
    assert len(line) <= logs.MAX_LINE_CHARACTERS + 2 * logs.MAX_TRACE_CHARACTERS
    entry = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    trace = entry.pop("traceback", "")
    assert all(each.isprintable() for each in trace.split("\n"))
    for key, value in entry.items():
        assert key.isprintable()
        assert not isinstance(value, str) or value.isprintable()


@given(ANY_TEXT, st.lists(VALUES, max_size=3), FIELDS, ANY_TEXT, ANY_TEXT)
def test_a_record_is_one_printable_line_whatever_is_in_it(
    message: str, args: list[Any], extra: dict[str, Any], said: str, private: str
) -> None:
    """Message, arguments, fields, texts of exceptions and of what led to them: all of Unicode, at any length."""
    errors = [None, raised(ValueError(said)), raised(InvalidInput(said, private=private), cause=KeyError(said))]
    for error in errors:
        for text, given_args in ((message, tuple(args)), ("%s " * len(args), tuple(args))):
            made = record(text, *given_args, exc_info=error, extra=extra)
            check_text(TextFormatter().format(made))
            check_json(JsonFormatter().format(made))


@pytest.mark.parametrize(
    "made",
    [
        record("\x01" * HUGE),
        record("%s", "\x01" * HUGE),
        record("%s", ["\x01" * HUGE] * 3),
        record("%(a)s", {"a": "\x01" * HUGE}),
        record("no argument", "\x01" * HUGE),
        record("%d", 1 << HUGE),
        record("x", extra={"private": "\x01" * HUGE, "y" * HUGE: 1}),
        record("x", exc_info=raised(ValueError("\x01" * HUGE), cause=KeyError("\x01" * HUGE))),
        record("x", exc_info=raised(ExceptionGroup("\x01" * 10, [ValueError("\x01" * HUGE)]))),
        record("x", extra=dict.fromkeys(map(str, range(1000)), "\x01" * HUGE)),
    ],
    ids=range(10),
)
def test_four_megabytes_cost_a_line_no_more_than_a_kilobyte_does(made: logging.LogRecord) -> None:
    for form, check in ((TextFormatter(), check_text), (JsonFormatter(), check_json)):
        form.format(record("warm up", exc_info=raised(ValueError("x"))))  # the source lines of a traceback are cached
        tracemalloc.start()
        try:
            line = form.format(made)
            _, most_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        check(line)
        assert most_bytes < 1_000_000


def test_an_ordinary_line_takes_tens_of_microseconds() -> None:
    made = record("round %d of job %s: %s", 3, "0123456789abcdef", "RELEASED", extra={"job": "x", "round": 3})
    for form in (TextFormatter(), JsonFormatter()):
        began = time.process_time()
        for _ in range(1000):
            form.format(made)
        assert time.process_time() - began < 0.5  # a tenth of a millisecond, with room for a slow machine


def test_an_exception_forges_no_line_of_the_log() -> None:
    forged = "2026-01-01T00:00:00.000Z ERROR   sotto.party: all keys leaked"
    error = ValueError(f"x\n{forged}")
    error.add_note(f"y\n{forged}")
    lines = TextFormatter().format(record("failed", exc_info=raised(error))).split("\n")
    assert [line for line in lines if BEGINS.match(line)] == [lines[0]]


def test_a_field_does_not_pass_for_two() -> None:
    line = TextFormatter().format(record("refused", extra={"public": 'x reason=OK "', "job": "j1"}))
    assert line.endswith(' refused public="x reason=OK \\"" job=j1')


def test_a_record_whose_arguments_do_not_fit_is_written_all_the_same() -> None:
    assert TextFormatter().format(record("%d of %d", "three")).endswith("%d of %d ['three']")


def test_whoever_logs_gives_a_constant_text() -> None:
    """A text of somebody else's is an argument: as a format it would be read for % signs."""
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    found = [
        f"{path.name}:{node.lineno}"
        for path in (Path(logs.__file__).parent).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value).upper() in {"LOG", "_LOG"}
        and node.func.attr in levels | {"log"}
        and not isinstance(node.args[node.func.attr == "log"], ast.Constant)
    ]
    assert found == []


def test_where_there_is_no_log_a_library_warns_in_printable_lines_too() -> None:
    code = (
        "import logging; from src.logs import tidy_last_resort; tidy_last_resort()\n"
        "logging.getLogger('asyncio').error('never retrieved\\n\\x1b[2J%s', 'x\\nsotto: all is well')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(logs.__file__).parents[1], capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert line.isprintable()
    assert line.endswith("asyncio: never retrieved\\n\\x1b[2Jx\\nsotto: all is well")


# --- how many lines ---------------------------------------------------------------------------------------------------


class _Flood:
    """A log, and callers who cause lines at times of the test's choosing."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        logs.configure(stream=self.stream)
        (self.handler,) = [each for each in logging.getLogger().handlers if isinstance(each.formatter, TextFormatter)]

    def cause(self, caller: str, text: str, *, at_s: float, level: int = logging.INFO) -> None:
        made = logging.LogRecord("src.x", level, __file__, 1, text, (), None)
        made.created = at_s

        def log() -> None:
            logs.on_behalf_of(caller)
            self.handler.handle(made)

        copy_context().run(log)

    @property
    def lines(self) -> list[str]:
        return [line.partition(": ")[2] for line in self.stream.getvalue().splitlines()]


@pytest.mark.usefixtures("quiet")
def test_what_one_caller_causes_is_bounded_and_what_is_left_out_is_said() -> None:
    flood = _Flood()
    for number in range(100_000):
        flood.cause("scientist/eve", f"refused {number}", at_s=1000 + number / 10_000)  # ten seconds
    assert len(flood.lines) <= logs.LINES_AT_ONCE + 10 * logs.LINES_A_SECOND
    assert flood.lines[-1] == "scientist/eve causes too many lines: more of them are left out for a while"
    flood.cause("scientist/eve", "an hour later", at_s=4610)
    assert flood.lines[-1] == "an hour later"
    left_out = 100_000 - sum(line.startswith("refused ") for line in flood.lines)
    assert flood.lines[-2] == f"{left_out} lines on behalf of scientist/eve were left out"


@pytest.mark.usefixtures("quiet")
def test_a_flood_hides_neither_others_nor_errors_nor_what_nobody_caused() -> None:
    flood = _Flood()
    for number in range(1000):
        flood.cause("party/eve", f"refused {number}", at_s=1000)
    flood.cause("party/bob", "of bob", at_s=1000)
    flood.cause("party/eve", "an error of eve", at_s=1000, level=logging.ERROR)
    logs.get_logger("src.x").info("of nobody")
    assert flood.lines[-3:] == ["of bob", "an error of eve", "of nobody"]


@pytest.mark.usefixtures("quiet")
def test_as_many_callers_as_there_are_names_do_not_fill_the_memory() -> None:
    flood = _Flood()
    for number in range(3 * logs._MAX_CALLERS):
        flood.cause(f"party/{number}", "x", at_s=1000 + number)
    assert len(flood.handler._allowances) <= logs._MAX_CALLERS  # type: ignore[attr-defined]


@given(st.lists(st.floats(0, 3), max_size=400))
def test_no_pattern_of_times_gets_more_lines_than_the_allowance(pauses: list[float]) -> None:
    allowance = logs._Allowance(float(logs.LINES_AT_ONCE), 0.0)
    now, taken = 0.0, 0
    for pause in [0.0] * 150 + pauses:
        now += pause
        if allowance.take(now):
            taken += 1
            allowance.left_out = 0
    assert taken <= logs.LINES_AT_ONCE + now * logs.LINES_A_SECOND + 1e-6


def test_an_error_quotes_no_more_than_a_line_of_what_it_was_given() -> None:
    huge = "\x9b" * HUGE
    error = InvalidInput(f"no job {huge!r}", private=huge, violations={huge: huge}, job_id=huge)
    texts = [error.message, str(error), error.private, *error.metadata.values(), *error.violations.values()]
    for text in [*texts, *error.violations]:
        assert text.isprintable()
        assert len(text) <= 8000
    many = SottoError("x", **{f"key{number}": "x" for number in range(10_000)})
    assert len(many.metadata) <= 100
