"""The three server optimizers, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from src.errors import ConfigError, InvalidInput
from src.learning.flatten import from_safetensors, to_safetensors
from src.learning.server_optimizer import Kind, ServerOptimizer

MODEL = np.array([1.0, -2.0], np.float32)
UPDATE = np.array([0.5, -0.25])


def test_fedavg_adds_the_mean() -> None:
    parameters, state = ServerOptimizer().step(MODEL, UPDATE, state={})
    assert parameters.dtype == np.float32
    assert parameters.tolist() == [1.5, -2.25]
    assert state == {}
    assert MODEL.tolist() == [1.0, -2.0]


def test_fedavgm_by_hand() -> None:
    """v₁ = Δ; v₂ = 0.5·Δ + Δ; the model moves by the server rate times v."""
    optimizer = ServerOptimizer("fedavgm", 2.0, momentum=0.5)
    first, state = optimizer.step(MODEL, UPDATE, state={})
    assert first.tolist() == [2.0, -2.5]
    second, state = optimizer.step(first, UPDATE, state=state)
    assert second.tolist() == [2.0 + 2 * 0.75, -2.5 - 2 * 0.375]
    assert state["momentum"].tolist() == [0.75, -0.375]


def test_fedadam_by_hand() -> None:
    """Reddi et al. 2021, algorithm 2: no bias correction, the second moment starts at τ²."""
    optimizer = ServerOptimizer("fedadam", 0.1, momentum=0.9, second_momentum=0.99, adaptivity=0.01)
    parameters, state = optimizer.step(MODEL, UPDATE, state={})
    m, v = 0.1 * 0.5, 0.99 * 0.01**2 + 0.01 * 0.25
    assert parameters[0] == np.float32(1.0 + 0.1 * m / (math.sqrt(v) + 0.01))
    again, _ = optimizer.step(parameters, UPDATE, state=state)
    m, v = 0.9 * m + 0.1 * 0.5, 0.99 * v + 0.01 * 0.25
    assert again[0] == pytest.approx(float(parameters[0]) + 0.1 * m / (math.sqrt(v) + 0.01), rel=1e-6)


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam"])
def test_state_survives_storage_and_the_next_step_is_the_same_bits(kind: Kind) -> None:
    optimizer = ServerOptimizer(kind, 0.3)
    parameters, state = optimizer.step(MODEL, UPDATE, state={})
    stored = from_safetensors(to_safetensors(state))
    direct, _ = optimizer.step(parameters, UPDATE, state=state)
    assert np.array_equal(direct, optimizer.step(parameters, UPDATE, state=stored)[0])


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam"])
def test_no_update_moves_nothing(kind: Kind) -> None:
    assert np.array_equal(ServerOptimizer(kind).step(MODEL, np.zeros(2), state={})[0], MODEL)


REFUSED_STEPS: dict[str, tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]] = {
    "another length": (np.zeros(3), {}),
    "not finite": (np.array([np.nan, 0]), {}),
    "another optimizer's state": (UPDATE, {"second_moment": np.zeros(2)}),
    "another model's state": (UPDATE, {"momentum": np.zeros(3)}),
}


@pytest.mark.parametrize("what", REFUSED_STEPS)
def test_refuses_a_step_with(what: str) -> None:
    update, state = REFUSED_STEPS[what]
    with pytest.raises(InvalidInput):
        ServerOptimizer("fedavgm").step(MODEL, update, state=state)


REFUSED_SETTINGS = [
    {"kind": "sgd"},
    {"learning_rate": 0.0},
    {"learning_rate": math.nan},
    {"momentum": 1.0},
    {"second_momentum": -0.1},
    {"adaptivity": 0.0},
]


@pytest.mark.parametrize("change", REFUSED_SETTINGS, ids=str)
def test_refuses_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerOptimizer(**change)
    assert [problem.split(":")[0] for problem in caught.value.problems] == list(change)
