"""An aggregator that asks the real node of party a for more than any party does: it keeps so much, and works on."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest

from src import logs
from src.communication.generated import federation_pb2
from src.party.desk import AT_ONCE, WAITING
from tests.rejections.cheating import PATIENCE_S, Meeting, contribute_to

FLOOD = 300


def asked(number: int, kind: str, meeting: Meeting) -> federation_pb2.Assignment:
    name = federation_pb2.RoundName(job_id="flood", round=number)
    if kind == "ended":
        return federation_pb2.Assignment(round=name, ended=federation_pb2.RoundEnded(state="FAILED", reason="x" * 100))
    return federation_pb2.Assignment(round=name, contribute=contribute_to(meeting.them.plan()))


@pytest.mark.parametrize("kind", ["contribute", "ended"])
async def test_what_is_asked_and_not_done_yet_stays_bounded(
    meeting: Meeting, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work hangs, as on a model that never comes; once it ends, everything that was asked is done."""
    let_go, done = asyncio.Event(), []

    async def hang(*_: Any) -> None:
        await let_go.wait()
        done.append(kind)

    node = meeting.a._node
    monkeypatch.setattr(node._worker, "contribute", hang)
    monkeypatch.setattr(node._worker, "ended", hang)
    for number in range(1, FLOOD + 1):
        meeting.them._work.put_nowait(asked(number, kind, meeting))
    most = 0
    async with asyncio.timeout(PATIENCE_S):
        while len(node._desk._waiting) < WAITING:  # noqa: ASYNC110  it fills from another process's stream
            await asyncio.sleep(0.01)
    for _ in range(50):
        await asyncio.sleep(0.01)
        most = max(most, len(node._tasks) + len(node._desk._waiting))
    assert most <= AT_ONCE + WAITING
    let_go.set()
    async with asyncio.timeout(PATIENCE_S):
        while len(done) < FLOOD:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    monkeypatch.undo()
    await meeting.committed()  # an honest round works on


async def test_work_of_a_kind_that_nobody_knows_is_passed_over(meeting: Meeting) -> None:
    meeting.them._work.put_nowait(federation_pb2.Assignment(round=federation_pb2.RoundName(job_id="j", round=1)))
    await meeting.committed()


async def test_refusals_that_an_aggregator_provokes_do_not_fill_a_partys_log(meeting: Meeting, quiet: None) -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    for number in range(1, FLOOD + 1):
        meeting.them._work.put_nowait(asked(number, "contribute", meeting))
    for _ in range(FLOOD):
        answer = await asyncio.wait_for(meeting.them.answers.get(), PATIENCE_S)
        assert answer.kind == "failure"
    lines = stream.getvalue().splitlines()
    assert len(lines) < FLOOD
    assert any("the aggregator causes too many lines" in line for line in lines)
