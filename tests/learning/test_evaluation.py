"""Public rows are measured some at a time, and whatever a task's own code does becomes a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from src.errors import EvaluationError, InvalidInput
from src.learning import evaluation
from src.learning.evaluation import batches, default_metrics, evaluate, predict, public_rows
from src.learning.task import Dataset

SECRET = "postgresql://operator:password@db"


class OneTask:
    """Six features, two classes; what a test sets is what it does."""

    name = "one"

    def __init__(self, **own: Any) -> None:
        self.seen: list[int] = []
        for name, value in own.items():
            setattr(self, name, value)

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(6, 2))
        net.register_forward_hook(lambda _module, inputs, _outputs: self.seen.append(len(inputs[0])))
        return net

    def load_data(self, options: Mapping[str, object]) -> Dataset:
        return rows(10)


def rows(count: int) -> Dataset:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(count, 6)).astype(np.float32)
    return Dataset(features, (features.sum(1) > 0).astype(np.int64), "made up")


def measure(task: Any, count: int = 10) -> dict[str, float]:
    return evaluate(task, task.build_model(0), rows(count))


def raising(error: Exception) -> Any:
    def metrics(outputs: Any, labels: Any) -> Any:
        raise error

    return metrics


NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "raises": (raising(ValueError(SECRET)), r"cannot be computed: ValueError at test_evaluation\.py:\d+$"),
    "a key": (raising(KeyError("x")), r"cannot be computed: KeyError at"),
    "exits": (raising(SystemExit(SECRET)), r"cannot be computed: SystemExit at"),  # type: ignore[arg-type]
    "text": (lambda outputs, labels: {"table": "tn 3 fp 4"}, "'table' is a str, not a number"),
    "nested": (lambda outputs, labels: {"f1": {"a": 1.0}}, "'f1' is a dict, not a number"),
    "array": (lambda outputs, labels: {"each": np.ones(3)}, "'each' is a ndarray, not a number"),
    "complex": (lambda outputs, labels: {"z": 1j}, "'z' is a complex, not a number"),
    "none": (lambda outputs, labels: {"f1": None}, "'f1' is a NoneType, not a number"),
    "huge": (lambda outputs, labels: {"n": 10**400}, "'n' is a int, not a number"),
    "list": (lambda outputs, labels: [0.5], "are a list, not numbers by name"),
    "nothing": (lambda outputs, labels: None, "are a NoneType, not numbers by name"),
    "many": (lambda outputs, labels: {str(i): 1.0 for i in range(5000)}, "are 5000 numbers; at most 100"),
    "name": (lambda outputs, labels: {"a\nb": 1.0}, r"'a\\nb' is no name"),
    "number": (lambda outputs, labels: {3: 1.0}, "3 is no name"),
    "long": (lambda outputs, labels: {"x" * 1000: 1.0}, "is no name of at most 100"),
}


@pytest.mark.parametrize("which", NO_NUMBERS)
def test_metrics_that_are_no_numbers_are_told_by_name_and_never_in_the_words_of_an_exception(which: str) -> None:
    metrics, said = NO_NUMBERS[which]
    with pytest.raises(EvaluationError, match=said) as caught:
        measure(OneTask(metrics=metrics))
    assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    "value",
    [1, 0.5, True, np.float32(0.5), np.int64(3), np.array(0.5), torch.tensor(0.5)],
    ids=lambda v: type(v).__name__,
)
def test_numbers_of_python_numpy_and_torch_are_metrics(value: Any) -> None:
    assert measure(OneTask(metrics=lambda outputs, labels: {"m": value}))["m"] == pytest.approx(float(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_no_fault(value: float) -> None:
    assert not np.isfinite(measure(OneTask(metrics=lambda outputs, labels: {"r": value}))["r"])


def no_file(options: object) -> Dataset:
    with np.load("/nowhere/holdout.npz") as table:
        return Dataset(table["x"], table["y"], "")


def not_finite(options: object) -> Dataset:
    found = rows(10)
    found.features[3, 2] = np.nan
    return found


def secretive(options: object) -> Dataset:
    raise ConnectionError(SECRET)


NO_ROWS: dict[str, tuple[Any, str]] = {
    "gone": (no_file, r"cannot be loaded: FileNotFoundError at test_evaluation\.py:\d+$"),
    "nan": (not_finite, "cannot be used: every feature and label must be finite: of 10 rows 1 has"),
    "raises": (secretive, "cannot be loaded: ConnectionError at"),
    "empty": (lambda options: rows(0), "are none"),
    "other": (lambda options: (np.ones(3), np.ones(3)), "cannot be loaded: AttributeError"),
    "float64": (lambda options: Dataset(np.ones((3, 2)), np.ones(3), ""), "cannot be used: features are float32"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("which", NO_ROWS)
def test_rows_that_cannot_be_had_are_told_by_type_and_place_alone(which: str) -> None:
    load, said = NO_ROWS[which]
    with pytest.raises(EvaluationError, match=said) as caught:
        public_rows(OneTask(load_holdout=load), {})
    assert SECRET not in caught.value.message
    assert "/nowhere" not in caught.value.message


def test_rows_of_another_shape_than_the_model_takes_are_said_to_be() -> None:
    task = OneTask()
    with pytest.raises(EvaluationError, match=r"cannot compute hold-out rows of shape \[7\]: RuntimeError"):
        predict(task.build_model(0), np.ones((4, 7), np.float32))


class Odd(torch.nn.Module):
    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.a = torch.nn.Linear(6, 2)
        self.returned = returned

    def forward(self, features: torch.Tensor) -> Any:
        return self.returned(self.a(features))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda outputs: (outputs, outputs), "returns a tuple; outputs are one tensor"),
        (lambda outputs: outputs.sum(), r"returns shape \[\]"),
        (lambda outputs: outputs[:3], r"of 10 rows the model returns shape \[3, 2\]"),
    ],
)
def test_outputs_that_are_none_for_each_row_are_refused(returned: Any, said: str) -> None:
    task = OneTask(build_model=lambda seed: Odd(returned))
    with pytest.raises(EvaluationError, match=said):
        measure(task)


def test_a_model_that_computes_no_finite_numbers_is_its_own_fault() -> None:
    task = OneTask(build_model=lambda seed: Odd(lambda outputs: outputs * torch.nan))
    with pytest.raises(InvalidInput, match="they are not finite"):
        measure(task)


@pytest.mark.parametrize("count", [1, 2, 4096, 4097, 8193, 10_001])
def test_rows_are_computed_some_at_a_time_and_measured_as_a_whole(count: int) -> None:
    task, whole = OneTask(), []
    task.metrics = lambda outputs, labels: whole.append(outputs) or {}  # type: ignore[attr-defined, func-returns-value]
    assert measure(task, count) == {"n": count}
    assert sum(task.seen) == count
    assert max(task.seen) <= evaluation.MAX_BATCH_ROWS
    assert count == 1 or min(task.seen) > 1  # of one row some models drop an axis
    with torch.no_grad():
        at_once = task.build_model(0)(torch.from_numpy(rows(count).features)).numpy()
    np.testing.assert_allclose(whole[0], at_once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [1, 64 * 64, 3 * 224 * 224, 10**9])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 999, 1000])
def test_batches_cover_every_row_once_and_hold_no_more_values_than_they_must(count: int, values: int) -> None:
    parts = list(batches(count, values))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= max(3, evaluation.BATCH_VALUES // values)
    assert count == 1 or min(sizes) > 1


@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 5, 3), (4, 5, 3)])
def test_outputs_of_more_axes_are_no_classes_and_have_no_metrics_of_ours(shape: tuple[int, ...]) -> None:
    assert default_metrics(np.ones(shape), np.array([0, 1, 1, 0])[: shape[0]]) == {}
    assert default_metrics(np.array([[[2.0]], [[-2.0]]]), np.array([1, 0])) == {"accuracy": 1.0, "auc": 1.0}


class Writes(torch.nn.Module):
    """Centres what it is given in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 1.0
        found: torch.Tensor = self.layer(x)
        return found


def test_a_model_that_writes_into_its_input_is_measured_the_same_every_time() -> None:
    public, model = rows(10), Writes()
    before = public.features.copy()
    first = predict(model, public.features)
    assert (predict(model, public.features) == first).all()
    assert (public.features == before).all()
