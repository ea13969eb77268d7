"""The table that both histories begin with, and what a later revision of either adds to it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from sqlalchemy import Column, Integer
from sqlalchemy import text as sql

from ...privacy.entries import GENESIS
from ..columns import text
from ..ledger import TRIGGERS

if TYPE_CHECKING:
    from alembic.operations import Operations

_END_OF_VERSION_1: Final = '"version":1}'
"""Of a line: its names are sorted. Whether it is sound, the first reading says."""


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


def pin_version_1(op: Operations) -> None:
    """The lines of version 1, which are not signed, are from here on those that are there now."""
    made = op.create_table(
        "ledger_version_1",
        Column("entries", Integer, primary_key=True, autoincrement=False),
        Column("head", text(), nullable=False),
    )
    rows = op.get_bind().execute(sql("SELECT digest, line FROM ledger ORDER BY sequence")).all()
    old = list(itertools.takewhile(lambda row: row.line.endswith(_END_OF_VERSION_1), rows))
    op.bulk_insert(made, [{"entries": len(old), "head": old[-1].digest if old else GENESIS}])


def refuse_a_digest_twice(op: Operations) -> None:
    """SQLite's INSERT OR REPLACE took the row of a digest away without a word to the trigger on deletions. (PostgreSQL
    has no such statement: what it has instead, ON CONFLICT and MERGE, are updates and deletions to its triggers.)"""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER IF EXISTS ledger_in_order")
        op.execute(next(each for each in TRIGGERS["sqlite"] if "ledger_in_order" in each))


def create_ledger_checkpoint(op: Operations) -> None:
    """The table `ledger_checkpoint` of `storage.checkpoints`; empty until a role has verified its ledger."""
    op.create_table(
        "ledger_checkpoint",
        Column("entries", Integer, primary_key=True, autoincrement=False),
        Column("digest", text(), nullable=False),
        Column("signature", text(), nullable=False),
    )
