"""Local training with DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1), and without.

Sums of clipped gradients come from `per_example`. Which examples a step sees (Poisson sampling) and the Gaussian noise
both come from the entropy that the caller hands in. Neither torch's nor numpy's generators are touched.

What a run costs is a function of `sampling_rate`, `noise_multiplier` and `steps` alone, under the adding or removing of
one row. The divisor of a step is public (`sampling_rate * declared_rows`), so the number of private rows shows nowhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ..privacy.entropy import Entropy
from ..privacy.normals import secure_normals
from ..privacy.sampling import poisson_sample
from .per_example import ClippedSums, SumsOf
from .settings import LocalTraining
from .task import Dataset, Loss
from .trial import checked_losses


def train_dpsgd(
    model: torch.nn.Module,
    dataset: Dataset,
    *,
    loss: Loss,
    config: LocalTraining,
    entropy: Entropy,
    sums_of: SumsOf = ClippedSums,
) -> None:
    """Train `model` in place with DP-SGD: `config.steps` steps of SGD on clipped, noised gradients.

    A step whose sample is empty is a step of pure noise, and so is one whose every row is not finite, or has no finite
    gradient: such a row is sampled as any other, and counts as zero. No row makes this fail. The caller sets torch's
    threads. Losses are neither returned nor logged: they are functions of private rows.

    Args:
        model: float32, trained in float64 and rounded at the end; buffers stay as they are.
        dataset: private rows.
        loss: one loss for each example, shape (n,).
        sums_of: what adds up gradients. What is not the default one protects nobody: for public rows.

    Raises:
        InvalidInput: DP-SGD cannot train this model (it mixes examples, as batch normalisation does), or `loss` does
            not return one value for each example. Found on public rows, before the others are looked at.
    """
    working = copy.deepcopy(model).double().train()  # what is left behind (un-noised sums) dies with the copy
    trainable = [parameter for parameter in working.parameters() if parameter.requires_grad]
    sums = sums_of(working, dataset, loss=loss, parameters=trainable, max_grad_norm=config.max_grad_norm)
    optimizer = torch.optim.SGD(trainable, lr=config.learning_rate, momentum=config.momentum)
    for chosen in _samples(dataset, config, entropy):
        noised = noised_sum(sums.over(dataset, chosen), config.noise_multiplier * config.max_grad_norm, entropy=entropy)
        parts = torch.split(noised / config.expected_batch, [parameter.numel() for parameter in trainable])
        for parameter, part in zip(trainable, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape)
        optimizer.step()
    _copy_parameters(working, model)


def train_plain(
    model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
) -> None:
    """Train `model` in place with SGD and no privacy: for baselines on pooled data.

    `config.max_grad_norm` and `config.noise_multiplier` are ignored; batches are drawn as in `train_dpsgd`, and the
    divisor is the same.

    Raises:
        InvalidInput: a row is not finite, or `loss` does not return one value for each example.
    """
    dataset.require_finite()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)
    features, labels = torch.from_numpy(dataset.features), torch.from_numpy(dataset.labels)
    for chosen in _samples(dataset, config, entropy):
        optimizer.zero_grad()
        if len(chosen):
            losses = checked_losses(loss(model(features[chosen]), labels[chosen]), len(chosen))
            torch.autograd.backward(losses.sum() / config.expected_batch)
        optimizer.step()


def noised_sum(total: torch.Tensor, deviation: float, *, entropy: Entropy) -> torch.Tensor:
    """A clipped sum, shape (d,), float64, plus Gaussian noise of this standard deviation in every coordinate; added in
    float64, so that rounding comes after the noise."""
    return total + deviation * torch.from_numpy(secure_normals(total.numel(), entropy))


def _samples(dataset: Dataset, config: LocalTraining, entropy: Entropy) -> Iterator[NDArray[np.int64]]:
    """The rows that each step sees, in increasing order, drawn when they are asked for."""
    for _ in range(config.steps):
        yield poisson_sample(len(dataset), sampling_rate=config.sampling_rate, entropy=entropy)


def _copy_parameters(source: torch.nn.Module, target: torch.nn.Module) -> None:
    with torch.no_grad():
        for trained, parameter in zip(source.parameters(), target.parameters(), strict=True):
            parameter.copy_(trained)
