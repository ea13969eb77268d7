"""Units of work that try the pool itself: that a worker answers, computes, fails and dies as it should."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...confinement import code, confine
from ...errors import BY_REASON
from .units import Handler, WorkContext, unit_version


def echo(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{…} → the same: is there a worker that answers?"""
    return dict(params)


@unit_version(2)
def echo_again(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """As `echo`, in a second version."""
    return {**params, "version": 2}


def describe(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{} → what a worker is: its process, priority, threads, and the modules that it should not have."""
    return {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "nice": os.nice(0),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "interrupt_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "modules": sorted({name.partition(".")[0] for name in sys.modules} & {"grpc", "sqlalchemy", "torch", "numpy"}),
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "core_bytes": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "files": _open_files(),
        "workspace": [path.name for path in context.workspace.iterdir()],
    }


def _open_files() -> list[str]:
    """What is open besides the three standard streams, as Linux names it."""
    directory = Path("/proc/self/fd")
    if not directory.is_dir():
        return []
    return [str(path.readlink()) for path in directory.iterdir() if int(path.name) > 2 and path.is_symlink()]


def store(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{text} → {sha256}: by way of a file in the workspace, which is left behind."""
    scratch = context.workspace / "scratch"
    scratch.write_text(params["text"], encoding="utf-8")
    return {"sha256": context.blobs.write(scratch.read_bytes()).sha256, "workspace": str(context.workspace)}


def count(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{} → how many times this unit has been answered by this worker, by what it keeps."""
    context.kept["counted"] = context.kept.get("counted", 0) + 1
    return {"counted": context.kept["counted"]}


def busy(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{blob} → never returns; stores the text `blob` first, by which an onlooker knows that it has begun."""
    context.blobs.write(params["blob"].encode())
    digest = b""
    while True:
        digest = hashlib.sha256(digest).digest()


def fail(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{reason} → raises that error of the catalogue, or for no reason an exception whose text must stay here."""
    if "reason" in params:
        raise BY_REASON[params["reason"]]("on purpose", private="for the log", unit="fail", index=3)
    raise ValueError("a private row: 1,2,3")


def leave(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{} → raises SystemExit, which must not end the worker."""
    sys.exit(3)


def misbehave(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{} → a result that is not JSON."""
    return {"digest": b"bytes"}


def allocate(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{mb} → asks for so many MiB at once, and gives them back."""
    return {"bytes": len(bytearray(params["mb"] << 20))}


def spawn(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{blob} → starts a process, and goes on as `busy`."""
    if os.fork() == 0:
        while True:
            signal.pause()
    return busy(params, context)


def die(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{} → kills its own process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def withdraw(params: Mapping[str, Any], context: WorkContext) -> dict[str, Any]:
    """{files} → confines the process, and tells which of the files, by their paths, can be read even so."""
    confined = confine(readable=code(), writable=[context.workspace])
    (context.workspace / "scratch").touch()
    readable = [file for file in params["files"] if _opens(file)]
    return {"confined": confined, "readable": readable, "pid": os.getpid(), "untouched": context.untouched}


def _opens(file: str) -> bool:
    try:
        Path(file).open("rb").close()
    except OSError:
        return False
    return True


HANDLERS: Final[dict[str, Handler]] = {
    "echo": echo,
    "echo_again": echo_again,
    "describe": describe,
    "store": store,
    "count": count,
    "busy": busy,
    "fail": fail,
    "leave": leave,
    "misbehave": misbehave,
    "allocate": allocate,
    "spawn": spawn,
    "die": die,
    "withdraw": withdraw,
}
