"""What is shown of jobs and of the aggregator, before it becomes messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..protocol.faults import TaskStanding
from .states import JobRow

if TYPE_CHECKING:
    from .executors.stats import PoolStats


@dataclass(frozen=True, slots=True)
class Activity:
    """What a job is doing now.

    Attributes:
        stage: in words.
        waiting_for: names of the parties that the present round waits for.
        parties: (name, state) of each party of the present round; the states are those of the wire's `PartyProgress`.
        bytes_received: updates and shares, from all parties so far.
        estimated_end_at: UTC, ISO 8601 with microseconds, as `states.utc` writes it; empty where nothing is known.
    """

    stage: str = ""
    waiting_for: tuple[str, ...] = ()
    parties: tuple[tuple[str, str], ...] = ()
    bytes_received: int = 0
    estimated_end_at: str = ""


@dataclass(frozen=True, slots=True)
class PartyStatus:
    """Whether a party is reachable, what is expected of it (empty: nothing) or why it was refused, what somebody should
    look at, a sentence each, and how it stands with its tasks."""

    party: str
    connected: bool
    waiting_for: str = ""
    warnings: tuple[str, ...] = ()
    tasks: Mapping[str, TaskStanding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the aggregator is.

    Attributes:
        workers: the state of the pool.
        jobs_pending: PENDING.
        jobs_running: RUNNING, RETRYING or CANCELLING.
        started_at: since when this process serves; UTC, ISO 8601 with microseconds.
        stopping: it takes no jobs any more.
        warnings: what its operator should look at, a sentence each.
        tasks: how it stands with those that are installed at the aggregator.
    """

    federation: str
    software_version: str
    key_id: str
    custody: str
    parties: tuple[PartyStatus, ...]
    workers: PoolStats
    jobs_pending: int = 0
    jobs_running: int = 0
    started_at: str
    stopping: bool = False
    warnings: tuple[str, ...] = ()
    tasks: Mapping[str, TaskStanding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is shown.

    Attributes:
        row: what is stored of it.
        activity: what it is doing.
        queue_position: 1 for the job that is started next; 0 for one that does not wait.
        rounds: round summaries (`states.round_event`), in order; left out of listings and operations.
        kept: the released rounds whose models are there; left out likewise.
    """

    row: JobRow
    activity: Activity
    queue_position: int
    rounds: tuple[dict[str, Any], ...] = ()
    kept: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a finished job. `sha256` is hex."""

    name: str
    size: int
    sha256: str
