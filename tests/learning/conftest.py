"""What the tests of this room share: seeded entropy, small data sets, one torch thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from src.learning.settings import LocalTraining
from src.learning.task import Dataset
from src.privacy.entropy import DeterministicEntropy

MakeEntropy = Callable[[str], DeterministicEntropy]
MakeData = Callable[..., Dataset]
MakeTraining = Callable[..., LocalTraining]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two workers share two cores, and sums come out alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def entropy() -> MakeEntropy:
    """A repeatable source; another name, another stream."""
    return lambda name: DeterministicEntropy(b"tests/learning", purpose=name)


@pytest.fixture
def data() -> MakeData:
    """Random rows with binary labels that the first feature half explains."""

    def make(rows: int, features: int = 4, seed: int = 7) -> Dataset:
        generator = np.random.default_rng(seed)
        values = generator.normal(size=(rows, features)).astype(np.float32)
        labels = (values[:, 0] + generator.normal(size=rows) > 0).astype(np.int64)
        return Dataset(values, labels, "random rows")

    return make


@pytest.fixture
def training() -> MakeTraining:
    """`LocalTraining` with defaults that change nothing: one step on all of 32 rows, no noise, a clip out of reach."""

    def make(**changes: float) -> LocalTraining:
        settings: dict[str, float] = {
            "steps": 1,
            "sampling_rate": 1.0,
            "learning_rate": 0.5,
            "max_grad_norm": 1e6,
            "noise_multiplier": 0.0,
            "declared_rows": 32,
        }
        return LocalTraining(**(settings | changes))  # type: ignore[arg-type]  # whole numbers are floats here

    return make
