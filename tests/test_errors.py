"""The error catalogue: complete, unambiguous, and what its docstring draws."""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
import pytest

from src import errors
from src.errors import BY_REASON, CATALOGUE, UNEXPECTED, BudgetError, ConfigError, InvalidInput, SottoError, meaning


def family(cls: type[SottoError]) -> Iterator[type[SottoError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from family(child)


CLASSES = [cls for cls in family(SottoError) if cls.__module__ == errors.__name__]


def test_every_error_has_a_row_of_its_own() -> None:
    assert set(CLASSES) == set(CATALOGUE)


def test_no_room_defines_public_errors_of_its_own() -> None:
    elsewhere = [cls for cls in family(SottoError) if cls.__module__.startswith("src.") and cls not in CLASSES]
    assert [cls for cls in elsewhere if not cls.__name__.startswith("_")] == []


def test_a_reason_means_one_class_and_back() -> None:
    reasons = [row.reason for row in CATALOGUE.values()]
    assert len(set(reasons)) == len(reasons)
    assert {cls: row.reason for cls, row in CATALOGUE.items() if cls is not SottoError} == {
        cls: reason for reason, cls in BY_REASON.items()
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_row_is_what_grpc_and_a_shell_can_carry(cls: type[SottoError]) -> None:
    row = CATALOGUE[cls]
    assert row.status in grpc.StatusCode.__members__
    assert row.status != "OK"
    # google.rpc.ErrorInfo: at most 63 characters of [A-Z][A-Z0-9_]+[A-Z0-9].
    assert re.fullmatch(r"[A-Z][A-Z0-9_]{0,61}[A-Z0-9]", row.reason)
    assert (
        3 <= row.exit_code <= 125 or row is UNEXPECTED
    )  # 0 success, 1 unexpected, 2 usage, 126 and up the shell's own


def test_what_nobody_raised_on_purpose_is_unexpected() -> None:
    assert meaning(ValueError("x")) == meaning(SottoError("x")) == UNEXPECTED
    assert UNEXPECTED.exit_code == 1


def test_a_class_without_a_row_means_what_its_parent_means() -> None:
    special = type("SpecialBudgetError", (BudgetError,), {"__module__": "elsewhere"})
    assert meaning(special("x")) == CATALOGUE[BudgetError]


def test_the_tree_in_the_docstring_names_every_class() -> None:
    drawn = set(
        re.findall(r"\b(?:[A-Z][A-Za-z]*Error|InvalidInput|Refused|RoundFailed|JobFailed)\b", errors.__doc__ or "")
    )
    assert drawn == {cls.__name__ for cls in CLASSES}


def test_the_private_text_is_not_in_what_is_shown() -> None:
    error = BudgetError("nothing left", private="entry 7 of alice", limit=4)
    assert "alice" not in str(error) + repr(error)
    assert error.metadata == {"limit": "4"}


def test_details_belong_to_the_error_that_got_them() -> None:
    violations = {"rounds": "must be > 0"}
    error = InvalidInput("bad", violations=violations)
    violations.clear()
    assert error.violations == {"rounds": "must be > 0"}
    assert ConfigError("bad").problems == ()
