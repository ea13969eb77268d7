"""A party that is not ready for a task is not invited, not waited for and not charged; where that leaves too few, no
round begins, and whoever submits is told who."""

from __future__ import annotations

from typing import Any, cast

import pytest

from src.aggregator import pipeline as pipeline_module
from src.aggregator.federation import Federation
from src.aggregator.pipeline import BUILT_IN_S, SOON_S, AggregatorPipeline
from src.aggregator.round_row import Failure, PartyFailed, RootCommitted, RoundState, Work
from src.aggregator.rounds import waiting_for, wanted
from src.communication.generated import common_pb2
from src.communication.messages import standing_to_proto, standings_from_proto
from src.config import AggregatorConfig
from src.errors import DeadlineError, InvalidInput, StateError, TaskError
from src.jobs.states import JobState
from src.protocol.faults import TaskProblem, TaskStanding

from .played import Place

READY = TaskStanding("a" * 64, True)
NOT_READY = TaskStanding("a" * 64, False, TaskProblem.DATA_NOT_READY)
CHECKING = TaskStanding("a" * 64, False, TaskProblem.CHECKING)

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


async def test_a_round_goes_on_without_whoever_is_not_ready(place: Place) -> None:
    """And the next one with it, once it is: nothing is started again."""
    readiness = place.federation.readiness
    readiness.tell("a", {"t": READY})
    readiness.tell("c", {"t": NOT_READY})
    job_id = await place.submit(place.training(parties=("a", "b", "c"), quorum=2, spare_rounds=1))
    await place.turn()
    row = await place.round(job_id)
    assert row.state is RoundState.TRAINING
    assert [wanted(row, name) for name in ("a", "b", "c")] == [Work.CONTRIBUTE, Work.CONTRIBUTE, None]
    assert waiting_for(row) == ("a", "b")
    assert row.failures["c"].message == "not ready: its data is not ready"
    (entry, *_) = await place.database.run(place.ledger.entries)
    assert entry.parties == ("a", "b")
    readiness.tell("c", {"t": READY})
    await place.refuse(job_id, TaskError, "a", "b")
    assert waiting_for(await place.round(job_id, 2)) == ("a", "b", "c")


async def test_whoever_was_left_out_of_a_round_puts_nothing_into_it(place: Place) -> None:
    """It knows the plan from another party, say. Nothing was reserved for it: its update would cost it nothing."""
    place.federation.readiness.tell("c", {"t": NOT_READY})
    job_id = await place.submit(place.training(parties=("a", "b", "c"), quorum=2))
    await place.turn()
    for stage in (None, Work.CONTRIBUTE, Work.OPEN):
        if stage is not None:  # it says that something else is wrong, and that nothing is any more
            failed = PartyFailed("c", Failure(stage.value, "WORKER_FAILED", "no"))
            await place.coordinator.trainings.happened(job_id, 1, failed)
        with pytest.raises(StateError, match="party c is not ready, and takes no part in this round"):
            await place.coordinator.trainings.happened(job_id, 1, RootCommitted("c", {"root": "c"}))
    assert (await place.round(job_id)).committed == ()


async def test_a_task_that_a_party_does_not_list_is_one_that_it_is_not_ready_for(place: Place) -> None:
    place.federation.readiness.tell("b", {"other": READY})
    with pytest.raises(TaskError, match=r"b is not ready \(the task is not among its datasets\)"):
        place.federation.readiness.check(place.training(), place.federation.roster)


@pytest.mark.parametrize("standing", [READY, CHECKING, None])
async def test_whoever_is_ready_or_may_be_is_invited(place: Place, standing: TaskStanding | None) -> None:
    place.federation.readiness.tell("b", {} if standing is None else {"t": standing, "other": NOT_READY})
    job_id = await place.submit(place.training())
    await place.turn()
    assert waiting_for(await place.round(job_id)) == ("a", "b")


