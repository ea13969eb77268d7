"""What a privacy mechanism did, as data: the events that a ledger stores instead of epsilons.

An event is versioned and canonical: the same event has one JSON text, reals are decimal strings (the shortest that give
the float back), unknown types, versions and fields are refused. ε is recomputed from events by `accounting`. A value
out of its range raises InvalidInput wherever an event is made; numbers of other types become Python's there.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import ClassVar, Final, Literal, get_args

from ..errors import InvalidInput

Unit = Literal["example", "party"]
"""Whom a guarantee protects: one row of training data, or everything that one party contributes."""

NoiseBy = Literal["both", "parties", "aggregator"]
"""Who draws the noise on a sum: half the variance each, the parties alone, or the aggregator alone."""

Relation = Literal["ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL"]
"""`dp_accounting.NeighboringRelation` by name: one unit more or less, or its contribution replaced by zero."""

RELATIONS: Final[dict[Unit, Relation]] = {"example": "ADD_OR_REMOVE_ONE", "party": "REPLACE_SPECIAL"}

JsonEvent = dict[str, str | int]

_MAX_COUNT: Final = 1 << 53
_MAX_REASON: Final = 200


def real(name: str, value: object, *, upper: float = math.inf) -> float:
    """A real that an event may hold, as a Python float: the only kind with which accountants are to be trusted.

    dp-accounting takes what is no `float` for something that it need not compose. A whole number, a fraction, a decimal
    and numpy's scalars become the nearest float here; a truth value or a text is none.

    Raises:
        InvalidInput: another type, not finite, negative, or above `upper`; names `name`.
    """
    found = math.nan
    if not isinstance(value, bool) and isinstance(value, numbers.Real | Decimal):
        with suppress(OverflowError, ValueError):
            found = float(value)
    if not (math.isfinite(found) and 0.0 <= found <= upper):
        raise InvalidInput(f"{name} must be a finite number in [0, {upper}]")
    return found


def count(name: str, value: object, *, least: int = 1) -> int:
    """A count that an event may hold, as a Python int: numpy's overflow silently.

    Raises:
        InvalidInput: another type, below `least`, or above 2^53; names `name`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= _MAX_COUNT:
        raise InvalidInput(f"{name} must be an integer in [{least}, 2^53]")
    return int(value)


