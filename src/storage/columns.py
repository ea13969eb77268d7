"""Types of columns that mean the same on every engine."""

from __future__ import annotations

from sqlalchemy import String, Text
from sqlalchemy.types import TypeEngine


def text(length: int | None = None) -> TypeEngine[str]:
    """Text of at most `length` characters, compared and sorted by code point, whatever the locale of the server."""
    if length is None:
        return Text().with_variant(Text(collation="C"), "postgresql")
    return String(length).with_variant(String(length, collation="C"), "postgresql")
