"""The classic set-up: the two files of config/, no kits; the aggregator makes its keys, parties join as they come."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from src.client import SottoClient
from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.errors import StateError
from src.files import OF_A_ROLE
from src.jobs.spec import FederatedTrainingSpec, LocalTraining
from src.protocol.keyring import load_private_key

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 200.0
SETTINGS = {"SOTTO__KEYS__INSECURE_SMALL_MODULUS": "true", "SOTTO__WORKERS__NICE": "0"}
"""What is not as in the files: a key that is made in a moment, and workers that yield to nobody."""
SPEC = FederatedTrainingSpec(
    task="randhie", rounds=1, spare_rounds=0, local_training=LocalTraining(steps=5, sampling_rate=0.02, epsilon=3.0)
)


class Classic:
    """config/ copied, its state beside it; the modules of the two roles are run as scripts."""

    def __init__(self, directory: Path, processes: Any, wait_until: Callable[..., Any], *, address: str) -> None:
        self.config = shutil.copytree(ROOT / "config", directory / "config")
        self.state = directory / "var"
        self.processes = processes
        self._until = wait_until
        self.address = address
        self.start_aggregator()
        self.client = SottoClient(self.address, insecure=True, identity=Identity("scientist", "ann"))

    def start_aggregator(self, **more: str) -> None:
        file = self.state / "address"
        file.unlink(missing_ok=True)
        settings = {
            "SOTTO__SERVER__LISTEN": self.address,
            "SOTTO__SERVER__ADDRESS_FILE": str(file),
            "SOTTO__KEYS__MODULUS_BITS": "512",
            **SETTINGS,
            **more,
        }
        config = str(self.config / "aggregator.yaml")
        self.processes.start("aggregator", "--config", config, module="src.aggregator.main", settings=settings, umask=0)

        def serving() -> bool:
            self.processes.check()
            return file.exists()

        self._until(serving, "the aggregator serves")

    def start_parties(self) -> None:
        """Those of a, b and c that do not run; returns once the aggregator has them all."""
        settings = {"SOTTO__SERVER__ADDRESS": self.address, **SETTINGS}
        config = str(self.config / "party.yaml")
        for name in "abc":
            if name not in self.processes.running:
                arguments = ("--config", config, "--name", name)
                self.processes.start(name, *arguments, module="src.party.main", settings=settings, umask=0)

        def joined() -> bool:
            self.processes.check()
            return [each.party for each in self.client.status().parties if each.connected] == ["a", "b", "c"]

        self._until(joined, "three parties join", every_s=0.25)


@pytest.fixture(scope="module")
def classic(
    tmp_path_factory: pytest.TempPathFactory,
    make_processes: Callable[[Path], Any],
    wait_until: Callable[..., Any],
    reserved_address: Callable[[], AbstractContextManager[str]],
) -> Iterator[Classic]:
    directory = tmp_path_factory.mktemp("classic")
    with reserved_address() as address:
        made = Classic(directory, make_processes(directory), wait_until, address=address)
        yield made
        made.client.close()
        made.processes.close()


def test_the_aggregator_starts_without_anything_and_makes_its_keys(classic: Classic) -> None:
    status = classic.client.status()
    assert (status.custody, status.federation) == ("aggregator", "demo")
    private, signing = (classic.state / "aggregator" / name for name in ("private_key.json", "signing.key"))
    assert load_private_key(private, insecure_small=True).public.key_id == status.key_id
    assert [path.stat().st_mode & 0o077 for path in (private, signing)] == [0, 0]  # their owner's alone
    log = classic.processes.log("aggregator").read_text()
    assert "this process holds the key and can read every update" in log
    assert "INSECURE: no TLS" in log
    assert "party-level budget: 10000 rounds, no limit in ε\n" in log


def test_three_parties_join_and_finish_a_job_whose_manifest_says_that_the_aggregator_can_read(
    classic: Classic, tmp_path: Path
) -> None:
    if not classic.client.status().parties:
        with pytest.raises(StateError, match="no party has joined yet"):
            classic.client.submit(SPEC)
    classic.start_parties()
    job = classic.client.wait(classic.client.submit(SPEC).job_id, LONG_S)
    assert job.state == jobs_pb2.SUCCEEDED, job.error.message
    assert job.progress.rounds[0].contributions == 3
    files = classic.client.fetch_artifact(job.job_id, tmp_path)
    manifest = json.loads(files["manifest.json"].read_text())["readable"]
    assert any(text.startswith("the aggregator holds the key: updates are") for text in manifest["statements"])
    assert manifest["encryption"]["custody"] == "aggregator"
    assert manifest["encryption"]["key_id"] == classic.client.status().key_id


def test_what_the_roles_have_made_is_their_owners_alone_though_no_umask_said_so(classic: Classic) -> None:
    """They run with umask 0: databases, keys, models, batches, workers' directories; public are key and address."""
    classic.start_parties()
    modes = {path.relative_to(classic.state).as_posix(): path.stat().st_mode for path in classic.state.rglob("*")}
    assert {"aggregator/aggregator.sqlite-wal", "party-a/party.sqlite", "aggregator/work"} <= set(modes)
    public = {"address", "aggregator/public_key.json"}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077 and name not in public} == {}
    # And nothing lies there that is taken for somebody else's: such a directory would not be made private.
    names = {path.name for role in classic.state.iterdir() if role.is_dir() for path in role.iterdir()}
    assert {"accepted.json", "party.sqlite", "aggregator.sqlite"} <= names
    assert {name for name in names if not OF_A_ROLE.fullmatch(name)} == set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is dumped")
def test_no_process_of_a_role_leaves_an_image_of_its_memory(classic: Classic) -> None:
    """Both roles, their zygotes and their workers."""
    classic.start_parties()
    for name in ("aggregator", "a"):
        everybody = classic.processes.all_of(name)
        assert len(everybody) >= 3
        for process in everybody:
            about = Path("/proc") / str(process.pid)
            (limit,) = [line for line in (about / "limits").read_text().splitlines() if "core file size" in line]
            assert limit.split()[4:6] == ["0", "0"]
            with contextlib.suppress(PermissionError):  # one that is not dumpable shows it to root alone
                assert int((about / "coredump_filter").read_text(), 16) == 0


def test_a_restarted_aggregator_keeps_its_keys_and_its_parties(classic: Classic) -> None:
    classic.start_parties()
    key_id = classic.client.status().key_id
    assert classic.processes.stop("aggregator") == 0
    classic.start_aggregator(SOTTO__EVALUATION="{}")  # seconds sooner; nothing is evaluated here
    assert classic.client.status().key_id == key_id
    classic.start_parties()  # they come back by themselves, and know the aggregator by its keys
