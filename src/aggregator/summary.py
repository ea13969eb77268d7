"""A round as the job's history tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from .planning import plan_of
from .round_row import RoundRow, RoundState


def round_summary(row: RoundRow) -> dict[str, Any]:
    """What `jobs.states.round_event` documents, from a round at rest.

    How long it took is left out under fedsgd: a larger sample takes longer, and which rows are in it is secret.
    """
    result = row.result or {}
    took = {"seconds": round(row.ended_at - row.started_at, 3)} if tells_time(row) else {}
    return {
        "round": row.number,
        "state": row.state.value,
        "contributions": len([name for name in row.contributors if name in row.cohort]) if result else 0,
        "metrics": row.metrics,
        **({"not_evaluated": row.not_evaluated} if row.not_evaluated else {}),
        "epsilon_party": result.get("epsilon_party", 0.0),
        "epsilon_party_against_aggregator": result.get("epsilon_party_against_aggregator", 0.0),
        **{name: result[name] for name in _OF_RESULT if name in result},
        "parties": [
            {"party": name, "bytes_up": row.bytes_up.get(name, 0), **_disclosed(row, name)} for name in row.cohort
        ],
        **took,
        "reason": row.reason,
    }


_OF_RESULT: Final = ("epsilon_party_if_all_others_collude", "party_assumption", "party_delta")
_OF_PARTY: Final = ("example_epsilon_spent", "example_epsilon_left", "example_epsilon_left_delta")


def _disclosed(row: RoundRow, name: str) -> dict[str, float | None]:
    given = row.budgets.get(name, ())
    return {field: given[place] if place < len(given) else None for place, field in enumerate(_OF_PARTY)}


def tells_time(row: RoundRow) -> bool:
    """Whether how long the round took may be told."""
    return plan_of(row.plan).gradient_sum is None


FIRST_PAUSE_S: Final = 5.0
LONGEST_PAUSE_S: Final = 60.0
"""Between rounds that fail one after the other: a full disk, a database or a machine that is started again."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What the rounds of a job that are at rest brought.

    Attributes:
        bytes_up: received from parties; released: rounds; seconds: that those took together; 0 if they do not tell.
        failures: rounds that failed since the last one that was released.
    """

    bytes_up: int = 0
    released: int = 0
    seconds: float = 0.0
    failures: int = 0

    @property
    def pause_s(self) -> float:
        """How long the next round waits: after the first failure not at all, then longer each time. What was only for a
        moment would else use up all spare rounds before it is over."""
        return min(FIRST_PAUSE_S * 2.0 ** (self.failures - 2), LONGEST_PAUSE_S) if self.failures > 1 else 0.0

    def after(self, row: RoundRow) -> Tally:
        """With one more round at rest."""
        done = row.state is RoundState.RELEASED
        return Tally(
            bytes_up=self.bytes_up + sum(row.bytes_up.values()),
            released=self.released + done,
            seconds=self.seconds + (row.ended_at - row.started_at if done and tells_time(row) else 0.0),
            failures=0 if done else self.failures + 1,
        )

    def estimate(self, rounds: int, *, since: float, now: float) -> float:
        """When the last of `rounds` will end, the first of which began at `since`; 0 before any round was released, and
        where rounds do not tell how long they took."""
        if not self.seconds:
            return 0.0
        return max(since + rounds * self.seconds / self.released, now)
