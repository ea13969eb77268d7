"""What follows from a round's settings: both roles compute it, so that a party takes no width or variance on trust."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from ..encryption.scheme import Layout, LayoutRequest, Scheme
from ..errors import PlanError
from ..privacy.clipping import MIN_ADAPTIVE_PARTIES, AdaptiveClipping, joint_sensitivity
from ..privacy.events import DpSgdSteps, Event, NoiseBy, NoisySum
from ..privacy.figures import Against
from ..privacy.noise import tail_bound
from ..privacy.noise_plan import NoisePlan, fraction_to_json, plan_noise
from ..privacy.rounding import coordinate_bound, least_resolution_bits, nearest_bound, rounded_bound
from ..privacy.sampling import batch_cap
from .canonical import real
from .plan import GradientSum, NoiseSpec, RoundPlan

OVERFLOW_LOG2: Final = 64
"""The noise of some slot of a job exceeds its bound with probability at most 2^-64, and then the party refuses. That is
taken from δ, times 1 + e^ε: at δ = 1e-5 nothing is left of it above ε = 33 (docs/numerics.md)."""
CAP_LOG2: Final = 64
"""Some batch of a `fedsgd` job exceeds the cap with probability at most 2^-64."""


@dataclass(frozen=True, slots=True)
class Derived:
    """Bounds, noise and layout of a round.

    Attributes:
        contribution_norm: bound on what a party contributes, before encoding.
        resolution_bits: of the grid.
        cap: `GradientSum.batch_cap`; 0 under fedavg.
        bit_unit: `NormAdaptation.bit_unit`; 0 without adaptive clipping.
    """

    rounded_bound: int
    noise_plan: NoisePlan
    noise: NoiseSpec
    layout: Layout
    contribution_norm: float
    resolution_bits: int
    cap: int = 0
    bit_unit: int = 0


def derive(
    scheme: Scheme,
    *,
    dimension: int,
    clipping_norm: float,
    resolution_bits: int,
    noise_by: str,
    noise_multiplier: float,
    delta: float,
    cohort: int,
    quorum: int,
    colluders: int,
    priced_rounds: int,
    adaptive: AdaptiveClipping | None = None,
) -> Derived:
    """The sensitivity after rounding, the noise that gives the multiplier, and the slots that hold their sum.

    Args:
        dimension: trainable parameters.
        clipping_norm: L2 bound of an update, before encoding.
        resolution_bits: f of the resolution 2^-f.
        noise_multiplier: of the sum, over its sensitivity.
        cohort, quorum, colluders: parties invited, needed, and possibly corrupt.
        priced_rounds: over how many rounds the probability of an overflow is bounded.
        adaptive: how the clipping norm follows the updates' norms: a bit of each party is one more value.

    Raises:
        InvalidInput: a setting out of range; SlotOverflowError when no slot can hold the sum.
        PlanError: adaptive clipping with too few parties, or with a norm outside its bounds.
    """
    bound = math.ceil(rounded_bound(clipping_norm, resolution_bits=resolution_bits, dimension=dimension))
    bit_unit = _bit_unit(adaptive, noise_multiplier, bound, quorum=quorum, norm=clipping_norm) if adaptive else 0
    noise = plan_noise(
        noise_by=cast(NoiseBy, noise_by),
        noise_multiplier=noise_multiplier,
        sensitivity=float(joint_sensitivity(bound, bit_unit)),
        quorum=quorum,
        colluders=colluders,
    )
    return _with_slots(
        scheme,
        noise,
        dimension=dimension,
        rounded=bound,
        norm=clipping_norm,
        resolution_bits=resolution_bits,
        delta=delta,
        cohort=cohort,
        priced_rounds=priced_rounds,
        bit_unit=bit_unit,
    )


def _bit_unit(
    adaptive: AdaptiveClipping, noise_multiplier: float, sensitivity: int, *, quorum: int, norm: float
) -> int:
    if quorum < MIN_ADAPTIVE_PARTIES:
        raise PlanError(
            f"adaptive clipping needs a quorum of at least {MIN_ADAPTIVE_PARTIES} parties (got {quorum}): with fewer "
            "the noise hides how many updates were within the norm",
            field="quorum",
        )
    if not adaptive.smallest <= norm <= adaptive.largest:
        raise PlanError(
            f"the clipping norm {norm:g} is outside [{adaptive.smallest:g}, {adaptive.largest:g}], the bounds of "
            "adaptive clipping",
            field="clipping_norm",
        )
    return adaptive.bit_unit(noise_multiplier, sensitivity)


def derive_gradient_sum(
    scheme: Scheme,
    *,
    dimension: int,
    max_grad_norm: float,
    sampling_rate: float,
    resolution_bits: int,
    noise_by: str,
    noise_multiplier: float,
    delta: float,
    declared_rows: Mapping[str, int],
    trusted_aggregator: bool,
    quorum: int,
    colluders: int,
    priced_rounds: int,
) -> Derived:
    """`derive` for `fedsgd`: what one example can change, the noise over that, and slots for the largest batch.

    Args:
        max_grad_norm: L2 bound of one example's gradient.
        sampling_rate: of every party's Poisson sample.
        noise_multiplier: of the sum, over what one example can change; all planned noise.
        declared_rows: of each party of the cohort.
        trusted_aggregator: the job lets the aggregator alone draw the noise.

    Raises:
        PlanError: the aggregator alone would draw the noise and the job does not call it trusted, or calls it so for
            nothing; a grid so coarse that rounding costs noise; a party that declares no rows.
        InvalidInput, SlotOverflowError: as `derive`.
    """
    if (noise_by == "aggregator") != trusted_aggregator:
        raise PlanError(
            "fedsgd with noise_by aggregator is a trusted server: the job has to say trusted_aggregator: true, and "
            "only such a job may",
            field="trusted_aggregator",
        )
    _check_grid(max_grad_norm, resolution_bits=resolution_bits, dimension=dimension)
    if not declared_rows or min(declared_rows.values()) < 1:
        raise PlanError("every party of a fedsgd cohort declares at least one row", field="declared_rows")
    most, cohort = max(declared_rows.values()), len(declared_rows)
    cap = _cap(most, sampling_rate=sampling_rate, cohort=cohort, priced_rounds=priced_rounds)
    bound = nearest_bound(max_grad_norm, resolution_bits=resolution_bits, dimension=dimension)
    noise = plan_noise(
        noise_by=cast(NoiseBy, noise_by),
        noise_multiplier=noise_multiplier,
        sensitivity=float(bound),
        quorum=quorum,
        colluders=colluders,
    )
    return _with_slots(
        scheme,
        noise,
        dimension=dimension,
        rounded=bound,
        norm=cap * max_grad_norm,
        resolution_bits=resolution_bits,
        delta=delta,
        cohort=len(declared_rows),
        priced_rounds=priced_rounds,
        cap=cap,
    )


def _check_grid(max_grad_norm: float, *, resolution_bits: int, dimension: int) -> None:
    least = least_resolution_bits(max_grad_norm, dimension=dimension)
    if resolution_bits < least:
        raise PlanError(
            f"a sum of {dimension} coordinates under a norm of {max_grad_norm:g} needs at least {least} "
            f"resolution bits, the plan has {resolution_bits}",
            field="resolution_bits",
        )


def _cap(rows: int, *, sampling_rate: float, cohort: int, priced_rounds: int) -> int:
    return batch_cap(rows, sampling_rate=sampling_rate, draws=cohort * priced_rounds, log2_probability=CAP_LOG2)


def own_batch_cap(plan: RoundPlan, rows: int) -> int:
    """Of a fedsgd plan the cap of a party that declares `rows`: what it computes for each sample, however small. Never
    above the plan's, which is that of the largest, so that all slots are the same: what others declare costs a party no
    work."""
    cohort, rate = len(plan.cohort), float(plan.local.sampling_rate)
    return _cap(rows, sampling_rate=rate, cohort=cohort, priced_rounds=plan.priced_rounds)


def _with_slots(
    scheme: Scheme,
    noise: NoisePlan,
    *,
    dimension: int,
    rounded: int,
    norm: float,
    resolution_bits: int,
    delta: float,
    cohort: int,
    priced_rounds: int,
    cap: int = 0,
    bit_unit: int = 0,
) -> Derived:
    """Slots for contributions of L2 norm `norm`, each with its noise; one more for a bit where that has a unit."""
    values = dimension + (bit_unit > 0)
    with_aggregator = noise.aggregator_sigma2 > 0
    largest = max(noise.aggregator_sigma2, noise.share_sigma2)
    draws = values * (cohort + 1) * priced_rounds
    noise_bound = tail_bound(largest, log2_probability=OVERFLOW_LOG2, draws=draws) if largest else 0
    layout = scheme.plan(
        LayoutRequest(
            parameter_count=values,
            value_bound=max(coordinate_bound(norm, resolution_bits=resolution_bits), bit_unit),
            noise_bound=noise_bound,
            contributions=cohort + int(with_aggregator),
        )
    )
    spec = NoiseSpec(
        noise_by=noise.noise_by,
        noise_multiplier=real(noise.noise_multiplier),
        share_sigma2=fraction_to_json(noise.share_sigma2),
        aggregator_sigma2=fraction_to_json(noise.aggregator_sigma2),
        bound=noise_bound,
        delta=real(delta),
    )
    return Derived(
        rounded,
        noise,
        spec,
        layout,
        contribution_norm=norm,
        resolution_bits=resolution_bits,
        cap=cap,
        bit_unit=bit_unit,
    )


def derive_again(scheme: Scheme, plan: RoundPlan) -> Derived:
    """What `plan` must contain, computed from its settings alone.

    Raises:
        PlanError: when it contains something else; names the field.
    """
    if plan.gradient_sum is None:
        derived = _derive_update(scheme, plan)
        found: dict[str, Any] = {"bit_unit": plan.bit_unit}
        computed: dict[str, Any] = {"bit_unit": derived.bit_unit}
    else:
        derived = _derive_sum(scheme, plan, plan.gradient_sum)
        found = {
            "clipping_norm": plan.clipping_norm,
            "batch_cap": plan.gradient_sum.batch_cap,
            "local.steps": plan.local.steps,
            "local.noise_multiplier": plan.local.noise_multiplier,
        }
        computed = {
            "clipping_norm": real(derived.contribution_norm),
            "batch_cap": derived.cap,
            "local.steps": 1,
            "local.noise_multiplier": real(example_multiplier(derived.noise_plan)),
        }
    found |= {"rounded_bound": plan.rounded_bound, "noise": plan.noise, "layout": plan.layout}
    computed |= {"rounded_bound": derived.rounded_bound, "noise": derived.noise, "layout": derived.layout.to_json()}
    for field, value in computed.items():
        if found[field] != value:
            raise PlanError(f"the round plan's {field} does not follow from its settings", field=field)
    return derived


def _derive_update(scheme: Scheme, plan: RoundPlan) -> Derived:
    return derive(
        scheme,
        dimension=plan.dimension,
        clipping_norm=float(plan.clipping_norm),
        resolution_bits=plan.resolution_bits,
        noise_by=plan.noise.noise_by,
        noise_multiplier=float(plan.noise.noise_multiplier),
        delta=float(plan.noise.delta),
        cohort=len(plan.cohort),
        quorum=plan.quorum,
        colluders=plan.colluders,
        priced_rounds=plan.priced_rounds,
        adaptive=adaptation_of(plan),
    )


def adaptation_of(plan: RoundPlan) -> AdaptiveClipping | None:
    """How the clipping norm follows the updates' norms; None where it stays.

    Raises:
        InvalidInput: a setting out of its range.
    """
    if plan.adaptive_clipping is None:
        return None
    given = plan.adaptive_clipping
    return AdaptiveClipping(
        quantile=float(given.quantile),
        learning_rate=float(given.learning_rate),
        bit_deviation=float(given.bit_deviation),
        smallest=float(given.smallest),
        largest=float(given.largest),
    )


def _derive_sum(scheme: Scheme, plan: RoundPlan, gradient_sum: GradientSum) -> Derived:
    if plan.adaptive_clipping is not None:
        raise PlanError("only fedavg has adaptive clipping", field="adaptive_clipping")
    if sorted(gradient_sum.declared_rows) != sorted(plan.cohort):
        raise PlanError("the plan's declared rows are not those of its cohort", field="declared_rows")
    return derive_gradient_sum(
        scheme,
        dimension=plan.dimension,
        max_grad_norm=float(plan.local.max_grad_norm),
        sampling_rate=float(plan.local.sampling_rate),
        resolution_bits=plan.resolution_bits,
        noise_by=plan.noise.noise_by,
        noise_multiplier=float(plan.noise.noise_multiplier),
        delta=float(plan.noise.delta),
        declared_rows=gradient_sum.declared_rows,
        trusted_aggregator=gradient_sum.trusted_aggregator,
        quorum=plan.quorum,
        colluders=plan.colluders,
        priced_rounds=plan.priced_rounds,
    )


# --- what a round costs -----------------------------------------------------------------------------------------------


def noise_of(plan: RoundPlan) -> NoisePlan:
    """Who draws how much in a round whose plan was derived."""
    return plan_noise(
        noise_by=cast(NoiseBy, plan.noise.noise_by),
        noise_multiplier=float(plan.noise.noise_multiplier),
        sensitivity=float(joint_sensitivity(plan.rounded_bound, plan.bit_unit)),
        quorum=plan.quorum,
        colluders=plan.colluders,
    )


def charged_against(noise: NoisePlan) -> Against:
    """Against whom a row is protected under `fedsgd`, and charged for: the aggregator, unless it is the trusted server
    that draws all the noise."""
    return "release" if noise.noise_by == "aggregator" else "aggregator"


def example_multiplier(noise: NoisePlan) -> float:
    """Of `fedsgd`: the guaranteed noise that a row is charged for, over what one row can change; 0 for none."""
    if charged_against(noise) == "release":
        return noise.multiplier_release or 0.0
    return noise.multiplier_against_aggregator or 0.0


def overflow_probability(priced_rounds: int) -> float:
    """Of one round, as a share of a job's: that noise does not fit its slot, and the party refuses."""
    return 2.0**-OVERFLOW_LOG2 / priced_rounds


