"""Sums of clipped per-example gradients: what one example adds is bounded, whatever it, the model and the others hold.

A row's gradient is a function of that row and the model alone, **to the bit**: each row is computed by itself, in a
tensor of its own. In a product of many rows a processor's kernels add up a row's terms in an order that depends on
where it stands and on how many there are; weights that somebody made up turn the last bit of such a sum into the sign
of a gradient, and one row more then turns every other one's round (docs/adr/0012-rows-by-themselves.md). Nor may a
task's model or loss mix rows: `trial` finds that beforehand, on public rows, and here there is nothing to mix.

What is clipped is what is summed: norm and sum are of the same numbers, in float64, from one backward pass. Where every
trainable layer is linear and called once, a row's gradient of a layer is the outer product of its input and of the
gradient at its output, and need not be written out (Goodfellow 2015, "Efficient Per-Example Gradient Computations").

An example that is not finite itself, or whose loss or gradient is not, or cannot be computed, counts as zero: neither
a sum that is not finite nor a failure ever tells of one row. A public row is computed in its place, so that the work is
the same; subnormal numbers, for which many processors are slow, are taken for zero meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidInput
from ..privacy.clipping import MIN_NORM
from .subnormals import flushed_subnormals
from .task import Dataset, Loss, classes_of, default_loss, finite_rows
from .trial import PublicRow, checked_losses, try_out

CLIPPING_MARGIN: Final = 1.0 - 2.0**-20
"""Gradients are scaled to this much of the bound. What is left is for the rounding of norms and sums: in a chunk of m
rows each coordinate is off by at most m·2⁻⁵³ of the sum of its magnitudes (Higham 2002, "Accuracy and Stability of
Numerical Algorithms", section 4.2), chunks are added up without loss (`_Total`), so that two sums of n rows are off by
(2m + 4)·2⁻⁵³·n bounds together: less than 2⁻²⁰ up to n = 2²⁴."""

_CHUNK_ROWS: Final = 128
_CHUNK_BYTES: Final = 1 << 27
"""Rows that are read at a time: so many, or as many as fit 128 MiB."""


class Sums(Protocol):
    """Computes sums of clipped gradients of one model, with its parameters as they are at each call."""

    def over(self, dataset: Dataset, chosen: NDArray[np.int64], *, padded_to: int = 0) -> torch.Tensor:
        """Σ over the chosen examples, each scaled down to the bound at most; shape (size,), float64."""
        ...


class SumsOf(Protocol):
    """Makes them; `ClippedSums` is the only one that protects a row."""

    def __call__(
        self,
        model: torch.nn.Module,
        rows: Dataset,
        *,
        loss: Loss,
        parameters: Sequence[torch.nn.Parameter],
        max_grad_norm: float,
    ) -> Sums: ...


class ClippedSums:
    """Computes sums of clipped per-example gradients of one model, with its parameters as they are at each call.

    Args:
        model: float64, in training mode; hooks stay on it, so it is a copy.
        rows: what a row looks like: of its features the shape, of its labels the dtype.
        loss: one loss for each example, shape (n,).
        parameters: trainable ones, in the order of the sums.
        max_grad_norm: C, at least `privacy.clipping.MIN_NORM`.

    Raises:
        InvalidInput: what is computed of a row would depend on others (batch normalisation, a mean over the batch), on
            chance (dropout) or on what was computed before; the model does not take such rows; `loss` does not return
            one value for each example; or C is out of range. Found on public rows; names the line where it can.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Dataset,
        *,
        loss: Loss,
        parameters: Sequence[torch.nn.Parameter],
        max_grad_norm: float,
    ) -> None:
        if not MIN_NORM <= max_grad_norm < math.inf:
            raise InvalidInput(f"the clipping norm must be finite and at least {MIN_NORM:g}")
        self.size = sum(parameter.numel() for parameter in parameters)
        self._bound = max_grad_norm * CLIPPING_MARGIN
        shape = rows.features.shape[1:]
        self._filler = try_out(model, loss, list(parameters), shape=shape, label_dtype=rows.labels.dtype)
        self._tensors = _Tensors(model)
        self._source: _Source
        if _is_chain(model, loss, self._filler):
            self._source = _LinearLayers(model, loss, list(parameters))
        else:
            self._source = _EveryLayer(model, loss, list(parameters))
        self._chunk = min(_CHUNK_ROWS, max(1, _CHUNK_BYTES // (8 * max(1, math.prod(shape)))))

    def over(self, dataset: Dataset, chosen: NDArray[np.int64], *, padded_to: int = 0) -> torch.Tensor:
        """Σ over the chosen examples, each scaled down to L2 norm C at most; shape (size,), float64.

        No model and no loss sees an example that is not finite.

        Args:
            chosen: positions in `dataset`, shape (k,).
            padded_to: rows to compute at least, with public ones that count for nothing: then neither the time taken
                nor the shapes at work tell how many were chosen.
        """
        total = _Total(self.size)
        for part, _ in self._chunks(dataset, chosen, padded_to=padded_to):
            total.add(part)
        return total.value()

    def counted(self, dataset: Dataset) -> NDArray[np.bool_]:
        """Which rows a sum over all of them adds up, shape (n,): for their owner, and nobody else."""
        found = [counted for _, counted in self._chunks(dataset, np.arange(len(dataset)), padded_to=0)]
        return np.concatenate([np.zeros(0, np.bool_), *found])

    def _chunks(
        self, dataset: Dataset, chosen: NDArray[np.int64], *, padded_to: int
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.bool_]]]:
        """The sum over each chunk, shape (size,), and which of its chosen rows it is of."""
        self._tensors.keep()
        end = max(len(chosen), padded_to)
        for start in range(0, end, self._chunk):
            part = chosen[start : start + self._chunk]
            yield self._of_chunk(
                *_tensors(dataset, part, min(self._chunk, end - start), self._filler), chosen=len(part)
            )

    def _of_chunk(
        self, features: torch.Tensor, labels: torch.Tensor, counts: NDArray[np.bool_], *, chosen: int
    ) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        counted = np.zeros(len(counts), np.bool_)
        with flushed_subnormals():
            for row in range(len(counts)):
                found, finite = self._of_row(features[row : row + 1], labels[row : row + 1])
                counted[row] = finite and counts[row]
                self._source.add(found, min(1.0, self._bound / found.norm) if counted[row] and found.norm else 0.0)
            total = self._source.take()
        return total, counted[:chosen]

    def _of_row(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[_Row, bool]:
        """A row's gradient, and whether it is one: where it is not, zeros."""
        try:
            found = self._alone(features, labels)
            if found is None:  # what it took to find that out is a pass as well, as of a row that fails
                found = self._alone(features, labels, written_out=True) or self._source.nothing()
        except (Exception, SystemExit):  # of the task's own code: which row it was must not be told by failing, nor by
            # the time
            with contextlib.suppress(Exception, SystemExit):  # the public row's, with parameters that somebody made up
                self._alone(self._filler.features, self._filler.labels)
            return self._source.nothing(), False
        if math.isfinite(found.norm) and math.isfinite(found.loss):
            return found, True
        return self._source.nothing(), False

    def _alone(self, features: torch.Tensor, labels: torch.Tensor, *, written_out: bool = False) -> _Row | None:
        """Of one row in tensors of its own: where it stood before is in no shape, no address and no state."""
        try:
            return self._source.of_row(features.clone(), labels.clone(), written_out=written_out)
        finally:
            self._tensors.restore()


def rows_that_count(model: torch.nn.Module, dataset: Dataset, *, loss: Loss) -> NDArray[np.bool_]:
    """Which rows DP-SGD would learn from, with the parameters that `model` has, shape (n,); it stays as it is.

    Raises:
        InvalidInput: as `ClippedSums`: then there is nothing to be learnt from any row.
    """
    return _sums_over(copy.deepcopy(model), dataset, loss).counted(dataset)


def classes_known(model: torch.nn.Module, dataset: Dataset, *, loss: Loss) -> int | None:
    """How many classes the default loss knows of this model's outputs; None with a loss of the task's own, which takes
    what it takes. The model stays as it is. Raises InvalidInput as `ClippedSums`."""
    if loss is not default_loss:
        return None
    working = copy.deepcopy(model)
    sums = _sums_over(working, dataset, loss)
    return classes_of(working(sums._filler.features.clone()))


def computed_as_chain(model: torch.nn.Module, dataset: Dataset, *, loss: Loss) -> bool:
    """Whether sums over this model take the way of linear layers, whose gradients are not written out; it stays as it
    is. Raises InvalidInput as `ClippedSums`."""
    return isinstance(_sums_over(copy.deepcopy(model), dataset, loss)._source, _LinearLayers)


def _sums_over(working: torch.nn.Module, dataset: Dataset, loss: Loss) -> ClippedSums:
    """With a bound of 1, over a model that becomes float64 and trains."""
    working.double().train()
    parameters = [parameter for parameter in working.parameters() if parameter.requires_grad]
    return ClippedSums(working, dataset, loss=loss, parameters=parameters, max_grad_norm=1.0)


def _is_chain(model: torch.nn.Module, loss: Loss, row: PublicRow) -> bool:
    """Whether a row's gradient follows from inputs and output gradients of linear layers alone.

    That is so where every trainable parameter is the weight or bias of one `torch.nn.Linear`, each of these layers is
    called exactly once, on a matrix of one row, and none of their parameters is used in another way.
    """
    layers = _linear_layers(model)
    if layers is None:
        return False
    seen: list[torch.nn.Module] = []
    apart: list[bool] = []

    def cut_off(layer: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], _: object) -> torch.Tensor:
        seen.append(layer)
        apart.append(inputs[0].ndim == 2 and len(inputs[0]) == 1)
        bias = None if layer.bias is None else layer.bias.detach()
        return torch.nn.functional.linear(inputs[0], layer.weight.detach(), bias)

    handles = [layer.register_forward_hook(cut_off) for layer in layers]
    try:
        losses = loss(model(row.features.clone()), row.labels.clone())
    finally:
        for handle in handles:
            handle.remove()
    once = len(seen) == len(set(seen)) == len(layers)
    return once and all(apart) and not losses.requires_grad  # else a parameter is used outside of its layer


