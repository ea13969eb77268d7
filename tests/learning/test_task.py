"""Tasks: found by short name, judged by default losses and metrics."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src.errors import ConfigError, InvalidInput, NotFoundError, TaskError
from src.learning import installed
from src.learning.evaluation import default_metrics, evaluate
from src.learning.installed import known_tasks
from src.learning.task import (
    Dataset,
    check_options,
    default_loss,
    find_task,
    finite_rows,
    holdout_of,
    loss_of,
    metrics_of,
)
from src.learning.tasks.randhie import RandHieTask

from .packages import install


def f32(values: list[Any]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


class Bare:
    """The least that a task is."""

    name = "bare"

    def build_model(self, seed: int) -> torch.nn.Module:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, 1.0)
        torch.nn.init.zeros_(model.bias)
        return model

    def load_data(self, options: object) -> Dataset:
        return Dataset(f32([[-2], [-1], [1], [2]]), np.array([0, 1, 0, 1]), "four points")


class Full(Bare):
    """Brings everything that may be brought."""

    def load_holdout(self, options: object) -> Dataset:
        return self.load_data(options)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - labels) ** 2

    def metrics(self, outputs: object, labels: object) -> dict[str, float]:
        return {"own": 1.0}


def test_the_demonstrations_task_is_found_without_an_installed_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "entry_points", lambda group: ())
    assert isinstance(find_task("randhie"), RandHieTask)
    assert known_tasks() == ("randhie",)


def test_a_task_of_your_own_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("fractions", "fractions:Fraction", "sotto.tasks")
    monkeypatch.setattr(installed, "entry_points", lambda group: (point,) if group == "sotto.tasks" else ())
    assert type(find_task("fractions")).__name__ == "Fraction"
    assert known_tasks() == ("fractions", "randhie")


@pytest.mark.parametrize("name", ["", "os:system", "src.learning.tasks.randhie:RandHieTask", "RANDHIE"])
def test_an_unregistered_name_imports_nothing_and_lists_what_there_is(name: str) -> None:
    with pytest.raises(NotFoundError, match=r"known: .*randhie"):
        find_task(name)


def test_a_task_without_hold_out_rows_has_none_and_the_defaults() -> None:
    assert holdout_of(Bare(), {}) is None
    assert loss_of(Bare()) is default_loss
    assert metrics_of(Bare()) is default_metrics


def test_a_task_may_return_no_hold_out_rows() -> None:
    class Nothing(Bare):
        def load_holdout(self, options: object) -> None:
            return None

    assert holdout_of(Nothing(), {}) is None


def test_a_name_that_several_packages_register_is_no_task_until_one_of_them_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them is found hangs on the order of directories, and may be another one at each site."""
    for name in ("wards_one", "wards_other"):
        text = "class Task:\n    name = 'ward'\n"
        place = install(tmp_path / name, {"ward": f"{name}:Task"}, {f"{name}.py": text}, name=name)
        monkeypatch.syspath_prepend(str(place))
    with pytest.raises(TaskError) as raised:
        find_task("ward")
    assert raised.value.metadata["problem"] == "TASK_IMPORT_FAILED"
    expected = "several packages have a task of this name: wards_one (wards_one:Task), wards_other (wards_other:Task)"
    assert expected in raised.value.private
    (tmp_path / "wards_one" / "wards_one-1.dist-info" / "entry_points.txt").unlink()
    assert find_task("ward").__class__.__module__ == "wards_other"


def test_a_task_that_brings_its_own_keeps_it() -> None:
    rows = holdout_of(Full(), {})
    assert rows is not None
    assert loss_of(Full())(torch.tensor([[3.0]]), torch.tensor([1])).tolist() == [4.0]
    assert evaluate(Full(), Full().build_model(0), rows) == {"own": 1.0, "n": 4.0}


def test_evaluate_by_hand() -> None:
    """Scores −2, −1, 1, 2 for labels 0, 1, 0, 1: three of four pairs are in order, half the signs are right."""
    task = Bare()
    metrics = evaluate(task, task.build_model(0), task.load_data({}))
    assert metrics == {"accuracy": 0.5, "auc": 0.75, "n": 4.0}


def test_metrics_for_one_output_two_outputs_and_several() -> None:
    labels = np.array([0, 1, 0, 1])
    flat = f32([-2, -1, 1, 2])
    both = np.stack([-flat / 2, flat / 2], axis=1)
    assert default_metrics(flat, labels) == default_metrics(flat[:, None], labels) == default_metrics(both, labels)
    assert default_metrics(np.eye(3, dtype=np.float32), np.array([0, 1, 1])) == {"accuracy": pytest.approx(2 / 3)}


def test_auc_is_left_out_where_one_class_is_all_there_is() -> None:
    assert default_metrics(f32([1, 2]), np.array([1, 1])) == {"accuracy": 1.0}


def test_default_losses_by_hand() -> None:
    one = default_loss(torch.tensor([[0.0], [2.0]]), torch.tensor([1, 0]))
    assert one.tolist() == pytest.approx([np.log(2), np.log(1 + np.exp(2))], rel=1e-6)
    several = default_loss(torch.zeros(2, 3), torch.tensor([1, 2]))
    assert several.tolist() == pytest.approx([np.log(3)] * 2, rel=1e-6)


def test_a_label_that_is_no_class_has_no_loss_and_leaves_the_others_theirs() -> None:
    found = default_loss(torch.zeros(4, 3), torch.tensor([1, 7, -1, -100]))
    assert found[0].item() == pytest.approx(np.log(3))
    assert found[1:].isnan().all()


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options({"seed": 1, "sede": 2, "path": 3}, known=("seed",), task="t")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["path", "sede"]


REFUSED = {
    "features of float64": (np.zeros((2, 1)), np.zeros(2)),
    "features without a second axis": (np.zeros(2, np.float32), np.zeros(2)),
    "one label too few": (np.zeros((2, 1), np.float32), np.zeros(1)),
    "labels in a column": (np.zeros((2, 1), np.float32), np.zeros((2, 1))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_a_data_set_with(what: str) -> None:
    with pytest.raises(InvalidInput):
        Dataset(*REFUSED[what], "x")  # type: ignore[arg-type]


NOT_FINITE = {
    "a feature that is not a number": (f32([[0], [np.nan]]), np.zeros(2)),
    "an infinite feature": (f32([[0], [-np.inf]]), np.zeros(2, np.int64)),
    "a label that is not a number": (f32([[0], [0]]), np.array([0.0, np.nan])),
    "a label that is infinite": (f32([[0], [0]]), np.array([0.0, np.inf], np.float32)),
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_loading_a_row_is_no_error_and_tells_its_owner_of(what: str) -> None:
    """Whether a party contributes must not hang on one row; whoever cannot use such a row asks for finite ones."""
    rows = Dataset(*NOT_FINITE[what], "x")
    assert len(rows) == 2
    assert finite_rows(rows.features, rows.labels).tolist() == [True, False]
    with pytest.raises(InvalidInput, match="must be finite: of 2 rows 1 "):
        rows.require_finite()


def test_no_row_and_images_are_finite() -> None:
    assert finite_rows(np.zeros((0, 3), np.float32), np.zeros(0)).shape == (0,)
    Dataset(np.zeros((2, 3, 4, 5), np.float32), np.zeros(2, bool), "x").require_finite()


def test_public_rows_are_finite_or_refused() -> None:
    class Broken(Bare):
        def load_holdout(self, options: object) -> Dataset:
            return Dataset(f32([[np.nan]]), np.zeros(1), "x")

    with pytest.raises(InvalidInput, match="finite"):
        holdout_of(Broken(), {})