def failure_probability(priced_rounds: int) -> float:
    """Of one fedsgd round for a row, as a share of a job's: that noise does not fit its slot, or that a batch exceeds
    the cap. The latter only shortens the sum, by a projection, and costs no privacy; it is charged all
    the same, so that the figure does not rest on that argument."""
    return overflow_probability(priced_rounds) + 2.0**-CAP_LOG2 / priced_rounds


def example_event(plan: RoundPlan, *, against: Against | None = None) -> Event:
    """What one round costs each row of a party's data.

    Under fedavg a party's own noise protects its rows, against everybody alike. Under fedsgd `against` None is what is
    charged (`charged_against`).
    """
    local = plan.local
    if plan.gradient_sum is None:
        return DpSgdSteps(
            sampling_rate=float(local.sampling_rate), noise_multiplier=float(local.noise_multiplier), steps=local.steps
        )
    noise = noise_of(plan)
    return noise.event(
        against or charged_against(noise),
        dimension=plan.dimension,
        sampling_rate=float(local.sampling_rate),
        failure_probability=failure_probability(plan.priced_rounds),
    )


def party_event(plan: RoundPlan, noise: NoisePlan, *, against: Against = "release") -> Event:
    """What one round costs a party as a whole, against whoever sees the release or against the aggregator.

    Under fedsgd noise that hides a row hides a party hardly at all: what it contributes has up to `batch_cap` times
    the norm of one gradient. The figure says so. (A batch above the cap is projected onto that norm: it costs nothing.)
    """
    event = noise.event(
        against, dimension=plan.value_count, failure_probability=overflow_probability(plan.priced_rounds)
    )
    if plan.gradient_sum is None or not isinstance(event, NoisySum):
        return event
    smaller = plan.rounded_bound / contribution_bound(plan)
    shares = event.shares and replace(event.shares, share_multiplier=event.shares.share_multiplier * smaller)
    return replace(event, noise_multiplier=event.noise_multiplier * smaller, shares=shares)


def contribution_bound(plan: RoundPlan) -> int:
    """L2 bound, in integer units, of what a party contributes under fedsgd: 2^f·(cap·C) + √d/2, rounded up."""
    return nearest_bound(float(plan.clipping_norm), resolution_bits=plan.resolution_bits, dimension=plan.dimension)
