"""What one example adds to a sum of clipped gradients is bounded, whatever it, the model and the loss are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.learning import per_example
from src.learning.dpsgd import SecurePoissonSampler, train_dpsgd
from src.learning.gradients import clipped_gradient_sum
from src.learning.per_example import ClippedSums, rows_that_count, uses_ghost_clipping
from src.learning.settings import LocalTraining
from src.learning.task import Dataset, default_loss
from src.privacy.clipping import MIN_NORM
from src.privacy.entropy import DeterministicEntropy, SystemEntropy

Build = Callable[[], torch.nn.Module]
Vector = NDArray[np.float64]


def seeded(*layers: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def linear() -> torch.nn.Module:
    return seeded(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def no_bias() -> torch.nn.Module:
    return seeded(torch.nn.Linear(4, 3, bias=False), torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 1))


def normalised() -> torch.nn.Module:
    return seeded(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))


class Pooled(torch.nn.Module):
    """A linear layer on the two halves of a row, as one matrix for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(rows.reshape(-1, 2, 2)).mean(1))


class Twice(torch.nn.Module):
    """The same layer on both halves of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(rows[:, :2]) + self.layer(rows[:, 2:]))


class FourAxes(Pooled):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(rows.reshape(-1, 2, 1, 2)).mean((1, 2)))


MODELS: dict[str, Build] = {
    "linear": linear,
    "without bias": no_bias,
    "normalised": normalised,
    "three axes": Pooled,
    "four axes": FourAxes,
    "called twice": Twice,
}
GHOSTS = {"linear", "without bias"}


def rows_of(features: Any, labels: Any = None) -> Dataset:
    values = np.asarray(features, np.float32)
    return Dataset(values, np.zeros(len(values), np.int64) if labels is None else np.asarray(labels), "x")


def summed(model: torch.nn.Module, dataset: Dataset, bound: float = 1.0, loss: Any = default_loss) -> Vector:
    return clipped_gradient_sum(model, dataset, np.arange(len(dataset)), loss=loss, max_grad_norm=bound)


def moved(model: torch.nn.Module, dataset: Dataset, bound: float = 1.0, loss: Any = default_loss) -> Vector:
    """What one step of DP-SGD without noise takes off the model, in units of the sum."""
    trained = copy.deepcopy(model)
    config = LocalTraining(1, 1.0, 1.0, bound, 0.0, declared_rows=1)
    train_dpsgd(trained, dataset, loss=loss, config=config, entropy=SystemEntropy())
    pairs = zip(model.parameters(), trained.parameters(), strict=True)
    return torch.cat([(one.double() - other.double()).detach().reshape(-1) for one, other in pairs]).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_ghost_clipping_only_where_every_linear_layer_sees_one_row_for_each_example(name: str) -> None:
    model = MODELS[name]()
    assert uses_ghost_clipping(model, (4,)) == (name in GHOSTS)
    assert all(not module._forward_hooks for module in model.modules())


def test_ghost_clipping_needs_the_layers_own_parameters() -> None:
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    frozen = linear()
    next(frozen.children()).requires_grad_(False)
    assert not uses_ghost_clipping(tied, (4,))
    assert uses_ghost_clipping(frozen, (4,))
    assert not uses_ghost_clipping(torch.nn.Tanh(), (4,))
    other = torch.nn.Linear(4, 4)
    other.extra = torch.nn.Parameter(torch.zeros(1))  # as weight_norm does it
    assert not uses_ghost_clipping(other, (4,))


@pytest.mark.parametrize("name", sorted(GHOSTS))
@pytest.mark.parametrize("bound", [MIN_NORM, 0.3, 1e6])
def test_both_ways_give_the_same_sum(name: str, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    build = linear if name == "linear" else lambda: seeded(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 1))
    dataset = rows_of(np.random.default_rng(1).normal(size=(40, 4)), np.arange(40) % 2)
    ghost = summed(build(), dataset, bound)
    monkeypatch.setattr(per_example, "uses_ghost_clipping", lambda model, shape: False)
    np.testing.assert_allclose(ghost, summed(build(), dataset, bound), rtol=1e-9, atol=1e-12 * bound)


# ------------------------------------------------------------------------------------------------- adversarial rows

HUGE = st.sampled_from([0.0, 1.0, -1.0, 1e-45, 1e-38, 1e-20, 1e5, -1e5, 1e10, 1e18, -1e19, 1e30, 3e38, -3e38])


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    row=st.lists(HUGE | st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    weight=st.sampled_from([1.0, 1e-30, 1e10, 1e19, -1e38]),
    bound=st.sampled_from([MIN_NORM, 1.0, 1e6]),
    scale=st.sampled_from([1.0, 1e-300, 1e300]),
)
def test_one_example_moves_a_sum_by_the_bound_at_most_whatever_it_holds(
    name: str, row: list[float], weight: float, bound: float, scale: float
) -> None:
    """Beside three others, of a model that the aggregator may have made up, under both strategies."""
    model = MODELS[name]()
    with torch.no_grad():
        next(model.parameters()).reshape(-1)[0] = weight
    others = np.random.default_rng(2).normal(size=(3, 4))

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return scale * default_loss(outputs, labels)

    for run in (summed, moved) if scale == 1.0 and weight == 1.0 else (summed,):
        with_it, without = (run(model, rows_of(each), bound, loss) for each in ([*others, row], others))
        assert np.isfinite(with_it).all()
        # What a step takes off a float32 parameter is rounded to its digits.
        rounding = 0.0 if run is summed else 1e-6 * (1.0 + 4 * bound)
        assert np.linalg.norm(with_it - without) <= bound * (1 + 1e-5) + rounding


@pytest.mark.parametrize("build", [Pooled, FourAxes])
def test_positions_that_nearly_cancel_are_clipped_by_the_norm_that_is_summed(build: Build) -> None:
    """In float32, by ghost norms, such a row moved the sum by 2.5e7 times the bound."""
    for size, rest in ((1.0, 0.5), (1e5, 30.0), (1e7, 1e3), (1e12, 1e8)):
        for run in (summed, moved):
            assert np.linalg.norm(run(build(), rows_of([[size, 0.0, -size + rest, 0.0]]))) <= 1.0 + 1e-6


# ------------------------------------------------------------------------------- rows of which nothing can be computed


BROKEN: dict[str, tuple[list[float], float]] = {
    "a feature that is not a number": ([np.nan, 1.0, 1.0, 1.0], 0.0),
    "an infinite feature": ([1.0, np.inf, 1.0, 1.0], 1.0),
    "a label that is not a number": ([1.0, 1.0, 1.0, 1.0], np.nan),
    "an infinite label": ([1.0, 1.0, 1.0, 1.0], -np.inf),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_that_is_not_finite_adds_nothing_and_no_model_or_loss_ever_sees_it(name: str, what: str) -> None:
    """Not even a model that would make a number of it, or fail."""
    model, (features, label) = MODELS[name](), BROKEN[what]
    others = np.random.default_rng(4).normal(size=(6, 4))
    known = np.arange(6) % 2 * 1.0
    with_it = rows_of(np.insert(others, 2, features, axis=0), np.insert(known, 2, label))

    seen: list[bool] = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(bool(torch.isfinite(outputs).all() and torch.isfinite(labels).all()))
        return default_loss(outputs, labels)

    for run in (summed, moved):
        found, without = run(model, with_it, 0.5, loss), run(model, rows_of(others, known), 0.5)
        np.testing.assert_allclose(found, without, rtol=1e-6, atol=1e-7)
    alone = rows_of([features], [label])
    assert not summed(model, alone, 0.5, loss).any()
    assert seen
    assert all(seen)


def test_a_row_that_is_not_finite_stays_in_the_count_and_moves_no_other_in_or_out_of_a_batch() -> None:
    """As one whose label is no class, which counts as zero too: the same rows are drawn, the same noise is added."""
    features = np.random.default_rng(5).normal(size=(30, 4))
    labels = np.arange(30) % 2
    labels[3] = 7
    broken = features.copy()
    broken[3, 1] = np.nan
    found = []
    for rows in (rows_of(features, labels), rows_of(broken, labels)):
        model = seeded(torch.nn.Linear(4, 2))
        config = LocalTraining(5, 0.5, 0.5, 1.0, 1.0, declared_rows=30)
        entropy = DeterministicEntropy(b"tests/learning", purpose="broken")
        train_dpsgd(model, rows, loss=default_loss, config=config, entropy=entropy)
        found.append(torch.cat([each.detach().reshape(-1) for each in model.parameters()]))
    assert torch.equal(*found)


def steep() -> torch.nn.Module:
    """The model that finds out whether a row has a first feature of 2: in float32 a square overflows there."""
    first, last = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first.weight[0, 0] = 1e19
        last.weight[0, 0] = 1.0
    return model


def worse_than(limit: float) -> Any:
    """A loss that is not finite for outputs beyond a limit."""
    return lambda outputs, labels: (
        default_loss(outputs, labels) * torch.where(outputs[:, 0] > limit, torch.inf, torch.ones(()))
    )


def fails_beyond(limit: float) -> Any:
    """A loss that fails, for all rows at once, if one is beyond a limit."""

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (labels > limit).any():
            raise IndexError(f"no class {labels.max()}")
        return default_loss(outputs, labels)

    return loss


def three_classes() -> torch.nn.Module:
    return seeded(torch.nn.Linear(4, 3))


def three_classes_normalised() -> torch.nn.Module:
    return seeded(torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))


ODD: dict[str, tuple[Build, list[float], float, Any]] = {
    "a loss that is not finite": (linear, [50, 50, 50, 50], 0, worse_than(-1e300)),
    "a label that is no class": (three_classes, [1, 1, 1, 1], 7, default_loss),
    "a negative label": (three_classes_normalised, [1, 1, 1, 1], -1, default_loss),
    "a loss that fails": (linear, [1, 1, 1, 1], 7, fails_beyond(5)),
    "a loss that fails, normalised": (normalised, [1, 1, 1, 1], 7, fails_beyond(5)),
}


@pytest.mark.parametrize("what", ODD)
def test_an_example_of_which_nothing_can_be_computed_counts_as_zero(what: str) -> None:
    build, row, label, loss = ODD[what]
    features = np.random.default_rng(2).normal(size=(5, 4))
    others = rows_of(features, np.zeros(5, np.int64))
    everybody = rows_of([*features, row], np.array([0] * 5 + [label], np.int64))
    alone = rows_of([row], np.array([label], np.int64))
    if what != "a loss that is not finite":
        expected = summed(build(), others, loss=loss)
        assert np.linalg.norm(expected) > 0.1
        np.testing.assert_allclose(summed(build(), everybody, loss=loss), expected, rtol=1e-9)
        np.testing.assert_allclose(moved(build(), everybody, loss=loss), moved(build(), others, loss=loss), atol=1e-5)
    assert not summed(build(), alone, loss=loss).any()
    assert not moved(build(), alone, loss=loss).any()


@pytest.mark.parametrize("build", [linear, normalised])
def test_the_owner_may_ask_which_rows_count_and_only_chunks_that_fail_are_tried_row_by_row(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_example, "_CHUNK_ROWS", 4)
    features, labels = np.ones((10, 4)), np.zeros(10, np.int64)
    features[0, 1], labels[5], labels[9] = np.inf, 7, 8
    seen: list[int] = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(labels))
        return torch.as_tensor(fails_beyond(5)(outputs, labels))

    model = build()
    before = copy.deepcopy(model.state_dict())
    counted = rows_that_count(model, rows_of(features, labels), loss=loss)
    assert np.flatnonzero(~counted).tolist() == [0, 5, 9]
    assert seen[1:] == [4, 4, 1, 1, 1, 1, 2, 1, 1]  # after the blank rows
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert rows_that_count(model, rows_of(features[:0].reshape(0, 4), labels[:0]), loss=loss).shape == (0,)


def test_no_finite_model_tells_of_a_row_by_what_becomes_of_the_training() -> None:
    """Whether one ordinary row has a feature of 2 was to be read off from a failure."""
    features = np.clip(np.random.default_rng(0).normal(size=(500, 4)), -1.5, 1.5)
    config = LocalTraining(1, 1.0, 0.5, 1.0, 5.0, declared_rows=500)
    labels = (features[:, 0] > 0).astype(np.int64)
    labels[7] = 1  # of which the model is certain: an infinite norm of the input, times nothing
    for first in (1.0, 2.0):
        features[7] = [first, 0, 0, 0]
        model = steep()
        train_dpsgd(model, rows_of(features, labels), loss=default_loss, config=config, entropy=SystemEntropy())
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_batch_of_nothing_but_such_rows_is_a_step_of_noise_like_an_empty_one() -> None:
    config = LocalTraining(3, 1.0, 0.5, 1.0, 2.0, declared_rows=8)
    found = []
    for dataset in (rows_of(np.ones((8, 4)), np.full(8, 7)), rows_of(np.ones((0, 4)), np.zeros(0, np.int64))):
        model = three_classes()
        source = DeterministicEntropy(b"x", purpose="same")
        train_dpsgd(model, dataset, loss=default_loss, config=config, entropy=source)
        found.append(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------- what is refused on blank rows


class Reshaped(Pooled):
    """One row for each half of an example: to a layer, two examples."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(rows.reshape(-1, 2)).reshape(-1, 2).sum(1))


