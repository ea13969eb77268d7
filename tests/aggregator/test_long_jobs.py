"""What a round takes does not grow with the rounds of its job, and what it says of them is what they all say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy import text as sql

from src.aggregator.federation import Federation
from src.aggregator.round_row import RoundRow, SpentRounds
from src.aggregator.steps import costs_of
from src.config_sections import AggregatorPrivacy
from src.errors import StorageError
from src.jobs.states import JobState
from src.privacy.accounting import epsilon
from src.protocol.canonical import number_or_inf
from tests.aggregator.played import ANN, Place

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)

EARLY, LATE = 3, 14


@pytest.fixture
async def place(federation: Federation, tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(federation, tmp_path)
    budget = place.config.privacy.budget.model_copy(update={"max_rounds": 1000})
    privacy = AggregatorPrivacy.model_construct(**{**dict(place.config.privacy), "budget": budget})
    place.config = place.config.model_copy(update={"privacy": privacy})
    place.coordinator = place.another()
    await place.database.open()
    yield place
    await place.coordinator.stop()
    await place.database.close()


class Work:
    """What the database did: rounds that were read, and steps of its virtual machine, the same on every machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds = self.steps = 0
        read = RoundRow.from_json

        def counted(content: Any) -> RoundRow:
            self.rounds += 1
            return read(content)

        monkeypatch.setattr(RoundRow, "from_json", counted)

    def _step(self) -> int:
        self.steps += 1
        return 0

    def watch(self, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(self._step, 1)

    async def of(self, place: Place, job_id: str, number: int) -> tuple[int, int]:
        """Of one round, from its plan to the plan of the next."""
        await place.database.run(self.watch)
        before = self.rounds, self.steps
        await place.contribute(job_id, number)
        await place.leftovers.settled()
        return self.rounds - before[0], self.steps - before[1]


async def test_what_a_round_reads_does_not_grow_with_the_rounds_before_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await place.submit(place.training(rounds=LATE + 1))
    await place.turn()
    work, taken = Work(monkeypatch), {}
    for number in range(1, LATE + 1):
        taken[number] = await work.of(place, job_id, number)
    assert taken[LATE][0] <= taken[EARLY][0]
    assert taken[LATE][1] <= 1.1 * taken[EARLY][1]


async def _stored(place: Place, job_id: str) -> list[RoundRow]:
    return await place.database.run(lambda c: place.rounds.of_job(c, job_id))


async def _said(place: Place, rows: list[RoundRow]) -> list[Any]:
    """What each released round says, and what all rounds so far that were spent say together."""
    found = []
    for row in rows:
        if row.result is None:
            continue
        spent = [costs_of(each.costs) for each in rows if each.number <= row.number and each.spent]
        expected = [
            number_or_inf(epsilon(events, delta=row.result["party_delta"])) for events in zip(*spent, strict=True)
        ]
        assert [row.result[name] for name in ("epsilon_party", "epsilon_party_against_aggregator")] == expected
        found.append(expected)
    return found


@pytest.mark.parametrize("old", [False, True], ids=["kept", "of a version that kept nothing"])
async def test_what_a_release_says_is_spent_is_what_all_rounds_before_it_spent(place: Place, old: bool) -> None:
    """To the last bit. A round whose shares were asked for counts though it failed; one given back does not."""
    job_id = await place.submit(place.training(rounds=4, spare_rounds=2))
    await place.turn()
    await place.contribute(job_id, 1)
    place.work.failures["open_aggregate"] = [StorageError("the disk is full")]
    await place.contribute(job_id, 2)
    if old:
        await place.database.run(_forget)
    place.work.failures["fold"] = [StorageError("the disk is full")]
    await place.contribute(job_id, 3)
    await place.turn(60.0)  # after two that failed the next one waits
    for number in (4, 5, 6):
        await place.contribute(job_id, number)
    assert await place.state(job_id) is JobState.SUCCEEDED
    rows = await _stored(place, job_id)
    assert [row.spent for row in rows] == [True, True, False, True, True, True]
    assert len(await _said(place, rows)) == 4
    before = [sum(each.rounds for each in row.spent_before or ()) for row in rows]
    assert before[-3:] == [2, 3, 4]
    assert rows[-1].spent_before == (SpentRounds(rows[-1].costs, 4),)


def _forget(connection: Connection) -> None:
    """Rounds as they were written before they kept what came before them."""
    for job_id, number, content in connection.execute(sql("SELECT job_id, number, content FROM rounds")).all():
        known = json.loads(content)
        del known["spent_before"]
        named = {"job_id": job_id, "number": number, "content": json.dumps(known)}
        connection.execute(
            sql("UPDATE rounds SET content = :content WHERE job_id = :job_id AND number = :number"), named
        )


async def test_whether_a_few_blobs_are_needed_is_what_is_said_of_all(place: Place) -> None:
    """Of jobs under way, at rest and deleted."""
    done = await place.submit(place.training(rounds=2))
    await place.turn()
    for number in (1, 2):
        await place.contribute(done, number)
    under_way = await place.submit(place.training(rounds=3), owner=ANN)
    await place.turn()
    await place.contribute(under_way, 1)
    await place.commit(under_way, 2)
    names = place.leftovers._names
    everything = {blob for each in (done, under_way) for row in await _stored(place, each) for blob in _named(row)}
    needed = await place.database.run(names.blobs)
    assert needed & everything not in (set(), everything)
    for blob in sorted(everything | needed):
        among = await place.database.run(lambda c, blob=blob: names.blobs(c, among={blob}))  # type: ignore[misc]
        assert (blob in among) == (blob in needed)


def _named(row: RoundRow) -> set[str]:
    models = {row.model_sha256, *(row.result or {}).get("blobs", ())}
    return models | {batch.sha256 for batch in row.batches.values()} | set(row.shares.values())
