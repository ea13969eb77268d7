"""A round as the job's history tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .round_row import RoundRow, RoundState


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


@dataclass(frozen=True, slots=True)
class Tally:
    """What the rounds of a job that are at rest brought.

    Attributes:
        bytes_up: received from parties; released: rounds; seconds: that those took together.
    """

    bytes_up: int = 0
    released: int = 0
    seconds: float = 0.0

    def after(self, row: RoundRow) -> Tally:
        """With one more round at rest."""
        done = row.state is RoundState.RELEASED
        return Tally(
            bytes_up=self.bytes_up + sum(row.bytes_up.values()),
            released=self.released + done,
            seconds=self.seconds + (row.ended_at - row.started_at if done else 0.0),
        )

    def estimate(self, rounds: int, *, since: float, now: float) -> float:
        """When the last of `rounds` will end, the first of which began at `since`; 0 before any round was released."""
        if not self.released:
            return 0.0
        return max(since + rounds * self.seconds / self.released, now)
