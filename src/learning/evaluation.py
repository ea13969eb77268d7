"""How well a model predicts, on rows that are public or held out for this purpose."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError, InvalidInput, SottoError
from ..text import brief, shown
from .labels import complaint
from .task import Dataset, Options, Task, default_loss, holdout_of, loss_of, metrics_of

if TYPE_CHECKING:
    import torch

BATCH_VALUES: Final = 1 << 18
"""Feature values that a model is given at once (1 MiB): what it computes of them on its way is a multiple of that."""
MAX_BATCH_ROWS: Final = 4096
MAX_METRICS: Final = 100
"""Numbers of a task's own: they stand in every round of a job's history, and in what is signed."""
MAX_NAME_CHARACTERS: Final = 100


def public_rows(task: Task, options: Options) -> Dataset | None:
    """`holdout_of`, whatever becomes of it: what a task's own code raises is told by its type and place.

    Raises:
        EvaluationError: they cannot be loaded, there are none among them, or one is not finite.
    """
    what = f"the hold-out rows of task {task.name!r}"
    try:
        rows = holdout_of(task, options)
    except SottoError as error:
        raise EvaluationError(f"{what} cannot be used: {error.message}", private=error.private) from error
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # its text may say more of the aggregator's machine than a scientist is to know
        raise EvaluationError(f"{what} cannot be loaded: {_raised(error)}", private=brief(error)) from error
    if rows is not None and not len(rows):
        raise EvaluationError(f"{what} are none: load_holdout returned a data set without rows")
    return rows


def evaluate(task: Task, model: torch.nn.Module, dataset: Dataset) -> dict[str, float]:
    """The task's metrics of a model on a data set, and `n`, its number of rows.

    The numbers are exact, with no noise: for public or hold-out rows only. A metric that is not finite is among them.

    Raises:
        InvalidInput: the model does not compute finite numbers.
        EvaluationError: the model cannot compute these rows, their labels are no classes of it where the task has the
            default loss, or the task's metrics are at fault.
    """
    outputs = predict(model, dataset.features)
    if not np.isfinite(outputs).any():
        raise InvalidInput("the model's outputs cannot be measured: they are not finite")
    wrong = _no_classes(outputs, dataset.labels) if loss_of(task) is default_loss else ""
    if wrong:
        raise EvaluationError(f"the hold-out rows of task {task.name!r} cannot be used: {wrong}")
    try:
        found = _checked(metrics_of(task)(outputs, dataset.labels), task.name)
    except (KeyboardInterrupt, MemoryError, EvaluationError):
        raise
    except BaseException as error:  # of the task's own code, which may raise anything
        if not np.isfinite(outputs).all():  # which libraries refuse, and no fault of the task's
            raise InvalidInput("the model's outputs cannot be measured: they are not finite") from error
        raise EvaluationError(
            f"the metrics of task {task.name!r} cannot be computed: {_raised(error)}", private=brief(error)
        ) from error
    return {**found, "n": float(len(dataset))}


def predict(model: torch.nn.Module, features: NDArray[np.float32]) -> NDArray[Any]:
    """The model's outputs (logits), of shape (n, outputs) or (n,), computed some rows at a time.

    Raises:
        EvaluationError: the model cannot compute these rows, or gives other than outputs of each.
    """
    import torch

    model.eval()
    parts = []
    for part in batches(len(features), math.prod(features.shape[1:])):
        try:
            with torch.no_grad():
                outputs: object = model(torch.from_numpy(features[part].copy()))  # which may write into it
        except Exception as error:
            shape = list(features.shape[1:])
            raise EvaluationError(
                f"the task's model cannot compute hold-out rows of shape {shape}: {_raised(error)}",
                private=brief(error),
            ) from error
        parts.append(_array(outputs, part.stop - part.start))
    if len({part.shape[1:] for part in parts}) > 1:
        raise EvaluationError("the task's model gives outputs of several shapes")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def batches(rows: int, values: int) -> Iterator[slice]:
    """Parts of about the same size of `rows` rows with so many values each. No part is a single row, for which some
    models drop an axis, unless it is the only one."""
    most = max(2, min(MAX_BATCH_ROWS, BATCH_VALUES // max(1, values)))
    count = max(1, math.ceil(rows / most))
    while count > 1 and rows // count < 2:
        count -= 1
    ends = [rows * each // count for each in range(count + 1)]
    for start, stop in itertools.pairwise(ends):
        yield slice(start, stop)


def _array(outputs: object, rows: int) -> NDArray[Any]:
    """Raises EvaluationError unless there is an output for each row."""
    import torch

    if not isinstance(outputs, torch.Tensor):
        raise EvaluationError(f"the model returns a {type(outputs).__name__}; outputs are one tensor, rows first")
    if not outputs.ndim or len(outputs) != rows:
        raise EvaluationError(f"of {rows} rows the model returns shape {list(outputs.shape)}; outputs are rows first")
    return _plain_floats(outputs).numpy()


def _plain_floats(outputs: torch.Tensor) -> torch.Tensor:
    """Of a dtype that numpy has."""
    import torch

    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def _raised(error: BaseException) -> str:
    """The type of what a task's code raised, and the line of that code. Not its text: that is for the log."""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.parent != Path(__file__).parent and "torch" not in path.parts:
            return f"{type(error).__name__} at {path.name}:{frame.lineno}"
    return type(error).__name__


