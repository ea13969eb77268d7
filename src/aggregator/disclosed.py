"""What parties last disclosed of the ε of their rows; and which of them, by that, can take no part in a job.

In memory alone, until another process of the party joins: its owner may have changed the limit meanwhile, which is done
while it is stopped. Nothing is guessed at: nothing follows for a party that never told, nor from figures at two δ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..errors import BudgetError
from ..jobs.plans import invited
from ..jobs.spec import FederatedTrainingSpec
from ..protocol.plan import RoundPlan
from ..protocol.roster import Roster
from .round_row import RootCommitted, RoundRow


class _Bound(NamedTuple):
    """What a party lets a row of a task spend in all: at most `epsilon`, at `delta`; whether that is used up."""

    epsilon: float | None
    delta: float
    used_up: bool


class Disclosed:
    """By party and task, what was told last."""

    def __init__(self) -> None:
        self._told: dict[str, dict[str, _Bound]] = {}
        self._instances: dict[str, str] = {}

    def joined(self, party: str, instance: str) -> None:
        """Forget what a party told unless this process of it did; one that gives itself no name may be another."""
        if not instance or self._instances.get(party) != instance:
            self._told.pop(party, None)
        self._instances[party] = instance

    def tell(self, row: RoundRow, event: RootCommitted, *, plan: RoundPlan, beside: Iterable[RoundRow]) -> None:
        """What a party told with its root.

        Args:
            plan: of the round.
            beside: the rounds at hand. What the party reserved for another one it may still be given back: then it is
                not certain that nothing is left.
        """
        spent, left, delta = event.budget
        bounds = self._told.setdefault(event.party, {})
        if left is None or delta is None:
            bounds.pop(plan.task, None)
            return
        alone = not any(
            event.party in each.cohort and each.job_id != row.job_id and not each.at_rest for each in beside
        )
        comparable = spent is not None and float(plan.local.delta) == delta
        epsilon = spent + left if comparable and spent is not None else None
        bounds[plan.task] = _Bound(epsilon, delta, left <= 0 and alone)

    def bounds(self, parties: Iterable[str], task: str, *, delta: float) -> dict[str, float]:
        """Of some parties, as far as it is known, the most ε at `delta` that a row may still come to by a job that is
        its only one; 0 where nothing is left."""
        found = {}
        for name in parties:
            known = self._told.get(name, {}).get(task)
            if known is not None and known.used_up:
                found[name] = 0.0
            elif known is not None and known.epsilon is not None and known.delta == delta:
                found[name] = known.epsilon
        return found


def too_dear(bounds: Mapping[str, float], spec: FederatedTrainingSpec, *, epsilon: float) -> dict[str, str]:
    """Of parties with these bounds those whose rows a job cannot be charged to, which costs each at least `epsilon` by
    itself; with why, in words."""
    found = {}
    for name, bound in bounds.items():
        if not bound:
            found[name] = f"{name} has no ε left for a row"
        elif epsilon > bound * (1 + 1e-9):  # which was added up from two figures
            at = f"at δ = {spec.local_training.delta:g}"
            found[name] = f"{name} lets a row spend ε = {bound:.4g} in all, of which this job needs {epsilon:.4g} {at}"
    return found


def check_rows(short: Mapping[str, str], spec: FederatedTrainingSpec, roster: Roster) -> str:
    """Of a job that some parties cannot take part in (`too_dear`) what to say of it, empty where there are none.

    Raises:
        BudgetError: too few are left for any round of it.
    """
    if not short:
        return ""
    cohort, quorum = invited(spec, roster)
    words = "; ".join(short.values())
    if len(cohort) - len(short) >= quorum:
        return f"{words}: rounds go on without {', '.join(short)}"
    needs = f"a round of task {spec.task} needs updates of {quorum} of {len(cohort)} parties"
    raise BudgetError(f"{needs}, and {words}", task=spec.task, parties=", ".join(short))
