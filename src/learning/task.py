"""What a learning task is, and how one is found by its short name.

A task brings the model, the data and, if it likes, its own loss and metrics. Sotto's demonstration is written against
this protocol, and so are tasks of your own: put a class in a package, give it an entry point in the group
`sotto.tasks`, install the package where the parties and the aggregator run. Only registered short names are ever
looked up: nothing that comes over the wire is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InvalidInput, NotFoundError, PolicyError

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP: Final = "sotto.tasks"
BUILT_IN: Final[Mapping[str, tuple[str, str]]] = {"randhie": (".tasks.randhie", "RandHieTask")}
"""Short name → (module relative to this package, class): found without an installed distribution too."""

Options = Mapping[str, object]
Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
Metrics = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train or evaluate on; one row is one example.

    Attributes:
        features: float32, shape (n, …): the first axis counts the rows.
        labels: shape (n,): whole numbers for classes, floats for anything else.
        description: public text on what the rows are; no count or statistic of private rows.

    A row that is not finite is a row: to refuse it here would tell others of it, by a party that does not contribute.

    Raises:
        InvalidInput: the shapes or dtypes are others.
    """

    features: NDArray[np.float32]
    labels: NDArray[Any]
    description: str

    def __post_init__(self) -> None:
        if self.features.dtype != np.float32 or self.features.ndim < 2:
            raise InvalidInput("features are float32 with at least two axes, rows first")
        if self.labels.shape != self.features.shape[:1]:
            raise InvalidInput("there is one label for each row of features")

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


class Task(Protocol):
    """What every task brings.

    It may bring more, found by `holdout_of`, `loss_of`, `metrics_of` and `warm`:

    - `load_holdout(options) -> Dataset`: public rows on which the aggregator evaluates;
    - `loss(outputs, labels) -> Tensor` of shape (n,): one loss for each example, never their mean, since DP-SGD clips
      each example's gradient by itself. Model and loss are computed in float64, one row at a time, and tried on public
      rows first (`trial`), alone and beside each other; of an example that is not finite, or for which the loss is not
      or fails, nothing is learnt;
    - `metrics(outputs, labels) -> dict[str, float]`, over numpy arrays;
    - `preload()`: imports what its data needs, once for all workers.
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
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        return cast(Task, getattr(import_module(module, __package__), attribute)())
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return cast(Task, point.load()())
    raise NotFoundError(f"no task is called {name!r}; known: {', '.join(known_tasks())}")


def known_tasks() -> tuple[str, ...]:
    """Every registered short name, sorted."""
    return tuple(sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


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
    """The task's public rows, or None where it has none: then a job says "not evaluated".

    Raises:
        InvalidInput: one of them is not finite.
    """
    load = getattr(task, "load_holdout", None)
    if load is None:
        return None
    rows = cast(Dataset, load(options))
    rows.require_finite()
    return rows


def loss_of(task: Task) -> Loss:
    """The task's own per-example loss, or `default_loss`."""
    return cast(Loss, getattr(task, "loss", default_loss))


def metrics_of(task: Task) -> Metrics:
    """The task's own metrics, or `evaluation.default_metrics`."""
    own = getattr(task, "metrics", None)
    if own is not None:
        return cast(Metrics, own)
    from .evaluation import default_metrics

    return default_metrics


def default_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of logits for one output, cross entropy for several; shape (n,), in nats.

    NaN for a label that is no class of these outputs: such an example is passed over, where an error would tell of it.
    """
    import torch
    from torch.nn import functional

    if outputs.ndim == 1 or outputs.shape[-1] == 1:
        logits = outputs.reshape(len(outputs))
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    classes = labels.long()
    known = (classes >= 0) & (classes < outputs.shape[-1])
    losses = functional.cross_entropy(outputs, torch.where(known, classes, 0), reduction="none")
    return torch.where(known, losses, torch.nan)
