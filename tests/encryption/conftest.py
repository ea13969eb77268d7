"""Keys made once per session from fixed primes, and a seeded stand-in for the operating system's randomness.

The moduli have 512 bits: far too short to protect anything, long enough for every code path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from src.encryption.dealer import deal
from src.encryption.integers import Entropy
from src.encryption.keys import KeyShare, PrivateKey, PublicKey, ThresholdKey

P = 0xE3B9FF6586D70C163EC926DDEAD91F6B011B351FBF8CDA056459F50D3E9BA993
Q = 0xFAAA49171DF29F6E64818C4F9C0526B6962FD595EF4A54FC599214270537BE5B

P_1024 = int(
    "ef10d3e8a79ec75c709a65fbf6765e8b1353f8b6d14aa955124aa95db3bd838de30f15eaca7b94b34d4c0fe9fb30a8f0"
    "6012ac90adaf031d5892eab4a0d54f09cbd8d63d73e2c9a41b43744b24ea51348174a965ffd38d1bd6a9320f50dc6fb2"
    "0b3971e2b11e86d1df7ba83bcdaf51dcf3afebbd29af5233bf9e4371a253230b",
    16,
)
Q_1024 = int(
    "c40b327d8c385457ef31ee5bb4c90df90a2731239e96d25823e21eedeb68a79cb4e6e2d6ba333d96d2d0d7ab974b62a9"
    "222c826359e6ae5d1308a485639dc1c3fb914da4b17a75385a9425b4aade491ba9e4b6268c3b7ba22be1cd2d1d6248e4"
    "db9982de3a58b65c4c122264b03dcfeb743dc1ebdff19e0c99bfb674949e93fb",
    16,
)


class SeededEntropy:
    """SHAKE-256 over a seed and a counter: the same tokens in every run."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._drawn = 0

    def token(self, size: int) -> bytes:
        self._drawn += 1
        return hashlib.shake_256(self._seed + self._drawn.to_bytes(8, "big")).digest(size)


@pytest.fixture(scope="session")
def seeded() -> Callable[[bytes], Entropy]:
    """Makes an entropy source from a seed."""
    return SeededEntropy


@pytest.fixture(scope="module")
def entropy(request: pytest.FixtureRequest) -> Entropy:
    """Of a file's own: what its tests draw does not depend on which others ran before."""
    return SeededEntropy(request.node.nodeid.encode())


@pytest.fixture(scope="session")
def primes() -> tuple[int, int]:
    """Two safe primes of 256 bits."""
    return P, Q


@pytest.fixture(scope="session")
def primes_1024() -> tuple[int, int]:
    """Two safe primes of 1024 bits."""
    return P_1024, Q_1024


@pytest.fixture(scope="session")
def dealt() -> tuple[ThresholdKey, list[KeyShare]]:
    """A deal of 3 shares for 5 holders."""
    return deal(P, Q, threshold=3, holders=5, entropy=SeededEntropy(b"deal"))


@pytest.fixture(scope="session")
def dealt_again() -> tuple[ThresholdKey, list[KeyShare]]:
    """Another deal with the same primes and counts."""
    return deal(P, Q, threshold=3, holders=5, entropy=SeededEntropy(b"another deal"))


@pytest.fixture(scope="session")
def key(dealt: tuple[ThresholdKey, list[KeyShare]]) -> ThresholdKey:
    return dealt[0]


@pytest.fixture(scope="session")
def shares(dealt: tuple[ThresholdKey, list[KeyShare]]) -> list[KeyShare]:
    return dealt[1]


@pytest.fixture(scope="session")
def public(key: ThresholdKey) -> PublicKey:
    return key.public


@pytest.fixture(scope="session")
def private(public: PublicKey) -> PrivateKey:
    """The key pair with the public half of `key`."""
    return PrivateKey(P, Q, public)
