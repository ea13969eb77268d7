"""What one example adds to a sum of clipped gradients is bounded, whatever it, the model and the loss are."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.learning import made_up, per_example
from src.learning.dpsgd import train_dpsgd
from src.learning.gradients import clipped_gradient_sum
from src.learning.per_example import ClippedSums, computed_as_chain, rows_that_count
from src.learning.settings import LocalTraining
from src.learning.subnormals import flushed_subnormals
from src.learning.task import Dataset, default_loss
from src.privacy.clipping import MIN_NORM
from src.privacy.entropy import DeterministicEntropy, SystemEntropy
from tests.learning.notes import note, noted

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


def the_way_of_public_rows(rows: torch.Tensor) -> bool:
    return bool(rows.abs().max() < 50)


class Otherwise(torch.nn.Module):
    """Calls its layers in another way for rows that no public one is like."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        middle = torch.tanh(self.middle(torch.tanh(self.first(rows))))
        return torch.as_tensor(self.last(middle if the_way_of_public_rows(rows) else self.other(rows, middle)))

    def other(self, rows: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.middle(middle))


MODELS: dict[str, Build] = {
    "linear": linear,
    "without bias": no_bias,
    "normalised": normalised,
    "three axes": Pooled,
    "four axes": FourAxes,
    "called twice": Twice,
    "called otherwise for some rows": lambda: seeded(Otherwise()),
}
CHAINS = {"linear", "without bias", "called otherwise for some rows"}


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


def chained(model: torch.nn.Module) -> bool:
    return computed_as_chain(model, rows_of(np.zeros((0, 4))), loss=default_loss)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_left_unwritten_only_where_every_linear_layer_sees_one_row_once(name: str) -> None:
    model = MODELS[name]()
    assert chained(model) == (name in CHAINS)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def changed_forward() -> torch.nn.Module:
    model = linear()
    first = next(model.children())
    first.forward = MethodType(lambda self, rows: 2 * torch.nn.functional.linear(rows, self.weight, self.bias), first)
    return model


def hooked() -> torch.nn.Module:
    model = linear()
    next(model.children()).register_forward_hook(lambda layer, given, output: 2 * output)
    return model


class Beside(torch.nn.Module):
    """Uses a layer's weight outside of it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(torch.nn.functional.linear(torch.tanh(self.layer(rows)), self.layer.weight)))


def weight_normed() -> torch.nn.Module:
    first = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    return torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(3, 1))


def tied() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


ODDLY_MADE: dict[str, Build] = {
    "a layer with another forward": changed_forward,
    "a layer with a hook": hooked,
    "a weight used outside of its layer": Beside,
    "weight normalisation": weight_normed,
    "two layers of one weight": tied,
}


@pytest.mark.parametrize("name", ODDLY_MADE)
def test_whatever_is_done_to_linear_layers_the_gradient_is_torchs(name: str) -> None:
    """Norms and sums that follow from inputs and outputs would be others."""
    model, dataset = ODDLY_MADE[name](), rows_of(np.random.default_rng(8).normal(size=(5, 4)), np.arange(5) % 2)
    assert not chained(model)
    twin = copy.deepcopy(model).double()
    parameters = [parameter for _, parameter in sorted(twin.named_parameters())]
    losses = default_loss(twin(torch.from_numpy(dataset.features).double()), torch.from_numpy(dataset.labels))
    expected = torch.cat([each.reshape(-1) for each in torch.autograd.grad(losses.sum(), parameters)])
    np.testing.assert_allclose(summed(model, dataset, 1e6), expected.numpy(), rtol=1e-5)


class OnPairs(Otherwise):
    def other(self, rows: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.middle(torch.stack([middle[0], rows[0] / 100]))).mean(0, keepdim=True)


class Caught(Otherwise):
    def other(self, rows: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        try:
            return torch.as_tensor(self.middle(middle))
        except Exception:
            return middle


class Shorter(Otherwise):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if the_way_of_public_rows(rows):
            return super().forward(rows)
        return torch.as_tensor(self.last(torch.tanh(self.first(rows))))


@pytest.mark.parametrize("kind", [Otherwise, OnPairs, Caught, Shorter])
def test_a_row_for_which_layers_are_called_otherwise_counts_with_torchs_gradient(kind: type[torch.nn.Module]) -> None:
    features = np.random.default_rng(4).normal(size=(6, 4))
    features[[1, 4], 0] = 70
    dataset, model = rows_of(features, np.arange(6) % 2), kind()
    assert chained(model)
    assert rows_that_count(model, dataset, loss=default_loss).all()
    twin = copy.deepcopy(model).double()
    parameters = [parameter for _, parameter in sorted(twin.named_parameters())]
    expected = np.zeros(sum(parameter.numel() for parameter in parameters))
    for row, label in zip(torch.from_numpy(dataset.features).double(), torch.from_numpy(dataset.labels), strict=True):
        loss = default_loss(twin(row[None]), label[None]).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([each.reshape(-1) for each in found]).numpy()
        expected += gradient * min(1.0, 0.3 / np.linalg.norm(gradient))
    np.testing.assert_allclose(summed(model, dataset, 0.3), expected, rtol=1e-5, atol=1e-9)
    assert np.array_equal(summed(model, dataset, 0.3), summed(model, dataset, 0.3))


@pytest.mark.parametrize("name", sorted(CHAINS))
@pytest.mark.parametrize("bound", [MIN_NORM, 0.3, 1e6])
def test_both_ways_give_the_same_sum(name: str, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = rows_of(np.random.default_rng(1).normal(size=(40, 4)), np.arange(40) % 2)
    chain = summed(MODELS[name](), dataset, bound)
    monkeypatch.setattr(per_example, "_is_chain", lambda *_: False)
    np.testing.assert_allclose(chain, summed(MODELS[name](), dataset, bound), rtol=1e-9, atol=1e-12 * bound)


# ------------------------------------------------------------------------------------------------ rows by themselves


def cancelling(build: Build, row: NDArray[np.float32], seed: int) -> torch.nn.Module:
    """The model with weights of which a search made one layer's terms cancel on this row."""
    source = DeterministicEntropy(b"tests/learning", purpose=f"cancelling {seed}")
    return made_up._made_up(build(), row, source, cancelling=True)


