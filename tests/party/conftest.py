"""Party a of a federation of four, of whom three hold a key share: its configuration, and plans that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine
from sqlalchemy.pool import StaticPool

from src.config import PartyConfig
from src.encryption.plaintext import PlaintextScheme
from src.encryption.scheme import Scheme
from src.protocol.canonical import real
from src.protocol.derive import derive, derive_gradient_sum, example_multiplier
from src.protocol.plan import GradientSum, LocalPlan, RoundPlan
from src.protocol.roster import Member, Roster
from src.protocol.signing import SigningKey

MakeConfig = Callable[..., PartyConfig]
MakePlan = Callable[..., RoundPlan]


@pytest.fixture(scope="session")
def keys() -> dict[str, SigningKey]:
    """Of the aggregator, of the parties, and of a stranger z."""
    names = ("aggregator", "a", "b", "c", "d", "z")
    return {name: SigningKey.from_bytes(name.encode().ljust(32, b"-")) for name in names}


@pytest.fixture(scope="session")
def roster(keys: dict[str, SigningKey]) -> Roster:
    return Roster(
        federation="demo",
        key_id="",
        custody="threshold",
        threshold=2,
        colluders=0,
        aggregator_verify_key=keys["aggregator"].verify_key,
        members=tuple(
            Member(name, keys[name].verify_key, share) for name, share in zip("abcd", (1, 2, 3, 0), strict=True)
        ),
        created_at="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture(scope="session")
def scheme() -> Scheme:
    return PlaintextScheme(2, 3)


@pytest.fixture(scope="session")
def make_plan(roster: Roster, scheme: Scheme) -> MakePlan:
    """make_plan(…): a plan whose derived fields follow; other fields are laid over it."""

    def make(
        *,
        cohort: tuple[str, ...] = ("a", "b", "c"),
        quorum: int = 2,
        noise_by: str = "both",
        noise_multiplier: float = 0.5,
        priced_rounds: int = 5,
        **changes: Any,
    ) -> RoundPlan:
        derived = derive(
            scheme,
            dimension=10,
            clipping_norm=1.0,
            resolution_bits=16,
            noise_by=noise_by,
            noise_multiplier=noise_multiplier,
            delta=1e-5,
            cohort=len(cohort),
            quorum=quorum,
            colluders=0,
            priced_rounds=priced_rounds,
        )
        plan = RoundPlan(
            federation="demo",
            job_id="job",
            round=1,
            priced_rounds=priced_rounds,
            spec_digest="5" * 64,
            task="randhie",
            task_options="{}",
            seed=0,
            model_sha256="a" * 64,
            model_bytes=100,
            dimension=10,
            local=LocalPlan(10, "0.05", "0.1", "1.0", "1.1", "1e-05"),
            clipping_norm="1.0",
            resolution_bits=16,
            rounded_bound=derived.rounded_bound,
            scheme=scheme.name,
            key_id="",
            layout=derived.layout.to_json(),
            noise=derived.noise,
            roster_digest=roster.digest,
            cohort=cohort,
            quorum=quorum,
            colluders=0,
            threshold=2,
            custody="threshold",
        )
        return replace(plan, **changes)

    return make


@pytest.fixture(scope="session")
def make_sum_plan(make_plan: MakePlan, scheme: Scheme) -> MakePlan:
    """make_sum_plan(…): a plan of fedsgd whose derived fields follow; other fields are laid over it."""

    def make(
        *,
        noise_by: str = "both",
        noise_multiplier: float = 1.5,
        declared_rows: dict[str, int] | None = None,
        trusted_aggregator: bool | None = None,
        priced_rounds: int = 5,
        **changes: Any,
    ) -> RoundPlan:
        rows = declared_rows or {"a": 100, "b": 120, "c": 80}
        trusted = noise_by == "aggregator" if trusted_aggregator is None else trusted_aggregator
        derived = derive_gradient_sum(
            scheme,
            dimension=10,
            max_grad_norm=1.0,
            sampling_rate=0.05,
            resolution_bits=16,
            noise_by=noise_by,
            noise_multiplier=noise_multiplier,
            delta=1e-5,
            declared_rows=rows,
            trusted_aggregator=trusted,
            quorum=2,
            colluders=0,
            priced_rounds=priced_rounds,
        )
        multiplier = real(example_multiplier(derived.noise_plan))
        fields: dict[str, Any] = {
            "cohort": tuple(rows),
            "priced_rounds": priced_rounds,
            "local": LocalPlan(1, "0.05", "0.1", "1.0", multiplier, "1e-05"),
            "clipping_norm": real(derived.contribution_norm),
            "rounded_bound": derived.rounded_bound,
            "layout": derived.layout.to_json(),
            "noise": derived.noise,
            "gradient_sum": GradientSum(derived.cap, rows, trusted),
        }
        return make_plan(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """make_config(**sections): the party's configuration, with plaintext allowed."""
    kit: Path = tmp_path_factory.mktemp("kit")
    files = ("public_key", "roster", "signing_key", "share")
    for name in files:
        (kit / name).touch()

    def make(**sections: Any) -> PartyConfig:
        values: dict[str, Any] = {
            "version": 1,
            "name": "a",
            "federation": "demo",
            "state_dir": str(kit / "state"),
            "server": {"insecure": True, "address": "127.0.0.1:50051"},
            "keys": {"custody": "threshold", **{name: str(kit / name) for name in files}},
            "policy": {"allow_plaintext_scheme": True},
            "datasets": {"randhie": {"declared_rows": 100}},
        }
        return PartyConfig.model_validate({**values, **sections})

    return make


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An empty database in memory."""
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    yield engine
    engine.dispose()
