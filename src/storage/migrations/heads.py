"""The table `ledger_heads` of `storage.heads`, in both histories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Column, Integer, String

from ..columns import text

if TYPE_CHECKING:
    from alembic.operations import Operations


def create_ledger_heads(op: Operations) -> None:
    """What each other role told of its ledger; empty until it tells."""
    op.create_table(
        "ledger_heads",
        Column("name", text(64), primary_key=True),
        Column("job_id", text(64), primary_key=True),
        Column("round", Integer, nullable=False),
        Column("digest", String(64), nullable=False),
        Column("told", Integer, nullable=False),
    )
