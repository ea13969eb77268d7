"""Chunked streams: what arrives is what was announced, or an error."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.communication.generated import federation_pb2, federation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from src.communication.generated.common_pb2 import DataChunk
from src.communication.messages import signed_from_proto, signed_to_proto
from src.communication.streams import (
    blob_pieces,
    receive,
    receive_blob,
    receive_bytes,
    receive_pieces,
    send_blob,
    send_bytes,
    unless_not_taken,
    unless_silent,
)
from src.errors import DigestError, InvalidInput, LimitError, NotFoundError, SottoError, UnavailableError
from src.protocol.signing import Signed
from src.storage.blobs import BlobRef, Blobs

WHOLE = bytes(range(256)) * 4
DIGEST = hashlib.sha256(WHOLE).digest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


async def _stream(chunks: Iterable[DataChunk]) -> AsyncIterator[DataChunk]:
    for chunk in chunks:
        yield chunk


async def _listed(stream: AsyncIterator[DataChunk]) -> list[DataChunk]:
    return [chunk async for chunk in stream]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=300), chunk_bytes=st.integers(1, 120), offset=st.integers(0, 300))
def test_what_is_sent_is_received_in_memory_and_as_a_blob(
    blobs: Blobs, data: bytes, chunk_bytes: int, offset: int
) -> None:
    async def check() -> None:
        begin = min(offset, len(data))
        stored = blobs.write(data)
        from_memory = await _listed(send_bytes(data, offset=begin, chunk_bytes=chunk_bytes))
        from_blob = await _listed(send_blob(blobs, stored.sha256, offset=begin, chunk_bytes=chunk_bytes))
        assert from_memory == from_blob
        assert all(len(chunk.data) <= chunk_bytes for chunk in from_memory)
        resumed = bytearray(data[:begin])
        assert await receive(_stream(from_memory), resumed, max_bytes=len(data)) == stored
        assert resumed == data
        if begin == 0:
            assert await receive_bytes(_stream(from_memory), max_bytes=len(data)) == data
            other = Blobs(blobs.root / "other")
            assert await receive_blob(_stream(from_blob), other, max_bytes=len(data)) == stored
            assert other.read(stored.sha256) == data

    asyncio.run(check())


def _chunks() -> list[DataChunk]:
    parts = [DataChunk(data=WHOLE[n : n + 256], offset=n) for n in range(0, len(WHOLE), 256)]
    parts[0].total_bytes, parts[0].sha256 = len(WHOLE), DIGEST
    return parts


def _edited(place: int, **fields: Any) -> list[DataChunk]:
    chunks = _chunks()
    for name, value in fields.items():
        setattr(chunks[place], name, value)
    return chunks


FLIPPED = bytearray(WHOLE[256:512])
FLIPPED[0] ^= 1
C = _chunks()

REJECTIONS: list[tuple[str, list[DataChunk], type[SottoError]]] = [
    ("no chunk at all", [], InvalidInput),
    ("no digest announced", _edited(0, sha256=b""), InvalidInput),
    ("a digest of another length", _edited(0, sha256=b"x" * 31), InvalidInput),
    ("an endless run of empty chunks", [C[0], DataChunk(offset=256)], InvalidInput),
    ("announced larger than allowed", _edited(0, total_bytes=len(WHOLE) + 1), LimitError),
    ("one bit flipped", _edited(1, data=bytes(FLIPPED)), DigestError),
    ("another digest announced", _edited(0, sha256=bytes(32)), DigestError),
    ("cut short", C[:-1], DigestError),
    ("only the announcement", [DataChunk(total_bytes=len(WHOLE), sha256=DIGEST)], DigestError),
    ("one chunk too many", [*C, DataChunk(data=b"x", offset=len(WHOLE))], DigestError),
    ("a gap", [C[0], *C[2:]], DigestError),
    ("a chunk twice", [C[0], C[0], *C[1:]], DigestError),
    ("out of order", [C[0], C[2], C[1], C[3]], DigestError),
    ("begun in the middle", _edited(0, offset=256), DigestError),
    ("announced smaller than sent", _edited(0, total_bytes=300), DigestError),
]


@pytest.mark.parametrize(("chunks", "error"), [row[1:] for row in REJECTIONS], ids=[row[0] for row in REJECTIONS])
async def test_refused_and_nothing_kept(blobs: Blobs, chunks: list[DataChunk], error: type[SottoError]) -> None:
    with pytest.raises(error):
        await receive_bytes(_stream(chunks), max_bytes=len(WHOLE))
    with pytest.raises(error):
        await receive_blob(_stream(chunks), blobs, max_bytes=len(WHOLE))
    assert not [path for path in blobs.root.rglob("*") if path.is_file()]


async def test_a_whole_over_the_limit_is_refused_at_its_first_chunk(blobs: Blobs) -> None:
    async def stream() -> AsyncIterator[DataChunk]:
        yield DataChunk(data=b"x", total_bytes=1 << 40, sha256=DIGEST)
        raise AssertionError("asked for more")

    with pytest.raises(LimitError, match="1099511627776 bytes are announced, at most 1000 are allowed"):
        await receive_bytes(stream(), max_bytes=1000)


async def test_a_whole_of_another_digest_than_expected_is_refused_at_its_first_chunk() -> None:
    for expected, fits in ((DIGEST.hex(), True), ("0" * 64, False)):
        if fits:
            assert await receive_bytes(_stream(_chunks()), max_bytes=9999, expected_sha256=expected) == WHOLE
        else:
            with pytest.raises(DigestError, match="not the expected one"):
                await receive_bytes(_stream(_chunks()[:1]), max_bytes=9999, expected_sha256=expected)


async def test_pieces_of_a_known_size_are_stored_and_any_other_number_of_bytes_is_refused(blobs: Blobs) -> None:
    source = blobs.write(WHOLE)
    target = Blobs(blobs.root / "target")

    async def attempt(size: int, sha256: str | None = None) -> BlobRef:
        with target.writer() as writer:
            pieces = blob_pieces(blobs, source.sha256, piece_bytes=100)
            await receive_pieces(pieces, writer, size=size)
            return writer.commit(sha256)

    for size, sha256 in ((len(WHOLE) - 1, None), (len(WHOLE) + 1, None), (len(WHOLE), "0" * 64)):
        with pytest.raises(DigestError):
            await attempt(size, sha256)
    assert await attempt(len(WHOLE), source.sha256) == source
    assert len([path for path in target.root.rglob("*") if path.is_file()]) == 1


async def test_sending_what_is_not_there_or_beyond_the_end_is_refused(blobs: Blobs) -> None:
    with pytest.raises(NotFoundError):
        await _listed(send_blob(blobs, "0" * 64))
    with pytest.raises(InvalidInput):
        await _listed(send_blob(blobs, blobs.write(b"abc").sha256, offset=4))
    with pytest.raises(InvalidInput):
        await _listed(send_bytes(b"abc", offset=4))


async def test_a_download_resumes_over_grpc(plain: Any, scientist: grpc.aio.Channel) -> None:
    stub = jobs_pb2_grpc.JobServiceStub(scientist)
    data = plain.behaviour.data
    sink = bytearray(data[:37])
    stream = stub.DownloadArtifact(jobs_pb2.DownloadArtifactRequest(offset=37), timeout=60)
    await receive(stream, sink, max_bytes=1000)
    assert sink == data


async def test_an_upload_over_grpc_ends_at_the_first_byte_too_many(plain: Any, party: grpc.aio.Channel) -> None:
    stub = federation_pb2_grpc.FederationServiceStub(party)

    async def upload(data: bytes) -> AsyncIterator[federation_pb2.UploadUpdateRequest]:
        for begin in range(0, len(data), 30):
            yield federation_pb2.UploadUpdateRequest(body=data[begin : begin + 30])

    assert (await stub.UploadUpdate(upload(plain.behaviour.data), timeout=60)).accepted
    with pytest.raises(DigestError, match="more than the 100 bytes"):
        await stub.UploadUpdate(upload(plain.behaviour.data + b"x"), timeout=60)


def test_a_signed_statement_survives_its_message_and_an_incomplete_one_is_refused() -> None:
    signed = Signed(b'{"kind":"root"}', "a", b"s" * 64)
    message = signed_to_proto(signed)
    assert signed_from_proto(message) == signed
    message.ClearField("signature")
    with pytest.raises(InvalidInput) as caught:
        signed_from_proto(message)
    assert caught.value.violations == {"signature": "must not be empty"}


def _descriptors() -> list[str]:
    return sorted(each.name for each in Path("/dev/fd").iterdir())


async def test_a_blob_that_is_read_slowly_holds_no_file(blobs: Blobs) -> None:
    """Between two pieces nothing is open; a blob that goes meanwhile is missed at the next."""
    ref = blobs.write(WHOLE)
    pieces = blob_pieces(blobs, ref.sha256, offset=10, piece_bytes=100)
    assert await anext(pieces) == WHOLE[10:110]
    before = _descriptors()
    others = [blob_pieces(blobs, ref.sha256, piece_bytes=100) for _ in range(50)]
    assert {await anext(each) for each in others} == {WHOLE[:100]}
    assert _descriptors() == before
    blobs.path(ref.sha256).unlink()
    with pytest.raises(NotFoundError):
        await anext(pieces)


async def test_a_piece_without_a_byte_is_no_progress(blobs: Blobs) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"
        while True:
            yield b""

    with blobs.writer() as writer, pytest.raises(InvalidInput, match="empty"):
        await receive_pieces(pieces(), writer, size=2)


async def _in_steps(steps: int, pause_s: float, *, hangs: bool) -> AsyncIterator[int]:
    for step in range(steps):
        await asyncio.sleep(pause_s)
        yield step
    if hangs:
        await asyncio.Event().wait()


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_stream_may_be_slow_and_not_silent(hangs: bool) -> None:
    """Altogether it takes longer than it may be silent."""
    stream = unless_silent(_in_steps(6, 0.1, hangs=hangs), silence_s=0.4)
    assert [await anext(stream) for _ in range(6)] == list(range(6))
    if hangs:
        with pytest.raises(UnavailableError, match="nothing came") as raised:
            await anext(stream)
        assert raised.value.remote  # so that it is tried again
    else:
        assert await anext(stream, None) is None


async def test_a_stream_that_nobody_takes_any_more_is_hung_up() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    stream = unless_silent(endless(), silence_s=60)
    assert await anext(stream) == 1
    await stream.aclose()
    assert closed.is_set()


@pytest.mark.parametrize("hangs_at", [0, 5, None])
async def test_an_upload_may_be_taken_slowly_and_answered_late(hangs_at: int | None) -> None:
    async def send(parts: AsyncIterator[int]) -> str:
        async for part in parts:
            await asyncio.sleep(0.1)
            if part == hangs_at:
                await asyncio.Event().wait()
        await asyncio.sleep(0.6)
        return "taken"

    sending = unless_not_taken(send, _in_steps(6, 0, hangs=False), silence_s=0.4)
    if hangs_at is None:
        assert await sending == "taken"
    else:
        with pytest.raises(UnavailableError, match="was taken") as raised:
            await sending
        assert raised.value.remote
