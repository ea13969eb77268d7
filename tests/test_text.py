"""What is shown of text that somebody else wrote: one printable line, not too long, and cheap however large it is."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.communication.generated.common_pb2 import DataChunk
from src.text import CUT, brief, printable, shown

ANY_TEXT = st.text(st.characters(exclude_categories=()))
"""All of Unicode, unpaired surrogates and unassigned code points too."""
HUGE = 4_000_000


@given(ANY_TEXT, st.integers(1, 50))
def test_what_is_shown_is_one_printable_line_and_no_longer_than_allowed(text: str, most: int) -> None:
    for line in (printable(text, most), brief(text, most), shown(text, most)):
        assert line.isprintable()
        assert len(line) <= most
    assert printable(text).isprintable()


@given(ANY_TEXT)
def test_what_is_printable_already_stays_as_it_is(text: str) -> None:
    line = printable(text)
    assert printable(line) == line
    assert (line == text) is text.isprintable()


def test_every_character_that_no_line_can_show_is_escaped() -> None:
    """Control characters, C1, DEL, marks of direction, line and paragraph separators, surrogates: all code points."""
    for code in range(sys.maxunicode + 1):
        found = printable(chr(code))
        assert found == chr(code) if chr(code).isprintable() else found.startswith("\\")
    assert printable("a\n\x1b\x7f\x9b\u202e\u2028\u2066\ud800") == "a\\n\\x1b\\x7f\\x9b\\u202e\\u2028\\u2066\\ud800"


def test_a_text_that_was_cut_says_so() -> None:
    assert printable("abcdef", 4) == f"abc{CUT}"
    assert printable("abcd", 4) == "abcd"
    assert printable("\x01\x01", 6) == f"\\x01\\{CUT}"
    assert shown("x" * 10, 5) == f"'xxx{CUT}"


@dataclass
class _Row:
    name: str
    content: bytes


@dataclass
class _Named(_Row):
    def __str__(self) -> str:
        return f"row {self.name}"


class _Rude:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.mark.parametrize(
    "value",
    [
        "\x01" * HUGE,
        b"\x01" * HUGE,
        bytearray(HUGE),
        1 << HUGE,
        ["\x01" * HUGE] * 50,
        {"k" * HUGE: "\x01" * HUGE},
        {1: {2: {3: {4: {5: "x" * HUGE}}}}},
        ValueError("\x01" * HUGE),
        KeyError("\x01" * HUGE),
        ValueError("\x01" * HUGE, b"\x01" * HUGE),
        _Row("\x01" * HUGE, b"\x01" * HUGE),
        [1] * HUGE,
        DataChunk(data=b"\x01" * HUGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_huge_value_is_not_rendered_before_it_is_cut(value: object) -> None:
    """Whoever renders four million characters has to keep them somewhere."""
    for render in (brief, shown):
        tracemalloc.start()
        try:
            line = render(value, 100)
            _, most_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(line) <= 100
        assert line.isprintable()
        assert most_bytes < HUGE / 8


def test_what_cannot_be_rendered_is_named_by_its_type() -> None:
    assert brief(_Rude()) == "<_Rude>"
    assert brief([_Rude()]) == "[<_Rude>]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (None, "None"),
        (1.5, "1.5"),
        ("a b", "a b"),
        (ValueError("no"), "no"),
        (KeyError("k"), "'k'"),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
        ({"a": [1, "b"]}, "{'a': [1, 'b']}"),
        (_Row("n", b"x"), "_Row(name='n', content=b'x')"),
        (_Named("n", b"x"), "row n"),
    ],
)
def test_an_ordinary_value_is_shown_as_one_expects(value: Any, text: str) -> None:
    assert brief(value) == text


def test_shown_quotes_a_text() -> None:
    render: Callable[[object], str] = shown
    assert (render("a'b"), render(3)) == ('"a\'b"', "3")
