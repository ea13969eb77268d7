"""A round that nobody runs: how it begins, what everybody sends, and playing it to a state."""

from __future__ import annotations

from src.aggregator.round_row import (
    Batch,
    BatchStored,
    BudgetSpent,
    Evaluated,
    Event,
    Failure,
    Folded,
    ListFrozen,
    NoiseMade,
    Released,
    RootCommitted,
    RoundRow,
    RoundState,
    Settled,
    SharesAsked,
    ShareStored,
    Step,
    Tick,
    Work,
)
from src.aggregator.rounds import (
    advance,
    holders_to_ask,
    next_step,
    wanted,
)

START, TIMEOUT = 1000.0, 100.0
PHASES = [RoundState.PLANNED, RoundState.TRAINING, RoundState.COLLECTING, RoundState.AGGREGATING, RoundState.OPENING]


def new_row(
    cohort: tuple[str, ...] = ("a", "b", "c"),
    *,
    quorum: int = 2,
    holders: tuple[str, ...] = ("a", "b", "c"),
    threshold: int = 2,
    noise: bool = True,
) -> RoundRow:
    """A round as the coordinator stores it first."""
    row = RoundRow(
        job_id="job",
        number=1,
        plan={"statement": "{}", "signer": "aggregator", "signature": "00"},
        plan_digest="p" * 64,
        model_sha256="m" * 64,
        cohort=cohort,
        quorum=quorum,
        holders=holders,
        threshold=threshold,
        noise_needed=noise,
        started_at=START,
        timeout_s=TIMEOUT,
    )
    return advance(row, Tick(), START)


def signed(text: str) -> dict[str, str]:
    return {"statement": text, "signer": "x", "signature": "00"}


def root_of(name: str, which: int = 0) -> dict[str, str]:
    return signed(f"root {which} of {name}")


def batch_of(name: str, which: int = 0) -> Batch:
    return Batch(f"{name}{which}".encode().hex(), f"sha256 {which} of {name}", 100)


def failure(stage: Work = Work.CONTRIBUTE, message: str = "it rained") -> Failure:
    return Failure(stage.value, "REFUSED", message)


def committed(name: str) -> RootCommitted:
    return RootCommitted(name, root_of(name), (0.5, None))


def stored(name: str) -> BatchStored:
    return BatchStored(name, batch_of(name), 123)


def performed(row: RoundRow, step: Step, now: float) -> Event:
    """What a step of the aggregator gives when it works."""
    events: dict[Step, Event] = {
        Step.MAKE_NOISE: NoiseMade(root_of("aggregator"), batch_of("aggregator")),
        Step.FREEZE_LIST: ListFrozen(signed("list")),
        Step.FOLD: Folded(batch_of("aggregate"), "r" * 64),
        Step.SPEND: BudgetSpent(),
        Step.ASK_SHARES: SharesAsked(signed("opening"), holders_to_ask(row, connected=frozenset(), now=now)),
        Step.RELEASE: Released({"model_sha256": "n" * 64}),
        Step.EVALUATE: Evaluated({"auc": 0.5}),
        Step.SETTLE: Settled(),
    }
    return events[step]


def answered(work: Work, name: str) -> Event:
    """What a party that does what it is asked for sends."""
    events: dict[Work, Event] = {
        Work.CONTRIBUTE: committed(name),
        Work.REVEAL: stored(name),
        Work.OPEN: ShareStored(name, f"share of {name}"),
    }
    return events[work]


def play(row: RoundRow, *, now: float = START, silent: frozenset[str] = frozenset(), until: RoundState) -> RoundRow:
    """Everybody but the silent does what they are asked for, until a state is reached or nothing moves any more."""
    for _ in range(100):
        if row.state is until or row.at_rest:
            return row
        step = next_step(row, now)
        everybody = dict.fromkeys((*row.cohort, *row.holders))
        answers = [
            answered(work, name)
            for name in everybody
            if name not in silent and (work := wanted(row, name)) is not None and work is not Work.ENDED
        ]
        events: list[Event] = [performed(row, step, now)] if step is not None else answers[:1]
        if not events:
            return row
        row = advance(row, events[0], now)
    raise AssertionError("the round does not come to rest")
