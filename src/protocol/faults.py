"""What may be said to others of a task that cannot be trained at a party: classes of a closed list.

Each depends on the task's code, on a plan and on public rows, never on a row of the party's own. What does depend on
those has one class, `DATA_NOT_READY`, that says no more than that. Beside a class goes a place in the task's file at
most: never the text of an exception that a task or a library raised, which may quote a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ..errors import TaskError


class TaskProblem(StrEnum):
    """Why a task cannot be trained, as the wire has it."""

    CHECKING = "CHECKING"
    TASK_NOT_LISTED = "TASK_NOT_LISTED"
    TASK_NOT_INSTALLED = "TASK_NOT_INSTALLED"
    TASK_IMPORT_FAILED = "TASK_IMPORT_FAILED"
    MODEL_NOT_BUILT = "MODEL_NOT_BUILT"
    MODEL_DOES_NOT_FIT_PLAN = "MODEL_DOES_NOT_FIT_PLAN"
    NOT_TRAINED_STATE_DIFFERS = "NOT_TRAINED_STATE_DIFFERS"
    LAYER_REFUSED = "LAYER_REFUSED"
    LOSS_NOT_PER_EXAMPLE = "LOSS_NOT_PER_EXAMPLE"
    ROWS_MIXED = "ROWS_MIXED"
    RANDOM_DRAWN = "RANDOM_DRAWN"
    STATE_KEPT = "STATE_KEPT"
    LOSS_MISSING = "LOSS_MISSING"
    LABELS_NOT_NUMBERS = "LABELS_NOT_NUMBERS"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    NOT_COMPUTABLE = "NOT_COMPUTABLE"
    TRIAL_DIED = "TRIAL_DIED"
    DATA_NOT_READY = "DATA_NOT_READY"


SENTENCES: Final[Mapping[TaskProblem, str]] = {
    TaskProblem.CHECKING: "it is still being checked",
    TaskProblem.TASK_NOT_LISTED: "the task is not among its datasets",
    TaskProblem.TASK_NOT_INSTALLED: "the task is not installed",
    TaskProblem.TASK_IMPORT_FAILED: "the task's package cannot be imported",
    TaskProblem.MODEL_NOT_BUILT: "the task's model cannot be built",
    TaskProblem.MODEL_DOES_NOT_FIT_PLAN: "the task's model has other parameters than the plan's (another version?)",
    TaskProblem.NOT_TRAINED_STATE_DIFFERS: (
        "what is not trained of the task's model (frozen layers, buffers) differs from the plan's: another version of "
        "the task or of a library, or a file of weights that is another here"
    ),
    TaskProblem.LAYER_REFUSED: "the model has a layer that DP-SGD cannot train",
    TaskProblem.LOSS_NOT_PER_EXAMPLE: "the task's loss does not give one value for each example",
    TaskProblem.ROWS_MIXED: "model or loss mix the rows of a batch",
    TaskProblem.RANDOM_DRAWN: "the model draws random numbers as it computes, as dropout does",
    TaskProblem.STATE_KEPT: "model or loss keep something of a row for the next",
    TaskProblem.LOSS_MISSING: "the task says that its labels are floats, a regression, and has no loss of its own",
    TaskProblem.LABELS_NOT_NUMBERS: "labels are no numbers",
    TaskProblem.SHAPE_MISMATCH: "the model does not take features of this shape",
    TaskProblem.NOT_COMPUTABLE: "model and loss cannot be computed on public rows",
    TaskProblem.TRIAL_DIED: "trying the model on public rows ended its process, or took too long",
    TaskProblem.DATA_NOT_READY: "its data is not ready",
}
"""What each class says, of a party or of its task: for everybody to read."""

_PASSING: Final = frozenset({TaskProblem.CHECKING, TaskProblem.DATA_NOT_READY, TaskProblem.TRIAL_DIED})
_BY_NAME: Final = {problem.value: text for problem, text in SENTENCES.items()}

PLACE: Final = re.compile(r"[^\W\d][\w.-]{0,99}\.py:[1-9][0-9]{0,6}")
"""Of a line in a task's file: "triage.py:17". The file's name alone; no path, which may name a person."""


@dataclass(frozen=True, slots=True)
class TaskStanding:
    """How it stands with a task where it is installed.

    Attributes:
        digest: of its code (`learning.installed.code_digest`); empty where none is found.
        ready: whether it can be trained on.
        problem: why not; a class of `TaskProblem`, or of a later version's.
        place: of some classes, "file.py:line".
    """

    digest: str
    ready: bool
    problem: str = ""
    place: str = ""

    @property
    def not_ready(self) -> bool:
        """Whether it is known that it cannot be trained on: not while that is being found out."""
        return not self.ready and self.problem != TaskProblem.CHECKING

    @property
    def why_not(self) -> str:
        """In words; empty where it can be."""
        return "" if self.ready else sentence(self.problem, self.place)


def sentence(problem: str, place: str = "") -> str:
    """A class in words, with the place; of a class of a later version that its party is not ready."""
    known = _BY_NAME.get(problem, "it is not ready")
    return f"{known} ({place})" if place else known


def task_error(problem: TaskProblem, *, task: str, place: str = "", private: str = "") -> TaskError:
    """The error by which everybody hears of a problem. `private`: for the owner's log alone."""
    problem_name, place = checked(problem, place)
    return TaskError(told(problem_name, place, task=task), private=private, problem=problem_name, place=place)


def checked(problem: str, place: str) -> tuple[str, str]:
    """Class and place as another role told them: each empty unless it is of the closed form."""
    return problem if problem in _BY_NAME else "", place if PLACE.fullmatch(place) else ""


def told(problem: str, place: str, *, task: str) -> str:
    """What is said of a party whose class and place these are."""
    return f"task {task} cannot be trained here: {sentence(problem, place)}"


def lasts(problem: str) -> bool:
    """Whether every further round of a job meets it too: it is of the code, which stays, and not of a moment."""
    return problem in _BY_NAME and problem not in _PASSING
