"""Blobs are named by what they hold, and what two rounds need goes when neither does: whatever an aggregator sends that
has the bytes of something else, nothing that a party needs leaves its disk. And what is true of a round when it is
written is what counts, not what was true when somebody began to work on it.
"""

from __future__ import annotations

import asyncio
from hashlib import sha256

import pytest

from src.communication.generated import federation_pb2
from src.party.store import Stage
from src.protocol.roster import AGGREGATOR
from tests.rejections.cheating import Answer, Meeting, Round, contribute_to, open_of


async def ask(meeting: Meeting, round_: Round) -> None:
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))


async def answer(meeting: Meeting) -> Answer:
    async with asyncio.timeout(60):
        return await meeting.them.answers.get()


async def gone(meeting: Meeting) -> None:
    """What was let go has left the disk, or is known to be needed."""
    await meeting.a.idle()
    await meeting.a.worker.uses.settled()


def held(meeting: Meeting, *jobs: str) -> list[asyncio.Event]:
    """The workers of these jobs wait before they read their model."""
    gates = {f"contribute of {job}": asyncio.Event() for job in jobs}
    meeting.a.pool.gates |= gates
    return list(gates.values())


async def test_two_jobs_that_start_from_one_model_train_both_whichever_is_done_first(meeting: Meeting) -> None:
    them, pool = meeting.them, meeting.a.pool
    first, second = them.plan(1), them.plan_of_another_job("other")
    gates = held(meeting, "job", "other")
    for round_ in (first, second):
        await ask(meeting, round_)
    async with asyncio.timeout(60):
        while pool.begun.count("contribute") < 2:
            await meeting.a.open_rounds()
    for gate in gates:
        gate.set()
        assert (await answer(meeting)).kind == "root"
        for _ in range(9):  # whatever follows from the first one's end
            await meeting.a.open_rounds()
            await asyncio.to_thread(lambda: None)
    await gone(meeting)
    assert await meeting.a.charges() == ["final"] * 4
    assert not meeting.a.blobs.exists(sha256(them.model).hexdigest())  # nobody needs it any more


async def test_a_batch_that_comes_back_as_a_model_stays(meeting: Meeting) -> None:
    """Its round goes on: the bytes that were committed to are the bytes that are sent."""
    them = meeting.them
    round_ = await meeting.committed()
    (row,) = await meeting.a.open_rounds()
    assert row.batch is not None
    model, them.model = them.model, meeting.a.blobs.read(row.batch["sha256"])
    other = them.plan_of_another_job("other", model_sha256=row.batch["sha256"], model_bytes=len(them.model))
    assert (await them.ask_contribute(other)).kind == "root"
    await gone(meeting)
    them.model = model
    await _goes_on(meeting, round_)


async def test_a_batch_that_comes_back_as_somebody_elses_contribution_stays(meeting: Meeting) -> None:
    them = meeting.them
    round_ = await meeting.committed()
    (row,) = await meeting.a.open_rounds()
    assert row.batch is not None
    other = await meeting.committed(2)
    listed = them.freeze(other)
    revealed = await them.ask_reveal(other, listed)
    meeting.keep_upload(other, revealed.what)
    them.served["b"] = meeting.a.blobs.read(row.batch["sha256"])
    refused = await them.ask_open(other, listed, them.opening(other, listed))
    assert refused.kind == "failure"
    await gone(meeting)
    them.served.clear()
    await _goes_on(meeting, round_)
    them.served.clear()
    await meeting.opens(other, listed)


async def test_the_end_of_one_round_takes_nothing_from_another(meeting: Meeting) -> None:
    round_, other = await meeting.committed(), await meeting.committed(2)
    await meeting.them.tell(other.name, ended=federation_pb2.RoundEnded(state="FAILED"))
    async with asyncio.timeout(60):
        while len(await meeting.a.open_rounds()) > 1:
            await meeting.a.idle()
    await gone(meeting)
    kept = {path.name for path in meeting.a.blobs.root.rglob("*") if path.is_file()}
    (row,) = await meeting.a.open_rounds()
    assert row.batch is not None
    assert kept == {row.batch["sha256"]}
    await _goes_on(meeting, round_)


async def _goes_on(meeting: Meeting, round_: Round) -> None:
    """The round is revealed and opened as if nothing had happened."""
    listed = meeting.them.freeze(round_)
    revealed = await meeting.them.ask_reveal(round_, listed)
    assert revealed.kind == "upload", revealed
    meeting.keep_upload(round_, revealed.what)
    await meeting.opens(round_, listed)


@pytest.mark.parametrize("stalled", ["b", AGGREGATOR])
async def test_a_sum_without_an_update_that_was_delivered_meanwhile_is_not_opened(
    meeting: Meeting, stalled: str
) -> None:
    """Asked to open while its own update is not delivered, held up, and asked for its update: what counts is what is
    true when it opens. And the round can end: what is known of it is not what was known when it was asked."""
    them = meeting.them
    round_ = await meeting.committed()
    listed = them.freeze(round_)
    others = sorted([AGGREGATOR, "b", "c"])
    opening = them.opening(round_, listed, others)
    them.served = {name: them.blobs.read(round_.batches[name].sha256) for name in others}
    them.gates[stalled] = asyncio.Event()
    work = open_of(round_, listed, opening)
    await them.tell(round_.name, open=work)
    await them.tell(round_.name, reveal=federation_pb2.Reveal(plan=work.plan, frozen_list=work.frozen_list))
    revealed = await answer(meeting)
    assert revealed.kind == "upload"
    async with asyncio.timeout(60):
        while (await meeting.a.open_rounds())[0].stage is not Stage.DELIVERED:
            pass
    them.gates[stalled].set()
    assert await answer(meeting) == Answer("failure", ("open", "OPENING_REFUSED"))
    await meeting.a.idle()  # what is asked for while the same work ends would be passed over
    assert them.came("shares") == []
    (row,) = await meeting.a.open_rounds()
    assert (row.stage, row.aggregate_root) == (Stage.DELIVERED, "")
    meeting.keep_upload(round_, revealed.what)
    await meeting.opens(round_, listed)
    await them.tell(round_.name, ended=federation_pb2.RoundEnded(state="RELEASED"))
    async with asyncio.timeout(60):
        while await meeting.a.open_rounds():
            await meeting.a.idle()


async def test_an_update_is_not_sent_once_a_sum_without_it_is_being_opened(meeting: Meeting) -> None:
    them = meeting.them
    round_ = await meeting.committed()
    listed = them.freeze(round_)
    opening = them.opening(round_, listed, sorted([AGGREGATOR, "b", "c"]))
    assert (await them.ask_open(round_, listed, opening)).kind == "shares"
    assert await them.ask_reveal(round_, listed) == Answer("failure", ("reveal", "PLAN_REFUSED"))
    assert them.came("upload") == []


async def test_a_holder_that_has_opened_a_round_takes_no_other_part_in_it(meeting: Meeting) -> None:
    """Else it would be asked to contribute to what it has seen nothing of, after the sum."""
    them = meeting.them
    round_ = them.plan()
    them.contribute(round_, "b", "c", AGGREGATOR)
    listed = them.freeze(round_)
    assert (await them.ask_open(round_, listed, them.opening(round_, listed))).kind == "shares"
    assert await them.ask_contribute(round_) == Answer("failure", ("contribute", "PLAN_REFUSED"))
    assert await meeting.a.charges() == []
