"""The sum of clipped per-example gradients over a secret sample: what a party contributes to one step of `fedsgd`."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from .per_example import ClippedSums, SumsOf
from .task import Dataset, Loss


def clipped_gradient_sum(
    model: torch.nn.Module,
    dataset: Dataset,
    chosen: NDArray[np.int64],
    *,
    loss: Loss,
    max_grad_norm: float,
    padded_to: int = 0,
    sums_of: SumsOf = ClippedSums,
) -> NDArray[np.float64]:
    """Σ of the gradients of the chosen examples, each scaled down to L2 norm `max_grad_norm` at most.

    An example that is not finite, or whose gradient is not, counts as zero: what one example adds is bounded whatever
    it holds, and nothing that one example does makes this fail. No row chosen: zeros.

    Args:
        model: as it is sent to the parties; stays as it is.
        dataset: private rows.
        chosen: positions in `dataset`, shape (k,); who chose them keeps them secret.
        loss: one loss for each example, shape (n,).
        max_grad_norm: C, at least `privacy.clipping.MIN_NORM`.
        padded_to: rows to compute at least, with public ones that count for nothing, so that neither the time taken nor
            the shapes at work tell how many were chosen.
        sums_of: what adds up gradients. What is not the default one protects nobody: for public rows.

    Returns:
        shape (d,), float64: trainable parameters in the order of their names, as `flatten` has them.

    Raises:
        InvalidInput: gradients of single examples cannot be had of this model (it mixes examples, as batch
            normalisation does), or `loss` does not return one value for each example.
    """
    working = copy.deepcopy(model).double().train()  # what is left behind dies with the copy
    named = sorted((name, p) for name, p in working.named_parameters() if p.requires_grad)
    parameters = [parameter for _, parameter in named]
    sums = sums_of(working, dataset, loss=loss, parameters=parameters, max_grad_norm=max_grad_norm)
    return cast("NDArray[np.float64]", sums.over(dataset, chosen, padded_to=max(1, padded_to)).numpy())