async def test_no_round_begins_while_too_few_are_ready_and_the_job_says_for_whom_it_waits(place: Place) -> None:
    place.federation.readiness.tell("b", {"t": NOT_READY})
    job_id = await place.submit(place.training())
    await place.turn(after_s=100)
    assert await place.state(job_id) is JobState.PENDING
    activity = place.coordinator.progress(job_id)
    assert activity is not None
    assert activity.stage == "waiting for parties to be ready for t: b is not ready (its data is not ready)"
    assert await place.charged(job_id) == []
    place.federation.readiness.tell("b", {"t": READY})
    await place.turn()
    assert waiting_for(await place.round(job_id)) == ("a", "b")


async def test_a_job_under_way_waits_with_its_next_round(place: Place) -> None:
    """Its spare rounds are not used up by a party whose file is gone for a while."""
    job_id = await place.submit(place.training(spare_rounds=1))
    await place.turn()
    place.federation.readiness.tell("b", {"t": NOT_READY})
    await place.refuse(job_id, TaskError, "b")
    await place.turn(after_s=50)
    assert (await place.job(job_id)).rounds_failed == 1
    assert await place.state(job_id) is JobState.RUNNING
    place.federation.readiness.tell("b", {"t": READY})
    await place.turn()
    assert waiting_for(await place.round(job_id, 2)) == ("a", "b")


def test_whoever_submits_hears_who_is_not_ready_and_why(federation: Federation) -> None:
    from src.jobs.spec import FederatedTrainingSpec

    spec = FederatedTrainingSpec(task="t")
    federation.readiness.tell("b", {"t": TaskStanding("", False, TaskProblem.TASK_IMPORT_FAILED, "ward.py:3")})
    with pytest.raises(TaskError) as raised:
        federation.readiness.check(spec, federation.roster)
    assert raised.value.message == (
        "a round of task t needs updates of 3 of 3 parties, and b is not ready (the task's package cannot be imported "
        "(ward.py:3))"
    )
    federation.readiness.check(FederatedTrainingSpec(task="t", quorum=2), federation.roster)
    federation.readiness.check(FederatedTrainingSpec(task="t", parties=("a", "c")), federation.roster)


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("../t", {}),
        ("t" * 65, {}),
        ("t", {"digest": "x"}),
        ("t", {"problem": "row 7 is 31337"}),
        ("t", {"problem": "A" * 50}),
        ("t", {"place": "/home/ann/triage.py:17"}),
        ("t", {"place": "row 7"}),
    ],
    ids=str,
)
def test_a_party_says_no_other_text_of_its_tasks_than_a_class_and_a_place(
    federation: Federation, task: str, changes: dict[str, str]
) -> None:
    fine: dict[str, Any] = {"digest": "a" * 64, "problem": "ROWS_MIXED", "place": "triage.py:17"}
    assert standings_from_proto({"t": common_pb2.TaskReadiness(**fine)})["t"].place == "triage.py:17"
    with pytest.raises(InvalidInput):
        standings_from_proto({task: common_pb2.TaskReadiness(**{**fine, **changes})})


@pytest.mark.parametrize("standing", [READY, NOT_READY, CHECKING])
def test_what_is_told_arrives(federation: Federation, standing: TaskStanding) -> None:
    assert standings_from_proto({"t": standing_to_proto(standing)}) == {"t": standing}


async def test_a_task_whose_import_hangs_holds_up_no_other_and_one_that_is_slow_is_known_in_the_end(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the aggregator, as it starts; those come first whose models it measures."""
    lasts = {"a hangs": BUILT_IN_S + 1, "b slow": SOON_S + 1, "c": 1.0, "d evaluated": 1.0}
    tries: list[str] = []
    own = federation.readiness.own

    class Pool:
        async def run(self, _: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
            task = params["task"]
            tries.append(task)
            if lasts[task] > timeout_s:
                raise DeadlineError("too long")
            return {"dimension": 3}

    monkeypatch.setattr(pipeline_module, "known_tasks", lambda: sorted(lasts))
    config = AggregatorConfig.model_construct(evaluation={"d evaluated": {}})
    await AggregatorPipeline(cast(Any, Pool()), federation, config, cast(Any, None)).warm()
    assert tries == ["d evaluated", "a hangs", "b slow", "c", "a hangs", "b slow"]
    assert {task: each.problem for task, each in own.items()} == {
        **dict.fromkeys(("b slow", "c", "d evaluated"), ""),
        "a hangs": TaskProblem.MODEL_NOT_BUILT,
    }
