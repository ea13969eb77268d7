"""A gRPC channel whose calls raise `SottoError` instead of `grpc.aio.AioRpcError`, while they stream too.

The channel wraps its calls itself. gRPC's client interceptors would see a call only when it starts, and what a stream
raises later would pass them by.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from typing import Any, Final

import grpc

from ..errors import SottoError, UnavailableError
from .errors import from_rpc_error
from .identity import METADATA_KEY, Identity
from .options import DEFAULT_MAX_MESSAGE_BYTES, client_options
from .tls import TlsFiles, check_transport, client_credentials, is_loopback
from .validity import why_not


def connect(
    address: str,
    *,
    tls: TlsFiles | None,
    insecure: bool = False,
    identity: Identity | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    call_timeout_s: float | None = None,
) -> grpc.aio.Channel:
    """A channel to `address`; generated stubs take it like any other. It dials with the first call.

    A failed call raises the error that the server raised (found by `ErrorInfo.reason`), and where there is no such
    detail what the status means: `UnavailableError`, `DeadlineError`, … with the address in the text.

    Args:
        address: "host:port"; with TLS the host must be in the server's certificate.
        tls: this end's certificate and key, and the CA of the federation; None only with `insecure`.
        insecure: plaintext; loopback addresses only.
        identity: who calls, where `insecure`; with TLS the certificate says it.
        max_message_bytes: of one message, both ways.
        call_timeout_s: of a call that does not stream and names no timeout of its own; None: as long as it takes.

    Raises:
        ConfigError: neither TLS nor plaintext on loopback, or TLS files that cannot be used.
    """
    check_transport("server.address", address, tls=tls, insecure=insecure)
    options = client_options(max_message_bytes)
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))  # a proxy in the environment would look for it on its own machine
    metadata: tuple[tuple[str, str], ...] = ()
    if tls is None:
        channel = grpc.aio.insecure_channel(address, options=options)
        if identity is not None:
            metadata = ((METADATA_KEY, str(identity)),)
    else:
        channel = grpc.aio.secure_channel(address, client_credentials(tls), options=options)
    return _Channel(channel, _Other(address, tls), metadata, call_timeout_s=call_timeout_s)


class _Other:
    """The other end: where it is, and what is said of it when a call fails."""

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        self._address = address
        self._tls = tls

    def error(self, error: grpc.aio.AioRpcError) -> SottoError:
        """What a failed call raises. Of a handshake that fails gRPC says not enough: it is asked why, once a minute."""
        said = from_rpc_error(error, address=self._address)
        text = (error.details() or "").lower()
        if self._tls is None or not isinstance(said, UnavailableError) or not any(each in text for each in _BROKEN_OFF):
            return said
        why = why_not(self._address, certificate=self._tls.certificate, key=self._tls.key)
        if not why:
            return said
        found = UnavailableError(f"{self._address} cannot be worked with: {why}", address=self._address)
        found.remote = True
        return found


_BROKEN_OFF: Final = ("handshake", "ssl", "certificate", "socket closed", "reset", "eof", "goaway")
"""In what gRPC says of a connection that was made, and came to nothing."""


class _Channel(grpc.aio.Channel):
    """Makes what generated stubs ask a channel for, wrapped."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        other: _Other,
        metadata: tuple[tuple[str, str], ...],
        *,
        call_timeout_s: float | None,
    ) -> None:
        self._channel = channel
        self._other = other
        self._metadata = metadata
        self._call_timeout_s = call_timeout_s

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.unary_unary(method, *args, **kwargs), timeout_s=self._call_timeout_s)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.unary_stream(method, *args, **kwargs))

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.stream_unary(method, *args, **kwargs), streams_requests=True)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.stream_stream(method, *args, **kwargs), streams_requests=True)

    def _wrap(
        self, inner: Callable[..., Any], *, streams_requests: bool = False, timeout_s: float | None = None
    ) -> _MultiCallable:
        return _MultiCallable(
            inner, self._other, metadata=self._metadata, streams_requests=streams_requests, timeout_s=timeout_s
        )

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _MultiCallable:
    """A method of a stub: called with a request (or an iterator of requests), it returns the call."""

    def __init__(
        self,
        inner: Callable[..., Any],
        other: _Other,
        *,
        metadata: tuple[tuple[str, str], ...],
        streams_requests: bool,
        timeout_s: float | None,
    ) -> None:
        self._timeout_s = timeout_s
        self._inner = inner
        self._other = other
        self._metadata = metadata
        self._streams_requests = streams_requests

    def __call__(self, request: Any = None, *, metadata: Iterable[tuple[str, Any]] | None = None, **kwargs: Any) -> Any:
        source = _Source(request) if self._streams_requests and request is not None else None
        args = () if request is None else (source or request,)
        if self._timeout_s is not None:
            kwargs = {"timeout": self._timeout_s, **kwargs}
        call = self._inner(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)
        return _Call(call, self._other, source)


class _Source:
    """The requests of a call, remembering what their iterator raised: gRPC would only cancel the call."""

    def __init__(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        self._requests = requests
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            if isinstance(self._requests, AsyncIterable):
                async for request in self._requests:
                    yield request
            else:
                for request in self._requests:
                    yield request
        except Exception as error:
            self.error = error
            raise


class _Call:
    """A call under way. Awaiting, iterating, reading and writing translate; the rest is the call's own."""

    def __init__(self, call: Any, other: _Other, source: _Source | None) -> None:
        self._call = call
        self._other = other
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        with self._translated():
            return (yield from self._call.__await__())

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            with self._translated():
                async for response in self._call:
                    yield response
        finally:
            self._call.cancel()  # who stops listening hangs up; a call that is over stays as it is

    async def read(self) -> Any:
        with self._translated():
            return await self._call.read()

    async def write(self, request: Any) -> None:
        with self._translated():
            await self._send(self._call.write(request))

    async def done_writing(self) -> None:
        with self._translated():
            await self._send(self._call.done_writing())

    async def wait_for_connection(self) -> None:
        with self._translated():
            await self._call.wait_for_connection()

    async def _send(self, step: Awaitable[None]) -> None:
        try:
            await step
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write after the server ended the call fails for reasons of its own: what matters is why it ended.
            if isinstance(self._call, Awaitable):
                await self._call
            raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._other.error(error) from error
        except asyncio.CancelledError:
            if self._source is not None and self._source.error is not None:
                raise self._source.error from None
            raise
