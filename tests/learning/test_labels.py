"""Labels: what counts as a class, what the default loss is not for, and what an owner is told of the rest."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src.errors import EvaluationError, InvalidInput
from src.learning.evaluation import evaluate
from src.learning.labels import complaint
from src.learning.per_example import classes_known, rows_that_count
from src.learning.task import Dataset, classes_of, default_loss, holdout_of, loss_for
from src.learning.trial import try_out

BITS = np.arange(8) % 2
CLASSES = np.arange(8) % 3
FEW = np.where(np.arange(8) == 3, 999, BITS)
DATES = np.datetime64("2024-01-01") + BITS.astype("timedelta64[D]")

COUNTED: dict[str, tuple[int, NDArray[Any], list[int]]] = {
    "0 and 1": (1, BITS, [1] * 8),
    "truth values": (1, BITS.astype(bool), [1] * 8),
    "unsigned": (1, BITS.astype(np.uint16), [1] * 8),
    "of another byte order": (1, BITS.astype(">i4"), [1] * 8),
    "1 and 2": (1, BITS + 1, [1, 0] * 4),
    "-1 and 1": (1, 2 * BITS - 1, [0, 1] * 4),
    "999 for unknown": (1, FEW, [1, 1, 1, 0, 1, 1, 1, 1]),
    "an id of 64 bits": (1, np.where(np.arange(8) == 3, 2**63 + 1, BITS.astype(np.uint64)), [1, 1, 1, 0, 1, 1, 1, 1]),
    "fractions": (1, BITS + 0.25, [0] * 8),
    "0 to 2": (3, CLASSES, [1] * 8),
    "0 to 2 as floats": (3, CLASSES.astype(np.float32), [1] * 8),
    "0 to 2 as floats of another byte order": (3, CLASSES.astype(">f8"), [1] * 8),
    "0 to 2 as wide floats": (3, (CLASSES + 1).astype(np.longdouble), [1, 1, 0, 1, 1, 0, 1, 1]),
    "0 to 2 as small floats": (3, CLASSES.astype(np.float16), [1] * 8),
    "1 to 3": (3, CLASSES + 1, [1, 1, 0, 1, 1, 0, 1, 1]),
    "fractions between classes": (3, np.where(np.arange(8) == 3, 0.7, CLASSES), [1, 1, 1, 0, 1, 1, 1, 1]),
    "an id": (3, np.arange(8) * 1000, [1] + [0] * 7),
}


@pytest.mark.parametrize("what", COUNTED)
def test_a_row_counts_where_its_label_is_a_class_of_the_model_and_for_nothing_elsewhere(what: str) -> None:
    """With one output as with several: no label is bent into a class."""
    outputs, labels, counted = COUNTED[what]
    rows = Dataset(np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32), labels, "x")
    found = rows_that_count(torch.nn.Linear(4, outputs), rows, loss=default_loss)
    assert found.tolist() == [bool(each) for each in counted]


COMPLAINTS: dict[str, tuple[NDArray[Any], int, str]] = {
    "classes": (CLASSES, 3, ""),
    "classes and unknown ones": (np.array([0.0, 1.0, np.nan]), 2, ""),
    "no rows": (np.zeros(0, np.int64), 2, ""),
    "from 1": (BITS + 1, 2, "labels are 0 or 1; found 1 and 2: labels seem to start at 1; take labels - 1"),
    "of three from 1": (CLASSES + 1, 3, "labels are 0 to 2 for 3 outputs; found 1, 2 and 3: labels seem to start at 1"),
    "from 1 and a code": (np.where(np.arange(8) == 3, 999, BITS + 1), 2, "found 1, 2 and 999: labels seem to start at"),
    "signs": (2 * BITS - 1, 2, r"found -1 and 1: take \(labels \+ 1\) // 2"),
    "a code": (FEW, 2, "found 0, 1 and 999: if one of these stands for unknown"),
    "one class too many": (np.arange(4), 3, "found 0, 1, 2 and 3"),
    "ids": (np.arange(60) * 17, 3, "60 different values from 0 to 1003: these look like ids or measurements"),
    "fractions": (CLASSES + 0.5, 3, "found 0.5, 1.5 and 2.5: a fraction is no class; a regression needs a loss of"),
    "all the same": (np.full(5, 7), 2, "found 7$"),
}


@pytest.mark.parametrize("what", COMPLAINTS)
def test_what_is_wrong_with_labels_is_said_in_words(what: str) -> None:
    labels, classes, words = COMPLAINTS[what]
    found = complaint(labels, classes)
    assert bool(found) == bool(words)
    assert re.search(words, found), found


class Regression:
    """Floats to be met, by one output, and a loss of its own or none."""

    name = "regression"

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(4, 1)

    def load_data(self, options: object) -> Dataset:
        return Dataset(np.ones((8, 4), np.float32), 40.0 + np.arange(8), "x")


class OwnLoss(Regression):
    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - labels) ** 2


class TwoOutputs(Regression):
    def build_model(self, seed: int) -> torch.nn.Module:
        return torch.nn.Linear(4, 2).double()


@pytest.mark.parametrize("wide", [np.float16, np.float32, np.float64])
def test_a_regression_without_a_loss_of_its_own_is_refused_by_the_dtype_of_its_labels_alone(wide: Any) -> None:
    """It trained with the cross entropy of numbers that are no classes. No label decides, or refusing would tell."""
    model = Regression().build_model(0)
    for values in (40.0 + np.arange(8), BITS, np.full(8, np.nan), np.zeros(0)):
        rows = Dataset(np.ones((len(values), 4), np.float32), values.astype(wide), "x")
        with pytest.raises(InvalidInput, match=r"give the task a loss of its own; for classes.*astype\(np.int64\)"):
            loss_for(Regression(), model, rows)
        assert loss_for(OwnLoss(), model, rows)(torch.tensor([[3.0]]), torch.tensor([1.0])).tolist() == [4.0]
    whole = Dataset(np.ones((8, 4), np.float32), BITS, "x")
    says_classes, says_floats, says_nonsense = Regression(), Regression(), Regression()
    says_classes.label_dtype, says_floats.label_dtype = "int64", "float32"  # type: ignore[attr-defined]
    says_nonsense.label_dtype = "numbers"  # type: ignore[attr-defined]
    missing = Dataset(np.ones((8, 4), np.float32), np.where(np.arange(8) == 3, np.nan, BITS), "x")
    assert loss_for(says_classes, model, missing) is default_loss  # one missing label made floats of all
    assert loss_for(says_nonsense, model, whole) is default_loss
    with pytest.raises(InvalidInput, match="of its own"):
        loss_for(says_floats, model, whole)
    assert loss_for(Regression(), model, whole) is default_loss
    floats = Regression().load_data({})
    assert loss_for(TwoOutputs(), TwoOutputs().build_model(0), floats) is default_loss


PUBLIC: dict[str, tuple[NDArray[Any], str]] = {
    "classes": (BITS, ""),
    "classes as floats": (BITS.astype(np.float32), ""),
    "from 1": (BITS + 1, "found 1 and 2: labels seem to start at 1"),
    "a regression": (40.5 + np.arange(8), "a regression needs a loss of the task's own"),
    "a code": (FEW, "found 0, 1 and 999"),
}


@pytest.mark.parametrize("what", PUBLIC)
def test_of_public_rows_everybody_is_told_what_their_labels_look_like(what: str) -> None:
    """Before a job or a training is charged, since evaluating is tried first."""
    labels, words = PUBLIC[what]
    rows = Dataset(np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32), labels, "x")
    model = Regression().build_model(0)
    if words:
        with pytest.raises(EvaluationError, match=f"hold-out rows of task 'regression' cannot be used: .*{words}"):
            evaluate(Regression(), model, rows)
        assert evaluate(OwnLoss(), model, rows) == {"n": 8.0}  # no accuracy of what are no classes
    else:
        assert evaluate(Regression(), model, rows).keys() == {"accuracy", "auc", "n"}


OTHER_DTYPES: dict[str, tuple[NDArray[Any], str]] = {
    "texts": (np.where(BITS == 1, "yes", "no"), r"here they are <U3: give each text its class in load_data"),
    "bytes": (np.where(BITS == 1, b"yes", b"no"), r"give each text its class"),
    "objects": (BITS.astype(object), r"here they are object: .*labels\.astype\(np\.int64\)"),
    "dates": (DATES, r"datetime64\[D\]: turn dates into numbers"),
    "durations": (DATES - DATES[0], r"timedelta64\[D\]: turn durations into numbers"),
    "complex numbers": (BITS * 1j, r"take labels\.real"),
}


@pytest.mark.parametrize("what", OTHER_DTYPES)
def test_labels_that_are_no_numbers_are_refused_by_their_dtype_with_what_to_do(what: str) -> None:
    labels, words = OTHER_DTYPES[what]
    rows = Dataset(np.ones((8, 4), np.float32), labels, "x")
    model = torch.nn.Linear(4, 1).double()
    with pytest.raises(InvalidInput, match=words):
        try_out(model, default_loss, list(model.parameters()), shape=(4,), label_dtype=rows.labels.dtype)

    class Public(Regression):
        def load_holdout(self, options: object) -> Dataset:
            return rows

    with pytest.raises(InvalidInput, match=words):
        holdout_of(Public(), {})


SHAPES: dict[str, tuple[Any, Any, str]] = {
    "features that are whole numbers": (
        np.ones((8, 4), np.int64), BITS, r"int64 of shape \(8, 4\); take features\.astype\(np\.float32\).*\.long\(\)"
    ),
    "features in double precision": (np.ones((8, 4)), BITS, r"float64.*take features\.astype\(np\.float32\)"),
    "texts for features": (np.full((8, 4), "a"), BITS, "<U1 of shape .*become numbers in load_data"),
    "one column of features": (np.ones(8, np.float32), BITS, r"reshape\(-1, 1\)"),
    "a list of features": ([[1.0]] * 8, BITS, "NumPy array, not a list"),
    "a tensor of labels": (np.ones((8, 4), np.float32), torch.zeros(8), "NumPy array, not a Tensor"),
    "labels in a column": (np.ones((8, 4), np.float32), BITS[:, None], r"int64 of shape \(8, 1\); take labels\[:, 0\]"),
    "two targets": (
        np.ones((8, 4), np.float32), np.stack([BITS, BITS], 1), r"of shape \(8, 2\); .*several targets .* among"
    ),
    "classes that are one-hot": (np.ones((8, 4), np.float32), np.eye(2)[BITS], r"one-hot take labels\.argmax"),
    "complex features": (np.ones((8, 4), complex), BITS, r"two features each, \.real and \.imag"),
    "a label too few": (np.ones((8, 4), np.float32), BITS[1:], r"shape \(8,\); here labels are int64 of shape \(7,\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_what_is_no_data_set_is_refused_with_what_it_is_and_what_to_do(what: str) -> None:
    features, labels, words = SHAPES[what]
    with pytest.raises(InvalidInput, match=words):
        Dataset(features, labels, "x")


def test_what_the_default_loss_cannot_use_of_a_model_is_said() -> None:
    assert [classes_of(torch.zeros(shape)) for shape in ((5,), (5, 1), (5, 1, 1), (5, 2), (5, 3), (0, 3))] == [
        2, 2, 2, 2, 3, 3
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="one tensor; the model returns a tuple"):
        default_loss((torch.zeros(5, 2), torch.zeros(5)), torch.zeros(5))  # type: ignore[arg-type]
    for shape in ((5, 2, 2), ()):
        with pytest.raises(InvalidInput, match=r"returns shape \("):
            classes_of(torch.zeros(shape))


def test_only_of_the_default_loss_is_known_which_classes_there_are() -> None:
    rows, model = Dataset(np.zeros((0, 4), np.float32), BITS[:0], "x"), torch.nn.Linear(4, 3)
    assert classes_known(model, rows, loss=default_loss) == 3
    assert classes_known(model, rows, loss=lambda outputs, labels: outputs[:, 0]) is None


def test_a_masked_array_is_refused_with_the_way_out() -> None:
    """What is masked holds a number all the same, and would be trained on."""
    values = np.ma.masked_greater(np.arange(6, dtype=np.float32).reshape(3, 2), 4)
    with pytest.raises(InvalidInput, match=r"features are a masked array: features\.filled\(np\.nan\)"):
        Dataset(values, np.arange(3), "made up")
    with pytest.raises(InvalidInput, match="labels are a masked array"):
        Dataset(np.zeros((3, 2), np.float32), np.ma.masked_equal(np.arange(3), 1), "made up")


def test_labels_of_any_order_in_memory_are_told_apart() -> None:
    backwards = np.arange(6, dtype=np.int64)[::-1]
    labels = Dataset(np.zeros((6, 2), np.float32), backwards, "made up").labels
    assert "found 6 different values from 0 to 5" in complaint(labels, 2)
