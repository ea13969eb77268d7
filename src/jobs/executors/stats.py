"""What a pool tells of itself: names of units, how many, how long; nothing of their content."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

DURATIONS: Final = 200
"""Of the latest units of one name: enough for a 95th percentile that ten units stand behind."""
OUTCOMES: Final = 100
"""Latest units that the failure rate is of."""


class Outcome(Enum):
    """How a unit ended."""

    DONE = "done"
    """With a result."""
    REFUSED = "refused"
    """The handler said no (a `SottoError` other than `WorkerError`): an answer, the worker did its work."""
    FAILED = "failed"
    """The handler failed for a reason of its own, its worker died, or it took too long or too much."""
    CANCELLED = "cancelled"
    """The caller no longer wanted it, or the pool was closed."""


@dataclass(frozen=True, slots=True)
class UnitStats:
    """Units of one name: how they ended so far, and how long the latest `DURATIONS` that were done computed, in s (the
    wait for a worker not counted; percentiles by nearest rank; 0 where none was done)."""

    name: str
    done: int
    refused: int
    failed: int
    cancelled: int
    mean_s: float
    p50_s: float
    p95_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The state of a pool.

    Attributes:
        size: workers now, `busy` and `idle` ones; those that are being forked are not among them.
        min_size, max_size: as in `PoolSettings`.
        busy: workers that compute.
        idle: workers that have nothing to do.
        waiting: units that wait for a worker.
        started: workers so far.
        replaced: of these, died, gave no answer, or were killed over a unit that took too long or too much, or that was
            cancelled.
        recycled: of these, replaced after their share of units.
        grown: workers added because units waited.
        shrunk: workers ended because nothing came.
        tasks_done, tasks_refused, tasks_failed, tasks_cancelled: units so far, by how they ended (see `Outcome`).
        failure_rate: share of failed ones among the latest `OUTCOMES` that were not cancelled, 0 to 1.
        units: by name, in alphabetical order.
    """

    size: int
    min_size: int
    max_size: int
    busy: int
    idle: int
    waiting: int
    started: int
    replaced: int
    recycled: int
    grown: int
    shrunk: int
    tasks_done: int
    tasks_refused: int
    tasks_failed: int
    tasks_cancelled: int
    failure_rate: float
    units: tuple[UnitStats, ...]

    def line(self) -> str:
        """For the log."""
        means = ", ".join(f"{unit.name} {unit.mean_s:.3g} s" for unit in self.units if unit.done)
        return (
            f"{self.size} workers ({self.min_size} to {self.max_size}): {self.busy} busy, {self.waiting} units "
            f"waiting; units: {self.tasks_done} done, {self.tasks_refused} refused, {self.tasks_failed} failed, "
            f"{self.tasks_cancelled} cancelled; workers: {self.started} started, {self.replaced} replaced, "
            f"{self.recycled} recycled, {self.grown} grown, {self.shrunk} shrunk; mean durations: {means or 'none'}"
        )


@dataclass(slots=True)
class _Unit:
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=DURATIONS))


class Tally:
    """Counts units."""

    def __init__(self) -> None:
        self._units: dict[str, _Unit] = {}
        self._recent: deque[bool] = deque(maxlen=OUTCOMES)
        self.total: Counter[Outcome] = Counter()

    def record(self, name: str, outcome: Outcome, duration_s: float = 0.0) -> None:
        """One unit has ended; `duration_s` counts for one that was done."""
        unit = self._units.setdefault(name, _Unit())
        unit.outcomes[outcome] += 1
        self.total[outcome] += 1
        if outcome is Outcome.DONE:
            unit.durations_s.append(duration_s)
        if outcome is not Outcome.CANCELLED:
            self._recent.append(outcome is Outcome.FAILED)

    @property
    def failure_rate(self) -> float:
        """See `PoolStats`."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def units(self) -> tuple[UnitStats, ...]:
        """See `PoolStats`."""
        return tuple(_unit_stats(name, unit) for name, unit in sorted(self._units.items()))


def _unit_stats(name: str, unit: _Unit) -> UnitStats:
    ordered = sorted(unit.durations_s) or [0.0]
    return UnitStats(
        name=name,
        done=unit.outcomes[Outcome.DONE],
        refused=unit.outcomes[Outcome.REFUSED],
        failed=unit.outcomes[Outcome.FAILED],
        cancelled=unit.outcomes[Outcome.CANCELLED],
        mean_s=sum(ordered) / len(ordered),
        p50_s=_percentile(ordered, 50),
        p95_s=_percentile(ordered, 95),
        longest_s=ordered[-1],
    )


def _percentile(ordered: list[float], percent: int) -> float:
    """The smallest value that at least so many percent do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
