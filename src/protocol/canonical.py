"""Canonical JSON: the one form in which statements are hashed and signed.

Sorted keys, no white space, UTF-8 without escapes beyond those JSON requires, and no floating-point numbers: reals
travel as decimal strings (`repr` of the float), because every language prints floats its own way. A plain JSON library
reproduces it. Not quite a subset of RFC 8785: keys sort by code points, and integers may exceed 2^53.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import InvalidInput


def canonical_bytes(value: Mapping[str, Any]) -> bytes:
    """The canonical form of an object of strings, integers, booleans, nulls, lists and objects.

    Raises:
        InvalidInput: on a float, a key that is not a string, any other type, or what no JSON text can hold: half of a
            surrogate pair, an integer of thousands of digits, objects nested without end.
    """
    try:
        _check(value, "$")
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise InvalidInput("a statement holds what canonical JSON cannot") from error


def parse_canonical(data: bytes) -> dict[str, Any]:
    """The object that `data` is the canonical form of.

    Raises:
        InvalidInput: when `data` is not JSON, not an object, or not canonical (so that one statement has one digest).
    """
    try:
        value = json.loads(data, parse_float=_no_float, parse_constant=_no_float)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("a statement is not canonical JSON") from error
    if not isinstance(value, dict):
        raise InvalidInput("a statement is not a JSON object")
    if canonical_bytes(value) != data:
        raise InvalidInput("a statement is JSON, but not in canonical form")
    return value


def digest(value: Mapping[str, Any], *, domain: str) -> str:
    """SHA-256 (lower-case hex) of the canonical form under a domain, so that no digest means two things."""
    return hashlib.sha256(f"sotto/v1/{domain}\n".encode() + canonical_bytes(value)).hexdigest()


def real(value: float | str) -> str:
    """A float, or its text (`number_or_inf`), as statements carry it: the shortest decimal that reads back as the same
    double."""
    return repr(float(value))


def number_or_inf(value: float) -> float | str:
    """A float as plain JSON carries it, which has no infinity: that is the text "inf"."""
    return value if math.isfinite(value) else "inf"


def finite(value: float | None) -> float | None:
    """What a message or plain JSON carries of a figure: None where it is infinite, or there is none."""
    return value if value is not None and math.isfinite(value) else None


def _check(value: object, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"{path}: a statement's keys are strings")
            _check(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
    elif value is not None and not isinstance(value, str | int):
        raise InvalidInput(f"{path}: a statement holds no {type(value).__name__}")


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"floating-point number {text}")
