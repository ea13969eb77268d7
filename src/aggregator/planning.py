"""From a job's specification to the plan of a round, and what a round costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, cast

from ..encryption.dealer import check_threshold
from ..encryption.scheme import Scheme
from ..errors import InvalidInput, KeyMaterialError, PlanError, PolicyError
from ..jobs.spec import FederatedTrainingSpec
from ..privacy.accounting import MULTIPLIER_STEPS, calibrate_dp_sgd, calibrate_sampled_sum, check_dp_sgd
from ..privacy.clipping import PARTIES_PER_DEVIATION, AdaptiveClipping
from ..privacy.events import Event, NoiseBy
from ..privacy.noise import sum_divergence
from ..privacy.noise_plan import plan_noise
from ..privacy.rounding import least_resolution_bits, nearest_bound
from ..protocol.canonical import parse_canonical, real
from ..protocol.derive import (
    Derived,
    derive,
    derive_again,
    derive_gradient_sum,
    example_multiplier,
    failure_probability,
    party_event,
)
from ..protocol.plan import GradientSum, LocalPlan, NormAdaptation, RoundPlan
from ..protocol.roster import Roster
from ..protocol.signing import Signed
from .federation import Federation

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


@dataclass(frozen=True, slots=True)
class _Settings:
    """Of a round plan, what its strategy decides."""

    derived: Derived
    steps: int
    noise_multiplier: float
    clipping_norm: float
    resolution_bits: int
    gradient_sum: GradientSum | None = None
    adaptive_clipping: NormAdaptation | None = None


def plan_round(
    spec: FederatedTrainingSpec,
    *,
    job_id: str,
    number: int,
    model: Model,
    roster: Roster,
    scheme: Scheme,
    local_noise: float | None = None,
    declared_rows: Mapping[str, int] | None = None,
    clipping_norm: float | None = None,
) -> RoundPlan:
    """Everything that a round fixes.

    Args:
        local_noise: fedavg's noise multiplier of DP-SGD; by default calibrated to the job's target: a second's work.
        declared_rows: of each party of the cohort; needed for fedsgd alone.
        clipping_norm: under adaptive clipping what the last release left it at; by default the job's.

    Raises:
        InvalidInput, PlanError: when no such round can be run; says why.
    """
    cohort, quorum = invited(spec, roster)
    if spec.strategy == "fedsgd":
        settings = _gradient_sum(spec, model, roster, scheme=scheme, quorum=quorum, declared_rows=declared_rows or {})
    else:
        settings = _update(spec, model, roster, scheme=scheme, local_noise=local_noise, clipping_norm=clipping_norm)
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
        local=_local_plan(spec, settings),
        clipping_norm=real(settings.clipping_norm),
        resolution_bits=settings.resolution_bits,
        rounded_bound=settings.derived.rounded_bound,
        scheme=scheme.name,
        key_id=roster.key_id,
        layout=settings.derived.layout.to_json(),
        noise=settings.derived.noise,
        roster_digest=roster.digest,
        cohort=cohort,
        quorum=quorum,
        colluders=roster.colluders,
        threshold=roster.threshold,
        custody=roster.custody,
        gradient_sum=settings.gradient_sum,
        adaptive_clipping=settings.adaptive_clipping,
    )


def _local_plan(spec: FederatedTrainingSpec, settings: _Settings) -> LocalPlan:
    """What a party does with its rows: as the job asks, but for the steps and the noise."""
    local = spec.local_training
    return LocalPlan(
        steps=settings.steps,
        sampling_rate=real(local.sampling_rate),
        learning_rate=real(local.learning_rate),
        max_grad_norm=real(local.max_grad_norm),
        noise_multiplier=real(settings.noise_multiplier),
        delta=real(local.delta),
    )


def _update(
    spec: FederatedTrainingSpec,
    model: Model,
    roster: Roster,
    *,
    scheme: Scheme,
    local_noise: float | None,
    clipping_norm: float | None,
) -> _Settings:
    """fedavg: each party protects its rows itself, and the sum's noise protects the party."""
    privacy = spec.party_privacy
    cohort, quorum = invited(spec, roster)
    norm = clipping_norm or privacy.clipping_norm
    adaptive = _adaptation(spec, quorum)
    derived = derive(
        scheme,
        dimension=model.dimension,
        clipping_norm=norm,
        resolution_bits=spec.encryption.resolution_bits,
        noise_by=privacy.noise_by,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        cohort=len(cohort),
        quorum=quorum,
        colluders=roster.colluders,
        priced_rounds=spec.priced_rounds,
        adaptive=adaptive,
    )
    return _Settings(
        derived,
        steps=spec.local_training.steps,
        noise_multiplier=_local_noise(spec) if local_noise is None else local_noise,
        clipping_norm=norm,
        resolution_bits=spec.encryption.resolution_bits,
        adaptive_clipping=_as_planned(adaptive, derived.bit_unit) if adaptive else None,
    )


def _adaptation(spec: FederatedTrainingSpec, quorum: int) -> AdaptiveClipping | None:
    given = spec.party_privacy.adaptive_clipping
    if given is None:
        return None
    smallest, largest = spec.party_privacy.norm_bounds
    return AdaptiveClipping(
        quantile=given.quantile,
        learning_rate=given.learning_rate,
        bit_deviation=quorum / PARTIES_PER_DEVIATION if given.bit_deviation is None else given.bit_deviation,
        smallest=smallest,
        largest=largest,
    )


