"""Who is calling, from the certificate, and what they may call, from one table.

A certificate names its holder by one URI in the subject alternative name, after SPIFFE ("The SPIFFE Identity and
Verifiable Identity Document", section 2): `spiffe://<federation>/<role>/<name>`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import grpc

from ..errors import AccessError, AuthenticationError, InvalidInput
from ..logs import on_behalf_of
from .handlers import Handler, around

Role = Literal["party", "scientist", "operator", "aggregator"]
ROLES: Final[frozenset[str]] = frozenset(get_args(Role))

METADATA_KEY: Final = "sotto-identity"
"""Carries `role/name` where there is no TLS; a server with TLS never reads it."""

OPEN_SERVICES: Final = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
)
"""For anyone who got through the handshake: they say nothing about the federation's work."""

NOBODY: Final = "a caller who is not known"
"""On whose behalf the log counts what is refused before it is known who called."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody in a federation: a role, and a name that is unique in it (letters, digits, ".", "_", "-"; at most 63).

    Raises:
        InvalidInput: an unknown role or a malformed name.
    """

    role: Role
    name: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidInput(f"there is no such role: {self.role[:40]!r}", violations={"role": "unknown"})
        if not _NAME.fullmatch(self.name):
            raise InvalidInput("not a name: 1 to 63 letters, digits, '.', '_', '-'", violations={"name": "malformed"})

    def __str__(self) -> str:
        return f"{self.role}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """The identity in "role/name". Raises InvalidInput."""
        role, slash, name = text.partition("/")
        if not slash:
            raise InvalidInput("not an identity: it is written role/name")
        return cls(cast("Role", role), name)


def spiffe_id(federation: str, identity: Identity) -> str:
    """The URI that names `identity` in a certificate. Raises InvalidInput for a malformed federation name."""
    if not _NAME.fullmatch(federation):
        raise InvalidInput("not a federation's name: 1 to 63 letters, digits, '.', '_', '-'")
    return f"spiffe://{federation}/{identity}"


def parse_spiffe_id(uri: str) -> tuple[str, Identity]:
    """The federation and the identity in such a URI. Raises InvalidInput."""
    scheme, separator, rest = uri.partition("://")
    federation, slash, identity = rest.partition("/")
    if scheme != "spiffe" or not separator or not slash or not _NAME.fullmatch(federation):
        raise InvalidInput("not an identity: it is written spiffe://federation/role/name")
    return federation, Identity.parse(identity)


def certified(pem: bytes) -> tuple[str, Identity]:
    """The federation and the identity that a certificate names.

    Args:
        pem: a certificate, or a chain that begins with it.

    Raises:
        AuthenticationError: it names nobody, or more than one.
        ValueError: no certificate.
    """
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return _named([])
    return _named(names.get_values_for_type(x509.UniformResourceIdentifier))


_caller: ContextVar[Identity] = ContextVar("sotto_caller")


def caller() -> Identity:
    """Who called the RPC that this task answers.

    Raises:
        AuthenticationError: nobody known; never inside an RPC that the role table has a row for.
    """
    try:
        return _caller.get()
    except LookupError:
        raise AuthenticationError("who is calling is not known") from None


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Lets a call through when its caller is known and its method's row has the caller's role.

    Args:
        federation: to whose members the server talks.
        roles: full method name ("/package.Service/Method") → roles that may call it. A method without a row is for
            nobody.
        insecure: the server has no TLS: believe the metadata.
    """

    def __init__(self, federation: str, roles: Mapping[str, frozenset[str]], *, insecure: bool) -> None:
        unknown = frozenset().union(*roles.values()) - ROLES
        if unknown:
            raise ValueError(f"the role table has roles that do not exist: {sorted(unknown)}")
        self._federation = federation
        self._roles = {"/" + method.lstrip("/"): frozenset(allowed) for method, allowed in roles.items()}
        self._insecure = insecure

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Handler:
        """Wraps the method's handler; what the caller may do is decided before any of the request is read."""
        handler: Handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(OPEN_SERVICES):
            return handler
        return around(handler, lambda context: self._admit(method, context))

    def identify(self, context: Any) -> Identity:
        """Who calls, for an RPC's context. Raises AuthenticationError."""
        if self._insecure:
            return _from_metadata(context.invocation_metadata() or ())
        return _from_certificate(context.auth_context(), self._federation)

    @contextlib.asynccontextmanager
    async def _admit(self, method: str, context: Any) -> AsyncIterator[None]:
        on_behalf_of(NOBODY)
        identity = self.identify(context)
        on_behalf_of(str(identity))
        if identity.role not in self._roles.get(method, frozenset()):
            raise AccessError(f"a {identity.role} may not call {method}", role=identity.role, method=method)
        # Every RPC is answered in a task of its own, so that there is nothing to reset.
        _caller.set(identity)
        yield


def _from_certificate(properties: Mapping[str, Iterable[bytes]], federation: str) -> Identity:
    # Only URIs: a DNS entry of the same spelling names nobody.
    found, identity = _named([value.decode("utf-8", "replace") for value in properties.get("peer_uri", ())])
    if found != federation:
        raise AuthenticationError(f"the certificate is of another federation: {found}", federation=found)
    return identity


def _named(uris: Iterable[str]) -> tuple[str, Identity]:
    named = [uri for uri in uris if uri.startswith("spiffe://")]
    if len(named) != 1:
        raise AuthenticationError("the certificate must hold exactly one spiffe:// URI as alternative name")
    try:
        return parse_spiffe_id(named[0])
    except InvalidInput as error:
        raise AuthenticationError(f"the certificate's URI is {error.message}") from None


def _from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> Identity:
    values = [value for key, value in metadata if key == METADATA_KEY]
    if len(values) != 1 or not isinstance(values[0], str):
        raise AuthenticationError(f"without TLS the metadata must hold {METADATA_KEY}: role/name once")
    try:
        return Identity.parse(values[0])
    except InvalidInput as error:
        raise AuthenticationError(f"{METADATA_KEY}: {error.message}") from None
