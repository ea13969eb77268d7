"""A federation of three with a small key: 512 bits protect nothing, and are long enough for every code path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import Engine
from sqlalchemy.pool import StaticPool

from src.aggregator.federation import Federation
from src.encryption.dealer import deal
from src.encryption.keys import PrivateKey, ThresholdKey
from src.privacy.entropy import DeterministicEntropy
from src.protocol.keyring import Keyring
from src.protocol.roster import Member, Roster, sign_roster
from src.protocol.signing import SigningKey

from .played import Place

P = 0xE3B9FF6586D70C163EC926DDEAD91F6B011B351FBF8CDA056459F50D3E9BA993
Q = 0xFAAA49171DF29F6E64818C4F9C0526B6962FD595EF4A54FC599214270537BE5B

MakeRoster = Callable[..., Roster]


@pytest.fixture(scope="session")
def key() -> ThresholdKey:
    """2 of 3."""
    entropy = DeterministicEntropy(bytes(32), purpose="aggregator tests")
    return deal(P, Q, threshold=2, holders=3, entropy=entropy)[0]


@pytest.fixture(scope="session")
def signing_key() -> SigningKey:
    return SigningKey.from_bytes(bytes(range(32)))


@pytest.fixture(scope="session")
def make_roster(key: ThresholdKey, signing_key: SigningKey) -> MakeRoster:
    """make_roster(names, …): the first `holders` of them hold a key share."""

    def make(
        names: str = "abc",
        *,
        custody: str = "threshold",
        threshold: int = 2,
        colluders: int = 0,
        holders: int | None = None,
    ) -> Roster:
        shares = len(names) if holders is None else holders
        if custody == "aggregator":
            shares = threshold = 0
        return Roster(
            federation="demo",
            key_id=key.public.key_id,
            custody=custody,
            threshold=threshold,
            colluders=colluders,
            aggregator_verify_key=signing_key.verify_key,
            members=tuple(Member(n, bytes(32), i if i <= shares else 0) for i, n in enumerate(names, start=1)),
            created_at="2026-01-01T00:00:00+00:00",
        )

    return make


@pytest.fixture(params=["threshold", "aggregator"])
def federation(
    request: pytest.FixtureRequest, key: ThresholdKey, make_roster: MakeRoster, signing_key: SigningKey
) -> Federation:
    """In either custody."""
    roster = make_roster(custody=request.param)
    public = Keyring(key.public, key) if request.param == "threshold" else None
    return Federation(
        roster=roster,
        signed_roster=sign_roster(roster, signing_key),
        keyring=public or Keyring.of_private_key(PrivateKey(P, Q, key.public)),
        signing_key=signing_key,
        pinned=True,
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An empty database in memory."""
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    yield engine
    engine.dispose()


@pytest.fixture
async def place(federation: Federation, tmp_path: Path) -> AsyncIterator[Place]:
    """A coordinator whose workers, parties and clock are played."""
    place = Place(federation, tmp_path)
    await place.database.open()
    yield place
    await place.coordinator.stop()
    await place.database.close()
