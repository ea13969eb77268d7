"""The rules of a round: pure functions, no clock, no network, no database.

    PLANNED -> TRAINING -> COLLECTING -> AGGREGATING -> OPENING -> RELEASED
                  any of the former -> FAILED | CANCELLED

`advance(row, event, now)` gives the next row. What the aggregator has to do next follows from the row alone
(`next_step`), and so does what a party has to do next (`wanted`): after a crash both are simply asked again. A round is
never tried twice: a failed one stays failed, and its successor has a new number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ..errors import (
    CATALOGUE,
    BudgetError,
    ConflictError,
    PlanError,
    PolicyError,
    Refused,
    RoundFailed,
    StateError,
    TaskError,
    VersionError,
)
from ..protocol.faults import lasts
from ..protocol.roster import AGGREGATOR
from .round_row import (
    AT_REST,
    LEGAL_TRANSITIONS,
    BatchStored,
    BudgetSpent,
    Cancel,
    Evaluated,
    Event,
    Folded,
    ListFrozen,
    NoiseMade,
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

COMMIT_SHARE: Final = 0.6
"""Of the round's time: when the list of roots is frozen at the latest, and how long a quorum that can train is waited
for. Training is the long part."""
UPLOAD_SHARE: Final = 0.8
"""Of the round's time: when uploads close with at least the quorum."""
ASK_MORE_SHARE: Final = 0.9
"""Of the round's time: when every holder is asked for a share, not only as many as are needed."""

LASTING_REFUSALS: Final = frozenset(
    CATALOGUE[cls].reason for cls in (BudgetError, PolicyError, PlanError, VersionError, Refused)
)
"""Reasons for which a party refuses every round of a job, not only this one."""
_ROUND_FAILED: Final = CATALOGUE[RoundFailed].reason
LEFT_OUT: Final = CATALOGUE[TaskError].reason
"""For which a round that begins leaves a party out, and a party that is asked takes no part before it is charged."""
_NOBODY: Final[frozenset[str]] = frozenset()


# --- rules ------------------------------------------------------------------------------------------------------------


def advance(row: RoundRow, event: Event, now: float, *, ready: frozenset[str] = _NOBODY) -> RoundRow:
    """The row after an event; the same row when the event changes nothing.

    Args:
        ready: who could train and waits until enough others can (`Quorums.waiting`), for what is said of a failure.

    Raises:
        StateError: when the event cannot happen in the row's state.
        ConflictError: when it contradicts what is stored (another root of the same party, another batch).
    """
    if isinstance(event, Settled):
        return replace(row, settled=True)
    if isinstance(event, Evaluated):
        return _evaluated(row, event)
    if row.at_rest:
        return _late(row, event)
    if isinstance(event, Cancel):
        return _move(row, RoundState.CANCELLED, now, reason="the job was cancelled")
    if isinstance(event, StepFailed):
        return _fail(row, now, f"could not {event.step.value}: {event.message}")
    handler = _HANDLERS[type(event)]
    after = handler(row, event)  # type: ignore[operator]  # the table pairs each event with its rule
    return _settle_phase(after, now, away=event.away if isinstance(event, Tick) else _NOBODY, ready=ready)


def _evaluated(row: RoundRow, event: Evaluated) -> RoundRow:
    _expect(row, RoundState.RELEASED)
    return replace(row, evaluation=row.evaluation or {"metrics": event.metrics, "without": event.without})


def _late(row: RoundRow, event: Event) -> RoundRow:
    """At rest only what a party could not know is taken in silence; whatever would change the round is refused."""
    if isinstance(event, Tick | Cancel | PartyFailed | StepFailed):
        return row
    raise StateError(f"round {row.number} of job {row.job_id} is {row.state.value}", state=row.state.value)


def _noise_made(row: RoundRow, event: NoiseMade) -> RoundRow:
    _expect(row, RoundState.PLANNED)
    return replace(row, roots={**row.roots, AGGREGATOR: event.root}, batches={**row.batches, AGGREGATOR: event.batch})


