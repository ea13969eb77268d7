"""The batch: a versioned binary header, and a body of fixed-length ciphertexts.

Header, format version 1. All integers are unsigned and big-endian; `text` is one length byte and that many bytes:

    offset  size  field
    0       4     magic, the ASCII letters SOTB
    4       2     format version, 1
    6       text  scheme: short name, ASCII
    …       text  key id: ASCII; empty for a scheme without keys
    …       4     modulus bits
    …       2     slot bits
    …       8     offset added to each value
    …       8     parameter count
    …       8     ciphertext count
    …       4     ciphertext bytes
    …       text  job id, UTF-8
    …       4     round
    …       text  contributor, UTF-8
    …       32    round plan digest, SHA-256
    end

Nothing may follow. The body is `ciphertext count` ciphertexts of `ciphertext bytes` each, big-endian, back to back,
and nothing else.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import BinaryIO, Final, Protocol

from .scheme import Layout, mismatch

BATCH_MAGIC: Final = b"SOTB"
BATCH_VERSION: Final = 1
LONGEST_TEXT_BYTES: Final = 255
DIGEST_BYTES: Final = 32
LARGEST_HEADER_BYTES: Final = 4 + 2 + 4 * (1 + LONGEST_TEXT_BYTES) + 4 + 2 + 8 + 8 + 8 + 4 + 4 + DIGEST_BYTES
"""No header is longer: what a reader may limit itself to."""

_INTEGER_BYTES: Final = {
    "modulus_bits": 4,
    "slot_bits": 2,
    "offset": 8,
    "parameter_count": 8,
    "ciphertext_count": 8,
    "ciphertext_bytes": 4,
    "round_number": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchHeader:
    """What a batch says about itself, in the order of its bytes (module docstring).

    Raises:
        BatchError: a field that its bytes cannot hold; names the field.
    """

    scheme: str
    key_id: str
    modulus_bits: int
    slot_bits: int
    offset: int
    parameter_count: int
    ciphertext_count: int
    ciphertext_bytes: int
    job_id: str
    round_number: int
    contributor: str
    plan_digest: bytes

    def __post_init__(self) -> None:
        for name, size in _INTEGER_BYTES.items():
            if not 0 <= getattr(self, name) < 1 << (8 * size):
                raise mismatch(name, f"does not fit {size} bytes")
        for name in ("scheme", "key_id", "job_id", "contributor"):
            if len(getattr(self, name).encode()) > LONGEST_TEXT_BYTES:
                raise mismatch(name, f"longer than {LONGEST_TEXT_BYTES} bytes")
        for name in ("scheme", "key_id"):
            if not getattr(self, name).isascii():
                raise mismatch(name, "not ASCII")
        if len(self.plan_digest) != DIGEST_BYTES:
            raise mismatch("plan_digest", f"not {DIGEST_BYTES} bytes")

    @classmethod
    def of(cls, layout: Layout, *, job_id: str, round_number: int, contributor: str, plan_digest: bytes) -> BatchHeader:
        """The header of `contributor`'s batch under `layout`."""
        return cls(
            scheme=layout.scheme,
            key_id=layout.key_id,
            modulus_bits=layout.modulus_bits,
            slot_bits=layout.slot_bits,
            offset=layout.offset,
            parameter_count=layout.parameter_count,
            ciphertext_count=layout.ciphertext_count,
            ciphertext_bytes=layout.ciphertext_bytes,
            job_id=job_id,
            round_number=round_number,
            contributor=contributor,
            plan_digest=plan_digest,
        )

    def encode(self) -> bytes:
        """The header's bytes (module docstring)."""
        parts = [BATCH_MAGIC, BATCH_VERSION.to_bytes(2, "big")]
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str):
                data = value.encode()
                parts += [bytes([len(data)]), data]
            elif isinstance(value, bytes):
                parts.append(value)
            else:
                parts.append(value.to_bytes(_INTEGER_BYTES[each.name], "big"))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> BatchHeader:
        """Read a header.

        Raises:
            BatchError: not a header, another version, cut short, too long, or text that is not UTF-8; names the field.
        """
        reader = _Reader(data)
        if reader.take("magic", len(BATCH_MAGIC)) != BATCH_MAGIC:
            raise mismatch("magic", "this is not a Sotto batch")
        version = reader.integer("version", 2)
        if version != BATCH_VERSION:
            raise mismatch("version", f"{version} instead of {BATCH_VERSION}, the only version known here")
        values: dict[str, object] = {}
        for each in fields(cls):
            if each.name in _INTEGER_BYTES:
                values[each.name] = reader.integer(each.name, _INTEGER_BYTES[each.name])
            elif each.name == "plan_digest":
                values[each.name] = reader.take(each.name, DIGEST_BYTES)
            else:
                values[each.name] = reader.text(each.name)
        reader.end()
        return cls(**values)  # type: ignore[arg-type]  # each was read by its own type above


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, name: str, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise mismatch(name, "the header is cut short here")
        self._at += size
        return part

    def integer(self, name: str, size: int) -> int:
        return int.from_bytes(self.take(name, size), "big")

    def text(self, name: str) -> str:
        data = self.take(name, self.integer(name, 1))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise mismatch(name, "not UTF-8") from error

    def end(self) -> None:
        if self._at != len(self._data):
            raise mismatch("header", f"{len(self._data) - self._at} bytes too long")