def _convert(record: Event | Shares) -> None:
    """Check the numbers of a new record, and put Python's in their place."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name in _REALS:
            upper = 1.0 if field.name in _AT_MOST_1 else math.inf
            object.__setattr__(record, field.name, real(field.name, value, upper=upper))
        elif field.name in _COUNTS:
            object.__setattr__(record, field.name, count(field.name, value, least=int(field.name != "colluders")))
    if getattr(record, "sampling_rate", 1.0) == 0.0:
        raise InvalidInput("sampling_rate must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpSgdSteps:
    """`steps` of DP-SGD on one data set: Poisson sampling, per-example clipping, Gaussian noise on the sum.

    Example level: one example more or less.

    Attributes:
        sampling_rate: q in (0, 1], the probability of a row to be in a step.
        noise_multiplier: standard deviation over clipping norm, ≥ 0.
        steps: ≥ 1.
    """

    type: ClassVar[str] = "dp_sgd_steps"
    unit: ClassVar[Unit] = "example"
    relation: ClassVar[Relation] = RELATIONS["example"]
    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _convert(self)

    def repeated(self, times: int) -> DpSgdSteps:
        """The same `times` over."""
        return replace(self, steps=self.steps * count("times", times))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of whose hands the noise on a sum is: what its cost against the aggregator, or against all others, follows from.

    Attributes:
        noise_by: who drew.
        quorum, colluders: of every `quorum` contributions all but `colluders` are counted on to carry their share.
        share_multiplier: guaranteed standard deviation of one party's share over the sensitivity of the sum; 0.0 if
            parties draw none, else above 0.
        shares_tau: `noise.sum_divergence` of the counted shares alone, without the aggregator's noise.
    """

    noise_by: NoiseBy
    quorum: int
    colluders: int
    share_multiplier: float
    shares_tau: float

    def __post_init__(self) -> None:
        if self.noise_by not in get_args(NoiseBy):
            raise InvalidInput("noise_by must be both, parties or aggregator")
        _convert(self)
        if not self.colluders < self.quorum:
            raise InvalidInput("colluders must be an integer in [0, quorum)")
        if (self.noise_by == "aggregator") != (self.share_multiplier == 0.0):
            raise InvalidInput("parties draw a share unless the aggregator draws all the noise")
        if not self.share_multiplier and self.shares_tau:
            raise InvalidInput("without shares there is no sum of them")

    @property
    def honest(self) -> int:
        """Shares that are counted on."""
        return self.quorum - self.colluders


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisySum:
    """`rounds` releases of a sum of clipped updates with discrete Gaussian noise from one or several hands.

    Party level: one party's update replaced by zero; who contributed is public.

    Attributes:
        noise_multiplier: guaranteed standard deviation of all noise over the sensitivity of the sum, ≥ 0.
        rounds: ≥ 1.
        tau: `noise.sum_divergence` of the noise in one round; 0 for a single draw.
        dimension: coordinates of the sum, ≥ 1.
        failure_probability: of one round, the total variation distance between what ran and what is described here
            (noise that was cut or refused at a bound; an overflow that wraps is post-processing and costs nothing).
            It is taken from δ, times 1 + e^ε.
        shares: of whose hands the noise is; None where it is not known (events of version 1).
    """

    type: ClassVar[str] = "noisy_sum"
    unit: ClassVar[Unit] = "party"
    relation: ClassVar[Relation] = RELATIONS["party"]
    noise_multiplier: float
    rounds: int = 1
    tau: float = 0.0
    dimension: int = 1
    failure_probability: float = 0.0
    shares: Shares | None = None

    def __post_init__(self) -> None:
        _convert(self)

    def repeated(self, times: int) -> NoisySum:
        """The same `times` over."""
        return replace(self, rounds=self.rounds * count("times", times))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledNoisySum:
    """`rounds` releases of a sum of clipped gradients over a secret Poisson sample, with discrete Gaussian noise.

    Example level: one example more or less. The sum is one of integers: what one example can change, rounding
    included, is its sensitivity.

    Attributes:
        sampling_rate: q in (0, 1], the probability of a row to be in the sample of a round; nobody learns who was.
        noise_multiplier: guaranteed standard deviation of all noise over the sensitivity of the sum, ≥ 0.
        rounds: ≥ 1.
        tau: `noise.sum_divergence` of the noise in one round; 0 for a single draw.
        dimension: coordinates of the sum, ≥ 1.
        failure_probability: as in `NoisySum`; a batch above its cap, whose sum was shortened, belongs here.
        shares: as in `NoisySum`.
    """

    type: ClassVar[str] = "sampled_noisy_sum"
    unit: ClassVar[Unit] = "example"
    relation: ClassVar[Relation] = RELATIONS["example"]
    sampling_rate: float
    noise_multiplier: float
    rounds: int = 1
    tau: float = 0.0
    dimension: int = 1
    failure_probability: float = 0.0
    shares: Shares | None = None

    def __post_init__(self) -> None:
        _convert(self)

    def repeated(self, times: int) -> SampledNoisySum:
        """The same `times` over."""
        return replace(self, rounds=self.rounds * count("times", times))


@dataclass(frozen=True, slots=True, kw_only=True)
class NonPrivate:
    """A release without a guarantee: ε is infinite. `reason` says why, in public words (ASCII, at most 200)."""

    type: ClassVar[str] = "non_private"
    unit: Unit
    reason: str

    def __post_init__(self) -> None:
        if self.unit not in RELATIONS:
            raise InvalidInput("unit must be 'example' or 'party'")
        if type(self.reason) is not str or not self.reason.isascii() or not 1 <= len(self.reason) <= _MAX_REASON:
            raise InvalidInput(f"reason must be 1 to {_MAX_REASON} ASCII characters")

    @property
    def relation(self) -> Relation:
        """The relation of its unit."""
        return RELATIONS[self.unit]

    def repeated(self, times: int) -> NonPrivate:
        """Itself: it cannot get worse."""
        count("times", times)
        return self


