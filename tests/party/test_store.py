"""A party's memory: what it was shown once is what it stays with, whoever asks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData

from src.errors import PlanError, StateError
from src.party.store import PartyRound, RoundMemory, Stage, check_same

NEW = PartyRound(job_id="job", number=1, plan="p" * 64, stage=Stage.RESERVED)
FULL = PartyRound(
    job_id="job",
    number=1,
    plan="p" * 64,
    stage=Stage.DELIVERED,
    batch={"header": "00", "sha256": "batch", "size": 7, "root": "r"},
    root={"statement": "{}", "signer": "a", "signature": "00"},
    list="l" * 64,
    aggregate_root="g" * 64,
    share="share",
)


@pytest.fixture
def memory(engine: Engine) -> RoundMemory:
    metadata = MetaData()
    memory = RoundMemory(metadata)
    metadata.create_all(engine)
    return memory


@pytest.mark.parametrize("row", [NEW, FULL, replace(NEW, stage=Stage.FAILED, failure=("REFUSED", "no"))])
def test_a_round_is_remembered_as_it_was(engine: Engine, memory: RoundMemory, row: PartyRound) -> None:
    with engine.begin() as connection:
        assert memory.find(connection, "job", 1) is None
        memory.put(connection, row)
        assert memory.find(connection, "job", 1) == row
        assert memory.find(connection, "job", 2) is None
    assert PartyRound.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_a_round_moves_on_through_its_stages(engine: Engine, memory: RoundMemory) -> None:
    with engine.begin() as connection:
        row = NEW
        for changes in (
            {"stage": Stage.COMMITTED, "batch": FULL.batch, "root": FULL.root},
            {"stage": Stage.REVEALED, "list": FULL.list},
            {"stage": Stage.DELIVERED},
            {"aggregate_root": FULL.aggregate_root},
            {"share": FULL.share},
            {"ended": "RELEASED"},
        ):
            memory.put(connection, row)
            row = replace(row, **changes)
        memory.put(connection, row)
        assert memory.find(connection, "job", 1) == replace(FULL, ended="RELEASED")


SHOWN: dict[str, tuple[PartyRound, dict[str, Any], str]] = {
    "another plan, of another model say, under the same round": (NEW, {"plan": "q" * 64}, "another plan"),
    "another frozen list": (FULL, {"list": "m" * 64}, "another list"),
    "no list where one was accepted": (FULL, {"list": ""}, "another list"),
    "another aggregate": (FULL, {"aggregate_root": "h" * 64}, "another aggregate root"),
    "no aggregate where one was opened": (FULL, {"aggregate_root": ""}, "another aggregate root"),
}


@pytest.mark.parametrize(("row", "changes", "words"), SHOWN.values(), ids=SHOWN.keys())
def test_a_party_s_memory_does_not_take(
    engine: Engine, memory: RoundMemory, row: PartyRound, changes: dict[str, Any], words: str
) -> None:
    with engine.begin() as connection:
        memory.put(connection, row)
        with pytest.raises(PlanError, match=f"round 1 of job job was shown to this party with {words} before"):
            memory.put(connection, replace(row, **changes))
        assert memory.find(connection, "job", 1) == row
        memory.put(connection, replace(row, number=2, **changes))
    with pytest.raises(PlanError):
        check_same(row, replace(row, **changes))


LATER = {
    Stage.WITNESS: (),
    Stage.RESERVED: (Stage.COMMITTED, Stage.REVEALED, Stage.DELIVERED, Stage.FAILED),
    Stage.COMMITTED: (Stage.REVEALED, Stage.DELIVERED),
    Stage.REVEALED: (Stage.DELIVERED,),
    Stage.DELIVERED: (),
    Stage.FAILED: (),
}


@pytest.mark.parametrize("to", Stage)
@pytest.mark.parametrize("since", Stage)
def test_no_stage_goes_back(engine: Engine, memory: RoundMemory, since: Stage, to: Stage) -> None:
    """Whoever writes what it read before somebody else wrote is refused, and what was written stays."""
    known, row = replace(NEW, stage=since), replace(NEW, stage=to)
    with engine.begin() as connection:
        memory.put(connection, known)
        if to is since or to in LATER[since]:
            memory.put(connection, row)
            return
        with pytest.raises(StateError, match=f"does not go on from {since.value} to {to.value}"):
            memory.put(connection, row)
        assert memory.find(connection, "job", 1) == known


OLD: dict[str, tuple[PartyRound, dict[str, Any], str]] = {
    "without the batch that was stored": (FULL, {"batch": None}, "another batch"),
    "with another batch": (
        FULL,
        {"batch": {"header": "00", "sha256": "other", "size": 7, "root": "r"}},
        "another batch",
    ),
    "without its root": (FULL, {"root": None}, "another root"),
    "without the share that was made": (FULL, {"share": ""}, "another share"),
    "open again": (replace(FULL, ended="FAILED"), {"ended": ""}, "another ended"),
    "ended otherwise": (replace(FULL, ended="FAILED"), {"ended": "RELEASED"}, "another ended"),
    "with another failure": (replace(NEW, stage=Stage.FAILED, failure=("A", "a")), {"failure": ("B", "b")}, "failure"),
    "with fewer trainings": (replace(NEW, trainings=2), {"trainings": 1}, "another trainings"),
}


@pytest.mark.parametrize(("known", "changes", "words"), OLD.values(), ids=OLD.keys())
def test_what_a_party_made_or_heard_once_stays(
    engine: Engine, memory: RoundMemory, known: PartyRound, changes: dict[str, Any], words: str
) -> None:
    with engine.begin() as connection:
        memory.put(connection, known)
        with pytest.raises(StateError, match=words):
            memory.put(connection, replace(known, **changes))
        assert memory.find(connection, "job", 1) == known


def test_a_round_that_earlier_software_wrote_is_read() -> None:
    """It does not say how often training began; what is not known counts as never."""
    old = {name: value for name, value in NEW.to_json().items() if name != "trainings"}
    assert PartyRound.from_json(json.loads(json.dumps(old))) == NEW


def test_rounds_whose_end_is_not_known_keep_their_blobs(engine: Engine, memory: RoundMemory) -> None:
    with engine.begin() as connection:
        memory.put(connection, FULL)
        memory.put(connection, replace(NEW, number=2))
        memory.put(connection, replace(FULL, number=3, share="other share", ended="FAILED"))
        assert [row.number for row in memory.open_rounds(connection)] == [1, 2]
        assert memory.blobs(connection) == {"batch", "share"}
