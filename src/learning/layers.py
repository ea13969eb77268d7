"""Layers that DP-SGD cannot train, by name, and what to take instead: advice of one line for a task's author."""

from __future__ import annotations

import re
from typing import Final

import torch

from ..errors import InvalidInput
from ..protocol.faults import TaskProblem

_WITHOUT_DROPOUT: Final = "leave it out, or p=0; the noise of DP-SGD keeps a model from learning by heart as well"
_OF_ANOTHER_DTYPE: Final = re.compile(
    "scalar type|same dtype|dtypes? .* but (got|found)|must have the same dtype", re.I
)
_FIXED_WINDOWS: Final = "take MaxPool or AdaptiveMaxPool, whose windows are fixed"
_DRAW: Final = {
    "RReLU": "take LeakyReLU, whose slope is fixed",
    "FractionalMaxPool2d": _FIXED_WINDOWS,
    "FractionalMaxPool3d": _FIXED_WINDOWS,
}
_CODES: Final = re.compile(r"indices|\bLong\b|index tensor|IntTensor|LongTensor")


def refuse_layers(model: torch.nn.Module) -> None:
    """Refuse, by name, layers that are known to mix rows, or to keep something of them.

    Raises:
        InvalidInput: with the class LAYER_REFUSED; says what to take instead.
    """
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise _refused(
                f"DP-SGD cannot train this model: {type(module).__name__} ({name or 'the model'}) with max_norm "
                "changes its weights by the rows that it sees, without noise; leave max_norm out"
            )
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise _refused(
                f"DP-SGD cannot train this model: {type(module).__name__} ({name or 'the model'}) mixes the rows of a "
                "batch; take GroupNorm or LayerNorm"
            )


def _refused(text: str) -> InvalidInput:
    return InvalidInput(text, problem=TaskProblem.LAYER_REFUSED.value, place="")


def without_chance(model: torch.nn.Module) -> str:
    """Name the layers of a model that draw, with what to take instead; empty where none is known to."""
    advice: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if instead := _instead_of_chance(module):
            advice.setdefault(instead, []).append(name or "the model")
    return "; ".join(f"layer {', '.join(names)}: {instead}" for instead, names in advice.items())


def _instead_of_chance(module: torch.nn.Module) -> str:
    """Say what to take instead of dropout, of what has a dropout of its own (attention, recurrent layers), and of what
    else draws in training; empty for any other layer."""
    kind = type(module).__name__
    if kind in _DRAW:
        return _DRAW[kind]
    own = "p" if "dropout" in kind.lower() else "dropout"
    share = getattr(module, own, None)
    return _WITHOUT_DROPOUT if isinstance(share, float) and share > 0.0 else ""


def without_memory(names: list[str]) -> str:
    """Say what to do about buffers of these names, which change as rows are computed."""
    if any(name.rpartition(".")[2] in ("_u", "_v") or name.endswith(("weight_u", "weight_v")) for name in names):
        return "spectral normalisation goes on with its vectors at every row: leave it out"
    return "track_running_stats=False, where that is what it is"


def another_dtype(error: BaseException) -> str:
    """Say what to do where torch says that tensors are of another dtype than an operation takes; else empty."""
    said = str(error)
    if not isinstance(error, RuntimeError | TypeError | IndexError):
        return ""
    if _CODES.search(said):
        return "; features are numbers with fractions: codes for an embedding or an index are features.long()"
    if _OF_ANOTHER_DTYPE.search(said):
        return (
            "; here features and parameters are float64: a tensor made in the model or loss takes dtype=features.dtype"
        )
    return ""
