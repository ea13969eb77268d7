"""The sum of clipped per-example gradients over a secret sample: what a party contributes to one step of `fedsgd`.

Opacus computes the gradient of each example; norm, clipping and sum are in float64, of a model in float64. There the
gradient of an example depends on the other examples of its batch by some 1e-14 of itself at most (products of matrices
add up in another order), which the clipping leaves room for; in float32 it would depend on them by 1e-6, and thousands
of examples together by more than the sensitivity allows.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator

from ..errors import InvalidInput
from .dpsgd import checked_losses, known_warnings
from .task import Dataset, Loss

CLIPPING_MARGIN: Final = 1.0 - 2.0**-20
"""Gradients are scaled to this much of the bound: what is left is more than float64 can be off by in a sum of 2^20."""

_CHUNK_BYTES: Final = 1 << 27
_CHUNK_ROWS: Final = 128
"""Per-example gradients that are in memory at a time: 128 rows, or as many as fit 128 MiB."""


def clipped_gradient_sum(
    model: torch.nn.Module,
    dataset: Dataset,
    chosen: NDArray[np.int64],
    *,
    loss: Loss,
    max_grad_norm: float,
    padded_to: int = 0,
) -> NDArray[np.float64]:
    """Σ of the gradients of the chosen examples, each scaled down to L2 norm `max_grad_norm` at most.

    An example whose gradient is not finite counts as zero: what one example adds is bounded whatever it holds, and
    nothing that one example does makes this fail. No row chosen: zeros.

    Args:
        model: as it is sent to the parties; stays as it is.
        dataset: private rows.
        chosen: positions in `dataset`, shape (k,); who chose them keeps them secret.
        loss: one loss for each example, shape (n,).
        max_grad_norm: C > 0.
        padded_to: rows to compute at least, with blank ones that count for nothing, so that neither the time taken nor
            the shapes at work tell how many were chosen.

    Returns:
        shape (d,), float64: trainable parameters in the order of their names, as `flatten` has them.

    Raises:
        InvalidInput: gradients of single examples cannot be had of this model (it mixes examples, as batch
            normalisation does), or `loss` does not return one value for each example.
    """
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise InvalidInput("the clipping norm must be positive and finite")
    working = copy.deepcopy(model).double().train()  # what Opacus leaves behind dies with the copy
    found = [*ModuleValidator.validate(working, strict=False), *GradSampleModule.validate(working, strict=False)]
    if found:
        raise InvalidInput(f"no gradient of single examples can be had of this model: {'; '.join(map(str, found))}")
    wrapped = GradSampleModule(working, loss_reduction="sum")
    named = sorted((name, p) for name, p in working.named_parameters() if p.requires_grad)
    parameters = [parameter for _, parameter in named]
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (8 * max(1, total.numel()))))
    for start in range(0, max(len(chosen), padded_to), rows):
        part = chosen[start : start + rows]
        features, labels = _padded(dataset, part, rows)
        with known_warnings():
            losses = checked_losses(loss(wrapped(features), labels), rows)
            torch.autograd.backward(losses.sum())
        total += _clipped_sum(parameters, len(part), max_grad_norm)
        for parameter in parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus puts it there
    return cast("NDArray[np.float64]", total.numpy())


def _padded(dataset: Dataset, part: NDArray[np.int64], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a chunk, and blank ones after them, in the precision of the model."""
    features = np.zeros((rows, *dataset.features.shape[1:]), np.float64)
    features[: len(part)] = dataset.features[part]
    labels = np.zeros(rows, np.float64 if dataset.labels.dtype.kind == "f" else dataset.labels.dtype)
    labels[: len(part)] = dataset.labels[part]
    return torch.from_numpy(features), torch.from_numpy(labels)


def _clipped_sum(parameters: list[Any], count: int, max_grad_norm: float) -> torch.Tensor:
    """Of the first `count` examples of a chunk, whose gradients hooks have left on the parameters."""
    each = torch.cat([_flat(parameter, count) for parameter in parameters], dim=1)
    norms = each.norm(dim=1)
    finite = torch.isfinite(norms)
    # A norm that overflows belongs to a gradient that is as good as infinite.
    each = torch.where(finite[:, None], each, torch.zeros_like(each))
    factors = torch.where(finite, (max_grad_norm * CLIPPING_MARGIN / norms).clamp(max=1.0), torch.zeros_like(norms))
    return factors @ each


def _flat(parameter: Any, count: int) -> torch.Tensor:
    found = getattr(parameter, "grad_sample", None)
    if found is None:  # no part of this forward pass
        return torch.zeros((count, parameter.numel()), dtype=torch.float64)
    return cast(torch.Tensor, found[:count].reshape(count, parameter.numel()))
