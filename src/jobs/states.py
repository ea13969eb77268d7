"""The rules of a job: one table of legal transitions, and a pure function over it.

    PENDING ─┬─> RUNNING <──> RETRYING
             │      │ │            │
             │      │ └─> SUCCEEDED, FAILED (of RETRYING: FAILED)
             │      └─> CANCELLING <─┘
             │               └─> CANCELLED (or SUCCEEDED, FAILED: what was under way may end first)
             └─> FAILED, CANCELLED

`advance(row, event, now)` gives the next row; states at rest (SUCCEEDED, FAILED, CANCELLED) are final. Names follow
AIP-216 (https://google.aip.dev/216): -ING while moving, -ED at rest. Because `advance` is all there is, a job's history
replays: `replay` makes the row again from its events.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from ..errors import CATALOGUE, UNEXPECTED, DeadlineError, StateError


class JobState(StrEnum):
    """Where a job is. The names are those of the wire's `JobState`."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Priority(StrEnum):
    """How urgent a job is beside others. The names are those of the wire's `JobPriority`."""

    HIGH = "HIGH"
    NORMAL = "NORMAL"
    LOW = "LOW"


class EventKind(StrEnum):
    """What can happen to a job. The names are those of the wire's `JobEvent.kind`."""

    SUBMITTED = "submitted"
    STARTED = "started"
    WAITING = "waiting"
    WARNING = "warning"
    """Something that its owner may want to know, or to cancel it for; the job goes on."""
    ROUND = "round"
    RETRYING = "retrying"
    """An attempt failed, for a cause that another one may mend."""
    RESUMED = "resumed"
    """The next attempt begins, or another process goes on with the present one."""
    EXPIRED = "expired"
    """The job's deadline has passed, or it got nowhere for as long as its lease lasts."""
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DELETED = "deleted"
    """Its files were dropped; nothing else about it changes."""


AT_REST: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: Final[Mapping[tuple[JobState, EventKind], JobState]] = {
    (JobState.PENDING, EventKind.WAITING): JobState.PENDING,
    (JobState.PENDING, EventKind.STARTED): JobState.RUNNING,
    (JobState.PENDING, EventKind.EXPIRED): JobState.FAILED,
    (JobState.PENDING, EventKind.FAILED): JobState.FAILED,
    (JobState.PENDING, EventKind.CANCELLED): JobState.CANCELLED,
    (JobState.RUNNING, EventKind.WAITING): JobState.RUNNING,
    (JobState.RUNNING, EventKind.WARNING): JobState.RUNNING,
    (JobState.RUNNING, EventKind.ROUND): JobState.RUNNING,
    (JobState.RUNNING, EventKind.RESUMED): JobState.RUNNING,
    (JobState.RUNNING, EventKind.RETRYING): JobState.RETRYING,
    (JobState.RUNNING, EventKind.SUCCEEDED): JobState.SUCCEEDED,
    (JobState.RUNNING, EventKind.FAILED): JobState.FAILED,
    (JobState.RUNNING, EventKind.EXPIRED): JobState.CANCELLING,
    (JobState.RUNNING, EventKind.CANCELLING): JobState.CANCELLING,
    (JobState.RETRYING, EventKind.WAITING): JobState.RETRYING,
    (JobState.RETRYING, EventKind.ROUND): JobState.RETRYING,
    (JobState.RETRYING, EventKind.RESUMED): JobState.RUNNING,
    (JobState.RETRYING, EventKind.FAILED): JobState.FAILED,
    (JobState.RETRYING, EventKind.EXPIRED): JobState.CANCELLING,
    (JobState.RETRYING, EventKind.CANCELLING): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.WAITING): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.ROUND): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.RESUMED): JobState.CANCELLING,
    (JobState.CANCELLING, EventKind.CANCELLED): JobState.CANCELLED,
    (JobState.CANCELLING, EventKind.SUCCEEDED): JobState.SUCCEEDED,
    (JobState.CANCELLING, EventKind.FAILED): JobState.FAILED,
    **{(state, EventKind.DELETED): state for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)},
}
"""(state, event) → next state. What is not here is a StateError; nothing leads out of a state at rest."""

MENDABLE: Final = frozenset({"WORKER_FAILED", "UNAVAILABLE", "STORAGE_FULL"})
"""Reasons of the error catalogue that another attempt may mend: a process that died, a service that was away, a disk
that was full. For all others (a budget, a policy, bad input, damage, a mistake of ours) another one would end alike."""


