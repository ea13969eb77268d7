"""From events to ε. One table maps every type of event to an event of dp-accounting; nothing else computes privacy.

The accountant is Rényi differential privacy with the conversion of Canonne, Kamath & Steinke 2020, Proposition 12, as
dp-accounting 0.6 implements it. It bounds discrete noise as well as continuous noise, which PLD accountants of the
continuous Gaussian do not, and it is an upper bound, which the central-limit (GDP) accountant is not. Why it holds for
each type of event, sampled integer noise among them, is written out in docs/accounting.md.
"""

from __future__ import annotations

import functools
import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeGuard

from ..errors import InvalidInput
from .events import DpSgdSteps, Event, NoisySum, NonPrivate, Relation, SampledNoisySum, real

ACCOUNTANT: Final = "RDP (dp-accounting)"
"""How a manifest names the accountant."""

MULTIPLIER_STEPS: Final = 10_000
"""Calibrated noise multipliers are whole multiples of 1/10 000, rounded up: short in a manifest, and close enough."""

_MAX_MULTIPLIER: Final = 10_000_000
_MAX_TICKS: Final = _MAX_MULTIPLIER * MULTIPLIER_STEPS

_USABLE_MULTIPLIER: Final = (2.0**-20, 2.0**40)
"""What is charged for: less noise counts as none (its ε would exceed 10^11), more as this much, so that no square
leaves float64."""

_USABLE_TAU: Final = 2.0**60
"""More than this times the dimension counts as no noise."""

_LARGEST_OF_DP_ACCOUNTING: Final = 1024.0

_DEFAULT_ORDERS: Final = tuple(1.0 + tenth / 10.0 for tenth in range(1, 100)) + tuple(
    float(order) for order in (*range(11, 64), 128, 256, 512, 1024)
)
"""dp-accounting's own, where DP-SGD is bounded: it costs what dp-accounting says."""

_INTEGER_ORDERS: Final = tuple(
    float(order) for order in sorted({*range(2, 65), *(round(64 * 2 ** (step / 8)) for step in range(33))})
)
"""Where sampled integer noise is bounded: 2 … 64, then eight to the octave up to 1024, the default ones among them."""

_ORDERS: Final = tuple(
    sorted({1.0 + 2.0 ** (step / 16.0) for step in range(-104, 321)} | set(_DEFAULT_ORDERS) | set(_INTEGER_ORDERS))
)
"""The orders of every composition: from 1.011 (the conversion needs more than 1.01) to 2^20, which serves ε from 1e-5
to 1e4. Unsampled sums have a closed form at every order, so a fine grid costs nothing. It holds the other two, whose
events are charged in between at the next order of their own: so a further event never makes ε smaller."""

_LARGE_ORDERS: Final = tuple(order for order in _ORDERS if order > _LARGEST_OF_DP_ACCOUNTING)
"""At which an ε below 0.0035 (at δ = 1e-5) is found: sampled releases of either kind are bounded there by `renyi`."""

_OF_STEPS: Final = _DEFAULT_ORDERS + _LARGE_ORDERS
_OF_SAMPLED_SUMS: Final = _INTEGER_ORDERS + _LARGE_ORDERS

_NEXT: Final = {
    own: tuple(bisect_left(own, order) for order in _ORDERS) for own in (_ORDERS, _OF_STEPS, _OF_SAMPLED_SUMS)
}
"""For each of `_ORDERS` the position of the first order of their own that is not below it; past the end, none is."""

SAMPLED_TAU_FACTOR: Final = 1.5
"""What τ·dimension costs a sampled sum: (α - 1/2)/(α - 1) at order α, at most 3/2 from α = 2 on
(docs/accounting.md)."""

_KEPT_RELEASES: Final = 1024
"""Different sampled releases whose divergences are kept, at 3 KiB each: a ledger is composed again at every check, and
an order that is not whole takes a fraction of a millisecond each time."""

MEANINGLESS_EPSILON: Final = 20.0
"""Above it an ε says nothing: the odds may change by e^20 = 5·10^8. Figures are kept, and said to mean nothing."""


def _usable(multiplier: float) -> float:
    return min(real("noise_multiplier", multiplier), _USABLE_MULTIPLIER[1])


