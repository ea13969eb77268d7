"""DP-SGD: what it computes, what bounds it, and where its chance comes from."""

from __future__ import annotations

import copy
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src.errors import ConfigError, InvalidInput
from src.learning import dpsgd, per_example, trial
from src.learning.dpsgd import train_dpsgd, train_plain
from src.learning.flatten import flatten, model_to_tensors
from src.learning.settings import LocalTraining
from src.learning.task import Dataset, default_loss
from src.privacy.entropy import Entropy

Build = Callable[[], torch.nn.Module]
MakeData = Callable[..., Dataset]
MakeTraining = Callable[..., LocalTraining]
MakeEntropy = Callable[[str], Entropy]
Train = Callable[..., None]


def mlp(features: int = 4) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(features, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def normalised() -> torch.nn.Module:
    """Has a layer whose gradients are written out for each row."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def half_frozen() -> torch.nn.Module:
    model = mlp()
    for parameter in next(iter(model.children())).parameters():
        parameter.requires_grad_(False)
    return model


def vector(model: torch.nn.Module) -> NDArray[np.float32]:
    return flatten(model_to_tensors(model))[0]


def update(
    model: torch.nn.Module, dataset: Dataset, config: LocalTraining, source: Entropy, train: Train = train_dpsgd
) -> NDArray[np.float64]:
    """The change that training makes to a copy of `model`, float64."""
    trained = copy.deepcopy(model)
    train(trained, dataset, loss=default_loss, config=config, entropy=source)
    return vector(trained).astype(np.float64) - vector(model)


def clipped_sum(model: torch.nn.Module, dataset: Dataset, bound: float) -> NDArray[np.float64]:
    """The slow oracle: one backward pass for each example, clipped by hand, summed."""
    total = np.zeros(len(vector(model)))
    for row in range(len(dataset)):
        model.zero_grad()
        output = model(torch.from_numpy(dataset.features[row : row + 1]))
        torch.autograd.backward(default_loss(output, torch.from_numpy(dataset.labels[row : row + 1])).sum())
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        gradient = flatten(gradients)[0].astype(np.float64)
        total += gradient * min(1.0, bound / float(np.linalg.norm(gradient)))
    model.zero_grad()
    return total


@pytest.mark.parametrize("build", [mlp, normalised])
def test_without_noise_and_clipping_it_is_sgd(
    build: Build, data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    config = training(steps=6, momentum=0.5)
    private = update(build(), data(32), config, entropy("dp"))
    plain = update(build(), data(32), config, entropy("plain"), train_plain)
    assert np.linalg.norm(plain) > 0.1
    np.testing.assert_allclose(private, plain, atol=2e-6)


@pytest.mark.parametrize("build", [mlp, normalised, half_frozen])
@pytest.mark.parametrize("bound", [0.05, 0.4])
def test_a_step_is_the_sum_of_gradients_clipped_one_by_one(
    build: Build, bound: float, data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    model, rows = build(), data(32)
    config = training(max_grad_norm=bound)
    expected = -config.learning_rate / config.expected_batch * clipped_sum(model, rows, bound)
    np.testing.assert_allclose(update(model, rows, config, entropy("x")), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("build", [mlp, normalised])
def test_one_example_moves_the_model_by_no_more_than_the_bound(
    build: Build, data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    rows = data(33)
    # Huge features: gradients far beyond the bound.
    wild = Dataset(rows.features * 1000, rows.labels, "x")
    config = training(max_grad_norm=0.3)
    reach = config.learning_rate * config.max_grad_norm / config.expected_batch
    with_it = update(build(), wild, config, entropy("a"))
    without_it = update(build(), Dataset(wild.features[:-1], wild.labels[:-1], "x"), config, entropy("a"))
    assert np.linalg.norm(with_it) <= 33 * reach * (1 + 1e-4)
    assert np.linalg.norm(with_it - without_it) <= reach * (1 + 1e-3)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
def test_the_noise_of_a_step_has_the_planned_variance(
    layer_norm: bool, rows: int, data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    """σ²C² on the sum, thus (lr·σ·C/expected batch)² on the model; and a step on nothing is pure noise."""
    layers = [torch.nn.LayerNorm(100)] if layer_norm else []
    model = torch.nn.Sequential(*layers, torch.nn.Linear(100, 200), torch.nn.Linear(200, 1))
    config = training(max_grad_norm=0.5, noise_multiplier=1.7, declared_rows=10)
    known = update(model, data(rows, 100), training(max_grad_norm=0.5, declared_rows=10), entropy("none"))
    noise = update(model, data(rows, 100), config, entropy(f"noise {layer_norm} {rows}")) - known
    scaled = noise / (config.learning_rate * 1.7 * 0.5 / config.expected_batch)
    count = len(scaled)
    # Five standard errors of mean and variance of `count` normals: fails by chance once in a million.
    assert abs(scaled.mean()) < 5 / math.sqrt(count)
    assert abs(scaled.var() - 1) < 5 * math.sqrt(2 / count)
    assert len(np.unique(noise)) > 0.9 * count, "each coordinate has its own draw"


def test_steps_draw_fresh_noise(data: MakeData, training: MakeTraining, entropy: MakeEntropy) -> None:
    """Nine independent steps of pure noise add up to three times the deviation of one, not to nine times."""
    model = torch.nn.Linear(4000, 1)
    ratio = [
        update(model, data(0, 4000), training(steps=steps, max_grad_norm=1.0, noise_multiplier=1.0), entropy("n")).std()
        for steps in (9, 1)
    ]
    assert 2.8 < ratio[0] / ratio[1] < 3.2


def test_sampling_is_poisson(data: MakeData, training: MakeTraining, entropy: MakeEntropy) -> None:
    """With a linear loss of unit slope, a step counts its sample: binomial in mean and variance."""
    rows = Dataset(np.zeros((200, 1), np.float32), np.zeros(200, np.int64), "x")
    model = torch.nn.Linear(1, 1)
    config = LocalTraining(1, 0.1, 1.0, 1e6, 0.0, declared_rows=10)  # expected batch 1: the step is the count
    source, counts = entropy("poisson"), []
    for _ in range(400):
        trained = copy.deepcopy(model)
        train_dpsgd(trained, rows, loss=lambda out, _: -out[:, 0], config=config, entropy=source)
        counts.append((trained.bias - model.bias).item())
    assert abs(np.mean(counts) - 20) < 5 * math.sqrt(18 / 400)
    assert abs(np.var(counts) - 18) < 5 * 18 * math.sqrt(2 / 400)


def test_the_private_row_count_is_in_no_divisor(data: MakeData, training: MakeTraining, entropy: MakeEntropy) -> None:
    """Twice the same rows, the same declared number: twice the step."""
    rows = data(16)
    twice = Dataset(np.tile(rows.features, (2, 1)), np.tile(rows.labels, 2), "x")
    config = training(max_grad_norm=0.2)
    np.testing.assert_allclose(
        update(mlp(), twice, config, entropy("a")), 2 * update(mlp(), rows, config, entropy("a")), rtol=1e-3, atol=1e-8
    )


def test_same_entropy_same_model_other_entropy_other_model(
    data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    config = training(steps=4, sampling_rate=0.3, noise_multiplier=0.5, max_grad_norm=1.0)
    first, again, other = (update(mlp(), data(30), config, entropy(name)) for name in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_no_other_generator_is_touched(data: MakeData, training: MakeTraining, entropy: MakeEntropy) -> None:
    """Neither torch's nor numpy's global state moves, and the source names none of their samplers."""
    model = mlp()
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    update(model, data(30), training(steps=3, sampling_rate=0.5, noise_multiplier=1.0), entropy("a"))
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index]
    source = inspect.getsource(dpsgd) + inspect.getsource(per_example) + inspect.getsource(trial)
    for word in ("np.random", "import random", "Generator(", "manual_seed", "torch.rand", "torch.normal", ".normal_(",
                 "bernoulli", "DataLoader", "secure_mode"):  # fmt: skip
        assert word not in source, word


def test_nothing_private_stays_on_the_model(data: MakeData, training: MakeTraining, entropy: MakeEntropy) -> None:
    """No gradient, per-example gradient, norm or hook is left behind."""
    for model in (mlp(), normalised()):
        clean = {name: set(vars(parameter)) for name, parameter in model.named_parameters()}
        train_dpsgd(model, data(20), loss=default_loss, config=training(), entropy=entropy("a"))
        for name, parameter in model.named_parameters():
            assert parameter.grad is None
            assert set(vars(parameter)) == clean[name]
        assert all(not module._forward_hooks and not module._backward_hooks for module in model.modules())


def test_several_classes_train(data: MakeData, training: MakeTraining, entropy: MakeEntropy) -> None:
    torch.manual_seed(1)
    moved = update(torch.nn.Linear(4, 3), data(32), training(max_grad_norm=1.0), entropy("a"))
    assert 0 < np.linalg.norm(moved) < 1


REFUSED_MODELS: dict[str, Build] = {
    "batch normalisation mixes examples": lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)),
    "running statistics are not private": lambda: torch.nn.Sequential(
        torch.nn.Unflatten(1, (2, 2)),
        torch.nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 1),
    ),
}


@pytest.mark.parametrize("reason", REFUSED_MODELS)
def test_refuses_models_that_dp_sgd_cannot_train(
    reason: str, data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    with pytest.raises(InvalidInput, match="cannot train this model"):
        update(REFUSED_MODELS[reason](), data(8), training(), entropy("a"))


@pytest.mark.parametrize("train", [train_dpsgd, train_plain])
def test_refuses_a_loss_that_mixes_examples(
    train: Train, data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    def mean(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return default_loss(outputs, labels).mean()

    with pytest.raises(InvalidInput, match="one value for each example"):
        train(mlp(), data(8), loss=mean, config=training(), entropy=entropy("a"))


REFUSED_SETTINGS = [
    {"steps": 0},
    {"sampling_rate": 0.0},
    {"sampling_rate": 1.01},
    {"sampling_rate": math.nan},
    {"learning_rate": 0.0},
    {"learning_rate": math.inf},
    {"max_grad_norm": -1.0},
    {"max_grad_norm": 9e-7},
    {"max_grad_norm": 1e-45},
    {"noise_multiplier": -0.1},
    {"noise_multiplier": math.nan},
    {"declared_rows": 0},
    {"momentum": 1.0},
]


@pytest.mark.parametrize("change", REFUSED_SETTINGS, ids=str)
def test_refuses_settings_out_of_range(change: dict[str, Any], training: MakeTraining) -> None:
    with pytest.raises(ConfigError) as caught:
        training(**change)
    assert [problem.split(":")[0] for problem in caught.value.problems] == list(change)


FORKSERVER = """
import multiprocessing, sys

def work(_):
    preloaded = "src.learning.dpsgd" in sys.modules
    import numpy as np, torch
    from src.learning.dpsgd import train_dpsgd
    from src.learning.settings import LocalTraining
    from src.learning.task import Dataset, default_loss
    from src.privacy.entropy import SystemEntropy
    torch.set_num_threads(2)
    torch.ones(600, 600) @ torch.ones(600, 600)  # hangs here if the parent ran a parallel region
    rows = Dataset(np.ones((50, 4), np.float32), np.ones(50, np.int64), "x")
    config = LocalTraining(2, 0.5, 0.1, 1.0, 1.0, declared_rows=50)
    model = torch.nn.Linear(4, 1)
    train_dpsgd(model, rows, loss=default_loss, config=config, entropy=SystemEntropy())
    return preloaded, bool(torch.isfinite(model.weight).all())

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.learning.dpsgd"])
    with context.Pool(1) as pool:
        print(pool.map_async(work, [0, 1]).get(timeout=200))
"""


def test_it_trains_in_a_child_of_a_preloaded_forkserver(tmp_path: Path) -> None:
    """The import runs nothing parallel: a child that was forked after it can."""
    script = tmp_path / "zygote.py"
    script.write_text(FORKSERVER)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.stdout.strip() == "[(True, True), (True, True)]", done.stderr


def test_without_privacy_a_row_that_is_not_finite_is_refused(
    data: MakeData, training: MakeTraining, entropy: MakeEntropy
) -> None:
    rows = data(8)
    rows.features[3, 1] = np.inf
    with pytest.raises(InvalidInput, match="finite"):
        train_plain(mlp(), rows, loss=default_loss, config=training(), entropy=entropy("plain"))
