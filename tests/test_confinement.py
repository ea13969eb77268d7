"""What a process that has confined itself can still reach, and that nothing gives it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from src import confinement

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not confinement.version(), reason="this kernel has no Landlock")

TRIES = """
import os, socket, subprocess, sys
from pathlib import Path
from src.confinement import code, confine, version
mine, private = Path(sys.argv[1]), Path(sys.argv[2])
before = os.open(private.parent, os.O_RDONLY)
assert confine(readable=code(), writable=[mine])
def list_beside():
    os.listdir(private.parent)
tries = {
    "reads a private file": lambda: private.read_bytes(),
    "reads it by a directory that was open": lambda: os.open(private.name, os.O_RDONLY, dir_fd=before),
    "reads it by a link": lambda: ((mine / "link").symlink_to(private), (mine / "link").read_bytes()),
    "lists a directory": list_beside,
    "writes over it": lambda: private.write_bytes(b"x"),
    "removes it": lambda: private.unlink(),
    "moves it": lambda: private.rename(mine / "moved"),
    "links it": lambda: os.link(private, mine / "linked"),
    "makes a file beside it": lambda: private.with_name("new").touch(),
    "reads another process": lambda: Path("/proc/1/environ").read_bytes(),
    "runs a program": lambda: subprocess.run(["/bin/true"]),
    "allows itself more": lambda: confine(readable=[Path("/")], writable=[Path("/")]) and private.read_bytes(),
    "in a child": lambda: os.waitpid(os.fork() or os._exit(not os.access(private, os.F_OK) or bool(opened(private))), 0)
    [1] or 1 / 0,
}
def opened(file):
    try:
        return bool(file.read_bytes())
    except OSError:
        return False
if version() >= 4:
    tries["connects"] = lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])))
    tries["listens"] = lambda: socket.create_server(("127.0.0.1", 0))
if version() >= 6:
    tries["signals"] = lambda: os.kill(os.getppid(), 0)
for name, attempt in tries.items():
    try:
        attempt()
    except (OSError, ZeroDivisionError):
        pass
    else:
        print(name)
(mine / "own").write_bytes(b"x")
import csv, sqlite3, wave, xmlrpc.client  # lazily, as a model may
print("done")
"""


def test_it_reads_what_runs_it_and_nothing_else(tmp_path: Path) -> None:
    import socket

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    private = theirs / "rows.csv"
    private.write_text("31337")
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(mine), str(private), str(server.getsockname()[1])]
        done = subprocess.run(
            [sys.executable, "-c", TRIES, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert private.read_text() == "31337"


def test_of_a_place_on_the_import_path_only_what_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A party that is started in the directory of its data has that on its path."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "module.py").touch()
    (tmp_path / "rows.csv").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "task-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {path.name for path in confinement.code() if path.is_relative_to(tmp_path)}
    assert found == {"package", "module.py", "task-1.0.dist-info"}


def test_where_there_is_no_landlock_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "version", lambda: 0)
    assert not confinement.confine(readable=[])
    assert not confinement.is_confined()
