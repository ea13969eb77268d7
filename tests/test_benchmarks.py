"""`make bench-check`: what is to be reached is reached, or listed with a reason and what it reaches all the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from benchmarks.reach import problems

REACH = {"ratio": ("≥", 75.0), "ms": ("<", 20.0), "missing": ("≤", 0.0)}
FINE = {"ratio": 75.0, "ms": 19.0, "missing": 0.0, "told": 1.0}
LISTED = {"ratio": {"at": 60, "reason": "the processor"}}


def test_what_holds_is_no_problem() -> None:
    assert problems(FINE, REACH, {}) == problems(FINE, REACH, LISTED) == []


@pytest.mark.parametrize(("name", "value"), [("ratio", 74.9), ("ms", 20.0), ("missing", 1.0), ("ratio", float("nan"))])
def test_what_is_missed_and_not_listed_is_a_problem(name: str, value: float) -> None:
    (said,) = problems({**FINE, name: value}, REACH, {})
    assert said.startswith(f"{name} is ")
    assert "not listed" in said


def test_what_is_listed_may_be_as_bad_as_listed_and_no_worse() -> None:
    assert problems({**FINE, "ratio": 60.0}, REACH, LISTED) == []
    (said,) = problems({**FINE, "ratio": 59.0}, REACH, LISTED)
    assert "worse than listed" in said


def test_what_was_not_measured_is_a_problem_listed_or_not() -> None:
    for shortfalls in ({}, LISTED):
        assert problems({"ms": 1.0, "missing": 0.0}, REACH, shortfalls) == ["ratio was not measured"]


def test_every_shortfall_says_why_and_how_far() -> None:
    listed = tomllib.loads((Path(__file__).parent.parent / "benchmarks" / "shortfalls.toml").read_text())
    assert all(isinstance(each["at"], int | float) and each["reason"].strip() for each in listed.values())
    assert all(set(each) == {"at", "reason"} for each in listed.values())
