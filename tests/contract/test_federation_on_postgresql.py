"""A federation whose aggregator keeps its state on a PostgreSQL server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import MetaData

from src.storage.database import read_only
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations


def test_a_job_outlives_the_loss_of_its_database_server_and_a_kill_of_the_aggregator(
    make_federation: Callable[..., Any], postgresql: Any
) -> None:
    server, url = postgresql
    own = {"SOTTO__DATABASE__URL": url.render_as_string(hide_password=False), "SOTTO__EVALUATION": "{}"}
    settings = {"aggregator": own}  # nothing is evaluated, and nothing loaded for it before it serves
    federation = make_federation(parties=("a", "b"), settings=settings)
    federation.start("a", "b")
    job_id = federation.submit()
    server.stop()
    server.start()
    federation.processes.kill("aggregator")
    federation.start_aggregator()
    assert federation.succeed(job_id).progress.rounds_released == 1
    events = federation.client.events(job_id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    with read_only(url, schema=Migrations("aggregator")) as connection:
        entries = LedgerStore(MetaData()).entries(connection)
    assert [entry.kind for entry in entries if entry.job_id] == ["reservation", "final", "release"]
    assert not (federation.state("aggregator") / "aggregator.sqlite").exists()
