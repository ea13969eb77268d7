"""Tasks as their authors bring them, each with a fault of its own; in a package of their own, as anybody's are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from src.learning.task import Dataset

PRIVATE = "TRIED_PRIVATE"
"""In the environment: a file that no trial may read."""


class Plain:
    name = "plain"

    def build_model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return self.net()

    def net(self) -> Any:
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def load_data(self, options: Mapping[str, object]) -> Dataset:
        return Dataset(np.zeros((4, 6), np.float32), np.zeros(4, np.int64), "zeros")


class Frozen(Plain):
    """What is not trained of it comes from the seed."""

    def net(self) -> Any:
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        net[0].requires_grad_(False)
        return net


class Drops(Plain):
    def net(self) -> Any:
        return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))


class Normalises(Plain):
    def net(self) -> Any:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))


class Averages(Plain):
    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs, labels)


class Whole(Plain):
    """Its loss takes whole numbers alone."""

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.nll_loss(functional.log_softmax(outputs, 1), labels, reduction="none")


class Mixes(Plain):
    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy(outputs, labels, reduction="none")
        return losses - losses.mean()


class Remembers(Plain):
    seen: ClassVar[list[float]] = []

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy(outputs, labels, reduction="none")
        self.seen.append(losses.sum().item())
        return losses


class Wide(Plain):
    """Its model takes more features than there are."""

    def net(self) -> Any:
        return nn.Linear(9, 2)


class SaysItsShape(Wide):
    features_shape = (9,)
    label_dtype = "int64"

    def load_data(self, options: Mapping[str, object]) -> Dataset:
        raise AssertionError("it says what its rows look like")


class OneOutput(Plain):
    """Says nothing of its labels: floats may be classes, one of which is missing."""

    def net(self) -> Any:
        return nn.Linear(6, 1)


class Regresses(OneOutput):
    """A regression by its own word, without a loss for one."""

    features_shape = (6,)
    label_dtype = "float32"


class Fails(Plain):
    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise IndexError("row 7 is 31337 (rows.py:31337)")


class Unbuilt(Plain):
    def net(self) -> Any:
        raise FileNotFoundError("no such file: /home/ann/weights.bin")


class Leaves(Plain):
    def net(self) -> Any:
        raise SystemExit(3)


class Dies(Plain):
    def net(self) -> Any:
        os.kill(os.getpid(), 9)


class NoModel(Plain):
    def net(self) -> Any:
        return [nn.Linear(6, 2)]


class Half(Plain):
    def net(self) -> Any:
        return nn.Linear(6, 2).bfloat16()


class Later(Plain):
    """Another version of the task: one more unit."""

    def net(self) -> Any:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


class Looks(Plain):
    """Its model is built of private rows."""

    def net(self) -> Any:
        return nn.Linear(6, len(Path(os.environ[PRIVATE]).read_text()) % 2 + 1)


class Writes(Plain):
    """Leaves something where others find it."""

    def net(self) -> Any:
        Path(os.environ[PRIVATE]).with_name("left").write_text("31337")
        return super().net()