KEEP: Final = "keep"
"""In the detail of "cancelling": the job is to end with its last released round as its result."""


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job ended without a result.

    Attributes:
        reason: of the error catalogue, e.g. BUDGET_EXCEEDED.
        message: public text.
        stage: what the job was doing.
        parties: whose part in it is known.
        log_reference: what to look for in the log of the process where it happened.
    """

    reason: str
    message: str
    stage: str = ""
    parties: tuple[str, ...] = ()
    log_reference: str = ""

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
        kind: of the specification: "federated_training", "evaluation", "export".
        spec: the specification's `to_json()`.
        spec_digest: SHA-256 (hex) of the specification.
        signed_order: the order that its scientist signed (`protocol.signing.Signed.to_text`); empty: nobody did.
        attempt: that is under way, or was the last; 0 before the first, 1 again whenever a round is released.
        max_attempts: ≥ 1.
        created_at, started_at, ended_at, deleted_at: UTC, ISO 8601 with microseconds; empty while it has not happened.
        retry_at: when the next attempt begins; empty but in RETRYING.
        deadline_at: when the job expires; empty: never.
        rounds_released, rounds_failed: counted from the events of kind "round".
        error: in FAILED why; in RETRYING why the last attempt failed; in CANCELLING set where the deadline passed.
        result: set in SUCCEEDED: {"files": [{"name", "bytes", "sha256" (hex)}], "metrics": {name: real},
            "not_evaluated" (what is missing of the metrics and why; where something is), "epsilon_example",
            "epsilon_party", "epsilon_party_against_aggregator", "delta" and further figures and assumptions
            (`JobResult` names them)}; an infinite ε is "inf".
    """

    job_id: str
    request_id: str
    owner: str
    display_name: str
    kind: str
    spec: dict[str, Any]
    spec_digest: str
    priority: Priority = Priority.NORMAL
    state: JobState = JobState.PENDING
    attempt: int = 0
    max_attempts: int = 1
    created_at: str
    started_at: str = ""
    ended_at: str = ""
    retry_at: str = ""
    deadline_at: str = ""
    deleted_at: str = ""
    rounds_released: int = 0
    rounds_failed: int = 0
    error: JobError | None = None
    result: dict[str, Any] | None = None
    signed_order: str = ""

    @property
    def at_rest(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in AT_REST


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a job. The functions below make the ones that carry a detail.

    Attributes:
        cause: who or what brought it about: "scientist/ann", "aggregator", "deadline".
        detail: plain JSON. Of "round": a round summary; of "failed" and "expired": a `JobError`; of "succeeded": the
            result; of "retrying": {"error": a `JobError`, "attempt": the one that failed, "retry_at"}; of "resumed":
            {"attempt": the one that begins or goes on}; of "cancelling": {`KEEP`: whether it ends with what it has}.
    """

    kind: EventKind
    message: str = ""
    cause: str = ""
    detail: dict[str, Any] | None = None


def round_event(summary: Mapping[str, Any], message: str = "", *, also: str = "") -> Event:
    """A round ended.

    Args:
        summary: {"round", "state" (RELEASED, FAILED or CANCELLED), "contributions", "metrics",
            "not_evaluated" (what is missing of the metrics, and why), "epsilon_party",
            "epsilon_party_against_aggregator" (infinite where nothing protects), "parties": [{"party", "bytes_up",
            "example_epsilon_spent", "example_epsilon_left", "example_epsilon_left_delta"}], "seconds", "reason",
            "epsilon_party_if_all_others_collude", "party_assumption", "party_delta"}; all but the first two may be
            left out, or None.
        message: public text; made from the summary where empty.
        also: what else there is to say, put behind it.
    """
    text = message or f"round {summary['round']} {str(summary['state']).lower()}"
    text = f"{text}; {also}" if also else text
    return Event(kind=EventKind.ROUND, message=text, detail=_plain(summary))


def failed_event(error: JobError) -> Event:
    """The job ended without a result."""
    return Event(kind=EventKind.FAILED, message=error.message, detail=error.to_json())


def expired_event(row: JobRow) -> Event:
    """The job was not at rest at its deadline."""
    error = JobError(CATALOGUE[DeadlineError].reason, f"the job was not done by its deadline, {row.deadline_at}")
    return Event(kind=EventKind.EXPIRED, message=error.message, cause="deadline", detail=error.to_json())


def after_failure(row: JobRow, error: JobError, delays_s: Sequence[float], now: float) -> Event:
    """What follows when an attempt fails: the next one, as long as there is one and it may help, or the end.

    Args:
        row: of the job, RUNNING.
        error: of the attempt.
        delays_s: before the second attempt, the third, …; the last one also before all later ones; seconds.
        now: seconds since the epoch.
    """
    if error.reason not in MENDABLE or row.attempt >= row.max_attempts:
        return failed_event(error)
    delay_s = delays_s[min(row.attempt, len(delays_s)) - 1] if delays_s else 0.0
    detail = {"error": error.to_json(), "attempt": row.attempt, "retry_at": utc(now + delay_s)}
    text = f"attempt {row.attempt} of {row.max_attempts} failed: {error.message}; the next one in {delay_s:g} s"
    return Event(kind=EventKind.RETRYING, message=text, detail=detail)


def succeeded_event(result: Mapping[str, Any], message: str = "") -> Event:
    """The job ended with a result (`JobRow.result`)."""
    return Event(kind=EventKind.SUCCEEDED, message=message or _READY, detail=_plain(result))


_READY: Final = "the model and its manifest are ready"


def _plain(value: Any) -> Any:
    """JSON has no infinity: an infinite ε is the text "inf"."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "inf" if value == math.inf else value


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
    return _CHANGES.get(event.kind, _unchanged)(replace(row, state=state), event, now)


def replay(submitted: JobRow, events: Iterable[tuple[Event, float]]) -> JobRow:
    """The row that a history leads to.

    Args:
        submitted: as it was when it was stored, PENDING.
        events: what happened after "submitted", in order, each with its time (seconds since the epoch).

    Raises:
        StateError: it is no history of a job.
    """
    row = submitted
    for event, now in events:
        row = advance(row, event, now)
    return row


def _unchanged(row: JobRow, _event: Event, _now: float) -> JobRow:
    return row


def _started(row: JobRow, _event: Event, now: float) -> JobRow:
    return replace(row, started_at=utc(now), attempt=1)


def _round_ended(row: JobRow, event: Event, _now: float) -> JobRow:
    ended = (event.detail or {}).get("state")
    if ended == "RELEASED":  # who gets on does not run out of attempts
        return replace(row, rounds_released=row.rounds_released + 1, attempt=1)
    return replace(row, rounds_failed=row.rounds_failed + (ended == "FAILED"))


def _retrying(row: JobRow, event: Event, _now: float) -> JobRow:
    detail = event.detail or {}
    return replace(row, error=JobError.from_json(detail["error"]), retry_at=detail["retry_at"])


def _resumed(row: JobRow, _event: Event, _now: float) -> JobRow:
    if not row.retry_at:  # another process goes on with the same attempt
        return row
    return replace(row, attempt=row.attempt + 1, retry_at="", error=None)


def _stopping(row: JobRow, event: Event, now: float) -> JobRow:
    """Cancelled, or past its deadline: only then with an error."""
    error = JobError.from_json(event.detail) if event.kind is EventKind.EXPIRED and event.detail else None
    return replace(row, retry_at="", error=error, ended_at=utc(now) if row.at_rest else "")


def _failed(row: JobRow, event: Event, now: float) -> JobRow:
    detail = event.detail or {"reason": UNEXPECTED.reason, "message": event.message}
    return replace(row, retry_at="", ended_at=utc(now), error=JobError.from_json(detail))


def _succeeded(row: JobRow, event: Event, now: float) -> JobRow:
    return replace(row, ended_at=utc(now), error=None, result=event.detail or {})


def _deleted(row: JobRow, _event: Event, now: float) -> JobRow:
    result = None if row.result is None else {**row.result, "files": []}
    return replace(row, deleted_at=row.deleted_at or utc(now), result=result)


_CHANGES: Final = {
    EventKind.STARTED: _started,
    EventKind.ROUND: _round_ended,
    EventKind.RETRYING: _retrying,
    EventKind.RESUMED: _resumed,
    EventKind.EXPIRED: _stopping,
    EventKind.CANCELLING: _stopping,
    EventKind.CANCELLED: _stopping,
    EventKind.FAILED: _failed,
    EventKind.SUCCEEDED: _succeeded,
    EventKind.DELETED: _deleted,
}


def seconds(text: str) -> float:
    """What `utc` wrote, as seconds since the epoch."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()


def utc(now: float) -> str:
    """Seconds since the epoch as UTC, ISO 8601, always with microseconds: text order is time order."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
