"""Which job is started next: fair to the classes, fair to whoever waits, within the limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.jobs.scheduler import (
    STRIDES,
    WEIGHTS,
    Capacity,
    Lane,
    RunningJob,
    Waiting,
    lane_of,
    next_job,
    positions,
    queue_name,
)
from src.jobs.states import Priority

KINDS = ("federated_training", "evaluation", "export")
ROOMY = Capacity(max_trainings=10**6, max_computations=10**6, max_per_scientist=10**6)


def job(
    number: int,
    *,
    owner: str = "scientist/s",
    kind: str = "export",
    priority: Priority = Priority.NORMAL,
    at: int | None = None,
) -> Waiting:
    created_at = f"{number if at is None else at:09d}"
    return Waiting(job_id=f"{number:04x}", owner=owner, kind=kind, priority=priority, created_at=created_at)


@st.composite
def queues(draw: st.DrawFn, *, most: int = 25) -> list[Waiting]:
    shapes = st.tuples(
        st.sampled_from(["scientist/a", "scientist/b", "scientist/c"]),
        st.sampled_from(KINDS),
        st.sampled_from(Priority),
        st.integers(0, 5),
    )
    drawn = draw(st.lists(shapes, max_size=most))
    return [job(n, owner=o, kind=k, priority=p, at=at) for n, (o, k, p, at) in enumerate(drawn)]


RUNNING = st.lists(
    st.builds(RunningJob, st.sampled_from(["scientist/a", "scientist/b"]), st.sampled_from(KINDS)), max_size=6
)
CAPACITY = st.builds(
    Capacity,
    max_trainings=st.integers(1, 4),
    max_computations=st.integers(1, 4),
    max_per_scientist=st.integers(1, 3),
)
PASSES = st.dictionaries(
    st.sampled_from([queue_name(lane, priority) for lane in Lane for priority in Priority]), st.integers(0, 20)
)


def starts(waiting: Sequence[Waiting], capacity: Capacity = ROOMY) -> Iterator[Waiting]:
    """The order in which jobs are started when nothing is ever under way."""
    left, passes = list(waiting), dict[str, int]()
    while (found := next_job(left, [], passes=passes, capacity=capacity)) is not None:
        chosen, passes = found
        left.remove(chosen)
        yield chosen


def test_the_keys_of_the_passes_are_lane_and_class() -> None:
    assert queue_name(lane_of("federated_training"), Priority.HIGH) == "training/HIGH"
    assert {lane_of(kind) for kind in KINDS[1:]} == {Lane.COMPUTATION}
    assert STRIDES == {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 6}
    assert {stride * WEIGHTS[priority] for priority, stride in STRIDES.items()} == {6}


def test_while_all_classes_wait_any_ten_starts_in_a_row_are_six_three_and_one() -> None:
    waiting = [job(n, priority=priority) for n, priority in enumerate([*Priority] * 60)]
    order = [each.priority for each, _ in zip(starts(waiting), range(60), strict=False)]
    for first in range(len(order) - 10):
        assert Counter(order[first : first + 10]) == WEIGHTS
    assert order[0] is Priority.HIGH


def test_inside_a_class_whoever_came_first_goes_first() -> None:
    waiting = [job(1, at=5), job(3, at=2), job(2, at=2)]
    assert [each.job_id for each in starts(waiting)] == ["0002", "0003", "0001"]


def test_a_class_that_was_idle_does_not_make_up_for_it() -> None:
    passes = dict[str, int]()
    for number in range(100):
        found = next_job([job(number, priority=Priority.LOW)], [], passes=passes, capacity=ROOMY)
        assert found is not None
        passes = found[1]
    order = []
    left = [job(n, priority=[Priority.HIGH, Priority.LOW][n % 2]) for n in range(40)]
    while left:
        found = next_job(left, [], passes=passes, capacity=ROOMY)
        assert found is not None
        chosen, passes = found
        left.remove(chosen)
        order.append(chosen.priority)
    assert order[:15] == [Priority.HIGH] * 7 + [Priority.LOW] + [Priority.HIGH] * 6 + [Priority.LOW]


def test_a_computation_does_not_wait_behind_trainings() -> None:
    trainings = [job(n, kind="federated_training", priority=Priority.HIGH) for n in range(3)]
    running = [RunningJob("scientist/s", "federated_training")] * 2
    found = next_job([*trainings, job(9, priority=Priority.LOW)], running, passes={}, capacity=Capacity())
    assert found is not None
    assert found[0].job_id == "0009"
    assert next_job(trainings, running, passes={}, capacity=Capacity()) is None


def test_whoever_has_as_much_under_way_as_they_may_is_passed_over() -> None:
    waiting = [job(1, owner="scientist/a"), job(2, owner="scientist/b")]
    found = next_job(waiting, [RunningJob("scientist/a", "export")], passes={}, capacity=Capacity(max_per_scientist=1))
    assert found is not None
    assert found[0].owner == "scientist/b"
    trainings = [RunningJob("scientist/a", "federated_training")] * 2
    found = next_job(waiting, trainings, passes={}, capacity=Capacity())
    assert found is not None
    assert found[0].owner == "scientist/a"  # the limit is one of each lane


def test_a_job_that_is_not_ready_is_passed_over_as_if_it_were_not_there() -> None:
    waiting = [job(1, priority=Priority.HIGH), job(2), job(3)]
    ready = {"0003"}
    found = next_job(waiting, [], passes={}, capacity=Capacity(), ready=lambda each: each.job_id in ready)
    assert found == next_job(waiting[2:], [], passes={}, capacity=Capacity())
    assert next_job(waiting, [], passes={}, capacity=Capacity(), ready=lambda _each: False) is None


@settings(deadline=None, max_examples=150)
@given(queues(), RUNNING, PASSES, CAPACITY)
def test_limits_are_kept_and_nothing_waits_that_could_be_started(
    waiting: list[Waiting], running: list[RunningJob], passes: dict[str, int], capacity: Capacity
) -> None:
    def free(each: Waiting) -> bool:
        here = [other for other in running if lane_of(other.kind) is lane_of(each.kind)]
        own = sum(other.owner == each.owner for other in here)
        return len(here) < capacity.places(lane_of(each.kind)) and own < capacity.max_per_scientist

    found = next_job(waiting, running, passes=passes, capacity=capacity)
    assert (found is None) == (not any(map(free, waiting)))
    if found is None:
        return
    chosen, after = found
    assert free(chosen)
    alike = [each for each in waiting if (each.kind, each.priority) == (chosen.kind, chosen.priority) and free(each)]
    assert chosen.arrival == min(each.arrival for each in alike)
    assert all(after[queue] >= value for queue, value in passes.items())
    other = next(lane for lane in Lane if lane is not lane_of(chosen.kind))
    untouched = [queue_name(other, priority) for priority in Priority]
    assert all(after.get(queue) == passes.get(queue) for queue in untouched)


@settings(deadline=None, max_examples=100)
@given(queues(most=15), RUNNING, PASSES, CAPACITY)
def test_positions_are_what_happens_when_jobs_end_in_the_order_in_which_they_started(
    waiting: list[Waiting], running: list[RunningJob], passes: dict[str, int], capacity: Capacity
) -> None:
    expected: dict[str, int] = {}
    for lane in Lane:
        left = [each for each in waiting if lane_of(each.kind) is lane]
        under_way, now = [each for each in running if lane_of(each.kind) is lane], dict(passes)
        position = 0
        while left:
            found = next_job(left, under_way, passes=now, capacity=capacity)
            if found is None:
                under_way.pop(0)
                continue
            chosen, now = found
            left.remove(chosen)
            under_way.append(RunningJob(chosen.owner, chosen.kind))
            position += 1
            expected[chosen.job_id] = position
    assert positions(waiting, running, passes=passes, capacity=capacity) == expected


OVERTAKING = sum(-(-STRIDES[Priority.LOW] // STRIDES[other]) + 1 for other in (Priority.HIGH, Priority.NORMAL))
"""Starts of the other two classes between two of LOW: a class serves until its pass is beyond that of LOW."""


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(Priority), st.sampled_from("ab")), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from(Priority), st.sampled_from("cd")), min_size=120, max_size=120),
    PASSES,
)
def test_whatever_arrives_later_a_job_waits_for_a_bounded_number_of_starts(
    first: list[tuple[Priority, str]], later: list[tuple[Priority, str]], passes: dict[str, int]
) -> None:
    # Passes as they can be: none is ahead of another by more than its stride.
    bounded = {name: min(value, STRIDES[Priority(name.partition("/")[2])]) for name, value in passes.items()}
    left = [job(n, owner=owner, priority=priority) for n, (priority, owner) in enumerate(first)]
    watched = {each.job_id for each in left}
    capacity = Capacity(max_computations=2, max_per_scientist=2)
    under_way: list[RunningJob] = []
    for count, (priority, owner) in enumerate(later):
        left.append(job(1000 + count, owner=owner, priority=priority))
        while (found := next_job(left, under_way, passes=bounded, capacity=capacity)) is not None:
            chosen, bounded = found
            left.remove(chosen)
            watched.discard(chosen.job_id)
            under_way.append(RunningJob(chosen.owner, chosen.kind))
        under_way.pop(0)
        if count >= (len(first) + 1) * (OVERTAKING + 1):
            assert not watched
    assert not watched


@pytest.mark.parametrize("limit", ["max_trainings", "max_computations", "max_per_scientist"])
def test_a_capacity_that_would_start_nothing_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match="for ever"):
        Capacity(**{limit: 0})