Bits = tuple[float, float, tuple[bytes, ...]]


def bits_of_each_row(
    model: torch.nn.Module, dataset: Dataset, chosen: list[int], padded_to: int, patch: pytest.MonkeyPatch
) -> tuple[list[Bits], Vector]:
    """Norm, loss, and the bytes of what each row adds to a sum, its factor applied; and the sum."""
    seen: list[Bits] = []
    working = copy.deepcopy(model).double().train()
    parameters = [parameter for parameter in working.parameters() if parameter.requires_grad]
    sums = ClippedSums(working, dataset, loss=fails_beyond(5), parameters=parameters, max_grad_norm=0.7)
    real = sums._source.add

    def add(row: Any, factor: float) -> None:
        seen.append((row.norm, row.loss, tuple((part * factor).numpy().tobytes() for part in row.parts)))
        real(row, factor)

    patch.setattr(sums._source, "add", add)
    return seen, sums.over(dataset, np.array(chosen, np.int64), padded_to=padded_to).numpy()


@pytest.mark.parametrize("name", ["linear", "normalised", "called twice"])
@settings(deadline=None, max_examples=12)
@given(
    company=st.lists(st.sampled_from(["x", "other", "nan", "fails", "neutral"]), max_size=9),
    place=st.integers(0, 9),
    chunk=st.sampled_from([1, 2, 3, 4, 128]),
    padded_to=st.sampled_from([0, 7, 16]),
    seed=st.integers(0, 5),
)
def test_a_rows_gradient_has_the_same_bits_alone_and_beside_any_rows_wherever_it_stands(
    name: str, company: list[str], place: int, chunk: int, padded_to: int, seed: int
) -> None:
    """For weights that a search made up, with which the last bit of a sum is the sign of a gradient."""
    generator = np.random.default_rng(seed)
    x, other, neutral = generator.normal(size=(3, 4)).astype(np.float32)
    known = {"x": x, "other": other, "neutral": 3 * neutral, "nan": x * np.nan, "fails": other}
    model = cancelling(MODELS[name], x, seed)
    place = min(place, len(company))
    names = [*company[:place], "x", *company[place:]]
    labels = np.array([7 if each == "fails" else 1 for each in names])
    dataset = rows_of([known[each] for each in names], labels)
    with pytest.MonkeyPatch.context() as patch:
        alone, _ = bits_of_each_row(model, dataset, [place], 0, patch)
        patch.setattr(per_example, "_CHUNK_ROWS", chunk)
        beside, total = bits_of_each_row(model, dataset, list(range(len(names))), padded_to, patch)
    assert len(alone) == 1
    assert len(beside) == max(len(names), padded_to)
    assert {beside[at] for at, each in enumerate(names) if each == "x"} == set(alone)
    for at, each in enumerate(names):
        if each in ("nan", "fails"):
            assert not any(np.frombuffer(part).any() for part in beside[at][2])
    assert np.linalg.norm(total) <= 0.7 * len(names)


