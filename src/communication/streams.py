"""Bytes larger than a message: in chunks out, verified in.

The first chunk of a stream announces size and SHA-256 of the whole. A receiver checks the size against its own limit
before it keeps a byte, every offset as it comes, and the digest before anybody sees the result.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

from ..errors import DigestError, InvalidInput, LimitError, UnavailableError
from ..storage.blobs import BlobRef, Blobs, BlobWriter
from .generated.common_pb2 import DataChunk

T = TypeVar("T")
R = TypeVar("R")

CHUNK_BYTES: Final = 512 << 10
"""Of one message: between 256 KiB and 1 MiB throughput over loopback and LAN is flat, and flow control still fine."""


async def send_bytes(data: bytes, *, offset: int = 0, chunk_bytes: int = CHUNK_BYTES) -> AsyncIterator[DataChunk]:
    """The chunks of `data` from `offset` on; at least one, which announces the whole.

    Raises:
        InvalidInput: `offset` is beyond the end.
    """
    _check_offset(offset, len(data))
    chunk = DataChunk(total_bytes=len(data), sha256=hashlib.sha256(data).digest())
    for begin in range(offset, max(len(data), offset + 1), chunk_bytes):
        chunk.offset = begin
        chunk.data = data[begin : begin + chunk_bytes]
        yield chunk
        chunk = DataChunk()


async def send_blob(
    blobs: Blobs, sha256: str, *, offset: int = 0, chunk_bytes: int = CHUNK_BYTES
) -> AsyncIterator[DataChunk]:
    """The chunks of a stored blob from `offset` on, read piece by piece in a thread.

    Raises:
        NotFoundError: no such blob.
        InvalidInput: `offset` is beyond the end.
    """
    size = await asyncio.to_thread(blobs.size, sha256)
    _check_offset(offset, size)
    first = DataChunk(offset=offset, total_bytes=size, sha256=bytes.fromhex(sha256))
    begin = offset
    async for piece in blob_pieces(blobs, sha256, offset=offset, piece_bytes=chunk_bytes):
        chunk = first if begin == offset else DataChunk(offset=begin)
        chunk.data = piece
        yield chunk
        begin += len(piece)
    if begin == offset:
        yield first


async def blob_pieces(
    blobs: Blobs, sha256: str, *, offset: int = 0, piece_bytes: int = CHUNK_BYTES
) -> AsyncIterator[bytes]:
    """The bytes of a stored blob from `offset` on, piece by piece, read in a thread. Between two of them no file is
    open, however long whoever takes them takes.

    Raises:
        NotFoundError: no such blob, or none any more.
    """
    while piece := await asyncio.to_thread(_piece, blobs, sha256, offset=offset, piece_bytes=piece_bytes):
        yield piece
        offset += len(piece)


def _piece(blobs: Blobs, sha256: str, *, offset: int, piece_bytes: int) -> bytes:
    with blobs.open(sha256) as file:
        file.seek(offset)
        return file.read(piece_bytes)


async def receive_bytes(
    stream: AsyncIterable[DataChunk], *, max_bytes: int, expected_sha256: str | None = None
) -> bytes:
    """The whole that `stream` carries, in memory; raises as `receive`."""
    sink = bytearray()
    await receive(stream, sink, max_bytes=max_bytes, expected_sha256=expected_sha256)
    return bytes(sink)


async def receive_blob(
    stream: AsyncIterable[DataChunk],
    blobs: Blobs,
    *,
    max_bytes: int,
    expected_sha256: str | None = None,
    storing: Callable[[str], object] = lambda _sha256: None,
) -> BlobRef:
    """The whole that `stream` carries, as a stored blob; raises as `receive`, and then nothing is stored.

    Args:
        storing: called with its digest once all of it has come, before it is stored under that.
    """
    with await asyncio.to_thread(blobs.writer) as writer:
        return await receive(stream, writer, max_bytes=max_bytes, expected_sha256=expected_sha256, storing=storing)


async def receive(
    stream: AsyncIterable[DataChunk],
    sink: bytearray | BlobWriter,
    *,
    max_bytes: int,
    expected_sha256: str | None = None,
    storing: Callable[[str], object] = lambda _sha256: None,
) -> BlobRef:
    """Takes a whole into `sink`, and returns its name.

    Args:
        stream: chunks in order. It begins at offset 0, or at `len(sink)` where a bytearray holds the part before.
        sink: a bytearray, or a writer, which is committed at the end.
        max_bytes: how large the whole may be.
        expected_sha256: its digest where the receiver knows it already, hex.
        storing: called with its digest before a writer is committed.

    Raises:
        LimitError: the whole is announced larger than `max_bytes`; nothing was kept of it.
        DigestError: the bytes are not what was announced: other digest, too few, too many, a gap.
        InvalidInput: the first chunk does not announce the whole, or a later one is empty.
        StorageError: the writer cannot write.
    """
    digest = hashlib.sha256(sink if isinstance(sink, bytearray) else b"")
    position = len(sink) if isinstance(sink, bytearray) else sink.size
    total: int | None = None
    announced = b""
    async for chunk in stream:
        if total is None:
            total, announced = _announced(chunk, max_bytes=max_bytes, expected_sha256=expected_sha256)
        elif not chunk.data:
            raise InvalidInput("a chunk is empty", violations={"data": "must not be empty"})
        if chunk.offset != position:
            raise DigestError(f"a chunk begins at byte {chunk.offset} where {position} was expected")
        if position + len(chunk.data) > total:
            raise DigestError(f"more than the announced {total} bytes were sent")
        position += len(chunk.data)
        if isinstance(sink, bytearray):
            digest.update(chunk.data)
            sink += chunk.data
        else:
            await asyncio.to_thread(sink.write, chunk.data)
    if total is None:
        raise InvalidInput("the stream is empty: its first chunk announces the whole")
    if position < total:
        raise DigestError(f"{position} of the announced {total} bytes were sent")
    if not isinstance(sink, bytearray):
        storing(announced.hex())
        return await asyncio.to_thread(sink.commit, announced.hex())
    if digest.digest() != announced:
        raise DigestError("the bytes do not have the announced SHA-256")
    return BlobRef(announced.hex(), total)


async def receive_pieces(pieces: AsyncIterable[bytes], writer: BlobWriter, *, size: int) -> None:
    """Writes pieces of bytes whose total `size` both ends know. They are still to be committed.

    Raises:
        DigestError: another number of bytes, noticed before one too many is kept.
        InvalidInput: a piece is empty, which is no progress.
        StorageError: the writer cannot write.
    """
    async for piece in pieces:
        if not piece:
            raise InvalidInput("a piece is empty", violations={"body": "must not be empty"})
        if writer.size + len(piece) > size:
            raise DigestError(f"more than the {size} bytes that were to come were sent")
        await asyncio.to_thread(writer.write, piece)
    if writer.size < size:
        raise DigestError(f"{writer.size} of the {size} bytes that were to come were sent")


async def unless_silent(stream: AsyncIterable[T], *, silence_s: float) -> AsyncGenerator[T]:
    """What another process sends, for as long as it sends something: it may take its time, but not for nothing. To be
    closed, which hangs up.

    Raises:
        UnavailableError: nothing came for `silence_s`.
    """
    iterator = aiter(stream)
    try:
        while True:
            waiting = asyncio.timeout(silence_s)
            try:
                async with waiting:
                    message = await anext(iterator)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not waiting.expired():
                    raise
                raise _away(f"nothing came for {silence_s:g} s") from None
            yield message
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


async def unless_not_taken(
    send: Callable[[AsyncIterator[T]], Awaitable[R]], parts: AsyncIterable[T], *, silence_s: float
) -> R:
    """What another process answers to `parts`, for as long as it takes one after the other. For the answer itself it
    may take its time: it may have to work through all of them.

    Args:
        send: the call that takes them.

    Raises:
        UnavailableError: one was not taken for `silence_s`.
    """
    loop, taking, over = asyncio.get_running_loop(), asyncio.timeout(silence_s), False

    async def watched() -> AsyncIterator[T]:
        async for part in parts:
            yield part
            if over or taking.expired():
                return
            taking.reschedule(loop.time() + silence_s)
        if not over and not taking.expired():
            taking.reschedule(None)

    try:
        async with taking:
            return await send(watched())
    except TimeoutError:
        if not taking.expired():
            raise
        raise _away(f"nothing of an upload was taken for {silence_s:g} s") from None
    finally:
        over = True


def _away(text: str) -> UnavailableError:
    """As a channel says it of a process that is not there."""
    error = UnavailableError(text)
    error.remote = True
    return error


def _announced(chunk: DataChunk, *, max_bytes: int, expected_sha256: str | None) -> tuple[int, bytes]:
    if len(chunk.sha256) != hashlib.sha256().digest_size:
        raise InvalidInput("the first chunk must announce the whole", violations={"sha256": "must have 32 bytes"})
    if chunk.total_bytes > max_bytes:
        raise LimitError(
            f"{chunk.total_bytes} bytes are announced, at most {max_bytes} are allowed", limit_bytes=max_bytes
        )
    if expected_sha256 is not None and chunk.sha256.hex() != expected_sha256:
        raise DigestError("the announced SHA-256 is not the expected one", expected=expected_sha256)
    return chunk.total_bytes, chunk.sha256


def _check_offset(offset: int, size: int) -> None:
    if not 0 <= offset <= size:
        raise InvalidInput(f"byte {offset} is beyond the end ({size})", violations={"offset": f"must be 0 to {size}"})
