"""Descriptors: how many files and connections a role's process may have open, and who gets how many of them."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

MAX_CONNECTIONS: Final = 4096
"""To a server, whatever it may have open: far more than a federation has members, and some hundreds of MB at worst."""
_USABLE_IF_UNLIMITED: Final = (1 << 20, 10_240)
"""What is tried where the hard limit is no number: what Linux allows at most (fs.nr_open), and macOS (OPEN_MAX)."""


def raise_descriptor_limit() -> tuple[int, int]:
    """Take all that the system allows: the soft limit, often 1024, is for programs that use select(2).

    To be called when a role starts, before its workers: they inherit it.

    Returns:
        The soft limit before and after.
    """
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, *_USABLE_IF_UNLIMITED):
        if before == resource.RLIM_INFINITY or 0 <= wanted <= before:
            break
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            break
    return before, descriptor_limit()


def descriptor_limit() -> int:
    """How many descriptors this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _USABLE_IF_UNLIMITED[0] if soft == resource.RLIM_INFINITY else soft


def room_for_connections() -> int:
    """How many connections a server takes: at most half of the descriptors, the other half is for its own files."""
    return max(1, min(MAX_CONNECTIONS, descriptor_limit() // 2))
