"""One statement, one text, one digest: and no text that two readers could read differently."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput
from src.protocol.canonical import canonical_bytes, digest, parse_canonical, real

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
STATEMENTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=5)


@settings(deadline=None, max_examples=150)
@given(statement=STATEMENTS)
def test_what_is_written_is_read_back(statement: dict[str, Any]) -> None:
    assert parse_canonical(canonical_bytes(statement)) == statement


@settings(deadline=None, max_examples=60)
@given(statement=STATEMENTS, data=st.data())
def test_the_order_of_keys_in_memory_does_not_show(statement: dict[str, Any], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(statement.items()))))
    assert canonical_bytes(shuffled) == canonical_bytes(statement)
    assert digest(shuffled, domain="x") == digest(statement, domain="x")


@settings(deadline=None, max_examples=150)
@given(statement=STATEMENTS, data=st.data())
def test_another_byte_is_another_statement_or_none(statement: dict[str, Any], data: st.DataObject) -> None:
    text = bytearray(canonical_bytes(statement))
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read = parse_canonical(bytes(text))
    except InvalidInput:
        return
    assert canonical_bytes(read) == bytes(text) != canonical_bytes(statement)
    assert digest(read, domain="x") != digest(statement, domain="x")


def test_a_statement_by_hand() -> None:
    statement = {"b": ["é", None, True], "a": -1, "c": {"y": "\n\x01", "x": {}}}
    text = '{"a":-1,"b":["é",null,true],"c":{"x":{},"y":"\\n\\u0001"}}'
    assert canonical_bytes(statement) == text.encode()
    assert digest(statement, domain="test") == hashlib.sha256(b"sotto/v1/test\n" + text.encode()).hexdigest()


def test_a_digest_under_another_domain_is_another_digest() -> None:
    assert digest({"a": 1}, domain="plan") != digest({"a": 1}, domain="list")


NEVER_WRITTEN = {
    "a float": {"a": 1.0},
    "a float inside": {"a": [{"b": math.inf}]},
    "a key that is a number": {"a": {1: "x"}},
    "bytes": {"a": b"x"},
    "a set": {"a": {"x"}},
    "half of a surrogate pair": {"a": "\ud800"},
    "a key that is half of one": {"\udfff": 1},
    "an integer of 5000 digits": {"a": 10**5000},
}


@pytest.mark.parametrize("statement", NEVER_WRITTEN.values(), ids=NEVER_WRITTEN.keys())
def test_what_has_no_canonical_form_is_refused(statement: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        canonical_bytes(statement)


def test_objects_nested_without_end_are_refused() -> None:
    statement: dict[str, Any] = {}
    for _ in range(100_000):
        statement = {"a": statement}
    with pytest.raises(InvalidInput, match="cannot"):
        canonical_bytes(statement)
    with pytest.raises(InvalidInput):
        parse_canonical(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


NEVER_READ = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "a text": b'"a"',
    "white space": b'{"a": 1}',
    "a line after it": b'{"a":1}\n',
    "keys out of order": b'{"b":1,"a":2}',
    "a key twice": b'{"a":1,"a":1}',
    "a float": b'{"a":1.0}',
    "an exponent": b'{"a":1e2}',
    "not a number": b'{"a":NaN}',
    "infinity": b'{"a":Infinity}',
    "an integer spelt otherwise": b'{"a":-0}',
    "an integer of 5000 digits": b'{"a":' + b"1" * 5000 + b"}",
    "an escape that is not needed": b'{"a":"\\u0061"}',
    "an escaped solidus": b'{"a":"\\/"}',
    "an upper-case escape": b'{"a":"\\u000B"}',
    "half of a surrogate pair": b'{"a":"\\ud800"}',
    "a surrogate pair, escaped": b'{"a":"\\ud83d\\ude00"}',
    "another encoding": '{"a":1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"a":1}',
    "no UTF-8": b'{"a":"\xff"}',
}


@pytest.mark.parametrize("text", NEVER_READ.values(), ids=NEVER_READ.keys())
def test_a_text_that_is_not_the_canonical_one_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_canonical(text)


@settings(deadline=None, max_examples=200)
@given(value=st.floats())
def test_a_real_reads_back_as_the_same_double(value: float) -> None:
    text = real(value)
    assert math.isnan(float(text)) if math.isnan(value) else float(text) == value
    assert json.loads(canonical_bytes({"x": text})) == {"x": text}
    assert real(float(text)) == text
