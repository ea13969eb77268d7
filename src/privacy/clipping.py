"""L2 clipping of an update: what makes the sensitivity of a sum finite. Fixed, or following a quantile of the norms."""

from __future__ import annotations

import decimal
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput

MIN_NORM: Final = 1e-6
"""The smallest norm that gradients of single examples are clipped to: far above the numbers that float32, in which
models are sent, holds with fewer digits (below 1.2e-38), where rounding could move a sum by more than the bound."""

_MARGIN: Final = 1.0 - 2.0**-22
"""A float32 is off by at most 2^-24 of itself, so a vector scaled to `_MARGIN`·C stays within C after the cast."""


def l2_norm(update: NDArray[np.float32]) -> float:
    """L2 norm of `update`, shape (d,), in double precision: safe for finite float32, squares stay below 1e77 · d."""
    wide = update.astype(np.float64)
    return math.sqrt(float(np.dot(wide, wide)))


def clip(update: NDArray[np.float32], clipping_norm: float) -> NDArray[np.float32]:
    """`update` scaled down, if need be, to an L2 norm of at most `clipping_norm`; else unchanged.

    Args:
        update: shape (d,), dtype float32, finite.
        clipping_norm: C > 0, finite.

    Returns:
        A new array, shape (d,), dtype float32; its norm is ≤ C as a real number, rounding to float32 included.

    Raises:
        InvalidInput: wrong shape or dtype, a value that is not finite, or C not positive and finite. No value is shown.
    """
    if not (math.isfinite(clipping_norm) and clipping_norm > 0):
        raise InvalidInput("the clipping norm must be positive and finite")
    if update.ndim != 1 or update.dtype != np.float32:
        raise InvalidInput("an update must be a vector of float32")
    if not bool(np.isfinite(update).all()):
        raise InvalidInput("the update holds a value that is not finite")
    norm = l2_norm(update)
    # The sum of squares is itself off by a few 2^-53; an update that close to the border is scaled too.
    if norm <= clipping_norm * (1.0 - 2.0**-40):
        return update.copy()
    scaled = update.astype(np.float64) * (clipping_norm / norm * _MARGIN)
    return scaled.astype(np.float32)


MIN_ADAPTIVE_PARTIES: Final = 20
"""Below it the noise on the count of bits is as large as the count, or takes most of the budget."""
PARTIES_PER_DEVIATION: Final = 20
"""Andrew et al. 2021, section 3: a noise of a twentieth of the parties on the count of bits hardly costs accuracy."""

