"""What follows from a round's settings: both roles compute it, so that a party takes no width or variance on trust."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, cast

from ..encryption.scheme import Layout, LayoutRequest, Scheme
from ..errors import PlanError
from ..privacy.events import DpSgdSteps, Event
from ..privacy.noise import tail_bound
from ..privacy.noise_plan import NoiseBy, NoisePlan, fraction_to_json, plan_noise
from ..privacy.rounding import coordinate_bound, rounded_bound
from .canonical import real
from .plan import NoiseSpec, RoundPlan

OVERFLOW_LOG2: Final = 64
"""The noise of some slot of a job exceeds its bound with probability at most 2^-64, and then the party refuses. That is
not charged: (1 + e^ε)·2^-64 is far below any δ wherever ε still means something (docs/numerics.md)."""


@dataclass(frozen=True, slots=True)
class Derived:
    """Bounds, noise and layout of a round."""

    rounded_bound: int
    noise_plan: NoisePlan
    noise: NoiseSpec
    layout: Layout


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
) -> Derived:
    """The sensitivity after rounding, the noise that gives the multiplier, and the slots that hold their sum.

    Args:
        dimension: trainable parameters.
        clipping_norm: L2 bound of an update, before encoding.
        resolution_bits: f of the resolution 2^-f.
        noise_multiplier: of the sum, over its sensitivity.
        cohort, quorum, colluders: parties invited, needed, and possibly corrupt.
        priced_rounds: over how many rounds the probability of an overflow is bounded.

    Raises:
        InvalidInput: a setting out of range; SlotOverflowError when no slot can hold the sum.
    """
    bound = math.ceil(rounded_bound(clipping_norm, resolution_bits=resolution_bits, dimension=dimension))
    noise = plan_noise(
        noise_by=cast(NoiseBy, noise_by),
        noise_multiplier=noise_multiplier,
        sensitivity=float(bound),
        quorum=quorum,
        colluders=colluders,
    )
    with_aggregator = noise.aggregator_sigma2 > 0
    largest = max(noise.aggregator_sigma2, noise.share_sigma2)
    draws = dimension * (cohort + 1) * priced_rounds
    noise_bound = tail_bound(largest, log2_probability=OVERFLOW_LOG2, draws=draws) if largest else 0
    layout = scheme.plan(
        LayoutRequest(
            parameter_count=dimension,
            value_bound=coordinate_bound(clipping_norm, resolution_bits=resolution_bits),
            noise_bound=noise_bound,
            contributions=cohort + int(with_aggregator),
        )
    )
    spec = NoiseSpec(
        noise_by=noise_by,
        noise_multiplier=real(noise_multiplier),
        share_sigma2=fraction_to_json(noise.share_sigma2),
        aggregator_sigma2=fraction_to_json(noise.aggregator_sigma2),
        bound=noise_bound,
        delta=real(delta),
    )
    return Derived(bound, noise, spec, layout)


def derive_again(scheme: Scheme, plan: RoundPlan) -> Derived:
    """What `plan` must contain, computed from its settings alone.

    Raises:
        PlanError: when it contains something else; names the field.
    """
    derived = derive(
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
    )
    found = {"rounded_bound": plan.rounded_bound, "noise": plan.noise, "layout": plan.layout}
    computed = {"rounded_bound": derived.rounded_bound, "noise": derived.noise, "layout": derived.layout.to_json()}
    for field, value in computed.items():
        if found[field] != value:
            raise PlanError(f"the round plan's {field} does not follow from its settings", field=field)
    return derived


def example_event(plan: RoundPlan) -> DpSgdSteps:
    """What one round costs each row of a party's data."""
    local = plan.local
    return DpSgdSteps(
        sampling_rate=float(local.sampling_rate), noise_multiplier=float(local.noise_multiplier), steps=local.steps
    )


def party_event(plan: RoundPlan, noise: NoisePlan, *, against: Literal["release", "aggregator"] = "release") -> Event:
    """What one round costs a party as a whole, against whoever sees the release or against the aggregator."""
    if against == "aggregator":
        return noise.against_aggregator_event(dimension=plan.dimension)
    return noise.release_event(dimension=plan.dimension)
