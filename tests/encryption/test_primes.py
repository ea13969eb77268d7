"""Primes: safe where they have to be, of the promised length, found by a sieve that misses none."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.integers import Entropy, gcd, is_prime, random_below, small_primorial
from src.encryption.primes import generate_primes, generate_safe_primes, safe_prime, search_segment


@pytest.mark.parametrize("bits", [64, 96, 128, 160])
def test_a_safe_prime_is_safe_and_has_its_two_top_bits_set(bits: int, seeded: Callable[[bytes], Entropy]) -> None:
    prime = safe_prime(bits, entropy=seeded(b"safe"))
    assert is_prime(prime)
    assert is_prime(prime // 2)
    assert prime >> (bits - 2) == 3
    assert prime % 4 == 3


@settings(deadline=None, max_examples=25)
@given(start=st.integers(1 << 30, 1 << 34), length=st.integers(50, 2000))
def test_the_sieve_finds_what_a_search_one_by_one_finds(start: int, length: int) -> None:
    start |= 1
    candidates = (start + 2 * step for step in range(length))
    slow = next((2 * half + 1 for half in candidates if is_prime(half) and is_prime(2 * half + 1)), None)
    assert search_segment(start, length) == slow


def test_a_safe_prime_that_is_known() -> None:
    """RFC 2409, section 6.1: the first Oakley group is over a safe prime of 768 bits."""
    prime = int(
        "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
        "EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A63A3620FFFFFFFFFFFFFFFF",
        16,
    )
    assert search_segment(prime // 2, 1) == prime
    assert search_segment(prime // 2 - 20, 11) == prime
    assert search_segment(prime // 2 - 20, 10) is None


@pytest.mark.parametrize("processes", [1, 2])
def test_safe_primes_for_a_modulus_of_exact_length(processes: int, seeded: Callable[[bytes], Entropy]) -> None:
    told: list[str] = []
    p, q = generate_safe_primes(320, entropy=seeded(b"pair"), processes=processes, progress=told.append)
    assert (p * q).bit_length() == 320
    assert p != q
    assert all(is_prime(prime) and is_prime(prime // 2) for prime in (p, q))
    assert [line for line in told if "found" in line] == [f"safe prime {k} of 2 found (160 bits)" for k in (1, 2)]


def test_the_search_tells_how_far_it_is(seeded: Callable[[bytes], Entropy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.encryption.primes.SEGMENTS_A_LINE", 1)
    told: list[str] = []
    generate_safe_primes(256, entropy=seeded(b"far"), processes=2, progress=told.append)
    assert told[0] == "1 segments searched, about one in seven holds a safe prime"


def test_the_same_entropy_gives_the_same_primes_however_many_processes_search(
    seeded: Callable[[bytes], Entropy],
) -> None:
    one, two, three = (generate_safe_primes(256, entropy=seeded(b"same"), processes=count) for count in (1, 2, 3))
    assert one == two == three
    assert psutil.Process().children() == []


def test_primes_for_a_key_pair_are_what_djn_asks_for(seeded: Callable[[bytes], Entropy]) -> None:
    p, q = generate_primes(512, entropy=seeded(b"djn"))
    assert (p * q).bit_length() == 512
    assert p % 4 == q % 4 == 3
    assert gcd(p - 1, q - 1) == 2


def test_random_integers_stay_below_their_limit_and_reach_every_value(seeded: Callable[[bytes], Entropy]) -> None:
    source = seeded(b"below")
    assert {random_below(source, 5) for _ in range(200)} == set(range(5))
    assert {random_below(source, 1) for _ in range(5)} == {0}


def test_the_trial_division_covers_the_primes_up_to_its_limit() -> None:
    assert small_primorial() % 65_521 == 0
    assert small_primorial() % 65_537 != 0
