"""Queues, retries, leases and deletion of jobs; why an event happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, Integer

from ...columns import text

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0002"
down_revision = "aggregator_0001"


def upgrade(op: Operations) -> None:
    """Jobs that are there become federated trainings of normal priority; those that were started, a first attempt."""
    added = (
        Column("kind", text(32), nullable=False, server_default="federated_training"),
        Column("priority", text(8), nullable=False, server_default="NORMAL"),
        Column("attempt", Integer, nullable=False, server_default="1"),
        Column("max_attempts", Integer, nullable=False, server_default="4"),
        Column("retry_at", text(32), nullable=False, server_default=""),
        Column("deadline_at", text(32), nullable=False, server_default=""),
        Column("deleted_at", text(32), nullable=False, server_default=""),
        Column("fencing_token", Integer, nullable=False, server_default="0"),
        Column("lease_holder", text(64), nullable=False, server_default=""),
        Column("lease_expires_at", text(32), nullable=False, server_default=""),
    )
    for column in added:
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET attempt = 0 WHERE state = 'PENDING'")
    cause = Column("cause", text(300), nullable=False, server_default="")
    op.add_column("job_events", cause)
    # The defaults were for the rows that were there; SQLite drops them by making the tables anew.
    for table, columns in {"jobs": added, "job_events": (cause,)}.items():
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.alter_column(column.name, existing_type=column.type, nullable=False, server_default=None)
    op.drop_index("jobs_state", "jobs")
    op.create_index("jobs_state", "jobs", ["state", "priority", "created_at"])
    op.create_index("jobs_owner", "jobs", ["owner", "created_at", "job_id"])
    op.create_table(
        "job_queues",
        Column("queue", text(32), primary_key=True),
        Column("pass_value", BigInteger, nullable=False),
    )
