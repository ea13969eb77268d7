"""What filters find, how orders sort and how pages turn: the same on every engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src.errors import InvalidInput
from src.jobs.states import (
    Event,
    EventKind,
    JobError,
    JobRow,
    Priority,
    after_failure,
    failed_event,
    succeeded_event,
    utc,
)
from src.jobs.store import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, JobQuery, JobStore
from src.storage.database import Database
from src.storage.schema import FromMetadata, Schema

OpenDatabase = Callable[[Schema], Awaitable[Database]]

METADATA = MetaData()
STORE = JobStore(METADATA)
DIED = JobError("WORKER_FAILED", "a process died")


def in_database(test: Callable[[Connection], None]) -> Callable[[OpenDatabase], Awaitable[None]]:
    """A test that is one transaction of an empty database."""

    async def run(open_database: OpenDatabase) -> None:
        database = await open_database(FromMetadata(METADATA))
        await database.run(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def make_row(number: int, **fields: Any) -> JobRow:
    row = JobRow(
        job_id=f"{number:04x}",
        request_id=f"request {number}",
        owner="scientist/s",
        display_name=f"job {number}",
        kind="federated_training",
        spec={"task": "randhie"},
        spec_digest=f"digest {number}",
        max_attempts=3,
        created_at=utc(number),
    )
    return replace(row, **fields)


def started(connection: Connection, number: int, **fields: Any) -> JobRow:
    row = STORE.create(connection, make_row(number, **fields))
    return STORE.apply(connection, row.job_id, Event(kind=EventKind.STARTED), now=number + 0.5)


def found(connection: Connection, **query: Any) -> list[str]:
    return [row.job_id for row in STORE.list_jobs(connection, query=JobQuery(**query)).rows]


ANN, BOB = "scientist/ann", "scientist/bob"


def populate(connection: Connection) -> None:
    """1: waits. 2: runs. 3: was retried. 4: succeeded. 5: failed. 6: cancelled while it waited. 7: deleted."""
    STORE.create(connection, make_row(1, owner=ANN, priority=Priority.HIGH, display_name="Round 1"))
    started(connection, 2, owner=BOB, display_name="round 2")
    row = started(connection, 3, owner=ANN, priority=Priority.LOW, display_name="100% größe")
    STORE.apply(connection, "0003", after_failure(row, DIED, delays_s=(1.0,), now=5.0), now=5.0)
    STORE.apply(connection, "0003", Event(kind=EventKind.RESUMED), now=6.0)
    started(connection, 4, owner=ANN, kind="export", spec={"job_id": "0002"}, display_name="a_b")
    STORE.apply(connection, "0004", succeeded_event({"files": []}), now=20.0)
    started(connection, 5, owner=BOB, kind="evaluation", spec={"task": "digits", "options": {"task": "randhie"}})
    STORE.apply(connection, "0005", failed_event(DIED), now=10.0)
    STORE.create(connection, make_row(6, owner=BOB, priority=Priority.HIGH, display_name=""))
    STORE.apply(connection, "0006", Event(kind=EventKind.CANCELLED), now=30.0)
    started(connection, 7, owner=ANN)
    STORE.apply(connection, "0007", succeeded_event({"files": []}), now=40.0)
    STORE.apply(connection, "0007", Event(kind=EventKind.DELETED), now=41.0)


FILTERS = {
    "": "654321",
    "state = PENDING": "1",
    "state != RUNNING": "6541",
    "NOT state = RUNNING": "6541",
    "priority = HIGH": "61",
    "priority >= NORMAL": "65421",
    "priority > NORMAL": "61",
    "priority < HIGH": "5432",
    "priority <= LOW": "3",
    "priority != LOW": "65421",
    "kind = export OR kind = evaluation": "54",
    "kind:ed": "6321",
    "owner = scientist/ann": "431",
    "owner > scientist/ann": "652",
    'display_name = "Round 1"': "1",
    "display_name:round": "21",
    "display_name:%": "3",
    "display_name:_": "4",
    "display_name:GRÖSSE": "",
    "display_name:größe": "3",
    "display_name:*": "54321",
    "NOT display_name:*": "6",
    "display_name = ''": "6",
    "task = randhie": "6321",
    "task = digits": "5",
    "task != randhie": "54",
    "NOT task:*": "4",
    "attempt = 0": "61",
    "attempt >= 2": "3",
    "create_time >= 1970-01-01T00:00:04Z": "654",
    "create_time = 1970-01-01T01:00:04+01:00": "4",
    "start_time < 1970-01-01T00:00:04Z": "32",
    "start_time > 1970-01-01T00:00:04Z": "54",
    "start_time != 1970-01-01T00:00:02.5Z": "65431",
    "start_time:*": "5432",
    "NOT start_time <= 9999-01-01T00:00:00Z": "61",
    "end_time:*": "654",
    "end_time > 1970-01-01T00:00:15Z AND owner = scientist/ann": "4",
    "state = RUNNING AND priority = LOW OR priority = NORMAL": "32",
    "(state = PENDING AND priority = HIGH) OR kind = export": "41",
    "-owner = scientist/bob AND -state = RUNNING": "41",
}
ORDERS = {
    "": "654321",
    "create_time": "123456",
    "create_time desc": "654321",
    "priority desc": "615423",
    "priority desc, create_time": "162453",
    "priority, create_time desc": "354261",
    "state": "123456",
    "state desc, create_time desc": "654321",
    "kind, start_time desc": "543261",
    "owner, display_name": "314652",
    "end_time desc": "645321",
    "start_time": "162345",
    "display_name": "631452",
}


@in_database
def test_a_filter_finds(connection: Connection) -> None:
    populate(connection)
    wrong = {
        text: (ids, expected)
        for text, expected in FILTERS.items()
        if (ids := "".join(job_id[-1] for job_id in found(connection, filter=text))) != expected
    }
    assert wrong == {}


@in_database
def test_an_order_sorts_and_its_pages_put_together_are_the_listing(connection: Connection) -> None:
    populate(connection)
    for text, expected in ORDERS.items():
        assert ("".join(job_id[-1] for job_id in found(connection, order_by=text)), text) == (expected, text)
        seen, token = "", ""
        while True:
            query = JobQuery(order_by=text, page_size=2, page_token=token, filter="NOT state = FAILED")
            page = STORE.list_jobs(connection, query=query)
            seen += "".join(row.job_id[-1] for row in page.rows)
            token = page.next_page_token
            if not token:
                break
            assert len(page.rows) == 2
        assert (seen, text) == (expected.replace("5", ""), text)


@in_database
def test_a_listing_is_of_one_owner_or_all_and_of_deleted_jobs_on_request(connection: Connection) -> None:
    populate(connection)
    assert found(connection, owner=ANN) == ["0004", "0003", "0001"]
    assert found(connection, owner=ANN, show_deleted=True)[0] == "0007"
    assert found(connection, owner=ANN, filter="owner = scientist/bob OR owner = scientist/ann") == found(
        connection, owner=ANN
    )
    assert found(connection, owner="scientist/nobody") == []


@in_database
def test_text_is_sorted_by_code_point_whatever_the_locale(connection: Connection) -> None:
    for number, name in enumerate(["b", "B", "a", "ä", "_", "Z z", "Zz"]):
        STORE.create(connection, make_row(number, display_name=name))
    page = STORE.list_jobs(connection, query=JobQuery(order_by="display_name"))
    assert [row.display_name for row in page.rows] == ["B", "Z z", "Zz", "_", "a", "b", "ä"]
    assert len(found(connection, filter="display_name < a")) == 4


@in_database
def test_a_job_that_is_created_while_somebody_turns_pages_is_on_none_that_follows(connection: Connection) -> None:
    for number in range(5):
        STORE.create(connection, make_row(number, created_at=utc(number // 2)))
    first = STORE.list_jobs(connection, query=JobQuery(page_size=2))
    STORE.create(connection, make_row(9))
    second = STORE.list_jobs(connection, query=JobQuery(page_size=9, page_token=first.next_page_token))
    assert [row.job_id for row in (*first.rows, *second.rows)] == ["0004", "0003", "0002", "0001", "0000"]
    assert second.next_page_token == ""


@in_database
def test_a_page_has_a_size_and_a_token_belongs_to_its_listing(connection: Connection) -> None:
    for number in range(DEFAULT_PAGE_SIZE + 1):
        STORE.create(connection, make_row(number))
    page = STORE.list_jobs(connection, query=JobQuery())
    assert len(page.rows) == DEFAULT_PAGE_SIZE
    assert len(found(connection, page_size=10**9)) == DEFAULT_PAGE_SIZE + 1 <= MAX_PAGE_SIZE
    assert found(connection, page_token=page.next_page_token, page_size=10**9) == ["0000"]
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"page_size": -1}, "page_size"),
        ({"page_token": "?"}, "page_token"),
        ({"page_token": page.next_page_token, "owner": ANN}, "page_token"),
        ({"page_token": page.next_page_token, "filter": "state = PENDING"}, "page_token"),
        ({"page_token": page.next_page_token, "order_by": "kind"}, "page_token"),
        ({"page_token": page.next_page_token, "show_deleted": True}, "page_token"),
        ({"filter": "state"}, "filter"),
        ({"order_by": "?"}, "order_by"),
    ]
    for query, field in refusals:
        with pytest.raises(InvalidInput) as caught:
            found(connection, **query)
        assert list(caught.value.violations) == [field]
