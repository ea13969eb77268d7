"""What of planted values is in a text, however they are written there."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

DIGITS: Final = {"rows": 5, "vector": 6, "values": 6}
"""Significant digits from which on a number counts as one of these: with fewer, chance would find many."""
COUNT_DIGITS: Final = 5
INTEGER_DIGITS: Final = 7
"""Of an integer in a vector: noise draws many, and shorter ones would now and then be the bound of a plan by chance."""
PAIR_DIGITS: Final = 7
"""Of two numbers in a row together: arrays are shown with four decimals or fewer."""
ATTEMPTS: Final = 3
"""Before something counts as told. Of all the figures that anybody may know, one has the first digits of a private one
by chance once in a thousand runs: not three times, while what is told is told whenever it is computed."""
_STAMP: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_NUMBER: Final = re.compile(r"(?<![\w.])[-+]?(\d+\.?\d*|\.\d+)(?:[eE]([-+]?\d{1,2}))?")
_DIGEST: Final = re.compile(r"(?<![\w.])(?=\d*[a-f])[0-9a-f]{16,}\b")
"""Of which the first digits are no number."""
_HEX_NUMBER: Final = re.compile(r"0x[0-9a-fA-F]{5,16}\b(?!\.)")
_WORD: Final = re.compile(r"[0-9A-Za-z+/_-]{10,}")
_SIZES: Final = (10, 16)
"""Characters of eight bytes as base64 and as hex."""
_SPACED: Final = re.compile(r"\\x[0-9a-f]{2}|0x1\.|(?:[0-9a-f]{2} ){7}|(?:\d{1,3}, ){7}")
"""What a line has in which bytes are written in another form than these."""
_FLOAT_PRECISION: Final = 1e-7
"""Relative: a float32 that is written as a double is no longer the number that it was."""


class Planted:
    """Values that must turn up nowhere."""

    def __init__(self) -> None:
        self._numbers: dict[int, list[float]] = {digits: [] for digits in sorted(set(DIGITS.values()))}
        self._counts: set[int] = set()
        self._pairs: set[tuple[float, float]] = set()
        self._texts: set[str] = set()
        self.kinds: set[str] = set()

    @classmethod
    def read(cls, notebook: Path, *, since: int = 0) -> Planted:
        """What was noted from this byte on."""
        planted = cls()
        for line in notebook.read_bytes()[since:].decode("ascii").splitlines():
            noted = json.loads(line)
            planted.add(noted["kind"], np.array(noted["values"]))
        return planted

    def add(self, kind: str, values: NDArray[np.float64]) -> None:
        self.kinds.add(kind)
        integers = (abs(int(value)) for value in values if value == np.rint(value))
        least = INTEGER_DIGITS if kind == "vector" else COUNT_DIGITS
        self._counts.update(value for value in integers if value >= 10 ** (least - 1))
        if kind == "count":
            return
        self._numbers[DIGITS[kind]] += [abs(value) for value in values if value != np.rint(value)]
        self._texts.update(value.hex()[:14] for value in map(float, values) if value % 1)
        # Eight bytes are more than chance would bring together: two float32, or one double or integer.
        for one, other in pairwise(values) if kind in ("rows", "vector") else ():
            if min(abs(one), abs(other)) > 1e-12:
                self._pairs.add((abs(one), abs(other)))
                for dtype in ("<f4", ">f4"):
                    self._texts.update(_forms(np.array([one, other], dtype).tobytes()))
        for value in values if kind in ("rows", "vector") else ():
            whole = value == np.rint(value)
            for dtype in () if abs(value) < (1e4 if whole else 1e-12) else ("<i8", ">i8") if whole else ("<f8", ">f8"):
                self._texts.update(_forms(np.array([value], dtype).tobytes()))

    def found(self, text: str) -> list[str]:
        """What of it is in `text`, with its surroundings."""
        clean = "\n".join(dict.fromkeys(_STAMP.sub("<time>", text).splitlines()))
        hits = [f"bytes: {each}" for each in self._bytes_in(clean)]
        sorted_ = {digits: np.sort(np.array(values)) for digits, values in self._numbers.items()}
        pairs = np.array(sorted(self._pairs)).reshape(-1, 2)
        last: tuple[int, _Written] | None = None
        clean = _DIGEST.sub("<digest>", clean)
        for match in _NUMBER.finditer(clean):
            number = _Written.read(match)
            in_a_row = last is not None and set(clean[last[0] : match.start()]) <= set(" ,;[]()\n\t")
            if self._is_planted(number, sorted_) or (
                in_a_row and last is not None and _is_pair(pairs, last[1], number)
            ):
                hits.append(clean[max(0, match.start() - 60) : match.end() + 20])
            last = (match.end(), number)
        hits += [match[0] for match in _HEX_NUMBER.finditer(clean) if int(match[0], 16) in self._counts]
        return hits

    def _bytes_in(self, text: str) -> Iterator[str]:
        for word in dict.fromkeys(_WORD.findall(text)):
            for size in _SIZES:
                yield from (part for at in range(len(word) - size + 1) if (part := word[at : at + size]) in self._texts)
        spaced = "\n".join(line for line in text.splitlines() if _SPACED.search(line))
        yield from (form for form in self._texts if form in spaced)

    def _is_planted(self, number: _Written, planted: dict[int, NDArray[np.float64]]) -> bool:
        if number.digits >= COUNT_DIGITS and number.value in self._counts:
            return True
        for least, numbers in planted.items():
            if number.digits >= least and number.point:
                at = int(np.searchsorted(numbers, number.value - number.tolerance))
                if at < len(numbers) and numbers[at] <= number.value + number.tolerance:
                    return True
        return False


@dataclass(frozen=True, slots=True)
class _Written:
    """A number as a text has it, without its sign."""

    value: float
    tolerance: float
    digits: int
    point: bool

    @classmethod
    def read(cls, match: re.Match[str]) -> _Written:
        mantissa, exponent = match[1], int(match[2] or 0)
        value = float(f"{mantissa}e{exponent}")
        unit = 10.0 ** (exponent - len(mantissa.partition(".")[2]))
        tolerance = max(0.51 * unit, _FLOAT_PRECISION * value)
        return cls(value, tolerance, len(mantissa.replace(".", "").lstrip("0")), "." in mantissa)


def _is_pair(pairs: NDArray[np.float64], one: _Written, other: _Written) -> bool:
    if one.digits + other.digits < PAIR_DIGITS or not (one.point and other.point):
        return False
    near = np.abs(pairs - (one.value, other.value)) <= (one.tolerance, other.tolerance)
    return bool(near.all(axis=1).any())


def _forms(raw: bytes) -> Iterator[str]:
    """Bytes as hex, escapes, a list of numbers, and base64 at each of its three places."""
    yield from (raw.hex(), raw.hex().upper(), raw.hex(" "), repr(raw)[2:-1], ", ".join(map(str, raw)))
    for place in range(3):
        first, last = -(-place * 8 // 6), (place + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(place) + raw).decode()[first:last]
