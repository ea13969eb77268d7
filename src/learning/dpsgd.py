"""Local training with DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1), and without.

Opacus computes and clips the gradients: by ghost clipping (Li et al. 2021, "Large Language Models Can Be Strong
Differentially Private Learners", section 4) where every trainable layer is linear, else from per-example gradients.
What protects somebody is ours: which examples a step sees (Poisson sampling) and the Gaussian noise both come from the
entropy that the caller hands in. Neither torch's nor numpy's generators are touched.

What a run costs is a function of `sampling_rate`, `noise_multiplier` and `steps` alone, under the adding or removing of
one row. The divisor of a step is public (`sampling_rate * declared_rows`), so the number of private rows shows nowhere.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from opacus.validators import ModuleValidator

from ..errors import InvalidInput
from ..privacy.entropy import Entropy
from ..privacy.sampling import poisson_sample
from .settings import LocalTraining
from .task import Dataset, Loss

NORMALS_PER_DRAW: Final = 4
"""Normals summed for one noise value, so that its low bits tell nothing of it: Holohan & Braghin 2021, "Secure Random
Sampling in Differential Privacy", section 5.1, with n = 2 as Opacus has it in its secure mode."""

LossesOf = Callable[[torch.Tensor], torch.Tensor]
"""Positions of rows, shape (k,) → one loss for each, shape (k,)."""

_MANTISSA_BITS: Final = 53
_WORD_BITS: Final = 64


def secure_normals(count: int, entropy: Entropy) -> NDArray[np.float64]:
    """`count` standard normals, float64, shape (count,).

    Box & Muller 1958 from 53-bit uniforms; each value is the sum of `NORMALS_PER_DRAW` normals over its root. A single
    normal is at most sqrt(2 · 53 · ln 2) = 8.57 in magnitude: what lies beyond has probability below 2⁻⁵³.
    """
    pairs = (count * NORMALS_PER_DRAW + 1) // 2
    uniforms = (entropy.words(2 * pairs) >> np.uint64(_WORD_BITS - _MANTISSA_BITS)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((uniforms[:pairs] + 1.0) * 2.0**-_MANTISSA_BITS))  # the uniform is in (0, 1]
    angle = uniforms[pairs:] * (2.0 * math.pi * 2.0**-_MANTISSA_BITS)
    normals = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[: count * NORMALS_PER_DRAW]
    total: NDArray[np.float64] = normals.reshape(NORMALS_PER_DRAW, count).sum(axis=0) / math.sqrt(NORMALS_PER_DRAW)
    return total


def train_dpsgd(
    model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
) -> None:
    """Train `model` in place with DP-SGD: `config.steps` steps of SGD on clipped, noised gradients.

    A step whose sample is empty is a step of pure noise. An example whose gradient is not finite counts as zero: what
    one example adds is bounded whatever it holds, and none of them makes the training fail or diverge. The caller sets
    torch's threads. Losses are neither returned nor logged: they are functions of private rows.

    Args:
        model: float32; buffers stay as they are.
        dataset: private rows.
        loss: one loss for each example, shape (n,).

    Raises:
        InvalidInput: DP-SGD cannot train this model (it mixes examples, as batch normalisation does), or `loss` does
            not return one value for each example.
    """
    working = copy.deepcopy(model).train()  # what Opacus leaves behind (un-noised sums, norms) dies with the copy
    found = [*ModuleValidator.validate(working, strict=False), *GradSampleModule.validate(working, strict=False)]
    if found:
        raise InvalidInput(f"DP-SGD cannot train this model: {'; '.join(map(str, found))}")
    mechanism = _mechanism(working, config, entropy)
    features, labels = torch.from_numpy(dataset.features), torch.from_numpy(dataset.labels)

    def losses(rows: torch.Tensor) -> torch.Tensor:
        return checked_losses(loss(mechanism.model(features[rows]), labels[rows]), len(rows))

    for _ in range(config.steps):
        mechanism.optimizer.zero_grad()
        chosen = _sample(dataset, config, entropy)
        if len(chosen):
            with known_warnings():
                mechanism.backward(losses, chosen)
        else:
            mechanism.no_gradients()
        mechanism.optimizer.step()
    _copy_parameters(working, model)


