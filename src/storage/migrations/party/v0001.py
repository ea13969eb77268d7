"""The party's first tables: what version 0.1 made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Column, Integer

from ...columns import text
from ..ledger import create_ledger

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "party_0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """From an empty database."""
    op.create_table(
        "party_rounds",
        Column("job_id", text(64), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("ended", text(16), nullable=False),
        Column("content", text(), nullable=False),
    )
    create_ledger(op)
