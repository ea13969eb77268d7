"""However much a party is asked for, it keeps and does so much at a time; nothing that is wanted is lost by it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.party.desk import AT_ONCE, ENDED, WAITING, Desk

KINDS = ("contribute", "reveal", "open", ENDED)


class Room:
    """A desk whose work ends when it is let go; notes what was done, and how much there ever was."""

    def __init__(self) -> None:
        self.done: list[tuple[int, str]] = []
        self.begun: list[tuple[int, str]] = []
        self.most = Counter[str]()
        self.gate = asyncio.Event()
        self.desk: Desk[int] = Desk(self._do)

    async def _do(self, number: int, kind: str) -> None:
        self.begun.append((number, kind))
        await self.gate.wait()
        self.done.append((number, kind))

    def take(self, number: int, kind: str = "contribute") -> None:
        self.desk.take("j", number, kind, number)
        ends = sum(key[2] == ENDED for key in self.desk.tasks)
        counts = {"work": len(self.desk.tasks) - ends, "ends": ends, "waiting": len(self.desk._waiting)}
        self.most |= Counter(counts)

    async def all_done(self) -> None:
        self.gate.set()
        while self.desk.tasks:
            await asyncio.gather(*self.desk.tasks.values())


async def test_so_many_are_worked_on_so_many_wait_and_then_nothing_more_is_taken() -> None:
    room = Room()
    for number in range(AT_ONCE + WAITING):
        await room.desk.room()
        room.take(number)
    asking = asyncio.create_task(room.desk.room())
    await asyncio.sleep(0)
    assert not asking.done()
    assert (len(room.desk.tasks), len(room.desk._waiting)) == (AT_ONCE, WAITING)
    room.gate.set()
    async with asyncio.timeout(10):
        await asking
    await room.all_done()
    assert room.done == [(number, "contribute") for number in range(AT_ONCE + WAITING)]


async def test_the_same_again_is_dropped_and_the_latest_of_a_round_is_what_waits() -> None:
    room = Room()
    for number in range(AT_ONCE):
        room.take(number)
    for _ in range(1000):
        room.take(0)  # under way
        room.take(99, "contribute")
        room.take(99, "reveal")
    assert len(room.desk._waiting) == 1
    await room.all_done()
    assert room.done.count((0, "contribute")) == 1
    assert [each for each in room.done if each[0] == 99] == [(99, "reveal")]


async def test_that_a_round_has_ended_is_worked_on_however_much_else_there_is() -> None:
    room = Room()
    for number in range(AT_ONCE + WAITING - 1):
        room.take(number)
    room.take(AT_ONCE, ENDED)
    await asyncio.sleep(0)
    assert (AT_ONCE, ENDED) in room.begun
    assert ("j", AT_ONCE) not in room.desk._waiting  # what waited of that round is of no use any more


async def test_what_is_cancelled_neither_goes_on_nor_waits() -> None:
    room = Room()
    for number in range(AT_ONCE + WAITING):
        room.take(number)
    await room.desk.cancel(lambda key: key[1] in (0, AT_ONCE))
    assert ("j", 0, "contribute") not in room.desk.tasks
    await room.all_done()
    assert {number for number, _ in room.done} == set(range(AT_ONCE + WAITING)) - {0, AT_ONCE}
    for number in range(AT_ONCE + WAITING):
        room.take(number)
    await room.desk.cancel()
    assert (room.desk.tasks, room.desk._waiting) == ({}, {})


@given(st.lists(st.tuples(st.integers(0, 80), st.sampled_from(KINDS), st.booleans()), max_size=300))
def test_no_order_of_what_is_asked_gets_past_the_bounds_or_loses_the_last_word(
    asked: list[tuple[int, str, bool]],
) -> None:
    """As a node takes it: with room first. Of each round the last that was asked is done, or was under way."""

    async def play() -> None:
        room = Room()
        for number, kind, let_go in asked:
            if let_go:
                room.gate.set()
                await asyncio.sleep(0)
                room.gate.clear()
            try:
                async with asyncio.timeout(0):
                    await room.desk.room()
            except TimeoutError:
                room.gate.set()
                await room.desk.room()
                room.gate.clear()
            room.take(number, kind)
        await room.all_done()
        assert room.most["work"] <= AT_ONCE
        assert room.most["ends"] <= AT_ONCE
        assert room.most["waiting"] <= WAITING
        last = {number: kind for number, kind, _ in asked}
        assert set(last.items()) <= set(room.done)

    asyncio.run(play())


@pytest.mark.parametrize("kind", KINDS)
async def test_ten_thousand_rounds_of_an_aggregator_that_never_stops_are_not_kept(kind: str) -> None:
    room = Room()

    async def flood() -> None:
        for number in range(10_000):
            await room.desk.room()
            room.take(number, kind)

    flooding = asyncio.create_task(flood())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not flooding.done()
    assert len(room.desk.tasks) + len(room.desk._waiting) <= AT_ONCE + WAITING
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)
    await room.desk.cancel()
