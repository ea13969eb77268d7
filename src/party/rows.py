"""A party's rows, as a worker holds them: read once for a job, and again where a file that an option names has changed.

They lie in the memory of the worker that trains on them, for each task those of its last job, and go with it: no copy
reaches a disk, and none the process that workers are forked from. What is held cannot be written to. It is a copy, so
that a task which keeps what it returned, a table that it took a part of for example, changes no row that is trained on;
and what it returned becomes read-only, so that it hears of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..learning.loading import texts_of
from ..learning.task import Dataset, Options, Task

MAX_FILES: Final = 10_000
"""That options name, in directories and patterns too, and are looked at; rows of more are read in every round."""

_TICK_NS: Final = 20_000_000
"""A file that changed this shortly before may change again and look the same: clocks of file systems have ticks."""

Stamps = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Held:
    """Rows, with the task that loaded them.

    Attributes:
        key: of the job, the options and where relative paths in them start.
        stamps: of the files that options name, once the rows were read.
    """

    key: str
    stamps: Stamps
    task: Task
    rows: Dataset


def held_rows(
    task: Task,
    *,
    name: str,
    options: Options,
    directory: Path,
    job: str,
    kept: dict[str, Any],
    load: Callable[[], Dataset],
) -> tuple[Task, Dataset]:
    """The rows of a task, and the instance of it that loaded them.

    Args:
        task: whose rows `load` reads, if they have to be read.
        name: under which that is registered and has a dataset, whatever it says of itself: several may say the same.
        directory: where relative paths in options start.
        job: by its id: for each, rows are read anew, since a loader may read what no option names.
        kept: what this worker keeps; at most one `Held` for each task.

    Raises:
        Exception: whatever `load` does.
    """
    place, key = f"rows of {name}", json.dumps([job, str(directory), options], sort_keys=True)
    began_ns, before = time.time_ns(), stamps_of(options, directory)
    held: Held | None = kept.get(place)
    if held is not None and held.key == key and held.stamps == before:
        return held.task, held.rows
    del held
    kept.pop(place, None)  # before there are others: there may be no room for both
    rows = read_only(load())
    after = stamps_of(options, directory)
    if before is not None and after is not None and not _changed(before, after, began_ns):
        kept[place] = Held(key, after, task, rows)
    return task, rows


def read_only(rows: Dataset) -> Dataset:
    """The same rows where nobody can write to them. A file that is mapped read-only stays as it is."""
    return Dataset(_read_only(rows.features), _read_only(rows.labels), rows.description)


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    if (isinstance(values, np.memmap) and values.mode == "r") or values.dtype.hasobject:  # the latter is refused later
        return values
    values.setflags(write=False)
    if not values.size:
        return values
    # Of bytes, which nobody can make writable: of an array of its own its owner can.
    return np.frombuffer(values.tobytes(), values.dtype).reshape(values.shape)


def stamps_of(options: Options, directory: Path) -> Stamps | None:
    """What tells that a file changed, for each that options name: by path, in directories, by pattern, at any depth.
    None for more than `MAX_FILES`."""
    found: Stamps = {}
    for _, text in texts_of(options):
        with suppress(OSError, ValueError, RuntimeError):  # no path, or none that can be read
            for path in _paths(directory / Path(text).expanduser()):
                state = path.stat()
                stamp = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                found[str(path)] = stamp
                if len(found) > MAX_FILES:
                    return None
    return found


def _paths(path: Path) -> Iterator[Path]:
    """A file; a directory with all that is in it; what a pattern fits."""
    if path.exists():
        yield path
        if path.is_dir():
            yield from path.rglob("*")
    elif has_magic(str(path)) and "." in path.name:  # a lone * is no pattern of files, as likely as not
        yield from Path(path.anchor).glob(str(path.relative_to(path.anchor)))


def _changed(before: Stamps, after: Stamps, began_ns: int) -> bool:
    """Whether other rows may be there than those that were read: a file was replaced meanwhile, or changed so shortly
    before that another change would not show. (One that a loader writes to itself, a log say, goes on as it is.)"""
    replaced = any(path in after and after[path][:2] != state[:2] for path, state in before.items())
    return replaced or any(max(state[3:]) > began_ns - _TICK_NS for state in before.values())
