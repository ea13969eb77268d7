"""Yardsticks on public rows go many rows at a time: to the same numbers up to rounding, and nothing private goes so."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from src.errors import InvalidInput
from src.learning.dpsgd import train_dpsgd
from src.learning.gradients import clipped_gradient_sum
from src.learning.per_example import ClippedSums
from src.learning.task import Dataset, default_loss
from src.learning.together import sums_together

SRC = Path(__file__).resolve().parents[2] / "src"
ROWS = 300
BOUND = 0.3


class Branching(torch.nn.Module):
    """Does one thing or another, as its input says: nothing that could be mapped over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layer(row) * (1 if float(row[0]) > 0 else 2) for row in features])


class Mixing(torch.nn.Module):
    """Takes the mean over the batch away."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(features - features.mean(0))
        return outputs


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "a layer": lambda: torch.nn.Linear(4, 1),
    "a perceptron": lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
    "normalised": lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)),
    "a convolution": lambda: torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 4)), torch.nn.Conv1d(1, 3, 2), torch.nn.Flatten(), torch.nn.Linear(9, 2)
    ),
    "one that branches": Branching,
}


@pytest.fixture
def rows() -> Dataset:
    generator = np.random.default_rng(5)
    return Dataset(generator.normal(size=(ROWS, 4)).astype(np.float32), generator.integers(0, 2, ROWS), "public rows")


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_rows_by_themselves_up_to_rounding(name: str, rows: Dataset) -> None:
    torch.manual_seed(1)
    model = MODELS[name]().double().train()
    chosen = np.arange(0, ROWS, 2)
    twin = copy.deepcopy(model)
    alone = ClippedSums(twin, rows, loss=default_loss, parameters=list(twin.parameters()), max_grad_norm=BOUND)
    sums = sums_together(model, rows, loss=default_loss, parameters=list(model.parameters()), max_grad_norm=BOUND)
    # Gradients are scaled to a hair less than the bound where somebody is protected.
    assert torch.allclose(sums.over(rows, chosen), alone.over(rows, chosen), rtol=1e-5, atol=1e-7)
    assert not sums.over(rows, chosen[:0]).any()
    assert isinstance(sums, ClippedSums) == (name == "one that branches")


def test_a_row_without_a_finite_gradient_counts_for_nothing_here_too(rows: Dataset) -> None:
    labels = rows.labels.copy()
    labels[7] = 9  # no class of this model: its loss is not a number
    model = MODELS["a perceptron"]().double().train()
    sums = sums_together(model, rows, loss=default_loss, parameters=list(model.parameters()), max_grad_norm=BOUND)
    bad = Dataset(rows.features, labels, "public rows")
    others = np.array([row for row in range(ROWS) if row != 7])
    assert torch.allclose(sums.over(bad, np.arange(ROWS)), sums.over(rows, others))


def test_what_mixes_rows_is_refused_here_too(rows: Dataset) -> None:
    model = Mixing().double().train()
    with pytest.raises(InvalidInput):
        sums_together(model, rows, loss=default_loss, parameters=list(model.parameters()), max_grad_norm=BOUND)


@pytest.mark.parametrize("function", [train_dpsgd, clipped_gradient_sum])
def test_rows_go_by_themselves_unless_somebody_says_otherwise(function: Callable[..., object]) -> None:
    assert inspect.signature(function).parameters["sums_of"].default is ClippedSums


def test_only_yardsticks_and_simulations_say_otherwise() -> None:
    named = {path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if "together" in path.read_text("utf-8")}
    assert {path for path in named if "sums_together" in (SRC / path).read_text("utf-8")} == {
        "learning/baselines.py",
        "learning/simulate.py",
        "learning/together.py",
    }
    users = {
        path.relative_to(SRC).as_posix()
        for path in SRC.rglob("*.py")
        if any(f"{room} import" in path.read_text("utf-8") for room in ("baselines", "simulate", "learning.together"))
    }
    assert users == {"demo/run.py"}


def test_a_sum_over_private_rows_is_given_nothing_else() -> None:
    """Whoever calls with `sums_of` is in the list above."""
    callers = {path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if "sums_of=" in path.read_text("utf-8")}
    assert callers == {"learning/baselines.py", "learning/simulate.py"}