def _root_committed(row: RoundRow, event: RootCommitted) -> RoundRow:
    _expect_cohort(row, event.party)
    known = row.roots.get(event.party)
    if known is not None:
        if known != event.root:
            raise ConflictError(f"party {event.party} committed to another batch in this round", party=event.party)
        return row
    _expect(row, RoundState.TRAINING)
    if _left_out(row, event.party):  # nothing was reserved for it
        raise StateError(f"party {event.party} is not ready, and takes no part in this round", party=event.party)
    failures = {name: failure for name, failure in row.failures.items() if name != event.party}
    return replace(
        row,
        roots={**row.roots, event.party: event.root},
        budgets={**row.budgets, event.party: event.budget},
        failures=failures,
    )


def _quorum_reached(row: RoundRow, event: QuorumReached) -> RoundRow:
    """A round that is further on has begun: those who could train it did, or it was known before."""
    return replace(row, able_at=event.at) if row.state is RoundState.TRAINING and not row.able_at else row


def _list_frozen(row: RoundRow, event: ListFrozen) -> RoundRow:
    _expect(row, RoundState.COLLECTING)
    return row if row.frozen_list else replace(row, frozen_list=event.frozen_list)


def _batch_stored(row: RoundRow, event: BatchStored) -> RoundRow:
    _expect_cohort(row, event.party)
    known = row.batches.get(event.party)
    if known is not None:
        if known != event.batch:
            raise ConflictError(f"party {event.party} already delivered another batch", party=event.party)
        return row
    _expect(row, RoundState.COLLECTING)
    if event.party not in row.roots:
        raise StateError(f"party {event.party} is not on the frozen list", party=event.party)
    return replace(
        row,
        batches={**row.batches, event.party: event.batch},
        bytes_up={**row.bytes_up, event.party: event.bytes_up},
    )


def _folded(row: RoundRow, event: Folded) -> RoundRow:
    _expect(row, RoundState.AGGREGATING)
    return replace(row, aggregate=event.aggregate, aggregate_root=event.root)


def _budget_spent(row: RoundRow, _event: BudgetSpent) -> RoundRow:
    _expect(row, RoundState.OPENING)
    return replace(row, spent=True)


def _shares_asked(row: RoundRow, event: SharesAsked) -> RoundRow:
    _expect(row, RoundState.OPENING)
    if not row.spent:
        raise StateError("no share is asked for before the budget is spent")
    asked = (*row.asked, *(name for name in event.asked if name not in row.asked))
    return replace(row, opening=row.opening or event.opening, asked=asked)


def _share_stored(row: RoundRow, event: ShareStored) -> RoundRow:
    _expect(row, RoundState.OPENING)
    if event.party not in row.asked:
        raise StateError(f"party {event.party} was not asked for a share", party=event.party)
    if _cannot_open(row, event.party):  # else a wrong share could be sent again and again until the deadline
        raise StateError(f"party {event.party} failed to open, and others are asked", party=event.party)
    if event.party in row.shares:  # the first one counts until it is found to be wrong
        return row
    return replace(row, shares={**row.shares, event.party: event.sha256})


def _party_failed(row: RoundRow, event: PartyFailed) -> RoundRow:
    if event.party not in row.cohort and event.party not in row.holders:
        raise StateError(f"party {event.party} has no part in this round", party=event.party)
    if row.state is RoundState.OPENING and event.failure.stage != Work.OPEN.value:
        # Of an upload that came too late, say: it takes no share back, and undoes no failure to open.
        return replace(row, failures={event.party: event.failure, **row.failures})
    if row.state is not RoundState.OPENING and _left_out(row, event.party):  # else it could come back by failing
        return row
    shares = {name: blob for name, blob in row.shares.items() if name != event.party}
    return replace(row, failures={**row.failures, event.party: event.failure}, shares=shares)


def _released(row: RoundRow, event: Released) -> RoundRow:
    _expect(row, RoundState.OPENING)
    if not row.spent:
        raise StateError("nothing is released before the budget is spent")
    return replace(row, result=event.result)


def _tick(row: RoundRow, _event: Tick) -> RoundRow:
    return row


_HANDLERS: Final = {
    NoiseMade: _noise_made,
    QuorumReached: _quorum_reached,
    RootCommitted: _root_committed,
    ListFrozen: _list_frozen,
    BatchStored: _batch_stored,
    Folded: _folded,
    BudgetSpent: _budget_spent,
    SharesAsked: _shares_asked,
    ShareStored: _share_stored,
    PartyFailed: _party_failed,
    Released: _released,
    Tick: _tick,
}


