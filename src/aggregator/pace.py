"""How far an opening is, and how long it may take: of a large model minutes, in which nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .planning import plan_of
from .round_row import RoundRow, RoundState
from .summary import tells_time

CORE_S_PER_PARAMETER: Final = 5e-4
"""Of one core at a party that opens, with a key of 3072 bits: roughly, and only said until this process has seen an
opening. (`make bench` has what a machine takes.)"""
WORTH_SAYING_S: Final = 5.0
"""What is over sooner needs no words."""
_UNPROTECTED: Final = "plaintext"


class Pace:
    """Openings as this process sees them, in memory: what is shown of them is as coarse as that.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: dict[tuple[str, int], float] = {}
        self._rate_s = 0.0

    def seen(self, row: RoundRow) -> None:
        """A round as it is now, each time that anything happened to it."""
        key = (row.job_id, row.number)
        if row.state is RoundState.OPENING:
            self._began.setdefault(key, self._clock())
            return
        began = self._began.pop(key, None)
        if began is not None and row.state is RoundState.RELEASED:
            self._rate_s = (self._clock() - began) / plan_of(row.plan).dimension

    def words(self, row: RoundRow) -> str:
        """What to say after the name of the state; "" for a round that is not opened now.

        Of fedsgd no time is told that says when training ended (`summary.tells_time`); how long an opening takes
        depends on the number of parameters, and on nobody's rows.
        """
        began = self._began.get((row.job_id, row.number))
        if began is None or row.state is not RoundState.OPENING:
            return ""
        said = [f"{min(len(row.shares), row.threshold)} of {row.threshold} shares are there"] if row.holders else []
        took, so_far = self._expected_s(row), self._clock() - began
        if tells_time(row) and so_far >= WORTH_SAYING_S:
            said.append(f"for {_time(so_far)} so far")
        if self._rate_s and took >= WORTH_SAYING_S:
            said.append(f"{_time(took)} by what the last one took")
            if tells_time(row) and took > so_far:
                said.append(f"about {_time(took - so_far)} more")
        elif row.holders and took >= WORTH_SAYING_S:
            said.append(f"which takes roughly {_time(took)} of one core at each party that opens")
        return f" ({', '.join(said)})" if said else ""

    def _expected_s(self, row: RoundRow) -> float:
        plan = plan_of(row.plan)
        if self._rate_s:
            return self._rate_s * plan.dimension
        return 0.0 if plan.scheme == _UNPROTECTED else CORE_S_PER_PARAMETER * plan.dimension


def _time(seconds: float) -> str:
    """As coarse as it is known."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
