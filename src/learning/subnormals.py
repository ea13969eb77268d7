"""Subnormal numbers taken for zero, in this thread, for a while: so that how long a computation takes tells less of it.

On many processors an operation on a subnormal number (below 2.2e-308 in float64) takes a hundred times as long as on
any other, and weights that somebody made up make one row, and no other, meet them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Around what is computed on private rows: this thread, and torch's backward passes in it, read and write zero for
    subnormal numbers. On a processor that cannot (`torch.set_flush_denormal` knows x86 and ARM64) nothing changes.
    """
    before = _flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes() -> bool:
    """Whether this thread does so already; torch does not tell."""
    return sys.float_info.min / 2.0 == 0.0