def _settle_phase(row: RoundRow, now: float, *, away: frozenset[str], ready: frozenset[str]) -> RoundRow:
    """Move on when the phase has what it needs, and give up when it cannot get it any more. For those who are away
    nobody waits who has the quorum; without it they may still come back."""
    if row.result is not None:
        return _move(row, RoundState.RELEASED, now)
    row = _next_phase(row, now, away, ready)
    late = now >= row.deadline and not row.at_rest
    return _fail(row, now, "the round's deadline has passed", late=True, ready=ready) if late else row


def _next_phase(row: RoundRow, now: float, away: frozenset[str], ready: frozenset[str]) -> RoundRow:
    if row.state is RoundState.PLANNED and (not row.noise_needed or AGGREGATOR in row.batches):
        row = _move(row, RoundState.TRAINING, now)
    if row.state is RoundState.TRAINING:
        return _settle_training(row, now, away, ready)
    if row.state is RoundState.COLLECTING and row.frozen_list is not None:
        return _settle_collecting(row, now, away)
    if row.state is RoundState.AGGREGATING and row.aggregate is not None:
        row = _move(row, RoundState.OPENING, now)
    if row.state is RoundState.OPENING and _too_few_holders(row):
        return _fail(row, now, f"fewer than {row.threshold} parties can open")
    return row


def _settle_training(row: RoundRow, now: float, away: frozenset[str], ready: frozenset[str]) -> RoundRow:
    out = [name for name in row.cohort if name in row.failures]
    if len(row.cohort) - len(out) < row.quorum:
        return _fail(row, now, f"fewer than {row.quorum} parties can contribute", ready=ready)
    pending = [name for name in row.cohort if name not in row.roots and name not in row.failures]
    closing = now >= row.began_at + COMMIT_SHARE * row.timeout_s
    complete = len(row.committed) >= row.quorum and away.issuperset(pending)
    if not pending or closing or complete:
        if len(row.committed) >= row.quorum:
            return _move(row, RoundState.COLLECTING, now)
        if not row.able_at and not row.committed:
            return _fail(row, now, _nobody_began(row), late=True, ready=ready)
        return _fail(row, now, f"fewer than {row.quorum} parties contributed in time", late=True, ready=ready)
    return row


def _settle_collecting(row: RoundRow, now: float, away: frozenset[str]) -> RoundRow:
    listed = row.committed
    out = [name for name in listed if name in row.failures and name not in row.batches]
    if len(listed) - len(out) < row.quorum:
        return _fail(row, now, f"fewer than {row.quorum} parties can deliver")
    missing = [name for name in listed if name not in row.batches and name not in row.failures]
    closing = now >= row.began_at + UPLOAD_SHARE * row.timeout_s
    complete = len(row.delivered) >= row.quorum and away.issuperset(missing)
    if not missing or closing or complete:
        if len(row.delivered) >= row.quorum:
            contributors = tuple(sorted(row.batches))
            return _move(replace(row, contributors=contributors), RoundState.AGGREGATING, now)
        return _fail(row, now, f"fewer than {row.quorum} parties delivered in time", late=True)
    return row


def _nobody_began(row: RoundRow) -> str:
    opening = f", or fewer than {row.threshold} that open it were connected" if row.threshold else ""
    return f"nobody began: fewer than {row.quorum} parties could train it in time{opening}"


def _too_few_holders(row: RoundRow) -> bool:
    return len([name for name in row.holders if not _cannot_open(row, name)]) < row.threshold


def _left_out(row: RoundRow, name: str) -> bool:
    failure = row.failures.get(name)
    return failure is not None and failure.reason == LEFT_OUT


def _cannot_open(row: RoundRow, name: str) -> bool:
    failure = row.failures.get(name)
    return failure is not None and failure.stage == Work.OPEN.value


def _move(row: RoundRow, state: RoundState, now: float, *, reason: str = "") -> RoundRow:
    if (row.state, state) not in LEGAL_TRANSITIONS:
        raise StateError(f"a round does not go from {row.state.value} to {state.value}")
    ended = now if state in AT_REST else 0.0
    return replace(row, state=state, reason=reason or row.reason, ended_at=ended)


