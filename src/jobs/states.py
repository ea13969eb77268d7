"""The rules of a job: one table of legal transitions, and a pure function over it.

    PENDING ─┬─> RUNNING ─┬─> SUCCEEDED
             │      │     ├─> FAILED
             │      └─> CANCELLING ─> CANCELLED (or SUCCEEDED, FAILED: what was under way may end first)
             ├─> FAILED
             └─> CANCELLED

`advance(row, event, now)` gives the next row; states at rest (SUCCEEDED, FAILED, CANCELLED) are final. Names follow
AIP-216 (https://google.aip.dev/216): -ING while moving, -ED at rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from ..errors import UNEXPECTED, StateError


class JobState(StrEnum):
    """Where a job is. The names are those of the wire's `JobState`."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class EventKind(StrEnum):
    """What can happen to a job. The names are those of the wire's `JobEvent.kind`."""

    SUBMITTED = "submitted"
    STARTED = "started"
    WAITING = "waiting"
    ROUND = "round"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


AT_REST: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: Final[Mapping[tuple[JobState, EventKind], JobState]] = {
    (JobState.PENDING, EventKind.WAITING): JobState.PENDING,
    (JobState.PENDING, EventKind.STARTED): JobState.RUNNING,
    (JobState.PENDING, EventKind.FAILED): JobState.FAILED,
    (JobState.PENDING, EventKind.CANCELLED): JobState.CANCELLED,
    (JobState.RUNNING, EventKind.WAITING): JobState.RUNNING,
    (JobState.RUNNING, EventKind.ROUND): JobState.RUNNING,
    (JobState.RUNNING, EventKind.SUCCEEDED): JobState.SUCCEEDED,
    (JobState.RUNNING, EventKind.FAILED): JobState.FAILED,
    (JobState.RUNNING, EventKind.CANCELLING): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.WAITING): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.ROUND): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.CANCELLED): JobState.CANCELLED,
    (JobState.CANCELLING, EventKind.SUCCEEDED): JobState.SUCCEEDED,
    (JobState.CANCELLING, EventKind.FAILED): JobState.FAILED,
}
"""(state, event) → next state. What is not here is a StateError; nothing leads out of a state at rest."""


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job ended without a result.

    Attributes:
        reason: of the error catalogue, e.g. BUDGET_EXCEEDED.
        message: public text.
        stage: what the job was doing.
        parties: whose part in it is known.
    """

    reason: str
    message: str
    stage: str = ""
    parties: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as events and the store keep it."""
        return {**asdict(self), "parties": list(self.parties)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> JobError:
        """What `to_json` wrote."""
        return cls(**{**value, "parties": tuple(value.get("parties", ()))})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """All that is known of a job but its history.

    Attributes:
        job_id: made by the aggregator; hexadecimal, so that it is safe in a path.
        request_id: made by the client; unique for an owner.
        owner: who submitted it, as "role/name".
        spec: `FederatedTrainingSpec.to_json()`.
        spec_digest: SHA-256 (hex) of the specification.
        created_at, started_at, ended_at: UTC, ISO 8601 with microseconds; empty while it has not happened.
        rounds_released, rounds_failed: counted from the events of kind "round".
        error: set in FAILED.
        result: set in SUCCEEDED: {"files": [{"name", "bytes", "sha256" (hex)}], "metrics": {name: real},
            "epsilon_example", "epsilon_party", "epsilon_party_against_aggregator", "delta"}; an infinite ε is "inf".
    """

    job_id: str
    request_id: str
    owner: str
    display_name: str
    spec: dict[str, Any]
    spec_digest: str
    state: JobState = JobState.PENDING
    created_at: str
    started_at: str = ""
    ended_at: str = ""
    rounds_released: int = 0
    rounds_failed: int = 0
    error: JobError | None = None
    result: dict[str, Any] | None = None

    @property
    def at_rest(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in AT_REST


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a job. The functions below make the ones that carry a detail.

    Attributes:
        detail: plain JSON. Of "round": a round summary; of "failed": a `JobError`; of "succeeded": the result.
    """

    kind: EventKind
    message: str = ""
    detail: dict[str, Any] | None = None


def round_event(summary: Mapping[str, Any], message: str = "") -> Event:
    """A round ended.

    Args:
        summary: {"round", "state" (RELEASED, FAILED or CANCELLED), "contributions", "metrics", "epsilon_party",
            "epsilon_party_against_aggregator" (infinite where nothing protects), "parties": [{"party", "bytes_up",
            "example_epsilon_spent", "example_epsilon_left"}], "seconds", "reason"}; all but the first two may be left
            out, or None.
        message: public text; made from the summary where empty.
    """
    text = message or f"round {summary['round']} {str(summary['state']).lower()}"
    return Event(kind=EventKind.ROUND, message=text, detail=_plain(summary))


def failed_event(reason: str, message: str, *, stage: str = "", parties: Sequence[str] = ()) -> Event:
    """The job ended without a result, for a reason of the error catalogue."""
    error = JobError(reason, message, stage, tuple(parties))
    return Event(kind=EventKind.FAILED, message=message, detail=error.to_json())


def succeeded_event(result: Mapping[str, Any], message: str = "the model and its manifest are ready") -> Event:
    """The job ended with a result (`JobRow.result`)."""
    return Event(kind=EventKind.SUCCEEDED, message=message, detail=_plain(result))


def _plain(value: Any) -> Any:
    """JSON has no infinity: an infinite ε is the text "inf"."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def advance(row: JobRow, event: Event, now: float) -> JobRow:
    """The row after an event.

    Args:
        row: as it is.
        event: what happened.
        now: seconds since the epoch.

    Raises:
        StateError: the table has no such transition; of a state at rest it has none.
    """
    state = TRANSITIONS.get((row.state, event.kind))
    if state is None:
        raise StateError(
            f"job {row.job_id} is {row.state.value}: {event.kind.value!r} cannot happen to it", state=row.state.value
        )
    row = replace(row, state=state)
    if event.kind is EventKind.STARTED:
        return replace(row, started_at=utc(now))
    if event.kind is EventKind.ROUND:
        ended = (event.detail or {}).get("state")
        return replace(
            row,
            rounds_released=row.rounds_released + (ended == "RELEASED"),
            rounds_failed=row.rounds_failed + (ended == "FAILED"),
        )
    if not row.at_rest:
        return row
    error = result = None
    if state is JobState.FAILED:
        error = JobError.from_json(event.detail or {"reason": UNEXPECTED.reason, "message": event.message})
    if state is JobState.SUCCEEDED:
        result = event.detail or {}
    return replace(row, ended_at=utc(now), error=error, result=result)


def utc(now: float) -> str:
    """Seconds since the epoch as UTC, ISO 8601, always with microseconds: text order is time order."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
