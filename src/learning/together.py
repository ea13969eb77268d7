"""Sums of clipped gradients with many rows in one pass: for yardsticks and simulations on public rows, where nobody is
to be protected.

Products of many rows round each by where it stands (ADR 0012), so that nothing which a party computes may come from
here: what is private goes through `per_example`, one row at a time, at tens of times the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call, grad, vmap

from .per_example import ClippedSums, Sums
from .task import Dataset, Loss
from .trial import PublicRow, try_out

_CHUNK_VALUES = 1 << 22
"""Of gradients that are written out at a time: 32 MiB."""


def sums_together(
    model: torch.nn.Module,
    rows: Dataset,
    *,
    loss: Loss,
    parameters: Sequence[torch.nn.Parameter],
    max_grad_norm: float,
) -> Sums:
    """As `ClippedSums`, up to rounding, and many rows at a time where torch can: where a model's operations cannot be
    mapped over rows, or a public row's gradient is another alone, it is `ClippedSums` itself.

    Args:
        rows: public ones, as those that are summed over.

    Raises:
        InvalidInput: as `ClippedSums`.
    """
    filler = try_out(model, loss, list(parameters), shape=rows.features.shape[1:], label_dtype=rows.labels.dtype)
    together = _Together(model, loss, parameters, max_grad_norm)
    if together.takes(filler):
        return together
    return ClippedSums(model, rows, loss=loss, parameters=parameters, max_grad_norm=max_grad_norm)


class _Together:
    def __init__(
        self, model: torch.nn.Module, loss: Loss, parameters: Sequence[torch.nn.Parameter], max_grad_norm: float
    ) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._model, self._loss = model, loss
        self._parameters = {names[id(parameter)]: parameter for parameter in parameters}
        self._bound = max_grad_norm
        self._chunk = max(1, _CHUNK_VALUES // max(1, sum(parameter.numel() for parameter in parameters)))

        def of_row(values: dict[str, torch.Tensor], features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            losses = loss(functional_call(model, values, (features[None],)), label[None])
            return losses.sum()

        self._gradients: Callable[..., dict[str, torch.Tensor]] = vmap(grad(of_row), in_dims=(None, 0, 0))

    def over(self, dataset: Dataset, chosen: NDArray[np.int64], *, padded_to: int = 0) -> torch.Tensor:
        """As `ClippedSums.over`; nothing is padded."""
        del padded_to
        total = torch.zeros(sum(parameter.numel() for parameter in self._parameters.values()), dtype=torch.float64)
        for start in range(0, len(chosen), self._chunk):
            part = chosen[start : start + self._chunk]
            features, labels = torch.from_numpy(dataset.features[part]), torch.from_numpy(dataset.labels[part])
            gradients = self._of(features.double(), labels.double() if labels.is_floating_point() else labels)
            norms = torch.linalg.vector_norm(gradients, dim=1)
            factors = torch.where(norms > self._bound, self._bound / norms, 1.0)
            total += torch.where(torch.isfinite(norms), factors, 0.0) @ torch.nan_to_num(gradients, posinf=0, neginf=0)
        return total

    def takes(self, row: PublicRow) -> bool:
        """Whether two public rows in one pass have the gradient that torch gives the one alone."""
        parameters = list(self._parameters.values())
        alone = torch.autograd.grad(self._loss(self._model(row.features), row.labels).sum(), parameters)
        try:
            found = self._of(torch.cat([row.features] * 2), torch.cat([row.labels] * 2))
        except Exception:  # whatever torch says of an operation that it cannot map
            return False
        return torch.allclose(found, torch.cat([part.reshape(-1) for part in alone]).expand(2, -1))

    def _of(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient of each row, shape (n, size)."""
        found = self._gradients(
            {name: parameter.detach() for name, parameter in self._parameters.items()}, features, labels
        )
        return torch.cat([found[name].reshape(len(features), -1) for name in self._parameters], dim=1)