@dataclass(frozen=True, slots=True)
class _Row:
    """What came of one row: the L2 norm of its gradient, its loss, and the parts that the gradient is made of."""

    norm: float
    loss: float
    parts: list[torch.Tensor]


class _Source(Protocol):
    """Where the gradients of single rows come from, and how they are added up."""

    def of_row(self, features: torch.Tensor, labels: torch.Tensor, *, written_out: bool) -> _Row | None:
        """Of one row, shapes (1, …) and (1,); None: this row's has to be `written_out`."""
        ...

    def nothing(self) -> _Row:
        """A gradient of zeros."""
        ...

    def add(self, row: _Row, factor: float) -> None:
        """A row's gradient, times a factor in [0, 1], is part of this chunk's sum."""
        ...

    def take(self) -> torch.Tensor:
        """The chunk's sum, shape (size,), float64; the next one begins."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a linear layer: its input, and zeros added to its output, for the gradient there."""

    inputs: torch.Tensor
    probe: torch.Tensor


class _LinearLayers:
    """A row's gradient of a layer's weights is gaᵀ, for input a and output gradient g, of norm ‖g‖·‖a‖.

    A `_Row` has for each layer a, shape (1, in), and g, shape (1, out). A model may call its layers in another way for
    some rows than for public ones: the gradient of such a row is written out, and its `_Row` is that of `_EveryLayer`.
    """

    def __init__(self, model: torch.nn.Module, loss: Loss, parameters: list[torch.nn.Parameter]) -> None:
        self._model, self._loss, self._parameters = model, loss, parameters
        self._layers = _linear_layers(model) or []
        self._trained = {id(parameter) for parameter in parameters}
        self._calls: dict[torch.nn.Module, _Call] = {}
        self._otherwise = False
        self._handles: list[RemovableHandle] = []
        self._whole, self._some_whole = _EveryLayer(model, loss, parameters), False
        self._kept: list[list[torch.Tensor]] = [[] for _ in range(2 * len(self._layers))]
        self._attach()

    def _attach(self) -> None:
        self._handles = [layer.register_forward_hook(self._record) for layer in self._layers]
        for parameter in self._parameters:
            parameter.requires_grad_(False)  # or their gradients would be computed too, of no use

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside, the model is as it came."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self._attach()

    def of_row(self, features: torch.Tensor, labels: torch.Tensor, *, written_out: bool) -> _Row | None:
        if written_out:
            with self._apart():
                return self._whole.of_row(features, labels, written_out=True)
        self._calls.clear()
        self._otherwise = False
        try:
            losses = checked_losses(self._loss(self._model(features), labels), 1)
        except Exception:
            if self._otherwise:
                return None
            raise
        if self._otherwise or len(self._calls) < len(self._layers):
            return None
        calls = [self._calls[layer] for layer in self._layers]
        found = torch.autograd.grad(losses.sum(), [call.probe for call in calls], allow_unused=True)
        parts, squares = [], 0.0
        for layer, call, part in zip(self._layers, calls, found, strict=True):
            g = torch.zeros_like(call.probe) if part is None else part
            reach = _square(call.inputs) if id(layer.weight) in self._trained else 0.0
            squares += _square(g) * (reach + (id(layer.bias) in self._trained))
            parts += [call.inputs, g]
        self._calls.clear()
        return _Row(math.sqrt(squares), losses.item(), parts)

    def nothing(self) -> _Row:
        widths = [width for layer in self._layers for width in (layer.in_features, layer.out_features)]
        return _Row(0.0, 0.0, [torch.zeros((1, width), dtype=torch.float64) for width in widths])

    def add(self, row: _Row, factor: float) -> None:
        if len(row.parts) == 1:
            self._some_whole = True
            return self._whole.add(row, factor)
        for number, (kept, part) in enumerate(zip(self._kept, row.parts, strict=True)):
            kept.append(part * factor if number % 2 else part)

    def take(self) -> torch.Tensor:
        sums: dict[int, torch.Tensor] = {}
        for layer, a, g in zip(self._layers, self._kept[::2], self._kept[1::2], strict=True):
            scaled = torch.cat(g)
            sums[id(layer.weight)] = scaled.T @ torch.cat(a)
            sums[id(layer.bias)] = scaled.sum(dim=0)
        for kept in self._kept:
            kept.clear()
        total = torch.cat([sums[id(parameter)].reshape(-1) for parameter in self._parameters])
        if self._some_whole:
            total, self._some_whole = total + self._whole.take(), False
        return total

    def _record(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if layer in self._calls or inputs[0].ndim != 2 or len(inputs[0]) != 1:
            self._otherwise = True
            raise InvalidInput("a linear layer was called in another way than on public rows")
        # A copy: the model may have computed it in a space of its own, where the next row comes.
        call = self._calls[layer] = _Call(inputs[0].detach().clone(), torch.zeros_like(output, requires_grad=True))
        return output + call.probe


class _EveryLayer:
    """A row's gradient of every parameter, written out: whatever the layers are, torch differentiates them.

    A `_Row` has the whole gradient, shape (size,).
    """

    def __init__(self, model: torch.nn.Module, loss: Loss, parameters: list[torch.nn.Parameter]) -> None:
        self._model, self._loss, self._parameters = model, loss, parameters
        self._total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)

    def of_row(self, features: torch.Tensor, labels: torch.Tensor, *, written_out: bool) -> _Row:
        losses = checked_losses(self._loss(self._model(features), labels), 1)
        found = torch.autograd.grad(losses.sum(), self._parameters, allow_unused=True)
        parts = [
            torch.zeros(parameter.numel(), dtype=torch.float64) if part is None else part.reshape(-1).double()
            for part, parameter in zip(found, self._parameters, strict=True)
        ]
        gradient = torch.cat(parts)
        return _Row(math.sqrt(_square(gradient)), losses.item(), [gradient])

    def nothing(self) -> _Row:
        return _Row(0.0, 0.0, [torch.zeros_like(self._total)])

    def add(self, row: _Row, factor: float) -> None:
        self._total.add_(row.parts[0], alpha=factor)

    def take(self) -> torch.Tensor:
        total, self._total = self._total, torch.zeros_like(self._total)
        return total


