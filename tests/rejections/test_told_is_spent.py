"""What a party's time tells is paid for: a charge is final before data is touched, and so before a root, or the silence
where one could be, is seen. The aggregator can end a round, break the connection, or ask again: no timing is free.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import MetaData

from src.communication.generated import federation_pb2
from src.party.rounds import MOST_TRAININGS, NO_CONTRIBUTION
from src.party.store import PartyRound, RoundMemory, Stage
from src.privacy.entries import Limit
from src.storage.books import RETURNS_OF_A_JOB_A_DAY
from src.storage.database import read_only
from tests.rejections.cheating import Answer, Meeting, Round, contribute_to

SPENT = ["final", "final"]
"""Of the rows, and of the party."""


async def end(meeting: Meeting, round_: Round, state: str = "FAILED") -> None:
    """The aggregator says that the round has ended; until a knows of no open one."""
    await meeting.them.tell(round_.name, ended=federation_pb2.RoundEnded(state=state, reason="because"))
    await until(meeting.a.open_rounds, lambda rows: not rows)


async def until(look: Callable[[], Awaitable[Any]], right: Callable[[Any], bool]) -> Any:
    """What `look`, which asks a's database, finds in the end."""
    async with asyncio.timeout(60):
        while not right(found := await look()):
            pass
    return found


async def training(meeting: Meeting, number: int = 1, *, times: int = 1) -> Round:
    """A round in which a's worker computes, and goes on until its gate is open."""
    pool = meeting.a.pool
    pool.gates.setdefault("contribute", asyncio.Event())
    round_ = meeting.them.plan(number)
    await ask(meeting, round_)
    await begun(meeting, times)
    return round_


async def ask(meeting: Meeting, round_: Round) -> None:
    await meeting.them.tell(round_.name, contribute=contribute_to(round_))


async def begun(meeting: Meeting, times: int) -> None:
    async def count() -> int:
        await meeting.a.open_rounds()
        return meeting.a.pool.begun.count("contribute")

    await until(count, lambda found: found >= times)


async def joined(meeting: Meeting, times: int) -> None:
    async def count() -> int:
        await meeting.a.open_rounds()
        return len(meeting.them.joined)

    await until(count, lambda found: found >= times)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
async def test_a_root_that_was_told_is_paid_for_however_the_round_ends(
    meeting: Meeting, state: str, restarted: bool
) -> None:
    round_ = await meeting.committed()
    if restarted:
        await meeting.restart()
    await end(meeting, round_, state)
    assert await meeting.a.charges() == SPENT
    # That it was told is all that can be seen of it: after a reset it does not count.
    released = [entry for entry in await meeting.a.entries() if entry.kind == "release"]
    assert [set(dict(entry.figures)) for entry in released] == [{"plan", "root"}] * 2


async def test_the_charge_is_final_before_the_root_is_on_its_way(meeting: Meeting) -> None:
    """As the aggregator's own clock would have it: when the request arrives, a's database already says so."""
    seen: list[list[str]] = []

    def look(_name: object, _digest: str) -> None:
        with closing(sqlite3.connect(meeting.a.config.state_dir / "party.sqlite")) as database:
            lines = database.execute("SELECT line FROM ledger WHERE line LIKE '%\"round\":1,%'").fetchall()
        seen.append([kind for kind in ("reservation", "final", "returned") for (line,) in lines if f'"{kind}"' in line])

    meeting.them._told = look  # type: ignore[assignment,method-assign]  # called before a root is answered
    await meeting.committed()
    assert seen == [["reservation"] * 2 + ["final"] * 2]


async def test_a_round_that_ends_while_a_trains_is_paid_for_as_silence_tells_the_time_too(meeting: Meeting) -> None:
    """No root has come by a moment that the aggregator chose: so the work takes longer than that."""
    round_ = await training(meeting)
    assert await meeting.a.charges() == SPENT
    await end(meeting, round_)
    assert await meeting.a.charges() == SPENT
    assert meeting.them.received == []


async def test_what_no_training_began_for_is_given_back(meeting: Meeting) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))  # what it does, it does in order
    await end(meeting, await meeting.committed())  # of this job, which is tried but once
    meeting.them.gates["model"] = asyncio.Event()
    round_ = meeting.them.plan(2)
    await ask(meeting, round_)
    await until(meeting.a.charges, lambda found: found == [*SPENT, "reserved", "reserved"])
    await until(meeting.a.charges, lambda _: "model" in meeting.them.asked_for)
    await end(meeting, round_)
    assert await meeting.a.charges() == [*SPENT, "returned", "returned"]
    assert meeting.a.pool.begun == ["contribute"]


async def test_a_broken_connection_does_not_have_a_round_timed_again(meeting: Meeting) -> None:
    """The training goes on without one, and is what is answered with: it is begun once, and charged once."""
    round_ = await training(meeting)
    for times in (2, 3, 4):
        await meeting.them.drop()
        await joined(meeting, times)
        await ask(meeting, round_)
    meeting.a.pool.gates["contribute"].set()
    async with asyncio.timeout(60):
        answer = await meeting.them.answers.get()
    assert answer.kind == "root"
    assert meeting.a.pool.begun.count("contribute") == 1
    assert await meeting.a.charges() == SPENT


