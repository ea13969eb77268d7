"""The rules of a round as a machine: any event at any time, and what holds whatever happens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from src.aggregator.round_row import (
    AT_REST,
    LEGAL_TRANSITIONS,
    BatchStored,
    Cancel,
    Event,
    PartyFailed,
    RootCommitted,
    RoundRow,
    RoundState,
    ShareStored,
    Step,
    StepFailed,
    Tick,
    Work,
    check_follows,
    is_older,
)
from src.aggregator.rounds import (
    advance,
    next_step,
    waiting_for,
    wanted,
)
from src.errors import ConflictError, SottoError, StateError
from tests.aggregator.played_round import (
    PHASES,
    START,
    answered,
    batch_of,
    failure,
    new_row,
    performed,
    play,
    root_of,
)

NAMES = ("a", "b", "c", "d", "e")
KEPT = (
    "state",
    "roots",
    "batches",
    "frozen_list",
    "aggregate",
    "spent",
    "opening",
    "asked",
    "result",
    "evaluation",
    "settled",
)
"""What a row says of what has happened and stays so."""
STAGES = st.sampled_from([Work.CONTRIBUTE, Work.REVEAL, Work.OPEN])


class Rounds(RuleBasedStateMachine):
    """Any event at any time: from the parties, from the aggregator's steps, from the clock."""

    @initialize(
        size=st.integers(2, 4),
        noise=st.booleans(),
        custody=st.sampled_from(["threshold", "aggregator"]),
        data=st.data(),
    )
    def begin(self, size: int, noise: bool, custody: str, data: st.DataObject) -> None:
        cohort = NAMES[:size]
        holders = tuple(data.draw(st.permutations(NAMES))[: data.draw(st.integers(2, 5))])
        if custody == "aggregator":
            holders = ()
        self.now = START
        self.row = new_row(
            cohort,
            quorum=data.draw(st.integers(2, size)),
            holders=holders,
            threshold=data.draw(st.integers(2, len(holders))) if holders else 0,
            noise=noise,
        )
        self.path = [self.row.state]
        self.history = [self.row]

    def happen(self, event: Event) -> None:
        before = self.row
        try:
            after = advance(before, event, self.now)
        except (StateError, ConflictError):
            return  # refused, and nothing has changed: rows are values
        self.row = after
        if after.state is not before.state:
            self.path.append(after.state)
        check_change(before, after)
        check_follows(before, after)
        self.history.append(after)

    @invariant()
    def no_older_row_can_be_written_over_it(self) -> None:
        """Whoever read one of them, waited, and writes it with what it found: nothing that came since is lost."""
        for older in self.history:
            if any(getattr(older, name) != getattr(self.row, name) for name in KEPT):
                assert is_older(older, self.row) or older.state is self.row.state
                with pytest.raises(StateError, match="does not go on"):
                    check_follows(self.row, older)

    # --- what the aggregator does

    @rule()
    def do_the_next_step(self) -> None:
        step = next_step(self.row, self.now)
        if step is not None:
            self.happen(performed(self.row, step, self.now))

    @rule(step=st.sampled_from(Step))
    def repeat_or_mistime_a_step(self, step: Step) -> None:
        self.happen(performed(self.row, step, self.now) if step is not Step.SETTLE else Tick())

    @rule(
        step=st.sampled_from([step for step in Step if step not in (Step.SPEND, Step.SETTLE)]), rare=st.integers(0, 9)
    )
    def a_step_fails(self, step: Step, rare: int) -> None:
        if rare == 0:
            self.happen(StepFailed(step, "the disk is full"))

    @rule(rare=st.integers(0, 9))
    def cancel(self, rare: int) -> None:
        if rare == 0:
            self.happen(Cancel())

    # --- what parties do

    @rule(name=st.sampled_from(NAMES))
    def do_what_is_wanted(self, name: str) -> None:
        work = wanted(self.row, name)
        if work is not None and work is not Work.ENDED:
            self.happen(answered(work, name))

    @rule(silent=st.sampled_from(["", "", *NAMES]))
    def all_do_what_they_should(self, silent: str) -> None:
        for each in NAMES:
            if each != silent:
                self.do_what_is_wanted(each)
        self.do_the_next_step()

    @rule(name=st.sampled_from(NAMES), which=st.integers(0, 1))
    def commit_at_any_time(self, name: str, which: int) -> None:
        self.happen(RootCommitted(name, root_of(name, which)))

    @rule(name=st.sampled_from(NAMES), which=st.integers(0, 1))
    def deliver_at_any_time(self, name: str, which: int) -> None:
        self.happen(BatchStored(name, batch_of(name, which), 1))

    @rule(name=st.sampled_from(NAMES), which=st.integers(0, 1))
    def send_a_share_at_any_time(self, name: str, which: int) -> None:
        self.happen(ShareStored(name, f"share {which} of {name}"))

    @rule(name=st.sampled_from(NAMES), stage=STAGES)
    def fail(self, name: str, stage: Work) -> None:
        self.happen(PartyFailed(name, failure(stage)))

    # --- the clock

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.happen(Tick())

    # --- what always holds

    @invariant()
    def the_row_is_sound(self) -> None:
        if hasattr(self, "row"):
            check_row(self.row)

    @invariant()
    def somebody_has_the_next_move(self) -> None:
        """No round waits for nobody: the aggregator has a step, or a party has work, or it is over."""
        if hasattr(self, "row") and not self.row.at_rest:
            settled = advance(self.row, Tick(), self.now)
            assert settled.at_rest or next_step(settled, self.now) is not None or waiting_for(settled)

    @invariant()
    def the_row_alone_says_what_is_next(self) -> None:
        if hasattr(self, "row"):
            again = RoundRow.from_json(json.loads(json.dumps(self.row.to_json())))
            assert again == self.row
            assert next_step(again, self.now) is next_step(self.row, self.now)
            assert [wanted(again, name) for name in NAMES] == [wanted(self.row, name) for name in NAMES]

    def teardown(self) -> None:
        if not hasattr(self, "row"):
            return
        for before, after in zip(self.path, self.path[1:], strict=False):
            assert is_legal(before, after)
        # If all who can still answer do, the round comes to rest without the clock ...
        end = advance(self.row, Tick(), self.now)
        assert play(end, now=self.now, until=RoundState.RELEASED).at_rest
        # ... and without them it does at the deadline.
        assert advance(self.row, Tick(), self.row.deadline).at_rest


