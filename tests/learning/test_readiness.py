"""Whether a task can be trained on: what others hear of it depends on its code alone, and the owner hears the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.errors import TaskError
from src.learning.readiness import check_code, check_rows
from src.learning.row_kind import RowKind

from .packages import GOOD, install

SECRET = "v31337"
Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Install the task `ward` with changed code, and write its rows; returns the directory of its configuration."""

    def make(*changes: tuple[str, str], rows: str = "1,2,3,0\n4,5,6,1\n") -> Path:
        text = GOOD
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        monkeypatch.syspath_prepend(
            str(install(tmp_path / "site", {"ward": "ward_ready:Task"}, {"ward_ready.py": text}))
        )
        (tmp_path / "rows.csv").write_text(rows)
        return tmp_path

    yield make
    sys.modules.pop("ward_ready", None)


def look(directory: Path, **options: Any) -> tuple[str, str, str]:
    """(problem, place, what the owner reads) of a task and its rows; a hint counts where its rows do not go with it."""
    hint: TaskError | None = None
    try:
        hint, _ = check_code("ward")
        check_rows("ward", {"file": "rows.csv", **options}, directory=str(directory))
    except TaskError as error:
        told = hint if hint and error.metadata["problem"] == "DATA_NOT_READY" else error
        return told.metadata["problem"], told.metadata["place"], told.private
    return "", "", ""


def test_a_task_whose_rows_go_with_it_is_ready(made: Made) -> None:
    assert look(made()) == ("", "", "")


def test_a_model_that_cannot_be_built_once_rows_were_seen_is_not_ready_data_and_its_text_is_told_nobody(
    made: Made,
) -> None:
    """A task that keeps something of its rows for `build_model`: a column for each category that occurs, say."""
    kept = ("        return Dataset(", "        self.seen = table[0, 0]\n        return Dataset(")
    built = ("        torch.manual_seed(seed)", f"        if hasattr(self, 'seen'): raise ValueError({SECRET!r})")
    problem, place, private = look(made(kept, built))
    assert (problem, place) == ("DATA_NOT_READY", "")
    assert "ValueError at ward_ready.py:" in private
    assert SECRET not in private


LINEAR = "torch.nn.Linear(3, 1)"
LOSS = "    def loss(self, outputs, labels):\n        return "
MODEL = "    def build_model"
LABELS = "table[:, 3].astype(np.int64)"
FLOATS = '    label_dtype = "float32"\n'
DECLARED = f"    features_shape = (3,)\n{FLOATS}"
TAKES_ANY = "torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(3), torch.nn.Linear(3, 1))"