def _fail(row: RoundRow, now: float, cause: str, *, late: bool = False, ready: frozenset[str] = _NOBODY) -> RoundRow:
    return _move(row, RoundState.FAILED, now, reason=explain(row, cause, late=late, ready=ready))


def _expect(row: RoundRow, state: RoundState) -> None:
    if row.state is not state:
        raise StateError(
            f"round {row.number} of job {row.job_id} is {row.state.value}, not {state.value}", state=row.state.value
        )


def _expect_cohort(row: RoundRow, party: str) -> None:
    if party not in row.cohort:
        raise StateError(f"party {party} is not in the cohort of this round", party=party)


# --- what follows from a row ------------------------------------------------------------------------------------------


def explain(row: RoundRow, cause: str, *, late: bool, ready: frozenset[str] = _NOBODY) -> str:
    """The cause with everybody's part in it: who failed with which reason, for whom the round waited, and for what.

    Args:
        late: the time was up for those who did not answer; otherwise they could have, had the round gone on.
        ready: as for `advance`.
    """
    said = _ACTIVE if late else _CUT_SHORT
    parts = [f"{name}: {failure.message} [{failure.reason}]" for name, failure in sorted(row.failures.items())]
    parts += [f"{name}: {said[work]}" for name in waiting_for(row, ready) if (work := wanted(row, name))]
    parts += [f"{name}: ready to train, and waited for others" for name in held_back(row, ready)]
    return f"{cause} ({'; '.join(parts)})" if parts else cause


def waiting_for(row: RoundRow, ready: frozenset[str] = _NOBODY) -> tuple[str, ...]:
    """The parties for which the round waits now; not those that are `ready`, and wait themselves until enough are."""
    names = (*row.cohort, *_only_holders(row))
    return tuple(name for name in names if wanted(row, name) in _ACTIVE and name not in held_back(row, ready))


def held_back(row: RoundRow, ready: frozenset[str]) -> tuple[str, ...]:
    """Who is `ready` to train a round that needs more parties than are, or more to open it than are connected."""
    if row.able_at:
        return ()
    return tuple(name for name in row.cohort if name in ready and wanted(row, name) is Work.CONTRIBUTE)


def expected(row: RoundRow, ready: frozenset[str]) -> dict[str, str]:
    """What is expected of parties now, and of those that are `ready` for whom they wait."""
    awaited = waiting_for(row, ready)
    whom = ", ".join(awaited) or "who can open it"
    held = dict.fromkeys(held_back(row, ready), f"ready, waits for {whom}")
    return held | dict.fromkeys(awaited, row.state.value.lower())


def phase(row: RoundRow, ready: frozenset[str] = _NOBODY) -> str:
    """What a round does now, in words: before enough parties are ready none trains, also where some are."""
    able = [*held_back(row, ready), *row.committed]
    if row.state is not RoundState.TRAINING or not held_back(row, ready):
        return row.state.value.lower()
    return f"{len(able)} of the {row.quorum} parties that it needs are ready"


def wanted(row: RoundRow, party: str) -> Work | None:
    """What a party has to do now; None when there is nothing (any more)."""
    if row.at_rest:
        return Work.ENDED if party in row.cohort or party in row.asked else None
    if row.state is RoundState.OPENING:
        open_now = party in row.asked and party not in row.shares and not _cannot_open(row, party)
        return Work.OPEN if open_now else None
    if party not in row.cohort or party in row.failures:
        return None
    if row.state is RoundState.TRAINING and party not in row.roots:
        return Work.CONTRIBUTE
    if row.state is RoundState.COLLECTING and row.frozen_list and party in row.roots and party not in row.batches:
        return Work.REVEAL
    return None


_ACTIVE: Final = {
    Work.CONTRIBUTE: "no answer yet: training, or away",
    Work.REVEAL: "committed to an update that has not come",
    Work.OPEN: "asked for a share that has not come",
}
"""What the round waits for, and what is known then of a party that it waits for."""

