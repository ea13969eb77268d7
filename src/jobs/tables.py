"""The tables of jobs, and how a `JobRow` lies in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from pydantic_core import from_json
from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, MetaData, Row, Table, UniqueConstraint

from ..storage.columns import text
from .states import JobError, JobRow, JobState, Priority

MAX_CAUSE_CHARACTERS: Final = 300
"""As an owner's name: who cancelled a job is a cause."""


def jobs_table(metadata: MetaData) -> Table:
    """One row a job: a `JobRow`, and the lease of whoever drives it."""
    return Table(
        "jobs",
        metadata,
        Column("job_id", text(64), primary_key=True),
        Column("request_id", text(100), nullable=False),
        Column("owner", text(300), nullable=False),
        Column("display_name", text(), nullable=False),
        Column("kind", text(32), nullable=False),
        Column("spec", text(), nullable=False),
        Column("spec_digest", text(64), nullable=False),
        Column("priority", text(8), nullable=False),
        Column("state", text(16), nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("max_attempts", Integer, nullable=False),
        Column("created_at", text(32), nullable=False),
        Column("started_at", text(32), nullable=False),
        Column("ended_at", text(32), nullable=False),
        Column("retry_at", text(32), nullable=False),
        Column("deadline_at", text(32), nullable=False),
        Column("deleted_at", text(32), nullable=False),
        Column("rounds_released", Integer, nullable=False),
        Column("rounds_failed", Integer, nullable=False),
        Column("error", text()),
        Column("result", text()),
        Column("signed_order", text(), nullable=False),
        Column("fencing_token", Integer, nullable=False),
        Column("lease_holder", text(64), nullable=False),
        Column("lease_expires_at", text(32), nullable=False),
        UniqueConstraint("owner", "request_id", name="jobs_request"),
        Index("jobs_newest", "created_at", "job_id"),
        Index("jobs_owner", "owner", "created_at", "job_id"),
        Index("jobs_state", "state", "priority", "created_at"),
    )


def events_table(metadata: MetaData) -> Table:
    """One row an event; a job's history counts 1, 2, 3, …"""
    return Table(
        "job_events",
        metadata,
        Column("job_id", text(64), ForeignKey("jobs.job_id"), primary_key=True),
        Column("sequence", Integer, primary_key=True, autoincrement=False),
        Column("time", text(32), nullable=False),
        Column("kind", text(16), nullable=False),
        Column("state", text(16), nullable=False),
        Column("message", text(), nullable=False),
        Column("cause", text(MAX_CAUSE_CHARACTERS), nullable=False),
        Column("detail", text()),
    )


def queues_table(metadata: MetaData) -> Table:
    """One row a class of waiting jobs that was ever served: its pass (`scheduler.Passes`)."""
    return Table(
        "job_queues",
        metadata,
        Column("queue", text(32), primary_key=True),
        Column("pass_value", BigInteger, nullable=False),
    )


ROW_COLUMNS: Final = tuple(field.name for field in fields(JobRow))
"""The columns that make a `JobRow`, in the order in which `from_record` expects them."""

_JSON: Final = ("spec", "error", "result")
_PRIORITIES: Final = {priority.value: priority for priority in Priority}
_STATES: Final = {state.value: state for state in JobState}


def to_columns(row: JobRow) -> dict[str, Any]:
    """The columns of a row, without its lease."""
    values = {name: getattr(row, name) for name in ROW_COLUMNS}
    values["priority"], values["state"] = row.priority.value, row.state.value
    values["error"] = row.error.to_json() if row.error else None
    return {**values, **{name: dump(values[name]) for name in _JSON}}


def from_record(record: Row[Any]) -> JobRow:
    """The row that `ROW_COLUMNS` of a record are; further columns may follow."""
    values = dict(zip(ROW_COLUMNS, record, strict=False))
    values["spec"] = load(values["spec"])
    values["priority"] = _PRIORITIES[values["priority"]]
    values["state"] = _STATES[values["state"]]
    values["error"] = JobError.from_json(error) if (error := load(values["error"])) else None
    values["result"] = load(values["result"])
    return JobRow(**values)


def dump(value: Mapping[str, Any] | None) -> str | None:
    """JSON as it is stored."""
    return None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def load(json_text: str | None) -> Any:
    """What `dump` wrote. pydantic's parser: a page of a thousand jobs is read in half the time."""
    return None if json_text is None else from_json(json_text)
