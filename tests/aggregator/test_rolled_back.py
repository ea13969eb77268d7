"""The aggregator's database, put back to an old copy: found by the head that a transcript took to the parties."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection

from src.aggregator.artifact import MANIFEST_FILE, file_of
from src.aggregator.federation import Federation
from src.aggregator.round_row import RoundState
from src.errors import LedgerError
from src.privacy.ledger import Limit
from src.storage.books import Books
from src.storage.heads import Head
from tests.aggregator.played import Place, digest


async def test_an_aggregator_that_was_put_back_to_before_a_release_is_found_by_any_party_that_saw_it(
    federation: Federation, tmp_path: Path
) -> None:
    place = Place(federation, tmp_path)
    await place.database.open()
    with (
        closing(sqlite3.connect(tmp_path / "aggregator.sqlite")) as now,
        closing(sqlite3.connect(tmp_path / "copy")) as to,
    ):
        now.backup(to)
    job_id = await place.submit(place.training())
    await place.turn()
    await place.contribute(job_id)
    row = await place.round(job_id)
    assert (row.state, row.result is not None) == (RoundState.RELEASED, True)
    transcript = json.loads((row.result or {})["transcript"]["statement"])
    told = {party: digest(f"ledger of {party}") for party in row.cohort}
    assert transcript["party_ledger_heads"] == told
    manifest = file_of(await place.job(job_id), MANIFEST_FILE)
    assert json.loads(place.blobs.read(manifest["sha256"]))["readable"]["party_ledger_heads"] == told
    seen = Head(transcript["ledger_head"], job_id, 1)
    assert await place.coordinator.meet("a", [seen]) == ()
    await place.coordinator.stop()
    await place.database.close()
    for left in tmp_path.glob("aggregator.sqlite-*"):  # noqa: ASYNC240  nothing else runs in this loop
        left.unlink()
    (tmp_path / "copy").replace(tmp_path / "aggregator.sqlite")

    back = Place(federation, tmp_path)
    await back.database.open()
    with pytest.raises(LedgerError, match=f"this aggregator's ledger lacks the entry {seen.digest}.*round 1 of job"):
        await back.coordinator.meet("a", [seen])
    assert await back.coordinator.meet("b", []) == ()

    def answer(connection: Connection) -> None:
        books = Books(back.ledger, back.coordinator._accounts._books.limits)
        limit = Limit(max_rounds=5, epsilon=None, delta=1e-5)
        reason = f"the newest copy is lost: {seen.digest}"
        books.correct(
            connection,
            ("party", "federation:demo"),
            action="set",
            limit=limit,
            at="2026-01-01T00:00:00Z",
            reason=reason,
        )

    await back.database.run(answer)
    assert await back.coordinator.meet("a", [seen]) == ()
    await back.coordinator.stop()
    await back.database.close()


@pytest.mark.parametrize("pinned", [False, True])
async def test_who_waits_for_a_party_that_was_refused_is_told_until_it_joins(
    pinned: bool, federation: Federation, tmp_path: Path
) -> None:
    federation.pinned = pinned
    place = Place(federation, tmp_path)
    await place.database.open()
    job_id = await place.submit(place.training())
    doing = "round 1: training" if pinned else "waiting for a, b to join"
    refused = "refused: its kit is another one"
    place.coordinator._sessions.refuse("a", "its kit is another one")
    await place.turn()
    assert _shown(place, job_id) == (f"{doing}; a was {refused}", refused)
    if pinned:
        await place.turn(after_s=11)
        assert (await place.events(job_id))[-1].message == f"round 1 waits for a, b (training); a was {refused}"
    place.coordinator._sessions.open("a", "1")
    await place.turn()
    assert _shown(place, job_id) == ((doing, "training") if pinned else ("waiting for b to join", ""))
    await place.coordinator.stop()
    await place.database.close()


def _shown(place: Place, job_id: str) -> tuple[str, str]:
    """What a job is doing, and what is expected of party a."""
    activity = place.coordinator.progress(job_id)
    assert activity is not None
    return activity.stage, place.coordinator.trainings.awaited().get("a", "")
