"""A checkpoint of the ledger is kept, and which blobs each round names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Integer, String
from sqlalchemy import text as sql

from ..ledger import create_ledger_checkpoint

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0006"
down_revision = "aggregator_0005"


def upgrade(op: Operations) -> None:
    """Two more tables, one of them filled from what rounds say."""
    create_ledger_checkpoint(op)
    made = op.create_table(
        "round_blobs",
        Column("job_id", String(64), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("sha256", String(64), primary_key=True),
    )
    rows = op.get_bind().execute(sql("SELECT job_id, number, settled, content FROM rounds")).all()
    named = [
        {"job_id": row.job_id, "number": row.number, "sha256": sha256}
        for row in rows
        for sha256 in sorted(_named(json.loads(row.content), settled=bool(row.settled)))
    ]
    if named:
        op.bulk_insert(made, named)


def _named(content: dict[str, Any], *, settled: bool) -> set[str]:
    """What a round names, as the content of this revision has it."""
    models = {content["model_sha256"], *map(str, (content["result"] or {}).get("blobs", ()))}
    batches = [*content["batches"].values(), *([content["aggregate"]] if content["aggregate"] else [])]
    sent = {*(batch["sha256"] for batch in batches), *content["shares"].values()}
    return models if settled else models | sent
