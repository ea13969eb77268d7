"""What a learning task is, and how one is found by its short name.

A task brings the model, the data and, if it likes, its own loss and metrics. Sotto's demonstration is written against
this protocol, and so are tasks of your own: put a class in a package, give it an entry point in the group
`sotto.tasks`, install the package where the parties and the aggregator run. Only registered short names are ever
looked up: nothing that comes over the wire is imported.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InvalidInput, NotFoundError, PolicyError
from ..protocol.faults import TaskProblem, task_error
from ..text import brief
from .installed import BUILT_IN, entry_of, known_tasks, packages_of, place_in
from .labels import NO_REGRESSION, is_class, wrong_dtype

if TYPE_CHECKING:
    import torch

_SHOWN_CHARACTERS: Final = 400
"""Of what a package raised."""

Options = Mapping[str, object]
Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
Metrics = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train or evaluate on; one row is one example.

    Attributes:
        features: float32, shape (n, …): the first axis counts the rows.
        labels: shape (n,): whole numbers for classes (kept as int64), floats for anything else.
        description: public text on what the rows are; no count or statistic of private rows.

    A row that is not finite is a row: to refuse it here would tell others of it, by a party that does not contribute.
    What is refused hangs on shapes and dtypes, and on no value; a loader that fixes both fails for no row.

    Raises:
        InvalidInput: the shapes or dtypes are others; says which they are, and how they come right.
    """

    features: NDArray[np.float32]
    labels: NDArray[Any]
    description: str

    def __post_init__(self) -> None:
        for name, value in (("features", self.features), ("labels", self.labels)):
            if not isinstance(value, np.ndarray):
                raise InvalidInput(f"{name} are a NumPy array, not a {type(value).__name__}; np.asarray makes one")
            if isinstance(value, np.ma.MaskedArray):  # whose masked values hold something all the same, 1e20 say
                raise InvalidInput(f"{name} are a masked array: {name}.filled(np.nan) says which values are missing")
        if self.features.dtype != np.float32 or self.features.ndim < 2:
            raise InvalidInput(
                "features are float32 with at least two axes, rows first; here they are "
                f"{_described(self.features)}{_way_out(self.features)}"
            )
        if self.labels.shape != self.features.shape[:1]:
            raise InvalidInput(
                f"there is one label for each row of features, shape ({len(self.features)},); here labels are "
                f"{_described(self.labels)}{_one_axis(self.labels)}"
            )
        if self.labels.dtype.kind in "iu":  # of any width and byte order
            object.__setattr__(self, "labels", np.ascontiguousarray(self.labels, np.int64))
        elif self.labels.dtype.kind == "f":
            plain = np.float64 if self.labels.dtype.itemsize > 8 else self.labels.dtype.newbyteorder("=")
            object.__setattr__(self, "labels", np.ascontiguousarray(self.labels, plain))

    def __len__(self) -> int:
        return len(self.labels)

    def require_finite(self) -> None:
        """Raises InvalidInput where a row is not finite: for rows that are public, or trained on without privacy."""
        broken = np.count_nonzero(~finite_rows(self.features, self.labels))
        if broken:
            have = "has" if broken == 1 else "have"
            raise InvalidInput(
                f"every feature and label must be finite: of {len(self)} rows {broken} {have} one that is not"
            )


