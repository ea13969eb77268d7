"""A small deal, plans under it, and randomness that is the same in every run.

The modulus has 512 bits: far too short to protect anything, long enough for every code path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from src.encryption.dealer import deal
from src.encryption.keys import KeyShare, PrivateKey, ThresholdKey
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.plaintext import PlaintextScheme
from src.encryption.scheme import Scheme
from src.privacy.clipping import AdaptiveClipping
from src.privacy.entropy import DeterministicEntropy
from src.protocol.derive import derive
from src.protocol.plan import LocalPlan, NormAdaptation, RoundPlan
from src.storage.blobs import Blobs

P = 0xE3B9FF6586D70C163EC926DDEAD91F6B011B351FBF8CDA056459F50D3E9BA993
Q = 0xFAAA49171DF29F6E64818C4F9C0526B6962FD595EF4A54FC599214270537BE5B

MakePlan = Callable[..., RoundPlan]
"""make_plan(scheme, **settings): a plan whose derived fields follow from its settings."""

GIVEN: dict[str, Any] = {
    "federation": "demo",
    "job_id": "job1",
    "round": 1,
    "spec_digest": "5" * 64,
    "task": "randhie",
    "task_options": "{}",
    "seed": 7,
    "model_sha256": "a" * 64,
    "model_bytes": 100,
    "local": LocalPlan(
        steps=10, sampling_rate="0.05", learning_rate="0.1", max_grad_norm="1.0", noise_multiplier="1.1", delta="1e-05"
    ),
    "roster_digest": "b" * 64,
    "threshold": 2,
    "custody": "threshold",
}
"""Of every plan, whatever its settings."""


@pytest.fixture(scope="session")
def entropy() -> DeterministicEntropy:
    return DeterministicEntropy(bytes(32), purpose="protocol tests")


@pytest.fixture(scope="session")
def dealt(entropy: DeterministicEntropy) -> tuple[ThresholdKey, list[KeyShare]]:
    """2 of 3."""
    return deal(P, Q, threshold=2, holders=3, entropy=entropy)


@pytest.fixture(scope="session")
def key(dealt: tuple[ThresholdKey, list[KeyShare]]) -> ThresholdKey:
    return dealt[0]


@pytest.fixture(scope="session")
def shares(dealt: tuple[ThresholdKey, list[KeyShare]]) -> list[KeyShare]:
    return dealt[1]


@pytest.fixture(scope="session")
def private(key: ThresholdKey) -> PrivateKey:
    """The whole key pair, as custody `aggregator` would have it."""
    return PrivateKey(P, Q, key.public)


@pytest.fixture(scope="session")
def paillier(key: ThresholdKey) -> Scheme:
    return PaillierScheme(key.public, key)


@pytest.fixture(scope="session", params=["paillier", "plaintext"])
def scheme(request: pytest.FixtureRequest, paillier: Scheme) -> Scheme:
    return paillier if request.param == "paillier" else PlaintextScheme(2, 3)


@pytest.fixture(scope="session")
def make_plan() -> MakePlan:
    def make(
        scheme: Scheme,
        *,
        dimension: int = 10,
        clipping_norm: float = 1.0,
        resolution_bits: int = 16,
        noise_by: str = "both",
        noise_multiplier: float = 0.5,
        parties: int = 3,
        quorum: int = 2,
        colluders: int = 0,
        priced_rounds: int = 5,
        adaptive: AdaptiveClipping | None = None,
    ) -> RoundPlan:
        derived = derive(
            scheme,
            dimension=dimension,
            clipping_norm=clipping_norm,
            resolution_bits=resolution_bits,
            noise_by=noise_by,
            noise_multiplier=noise_multiplier,
            delta=1e-5,
            cohort=parties,
            quorum=quorum,
            colluders=colluders,
            priced_rounds=priced_rounds,
            adaptive=adaptive,
        )
        return RoundPlan(
            **GIVEN,
            priced_rounds=priced_rounds,
            dimension=dimension,
            clipping_norm=repr(clipping_norm),
            resolution_bits=resolution_bits,
            rounded_bound=derived.rounded_bound,
            scheme=scheme.name,
            key_id=derived.layout.key_id,
            layout=derived.layout.to_json(),
            noise=derived.noise,
            cohort=tuple(f"party{index}" for index in range(parties)),
            quorum=quorum,
            colluders=colluders,
            adaptive_clipping=_adaptation(adaptive, derived.bit_unit) if adaptive else None,
        )

    return make


def _adaptation(adaptive: AdaptiveClipping, bit_unit: int) -> NormAdaptation:
    reals = {field.name: repr(getattr(adaptive, field.name)) for field in fields(adaptive)}
    return NormAdaptation(**reals, bit_unit=bit_unit)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")
