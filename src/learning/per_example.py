"""Sums of clipped per-example gradients: what one example adds is bounded, whatever it and the others hold.

All in float64. There the gradient of an example depends on the other examples of its batch by some 1e-14 of itself at
most (products of matrices add up in another order), which the clipping leaves room for; in float32 it would depend on
them by 1e-6, and thousands of examples together by more than the sensitivity allows.

What is clipped is what is summed: norm and sum are of the same numbers, from one backward pass. Where every trainable
layer is linear and called once, on one row for each example, they come from its inputs and from the gradients at its
outputs (Goodfellow 2015, "Efficient Per-Example Gradient Computations"; Bu et al. 2022, "Differentially Private
Optimization on Large Foundation Models at Small Cost", section 3); else Opacus computes every gradient by itself.

An example that is not finite itself, or whose loss or gradient is not, or cannot be computed, counts as zero: neither
a sum that is not finite nor a failure ever tells of one row. What is wrong with the model or the loss itself is found
beforehand, on blank rows.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator

from ..errors import InvalidInput, SottoError
from ..privacy.clipping import MIN_NORM
from .task import Dataset, Loss, finite_rows

CLIPPING_MARGIN: Final = 1.0 - 2.0**-20
"""Gradients are scaled to this much of the bound: what is left is more than float64 can be off by in a sum of 2^20."""

_CHUNK_BYTES: Final = 1 << 27
_CHUNK_ROWS: Final = 1024
_PADDED_ROWS: Final = 128
"""Per-example gradients that are in memory at a time: of so many rows, or of as many as fit 128 MiB. The smaller a
chunk that is filled up, the less is computed for nothing."""

_BLANK_ROWS: Final = 2
"""On which a model is tried: with one alone, an axis of examples could be taken for another one."""


class ClippedSums:
    """Computes sums of clipped per-example gradients of one model, with its parameters as they are at each call.

    Args:
        model: float64, in training mode; hooks stay on it, so it is a copy.
        rows: what a row looks like: of its features the shape, of its labels the dtype.
        loss: one loss for each example, shape (n,).
        parameters: trainable ones, in the order of the sums.
        max_grad_norm: C, at least `privacy.clipping.MIN_NORM`.

    Raises:
        InvalidInput: no gradients of single examples can be had of this model (it mixes examples, as batch
            normalisation does), it does not take such rows, it draws random numbers, as dropout does, `loss` does not
            return one value for each example, or C is out of range.
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
        _check_model(model)
        self.size = sum(parameter.numel() for parameter in parameters)
        self._model, self._loss, self._bound = model, loss, max_grad_norm
        shape = rows.features.shape[1:]
        self._source: _Source
        blank = Dataset(np.zeros((_BLANK_ROWS, *shape), np.float32), np.zeros(_BLANK_ROWS, rows.labels.dtype), "blank")
        generator = torch.get_rng_state()
        try:
            if uses_ghost_clipping(model, shape):
                self._source = _LinearLayers(model, loss, list(parameters))
            else:
                self._source = _PerExampleHooks(model, loss, list(parameters))
            self._add(*_tensors(blank, np.arange(_BLANK_ROWS), _BLANK_ROWS))
        except SottoError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"  # of blank rows: nobody's
            raise InvalidInput(
                f"model and loss cannot be computed in float64, on blank rows with features of shape {shape}: {text}"
            ) from error
        # What is drawn goes to examples by their position: with a generator that a task has seeded, one row more would
        # move what all later ones draw.
        if not torch.equal(generator, torch.get_rng_state()):
            raise InvalidInput(
                "DP-SGD cannot train this model: it draws random numbers as it computes, as dropout does"
            )
        self._most_rows = max(1, _CHUNK_BYTES // (8 * max(1, self._source.values_per_row)))

    def over(self, dataset: Dataset, chosen: NDArray[np.int64], *, padded_to: int = 0) -> torch.Tensor:
        """Σ over the chosen examples, each scaled down to L2 norm C at most; shape (size,), float64.

        No model and no loss sees an example that is not finite.

        Args:
            chosen: positions in `dataset`, shape (k,).
            padded_to: 0, or rows to compute at least, in chunks that are all full, with blank rows that count for
                nothing: then neither the time taken nor the shapes at work tell how many were chosen.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        if not len(dataset):
            return total
        for added in self._chunks(dataset, chosen, padded_to=padded_to):
            total += added.total
        return total

    def counted(self, dataset: Dataset) -> NDArray[np.bool_]:
        """Which rows a sum over all of them adds up, shape (n,): for their owner, and nobody else."""
        found = [added.counted.numpy() for added in self._chunks(dataset, np.arange(len(dataset)), padded_to=0)]
        return np.concatenate([np.zeros(0, np.bool_), *found])

    def _chunks(self, dataset: Dataset, chosen: NDArray[np.int64], *, padded_to: int) -> Iterator[_Added]:
        rows = min(self._most_rows, _PADDED_ROWS if padded_to else _CHUNK_ROWS)
        for start in range(0, max(len(chosen), padded_to), rows):
            part = chosen[start : start + rows]
            tensors = _tensors(dataset, part, rows if padded_to else len(part))
            try:
                together = self._add(*tensors)
            except Exception:  # one of these rows made it fail: which one must not be told by failing
                for row in range(len(part)):
                    yield self._alone(*(each[row : row + 1] for each in tensors))
            else:
                yield together

    def _alone(self, features: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> _Added:
        try:
            return self._add(features, labels, counts)
        except Exception:
            return _Added(torch.zeros(self.size, dtype=torch.float64), torch.zeros(1, dtype=torch.bool))

    def _add(self, features: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> _Added:
        """The sum over those of these examples that count."""
        try:
            return self._source.clipped_sum(features, labels, counts, bound=self._bound * CLIPPING_MARGIN)
        finally:
            self._source.forget()


def rows_that_count(model: torch.nn.Module, dataset: Dataset, *, loss: Loss) -> NDArray[np.bool_]:
    """Which rows DP-SGD would learn from, with the parameters that `model` has, shape (n,); it stays as it is.

    Raises:
        InvalidInput: as `ClippedSums`: then there is nothing to be learnt from any row.
    """
    working = copy.deepcopy(model).double().train()
    parameters = [parameter for parameter in working.parameters() if parameter.requires_grad]
    return ClippedSums(working, dataset, loss=loss, parameters=parameters, max_grad_norm=1.0).counted(dataset)


def uses_ghost_clipping(model: torch.nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether norms and sums follow from the inputs and output gradients of linear layers.

    That is so where every trainable parameter is the weight or bias of one `torch.nn.Linear`, and each of these layers
    is called exactly once, on a matrix with one row for each example. Found by a dry run on zeros.

    Args:
        shape: of one row's features, which is public.
    """
    layers = _linear_layers(model)
    if layers is None:
        return False
    seen: dict[torch.nn.Module, list[bool]] = {layer: [] for layer in layers}

    def note(layer: torch.nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        seen[layer].append(len(inputs) == 1 and inputs[0].ndim == 2 and len(inputs[0]) == _BLANK_ROWS)

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(torch.zeros((_BLANK_ROWS, *shape), dtype=next(model.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    return all(calls == [True] for calls in seen.values())


def checked_losses(losses: torch.Tensor, examples: int) -> torch.Tensor:
    """`losses` as they are; InvalidInput unless there is one for each example, shape (examples,)."""
    # A mean over the batch would make every clipped gradient a function of the other examples.
    if losses.shape != (examples,):
        raise InvalidInput("a task's loss returns one value for each example, shape (n,), with no reduction")
    return losses


@dataclass(frozen=True, slots=True)
class _Added:
    """The sum of a chunk, shape (size,), and which of its examples it is of: bool, shape (n,)."""

    total: torch.Tensor
    counted: torch.Tensor


class _Source(Protocol):
    """Where the gradients of single examples come from."""

    @property
    def values_per_row(self) -> int:
        """That one example needs in memory, about."""
        ...

    def clipped_sum(
        self, features: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, *, bound: float
    ) -> _Added:
        """Over the examples of a chunk that `counts` has, shape (n,), and whose loss and gradient are finite."""
        ...

    def forget(self) -> None:
        """Drop what is left of the last chunk, whether or not it came to its end."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a linear layer: its input, and zeros added to its output, for the gradient there."""

    inputs: torch.Tensor
    probe: torch.Tensor


class _LinearLayers:
    """An example's gradient of a layer's weights is gaᵀ, for input a and output gradient g, of norm ‖g‖·‖a‖."""

    def __init__(self, model: torch.nn.Module, loss: Loss, parameters: list[torch.nn.Parameter]) -> None:
        self._model, self._loss, self._parameters = model, loss, parameters
        self._layers = _linear_layers(model) or []
        self._trained = {id(parameter) for parameter in parameters}
        self._calls: dict[torch.nn.Module, _Call] = {}
        for layer in self._layers:
            layer.register_forward_hook(self._record)

    @property
    def values_per_row(self) -> int:
        return sum(layer.in_features + layer.out_features for layer in self._layers)

    def clipped_sum(
        self, features: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, *, bound: float
    ) -> _Added:
        for parameter in self._parameters:
            parameter.requires_grad_(False)  # or their gradients would be computed too, of no use
        losses = checked_losses(self._loss(self._model(features), labels), len(features))
        calls = [self._calls[layer] for layer in self._layers]
        found = torch.autograd.grad(losses.sum(), [call.probe for call in calls], allow_unused=True)
        inputs = [call.inputs for call in calls]
        outputs = [_or_zeros(each, call.probe) for each, call in zip(found, calls, strict=True)]
        norms = [self._norms(*each) for each in zip(self._layers, inputs, outputs, strict=True)]
        factors, sound = _factors(torch.stack(norms).norm(dim=0), losses, counts, bound=bound)
        sums: dict[int, torch.Tensor] = {}
        for layer, a, g in zip(self._layers, inputs, outputs, strict=True):
            scaled = torch.where(sound, g, 0.0) * factors
            sums[id(layer.weight)] = scaled.T @ torch.where(sound, a, 0.0)  # never 0 · ∞
            sums[id(layer.bias)] = scaled.sum(dim=0)
        total = torch.cat([sums[id(parameter)].reshape(-1) for parameter in self._parameters])
        return _Added(total, sound[:, 0])

    def forget(self) -> None:
        self._calls.clear()
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def _record(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if layer in self._calls or inputs[0].ndim != 2 or len(inputs[0]) != len(output):
            raise InvalidInput("a linear layer was called in another way than on blank rows")
        call = self._calls[layer] = _Call(inputs[0].detach(), torch.zeros_like(output, requires_grad=True))
        return output + call.probe

    def _norms(self, layer: torch.nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Of each example's gradient of this layer's parameters, shape (n,)."""
        reach = torch.zeros(len(inputs), dtype=torch.float64)
        if id(layer.weight) in self._trained:
            reach = _row_norms(inputs)
        if id(layer.bias) in self._trained:
            reach = torch.hypot(reach, torch.ones_like(reach))
        return _row_norms(outputs) * reach


class _PerExampleHooks:
    """Gradients of single examples by Opacus's hooks."""

    def __init__(self, model: torch.nn.Module, loss: Loss, parameters: list[Any]) -> None:
        self._model, self._loss, self._parameters = GradSampleModule(model, loss_reduction="sum"), loss, parameters
        self.values_per_row = sum(parameter.numel() for parameter in parameters)

    def clipped_sum(
        self, features: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, *, bound: float
    ) -> _Added:
        with _known_warnings():
            losses = checked_losses(self._loss(self._model(features), labels), len(features))
            torch.autograd.backward(losses.sum())
        each = torch.cat([self._flat(parameter, len(features)) for parameter in self._parameters], dim=1)
        factors, sound = _factors(each.norm(dim=1), losses, counts, bound=bound)
        return _Added(factors[:, 0] @ torch.where(sound, each, 0.0), sound[:, 0])

    def _flat(self, parameter: Any, rows: int) -> torch.Tensor:
        found = parameter.grad_sample
        if found is None and parameter.grad is None:  # no part of this forward pass
            return torch.zeros((rows, parameter.numel()), dtype=torch.float64)
        if not isinstance(found, torch.Tensor) or len(found) != rows:
            raise InvalidInput(
                "DP-SGD cannot train this model, as it has no gradients of single examples: a trainable layer does not "
                "see one entry for each example in its first axis, or its parameters are used outside of it"
            )
        return found.reshape(rows, parameter.numel()).to(torch.float64)

    def forget(self) -> None:
        for module in self._model.modules():
            for name in ("activations", "max_batch_len"):
                module.__dict__.pop(name, None)
        for parameter in self._model.parameters():
            parameter.grad = parameter.grad_sample = None
            parameter._forward_counter = 0
            parameter.__dict__.pop("_current_grad_sample", None)


def _check_model(model: torch.nn.Module) -> None:
    found = [*ModuleValidator.validate(model, strict=False), *GradSampleModule.validate(model, strict=False)]
    # Opacus passes over those without parameters of their own, which mix examples all the same.
    found += [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if found:
        text = "; ".join(map(str, found))
        raise InvalidInput(f"DP-SGD cannot train this model, as it has no gradients of single examples: {text}")


def _linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear] | None:
    """The layers that are trained, if all are linear and no parameter belongs to two of them; else None."""
    layers: list[torch.nn.Linear] = []
    seen: set[int] = set()
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        # By identity: weight_norm, for one, keeps the type and puts other parameters into it.
        if type(module) is not torch.nn.Linear or {id(p) for p in own} - {id(module.weight), id(module.bias)}:
            return None
        if seen & {id(parameter) for parameter in own}:
            return None
        seen |= {id(parameter) for parameter in own}
        layers.append(module)
    return layers or None


def _or_zeros(found: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A gradient; zeros for what has no part in the loss."""
    return torch.zeros_like(like) if found is None else found


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """L2 norm of each row, shape (n,): no square over- or underflows; not finite where an entry is not."""
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.float64)
    largest = rows.abs().amax(dim=1)
    norms: torch.Tensor = largest * (rows / torch.where(largest > 0, largest, 1.0)[:, None]).norm(dim=1)
    return norms


def _factors(
    norms: torch.Tensor, losses: torch.Tensor, counts: torch.Tensor, *, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much each example is scaled, and which examples count after all: both of shape (n, 1).

    A norm that overflows belongs to a gradient that is as good as infinite.
    """
    sound = counts & torch.isfinite(norms) & torch.isfinite(losses.detach())
    factors = torch.where(sound, (bound / norms).clamp(max=1.0), 0.0)
    return factors[:, None], sound[:, None]


def _tensors(dataset: Dataset, part: NDArray[np.int64], rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and labels of these rows, in the precision of the model, and which of `rows` count: blank ones do not.

    Blank are those that fill a chunk up, and those that are not finite. Each takes what any other row takes: as many
    are read, looked at and written whatever `part` holds.
    """
    positions = np.resize(part, rows) if len(part) else np.zeros(rows, np.int64)
    features, labels = dataset.features[positions], dataset.labels[positions]
    counts = finite_rows(features, labels) & (np.arange(rows) < len(part))
    features = np.where(counts.reshape(-1, *[1] * (features.ndim - 1)), features, 0).astype(np.float64)
    labels = np.where(counts, labels, np.zeros_like(labels))
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)
    return torch.from_numpy(features), torch.from_numpy(labels), torch.from_numpy(counts)


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Passes over what Opacus's hooks make torch warn of."""
    with warnings.catch_warnings():
        # The first layer's input needs no gradient; its hook fires all the same, and Opacus counts on it.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        yield
