"""Where a role's database is, from its configuration."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import ConfigError


def database_location(path: Path, url: str | None, password_file: Path | None) -> Path | str | URL:
    """`path` for SQLite; where a URL is configured that one, with the password from its file.

    Raises:
        ConfigError: the URL or the file cannot be read.
    """
    if url is None:
        return path
    if password_file is None:
        return url
    try:
        return make_url(url).set(password=password_file.read_text().strip())
    except (ArgumentError, ValueError):
        raise ConfigError("database.url cannot be read; it looks like postgresql+psycopg://user@host/name") from None
    except OSError as error:
        raise ConfigError(f"database.password_file cannot be read: {error.strerror}") from error
