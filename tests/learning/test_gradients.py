"""The clipped sum that a party contributes to a step of fedsgd: bounded by every example, whatever the others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src.errors import ConfigError, InvalidInput
from src.learning.gradients import clipped_gradient_sum
from src.learning.per_example import CLIPPING_MARGIN
from src.learning.simulate import SumSettings, simulate_fedsgd
from src.learning.task import Dataset, default_loss, find_task
from src.privacy.entropy import DeterministicEntropy
from tests.learning.notes import note, noted

MakeData = Callable[..., Dataset]


def make_model(seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def slow(model: torch.nn.Module, data: Dataset, rows: NDArray[np.int64], norm: float) -> NDArray[np.float64]:
    """One example at a time, in float64, parameters in the order of their names."""
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    twin.double()
    parameters = [parameter for _, parameter in sorted(twin.named_parameters())]
    total = np.zeros(sum(parameter.numel() for parameter in parameters))
    for row in rows:
        value = default_loss(
            twin(torch.from_numpy(data.features[[row]].astype(np.float64))), torch.from_numpy(data.labels[[row]])
        )
        gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(value.sum(), parameters)]).numpy()
        total += gradient * min(1.0, norm * CLIPPING_MARGIN / np.linalg.norm(gradient))
    return total


@pytest.mark.parametrize("norm", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize("count", [0, 1, 5, 128, 129, 300])
def test_it_is_the_sum_of_clipped_gradients_in_the_order_of_names(data: MakeData, norm: float, count: int) -> None:
    rows, model = data(400), make_model()
    chosen = np.arange(0, count, dtype=np.int64)
    found = clipped_gradient_sum(model, rows, chosen, loss=default_loss, max_grad_norm=norm, padded_to=200)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, slow(model, rows, chosen, norm), rtol=1e-9, atol=1e-12)


def test_one_row_more_changes_the_sum_by_the_bound_at_most_and_the_others_by_nothing(data: MakeData) -> None:
    rows, model = data(700), make_model()
    everybody = np.arange(700, dtype=np.int64)
    whole = clipped_gradient_sum(model, rows, everybody, loss=default_loss, max_grad_norm=0.1)
    for missing in (0, 127, 128, 699):
        without = clipped_gradient_sum(
            model, rows, np.delete(everybody, missing), loss=default_loss, max_grad_norm=0.1, padded_to=500
        )
        own = clipped_gradient_sum(model, rows, everybody[[missing]], loss=default_loss, max_grad_norm=0.1)
        assert np.linalg.norm(own) <= 0.1 * CLIPPING_MARGIN * (1 + 1e-12)
        assert np.linalg.norm(whole - without) <= 0.1
        np.testing.assert_allclose(whole - without, own, rtol=0, atol=0.1 * 2.0**-36)


def test_blank_rows_make_up_the_numbers_and_count_for_nothing(data: MakeData) -> None:
    rows, model = data(50), make_model()
    for chosen in (np.zeros(0, np.int64), np.array([3, 7])):
        bare = clipped_gradient_sum(model, rows, chosen, loss=default_loss, max_grad_norm=1.0)
        padded = clipped_gradient_sum(model, rows, chosen, loss=default_loss, max_grad_norm=1.0, padded_to=1000)
        assert np.array_equal(bare, padded)


@pytest.mark.parametrize("padded_to", [1, 64, 129])
def test_as_much_is_computed_for_an_empty_batch_as_for_a_full_one(data: MakeData, padded_to: int) -> None:
    """And for a party with no row at all."""

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        note(tuple(outputs.shape))
        return default_loss(outputs, labels)

    found = []
    for rows, count in ((data(200), 0), (data(200), 1), (data(200), padded_to), (data(0), 0)):
        noted()
        clipped_gradient_sum(make_model(), rows, np.arange(count), loss=loss, max_grad_norm=1.0, padded_to=padded_to)
        found.append(noted())
    assert found[0][-padded_to:] == [(1, 1)] * padded_to
    assert found == [found[0]] * 4


class Watched(np.ndarray[Any, Any]):
    """Features that note how many rows are read at a time."""

    read: ClassVar[list[int]] = []

    def __getitem__(self, key: Any) -> Any:
        self.read.append(len(key))
        return np.asarray(super().__getitem__(key))


def test_as_many_rows_are_read_for_an_empty_batch_as_for_a_full_one(data: MakeData) -> None:
    """Of wide rows reading takes longer than computing."""
    rows = data(200)
    watched = Dataset(rows.features.view(Watched), rows.labels, "watched")
    for count in (0, 1, 129, 200):
        Watched.read.clear()
        clipped_gradient_sum(
            make_model(), watched, np.arange(count), loss=default_loss, max_grad_norm=1.0, padded_to=200
        )
        assert Watched.read == [128, 72]


def test_a_row_whose_gradient_is_not_finite_counts_as_zero_and_harms_no_other(data: MakeData) -> None:
    """Else one row could turn the sum into NaN, which no noise hides, or make the party refuse, which tells of it."""
    rows = data(20)
    rows.labels[4] = 7

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return default_loss(outputs, labels) * torch.where(labels == 7, torch.inf, 1.0)

    everybody = np.arange(20, dtype=np.int64)
    found = clipped_gradient_sum(make_model(), rows, everybody, loss=loss, max_grad_norm=1.0)
    np.testing.assert_allclose(found, slow(make_model(), rows, np.delete(everybody, 4), 1.0), rtol=1e-9)


def test_the_model_is_left_as_it_was(data: MakeData) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clipped_gradient_sum(model, data(9), np.arange(9), loss=default_loss, max_grad_norm=1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_only_trainable_parameters_count_and_one_without_a_part_gets_zero(data: MakeData) -> None:
    class Partly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.frozen = (torch.nn.Linear(4, 1) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.used(inputs) + self.frozen(inputs))

    found = clipped_gradient_sum(Partly(), data(30), np.arange(30), loss=default_loss, max_grad_norm=1.0)
    assert found.shape == (10,)  # idle.bias, idle.weight, used.bias, used.weight
    assert not found[:5].any()
    assert found[5:].all()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("batch normalisation", {"model": torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))}, "mixes"),
    ("a mean", {"loss": lambda outputs, labels: default_loss(outputs, labels).mean()}, "one value for each example"),
    ("no norm", {"max_grad_norm": 0.0}, "clipping norm"),
    ("an infinite norm", {"max_grad_norm": float("inf")}, "clipping norm"),
]


@pytest.mark.parametrize(("what", "change", "match"), REFUSED, ids=[what for what, _, _ in REFUSED])
def test_what_cannot_be_clipped_is_refused(data: MakeData, what: str, change: dict[str, Any], match: str) -> None:
    settings = {"model": make_model(), "loss": default_loss, "max_grad_norm": 1.0, **change}
    model = settings.pop("model")
    with pytest.raises(InvalidInput, match=match):
        clipped_gradient_sum(model, data(5), np.arange(5), **settings)


# --------------------------------------------------------------------------------------------------------- simulation


def sum_settings(**changes: Any) -> SumSettings:
    settings: dict[str, Any] = {
        "rounds": 3,
        "sampling_rate": 0.05,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "learning_rate": 1.0,
        "declared_rows": {"a": 5400, "b": 5400, "c": 5400},
    }
    return SumSettings(**{**settings, **changes})


def test_the_simulation_says_how_good_the_model_is_after_each_round() -> None:
    task = find_task("randhie")
    options = {"parties": 3, "seed": 0}
    parties = {name: task.load_data({**options, "party": index}) for index, name in enumerate("abc")}
    holdout = task.load_holdout(options)  # type: ignore[attr-defined]  # this task has one
    seen: list[int] = []
    found = [
        simulate_fedsgd(
            task,
            parties,
            holdout=holdout,
            settings=sum_settings(),
            seed=1,
            entropy=DeterministicEntropy(b"x", purpose="simulation"),
            on_round=lambda number, _: seen.append(number),
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert [set(metrics) for metrics in found[0]] == [{"auc", "accuracy", "n"}] * 3
    assert seen == [1, 2, 3] * 2
    with pytest.raises(ConfigError, match="declares its rows"):
        simulate_fedsgd(
            task,
            {"a": parties["a"], "b": parties["b"]},
            holdout=holdout,
            settings=sum_settings(),
            seed=1,
            entropy=DeterministicEntropy(b"x", purpose="simulation"),
        )


def test_settings_out_of_range_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        sum_settings(
            rounds=0,
            sampling_rate=0.0,
            max_grad_norm=-1.0,
            noise_multiplier=float("nan"),
            learning_rate=0.0,
            declared_rows={"a": 1},
        )
    assert len(caught.value.problems) == 6