@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 40), chunk=st.sampled_from([1, 3, 128]), seed=st.integers(0, 3))
def test_a_sum_is_that_of_its_rows_alone_but_for_one_rounding(count: int, chunk: int, seed: int) -> None:
    """So what one row more changes is that row's clipped gradient, within what the margin is for."""
    generator = np.random.default_rng(seed)
    model, dataset = (
        linear(),
        rows_of(generator.normal(size=(count, 4)) * 10.0 ** generator.integers(-6, 6, (count, 1))),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_example, "_CHUNK_ROWS", chunk)
        together = summed(model, dataset)
    alone = [summed(model, Dataset(dataset.features[[row]], dataset.labels[[row]], "x")) for row in range(count)]
    exact = np.array([math.fsum(values) for values in zip(*alone, strict=True)])
    assert np.linalg.norm(together - exact) <= count * chunk * 2.0**-51


@pytest.mark.parametrize("build", [linear, normalised])
def test_every_row_takes_one_pass_and_one_that_fails_another(build: Build) -> None:
    """A chunk with a failing row used to be computed row by row, which took nine times as long, and told of it."""
    good = rows_of(np.random.default_rng(3).normal(size=(300, 4)))
    passes = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        note(len(labels))
        return torch.as_tensor(fails_beyond(5)(outputs, labels))

    for label in (0, 7):
        labels = np.zeros(300, np.int64)
        labels[5] = label
        noted()
        dataset = rows_of(good.features, labels)
        clipped_gradient_sum(build(), dataset, np.arange(300), loss=loss, max_grad_norm=1.0, padded_to=320)
        seen = noted()
        assert set(seen[-320:]) == {1}
        passes.append(len(seen))
    assert passes[1] == passes[0] + 1


class Watched(torch.autograd.Function):
    """Notes, going forward and backward, whether this thread knows subnormal numbers."""

    seen: ClassVar[list[float]] = []

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        Watched.seen.append(sys.float_info.min / 4.0)
        Watched.seen.append((torch.full((9,), sys.float_info.min, dtype=torch.float64) / 4.0).sum().item())
        return values * 1.0

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        Watched.seen.append(sys.float_info.min / 4.0)
        Watched.seen.append((torch.full((9,), sys.float_info.min, dtype=torch.float64) / 4.0).sum().item())
        return gradients[0] * 1.0


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="a processor that cannot flush subnormal numbers")
@pytest.mark.parametrize("build", [linear, normalised])
def test_subnormal_numbers_are_zero_on_both_ways_and_afterwards_what_they_were(build: Build) -> None:
    """With them a row that met some took many times as long as any other."""

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return default_loss(Watched.apply(outputs), labels)  # type: ignore[no-untyped-call]

    model, dataset = build(), rows_of(np.ones((3, 4)))
    Watched.seen.clear()
    for run in (summed, moved):
        run(model, dataset, loss=loss)
        assert Watched.seen[-12:] == [0.0] * 12
        assert sys.float_info.min / 4.0 > 0.0
    with flushed_subnormals():
        summed(model, dataset, loss=loss)
        assert sys.float_info.min / 4.0 == 0.0
    assert sys.float_info.min / 4.0 > 0.0


