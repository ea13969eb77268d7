"""Until when certificates hold, by this machine's clock: whose, until when, and what the clock says, in one sentence.

The two times are read here from the certificate's DER (RFC 5280, section 4.1), because a command of the shell would
wait a quarter of a second for the import of a library that can; only who is named is looked up with it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from .identity import certified

WARN: Final = timedelta(days=60)
"""So long before a certificate ends its owner is told: kits are made by hand, and brought to their owners."""
PROBE_S: Final = 2.0
"""For each step of a probe."""
PROBED_S: Final = 60.0
"""How long the outcome of a probe is believed."""

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME: Final = 0x17
_VERSION: Final = 0xA0
_probed: dict[str, tuple[float, str]] = {}


def clock() -> datetime:
    """What this machine takes for the time."""
    return datetime.now(UTC)


def out_of_time(pem: bytes) -> str:
    """What is wrong with the first certificate of a chain that does not hold now; empty where all of them do."""
    now = clock()
    for der in _certificates(pem):
        begins, ends = _period(der)
        if now < begins:
            return f"the certificate of {_who(der)} holds from {_utc(begins)} on, and {_says(now)}: is the clock right?"
        if now >= ends:
            return f"the certificate of {_who(der)} held until {_utc(ends)}, and {_says(now)}: ask for a new one"
    return ""


def ends_soon(pem: bytes) -> str:
    """What to say of the certificate of a chain that ends first, if that is within `WARN` from now; else empty."""
    now, found = clock(), [(_period(der)[1], der) for der in _certificates(pem)]
    ends, der = min(found, default=(datetime.max.replace(tzinfo=UTC), b""))
    if not now <= ends <= now + WARN:
        return ""
    return (
        f"the certificate of {_who(der)} holds until {_utc(ends)}, {(ends - now).days} days from now: renew it in time"
    )


def warnings_of(*files: Path | None) -> list[str]:
    """`ends_soon` of each of these PEM files that can be read."""
    said = []
    for path in files:
        with contextlib.suppress(OSError):
            said.append(ends_soon(path.read_bytes()) if path is not None else "")
    return [text for text in dict.fromkeys(said) if text]


def certificate_of(context: Any) -> bytes:
    """The certificate that the caller of an RPC showed, as PEM; empty without TLS."""
    return next(iter(context.auth_context().get("x509_pem_cert", ())), b"")


def why_not(address: str, *, certificate: Path, key: Path) -> str:
    """What the clocks of both ends have against each other's certificate, asked of a server that gRPC cannot work with
    (and does not say why); empty where they have nothing, or nobody is there.

    Args:
        address: "host:port".
        certificate, key: of this end.
    """
    known = _probed.get(address)
    if known is not None and time.monotonic() - known[0] < PROBED_S:
        return known[1]
    try:
        said = _probe(address, certificate, key)
    except (OSError, ValueError):
        said = ""
    _probed.clear()  # who dials one address dials no other
    _probed[address] = time.monotonic(), said
    return said


def _probe(address: str, certificate: Path, key: Path) -> str:
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent, and nothing believed
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(certificate, key)
    host = host.removeprefix("[").removesuffix("]")
    with (
        socket.create_connection((host, int(port)), timeout=PROBE_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        shown = ssl.DER_cert_to_PEM_cert(wrapped.getpeercert(binary_form=True) or b"").encode()
        theirs = out_of_time(shown)
        if theirs:
            return f"{theirs} (the other end's)"
        # Of a certificate that it refuses gRPC's server says nothing: it hangs up where it would begin to speak.
        refused = not wrapped.recv(1)
    if not refused:
        return ""
    own = next(_certificates(certificate.read_bytes()))
    begins, ends = _period(own)
    return (
        f"it hangs up when it is shown the certificate of {_who(own)}, which holds from {_utc(begins)} to "
        f"{_utc(ends)}, and {_says(clock())}: its clock says otherwise, or it knows another authority"
    )


def _certificates(pem: bytes) -> Iterator[bytes]:
    for block in _PEM.findall(pem):
        yield ssl.PEM_cert_to_DER_cert(block.decode("ascii"))


def _period(der: bytes) -> tuple[datetime, datetime]:
    """When a certificate begins and ends to hold."""
    at = _inside(der, _inside(der, 0))  # Certificate, TBSCertificate
    for _ in range(4 if der[at] == _VERSION else 3):  # version (which may be left out), number, algorithm, issuer
        at = _after(der, at)
    at = _inside(der, at)
    return _time(der, at), _time(der, _after(der, at))


def _time(der: bytes, at: int) -> datetime:
    text = der[_inside(der, at) : _after(der, at)].decode("ascii")
    if der[at] == _UTC_TIME:  # two digits: 1950 to 2049
        text = f"{'19' if text >= '50' else '20'}{text}"
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _inside(der: bytes, at: int) -> int:
    """Where the content of the element at `at` begins."""
    long = der[at + 1]
    return at + 2 + (long & 0x7F if long & 0x80 else 0)


def _after(der: bytes, at: int) -> int:
    """Where the element at `at` ends."""
    begin, short = _inside(der, at), der[at + 1]
    return begin + (int.from_bytes(der[at + 2 : begin], "big") if short & 0x80 else short)


def _who(der: bytes) -> str:
    from cryptography import x509

    from ..errors import AuthenticationError

    try:
        federation, identity = certified(ssl.DER_cert_to_PEM_cert(der).encode())
    except AuthenticationError:
        return x509.load_der_x509_certificate(der).subject.rfc4514_string()
    return f"{identity} of {federation}"


def _says(now: datetime) -> str:
    return f"this machine's clock says {_utc(now)}"


def _utc(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"
