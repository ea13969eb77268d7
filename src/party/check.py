"""What an owner is told of the data that this party brings: when they ask, on their own screen.

A row that is not finite counts for nothing in training, and nobody is told while it does: neither the aggregator, by a
party that does not contribute, nor a log.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ..config import PartyConfig
from ..errors import SottoError
from ..learning.task import find_task, finite_rows

MAX_NAMED: Final = 10
"""Rows that are named; whoever mends these finds the others by asking again."""


def check_data(config: PartyConfig) -> Iterator[tuple[str, bool]]:
    """Load each dataset of the configuration; yields a line about it, and whether all of it can be trained on.

    An option that is null is left to jobs, and has the task's default here. Rows are named by position, from 0. The
    lines hold private facts: they are for the screen of the machine that has the data, and for no log.
    """
    for task, dataset in config.datasets.items():
        options = {key: value for key, value in dataset.options.items() if value is not None}
        found, fine = _findings(task, options, declared=dataset.declared_rows)
        yield f"{task}: {found}", fine


def _findings(task: str, options: dict[str, Any], *, declared: int) -> tuple[str, bool]:
    try:
        rows = find_task(task).load_data(options)
        broken = np.flatnonzero(~finite_rows(rows.features, rows.labels))
    except Exception as error:  # of the task's own code, which may raise anything
        text = error.message if isinstance(error, SottoError) else str(error)
        return f"cannot be loaded: {type(error).__name__}: {text}", False
    if not len(broken):
        return f"{len(rows)} rows ({declared} declared), all of them finite", True
    names = ", ".join([*map(str, broken[:MAX_NAMED]), *(["…"] if len(broken) > MAX_NAMED else [])])
    count = f"{len(broken)} of {len(rows)} rows ({declared} declared)"
    return f"{count} hold a value that is not finite, and count for nothing in training: {names}", False
