"""A round as data: its states, its row, and the events that may happen to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from ..errors import StateError


class RoundState(StrEnum):
    """Where a round is; RELEASED, FAILED and CANCELLED are at rest."""

    PLANNED = "PLANNED"
    TRAINING = "TRAINING"
    COLLECTING = "COLLECTING"
    AGGREGATING = "AGGREGATING"
    OPENING = "OPENING"
    RELEASED = "RELEASED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


AT_REST: Final = frozenset({RoundState.RELEASED, RoundState.FAILED, RoundState.CANCELLED})

_ORDER: Final = (
    RoundState.PLANNED,
    RoundState.TRAINING,
    RoundState.COLLECTING,
    RoundState.AGGREGATING,
    RoundState.OPENING,
    RoundState.RELEASED,
)
LEGAL_TRANSITIONS: Final[frozenset[tuple[RoundState, RoundState]]] = frozenset(
    set(itertools.pairwise(_ORDER))
    | {(a, end) for a in _ORDER[:-1] for end in (RoundState.FAILED, RoundState.CANCELLED)}
)
"""Every change of state that may happen; anything else is a StateError."""


class Step(StrEnum):
    """What the aggregator does next. Each is idempotent."""

    MAKE_NOISE = "make noise"
    FREEZE_LIST = "freeze the list"
    FOLD = "multiply the contributions"
    SPEND = "spend the budget"
    ASK_SHARES = "ask for shares"
    RELEASE = "open and release"
    EVALUATE = "evaluate"
    SETTLE = "give back what was not spent"


class Work(StrEnum):
    """What a party does next."""

    CONTRIBUTE = "contribute"
    REVEAL = "reveal"
    OPEN = "open"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Batch:
    """A stored batch: its encoded header (hex), and its body as a blob."""

    header: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Failure:
    """What a party could not or would not do: the stage, a reason of the error catalogue, its public text; and where
    its task cannot be trained there, the class (`protocol.faults`) and the place, as far as they are of closed form."""

    stage: str
    reason: str
    message: str
    problem: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class SpentRounds:
    """So many rounds of one job that count as spent and cost the same: mechanism events (JSON), as of `RoundRow`."""

    costs: dict[str, dict[str, Any]]
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """All that is known of a round. Signed statements are kept as `Signed.to_json()`.

    Times are seconds since the epoch. `order` is what the plan names by its digest, if it names one. `costs` are the
    mechanism events (JSON) that the round is charged with, against the "release" and against the "aggregator". `roots`,
    `batches` and `shares` are keyed by contributor; the aggregator's noise batch is under its name. `asked` are the
    holders whose share was requested, `able_at` is when a quorum was known to be able to train it, 0.0 before,
    `settled` says that the ledger holds the last word on the round. `evaluation` is {"metrics", "without"} of the
    released model, the latter what is missing and why, in words; before it was tried, or where nobody does, None.
    `spent_before` are the rounds of the job before this one that count as spent, so that nobody has to read them again;
    None in a row of a version that did not keep it.
    """

    job_id: str
    number: int
    state: RoundState = RoundState.PLANNED
    plan: dict[str, str]
    plan_digest: str
    order: dict[str, str] | None = None
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent_before: tuple[SpentRounds, ...] | None = None
    model_sha256: str
    cohort: tuple[str, ...]
    quorum: int
    holders: tuple[str, ...]
    threshold: int
    noise_needed: bool
    started_at: float
    timeout_s: float
    able_at: float = 0.0
    ended_at: float = 0.0
    roots: dict[str, dict[str, str]] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    budgets: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    frozen_list: dict[str, str] | None = None
    contributors: tuple[str, ...] = ()
    aggregate: Batch | None = None
    aggregate_root: str = ""
    spent: bool = False
    opening: dict[str, str] | None = None
    asked: tuple[str, ...] = ()
    shares: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    reason: str = ""
    settled: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """Of the released model; earlier versions kept them with its result."""
        return dict((self.evaluation or self.result or {}).get("metrics", {}))

    @property
    def not_evaluated(self) -> str:
        """What is missing of the metrics and why; empty where nothing is, or nobody tried."""
        return str((self.evaluation or {}).get("without", ""))

    @property
    def at_rest(self) -> bool:
        """Whether nothing will change but the ledger's last word."""
        return self.state in AT_REST

    @property
    def committed(self) -> tuple[str, ...]:
        """Parties whose root is known."""
        return tuple(name for name in self.cohort if name in self.roots)

    @property
    def delivered(self) -> tuple[str, ...]:
        """Listed parties whose batch is stored."""
        return tuple(name for name in self.cohort if name in self.batches)

    @property
    def began_at(self) -> float:
        """When its time began: once a quorum could train it; until then it has the time from when it was planned."""
        return self.able_at or self.started_at

    @property
    def deadline(self) -> float:
        """When the round ends, one way or the other."""
        return self.began_at + self.timeout_s

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundRow:
        """What `to_json` wrote."""
        content = dict(value)
        content["state"] = RoundState(content["state"])
        content["batches"] = {name: Batch(**batch) for name, batch in content["batches"].items()}
        content["aggregate"] = Batch(**content["aggregate"]) if content["aggregate"] else None
        content["failures"] = {name: Failure(**failure) for name, failure in content["failures"].items()}
        content["budgets"] = {name: tuple(figures) for name, figures in content["budgets"].items()}
        before = content.get("spent_before")
        content["spent_before"] = None if before is None else tuple(SpentRounds(**each) for each in before)
        for name in ("cohort", "holders", "contributors", "asked"):
            content[name] = tuple(content[name])
        return cls(**content)


