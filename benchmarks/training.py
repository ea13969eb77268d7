"""What a step of DP-SGD costs, each row by itself, beside an ordinary step on the same rows and bare autograd; and what
reading a party's rows adds to it."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch

from src.learning.dpsgd import noised_sum
from src.learning.gradients import clipped_gradient_sum
from src.learning.per_example import ClippedSums
from src.learning.task import Dataset, Options, default_loss
from src.learning.together import sums_together
from src.party.rows import held_rows
from src.privacy.entropy import SystemEntropy

from .measure import Figures, cpu_s, say

ROWS: Final = 500
WIDTHS: Final = {"177": (9, 16), "10k": (100, 100), "100k": (784, 128)}
"""Inputs and hidden units of models with so many parameters."""

HELD_ROWS: Final = 250_000
"""Of 100 features: a file of 100 MB."""

REACH: Final[dict[str, tuple[str, float]]] = {"row_vs_bare_autograd_177": ("≤", 2), "rows_held_vs_read": ("≤", 0.02)}
"""What is to be reached: at least, or at most."""


def run() -> Figures:
    """For each model: microseconds a row; a step of DP-SGD over an ordinary float32 step; over one row's autograd;
    over the same sums of public rows, many at a time. Of a file of 100 MB: milliseconds to read it and to hold it;
    to have it held over reading it; a step of fedsgd on 500 of its rows that reads them, over one that has them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: Figures = {}
    for name, widths in WIDTHS.items():
        say(f"DP-SGD of {name} parameters, {ROWS} rows a step")
        figures |= _of_model(name, *widths)
    say("rows of 100 MB, read and held")
    with TemporaryDirectory() as directory:
        figures |= _of_file(Path(directory))
    torch.set_num_threads(threads)
    return figures


def _of_model(name: str, inputs: int, hidden: int) -> Figures:
    model = torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1))
    generator = np.random.default_rng(0)
    dataset = Dataset(
        generator.normal(size=(ROWS, inputs)).astype(np.float32), generator.integers(0, 2, ROWS), "generated"
    )
    working, entropy, chosen = copy.deepcopy(model).double().train(), SystemEntropy(), np.arange(ROWS)
    sums = ClippedSums(working, dataset, loss=default_loss, parameters=list(working.parameters()), max_grad_norm=1.0)
    private = cpu_s(lambda: noised_sum(sums.over(dataset, chosen), 1.0, entropy=entropy))
    public = copy.deepcopy(model).double().train()
    at_once = sums_together(public, dataset, loss=default_loss, parameters=list(public.parameters()), max_grad_norm=1.0)
    together = cpu_s(lambda: at_once.over(dataset, chosen))
    features, labels = torch.from_numpy(dataset.features), torch.from_numpy(dataset.labels)
    plain = cpu_s(lambda: _gradient(model, features, labels))
    twin, wide = copy.deepcopy(model).double(), features.double()
    bare = cpu_s(lambda: [_gradient(twin, wide[i : i + 1].clone(), labels[i : i + 1].clone()) for i in range(ROWS)])
    return {
        f"dp_sgd_row_us_{name}": private / ROWS * 1e6,
        f"dp_sgd_vs_plain_step_{name}": private / plain,
        f"row_vs_bare_autograd_{name}": private / bare,
        f"rows_alone_vs_together_{name}": private / together,
    }


def _gradient(model: torch.nn.Module, features: torch.Tensor, labels: torch.Tensor) -> object:
    return torch.autograd.grad(default_loss(model(features), labels).sum(), list(model.parameters()))


class _Table:
    """Rows of a file."""

    name = "table"

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(100, 1)

    def load_data(self, options: Options) -> Dataset:
        with np.load(str(options["file"])) as table:
            return Dataset(table["features"], table["labels"], "generated")


def _of_file(directory: Path) -> Figures:
    file, task = directory / "rows.npz", _Table()
    generator = np.random.default_rng(0)
    features = generator.normal(size=(HELD_ROWS, 100)).astype(np.float32)
    np.savez(file, features=features, labels=generator.integers(0, 2, HELD_ROWS))
    options, chosen = {"file": str(file)}, np.arange(ROWS)

    def rows(kept: dict[str, Any]) -> Dataset:
        return held_rows(
            task,
            name=task.name,
            options=options,
            directory=directory,
            job="j",
            kept=kept,
            load=lambda: task.load_data(options),
        )[1]

    def step(kept: dict[str, Any]) -> object:
        model = task.build_model(0)
        return clipped_gradient_sum(model, rows(kept), chosen, loss=default_loss, max_grad_norm=1.0)

    kept: dict[str, Any] = {}
    plain = cpu_s(lambda: task.load_data(options))
    while not kept:  # until the file is older than a tick of its clock
        rows(kept)
    read, held = cpu_s(lambda: rows({})), cpu_s(lambda: rows(kept))
    return {
        "rows_read_100mb_ms": plain * 1e3,
        "rows_read_and_held_100mb_ms": read * 1e3,
        "rows_held_vs_read": held / read,
        "fedsgd_step_read_vs_held": cpu_s(lambda: step({})) / cpu_s(lambda: step(kept)),
    }