def train_plain(
    model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
) -> None:
    """Train `model` in place with SGD and no privacy: for baselines on pooled data.

    `config.max_grad_norm` and `config.noise_multiplier` are ignored; batches are drawn as in `train_dpsgd`, and the
    divisor is the same.

    Raises:
        InvalidInput: `loss` does not return one value for each example.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)
    features, labels = torch.from_numpy(dataset.features), torch.from_numpy(dataset.labels)
    for _ in range(config.steps):
        optimizer.zero_grad()
        chosen = _sample(dataset, config, entropy)
        if len(chosen):
            losses = checked_losses(loss(model(features[chosen]), labels[chosen]), len(chosen))
            torch.autograd.backward(losses.sum() / config.expected_batch)
        optimizer.step()


def uses_ghost_clipping(model: torch.nn.Module) -> bool:
    """Whether every trainable layer is `torch.nn.Linear` and no parameter is used by two of them.

    Opacus has ghost norms for embeddings too; here they go by per-example gradients, which hold for any layer.
    """
    owners = [
        (module, parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    distinct = {id(parameter) for _, parameter in owners}
    return len(distinct) == len(owners) and all(type(module) is torch.nn.Linear for module, _ in owners)


class _EntropyNoise:
    """Replaces the noise of an Opacus optimizer by ours. Comes first among the base classes."""

    params: list[torch.nn.Parameter]
    noise_multiplier: float
    max_grad_norm: float
    entropy: Entropy

    def add_noise(self) -> None:
        """Set `p.grad` to the clipped sum plus noise, added in float64, so that rounding comes after the noise."""
        for parameter in self.params:
            total = cast(Any, parameter).summed_grad.detach().to(torch.float64)
            noise = torch.from_numpy(secure_normals(total.numel(), self.entropy)).reshape(total.shape)
            noised = total + self.noise_multiplier * self.max_grad_norm * noise
            parameter.grad = noised.to(parameter.dtype).view_as(parameter)


class _PerExampleOptimizer(_EntropyNoise, DPOptimizer):  # type: ignore[misc]  # opacus ships no types
    pass


class _GhostOptimizer(_EntropyNoise, DPOptimizerFastGradientClipping):  # type: ignore[misc]  # opacus ships no types
    pass


@dataclass(frozen=True, slots=True)
class _PerExample:
    """Clips per-example gradients that hooks have collected."""

    model: Any
    optimizer: Any

    def backward(self, losses: LossesOf, rows: torch.Tensor) -> None:
        torch.autograd.backward(losses(rows).sum())
        found = [parameter.grad_sample for parameter in self.optimizer.params]
        finite = torch.stack([torch.isfinite(each).flatten(1).all(dim=1) for each in found]).all(dim=0)
        for each in found:
            each[~finite] = 0.0

    def no_gradients(self) -> None:
        for parameter in self.optimizer.params:
            parameter.grad_sample = torch.zeros((0, *parameter.shape), dtype=parameter.dtype)


@dataclass(frozen=True, slots=True)
class _Ghost:
    """Clips by re-weighting the losses: norms in a first backward pass, the clipped sum in a second."""

    model: Any
    optimizer: Any

    def backward(self, losses: LossesOf, rows: torch.Tensor) -> None:
        self._backward(losses(rows))
        finite = torch.isfinite(self.model.per_sample_gradient_norms)
        if not bool(finite.all()):  # times zero they would still be NaN: once more, without them
            self.optimizer.zero_grad()
            if bool(finite.any()):
                self._backward(losses(rows[finite]))
            else:
                self.no_gradients()

    def _backward(self, losses: torch.Tensor) -> None:
        DPTensorFastGradientClipping(self.model, self.optimizer, losses, loss_reduction="sum").backward()

    def no_gradients(self) -> None:
        for parameter in self.optimizer.params:
            parameter.grad = torch.zeros_like(parameter)


def _mechanism(model: torch.nn.Module, config: LocalTraining, entropy: Entropy) -> _PerExample | _Ghost:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trainable, lr=config.learning_rate, momentum=config.momentum)
    # "mean": Opacus divides the noised sum by `expected_batch_size`; the backward pass below sums.
    settings = {
        "noise_multiplier": config.noise_multiplier,
        "max_grad_norm": config.max_grad_norm,
        "expected_batch_size": config.expected_batch,
        "loss_reduction": "mean",
    }
    mechanism: _PerExample | _Ghost
    if uses_ghost_clipping(model):
        wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=config.max_grad_norm)
        mechanism = _Ghost(wrapped, _GhostOptimizer(sgd, **settings))
    else:
        wrapped = GradSampleModule(model, loss_reduction="sum")
        mechanism = _PerExample(wrapped, _PerExampleOptimizer(sgd, **settings))
    mechanism.optimizer.entropy = entropy
    return mechanism


def _sample(dataset: Dataset, config: LocalTraining, entropy: Entropy) -> torch.Tensor:
    return torch.from_numpy(poisson_sample(len(dataset), sampling_rate=config.sampling_rate, entropy=entropy))


def checked_losses(losses: torch.Tensor, examples: int) -> torch.Tensor:
    """`losses` as they are; InvalidInput unless there is one for each example, shape (examples,)."""
    # A mean over the batch would make every clipped gradient a function of the other examples.
    if losses.shape != (examples,):
        raise InvalidInput("a task's loss returns one value for each example, shape (n,), with no reduction")
    return losses


def _copy_parameters(source: torch.nn.Module, target: torch.nn.Module) -> None:
    with torch.no_grad():
        for trained, parameter in zip(source.parameters(), target.parameters(), strict=True):
            parameter.copy_(trained)


@contextmanager
def known_warnings() -> Iterator[None]:
    """Passes over what Opacus's hooks make torch warn of."""
    with warnings.catch_warnings():
        # The first layer's input needs no gradient; its hook fires all the same, and Opacus counts on it.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        yield
