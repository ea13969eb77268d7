"""Rows and events ↔ the messages of proto/sotto/v1/jobs.proto and google.longrunning.

A page of a thousand jobs is built in milliseconds: what does not change any more (a specification, a job at rest)
becomes a message once, however often it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from ..communication.errors import to_status
from ..communication.generated import jobs_pb2
from ..communication.messages import standing_to_proto
from ..errors import BY_REASON, AbandonedError, InvalidInput, NotFoundError, SottoError
from ..text import shown
from .specs import spec_into_proto, spec_of
from .states import EventKind, JobError, JobRow, JobState, Priority
from .store import StoredEvent
from .views import JobView, Status

if TYPE_CHECKING:
    from .executors.stats import PoolStats

OPERATION_PREFIX: Final = "operations/"
MAX_PAGE_BYTES: Final = 3 << 20
"""Of a page of a listing, and of the rounds in one answer: whatever jobs hold, it has to fit into one message, and
gRPC's default limit for a message is 4 MiB."""
MESSAGES_KEPT: Final = 4096
MAX_MESSAGE_KEPT_BYTES: Final = 4096
"""Hence at most 16 MiB of each kind."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_STATES: Final = {state: jobs_pb2.JobState.Value(state.value) for state in JobState}
_PRIORITIES: Final = {priority: jobs_pb2.JobPriority.Value(priority.value) for priority in Priority}
_PRIORITIES_BACK: Final[Mapping[int, Priority]] = {number: priority for priority, number in _PRIORITIES.items()}


class _Kept:
    """Serialized messages by what they are made of. Used from several threads: each step is one of a dict's own."""

    def __init__(self) -> None:
        self._messages: dict[tuple[str, ...], bytes] = {}

    def get(self, key: tuple[str, ...], make: Callable[[], bytes]) -> bytes:
        """The message of a key; `make` is asked for one that is not (or no longer) there."""
        message = self._messages.get(key)
        if message is None:
            message = make()
            if len(message) <= MAX_MESSAGE_KEPT_BYTES:
                if len(self._messages) >= MESSAGES_KEPT:
                    self._messages.clear()
                self._messages[key] = message
        return message


_specs: Final = _Kept()
_at_rest: Final = _Kept()

# --- jobs -------------------------------------------------------------------------------------------------------------


def job_to_proto(view: JobView) -> jobs_pb2.Job:
    """A job as its owner sees it. A model that came with it is not sent back: the specification's digest covers it."""
    job = jobs_pb2.Job()
    _fill_job(job, view)
    return job


def jobs_page(views: Sequence[JobView], next_page_token: str) -> jobs_pb2.ListJobsResponse:
    """A page of a listing, perhaps with fewer jobs than views: as many as fit into `MAX_PAGE_BYTES`, at least one."""
    page = jobs_pb2.ListJobsResponse(next_page_token=next_page_token)
    for view in views:
        _fill_job(page.jobs.add(), view)
    _shorten(page, page.jobs)
    return page


def _fill_job(job: jobs_pb2.Job, view: JobView) -> None:
    row = view.row
    if row.at_rest and not view.rounds and not view.kept:
        key = (row.job_id, row.owner, row.spec_digest, row.ended_at, row.deleted_at)
        job.MergeFromString(_at_rest.get(key, lambda: _filled(view).SerializeToString()))
    else:
        job.CopyFrom(_filled(view))


def _filled(view: JobView) -> jobs_pb2.Job:
    row, job = view.row, jobs_pb2.Job()
    # The same digest is the same specification.
    job.MergeFromString(_specs.get((row.kind, row.spec_digest), lambda: _spec_bytes(row)))
    job.job_id = row.job_id
    job.owner = row.owner
    job.kind = row.kind
    job.state = _STATES[row.state]
    job.priority = _PRIORITIES[row.priority]
    job.display_name = row.display_name
    job.spec_digest = row.spec_digest
    job.attempt = row.attempt
    job.max_attempts = row.max_attempts
    _set_time(job.create_time, row.created_at)
    if row.started_at:
        _set_time(job.start_time, row.started_at)
    if row.ended_at:
        _set_time(job.end_time, row.ended_at)
    if row.retry_at:
        _set_time(job.retry_time, row.retry_at)
    if row.deleted_at:
        _set_time(job.delete_time, row.deleted_at)
    if row.deadline_at:
        _set_time(job.deadline, row.deadline_at)
        _set_timeout(job.timeout, row)
    _fill_progress(job.progress, view)
    job.kept_rounds.extend(view.kept)
    if row.result is not None:
        _fill_result(job.result, row.result)
    if row.error is not None:
        job.error.CopyFrom(error_to_proto(row.error))
    return job


