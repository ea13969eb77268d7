"""An aggregator that lets a call of party a hang costs it nothing: no room on its disk, and not for ever the call."""

from __future__ import annotations

import asyncio
import os

import pytest

from src.party import means
from src.protocol.signing import Signed
from tests.rejections.cheating import PATIENCE_S, Meeting, Round, contribute_to, open_of

OPENINGS = 20


def files(meeting: Meeting) -> set[str]:
    """What lies in a's store, whole or in part."""
    return {path.name for path in meeting.a.blobs.root.rglob("*") if path.is_file()}


async def asked_for(meeting: Meeting, what: str, times: int = 1) -> None:
    """Until a has asked so often for what does not come."""
    async with asyncio.timeout(PATIENCE_S):
        while meeting.them.asked_for.count(what) < times:  # noqa: ASYNC110  it is the party that asks
            await asyncio.sleep(0.01)


async def refused(meeting: Meeting, round_: Round, listed: Signed, times: int) -> None:
    """a is asked to open the round so many times, with other garbage in b's place each time."""
    them = meeting.them
    opening = them.opening(round_, listed)
    for _ in range(times):
        them.served = {"b": os.urandom(round_.batches["b"].size)}
        answer = await them.ask_open(round_, listed, opening)
        assert answer.kind == "failure", answer
    them.served = {}


def only_openings(meeting: Meeting) -> None:
    """What hangs is not waited for between two of them."""

    async def opened() -> None:
        tasks = meeting.a._node._tasks
        await asyncio.gather(*(task for key, task in tasks.items() if key[2] == "open"))

    meeting.them.settled = opened


async def comes_to(meeting: Meeting, kept: set[str]) -> None:
    async with asyncio.timeout(5):
        while files(meeting) != kept:  # noqa: ASYNC110  it is the party that removes them
            await asyncio.sleep(0.01)


async def test_while_a_download_hangs_what_refused_openings_brought_leaves_the_disk(meeting: Meeting) -> None:
    them = meeting.them
    round_, listed = await meeting.delivered()
    await meeting.a.worker.uses.settled()
    kept = files(meeting)
    them.gates["model"] = asyncio.Event()
    other = them.plan_of_another_job("other")
    await them.tell(other.name, contribute=contribute_to(other))
    await asked_for(meeting, "model")
    only_openings(meeting)
    await refused(meeting, round_, listed, OPENINGS)
    await comes_to(meeting, kept)
    them.gates["model"].set()
    async with asyncio.timeout(PATIENCE_S):
        assert (await them.answers.get()).kind == "root"


async def test_a_model_that_does_not_come_is_asked_for_again(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means, "SILENCE_S", 0.3)
    them = meeting.them
    them.gates["model"] = asyncio.Event()
    round_ = them.plan()
    await them.tell(round_.name, contribute=contribute_to(round_))
    await asked_for(meeting, "model", 3)
    them.gates["model"].set()
    async with asyncio.timeout(PATIENCE_S):
        assert (await them.answers.get()).kind == "root"


async def test_a_contribution_that_does_not_come_is_asked_for_again(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_, listed = await meeting.delivered()
    monkeypatch.setattr(means, "SILENCE_S", 0.3)
    them = meeting.them
    them.gates["b"] = asyncio.Event()
    opening = them.opening(round_, listed)
    them.served = {name: them.blobs.read(batch.sha256) for name, batch in round_.batches.items()}
    await them.tell(round_.name, open=open_of(round_, listed, opening))
    await asked_for(meeting, "b", 3)
    them.gates["b"].set()
    async with asyncio.timeout(PATIENCE_S):
        assert (await them.answers.get()).kind == "shares"