async def test_a_round_that_a_is_stopped_in_again_and_again_is_trained_for_only_so_often(meeting: Meeting) -> None:
    """After a stop it trains again, under the same charge, as nothing of the first try was told; but not for ever."""
    for _ in range(MOST_TRAININGS):
        round_ = await training(meeting)
        await meeting.restart()
    assert await meeting.them.ask_contribute(round_) == Answer("failure", ("contribute", "WORKER_FAILED"))
    assert meeting.a.pool.begun == []
    assert meeting.them.told == [NO_CONTRIBUTION]
    assert await meeting.a.charges() == SPENT


async def test_a_process_that_dies_between_the_charge_and_the_root_tells_the_same_root_for_the_same_charge(
    meeting: Meeting,
) -> None:
    round_ = await training(meeting)
    meeting.a.pool.gates["contribute"].set()
    async with asyncio.timeout(60):
        first = await meeting.them.answers.get()
    before = await meeting.a.entries()
    await meeting.restart()
    again = await meeting.them.ask_contribute(round_)
    assert again == first
    assert meeting.a.pool.begun == []
    assert await meeting.a.entries() == before


@pytest.mark.parametrize("then", ["it is asked again", "the round ends"])
async def test_a_root_that_an_earlier_version_stored_is_paid_for_before_it_is_told_again(
    meeting: Meeting, then: str
) -> None:
    """Its row says COMMITTED, and its charge is not final."""
    round_ = await meeting.committed()
    (row,) = await meeting.a.open_rounds()
    await meeting.a.stop()
    await meeting.them.gone.wait()
    with closing(sqlite3.connect(meeting.a.config.state_dir / "party.sqlite")) as database, database:
        for trigger in ("no_update", "no_delete"):
            database.execute(f"DROP TRIGGER ledger_{trigger}")
        database.execute('DELETE FROM ledger WHERE line LIKE \'%"kind":"final"%\'')
    meeting.them.party_ledger = []  # what it was told is gone with them
    await meeting.a.start()
    assert await meeting.a.charges() == ["reserved", "reserved"]
    if then == "the round ends":
        await end(meeting, round_)
    else:
        assert (await meeting.them.ask_contribute(round_)).kind == "root"
        (after,) = await meeting.a.open_rounds()
        assert (row.stage, after) == (Stage.COMMITTED, row)
    assert await meeting.a.charges() == SPENT


async def test_a_round_whose_budget_was_reset_is_not_sent_again(meeting: Meeting) -> None:
    """It counts in the period that is over; what was not seen by then would be free."""
    round_, listed = await meeting.delivered()
    await meeting.a.stop()
    await meeting.them.gone.wait()
    await meeting.a.start()
    limit = Limit(max_rounds=50, epsilon=None, delta=1e-5)
    books = meeting.a.worker._accounts._books

    def reset(connection: Any) -> None:
        books.correct(
            connection,
            ("example", "dataset:scripted"),
            action="reset",
            limit=limit,
            at="2026-01-01T00:00:00Z",
            reason="a new study",
        )

    await meeting.a._database.run(reset)
    assert await meeting.them.ask_reveal(round_, listed) == Answer("failure", ("reveal", "PLAN_REFUSED"))
    assert len(meeting.them.came("upload")) == 1


async def test_what_an_upload_shows_is_entered_before_its_first_byte(meeting: Meeting) -> None:
    round_ = await meeting.committed()
    kinds: list[list[str]] = []
    told = meeting.them._told

    def look(name: federation_pb2.RoundName, digest: str) -> None:
        with read_only(meeting.a.config.state_dir / "party.sqlite") as connection:
            row = RoundMemory(MetaData()).find(connection, name.job_id, name.round)
            lines = connection.exec_driver_sql("SELECT line FROM ledger").scalars().all()
        assert isinstance(row, PartyRound)
        kinds.append([row.stage.value, str(sum('"kind":"release"' in line for line in lines))])
        told(name, digest)

    meeting.them._told = look  # type: ignore[method-assign]
    await meeting.them.ask_reveal(round_, meeting.them.freeze(round_))
    assert kinds == [["REVEALED", "2"]]


async def test_rounds_whose_model_never_comes_are_given_back_only_so_often_in_a_day(meeting: Meeting) -> None:
    """Each leaves rows for ever, in the ledger and among the rounds: beyond, they are paid for."""
    await meeting.committed()
    meeting.them.model = b"another"
    for number in range(2, RETURNS_OF_A_JOB_A_DAY + 3):
        round_ = meeting.them.plan(number, model_sha256="0" * 64)
        assert await meeting.them.ask_contribute(round_) == Answer("failure", ("contribute", "DIGEST_MISMATCH"))
    assert await meeting.a.charges() == [*SPENT, *["returned"] * 2 * RETURNS_OF_A_JOB_A_DAY, *SPENT]