def _gaussian(multiplier: float) -> Any:
    """The only place that makes one: of a multiplier that is no `float` dp-accounting drops compositions."""
    import dp_accounting as dp

    return dp.GaussianDpEvent(_usable(multiplier))


def _sampled_gaussian(event: DpSgdSteps | SampledNoisySum) -> Any:
    import dp_accounting as dp

    rate = real("sampling_rate", event.sampling_rate, upper=1.0)
    return dp.PoissonSampledDpEvent(rate, _gaussian(event.noise_multiplier))


def to_dp_event(event: Event) -> Any:
    """`event` as a `dp_accounting.DpEvent`. That of a sampled sum is a bound at integer orders ≥ 2 only.

    dp-accounting's own figure of it may be rounding where noise is large (`renyi.loses_digits`); ours is not.

    It is the sampled Gaussian, and `SAMPLED_TAU_FACTOR` · τ · d for its being a sum of draws.
    """
    import dp_accounting as dp

    if isinstance(event, NonPrivate) or _is_infinite(event):
        return dp.NonPrivateDpEvent()
    if not _is_sampled(event):
        return _closed_form([event])
    one: Any = _sampled_gaussian(event)
    if isinstance(event, SampledNoisySum):
        one = dp.ComposedDpEvent([one, dp.ZCDpEvent(rho=0.0, xi=SAMPLED_TAU_FACTOR * event.tau * event.dimension)])
    return dp.SelfComposedDpEvent(one, _count(event))


def _is_infinite(event: Event) -> bool:
    if isinstance(event, NonPrivate) or event.noise_multiplier < _USABLE_MULTIPLIER[0]:
        return True
    return isinstance(event, NoisySum | SampledNoisySum) and event.tau * event.dimension > _USABLE_TAU


def _is_sampled(event: Event) -> TypeGuard[DpSgdSteps | SampledNoisySum]:
    return isinstance(event, DpSgdSteps | SampledNoisySum) and event.sampling_rate < 1.0


def _count(event: Event) -> int:
    if isinstance(event, DpSgdSteps):
        return event.steps
    return 1 if isinstance(event, NonPrivate) else event.rounds


def _once(event: Event) -> Event:
    """One of the `_count` releases that `event` stands for; whose hands its noise is in costs nothing."""
    if isinstance(event, DpSgdSteps):
        return replace(event, steps=1)
    return event if isinstance(event, NonPrivate) else replace(event, rounds=1, shares=None)


def _concentrated(event: DpSgdSteps | NoisySum | SampledNoisySum) -> tuple[float, float]:
    """(ρ, ξ) of one unsampled release: its Rényi divergence of order α is at most ξ + ρα.

    1/(2z²) for one draw. With τ of a sum of draws either (1/(2z²), τd) or ((1/z + τ√d)²/2, 0): both hold (Kairouz,
    Liu & Steinke 2021, Proposition 14), and the one that is smaller at α = 2 is taken.
    """
    ratio = 1.0 / _usable(event.noise_multiplier)
    if isinstance(event, DpSgdSteps):
        return ratio * ratio / 2.0, 0.0
    stretched = ratio + event.tau * math.sqrt(event.dimension)
    bounds = [(ratio * ratio / 2.0, event.tau * event.dimension), (stretched * stretched / 2.0, 0.0)]
    return min(bounds, key=lambda bound: bound[1] + 2.0 * bound[0])


def _closed_form(events: Sequence[DpSgdSteps | NoisySum | SampledNoisySum]) -> Any:
    """Unsampled Gaussians are one Gaussian, or what bounds it: ρ = Σ 1/(2z²) and ξ add up."""
    import dp_accounting as dp

    each = [(_count(event), *_concentrated(event)) for event in events]
    return dp.ZCDpEvent(
        rho=math.fsum(count * rho for count, rho, _ in each), xi=math.fsum(count * xi for count, _, xi in each)
    )


def merged(events: Iterable[Event]) -> list[Event]:
    """The same composition with equal mechanisms counted together, in a canonical order.

    So k events of one round and one event of k rounds give the same float ε to the last bit.
    """
    counts: Counter[Event] = Counter()
    for event in events:
        counts[_once(event)] += _count(event)
    return [event.repeated(count) for event, count in sorted(counts.items(), key=lambda item: repr(item[0]))]


