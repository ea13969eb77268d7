"""A federation in one process, without encryption, network or ledger: for benchmarks and for choosing settings.

`simulate` computes what a real job of `fedavg` computes up to the rounding of encoded updates: local DP-SGD, clipping
of each party's update, Gaussian noise on the sum, the server optimizer. `simulate_fedsgd` computes the very integers of
a job of `fedsgd`: those that a scheme without encryption sums, and Paillier opens. Neither accounts for anything or
protects anybody: rows are public, and may go through the model together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..encryption.plaintext import PlaintextScheme
from ..errors import ConfigError
from ..privacy.clipping import clip
from ..privacy.entropy import Entropy
from ..privacy.noise import discrete_gaussian
from ..privacy.normals import secure_normals
from ..privacy.rounding import least_resolution_bits, project, round_to_nearest
from ..privacy.sampling import poisson_sample
from ..protocol.derive import Derived, derive_gradient_sum
from .dpsgd import train_dpsgd
from .evaluation import evaluate
from .flatten import Tensors, flatten, load_tensors, model_to_tensors, unflatten
from .gradients import clipped_gradient_sum
from .per_example import ClippedSums, SumsOf
from .server_optimizer import ServerOptimizer
from .settings import LocalTraining
from .task import Dataset, Task, loss_for
from .together import sums_together

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
            model = _with(task, seed, unflatten(parameters, signature))
            loss = loss_for(task, model, data)
            train_dpsgd(model, data, loss=loss, config=settings.local, entropy=entropy, sums_of=sums_together)
            total += clip(flatten(model_to_tensors(model))[0] - parameters, settings.clipping_norm)
        parameters, state = settings.server.step(parameters, total / len(parties), state=state)
        history.append(evaluate(task, _with(task, seed, unflatten(parameters, signature)), holdout))
        if on_round is not None:
            on_round(number, history[-1])
    return history


@dataclass(frozen=True, slots=True, kw_only=True)
class SumSettings:
    """What the parties and the aggregator of a job of `fedsgd` agree on.

    Attributes:
        rounds: steps, ≥ 1.
        sampling_rate: of each party's sample, in (0, 1].
        max_grad_norm: bound C on the L2 norm of one example's gradient, > 0.
        noise_multiplier: standard deviation of the noise on the sum, over what one example can change; all of it drawn
            in shares by the parties, all of whom are needed.
        learning_rate: of the step, > 0.
        declared_rows: of each party.
        resolution_bits: f of the grid 2^-f; refined where rounding would cost noise.
        server: how the step enters the model.

    Raises:
        ConfigError: a setting is out of its range; all that are get listed.
    """

    rounds: int
    sampling_rate: float
    max_grad_norm: float
    noise_multiplier: float
    learning_rate: float
    declared_rows: Mapping[str, int]
    resolution_bits: int = 16
    server: ServerOptimizer = field(default_factory=ServerOptimizer)

    def __post_init__(self) -> None:
        checks = {
            "rounds: at least 1": self.rounds >= 1,
            "sampling_rate: above 0 and at most 1": 0 < self.sampling_rate <= 1,
            "max_grad_norm: finite and above 0": 0 < self.max_grad_norm < float("inf"),
            "noise_multiplier: finite and at least 0": 0 <= self.noise_multiplier < float("inf"),
            "learning_rate: finite and above 0": 0 < self.learning_rate < float("inf"),
            "declared_rows: at least 1 each, of at least two parties": len(self.declared_rows) > 1
            and min(self.declared_rows.values()) >= 1,
        }
        problems = tuple(text for text, holds in checks.items() if not holds)
        if problems:
            raise ConfigError("the federation cannot be simulated", problems=problems)

    def derived(self, dimension: int) -> Derived:
        """Noise and bounds of a round, as both ends of a real one derive them."""
        parties = len(self.declared_rows)
        least = least_resolution_bits(self.max_grad_norm, dimension=dimension)
        return derive_gradient_sum(
            PlaintextScheme(2, max(2, parties)),
            dimension=dimension,
            max_grad_norm=self.max_grad_norm,
            sampling_rate=self.sampling_rate,
            resolution_bits=max(self.resolution_bits, least),
            noise_by="parties",
            noise_multiplier=self.noise_multiplier,
            delta=1e-5,  # of the party level, which has no part in what is computed
            declared_rows=self.declared_rows,
            trusted_aggregator=False,
            quorum=parties,
            colluders=0,
            priced_rounds=self.rounds,
        )


def simulate_fedsgd(
    task: Task,
    parties: Mapping[str, Dataset],
    *,
    holdout: Dataset,
    settings: SumSettings,
    seed: int,
    entropy: Entropy,
    on_round: OnRound | None = None,
    sums_of: SumsOf = ClippedSums,
) -> list[dict[str, float]]:
    """Metrics on `holdout` after each round of `fedsgd`; the arguments as in `simulate`, parties by name.

    With `sums_of` `together.sums_together` it is tens of times as fast, and the integers are those of a job up to the
    rounding of gradients.

    Raises:
        ConfigError: the parties are not those of `settings.declared_rows`.
    """
    if set(parties) != set(settings.declared_rows):
        raise ConfigError("every party that is simulated declares its rows, and no other")
    parameters, signature = flatten(model_to_tensors(task.build_model(seed)))
    derived = settings.derived(len(parameters))
    bits = derived.resolution_bits
    step = settings.learning_rate / (settings.sampling_rate * sum(settings.declared_rows.values()))
    state: dict[str, NDArray[np.float64]] = {}
    history: list[dict[str, float]] = []
    for number in range(1, settings.rounds + 1):
        model = _with(task, seed, unflatten(parameters, signature))
        total = np.zeros(len(parameters), np.int64)
        for data in parties.values():
            chosen = poisson_sample(len(data), sampling_rate=settings.sampling_rate, entropy=entropy)
            gradients = clipped_gradient_sum(
                model,
                data,
                chosen,
                loss=loss_for(task, model, data),
                max_grad_norm=settings.max_grad_norm,
                sums_of=sums_of,
            )
            total += round_to_nearest(project(gradients, derived.contribution_norm), resolution_bits=bits)
            total += discrete_gaussian(derived.noise_plan.share_sigma2, len(parameters), entropy=entropy)
        update = -step * (total.astype(np.float64) / 2.0**bits)
        parameters, state = settings.server.step(parameters, update, state=state)
        history.append(evaluate(task, _with(task, seed, unflatten(parameters, signature)), holdout))
        if on_round is not None:
            on_round(number, history[-1])
    return history


def _with(task: Task, seed: int, tensors: Tensors) -> torch.nn.Module:
    """The task's model with these parameters."""
    model = task.build_model(seed)
    load_tensors(model, tensors)
    return model
