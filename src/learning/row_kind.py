"""What a row of a task looks like: the shape of its features, and of which kind its label is. No row is needed to know
it, and it tells of none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..text import brief
from .labels import wrong_dtype
from .task import Dataset, Task, stated_label_dtype

MAX_AXES = 8
MAX_VALUES = 1 << 24
"""Features of one row that the trial on public rows is made with; a video has fewer."""


@dataclass(frozen=True, slots=True)
class RowKind:
    """Of one row.

    Attributes:
        shape: of its features.
        labels: dtype of labels by name, "int64" say; of what is no number its kind alone, "U" say.
    """

    shape: tuple[int, ...]
    labels: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"shape": list(self.shape), "labels": self.labels}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RowKind:
        """What `to_json` wrote."""
        return cls(tuple(int(axis) for axis in value["shape"]), str(value["labels"]))

    @classmethod
    def of(cls, rows: Dataset) -> RowKind:
        """Of rows that are there, or of none: only shape and dtype are looked at."""
        dtype = rows.labels.dtype
        return cls(tuple(rows.features.shape[1:]), dtype.name if dtype.kind in "iufb" else dtype.kind)

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """As numpy has it."""
        return np.dtype(self.labels)


def wrongly_declared(task: Task) -> str:
    """Say what is wrong with what a task says of its rows; empty where nothing is."""
    shape, dtype = getattr(task, "features_shape", None), getattr(task, "label_dtype", None)
    if dtype is not None and stated_label_dtype(task) is None:
        return f"label_dtype is {brief(repr(dtype), 80)}, and no dtype: 'int64' for classes, 'float32' for measurements"
    if dtype is not None and (wrong := wrong_dtype(np.dtype(dtype))):
        return f"label_dtype: {wrong}"
    if shape is not None and dtype is not None and declared_by(task) is None:
        return f"features_shape is {brief(repr(shape), 80)}: of one row, a tuple such as (9,)"
    return ""


def declared_by(task: Task) -> RowKind | None:
    """What a task says of its rows by `features_shape` and `label_dtype`; None of one that does not say both, or says
    what no row is."""
    shape, labels = getattr(task, "features_shape", None), stated_label_dtype(task)
    if labels is None:
        return None
    try:
        kind = RowKind(tuple(int(axis) for axis in shape or ()), labels.name)
    except (TypeError, ValueError):
        return None
    fits = 1 <= len(kind.shape) <= MAX_AXES and all(axis >= 0 for axis in kind.shape)
    return kind if fits and int(np.prod(kind.shape, dtype=float)) <= MAX_VALUES else None