def _drop_excluded_orders(record: logging.LogRecord) -> bool:
    """dp-accounting warns of every fractional order it leaves out for lack of convergence: sound, and not news."""
    return not record.getMessage().startswith("_compute_log_a_frac failed to converge")


def _own_orders(event: Event) -> tuple[float, ...]:
    """Where `event` has a bound of its own, sorted: a key of `_NEXT`."""
    if isinstance(event, DpSgdSteps):
        return _OF_STEPS
    return _OF_SAMPLED_SUMS if _is_sampled(event) else _ORDERS


def _parts(events: Sequence[Event]) -> tuple[list[Any], list[Any]]:
    """Those without sampling, those with: the former are composed in closed form before anything else."""
    return [event for event in events if not _is_sampled(event)], [event for event in events if _is_sampled(event)]


def _renyi(dp_event: Any, relation: Relation, *, orders: Sequence[float]) -> Any:
    """Rényi divergence by dp-accounting at each of `orders`: an array of float64, inf where it has no bound."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    absl = logging.getLogger("absl")
    if _drop_excluded_orders not in absl.filters:
        absl.addFilter(_drop_excluded_orders)
    accountant = RdpAccountant(orders=orders, neighboring_relation=getattr(dp.NeighboringRelation, relation))
    return accountant.compose(dp_event).rdp


@functools.lru_cache(maxsize=_KEPT_RELEASES)
def _renyi_of_one(event: DpSgdSteps | SampledNoisySum) -> Any:
    """Of one sampled release, at its own orders; the array is shared: not to be written to.

    By dp-accounting up to its largest order, unless it would lose digits; by `renyi` else. What is not a number, or
    negative, is no bound.
    """
    import numpy as np

    from .renyi import loses_digits, sampled_gaussian

    rate, multiplier, orders = event.sampling_rate, _usable(event.noise_multiplier), _own_orders(event)
    known = 0 if loses_digits(rate, multiplier) else len(orders) - len(_LARGE_ORDERS)
    bounds = sampled_gaussian(rate, multiplier, orders[known:])
    if isinstance(event, SampledNoisySum):
        bounds += SAMPLED_TAU_FACTOR * event.tau * event.dimension
    if known:
        bounds = np.concatenate((_renyi(to_dp_event(event), event.relation, orders=orders[:known]), bounds))
    return np.where(bounds >= 0.0, bounds, np.inf)


def _divergences(events: Sequence[Event]) -> Any:
    """Rényi divergence of all `events` together, at most: an array of float64, one for each of `_ORDERS`, inf for none.

    It does not fall as the order grows (van Erven & Harremoës 2014, Theorem 3). So at any order an event costs no more
    than the least of its bounds at its own orders from there on (docs/accounting.md).
    """
    import numpy as np

    total = np.zeros(len(_ORDERS))
    for orders, position in _NEXT.items():
        whole, sampled = _parts([event for event in events if _own_orders(event) is orders])
        if not whole and not sampled:
            continue
        own = _renyi(_closed_form(whole), events[0].relation, orders=orders)
        for event in sampled:
            own = own + _count(event) * _renyi_of_one(_once(event))
        from_there_on = np.minimum.accumulate(np.append(own, np.inf)[::-1])[::-1]
        total += from_there_on[list(position)]
    return np.where(total >= 0.0, total, np.inf)  # of what is not a number dp-accounting makes an epsilon of 0


def _checked(events: Iterable[Event], delta: float) -> tuple[list[Event], float]:
    """The composition, and δ as a Python float."""
    composed, delta = merged(events), real("delta", delta)
    if not 0.0 < delta < 1.0:
        raise InvalidInput("delta must lie strictly between 0 and 1")
    if len({event.unit for event in composed}) > 1:
        raise InvalidInput("events at example level and at party level are never added up")
    return composed, delta


def _failure(events: Sequence[Event]) -> float:
    """Total variation between what all rounds do and what is described, at most."""
    sums = [event for event in events if isinstance(event, NoisySum | SampledNoisySum)]
    return math.fsum(event.rounds * event.failure_probability for event in sums)


def epsilon(events: Iterable[Event], *, delta: float) -> float:
    """ε at `delta` of all `events` together; `math.inf` where nothing is guaranteed, 0 for no events.

    With failure terms η (`failure_probability` of sums, added up over rounds) it is the ε with
    δ' + (1 + e^ε)·η ≤ δ, where δ' is what the mechanisms themselves need. What they cost at another δ is computed from
    the events again, never from the ε; figures at different δ are not compared with one budget.

    Args:
        delta: δ in (0, 1).

    Raises:
        InvalidInput: δ out of range, or events of different units, whose guarantees do not add up.
    """
    composed, delta = _checked(events, delta)
    if not composed:
        return 0.0
    if any(map(_is_infinite, composed)):
        return math.inf
    from dp_accounting.rdp import compute_epsilon

    divergences = _divergences(composed)
    return _with_failure(
        lambda left: float(compute_epsilon(_ORDERS, divergences, left)[0]), delta=delta, failure=_failure(composed)
    )


_FIXED_POINT_STEPS: Final = 200
_FIXED_POINT_SLACK: Final = 1e-9


def _with_failure(curve: Callable[[float], float], *, delta: float, failure: float) -> float:
    """An ε with curve(δ - (1 + e^ε)·η) ≤ ε, as small as an iteration from below finds it; inf if there is none."""
    start = curve(delta)
    if failure == 0.0:
        return start
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


PLD: Final = "PLD (dp-accounting)"
PLD_LIMIT: Final = 50.0
"""Above it a PLD takes long (36 s and 4.7 GB at ε = 1 200), and its figure says nothing."""

PLD_RELEASES: Final = 1 << 20
"""Sampled releases beyond this take minutes (10^6: 16 s; 10^9: no end in sight)."""

_PLD_INTERVAL: Final = 1e-4
"""Of the privacy loss; dp-accounting's default, which rounds upwards."""

