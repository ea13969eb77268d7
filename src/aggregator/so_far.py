"""What the rounds of a job so far come to, for the next one and for a release, without reading them all again."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from ..jobs.spec import FederatedTrainingSpec
from .accounts import Accounts
from .federation import Federation
from .planning import Model, declarations, declared_rows_of, plan_of
from .round_row import RoundRow, RoundState, SpentRounds, spent_through
from .steps import History
from .store import RoundStore


@dataclass(frozen=True, slots=True)
class Standing:
    """What the next round of a job starts from.

    Attributes:
        model: of the last released round; None before the first.
        clipping_norm: where that round left it, under adaptive clipping; None before, and without.
        declared_rows: by party.
        spent: rounds of the job that count as spent.
    """

    model: Model | None
    clipping_norm: float | None
    declared_rows: dict[str, int]
    spent: tuple[SpentRounds, ...] = ()


def so_far(
    connection: Connection, job_id: str, spec: FederatedTrainingSpec, *, rounds: RoundStore, federation: Federation
) -> Standing:
    """What the last released round of a job gave, and the rows that the invited declare: those that its first plan
    named, whatever a party has come to say since. One that says otherwise then refuses by itself."""
    last = rounds.latest(connection, job_id)
    declared = declarations(spec, federation)
    declared |= declared_rows_of(plan_of(last.plan)) if last else {}
    spent = spent_through(last, rounds.spent_before(connection, last)) if last else ()
    released = rounds.latest(connection, job_id, state=RoundState.RELEASED)
    if released is None:
        return Standing(None, None, declared, spent)
    result, plan = released.result or {}, plan_of(released.plan)
    norm = result.get("next_clipping_norm")
    model = Model(result["model_sha256"], result["model_bytes"], plan.dimension, plan.not_trained)
    return Standing(model, None if norm is None else float(norm), declared, spent)


def history(connection: Connection, row: RoundRow, *, rounds: RoundStore, accounts: Accounts) -> History:
    """What came before a round that is under way: rounds of a job follow one upon the other."""
    released = rounds.latest(connection, row.job_id, state=RoundState.RELEASED)
    state = (released.result or {})["state_sha256"] if released else ""
    return History(rounds.spent_before(connection, row), state, accounts.head(connection))
