"""Which models of released rounds are kept, and what was made of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Boolean, Column, Integer, String
from sqlalchemy import text as sql

from ...columns import text

if TYPE_CHECKING:
    from alembic.operations import Operations

revision = "aggregator_0008"
down_revision = "aggregator_0007"

_GONE = ("CANCELLED", "FAILED")
"""Of jobs in these states no model of a round was kept."""


def upgrade(op: Operations) -> None:
    """One more table, filled from the rounds that were released: of each job the last one's model is there."""
    made = op.create_table(
        "released_models",
        Column("job_id", String(64), primary_key=True),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("place", Integer, nullable=False),
        Column("sha256", String(64), nullable=False),
        Column("size", BigInteger, nullable=False),
        Column("kept", Boolean, nullable=False),
        Column("metrics", text(), nullable=False),
        Column("result", text()),
        Column("file_sha256", String(64), nullable=False),
        Column("file_size", BigInteger, nullable=False),
        Column("manifest_sha256", String(64), nullable=False),
        Column("manifest_size", BigInteger, nullable=False),
        Column("as_of", String(64), nullable=False),
    )
    states = {row.job_id: row.state for row in op.get_bind().execute(sql("SELECT job_id, state FROM jobs"))}
    query = "SELECT job_id, number, content FROM rounds WHERE state = 'RELEASED' ORDER BY job_id, number"
    by_job: dict[str, list[dict[str, Any]]] = {}
    for row in op.get_bind().execute(sql(query)):
        result = json.loads(row.content)["result"] or {}
        if "model_sha256" in result:
            by_job.setdefault(row.job_id, []).append(_released(row, result, len(by_job.get(row.job_id, ())) + 1))
    for job_id, rows in by_job.items():
        rows[-1]["kept"] = states.get(job_id, "FAILED") not in _GONE
    if by_job:
        op.bulk_insert(made, [row for rows in by_job.values() for row in rows])


def _released(row: Any, result: dict[str, Any], place: int) -> dict[str, Any]:
    return {
        "job_id": row.job_id,
        "number": row.number,
        "place": place,
        "sha256": result["model_sha256"],
        "size": result["model_bytes"],
        "kept": False,
        "metrics": json.dumps(result.get("metrics") or {}),
        "result": None,
        "file_sha256": "",
        "file_size": 0,
        "manifest_sha256": "",
        "manifest_size": 0,
        "as_of": "",
    }