Event = DpSgdSteps | NoisySum | SampledNoisySum | NonPrivate

VERSION: Final = 1
SHARES_VERSION: Final = 2
"""Of an event that says of whose hands its noise is."""

_TYPES: Final[dict[str, type[DpSgdSteps] | type[NoisySum] | type[SampledNoisySum] | type[NonPrivate]]] = {
    cls.type: cls for cls in (DpSgdSteps, NoisySum, SampledNoisySum, NonPrivate)
}
_OF_A_SHARE: Final = frozenset({"share_multiplier", "shares_tau"})
"""Absent where parties draw none."""
_REALS: Final = frozenset({"sampling_rate", "noise_multiplier", "tau", "failure_probability"}) | _OF_A_SHARE
_AT_MOST_1: Final = frozenset({"sampling_rate", "failure_probability"})
_COUNTS: Final = frozenset({"steps", "rounds", "dimension", "quorum", "colluders"})


def event_to_json(event: Event) -> JsonEvent:
    """`event` as a flat object of strings and integers; `event_from_json` gives it back."""
    shares = getattr(event, "shares", None)
    fields: JsonEvent = {"type": event.type, "version": SHARES_VERSION if shares else VERSION}
    fields |= _fields_of(event)
    if shares:
        fields |= _fields_of(shares)
        if not shares.share_multiplier:
            fields = {name: value for name, value in fields.items() if name not in _OF_A_SHARE}
    return fields


def _fields_of(part: Event | Shares) -> JsonEvent:
    names = [field.name for field in dataclasses.fields(part) if field.name != "shares"]
    return {name: repr(getattr(part, name)) if name in _REALS else getattr(part, name) for name in names}


def _real(name: str, text: object) -> float:
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        value = math.nan
    if repr(value) != text or math.isnan(value):
        raise InvalidInput(f"{name} must be a canonical decimal string")
    return value


def _values(fields: Mapping[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in sorted(fields.items()):
        if key in _REALS:
            values[key] = _real(key, value)
        elif type(value) is not (int if key in _COUNTS else str):
            raise InvalidInput(f"{key} has another type")
        else:
            values[key] = value
    return values


def event_from_json(fields: object) -> Event:
    """The event that `fields` describes.

    Raises:
        InvalidInput: not an object; an unknown type or version; a field missing, unknown, of another type, not in
            canonical form, or out of range.
    """
    if not isinstance(fields, Mapping):
        raise InvalidInput("an event must be an object")
    name = fields.get("type")
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise InvalidInput("an event of unknown type")
    own = {field.name for field in dataclasses.fields(cls)}
    versions = (VERSION, SHARES_VERSION) if "shares" in own else (VERSION,)
    version = fields.get("version")
    if type(version) is not int or version not in versions:
        raise InvalidInput(f"an event of type {cls.type} must have version {' or '.join(map(str, versions))}")
    own -= {"shares"}
    of_shares = {field.name for field in dataclasses.fields(Shares)} if version == SHARES_VERSION else set()
    if fields.get("noise_by") == "aggregator":
        of_shares -= _OF_A_SHARE
    if set(fields) != own | of_shares | {"type", "version"}:
        raise InvalidInput(f"an event of type {cls.type} must have exactly the fields {sorted(own | of_shares)}")
    values = _values({key: fields[key] for key in own})
    if of_shares:
        shares = {**dict.fromkeys(_OF_A_SHARE, 0.0), **_values({key: fields[key] for key in of_shares})}
        values["shares"] = Shares(**shares)  # type: ignore[arg-type]  # checked in _values and in __post_init__
    return cls(**values)  # type: ignore[arg-type]  # the same