class Beside(torch.nn.Module):
    """Uses a layer's weight outside of it: Opacus has no gradient of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(4, 1), torch.nn.LayerNorm(4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.norm(rows), self.layer.weight)


def frozen_batch_norm() -> torch.nn.Module:
    norm = torch.nn.BatchNorm1d(3)
    norm.requires_grad_(False)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), norm, torch.nn.Linear(3, 1))


REFUSED: dict[str, tuple[Build, Any]] = {
    "halves of examples": (Reshaped, default_loss),
    "a weight outside of its layer": (Beside, default_loss),
    "batch normalisation without parameters": (
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, affine=False)),
        default_loss,
    ),
    "frozen batch normalisation": (frozen_batch_norm, default_loss),
    "dropout between linear layers": (
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.1), torch.nn.Linear(3, 1)),
        default_loss,
    ),
    "dropout behind another layer": (
        lambda: torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 1)),
        default_loss,
    ),
    "a loss that draws": (linear, lambda outputs, labels: default_loss(outputs, labels) * torch.rand(len(labels))),
    "a loss that fails always": (linear, lambda outputs, labels: outputs @ labels),
    "a mean": (linear, lambda outputs, labels: default_loss(outputs, labels).mean()),
    "rows of another width": (lambda: seeded(torch.nn.Linear(5, 1)), default_loss),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_never_be_computed_is_refused_without_a_row(what: str) -> None:
    build, loss = REFUSED[what]
    none = rows_of(np.zeros((0, 4)), np.zeros(0, np.int64))
    with pytest.raises(InvalidInput):
        moved(build(), none, loss=loss)
    with pytest.raises(InvalidInput):
        summed(build(), none, loss=loss)


@pytest.mark.parametrize("bound", [0.0, -1.0, MIN_NORM / 2, float("inf"), float("nan")])
def test_refuses_a_bound_that_rounding_could_exceed(bound: float) -> None:
    model = linear().double()
    with pytest.raises(InvalidInput, match="at least 1e-06"):
        ClippedSums(
            model, rows_of([[1.0] * 4]), loss=default_loss, parameters=list(model.parameters()), max_grad_norm=bound
        )


def test_the_sampler_is_opacus_s_with_our_entropy_and_takes_no_rows_for_an_empty_sample() -> None:
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    state = torch.get_rng_state()
    source = DeterministicEntropy(b"x", purpose="sampler")
    sampler = SecurePoissonSampler(num_samples=1000, sample_rate=0.1, steps=50, entropy=source)
    batches = list(sampler)
    assert isinstance(sampler, UniformWithReplacementSampler)
    assert len(sampler) == len(batches) == 50
    assert 80 < np.mean([len(batch) for batch in batches]) < 120
    assert len({batch.tobytes() for batch in batches}) == 50
    assert torch.equal(state, torch.get_rng_state())
    empty = SecurePoissonSampler(num_samples=0, sample_rate=0.1, steps=3, entropy=source)
    assert [len(batch) for batch in empty] == [0, 0, 0]
