"""Who names a blob is found without reading what all rounds of a job name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0007"
down_revision = "aggregator_0006"


def upgrade(op: Operations) -> None:
    """An index."""
    op.create_index("round_blobs_sha256", "round_blobs", ["sha256"])
