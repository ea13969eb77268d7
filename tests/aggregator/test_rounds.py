"""The rules of a round, event by event: what moves it on, what it refuses, and what it says when it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from src.aggregator.round_row import (
    AT_REST,
    LEGAL_TRANSITIONS,
    BatchStored,
    BudgetSpent,
    Cancel,
    Event,
    ListFrozen,
    PartyFailed,
    QuorumReached,
    Released,
    RootCommitted,
    RoundRow,
    RoundState,
    Settled,
    SharesAsked,
    ShareStored,
    Step,
    StepFailed,
    Tick,
    Work,
)
from src.aggregator.rounds import (
    ASK_MORE_SHARE,
    COMMIT_SHARE,
    UPLOAD_SHARE,
    advance,
    holders_to_ask,
    next_step,
    party_states,
    phase,
    waiting_for,
    wanted,
)
from src.aggregator.steps import lacking
from src.errors import ConflictError, StateError
from tests.aggregator.played_round import (
    PHASES,
    START,
    TIMEOUT,
    answered,
    batch_of,
    committed,
    failure,
    new_row,
    performed,
    play,
    root_of,
    signed,
    stored,
)

# ------------------------------------------------------------------------------------------------------ its way through


def test_the_table_of_transitions_leads_forward_or_to_an_end() -> None:
    order = list(RoundState)
    for before, after in LEGAL_TRANSITIONS:
        assert before not in AT_REST
        assert after in AT_REST or order.index(after) == order.index(before) + 1
    assert {before for before, _ in LEGAL_TRANSITIONS} == set(RoundState) - AT_REST
    for before in set(RoundState) - AT_REST:
        assert {(before, RoundState.FAILED), (before, RoundState.CANCELLED)} <= LEGAL_TRANSITIONS
    assert (RoundState.AGGREGATING, RoundState.RELEASED) not in LEGAL_TRANSITIONS


@pytest.mark.parametrize("noise", [True, False], ids=["with the aggregator's noise", "without"])
def test_a_round_in_which_all_goes_well(noise: bool) -> None:
    row, now = new_row(noise=noise), START
    steps: list[Step | Work] = []
    states = [row.state]
    while not (row.at_rest and row.settled):
        step = next_step(row, now)
        if step is not None:
            steps.append(step)
            row = advance(row, performed(row, step, now), now)
        else:
            name = waiting_for(row)[0]
            work = wanted(row, name)
            assert work is not None
            steps.append(work)
            row = advance(row, answered(work, name), now)
        now += 1
        if row.state is not states[-1]:
            states.append(row.state)
    assert steps == [
        *([Step.MAKE_NOISE] if noise else []),
        *[Work.CONTRIBUTE] * 3,
        Step.FREEZE_LIST,
        *[Work.REVEAL] * 3,
        Step.FOLD,
        Step.SPEND,
        Step.ASK_SHARES,
        *[Work.OPEN] * 2,
        Step.RELEASE,
        Step.EVALUATE,
        Step.SETTLE,
    ]
    first = [] if noise else [RoundState.PLANNED]
    assert [*first, *states] == [*PHASES, RoundState.RELEASED]
    assert row.contributors == (("a", "aggregator", "b", "c") if noise else ("a", "b", "c"))
    assert row.asked == ("a", "b")
    assert (row.reason, row.result) == ("", {"model_sha256": "n" * 64})
    assert row.ended_at > START
    assert row.budgets == dict.fromkeys("abc", (0.5, None))


def test_custody_aggregator_opens_without_shares() -> None:
    row = play(new_row(holders=(), threshold=0), until=RoundState.OPENING)
    assert next_step(row, START) is Step.SPEND
    row = advance(row, BudgetSpent(), START)
    assert next_step(row, START) is Step.RELEASE
    row = advance(row, performed(row, Step.RELEASE, START), START)
    assert (row.state, row.asked, row.shares) == (RoundState.RELEASED, (), {})


def test_a_share_is_asked_for_only_after_the_budget_is_spent() -> None:
    row = play(new_row(), until=RoundState.OPENING)
    assert next_step(row, START) is Step.SPEND
    with pytest.raises(StateError, match="before the budget is spent"):
        advance(row, SharesAsked(signed("opening"), ("a",)), START)
    with pytest.raises(StateError, match="before the budget is spent"):
        advance(row, Released({}), START)
    with pytest.raises(StateError, match="not asked"):
        advance(row, ShareStored("a", "x"), START)


@pytest.mark.parametrize("state", [*PHASES, RoundState.RELEASED])
def test_a_job_that_is_cancelled_ends_its_round_wherever_it_is(state: RoundState) -> None:
    row = play(new_row(), until=state)
    assert row.state is state or state is RoundState.PLANNED
    row = advance(row, Cancel(), START + 1)
    ended = RoundState.RELEASED if state is RoundState.RELEASED else RoundState.CANCELLED
    assert row.state is ended
    assert row.reason == ("" if ended is RoundState.RELEASED else "the job was cancelled")


def test_what_was_spent_stays_spent_when_the_round_fails() -> None:
    row = advance(play(new_row(), until=RoundState.OPENING), BudgetSpent(), START)
    for event in (Cancel(), StepFailed(Step.RELEASE, "x")):
        assert advance(row, event, START).spent
    assert advance(row, Tick(), row.deadline).spent


@pytest.mark.parametrize("end", [RoundState.RELEASED, RoundState.FAILED, RoundState.CANCELLED])
def test_a_round_at_rest_stays_as_it_is(end: RoundState) -> None:
    row = play(new_row(), until=RoundState.OPENING)
    if end is RoundState.RELEASED:
        row = play(row, until=end)
    else:
        row = advance(row, Cancel(), START) if end is RoundState.CANCELLED else advance(row, Tick(), row.deadline)
    assert row.state is end
    late: list[Event] = [Tick(), Cancel(), PartyFailed("a", failure()), StepFailed(Step.FOLD, "x")]
    assert all(advance(row, event, row.deadline + 1) == row for event in late)
    refused: list[Event] = [
        committed("a"),
        stored("a"),
        ShareStored("a", "x"),
        BudgetSpent(),
        Released({}),
        ListFrozen({}),
    ]
    for event in refused:
        with pytest.raises(StateError, match=end.value):
            advance(row, event, START)
    assert wanted(row, "a") is Work.ENDED
    assert wanted(row, "stranger") is None
    assert advance(row, Settled(), START).settled


def test_the_same_twice_is_once_and_another_is_a_contradiction() -> None:
    row = play(new_row(), until=RoundState.TRAINING)
    row = advance(row, committed("a"), START)
    assert advance(row, committed("a"), START) == row
    with pytest.raises(ConflictError, match="party a committed to another batch"):
        advance(row, RootCommitted("a", root_of("a", 1)), START)
    row = play(row, until=RoundState.COLLECTING)
    assert advance(row, committed("a"), START) == row
    row = advance(advance(row, ListFrozen(signed("list")), START), stored("a"), START)
    assert advance(row, stored("a"), START) == row
    with pytest.raises(ConflictError, match="party a already delivered another"):
        advance(row, BatchStored("a", batch_of("a", 1), 1), START)


def test_the_list_is_frozen_once() -> None:
    row = play(new_row(), until=RoundState.COLLECTING)
    row = advance(row, ListFrozen(signed("list")), START)
    assert advance(row, ListFrozen(signed("another list")), START) == row


@pytest.mark.parametrize(
    "event",
    [committed("z"), stored("z"), PartyFailed("z", failure()), RootCommitted("aggregator", root_of("aggregator"))],
)
def test_nobody_else_has_a_part_in_the_round(event: Event) -> None:
    for state in (RoundState.TRAINING, RoundState.COLLECTING):
        with pytest.raises(StateError, match=r"not in the cohort|no part in this round"):
            advance(play(new_row(), until=state), event, START)


def test_who_did_not_commit_is_not_on_the_list_and_delivers_nothing() -> None:
    row = play(new_row(), silent=frozenset("c"), until=RoundState.COLLECTING)
    row = play(advance(row, Tick(), START + COMMIT_SHARE * TIMEOUT), silent=frozenset("abc"), until=RoundState.OPENING)
    assert row.state is RoundState.COLLECTING
    assert set(row.roots) == {"a", "b", "aggregator"}
    assert wanted(row, "c") is None
    with pytest.raises(StateError, match="party c is not on the frozen list"):
        advance(row, stored("c"), START)
    with pytest.raises(StateError, match="is COLLECTING, not TRAINING"):
        advance(row, committed("c"), START)


def test_nothing_is_revealed_before_the_list_is_frozen() -> None:
    row = play(new_row(), until=RoundState.COLLECTING)
    assert row.frozen_list is None
    assert [wanted(row, name) for name in "abc"] == [None] * 3
    assert next_step(row, START) is Step.FREEZE_LIST
    row = advance(row, ListFrozen(signed("list")), START)
    assert [wanted(row, name) for name in "abc"] == [Work.REVEAL] * 3


# ------------------------------------------------------------------------------------ too few, too late, and who it was


def test_a_round_fails_at_once_when_its_quorum_is_out_of_reach() -> None:
    row = play(new_row(quorum=3), until=RoundState.TRAINING)
    row = advance(row, PartyFailed("b", failure(message="no budget left")), START)
    assert row.state is RoundState.FAILED
    assert row.reason.startswith("fewer than 3 parties can contribute")
    unheard = "not heard before the round failed"
    assert row.reason.endswith(f" (b: no budget left [REFUSED]; a: {unheard}; c: {unheard})")
    assert lacking(row) == ("b",)


def test_a_round_that_can_still_have_its_quorum_goes_on_without_who_failed() -> None:
    row = advance(play(new_row(), until=RoundState.TRAINING), PartyFailed("b", failure()), START)
    assert row.state is RoundState.TRAINING
    assert wanted(row, "b") is None
    row = play(row, until=RoundState.RELEASED)
    assert row.contributors == ("a", "aggregator", "c")


def test_who_failed_and_comes_back_in_time_is_in_again() -> None:
    row = advance(play(new_row(), until=RoundState.TRAINING), PartyFailed("b", failure()), START)
    row = advance(row, committed("b"), START)
    assert row.failures == {}
    assert "b" in play(row, until=RoundState.RELEASED).contributors


def test_a_quorum_missed_while_training_names_the_silent_and_the_failing() -> None:
    row = advance(play(new_row(quorum=2), until=RoundState.TRAINING), PartyFailed("b", failure()), START)
    row = advance(row, committed("a"), START)
    closing = START + COMMIT_SHARE * TIMEOUT
    assert advance(row, Tick(), closing - 1) == row
    row = advance(row, Tick(), closing)
    assert row.state is RoundState.FAILED
    assert row.reason.startswith("fewer than 2 parties contributed in time (b: it rained [REFUSED]; c: no answer yet: ")


def test_who_is_ready_and_waits_for_others_is_said_to_be_so_while_it_waits_and_when_it_was_in_vain() -> None:
    """And is not waited for, as is who has said nothing yet."""
    row, ready = play(new_row(quorum=3), until=RoundState.TRAINING), frozenset("ab")
    assert (waiting_for(row), phase(row)) == (("a", "b", "c"), "training")
    assert (waiting_for(row, ready), phase(row, ready)) == (
        ("c",),
        "2 of the 3 parties that it needs are ready",
    )
    assert dict(party_states(row, frozenset("ab"), ready)) == {"a": "READY", "b": "READY", "c": "AWAY"}
    closing, said = START + COMMIT_SHARE * TIMEOUT, "ready to train, and waited for others"
    for failed, silent in (
        (advance(row, Tick(), closing, ready=ready), "c: no answer yet: training, or away"),
        (advance(row, PartyFailed("c", failure(message="no budget left")), START, ready=ready), "c: no budget left "),
    ):
        assert failed.state is RoundState.FAILED
        assert silent in failed.reason
        assert failed.reason.endswith(f"; a: {said}; b: {said})")


def test_a_latecomer_is_left_out_and_the_round_goes_on_with_the_quorum() -> None:
    row = play(new_row(), silent=frozenset("c"), until=RoundState.COLLECTING)
    assert row.state is RoundState.TRAINING
    row = advance(row, Tick(), START + COMMIT_SHARE * TIMEOUT)
    assert row.state is RoundState.COLLECTING
    assert play(row, now=START + 61, until=RoundState.RELEASED).contributors == ("a", "aggregator", "b")


def test_who_delivers_too_late_is_left_out_while_there_is_a_quorum() -> None:
    row = play(new_row(), until=RoundState.COLLECTING)
    row = play(row, silent=frozenset("b"), until=RoundState.AGGREGATING)
    assert waiting_for(row) == ("b",)
    row = advance(row, Tick(), START + UPLOAD_SHARE * TIMEOUT)
    assert (row.state, row.contributors) == (RoundState.AGGREGATING, ("a", "aggregator", "c"))
    with pytest.raises(StateError):
        advance(row, stored("b"), START)


def test_a_quorum_missed_while_collecting_names_who_did_not_deliver() -> None:
    row = play(play(new_row(quorum=3), until=RoundState.COLLECTING), silent=frozenset("b"), until=RoundState.OPENING)
    other = play(play(new_row(quorum=3), until=RoundState.COLLECTING), silent=frozenset("bc"), until=RoundState.OPENING)
    between = START + (COMMIT_SHARE + UPLOAD_SHARE) / 2 * TIMEOUT
    other = advance(other, PartyFailed("b", failure(Work.REVEAL, "another list")), between)
    assert other.reason.endswith("; c: committed; its update had not come before the round failed)")
    assert lacking(other) == ("b",)  # c had its time until `UPLOAD_SHARE`
    failed = advance(row, PartyFailed("b", failure(Work.REVEAL, "another list")), START)
    assert failed.reason == "fewer than 3 parties can deliver (b: another list [REFUSED])"
    late = advance(row, Tick(), START + UPLOAD_SHARE * TIMEOUT)
    assert late.reason == "fewer than 3 parties delivered in time (b: committed to an update that has not come)"
    assert lacking(late) == ("b",)


@pytest.mark.parametrize("state", PHASES)
def test_at_the_deadline_a_round_that_is_not_done_fails(state: RoundState) -> None:
    row = replace(new_row(), state=RoundState.PLANNED, roots={}, batches={})
    row = play(row, until=state)
    assert row.state is state
    failed = advance(row, Tick(), row.deadline)
    assert failed.state is RoundState.FAILED
    assert failed.reason


def test_a_round_whose_holders_do_not_answer_names_them_at_the_deadline() -> None:
    row = play(new_row(), silent=frozenset("ab"), until=RoundState.OPENING)
    row = play(row, silent=frozenset(), until=RoundState.OPENING)
    row = play(row, silent=frozenset("ab"), until=RoundState.RELEASED)
    assert waiting_for(row) == ("a", "b")
    row = advance(row, Tick(), row.deadline)
    missing = "asked for a share that has not come"
    assert row.reason == f"the round's deadline has passed (a: {missing}; b: {missing})"
    assert lacking(row) == ("a", "b")
    assert row.spent


@pytest.mark.parametrize("step", [Step.MAKE_NOISE, Step.FREEZE_LIST, Step.FOLD, Step.RELEASE])
def test_a_step_that_fails_for_good_is_named(step: Step) -> None:
    row = advance(new_row(), StepFailed(step, "the disk is full"), START)
    assert row.state is RoundState.FAILED
    assert row.reason == f"could not {step.value}: the disk is full"


# ------------------------------------------------------------------------------------------------------------ opening


def _opening(**settings: Any) -> RoundRow:
    """As many holders asked as are needed."""
    row = advance(play(new_row(**settings), until=RoundState.OPENING), BudgetSpent(), START)
    return advance(row, performed(row, Step.ASK_SHARES, START), START)


def test_instead_of_a_wrong_share_another_holder_is_asked() -> None:
    row = _opening()
    for name in row.asked:
        row = advance(row, ShareStored(name, f"share of {name}"), START)
    assert next_step(row, START) is Step.RELEASE
    row = advance(row, PartyFailed("a", failure(Work.OPEN, "the proof does not hold")), START)
    assert (row.state, set(row.shares)) == (RoundState.OPENING, {"b"})
    assert next_step(row, START) is Step.ASK_SHARES
    assert holders_to_ask(row, connected=frozenset(), now=START) == ("c",)
    row = play(row, until=RoundState.RELEASED)
    assert set(row.shares) == {"b", "c"}


def test_who_sent_a_wrong_share_sends_no_other() -> None:
    """Else one wrong share after the other could keep a round from opening until its deadline."""
    row = advance(_opening(), PartyFailed("a", failure(Work.OPEN)), START)
    assert wanted(row, "a") is None
    with pytest.raises(StateError, match="party a failed to open"):
        advance(row, ShareStored("a", "another"), START)


def test_the_first_share_of_a_holder_counts() -> None:
    row = advance(_opening(), ShareStored("a", "first"), START)
    assert advance(row, ShareStored("a", "second"), START).shares == {"a": "first"}


def test_an_upload_that_failed_late_takes_back_no_share_and_undoes_no_failure() -> None:
    row = advance(_opening(), ShareStored("a", "share of a"), START)
    row = advance(row, PartyFailed("b", failure(Work.OPEN, "refused")), START)
    for name in "ab":
        row = advance(row, PartyFailed(name, failure(Work.REVEAL, "came too late")), START)
    assert set(row.shares) == {"a"}
    assert wanted(row, "b") is None
    assert row.failures["b"].message == "refused"


def test_too_few_holders_fail_the_round_at_once() -> None:
    row = _opening()
    row = advance(row, PartyFailed("a", failure(Work.OPEN, "another aggregate")), START)
    assert row.state is RoundState.OPENING
    row = advance(row, PartyFailed("b", failure(Work.OPEN, "another list")), START)
    assert row.state is RoundState.FAILED
    assert row.reason == ("fewer than 2 parties can open (a: another aggregate [REFUSED]; b: another list [REFUSED])")


def test_no_budget_is_spent_on_an_opening_that_cannot_come() -> None:
    row = play(new_row(), until=RoundState.AGGREGATING)
    for name in "ab":
        row = advance(row, PartyFailed(name, failure(Work.OPEN)), START)
    row = advance(row, performed(row, Step.FOLD, START), START)
    assert (row.state, row.spent) == (RoundState.FAILED, False)


def test_holders_that_were_not_invited_are_asked_too() -> None:
    row = play(new_row(cohort=("a", "b"), holders=("x", "y", "a"), threshold=3), until=RoundState.OPENING)
    assert wanted(row, "x") is None
    row = play(row, silent=frozenset("x"), until=RoundState.RELEASED)
    assert set(row.asked) == {"x", "y", "a"}
    assert waiting_for(row) == ("x",)
    row = play(row, until=RoundState.RELEASED)
    assert row.state is RoundState.RELEASED
    assert wanted(row, "x") is Work.ENDED


def test_who_is_reachable_is_asked_first_and_everybody_once_time_runs_short() -> None:
    row = advance(play(new_row(), until=RoundState.OPENING), BudgetSpent(), START)
    assert holders_to_ask(row, connected=frozenset("c"), now=START) == ("c", "a")
    short = START + ASK_MORE_SHARE * TIMEOUT
    assert holders_to_ask(row, connected=frozenset("c"), now=short) == ("c", "a", "b")
    row = advance(row, SharesAsked(signed("opening"), ("c", "a")), START)
    assert next_step(row, START) is None
    assert next_step(row, short) is Step.ASK_SHARES
    row = advance(row, SharesAsked(signed("another opening"), ("b",)), short)
    assert row.asked == ("c", "a", "b")
    assert row.opening == signed("opening")
    assert next_step(row, short) is None


def test_a_row_after_a_crash_is_the_row_before_it() -> None:
    row = new_row()
    for state in [*PHASES, RoundState.RELEASED]:
        row = play(row, until=state)
        assert RoundRow.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_who_was_asked_for_a_share_and_went_away_is_not_waited_for_while_another_can_be_reached() -> None:
    row = _opening()  # a and b are asked
    for there, step in (("abc", None), ("bc", Step.ASK_SHARES), ("b", None)):
        assert next_step(row, START, connected=frozenset(there)) is step
    assert holders_to_ask(row, connected=frozenset("bc"), now=START) == ("c",)


# --- when a round's time begins ---------------------------------------------------------------------------------------


def test_whoever_begins_to_train_has_all_of_the_rounds_time_however_late_the_quorum_came() -> None:
    late = START + COMMIT_SHARE * TIMEOUT - 1
    row = advance(play(new_row(quorum=3), until=RoundState.TRAINING), QuorumReached(late), late)
    assert (row.began_at, row.deadline) == (late, late + TIMEOUT)
    closing = late + COMMIT_SHARE * TIMEOUT
    for name in ("a", "b"):
        row = advance(row, committed(name), closing - 1)
    assert advance(row, Tick(), closing - 1) == row
    assert advance(row, Tick(), closing).state is RoundState.FAILED
    row = advance(row, committed("c"), closing - 1)
    assert row.state is RoundState.COLLECTING
    assert play(row, now=closing, until=RoundState.RELEASED).state is RoundState.RELEASED


def test_a_quorum_that_does_not_come_ends_the_round_and_nobody_has_begun() -> None:
    row = play(new_row(quorum=3), until=RoundState.TRAINING)
    closing = START + COMMIT_SHARE * TIMEOUT
    assert advance(row, Tick(), closing - 1) == row
    row = advance(row, Tick(), closing)
    assert row.state is RoundState.FAILED
    assert row.reason.startswith(
        "nobody began: fewer than 3 parties could train it in time, or fewer than 2 that open it were connected"
    )
    with pytest.raises(StateError):
        advance(row, QuorumReached(closing), closing)


def test_a_quorum_is_reached_once_and_not_once_a_round_is_further_on() -> None:
    row = advance(play(new_row(), until=RoundState.TRAINING), QuorumReached(START + 1), START + 1)
    assert advance(row, QuorumReached(START + 9), START + 9) == row
    further = play(new_row(), until=RoundState.COLLECTING)
    assert advance(further, QuorumReached(START + 1), START + 1) == further


# --- parties that are away --------------------------------------------------------------------------------------------


def test_a_round_that_has_its_quorum_does_not_wait_for_who_is_away() -> None:
    row = play(new_row(), silent=frozenset("c"), until=RoundState.COLLECTING)
    assert advance(row, Tick(), START + 1) == row, "c is slow, for all that is known"
    row = advance(row, Tick(frozenset("c")), START + 1)
    assert row.state is RoundState.COLLECTING
    row = play(row, silent=frozenset("b"), until=RoundState.AGGREGATING)
    assert advance(row, Tick(frozenset("c")), START + 1) == row
    two = advance(row, Tick(frozenset("bc")), START + 1)
    assert two == row, "one delivery is no quorum: b may come back with its own"
    assert play(row, until=RoundState.RELEASED).contributors == ("a", "aggregator", "b")


def test_who_goes_away_before_its_upload_is_left_out_once_the_others_are_a_quorum() -> None:
    row = play(play(new_row(), until=RoundState.COLLECTING), silent=frozenset("b"), until=RoundState.AGGREGATING)
    row = advance(row, Tick(frozenset("b")), START + 1)
    assert (row.state, row.contributors) == (RoundState.AGGREGATING, ("a", "aggregator", "c"))


def test_without_a_quorum_a_round_waits_for_those_who_are_away_as_long_as_for_any() -> None:
    row = advance(play(new_row(), until=RoundState.TRAINING), committed("a"), START)
    away = Tick(frozenset("bc"))
    closing = START + COMMIT_SHARE * TIMEOUT
    assert advance(row, away, closing - 1) == row
    back = advance(row, committed("b"), closing - 1)
    assert advance(back, Tick(frozenset("c")), closing - 1).state is RoundState.COLLECTING
    assert advance(row, away, closing).state is RoundState.FAILED
