"""A federation in one process, without encryption, network or ledger: for benchmarks and for choosing settings.

It computes what a real job computes up to the rounding of encoded updates: local DP-SGD, clipping of each party's
update, Gaussian noise on the sum, the server optimizer. It accounts for nothing and protects nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..privacy.clipping import clip
from ..privacy.entropy import Entropy
from .dpsgd import secure_normals, train_dpsgd
from .evaluation import evaluate
from .flatten import flatten, load_tensors, model_to_tensors, unflatten
from .server_optimizer import ServerOptimizer
from .settings import LocalTraining
from .task import Dataset, Task, loss_of

OnRound = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class FederationSettings:
    """What the parties and the aggregator agree on.

    Attributes:
        rounds: ≥ 1.
        local: each party's training in each round.
        clipping_norm: bound C on the L2 norm of a party's update, > 0.
        party_noise_multiplier: standard deviation of the noise on the sum of updates, in units of C; ≥ 0.
        server: how the mean update enters the model.

    Raises:
        ConfigError: a setting is out of its range; all that are get listed.
    """

    rounds: int
    local: LocalTraining
    clipping_norm: float
    party_noise_multiplier: float
    server: ServerOptimizer = field(default_factory=ServerOptimizer)

    def __post_init__(self) -> None:
        checks = {
            "rounds: at least 1": self.rounds >= 1,
            "clipping_norm: finite and above 0": 0 < self.clipping_norm < float("inf"),
            "party_noise_multiplier: finite and at least 0": 0 <= self.party_noise_multiplier < float("inf"),
        }
        problems = tuple(text for text, holds in checks.items() if not holds)
        if problems:
            raise ConfigError("the federation cannot be simulated", problems=problems)


def simulate(
    task: Task,
    parties: Sequence[Dataset],
    *,
    holdout: Dataset,
    settings: FederationSettings,
    seed: int,
    entropy: Entropy,
    on_round: OnRound | None = None,
) -> list[dict[str, float]]:
    """Metrics on `holdout` after each round; `seed` decides the initial model, `entropy` all that protects somebody.

    `on_round(round, metrics)` is called after each round, counted from 1. The caller sets torch's threads.
    """
    parameters, signature = flatten(model_to_tensors(task.build_model(seed)))
    state: dict[str, NDArray[np.float64]] = {}
    history: list[dict[str, float]] = []
    for number in range(1, settings.rounds + 1):
        total = settings.party_noise_multiplier * settings.clipping_norm * secure_normals(len(parameters), entropy)
        for data in parties:
            model = task.build_model(seed)
            load_tensors(model, unflatten(parameters, signature))
            train_dpsgd(model, data, loss=loss_of(task), config=settings.local, entropy=entropy)
            total += clip(flatten(model_to_tensors(model))[0] - parameters, settings.clipping_norm)
        parameters, state = settings.server.step(parameters, total / len(parties), state=state)
        history.append(evaluate(task, unflatten(parameters, signature), holdout))
        if on_round is not None:
            on_round(number, history[-1])
    return history