def _spec_bytes(row: JobRow) -> bytes:
    """A `Job` with nothing but the specification."""
    job = jobs_pb2.Job()
    spec_into_proto(job, spec_of(row.kind, row.spec))
    return job.SerializeToString()


def _fill_progress(progress: jobs_pb2.JobProgress, view: JobView) -> None:
    activity, row = view.activity, view.row
    progress.stage = activity.stage
    progress.rounds_released = row.rounds_released
    progress.rounds_planned = int(row.spec.get("rounds", 0))
    progress.rounds_failed = row.rounds_failed
    progress.queue_position = view.queue_position
    progress.bytes_received = activity.bytes_received
    progress.waiting_for.extend(activity.waiting_for)
    for party, state in activity.parties:
        progress.parties.add(party=party, state=state)
    if activity.estimated_end_at:
        _set_time(progress.estimated_end_time, activity.estimated_end_at)
    if view.rounds:
        progress.rounds.extend(_latest_rounds(view.rounds))


def _latest_rounds(summaries: Sequence[Mapping[str, Any]]) -> list[jobs_pb2.RoundSummary]:
    """In order; of very many the latest ones."""
    rounds: list[jobs_pb2.RoundSummary] = []
    room = MAX_PAGE_BYTES
    for summary in reversed(summaries):
        message = round_to_proto(summary)
        room -= message.ByteSize() + _ENTRY_BYTES
        if room < 0:
            break
        rounds.append(message)
    return rounds[::-1]


def round_to_proto(summary: Mapping[str, Any]) -> jobs_pb2.RoundSummary:
    """The detail of an event of kind "round" (`states.round_event`); what is left out stays empty."""
    given = {key: value for key, value in summary.items() if value is not None}
    return jobs_pb2.RoundSummary(
        round=given["round"],
        state=given["state"],
        contributions=given.get("contributions", 0),
        metrics={name: float(value) for name, value in given.get("metrics", {}).items()},
        epsilon_party=float(given.get("epsilon_party", 0)),
        epsilon_party_against_aggregator=float(given.get("epsilon_party_against_aggregator", 0)),
        parties=[_party_to_proto(party) for party in given.get("parties", ())],
        seconds=_real(given.get("seconds")),
        reason=given.get("reason", ""),
        epsilon_party_if_all_others_collude=_real(given.get("epsilon_party_if_all_others_collude")),
        party_assumption=given.get("party_assumption", ""),
        party_delta=given.get("party_delta"),
        not_evaluated=given.get("not_evaluated", ""),
    )


def _real(value: float | str | None) -> float | None:
    """An infinite ε is "inf"."""
    return None if value is None else float(value)


def _party_to_proto(party: Mapping[str, Any]) -> jobs_pb2.PartySummary:
    message = jobs_pb2.PartySummary(party=party["party"], bytes_up=party.get("bytes_up") or 0)
    for name in ("example_epsilon_spent", "example_epsilon_left", "example_epsilon_left_delta"):
        if party.get(name) is not None:
            setattr(message, name, float(party[name]))
    return message


FIGURES: Final = (
    "epsilon_example",
    "epsilon_party",
    "epsilon_party_against_aggregator",
    "delta",
    "party_delta",
    "epsilon_example_if_all_others_collude",
    "epsilon_party_if_all_others_collude",
)
ROUND_FIELDS: Final = ("round", "rounds_released", "rounds_planned", "continued_from")
"""What a training's result has besides; all but the first only where it did not come to its end, or went on from
another."""
MEASURED: Final = ("metrics", "not_evaluated")
"""What a result says of its model on public rows; the second only where something is missing."""
ASSUMPTIONS: Final = ("example_assumption", "party_assumption", "party_assumption_against_aggregator")


_OF_PREDECESSOR: Final = ("epsilon_example", "delta", "epsilon_party", "party_delta")


def result_to_proto(result: Mapping[str, Any]) -> jobs_pb2.JobResult:
    """`JobRow.result`."""
    message = jobs_pb2.JobResult()
    _fill_result(message, result)
    return message


