"""What others hear of a task that cannot be trained: a class of the list, and a place in its file."""

from __future__ import annotations

import pytest

from src.errors import meaning
from src.protocol.faults import SENTENCES, TaskProblem, sentence, task_error


def test_every_class_has_its_sentence() -> None:
    assert set(SENTENCES) == set(TaskProblem)
    assert len(set(SENTENCES.values())) == len(SENTENCES)


def test_an_error_names_class_and_place_and_nothing_that_was_raised() -> None:
    error = task_error(TaskProblem.ROWS_MIXED, task="triage", place="triage.py:17", private="row 7 is 31337")
    assert error.message == "task triage cannot be trained here: model or loss mix the rows of a batch (triage.py:17)"
    assert error.metadata == {"problem": "ROWS_MIXED", "place": "triage.py:17"}
    assert meaning(error).reason == "TASK_NOT_READY"


@pytest.mark.parametrize(
    "place", ["/home/ann/triage.py:17", "triage.py", "triage.py:0", "a value of 3.5", "triage.py:1\n", "../x.py:1"]
)
def test_what_is_no_place_in_a_file_is_left_out(place: str) -> None:
    assert task_error(TaskProblem.ROWS_MIXED, task="triage", place=place).metadata["place"] == ""


def test_a_class_of_a_later_version_says_that_its_party_is_not_ready() -> None:
    assert sentence("SOMETHING_NEW") == "it is not ready"
