"""Nothing of one row is there when the next one is computed: a model or a loss that keeps something is refused, by the
name of what it keeps; and what is not found there changes no parameter, and no sum by what another row left."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from src.errors import InvalidInput
from src.learning import per_example
from src.learning.dpsgd import train_dpsgd
from src.learning.kept import changed, state_of
from src.learning.per_example import ClippedSums
from src.learning.settings import LocalTraining
from src.learning.task import Dataset, Loss, default_loss
from src.learning.trial import PublicRow
from src.privacy.entropy import SystemEntropy

ROWS = 200
SEEN: list[float] = []
PLACE: list[float] = []


class Words(torch.nn.Module):
    """A bag of words."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.words, self.last = layer, torch.nn.Linear(3, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.last(self.words(features.long().clamp(0, 9)).reshape(len(features), 3))
        return outputs


class Renormalised(torch.nn.Module):
    """The same as `Embedding(max_norm=…)`, but no layer says so; of weights of norm 50."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(10, 3)
        self.weight = torch.nn.Parameter(50 * weight / weight.norm(dim=1, keepdim=True))
        self.last = torch.nn.Linear(3, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        words = torch.nn.functional.embedding(features.long().clamp(0, 9), self.weight, max_norm=40.0)
        outputs: torch.Tensor = self.last(words.reshape(len(features), 3))
        return outputs


class WorkSpace(torch.nn.Module):
    """Computes each row in the same place."""

    def __init__(self) -> None:
        super().__init__()
        self.space = torch.zeros(5, 3, dtype=torch.float64)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        here = torch.sub(features, 0.5, out=self.space[: len(features)])
        outputs: torch.Tensor = self.layer(here)
        return outputs


class Prototypes:
    """The first row of each class is what the others are compared with."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._of(*pair) for pair in zip(outputs, labels, strict=True)])

    def _of(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        first = self.seen.setdefault(int(label), output.detach() + 1)
        return (output - first).square().sum()


class Caching:
    """The same, for all of its kind."""

    cache: ClassVar[dict[int, float]] = {}

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for output, label in zip(outputs.detach(), labels, strict=True):
            self.cache.setdefault(int(label), float(output))
        return default_loss(outputs, labels)


class Counting:
    """Does something else from the thousandth call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        losses = default_loss(outputs, labels)
        return losses if self.calls < 1000 else -losses


def appending(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    SEEN.append(float(outputs.detach().sum()))
    return default_loss(outputs, labels)


def closing_over() -> Loss:
    before = [torch.zeros(())]

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        before[0] = outputs.detach().sum()
        return default_loss(outputs, labels)

    return loss


def counting_itself(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    counting_itself.calls = getattr(counting_itself, "calls", 0) + 1  # type: ignore[attr-defined]
    return default_loss(outputs, labels)


def with_a_default(outputs: torch.Tensor, labels: torch.Tensor, *, seen: set[float] = {0.0}) -> torch.Tensor:  # noqa: B006
    seen.pop()
    seen.add(float(outputs.detach().sum()))
    return default_loss(outputs, labels)


class Naming(torch.nn.Module):
    """Its forward pass writes into its module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        PLACE.append(float(features.sum()))
        outputs: torch.Tensor = self.layer(features)
        return outputs


def hooked() -> torch.nn.Module:
    """A hook on a layer counts what goes through it."""
    layer, passes = torch.nn.Linear(3, 1), itertools.count()
    layer.register_forward_hook(lambda *_: (next(passes), None)[1])
    return layer


class Complex(torch.nn.Module):
    """Holds tensors of every kind, and changes none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.held = [torch.ones(2, dtype=torch.complex64).conj(), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)]
        self.held += [torch.eye(2).to_sparse(), torch.tensor(1.0)]
        self.log, self.lock = logging.getLogger("test"), threading.Lock()
        self.array = np.zeros((2, 0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(features)
        return outputs


def drawing(generator: np.random.Generator, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    generator.normal()
    return default_loss(outputs, labels)


class Once(torch.nn.Module):
    """Makes a constant when it is first called, and leaves it: nobody's row is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.scale: torch.Tensor | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = torch.arange(1, features.shape[1] + 1, dtype=features.dtype)
        outputs: torch.Tensor = self.layer(features * self.scale)
        return outputs


def linear() -> torch.nn.Module:
    return torch.nn.Linear(3, 1)


def rows(features: np.ndarray[Any, Any]) -> Dataset:
    return Dataset(features.astype(np.float32), np.arange(len(features)) % 2, "made-up rows")


def sums(model: torch.nn.Module, loss: Loss = default_loss, width: int = 3) -> ClippedSums:
    return ClippedSums(
        model.double().train(),
        rows(np.zeros((1, width))),
        loss=loss,
        parameters=list(model.parameters()),
        max_grad_norm=1.0,
    )


KEEPING: list[tuple[str, Callable[[], torch.nn.Module], Callable[[], Loss], str]] = [
    ("a prototype of each class", linear, lambda: Prototypes().loss, r"loss\.seen"),
    ("a cache of its class", linear, Caching, r"loss\.cache"),
    ("a count of calls", linear, Counting, r"loss\.calls"),
    ("a list of its module", linear, lambda: appending, r"loss\.SEEN"),
    ("an attribute of the function", linear, lambda: counting_itself, r"loss\.calls"),
    ("a default that is a set", linear, lambda: with_a_default, r"loss\.seen"),
    ("what its forward pass names", Naming, lambda: default_loss, r"model\.PLACE"),
    ("a hook", hooked, lambda: default_loss, r"model\._forward_hooks"),
    ("what it closes over", linear, closing_over, r"loss\.before"),
    ("a generator", linear, lambda: functools.partial(drawing, np.random.default_rng(1)), r"loss\.args"),
    ("a space that each row is computed in", WorkSpace, lambda: default_loss, r"model\.space"),
]


@pytest.mark.parametrize(("what", "model", "loss", "named"), KEEPING, ids=[each[0] for each in KEEPING])
def test_what_keeps_something_of_a_row_is_refused_and_named(
    what: str, model: Callable[[], torch.nn.Module], loss: Callable[[], Loss], named: str
) -> None:
    with pytest.raises(InvalidInput, match=f"keeps something of the rows.*{named}"):
        sums(model(), loss())


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_weights_that_are_changed_by_looking_are_refused(layer: Any, max_norm: float) -> None:
    with pytest.raises(InvalidInput, match="with max_norm changes its weights"):
        sums(Words(layer(10, 3, max_norm=max_norm)), width=1)


def test_a_constant_that_is_made_once_is_no_row_s() -> None:
    sums(Once())


def test_what_is_held_and_not_changed_is_nobodys_row() -> None:
    model = Complex().train()
    kept = state_of(model=model)
    assert changed(kept, state_of(model=model)) == []
    model.held[0].mul_(2)
    assert changed(kept, state_of(model=model)) == ["model.held[0]"]


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """untried(width): models are taken as they are."""

    def row(width: int) -> None:
        given = PublicRow(torch.zeros(1, width, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
        monkeypatch.setattr(per_example, "try_out", lambda *_, **__: given)

    return row  # type: ignore[return-value]  # a fixture without a teardown


def moved(model: Callable[[], torch.nn.Module], data: Dataset, untried: Callable[[int], None]) -> float:
    """What the last row's being there moves the sum by."""
    untried(data.features.shape[1])
    found = []
    for count in (len(data), len(data) - 1):
        found.append(sums(model(), width=data.features.shape[1]).over(data, np.arange(count)))
    return float(torch.linalg.vector_norm(found[0] - found[1]))


def test_a_space_that_rows_are_computed_in_one_after_the_other_moves_no_other_row(
    untried: Callable[[int], None],
) -> None:
    """Also where the trial does not find it: what is summed is what was clipped."""

    def model() -> torch.nn.Module:
        torch.manual_seed(2)
        return WorkSpace()

    features = np.random.default_rng(3).normal(size=(ROWS, 3))
    features[-1] = 1e6
    assert moved(model, rows(features), untried) <= 1.0


def test_a_row_changes_no_parameter_and_so_no_other_row(untried: Callable[[int], None]) -> None:
    """Own weights of norm 50, beyond what the model leaves as it is: the trial's public ones are smaller."""

    def model() -> torch.nn.Module:
        torch.manual_seed(4)
        return Renormalised()

    features = np.arange(ROWS).reshape(-1, 1) % 3
    features[-1] = 7
    assert moved(model, rows(features), untried) <= 1.0
    trained = model()
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    config = LocalTraining(1, 1.0, 1e-9, 1.0, 1.0, ROWS)
    train_dpsgd(trained, rows(features), loss=default_loss, config=config, entropy=SystemEntropy())
    for value, old in zip(trained.parameters(), before, strict=True):
        assert torch.allclose(value, old, atol=1e-4)  # a step of next to nothing, and nothing beside it


def test_what_is_compared_is_seen_wherever_it_is_held() -> None:
    """Attributes, containers, arrays, generators, closures; equal values are equal."""
    holder = Prototypes()
    before = state_of(loss=holder.loss)
    assert changed(before, state_of(loss=holder.loss)) == []
    holder.seen[3] = torch.ones(2)
    assert changed(before, state_of(loss=holder.loss)) == ["loss.seen", "loss.seen[3]"]
    nested = {"a": [np.zeros(2), {"b": (1, float("nan"))}]}
    assert state_of(x=nested) == state_of(x={"a": [np.zeros(2), {"b": (1, float("nan"))}]})
    circle: list[Any] = []
    circle.append(circle)
    assert state_of(x=circle) == {"x": "1 items"}