def _fill_result(message: jobs_pb2.JobResult, result: Mapping[str, Any]) -> None:
    message.SetInParent()
    for file in result.get("files", ()):
        message.files.add(name=file["name"], bytes=file["bytes"], sha256=bytes.fromhex(file["sha256"]))
    for name, value in (result.get("metrics") or {}).items():
        message.metrics[name] = float(value)
    message.not_evaluated = str(result.get("not_evaluated") or "")
    for name in FIGURES:
        if result.get(name) is not None:  # of a model that came with the job nothing is known, which is not zero
            setattr(message, name, float(result[name]))
    for name in ASSUMPTIONS:
        if result.get(name):
            setattr(message, name, str(result[name]))
    for name in ROUND_FIELDS[:-1]:
        setattr(message, name, int(result.get(name, 0)))
    for each in result.get("continued_from", ()):
        texts = {name: each[name] for name in ("job_id", "round", "model_sha256")}
        message.continued_from.add(**texts, **{name: float(each[name]) for name in _OF_PREDECESSOR})


def error_to_proto(error: JobError) -> jobs_pb2.JobError:
    """Why a job failed, or its last attempt."""
    return jobs_pb2.JobError(
        reason=error.reason,
        message=error.message,
        stage=error.stage,
        parties=error.parties,
        log_reference=error.log_reference,
    )


def priority_from_proto(job: jobs_pb2.Job) -> Priority | None:
    """The priority that a job asks for; None where it asks for none. Raises InvalidInput for an unknown number."""
    if job.priority == jobs_pb2.JOB_PRIORITY_UNSPECIFIED:
        return None
    priority = _PRIORITIES_BACK.get(job.priority)
    if priority is None:
        violation = f"one of {', '.join(Priority)} (got {job.priority})"
        raise InvalidInput(f"priority: {violation}", violations={"priority": violation})
    return priority


def timeout_from_proto(job: jobs_pb2.Job) -> float | None:
    """Seconds from submission to the deadline that a job asks for; None where it asks for none."""
    return seconds_of(job.timeout) if job.HasField("timeout") else None