def _checked(found: object, task: str) -> dict[str, float]:
    """Raises EvaluationError for what are no numbers by name."""
    what = f"the metrics of task {task!r}"
    if not isinstance(found, Mapping):
        raise EvaluationError(f"{what} are a {type(found).__name__}, not numbers by name")
    if len(found) > MAX_METRICS:
        raise EvaluationError(f"{what} are {len(found)} numbers; at most {MAX_METRICS} are kept")
    metrics = {}
    for name, value in found.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARACTERS:
            raise EvaluationError(f"{what}: {shown(name)} is no name of at most {MAX_NAME_CHARACTERS} characters")
        number = _number(value)
        if number is None:
            raise EvaluationError(f"{what}: {shown(name)} is a {type(value).__name__}, not a number")
        metrics[name] = number
    return metrics


def _number(value: object) -> float | None:
    """Of Python, numpy or torch, also as an array of a single one; None for anything else."""
    item = getattr(value, "item", None)
    if item is not None and not getattr(value, "shape", ()):
        value = item()
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def default_metrics(outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """`accuracy` in [0, 1], and for two classes `auc` in [0, 1], the area under the ROC curve.

    Args:
        outputs: logits of shape (n,), (n, 1) or (n, classes).
        labels: classes 0, 1, …, shape (n,). With a single class present, or outputs that are no numbers, `auc` is not
            defined and is left out. Others than the classes of these outputs have no metrics (a regression, with a loss
            of its own), and there are none of outputs of more axes.
    """
    each = math.prod(outputs.shape[1:])
    if (outputs.ndim > 2 and each != 1) or _no_classes(outputs, labels):
        return {}
    scores: NDArray[Any] | None
    if each == 1:
        scores = outputs.reshape(len(outputs))
        predicted = (scores > 0).astype(np.int64)
    else:
        scores = outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else None
        predicted = outputs.argmax(axis=1)
    metrics = {"accuracy": float(np.mean(predicted == labels))}
    if scores is not None and np.unique(labels).size == 2 and not np.isnan(scores).any():
        metrics["auc"] = area_under_roc(scores, labels)
    return metrics


def area_under_roc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """How probable it is that a row of the greater class scores higher than one of the smaller, in [0, 1]; equal scores
    count half (Mann and Whitney's U over the number of pairs).

    Args:
        scores: shape (n,), no NaN.
        labels: shape (n,), two different values.
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1; of equal scores the mean of theirs
    greater = labels == labels.max()
    many = int(greater.sum())
    above = ranks[greater].sum() - many * (many + 1) / 2
    return float(above / (many * (len(labels) - many)))


def _no_classes(outputs: NDArray[Any], labels: NDArray[Any]) -> str:
    """What is wrong with labels of public rows, if they are to be classes of outputs like these; else nothing."""
    if math.prod(outputs.shape[1:]) == 1:
        return complaint(labels, 2)
    return complaint(labels, outputs.shape[1]) if outputs.ndim == 2 else ""
