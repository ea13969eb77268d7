"""What one worker may use, as far as the kernel enforces it; called inside the worker.

A limit that the process has already, from a service manager for example, is never raised.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20


def cores() -> int:
    """Cores that this process may use; at least 1."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def private_memory_mb() -> float:
    """What counts against `limit_memory` now, in MiB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024 / MIB
    return 0.0


def limit_memory(limit_mb: int) -> None:
    """From now on an allocation beyond so many MiB of private memory fails; on Linux, elsewhere this does nothing.

    RLIMIT_DATA has counted anonymous mappings since Linux 4.7; RLIMIT_AS would count what is reserved but never used.
    """
    if sys.platform == "linux":
        limit = _at_most(limit_mb * MIB, resource.getrlimit(resource.RLIMIT_DATA)[0])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextmanager
def limited_cpu(limit_s: float | None) -> Iterator[None]:
    """The block is killed with SIGXCPU once this process has used `limit_s` more CPU time, rounded up to a whole second
    of its life, which is what the kernel counts in."""
    if limit_s is None:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = _at_most(math.ceil(time.process_time() + limit_s), before)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (before, hard))


def _at_most(limit: int, present: int) -> int:
    return limit if present == resource.RLIM_INFINITY else min(limit, present)
