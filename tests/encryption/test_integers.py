"""Integers to bytes and back, one by one and in bulk; powers of many bases at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption import integers, parallel
from src.encryption.integers import LARGEST_BULK, Entropy, PackedIntegers, from_bytes, join, mpz, multi_power, split


def slowly(block: bytes, width: int) -> list[int]:
    return [int.from_bytes(block[at : at + width], "big") for at in range(0, len(block), width)]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), width=st.sampled_from([1, 3, 8, 12, 16, 64]), count=st.integers(0, 40))
def test_bytes_survive_being_numbers(data: st.DataObject, width: int, count: int) -> None:
    edge = st.sampled_from([bytes(width), b"\xff" * width, bytes(width - 1) + b"\x01", b"\x80" + bytes(width - 1)])
    block = b"".join(data.draw(st.lists(edge | st.binary(min_size=width, max_size=width), max_size=count)))
    values = split(block, width)
    assert values == slowly(block, width)
    assert join(values, width) == block
    assert join([int(value) for value in values], width) == block


@pytest.mark.parametrize("count", [LARGEST_BULK - 1, LARGEST_BULK, LARGEST_BULK + 1, 3 * LARGEST_BULK + 5])
def test_more_than_are_converted_at_once(count: int, seeded: Callable[[bytes], Entropy]) -> None:
    block = seeded(b"bulk").token(count * 64)
    for changed in (block, block[: -64 * 20] + bytes(64 * 20), bytes(64 * 20) + block[64 * 20 :]):
        values = split(changed, 64)
        assert values == slowly(changed, 64)
        assert join(values, 64) == join(iter(values), 64) == changed


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("value", [256**64, 256**65, -1])
def test_a_number_that_is_too_large_or_negative_is_not_cut_off(count: int, value: int) -> None:
    with pytest.raises((OverflowError, TypeError, ValueError)):
        join([mpz(1)] * (count - 1) + [mpz(value)], 64)


def test_packed_integers_are_a_sequence_over_bytes(seeded: Callable[[bytes], Entropy]) -> None:
    data = seeded(b"packed").token(300 * 16)
    packed, plain = PackedIntegers(data, 16), slowly(data, 16)
    assert len(packed) == 300
    assert packed == plain
    assert list(packed) == plain
    assert (packed[0], packed[-1], packed[299]) == (plain[0], plain[-1], plain[-1])
    assert list(packed[10:20]) == plain[10:20]
    assert list(packed[290:400]) == plain[290:]
    assert len(packed[5:5]) == 0
    assert join(packed, 16) == data
    assert join(packed[3:5], 20) == b"".join(value.to_bytes(20, "big") for value in plain[3:5])
    for outside in (300, -301):
        with pytest.raises(IndexError):
            packed[outside]
    with pytest.raises(ValueError, match="strides"):
        packed[::2]


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 50])
def test_many_powers_at_once_are_the_product_of_each(
    count: int, processes: int, seeded: Callable[[bytes], Entropy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SMALLEST_PART_PRODUCTS", 1)
    monkeypatch.setattr(integers, "MULTI_POWER_BASES", 7)
    source, modulus = seeded(b"powers"), mpz(2**521 - 1)
    bases = [from_bytes(source.token(60)) for _ in range(count)]
    exponents = [from_bytes(source.token(16)) for _ in range(count)]
    expected = 1
    for base, exponent in zip(bases, exponents, strict=True):
        expected = expected * pow(int(base), int(exponent), int(modulus)) % int(modulus)
    assert multi_power(bases, exponents, modulus, exponent_bits=128, processes=processes) == expected
    if count:
        with pytest.raises(ValueError, match="as many"):
            multi_power(bases, exponents[1:], modulus, exponent_bits=128)
