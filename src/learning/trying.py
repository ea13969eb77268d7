"""A task's model, built and tried on public rows as training would begin with it."""

from __future__ import annotations

import copy

import numpy as np
import torch

from ..errors import InvalidInput
from ..protocol.faults import TaskProblem
from .layers import refuse_layers
from .row_kind import RowKind, declared_by
from .task import Task, loss_as_stated
from .trial import try_out


def compute(task: Task, model: torch.nn.Module, rows: RowKind | None) -> None:
    """Try a model and the task's loss on public rows, in float64 and training mode.

    Args:
        rows: what a row looks like where the task does not say it; None: nobody knows, and the layers alone are looked
            at.

    Raises:
        InvalidInput: as `compute_as`.
    """
    declared = declared_by(task)
    looks = declared or rows
    if looks is None:
        refuse_layers(model)
        return
    compute_as(task, model, looks, found=declared is None)


def compute_as(task: Task, model: torch.nn.Module, kind: RowKind, *, found: bool) -> None:
    """`compute`, on public rows of this kind, whatever the task says of its own.

    Args:
        found: whether rows were found to look so. Labels that are floats are then tried as whole numbers too where
            nothing can be computed with floats: a single missing one makes floats of all, and what is found must not
            tell of it.

    Raises:
        InvalidInput: as `task.loss_as_stated` and `trial.try_out`.
    """
    try:
        _try(task, model, kind.shape, kind.label_dtype)
    except InvalidInput as error:
        floats = found and kind.label_dtype.kind == "f"
        if not floats or error.metadata.get("problem") != TaskProblem.NOT_COMPUTABLE:
            raise
        _try(task, model, kind.shape, np.dtype(np.int64))


def _try(task: Task, model: torch.nn.Module, shape: tuple[int, ...], label_dtype: np.dtype[np.generic]) -> None:
    working = copy.deepcopy(model).double().train()
    trained = [parameter for parameter in working.parameters() if parameter.requires_grad]
    try_out(working, loss_as_stated(task, model, shape), trained, shape=shape, label_dtype=label_dtype)
