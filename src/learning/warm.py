"""What a zygote imports before it forks workers: what each of them would otherwise import by itself, in seconds.

Only imports, no computation: nothing here may start a thread, for a forked child would hang on it. A task's package may
do that, or end the process that imports it. So each is imported in a child first, and here only if that went well; one
that does not go well is left to whoever asks for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch  # noqa: F401

from .installed import BUILT_IN
from .task import find_task

TRIED_FOR_S: Final = 60.0
"""How long the import of a task's package may take: seconds, where nothing is wrong."""
_LOOK_S: Final = 0.01


def prepare(names: Sequence[str]) -> None:
    """Import the packages of these tasks and of their data, as far as they can be."""
    for name in names:
        if name in BUILT_IN or _goes_well(name):
            _import(name)


def _import(name: str) -> bool:
    """Whether a task and what its data needs are imported now."""
    try:
        getattr(find_task(name), "preload", lambda: None)()
    except KeyboardInterrupt:
        raise
    except BaseException:  # a task's package may raise anything: whoever asks for the task is told
        return False
    return True


def _goes_well(name: str) -> bool:
    """Whether a child of this process that imports a task lives, ends its import in time, and starts no thread."""
    child = os.fork()
    if child == 0:
        fine = False
        try:
            fine = _import(name) and _threads() == 1
        finally:
            os._exit(0 if fine else 1)
    end = time.monotonic() + TRIED_FOR_S
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(_LOOK_S)


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
