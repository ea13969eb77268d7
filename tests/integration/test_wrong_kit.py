"""A party with keys of another deal: refused at once, told which key it has and which it should have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.errors import CATALOGUE, ConfigError, KeyMaterialError, SignatureError
from src.protocol.roster import load_roster
from src.provisioning import provision

LONG_S = 120.0
"""Far beyond what a refusal takes."""


@pytest.fixture(scope="module")
def another_deal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of the same parties, dealt again."""
    out = tmp_path_factory.mktemp("another") / "kits"
    provision(out, federation="demo", parties=("a", "b", "c"), modulus_bits=512, insecure_small=True, processes=1)
    return out


@pytest.fixture(scope="module")
def refused(
    federation: Any, another_deal: Path, make_processes: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, str]:
    """Exit code and log of a party that has a kit of another deal, and a certificate of this federation."""
    federation.start_aggregator()
    kit = tmp_path_factory.mktemp("kit") / "party-c"
    shutil.copytree(another_deal / "party-c", kit)
    shutil.rmtree(kit / "tls")
    shutil.copytree(federation.kits / "party-c" / "tls", kit / "tls")
    processes = make_processes(kit)
    settings = {"SOTTO__SERVER__ADDRESS": federation.address}
    process = processes.start("c", "party", "--config", str(kit / "party.yaml"), settings=settings)
    return process.wait(LONG_S), processes.log("c").read_text()


def test_a_kit_of_another_deal_is_refused_at_once(refused: tuple[int, str]) -> None:
    code, log = refused
    assert code == CATALOGUE[KeyMaterialError].exit_code == CATALOGUE[SignatureError].exit_code
    assert log.splitlines()[-1].startswith("sotto: party c ")
    assert "Traceback" not in log
    assert "joined" not in log


def test_who_is_refused_for_a_kit_of_another_deal_learns_both_key_ids(
    refused: tuple[int, str], federation: Any, another_deal: Path
) -> None:
    for kits in (another_deal, federation.kits):
        _, roster = load_roster(kits / "party-c" / "roster.json")
        assert roster.key_id in refused[1].splitlines()[-1]


def test_a_kit_put_together_from_two_deals_does_not_start(
    federation: Any, another_deal: Path, make_processes: Callable[[Path], Any], tmp_path: Path
) -> None:
    kit = tmp_path / "party-c"
    shutil.copytree(federation.kits / "party-c", kit, ignore=shutil.ignore_patterns("state", "*.away"))
    shutil.copy(another_deal / "party-c" / "share.json", kit / "share.json")
    processes = make_processes(tmp_path)
    code = processes.start("c", "party", "--config", str(kit / "party.yaml")).wait(LONG_S)
    assert code == CATALOGUE[ConfigError].exit_code
    assert "keys.share" in processes.log("c").read_text()