def is_legal(before: RoundState, after: RoundState) -> bool:
    """In one transition, or in two where the first needs nothing to happen in between."""
    through = {middle for start, middle in LEGAL_TRANSITIONS if start is before}
    return after in through or any((middle, after) in LEGAL_TRANSITIONS for middle in through)


def check_change(before: RoundRow, after: RoundRow) -> None:
    """What no event may undo."""
    assert after.state is before.state or is_legal(before.state, after.state)
    assert not before.at_rest or replace(after, settled=before.settled, evaluation=before.evaluation) == before
    for kept in ("roots", "batches", "bytes_up"):
        assert getattr(before, kept).items() <= getattr(after, kept).items()
    for fixed in ("frozen_list", "contributors", "opening"):
        assert not getattr(before, fixed) or getattr(before, fixed) == getattr(after, fixed)
    assert set(before.asked) <= set(after.asked)
    assert set(before.failures) - set(after.failures) <= set(after.roots)  # who failed and came back
    assert after.spent or not before.spent
    assert before.settled <= after.settled
    for name in ("job_id", "number", "plan", "plan_digest", "model_sha256", "cohort", "quorum", "holders", "threshold"):
        assert getattr(before, name) == getattr(after, name)


def check_row(row: RoundRow) -> None:
    """What holds of every row that is stored."""
    noise = {"aggregator"} if row.noise_needed else set()
    assert set(row.roots) <= set(row.cohort) | noise
    assert set(row.batches) <= set(row.roots)
    if row.state is not RoundState.PLANNED and row.state not in AT_REST:
        assert noise <= set(row.batches)
    if row.contributors:
        assert list(row.contributors) == sorted(set(row.contributors))
        assert set(row.contributors) == set(row.batches)
        assert noise <= set(row.contributors) <= set(row.committed) | noise
        assert len(set(row.contributors) - noise) >= row.quorum
    assert bool(row.contributors) or row.state not in (
        RoundState.AGGREGATING,
        RoundState.OPENING,
        RoundState.RELEASED,
    )
    assert row.spent or not (row.opening or row.asked or row.shares or row.result)
    assert set(row.shares) <= set(row.asked) <= set(row.holders)
    if row.state is RoundState.RELEASED:
        assert row.spent
        assert row.aggregate is not None
        assert row.result is not None
    else:
        assert row.result is None
    assert row.at_rest == bool(row.ended_at)
    assert bool(row.reason) == (row.state in (RoundState.FAILED, RoundState.CANCELLED))
    if row.at_rest:
        assert waiting_for(row) == ()
        unmeasured = row.state is RoundState.RELEASED and row.evaluation is None
        assert next_step(row, START) is (None if row.settled else Step.EVALUATE if unmeasured else Step.SETTLE)


Rounds.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=35)
TestRounds = Rounds.TestCase


def test_only_errors_of_the_catalogue_are_raised() -> None:
    """Every event against every state."""
    names = ("a", "z")
    for state in [*PHASES, RoundState.RELEASED]:
        row = play(replace(new_row(), state=RoundState.PLANNED, roots={}, batches={}), until=state)
        events: list[Event] = [performed(row, step, START) for step in Step]
        events += [answered(work, name) for work in (Work.CONTRIBUTE, Work.REVEAL, Work.OPEN) for name in names]
        events += [PartyFailed(name, failure()) for name in names] + [Tick(), Cancel(), StepFailed(Step.FOLD, "x")]
        for event in events:
            try:
                check_change(row, advance(row, event, START))
            except SottoError as error:
                assert isinstance(error, StateError | ConflictError), (state, event)  # noqa: PT017  # or nothing at all
