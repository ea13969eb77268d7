"""A small federation for crashes: two parties, both of whom must open; an aggregator that starts in a moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Pair:
    """A federation of a and b that has run a job.

    Attributes:
        federation: aggregator and parties.
        model: what the first job released: later jobs start from it, so that the aggregator needs no torch.
    """

    federation: Any
    model: bytes

    def submit(self, **fields: Any) -> str:
        return str(self.federation.submit(initial_model=self.model, **fields))


@pytest.fixture(scope="session")
def _pair(make_federation: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    federation = make_federation(
        parties=("a", "b"),
        party={"privacy": {"budgets": {"example": {"epsilon": 1000.0}}}},
        settings={"aggregator": {"SOTTO__EVALUATION": "{}"}},  # nothing to load before it serves
    )
    federation.start("a", "b")
    job_id = federation.submit()
    federation.succeed(job_id)
    files = federation.client.fetch_artifact(job_id, tmp_path_factory.mktemp("artifact"))
    return Pair(federation, files["model.safetensors"].read_bytes())


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """Everybody is there, whatever the test before did to them."""
    _pair.federation.start("a", "b")
    return _pair