def _as_planned(adaptive: AdaptiveClipping, bit_unit: int) -> NormAdaptation:
    return NormAdaptation(
        quantile=real(adaptive.quantile),
        learning_rate=real(adaptive.learning_rate),
        bit_deviation=real(adaptive.bit_deviation),
        smallest=real(adaptive.smallest),
        largest=real(adaptive.largest),
        bit_unit=bit_unit,
    )


def _gradient_sum(
    spec: FederatedTrainingSpec,
    model: Model,
    roster: Roster,
    *,
    scheme: Scheme,
    quorum: int,
    declared_rows: Mapping[str, int],
) -> _Settings:
    """fedsgd: the noise of one DP-SGD step, once for all parties. The grid is as fine as the job asks, or finer."""
    local, privacy = spec.local_training, spec.party_privacy
    cohort, _ = invited(spec, roster)
    missing = [name for name in cohort if name not in declared_rows]
    if missing:
        raise PlanError(f"fedsgd needs the number of rows that each party declares: {', '.join(missing)} has not yet")
    least = least_resolution_bits(local.max_grad_norm, dimension=model.dimension)
    resolution_bits = max(spec.encryption.resolution_bits, least)
    multiplier = _sum_noise(
        local.epsilon,
        local.delta,
        local.sampling_rate,
        rounds=spec.priced_rounds,
        dimension=model.dimension,
        sensitivity=nearest_bound(local.max_grad_norm, resolution_bits=resolution_bits, dimension=model.dimension),
        noise_by=privacy.noise_by,
        quorum=quorum,
        colluders=roster.colluders,
    )
    rows = {name: declared_rows[name] for name in cohort}
    derived = derive_gradient_sum(
        scheme,
        dimension=model.dimension,
        max_grad_norm=local.max_grad_norm,
        sampling_rate=local.sampling_rate,
        resolution_bits=resolution_bits,
        noise_by=privacy.noise_by,
        noise_multiplier=multiplier,
        delta=privacy.delta,
        declared_rows=rows,
        trusted_aggregator=spec.trusted_aggregator,
        quorum=quorum,
        colluders=roster.colluders,
        priced_rounds=spec.priced_rounds,
    )
    return _Settings(
        derived,
        steps=1,
        noise_multiplier=example_multiplier(derived.noise_plan),
        clipping_norm=derived.contribution_norm,
        resolution_bits=resolution_bits,
        gradient_sum=GradientSum(derived.cap, rows, spec.trusted_aggregator),
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


@lru_cache(maxsize=256)
def _sum_noise(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    *,
    rounds: int,
    dimension: int,
    sensitivity: int,
    noise_by: str,
    quorum: int,
    colluders: int,
) -> float:
    """The noise multiplier of the sum, with which every row stays within (`epsilon`, `delta`) against the aggregator.

    The parties' noise alone has to do that: with noise_by both as much again comes from the aggregator on top. Only
    where the aggregator is the trusted server does its noise count.
    """

    def tau_of(multiplier: float) -> float:
        noise = plan_noise(
            noise_by="parties",
            noise_multiplier=multiplier,
            sensitivity=float(sensitivity),
            quorum=quorum,
            colluders=colluders,
        )
        return sum_divergence(noise.share_sigma2, noise.honest_shares)

    needed = calibrate_sampled_sum(
        epsilon=epsilon,
        delta=delta,
        sampling_rate=sampling_rate,
        rounds=rounds,
        dimension=dimension,
        tau_of=None if noise_by == "aggregator" else tau_of,
        failure_probability=failure_probability(rounds),
    )
    ticks = round(needed * MULTIPLIER_STEPS)
    if noise_by == "both":
        ticks = math.isqrt(2 * ticks**2) + 1

    def holds(tick: int) -> bool:
        noise = plan_noise(
            noise_by=cast(NoiseBy, noise_by),
            noise_multiplier=tick / MULTIPLIER_STEPS,
            sensitivity=float(sensitivity),
            quorum=quorum,
            colluders=colluders,
        )
        return example_multiplier(noise) >= needed

    while not holds(ticks):  # a rounding's worth, at most
        ticks += 1
    return ticks / MULTIPLIER_STEPS


def round_costs(scheme: Scheme, plan: RoundPlan) -> dict[str, Event]:
    """What one round costs a party: against whoever sees the "release", and against the "aggregator"."""
    noise = derive_again(scheme, plan).noise_plan
    return {
        "release": party_event(plan, noise),
        "aggregator": party_event(plan, noise, against="aggregator"),
    }


def declarations(spec: FederatedTrainingSpec, federation: Federation) -> dict[str, int]:
    """The rows that the invited have declared so far for a job's task; empty under fedavg, which does not ask."""
    if spec.strategy != "fedsgd":
        return {}
    return federation.declared_rows(invited(spec, federation.roster)[0], spec.task)


def undeclared(spec: FederatedTrainingSpec, federation: Federation) -> tuple[str, ...]:
    """Who of the invited has not said yet what `declarations` lacks; nobody for a job that cannot be planned at all,
    which planning it then says."""
    if spec.strategy != "fedsgd":
        return ()
    try:
        cohort, _ = invited(spec, federation.roster)
    except (InvalidInput, PlanError):
        return ()
    known = federation.declared_rows(cohort, spec.task)
    return tuple(name for name in cohort if name not in known)


def declared_rows_of(plan: RoundPlan) -> dict[str, int]:
    """What each party of a fedsgd plan declared; empty under fedavg, which does not ask."""
    return dict(plan.gradient_sum.declared_rows) if plan.gradient_sum else {}


def plan_of(signed: dict[str, Any]) -> RoundPlan:
    """The plan in a round row, which the aggregator itself signed."""
    statement = parse_canonical(Signed.from_json(signed).statement)
    statement.pop("kind", None)
    return RoundPlan.from_statement(statement)
