"""A round as the job's history tells it."""

from __future__ import annotations

from typing import Any

from .round_row import RoundRow


def round_summary(row: RoundRow) -> dict[str, Any]:
    """What `jobs.states.round_event` documents, from a round at rest."""
    result = row.result or {}
    return {
        "round": row.number,
        "state": row.state.value,
        "contributions": len([name for name in row.contributors if name in row.cohort]) if result else 0,
        "metrics": result.get("metrics", {}),
        "epsilon_party": result.get("epsilon_party", 0.0),
        "epsilon_party_against_aggregator": result.get("epsilon_party_against_aggregator", 0.0),
        "parties": [
            {
                "party": name,
                "bytes_up": row.bytes_up.get(name, 0),
                "example_epsilon_spent": row.budgets.get(name, (None, None))[0],
                "example_epsilon_left": row.budgets.get(name, (None, None))[1],
            }
            for name in row.cohort
        ],
        "seconds": round(row.ended_at - row.started_at, 3),
        "reason": row.reason,
    }
