"""The batch format: its bytes are fixed, and whatever differs is refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.batch import LARGEST_HEADER_BYTES, BatchHeader, check_header, counted, read_blocks
from src.encryption.scheme import Layout
from src.errors import BatchError

HEADER = BatchHeader(
    scheme="paillier",
    key_id="0123456789abcdef0123456789abcdef",
    modulus_bits=3072,
    slot_bits=20,
    offset=25_000,
    parameter_count=1_000_000,
    ciphertext_count=6_536,
    ciphertext_bytes=768,
    job_id="jobs/ä",
    round_number=7,
    contributor="party-a",
    plan_digest=bytes(range(32)),
)

GOLDEN = bytes.fromhex(
    "534f5442"  # SOTB
    "0001"
    "08" + b"paillier".hex() + "20" + b"0123456789abcdef0123456789abcdef".hex() + "00000c00"
    "0014"
    "00000000000061a8"
    "00000000000f4240"
    "0000000000001988"
    "00000300"
    "07" + "jobs/ä".encode().hex() + "00000007"
    "07" + b"party-a".hex() + "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
)

LAYOUT = Layout(
    scheme="plaintext",
    key_id="",
    modulus_bits=64,
    parameter_count=10,
    slot_bits=5,
    offset=10,
    slots_per_ciphertext=1,
    ciphertext_count=10,
    ciphertext_bytes=8,
    contributions=1,
)


def test_the_header_has_the_bytes_of_its_format() -> None:
    assert HEADER.encode() == GOLDEN
    assert BatchHeader.decode(GOLDEN) == HEADER


@settings(deadline=None, max_examples=50)
@given(
    text=st.text(max_size=60),
    number=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**64 - 1),
    digest=st.binary(min_size=32, max_size=32),
)
def test_every_header_survives_its_bytes(text: str, number: int, offset: int, digest: bytes) -> None:
    header = replace(
        HEADER, job_id=text, contributor=text[::-1], round_number=number, offset=offset, plan_digest=digest
    )
    assert len(header.encode()) <= LARGEST_HEADER_BYTES
    assert BatchHeader.decode(header.encode()) == header


def test_a_header_cut_anywhere_is_refused() -> None:
    for length in range(len(GOLDEN)):
        with pytest.raises(BatchError):
            BatchHeader.decode(GOLDEN[:length])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: b"SOTS" + data[4:], "magic"),
        (lambda data: data[:5] + b"\x02" + data[6:], "version"),
        (lambda data: data + b"\x00", "header"),
        (lambda data: data[:7] + b"\xc3\xa4" + data[9:], "scheme"),
        (lambda data: data[:7] + b"\xff" + data[8:], "scheme"),
        (lambda data: data.replace("ä".encode(), b"\xff\xfe"), "job_id"),
        (lambda data: b"", "magic"),
    ],
)
def test_headers_that_are_refused(change: Callable[[bytes], bytes], field: str) -> None:
    with pytest.raises(BatchError) as caught:
        BatchHeader.decode(change(GOLDEN))
    assert caught.value.metadata["field"] == field


CHANGES: list[tuple[str, object]] = [
    ("scheme", "plaintext"),
    ("key_id", "0" * 32),
    ("modulus_bits", 2048),
    ("slot_bits", 21),
    ("offset", 25_001),
    ("parameter_count", 999_999),
    ("ciphertext_count", 6_537),
    ("ciphertext_bytes", 512),
    ("job_id", "jobs/b"),
    ("round_number", 8),
    ("contributor", "party-b"),
    ("plan_digest", bytes(32)),
]


@pytest.mark.parametrize(("field", "value"), CHANGES, ids=[row[0] for row in CHANGES])
def test_a_header_that_differs_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    check_header(BatchHeader.decode(GOLDEN), HEADER)
    changes: dict[str, object] = {field: value}
    other = replace(HEADER, **changes)  # type: ignore[arg-type]
    assert other.encode() != GOLDEN
    with pytest.raises(BatchError, match=field) as caught:
        check_header(other, HEADER)
    assert caught.value.metadata["field"] == field
    assert list(caught.value.violations) == [field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modulus_bits", 1 << 32),
        ("slot_bits", -1),
        ("offset", 1 << 64),
        ("round_number", 1 << 32),
        ("job_id", "x" * 256),
        ("contributor", "ä" * 128),
        ("scheme", "pä"),
        ("plan_digest", bytes(31)),
    ],
)
def test_fields_that_the_bytes_cannot_hold_are_refused(field: str, value: object) -> None:
    changes: dict[str, object] = {field: value}
    with pytest.raises(BatchError) as caught:
        replace(HEADER, **changes)  # type: ignore[arg-type]
    assert caught.value.metadata["field"] == field


def test_a_header_is_made_of_a_layout() -> None:
    header = BatchHeader.of(LAYOUT, job_id="j", round_number=1, contributor="c", plan_digest=bytes(32))
    for field in ("scheme", "key_id", "modulus_bits", "slot_bits", "offset", "parameter_count", "ciphertext_count"):
        assert getattr(header, field) == getattr(LAYOUT, field)
    assert BatchHeader.decode(header.encode()) == header


class Dribble(io.RawIOBase):
    """A stream that gives at most three bytes at a time, as a socket may."""

    def __init__(self, data: bytes) -> None:
        self._left = io.BytesIO(data)

    def read(self, size: int = -1, /) -> bytes:
        return self._left.read(min(size, 3) if size >= 0 else 3)


def test_blocks_are_read_whole_from_any_stream() -> None:
    data = bytes(range(80))
    for stream in (io.BytesIO(data), Dribble(data)):
        blocks = list(read_blocks(stream, LAYOUT, block_ciphertexts=4))  # type: ignore[arg-type]
        assert [len(block) for block in blocks] == [32, 32, 16]
        assert b"".join(blocks) == data


@pytest.mark.parametrize(
    ("length", "said"),
    [(0, "cut short, 80"), (79, "cut short, 1 "), (40, "cut short, 40"), (81, "longer"), (160, "longer")],
)
def test_bodies_of_another_length_are_refused(length: int, said: str) -> None:
    with pytest.raises(BatchError, match=said):
        list(read_blocks(io.BytesIO(bytes(length)), LAYOUT, block_ciphertexts=4))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([80 * b"a", b"a" * 8], "longer"),
        ([b"a" * 12, b"a" * 68], "whole items"),
        ([b"a" * 72], "cut short"),
        ([], "cut short"),
    ],
)
def test_blocks_that_do_not_add_up_are_refused(blocks: list[bytes], said: str) -> None:
    with pytest.raises(BatchError, match=said):
        list(counted(blocks, 8, 10))


def test_counted_blocks_know_their_position() -> None:
    blocks = [b"a" * 24, b"", b"b" * 56]
    assert [(position, len(block)) for position, block in counted(blocks, 8, 10)] == [(0, 24), (3, 56)]
