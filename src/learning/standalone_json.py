"""JSON that comes from outside: read strictly, checked against a schema, and in the one form that is hashed.

The form is RFC 8785 (JSON Canonicalization Scheme), for which most languages have a library: artifacts carry numbers,
and RFC 8785 says how a double is written.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from jsonschema import Draft202012Validator

from ..errors import InvalidInput

SCHEMAS: Final = Path(__file__).parent / "schemas"
LARGEST_SAFE_INTEGER: Final = 2**53 - 1
"""RFC 8785, section 3.2.2.3: numbers are IEEE 754 doubles; beyond this not every integer is one."""

_MOST_SHOWN: Final = 80  # characters of what a schema's checker says of a wrong value


def load_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) `schemas/<name>.schema.json`."""
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8"))
    return schema


def read_object(data: bytes, *, what: str) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8.

    Raises:
        InvalidInput: it is not JSON, not an object, names a key twice, or holds a number that no double is.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_repetition, parse_constant=_no_constant, parse_float=_real
        )
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{what} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{what} is not JSON: {error.msg}, line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise InvalidInput(f"{what} is nested too deeply") from error
    except ValueError as error:  # ours, and Python's on integers of thousands of digits
        raise InvalidInput(f"{what} cannot be used: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{what} is not a JSON object")
    return value


def violations(schema: Mapping[str, Any], value: object) -> dict[str, str]:
    """Everything in which `value` breaks `schema`, by path ("dp.epsilon"; "" is the whole)."""
    found: dict[str, str] = {}
    for error in Draft202012Validator(schema).iter_errors(value):
        for path, text in _explain(error):
            found.setdefault(path, text)
    return dict(sorted(found.items()))


def rfc8785(value: object) -> bytes:
    """The canonical form of a JSON value (RFC 8785): keys sorted by UTF-16 code units, numbers as ECMAScript prints.

    Raises:
        InvalidInput: a type that JSON does not have, a number that is not finite, an integer beyond ±(2^53 − 1), half
            of a surrogate pair.
    """
    try:
        return _canonical(value).encode("utf-8")
    except (UnicodeEncodeError, RecursionError) as error:
        raise InvalidInput("a value has no canonical form") from error


def number(value: float) -> str:
    """A double as ECMAScript prints it (ECMA-262, Number::toString), which RFC 8785 section 3.2.2.3 asks for."""
    if not math.isfinite(value):
        raise InvalidInput("a number that is not finite has no canonical form")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")  # repr: the shortest digits that give the double back
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    point = len(whole) + int(exponent or 0)
    digits = (whole + fraction).lstrip("0")
    point -= len(whole + fraction) - len(digits)
    digits = digits.rstrip("0")
    count = len(digits)
    if count <= point <= 21:
        return sign + digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    scientific = digits[0] + (f".{digits[1:]}" if count > 1 else "")
    return f"{sign}{scientific}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def _canonical(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > LARGEST_SAFE_INTEGER:
            raise InvalidInput("an integer beyond 2^53 - 1 has no canonical form")
        return str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return f"{{{','.join(f'{_canonical(key)}:{_canonical(value[key])}' for key in keys)}}}"
    raise InvalidInput(f"a {type(value).__name__} has no canonical form")


def _explain(error: Any) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of one error of the checker; several for several missing or unknown keys."""
    path = ".".join(str(part) for part in error.absolute_path)
    at = f"{path}." if path else ""
    if error.validator == "required":
        yield from ((f"{at}{key}", "is required") for key in error.validator_value if key not in error.instance)
    elif error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in sorted(set(error.instance) - set(known)):
            close = difflib.get_close_matches(key, known, n=1)
            yield f"{at}{key}", f"is not known; did you mean {close[0]!r}?" if close else "is not known"
    elif "$comment" in error.schema and error.validator in {"anyOf", "not"}:
        yield path, error.schema["$comment"]
    elif error.validator == "pattern":
        yield path, f"does not match {error.validator_value}"
    else:
        text = error.message
        yield path, text if len(text) <= _MOST_SHOWN else f"breaks {error.validator}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
