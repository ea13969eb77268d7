"""What an owner is told of the data that this party brings: when they ask, on their own screen.

A row that is not finite, or whose loss or gradient is not, or cannot be computed, counts for nothing in training, and
nobody is told while it does: neither the aggregator, by a party that does not contribute, nor a log.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..config import PartyConfig
from ..errors import SottoError, TaskError
from ..learning.installed import known_tasks
from ..learning.labels import are_classes, complaint
from ..learning.loading import needs, not_there, starting_from
from ..learning.task import Dataset, Task, find_task, finite_rows, loss_for
from .rows import read_only

MAX_NAMED: Final = 10
"""Rows that are named of each fault; whoever mends these finds the others by asking again."""

_SEED: Final = 0
"""Of the model that rows are tried on: a job brings its own."""


def check_data(config: PartyConfig) -> Iterator[tuple[str, bool]]:
    """Load each dataset of the configuration, and try the task's model on it; yields a line about it, and whether all
    of it can be trained on.

    An option that is null is left to jobs, and has the task's default here. The model has its initial parameters: of
    others, a loss may be finite where it is not here, or the other way round. Rows are named by position, from 0. The
    lines hold private facts: they are for the screen of the machine that has the data, and for no log.
    """
    for task, dataset in config.datasets.items():
        options = {key: value for key, value in dataset.options.items() if value is not None}
        with starting_from(config.directory):
            found, fine = _findings(task, options, declared=dataset.declared_rows)
        yield f"{task}: {found}", fine
    for task in sorted(set(known_tasks()) - set(config.datasets)):
        try:
            find_task(task)
        except TaskError as error:
            yield f"{task}: is installed and not listed here; {_text(error, task)}", True


def _findings(name: str, options: dict[str, Any], *, declared: int) -> tuple[str, bool]:
    try:
        task = find_task(name)
        rows = read_only(task.load_data(options))  # as in training
        finite = finite_rows(rows.features, rows.labels)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of the task's own code, which may raise anything
        missing = "; ".join(not_there(name, options, Path.cwd()))
        return f"cannot be loaded: {_text(error, name)}{missing and f' ({missing})'}", False
    known = f"{len(rows)} rows ({declared} declared)"
    if not len(rows):
        return f"{known}: there is nothing to learn from", False
    try:
        counted, classes = _counted(task, rows)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # likewise
        return f"{known} cannot be trained on: {_text(error, name)}", False
    if counted.all():
        return f"{known}: the task's model takes them, and all of them count in training", True
    no_class = finite & ~are_classes(rows.labels, classes) if classes is not None else np.zeros(len(rows), np.bool_)
    faults = {
        "a value is not finite": ~finite,
        "a label is no class of the model": no_class,
        "loss or gradient cannot be computed, or is not finite": finite & ~counted & ~no_class,
    }
    named = "; ".join(_named(fault, np.flatnonzero(which)) for fault, which in faults.items() if which.any())
    why = complaint(rows.labels, classes) if classes is not None else ""
    total = f"{np.count_nonzero(~counted)} of {known}"
    return f"{total} count for nothing in training; by position, counted from 0: {named}{why and f' ({why})'}", False


def _counted(task: Task, rows: Dataset) -> tuple[NDArray[np.bool_], int | None]:
    """Which rows count in training; and the classes that there are, where the loss is the default one."""
    from ..learning.per_example import classes_known, rows_that_count
    from ..learning.whole import built

    model = built(task, _SEED)
    loss = loss_for(task, model, rows)
    return rows_that_count(model, rows, loss=loss), classes_known(model, rows, loss=loss)


def _named(fault: str, rows: NDArray[np.intp]) -> str:
    names = ", ".join([*map(str, rows[:MAX_NAMED]), *(["…"] if len(rows) > MAX_NAMED else [])])
    return f"{fault} ({len(rows)}): {names}"


def _text(error: BaseException, task: str) -> str:
    if isinstance(error, TaskError):
        return f"{error.message}: {error.private}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return needs(task, error.name)
    return f"{type(error).__name__}: {error.message if isinstance(error, SottoError) else error}"
