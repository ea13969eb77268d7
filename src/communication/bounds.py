"""What one caller may hold of a server, and for how long.

Every method is served through here: calls are counted for whoever makes them, from before the first byte of a request
is read; a stream that brings nothing and an answer that nobody takes are ended. On the wire nothing changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from ..errors import DeadlineError, InvalidInput, UnavailableError
from .calls import Call, CallCounts
from .handlers import Handler, parse

LOG: Final = logging.getLogger("sotto.communication")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a server lets one caller have.

    Attributes:
        streams: calls at a time that stream. A party needs three; a scientist who follows as many jobs as may wait and
            run, some fifty.
        requests: other calls at a time.
        silence_s: how long a stream may bring no further message, and a message to the caller may take: 4 MiB, the
            largest by default, within a minute is 0.6 Mbit/s. It is progress that counts; a whole stream may take as
            long as what it is for.
        lifetimes_s: of streams that nothing else ends, by full method name; their callers open them again.
    """

    streams: int = 64
    requests: int = 64
    silence_s: float = 60.0
    lifetimes_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def concurrent_streams(self) -> int:
        """For HTTP/2, of one connection: more than the calls above, so that who has too many hears of it. What is
        beyond this waits at the caller, in silence."""
        return 2 * (self.streams + self.requests)


class BoundedCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Serves every method within its bounds. To be the innermost interceptor: who calls is known by then.

    Args:
        bounds: for each caller.
        who: calls, for an RPC's context; the text says it to people too.
        hang_up: on the connection of a peer, as gRPC names it.
        check: whether a message may go on to its handler; raises where not.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        who: Callable[[Any], str],
        hang_up: Callable[[str], bool],
        check: Callable[[Any], None] = lambda _message: None,
    ) -> None:
        self._bounds = bounds
        self._who = who
        self._hang_up = hang_up
        self._check = check
        self._counts = CallCounts(streams=bounds.streams, requests=bounds.requests)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Handler:
        """Makes the method one whose requests stream: then its handler begins before one is there."""
        handler: Handler = await continuation(handler_call_details)
        if handler is None:
            return None
        lifetime_s = self._bounds.lifetimes_s.get(handler_call_details.method)
        streams = handler.request_streaming or handler.response_streaming

        async def serve(requests: Any, context: Any) -> Any:
            caller = _Caller(self._who(context), context, silence_s=self._bounds.silence_s, hang_up=self._hang_up)
            give_back = self._counts.take(caller.who, streams=streams)
            context.add_done_callback(lambda _: give_back())  # not before the last byte of the answer is taken
            call = Call()
            with call.running():
                answer = _Answer(handler, requests, _Writer(caller, call), check=self._check)
                response = await _within(lifetime_s, answer.give(self._bounds.silence_s))
            if not handler.response_streaming:
                caller.has_to_take_the_rest()
            return response

        build = grpc.stream_stream_rpc_method_handler if handler.response_streaming else _STREAM_UNARY
        return build(serve, request_deserializer=None, response_serializer=handler.response_serializer)


_STREAM_UNARY: Final = grpc.stream_unary_rpc_method_handler


async def _within(lifetime_s: float | None, work: Awaitable[Any]) -> Any:
    lifetime = asyncio.timeout(lifetime_s)
    try:
        async with lifetime:
            return await work
    except TimeoutError:
        if not lifetime.expired():
            raise
        raise UnavailableError(f"a stream of this kind lasts {lifetime_s:g} s; open it again") from None


class _Caller:
    """Whoever called, and what becomes of one that does not take what it asked for: see `connections.hang_up`."""

    def __init__(self, who: str, context: Any, *, silence_s: float, hang_up: Callable[[str], bool]) -> None:
        self.who = who
        self.context = context
        self.silence_s = silence_s
        self._hang_up = hang_up

    async def left_hanging(self) -> bool:
        """Hangs up on it; whether its connection was found."""
        peer = self.context.peer()
        LOG.warning("%s at %s takes nothing of what it asked for; hanging up", self.who, peer)
        return await asyncio.to_thread(self._hang_up, peer)

    def has_to_take_the_rest(self) -> None:
        """Watches an answer that gRPC sends by itself, until the call is over."""
        loop = asyncio.get_running_loop()

        def too_long() -> None:
            task = loop.create_task(self.left_hanging())
            self.context.add_done_callback(lambda _: task.cancel())  # which keeps the task, too

        timer = loop.call_later(self.silence_s, too_long)
        self.context.add_done_callback(lambda _: timer.cancel())


class _Writer:
    """An RPC's context whose messages have to be taken in time. The rest is the context's own."""

    def __init__(self, caller: _Caller, call: Call) -> None:
        self._caller = caller
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._caller.context, name)

    async def write(self, message: Any) -> None:
        """Sends one message."""
        taking = asyncio.timeout(self._caller.silence_s)
        try:
            with self._call.writing():
                async with taking:
                    await self._caller.context.write(message)
        except grpc.aio.InternalError:  # the caller is gone: whoever cancels this task has not come to it yet
            raise asyncio.CancelledError from None
        except TimeoutError:
            if not taking.expired():
                raise
            if not await self._caller.left_hanging():
                raise DeadlineError(f"the answer was not taken within {self._caller.silence_s:g} s") from None
            raise asyncio.CancelledError from None


class _Answer:
    """One method's handler, applied to the messages of one call."""

    def __init__(
        self, handler: Handler, messages: AsyncIterator[bytes], context: _Writer, *, check: Callable[[Any], None]
    ) -> None:
        self._handler = handler
        self._messages = messages
        self._context = context
        self._check = check

    async def give(self, silence_s: float) -> Any:
        """Reads what the method takes, and writes what it gives; returns it where that is one message."""
        handler, context = self._handler, self._context
        kinds = ["stream" if each else "unary" for each in (handler.request_streaming, handler.response_streaming)]
        function = getattr(handler, "_".join(kinds))
        async with contextlib.aclosing(self._requests(silence_s)) as requests:
            request = requests if handler.request_streaming else await _only(requests)
            if not handler.response_streaming:
                return await function(request, context)
            if not inspect.isasyncgenfunction(function):
                return await function(request, context)
            async with contextlib.aclosing(function(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
        return None

    async def _requests(self, silence_s: float) -> AsyncGenerator[Any]:
        iterator = aiter(self._messages)
        while True:
            waiting = asyncio.timeout(silence_s)
            try:
                async with waiting:
                    data = await anext(iterator)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not waiting.expired():
                    raise
                raise DeadlineError(f"nothing came for {silence_s:g} s") from None
            message = parse(self._handler.request_deserializer, data)
            self._check(message)
            yield message


async def _only(requests: AsyncIterator[Any]) -> Any:
    """The request of a method that takes one."""
    async for request in requests:
        return request
    raise InvalidInput("the call has no request")
