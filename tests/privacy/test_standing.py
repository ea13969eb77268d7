"""What is kept up to date entry by entry is what the definitions say over all entries, whatever happened in between."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import ConflictError, InvalidInput, LedgerError, NotFoundError
from src.privacy import ledger
from src.privacy.accounting import epsilon
from src.privacy.budget import Account, Budget, balance, check_affordable, concerns, epsilon_spent, resets
from src.privacy.entries import Limit, entry_digest
from src.privacy.events import DpSgdSteps, Event, NoisySum, NonPrivate, Unit
from src.privacy.ledger import Charge, Entry
from src.privacy.standing import Standing

DELTA = 1e-5
LIMIT = Limit(max_rounds=9, epsilon=None, delta=DELTA)
EVENTS: dict[Unit, list[Event]] = {
    "party": [NoisySum(noise_multiplier=4.0), NoisySum(noise_multiplier=4.0, rounds=2), NoisySum(noise_multiplier=8.0)],
    "example": [
        DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=20),
        NonPrivate(unit="example", reason="no noise"),
    ],
}
SUBJECTS: dict[Unit, list[str]] = {"party": ["federation:demo", "party:a"], "example": ["dataset:x", "dataset:y"]}
NAMES = ["", "a", "b"]
ACCOUNTS: list[Account] = [
    (unit, subject)
    for unit in ("party", "example")
    for subject in (
        *("federation:demo", "federation:*", "party:a", "party:b", "party:c", "party:"),
        *("dataset:x", "dataset:y", "user:a", "user:b", "user:", "job:j1", "job:j2", "job:"),
    )
]


# --- the definitions, over all entries each time ----------------------------------------------------------------------


def spent_by_definition(entries: list[Entry], account: Account, *, ever: bool) -> tuple[int, Counter[Event]]:
    """Every charge that was not given back; since a reset not those that were over by then."""
    start = 0 if ever else max((entry.sequence for entry in entries if resets(entry, account)), default=0)
    rounds, events = 0, Counter[Event]()
    for charge in charges_by_definition(entries).values():
        last = charge.released or charge.settled or charge.entry
        over = charge.entry.kind == "opening_balance" or charge.released is not None
        over = over or (charge.settled is not None and charge.settled.version == 1)
        returned = charge.settled is not None and charge.settled.kind == "returned"
        if concerns(charge.entry, account) and not returned and (last.sequence > start or not over):
            rounds += charge.entry.charged_rounds
            events[charge.entry.event] += 1  # type: ignore[index]  # a charge has one
    return rounds, events


def charges_by_definition(entries: list[Entry]) -> dict[str, Charge]:
    found: dict[str, Charge] = {}
    for entry in entries:
        if entry.kind in ("reservation", "opening_balance"):
            found[entry.reservation_id] = Charge(entry, None)
        elif entry.kind in ("final", "returned"):
            found[entry.reservation_id] = replace(found[entry.reservation_id], settled=entry)
        elif entry.kind == "release":
            found[entry.reservation_id] = replace(found[entry.reservation_id], released=entry)
    return found


# --- random ledgers ---------------------------------------------------------------------------------------------------


@st.composite
def _charge(draw: Any) -> tuple[str, dict[str, Any]]:
    unit: Unit = draw(st.sampled_from(["party", "example"]))
    parties = draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=2, unique=True)) if unit == "party" else []
    return "reserve", {
        "unit": unit,
        "subject": draw(st.sampled_from(SUBJECTS[unit])),
        "event": draw(st.sampled_from(EVENTS[unit])),
        "job_id": draw(st.sampled_from(["", "j1", "j2"])),
        "round": draw(st.integers(1, 3)),
        "user": draw(st.sampled_from(NAMES)),
        "parties": sorted(parties),
    }


OPERATIONS = st.lists(
    st.one_of(
        _charge(),
        st.tuples(st.sampled_from(["finalise", "give_back", "release", "open_balance"]), st.integers(0, 30)),
        st.tuples(
            st.sampled_from(["reset", "set", "configured"]), st.sampled_from([a for a in ACCOUNTS if a[1][-1] != ":"])
        ),
        st.tuples(st.just("refuse"), st.integers(0, 3)),
    ),
    max_size=40,
)


def write(entries: list[Entry], operation: str, what: Any) -> None:
    """One operation as the rules allow it; what they refuse changes nothing."""
    day = f"2026-01-0{1 + len(entries) // 12}T00:00:00Z"
    known = [entry.reservation_id for entry in entries if entry.kind in ("reservation", "opening_balance")]
    key = f"r{len(entries)}"
    try:
        if operation == "reserve":
            entry = ledger.reserve(entries, at=day, reservation_id=key, **what)
        elif operation == "open_balance":
            entry = ledger.open_balance(
                entries,
                at=day,
                unit="example",
                subject="dataset:x",
                reservation_id=key,
                event=EVENTS["example"][0],
                charged_rounds=what,
                reason="",
                user=NAMES[what % 3],
            )
        elif operation == "refuse":
            fields: dict[str, Any] = {"job_id": "j1", "round": what, "unit": "party", "subject": "federation:demo"}
            entry = ledger.refuse(entries, at=day, reservation_id=f"x{what}", event=None, reason="no", **fields)
        elif operation in ("reset", "set", "configured"):
            unit, subject = what
            limit = None if operation == "reset" else LIMIT
            entry = ledger.correct(
                entries,
                at=day,
                unit=unit,
                subject=subject,
                action=operation,  # type: ignore[arg-type]
                limit=limit,
                reason="because",
            )
        else:
            chosen = known[what % len(known)] if known else "none"
            more: dict[str, Any] = {"figures": {}} if operation == "release" else {"reason": ""}
            rule: Callable[..., Entry] = getattr(ledger, operation)
            entry = rule(entries, chosen, at=day, **more)
    except (ConflictError, InvalidInput, LedgerError, NotFoundError):
        return
    if entry.sequence == len(entries) + 1:
        entries.append(entry)


def grown(operations: list[tuple[str, Any]], *, of_version_1: int) -> list[Entry]:
    entries: list[Entry] = []
    for operation, what in operations:
        write(entries, operation, what)
    old: list[Entry] = []
    for entry in entries:  # the first of them as version 1 would have written them
        bare = entry.kind not in ("release", "correction") and not entry.user and not entry.parties
        if len(old) < of_version_1 and bare and len(old) == entry.sequence - 1:
            entry = replace(entry, version=1, previous=old[-1].digest if old else ledger.GENESIS)
        elif old:
            entry = replace(entry, previous=old[-1].digest)
        old.append(replace(entry, digest=entry_digest(entry)))
    return old


@settings(deadline=None, max_examples=300)
@given(operations=OPERATIONS, of_version_1=st.integers(0, 6))
def test_entry_by_entry_it_stands_as_the_definitions_say(operations: list[tuple[str, Any]], of_version_1: int) -> None:
    entries = grown(operations, of_version_1=of_version_1)
    standing = Standing()
    for count, entry in enumerate(entries, start=1):
        assert standing.apply(entry) == ""
        so_far = entries[:count]
        for account in ACCOUNTS:
            for ever in (False, True):
                assert standing.spent(account, ever=ever) == spent_by_definition(so_far, account, ever=ever)
            starts = [each.sequence for each in so_far if resets(each, account)]
            assert standing.period_start(account) == max(starts, default=0)
            assert standing.periods(account) == 1 + len(starts)
            here = [
                each
                for each in charges_by_definition(so_far).values()
                if (each.entry.unit, each.entry.subject) == account
            ]
            assert standing.charged("j1", account) == sum(each.entry.job_id == "j1" for each in here)
    assert dict(standing.charges) == charges_by_definition(entries)
    assert standing.digests == {ledger.GENESIS, *(entry.digest for entry in entries)}
    assert standing.invited == {name for entry in entries for name in entry.parties}
    corrected = [entry for entry in entries if entry.correction is not None]
    assert standing.reasons == [entry.reason for entry in corrected]
    limits = {
        (each.unit, each.subject): each.correction.limit
        for each in corrected
        if each.correction and each.correction.limit
    }
    assert standing.limits == limits
    by_hand = {(each.unit, each.subject) for each in corrected if each.correction and each.correction.action == "set"}
    assert standing.set_by_hand == by_hand


@settings(deadline=None, max_examples=60)
@given(operations=OPERATIONS)
def test_counted_together_events_cost_what_they_cost_one_by_one_to_the_last_bit(
    operations: list[tuple[str, Any]],
) -> None:
    entries = grown(operations, of_version_1=0)
    standing = Standing.of(entries)
    for unit, subject in ACCOUNTS:
        budget = Budget(unit=unit, subject=subject, max_rounds=None, epsilon=None, delta=DELTA)
        found = balance(standing, budget)
        one_by_one = list(spent_by_definition(entries, (unit, subject), ever=False)[1].elements())
        assert Counter(found.events) == Counter(one_by_one)
        cost = epsilon(one_by_one, delta=DELTA)
        assert found.epsilon_spent == epsilon_spent(standing, (unit, subject), delta=DELTA) == cost
        assert balance(entries, budget).epsilon_spent == cost  # given as entries it is the same


@settings(deadline=None, max_examples=100)
@given(operations=OPERATIONS)
def test_returns_and_refusals_are_counted_by_day(operations: list[tuple[str, Any]]) -> None:
    entries = grown(operations, of_version_1=0)
    standing = Standing.of(entries)
    for day in {entry.at[:10] for entry in entries}:
        of_day = [entry for entry in entries if entry.at[:10] == day]
        returned = {(entry.job_id, entry.round) for entry in of_day if entry.kind == "returned"}
        assert standing.returns(day) == standing.returns(f"{day}T12:00:00Z") == len(returned)
        assert standing.returns_of_job("j1", day) == sum(job == "j1" for job, _ in returned)
        assert standing.refused(day) == {
            (each.reservation_id, each.reason) for each in of_day if each.kind == "refusal"
        }


def test_an_entry_that_breaks_a_rule_changes_nothing() -> None:
    entries = grown(
        [
            (
                "reserve",
                {
                    "unit": "party",
                    "subject": "federation:demo",
                    "event": EVENTS["party"][0],
                    "job_id": "j1",
                    "round": 1,
                    "user": "",
                    "parties": [],
                },
            )
        ],
        of_version_1=0,
    )
    standing = Standing.of(entries)
    fields: dict[str, Any] = {
        "at": "2026-01-01T00:00:00Z",
        "job_id": "j1",
        "round": 1,
        "unit": "party",
        "subject": "federation:demo",
    }
    twice = ledger.append(
        entries[-1], kind="reservation", reservation_id="r0", charged_rounds=1, event=EVENTS["party"][0], **fields
    )
    unknown = ledger.append(entries[-1], kind="final", reservation_id="r9", **fields)
    early = ledger.append(entries[-1], kind="release", reservation_id="r0", **fields)
    for wrong in (twice, unknown, early):
        assert standing.apply(wrong)
        assert standing.head == entries[-1]
        assert standing.spent(("party", "federation:demo")) == (1, Counter([EVENTS["party"][0]]))


# --- what a charge costs ----------------------------------------------------------------------------------------------


def calls(work: Callable[[], object]) -> int:
    """How many functions are called, in Python or C: the same in every run, on every machine."""
    count = 0

    def look(_frame: object, what: str, _arg: object) -> None:
        nonlocal count
        count += what in ("call", "c_call")

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_what_a_check_takes_does_not_grow_with_the_rounds_that_were_charged() -> None:
    event = EVENTS["party"][0]
    budget = Budget(unit="party", subject="federation:demo", max_rounds=10_000, epsilon=1e9, delta=DELTA)

    def taken(rounds: int) -> int:
        entries: list[Entry] = []
        for number in range(rounds):
            fields: dict[str, Any] = {"unit": "party", "subject": "federation:demo", "event": event, "job_id": "j1"}
            head = entries[-1] if entries else None
            entries.append(
                ledger.append(
                    head,
                    at="2026-01-01T00:00:00Z",
                    kind="reservation",
                    round=number,
                    reservation_id=f"r{number}",
                    charged_rounds=1,
                    **fields,
                )
            )
        standing = Standing.of(entries)
        check_affordable(standing, budget, [(1, event)])  # whatever is done once is done
        return calls(lambda: check_affordable(standing, budget, [(1, event)]))

    assert taken(1000) <= taken(10) * 1.05
