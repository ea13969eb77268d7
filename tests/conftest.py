"""A federation of real processes on this machine, for every directory of tests that needs one; and which worker of
pytest-xdist runs what."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # the tests of pure rooms do not pay for grpc and SQLAlchemy
    from src.aggregator.round_row import RoundRow
    from src.client import Job, SottoClient
    from src.party.store import PartyRound
    from src.privacy.ledger import Charge, Entry

ROOT: Final = Path(__file__).resolve().parents[1]
PATIENCE_S: Final = 200.0
"""Far beyond what any wait takes, on a busy machine too; only a hang reaches it."""
LOOK_S: Final = 0.05
ASK_S: Final = 0.25
"""Between two calls over the network: looking must not cost what is waited for."""
ROUND_TIMEOUT_S: Final = 150.0
"""Only a hang reaches it, and then the job says for whom it waited before `PATIENCE_S` is over."""
MODULUS_BITS: Final = 512
URGENT: Final = {"workers": {"nice": 0, "size": 2, "min_size": 2, "max_size": 2, "health_interval_s": 3600.0}}
"""Yielding to whatever else this machine does, workers could wait for ever: tests are in a hurry. And no worker takes
the place of one that a test holds."""

LONG_FILES: Final = (
    "tests/integration/test_federation.py",
    "tests/integration/test_missing.py",
    "tests/integration/test_wrong_kit.py",
    "tests/integration/test_node_client.py",
    "tests/integration/test_fedsgd.py",
    "tests/integration/test_private_values_told.py",
    "tests/faults/test_kill_and_resume.py",
    "tests/faults/test_crash_points.py",
    "tests/faults/test_cancelling.py",
    "tests/faults/test_end_in_order.py",
    "tests/faults/test_stopping.py",
    "tests/integration/test_demo.py",
    "tests/integration/test_classic.py",
)
"""With processes of their own, about a minute each: workers begin with these, so that none is left alone with one."""
ONE_FEDERATION: Final = frozenset(LONG_FILES[:6])
"""Their tests share one federation, which takes half a minute to start: they belong into one worker."""

os.environ["no_grpc_proxy"] = "localhost,127.0.0.1"  # noqa: SIM112  gRPC looks for it in lower case
"""This machine is reached without its proxy, if it has one."""

_IN_PEACE: Final[dict[str, Any]] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],  # of this machine, that is, whatever else it does
    "print_blob": True,
}
settings.register_profile("repeatable", **_IN_PEACE, derandomize=True, database=None)
settings.register_profile("searching", **_IN_PEACE, derandomize=False)
settings.load_profile("repeatable")
"""Whoever runs the tests sees what everybody sees; `make test-all` looks for what nobody has seen yet."""

if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # Dozens of processes that import torch: each would compile it again, for seconds. Written here, not into the tree.
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(ROOT / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False

FORKING: Final = ("tests/encryption/", "tests/privacy/", "tests/jobs/test_pool")
"""They fork this process, or count its children: before any test opens a gRPC channel here, whose threads do not
survive a fork (grpc aborts the child), and before a federation of real processes runs."""


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one worker, which makes its fixtures once. (`--dist loadgroup` needs no hook, and groups
    nothing under pytest 9.2: pytest-xdist 3.8 sets a private attribute that is not read any more.)"""
    if config.getoption("dist") != "load":  # somebody asked for something else
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # ships no types

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = _file_of(nodeid)
            if file.startswith("tests/faults/"):  # likewise
                return "faults"
            return "one federation" if file in ONE_FEDERATION else file

    config.option.loadscopereorder = False  # it would begin with the files of many tests, which are the quick ones
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what forks, then the long files, so that no worker is left alone with one; then all others."""

    def turn(item: pytest.Item) -> int:
        file = _file_of(item.nodeid)
        return 0 if file.startswith(FORKING) else 1 if file in LONG_FILES else 2

    items.sort(key=turn)


def until(condition: Callable[[], Any], what: str, *, timeout_s: float = PATIENCE_S, every_s: float = LOOK_S) -> Any:
    """The first true value of `condition`; fails, and says `what` did not happen, when time is over."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)
    return value


def gone(process: psutil.Process) -> bool:
    """Ended; who reaps it is its new parent's business."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def reserve() -> Iterator[str]:
    """An address at which a server can end and begin again: meanwhile the system gives its port to nobody who asks for
    any port. Linux lets a socket that does not listen hold it, while another one listens there by name."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        if sys.platform != "linux":
            holder.close()
        yield address


