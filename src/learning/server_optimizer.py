"""What the aggregator does with the mean update of a round: FedAvg, FedAvgM, FedAdam.

FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1,
with a server learning rate. FedAvgM: Hsu, Qi & Brown 2019, "Measuring the Effects of Non-Identical Data Distribution
for Federated Visual Classification", section 4.3. FedAdam: Reddi et al. 2021, "Adaptive Federated Optimization",
algorithm 2. All are post-processing of an update that was noised already: they cost no privacy.

Computed in float64 by numpy alone, so that the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InvalidInput

Kind = Literal["fedavg", "fedavgm", "fedadam"]
State = Mapping[str, NDArray[np.float64]]
"""Moments by name, each of the parameters' shape; empty before the first round. `flatten.to_safetensors` stores it."""

_MOMENTS: Final[dict[str, tuple[str, ...]]] = {
    "fedavg": (),
    "fedavgm": ("momentum",),
    "fedadam": ("momentum", "second_moment"),
}


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """One of the three, with its settings.

    Attributes:
        kind: `fedavg`, `fedavgm` or `fedadam`.
        learning_rate: of the server, > 0; 1 makes `fedavg` the plain mean.
        momentum: β (fedavgm) or β₁ (fedadam), in [0, 1).
        second_momentum: β₂ (fedadam), in [0, 1).
        adaptivity: τ (fedadam), > 0, added to the root of the second moment, which starts at τ².

    Raises:
        ConfigError: a setting is out of its range; all that are get listed.
    """

    kind: Kind = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9
    second_momentum: float = 0.99  # Reddi et al. 2021, section 5: β₁ = 0.9, β₂ = 0.99 throughout
    adaptivity: float = 1e-3

    def __post_init__(self) -> None:
        checks = {
            f"kind: one of {', '.join(_MOMENTS)}, not {self.kind!r}": self.kind in _MOMENTS,
            "learning_rate: finite and above 0": 0 < self.learning_rate < float("inf"),
            "momentum: at least 0 and below 1": 0 <= self.momentum < 1,
            "second_momentum: at least 0 and below 1": 0 <= self.second_momentum < 1,
            "adaptivity: finite and above 0": 0 < self.adaptivity < float("inf"),
        }
        problems = tuple(text for text, holds in checks.items() if not holds)
        if problems:
            raise ConfigError("the server optimizer cannot be used", problems=problems)

    def step(
        self, parameters: NDArray[np.float32], mean_update: NDArray[Any], *, state: State
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
        """The new parameters (float32, shape (d,)) and the new state, after one round; the inputs stay as they are.

        Args:
            parameters: the global model, shape (d,).
            mean_update: the mean of the parties' model deltas, noise included, shape (d,); added, not subtracted.
            state: what the round before returned; empty in the first round.

        Raises:
            InvalidInput: shapes differ, the update is not finite, or the state is not this optimizer's.
        """
        if parameters.ndim != 1 or mean_update.shape != parameters.shape:
            raise InvalidInput(f"the update has shape {mean_update.shape}, the model {parameters.shape}")
        update = mean_update.astype(np.float64)
        if not np.all(np.isfinite(update)):
            raise InvalidInput("the mean update holds a value that is not finite")
        moments = self._moments(state, parameters.shape)
        direction = update
        if self.kind == "fedavgm":
            direction = moments["momentum"] = self.momentum * moments["momentum"] + update
        elif self.kind == "fedadam":
            first = self.momentum * moments["momentum"] + (1 - self.momentum) * update
            second = self.second_momentum * moments["second_moment"] + (1 - self.second_momentum) * update**2
            moments = {"momentum": first, "second_moment": second}
            direction = first / (np.sqrt(second) + self.adaptivity)
        return (parameters.astype(np.float64) + self.learning_rate * direction).astype(np.float32), moments

    def _moments(self, state: State, shape: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
        names = _MOMENTS[self.kind]
        if not state:
            start = {"momentum": 0.0, "second_moment": self.adaptivity**2}
            return {name: np.full(shape, start[name]) for name in names}
        if set(state) != set(names) or any(array.shape != shape for array in state.values()):
            raise InvalidInput(f"this is not the state of {self.kind} for a model of shape {shape}")
        return {name: state[name].astype(np.float64) for name in names}
