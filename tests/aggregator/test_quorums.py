"""Who waits for a quorum is answered once enough parties can train the round, and not before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from src.aggregator.quorums import Quorums
from src.aggregator.round_row import Failure, RoundRow, RoundState, Work
from src.protocol.roster import AGGREGATOR

AT_ONCE_S = 0.0
PATIENCE_S = 20.0
FAILED = Failure(Work.CONTRIBUTE.value, "TASK_NOT_READY", "no")


def everybody() -> frozenset[str]:
    return frozenset({"a", "b", "c", "d"})


def a_round(**changes: Any) -> RoundRow:
    row = RoundRow(
        job_id="job",
        number=1,
        state=RoundState.TRAINING,
        plan={},
        plan_digest="",
        model_sha256="a" * 64,
        cohort=("a", "b", "c", "d"),
        quorum=3,
        holders=("a", "b", "c", "d"),
        threshold=2,
        noise_needed=False,
        started_at=900.0,
        timeout_s=600.0,
    )
    return replace(row, **changes)


async def asking(quorums: Quorums, row: RoundRow, *names: str) -> list[asyncio.Task[bool]]:
    """Calls of parties that are open."""
    waits = [asyncio.create_task(quorums.wait(row, name, at_most_s=PATIENCE_S)) for name in names]
    await asyncio.sleep(0)
    return waits


async def test_as_many_as_the_round_needs_begin_and_whoever_comes_later_too() -> None:
    quorums, row = Quorums(everybody), a_round()
    waits = await asking(quorums, row, "a", "b", "b")  # who asks twice is one all the same
    assert not any(each.done() for each in waits)
    assert await quorums.wait(row, "c", at_most_s=AT_ONCE_S)
    assert [await each for each in waits] == [True, True, True]
    assert await quorums.wait(row, "d", at_most_s=AT_ONCE_S)


async def test_who_waits_is_known_until_enough_do() -> None:
    quorums, row = Quorums(everybody), a_round()
    assert quorums.waiting("job", 1) == frozenset()
    waits = await asking(quorums, row, "a", "b")
    assert (quorums.waiting("job", 1), quorums.waiting("job", 2)) == (frozenset("ab"), frozenset())
    waits += await asking(quorums, row, "c")
    assert quorums.waiting("job", 1) == frozenset()
    await asyncio.gather(*waits)


async def test_who_has_gone_since_is_none_of_them() -> None:
    quorums, row = Quorums(everybody), a_round()
    gone, _, twice = await asking(quorums, row, "a", "b", "b")
    for each in (gone, twice):
        each.cancel()
    await asyncio.gather(gone, twice, return_exceptions=True)
    assert not await quorums.wait(row, "c", at_most_s=AT_ONCE_S)
    waits = await asking(quorums, row, "c")
    assert await quorums.wait(row, "a", at_most_s=AT_ONCE_S)  # comes back: b asks still, by its other call
    assert await waits[0]


async def test_the_aggregators_own_noise_is_no_party() -> None:
    """Its root is there before any party is asked, where it draws noise, as it does by default."""
    quorums, row = Quorums(everybody), a_round(noise_needed=True, roots={AGGREGATOR: {}})
    await asking(quorums, row, "a")
    assert not await quorums.wait(row, "b", at_most_s=AT_ONCE_S)


@pytest.mark.parametrize("late", [False, True], ids=["when it asks", "while the others wait"])
async def test_who_has_failed_is_none_of_them(late: bool) -> None:
    quorums, failed = Quorums(everybody), a_round(failures={"a": FAILED})
    await asking(quorums, a_round() if late else failed, "a")
    quorums.changed(failed)
    waits = await asking(quorums, failed, "b", "c")
    assert not any(each.done() for each in waits)
    assert await quorums.wait(failed, "d", at_most_s=AT_ONCE_S)


async def test_who_committed_to_an_update_could_train_it_although_this_process_never_heard_so() -> None:
    quorums = Quorums(everybody)
    assert await quorums.wait(a_round(roots={"a": {}, "b": {}}), "c", at_most_s=AT_ONCE_S)
    waits = asyncio.create_task(Quorums.wait(other := Quorums(everybody), a_round(), "c", at_most_s=PATIENCE_S))
    await asyncio.sleep(0)
    other.changed(a_round(roots={"a": {}}))
    assert not waits.done()
    other.changed(a_round(roots={"a": {}, "b": {}}))
    assert await waits


async def test_nobody_trains_before_as_many_are_there_as_have_to_open() -> None:
    """Else all would pay for a sum that nobody can open."""
    there = {"a", "b"}
    quorums, row = Quorums(lambda: frozenset(there)), a_round(quorum=2, holders=("a", "b", "c"), threshold=3)
    (waits,) = await asking(quorums, row, "a")
    assert not await quorums.wait(row, "b", at_most_s=AT_ONCE_S)
    quorums.changed(row)
    assert not waits.done()
    there.add("c")  # which trains nothing
    quorums.changed(row)
    assert await waits


async def test_who_asks_is_there_to_open() -> None:
    quorums, row = Quorums(frozenset), a_round(quorum=2, holders=("a", "b"), threshold=2)
    await asking(quorums, row, "a")
    assert await quorums.wait(row, "b", at_most_s=AT_ONCE_S)


async def test_of_a_round_that_has_begun_everybody_hears_so_although_this_process_never_did() -> None:
    """After a restart, say: those who train already need not ask again."""
    assert await Quorums(frozenset).wait(a_round(able_at=950.0), "c", at_most_s=AT_ONCE_S)


async def test_what_one_round_has_another_has_not() -> None:
    quorums = Quorums(everybody)
    await asking(quorums, a_round(), "a", "b")
    assert not await quorums.wait(a_round(number=2), "c", at_most_s=AT_ONCE_S)
    assert not await quorums.wait(a_round(job_id="other"), "c", at_most_s=AT_ONCE_S)
    assert await quorums.wait(a_round(), "c", at_most_s=AT_ONCE_S)


async def test_a_round_that_is_over_is_forgotten() -> None:
    quorums = Quorums(everybody)
    await asyncio.gather(*await asking(quorums, a_round(), "a", "b", "c"))
    quorums.changed(a_round(state=RoundState.FAILED))
    assert quorums._rounds == {}


async def test_who_was_told_no_counts_until_it_has_had_time_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many parties, each of which asks, is told no and asks again, all would never ask at the same moment."""
    quorums, row = Quorums(everybody), a_round()
    for name in ("a", "b"):
        assert not await quorums.wait(row, name, at_most_s=AT_ONCE_S)
    assert await quorums.wait(row, "c", at_most_s=AT_ONCE_S)
    monkeypatch.setattr("src.aggregator.quorums.AGAIN_S", 0.0)
    late, other = Quorums(everybody), a_round(number=2)
    for name in ("a", "b"):
        assert not await late.wait(other, name, at_most_s=AT_ONCE_S)
        await asyncio.sleep(0)  # what is due is done before what comes then
        await asyncio.sleep(0)
    assert not await late.wait(other, "c", at_most_s=AT_ONCE_S)
