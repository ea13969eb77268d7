"""Who is not there: a round goes on with whom it can, says for whom it waits, and names whom it lacked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from src.communication.generated import jobs_pb2

SHORT_S = 16.0
"""A round's time where somebody is missing: commitments close after 0.6 of it, uploads after 0.8."""
LONGER_S = 28.0
"""Long enough for the notice after ten seconds of waiting, and for an opening in the last tenth."""


@pytest.fixture(scope="module")
def two(federation: Any) -> Any:
    """Parties a and b, which have trained before; nobody is there to be c."""
    if "c" in federation.processes.running:
        assert federation.processes.stop("c") == 0
    federation.start("a", "b")
    federation.succeed(federation.submit(parties=("a", "b")))
    return federation


@contextmanager
def without_share(federation: Any, *names: str) -> Iterator[None]:
    """These parties cannot open: their key share is not where it was."""
    files = [federation.kits / f"party-{name}" / "share.json" for name in names]
    away = [file.rename(file.with_suffix(".away")) for file in files]
    try:
        yield
    finally:
        for file, kept in zip(files, away, strict=True):
            kept.rename(file)


def test_a_share_holder_that_cannot_open_is_replaced_by_another(federation: Any) -> None:
    federation.start("a", "b", "c")
    with without_share(federation, "a"):
        job = federation.succeed(federation.submit(parties=("b", "c")))
    (row,) = federation.rounds(job.job_id)
    assert row.asked == ("a", "b", "c")
    assert row.failures["a"].stage == "open"
    assert set(row.shares) == {"b", "c"}


def test_a_share_holder_that_falls_silent_is_replaced_before_the_deadline(federation: Any) -> None:
    federation.start("a", "b", "c")
    federation.succeed(federation.submit())  # everybody has trained before: what follows takes a second
    with federation.processes.hold("a"):
        job = federation.succeed(federation.submit(parties=("b", "c"), round_timeout_s=LONGER_S))
    (row,) = federation.rounds(job.job_id)
    assert row.asked == ("a", "b", "c")
    assert set(row.shares) == {"b", "c"}
    assert 0.9 * row.timeout_s <= row.ended_at - row.started_at < row.timeout_s


def test_a_round_closes_with_its_quorum_and_says_for_whom_it_waited(two: Any) -> None:
    job_id = two.submit(quorum=2, round_timeout_s=LONGER_S)
    row = two.reached(job_id, lambda row: {"a", "b"} <= set(row.roots), "a and b commit")
    assert list(two.client.get(job_id).progress.waiting_for) == ["c"]
    assert {each.party: each.waiting_for for each in two.client.status().parties} == {"a": "", "b": "", "c": "training"}
    job = two.succeed(job_id)
    assert "round 1 waits for c (training)" in [event.message for event in two.client.watch(job_id)]
    assert job.progress.rounds[0].contributions == 2
    (row,) = two.rounds(job_id)
    assert row.contributors == ("a", "aggregator", "b")
    assert set(row.asked) == {"a", "b"}  # of the three share holders, those that are there
    assert 0.6 * row.timeout_s <= row.ended_at - row.started_at < row.timeout_s


def test_a_round_without_its_quorum_fails_at_its_deadline_and_names_who_was_missing(two: Any) -> None:
    job_id = two.submit(quorum=3, round_timeout_s=SHORT_S)
    two.reached(job_id, lambda _: two.client.get(job_id).progress.waiting_for == ["c"], "a and b are ready")
    expected = {each.party: each.waiting_for for each in two.client.status().parties}
    assert expected == {"a": "ready, waits for c", "b": "ready, waits for c", "c": "training"}
    job = two.end(job_id)
    assert job.state == jobs_pb2.FAILED
    assert "nobody began: fewer than 3 parties could train it in time" in job.error.message
    assert "c: no answer yet: training, or away; a: ready to train, and waited for others;" in job.error.message
    assert (list(job.error.parties), job.error.stage) == (["c"], "round 1")
    (row,) = two.rounds(job_id)
    assert 0.6 * SHORT_S <= row.ended_at - row.started_at < SHORT_S
    assert not row.spent
    assert {each.settled.kind for each in two.charges("aggregator", job_id)} == {"returned"}


def test_too_few_shares_fail_the_round_which_counts_as_spent_and_name_who_could_not_open(two: Any) -> None:
    with without_share(two, "a", "b"):
        job = two.end(two.submit(parties=("a", "b")))
    assert job.state == jobs_pb2.FAILED
    assert job.error.message.startswith("fewer than 2 parties can open (a: ")
    assert "; b: " in job.error.message
    assert list(job.error.parties) == ["a", "b"]
    (row,) = two.rounds(job.job_id)
    assert row.spent
    assert {each.settled.kind for each in two.charges("aggregator", job.job_id)} == {"final"}
