"""No party trains, and none is charged for good, before as many as a round needs have found that they can train it: a
fault of one of them, another version of the task say, costs the others nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

import grpc
import pytest

from src.communication.generated import federation_pb2
from src.errors import NotFoundError, SottoError, StateError
from src.protocol.faults import TaskProblem
from tests.rejections.cheating import PATIENCE_S, Meeting, Round, contribute_to
from tests.rejections.scripted import House, Name, ScriptedParty


async def held_back(meeting: Meeting) -> Round:
    """a has tried the task, has what the round costs reserved, and is told nothing."""
    meeting.them.gates["quorum"] = asyncio.Event()
    round_ = meeting.them.plan()
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))
    async with asyncio.timeout(PATIENCE_S):
        while "quorum" not in meeting.them.asked_for:  # noqa: ASYNC110  it is the party that asks
            await asyncio.sleep(0.01)
    return round_


async def test_while_it_waits_nothing_is_computed_and_if_the_round_ends_nothing_was_paid(meeting: Meeting) -> None:
    round_ = await held_back(meeting)
    assert len(meeting.a.pool.tried) == 1
    assert meeting.a.pool.begun == []
    assert await meeting.a.charges() == ["reserved", "reserved"]
    await meeting.them.tell(round_.name, ended=federation_pb2.RoundEnded(state="FAILED", reason="because"))
    async with asyncio.timeout(PATIENCE_S):
        while meeting.a._node._tasks:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)
    assert await meeting.a.charges() == ["returned", "returned"]
    assert meeting.a.pool.begun == []


async def test_a_party_that_starts_again_meanwhile_waits_again(meeting: Meeting) -> None:
    round_ = await held_back(meeting)
    await meeting.restart()
    assert await meeting.a.charges() == ["reserved", "reserved"]
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))
    async with asyncio.timeout(PATIENCE_S):
        while meeting.them.asked_for != ["quorum", "quorum"]:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)
    assert meeting.a.pool.begun == []
    meeting.them.gates["quorum"].set()
    async with asyncio.timeout(PATIENCE_S):
        assert (await meeting.them.answers.get()).kind == "root"
    assert await meeting.a.charges() == ["final", "final"]


async def test_that_the_round_is_over_is_no_failure_of_the_party(meeting: Meeting) -> None:
    refused = asyncio.Event()

    async def over(_context: Any) -> None:
        refused.set()
        raise StateError("round 1 of job job is FAILED, and has no use for this")

    meeting.them.quorum = over
    round_ = meeting.them.plan()
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))
    async with asyncio.timeout(PATIENCE_S):
        await refused.wait()
        await meeting.them.tell(round_.name, ended=federation_pb2.RoundEnded(state="FAILED", reason="because"))
        while await meeting.a.charges() != ["returned", "returned"]:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)
    assert meeting.them.reports == []
    assert meeting.a.pool.begun == []


async def unknown(context: Any) -> None:
    """As an aggregator of before says it."""
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def test_an_aggregator_of_before_lets_it_begin(meeting: Meeting) -> None:
    meeting.them.quorum = unknown
    assert (await meeting.them.ask_contribute(meeting.them.plan())).kind == "root"


async def test_a_party_whose_training_had_begun_does_not_ask_again(meeting: Meeting) -> None:
    """It is charged already: all that is left to do is to train, whatever has become of the others."""
    meeting.a.pool.gates["contribute"] = asyncio.Event()
    round_ = meeting.them.plan()
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))
    async with asyncio.timeout(PATIENCE_S):
        while not meeting.a.pool.begun:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)
    await meeting.restart()
    meeting.them.gates["quorum"] = asyncio.Event()
    assert (await meeting.them.ask_contribute(round_)).kind == "root"
    assert meeting.them.asked_for == []


# --- the aggregator ---------------------------------------------------------------------------------------------------

in_module: Final = pytest.mark.asyncio(loop_scope="module")


def asks(party: ScriptedParty, name: Name) -> asyncio.Task[Any]:
    async def ask() -> bool:
        answer = await party.stub.AwaitQuorum(federation_pb2.AwaitQuorumRequest(round=name))
        return bool(answer.reached)

    return asyncio.create_task(ask())


def report(party: ScriptedParty, name: Name) -> Awaitable[object]:
    """Its task is of another version, say."""
    request = federation_pb2.ReportFailureRequest(
        round=name,
        stage="contribute",
        reason="TASK_NOT_READY",
        problem=TaskProblem.MODEL_DOES_NOT_FIT_PLAN.value,
        place="net.py:12",
    )
    return party.stub.ReportFailure(request)


@in_module
@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["without noise", "with the aggregator's own"])
async def test_all_are_answered_when_the_last_that_is_needed_has_asked(house: House, noise: float) -> None:
    async with house.job(noise_multiplier=noise) as (_, parties):
        name = (await parties["a"].wanted("contribute")).round
        waits = [asks(parties[each], name) for each in ("a", "b")]
        done, _ = await asyncio.wait(waits, timeout=0.3)
        assert not done
        async with asyncio.timeout(PATIENCE_S):
            assert await asks(parties["c"], name)
            assert [await each for each in waits] == [True, True]


@in_module
async def test_a_fault_at_one_ends_a_round_that_needs_all_before_any_other_has_begun(house: House) -> None:
    async with house.job() as (_, parties):
        name = (await parties["a"].wanted("contribute")).round
        waits = [asks(parties[each], name) for each in ("a", "c")]
        await report(parties["b"], name)
        async with asyncio.timeout(PATIENCE_S):
            ends = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(each) for each in ends] == [StateError, StateError]
        assert (await house.row(name)).at_rest


@in_module
async def test_with_a_quorum_the_others_begin_without_whom_it_concerns(house: House) -> None:
    async with house.job(quorum=2) as (_, parties):
        name = (await parties["a"].wanted("contribute")).round
        await parties["b"].wanted("contribute")  # it is there to open, all the same
        await report(parties["b"], name)
        async with asyncio.timeout(PATIENCE_S):
            waits = [asks(parties[each], name) for each in ("a", "c")]
            assert [await each for each in waits] == [True, True]


@in_module
@pytest.mark.parametrize(("who", "number"), [("d", 1), ("a", 99)], ids=["d has no part in it", "no such round"])
async def test_of_what_is_no_round_of_its_own_a_party_is_told_nothing(house: House, who: str, number: int) -> None:
    async with house.job() as (job_id, parties):
        await parties["a"].wanted("contribute")
        with pytest.raises(SottoError) as caught:
            await asks(parties[who], Name(job_id=job_id, round=number))
        assert type(caught.value) is NotFoundError