def finite_rows(features: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether every feature of a row and its label are finite, shape (n,): DP-SGD passes over the others."""
    found = np.asarray(np.isfinite(features).all(axis=tuple(range(1, features.ndim))))
    return found & np.isfinite(labels) if labels.dtype.kind == "f" else found


def _described(values: NDArray[Any]) -> str:
    return f"{values.dtype} of shape {values.shape}"


def _way_out(features: NDArray[Any]) -> str:
    if features.ndim < 2:
        return "; one column of numbers is features.reshape(-1, 1)"
    if features.dtype.kind in "iub":
        return "; take features.astype(np.float32), and of codes for an embedding features.long() in the model"
    if features.dtype.kind == "f":
        return "; take features.astype(np.float32)"
    if features.dtype.kind == "c":
        return "; complex numbers are two features each, .real and .imag"
    return "; texts and objects become numbers in load_data"


def _one_axis(labels: NDArray[Any]) -> str:
    if labels.ndim == 2 and labels.shape[1] == 1:
        return "; take labels[:, 0]"
    if labels.ndim > 1:
        return (
            "; of classes that are one-hot take labels.argmax(axis=1); several targets of a row go among its features, "
            "whose model hands them on for a loss of the task's own"
        )
    return ""


class Task(Protocol):
    """What every task brings.

    It may bring more, found by `holdout_of`, `loss_of`, `metrics_of` and `warm`:

    - `load_holdout(options) -> Dataset | None`: public rows on which the aggregator evaluates;
    - `loss(outputs, labels) -> Tensor` of shape (n,): one loss for each example, never their mean, since DP-SGD clips
      each example's gradient by itself. Model and loss are computed in float64, one row at a time, and tried on public
      rows first (`trial`), alone and beside each other; of an example that is not finite, or for which the loss is not
      or fails, nothing is learnt;
    - `metrics(outputs, labels) -> dict[str, float]`, over numpy arrays;
    - `preload()`: imports what its data needs, once for all workers;
    - `features_shape` and `label_dtype`, as `(9,)` and `"int64"`: what a row looks like. Before a party is charged
      the task is tried on public rows; of one that does not say it they look as the party's own did when it was last
      found ready.
    """

    @property
    def name(self) -> str:
        """The short name under which it is registered."""
        ...

    def build_model(self, seed: int) -> torch.nn.Module:
        """A fresh float32 model; the same seed gives the same parameters."""
        ...

    def load_data(self, options: Options) -> Dataset:
        """The rows that one party trains on.

        Raises:
            ConfigError: an option is unknown or cannot be used.
        """
        ...


def find_task(name: str) -> Task:
    """The task registered under a short name: the built-in ones first, then the entry points in `sotto.tasks`.

    Raises:
        NotFoundError: none has this name; the message lists those there are.
        TaskError: its package cannot be imported, or the task not be made, whatever it does instead; or several
            packages have one of this name. `private` says what was raised. Nothing of the package is left imported, so
            that what is mended is found.
    """
    point = None if name in BUILT_IN else entry_of(name)
    if name not in BUILT_IN and point is None:
        raise NotFoundError(f"no task is called {name!r}; known: {', '.join(known_tasks())}")
    if len(others := packages_of(name)) > 1:
        text = f"several packages have a task of this name: {', '.join(others)}; one of them has to go"
        raise task_error(TaskProblem.TASK_IMPORT_FAILED, task=name, private=text)
    before = set(sys.modules)
    try:
        if point is None:
            module, attribute = BUILT_IN[name]
            return cast(Task, getattr(import_module(module, __package__), attribute)())
        return cast(Task, point.load()())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may raise anything as it is imported, and end its process
        if point is not None:
            _forget(point.value.partition(":")[0].partition(".")[0], before)
        text = f"{type(error).__name__}: {brief(error, _SHOWN_CHARACTERS)}"
        raise task_error(
            TaskProblem.TASK_IMPORT_FAILED, task=name, place=place_in(name, error), private=text
        ) from error


def _forget(package: str, before: set[str]) -> None:
    """Modules of a package that were imported since `before`: half of a package is of no use to the next who asks."""
    for module in [each for each in sys.modules if each not in before and each.partition(".")[0] == package]:
        del sys.modules[module]
    invalidate_caches()


def check_options(options: Options, *, known: tuple[str, ...], task: str) -> None:
    """Refuse options that a task does not know.

    Raises:
        ConfigError: with one problem for each unknown key.
    """
    allowed = ", ".join(sorted(known))
    unknown = sorted(set(options) - set(known))
    problems = tuple(f"{key}: not an option of task {task!r}; known: {allowed}" for key in unknown)
    if problems:
        raise ConfigError(f"task {task!r} was given options that it does not know", problems=problems)


def chosen_options(own: Options, asked: Options, *, task: str, owner: str, key: str) -> dict[str, object]:
    """The options with which an owner's data is loaded: their own; where one is null, the job's.

    Args:
        own: of the owner's configuration.
        asked: what a job sets, which comes from whoever may submit one.
        owner: in words, for the message.
        key: of the configuration, where `own` stands.

    Raises:
        PolicyError: the job sets an option that the owner has not left open: data is chosen by its owner.
    """
    closed = sorted(name for name, value in asked.items() if name not in own or own[name] not in (None, value))
    if closed:
        raise PolicyError(
            f"the job sets options of task {task!r} that {owner} has not left open: {', '.join(closed)} "
            f"({key}: null leaves one to the job)"
        )
    merged = {name: asked.get(name) if value is None else value for name, value in own.items()}
    return {name: value for name, value in merged.items() if value is not None}


def holdout_of(task: Task, options: Options) -> Dataset | None:
    """The task's public rows, or None where it has none, or returns none: then a job says "not evaluated".

    Raises:
        InvalidInput: one of them is not finite, or labels are no numbers.
    """
    load = getattr(task, "load_holdout", None)
    rows = None if load is None else cast(Dataset | None, load(options))
    if rows is None:
        return None
    if wrong := wrong_dtype(rows.labels.dtype):
        raise InvalidInput(wrong)
    rows.require_finite()
    return rows


def loss_of(task: Task) -> Loss:
    """The task's own per-example loss, or `default_loss`."""
    return cast(Loss, getattr(task, "loss", default_loss))


def loss_for(task: Task, model: torch.nn.Module, rows: Dataset) -> Loss:
    """`loss_of`, for a model and rows like these.

    Raises:
        InvalidInput: a regression, for all that is known (one output, labels that are floats), and no loss of the
            task's own: the default one is for classes. Decided by the dtype that the task says labels have, else by
            that which they have, and by no label.
    """
    stated = stated_label_dtype(task)
    return _no_regression(task, model, rows.features.shape[1:], rows.labels.dtype if stated is None else stated)


def loss_as_stated(task: Task, model: torch.nn.Module, shape: tuple[int, ...]) -> Loss:
    """`loss_for`, before anything is charged: by the dtype that the task says labels have, and by that of no row.

    Args:
        shape: of one row's features.

    Raises:
        InvalidInput: as `loss_for`.
    """
    return _no_regression(task, model, shape, stated_label_dtype(task))


def stated_label_dtype(task: Task) -> np.dtype[Any] | None:
    """What a task says its labels are (`label_dtype`); None where it says nothing, or what is no dtype."""
    stated = getattr(task, "label_dtype", None)
    if stated is None:  # which numpy takes for float64
        return None
    try:
        dtype: np.dtype[Any] = np.dtype(stated)
    except (TypeError, ValueError):
        return None
    return dtype


def _no_regression(task: Task, model: torch.nn.Module, shape: tuple[int, ...], dtype: np.dtype[Any] | None) -> Loss:
    loss = loss_of(task)
    if loss is default_loss and dtype is not None and dtype.kind == "f" and _has_one_output(model, shape):
        raise InvalidInput(NO_REGRESSION, problem=TaskProblem.LOSS_MISSING.value)
    return loss


def _has_one_output(model: torch.nn.Module, shape: tuple[int, ...]) -> bool:
    """Of a blank row; where the model takes none, somebody else says why."""
    import torch

    working = copy.deepcopy(model).double().eval()
    with torch.no_grad(), contextlib.suppress(Exception):
        outputs = working(torch.zeros((1, *shape), dtype=torch.float64))
        return isinstance(outputs, torch.Tensor) and _is_one(outputs)
    return False


def metrics_of(task: Task) -> Metrics:
    """The task's own metrics, or `evaluation.default_metrics`."""
    own = getattr(task, "metrics", None)
    if own is not None:
        return cast(Metrics, own)
    from .evaluation import default_metrics

    return default_metrics


def default_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of logits for one output, cross entropy for several; shape (n,), in nats.

    NaN for a label that is no class of these outputs (0 or 1 of one output, 0 to k − 1 of k): such an example is passed
    over, where an error would tell of it.

    Args:
        outputs: logits, shape (n,), (n, 1) or (n, k).
        labels: shape (n,); floats that are whole numbers are classes too.

    Raises:
        InvalidInput: outputs are others.
    """
    import torch
    from torch.nn import functional

    known = is_class(labels, classes_of(outputs))
    wanted = torch.where(known, labels, 0)
    if _is_one(outputs):
        logits = outputs.reshape(len(outputs))
        losses = functional.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
    else:
        losses = functional.cross_entropy(outputs, wanted.long(), reduction="none")
    return torch.where(known, losses, torch.nan)


def classes_of(outputs: object) -> int:
    """How many classes the default loss knows of logits of shape (n,), (n, 1) or (n, k): 2 of one output, or k.

    Raises:
        InvalidInput: outputs are others; says what they are.
    """
    import torch

    if not isinstance(outputs, torch.Tensor):
        raise InvalidInput(
            f"the default loss takes logits, one tensor; the model returns a {type(outputs).__name__}: let it return "
            "the logits alone, or give the task a loss of its own"
        )
    if _is_one(outputs):
        return 2
    if outputs.ndim != 2:
        raise InvalidInput(
            f"the default loss takes logits of shape (n,), (n, 1) or (n, k); of {len(outputs) if outputs.ndim else 1} "
            f"rows the model returns shape {tuple(outputs.shape)}"
        )
    return outputs.shape[1]


def _is_one(outputs: torch.Tensor) -> bool:
    """Whether there is one output for each row."""
    return outputs.ndim > 0 and math.prod(outputs.shape[1:]) == 1
