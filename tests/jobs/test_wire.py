"""Rows and events as messages: every field, sizes that fit into a message, errors by the book."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from src.communication.errors import MAX_STATUS_BYTES
from src.communication.generated import jobs_pb2
from src.communication.options import DEFAULT_MAX_MESSAGE_BYTES
from src.errors import CATALOGUE, DOMAIN, InvalidInput, NotFoundError
from src.jobs import wire
from src.jobs.computations import EvaluationSpec, ExportSpec
from src.jobs.executors.stats import PoolStats, UnitStats
from src.jobs.spec import FederatedTrainingSpec, spec_to_proto
from src.jobs.specs import JobSpec
from src.jobs.states import EventKind, JobError, JobRow, JobState, Priority, utc
from src.jobs.store import StoredEvent
from src.jobs.views import Activity, JobView, PartyStatus, Status

TRAINING = FederatedTrainingSpec.from_json({"task": "t", "rounds": 7, "parties": ["a", "b"]})
RESULT = {
    "files": [{"name": "model.safetensors", "bytes": 17, "sha256": "ab" * 32}],
    "metrics": {"auc": 0.5, "loss": "inf"},
    "epsilon_party_against_aggregator": "inf",
    "epsilon_example": None,
    "delta": 1e-5,
}
ACTIVITY = Activity(
    "round 2: training",
    ("b",),
    parties=(("a", "DELIVERED"), ("b", "TRAINING")),
    bytes_received=99,
    estimated_end_at=utc(50),
)


def row(spec: JobSpec = TRAINING, job_id: str = "ab", **values: Any) -> JobRow:
    known = {"request_id": "r", "owner": "scientist/ann", "display_name": "mine", "created_at": utc(10.5)}
    return JobRow(job_id=job_id, kind=spec.kind, spec=spec.to_json(), spec_digest=spec.digest, **{**known, **values})


def view(spec: JobSpec = TRAINING, *, rounds: tuple[dict[str, Any], ...] = (), **values: Any) -> JobView:
    return JobView(row(spec, **values), ACTIVITY, 3, rounds)


def event(sequence: int = 1, **values: Any) -> StoredEvent:
    known = {"kind": EventKind.STARTED, "state": JobState.RUNNING, "message": "started", "cause": "aggregator"}
    return StoredEvent(job_id="ab", sequence=sequence, time=utc(3), **{**known, "detail": None, **values})


def at(seconds: int) -> Timestamp:
    return Timestamp(seconds=seconds)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_carries_all_that_is_known_of_it() -> None:
    shown = view(
        state=JobState.RETRYING,
        priority=Priority.HIGH,
        attempt=2,
        max_attempts=4,
        started_at=utc(11),
        retry_at=utc(12),
        deadline_at=utc(100.75),
        error=JobError("WORKER_FAILED", "died", "round 1", ("a",), "incident 7"),
        rounds_released=1,
        rounds_failed=2,
    )
    assert wire.job_to_proto(shown) == jobs_pb2.Job(
        job_id="ab",
        owner="scientist/ann",
        state=jobs_pb2.RETRYING,
        create_time=Timestamp(seconds=10, nanos=500_000_000),
        start_time=at(11),
        progress=jobs_pb2.JobProgress(
            stage="round 2: training",
            rounds_released=1,
            rounds_planned=7,
            rounds_failed=2,
            waiting_for=["b"],
            queue_position=3,
            bytes_received=99,
            parties=[
                jobs_pb2.PartyProgress(party="a", state="DELIVERED"),
                jobs_pb2.PartyProgress(party="b", state="TRAINING"),
            ],
            estimated_end_time=at(50),
        ),
        error=jobs_pb2.JobError(
            reason="WORKER_FAILED", message="died", stage="round 1", parties=["a"], log_reference="incident 7"
        ),
        spec_digest=TRAINING.digest,
        attempt=2,
        max_attempts=4,
        retry_time=at(12),
        deadline=Timestamp(seconds=100, nanos=750_000_000),
        kind="federated_training",
        display_name="mine",
        priority=jobs_pb2.HIGH,
        timeout=Duration(seconds=90, nanos=250_000_000),
        federated_training=spec_to_proto(TRAINING),
    )


def test_a_job_that_ended_well_and_was_deleted_says_so() -> None:
    ended: dict[str, Any] = {"state": JobState.SUCCEEDED, "started_at": utc(1), "ended_at": utc(2), "result": RESULT}
    job = wire.job_to_proto(view(**ended))
    assert (job.end_time, job.HasField("delete_time"), job.HasField("deadline")) == (at(2), False, False)
    assert (job.result.files[0].name, job.result.files[0].bytes) == ("model.safetensors", 17)
    assert job.result.files[0].sha256 == b"\xab" * 32
    assert (job.result.metrics["loss"], job.result.epsilon_party_against_aggregator) == (math.inf, math.inf)
    job = wire.job_to_proto(view(**{**ended, "deleted_at": utc(3), "result": {**RESULT, "files": []}}))
    assert (job.delete_time, list(job.result.files), job.result.metrics["auc"]) == (at(3), [], 0.5)


@pytest.mark.parametrize(
    "spec",
    [EvaluationSpec.from_json({"job_id": "ab", "task": "t"}), ExportSpec.from_json({"job_id": "ab"})],
    ids=lambda spec: str(spec.kind),
)
def test_every_kind_has_its_specification(spec: EvaluationSpec | ExportSpec) -> None:
    job = wire.job_to_proto(view(spec))
    assert (job.kind, job.WhichOneof("spec")) == (spec.kind, spec.kind)
    assert (getattr(job, spec.kind).job_id, job.progress.rounds_planned) == ("ab", 0)


def test_a_job_at_rest_is_shown_from_what_was_made_the_first_time_and_another_is_not() -> None:
    first = view(job_id="first", state=JobState.FAILED, ended_at=utc(2), error=JobError("INTERNAL", "broken"))
    second = replace(first, row=replace(first.row, job_id="second", display_name="other"))
    moving = replace(first, row=replace(first.row, state=JobState.RUNNING, ended_at="", attempt=5))
    for each in (first, second, moving, first, second):
        job = wire.job_to_proto(each)
        assert (job.job_id, job.display_name) == (each.row.job_id, each.row.display_name)
        assert (job.state, job.attempt) == (jobs_pb2.JobState.Value(each.row.state.value), each.row.attempt)


def test_what_is_kept_is_bounded_in_number_and_size() -> None:
    kept = wire._Kept()
    for number in range(wire.MESSAGES_KEPT + 5):
        assert kept.get((str(number),), lambda: b"x") == b"x"
    assert len(kept._messages) <= wire.MESSAGES_KEPT
    large = b"x" * (wire.MAX_MESSAGE_KEPT_BYTES + 1)
    assert kept.get(("large",), lambda: large) == large
    assert ("large",) not in kept._messages


@given(st.floats(0, 2**33, allow_nan=False))
def test_times_are_those_that_were_stored_to_the_microsecond(now: float) -> None:
    stored, known = utc(now), Timestamp()
    known.FromJsonString(stored)
    assert wire.job_to_proto(view(created_at=stored)).create_time == known


def test_enumerations_on_the_wire_have_the_names_of_ours() -> None:
    assert set(jobs_pb2.JobState.keys()) == {"JOB_STATE_UNSPECIFIED", *JobState}
    assert set(jobs_pb2.JobPriority.keys()) == {"JOB_PRIORITY_UNSPECIFIED", *Priority}


def test_what_a_job_asks_for_is_read_back() -> None:
    job = jobs_pb2.Job(priority=jobs_pb2.LOW, timeout=Duration(seconds=1, nanos=500_000_000))
    assert (wire.priority_from_proto(job), wire.timeout_from_proto(job)) == (Priority.LOW, 1.5)
    assert (wire.priority_from_proto(jobs_pb2.Job()), wire.timeout_from_proto(jobs_pb2.Job())) == (None, None)
    job.priority = 99  # type: ignore[assignment]  # an enumeration is open: newer clients may know more
    with pytest.raises(InvalidInput) as caught:
        wire.priority_from_proto(job)
    assert list(caught.value.violations) == ["priority"]


# --- what fits into a message -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [wire.jobs_page, wire.operations_page], ids=["jobs", "operations"])
def test_a_page_holds_as_much_as_fits_and_at_least_one(build: Any) -> None:
    error = JobError("INTERNAL", "broken", stage="x" * 100_000, parties=("y" * 300_000,))
    views = [view(job_id=f"big {number}", display_name="x" * 100_000, error=error) for number in range(60)]
    views = [replace(each, activity=Activity("z" * 100_000)) for each in views]
    page = build(views, "token")
    entries = page.jobs if hasattr(page, "jobs") else page.operations
    assert 0 < len(entries) < 60
    assert page.ByteSize() <= wire.MAX_PAGE_BYTES
    one = build([replace(views[0], activity=Activity("z" * wire.MAX_PAGE_BYTES))], "")
    assert len(one.jobs if hasattr(one, "jobs") else one.operations) == 1
    few = build(views[:3], "token")
    assert (len(few.jobs if hasattr(few, "jobs") else few.operations), few.next_page_token) == (3, "token")


def test_a_page_of_a_history_that_is_cut_says_where_it_goes_on() -> None:
    page = wire.events_page([event(number, message="x" * 100_000) for number in range(1, 61)], 0)
    assert page.ByteSize() <= wire.MAX_PAGE_BYTES
    assert page.next_after_sequence == page.events[-1].sequence == len(page.events) < 60
    assert wire.events_page([event(1)], 7).next_after_sequence == 7


def test_of_very_many_rounds_the_latest_are_shown_in_order() -> None:
    rounds = tuple({"round": number, "state": "FAILED", "reason": "x" * 10_000} for number in range(1, 1001))
    job = wire.job_to_proto(view(rounds=rounds))
    numbers = [each.round for each in job.progress.rounds]
    assert job.ByteSize() < DEFAULT_MAX_MESSAGE_BYTES
    assert numbers == list(range(1001 - len(numbers), 1001))
    assert len(numbers) > 200


# --- events -----------------------------------------------------------------------------------------------------------


def test_an_event_says_what_happened_and_who_brought_it_about() -> None:
    message = wire.event_to_proto(event(4, cause="scientist/ann"))
    assert message == jobs_pb2.JobEvent(
        sequence=4,
        time=at(3),
        kind="started",
        state=jobs_pb2.RUNNING,
        message="started",
        cause="scientist/ann",
        attempt=1,
    )
    retrying = event(
        kind=EventKind.RETRYING, state=JobState.RETRYING, detail={"attempt": 2, "error": {}, "retry_at": ""}
    )
    assert (wire.event_to_proto(retrying).attempt, wire.event_to_proto(retrying).HasField("round")) == (2, False)
    summary = {"round": 3, "state": "RELEASED", "metrics": {"auc": 0.5}, "epsilon_party": "inf", "parties": None}
    ended = wire.event_to_proto(event(kind=EventKind.ROUND, detail=summary)).round
    assert (ended.round, ended.metrics["auc"], ended.epsilon_party, list(ended.parties)) == (3, 0.5, math.inf, [])


# --- operations -------------------------------------------------------------------------------------------------------


def test_an_operation_has_the_metadata_of_its_job_without_the_rounds() -> None:
    shown = view(
        state=JobState.CANCELLING,
        priority=Priority.LOW,
        attempt=1,
        max_attempts=4,
        started_at=utc(11),
        ended_at=utc(13),
        deadline_at=utc(12),
    )
    operation = wire.operation_to_proto(shown)
    metadata = jobs_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    assert (operation.name, operation.done, operation.WhichOneof("result")) == ("operations/ab", False, None)
    job = wire.job_to_proto(shown)
    shared = {field.name for field in metadata.DESCRIPTOR.fields}
    assert {name: getattr(metadata, name) for name in shared} == {name: getattr(job, name) for name in shared}
    assert {field.name for field, _ in metadata.ListFields()} == shared


def test_an_operation_that_ended_well_holds_the_result() -> None:
    operation = wire.operation_to_proto(view(state=JobState.SUCCEEDED, result=RESULT))
    result = jobs_pb2.JobResult()
    assert operation.response.Unpack(result)
    assert (operation.done, result.delta, result.metrics["auc"]) == (True, 1e-5, 0.5)
    empty = wire.operation_to_proto(view(state=JobState.SUCCEEDED, result=None))
    assert empty.response.Is(jobs_pb2.JobResult.DESCRIPTOR)


def error_of(error: JobError | None, state: JobState = JobState.FAILED) -> tuple[Any, error_details_pb2.ErrorInfo]:
    operation: operations_pb2.Operation = wire.operation_to_proto(view(state=state, error=error))
    info = error_details_pb2.ErrorInfo()
    assert operation.done
    assert operation.error.details[0].Unpack(info)
    assert info.domain == DOMAIN
    return operation.error, info


@pytest.mark.parametrize("meaning", sorted(set(CATALOGUE.values()), key=str), ids=lambda meaning: str(meaning.reason))
def test_a_failed_operation_carries_the_status_that_an_rpc_would_have(meaning: Any) -> None:
    error, info = error_of(JobError(meaning.reason, "why", "round 1", ("a", "b"), "incident 7"))
    assert (error.code, error.message) == (grpc.StatusCode[meaning.status].value[0], "why")
    assert info.reason == meaning.reason
    known = {"job_id": "ab", "stage": "round 1", "parties": "a,b", "log_reference": "incident 7"}
    assert {key: info.metadata[key] for key in known} == known


def test_a_reason_of_another_version_keeps_its_name() -> None:
    error, info = error_of(JobError("QUANTUM_DECOHERED", "why"))
    assert (error.code, info.metadata["reason"]) == (code_pb2.INTERNAL, "QUANTUM_DECOHERED")


def test_a_cancelled_operation_says_so() -> None:
    error, info = error_of(None, JobState.CANCELLED)
    assert (error.code, info.reason, info.metadata["job_id"]) == (code_pb2.CANCELLED, "CANCELLED", "ab")


@given(st.text(max_size=20_000), st.text(max_size=3_000), st.lists(st.text(max_size=63), max_size=200))
def test_an_error_stays_small_whatever_it_says(message: str, stage: str, parties: list[str]) -> None:
    error, info = error_of(JobError("ROUND_FAILED", message * 3, stage, tuple(parties), "incident 7"))
    assert error.ByteSize() <= MAX_STATUS_BYTES
    assert (info.metadata["job_id"], info.metadata["log_reference"]) == ("ab", "incident 7")


@pytest.mark.parametrize("name", ["", "operations/", "jobs/ab", "ab", "Operations/ab"])
def test_other_names_are_no_operations(name: str) -> None:
    with pytest.raises(NotFoundError):
        wire.job_id_of(name)


def test_names_of_operations_are_read_back() -> None:
    assert wire.job_id_of(wire.operation_name("ab")) == "ab"


# --- the aggregator ---------------------------------------------------------------------------------------------------


def test_the_status_has_the_whole_state_of_the_pool() -> None:
    unit = UnitStats("fold", 4, 0, 1, 0, mean_s=0.5, p50_s=0.25, p95_s=1.5, longest_s=2.0)
    counts = [field.name for field in fields(PoolStats) if field.name not in ("failure_rate", "units")]
    pool = PoolStats(**{name: number for number, name in enumerate(counts, 1)}, failure_rate=0.125, units=(unit,))
    status = wire.status_to_proto(
        Status(
            federation="demo",
            software_version="1",
            key_id="k",
            custody="threshold",
            parties=(PartyStatus("a", True, "an update"),),
            workers=pool,
            jobs_pending=5,
            jobs_running=6,
            started_at=utc(7),
            stopping=True,
        )
    )
    assert {name: getattr(status.workers, name) for name in counts} == {name: getattr(pool, name) for name in counts}
    assert status.workers.failure_rate == 0.125
    shown = status.workers.units[0]
    for field in shown.DESCRIPTOR.fields:
        assert getattr(shown, field.name) == getattr(unit, field.name)
    assert (status.jobs_pending, status.jobs_running, status.start_time, status.stopping) == (5, 6, at(7), True)
    assert (status.parties[0].party, status.parties[0].connected, status.parties[0].waiting_for) == (
        "a",
        True,
        "an update",
    )
