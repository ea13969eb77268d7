"""A layer of weights beside a model, one for each Dirac canary, and what its moves tell about who was trained on.

A canary is a row whose loss is linear in its own weight: its gradient is one coordinate of the layer, and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook

from .settings import LocalTraining
from .task import Dataset, Loss

SUSPECTED: Final = 0.5
"""The noise that scores are most sensitive for, in planned noise: it is halved noise that is hardest to tell."""

CANARY_WEIGHT: Final = "canaries.weight"
"""The name of the layer's weights among the parameters of a `WithCanaries`."""

_INDEX_COLUMNS: Final = 2  # a canary's input and output in the canary layer; -1, -1 for other rows


class Watch:
    """Sees the canary layer after each step, as whoever receives every model does, and adds up what that tells.

    A step's noised sum along a canary's direction, in clipping norms, is g = noise, or noise + 1 if the canary was in
    and sampled. What a step tells is the log-likelihood ratio ln(1 - q + q·exp((2g - 1)/(2s²))), for noise of deviation
    s.

    Attributes:
        scores: shape (m,), one for each canary.
    """

    def __init__(self, training: LocalTraining, canaries: int) -> None:
        self.scores = np.zeros(canaries)
        self._last = self._velocity = np.zeros(canaries)
        self._scale = training.expected_batch / (training.learning_rate * training.max_grad_norm)
        self._momentum = training.momentum
        rate, deviation = training.sampling_rate, SUSPECTED * training.noise_multiplier
        self._rest = math.log1p(-rate) if rate < 1.0 else -math.inf
        self._rate, self._double_variance = math.log(rate), 2.0 * deviation**2

    @contextmanager
    def every_step(self) -> Iterator[None]:
        """Look after each step of whatever optimizer trains a `WithCanaries` inside: its last parameter is the canary
        layer's weight. Training works on a copy of the model, so the model itself shows nothing meanwhile."""

        def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self.look(optimizer.param_groups[-1]["params"][-1])

        handle = register_optimizer_step_post_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def look(self, weight: torch.Tensor) -> None:
        """Called with the canary layer's weights; does nothing if they are those of the last call."""
        now = weight.detach().numpy().reshape(-1)[: len(self.scores)].astype(np.float64)  # copied: it is trained on
        if np.array_equal(now, self._last):
            return
        if not np.isfinite(now).all():
            self._diverged()
            return
        velocity = (self._last - now) * self._scale
        noised = velocity - self._momentum * self._velocity
        self._last, self._velocity = now, velocity
        self.scores += np.logaddexp(self._rest, self._rate + (2.0 * noised - 1.0) / self._double_variance)

    def close(self, weight: torch.Tensor) -> None:
        """Called with what the training has left, rounded to float32: of which nothing more is learnt than that."""
        if not torch.isfinite(weight).all():
            self._diverged()

    def _diverged(self) -> None:
        """Nothing is told, and every score says so."""
        self.scores[:] = math.nan


class WithCanaries(torch.nn.Module):
    """A copy of a model, and beside it a linear layer of `side` x `side` weights, all zero, one for each Dirac canary.

    A row is the model's own features, flattened, and which input and output of the canary layer it uses, or -1, -1. Its
    outputs are the model's, flattened, that output of the canary layer, and 1 for a canary, else 0.
    """

    def __init__(self, model: torch.nn.Module, rows: Dataset, *, side: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.canaries = torch.nn.Linear(side, side, bias=False, device="meta")  # draws no initial weights
        self.canaries.weight = torch.nn.Parameter(torch.zeros(side, side))
        self.side = side
        self.shape = rows.features.shape[1:]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Shape (n, features + 2) to (n, outputs + 2)."""
        index = rows[:, -_INDEX_COLUMNS:].long()
        canary = (index[:, :1] >= 0).to(rows.dtype)
        places = index.clamp(min=0)
        inputs = torch.zeros((len(rows), self.side), dtype=rows.dtype).scatter_(1, places[:, :1], canary)
        chosen = self.canaries(inputs).gather(1, places[:, 1:])
        outputs = self.model(rows[:, :-_INDEX_COLUMNS].reshape(-1, *self.shape))
        return torch.cat([outputs.reshape(len(rows), -1), chosen, canary], dim=1)

    def dataset(self, own: Dataset | None, rows: Dataset, canaries: NDArray[np.int64]) -> Dataset:
        """The rows of `own`, and one for each of `canaries`; what these bring for the model is a copy of the first of
        `rows` (zeros where there is none), which its loss does not look at."""
        width = math.prod(self.shape)
        features = np.zeros((len(canaries), width + _INDEX_COLUMNS), dtype=np.float32)
        labels = np.zeros(len(canaries), dtype=rows.labels.dtype)
        if len(rows):
            features[:, :width], labels[:] = rows.features[0].reshape(-1), rows.labels[0]
        features[:, width] = canaries % self.side
        features[:, width + 1] = canaries // self.side
        if own is not None:
            plain = np.full((len(own), width + _INDEX_COLUMNS), -1.0, dtype=np.float32)
            plain[:, :width] = own.features.reshape(len(own), width)
            features, labels = np.concatenate([plain, features]), np.concatenate([own.labels, labels])
        return Dataset(features, labels, "public rows and Dirac canaries")

    def loss_beside(self, loss: Loss, reach: float) -> Loss:
        """`loss` for the model's own rows; for a canary `reach` times its output, whose gradient has that norm."""
        with torch.no_grad():
            tail = copy.deepcopy(self.model).eval()(torch.zeros((1, *self.shape))).shape[1:]

        def both(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            own = loss(outputs[:, :-_INDEX_COLUMNS].reshape(-1, *tail), labels)
            if own.shape != outputs.shape[:1]:
                return own  # for the trainer to refuse; `where` would hide it
            return torch.where(outputs[:, -1] > 0.5, reach * outputs[:, -2], own)

        return both
