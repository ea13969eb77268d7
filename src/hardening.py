"""What a process that holds keys or private rows does first: it leaves no image of its memory, and makes no files for
others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Final

PRIVATE_UMASK: Final = 0o077
INSPECTION: Final = "SOTTO_ALLOW_INSPECTION"
"""Set to 1, other processes of the same user may look into this one: to measure its memory, to debug it."""

_PR_SET_DUMPABLE: Final = 4  # <linux/prctl.h>
_FILTER: Final = Path("/proc/self/coredump_filter")


def forbid_core_dumps() -> None:
    """From here on neither this process nor its children are dumped when they crash or are killed over a limit.

    The limit of a core file's size is 0, and cannot be raised again. Linux does not ask for it where it pipes dumps to
    a program, as systemd-coredump is run; so of no kind of memory anything is dumped, whoever asks (core(5)). And the
    process is declared not dumpable, which besides keeps debuggers of the same user out (prctl(2), PR_SET_DUMPABLE):
    unless `INSPECTION` allows them. A program that is executed is dumpable again, and has to say so itself.

    Raises:
        OSError: the kernel refuses; nothing secret should be loaded then.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # no such file in a kernel without core dumps; not ours, once not dumpable
        _FILTER.write_text("0")
    if os.environ.get(INSPECTION) != "1":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def keep_files_private() -> None:
    """Files that this process and its children make are the owner's alone, unless they are made for others."""
    os.umask(PRIVATE_UMASK)
