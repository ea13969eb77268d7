"""`sotto status` and a submission say who is not ready for a task, and who has another version of it."""

from __future__ import annotations

import pytest

from src.cli.status import status_lines
from src.cli.tasks_view import warnings
from src.communication.generated.common_pb2 import TaskReadiness
from src.communication.generated.jobs_pb2 import PartyStatus, Status

ONE, OTHER = "1" * 64, "2" * 64


def status(*, aggregator: str = "", **digests: str) -> Status:
    """Everybody ready, with these versions of `ward`."""
    found = Status(federation="demo")
    for name, digest in digests.items():
        found.parties.append(
            PartyStatus(party=name, connected=True, tasks={"ward": TaskReadiness(digest=digest, ready=True)})
        )
    if aggregator:
        found.tasks["ward"].CopyFrom(TaskReadiness(digest=aggregator, ready=True))
    return found


def test_the_status_says_of_each_party_what_it_is_ready_for_and_why_not() -> None:
    found = status(a=ONE, b=ONE)
    found.parties[1].tasks["ward"].CopyFrom(TaskReadiness(digest=ONE, problem="ROWS_MIXED", place="ward.py:7"))
    found.parties[1].tasks["other"].CopyFrom(TaskReadiness(problem="DATA_NOT_READY"))
    found.tasks["broken"].CopyFrom(TaskReadiness(problem="TASK_IMPORT_FAILED"))
    lines = [" ".join(line.split()) for line in status_lines(found)]
    assert lines[lines.index("task party") + 1 :] == [
        "broken (aggregator) not ready: the task's package cannot be imported",
        "other b not ready: its data is not ready",
        "ward a ready",
        "ward b not ready: model or loss mix the rows of a batch (ward.py:7)",
    ]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (status(a=ONE, b=ONE, c=OTHER), ["c: its version of ward is not that of most"]),
        (status(a=ONE, b=ONE, c=OTHER, aggregator=ONE), ["c: its version of ward is not the aggregator's"]),
        (status(a=OTHER, b=OTHER, aggregator=ONE), [f"{p}: its version of ward is not the aggregator's" for p in "ab"]),
        (status(a=ONE, b=OTHER), [f"{p}: not everybody has the same version of ward" for p in "ab"]),
        (status(a=ONE, b=ONE), []),
        (status(a=ONE, b=""), []),
    ],
)
def test_a_submission_names_whose_version_differs(found: Status, said: list[str]) -> None:
    assert warnings(found, "ward", ()) == said
    assert all(any(line.split(": ", 1)[1] in each for each in status_lines(found)) for line in said)
    assert warnings(found, "other", ()) == []


def test_a_submission_names_who_is_not_ready_of_those_invited() -> None:
    found = status(a=ONE, b=ONE)
    found.parties[1].tasks["ward"].CopyFrom(TaskReadiness(digest=ONE, problem="DATA_NOT_READY"))
    assert warnings(found, "ward", ("a",)) == []
    assert warnings(found, "ward", ("a", "b")) == [
        "b is not ready: its data is not ready; rounds go on without it until it is ready"
    ]
    found.parties[1].tasks["ward"].problem = "CHECKING"
    assert warnings(found, "ward", ()) == []
