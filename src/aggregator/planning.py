"""The aggregator's part in planning: the noise that a job's target asks for, and what a round costs.

What else a round fixes follows from specification and noise, at a party as here: `jobs.plans`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from ..encryption.scheme import Scheme
from ..errors import InvalidInput, PlanError, PolicyError
from ..jobs.plans import Model, declared_of, grid_of, invited, round_plan
from ..jobs.spec import FederatedTrainingSpec
from ..privacy.accounting import MULTIPLIER_STEPS, calibrate_dp_sgd, calibrate_sampled_sum, check_dp_sgd
from ..privacy.events import Event, NoiseBy
from ..privacy.noise import sum_divergence
from ..privacy.noise_plan import plan_noise
from ..privacy.rounding import nearest_bound
from ..protocol.canonical import parse_canonical
from ..protocol.derive import derive_again, example_multiplier, failure_probability, party_event
from ..protocol.plan import FEDSGD, RoundPlan
from ..protocol.roster import Roster
from ..protocol.signing import Signed
from .federation import Federation

__all__ = [
    "Model",
    "check_local_noise",
    "check_noise_by",
    "declarations",
    "declared_rows_of",
    "invited",
    "plan_of",
    "plan_round",
    "round_costs",
    "undeclared",
]


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
    order: str = "",
) -> RoundPlan:
    """Everything that a round fixes, with the noise that the job's target asks for.

    Args:
        local_noise: fedavg's noise multiplier of DP-SGD; by default calibrated to the job's target: a second's work.
        declared_rows: of each party of the cohort; needed for fedsgd alone.
        clipping_norm, order: as of `jobs.plans.round_plan`.

    Raises:
        InvalidInput, PlanError: when no such round can be run; says why.
    """
    rows = declared_rows or {}
    if spec.strategy == FEDSGD:
        declared_of(spec, roster, rows)
        noise = _noise_of_sum(spec, model.dimension, roster)
    else:
        noise = _local_noise(spec) if local_noise is None else local_noise
    return round_plan(
        spec,
        job_id=job_id,
        number=number,
        model=model,
        roster=roster,
        scheme=scheme,
        noise=noise,
        declared_rows=rows,
        clipping_norm=clipping_norm,
        order=order,
    )


def _noise_of_sum(spec: FederatedTrainingSpec, dimension: int, roster: Roster) -> float:
    """fedsgd's noise multiplier: that of one DP-SGD step, once for all parties."""
    local = spec.local_training
    sensitivity = nearest_bound(local.max_grad_norm, resolution_bits=grid_of(spec, dimension), dimension=dimension)
    return _sum_noise(
        local.epsilon,
        local.delta,
        local.sampling_rate,
        rounds=spec.priced_rounds,
        dimension=dimension,
        sensitivity=sensitivity,
        noise_by=spec.party_privacy.noise_by,
        quorum=invited(spec, roster)[1],
        colluders=roster.colluders,
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
