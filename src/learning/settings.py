"""How a party trains: settings alone, without torch, so that any process can hold and check them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..privacy.clipping import MIN_NORM


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """One party's training in one round.

    Attributes:
        steps: gradient steps, ≥ 1.
        sampling_rate: probability with which a step sees an example, in (0, 1].
        learning_rate: of SGD, > 0.
        max_grad_norm: bound on the L2 norm of one example's gradient, at least `privacy.clipping.MIN_NORM`.
        noise_multiplier: standard deviation of the noise on a step's gradient sum, in units of `max_grad_norm`; ≥ 0,
            and 0 is no privacy at all.
        declared_rows: a public number of rows, ≥ 1, that stands for the private one in the divisor of a step.
        momentum: of SGD, in [0, 1); starts anew with each call.

    Raises:
        ConfigError: a setting is out of its range; all that are get listed.
    """

    steps: int
    sampling_rate: float
    learning_rate: float
    max_grad_norm: float
    noise_multiplier: float
    declared_rows: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        checks = {
            "steps: at least 1": self.steps >= 1,
            "sampling_rate: above 0 and at most 1": 0 < self.sampling_rate <= 1,
            "learning_rate: finite and above 0": 0 < self.learning_rate < math.inf,
            f"max_grad_norm: finite and at least {MIN_NORM:g}": MIN_NORM <= self.max_grad_norm < math.inf,
            "noise_multiplier: finite and at least 0": 0 <= self.noise_multiplier < math.inf,
            "declared_rows: at least 1": self.declared_rows >= 1,
            "momentum: at least 0 and below 1": 0 <= self.momentum < 1,
        }
        problems = tuple(text for text, holds in checks.items() if not holds)
        if problems:
            raise ConfigError("the local training cannot be run", problems=problems)

    @property
    def expected_batch(self) -> float:
        """The public divisor of a step: examples that it would see in expectation, were there `declared_rows`."""
        return self.sampling_rate * self.declared_rows