def seconds_of(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


# --- events -----------------------------------------------------------------------------------------------------------


def event_to_proto(event: StoredEvent) -> jobs_pb2.JobEvent:
    """One line of a job's history."""
    message = jobs_pb2.JobEvent(
        sequence=event.sequence,
        kind=event.kind.value,
        state=_STATES[event.state],
        message=event.message,
        cause=event.cause,
        attempt=1 if event.kind is EventKind.STARTED else int((event.detail or {}).get("attempt", 0)),
    )
    _set_time(message.time, event.time)
    if event.kind is EventKind.ROUND and event.detail is not None:
        message.round.CopyFrom(round_to_proto(event.detail))
    return message


def events_page(events: Sequence[StoredEvent], next_after_sequence: int) -> jobs_pb2.ListJobEventsResponse:
    """A page of a history: as many of the events as fit into `MAX_PAGE_BYTES`, at least one."""
    page = jobs_pb2.ListJobEventsResponse(next_after_sequence=next_after_sequence)
    page.events.extend(event_to_proto(event) for event in events)
    if _shorten(page, page.events):
        page.next_after_sequence = page.events[-1].sequence
    return page


# --- operations -------------------------------------------------------------------------------------------------------


def operation_to_proto(view: JobView) -> operations_pb2.Operation:
    """The job as a long-running operation: its metadata always, at rest its result or error as well."""
    operation = operations_pb2.Operation()
    _fill_operation(operation, view)
    return operation


def operations_page(views: Sequence[JobView], next_page_token: str) -> operations_pb2.ListOperationsResponse:
    """As `jobs_page`."""
    page = operations_pb2.ListOperationsResponse(next_page_token=next_page_token)
    for view in views:
        _fill_operation(page.operations.add(), view)
    _shorten(page, page.operations)
    return page


def _fill_operation(operation: operations_pb2.Operation, view: JobView) -> None:
    row = view.row
    operation.name = operation_name(row.job_id)
    operation.done = row.at_rest
    metadata = jobs_pb2.OperationMetadata(
        job_id=row.job_id,
        state=_STATES[row.state],
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        priority=_PRIORITIES[row.priority],
        kind=row.kind,
    )
    _fill_progress(metadata.progress, view)
    _set_time(metadata.create_time, row.created_at)
    if row.started_at:
        _set_time(metadata.start_time, row.started_at)
    if row.ended_at:
        _set_time(metadata.end_time, row.ended_at)
    if row.deadline_at:
        _set_time(metadata.deadline, row.deadline_at)
    operation.metadata.Pack(metadata)
    if row.state is JobState.SUCCEEDED:
        operation.response.Pack(result_to_proto(row.result or {}))
    elif row.at_rest:
        operation.error.CopyFrom(_operation_error(row))


def _operation_error(row: JobRow) -> status_pb2.Status:
    """The status that an RPC would have carried (https://google.aip.dev/193), no larger than one: `ErrorInfo` says
    stage, parties and what to look for in the log."""
    if row.error is None:
        return to_status(AbandonedError(f"job {row.job_id} was cancelled", job_id=row.job_id))
    error = row.error
    details = {"stage": error.stage, "log_reference": error.log_reference, "parties": ",".join(error.parties)}
    cls = BY_REASON.get(error.reason, SottoError)
    if cls is SottoError:  # of another version: it has no class here, and still a name
        details["reason"] = error.reason
    shown = {key: value for key, value in details.items() if value}
    return to_status(cls(error.message, job_id=row.job_id, **shown))


def operation_name(job_id: str) -> str:
    """Of the job's operation."""
    return f"{OPERATION_PREFIX}{job_id}"


def job_id_of(operation: str) -> str:
    """The job of an operation's name; NotFoundError when it is not such a name."""
    job_id = operation.removeprefix(OPERATION_PREFIX)
    if job_id == operation or not job_id:
        raise NotFoundError(f"no operation {shown(operation)}; operations are named operations/ and the job's id")
    return job_id


# --- the aggregator ---------------------------------------------------------------------------------------------------


def status_to_proto(status: Status) -> jobs_pb2.Status:
    """How the aggregator is."""
    message = jobs_pb2.Status(
        federation=status.federation,
        software_version=status.software_version,
        key_id=status.key_id,
        custody=status.custody,
        parties=[
            jobs_pb2.PartyStatus(
                party=party.party,
                connected=party.connected,
                waiting_for=party.waiting_for,
                warnings=party.warnings,
                tasks={task: standing_to_proto(standing) for task, standing in party.tasks.items()},
            )
            for party in status.parties
        ],
        workers=_pool_to_proto(status.workers),
        jobs_pending=status.jobs_pending,
        jobs_running=status.jobs_running,
        stopping=status.stopping,
        warnings=status.warnings,
        tasks={task: standing_to_proto(standing) for task, standing in status.tasks.items()},
    )
    _set_time(message.start_time, status.started_at)
    return message


def _pool_to_proto(stats: PoolStats) -> jobs_pb2.PoolStatus:
    return jobs_pb2.PoolStatus(
        size=stats.size,
        min_size=stats.min_size,
        max_size=stats.max_size,
        busy=stats.busy,
        idle=stats.idle,
        waiting=stats.waiting,
        started=stats.started,
        replaced=stats.replaced,
        recycled=stats.recycled,
        grown=stats.grown,
        shrunk=stats.shrunk,
        tasks_done=stats.tasks_done,
        tasks_failed=stats.tasks_failed,
        tasks_refused=stats.tasks_refused,
        tasks_cancelled=stats.tasks_cancelled,
        failure_rate=stats.failure_rate,
        units=[
            jobs_pb2.UnitStatus(
                name=unit.name,
                done=unit.done,
                failed=unit.failed,
                mean_s=unit.mean_s,
                p50_s=unit.p50_s,
                p95_s=unit.p95_s,
                longest_s=unit.longest_s,
            )
            for unit in stats.units
        ],
    )


# --- inside -----------------------------------------------------------------------------------------------------------

_ENTRY_BYTES: Final = 6
"""Tag and length of one entry of a repeated field, at most (varints)."""


def _shorten(page: Any, entries: Any) -> bool:
    """Cut entries off a page until it fits into `MAX_PAGE_BYTES`, but for the first; returns whether any were."""
    room = MAX_PAGE_BYTES - page.ByteSize()
    count = len(entries)
    while room < 0 and len(entries) > 1:
        room += entries[-1].ByteSize()
        del entries[-1]
    return len(entries) < count


def _set_time(message: Timestamp, text: str) -> None:
    """What `states.utc` wrote. `Timestamp.FromJsonString` takes ten times as long."""
    since = datetime.fromisoformat(text) - _EPOCH
    message.seconds = since.days * 86_400 + since.seconds
    message.nanos = since.microseconds * 1000


def _set_timeout(message: Duration, row: JobRow) -> None:
    timeout = datetime.fromisoformat(row.deadline_at) - datetime.fromisoformat(row.created_at)
    message.seconds = timeout.days * 86_400 + timeout.seconds
    message.nanos = timeout.microseconds * 1000
