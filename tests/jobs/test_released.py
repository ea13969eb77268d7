"""Which models of released rounds are there: what the job said at its submission, the last one always, and no more than
there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, MetaData
from sqlalchemy.pool import StaticPool

from src.errors import NotFoundError
from src.jobs.computations import ExportSpec
from src.jobs.keeping import Keep
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import JobSpec
from src.jobs.states import Event, EventKind, JobRow
from src.jobs.store import JobStore

ANN = "scientist/ann"
ROOM = 10**9
SPEC = FederatedTrainingSpec(task="t")


class Kept:
    """Rounds that are released one after the other, each with a model of 100 bytes."""

    def __init__(self, connection: Connection, store: JobStore) -> None:
        self.connection, self.store = connection, store
        self.submit("job")

    def submit(self, job_id: str, spec: JobSpec = SPEC) -> None:
        row = JobRow(
            job_id=job_id,
            request_id=job_id,
            owner=ANN,
            display_name="",
            kind=spec.kind,
            spec=spec.to_json(),
            spec_digest=spec.digest,
            created_at="2026-01-01T00:00:00.000000Z",
        )
        self.store.create(self.connection, row)

    def release(
        self, number: int, keep: str, *, job_id: str = "job", room: int = ROOM, **metrics: float
    ) -> tuple[set[str], list[int]]:
        released = self.store.released
        released.add(self.connection, job_id, number, sha256=sha256(number, job_id), size=100)
        released.set_metrics(self.connection, job_id, number, metrics=metrics)
        return released.let_go(
            self.connection,
            job_id,
            Keep.from_text(keep),
            kept_bytes=lambda: sum(released.sizes_of(self.connection, ANN).values()),
            most_bytes=room,
        )

    @property
    def numbers(self) -> list[int]:
        return list(self.store.released.kept(self.connection, "job"))

    def find(self, choice: str) -> int:
        return self.store.released.find(self.connection, "job", choice).number


def sha256(number: int, job_id: str = "job") -> str:
    return f"{job_id}{number}".ljust(64, "0")


@pytest.fixture
def kept() -> Iterator[Kept]:
    metadata = MetaData()
    store = JobStore(metadata)
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    metadata.create_all(engine)
    with engine.begin() as connection:
        yield Kept(connection, store)
    engine.dispose()


@pytest.mark.parametrize(
    ("keep", "numbers"), [("last", [9]), ("every:1", [2, 3, 5, 6, 7, 9]), ("every:2", [3, 6, 9]), ("every:4", [6, 9])]
)
def test_the_last_is_kept_and_each_kth_of_those_released(kept: Kept, keep: str, numbers: list[int]) -> None:
    """Rounds 1, 4 and 8 failed: nothing was released there, and nothing is counted."""
    gone: set[str] = set()
    for number in (2, 3, 5, 6, 7, 9):
        went, lost = kept.release(number, keep)
        gone |= went
        assert lost == []
        assert kept.numbers[-1] == number
    assert kept.numbers == numbers
    assert gone == {sha256(number) for number in {2, 3, 5, 6, 7, 9} - set(numbers)}
    assert kept.store.released.blobs(kept.connection) == {sha256(number) for number in numbers}


def test_what_an_evaluation_needed_goes_once_it_is_not_needed_any_more(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(kept.store.released), "needed", lambda *_: {1})
        for number in (1, 2, 3, 4):
            kept.release(number, "every:2")
    assert kept.numbers == [1, 2, 4]
    assert kept.release(5, "every:2")[0] == {sha256(1)}
    assert kept.numbers == [2, 4, 5]


def test_the_best_by_a_public_metric_is_kept_and_the_last(kept: Kept) -> None:
    scores = [0.5, 0.7, 0.6, float("nan"), 0.7, 0.9, 0.1]
    seen = []
    for number, score in enumerate(scores, start=1):
        kept.release(number, "best:auc", auc=score)
        seen.append(kept.numbers)
    assert seen == [[1], [2], [2, 3], [2, 4], [2, 5], [6], [6, 7]]
    assert kept.find("best:auc") == 6
    kept.release(8, "best:auc", auc=0.2)
    with pytest.raises(NotFoundError, match="round 7 of job job, which is the best by min:auc, is not kept") as caught:
        kept.find("best:min:auc")
    assert "kept are 6, 8" in caught.value.message


def test_without_a_metric_the_last_alone_is_kept_and_nothing_is_the_best(kept: Kept) -> None:
    kept.release(1, "best:auc", n=3.0)
    kept.release(2, "best:auc", n=3.0)
    assert kept.numbers == [2]
    with pytest.raises(NotFoundError, match="has a metric auc: they have none to choose by"):
        kept.find("best:auc")
    with pytest.raises(NotFoundError, match="has a metric epsilon_party"):  # nor is any figure that is no public metric
        kept.find("best:min:epsilon_party")


def test_what_was_not_released_is_not_there_whatever_became_of_it(kept: Kept) -> None:
    with pytest.raises(NotFoundError, match="has released no round"):
        kept.find("last")
    for number in (1, 2, 4):
        kept.release(number, "every:2")
    assert (kept.find("last"), kept.find("2"), kept.find("4")) == (4, 2, 4)
    for choice, said in (
        ("1", "the model of round 1 of job job is not kept; kept are 2, 4"),
        ("3", "round 3 of job job was not released; released are 1 to 2, 4"),
        ("999999999", "was not released"),
    ):
        with pytest.raises(NotFoundError, match=said):
            kept.find(choice)


def test_what_has_no_room_goes_the_oldest_first_and_never_the_last(kept: Kept) -> None:
    # As at submission: the last is had in any case, and takes no room.
    for number in range(1, 5):
        assert kept.release(number, "every:1", room=300) == (set(), [])
    assert kept.release(5, "every:1", room=300) == ({sha256(1)}, [1])
    kept.submit("other")
    kept.release(1, "every:1", job_id="other", room=500)
    assert kept.release(6, "every:1", room=300) == ({sha256(2), sha256(3)}, [2, 3])
    assert kept.release(7, "every:1", room=0) == ({sha256(4), sha256(5), sha256(6)}, [4, 5, 6])
    assert kept.numbers == [7]


def test_a_round_that_a_waiting_job_is_about_stays_until_that_is_done(kept: Kept) -> None:
    kept.release(1, "last")
    kept.submit("export", ExportSpec(job_id="job", round="1"))
    kept.submit("another", ExportSpec(job_id="else", round="2"))
    kept.release(2, "last")
    assert kept.numbers == [1, 2]
    kept.store.apply(kept.connection, "export", Event(kind=EventKind.CANCELLED), now=0.0)
    kept.release(3, "last")
    assert kept.numbers == [3]


def test_of_a_deleted_job_nothing_is_needed_and_nothing_counted(kept: Kept) -> None:
    kept.release(1, "every:1")
    kept.release(2, "every:1")
    size, _ = kept.store.kept_for(kept.connection, ANN)
    assert sum(size.values()) == 200
    assert kept.store.blobs(kept.connection) == {sha256(1), sha256(2)}
    for kind in (EventKind.CANCELLED, EventKind.DELETED):
        kept.store.apply(kept.connection, "job", Event(kind=kind), now=0.0)
    assert kept.store.kept_for(kept.connection, ANN) == ({}, set())
    assert kept.store.blobs(kept.connection) == set()
    assert kept.store.blobs_of(kept.connection, "job") == {sha256(1), sha256(2)}  # to be removed


def test_ten_thousand_rounds_are_kept_each_in_the_same_time(kept: Kept) -> None:
    """By what is read, not by a clock: a round looks at the two newest, and at sums that the database makes."""
    for number in range(1, 40):
        kept.release(number, "every:1")
    read: list[Any] = []
    rows = kept.store.released._rows

    def counted(*args: Any, **named: Any) -> Any:
        found = rows(*args, **named)
        read.extend(found)
        return found

    kept.store.released._rows = counted  # type: ignore[method-assign]
    kept.release(40, "every:1")
    assert len(read) <= 2