def check_header(header: BatchHeader, expected: BatchHeader) -> None:
    """Refuse a batch that is not the expected one.

    Raises:
        BatchError: names the first field that differs in `metadata["field"]`.
    """
    for each in fields(header):
        found, wanted = getattr(header, each.name), getattr(expected, each.name)
        if found != wanted:
            if isinstance(found, bytes):
                found, wanted = found.hex(), wanted.hex()
            raise mismatch(each.name, f"{found!r} instead of {wanted!r}")


def read_blocks(
    stream: BinaryIO, layout: Layout, *, block_ciphertexts: int | None = None, name: str = "body"
) -> Iterator[bytes]:
    """The body in `stream`, block by block; reads no more than a block ahead.

    Args:
        stream: at the beginning of the body.
        layout: fixes the length.
        block_ciphertexts: ciphertexts in a block, the layout's by default; the last one has what is left.
        name: for error messages.

    Raises:
        BatchError: cut short, or bytes after the last ciphertext.
    """
    block_bytes = (block_ciphertexts or layout.block_ciphertexts) * layout.ciphertext_bytes
    left = layout.body_bytes
    while left:
        size = min(left, block_bytes)
        left -= size
        # Not kept in a variable: with many bodies read side by side, each would hold on to its last block.
        yield _read_exactly(stream, size, layout, missing=left, name=name)
    if stream.read(1):
        raise mismatch(name, f"longer than the {layout.body_bytes} bytes of its layout")


def _read_exactly(stream: BinaryIO, size: int, layout: Layout, *, missing: int, name: str) -> bytes:
    data = stream.read(size)
    if len(data) == size:
        return data
    parts = bytearray(data)
    while data and (data := stream.read(size - len(parts))):
        parts += data
    if len(parts) != size:
        missing += size - len(parts)
        raise mismatch(name, f"cut short, {missing} of {layout.body_bytes} bytes are missing")
    return bytes(parts)


class Body(Protocol):
    """A body that can be read anywhere, in a forked child too."""

    def ciphertexts(self, part: range) -> bytes:
        """Those ciphertexts, back to back. Raises BatchError when the body has become shorter."""
        ...

    @property
    def files(self) -> tuple[int, ...]:
        """Descriptors that it reads, by position."""
        ...


class _File:
    def __init__(self, descriptor: int, start: int, layout: Layout) -> None:
        self._start = start
        self._width = layout.ciphertext_bytes
        self.files = (descriptor,)
        check_length(os.fstat(descriptor).st_size - start, layout)

    def ciphertexts(self, part: range) -> bytes:
        at, left = self._start + part.start * self._width, len(part) * self._width
        data = bytearray()
        while left > len(data) and (piece := os.pread(self.files[0], left - len(data), at + len(data))):
            data += piece
        if len(data) != left:
            raise mismatch("body", "cut short while it was read")
        return bytes(data)


class _Memory:
    files = ()

    def __init__(self, data: bytes, start: int, layout: Layout) -> None:
        self._data = data
        self._start = start
        self._width = layout.ciphertext_bytes
        check_length(len(data) - start, layout)

    def ciphertexts(self, part: range) -> bytes:
        return self._data[self._start + part.start * self._width : self._start + part.stop * self._width]


def random_access(stream: BinaryIO, layout: Layout) -> Body | None:
    """The body that begins where `stream` stands, if it is a regular file or in memory; None for any other stream.

    Raises:
        BatchError: too short or too long.
    """
    if isinstance(stream, io.BytesIO):
        return _Memory(stream.getvalue(), stream.tell(), layout)
    if isinstance(stream, (io.FileIO, io.BufferedReader)) and isinstance(getattr(stream, "raw", stream), io.FileIO):
        descriptor = stream.fileno()
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return _File(descriptor, stream.tell(), layout)
    return None


def check_length(size: int, layout: Layout, *, name: str = "body") -> None:
    """Refuse a body of so many bytes unless it is as long as its layout says. Raises BatchError."""
    if size < layout.body_bytes:
        raise mismatch(name, f"cut short, {layout.body_bytes - size} of {layout.body_bytes} bytes are missing")
    if size > layout.body_bytes:
        raise mismatch(name, f"longer than the {layout.body_bytes} bytes of its layout")


def counted(blocks: Iterable[bytes], width: int, count: int, *, name: str = "body") -> Iterator[tuple[int, bytes]]:
    """The non-empty blocks with the position of their first item, once each is found to hold whole items.

    Args:
        blocks: `count` items of `width` bytes in all, cut anywhere between two items.
        width: bytes of an item.
        count: items.
        name: for error messages.

    Raises:
        BatchError: a block that cuts an item, or more or fewer than `count` items.
    """
    position = 0
    for block in blocks:
        items, rest = divmod(len(block), width)
        if rest:
            raise mismatch(name, f"a block of {len(block)} bytes does not hold whole items of {width}")
        if position + items > count:
            raise mismatch(name, f"longer than its {count} items of {width} bytes")
        if items:
            yield position, block
        position += items
    if position != count:
        raise mismatch(name, f"cut short, {position} of {count} items of {width} bytes")