def test_what_a_row_leaves_in_a_buffer_is_gone_for_the_next() -> None:
    """Even where the trial on public rows saw nothing of it."""

    class Remembers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.largest: torch.Tensor
            self.register_buffer("largest", torch.full((1,), 50.0))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            if rows.abs().max() > self.largest:
                self.largest.fill_(float(rows.abs().max()))
            return torch.as_tensor(self.layer(rows) * self.largest / 50.0)

    torch.manual_seed(0)
    model = Remembers()
    features = np.random.default_rng(1).normal(size=(4, 4))
    wild = rows_of([features[0], 1e3 * features[1], *features[2:]])
    everybody, without = summed(model, wild), summed(model, rows_of([wild.features[0], *wild.features[2:]]))
    own = summed(model, rows_of([wild.features[1]]))
    np.testing.assert_allclose(everybody - without, own, atol=1e-9)


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

    noted()

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        note(bool(torch.isfinite(outputs).all() and torch.isfinite(labels).all()))
        return default_loss(outputs, labels)

    for run in (summed, moved):
        found, without = run(model, with_it, 0.5, loss), run(model, rows_of(others, known), 0.5)
        np.testing.assert_allclose(found, without, rtol=1e-6, atol=1e-7)
    alone = rows_of([features], [label])
    assert not summed(model, alone, 0.5, loss).any()
    seen = noted()
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


def infinite_beyond(limit: float) -> Any:
    """A loss that is not finite for labels beyond a limit."""
    return lambda outputs, labels: (
        default_loss(outputs, labels) * torch.where(labels > limit, torch.inf, torch.ones(()))
    )


def fails_beyond(limit: float, error: type[BaseException] = IndexError) -> Any:
    """A loss that fails, for all rows at once, if one is beyond a limit."""

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (labels > limit).any():
            raise error(f"no class {labels.max()}")
        return default_loss(outputs, labels)

    return loss


def three_classes() -> torch.nn.Module:
    return seeded(torch.nn.Linear(4, 3))


def three_classes_normalised() -> torch.nn.Module:
    return seeded(torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))


ODD: dict[str, tuple[Build, list[float], float, Any]] = {
    "a loss that is not finite": (linear, [1, 1, 1, 1], 7, infinite_beyond(5)),
    "a label that is no class": (three_classes, [1, 1, 1, 1], 7, default_loss),
    "a negative label": (three_classes_normalised, [1, 1, 1, 1], -1, default_loss),
    "a loss that fails": (linear, [1, 1, 1, 1], 7, fails_beyond(5)),
    "a loss that ends the process": (linear, [1, 1, 1, 1], 7, fails_beyond(5, SystemExit)),
    "a loss that fails, normalised": (normalised, [1, 1, 1, 1], 7, fails_beyond(5)),
}


@pytest.mark.parametrize("what", ODD)
def test_an_example_of_which_nothing_can_be_computed_counts_as_zero(what: str) -> None:
    build, row, label, loss = ODD[what]
    features = np.random.default_rng(2).normal(size=(5, 4))
    others = rows_of(features, np.zeros(5, np.int64))
    everybody = rows_of([*features, row], np.array([0] * 5 + [label], np.int64))
    alone = rows_of([row], np.array([label], np.int64))
    expected = summed(build(), others, loss=loss)
    assert np.linalg.norm(expected) > 0.1
    assert np.array_equal(summed(build(), everybody, loss=loss), expected)
    assert np.array_equal(moved(build(), everybody, loss=loss), moved(build(), others, loss=loss))
    assert not summed(build(), alone, loss=loss).any()
    assert not moved(build(), alone, loss=loss).any()


@pytest.mark.parametrize("build", [linear, normalised])
def test_the_owner_may_ask_which_rows_count(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_example, "_CHUNK_ROWS", 4)
    features, labels = np.ones((10, 4)), np.zeros(10, np.int64)
    features[0, 1], labels[5], labels[9] = np.inf, 7, 8
    model = build()
    before = copy.deepcopy(model.state_dict())
    counted = rows_that_count(model, rows_of(features, labels), loss=fails_beyond(5))
    assert np.flatnonzero(~counted).tolist() == [0, 5, 9]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert rows_that_count(model, rows_of(features[:0].reshape(0, 4), labels[:0]), loss=default_loss).shape == (0,)


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


@pytest.mark.parametrize("bound", [0.0, -1.0, MIN_NORM / 2, float("inf"), float("nan")])
def test_refuses_a_bound_that_rounding_could_exceed(bound: float) -> None:
    model = linear().double()
    with pytest.raises(InvalidInput, match="at least 1e-06"):
        ClippedSums(
            model, rows_of([[1.0] * 4]), loss=default_loss, parameters=list(model.parameters()), max_grad_norm=bound
        )
