"""What the benchmark of jobs runs on: a kit, real encrypted batches to sum, processes that serve and that ask.

Custody is `aggregator`: its key takes a second to make instead of minutes, and a sum is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from src.aggregator.federation import open_federation
from src.aggregator.planning import Model, plan_round
from src.config import load_aggregator_config
from src.encryption.registry import scheme_for
from src.jobs.spec import FederatedTrainingSpec, PartyPrivacy
from src.privacy.entropy import SystemEntropy
from src.protocol.batches import write_batch
from src.protocol.plan import PLAN_KIND, signed_digest
from src.provisioning import provision
from src.storage.blobs import Blobs

MODULUS_BITS: Final = 3072
PARAMETERS: Final = 1_000_000
PARTIES: Final = ("a", "b")
"""Each contributes a batch of its own to the sum."""
SLOT_BITS: Final = 24
"""What a value takes, about; tables are chosen by it."""
ENCRYPTING_PROCESSES: Final = 2

_HERE: Final = Path(__file__).resolve().parent
_PLACEHOLDER: Final = "127.0.0.1:50051"
"""Where the clients' kits say that the aggregator is, until it has found a free port."""
_STOP_S: Final = 30.0
_LOG_CHARACTERS: Final = 3000
_MANY: Final = 100_000


@dataclass(frozen=True, slots=True)
class Load:
    """The unit "fold" of a round: its parameters, and the blobs that it reads."""

    params: dict[str, Any]
    blobs: Path


def make_kit(directory: Path) -> Path:
    """Kits with a key, which aggregators of this benchmark copy; what would refuse so many jobs is out of the way."""
    provision(
        directory,
        federation="bench",
        parties=PARTIES,
        custody="aggregator",
        modulus_bits=MODULUS_BITS,
        address=_PLACEHOLDER,
        aggregator_overrides={
            "server": {"listen": "127.0.0.1:0", "reflection": False},
            "limits": {"max_jobs_pending": _MANY, "max_streams_per_caller": _MANY, "max_requests_per_caller": _MANY},
            "jobs": {"max_pending_per_scientist": _MANY},
            "privacy": {"budget": {"max_rounds": 1000 * _MANY}},
        },
    )
    open_federation(load_aggregator_config(directory / "aggregator" / "aggregator.yaml", environ={}), now=time.time())
    return directory


def make_load(kit: Path, directory: Path) -> Load:
    """A round of `PARAMETERS` parameters, of which every party has delivered its batch: fresh randomness for each."""
    config = load_aggregator_config(kit / "aggregator" / "aggregator.yaml", environ={})
    federation = open_federation(config, now=time.time())
    scheme = scheme_for(
        "paillier",
        federation.keyring.public,
        expected_ciphertexts=len(PARTIES) * PARAMETERS * SLOT_BITS // MODULUS_BITS,  # the tables serve them all
        processes=ENCRYPTING_PROCESSES,
    )
    spec = FederatedTrainingSpec(task="randhie", party_privacy=PartyPrivacy(noise_by="parties"))
    model = Model("0" * 64, 4 * PARAMETERS, PARAMETERS)
    plan = plan_round(spec, job_id="bench", number=1, model=model, roster=federation.roster, scheme=scheme)
    signed = federation.sign(PLAN_KIND, plan.to_statement())
    digest = signed_digest(signed, PLAN_KIND)
    batches = {}
    for seed, name in enumerate(PARTIES):
        values = np.random.default_rng(seed).integers(-plan.rounded_bound, plan.rounded_bound + 1, PARAMETERS)
        batch = write_batch(
            scheme,
            plan,
            values,
            plan_digest=digest,
            contributor=name,
            blobs=Blobs(directory),
            entropy=SystemEntropy(),
        )
        stored = batch.to_json()
        del stored["proof"]  # was checked when the batch came
        batches[name] = stored
    params = {
        "plan": signed.statement.decode(),
        "plan_digest": digest,
        "public": json.dumps(federation.keyring.to_json()),
        "processes": 1,
        "batches": batches,
    }
    return Load(params, directory)


def environment() -> dict[str, str]:
    """This one's, without settings that would override those of the kits."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("SOTTO_")}


class Server:
    """An aggregator in a process of its own (jobs_server.py), which ends when this object's end of a pipe does."""

    def __init__(self, process: subprocess.Popen[str], log: Path, client_config: Path) -> None:
        self._process = process
        self._log = log
        self.client_config = client_config

    def tell(self, command: str, **arguments: Any) -> Any:
        """One command to the server; returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self.heard()

    def heard(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the aggregator has ended:\n{self._log.read_text()[-_LOG_CHARACTERS:]}")
        return json.loads(line)

    def ask(self, operation: str, *arguments: object) -> Any:
        """What a client in another process says (jobs_client.py)."""
        command = [*_client(operation, self.client_config), *map(str, arguments)]
        done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def asking(self, operation: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """The same, to be listened to meanwhile."""
        command = [*_client(operation, self.client_config), *map(str, arguments)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)  # noqa: S603  our own
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _client(operation: str, config: Path) -> list[str]:
    return [sys.executable, str(_HERE / "jobs_client.py"), operation, str(config)]


@contextlib.contextmanager
def serving(kit: Path, directory: Path, load: Load | None = None) -> Iterator[Server]:
    """An aggregator with an empty database, from a copy of the kit; `load` is what it can be told to compute."""
    shutil.copytree(kit, directory)
    settings = directory / "settings.json"
    given = load and {"params": load.params, "blobs": str(load.blobs)}
    config = directory / "aggregator" / "aggregator.yaml"
    settings.write_text(json.dumps({"config": str(config), "load": given}))
    log = directory / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(  # noqa: S603  our own
            [sys.executable, str(_HERE / "jobs_server.py"), str(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(),
            start_new_session=True,  # Ctrl-C is for this process; that one hears of it by its pipe
        )
    client_config = directory / "scientist" / "client.yaml"
    server = Server(process, log, client_config)
    try:
        address = server.heard()["address"]
        client_config.write_text(client_config.read_text().replace(_PLACEHOLDER, address))
        yield server
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
