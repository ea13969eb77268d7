"""Ledger lines of version 1 are pinned, a digest is refused a second time, and the heads of other roles' ledgers are
remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..heads import create_ledger_heads
from ..ledger import pin_version_1, refuse_a_digest_twice

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "party_0003"
down_revision = "party_0002"


def upgrade(op: Operations) -> None:
    """One more table; no line changes."""
    pin_version_1(op)
    refuse_a_digest_twice(op)
    create_ledger_heads(op)
