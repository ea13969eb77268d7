"""How PostgreSQL is reached: on this machine, or by TLS to a server that has proven its name.

Jobs, models' names and the ledger travel on this connection, and what a role believes of its budget comes from it. So
to another host there is no other way than `sslmode=verify-full`: with less libpq encrypts and does not look who is at
the other end, or (its default) does without encryption when it is told to. What libpq takes from elsewhere (PGSSLMODE,
a service file, GSSAPI) is overridden.
https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from typing import Final

from sqlalchemy import URL

from ..errors import ConfigError

REQUIRED: Final[Mapping[str, str]] = {
    "sslmode": "verify-full",
    "gssencmode": "disable",  # where there is a ticket libpq would encrypt by GSSAPI instead, and not look at sslmode
}

_PORT: Final = re.compile(r":\d*$")


def transport_of(url: URL, *, insecure: bool = False, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Parameters of the connection, besides those of the URL.

    Args:
        url: of the database.
        insecure: the operator has said that another host may be reached in whatever way the URL says.
        environ: where libpq looks for what the URL leaves out; the process's environment by default.

    Raises:
        ConfigError: the URL asks for less than `REQUIRED`, and is not only of this machine.
    """
    if insecure or is_local(url, environ=os.environ if environ is None else environ):
        return {}
    for name, needed in REQUIRED.items():
        found = set(_values(url, name))
        if found - {needed}:
            raise ConfigError(
                f"database.url: to another host {name} is {needed}, which need not be said; the URL says "
                f"{', '.join(sorted(found))} (database.insecure_transport: true allows that, and whoever is between to "
                "read and change everything)"
            )
    return dict(REQUIRED)


def is_local(url: URL, *, environ: Mapping[str, str]) -> bool:
    """Whether every server that libpq may try for this URL is on this machine: a Unix socket, or loopback.

    A service stands for whatever its file says, and is none.
    """
    if any(_values(url, "service")) or (environ.get("PGSERVICE") and "service" not in url.query):
        return False
    return all(map(_is_local, _places(url, environ)))


def _places(url: URL, environ: Mapping[str, str]) -> Iterator[str]:
    """Names and addresses, "" for the default, a socket. Both count: libpq verifies the one and dials the other."""
    named = [*([url.host] if url.host else []), *_values(url, "host")]
    yield from named if named else environ.get("PGHOST", "").split(",")
    yield from _values(url, "hostaddr") if "hostaddr" in url.query else environ.get("PGHOSTADDR", "").split(",")


def _values(url: URL, name: str) -> Iterator[str]:
    """Of a parameter that may be there more than once, and list several each time."""
    given = url.query.get(name, ())
    for each in (given,) if isinstance(given, str) else given:
        yield from each.split(",")


def _is_local(place: str) -> bool:
    place = place.strip()
    if not place or place[0] in "/@":  # a directory, or a name in Linux's abstract namespace
        return True
    for text in (place, _PORT.sub("", place)):
        try:
            return ipaddress.ip_address(text.strip("[]")).is_loopback
        except ValueError:
            if text.lower() == "localhost":
                return True
    return False
