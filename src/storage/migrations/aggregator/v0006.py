"""A checkpoint of the ledger is kept, and which blobs each round names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ledger import create_ledger_checkpoint

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0006"
down_revision = "aggregator_0005"


def upgrade(op: Operations) -> None:
    """One more table."""
    create_ledger_checkpoint(op)
