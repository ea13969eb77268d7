"""Whether a party's task can be trained on: found out before a job asks, and before anything is charged for it.

In two steps. The first touches no data: the package is imported, the model built, and model and loss are tried on
public rows, of a shape that the model itself suggests. What it finds may be told to others. The second loads the rows,
and tries model and loss on public rows that look like them; that it fails is all that others hear of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ..errors import InvalidInput, NotFoundError, TaskError
from ..logs import muted, type_and_place
from ..protocol.faults import SENTENCES, TaskProblem, sentence, task_error
from ..text import brief
from .installed import is_place_of, place_in
from .loading import CHECK_DATA, starting_from, why_not_loaded
from .row_kind import RowKind, declared_by, wrongly_declared
from .task import Dataset, Options, Task, find_task, loss_as_stated, loss_for

_SEED: Final = 0
"""Of the model that is tried: a job brings its own."""
_LABELS: Final = ("int64", "float64")
_FOUND_WITHOUT_ROWS: Final = frozenset(
    {
        TaskProblem.ROWS_MIXED,
        TaskProblem.RANDOM_DRAWN,
        TaskProblem.STATE_KEPT,
        TaskProblem.LOSS_NOT_PER_EXAMPLE,
        TaskProblem.LOSS_MISSING,
    }
)
"""Refusals that do not depend on how a row looks, if all that were tried agree."""
_SHOWN: Final = 500
"""Characters of what a task's code raised, in the owner's log."""


@muted()
def check_code(name: str) -> tuple[TaskError | None, RowKind | None]:
    """Import a task and build its model, and try both without data.

    Returns:
        What there is to say to others if the rows do not go with it, None where nothing is; and what the task says that
        a row looks like.

    Raises:
        TaskError: it is not installed, cannot be imported or built, has a layer that cannot be trained, says of its
            rows what no row is, or says that it is a regression and has no loss of its own.
    """
    try:
        task = find_task(name)
    except NotFoundError as error:
        raise task_error(TaskProblem.TASK_NOT_INSTALLED, task=name, private=error.message) from error
    found = [_refused_without_rows(name, task, labels) for labels in _LABELS]
    for each in found:
        if each is not None and each.metadata["problem"] == TaskProblem.LAYER_REFUSED:
            raise each
    if wrong := wrongly_declared(task):
        raise task_error(TaskProblem.NOT_COMPUTABLE, task=name, private=wrong)
    declared = declared_by(task)
    if declared is not None:
        try:
            loss_as_stated(task, _model(name, task), declared.shape)
        except InvalidInput as error:
            raise _told(name, error) from None
    problems = {None if each is None else each.metadata["problem"] for each in found}
    return found[0] if len(problems) == 1 and problems <= _FOUND_WITHOUT_ROWS else None, declared


@muted()
def check_rows(name: str, options: Options, *, directory: str) -> RowKind:
    """Load a party's rows, and try model and loss on public rows that look like them.

    Returns:
        What a row looks like. Trials of jobs go by it where the task says nothing of it, and load none.

    Raises:
        TaskError: DATA_NOT_READY, whatever it is; `private` says more, and of no row.
    """
    try:
        task = find_task(name)
    except TaskError as error:
        raise _not_ready(name, f"the task cannot be made: {_where(error)}") from None
    return check_loaded(name, task, load(name, task, options, directory=directory))


def load(name: str, task: Task, options: Options, *, directory: str | Path) -> Dataset:
    """A task's rows. Raises TaskError as `check_rows`."""
    try:
        with starting_from(directory):
            rows: object = task.load_data(options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of the task's own code, which may raise anything
        why = why_not_loaded(error, task=name, options=options, directory=directory)
        raise _not_ready(name, why) from None
    if not isinstance(rows, Dataset):
        raise _not_ready(name, "load_data returns no sotto.learning.task.Dataset")
    return rows


def check_loaded(name: str, task: Task, rows: Dataset) -> RowKind:
    """Try model and loss on public rows that look like these; what they look like. Raises TaskError as `check_rows`."""
    if wrong := wrongly_declared(task):
        raise _not_ready(name, wrong)
    kind, declared = RowKind.of(rows), declared_by(task)
    if declared is not None and declared.shape != kind.shape:
        raise _not_ready(name, f"a row's features have shape {kind.shape}, and features_shape says {declared.shape}")
    try:
        loss_for(task, _model(name, task), rows)
        refused = _refused(name, task, kind, found=True)
    except InvalidInput as error:  # a regression without a loss: its text is ours, and goes by dtypes alone
        raise _not_ready(name, error.message) from None
    except TaskError as error:  # the model was built without rows before: it is another one once the task has seen them
        raise _not_ready(name, f"the model cannot be built once the rows are loaded: {_where(error)}") from None
    if refused is not None:  # without its text: a task that has seen rows may quote one
        why = sentence(refused.metadata["problem"], refused.metadata["place"])
        raise _not_ready(name, f"{why}, with features of shape {kind.shape}; {CHECK_DATA}")
    return kind


def _where(error: TaskError) -> str:
    """What was raised and where, without its text, which may quote a row."""
    cause = error.__cause__
    return type_and_place(cause) if cause is not None else type(error).__name__


def _not_ready(name: str, why: str) -> TaskError:
    return task_error(TaskProblem.DATA_NOT_READY, task=name, private=why)


def _refused_without_rows(name: str, task: Task, labels: str) -> TaskError | None:
    import torch

    model = _model(name, task)
    first = next((each for each in model.modules() if isinstance(each, torch.nn.Linear)), None)
    return _refused(name, task, RowKind((1,) if first is None else (first.in_features,), labels), found=False)


def _refused(name: str, task: Task, kind: RowKind, *, found: bool) -> TaskError | None:
    """What the trial on public rows of this kind refuses; `found`: as of `trying.compute_as`."""
    from .trying import compute_as

    model = _model(name, task)
    try:
        compute_as(task, model, kind, found=found)
    except InvalidInput as error:
        return _told(name, error)
    return None


def _told(name: str, error: InvalidInput) -> TaskError:
    """A refusal by its class; its own words, where they quote dtypes of labels, are left out."""
    said = error.metadata.get("problem", "")  # a task may raise such an error itself
    problem = TaskProblem(said) if said in SENTENCES else TaskProblem.NOT_COMPUTABLE
    text = SENTENCES[problem] if problem is TaskProblem.LABELS_NOT_NUMBERS else error.message
    place = error.metadata.get("place", "")
    return task_error(problem, task=name, place=place if is_place_of(name, place) else "", private=text)


def _model(name: str, task: Task) -> Any:
    from .whole import check_copied, check_model

    try:
        model = task.build_model(_SEED)
        check_model(model)
        check_copied(model)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # likewise
        text = error.message if isinstance(error, InvalidInput) else f"{type(error).__name__}: {brief(error, _SHOWN)}"
        raise task_error(TaskProblem.MODEL_NOT_BUILT, task=name, place=place_in(name, error), private=text) from error
    return model
