"""Recorded histories of jobs: what was submitted, every event with its time, and the row that they led to.

    python -m tests.vectors.generate_jobs

writes jobs/history.json. What is recorded there has to replay to the same rows in every later version; a version that
knows more kinds of events or fields records them in a file of its own and leaves this one as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from src.jobs.states import (
    Event,
    EventKind,
    JobError,
    JobRow,
    JobState,
    Priority,
    advance,
    after_failure,
    expired_event,
    failed_event,
    round_event,
    seconds,
    succeeded_event,
    utc,
)

Json = dict[str, Any]
Step = Event | Callable[[JobRow, float], Event]
"""An event, or what makes it of the row and the time."""

FILE: Final = Path(__file__).parent / "jobs" / "history.json"
BEGIN: Final = seconds("2026-01-01T00:00:00.000000Z")
APART_S: Final = 90.125
"""Between two events: longer than any delay before an attempt."""
DELAYS_S: Final = (0.0, 60.0)

ANN: Final = "scientist/ann"
WAITING: Final = Event(
    kind=EventKind.WAITING, message="waiting for b", cause="aggregator", detail={"waiting_for": ["b"]}
)
STARTED: Final = Event(kind=EventKind.STARTED, message="started", cause="aggregator")
RESUMED: Final = Event(kind=EventKind.RESUMED, message="attempt 2 of 3", cause="aggregator")
TAKEN_OVER: Final = Event(kind=EventKind.RESUMED, message="another process goes on", cause="aggregator")
CANCELLING: Final = Event(kind=EventKind.CANCELLING, message=f"cancelled by {ANN}", cause=ANN)
CANCELLED: Final = Event(kind=EventKind.CANCELLED, message="cancelled", cause=ANN)
DELETED: Final = Event(kind=EventKind.DELETED, message="its files were dropped", cause="operator/root")
REFUSED: Final = failed_event(
    JobError("BUDGET_EXCEEDED", "no budget is left", "round 3", ("a", "größe"), "00ff/3 at 2026-01-01")
)
FILES: Final = [
    {"name": "model.safetensors", "bytes": 1234, "sha256": "ab" * 32},
    {"name": "manifest.json", "bytes": 56, "sha256": "cd" * 32},
]
TRAINED: Final = succeeded_event(
    {
        "files": FILES,
        "metrics": {"auc": 0.6123456789012345},
        "epsilon_example": 3.9,
        "epsilon_party": 7.25,
        "epsilon_party_against_aggregator": math.inf,
        "delta": 1e-05,
    }
)
EXPORTED: Final = succeeded_event({"files": FILES, "metrics": {}}, "the archive and its manifest are ready")


def fails(row: JobRow, now: float) -> Event:
    """An attempt fails for a cause that another one may mend."""
    error = JobError("WORKER_FAILED", "a process died", stage="round 2", log_reference="00ff/2")
    return after_failure(row, error, DELAYS_S, now)


def expires(row: JobRow, _now: float) -> Event:
    """The deadline has passed."""
    return expired_event(row)


def too_late(row: JobRow, _now: float) -> Event:
    """The end of a job that was stopped at its deadline."""
    assert row.error is not None
    return failed_event(row.error)


def ended(number: int, state: str, **summary: Any) -> Event:
    """A round ended."""
    return round_event({"round": number, "state": state, **summary})


RELEASED: Final = ended(
    1,
    "RELEASED",
    contributions=2,
    metrics={"auc": 0.55},
    epsilon_party=2.5,
    epsilon_party_against_aggregator=math.inf,
    parties=[{"party": "a", "bytes_up": 9000, "example_epsilon_spent": 0.25, "example_epsilon_left": None}],
    seconds=12.5,
)

HISTORIES: Final[dict[str, tuple[Step, ...]]] = {
    "a training that succeeds, loses an attempt and a round on its way, and is deleted": (
        *(
            WAITING,
            STARTED,
            WAITING,
            RELEASED,
            ended(2, "FAILED", reason="too few updates"),
            fails,
            RESUMED,
            TAKEN_OVER,
        ),
        *(ended(3, "RELEASED", contributions=3), TRAINED, DELETED, DELETED),
    ),
    "attempts run out": (STARTED, fails, RESUMED, fails, RESUMED, fails, DELETED),
    "a released round gives the attempts back": (
        STARTED,
        fails,
        RESUMED,
        RELEASED,
        fails,
        RESUMED,
        fails,
        RESUMED,
        EXPORTED,
    ),
    "a failure that no attempt mends": (STARTED, ended(1, "CANCELLED"), REFUSED),
    "a failure while it waits for the next attempt": (STARTED, fails, WAITING, RELEASED, REFUSED),
    "a failure before the start": (REFUSED,),
    "a failure while it is being cancelled": (STARTED, CANCELLING, REFUSED),
    "cancelled before the start": (WAITING, CANCELLED, DELETED),
    "cancelled under way": (STARTED, CANCELLING, WAITING, TAKEN_OVER, ended(1, "CANCELLED"), CANCELLED),
    "cancelled while it waits for the next attempt": (STARTED, fails, CANCELLING, CANCELLED),
    "done before it could be cancelled": (STARTED, CANCELLING, EXPORTED),
    "expired before the start": (expires,),
    "expired under way": (STARTED, expires, ended(1, "FAILED"), too_late),
    "expired while it waits for the next attempt": (STARTED, fails, expires, too_late),
    "expired and cancelled": (STARTED, expires, CANCELLED),
}


def submitted(number: int) -> JobRow:
    """A job as it was stored; they differ in kind, priority and deadline."""
    kind = ("federated_training", "evaluation", "export")[number % 3]
    return JobRow(
        job_id=f"{number:016x}",
        request_id=f"request {number}",
        owner=ANN,
        display_name=f"history {number} \U0001f600",
        kind=kind,
        spec={"task": "randhie", "rounds": 3, "rate": 0.1} if number % 3 == 0 else {"job_id": "00ff"},
        spec_digest=f"{number:064x}",
        priority=[*Priority][number % 3],
        max_attempts=3,
        created_at=utc(BEGIN),
        deadline_at=utc(BEGIN + 600.0),
    )


def row_to_json(row: JobRow) -> Json:
    """All fields of a row, in the forms that the database keeps."""
    return {**asdict(row), "error": row.error.to_json() if row.error else None}


def row_from_json(value: Json) -> JobRow:
    """What `row_to_json` wrote; fields that are younger than the record take their defaults."""
    error = JobError.from_json(value["error"]) if value["error"] else None
    enums = {"priority": Priority(value["priority"]), "state": JobState(value["state"])}
    return JobRow(**{**value, **enums, "error": error})


def history(name: str, number: int) -> Json:
    """One history, played."""
    first = row = submitted(number)
    events = [recorded(Event(kind=EventKind.SUBMITTED, message="submitted", cause=ANN), row, BEGIN)]
    for count, step in enumerate(HISTORIES[name], 1):
        now = BEGIN + count * APART_S
        event = step if isinstance(step, Event) else step(row, now)
        row = advance(row, event, now)
        events.append(recorded(event, row, now))
    return {"name": name, "submitted": row_to_json(first), "events": events, "final": row_to_json(row)}


def recorded(event: Event, row: JobRow, now: float) -> Json:
    """An event as the database keeps it; `state` is the one after it."""
    return {"time": utc(now), "state": row.state, **asdict(event)}


def histories() -> Iterator[Json]:
    """All of them."""
    for number, name in enumerate(HISTORIES):
        yield history(name, number)


def build() -> str:
    """The file's text."""
    value = {"version": 1, "histories": list(histories())}
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def main() -> None:
    """Write it."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    main()
