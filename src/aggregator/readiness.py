"""Who is ready for which task, as parties say it; and whom a round leaves out for it.

In memory alone: a party says it again whenever it joins. One that says nothing, as parties of before do, counts as
ready.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from ..errors import TaskError
from ..jobs.plans import invited
from ..jobs.spec import FederatedTrainingSpec
from ..protocol.faults import TaskProblem, TaskStanding
from ..protocol.roster import Roster
from .round_row import Failure, PartyFailed, RoundRow, Tick, Work
from .rounds import LEFT_OUT, advance

_NOT_LISTED: Final = TaskStanding("", False, TaskProblem.TASK_NOT_LISTED)

NAMED: Final = 20
"""Parties that a sentence names; of more it says how many."""


class Readiness:
    """How it stands with the tasks of each party, and with those that are installed here (`own`)."""

    def __init__(self) -> None:
        self._told: dict[str, dict[str, TaskStanding]] = {}
        self.own: dict[str, TaskStanding] = {}

    def tell(self, party: str, standings: Mapping[str, TaskStanding]) -> None:
        """What a party says of all of its datasets."""
        self._told[party] = dict(standings)

    def of(self, party: str) -> Mapping[str, TaskStanding]:
        """What a party said last, by task; empty where it said nothing."""
        return dict(self._told.get(party, {}))

    def not_ready(self, parties: Iterable[str], task: str) -> dict[str, str]:
        """Of some parties those that cannot train on a task now, each with why, in words."""
        known = {name: told.get(task, _NOT_LISTED) for name in parties if (told := self._told.get(name))}
        return {name: each.why_not for name, each in known.items() if each.not_ready}

    def lacking(self, spec: FederatedTrainingSpec, roster: Roster) -> dict[str, str]:
        """Who is not ready, and why, where for that a round of a job has too few updates; empty where it has enough."""
        cohort, quorum = invited(spec, roster)
        missing = self.not_ready(cohort, spec.task)
        return missing if len(cohort) - len(missing) < quorum else {}

    def check(self, spec: FederatedTrainingSpec, roster: Roster) -> None:
        """Raises TaskError where too few of those invited are ready for a job's task to begin any round of it."""
        lacking = self.lacking(spec, roster)
        if lacking:
            cohort, quorum = invited(spec, roster)
            needs = f"a round of task {spec.task} needs updates of {quorum} of {len(cohort)} parties"
            raise TaskError(f"{needs}, and {in_words(lacking)}", task=spec.task, parties=", ".join(lacking))

    def waits_for(self, spec: FederatedTrainingSpec, roster: Roster) -> str:
        """For whom a job's next round waits, in words; empty where it can begin."""
        lacking = self.lacking(spec, roster)
        return f"waiting for parties to be ready for {spec.task}: {in_words(lacking)}" if lacking else ""

    def begin(self, row: RoundRow, task: str) -> RoundRow:
        """A round that begins, without those who are not ready: they are not asked, and nobody waits for them."""
        now = row.started_at
        for name, why in self.not_ready(row.cohort, task).items():
            row = advance(row, PartyFailed(name, Failure(Work.CONTRIBUTE.value, LEFT_OUT, f"not ready: {why}")), now)
        return advance(row, Tick(), now)


def asked_of(row: RoundRow) -> tuple[str, ...]:
    """Of whom a round that begins asks an update: whom it invites, without those who are left out."""
    return tuple(name for name in row.cohort if name not in row.failures)


def who_is_away(spec: FederatedTrainingSpec, roster: Roster, *, connected: Collection[str]) -> str:
    """Which of those that a job invites, or that hold key shares while too few of these are there, are not connected
    when it is submitted, in a sentence; empty where all are."""
    cohort, quorum = invited(spec, roster)
    holders = [member.name for member in roster.holders]
    few = sum(name in connected for name in holders) < roster.threshold
    away = [name for name in dict.fromkeys([*cohort, *(holders if few else [])]) if name not in connected]
    if not away:
        return ""
    needs = f"a round needs updates of {quorum} of {len(cohort)} parties"
    if few:
        needs += f"; {_needed(roster)} to open it, and the job waits for them"
    return f"not connected when it was submitted: {_listed(away)} ({needs})"


def holders_awaited(roster: Roster, away: Callable[[Iterable[str]], frozenset[str]]) -> str:
    """For whom every round waits that has to be opened, in words; empty where enough holders of key shares are there.

    Args:
        away: which of some parties have been gone for so long that nobody waits for them.
    """
    holders = [member.name for member in roster.holders]
    gone = sorted(away(holders))
    if len(holders) - len(gone) >= roster.threshold:
        return ""
    return f"waiting for {_listed(gone)} to be connected: {_needed(roster)} to open a round"


def _needed(roster: Roster) -> str:
    return f"{roster.threshold} of {len(roster.holders)} holders of key shares are needed"


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


def in_words(missing: Mapping[str, str]) -> str:
    """ "a is not ready (why); b is not ready (why)"."""
    return "; ".join(f"{name} is not ready ({why})" for name, why in missing.items())
