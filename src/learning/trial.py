"""A model and its loss, tried on public rows before a private one is looked at: is a row's gradient its own affair?

What is computed of a row must depend on that row alone: not on the rows beside it, not on what was computed before, not
on chance. In training each row is computed by itself (`per_example`), so that rows beside it cost nobody their privacy;
but a loss that standardises by the batch, or a model that drops the axis of rows, learns something else than its author
believes, and is refused here, with the line where that can be found. What a task *keeps* of a row would reach the next
one even so: it is refused where it is found (`kept`). A task that hides what it keeps is not found: it is code that its
party trusts with the rows themselves.

Rows and parameters are public numbers: what an aggregator sends has no say in what is found.
"""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..errors import InvalidInput
from ..protocol.faults import PLACE, TaskProblem
from .kept import changed, state_of
from .labels import wrong_dtype
from .layers import another_dtype, refuse_layers, without_chance, without_memory
from .public_draws import public_normals, public_uniforms
from .task import Loss

COMPANIES: Final = (2, 3, 5)
"""Rows beside each other: an even number, odd ones, and more than one axis of a small model could be taken for."""

TOLERANCE: Final = 1e-6
"""Relative, between what is computed of a row alone and in company: ten digits above what float64 rounds off, and far
below what mixing rows does."""

_ROWS: Final = max(COMPANIES)
_KINDS: Final = ("normal", "whole", "positive", "above", "binary", "blank")
"""What public rows are: features and labels any numbers (labels that are whole stay so); for a loss that takes no
fractions, whole labels; for a logarithm or a root, positive features, and positive labels as well; for a model that
takes no fractions, features of zeros and ones; for one that takes not even these, zeros alone."""


@dataclass(frozen=True, slots=True)
class PublicRow:
    """A row that is nobody's, on which loss and gradient can be computed.

    Attributes:
        features: float64, shape (1, …).
        labels: shape (1,).
    """

    features: torch.Tensor
    labels: torch.Tensor


def try_out(
    model: torch.nn.Module,
    loss: Loss,
    parameters: Sequence[torch.nn.Parameter],
    *,
    shape: tuple[int, ...],
    label_dtype: np.dtype[Any],
) -> PublicRow:
    """Compute public rows alone and beside others, and refuse a model or loss for which that is not the same.

    Args:
        model: float64, in training mode; it is left as it was.
        loss: one loss for each example, shape (n,).
        parameters: that are trained; set to public numbers meanwhile.
        shape: of one row's features.
        label_dtype: of labels as the data set has them.

    Returns:
        A row of those that were computed.

    Raises:
        InvalidInput: a row's loss or gradient depends on others, on chance or on what was computed before; or none can
            be computed. Says where in the task's code, if that can be found. All it says is of public rows.
    """
    if wrong := wrong_dtype(label_dtype):
        raise _refusal(TaskProblem.LABELS_NOT_NUMBERS, wrong)
    refuse_layers(model)
    if not parameters:
        raise _refusal(TaskProblem.NOT_COMPUTABLE, "this model has no parameter that is trained (requires_grad)")
    trial = _Trial(model, loss, parameters)
    failed: Exception | None = None
    for own in (False, True):  # public parameters; the model's own, if nothing can be computed with those
        with trial.parameters(own=own):
            for kind in _KINDS:
                rows = _public_rows(kind, shape, label_dtype)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # what torch has to say of one row says the error, if any
                        works = trial.run(rows)
                    if works:
                        trial.keeps_nothing(shape, label_dtype)
                        return PublicRow(rows[0][:1].clone(), rows[1][:1].clone())
                except InvalidInput:
                    raise
                except Exception as error:  # of the task's own code, which may raise anything
                    failed = error
    if failed is None:
        raise _refusal(TaskProblem.NOT_COMPUTABLE, "no loss of this model is a finite number, on public rows")
    raise _refusal(
        trial.why_not(shape),
        f"model and loss cannot be computed in float64, on public rows with features of shape {shape}: "
        f"{type(failed).__name__}: {failed}",
        where=_raised_at(failed),
        advice=another_dtype(failed),
    ) from failed


def checked_losses(losses: torch.Tensor, examples: int) -> torch.Tensor:
    """`losses` as they are; InvalidInput unless there is one for each example, shape (examples,)."""
    # A mean over the batch would make every clipped gradient a function of the other examples.
    if losses.shape != (examples,):
        raise _refusal(
            TaskProblem.LOSS_NOT_PER_EXAMPLE,
            f"a task's loss returns one value for each example, shape (n,), with no reduction; of {examples} it "
            f"returned shape {tuple(losses.shape)}",
        )
    return losses


