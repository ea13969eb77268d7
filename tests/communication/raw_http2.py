"""A caller that speaks just enough HTTP/2 (RFC 9113) to do what no gRPC client does: open calls and say nothing, ask
for answers and never take them. It answers pings, so that its connection looks alive."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
_ACK: Final = 1
_END_HEADERS: Final = 4
_INITIAL_WINDOW_SIZE: Final = 4
PATIENCE_S: Final = 30.0  # only a hang reaches it


class RawCaller:
    """One connection. `frames` holds what came: (kind, stream)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, identity: str) -> None:
        self._reader, self._writer, self._identity = reader, writer, identity
        self._stream = -1
        self.frames: list[tuple[int, int]] = []
        self._came = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, port: int, *, identity: str = "scientist/eve", window: int = 0) -> RawCaller:
        """To a server without TLS; `window` is how many bytes of each answer are taken."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_PREFACE + _frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)))
        return cls(reader, writer, identity)

    def call(self, method: str, message: bytes | None = None) -> int:
        """Begins a call; without a message that is all that ever comes of it. The stream's number."""
        self._stream += 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            "sotto-identity": self._identity,
        }
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
        self._writer.write(_frame(HEADERS, _END_HEADERS, self._stream, block))
        if message is not None:
            self._writer.write(_frame(DATA, 0, self._stream, b"\0" + struct.pack(">I", len(message)) + message))
        return self._stream

    async def until_ended(self, *streams: int) -> None:
        """Until the server has ended these calls."""
        await self._until(lambda: all((RST_STREAM, each) in self.frames for each in streams))

    async def until_answered(self, stream: int) -> None:
        """Until the server has begun to answer this call."""
        await self._until(lambda: (HEADERS, stream) in self.frames)

    async def until_hung_up(self) -> None:
        """Until the connection is closed."""
        await self._until(self._listening.done)

    @property
    def connected(self) -> bool:
        """Whether the connection is there."""
        return not self._listening.done()

    async def close(self) -> None:
        self._writer.close()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _until(self, condition: object) -> None:
        assert callable(condition)
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._came.clear()
                await self._came.wait()

    async def _listen(self) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head = await self._reader.readexactly(9)
                    kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                    payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                    if kind in (SETTINGS, PING) and not flags & _ACK:
                        self._writer.write(_frame(kind, _ACK, 0, payload if kind == PING else b""))
                    self.frames.append((kind, stream))
                    self._came.set()
        finally:
            asyncio.get_running_loop().call_soon(self._came.set)


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _text(value: str) -> bytes:
    """A string literal of HPACK (RFC 7541, section 5.2), not compressed."""
    data = value.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data
