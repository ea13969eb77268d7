"""The ledger: what is written is chained, every change is named, and nothing that was spent comes back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import ConflictError, InvalidInput, LedgerError, NotFoundError
from src.privacy import ledger
from src.privacy.budget import Budget, balance
from src.privacy.entries import problem
from src.privacy.events import DpSgdSteps, NoisySum
from src.privacy.ledger import GENESIS, Entry, Limit, Replay, charges, from_line, to_line, verify_lines

AT = "2025-06-01T12:00:00+00:00"
VECTORS = Path(__file__).parents[1] / "vectors"
OLD: list[str] = json.loads((VECTORS / "ledger.json").read_text("utf-8"))["lines"]
"""As version 1 wrote them."""
SUM = NoisySum(noise_multiplier=1.5, dimension=10)
STEPS = DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=40)
SUBJECT = "federation:demo"
BUDGET = Budget(unit="party", subject=SUBJECT, max_rounds=None, epsilon=None, delta=1e-6)


def verify_chain(entries: Iterable[Entry], *, known_heads: Iterable[str] = ()) -> str:
    """Head of a ledger that was replayed as a whole."""
    replay = Replay()
    for entry in entries:
        replay.add(entry)
    replay.check_heads(known_heads)
    return replay.head


def reserve(entries: list[Entry], number: int, **changes: object) -> Entry:
    fields: dict[str, object] = {
        "at": AT,
        "job_id": "job-1",
        "round": number,
        "unit": "party",
        "subject": SUBJECT,
        "reservation_id": f"job-1/{number}/party/{SUBJECT}",
        "event": SUM,
        **changes,
    }
    return ledger.reserve(entries, **fields)  # type: ignore[arg-type]


def name(number: int) -> str:
    return f"job-1/{number}/party/{SUBJECT}"


def refuse(
    entries: list[Entry], number: int, *, job_id: str = "job-1", event: NoisySum | None = None, scientist: str = ""
) -> Entry:
    return ledger.refuse(
        entries,
        at=AT,
        job_id=job_id,
        round=number,
        unit="party",
        subject=SUBJECT,
        reservation_id=f"{job_id}/{number}/party/{SUBJECT}",
        event=event,
        reason="no budget",
        scientist=scientist,
    )


@pytest.fixture
def entries() -> list[Entry]:
    """Six entries, one of each kind that version 1 had."""
    book: list[Entry] = []
    book.append(
        ledger.open_balance(
            book,
            at=AT,
            unit="party",
            subject=SUBJECT,
            reservation_id="before",
            event=SUM.repeated(2),
            charged_rounds=2,
            reason="carried over",
        )
    )
    book.append(reserve(book, 1))
    book.append(ledger.finalise(book, name(1), at=AT))
    book.append(
        reserve(book, 2, unit="example", subject="dataset:randhie", event=STEPS, reservation_id="job-1/2/example")
    )
    book.append(ledger.give_back(book, "job-1/2/example", at=AT, reason="cancelled before training"))
    book.append(refuse(book, 1, job_id="job-2", event=SUM))
    return book


def test_a_ledger_verifies_and_survives_its_export(entries: list[Entry]) -> None:
    head = verify_chain(entries)
    assert head == entries[-1].digest
    assert verify_chain([]) == GENESIS
    lines = [to_line(entry) for entry in entries]
    assert all(line.isascii() and "\n" not in line for line in lines)
    assert verify_lines(lines) == entries
    assert verify_lines([line.encode() + b"\n" for line in lines], known_heads=[head, entries[1].digest]) == entries
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6]


def test_the_digest_can_be_recomputed_with_a_shell(entries: list[Entry]) -> None:
    """A second implementation from the description: domain, then the sorted JSON without digest and signature."""
    for line in map(to_line, entries):
        fields = json.loads(line)
        digest, signature = fields.pop("digest"), fields.pop("signature")
        assert (fields["version"], signature) == (3, "")
        body = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(b"sotto.v1.ledger-entry\0" + body.encode()).hexdigest() == digest
        assert not any(isinstance(value, float) for value in fields.values())


def test_any_byte_changed_anywhere_is_detected_and_its_entry_named(entries: list[Entry]) -> None:
    """Every position of every line, with one bit flipped."""
    lines = [to_line(entry).encode() for entry in entries]
    for number, line in enumerate(lines, start=1):
        for position in range(len(line)):
            bent = bytearray(line)
            bent[position] ^= 1 << (position % 8)
            with pytest.raises(LedgerError) as caught:
                verify_lines([*lines[: number - 1], bytes(bent), *lines[number:]])
            assert caught.value.metadata["entry"] == str(number)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_other_byte_in_its_place_is_detected_too(data: st.DataObject) -> None:
    book: list[Entry] = []
    for number in range(1, 4):
        book.append(reserve(book, number))
    lines = [to_line(entry).encode() for entry in book]
    number = data.draw(st.integers(1, 3))
    position = data.draw(st.integers(0, len(lines[number - 1]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != lines[number - 1][position]))
    bent = bytearray(lines[number - 1])
    bent[position] = value
    lines[number - 1] = bytes(bent)
    with pytest.raises(LedgerError) as caught:
        verify_lines(lines)
    assert caught.value.metadata["entry"] == str(number)


def test_removal_reordering_and_repetition_are_detected_and_named(entries: list[Entry]) -> None:
    for place in range(1, len(entries)):
        cases = {
            "removed": entries[: place - 1] + entries[place:],
            "swapped": [*entries[: place - 1], entries[place], entries[place - 1], *entries[place + 1 :]],
            "repeated": entries[:place] + entries[place - 1 :],
        }
        for case, book in cases.items():
            with pytest.raises(LedgerError) as caught:
                verify_chain(book)
            assert caught.value.metadata["entry"] == str(place + (case == "repeated"))


def test_a_ledger_cut_at_its_end_or_rewritten_lacks_a_known_head(entries: list[Entry]) -> None:
    head = entries[-1].digest
    verify_chain(entries[:-1])
    with pytest.raises(LedgerError):
        verify_chain(entries[:-1], known_heads=[head])
    rewritten: list[Entry] = []
    for number in range(1, 4):
        rewritten.append(reserve(rewritten, number))
    with pytest.raises(LedgerError):
        verify_chain(rewritten, known_heads=[head])


def test_a_well_chained_entry_that_breaks_a_rule_is_named(entries: list[Entry]) -> None:
    """Whoever can recompute digests still cannot make a ledger that gives back what is final."""

    def chained(**changes: object) -> list[Entry]:
        final = entries[2]
        fields: dict[str, object] = {
            "at": AT,
            "kind": "returned",
            "job_id": final.job_id,
            "round": final.round,
            "unit": final.unit,
            "subject": final.subject,
            "reservation_id": final.reservation_id,
            **changes,
        }
        return [*entries, ledger.append(entries[-1], **fields)]  # type: ignore[arg-type]

    for changes in (
        {},
        {"kind": "final"},
        {"reservation_id": "never reserved"},
        {"reservation_id": "before"},
        {"kind": "reservation", "charged_rounds": 1, "event": SUM},
    ):
        with pytest.raises(LedgerError) as caught:
            verify_chain(chained(**changes))
        assert caught.value.metadata["entry"] == "7"


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "0" * 64},
        {"previous": "1" * 64},
        {"sequence": 7},
        {"charged_rounds": 0},
        {"reason": "another"},
        {"event": replace(SUM, noise_multiplier=99.0)},
    ],
)
def test_a_changed_field_is_detected(entries: list[Entry], changes: dict[str, object]) -> None:
    with pytest.raises(LedgerError) as caught:
        verify_chain([entries[0], replace(entries[1], **changes), *entries[2:]])  # type: ignore[arg-type]
    assert caught.value.metadata["entry"] == "2"


def test_an_entry_moved_onto_another_history_is_detected(entries: list[Entry]) -> None:
    """Its own digest is right: only the link to the entry before is not."""
    moved = replace(entries[1], previous="1" * 64)
    moved = replace(moved, digest=ledger.entry_digest(moved))
    with pytest.raises(LedgerError, match="does not follow") as caught:
        verify_chain([entries[0], moved, *entries[2:]])
    assert caught.value.metadata["entry"] == "2"


LINE = to_line(reserve([], 1))
ORDERED = to_line(reserve([], 1, scientist="ann"))
REJECTED: dict[str, str | bytes] = {
    "empty": "",
    "not JSON": "{",
    "not an object": "[]",
    "deep": "[" * 100_000,
    "huge number": LINE.replace('"sequence":1', '"sequence":' + "9" * 5_000),
    "field missing": LINE.replace(',"version":3', ""),
    "field unknown": LINE.replace('{"at"', '{"aa":1,"at"'),
    "field twice": LINE.replace('{"at"', '{"at":"x","at"'),
    "space": LINE.replace(":", ": ", 1),
    "version": LINE.replace('"version":3', '"version":4'),
    "a version that is no number": LINE.replace('"version":3', '"version":"3"'),
    "the fields of version 1": LINE.replace('"version":3', '"version":1'),
    "a scientist in version 2": ORDERED.replace('"version":3', '"version":2'),
    "another type of scientist": ORDERED.replace('"scientist":"ann"', '"scientist":1'),
    "a scientist who is not named": ORDERED.replace('"scientist":"ann"', '"scientist":""'),
    "another relation": LINE.replace("REPLACE_SPECIAL", "ADD_OR_REMOVE_ONE"),
    "figures that are no object": LINE.replace('"figures":{}', '"figures":[]'),
    "a figure that is no text": LINE.replace('"figures":{}', '"figures":{"a":1}'),
    "a correction without a limit": LINE.replace('"correction":null', '"correction":{"action":"set"}'),
    "real for an integer": LINE.replace('"sequence":1', '"sequence":1.0'),
    "bool for an integer": LINE.replace('"sequence":1', '"sequence":true'),
    "text for an integer": LINE.replace('"round":1', '"round":"1"'),
    "another type of user": LINE.replace('"user":""', '"user":null'),
    "parties that are no list": LINE.replace('"previous"', '"parties":"a","previous"'),
    "a party that is no text": LINE.replace('"previous"', '"parties":[1],"previous"'),
    "parties of whom none is named": LINE.replace('"previous"', '"parties":[],"previous"'),
    "another type of signature": LINE.replace('"signature":""', '"signature":0'),
    "event unknown": LINE.replace("noisy_sum", "noisy_sun"),
    "two line feeds": LINE + "\n\n",
    "carriage return": LINE + "\r\n",
    "not ASCII": LINE.encode().replace(b"job-1", b"job-\xff"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_line_that_is_not_canonical_is_refused_and_named(case: str) -> None:
    assert REJECTED[case] != LINE
    with pytest.raises(LedgerError, match="line 9"):
        from_line(REJECTED[case], number=9)


@pytest.mark.parametrize(
    "changes",
    [
        {"at": "yesterday"},
        {"at": "2025-06-01T12:00:00"},
        {"at": "2025-06-01T12:00:00+02:00"},
        {"unit": "user"},
        {"subject": ""},
        {"reservation_id": ""},
        {"round": -1},
        {"charged_rounds": 0},
        {"charged_rounds": -1},
        {"event": STEPS},
        {"reason": "x" * 501},
        {"parties": ("a", "")},
    ],
)
def test_a_reservation_that_no_ledger_accepts_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        reserve([], 1, **changes)


def test_reserving_the_same_again_gives_the_entry_that_is_there(entries: list[Entry]) -> None:
    assert reserve(entries, 1, at="2026-01-01T00:00:00Z", reason="asked again") is entries[1]
    for changes in ({"event": SUM.repeated(2)}, {"charged_rounds": 2}, {"job_id": "job-9"}, {"round": 3}):
        with pytest.raises(ConflictError):
            reserve(entries, 1, **{"reservation_id": name(1), **changes})


def test_a_reservation_given_back_is_not_reserved_again(entries: list[Entry]) -> None:
    """Else a repeated request would take the old entry for a charge that no longer counts."""
    with pytest.raises(ConflictError):
        reserve(entries, 2, unit="example", subject="dataset:randhie", event=STEPS, reservation_id="job-1/2/example")


def test_settling_is_idempotent_and_final_is_final(entries: list[Entry]) -> None:
    assert ledger.finalise(entries, name(1), at=AT) is entries[2]
    assert ledger.give_back(entries, "job-1/2/example", at=AT, reason="again") is entries[4]
    with pytest.raises(LedgerError):
        ledger.give_back(entries, name(1), at=AT, reason="please")
    with pytest.raises(LedgerError):
        ledger.finalise(entries, "job-1/2/example", at=AT)
    with pytest.raises(LedgerError):
        ledger.give_back(entries, "before", at=AT, reason="please")
    with pytest.raises(NotFoundError):
        ledger.finalise(entries, f"job-2/1/party/{SUBJECT}", at=AT)  # was refused, never reserved


@dataclass
class Model:
    """What a ledger must say, kept in the simplest way."""

    reserved: dict[int, int] = field(default_factory=dict)
    final: set[int] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)

    @property
    def spent(self) -> int:
        return sum(rounds for number, rounds in self.reserved.items() if number not in self.returned)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["reserve", "final", "return", "refuse"]), st.integers(0, 5), st.integers(1, 3)),
    max_size=30,
)


def step(book: list[Entry], model: Model, operation: tuple[str, int, int]) -> Entry:
    """One operation on both; raises where the ledger refuses it."""
    kind, number, rounds = operation
    if kind == "reserve":
        entry = reserve(book, number, charged_rounds=rounds, event=SUM.repeated(rounds))
        assert model.reserved.setdefault(number, rounds) == rounds
        assert number not in model.returned
    elif kind == "final":
        entry = ledger.finalise(book, name(number), at=AT)
        model.final.add(number)
    elif kind == "return":
        entry = ledger.give_back(book, name(number), at=AT, reason="nothing left")
        model.returned.add(number)
    else:
        entry = refuse(book, number)
    return entry


@settings(deadline=None, max_examples=60)
@given(operations=OPERATIONS)
def test_what_was_reserved_and_not_returned_is_spent_whatever_happens(operations: list[tuple[str, int, int]]) -> None:
    """Random operations against the model; the chain holds after each, refused ones leave no trace."""
    book: list[Entry] = []
    model = Model()
    for operation in operations:
        try:
            entry = step(book, model, operation)
        except (ConflictError, LedgerError, NotFoundError):
            continue
        if entry not in book:
            book.append(entry)
        spent = sum(charge.entry.charged_rounds for charge in ledger.charges(book).values() if charge.counts)
        assert spent == model.spent
        assert not model.final & model.returned
    assert verify_lines([to_line(entry) for entry in book]) == book
    seen = balance(book, BUDGET)
    assert seen.rounds_spent == model.spent
    assert sum(event.rounds for event in seen.events if isinstance(event, NoisySum)) == model.spent


# --- what version 2 added ------------------------------------------------------------------------------------------


LIMIT = Limit(max_rounds=7, epsilon=4.0, delta=1e-5)


def correct(entries: list[Entry], **changes: object) -> Entry:
    fields: dict[str, object] = {
        "at": AT,
        "unit": "example",
        "subject": "dataset:randhie",
        "action": "set",
        "limit": LIMIT,
        "reason": "the board said so",
        **changes,
    }
    return ledger.correct(entries, **fields)  # type: ignore[arg-type]


@pytest.fixture
def newer(entries: list[Entry]) -> list[Entry]:
    """And what version 2 added: a release, corrections, a charge with a user."""
    book = [*entries, ledger.release(entries, name(1), at=AT, figures={"root": "ab", "contributors": "3"})]
    book.append(correct(book, subject="dataset:*", action="configured", reason=""))
    book.append(correct(book, limit=Limit(max_rounds=None, epsilon=0.5, delta=1e-6)))
    book.append(correct(book, action="reset", limit=None))
    book.append(reserve(book, 9, unit="example", subject="dataset:randhie", event=STEPS, user="ada"))
    return book


def test_what_version_2_added_survives_its_export_and_is_chained(newer: list[Entry]) -> None:
    lines = [to_line(entry) for entry in newer]
    assert verify_lines(lines, known_heads=[newer[-1].digest]) == newer
    release, correction = json.loads(lines[6]), json.loads(lines[8])
    assert (release["figures"], release["relation"]) == ({"root": "ab", "contributors": "3"}, "REPLACE_SPECIAL")
    assert correction["correction"] == {
        "action": "set",
        "limit": {"max_rounds": None, "epsilon": "0.5", "delta": "1e-06"},
    }
    assert json.loads(lines[10])["user"] == "ada"


def test_any_byte_of_a_line_of_version_2_is_detected_when_it_changes(newer: list[Entry]) -> None:
    """Every position of the lines with something new in them; a signature's bytes are the verifier's of signatures."""
    lines = [to_line(entry).encode() for entry in newer]
    for number in (7, 9, 11):
        line = lines[number - 1]
        for position in range(len(line)):
            bent = bytearray(line)
            bent[position] ^= 1 << (position % 7)
            with pytest.raises(LedgerError) as caught:
                verify_lines([*lines[: number - 1], bytes(bent), *lines[number:]])
            assert caught.value.metadata["entry"] == str(number)


def test_lines_of_version_1_are_read_and_written_as_they_are_and_never_follow_newer_ones(entries: list[Entry]) -> None:
    old = [from_line(line) for line in OLD]
    assert [to_line(entry) for entry in old] == OLD
    assert verify_chain(old) == old[-1].digest
    assert {(entry.version, entry.user, entry.figures, entry.signature) for entry in old} == {(1, "", (), "")}
    book = [*old, reserve(old, 9)]
    verify_chain(book)
    known = charges(book)["job-1/1"].entry
    assert known.event is not None
    again = reserve(book, 1, subject=known.subject, reservation_id="job-1/1", event=known.event)
    assert again is known
    downgraded = replace(book[-1], version=1, sequence=book[-1].sequence + 1, previous=book[-1].digest)
    downgraded = replace(downgraded, reservation_id="another", digest="")
    downgraded = replace(downgraded, digest=ledger.entry_digest(downgraded))
    with pytest.raises(LedgerError, match="older version"):
        verify_chain([*book, downgraded])


def test_who_ordered_a_charge_or_what_was_refused_stands_in_it_and_in_nothing_else(entries: list[Entry]) -> None:
    """Beside the user, whose data it is about; what settles or shows the charge does not say it again."""
    book = [*entries, reserve(entries, 3, user="ada", scientist="ann")]
    book.append(refuse(book, 4, event=SUM, scientist="ann"))
    book.append(ledger.finalise(book, name(3), at=AT))
    book.append(ledger.release(book, name(3), at=AT, figures={"root": "ab"}))
    lines = [to_line(entry) for entry in book]
    assert verify_lines(lines) == book
    assert [(entry.user, entry.scientist) for entry in book[6:]] == [
        ("ada", "ann"),
        ("", "ann"),
        ("ada", ""),
        ("ada", ""),
    ]
    assert ["scientist" in json.loads(line) for line in lines[5:]] == [False, True, True, False, False]
    for kind in ("final", "returned", "release", "correction"):
        forged = replace(book[-1], kind=kind, figures=(), scientist="ann")
        assert "names a scientist" in problem(forged) or kind == "correction"
        assert problem(forged)
    assert problem(replace(book[6], version=2)) == "version 2 names no scientist"


def test_the_same_round_ordered_by_another_is_another_charge(entries: list[Entry]) -> None:
    book = [*entries, reserve(entries, 3, scientist="ann")]
    assert reserve(book, 3, scientist="ann") is book[-1]
    for other in ("", "bob"):
        with pytest.raises(ConflictError, match="another content"):
            reserve(book, 3, scientist=other)


def test_lines_of_version_2_are_read_and_written_as_they_are_and_never_follow_those_of_version_3() -> None:
    lines = json.loads((VECTORS / "ledger_2.json").read_text("utf-8"))["lines"]
    old = verify_lines(lines)
    assert [to_line(entry) for entry in old] == lines
    assert {entry.version for entry in old} == {1, 2}
    book = [*old, reserve(old, 9)]
    verify_chain(book)
    follows = replace(old[-1], sequence=len(book) + 1, previous=book[-1].digest, reservation_id="another", digest="")
    with pytest.raises(LedgerError, match="older version"):
        verify_chain([*book, replace(follows, digest=ledger.entry_digest(follows))])


def test_nothing_is_released_that_is_not_final(entries: list[Entry]) -> None:
    book = [*entries, reserve(entries, 3)]
    for key, why in ((name(3), "not final"), ("job-1/2/example", "not final"), ("before", "not final")):
        with pytest.raises(LedgerError, match=why):
            ledger.release(book, key, at=AT, figures={})
    with pytest.raises(NotFoundError):
        ledger.release(book, "job-2/1", at=AT, figures={})
    released = ledger.release(book, name(1), at=AT, figures={"root": "ab"})
    book.append(released)
    assert ledger.release(book, name(1), at=AT, figures={"root": "cd"}) is released
    assert charges(book)[name(1)].released is released
    fields = {"at": AT, "job_id": "job-1", "unit": "party", "subject": SUBJECT, "reason": ""}
    for number, key in ((3, name(3)), (1, name(1))):
        forged = ledger.append(book[-1], kind="release", round=number, reservation_id=key, **fields)  # type: ignore[arg-type]
        with pytest.raises(LedgerError, match="is not final, or was released before"):
            verify_chain([*book, forged])


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": ""},
        {"reason": "  "},
        {"action": "raise"},
        {"limit": None},
        {"action": "reset", "subject": "dataset:*", "limit": None},
        {"subject": ""},
        {"unit": "user"},
    ],
)
def test_a_correction_that_no_ledger_accepts_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        correct([], **changes)


@pytest.mark.parametrize(
    "figures",
    [{"Root": "x"}, {"": "x"}, {"root": "x" * 501}, {f"f{number}": "" for number in range(33)}],
)
def test_figures_that_no_ledger_accepts_are_refused(entries: list[Entry], figures: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        ledger.release(entries, name(1), at=AT, figures=figures)


@pytest.mark.parametrize(
    ("max_rounds", "epsilon", "delta"),
    [(-1, None, 0.5), (None, -1.0, 0.5), (None, math.inf, 0.5), (None, math.nan, 0.5), (1, 1.0, 0.0), (1, 1.0, 1.0)],
)
def test_a_limit_out_of_range_is_refused(max_rounds: int | None, epsilon: float | None, delta: float) -> None:
    with pytest.raises(InvalidInput):
        Limit(max_rounds=max_rounds, epsilon=epsilon, delta=delta)
