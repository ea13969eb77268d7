"""What a party says of itself when it does not do what was asked, as far as logs and errors may carry it."""

from __future__ import annotations

from typing import Final

from ..communication.generated import federation_pb2
from ..errors import TaskError, meaning
from ..protocol.faults import checked, told
from .round_row import Failure

LONGEST_TEXT: Final = 500


def failure_of(request: federation_pb2.ReportFailureRequest, *, task: str) -> Failure:
    """Of a report. Why the task cannot be trained there is said in our words: of what the party sends for it class and
    place are looked at, and only where they are of the closed form."""
    stage, reason = _printable(request.stage, 20), _printable(request.reason, 40)
    if reason != meaning(TaskError("")).reason:
        return Failure(stage, reason, _printable(request.message))
    problem, place = checked(request.problem, request.place)
    return Failure(stage, reason, told(problem, place, task=task), problem, place)


def _printable(text: str, most: int = LONGEST_TEXT) -> str:
    """A party's own words, in one line."""
    return "".join(each if each.isprintable() else " " for each in text[:most])
