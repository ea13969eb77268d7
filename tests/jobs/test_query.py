"""Filters, orders and page tokens as they are read. What they find is in tests/contract/test_job_store.py."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import MetaData, select
from sqlalchemy.dialects import postgresql, sqlite

from src.errors import InvalidInput
from src.jobs.query import (
    MAX_DEPTH,
    MAX_FILTER_CHARACTERS,
    NEWEST_FIRST,
    And,
    Comparison,
    Filter,
    Not,
    Or,
    Order,
    after,
    condition,
    page_token,
    parse_filter,
    parse_order,
)
from src.jobs.states import JobRow, utc
from src.jobs.tables import jobs_table

JOBS = jobs_table(MetaData())
RUNNING = Comparison("state", "=", "RUNNING")
HIGH = Comparison("priority", "=", "HIGH")
EXPORT = Comparison("kind", "=", "export")
ROW = JobRow(
    job_id="00ff",
    request_id="r",
    owner="o",
    display_name="",
    kind="export",
    spec={},
    spec_digest="d",
    created_at=utc(9),
)
LISTING = ("", "", None, False)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", And()),
        ("  ", And()),
        ("state = RUNNING", RUNNING),
        (' state="RUNNING" ', RUNNING),
        ("state='RUNNING'", RUNNING),
        ("((state=RUNNING))", RUNNING),
        ("state = RUNNING AND priority = HIGH", And((RUNNING, HIGH))),
        ("state = RUNNING OR priority = HIGH", Or((RUNNING, HIGH))),
        ("state=RUNNING AND priority=HIGH OR kind=export", And((RUNNING, Or((HIGH, EXPORT))))),
        ("(state=RUNNING AND priority=HIGH) OR kind=export", Or((And((RUNNING, HIGH)), EXPORT))),
        ("NOT state=RUNNING AND priority=HIGH", And((Not(RUNNING), HIGH))),
        ("NOT (state=RUNNING AND priority=HIGH)", Not(And((RUNNING, HIGH)))),
        ("-state=RUNNING", Not(RUNNING)),
        ("NOT NOT state=RUNNING", Not(Not(RUNNING))),
        ("NOT(state=RUNNING)", Not(RUNNING)),
        ("priority >= NORMAL", Comparison("priority", ">=", "NORMAL")),
        ("attempt > 1", Comparison("attempt", ">", 1)),
        ('display_name:"round \\"1\\""', Comparison("display_name", ":", 'round "1"')),
        (r'display_name = "a\\b\c"', Comparison("display_name", "=", r"a\bc")),
        ("display_name != ''", Comparison("display_name", "!=", "")),
        ("display_name = größe", Comparison("display_name", "=", "größe")),
        ('display_name = "AND) OR ("', Comparison("display_name", "=", "AND) OR (")),
        ("task:randhie", Comparison("task", ":", "randhie")),
        ("owner = scientist/ann", Comparison("owner", "=", "scientist/ann")),
        ("start_time:*", Comparison("start_time", ":", "*")),
        ("create_time >= 2026-01-31T12:00:00Z", Comparison("create_time", ">=", "2026-01-31T12:00:00.000000Z")),
        ('end_time<"2026-01-31t12:00:00.5+02:00"', Comparison("end_time", "<", "2026-01-31T10:00:00.500000Z")),
        ('end_time<"0999-01-31T12:00:00.1234567-00:30"', Comparison("end_time", "<", "0999-01-31T12:30:00.123456Z")),
    ],
)
def test_a_filter_means(text: str, meaning: Filter) -> None:
    assert parse_filter(text) == meaning


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("color = red", "'color' is none of state, priority, kind, .* at character 1"),
        ("state = RUNNING AND color = red", "at character 21"),
        ("state", "state is compared by = !=: one of these expected at character 6"),
        ("state RUNNING", "one of these expected at character 7"),
        ("state < RUNNING", "compared by = !=: one of these expected at character 7"),
        ("state = BUSY", "state: one of PENDING, RUNNING, .* expected at character 9"),
        ("state = running", "at character 9"),
        ("priority = URGENT", "one of LOW, NORMAL, HIGH expected at character 12"),
        ("priority:HIGH", "at character 9"),
        ("attempt = -1", "an integer from 0 to 2147483647 expected at character 11"),
        ("attempt = 2147483648", "an integer"),
        ("attempt = 99999999999999999999", "an integer"),
        ("attempt = ٣", "an integer"),
        ("attempt = 1.5", "an integer"),
        ("create_time > yesterday", "a time such as 2026-01-31T12:00:00Z expected at character 15"),
        ("create_time > 2026-01-31", "a time such as"),
        ("create_time > 2026-01-31T12:00:00", "a time such as"),
        ("create_time > 2026-02-30T12:00:00Z", "no such time"),
        ("create_time > 0001-01-01T00:00:00+10:00", "no such time"),
        ("create_time:2026", "only .* can be contained"),
        ("state =", "a value expected, in quotes or a word at character 8"),
        ("state = 'RUNNING", "a value expected"),
        ('display_name = "a\0b"', "no NUL characters"),
        ("state = RUNNING AND", "a comparison expected at character 20"),
        ("AND state = RUNNING", "a comparison expected at character 1"),
        ("state = RUNNING priority = HIGH", "AND, OR or the end expected at character 17"),
        ("state = RUNNING and priority = HIGH", "AND, OR or the end expected at character 17"),
        ("(state = RUNNING", "AND, OR or a closing parenthesis expected at character 17"),
        ("state = RUNNING)", "AND, OR or the end expected at character 16"),
        ("()", "a comparison expected at character 2"),
        ("RUNNING", "'RUNNING' is none of"),
        ("state = RUNNING; DROP TABLE jobs", "a value|one of PENDING|AND, OR or the end expected"),
        ("(" * (MAX_DEPTH + 1) + "state = RUNNING" + ")" * (MAX_DEPTH + 1), "more than 20 parentheses"),
        ("NOT " * (MAX_DEPTH + 1) + "state = RUNNING", "more than 20 parentheses"),
        ("x" * (MAX_FILTER_CHARACTERS + 1), "at most 1000 characters"),
    ],
)
def test_what_is_no_filter_is_refused_with_the_place(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint) as caught:
        parse_filter(text)
    assert list(caught.value.violations) == ["filter"]
    assert caught.value.violations["filter"] in caught.value.message


def test_twenty_parentheses_within_each_other_are_read() -> None:
    assert parse_filter("(" * MAX_DEPTH + "state = RUNNING" + ")" * MAX_DEPTH) == RUNNING


PIECES = (
    *("state", "attempt", "start_time", "=", "!=", ":", "<", "(", ")", "AND", "OR", "NOT", "-", "RUNNING", "*"),
    *('"', "'", "\\", "1", " ", "\0", "2026-01-31T12:00:00Z", "é", ",", "%", "_"),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join) | st.text(max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        found = condition(parse_filter(text), JOBS)
        for dialect in (sqlite.dialect(), postgresql.dialect()):  # type: ignore[no-untyped-call]
            select(JOBS).where(found).compile(dialect=dialect)


def test_no_text_of_a_caller_becomes_part_of_the_statement() -> None:
    text = 'display_name:"x\' OR 1=1 --" AND owner = "%_\'" AND task != "\'"'
    for dialect in (sqlite.dialect(), postgresql.dialect()):  # type: ignore[no-untyped-call]
        statement = select(JOBS.c.job_id).where(condition(parse_filter(text), JOBS)).compile(dialect=dialect)
        assert "1=1" not in str(statement)
        assert "x' or 1=1 --" in statement.params.values()


@pytest.mark.parametrize(
    ("text", "orders"),
    [
        ("", NEWEST_FIRST),
        ("  ", (Order("create_time", descending=True),)),
        ("create_time", (Order("create_time"),)),
        ("priority desc, create_time", (Order("priority", descending=True), Order("create_time"))),
        (" state  asc ,kind   desc", (Order("state"), Order("kind", descending=True))),
    ],
)
def test_an_order_means(text: str, orders: tuple[Order, ...]) -> None:
    assert parse_order(text) == orders


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("color", "'color' is none of create_time, start_time"),
        ("task", "'task' is none of"),
        ("state,", "'' is none of"),
        ("state up", 'after state: "desc", "asc" or a comma expected'),
        ("state desc desc", "a comma expected"),
        ("state DESC", "a comma expected"),
        ("state, state desc", "a field is there twice"),
        ("state," * 500, "is none of|twice"),
    ],
)
def test_what_is_no_order_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint) as caught:
        parse_order(text)
    assert list(caught.value.violations) == ["order_by"]


def forged(*values: Any) -> str:
    """A token with the fingerprint of `LISTING`."""
    token = page_token(ROW, LISTING, order=NEWEST_FIRST)
    content = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    return base64.urlsafe_b64encode(json.dumps([content[0], *values]).encode()).decode()


@pytest.mark.parametrize(
    "token",
    [
        *("?", "AAAA", "bnVsbA", "W10", "WzEsMl0", "é", "[" * 4000, base64.urlsafe_b64encode(b"[" * 100_000).decode()),
        *(forged(), forged("a"), forged("a", "b", "c"), forged("a", 1), forged("a", None), forged([], {})),
        *(forged("a", "\0"), forged("\ud800", "b")),
    ],
)
def test_a_token_that_was_not_handed_out_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        after(token, LISTING, order=NEWEST_FIRST, jobs=JOBS)
    assert list(caught.value.violations) == ["page_token"]


@pytest.mark.parametrize("rank", [True, -1, 2**31, 2**64, 1.5, "HIGH"])
def test_a_token_with_a_rank_that_is_none_is_refused(rank: Any) -> None:
    order = parse_order("priority")
    with pytest.raises(InvalidInput, match="not of this service"):
        after(forged(rank, "00ff"), LISTING, order=order, jobs=JOBS)


@pytest.mark.parametrize(
    "other",
    [("state = RUNNING", "", None, False), ("", "kind", None, False), ("", "", "o", False), ("", "", None, True)],
)
def test_a_token_is_bound_to_its_listing(other: tuple[str, str, str | None, bool]) -> None:
    token = page_token(ROW, LISTING, order=NEWEST_FIRST)
    after(token, LISTING, order=NEWEST_FIRST, jobs=JOBS)
    with pytest.raises(InvalidInput, match="another filter, order or caller"):
        after(token, other, order=NEWEST_FIRST, jobs=JOBS)
