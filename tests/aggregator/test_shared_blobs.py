"""Whatever a party sends that has the bytes of something else, the end of its round takes nothing from anybody; and
what nobody needs any more goes, also where it was wrong. A round is written as it is, not as it was read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from src.aggregator.round_row import Batch, BatchStored, Failure, PartyFailed, RoundState, Settled, ShareStored, Work
from src.aggregator.rounds import advance
from src.errors import StateError
from src.jobs.states import Event, EventKind, JobState, succeeded_event
from tests.aggregator.played import Place

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)
"""Where the aggregator holds the key nobody sends a share."""

Bytes = Callable[[Place], Awaitable[str]]


async def a_job_that_waits(place: Place) -> str:
    """The model that came with it, before its first round."""
    spec = place.training()
    await place.submit(spec.model_copy(update={"parties": ("a", "b", "c")}))  # c never joined: it does not start
    return spec.initial_model_sha256


async def a_round_that_runs(place: Place) -> str:
    """What a party delivered in it."""
    job_id = await place.submit(place.training())
    await place.turn()
    await place.commit(job_id)
    await place.turn()
    sha256 = place.blobs.write(b"a's update in another round").sha256
    await place.coordinator.trainings.happened(job_id, 1, BatchStored("a", Batch("00", sha256, 1), 1))
    return sha256


async def a_job_that_is_done(place: Place) -> str:
    """A file of its result."""
    job_id = await place.submit()
    sha256 = place.blobs.write(b"a file of a result").sha256
    result = {"files": [{"name": "model.npz", "bytes": 1, "sha256": sha256}], "metrics": {}}
    for event in (Event(kind=EventKind.STARTED), succeeded_event(result, "done")):
        await place.database.run(lambda c, event=event: place.store.apply(c, job_id, event, now=place.clock()))  # type: ignore[misc]
    return sha256


@pytest.mark.parametrize("needed_by", [a_job_that_waits, a_round_that_runs, a_job_that_is_done])
@pytest.mark.parametrize("sent", ["a share", "an update"])
async def test_the_end_of_a_round_takes_nothing_that_somebody_else_needs(
    place: Place, needed_by: Bytes, sent: str
) -> None:
    sha256 = await needed_by(place)
    job_id = await place.submit(place.training())
    await place.turn()
    await place.commit(job_id)
    await place.turn()
    happened = place.coordinator.trainings.happened
    for party in ("a", "b"):
        copied = sent == "an update" and party == "b"
        batch = Batch("00", sha256 if copied else place.blobs.write(f"update of {party}".encode()).sha256, 1)
        await happened(job_id, 1, BatchStored(party, batch, 1))
    await place.turn()
    if sent == "a share":
        await happened(job_id, 1, ShareStored("b", sha256))
    own = (await place.round(job_id)).batches["a"].sha256
    await place.cancel(job_id)
    await place.turn()
    assert await place.state(job_id) is JobState.CANCELLED
    await place.leftovers.settled()
    assert place.blobs.exists(sha256)
    assert not place.blobs.exists(own)


async def test_a_share_that_is_wrong_goes_at_once(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    await place.commit(job_id)
    await place.turn()
    happened = place.coordinator.trainings.happened
    for party in ("a", "b"):
        await happened(job_id, 1, BatchStored(party, Batch("00", "0" * 64, 1), 1))
    await place.turn()
    wrong = place.blobs.write(b"a share that does not hold").sha256
    await happened(job_id, 1, ShareStored("a", wrong))
    await happened(job_id, 1, PartyFailed("a", Failure(Work.OPEN.value, "SHARE_INVALID", "no")))
    await place.leftovers.settled()
    assert not place.blobs.exists(wrong)


async def test_a_round_that_was_read_before_something_happened_to_it_is_not_written_over_it(place: Place) -> None:
    job_id = await place.submit(place.training())
    await place.turn()
    before = await place.round(job_id)
    await place.commit(job_id)
    after = await place.round(job_id)
    with pytest.raises(StateError, match="does not go on"):
        await place.database.run(lambda c: place.rounds.update(c, replace(before, reason="late")))
    assert await place.round(job_id) == after


async def test_a_round_is_settled_as_it_is_and_not_as_it_was_read(place: Place) -> None:
    """Settled by a turn that read it before its budget was spent, what was spent would be given back."""
    job_id = await place.submit(place.training())
    await place.turn()
    await place.commit(job_id)
    await place.turn()
    happened = place.coordinator.trainings.happened
    for party in ("a", "b"):
        await happened(job_id, 1, BatchStored(party, Batch("00", "0" * 64, 1), 1))
    read = replace(await place.round(job_id), state=RoundState.FAILED, spent=False)
    await place.turn()
    assert (await place.round(job_id)).spent
    await happened(job_id, 1, PartyFailed("a", Failure(Work.OPEN.value, "SHARE_INVALID", "no")))
    await happened(job_id, 1, PartyFailed("b", Failure(Work.OPEN.value, "SHARE_INVALID", "no")))
    await place.coordinator.trainings._settle(read)
    assert await place.charged(job_id) == ["final"]
    row = await place.round(job_id)
    assert (row.state, row.spent, row.settled) == (RoundState.FAILED, True, True)
    assert advance(row, Settled(), 0.0) == row
