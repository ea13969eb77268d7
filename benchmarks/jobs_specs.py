"""The jobs that the benchmark submits."""

from __future__ import annotations

from src.jobs.spec import FederatedTrainingSpec


def training(seed: int) -> FederatedTrainingSpec:
    """One of its own for each seed: nothing that is known of another is known of it."""
    return FederatedTrainingSpec(task="randhie", rounds=5, spare_rounds=1, seed=seed)
