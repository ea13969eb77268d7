"""JSON from outside: read strictly, checked with every violation's path, and in the canonical form of RFC 8785."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from src.errors import InvalidInput
from src.learning.standalone_json import SCHEMAS, load_schema, number, read_object, rfc8785, violations

RFC8785_APPENDIX_B = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.mark.parametrize(("bits", "text"), RFC8785_APPENDIX_B.items())
def test_numbers_are_written_as_the_rfc_lists_them(bits: str, text: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_written_number_reads_back_as_the_same_double(value: float) -> None:
    assert float(number(value)) == value


def test_keys_sort_by_utf16_code_units_as_in_section_3_2_3() -> None:
    value = {"\u20ac": 5, "\r": 1, "\ufb33": 7, "1": 2, "\U0001f600": 6, "\x80": 3, "\xf6": 4}
    assert list(json.loads(rfc8785(value)).values()) == [1, 2, 3, 4, 5, 6, 7]


def test_the_form_has_no_white_space_and_literals_as_json_has_them() -> None:
    value = {"b": [True, None, False, 1.0, "é\n\x0f"], "a": {}}
    assert rfc8785(value) == '{"a":{},"b":[true,null,false,1,"é\\n\\u000f"]}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, "\ud800", {1: 2}, {1, 2}, b""], ids=repr)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput):
        rfc8785({"key": value})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the job is not JSON: Expecting value, line 1, column 1"),
        (b"[]", "the job is not a JSON object"),
        (b'{"a": 1, "a": 2}', "a key is there twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "a number is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be used"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "is not UTF-8"),
        (b'{"a": 1} {}', "Extra data"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_one_plain_json_object_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_object(data, what="the job")


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.name)
def test_each_schema_is_one_of_2020_12(path: object) -> None:
    assert isinstance(path, type(SCHEMAS))
    schema = load_schema(path.name.removesuffix(".schema.json"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


def test_every_violation_is_named_by_its_path() -> None:
    schema = load_schema("train-job")
    value = {"dp": {"epsilonn": 1.0, "delta": 2}, "epochs": 0, "seed": True, "colour": 1}
    assert violations(schema, value) == {
        "colour": "is not known",
        "dp": "epsilon or noise_multiplier is required",
        "dp.delta": "2 is greater than or equal to the maximum of 1",
        "dp.epsilonn": "is not known; did you mean 'epsilon'?",
        "epochs": "0 is less than the minimum of 1",
        "job_id": "is required",
        "seed": "True is not of type 'integer'",
    }
