"""Where a role's database is, from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeAlias

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import ConfigError


class Insecure(NamedTuple):
    """A URL whose server may be another host, reached in whatever way it says: `database.insecure_transport`."""

    url: str | URL


Location: TypeAlias = Path | str | URL | Insecure
"""A file of SQLite, or the URL of a database."""


def database_location(
    path: Path, url: str | None, password_file: Path | None, *, insecure_transport: bool = False
) -> Location:
    """`path` for SQLite; where a URL is configured that one, with the password from its file.

    Raises:
        ConfigError: the URL or the file cannot be read.
    """
    if url is None:
        return path
    found = url if password_file is None else _with_password(url, password_file)
    return Insecure(found) if insecure_transport else found


def _with_password(url: str, password_file: Path) -> URL:
    try:
        return make_url(url).set(password=password_file.read_text("utf-8").strip())
    except (ArgumentError, ValueError):
        raise ConfigError("database.url cannot be read; it looks like postgresql+psycopg://user@host/name") from None
    except OSError as error:
        raise ConfigError(f"database.password_file cannot be read: {error.strerror}") from error