def spent_through(row: RoundRow, before: Iterable[SpentRounds]) -> tuple[SpentRounds, ...]:
    """With a round at rest: if its shares were asked for it counts as shown, whatever became of it.

    Args:
        before: the rounds of its job before it.
    """
    spent = list(before)
    if not row.spent:
        return tuple(spent)
    for place, each in enumerate(spent):
        if each.costs == row.costs:
            spent[place] = SpentRounds(each.costs, each.rounds + 1)
            return tuple(spent)
    return (*spent, SpentRounds(row.costs, 1))


_ONCE: Final = (
    "plan",
    "plan_digest",
    "costs",
    "spent_before",
    "model_sha256",
    "cohort",
    "quorum",
    "holders",
    "threshold",
    "started_at",
)
"""What a round is planned with."""
_SET_ONCE: Final = (
    "able_at",
    "frozen_list",
    "contributors",
    "aggregate",
    "aggregate_root",
    "spent",
    "opening",
    "result",
    "evaluation",
    "settled",
)
"""What is set once, by what happens to it."""


def check_follows(before: RoundRow, after: RoundRow) -> None:
    """What is written over a stored round comes after it: no state goes back, and what is set once stays.

    Raises:
        StateError: `after` was made of an older row than `before`.
    """
    lost = [name for name in _ONCE if getattr(before, name) != getattr(after, name)]
    lost += [name for name in _SET_ONCE if getattr(before, name) and getattr(before, name) != getattr(after, name)]
    lost += [name for name in ("roots", "batches") if not getattr(before, name).items() <= getattr(after, name).items()]
    lost += ["asked"] if not set(before.asked) <= set(after.asked) else []
    back = before.state is not after.state and (before.at_rest or _place(after) < _place(before))
    if back or lost:
        what = f"from {before.state.value} to {after.state.value}" if back else f"without its {', '.join(lost)}"
        raise StateError(
            f"round {before.number} of job {before.job_id} does not go on {what}", state=before.state.value
        )


def is_older(one: RoundRow, other: RoundRow) -> bool:
    """Whether `one` was read before `other` of the same round was written, as far as that can be seen."""
    return _far(one) < _far(other)


def _far(row: RoundRow) -> tuple[int, bool, int]:
    known = len(row.roots) + len(row.batches) + len(row.asked) + (row.evaluation is not None) + bool(row.able_at)
    return _place(row), row.settled, known


def _place(row: RoundRow) -> int:
    """Of its state among all; FAILED and CANCELLED come after any other."""
    return _ORDER.index(row.state) if row.state in _ORDER else len(_ORDER)


def blobs_of(row: RoundRow) -> frozenset[str]:
    """Digests of all blobs that a round names: its models, and what was sent for it."""
    sent = [*(batch.sha256 for batch in row.batches.values()), *row.shares.values()]
    sent += [row.aggregate.sha256] if row.aggregate else []
    return models_of(row) | frozenset(sent)


def models_of(row: RoundRow) -> frozenset[str]:
    """Digests of what a round began with and made."""
    return frozenset({row.model_sha256, *(str(blob) for blob in (row.result or {}).get("blobs", ()))})


@dataclass(frozen=True, slots=True)
class NoiseMade:
    """The aggregator's noise batch is stored, its root signed."""

    root: dict[str, str]
    batch: Batch


@dataclass(frozen=True, slots=True)
class QuorumReached:
    """As many parties as the round needs can train it, from this moment on (seconds since the epoch)."""

    at: float


@dataclass(frozen=True, slots=True)
class RootCommitted:
    """A party committed to its batch; `budget` is what it discloses of its example-level ε: spent, left, and the δ of
    what is left."""

    party: str
    root: dict[str, str]
    budget: tuple[float | None, ...] = (None, None, None)


@dataclass(frozen=True, slots=True)
class ListFrozen:
    """The list of roots is signed."""

    frozen_list: dict[str, str]


@dataclass(frozen=True, slots=True)
class BatchStored:
    """A party's upload is stored; its root and ciphertexts verified."""

    party: str
    batch: Batch
    bytes_up: int


@dataclass(frozen=True, slots=True)
class Folded:
    """The product of the contributors' batches is stored."""

    aggregate: Batch
    root: str


@dataclass(frozen=True, slots=True)
class BudgetSpent:
    """The ledger's final entry is written: from here on nothing is given back."""


@dataclass(frozen=True, slots=True)
class SharesAsked:
    """The opening is signed, and these holders are asked for a share."""

    opening: dict[str, str]
    asked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShareStored:
    """A holder's share batch is stored (blob digest)."""

    party: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PartyFailed:
    """A party refused or failed, or what it sent was wrong."""

    party: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Released:
    """The sum is opened, applied and recorded."""

    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The released model was measured, or that was tried: what is missing, and why, in words."""

    metrics: dict[str, float]
    without: str = ""


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A step of the aggregator failed for good."""

    step: Step
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `away` are parties that have been gone for so long that a round which has its quorum goes on
    without them."""

    away: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Cancel:
    """The job is being cancelled."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The ledger holds the last word on the round."""


Event = (
    NoiseMade
    | RootCommitted
    | ListFrozen
    | BatchStored
    | Folded
    | BudgetSpent
    | SharesAsked
    | ShareStored
    | PartyFailed
    | Released
    | Evaluated
    | StepFailed
    | QuorumReached
    | Tick
    | Cancel
    | Settled
)
