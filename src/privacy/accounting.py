"""From events to ε. One table maps every type of event to an event of dp-accounting; nothing else computes privacy.

The accountant is Rényi differential privacy with the conversion of Canonne, Kamath & Steinke 2020, Proposition 12, as
dp-accounting 0.6 implements it. It bounds discrete noise as well as continuous noise, which PLD accountants of the
continuous Gaussian do not, and it is an upper bound, which the central-limit (GDP) accountant is not.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from ..errors import InvalidInput
from .events import DpSgdSteps, Event, NoisySum, NonPrivate

ACCOUNTANT: Final = "RDP (dp-accounting)"
"""How a manifest names the accountant."""

MULTIPLIER_STEPS: Final = 10_000
"""Calibrated noise multipliers are whole multiples of 1/10 000, rounded up: short in a manifest, and close enough."""

_MAX_TICKS: Final = 10_000 * MULTIPLIER_STEPS

_UNSAMPLED_ORDERS: Final = tuple(1.0 + 2.0 ** (step / 16.0) for step in range(-104, 321))
"""Unsampled Gaussians have a closed form at every order, so a fine grid costs nothing: from 1.011 (the conversion needs
more than 1.01) to 2^20, which serves ε from 1e-3 to 1e4."""


MEANINGLESS_EPSILON: Final = 20.0
"""Above it an ε says nothing: the odds may change by e^20 = 5·10^8. Figures are kept, and said to mean nothing."""


def _dp_sgd(event: DpSgdSteps) -> Any:
    import dp_accounting as dp

    gaussian = dp.GaussianDpEvent(event.noise_multiplier)
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)


def _noisy_sum(event: NoisySum) -> Any:
    """Rényi divergence of order α ≤ ξ + ρα: with τ of the sum's noise either (τd, 1/(2z²)) or (0, (1/z + τ√d)²/2).

    Both hold (Kairouz, Liu & Steinke 2021, Proposition 14); the one that is smaller at α = 2 is taken.
    """
    import dp_accounting as dp

    if event.noise_multiplier == 0.0:
        return dp.NonPrivateDpEvent()
    ratio = 1.0 / event.noise_multiplier
    whole = event.tau * event.dimension
    plain = dp.ZCDpEvent(rho=ratio**2 / 2.0, xi=whole)
    stretched = dp.ZCDpEvent(rho=(ratio + event.tau * math.sqrt(event.dimension)) ** 2 / 2.0)
    one = min(plain, stretched, key=lambda bound: float(bound.xi + 2.0 * bound.rho))
    return dp.SelfComposedDpEvent(one, event.rounds)


def _non_private(_event: NonPrivate) -> Any:
    import dp_accounting as dp

    return dp.NonPrivateDpEvent()


_TABLE: Final[dict[type, Callable[[Any], Any]]] = {
    DpSgdSteps: _dp_sgd,
    NoisySum: _noisy_sum,
    NonPrivate: _non_private,
}


def to_dp_event(event: Event) -> Any:
    """`event` as a `dp_accounting.DpEvent`."""
    return _TABLE[type(event)](event)


def merged(events: Iterable[Event]) -> list[Event]:
    """The same composition with equal mechanisms counted together, in a canonical order.

    So k events of one round and one event of k rounds give the same float ε to the last bit.
    """
    counts: Counter[Event] = Counter()
    for event in events:
        if isinstance(event, DpSgdSteps):
            counts[replace(event, steps=1)] += event.steps
        elif isinstance(event, NoisySum):
            counts[replace(event, rounds=1)] += event.rounds
        else:
            counts[event] += 1
    return [event.repeated(count) for event, count in sorted(counts.items(), key=lambda item: repr(item[0]))]


def _drop_excluded_orders(record: logging.LogRecord) -> bool:
    """dp-accounting warns of every fractional order it leaves out for lack of convergence: sound, and not news."""
    return not record.getMessage().startswith("_compute_log_a_frac failed to converge")


def _accountant(events: Sequence[Event]) -> Any:
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    absl = logging.getLogger("absl")
    if _drop_excluded_orders not in absl.filters:
        absl.addFilter(_drop_excluded_orders)
    relation = getattr(dp.NeighboringRelation, events[0].relation)
    orders = None if events[0].unit == "example" else _UNSAMPLED_ORDERS
    accountant = RdpAccountant(orders=orders, neighboring_relation=relation)
    for event in events:
        accountant.compose(to_dp_event(event))
    return accountant


def epsilon(events: Iterable[Event], *, delta: float) -> float:
    """ε at `delta` of all `events` together; `math.inf` where nothing is guaranteed, 0 for no events.

    With failure terms η (`NoisySum.failure_probability`, summed over rounds) it is the ε with
    δ' + (1 + e^ε)·η ≤ δ, where δ' is what the mechanisms themselves need.

    Args:
        delta: δ in (0, 1).

    Raises:
        InvalidInput: δ out of range, or events of different units, whose guarantees do not add up.
    """
    if not 0.0 < delta < 1.0:
        raise InvalidInput("delta must lie strictly between 0 and 1")
    composed = merged(events)
    if not composed:
        return 0.0
    if len({event.unit for event in composed}) > 1:
        raise InvalidInput("events at example level and at party level are never added up")
    if any(isinstance(event, NonPrivate) or event.noise_multiplier == 0.0 for event in composed):
        return math.inf
    accountant = _accountant(composed)
    failure = math.fsum(event.rounds * event.failure_probability for event in composed if isinstance(event, NoisySum))
    value = float(accountant.get_epsilon(delta))
    if failure == 0.0:
        return value
    return _with_failure(
        lambda remaining: float(accountant.get_epsilon(remaining)), value, delta=delta, failure=failure
    )


_FIXED_POINT_STEPS: Final = 200
_FIXED_POINT_SLACK: Final = 1e-9


def _with_failure(curve: Callable[[float], float], start: float, *, delta: float, failure: float) -> float:
    """An ε with curve(δ - (1 + e^ε)·η) ≤ ε, as small as an iteration from below finds it; inf if there is none."""
    candidate = start * (1.0 + _FIXED_POINT_SLACK) + _FIXED_POINT_SLACK
    for _ in range(_FIXED_POINT_STEPS):
        if candidate > 700.0:  # e^ε leaves float64
            return math.inf
        remaining = delta - (1.0 + math.exp(candidate)) * failure
        if remaining <= 0.0:
            return math.inf
        needed = curve(remaining)
        if needed <= candidate:
            return candidate
        candidate = needed * (1.0 + _FIXED_POINT_SLACK) + _FIXED_POINT_SLACK
    return math.inf


_epsilon: Final = epsilon  # `calibrate_dp_sgd` has a parameter of that name


def calibrate_dp_sgd(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Smallest noise multiplier, a multiple of 1e-4, with which `steps` of DP-SGD stay within (`epsilon`, `delta`).

    Args:
        epsilon: > 0, finite.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
        steps: ≥ 1.

    Raises:
        InvalidInput: an argument out of range, or a target that even a noise multiplier of 10 000 does not reach.
    """
    reaches = _target(epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps)
    low, high = 0, MULTIPLIER_STEPS  # low does not reach the target (0 is infinite ε); high is 1.0
    while not reaches(high):
        if high == _MAX_TICKS:
            raise InvalidInput(_UNREACHABLE)
        low, high = high, min(2 * high, _MAX_TICKS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high / MULTIPLIER_STEPS


def check_dp_sgd(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> None:
    """Whether `calibrate_dp_sgd` finds a noise multiplier, in a tenth of its time; same arguments, same errors."""
    reaches = _target(epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps)
    if not reaches(_MAX_TICKS):
        raise InvalidInput(_UNREACHABLE)


_UNREACHABLE: Final = "no noise multiplier up to 10 000 reaches this epsilon"


def _target(epsilon: float, *, delta: float, sampling_rate: float, steps: int) -> Callable[[int], bool]:
    """Whether a noise multiplier, in units of 1/`MULTIPLIER_STEPS`, stays within (`epsilon`, `delta`)."""
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise InvalidInput("the target epsilon must be positive and finite")

    def reaches(tick: int) -> bool:
        event = DpSgdSteps(sampling_rate=sampling_rate, noise_multiplier=tick / MULTIPLIER_STEPS, steps=steps)
        return _epsilon([event], delta=delta) <= epsilon

    return reaches


def import_accountant() -> None:
    """Imports what everything here needs, which takes seconds."""
    import dp_accounting.rdp  # noqa: F401
