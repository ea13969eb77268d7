"""What a party declares of its rows when it joins: it goes into plans that everybody reads."""

from __future__ import annotations

import re
from typing import Final

from ...communication.generated import federation_pb2
from ...errors import InvalidInput, LimitError
from ...jobs.spec_base import NAME_PATTERN

MAX_DECLARED_TASKS: Final = 1000
MAX_DECLARED_ROWS: Final = 1 << 40
"""Far more than any party has, and small enough that a sum over all parties is exact in a float64."""
_TASK: Final = re.compile(NAME_PATTERN)


def declared_rows(request: federation_pb2.JoinRequest, *, most: int = MAX_DECLARED_ROWS) -> dict[str, int]:
    """What a party declares, by task: it goes into plans that everybody reads.

    Args:
        most: rows that this aggregator's operator takes for a task.
    """
    declared = dict(request.declared_rows)
    fine = all(_TASK.fullmatch(task) and 1 <= rows <= MAX_DECLARED_ROWS for task, rows in declared.items())
    if not fine or len(declared) > MAX_DECLARED_TASKS:
        text = f"at most {MAX_DECLARED_TASKS} tasks by short name, with 1 to {MAX_DECLARED_ROWS} rows each"
        raise InvalidInput(f"a party declares {text}", violations={"declared_rows": text})
    for task, rows in declared.items():
        if rows > most:
            raise LimitError(
                f"{rows} rows are declared for task {task}; at most {most} may be (limits.max_declared_rows)"
            )
    return declared
