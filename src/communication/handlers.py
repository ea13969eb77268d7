"""Wrapping the handler of an RPC, of any of the four kinds, in an asynchronous context."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from ..errors import InvalidInput

Handler: TypeAlias = Any
"""`grpc.RpcMethodHandler`, whose fields the type stubs do not know."""

_BUILDERS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def around(handler: Handler, enter: Callable[[Any], AbstractAsyncContextManager[None]]) -> Handler:
    """A handler that does what `handler` does inside `enter(context)`.

    Requests are parsed inside too: nothing of them is looked at before `enter` agrees, and a malformed one is an
    `InvalidInput` that surrounding handlers can translate.

    Args:
        handler: its function is a coroutine function or, where it streams responses, an asynchronous generator.
        enter: of the RPC's context.
    """
    name, build = _BUILDERS[handler.request_streaming, handler.response_streaming]
    function = getattr(handler, name)
    deserializer = handler.request_deserializer

    def parsed(request: Any) -> Any:
        if deserializer is None:  # a handler inside this one parses
            return request
        return _parse_each(deserializer, request) if handler.request_streaming else parse(deserializer, request)

    if inspect.isasyncgenfunction(function):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            async with enter(context), contextlib.aclosing(function(parsed(request), context)) as responses:
                async for response in responses:
                    yield response

        wrapped: Callable[..., Any] = generate
    else:

        async def answer(request: Any, context: Any) -> Any:
            async with enter(context):
                return await function(parsed(request), context)

        wrapped = answer
    return build(wrapped, request_deserializer=None, response_serializer=handler.response_serializer)


def parse(deserializer: Callable[[bytes], Any], data: bytes) -> Any:
    """The message in `data`. Raises InvalidInput."""
    try:
        return deserializer(data)
    except (DecodeError, UnicodeDecodeError):
        raise InvalidInput("the request is not a message of this method") from None


async def _parse_each(deserializer: Callable[[bytes], Any], stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in stream:
        yield parse(deserializer, data)
