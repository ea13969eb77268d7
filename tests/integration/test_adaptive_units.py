"""Adaptive clipping through the units of work of both roles: twenty parties, encrypted bits, a norm that moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import src.party.work as party_work
from src.aggregator import work as aggregator_work
from src.aggregator.planning import plan_round
from src.privacy.entropy import DeterministicEntropy
from src.privacy.noise import discrete_gaussian
from src.privacy.noise_plan import fraction_from_json
from src.protocol.plan import RoundPlan
from src.protocol.roster import AGGREGATOR

from .units import UnitsOfWork

PARTIES = tuple(f"p{index:02}" for index in range(20))
DIMENSION = 40


class Units(UnitsOfWork):
    """A federation of twenty; the training is played."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **privacy: Any) -> None:
        spec = {"task": "t", "rounds": 50, "party_privacy": {"adaptive_clipping": {}, **privacy}}
        super().__init__(directory, spec, parties=PARTIES)
        self.monkeypatch = monkeypatch
        self.model = self.store({"w": np.zeros(DIMENSION, np.float32)})

    def plan(self, number: int, norm: float | None = None) -> RoundPlan:
        scheme = self.keyring.scheme("paillier")
        return plan_round(
            self.spec,
            job_id="job",
            number=number,
            model=self.model,
            roster=self.roster,
            scheme=scheme,
            local_noise=1.0,
            clipping_norm=norm,
        )

    def round(self, plan: RoundPlan, norms: Mapping[str, float]) -> dict[str, Any]:
        """Contribute, noise, fold, open, apply: what `open_aggregate` answers when updates have these norms."""
        params = self.params(plan)
        batches = {}
        for name, norm in norms.items():
            self.monkeypatch.setattr(party_work, "SystemEntropy", lambda name=name: self.drawn(name, plan.round))
            self.monkeypatch.setattr(party_work, "_train", lambda *_, norm=norm: update(norm))
            batches[name] = party_work.HANDLERS["contribute"]({**params, "name": name}, self.context)
        if plan.aggregator_adds_noise:
            self.monkeypatch.setattr(aggregator_work, "SystemEntropy", lambda: self.drawn(AGGREGATOR, plan.round))
            batches[AGGREGATOR] = aggregator_work.HANDLERS["make_noise"](params, self.context)
        aggregate = aggregator_work.HANDLERS["fold"]({**params, "batches": batches}, self.context)
        opening = self.opening(aggregate, contributions=len(batches), updates=list(norms))
        return aggregator_work.HANDLERS["open_aggregate"]({**params, **opening}, self.context)

    @staticmethod
    def drawn(name: str, number: int) -> DeterministicEntropy:
        """What a party, or the aggregator, draws from in a round: here it is known."""
        return DeterministicEntropy(bytes(32), purpose="adaptive", party=name, round_number=number)


def update(norm: float) -> NDArray[np.float32]:
    return np.full(DIMENSION, norm / math.sqrt(DIMENSION), np.float32)


def noise_of_bits(plan: RoundPlan) -> int:
    """The noise in the last slot, drawn again: after what rounding takes, as each contributor drew it."""
    share, own = (fraction_from_json(text) for text in (plan.noise.share_sigma2, plan.noise.aggregator_sigma2))
    total = int(discrete_gaussian(own, plan.value_count, entropy=Units.drawn(AGGREGATOR, plan.round))[-1])
    for name in PARTIES:
        source = Units.drawn(name, plan.round)
        source.words(DIMENSION)  # one rounding: these updates are far from the bound that it may exceed
        total += int(discrete_gaussian(share, plan.value_count, entropy=source)[-1])
    return total


def test_the_opened_bits_move_the_norm_as_the_rule_says_and_the_model_by_the_mean_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 of 20 within the norm, and the noise of every contributor known: C·exp(-η·(b̃ - γ)) to the last bit."""
    units = Units(tmp_path, monkeypatch, noise_multiplier=0.5, clipping_norm=1.0)
    plan = units.plan(1)
    opened = units.round(plan, {name: 0.1 if index < 14 else 5.0 for index, name in enumerate(PARTIES)})
    counted = (8 + noise_of_bits(plan) / plan.bit_unit) / 20
    assert float(opened["next_clipping_norm"]) == pytest.approx(math.exp(-0.2 * ((counted + 1) / 2 - 0.5)), rel=1e-12)
    assert 0 < abs(counted - 0.4) < 0.4  # a noise of one party in twenty on the count, both ways
    moved = units.parameters(opened["model_sha256"])
    deviation = 0.5 * plan.rounded_bound / 2.0**plan.resolution_bits / 20
    assert moved.shape == (DIMENSION,)
    np.testing.assert_allclose(moved, (14 * 0.1 + 6 * 1.0) / 20 / math.sqrt(DIMENSION), atol=6 * deviation)


def test_the_norm_walks_to_the_median_of_the_updates_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = Units(
        tmp_path, monkeypatch, noise_multiplier=0.5, clipping_norm=1.0, adaptive_clipping={"learning_rate": 1.0}
    )
    norms = {name: 3.0 * 1.05**index for index, name in enumerate(PARTIES)}
    norm: float | None = None
    for number in range(1, 9):
        norm = float(units.round(units.plan(number, norm), norms)["next_clipping_norm"])
    assert norm == pytest.approx(3.0 * 1.05**9.5, rel=0.35)


def test_without_noise_the_count_is_exact_and_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = Units(tmp_path, monkeypatch, noise_multiplier=0.0, noise_by="parties")
    plan = units.plan(1)
    assert (plan.bit_unit, plan.noise.share_sigma2) == (1, "0/1")
    opened = units.round(plan, {name: 0.1 if index < 15 else 5.0 for index, name in enumerate(PARTIES)})
    assert float(opened["next_clipping_norm"]) == pytest.approx(math.exp(-0.05), rel=1e-15)