@pytest.mark.parametrize(
    ("changes", "problem", "said"),
    [
        ([("import torch\n", "import torch\nimport not_there\n")], "TASK_IMPORT_FAILED", "No module named 'not_there'"),
        ([(LINEAR, "torch.nn.Linear(3, width)")], "MODEL_NOT_BUILT", "NameError"),
        ([(LINEAR, LINEAR + ".double()")], "MODEL_NOT_BUILT", "float64; models are trained in float32"),
        ([(LINEAR, "None")], "MODEL_NOT_BUILT", "NoneType"),
        (
            [(LINEAR, "torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))")],
            "LAYER_REFUSED",
            "GroupNorm",
        ),
        ([(LINEAR, f"torch.nn.Sequential({LINEAR}, torch.nn.Dropout(0.5))")], "RANDOM_DRAWN", "dropout"),
        ([(MODEL, f"{LOSS}((outputs[:, 0] - labels) ** 2).mean()\n{MODEL}")], "LOSS_NOT_PER_EXAMPLE", "one value"),
        ([(MODEL, f"{LOSS}(outputs[:, 0] - outputs.mean() - labels) ** 2\n{MODEL}")], "ROWS_MIXED", "depends"),
        ([(MODEL, FLOATS + MODEL)], "LOSS_MISSING", "give the task a loss of its own"),
        ([(MODEL, DECLARED + MODEL)], "LOSS_MISSING", "give the task a loss of its own"),
        ([(LINEAR, f"torch.nn.utils.weight_norm({LINEAR})")], "MODEL_NOT_BUILT", "parametrizations.weight_norm"),
        (
            [(MODEL, f"    label_dtype = 'category'\n{MODEL}")],
            "NOT_COMPUTABLE",
            "label_dtype is 'category', and no dtype",
        ),
        ([(MODEL, f"    label_dtype = 'U3'\n{MODEL}")], "NOT_COMPUTABLE", "label_dtype: labels are whole numbers"),
        (
            [(MODEL, f"    features_shape, label_dtype = 'three', 'int64'\n{MODEL}")],
            "NOT_COMPUTABLE",
            "features_shape is 'three': of one row, a tuple such as (9,)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_what_depends_on_the_code_is_told_by_its_class(
    made: Made, changes: list[tuple[str, str]], problem: str, said: str
) -> None:
    directory = made(*changes)
    found = look(directory)
    assert found[0] == problem
    assert said in found[2]
    (directory / "rows.csv").unlink()  # whether the rows are there makes no difference to what others hear
    assert look(directory)[:2] == found[:2]


@pytest.mark.parametrize(
    ("changes", "rows", "said"),
    [
        ([], f"1,2,3,{SECRET}\n", "ValueError at"),
        ([], "1,2,3\n", "IndexError at"),
        ([("table[:, :3]", "table")], "1,2,3,0\n4,5,6,1\n", "features of shape (4,)"),
        ([("table[:, 3].astype(np.int64)", "table[:, 3].astype(str)")], "1,2,3,0\n", "labels are no numbers"),
        (
            [(MODEL, f'    features_shape, label_dtype = (4,), "int64"\n{MODEL}'), (LINEAR, TAKES_ANY)],
            "1,2,3,0\n",
            "features have shape (3,), and features_shape says (4,)",
        ),
        ([("        return Dataset(", "        return (")], "1,2,3,0\n", "returns no sotto.learning.task.Dataset"),
        (
            [("        return Dataset(", f"        raise SystemExit({SECRET!r})\n        return (")],
            "1",
            "SystemExit at",
        ),
    ],
)
def test_of_what_may_depend_on_a_row_others_hear_that_the_data_is_not_ready(
    made: Made, changes: list[tuple[str, str]], rows: str, said: str
) -> None:
    problem, place, private = look(made(*changes, rows=rows))
    assert (problem, place) == ("DATA_NOT_READY", "")
    assert said in private
    assert SECRET not in private


@pytest.mark.parametrize("says", ["label_dtype = 'category'", "features_shape, label_dtype = 'three', 'int64'"])
def test_what_no_row_is_is_told_where_rows_alone_are_looked_at(made: Made, says: str) -> None:
    """As `sotto train` does, before it charges."""
    directory = made((MODEL, f"    {says}\n{MODEL}"))
    with pytest.raises(TaskError) as raised:
        check_rows("ward", {"file": "rows.csv"}, directory=str(directory))
    assert raised.value.metadata["problem"] == "DATA_NOT_READY"
    assert raised.value.private.startswith(says.partition(" ")[0].rstrip(","))


def test_what_a_task_raises_once_it_has_seen_rows_is_quoted_to_nobody(made: Made) -> None:
    """Also by an error of Sotto's own, which it may raise as it likes."""
    kept = ("        return Dataset(", "        Task.seen = table[0, 0]\n        return Dataset(")
    raises = f"{LOSS}sotto_error(outputs)\n{MODEL}"
    error = (
        "def sotto_error(outputs):\n    from src.errors import InvalidInput\n"
        f"    if hasattr(Task, 'seen'): raise InvalidInput({SECRET!r})\n    return outputs[:, 0] ** 2\n\n\n"
    )
    problem, place, private = look(made(kept, (MODEL, raises), ("class Task:", error + "class Task:")))
    assert (problem, place) == ("DATA_NOT_READY", "")
    assert "cannot be computed" in private
    assert SECRET not in private


@pytest.mark.parametrize("own", ["", f"{LOSS}(outputs[:, 0] - labels) ** 2\n"])
def test_labels_that_a_task_says_are_floats_are_fine_with_a_loss_of_its_own(made: Made, own: str) -> None:
    found = look(made((MODEL, DECLARED + own + MODEL)))
    assert found[0] == ("" if own else "LOSS_MISSING")


def test_a_loss_of_its_own_is_ready_whatever_dtype_a_missing_label_gave_them(made: Made) -> None:
    """Or that one row would be told of, by a loss that takes whole numbers alone."""
    floats = (LABELS, "table[:, 3]")
    whole = "torch.nn.functional.one_hot(labels, 2).sum(1) * outputs[:, 0] ** 2"
    assert look(made(floats, (MODEL, f"{LOSS}{whole}\n{MODEL}"))) == ("", "", "")


def test_the_look_that_finds_it_ready_says_what_a_row_looks_like(made: Made) -> None:
    directory = str(made())
    assert check_rows("ward", {"file": "rows.csv"}, directory=directory) == RowKind((3,), "int64")


def test_what_a_task_says_of_its_rows_counts_and_not_what_they_look_like(made: Made) -> None:
    says = '    features_shape, label_dtype = (3,), "int64"\n'
    directory = str(made((LABELS, "table[:, 3]"), (MODEL, says + MODEL)))
    assert check_code("ward") == (None, RowKind((3,), "int64"))
    assert check_rows("ward", {"file": "rows.csv"}, directory=directory) == RowKind((3,), "float32")


def test_a_file_that_is_not_there_is_named_to_its_owner(made: Made) -> None:
    directory = made()
    problem, _, said = look(directory, file="other.csv")
    assert problem == "DATA_NOT_READY"
    assert "other.csv" in said


def test_a_task_that_is_not_installed_is_told() -> None:
    with pytest.raises(TaskError) as raised:
        check_code("nobody-has-this")
    assert raised.value.metadata["problem"] == "TASK_NOT_INSTALLED"


def test_rows_that_are_a_regression_are_not_ready_for_a_task_without_a_loss_for_one(made: Made) -> None:
    """Before any round, instead of in each of them after it was charged; others hear that the data is not ready."""
    problem, place, private = look(made((LABELS, "table[:, 3].astype(np.float32)")))
    assert (problem, place) == ("DATA_NOT_READY", "")
    assert "for a regression, give the task a loss of its own" in private
