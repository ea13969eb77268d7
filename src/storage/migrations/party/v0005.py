"""Rounds say how often their training began, which earlier software cannot read; those that are open are found by an
index; and a checkpoint of the ledger is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ledger import create_ledger_checkpoint

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "party_0005"
down_revision = "party_0004"


def upgrade(op: Operations) -> None:
    """One more table and an index; no row changes."""
    op.create_index("party_rounds_ended", "party_rounds", ["ended"])
    create_ledger_checkpoint(op)
