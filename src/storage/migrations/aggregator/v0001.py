"""The aggregator's first tables: what version 0.1 made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Boolean, Column, ForeignKey, Integer, LargeBinary, UniqueConstraint

from ...columns import text
from ..ledger import create_ledger

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """From an empty database."""
    op.create_table(
        "jobs",
        Column("job_id", text(64), primary_key=True),
        Column("request_id", text(100), nullable=False),
        Column("owner", text(300), nullable=False),
        Column("display_name", text(), nullable=False),
        Column("spec", text(), nullable=False),
        Column("spec_digest", text(64), nullable=False),
        Column("state", text(16), nullable=False),
        Column("created_at", text(32), nullable=False),
        Column("started_at", text(32), nullable=False),
        Column("ended_at", text(32), nullable=False),
        Column("rounds_released", Integer, nullable=False),
        Column("rounds_failed", Integer, nullable=False),
        Column("error", text()),
        Column("result", text()),
        UniqueConstraint("owner", "request_id", name="jobs_request"),
    )
    op.create_index("jobs_newest", "jobs", ["created_at", "job_id"])
    op.create_index("jobs_state", "jobs", ["state", "created_at"])
    op.create_table(
        "job_events",
        Column("job_id", text(64), ForeignKey("jobs.job_id"), primary_key=True),
        Column("sequence", Integer, primary_key=True, autoincrement=False),
        Column("time", text(32), nullable=False),
        Column("kind", text(16), nullable=False),
        Column("state", text(16), nullable=False),
        Column("message", text(), nullable=False),
        Column("detail", text()),
    )
    op.create_table(
        "rounds",
        Column("job_id", text(64), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("state", text(16), nullable=False),
        Column("settled", Boolean, nullable=False),
        Column("content", text(), nullable=False),
    )
    create_ledger(op)
    op.create_table(
        "enrolment",
        Column("name", text(64), primary_key=True),
        Column("verify_key", LargeBinary(32), nullable=False),
    )
