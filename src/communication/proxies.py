"""Proxies that the environment names: gRPC goes through them by itself, and its errors do not say so."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from ..text import printable
from .tls import host_of, is_loopback

_NAMES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""In the order in which gRPC's core looks for one (its doc/environment_variables.md); the first that is set counts."""
_EXCEPTIONS: Final = ("no_grpc_proxy", "no_proxy")
"""Likewise: hosts, their suffixes, and networks for which there is none."""
_SHOWN: Final = 200


def advice(address: str, environ: Mapping[str, str] | None = None) -> str:
    """What to say of a connection to `address` that failed, where a proxy stood in its way; "" where none did.

    Args:
        address: "host:port".
        environ: of this process by default.
    """
    given = os.environ if environ is None else environ
    name = next((each for each in _NAMES if given.get(each) is not None), None)
    if name is None or is_loopback(address):
        return ""
    try:
        parts = urlsplit(given[name])
    except ValueError:  # no address at all: gRPC says that itself
        return ""
    excepted = next((given[each] for each in _EXCEPTIONS if each in given), "")
    host = host_of(address)
    if parts.scheme != "http" or _is_excepted(host, excepted):
        return ""
    proxy = printable(given[name].rpartition("@")[2].removeprefix("http://"), _SHOWN)  # without a password
    return (
        f"the connection goes through the proxy {proxy} that the environment variable {name} names; if that is not "
        f"meant, add {host} to no_proxy, and start this again"
    )


def _is_excepted(host: str, exceptions: str) -> bool:
    """As gRPC reads the list: what the host ends with, or a network that it is in. Names are not looked up here."""
    for entry in filter(None, map(str.strip, exceptions.split(","))):
        if host.lower().endswith(entry.lower()):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
