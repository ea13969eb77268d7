"""Rounds and enrolled parties in the database: read back as written, a number used once, a key never swapped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import Engine, MetaData, literal, select
from sqlalchemy.exc import IntegrityError

from src.aggregator.round_row import Batch, Failure, RoundRow, RoundState
from src.aggregator.store import EnrolmentStore, RoundStore
from src.errors import ConflictError, NotFoundError

ROW = RoundRow(
    job_id="job",
    number=1,
    plan={"statement": "{}", "signer": "aggregator", "signature": "00"},
    plan_digest="p" * 64,
    model_sha256="model",
    cohort=("a", "b"),
    quorum=2,
    holders=("a", "b"),
    threshold=2,
    noise_needed=True,
    started_at=1000.5,
    timeout_s=60.0,
)
FULL = replace(
    ROW,
    state=RoundState.RELEASED,
    ended_at=1010.25,
    roots={"a": {"statement": "{}", "signer": "a", "signature": "01"}},
    batches={"a": Batch("00", "batch a", 7), "aggregator": Batch("01", "noise", 7)},
    bytes_up={"a": 9},
    budgets={"a": (0.25, None), "b": (None, None)},
    frozen_list={"statement": "list", "signer": "aggregator", "signature": "02"},
    contributors=("a", "aggregator"),
    aggregate=Batch("", "product", 7),
    aggregate_root="r" * 64,
    spent=True,
    opening={"statement": "opening", "signer": "aggregator", "signature": "03"},
    asked=("a", "b"),
    shares={"a": "share a", "b": "share b"},
    failures={"b": Failure("contribute", "REFUSED", "no")},
    result={"blobs": ["next model", "state"], "epsilon_party": "inf"},
    reason="because",
    settled=True,
)


@pytest.fixture
def rounds(engine: Engine) -> RoundStore:
    metadata = MetaData()
    store = RoundStore(metadata)
    metadata.create_all(engine)
    return store


@pytest.fixture
def enrolments(engine: Engine) -> EnrolmentStore:
    metadata = MetaData()
    store = EnrolmentStore(metadata)
    metadata.create_all(engine)
    return store


@pytest.mark.parametrize("row", [ROW, FULL], ids=["a new round", "one with everything"])
def test_a_round_is_read_back_as_it_was_written(engine: Engine, rounds: RoundStore, row: RoundRow) -> None:
    with engine.begin() as connection:
        rounds.insert(connection, row)
        assert rounds.get(connection, "job", 1) == row
        assert rounds.of_job(connection, "job") == [row]


def test_an_update_replaces_one_round_alone(engine: Engine, rounds: RoundStore) -> None:
    second, other = replace(ROW, number=2), replace(ROW, job_id="other")
    with engine.begin() as connection:
        for row in (second, ROW, other):
            rounds.insert(connection, row)
        rounds.update(connection, FULL)
        assert rounds.of_job(connection, "job") == [FULL, second]
        assert rounds.of_job(connection, "other") == [other]


def test_a_round_number_is_used_once(engine: Engine, rounds: RoundStore) -> None:
    with engine.begin() as connection:
        rounds.insert(connection, ROW)
        with pytest.raises(IntegrityError):
            rounds.insert(connection, FULL)


def test_a_round_that_never_was_is_not_found(engine: Engine, rounds: RoundStore) -> None:
    with engine.begin() as connection:
        rounds.insert(connection, ROW)
        for job, number in (("job", 2), ("other", 1)):
            with pytest.raises(NotFoundError, match=f"no round {number} of job {job}"):
                rounds.get(connection, job, number)
        assert rounds.of_job(connection, "other") == []


def test_every_blob_that_a_round_names_is_kept_until_it_is_settled(engine: Engine, rounds: RoundStore) -> None:
    with engine.begin() as connection:
        assert rounds.blobs(connection) == set()
        rounds.insert(connection, replace(FULL, settled=False))
        rounds.insert(connection, replace(ROW, number=2, model_sha256="next model"))
        assert rounds.blobs(connection) == {
            "model",
            "next model",
            "state",
            "batch a",
            "noise",
            "product",
            "share a",
            "share b",
        }
        rounds.update(connection, FULL)
        assert rounds.blobs(connection) == {"model", "next model", "state"}


def test_of_rounds_that_are_settled_the_last_released_is_what_a_job_goes_on_from(
    engine: Engine, rounds: RoundStore
) -> None:
    """The models of those before are nobody's any more; of a job that is none of those asked about, all are."""
    with engine.begin() as connection:
        for job in ("job", "other"):
            for number in (1, 2, 3):
                made = {"blobs": [f"{job} {number}"]}
                row = replace(FULL, job_id=job, number=number, model_sha256=f"{job} {number - 1}", result=made)
                rounds.insert(connection, row)
            failed = replace(ROW, job_id=job, number=4, model_sha256="failed", state=RoundState.FAILED, settled=True)
            rounds.insert(connection, failed)
        assert rounds.blobs(connection) == {"job 2", "job 3", "other 2", "other 3"}
        only = select(literal("job"))
        assert rounds.blobs(connection, of=only) == {"job 2", "job 3"}


def test_who_joined_is_remembered_by_the_first_key(engine: Engine, enrolments: EnrolmentStore) -> None:
    with engine.begin() as connection:
        enrolments.enrol(connection, "b", b"\2" * 32)
        enrolments.enrol(connection, "a", b"\1" * 32)
        enrolments.enrol(connection, "b", b"\2" * 32)
        with pytest.raises(ConflictError, match="'b' joined before with another signing key"):
            enrolments.enrol(connection, "b", b"\3" * 32)
        assert enrolments.members(connection) == [("a", b"\1" * 32), ("b", b"\2" * 32)]
