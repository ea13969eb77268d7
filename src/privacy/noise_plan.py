"""Who draws how much of a round's noise, and what may be claimed for it, against whom.

Only the guaranteed minimum is claimed: of any `quorum` contributors at least `quorum - colluders` are honest and add
one share each. Whatever a fuller cohort adds is not counted (further independent noise is post-processing). What is
left if everybody else colludes is one share, the party's own: it is told beside what is claimed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, get_args

from ..errors import InvalidInput
from .accounting import epsilon
from .events import Event, NoiseBy, NoisySum, NonPrivate, SampledNoisySum, Shares, Unit, real
from .figures import AGAINST, REASONS, Against, Figure, assumption, not_above_root
from .noise import MAX_SIGMA2, sum_divergence

VARIANCE_GRID: Final = 1 << 20
"""Variances are rounded up to multiples of 2^-20 squared integer units: short exact rationals, at most 4e-6 too large
at the smallest variance allowed in a sum."""

NO_NOISE_IN_SUM: Final = "no noise in the sum"


def _ceil_to_grid(value: Fraction) -> Fraction:
    return Fraction(math.ceil(value * VARIANCE_GRID), VARIANCE_GRID)


def fraction_to_json(value: Fraction) -> str:
    """Exact text of a rational: "num/den" in lowest terms, den ≥ 1."""
    return f"{value.numerator}/{value.denominator}"


def fraction_from_json(text: str) -> Fraction:
    """The rational ≥ 0 that `text` spells as "num/den" in lowest terms.

    Raises:
        InvalidInput: any other text.
    """
    numerator, slash, denominator = text.partition("/")
    digits = numerator + denominator
    if slash and len(text) <= 128 and digits.isascii() and numerator.isdigit() and denominator.strip("0").isdigit():
        value = Fraction(int(numerator), int(denominator))
        if fraction_to_json(value) == text:
            return value
    raise InvalidInput("a rational must read 'numerator/denominator' in lowest terms")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePlan:
    """The noise of one round, in integer units of the encoding.

    Attributes:
        noise_by: who draws.
        noise_multiplier: z of all guaranteed noise, as planned.
        sensitivity: L2 sensitivity of the sum: the rounding bound times the largest weight.
        quorum, colluders: honest shares counted are `quorum - colluders`.
        aggregator_sigma2: variance of the aggregator's contribution; 0 if it draws none.
        share_sigma2: variance of each party's share; 0 if parties draw none.
    """

    noise_by: NoiseBy
    noise_multiplier: float
    sensitivity: float
    quorum: int
    colluders: int
    aggregator_sigma2: Fraction
    share_sigma2: Fraction

    @property
    def honest_shares(self) -> int:
        """Shares that are counted on."""
        return self.quorum - self.colluders

    @property
    def multiplier_release(self) -> float | None:
        """Noise multiplier that holds against whoever sees the release; None if ε is infinite."""
        return self.noise_multiplier or None

    @property
    def multiplier_against_aggregator(self) -> float | None:
        """Noise multiplier of the parties' noise alone, which is all that the aggregator does not know; None if ε is
        infinite."""
        if self.noise_multiplier == 0.0 or self.noise_by == "aggregator":
            return None
        if self.noise_by == "parties":
            return self.noise_multiplier
        near = self.noise_multiplier * math.sqrt(0.5)  # within two units in the last place of the root
        return not_above_root(Fraction(self.noise_multiplier) ** 2 / 2, near + 2 * math.ulp(near))

    @property
    def multiplier_against_all_others(self) -> float | None:
        """Noise multiplier of one share, which is all that hides a party from everybody else; None if ε is infinite."""
        if not self.share_sigma2:
            return None
        square = self.share_sigma2 / Fraction(self.sensitivity) ** 2
        return not_above_root(square, math.sqrt(self.share_sigma2) / self.sensitivity) or None

    @property
    def shares(self) -> Shares | None:
        """Of whose hands the noise is, as events say it; None without noise."""
        if not self.noise_multiplier:
            return None
        return Shares(
            noise_by=self.noise_by,
            quorum=self.quorum,
            colluders=self.colluders,
            share_multiplier=self.multiplier_against_all_others or 0.0,
            shares_tau=sum_divergence(self.share_sigma2, self.honest_shares) if self.share_sigma2 else 0.0,
        )

    def _claim(self, against: Against) -> tuple[float | None, float]:
        """Noise multiplier and τ of the noise that is secret from `against`."""
        shares = self.honest_shares if self.share_sigma2 else 0
        if against == "all_others":
            return self.multiplier_against_all_others, 0.0
        if against == "aggregator":
            return self.multiplier_against_aggregator, sum_divergence(self.share_sigma2, shares)
        tau = sum_divergence(self.share_sigma2, shares, other_sigma2=self.aggregator_sigma2)
        return self.multiplier_release, tau

    def event(
        self,
        against: Against,
        *,
        dimension: int,
        rounds: int = 1,
        sampling_rate: float | None = None,
        failure_probability: float = 0.0,
    ) -> Event:
        """What `rounds` releases of `dimension` coordinates cost, against whom.

        Args:
            against: who must not learn.
            sampling_rate: None for a party's cost; else each row's, of a sum over secret Poisson samples of this rate.
            failure_probability: of one round, as in `NoisySum`.

        Raises:
            InvalidInput: an argument out of range, or shares too small for the theory of sums.
        """
        multiplier, tau = self._claim(against)
        if multiplier is None:
            unit: Unit = "party" if sampling_rate is None else "example"
            silent = REASONS["release"] if unit == "party" else NO_NOISE_IN_SUM
            return NonPrivate(unit=unit, reason=REASONS[against] if self.noise_multiplier else silent)
        if sampling_rate is None:
            return NoisySum(
                noise_multiplier=multiplier,
                rounds=rounds,
                tau=tau,
                dimension=dimension,
                failure_probability=failure_probability,
                shares=self.shares,
            )
        return SampledNoisySum(
            sampling_rate=sampling_rate,
            noise_multiplier=multiplier,
            rounds=rounds,
            tau=tau,
            dimension=dimension,
            failure_probability=failure_probability,
            shares=self.shares,
        )

    def figures(
        self,
        *,
        dimension: int,
        rounds: int,
        delta: float,
        sampling_rate: float | None = None,
        failure_probability: float = 0.0,
    ) -> tuple[Figure, Figure, Figure]:
        """ε of `rounds` such rounds against the release, the aggregator, and all others together, in this order.

        Args:
            dimension, rounds, sampling_rate, failure_probability: as in `event`.
            delta: in (0, 1).

        Raises:
            InvalidInput: an argument out of range.
        """

        def figure(against: Against) -> Figure:
            event = self.event(
                against,
                dimension=dimension,
                rounds=rounds,
                sampling_rate=sampling_rate,
                failure_probability=failure_probability,
            )
            return Figure(
                epsilon=epsilon([event], delta=delta),
                delta=delta,
                unit=event.unit,
                against=AGAINST[against],
                assumes=self.assumption(against, sampled=sampling_rate is not None),
            )

        return figure("release"), figure("aggregator"), figure("all_others")

    def assumption(self, against: Against, *, sampled: bool = False) -> str:
        """What a figure of this noise rests on, in words; of a sum over secret samples, these too."""
        return assumption(self.shares, against, sampled=sampled)


def plan_noise(
    *, noise_by: NoiseBy, noise_multiplier: float, sensitivity: float, quorum: int, colluders: int
) -> NoisePlan:
    """The plan that gives the sum a standard deviation of at least `noise_multiplier` · `sensitivity`.

    Args:
        noise_by: "both" (half the variance each), "parties" or "aggregator".
        noise_multiplier: z ≥ 0, finite; 0 means no noise and an infinite ε.
        sensitivity: L2 sensitivity of the sum in integer units, > 0, finite.
        quorum: contributions that a round needs, ≥ 1.
        colluders: parties among them that may leave their share out or tell it, ≥ 0 and below `quorum`.

    Raises:
        InvalidInput: an argument out of range; a variance above 2^80; shares so small (variance below 1/4) that their
            sum is not covered by theory.
    """
    if noise_by not in get_args(NoiseBy):
        raise InvalidInput("noise_by must be both, parties or aggregator")
    noise_multiplier = real("noise_multiplier", noise_multiplier)
    sensitivity = real("sensitivity", sensitivity)
    if sensitivity == 0.0:
        raise InvalidInput("sensitivity must be finite and positive")
    if colluders < 0 or quorum - colluders < 1:
        raise InvalidInput("at least one party of the quorum must be honest: quorum - colluders ≥ 1")
    total = (Fraction(noise_multiplier) * Fraction(sensitivity)) ** 2
    if total > MAX_SIGMA2:
        raise InvalidInput("the noise variance exceeds 2^80: lower the resolution")
    parts = {"both": Fraction(1, 2), "parties": Fraction(1), "aggregator": Fraction(0)}
    parties = parts[noise_by]
    plan = NoisePlan(
        noise_by=noise_by,
        noise_multiplier=noise_multiplier,
        sensitivity=sensitivity,
        quorum=quorum,
        colluders=colluders,
        aggregator_sigma2=_ceil_to_grid(total * (1 - parties)),
        share_sigma2=_ceil_to_grid(total * parties / (quorum - colluders)),
    )
    plan.event("release", dimension=1)  # raises where the theory of sums does not reach
    plan.event("aggregator", dimension=1)
    return plan
