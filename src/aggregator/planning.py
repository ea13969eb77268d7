"""From a job's specification to the plan of a round, and what a round costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from ..encryption.dealer import check_threshold
from ..encryption.scheme import Scheme
from ..errors import InvalidInput, KeyMaterialError, PlanError, PolicyError
from ..jobs.spec import FederatedTrainingSpec
from ..privacy.accounting import calibrate_dp_sgd, check_dp_sgd
from ..privacy.events import Event
from ..protocol.canonical import parse_canonical, real
from ..protocol.derive import derive, derive_again, party_event
from ..protocol.plan import LocalPlan, RoundPlan
from ..protocol.roster import Roster
from ..protocol.signing import Signed

MIN_COHORT: Final = 2
"""A sum over one party is that party's update."""


@dataclass(frozen=True, slots=True)
class Model:
    """A global model in the blob store.

    Attributes:
        sha256, size: of its safetensors bytes.
        dimension: trainable parameters.
    """

    sha256: str
    size: int
    dimension: int


def invited(spec: FederatedTrainingSpec, roster: Roster) -> tuple[tuple[str, ...], int]:
    """The cohort of a job, in the roster's order, and the updates that its rounds need.

    Raises:
        InvalidInput: a party that is not enrolled, or fewer than two.
        PlanError: a quorum under which a sum hides nobody, or two sums could be opened that differ by one party.
    """
    unknown = sorted(set(spec.parties) - set(roster.names))
    if unknown:
        raise InvalidInput(
            f"not enrolled in federation {roster.federation}: {', '.join(unknown)} (enrolled: "
            f"{', '.join(roster.names) or 'nobody yet'})",
            violations={"federated_training.parties": f"not enrolled: {', '.join(unknown)}"},
        )
    cohort = tuple(name for name in roster.names if not spec.parties or name in spec.parties)
    if len(cohort) < MIN_COHORT:
        raise InvalidInput(
            f"a federation needs at least {MIN_COHORT} parties; invited: {', '.join(cohort) or 'nobody'}"
        )
    quorum = spec.quorum or len(cohort)
    least = MIN_COHORT + roster.colluders
    if not least <= quorum <= len(cohort):
        raise PlanError(
            f"a quorum of {quorum} does not fit {len(cohort)} invited parties: at least {least}, so that a sum holds "
            f"{MIN_COHORT} honest updates beside those of {roster.colluders} colluders"
        )
    if roster.custody == "threshold":
        try:
            check_threshold(
                roster.threshold,
                len(roster.holders),
                colluders=roster.colluders,
                quorum=quorum,
                parties=len(cohort),
            )
        except KeyMaterialError as error:
            raise PlanError(f"this federation's keys do not allow a quorum of {quorum}: {error.message}") from error
    return cohort, quorum


def plan_round(
    spec: FederatedTrainingSpec,
    *,
    job_id: str,
    number: int,
    model: Model,
    roster: Roster,
    scheme: Scheme,
    local_noise: float | None = None,
) -> RoundPlan:
    """Everything that a round fixes.

    Args:
        local_noise: the noise multiplier of DP-SGD; by default calibrated to the job's target, which takes a second.

    Raises:
        InvalidInput, PlanError: when no such round can be run; says why.
    """
    cohort, quorum = invited(spec, roster)
    local, privacy = spec.local_training, spec.party_privacy
    derived = derive(
        scheme,
        dimension=model.dimension,
        clipping_norm=privacy.clipping_norm,
        resolution_bits=spec.encryption.resolution_bits,
        noise_by=privacy.noise_by,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        cohort=len(cohort),
        quorum=quorum,
        colluders=roster.colluders,
        priced_rounds=spec.priced_rounds,
    )
    return RoundPlan(
        federation=roster.federation,
        job_id=job_id,
        round=number,
        priced_rounds=spec.priced_rounds,
        spec_digest=spec.digest,
        task=spec.task,
        task_options=spec.task_options_text,
        seed=spec.seed,
        model_sha256=model.sha256,
        model_bytes=model.size,
        dimension=model.dimension,
        local=LocalPlan(
            steps=local.steps,
            sampling_rate=real(local.sampling_rate),
            learning_rate=real(local.learning_rate),
            max_grad_norm=real(local.max_grad_norm),
            noise_multiplier=real(_local_noise(spec) if local_noise is None else local_noise),
            delta=real(local.delta),
        ),
        clipping_norm=real(privacy.clipping_norm),
        resolution_bits=spec.encryption.resolution_bits,
        rounded_bound=derived.rounded_bound,
        scheme=scheme.name,
        key_id=roster.key_id,
        layout=derived.layout.to_json(),
        noise=derived.noise,
        roster_digest=roster.digest,
        cohort=cohort,
        quorum=quorum,
        colluders=roster.colluders,
        threshold=roster.threshold,
        custody=roster.custody,
    )


def check_noise_by(spec: FederatedTrainingSpec, noise_by: str) -> None:
    """Raises PolicyError unless the job's noise is drawn by whom this aggregator's configuration says."""
    if spec.party_privacy.noise_by != noise_by:
        raise PolicyError(
            f"this aggregator runs jobs with noise_by: {noise_by}; the job asks for {spec.party_privacy.noise_by}"
        )


def check_local_noise(spec: FederatedTrainingSpec) -> None:
    """Raises InvalidInput where no noise of DP-SGD reaches the job's target; without finding how much does."""
    local = spec.local_training
    _reachable(local.epsilon, local.delta, local.sampling_rate, local.steps * spec.priced_rounds)


@lru_cache(maxsize=256)
def _reachable(epsilon: float, delta: float, sampling_rate: float, steps: int) -> None:
    check_dp_sgd(epsilon=epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps)


def _local_noise(spec: FederatedTrainingSpec) -> float:
    local = spec.local_training
    return _calibrated(local.epsilon, local.delta, local.sampling_rate, local.steps * spec.priced_rounds)


@lru_cache(maxsize=256)
def _calibrated(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    return calibrate_dp_sgd(epsilon=epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps)


def round_costs(scheme: Scheme, plan: RoundPlan) -> dict[str, Event]:
    """What one round costs a party: against whoever sees the "release", and against the "aggregator"."""
    noise = derive_again(scheme, plan).noise_plan
    return {
        "release": party_event(plan, noise),
        "aggregator": party_event(plan, noise, against="aggregator"),
    }


def plan_of(signed: dict[str, Any]) -> RoundPlan:
    """The plan in a round row, which the aggregator itself signed."""
    statement = parse_canonical(Signed.from_json(signed).statement)
    statement.pop("kind", None)
    return RoundPlan.from_statement(statement)
