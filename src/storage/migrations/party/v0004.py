"""The orders that rounds rest on, and the rounds of each; ledger lines of version 3, which name a scientist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, Integer, String, UniqueConstraint

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "party_0004"
down_revision = "party_0003"


def upgrade(op: Operations) -> None:
    """Two more tables; no line changes."""
    op.create_table(
        "orders",
        Column("digest", String(64), primary_key=True),
        Column("scientist", String(64), nullable=False),
        Column("request_id", String(100), nullable=False),
        Column("job_id", String(64), nullable=False, unique=True),
        Column("most_rounds", BigInteger, nullable=False),
        Column("expires_at", String(20), nullable=False),
        UniqueConstraint("scientist", "request_id", name="orders_request"),
    )
    op.create_table(
        "order_rounds",
        Column("digest", String(64), primary_key=True),
        Column("number", Integer, primary_key=True),
    )
