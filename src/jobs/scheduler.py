"""Which job is started next.

Trainings and computations (evaluations, exports) wait in lanes of their own, so that what takes seconds never waits for
what takes hours. In a lane, the classes HIGH, NORMAL and LOW share the starts 6 : 3 : 1 by stride scheduling
(Waldspurger and Weihl, Stride Scheduling: Deterministic Proportional-Share Resource Management, MIT/LCS/TM-528, 1995):
every class has a pass, the class with the lowest is served, and its pass grows by its stride, which is the larger the
lighter the class weighs. Inside a class whoever came first goes first, but for scientists who have as much under way as
they may.

A class from which nothing can be started does not save up: its pass is raised to that of the class that is served.
Hence no pass is ever further ahead of the others than its own stride, and nobody starves.

Pure functions: what waits, what is under way and the passes come from the store.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .states import Priority


class Lane(StrEnum):
    """What shares a limit and a queue."""

    COMPUTATION = "computation"
    TRAINING = "training"


WEIGHTS: Final[Mapping[Priority, int]] = {Priority.HIGH: 6, Priority.NORMAL: 3, Priority.LOW: 1}
"""Starts of each class out of ten, while all classes wait. Ties are broken in this order."""

STRIDES: Final[Mapping[Priority, int]] = {priority: 6 // weight for priority, weight in WEIGHTS.items()}
"""6 is the least common multiple of the weights: strides are whole numbers."""

Passes = Mapping[str, int]
"""`queue_name(lane, priority)` → pass; one that is missing is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A PENDING job. `created_at` is UTC, ISO 8601, as in `JobRow`."""

    job_id: str
    owner: str
    kind: str
    priority: Priority
    created_at: str

    @property
    def arrival(self) -> tuple[str, str]:
        """Sorts by who came first."""
        return self.created_at, self.job_id


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that takes a place: RUNNING, RETRYING or CANCELLING."""

    owner: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How many jobs may be under way at once: in each lane, and of one scientist in a lane. All ≥ 1."""

    max_trainings: int = 2
    max_computations: int = 3
    max_per_scientist: int = 2

    def __post_init__(self) -> None:
        if min(self.max_trainings, self.max_computations, self.max_per_scientist) < 1:
            raise ValueError("a capacity below 1 would keep jobs waiting for ever")

    def places(self, lane: Lane) -> int:
        """Of a lane."""
        return self.max_trainings if lane is Lane.TRAINING else self.max_computations


def lane_of(kind: str) -> Lane:
    """Of a kind of job."""
    return Lane.TRAINING if kind == "federated_training" else Lane.COMPUTATION


def queue_name(lane: Lane, priority: Priority) -> str:
    """The key of a class in `Passes`, e.g. "training/HIGH"."""
    return f"{lane.value}/{priority.value}"


_QUEUES: Final = {lane: {priority: queue_name(lane, priority) for priority in WEIGHTS} for lane in Lane}


def next_job(
    waiting: Iterable[Waiting],
    running: Iterable[RunningJob],
    *,
    passes: Passes,
    capacity: Capacity,
    ready: Callable[[Waiting], bool] = lambda _job: True,
) -> tuple[Waiting, dict[str, int]] | None:
    """The job to start now, and all passes after it has been started; None when nothing can be.

    Args:
        waiting: in any order.
        running: what takes a place already.
        passes: as they are.
        capacity: not exceeded; where it is (the configuration changed), nothing is started.
        ready: a job of which it is false is passed over, as if it were not there.
    """
    in_order, under_way = sorted(waiting, key=lambda job: job.arrival), list(running)
    for lane in Lane:
        taken = Counter(job.owner for job in under_way if lane_of(job.kind) is lane)
        if taken.total() >= capacity.places(lane):
            continue
        first: dict[Priority, Waiting] = {}
        for job in in_order:
            if job.priority in first or lane_of(job.kind) is not lane:
                continue
            if taken[job.owner] < capacity.max_per_scientist and ready(job):
                first[job.priority] = job
        if first:
            chosen, changed = _serve(lane, first, passes)
            return first[chosen], {**passes, **changed}
    return None


def positions(
    waiting: Iterable[Waiting], running: Sequence[RunningJob], *, passes: Passes, capacity: Capacity
) -> dict[str, int]:
    """job_id → 1, 2, 3, … in the order in which the waiting jobs of its lane will be started.

    That is what `next_job` will do if nothing is submitted or cancelled meanwhile, everything is ready, and jobs end in
    the order in which they were started.

    Args:
        waiting: in any order.
        running: oldest first.
        passes: as they are.
        capacity: as for `next_job`.
    """
    order: dict[str, int] = {}
    jobs = sorted(waiting, key=lambda job: job.arrival)
    for lane in Lane:
        here = [job for job in jobs if lane_of(job.kind) is lane]
        if not here:
            continue
        classes = {priority: _Class(job for job in here if job.priority is priority) for priority in WEIGHTS}
        under_way = deque(job.owner for job in running if lane_of(job.kind) is lane)
        taken, now = Counter(under_way), dict(passes)
        for position in range(1, len(here) + 1):
            first: dict[Priority, Waiting] = {}
            while not first:
                if len(under_way) < capacity.places(lane):
                    full = {owner for owner, count in taken.items() if count >= capacity.max_per_scientist}
                    heads = {priority: each.first(full) for priority, each in classes.items()}
                    first = {priority: head for priority, head in heads.items() if head is not None}
                if not first:
                    taken -= Counter((under_way.popleft(),))  # somebody's job ends; an owner with none is forgotten
            chosen, changed = _serve(lane, first, now)
            now.update(changed)
            job = classes[chosen].take(first[chosen].owner)
            under_way.append(job.owner)
            taken[job.owner] += 1
            order[job.job_id] = position
    return order


def _serve(lane: Lane, first: Mapping[Priority, Waiting], passes: Passes) -> tuple[Priority, dict[str, int]]:
    """The class to be served, of those from which a job can be started, and the lane's passes after that."""
    names = _QUEUES[lane]
    now = {priority: passes.get(name, 0) for priority, name in names.items()}
    chosen = min((priority for priority in WEIGHTS if priority in first), key=lambda priority: now[priority])
    after = {priority: now[priority] if priority in first else max(now[priority], now[chosen]) for priority in WEIGHTS}
    after[chosen] += STRIDES[chosen]
    return chosen, {names[priority]: value for priority, value in after.items()}


class _Class:
    """The waiting jobs of one class: for each owner a queue, and a heap of these queues by who is first in each."""

    def __init__(self, in_order: Iterable[Waiting]) -> None:
        self._queues: dict[str, deque[Waiting]] = {}
        for job in in_order:
            self._queues.setdefault(job.owner, deque()).append(job)
        self._heads = [(queue[0].arrival, owner) for owner, queue in self._queues.items()]
        heapq.heapify(self._heads)

    def first(self, full: set[str]) -> Waiting | None:
        """The job that came first of those whose owner is not `full`. These are few: each has jobs under way."""
        aside = []
        while self._heads and self._heads[0][1] in full:
            aside.append(heapq.heappop(self._heads))
        found = self._queues[self._heads[0][1]][0] if self._heads else None
        for head in aside:
            heapq.heappush(self._heads, head)
        return found

    def take(self, owner: str) -> Waiting:
        """Removes and returns the job of an owner that came first."""
        queue = self._queues[owner]
        job = queue.popleft()
        if self._heads[0][1] == owner:
            heapq.heappop(self._heads)
        else:
            self._heads.remove((job.arrival, owner))
            heapq.heapify(self._heads)
        if queue:
            heapq.heappush(self._heads, (queue[0].arrival, owner))
        return job
