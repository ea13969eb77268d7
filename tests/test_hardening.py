"""A process that holds keys or private rows leaves no image of its memory."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
TELL = """
import ctypes, resource, sys
def tell():
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) if sys.platform == "linux" else 0  # PR_GET_DUMPABLE
    kinds = int(open("/proc/self/coredump_filter").read(), 16) if sys.platform == "linux" else 0
    print(*resource.getrlimit(resource.RLIMIT_CORE), dumpable, kinds)
"""


def told(code: str, **environ: str) -> list[str]:
    environ = {**{key: value for key, value in os.environ.items() if key != "SOTTO_ALLOW_INSPECTION"}, **environ}
    done = subprocess.run(
        [sys.executable, "-c", TELL + code], cwd=ROOT, capture_output=True, text=True, check=True, env=environ
    )
    return done.stdout.splitlines()


def test_every_command_begins_by_forbidding_dumps() -> None:
    """`sotto train`, `sotto provision`, both roles, `budget set`: whatever the command is, before it runs."""
    code = (
        "import src.cli as cli; cli.run = lambda _: tell() or 0; sys.argv = ['sotto']\n"
        "try: cli.main()\nexcept SystemExit: pass"
    )
    assert told(code) == ["0 0 0 0"]


@pytest.mark.parametrize("role", ["aggregator", "party"])
def test_a_role_that_is_started_as_a_module_does_so_itself(role: str) -> None:
    code = (
        f"import pathlib, src.{role}.main as main, src.config as config\n"
        f"def load(*_, **__): tell(); raise SystemExit\n"
        f"config.load_{role}_config = load\n"
        "try: main.run(pathlib.Path('x'))\nexcept SystemExit: pass"
    )
    assert told(code) == ["0 0 0 0"]


@LINUX
def test_whoever_measures_memory_may_look_and_still_nothing_is_dumped() -> None:
    code = "from src.hardening import forbid_core_dumps; forbid_core_dumps(); tell()"
    assert told(code, SOTTO_ALLOW_INSPECTION="1") == ["0 0 1 0"]


@LINUX
def test_a_crash_of_a_process_that_holds_a_secret_writes_none_of_it(tmp_path: Path) -> None:
    """Also where the limit was unlimited before; where this system pipes dumps away, the filter says the same."""
    code = (
        "import resource, signal, os\n"
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]; resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
        "from src.hardening import forbid_core_dumps; forbid_core_dumps()\n"
        f"os.chdir({str(tmp_path)!r}); secret = b'the key' * 1000; os.kill(os.getpid(), signal.SIGSEGV)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode < 0
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_runs_another_program_is_not_dumped_either() -> None:
    code = (
        "import subprocess; from src.hardening import forbid_core_dumps; forbid_core_dumps()\n"
        f"sys.stdout.flush(); subprocess.run([sys.executable, '-c', {TELL!r} + 'tell()'])"
    )
    (line,) = told(code)
    assert line.split()[:2] == ["0", "0"]
    assert line.split()[3] == "0"


QUIET = """
import importlib, os, sys
class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            assert os.environ["GRPC_VERBOSITY"] == sys.argv[2]
sys.meta_path.insert(0, Look())
importlib.import_module(sys.argv[1])
import grpc
call = grpc.insecure_channel("192.0.2.1:1").unary_unary("/a/b")
try:
    call(b"", timeout=0.01)
except grpc.RpcError:
    pass
"""


@pytest.mark.parametrize("module", ["src.client", "src.party.app", "src.aggregator.app"])
def test_whichever_part_is_imported_grpc_writes_no_line_of_its_own(module: str) -> None:
    """Neither of the client in somebody's program; unless who runs it asks for them."""
    environ = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"} | {"https_proxy": "ftp://x"}
    for asked, silent in (({}, True), ({"GRPC_VERBOSITY": "ERROR"}, False)):
        command = [sys.executable, "-c", QUIET, module, "NONE" if silent else "ERROR"]
        done = subprocess.run(command, cwd=ROOT, env=environ | asked, capture_output=True, text=True, check=False)
        assert (done.returncode, "http_proxy_mapper" not in done.stderr) == (0, silent), done.stderr
        assert silent is (done.stderr == "")


def test_who_fails_a_handshake_writes_no_line_into_anybodys_log(tmp_path: Path) -> None:
    """gRPC's core writes one for each, to stderr and past the log, for whoever reaches the port."""
    from src.provisioning import provision

    tests = {"modulus_bits": 512, "insecure_small": True, "processes": 1}
    server = {"server": {"listen": "127.0.0.1:0", "address_file": "address"}, "workers": {"size": 1, "min_size": 1}}
    provision(tmp_path / "kits", federation="demo", parties=("a", "b"), aggregator_overrides=server, **tests)  # type: ignore[arg-type]
    kit = tmp_path / "kits" / "aggregator"
    command = [sys.executable, "-m", "src", "aggregator", "--config", str(kit / "aggregator.yaml")]
    environ = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, env=environ, stderr=file) as process:
        try:
            deadline = time.monotonic() + 100
            while not (kit / "address").exists():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            host, _, port = (kit / "address").read_text().strip().rpartition(":")
            before = log.stat().st_size
            for _ in range(20):
                with socket.create_connection((host, int(port))) as client, contextlib.suppress(OSError):
                    client.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10)
                    client.recv(100)  # the end, once the handshake has failed
            assert log.stat().st_size == before
        finally:
            process.terminate()
    assert process.returncode == 0
