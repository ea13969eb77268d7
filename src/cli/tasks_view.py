"""Who is ready for which task, and who has another version of it: in `sotto status`, and when a job is submitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..communication.generated.common_pb2 import TaskReadiness
    from ..communication.generated.jobs_pb2 import Status

AGGREGATOR = "(aggregator)"
"""Stands for it among parties."""


def task_rows(found: Status) -> list[tuple[str, str, str]]:
    """(task, who, how it stands), of every party's datasets, and of what cannot be used at the aggregator."""
    rows: list[tuple[str, str, str]] = []
    for task in _tasks(found):
        own = found.tasks.get(task)
        if own is not None and own.problem and not own.ready:
            rows.append((task, AGGREGATOR, _words(own)))
        others = differing(found, task)
        for party in found.parties:
            if task in party.tasks:
                stands = [_words(party.tasks[task]), *filter(None, [others.get(party.party)])]
                rows.append((task, party.party, "; ".join(stands)))
    return rows


def warnings(found: Status, task: str, invited: Collection[str]) -> list[str]:
    """Of those invited to a job (nobody named: all) who is not ready for its task, and who has another version."""
    lines = []
    parties = [party for party in found.parties if not invited or party.party in invited]
    for party in parties:
        standing = party.tasks.get(task)
        if standing is not None and not standing.ready and standing.problem != "CHECKING":  # which takes seconds
            lines.append(f"{party.party} is {_words(standing)}; rounds go on without it until it is ready")
    others = differing(found, task)
    return lines + [f"{party.party}: {others[party.party]}" for party in parties if party.party in others]


def differing(found: Status, task: str) -> dict[str, str]:
    """Parties whose code of a task is not the aggregator's, or where that has none, not that of most; each with what to
    say of it."""
    digests = {party.party: party.tasks[task].digest for party in found.parties if task in party.tasks}
    known = {name: digest for name, digest in digests.items() if digest}
    own = found.tasks[task].digest if task in found.tasks else ""
    whose, usual = "the aggregator's", own
    if not own:
        most = Counter(known.values()).most_common(2)
        if len(most) < 2:
            return {}
        if most[0][1] == most[1][1]:
            return dict.fromkeys(known, f"not everybody has the same version of {task}")
        whose, usual = "that of most", most[0][0]
    return {name: f"its version of {task} is not {whose}" for name, digest in known.items() if digest != usual}


def _tasks(found: Status) -> list[str]:
    listed = {task for party in found.parties for task in party.tasks}
    return sorted(listed | {task for task, own in found.tasks.items() if own.problem and not own.ready})


def _words(standing: TaskReadiness) -> str:
    from ..protocol.faults import sentence

    return "ready" if standing.ready else f"not ready: {sentence(standing.problem, standing.place)}"