class _Total:
    """A sum of vectors of shape (size,) that rounds once, in the end: what each addition loses is kept beside it.

    Knuth's TwoSum (Knuth 1998, "The Art of Computer Programming" 2, section 4.2.2, theorem B) in every coordinate.
    """

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._lost = torch.zeros(size, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """One vector more, shape (size,), float64, finite."""
        total = self._sum + values
        back = total - self._sum
        self._lost += (self._sum - (total - back)) + (values - back)
        self._sum = total

    def value(self) -> torch.Tensor:
        """Shape (size,), float64."""
        return self._sum + self._lost


class _Tensors:
    """A model's parameters and buffers are for each row what they were for the first."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.keep()

    def keep(self) -> None:
        """As they are now: a step has changed them, say."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._kept = [(value, value.detach().clone()) for value in tensors]
        self._versions = [value._version for value, _ in self._kept]

    def restore(self) -> None:
        """Undo what a row did to them, if anything."""
        for number, (value, before) in enumerate(self._kept):
            if value._version != self._versions[number]:
                with torch.no_grad():
                    value.copy_(before)
                self._versions[number] = value._version


def _linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear] | None:
    """The layers that are trained, if all are plain linear ones and no parameter belongs to two of them; else None."""
    layers: list[torch.nn.Linear] = []
    seen: set[int] = set()
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        # By identity: weight_norm, for one, keeps the type and puts other parameters into it.
        if type(module) is not torch.nn.Linear or {id(p) for p in own} - {id(module.weight), id(module.bias)}:
            return None
        if seen & {id(parameter) for parameter in own} or _is_changed(module):
            return None
        seen |= {id(parameter) for parameter in own}
        layers.append(module)
    return layers or None