class Processes:
    """Role processes by name, each with a log of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        *arguments: str,
        module: str = "src",
        settings: Mapping[str, str] | None = None,
        umask: int = -1,
    ) -> subprocess.Popen[bytes]:
        """`python -m MODULE ARGUMENTS`, with SOTTO__… from `settings` alone."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SOTTO__")}
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**environ, **(settings or {})},
                umask=umask,
            )
        return self.running[name]

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def check(self) -> None:
        """Fails with the log of a role that ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                pytest.fail(f"{name} ended ({process.returncode}):\n{self.log(name).read_text()[-3000:]}")

    def all_of(self, name: str) -> list[psutil.Process]:
        """The role's process, its zygote, and its workers."""
        root = psutil.Process(self.running[name].pid)
        return [root, *root.children(recursive=True)]

    def workers(self, name: str) -> list[psutil.Process]:
        """Those that compute: the children of the zygote."""
        found: list[psutil.Process] = []
        for zygote in psutil.Process(self.running[name].pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it was being replaced
                found += zygote.children()
        return found

    def signal(self, name: str, number: signal.Signals) -> int:
        """Send a signal that ends the role; its exit code, once nothing that it started is left."""
        family = self.all_of(name)
        process = self.running.pop(name)
        process.send_signal(number)
        code = process.wait(PATIENCE_S)
        self.ended(family, f"the end of everything that {name} started")
        return code

    def ended(self, family: Sequence[psutil.Process], what: str) -> None:
        """Wait until none of them is left."""
        until(lambda: all(gone(each) for each in family), what)

    def stopped_worker(self, name: str) -> psutil.Process | None:
        """One that stands still, if one does."""
        for worker in self.workers(name):
            with contextlib.suppress(psutil.NoSuchProcess):  # it was being replaced
                if worker.status() == psutil.STATUS_STOPPED:
                    return worker
        return None

    def kill(self, name: str) -> None:
        """`kill -9`."""
        assert self.signal(name, signal.SIGKILL) == -signal.SIGKILL

    def stop(self, name: str) -> int:
        """SIGTERM; returns the exit code."""
        return self.signal(name, signal.SIGTERM)

    @contextlib.contextmanager
    def hold(self, *names: str) -> Iterator[None]:
        """Nothing that these roles have to compute is computed meanwhile; they still talk."""
        held = [worker for name in names for worker in self.workers(name)]
        assert held
        for worker in held:
            worker.suspend()
        try:
            yield
        finally:
            for worker in held:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.resume()

    def close(self) -> None:
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Federation:
    """Kits, an aggregator, parties and a scientist over mutual TLS; started as far as a test asks for it."""

    def __init__(
        self,
        directory: Path,
        *,
        parties: Sequence[str] = ("a", "b", "c"),
        party: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        from src.provisioning import provision

        self.parties = tuple(parties)
        self.kits = directory / "kits"
        self.processes = Processes(directory)
        self._kept = contextlib.ExitStack()
        self.address = self._kept.enter_context(reserve())
        self.notebook: Path | None = None
        self._settings = dict(settings or {})
        self._client: SottoClient | None = None
        provision(
            self.kits,
            federation="demo",
            parties=parties,
            modulus_bits=MODULUS_BITS,
            insecure_small=True,
            processes=1,
            aggregator_overrides={
                "server": {"listen": self.address, "address_file": "address"},
                "privacy": {"budget": {"max_rounds": 200}},
                **URGENT,
            },
            party_overrides={**URGENT, **(party or {})},
        )

    # --- roles --------------------------------------------------------------------------------------------------------

    def start_aggregator(self, **settings: str) -> None:
        """Always at the same address; returns once it serves."""
        if "aggregator" in self.processes.running:
            return
        kit = self.kits / "aggregator"
        (kit / "address").unlink(missing_ok=True)
        own = self._settings.get("aggregator", {})
        arguments = ("aggregator", "--config", str(kit / "aggregator.yaml"))
        self.processes.start("aggregator", *arguments, settings={**own, **settings})

        def serving() -> bool:
            self.processes.check()
            return (kit / "address").exists()

        until(serving, "the aggregator serves")

    def start(self, *names: str) -> None:
        """The aggregator and these parties, as far as they are not running; returns once they have joined."""
        self.start_aggregator()
        for name in names:
            if name not in self.processes.running:
                config = str(self.kits / f"party-{name}" / "party.yaml")
                settings = {"SOTTO__SERVER__ADDRESS": self.address, **self._settings.get(name, {})}
                self.processes.start(name, "party", "--config", config, settings=settings)
        self.joined(*names)

    def joined(self, *names: str) -> None:
        """Wait until these parties have a session."""

        def connected() -> bool:
            self.processes.check()
            return set(names) <= {each.party for each in self.client.status().parties if each.connected}

        until(connected, f"{', '.join(names)} join", every_s=ASK_S)

    @property
    def client(self) -> SottoClient:
        """A scientist, with the roster of the kit pinned."""
        from src.client import SottoClient

        if self._client is None:
            config = self.kits / "scientist" / "client.yaml"
            self._client = SottoClient.from_config(config, address=self.address, retry_for_s=PATIENCE_S)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self.processes.close()
        self._kept.close()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def submit(self, *, request_id: str | None = None, initial_model: bytes = b"", **fields: Any) -> str:
        """A job of one round by default, that trains little; returns its id."""
        from src.jobs.spec import FederatedTrainingSpec, LocalTraining, PartyPrivacy, spec_to_proto

        epsilon = fields.pop("epsilon", 3.0)
        standard = {
            "task": "randhie",
            "rounds": 1,
            "spare_rounds": 0,
            "local_training": LocalTraining(steps=5, sampling_rate=0.02, learning_rate=1.5, epsilon=epsilon),
            "party_privacy": PartyPrivacy(clipping_norm=0.5, noise_multiplier=0.2),
            "round_timeout_s": ROUND_TIMEOUT_S,
        }
        spec = FederatedTrainingSpec(**{**standard, **fields})
        return self.client.submit(spec_to_proto(spec, initial_model), request_id).job_id

    def end(self, job_id: str) -> Job:
        """The job, once it is at rest."""
        return self.client.wait(job_id, PATIENCE_S)

    def succeed(self, job_id: str) -> Job:
        """The job, once it has succeeded; any other end fails, with its reason."""
        from src.client import result_of

        job = self.end(job_id)
        result_of(job)
        return job

    # --- what lies on disk --------------------------------------------------------------------------------------------

    def state(self, name: str) -> Path:
        """A role's state directory."""
        return self.kits / (name if name == "aggregator" else f"party-{name}") / "state"

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        from src.storage.database import read_only

        file = "aggregator.sqlite" if name == "aggregator" else "party.sqlite"
        with read_only(self.state(name) / file) as connection:
            return read(connection)

    def rounds(self, job_id: str) -> list[RoundRow]:
        """The job's rounds as the aggregator has them on disk, whether it runs or not."""
        from sqlalchemy import MetaData

        from src.aggregator.store import RoundStore

        rows: list[RoundRow] = self._read("aggregator", lambda c: RoundStore(MetaData()).of_job(c, job_id))
        return rows

    def reached(self, job_id: str, condition: Callable[[RoundRow], Any], what: str) -> RoundRow:
        """The job's newest round, once `condition` holds of it; fails when the round comes to rest without it."""

        def look() -> RoundRow | None:
            self.processes.check()
            row = rows[-1] if (rows := self.rounds(job_id)) else None
            if row is not None and condition(row):
                return row
            if row is not None and row.at_rest:
                pytest.fail(f"{what}: the round is {row.state.value} {row.reason}")
            return None

        found: RoundRow = until(look, what)
        return found

    def memory(self, party: str, job_id: str, number: int = 1) -> PartyRound | None:
        """A round as a party has it on disk."""
        from sqlalchemy import MetaData

        from src.party.store import RoundMemory

        row: PartyRound | None = self._read(party, lambda c: RoundMemory(MetaData()).find(c, job_id, number))
        return row

    def ledger(self, name: str) -> list[Entry]:
        """A role's ledger, its chain verified."""
        from sqlalchemy import MetaData

        from src.storage.ledger import LedgerStore

        entries: list[Entry] = self._read(name, LedgerStore(MetaData()).entries)
        return entries

    def charges(self, name: str, job_id: str) -> list[Charge]:
        """What a job was charged in a role's ledger, and what became of it."""
        from src.privacy.ledger import charges

        return [each for each in charges(self.ledger(name)).values() if each.entry.job_id == job_id]


@pytest.fixture(scope="session")
def make_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Federation]]:
    """Makes kits; the federation is closed at the end of the session."""
    made: list[Federation] = []

    def make(**arguments: Any) -> Federation:
        made.append(Federation(tmp_path_factory.mktemp("federation"), **arguments))
        return made[-1]

    yield make
    for federation in made:
        federation.close()


@pytest.fixture(scope="session")
def make_processes() -> Iterator[Callable[[Path], Processes]]:
    """Makes an empty set of processes whose logs go to a directory; what still runs ends with the session."""
    made: list[Processes] = []

    def make(directory: Path) -> Processes:
        made.append(Processes(directory))
        return made[-1]

    yield make
    for processes in made:
        processes.close()


@pytest.fixture(scope="session")
def reserved_address() -> Callable[[], contextlib.AbstractContextManager[str]]:
    """`with reserved_address() as address`, see `reserve`."""
    return reserve


@pytest.fixture
def quiet() -> Iterator[None]:
    """Leaves the process's logging as it was."""
    loggers = [logging.getLogger(name) for name in ("", "sotto", "src")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard here, and by whatever a test starts: shells have the jobs in their background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """`until(condition, what)`."""
    return until
