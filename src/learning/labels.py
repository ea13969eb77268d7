"""Labels: which numbers are classes of a model, and in words what is wrong with others.

Words about labels hold values of rows: they are for the owner's own screen, or of rows that are public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

MAX_FOUND: Final = 5
"""Different values that are listed; of more, how many there are, and their range."""
_MANY: Final = 20
"""Different values beyond the classes, from which on they look like measurements or ids."""

NO_REGRESSION: Final = (
    "labels of one output are floats, and the default loss is for classes: for a regression, give the task a loss of "
    "its own; for classes, bring whole numbers, 0 and 1 (labels.astype(np.int64))"
)

_OTHER_KINDS: Final = {
    "U": "give each text its class in load_data, a whole number from 0 on",
    "S": "give each text its class in load_data, a whole number from 0 on",
    "T": "give each text its class in load_data, a whole number from 0 on",
    "O": "turn objects into numbers in load_data: texts into classes from 0 on, numbers by labels.astype(np.int64)",
    "M": "turn dates into numbers in load_data, days since some day for example",
    "m": "turn durations into numbers in load_data, days for example",
    "c": "take labels.real, or two targets with a loss of the task's own",
}


def wrong_dtype(dtype: np.dtype[Any]) -> str:
    """Why labels of this dtype are none, and what to do; empty where they are. No value of a label has part in it."""
    if dtype.kind in "iufb":
        return ""
    way_out = _OTHER_KINDS.get(dtype.kind, "turn them into numbers in load_data")
    return f"labels are whole numbers for classes, or floats; here they are {dtype}: {way_out}"


def is_class(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Which labels are whole numbers from 0 to `classes` − 1; shape (n,), bool."""
    fits = (labels >= 0) & (labels < classes)
    return fits & (labels == labels.floor()) if labels.is_floating_point() else fits


def are_classes(labels: NDArray[Any], classes: int) -> NDArray[np.bool_]:
    """`is_class`, of an array."""
    import torch

    return np.asarray(is_class(torch.from_numpy(labels.copy()), classes).numpy(), np.bool_)


def complaint(labels: NDArray[Any], classes: int) -> str:
    """What labels there are that the default loss cannot use, and what they look like; empty where there are none.

    Args:
        labels: shape (n,), numbers; those that are not finite are passed over.
        classes: of the model: 2 where it has one output.
    """
    finite = labels[np.isfinite(labels)] if labels.dtype.kind == "f" else labels
    if are_classes(finite, classes).all():
        return ""
    known = "0 or 1" if classes == 2 else f"0 to {classes - 1} for {classes} outputs"
    values = np.unique(finite)
    hint = _looks_like(values, classes, rows=len(finite))
    return f"labels are {known}; found {_listed(values)}{hint and f': {hint}'}"


def _looks_like(values: NDArray[Any], classes: int, *, rows: int) -> str:
    """What the owner probably has to do, from the different values there are, sorted."""
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        return "a fraction is no class; a regression needs a loss of the task's own"
    if len(values) > max(_MANY, classes) and (2 * len(values) > rows or len(values) > 10 * classes):
        return "these look like ids or measurements, not like classes"
    if np.isin((0, 1, classes), values).tolist() == [False, True, True]:
        return "labels seem to start at 1; take labels - 1"
    if classes == 2 and values.tolist() == [-1, 1]:
        return "take (labels + 1) // 2"
    if 0 < np.count_nonzero((values < 0) | (values >= classes)) < len(values):
        return "if one of these stands for unknown, leave its rows out, or as they are, to count for nothing"
    return ""


def _listed(values: NDArray[Any]) -> str:
    """Different values, sorted, at least one."""
    texts = [f"{value:g}" for value in values.tolist()]
    if len(texts) > MAX_FOUND:
        return f"{len(texts)} different values from {texts[0]} to {texts[-1]}"
    return " and ".join([*([", ".join(texts[:-1])] if len(texts) > 1 else []), texts[-1]])
