"""A task on generated rows: nobody's data, the same on every machine for the same seed.

Eight standard normal features; the label is 1 with the probability that a logistic model with weights of norm 4 gives.
Whoever knows the weights is right on 86 % of the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import ConfigError
from .public_draws import public_normals, public_uniforms
from .task import Dataset, Options, check_options

if TYPE_CHECKING:
    import torch

FEATURES: Final = 8
ROWS: Final = 4096
HOLDOUT_ROWS: Final = 2048
_WEIGHT_NORM: Final = 4.0


class SyntheticTask:
    """Logistic regression on generated rows (9 parameters)."""

    name: Final = "synthetic"

    def build_model(self, seed: int) -> torch.nn.Module:
        """8 → 1, linear, small weights drawn by `seed`; its output is a logit."""
        import torch

        model = torch.nn.Linear(FEATURES, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            torch.nn.init.xavier_uniform_(model.weight, generator=generator)
            model.bias.zero_()
        return model

    def load_data(self, options: Options) -> Dataset:
        """The rows to train on, `ROWS` of them. Raises ConfigError for an option that is not `seed`, an integer."""
        return _generate(_seed(options), "train", ROWS)

    def load_holdout(self, options: Options) -> Dataset:
        """Other rows of the same distribution, `HOLDOUT_ROWS` of them. Raises as `load_data`."""
        return _generate(_seed(options), "holdout", HOLDOUT_ROWS)


def _seed(options: Options) -> int:
    check_options(options, known=("seed",), task=SyntheticTask.name)
    seed = options.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError("the options of task 'synthetic' cannot be used", problems=("seed: a whole number",))
    return seed


def _generate(seed: int, part: str, rows: int) -> Dataset:
    weights = public_normals(FEATURES, f"synthetic/{seed}/weights")
    weights *= _WEIGHT_NORM / np.linalg.norm(weights)
    features = public_normals(rows * FEATURES, f"synthetic/{seed}/{part}/features").reshape(rows, FEATURES)
    uniforms = public_uniforms(rows, f"synthetic/{seed}/{part}/labels")
    labels = (uniforms < 1.0 / (1.0 + np.exp(-(features @ weights)))).astype(np.int64)
    return Dataset(features.astype(np.float32), labels, f"generated from seed {seed} ({part}): nobody's data")
