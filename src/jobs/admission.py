"""Whether a job may be created: the rules that need neither a price nor a database."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Final

from ..errors import ConflictError, InvalidInput, LimitError
from ..protocol.order import MAX_REQUEST_ID_CHARACTERS
from .scheduler import Capacity, Lane, lane_of
from .spec import FederatedTrainingSpec
from .specs import MAX_TIMEOUT_S, JobSpec
from .states import JobRow, Priority, seconds, utc

MAX_INLINE_WAIT_S: Final = 60.0
"""As proto/sotto/v1/jobs.proto says: what most proxies let a silent call last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What an aggregator allows and takes for granted.

    Attributes:
        max_jobs_pending, max_pending_per_scientist: jobs that wait, in all and of one owner.
        max_rounds, max_parties, max_round_timeout_s: what one federated training may ask for.
        max_jobs_a_day_per_scientist, max_stored_bytes_per_scientist: what one owner may leave here (`quotas`).
        capacity: how many jobs are under way at a time.
        max_attempts: of a job, ≥ 1.
        computation_timeout_s: from submission to deadline where the job says nothing; a federated training has none.
        max_inline_wait_s: how long `CreateJob` may wait.
    """

    max_jobs_pending: int
    max_pending_per_scientist: int
    max_rounds: int
    max_parties: int
    max_round_timeout_s: float
    max_jobs_a_day_per_scientist: int = 1000
    max_stored_bytes_per_scientist: int = 2 << 30
    capacity: Capacity = field(default_factory=Capacity)
    max_attempts: int = 4
    computation_timeout_s: float = 600.0
    max_inline_wait_s: float = MAX_INLINE_WAIT_S


def check_request(request_id: str, *, timeout_s: float | None, inline_wait_s: float, settings: JobSettings) -> None:
    """Raises InvalidInput with everything that is wrong beside the specification."""
    violations: dict[str, str] = {}
    if not 0 < len(request_id) <= MAX_REQUEST_ID_CHARACTERS:
        violations["request_id"] = f"1 to {MAX_REQUEST_ID_CHARACTERS} characters (got {len(request_id)})"
    elif "\0" in request_id:  # PostgreSQL has none
        violations["request_id"] = "no NUL characters"
    if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
        violations["timeout"] = f"above 0 and at most {MAX_TIMEOUT_S:g} seconds (got {timeout_s:g})"
    if not 0 <= inline_wait_s <= settings.max_inline_wait_s:  # a NaN is not
        violations["inline_wait_s"] = f"0 to {settings.max_inline_wait_s:g} seconds (got {inline_wait_s:g})"
    if violations:
        listed = "; ".join(f"{path}: {text}" for path, text in violations.items())
        raise InvalidInput(f"the job cannot be accepted: {listed}", violations=violations)


def check_size(spec: JobSpec, settings: JobSettings) -> None:
    """Raises LimitError when a federated training asks for more than this aggregator allows."""
    if not isinstance(spec, FederatedTrainingSpec):
        return
    checks = (
        (spec.priced_rounds, settings.max_rounds, "rounds and spare rounds"),
        (len(spec.parties), settings.max_parties, "parties"),
        (spec.round_timeout_s, settings.max_round_timeout_s, "seconds for a round"),
    )
    problems = [f"{given:g} {what}; at most {most:g}" for given, most, what in checks if given > most]
    if problems:
        raise LimitError(f"the job asks for more than this aggregator allows: {'; '.join(problems)}")


def check_room(pending: int, pending_of_owner: int, settings: JobSettings) -> None:
    """Raises LimitError when too many jobs wait already, of this scientist or in all; its metadata name the limit."""
    checks = (
        (pending_of_owner, settings.max_pending_per_scientist, "max_pending_per_scientist", "of your jobs"),
        (pending, settings.max_jobs_pending, "max_jobs_pending", "jobs"),
    )
    for waiting, most, name, what in checks:
        if waiting >= most:
            raise LimitError(f"{waiting} {what} are waiting already; at most {most} may", limit=name, at_most=most)


def check_same(known: JobRow, *, spec: JobSpec, priority: Priority | None, timeout_s: float | None) -> JobRow:
    """The job that a repeated request means.

    What the request says has to be what it said the first time: the specification, and priority and timeout where they
    are given. `display_name` is a label, and the first one stays.

    Raises:
        ConflictError: it asks for something else; nobody would notice that a changed wish had no effect.
    """
    others = {
        "specification": known.kind != spec.kind or known.spec_digest != spec.digest,
        "priority": priority is not None and known.priority is not priority,
        "timeout": timeout_s is not None and known.deadline_at != _deadline(known.created_at, timeout_s),
    }
    found = [name for name, other in others.items() if other]
    if found:
        raise ConflictError(
            f"request_id {known.request_id!r} was used for job {known.job_id}, which has another {' and '.join(found)}",
            job_id=known.job_id,
        )
    return known


def deadline_of(kind: str, created_at: str, *, timeout_s: float | None, settings: JobSettings) -> str:
    """When a job of a kind expires (UTC, as `states.utc` writes it); empty: never."""
    if timeout_s is None and lane_of(kind) is Lane.TRAINING:
        return ""
    return _deadline(created_at, settings.computation_timeout_s if timeout_s is None else timeout_s)


def _deadline(created_at: str, timeout_s: float) -> str:
    return utc(seconds(created_at) + timeout_s)


def new_row(
    owner: str, request_id: str, spec: JobSpec, *, timeout_s: float | None, now: float, settings: JobSettings
) -> JobRow:
    """A job that nobody knows of yet."""
    created_at = utc(now)
    return JobRow(
        job_id=secrets.token_hex(8),
        request_id=request_id,
        owner=owner,
        display_name="",
        kind=spec.kind,
        spec=spec.to_json(),
        spec_digest=spec.digest,
        max_attempts=settings.max_attempts,
        created_at=created_at,
        deadline_at=deadline_of(spec.kind, created_at, timeout_s=timeout_s, settings=settings),
    )


def check_not_negative(**numbers: int) -> None:
    """Raises InvalidInput that names those which are."""
    violations = {name: f"at least 0 (got {number})" for name, number in numbers.items() if number < 0}
    if violations:
        raise InvalidInput(f"{' and '.join(violations)} must not be negative", violations=violations)
