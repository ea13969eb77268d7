"""Jobs keep the order that their scientist signed; ledger lines of version 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Column

from ...columns import text

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0005"
down_revision = "aggregator_0004"


def upgrade(op: Operations) -> None:
    """Nobody signed for the jobs that are there."""
    op.add_column("jobs", Column("signed_order", text(), nullable=False, server_default=""))
    with op.batch_alter_table("jobs") as batch:  # the default was for them; SQLite drops it by making the table anew
        batch.alter_column("signed_order", existing_type=text(), nullable=False, server_default=None)
