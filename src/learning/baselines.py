"""What the same model reaches where all rows lie in one place: the yardsticks of a federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..errors import InvalidInput
from ..privacy.entropy import Entropy
from .dpsgd import train_dpsgd, train_plain
from .evaluation import evaluate
from .settings import LocalTraining
from .task import Dataset, Task, loss_for
from .together import sums_together


@dataclass(frozen=True, slots=True)
class Baselines:
    """Metrics on the hold-out rows of the same model, trained on the union of the parties' rows.

    Attributes:
        central: with no privacy.
        central_dp: with DP-SGD, at the example-level (ε, δ) of a party in the federation.
    """

    central: dict[str, float]
    central_dp: dict[str, float]


def pool(parties: Sequence[Dataset]) -> Dataset:
    """The union of the parties' rows, in their order.

    Raises:
        InvalidInput: there is no party, or their rows have different shapes.
    """
    if not parties or len({data.features.shape[1:] for data in parties}) != 1:
        raise InvalidInput("only data sets of one shape, and at least one, can be pooled")
    return Dataset(
        np.concatenate([data.features for data in parties]),
        np.concatenate([data.labels for data in parties]),
        f"union of {len(parties)} parties' rows",
    )


def pooled_training(local: LocalTraining, *, rounds: int, parties: int, learning_rate: float) -> LocalTraining:
    """Central DP-SGD that costs what `rounds` of `local` cost one party: same rate, noise multiplier and total steps.

    An example is sampled as often and noised as much as in the federation, so ε and δ are equal; what differs is that
    one step sees all parties' rows. The learning rate costs no privacy and is the baseline's own.
    """
    return replace(
        local,
        steps=local.steps * rounds,
        declared_rows=local.declared_rows * parties,
        learning_rate=learning_rate,
    )


def central(
    task: Task,
    parties: Sequence[Dataset],
    *,
    holdout: Dataset,
    plain: LocalTraining,
    private: LocalTraining,
    seed: int,
    entropy: Entropy,
    threads: int = 1,
) -> Baselines:
    """Train both baselines from the model that `seed` gives, and evaluate them.

    Args:
        parties: each party's rows, public ones, pooled here.
        plain: for the baseline without privacy; its clipping and noise are ignored.
        private: for DP-SGD, as `pooled_training` gives.
        threads: of torch, in this process from now on.

    Raises:
        InvalidInput: as `pool`, `train_plain` and `train_dpsgd`.
    """
    torch.set_num_threads(threads)
    data = pool(parties)
    results = []
    in_public = partial(train_dpsgd, sums_of=sums_together)  # nobody is protected where all rows lie in one place
    for train, config in ((train_plain, plain), (in_public, private)):
        model = task.build_model(seed)
        train(model, data, loss=loss_for(task, model, data), config=config, entropy=entropy)
        results.append(evaluate(task, model, holdout))
    return Baselines(central=results[0], central_dp=results[1])
