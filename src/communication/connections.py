"""The server's end of its connections, which gRPC for Python does not show: hanging up on one of them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import unquote

_DESCRIPTORS: Final = Path("/dev/fd")


def hang_up(peer: str, *, port: int) -> bool:
    """Close the connection of a peer to a listening port of this process; whether there was one.

    A caller that does not read keeps what was sent to it, and the end of its calls, waiting for as long as it likes:
    no status of a call gets past a full window. Only the connection can be ended, and it is found among this process's
    descriptors by both of its ends.

    Args:
        peer: as gRPC names it: "ipv4:127.0.0.1:40000", "ipv6:%5B::1%5D:40000".
        port: on which this process listens.
    """
    wanted = _place(peer)
    if wanted is None:
        return False
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208  # names, not paths
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, no socket, not connected
            descriptor = os.dup(int(name))  # so that it cannot become another's between the question and the answer
            try:
                found = socket.socket(fileno=descriptor)
            except OSError:
                os.close(descriptor)
                continue
            with found:
                if _ends(found) == (wanted, port):
                    found.shutdown(socket.SHUT_RDWR)
                    return True
    return False


def host_of(peer: str) -> str:
    """The address of a peer, as gRPC names it, without its port; empty for one that has none."""
    found = _place(peer)
    return found[0] if found else ""


def _ends(found: socket.socket) -> tuple[tuple[str, int], int] | None:
    if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
        return None
    host, port = found.getpeername()[:2]
    return (_host(host), port), found.getsockname()[1]


def _place(peer: str) -> tuple[str, int] | None:
    family, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return _host(host.removeprefix("[").removesuffix("]")), int(port)


def _host(text: str) -> str:
    """One spelling for an address, also of IPv4 over a socket of IPv6."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