_DIGITS: Final = 40
_WIDEST: Final = 2.0**40
"""Ratio of the largest to the smallest clipping norm, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClipping:
    """A clipping norm that follows a quantile of the norms of updates (Andrew, Thakkar, McMahan & Ramaswamy 2021,
    "Differentially Private Learning with Adaptive Clipping", arXiv:1905.03871, Algorithm 1).

    In each round a party adds, in one more slot, whether its update was within the norm: +B or -B integer units, that
    is B·(2b - 1) for a bit b, with noise of its own. Replacing a party by zero changes that slot by B. With S the
    sensitivity of the update and noise of one standard deviation σ = z_Δ·S in all slots, the bit has noise multiplier
    2σ_b for B = z_Δ·S / (2σ_b), and both together have z: 1/z² = 1/z_Δ² + 1/(2σ_b)² (ibid., Theorem 1). So the vector
    with the bit is released like any other, with sensitivity √(S² + B²) and noise multiplier z.

    Attributes:
        quantile: γ in (0, 1): the share of updates that should be within the norm.
        learning_rate: η in (0, 1]; 0.2 is theirs.
        bit_deviation: σ_b > 0, the standard deviation of all guaranteed noise on the count of bits.
        smallest, largest: bounds of the norm, > 0, at most a factor 2^40 apart.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    bit_deviation: float
    smallest: float
    largest: float

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0 or not 0.0 < self.learning_rate <= 1.0:
            raise InvalidInput("adaptive clipping needs a quantile in (0, 1) and a learning rate in (0, 1]")
        if not (math.isfinite(self.bit_deviation) and self.bit_deviation > 0.0):
            raise InvalidInput("adaptive clipping needs a positive, finite noise on the count of bits")
        if not (0.0 < self.smallest <= self.largest < math.inf and self.largest <= self.smallest * _WIDEST):
            raise InvalidInput("adaptive clipping needs 0 < smallest ≤ largest, at most a factor 2^40 apart")

    def _update_multiplier_squared(self, noise_multiplier: float) -> Fraction:
        """z_Δ², exactly."""
        if not (math.isfinite(noise_multiplier) and noise_multiplier > 0.0):
            raise InvalidInput("the noise multiplier must be positive and finite")
        left = Fraction(noise_multiplier) ** -2 - Fraction(2.0 * self.bit_deviation) ** -2
        if left <= 0:
            raise InvalidInput(
                f"the noise on the count of bits is too small: twice its deviation of {self.bit_deviation:g} must "
                f"exceed the noise multiplier {noise_multiplier:g}"
            )
        return 1 / left

    def update_multiplier(self, noise_multiplier: float) -> float:
        """z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2): the update's noise over its sensitivity, if update and bit cost what z costs.

        Raises:
            InvalidInput: z is not positive and finite, or the bit alone costs as much as z or more.
        """
        squared = self._update_multiplier_squared(noise_multiplier)
        with decimal.localcontext(prec=_DIGITS):
            return float((decimal.Decimal(squared.numerator) / decimal.Decimal(squared.denominator)).sqrt())

    def bit_unit(self, noise_multiplier: float, sensitivity: int) -> int:
        """B = max(1, ⌊z_Δ·S / (2σ_b)⌋): what one bit is worth in its slot, in integer units.

        Rounding costs no privacy, as the sensitivity counts the B that is used. It makes σ_b of the count larger by at
        most 1/B of itself; on a grid so coarse that B is 1 it may also be smaller, and the update's noise larger.

        Args:
            noise_multiplier: z ≥ 0 of update and bit together; 0 is no noise, under which B is 1.
            sensitivity: S ≥ 1, of the encoded update, in integer units.

        Raises:
            InvalidInput: z is out of range, or the bit alone costs as much as z or more.
        """
        if noise_multiplier == 0.0:
            return 1
        squared = self._update_multiplier_squared(noise_multiplier) * sensitivity**2
        return max(1, math.isqrt(math.floor(squared / Fraction(2.0 * self.bit_deviation) ** 2)))

    def bit(self, norm: float, clipping_norm: float, *, unit: int) -> int:
        """What a party whose update has this L2 norm adds to the bit's slot before noise, in integer units."""
        return unit if norm <= clipping_norm else -unit

    def next_norm(self, clipping_norm: float, *, noisy_bits: int, unit: int, contributions: int) -> float:
        """C·exp(-η(b̃ - γ)), within the bounds; the same float on every machine.

        Args:
            clipping_norm: of the round, within the bounds.
            noisy_bits: the opened slot: the sum of `bit` over contributions, and noise.
            unit: of the slot.
            contributions: parties in the sum, which is public; at least `MIN_ADAPTIVE_PARTIES`.

        Raises:
            InvalidInput: an argument out of range.
        """
        if contributions < MIN_ADAPTIVE_PARTIES:
            raise InvalidInput(f"adaptive clipping needs at least {MIN_ADAPTIVE_PARTIES} contributions")
        if not self.smallest <= clipping_norm <= self.largest:
            raise InvalidInput("the clipping norm is outside its bounds")
        within = (Fraction(noisy_bits, contributions * unit) + 1) / 2
        within = min(max(within, Fraction(0)), Fraction(1))  # noise may leave [0, 1]; this is post-processing
        step = Fraction(self.learning_rate) * (Fraction(self.quantile) - within)
        with decimal.localcontext(prec=_DIGITS):  # correctly rounded, unlike a machine's `exp`
            factor = (decimal.Decimal(step.numerator) / decimal.Decimal(step.denominator)).exp()
            moved = float(decimal.Decimal(clipping_norm) * factor)
        return min(max(moved, self.smallest), self.largest)


def joint_sensitivity(sensitivity: int, bit_unit: int) -> int:
    """⌈√(S² + B²)⌉: L2 sensitivity of an encoded update and its bit (0: no bit) together, all ≥ 0, in integer units."""
    squared = sensitivity**2 + bit_unit**2
    root = math.isqrt(squared)
    return root + (root * root < squared)
