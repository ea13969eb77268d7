"""The table that both histories begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Column, Integer

from ..columns import text
from ..ledger import TRIGGERS

if TYPE_CHECKING:
    from alembic.operations import Operations


def create_ledger(op: Operations) -> None:
    """The append-only table of `storage.ledger`, as the first revisions make it."""
    op.create_table(
        "ledger",
        Column("sequence", Integer, primary_key=True, autoincrement=False),
        Column("digest", text(), nullable=False, unique=True),
        Column("line", text(), nullable=False),
    )
    for statement in TRIGGERS[op.get_bind().dialect.name]:
        op.execute(statement)