Standing = Literal["bound", "estimate", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One accountant's figure.

    Attributes:
        accountant: its name.
        epsilon: at the δ that was asked for; None if it was not computed.
        standing: "bound" may be claimed, "estimate" may not.
        note: what the figure is, in a sentence.
    """

    accountant: str
    epsilon: float | None
    standing: Standing
    note: str


def epsilon_estimates(events: Iterable[Event], *, delta: float) -> tuple[Estimate, Estimate]:
    """The figure that is charged, and beside it that of a privacy loss distribution.

    The second is tighter, and holds for continuous noise alone: for discrete noise at σ = 1 and δ = 1e-5 the true δ
    is 1.65 times what it says.

    Args:
        delta: δ in (0, 1).

    Raises:
        InvalidInput: as `epsilon`.
    """
    composed, delta = _checked(events, delta)
    charged = epsilon(composed, delta=delta)
    bound = Estimate(accountant=ACCOUNTANT, epsilon=charged, standing="bound", note="an upper bound: what is charged")
    many = sum(map(_count, _parts(composed)[1])) > PLD_RELEASES
    if charged > PLD_LIMIT or many:
        note = f"more than {PLD_RELEASES} sampled releases" if many else f"epsilon is above {PLD_LIMIT:g}"
        note = f"not computed: {note}"
        return bound, Estimate(accountant=PLD, epsilon=None, standing="skipped", note=note)
    value = _pld(composed, delta=delta) if composed else 0.0
    if all(isinstance(event, DpSgdSteps) for event in composed):
        return bound, Estimate(
            accountant=PLD, epsilon=value, standing="bound", note="an upper bound for continuous Gaussian noise"
        )
    note = "an estimate: it takes the discrete noise for continuous, which understates it"
    return bound, Estimate(accountant=PLD, epsilon=value, standing="estimate", note=note)


def _pld(events: Sequence[Event], *, delta: float) -> float:
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    relation = getattr(dp.NeighboringRelation, events[0].relation)
    accountant = PLDAccountant(neighboring_relation=relation, value_discretization_interval=_PLD_INTERVAL)
    whole, sampled = _parts(events)
    if whole:
        squares = math.fsum(_count(event) / _usable(event.noise_multiplier) ** 2 for event in whole)
        accountant.compose(_gaussian(1.0 / math.sqrt(squares)))
    for event in sampled:
        accountant.compose(_sampled_gaussian(event), _count(event))
    return _with_failure(lambda left: float(accountant.get_epsilon(left)), delta=delta, failure=_failure(events))


_UNREACHABLE: Final = f"no noise multiplier up to {_MAX_MULTIPLIER:_} reaches this epsilon".replace("_", " ")


def _reaches(event_of: Callable[[float], Event], *, target: float, delta: float) -> Callable[[int], bool]:
    """Whether the event of a noise multiplier, in units of 1/`MULTIPLIER_STEPS`, stays within (`target`, `delta`)."""
    highest = real("the target epsilon", target)
    if highest == 0.0:
        raise InvalidInput("the target epsilon must be positive and finite")
    return lambda tick: epsilon([event_of(tick / MULTIPLIER_STEPS)], delta=delta) <= highest


def _smallest_multiplier(event_of: Callable[[float], Event], *, target: float, delta: float) -> float:
    """Smallest multiple of 1e-4 for which ε of `event_of(multiplier)` is at most `target`."""
    reaches = _reaches(event_of, target=target, delta=delta)
    low, high = 0, MULTIPLIER_STEPS  # low does not reach the target (0 is infinite ε); high is 1.0
    while not reaches(high):
        if high == _MAX_TICKS:
            raise InvalidInput(_UNREACHABLE)
        low, high = high, min(2 * high, _MAX_TICKS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high / MULTIPLIER_STEPS


def calibrate_dp_sgd(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Smallest noise multiplier, a multiple of 1e-4, with which `steps` of DP-SGD stay within (`epsilon`, `delta`).

    Args:
        epsilon: > 0, finite.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
        steps: ≥ 1.

    Raises:
        InvalidInput: an argument out of range, or a target that even a noise multiplier of 10 000 000 does not reach.
    """

    event_of = _dp_sgd_of(sampling_rate, steps)
    return _smallest_multiplier(event_of, target=epsilon, delta=delta)


def check_dp_sgd(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> None:
    """Whether `calibrate_dp_sgd` finds a noise multiplier, in a tenth of its time; same arguments, same errors."""
    if not _reaches(_dp_sgd_of(sampling_rate, steps), target=epsilon, delta=delta)(_MAX_TICKS):
        raise InvalidInput(_UNREACHABLE)


def _dp_sgd_of(sampling_rate: float, steps: int) -> Callable[[float], Event]:
    return lambda multiplier: DpSgdSteps(sampling_rate=sampling_rate, noise_multiplier=multiplier, steps=steps)


def calibrate_sampled_sum(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    rounds: int,
    dimension: int,
    tau_of: Callable[[float], float] | None,
    failure_probability: float = 0.0,
) -> float:
    """Smallest noise multiplier, a multiple of 1e-4, with which `rounds` sampled sums stay within (`epsilon`, `delta`).

    Args:
        epsilon: > 0, finite.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
        rounds: ≥ 1.
        dimension: coordinates of the sum, ≥ 1.
        tau_of: τ of one round's noise at a noise multiplier, falling as that grows; None for a single draw. It may
            raise InvalidInput where the noise is too small to say: such a multiplier is too small.
        failure_probability: of one round, as in `SampledNoisySum`.

    Raises:
        InvalidInput: an argument out of range, or a target that even a noise multiplier of 10 000 000 does not reach.
    """

    def event_of(multiplier: float) -> Event:
        try:
            tau = tau_of(multiplier) if tau_of else 0.0
        except InvalidInput:
            return NonPrivate(unit="example", reason="noise too small for a sum of shares")
        return SampledNoisySum(
            sampling_rate=sampling_rate,
            noise_multiplier=multiplier,
            rounds=rounds,
            tau=tau,
            dimension=dimension,
            failure_probability=failure_probability,
        )

    return _smallest_multiplier(event_of, target=epsilon, delta=delta)


def import_accountant() -> None:
    """Imports what everything here needs, which takes seconds."""
    import dp_accounting.rdp  # noqa: F401