def _is_changed(layer: torch.nn.Linear) -> bool:
    """Whether somebody has hooked into a layer, or put another function into it."""
    hooks: tuple[Any, ...] = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks)
    return any(map(len, (*hooks, layer._backward_hooks))) or "forward" in vars(layer)


def _square(values: torch.Tensor) -> float:
    """Squared L2 norm of a tensor of its own. One that overflows belongs to a gradient as good as infinite; of numbers
    below 1e-154, whose squares vanish, a gradient is as good as none."""
    norm = float(torch.linalg.vector_norm(values))
    return norm * norm


def _tensors(
    dataset: Dataset, part: NDArray[np.int64], rows: int, filler: PublicRow
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.bool_]]:
    """Features and labels of these rows, in the precision of the model, and which of `rows` count.

    The public row stands where one is missing, or is not finite. Each takes what any other row takes: as many are read,
    looked at and written whatever `part` holds.
    """
    if len(dataset):
        positions = np.resize(part, rows) if len(part) else np.zeros(rows, np.int64)
        features, labels = dataset.features[positions], dataset.labels[positions]
    else:
        features = np.zeros((rows, *dataset.features.shape[1:]), np.float32)
        labels = np.zeros(rows, dataset.labels.dtype)
    counts = finite_rows(features, labels) & (np.arange(rows) < len(part))
    wide = np.where(counts.reshape(-1, *[1] * (features.ndim - 1)), features, filler.features.numpy())
    kept = np.where(counts, labels, filler.labels.numpy())
    kept = kept.astype(np.float64 if labels.dtype.kind == "f" else labels.dtype)
    return torch.from_numpy(wide.astype(np.float64)), torch.from_numpy(kept), counts