_CUT_SHORT: Final = {
    Work.CONTRIBUTE: "not heard before the round failed",
    Work.REVEAL: "committed; its update had not come before the round failed",
    Work.OPEN: "asked for a share that had not come before the round failed",
}
"""The same of a party whose time was not up: nothing says that it is away."""


def _only_holders(row: RoundRow) -> tuple[str, ...]:
    return tuple(name for name in row.holders if name not in row.cohort)


def hopeless(row: RoundRow) -> str:
    """The reason (of the error catalogue) for which no further round would end otherwise; empty if one might.

    A party that refuses for its budget or policy, or whose code does not fit, refuses the next round as well. When
    those that do leave fewer than the quorum, trying again only costs time.
    """
    refusals = [failure for name, failure in row.failures.items() if name in row.cohort]
    lasting = [failure.reason for failure in refusals if failure.reason in LASTING_REFUSALS or lasts(failure.problem)]
    if row.state is not RoundState.FAILED or len(row.cohort) - len(lasting) >= row.quorum:
        return ""
    return lasting[0] if len(set(lasting)) == 1 else _ROUND_FAILED


def party_states(
    row: RoundRow, connected: frozenset[str], ready: frozenset[str] = _NOBODY
) -> tuple[tuple[str, str], ...]:
    """What each party of the cohort is doing, in the words of the wire's `JobProgress.parties`."""
    return tuple((name, _party_state(row, name, connected, ready)) for name in row.cohort)


def _party_state(row: RoundRow, name: str, connected: frozenset[str], ready: frozenset[str]) -> str:
    if name in row.failures:
        return "FAILED"
    if wanted(row, name) in _ACTIVE and name not in connected:
        return "AWAY"
    if row.state is RoundState.PLANNED or name in held_back(row, ready):
        return "READY"
    if row.state is RoundState.TRAINING:
        return "WAITING" if name in row.roots else "TRAINING"
    if row.state is RoundState.OPENING and name in row.asked:
        return "OPENED" if name in row.shares else "OPENING"
    if name in row.batches:
        return "DELIVERED"
    return "UPLOADING" if row.state is RoundState.COLLECTING and name in row.roots else "READY"


def next_step(row: RoundRow, now: float, *, connected: frozenset[str] | None = None) -> Step | None:
    """What the aggregator has to do now; None while it waits for parties or has nothing left to do.

    Args:
        connected: the parties that can be reached; None: all of them, as far as is known.
    """
    if row.state is RoundState.RELEASED and not row.settled and row.evaluation is None:
        return Step.EVALUATE
    if row.at_rest:
        return None if row.settled else Step.SETTLE
    if row.state is RoundState.PLANNED:
        return Step.MAKE_NOISE
    if row.state is RoundState.COLLECTING and row.frozen_list is None:
        return Step.FREEZE_LIST
    if row.state is RoundState.AGGREGATING:
        return Step.FOLD
    if row.state is RoundState.OPENING:
        if not row.spent:
            return Step.SPEND
        if len(row.shares) >= row.threshold:
            return Step.RELEASE
        everybody = frozenset(row.holders) if connected is None else connected
        return Step.ASK_SHARES if holders_to_ask(row, connected=everybody, now=now) else None
    return None


def _useful(row: RoundRow, connected: frozenset[str]) -> tuple[str, ...]:
    """Holders that were asked and answered, or can be reached and may still answer."""
    return tuple(
        name for name in row.asked if not _cannot_open(row, name) and (name in row.shares or name in connected)
    )


def holders_to_ask(row: RoundRow, *, connected: frozenset[str], now: float) -> tuple[str, ...]:
    """Whom to ask for a share next: as many as are missing, reachable ones first; everybody once time runs short.

    Of those who were asked and have gone away since, nobody knows whether they come back: others are asked in their
    place, as far as others can be reached.
    """
    fresh = [name for name in row.holders if name not in row.asked and not _cannot_open(row, name)]
    lacking = row.threshold - len(_useful(row, frozenset(row.holders)))
    gone = row.threshold - len(_useful(row, connected))
    missing = max(0, lacking, min(gone, len(connected.intersection(fresh))))
    if now >= row.began_at + ASK_MORE_SHARE * row.timeout_s:
        missing = len(fresh)
    return tuple(sorted(fresh, key=lambda name: (name not in connected, row.holders.index(name)))[:missing])
