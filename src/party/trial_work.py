"""The unit of work by which a party tries a task before anything is charged: it computes public rows, and sees no
other.

It runs in a worker that has computed nothing before, is given none of the dataset's options, and gives up all files but
what runs it, where the kernel lets it (`confinement`). So what it finds depends on the task's code, the plan and public
numbers alone, and its class may be told to others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..confinement import code, confine
from ..errors import InvalidInput, NotFoundError, SottoError, StateError, TaskError
from ..jobs.executors.units import WorkContext
from ..learning.flatten import flatten, load_tensors
from ..learning.installed import is_place_of, place_in
from ..learning.model_file import parameters_of
from ..learning.row_kind import RowKind
from ..logs import muted, type_and_place
from ..protocol.faults import SENTENCES, TaskProblem
from ..protocol.plan import RoundPlan
from ..protocol.units import Params, unit_plan
from ..text import brief

_SHOWN_CHARACTERS: Final = 900
"""Of what was found, for the owner's log: as much as one of its fields has room for."""
FINE: Final = {"problem": "", "place": "", "detail": ""}


def try_task(params: Params, context: WorkContext) -> dict[str, Any]:
    """{plan, rows} → {problem, place, detail, confined}: `problem` is a class of `protocol.faults`, or empty.

    `rows` is what a row looks like (`RowKind`), or null where nobody knows: then of a task that does not say it itself
    the model alone is looked at. `detail` is for the owner's log: where the process could not be confined it quotes
    nothing that the task or a library raised.
    """
    if not context.untouched:
        raise StateError("a task is tried in a worker of its own")
    plan = unit_plan(params)
    model = context.blobs.read(plan.model_sha256)
    rows = RowKind.from_json(params["rows"]) if params["rows"] else None
    from ..learning import trying  # noqa: F401  not first once the process may read no more

    confined = confine(readable=code(), writable=[context.workspace])
    tempfile.tempdir = str(context.workspace)
    found = dict(FINE)
    with muted():
        try:
            _try(plan, model, rows)
        except _Found as why:
            detail = why.said if confined else why.place_alone
            found = {"problem": why.problem.value, "place": why.place, "detail": brief(detail, _SHOWN_CHARACTERS)}
    return {**found, "confined": confined}


class _Found(Exception):
    """What keeps a task from being trained, and what was raised for it."""

    def __init__(self, problem: TaskProblem, error: BaseException, *, task: str) -> None:
        super().__init__(problem)
        known = error.metadata if isinstance(error, InvalidInput | TaskError) else {}
        missing = isinstance(error, NotFoundError) and problem is TaskProblem.TASK_IMPORT_FAILED
        ours = known.get("problem") in SENTENCES  # a task may raise such an error itself
        self.problem = TaskProblem.TASK_NOT_INSTALLED if missing else TaskProblem(known["problem"] if ours else problem)
        place = known.get("place", "") if ours else ""
        self.place = place if is_place_of(task, place) else "" if ours else place_in(task, error)
        self.said = error.message if isinstance(error, SottoError) else f"{type(error).__name__}: {brief(error, 800)}"
        self.said += f" {error.private}" if isinstance(error, TaskError) else ""
        self.place_alone = type_and_place(error)


@contextmanager
def _or(problem: TaskProblem, *, task: str) -> Iterator[None]:
    """Whatever a task's own code raises inside, an exit included, is this problem, unless it says which it is."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _Found(problem, error, task=task) from None


def _try(plan: RoundPlan, model_bytes: bytes, rows: RowKind | None) -> None:
    from ..learning.task import find_task
    from ..learning.trying import compute
    from ..learning.whole import built

    with _or(TaskProblem.TASK_IMPORT_FAILED, task=plan.task):
        task = find_task(plan.task)
    with _or(TaskProblem.MODEL_NOT_BUILT, task=plan.task):
        model = built(task, plan.seed)
    with _or(TaskProblem.MODEL_DOES_NOT_FIT_PLAN, task=plan.task):
        load_plans_model(model, model_bytes, plan)
    with _or(TaskProblem.NOT_COMPUTABLE, task=plan.task):
        compute(task, model, rows)


def load_plans_model(model: Any, data: bytes, plan: RoundPlan) -> NDArray[np.float32]:
    """Put the plan's parameters into the task's model; returns them, shape (dimension,). The trial before a charge and
    the training after it load alike.

    Raises:
        InvalidInput: they are no parameters of this model and plan, or something else is not trained.
    """
    from ..learning.whole import require_rest

    tensors = parameters_of(data)
    parameters, _ = flatten(tensors)
    if not np.isfinite(parameters).all():
        raise InvalidInput("a parameter of the plan's model is not finite", problem=TaskProblem.NOT_COMPUTABLE.value)
    load_tensors(model, tensors)
    if parameters.size != plan.dimension:
        raise InvalidInput(f"the model has {parameters.size} parameters, the plan says {plan.dimension}")
    require_rest(model, plan.not_trained)
    return parameters
