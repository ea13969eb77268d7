"""A model's parameters as a flat vector, as named arrays, and as safetensors bytes.

Everything here but `model_to_tensors`, `vector_to_tensors` and `load_tensors` works without torch: the aggregator's
image has none.
A flat vector concatenates the tensors in the order of their names (Unicode code points), each in C order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as _load
from safetensors.numpy import save as _save

from ..errors import InvalidInput

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, NDArray[Any]]

STORED_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64))
"""What may be stored: parameters (float32), a server optimiser's moments (float64), counters (int64)."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The layout of a flat vector: (name, shape) of each tensor, sorted by name, each name once.

    Raises:
        InvalidInput: the names are not sorted, or one is there twice, or a dimension is negative.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.entries]
        if names != sorted(set(names)):
            raise InvalidInput("a signature lists each tensor once, sorted by name")
        for name, shape in self.entries:
            if any(dimension < 0 for dimension in shape):
                raise InvalidInput(f"tensor {name!r} has a negative dimension in {list(shape)}")

    @property
    def size(self) -> int:
        """Values in the flat vector."""
        return sum(math.prod(shape) for _, shape in self.entries)


def signature_of(tensors: Tensors) -> Signature:
    """The `Signature` of named arrays, of any dtype."""
    return Signature(tuple((name, tuple(map(int, tensors[name].shape))) for name in sorted(tensors)))


def flatten(tensors: Tensors) -> tuple[NDArray[np.float32], Signature]:
    """Named float32 arrays as one float32 vector of shape (signature.size,), and its layout.

    Raises:
        InvalidInput: an array is not float32; the message names it.
    """
    signature = signature_of(tensors)
    for name, _ in signature.entries:
        if tensors[name].dtype != np.float32:
            raise InvalidInput(f"tensor {name!r} is {tensors[name].dtype}, parameters are float32")
    parts = [tensors[name].reshape(-1) for name, _ in signature.entries]
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), signature


def unflatten(vector: NDArray[np.float32], signature: Signature) -> dict[str, NDArray[np.float32]]:
    """The inverse of `flatten`: copies, so that changing one leaves `vector` as it is.

    Raises:
        InvalidInput: `vector` is not float32 of shape (signature.size,).
    """
    if vector.dtype != np.float32 or vector.shape != (signature.size,):
        raise InvalidInput(
            f"a float32 vector of shape ({signature.size},) is expected, not {vector.dtype} of {vector.shape}"
        )
    tensors: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name, shape in signature.entries:
        end = start + math.prod(shape)
        tensors[name] = vector[start:end].reshape(shape).copy()
        start = end
    return tensors


def to_safetensors(tensors: Tensors) -> bytes:
    """Named arrays as safetensors bytes; the same arrays give the same bytes, whatever order they come in.

    No metadata is written: the library keeps it in a hash map, whose order changes from run to run.

    Raises:
        InvalidInput: an array's dtype is not one of `STORED_DTYPES`.
    """
    for name, array in tensors.items():
        if array.dtype not in STORED_DTYPES:
            raise InvalidInput(f"tensor {name!r} is {array.dtype}; {_stored_dtypes()} can be stored")
    # `ascontiguousarray` makes a scalar one-dimensional: the shape is put back.
    return bytes(_save({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in sorted(tensors.items())}))


def from_safetensors(data: bytes) -> dict[str, NDArray[Any]]:
    """The inverse of `to_safetensors`; the arrays are writable copies.

    Raises:
        InvalidInput: `data` is not safetensors, or holds a dtype that is not one of `STORED_DTYPES`.
    """
    try:
        loaded: dict[str, NDArray[Any]] = _load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
        raise InvalidInput("these bytes are not a safetensors file that can be read", private=str(error)) from error
    for name, array in loaded.items():
        if array.dtype not in STORED_DTYPES:
            raise InvalidInput(f"tensor {name!r} is {array.dtype}; {_stored_dtypes()} can be stored")
    return {name: np.array(array) for name, array in loaded.items()}


def model_to_tensors(model: torch.nn.Module) -> dict[str, NDArray[np.float32]]:
    """Copies of a model's trainable parameters, by name.

    Raises:
        InvalidInput: it cannot be trained (`whole.check_model`).
    """
    from .whole import check_model

    check_model(model)
    return {
        name: np.array(parameter.detach().cpu().numpy())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def vector_to_tensors(vector: NDArray[np.float32], signature: Signature) -> dict[str, torch.Tensor]:
    """`unflatten` as torch tensors, float32 on the CPU.

    Raises:
        InvalidInput: as `unflatten`.
    """
    import torch

    return {name: torch.from_numpy(array) for name, array in unflatten(vector, signature).items()}


def load_tensors(model: torch.nn.Module, tensors: Tensors) -> None:
    """Set a model's trainable parameters, in place.

    Raises:
        InvalidInput: names or shapes are not the model's, an array is not float32, or a value is not finite; the model
            is left as it was.
    """
    vector, signature = flatten(tensors)
    if not np.isfinite(vector).all():
        raise InvalidInput("a parameter of the model is not finite")
    expected = signature_of(model_to_tensors(model))
    if signature != expected:
        difference = sorted(set(signature.entries) ^ set(expected.entries))
        raise InvalidInput(f"the tensors are not this model's: {difference[0][0]!r} differs in name or shape")
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in vector_to_tensors(vector, signature).items():
            parameters[name].copy_(tensor)


def _stored_dtypes() -> str:
    return ", ".join(str(dtype) for dtype in STORED_DTYPES)