def _refusal(problem: TaskProblem, text: str, *, where: str = "", advice: str = "") -> InvalidInput:
    """What is refused, in words for the task's author; and in its metadata what others may hear of it.

    Args:
        where: " (file.py:12)", as the functions below find it; text of the task's own is never searched for a place.
    """
    found = PLACE.search(where)
    return InvalidInput(f"{text}{where}{advice}", problem=problem.value, place=found[0] if found else "")


class _Trial:
    """One model, one loss."""

    def __init__(self, model: torch.nn.Module, loss: Loss, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._model, self._loss, self._parameters = model, loss, parameters

    @contextlib.contextmanager
    def parameters(self, *, own: bool) -> Iterator[None]:
        """Parameters are public numbers inside, or (`own`) what they are; afterwards what they were."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        try:
            if not own:
                for number, parameter in enumerate(self._parameters):
                    _set(parameter, number)
            yield
        finally:
            for parameter, values in zip(self._parameters, before, strict=True):
                _put(parameter, values)

    def run(self, rows: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether a loss and gradient of these rows are finite, and can be compared; raises InvalidInput for what
        differs, and what the task raises if no row can be computed by itself."""
        with self._nothing_drawn(), self._nothing_kept():
            alone = self._alone(rows)
            again = self._of(rows, [0])
        if not all(map(_is_finite, alone)):
            self._never_finite_alone(rows)
            return False
        if not all(torch.equal(*pair) for pair in zip(alone[0], again, strict=True)):
            raise _refusal(
                TaskProblem.RANDOM_DRAWN,
                "DP-SGD cannot train this model: of the same row something else is computed the second time; it draws "
                "random numbers, or keeps something of the rows before it",
                where=self._somewhere(),
            )
        for count in COMPANIES:
            self._compare(rows, count, alone)
        return True

    def keeps_nothing(self, shape: tuple[int, ...], label_dtype: np.dtype[Any]) -> None:
        """Refuses a model or loss that holds, once other rows were computed, something else than before; what is made
        once, with the first row of all, may stay."""
        before = state_of(model=self._model, loss=self._loss)
        for kind in _KINDS:
            rows = _public_rows(kind, shape, label_dtype, others=True)
            for row in range(_ROWS):
                with contextlib.suppress(Exception, SystemExit):  # a label that is none of this task's, say
                    self._of(rows, [row])
        found = changed(before, state_of(model=self._model, loss=self._loss))
        if found:
            raise _refusal(
                TaskProblem.STATE_KEPT,
                "DP-SGD cannot train this model: it keeps something of the rows that it computes, which the next row "
                f"would meet ({', '.join(found[:3])})",
                where=self._somewhere(),
            )

    def why_not(self, shape: tuple[int, ...]) -> TaskProblem:
        """Of what cannot be computed of any row: the shape of its features, if the model already stops at it."""
        for kind in _KINDS:
            features, _ = _public_rows(kind, shape, np.dtype(np.int64))
            try:
                with torch.no_grad():
                    self._model(features[:1])
            except (RuntimeError, ValueError, IndexError) as error:
                if "scalar type" in str(error):  # it is the dtype
                    return TaskProblem.NOT_COMPUTABLE
            except Exception:
                return TaskProblem.NOT_COMPUTABLE
            else:
                return TaskProblem.NOT_COMPUTABLE
        return TaskProblem.SHAPE_MISMATCH

    def _never_finite_alone(self, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Refuses what is a number for rows together and none for each by itself, as a deviation over the batch is."""
        everybody = list(range(_ROWS))
        try:
            together = self._of(rows, everybody)
        except Exception:
            return
        if _is_finite(together):
            raise _refusal(
                TaskProblem.ROWS_MIXED,
                "DP-SGD cannot train this model: the loss of a row depends on the rows beside it, and is no finite "
                "number without them",
                where=self._where(rows, everybody),
            )

    def _alone(self, rows: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Loss, shape (1,), and gradient, shape (d,), of each row by itself."""
        return [self._by_itself(rows, row) for row in range(_ROWS)]

    def _by_itself(self, rows: tuple[torch.Tensor, torch.Tensor], row: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return self._of(rows, [row])
        except Exception as error:
            pair = [row, (row + 1) % _ROWS]
            try:
                self._of(rows, pair)
            except Exception:
                raise error from None
            raise _refusal(
                TaskProblem.ROWS_MIXED,
                f"a row cannot be computed by itself, though two together can: {type(error).__name__}: {error}",
                where=self._where(rows, pair),
                advice="; squeeze() without an axis, for one, drops the axis of rows where there is one row: "
                "squeeze(-1) keeps it",
            ) from error

    def _of(self, rows: tuple[torch.Tensor, torch.Tensor], which: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, shape (n,), and the gradient of their weighted sum, shape (d,), of these rows together."""
        features, labels = (each[which].clone() for each in rows)
        losses = checked_losses(self._loss(self._model(features), labels), len(which))
        found = torch.autograd.grad((_weights()[which] * losses).sum(), self._parameters, allow_unused=True)
        parts = [
            torch.zeros_like(parameter).reshape(-1) if part is None else part.reshape(-1)
            for part, parameter in zip(found, self._parameters, strict=True)
        ]
        return losses.detach(), torch.cat(parts)

    def _compare(
        self, rows: tuple[torch.Tensor, torch.Tensor], count: int, alone: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        try:
            losses, gradient = self._of(rows, list(range(count)))
        except InvalidInput:
            raise
        except Exception as error:
            raise _refusal(
                TaskProblem.ROWS_MIXED,
                f"a row can be computed by itself, but not beside others ({count} rows): {type(error).__name__}: "
                f"{error}",
                where=_raised_at(error),
                advice=f"; an axis of another length may be taken for that of the rows{self._rows_second()}",
            ) from error
        expected = torch.cat([found[0] for found in alone[:count]])
        gradients = torch.stack([found[1] for found in alone[:count]])
        reach = float(torch.linalg.vector_norm(gradients, dim=1).sum())
        off = float(torch.linalg.vector_norm(gradient - gradients.sum(dim=0)))
        same = bool(((losses - expected).abs() <= TOLERANCE * (1.0 + expected.abs())).all())
        if not same or not off <= TOLERANCE * reach:
            raise _refusal(
                TaskProblem.ROWS_MIXED,
                f"DP-SGD cannot train this model: the {'gradient' if same else 'loss'} of a row depends on the rows "
                f"beside it ({count} rows)",
                where=self._where(rows, list(range(count))),
                advice=self._rows_second(),
            )

    @contextlib.contextmanager
    def _nothing_drawn(self) -> Iterator[None]:
        """Refuses what is drawn from torch's generator inside."""
        before = torch.get_rng_state()
        yield
        drawn = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
        if drawn:
            named = without_chance(self._model)
            raise _refusal(
                TaskProblem.RANDOM_DRAWN,
                "DP-SGD cannot train this model: it draws random numbers as it computes, as dropout does",
                where=f" ({named})" if named else self._somewhere(),
            )

    @contextlib.contextmanager
    def _nothing_kept(self) -> Iterator[None]:
        """Refuses buffers that change inside, and puts them back."""
        before = {name: (value, value.clone()) for name, value in self._model.named_buffers()}
        yield
        changed = [name for name, value in self._model.named_buffers() if not _unchanged(value, before.get(name))]
        for value, kept in before.values():
            value.copy_(kept)
        if changed:
            raise _refusal(
                TaskProblem.STATE_KEPT,
                "DP-SGD cannot train this model: it keeps something of each row that it sees, as running statistics do "
                f"(buffer {', '.join(changed[:3])}): {without_memory(changed)}",
            )

    def _where(self, rows: tuple[torch.Tensor, torch.Tensor], which: list[int]) -> str:
        """The first operation of which a row's part is another one in company."""
        company, *alone = (self._trace(rows, each) for each in (which, which[:1], which[1:2]))
        for step, *own in zip_longest(company, *alone):
            if step is None or None in own:
                break
            if not all(_is_part(step[1], each[1], row, len(which)) for row, each in enumerate(own)):
                return f": {step[0]}" if step[0] else self._somewhere()
        return self._somewhere()

    def _trace(self, rows: tuple[torch.Tensor, torch.Tensor], which: list[int]) -> list[tuple[str, torch.Tensor]]:
        features, labels = (each[which].clone() for each in rows)
        with torch.no_grad(), _Steps() as steps, contextlib.suppress(Exception):  # as far as it comes
            self._loss(self._model(features), labels)
        return list(steps.seen)

    def _rows_second(self) -> str:
        """A likely reason why rows are mixed: layers for which they are the second axis."""
        named = [name for name, module in self._model.named_modules() if getattr(module, "batch_first", None) is False]
        return f"; {', '.join(named)}: rows come second unless batch_first=True" if named else ""

    def _somewhere(self) -> str:
        """Where the task's own code begins, as far as it has any: a hint where no line is known."""
        found = [_code_of(self._loss), *(_code_of(type(module).forward) for module in self._model.modules())]
        places = dict.fromkeys(_line(Path(code.co_filename), code.co_firstlineno) for code in found if code is not None)
        return f" (look at {', '.join(list(places)[:3])})" if places else ""


class _Steps(TorchFunctionMode):
    """Notes each tensor that torch computes, and the line of the task that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((_asked_at(sys._getframe(1)), result.detach().clone()))
        return result


def _is_finite(found: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in found)


def _public_rows(
    kind: str, shape: tuple[int, ...], label_dtype: np.dtype[Any], *, others: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, float64 of shape (rows, …), and labels, shape (rows,): whole numbers 0 and 1, or any numbers.
    `others`: rows of other values, and whole numbers up to 6."""
    values, name = _ROWS * math.prod(shape), "trial/others" if others else "trial/features"
    if kind in ("normal", "whole"):
        features = public_normals(values, name)
    elif kind in ("positive", "above"):
        features = 0.5 + public_uniforms(values, name)
    else:
        features = np.round(public_uniforms(values, name)) * (kind == "binary")
    labels = np.array([5, 2, 3, 4, 1] if others else [0, 1, 1, 0, 1]) * (kind != "blank") + (kind == "above")
    if label_dtype.kind == "f":
        draws = "trial/other labels" if others else "trial/labels"
        labels = labels + (
            public_normals(_ROWS, draws)
            if kind == "normal"
            else 0.5 * public_uniforms(_ROWS, draws) * (kind == "above")
        )
    wide = np.float64 if label_dtype.kind == "f" else label_dtype
    return torch.from_numpy(features.reshape(_ROWS, *shape)), torch.from_numpy(labels.astype(wide))


def _weights() -> torch.Tensor:
    """Of each row's loss in what is differentiated, so that no two rows' gradients can stand for each other."""
    return torch.tensor([1.0, 0.5, 1.5, 0.75, 1.25], dtype=torch.float64)


def _set(parameter: torch.nn.Parameter, number: int) -> None:
    """Public numbers of a size at which nothing saturates: variance 1 over the number of inputs; about ½ where there is
    one for each unit (a bias, a scale)."""
    draws = public_normals(parameter.numel(), f"trial/parameter/{number}")
    wide = parameter.ndim > 1 and parameter.numel() > 0
    values = draws / math.sqrt(parameter.numel() / len(parameter)) if wide else 0.5 + 0.1 * draws
    _put(parameter, torch.from_numpy(values.reshape(parameter.shape)))


def _put(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def _unchanged(value: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
    return before is not None and value is before[0] and torch.equal(value, before[1])


def _is_part(together: torch.Tensor, alone: torch.Tensor, row: int, count: int) -> bool:
    """Whether what was computed of a row alone is that row's part of what was computed of all."""
    if together.shape == alone.shape:
        return _close(together, alone)
    if together.ndim != alone.ndim:
        return False
    axes = [axis for axis in range(together.ndim) if together.shape[axis] != alone.shape[axis]]
    if len(axes) != 1 or (together.shape[axes[0]], alone.shape[axes[0]]) != (count, 1):
        return False
    return _close(together.select(axes[0], row), alone.select(axes[0], 0))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _asked_at(frame: FrameType | None) -> str:
    """The innermost line of the task's own code on the stack; empty where there is none."""
    while frame is not None:
        if _is_the_tasks(Path(frame.f_code.co_filename)):
            return _line(Path(frame.f_code.co_filename), frame.f_lineno)
        frame = frame.f_back
    return ""


def _raised_at(error: BaseException) -> str:
    """ " (file:line)" of the task's own code from which it was raised, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_the_tasks(Path(frame.filename)):
            return f" ({_line(Path(frame.filename), frame.lineno or 0)})"
    return ""


def _code_of(function: Any) -> CodeType | None:
    """Of a function of the task's own; None of any other."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code if isinstance(code, CodeType) and _is_the_tasks(Path(code.co_filename)) else None


def _is_the_tasks(file: Path) -> bool:
    """Whether a file is neither torch's, nor one of ours, nor made up."""
    libraries = (Path(torch.__file__).parent, Path(np.__file__).parent)
    ours = Path(__file__).parents[1] in file.parents and file.parent != Path(__file__).parent / "tasks"
    return file.suffix == ".py" and not ours and not any(library in file.parents for library in libraries)


def _line(file: Path, number: int) -> str:
    return f"{file.name}:{number}"
