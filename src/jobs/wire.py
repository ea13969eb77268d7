"""Rows and events ↔ the messages of proto/sotto/v1/jobs.proto and google.longrunning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.longrunning import operations_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2

from ..communication.generated import jobs_pb2
from ..errors import BY_REASON, CATALOGUE, DOMAIN, UNEXPECTED, AbandonedError, InvalidInput, NotFoundError
from .service import JobView, Status
from .spec import FederatedTrainingSpec, spec_to_proto
from .states import EventKind, JobError, JobRow, JobState
from .store import StoredEvent

OPERATION_PREFIX: Final = "operations/"
_STATE_FILTER: Final = "state="


def job_to_proto(view: JobView) -> jobs_pb2.Job:
    """A job as its owner sees it. `initial_model` is not sent back: the digest of the specification covers it."""
    row = view.row
    return jobs_pb2.Job(
        job_id=row.job_id,
        owner=row.owner,
        state=state_to_proto(row.state),
        create_time=_timestamp(row.created_at),
        start_time=_timestamp(row.started_at),
        end_time=_timestamp(row.ended_at),
        progress=progress_to_proto(view),
        result=None if row.result is None else result_to_proto(row.result),
        error=None if row.error is None else error_to_proto(row.error),
        spec_digest=row.spec_digest,
        display_name=row.display_name,
        federated_training=spec_to_proto(FederatedTrainingSpec.from_json(row.spec)),
    )


def progress_to_proto(view: JobView) -> jobs_pb2.JobProgress:
    """What a job is doing and has done."""
    return jobs_pb2.JobProgress(
        stage=view.activity.stage,
        rounds_released=view.row.rounds_released,
        rounds_planned=int(view.row.spec["rounds"]),
        rounds_failed=view.row.rounds_failed,
        waiting_for=view.activity.waiting_for,
        queue_position=view.queue_position,
        rounds=[round_to_proto(summary) for summary in view.rounds],
    )


def round_to_proto(summary: Mapping[str, Any]) -> jobs_pb2.RoundSummary:
    """The detail of an event of kind "round" (`states.round_event`); what is left out stays empty."""
    given = {key: value for key, value in summary.items() if value is not None}
    return jobs_pb2.RoundSummary(
        round=given["round"],
        state=given["state"],
        contributions=given.get("contributions", 0),
        metrics=_metrics(given),
        epsilon_party=float(given.get("epsilon_party", 0)),
        epsilon_party_against_aggregator=float(given.get("epsilon_party_against_aggregator", 0)),
        parties=[_party_to_proto(party) for party in given.get("parties", ())],
        seconds=float(given.get("seconds", 0)),
        reason=given.get("reason", ""),
    )


def _party_to_proto(party: Mapping[str, Any]) -> jobs_pb2.PartySummary:
    message = jobs_pb2.PartySummary(party=party["party"], bytes_up=party.get("bytes_up") or 0)
    for name in ("example_epsilon_spent", "example_epsilon_left"):
        if party.get(name) is not None:
            setattr(message, name, float(party[name]))
    return message


def result_to_proto(result: Mapping[str, Any]) -> jobs_pb2.JobResult:
    """`JobRow.result`."""
    files = [
        jobs_pb2.ArtifactFile(name=file["name"], bytes=file["bytes"], sha256=bytes.fromhex(file["sha256"]))
        for file in result.get("files", ())
    ]
    figures = ("epsilon_example", "epsilon_party", "epsilon_party_against_aggregator", "delta")
    return jobs_pb2.JobResult(
        files=files, metrics=_metrics(result), **{name: float(result.get(name) or 0) for name in figures}
    )


def error_to_proto(error: JobError) -> jobs_pb2.JobError:
    """Why a job failed."""
    return jobs_pb2.JobError(reason=error.reason, message=error.message, stage=error.stage, parties=error.parties)


def event_to_proto(event: StoredEvent) -> jobs_pb2.JobEvent:
    """One line of a job's history."""
    summary = event.detail if event.kind is EventKind.ROUND else None
    return jobs_pb2.JobEvent(
        sequence=event.sequence,
        time=_timestamp(event.time),
        kind=event.kind.value,
        state=state_to_proto(event.state),
        message=event.message,
        round=None if summary is None else round_to_proto(summary),
    )


def operation_to_proto(view: JobView) -> operations_pb2.Operation:
    """The job as a long-running operation: its metadata always, at rest its result or error as well."""
    row = view.row
    operation = operations_pb2.Operation(name=operation_name(row.job_id), done=row.at_rest)
    operation.metadata.Pack(
        jobs_pb2.OperationMetadata(
            job_id=row.job_id,
            state=state_to_proto(row.state),
            progress=progress_to_proto(view),
            create_time=_timestamp(row.created_at),
        )
    )
    if row.state is JobState.SUCCEEDED:
        operation.response.Pack(result_to_proto(row.result or {}))
    elif row.at_rest:
        operation.error.CopyFrom(_operation_error(row))
    return operation


def _operation_error(row: JobRow) -> status_pb2.Status:
    """A `google.rpc.Status` with the `ErrorInfo` that an RPC would have carried (https://google.aip.dev/193)."""
    if row.error is None:
        error = JobError(CATALOGUE[AbandonedError].reason, f"job {row.job_id} was cancelled")
    else:
        error = row.error
    cls = BY_REASON.get(error.reason)
    code = (CATALOGUE[cls] if cls else UNEXPECTED).status
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    details = {"job_id": row.job_id, "stage": error.stage, "parties": ",".join(error.parties)}
    info.metadata.update({key: value for key, value in details.items() if value})
    status.details.add().Pack(info)
    return status


def status_to_proto(status: Status) -> jobs_pb2.Status:
    """How the aggregator is."""
    return jobs_pb2.Status(
        federation=status.federation,
        software_version=status.software_version,
        key_id=status.key_id,
        custody=status.custody,
        parties=[
            jobs_pb2.PartyStatus(party=party.party, connected=party.connected, waiting_for=party.waiting_for)
            for party in status.parties
        ],
        workers_busy=status.workers_busy,
        workers_idle=status.workers_idle,
        jobs_pending=status.jobs_pending,
        jobs_running=status.jobs_running,
    )


def state_to_proto(state: JobState) -> jobs_pb2.JobState.ValueType:
    """The enumeration's value of the same name."""
    return jobs_pb2.JobState.Value(state.value)


def state_of_filter(text: str) -> JobState | None:
    """The state in a filter such as "state=RUNNING"; None for an empty filter.

    Raises:
        InvalidInput: any other filter.
    """
    wanted = text.replace(" ", "")
    if not wanted:
        return None
    name = wanted.removeprefix(_STATE_FILTER).strip('"')
    if not wanted.startswith(_STATE_FILTER) or name not in JobState.__members__:
        allowed = f"empty, or state= and one of {', '.join(JobState)}"
        raise InvalidInput(f"filter: {allowed}", violations={"filter": allowed})
    return JobState(name)


def operation_name(job_id: str) -> str:
    """Of the job's operation."""
    return f"{OPERATION_PREFIX}{job_id}"


def job_id_of(operation: str) -> str:
    """The job of an operation's name; NotFoundError when it is not such a name."""
    job_id = operation.removeprefix(OPERATION_PREFIX)
    if job_id == operation or not job_id:
        raise NotFoundError(f"no operation {operation!r}; operations are named operations/ and the job's id")
    return job_id


def _metrics(holder: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in (holder.get("metrics") or {}).items()}


def _timestamp(text: str) -> Timestamp | None:
    if not text:
        return None
    timestamp = Timestamp()
    timestamp.FromJsonString(text)
    return timestamp
