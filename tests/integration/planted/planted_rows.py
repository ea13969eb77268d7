"""A task whose private rows are recognisable wherever they turn up, and a notebook of what was computed from them.

It is a package of its own, as anybody's task is: what puts it on the import path also gives it its entry point. The
notebook is a file that only tests read; it is named in the environment, so that workers find it too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from src.learning.task import Dataset, default_loss

NOTEBOOK: Final = "PLANTED_NOTEBOOK"
"""In the environment: the file for what was computed."""

WATCHED: Final = "PLANTED_WATCHED"
"""In the environment: what a party's worker computes is noted once this module is imported there."""

ROWS: Final = 20_147
"""So many that a count of rows, or of those in a batch, is a number that nothing else here is."""
LABEL: Final = 734_519
"""Of a bad row: not a class."""
BAD_ROWS: Final = slice(0, None, 7)
"""So many that every batch has some."""
NOTED_CALLS: Final = 40
"""Of the loss, which is called for every row, and some times before for public ones."""
PARTS: Final = 5
"""Of a sum that are noted, of some hundred: the whole is noted in the end."""
SECRET: Final = 0.591_837_25
"""Of a bad row too, in the text of an error."""
MARKERS: Final = np.array(
    [
        [0.735_19, 0.269_43, 0.481_57],
        [0.918_35, 0.352_71, 0.647_93],
        [0.173_89, 0.826_17, 0.539_21],
        [0.694_13, 0.415_83, 0.957_31],
    ],
    np.float32,
)

_noted: set[str] = set()
_noted_parts: list[None] = []
_noted_calls: list[None] = []
"""One entry for each of them; all begin anew with each training."""


def note(kind: str, values: Any) -> None:
    """Remember values that no log may hold: "rows", "vector" (whole), "values" (one by one), or "count"."""
    line = json.dumps({"kind": kind, "values": np.asarray(values, np.float64).ravel().tolist()})
    if line not in _noted and NOTEBOOK in os.environ:
        _noted.add(line)
        with Path(os.environ[NOTEBOOK]).open("a", encoding="ascii") as file:
            file.write(f"{line}\n")


def _begin() -> None:
    for noted in (_noted, _noted_parts, _noted_calls):
        noted.clear()


def _enough() -> bool:
    """Counts calls, out of sight: a task that keeps something between two rows is refused."""
    _noted_calls.append(None)
    return len(_noted_calls) > NOTED_CALLS


def watch(put: Callable[[Any, str, Any], None]) -> None:
    """Note what goes into and out of every mechanism, by `put(module, name, function)` in its place."""
    import src.learning.dpsgd as dpsgd
    import src.learning.per_example as per_example
    import src.party.work as party_work

    def around(module: Any, name: str, see: Callable[[tuple[Any, ...], Any], None]) -> None:
        real = getattr(module, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            see(arguments, result)
            return result

        put(module, name, watched)

    def sampled(_: Any, chosen: NDArray[np.int64]) -> None:
        note("count", [len(chosen)])
        note("vector", chosen[-3:])

    def of_a_part(_: Any, added: Any) -> None:
        if len(_noted_parts) < PARTS:
            _noted_parts.append(None)
            _vector(added[0])

    around(per_example.ClippedSums, "_of_chunk", of_a_part)
    around(dpsgd, "secure_normals", lambda _, noise: _vector(noise))
    around(dpsgd, "poisson_sample", sampled)
    around(party_work, "poisson_sample", sampled)
    around(party_work, "discrete_gaussian", lambda _, noise: _vector(noise))
    around(dpsgd, "noised_sum", lambda given, result: _vectors(given[0], result))
    for name in ("clip", "encode", "encode_sum", "_with_share"):
        around(party_work, name, lambda given, result: _vectors(given[0], result))


def _vectors(*given: Any) -> None:
    for each in given:
        _vector(each)


def _vector(values: Any) -> None:
    wide = np.asarray(values, np.float64)
    note("vector", wide)
    note("values", [np.linalg.norm(wide), wide.sum()])


def _range(text: str) -> None:
    raise ValueError(f"{text}: {SECRET}")


def _index(_: str) -> None:
    torch.nn.functional.cross_entropy(torch.zeros(1, 2), torch.tensor([LABEL]))


def _memory(_: str) -> None:
    np.empty((LABEL, 1 << 40))


def _leave(text: str) -> None:
    raise SystemExit(f"{text}: {SECRET}")


def _tell(_: str) -> None:
    logging.getLogger("planted").debug("a value: %g", SECRET)


FAILURES: Final[Mapping[str, Callable[[str], None]]] = {
    "range": _range,
    "index": _index,
    "memory": _memory,
    "leave": _leave,
    "tell": _tell,
}
"""What a bad row may do in the middle of a training; "tell" is what none may do, and what a search has to find."""


class PlantedTask:
    """Two classes, three features, a linear model."""

    name: Final = "planted"

    def __init__(self) -> None:
        self._fail = ""

    def build_model(self, seed: int) -> torch.nn.Module:
        """3 → 2; its outputs are logits."""
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            torch.nn.init.xavier_uniform_(model.weight, generator=torch.Generator().manual_seed(seed))
            model.bias.zero_()
        return model

    def load_data(self, options: Mapping[str, object]) -> Dataset:
        """The planted rows, `rows` of them. `fail` is what a bad row does in training, `unreadable` when it is read;
        for party `fails_at` (anybody, if absent)."""
        mine = options.get("fails_at") in (None, options.get("who"))
        self._fail = str(options.get("fail") or "") if mine else ""
        _begin()
        note("rows", MARKERS)
        note("rows", [SECRET])
        note("count", [ROWS, LABEL])
        if mine and options.get("unreadable"):
            FAILURES[str(options["unreadable"])]("a bad row")
        dataset = _dataset(MARKERS, int(str(options.get("rows") or ROWS)))
        if self._fail:
            dataset.labels[BAD_ROWS] = LABEL
        return dataset

    def load_holdout(self, options: Mapping[str, object]) -> Dataset:
        """Public rows."""
        return _dataset(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32), 30)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy, but for bad rows."""
        losses = default_loss(outputs, labels)
        self._note(losses, outputs)
        if self._fail and (labels == LABEL).any():
            FAILURES[self._fail]("a bad row")
        return losses

    def _note(self, losses: torch.Tensor, outputs: torch.Tensor) -> None:
        if _enough():
            return
        found = losses.detach().numpy()
        note("values", np.unique(found))
        note("values", np.unique(outputs.detach().numpy()))


def _dataset(rows: NDArray[np.float32], count: int) -> Dataset:
    labels = np.arange(count, dtype=np.int64) // len(rows) % 2
    return Dataset(np.resize(rows, (count, rows.shape[1])), labels, "planted")


if WATCHED in os.environ and "src.party.work" in sys.modules:
    watch(setattr)
