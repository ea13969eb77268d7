"""Where a test's model or loss notes what it was given: out of sight of the trial, which refuses whoever keeps it."""

from __future__ import annotations

from typing import Any

_BOOK: list[Any] = []


def note(value: Any) -> None:
    """Write it down."""
    _BOOK.append(value)


def noted() -> list[Any]:
    """All that was written down since this was last asked."""
    found = list(_BOOK)
    _BOOK.clear()
    return found
