"""Ledger lines of version 2: no table changes, but software that cannot read them must not call the ledger damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "party_0002"
down_revision = "party_0001"


def upgrade(op: Operations) -> None:
    """What is there stays as it is."""
