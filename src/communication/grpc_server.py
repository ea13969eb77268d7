"""A gRPC server: mutual TLS, a role table, translated errors, health, and reflection on request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..descriptors import room_for_connections
from ..errors import AuthenticationError, ConfigError, StateError
from .bounds import BoundedCalls, Bounds
from .connections import hang_up
from .errors import ServerErrors
from .identity import Gate
from .options import DEFAULT_MAX_MESSAGE_BYTES, Options, server_options
from .tls import TlsFiles, check_transport, server_credentials

OPEN_STREAM_S: Final = 3600.0
"""Of a stream that anybody with a certificate may open and nothing else ends: of health and reflection."""
_OPEN_STREAMS: Final = (
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
NOT_SERVING_S: Final = 1.0
"""How long a stopping server tries to say so to those who watch its health: one that does not read would keep it."""
_IN_USE: Final = "is another process listening there?"


class GrpcServer:
    """One listening address. Services are added, then it is started once and stopped once.

    Args:
        listen: "host:port"; port 0 takes a free one.
        tls: certificate, key and CA; None only with `insecure`.
        insecure: plaintext, with identities from metadata; loopback addresses only.
        federation: whose members may call.
        roles: full method name → roles that may call it; a method without a row is for nobody.
        reflection: describe the services to clients that ask.
        heartbeat_interval_s: how often a silent client is asked whether it is there.
        max_message_bytes: of one message, both ways.
        bounds: what one caller may hold.
        check: whether a message of a request may go on to its method; raises where not.

    Raises:
        ConfigError: neither TLS nor plaintext on loopback.
    """

    def __init__(
        self,
        *,
        listen: str,
        tls: TlsFiles | None,
        insecure: bool,
        federation: str,
        roles: Mapping[str, frozenset[str]],
        reflection: bool = False,
        heartbeat_interval_s: float = 10.0,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        bounds: Bounds | None = None,
        check: Callable[[Any], None] = lambda _message: None,
    ) -> None:
        check_transport("server.listen", listen, tls=tls, insecure=insecure)
        self._listen = listen
        self._tls = tls
        self._gate = Gate(federation, roles, insecure=insecure)
        self._reflection = reflection
        bounds = bounds or Bounds()
        self._bounds = replace(
            bounds, lifetimes_s={**dict.fromkeys(_OPEN_STREAMS, OPEN_STREAM_S), **bounds.lifetimes_s}
        )
        self._check = check
        self._max_message_bytes = max_message_bytes
        self._ping_interval_s = heartbeat_interval_s
        self._port = 0
        self._services: list[tuple[str, Callable[[Any, Any], None], Any]] = []
        self._server: Any = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it

    def add(self, add_servicer: Callable[[Any, Any], None], servicer: Any, service: str) -> None:
        """Serves `servicer`, a generated servicer's subclass with asynchronous methods.

        Args:
            add_servicer: the generated `add_…Servicer_to_server`.
            servicer: the object.
            service: full name, "sotto.v1.JobService".
        """
        if self._server is not None:
            raise StateError("services are added before the server starts")
        self._services.append((service, add_servicer, servicer))

    def try_address(self) -> None:
        """Whether the address could be bound now: asked before anything is started that takes long, and because gRPC
        would write lines of its own about it.

        Raises:
            ConfigError: it could not.
        """
        host, _, port = self._listen.rpartition(":")
        try:
            places = socket.getaddrinfo(
                host.removeprefix("[").removesuffix("]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, ValueError) as error:
            raise self._cannot_bind("the host has no address here", error) from error
        failed: OSError | None = None
        for family, kind, protocol, _, place in places:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    if os.name == "posix":  # as gRPC does: what a listener left behind is no listener
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(place)
                return
            except OSError as error:
                failed = error
        other = failed is not None and failed.errno != errno.EADDRINUSE and failed.strerror
        raise self._cannot_bind(other or _IN_USE, failed) from failed

    def _cannot_bind(self, why: str, error: Exception | None) -> ConfigError:
        problem = f"server.listen: {self._listen} cannot be bound: {why}"
        return ConfigError(problem, problems=(problem,), private=str(error))

    async def start(self) -> int:
        """Binds, serves, and returns the port.

        Raises:
            ConfigError: the TLS files cannot be used, or the address cannot be bound.
        """
        if self._server is not None:
            raise StateError("the server was started already")
        self.try_address()
        credentials = server_credentials(self._tls) if self._tls is not None else None
        calls = BoundedCalls(
            self._bounds,
            who=self._who,
            hang_up=lambda peer: hang_up(peer, port=self._port),
            check=self._check,
        )
        server = grpc.aio.server(interceptors=(ServerErrors(), self._gate, calls), options=self._options())
        names = [health.SERVICE_NAME, *(service for service, _, _ in self._services)]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for _, add_servicer, servicer in self._services:
            add_servicer(servicer, server)
        if self._reflection:
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        try:
            if credentials is None:
                port = server.add_insecure_port(self._listen)
            else:
                port = server.add_secure_port(self._listen, credentials)
        except RuntimeError as error:
            raise self._cannot_bind(_IN_USE, error) from error
        self._port = int(port)
        await server.start()
        self._server = server
        for name in names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self._port

    def _options(self) -> Options:
        return server_options(
            self._max_message_bytes,
            ping_interval_s=self._ping_interval_s,
            max_concurrent_streams=self._bounds.concurrent_streams,
            max_connections=room_for_connections(),
        )

    def _who(self, context: Any) -> str:
        """Whose calls are counted together: whoever the certificate names; all others count as one."""
        try:
            return str(self._gate.identify(context))
        except AuthenticationError:
            return "whoever has no identity in this federation"

    async def ended(self) -> None:
        """Returns when it does not serve any more, for whatever reason."""
        if self._server is not None:
            # Without a timeout gRPC waits for what `stop` waits for, and who is cancelled here would cancel that.
            while await self._server.wait_for_termination(timeout=3600):
                pass

    async def stop(self, grace_s: float = 5.0) -> None:
        """Says NOT_SERVING, takes no new calls, gives those under way `grace_s` and then cancels them."""
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NOT_SERVING_S):
                    await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)
