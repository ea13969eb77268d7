"""The processes behind the pool: a zygote, and the workers it forks.

The zygote is a fresh interpreter that imports what workers need, runs nothing parallel and keeps one thread, so that
its forks start in milliseconds and cannot hang on a lock that another thread held. A worker answers frames on one
socket until it closes. A pipe that only the role process holds open is everyone's lifeline: when it closes, however
the role ended, every process here ends too, in the middle of a computation if need be.

Frames are a length of four bytes (big-endian) and JSON; an empty one asks for an empty one, as a sign of life. The
zygote's commands are one line of JSON each way.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any, Final, NoReturn

from ...confinement import is_confined
from ...errors import ConfigError, SottoError
from ...files import make_private_directory
from ...hardening import forbid_core_dumps
from ...storage.blobs import Blobs
from .limits import limit_memory, limited_cpu, private_memory_mb
from .units import MAX_FRAME_BYTES, Handler, WorkContext, execute, import_short, load_handlers

LENGTH: Final = struct.Struct(">I")
PING: Final = b""
"""The frame that asks for itself back."""
COMMAND_BYTES: Final = 1 << 16
"""More than any command or answer of the zygote: a few paths."""

THREADS_ENV: Final = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
"""Read when a numerical library is imported. The pool's size is the parallelism; the zygote must not have threads."""

BOOT: Final = (
    "import json, sys; path, module, *fds = sys.argv[1:]; sys.path[:] = json.loads(path); "
    "import importlib; importlib.import_module(module).zygote(*map(int, fds))"
)
"""For `python -P -c`: by import path and module name, so that the role's own main module is never run again."""


def zygote(control_fd: int, lifeline_fd: int, watched_fd: int) -> None:
    """Serves fork and kill commands on the control socket until it closes; then ends every worker and returns.

    Commands: {"fork": directory} with the worker's socket attached → {"pid"}, or {"error"}; {"end": pid} → {"status":
    what waitpid said, negative for a signal}. The first line from the other side is the settings. `watched_fd` is open
    in this process alone, so that the role sees its end.
    """
    forbid_core_dumps()  # its forks are not dumped either
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the role's to handle
    control = socket.socket(fileno=control_fd)
    with contextlib.suppress(ConnectionError):  # the role is gone or has changed its mind
        settings = json.loads(control.recv(COMMAND_BYTES))
        try:
            handlers = _prepare(settings)
        except Exception as error:
            text = error.message if isinstance(error, SottoError) else f"{type(error).__name__}: {error}"
            control.sendall(json.dumps({"error": text[:4000]}).encode())
            return
        control.sendall(json.dumps({"ready": os.getpid(), "threads": _threads()}).encode())
        _serve(control, lifeline_fd, watched_fd, settings=settings, handlers=handlers)


def _serve(
    control: socket.socket,
    lifeline_fd: int,
    watched_fd: int,
    *,
    settings: dict[str, Any],
    handlers: dict[str, Handler],
) -> None:
    workers: set[int] = set()
    answer: dict[str, Any]
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(control, COMMAND_BYTES, 1)
            if not data:
                return
            command = json.loads(data)
            if "fork" in command:
                try:
                    pid = os.fork()
                except OSError as error:  # no more processes or no more memory: the workers that are there go on
                    answer = {"error": f"fork: {error}"}
                else:
                    if pid == 0:
                        control.close()
                        os.close(watched_fd)
                        _worker(fds[0], lifeline_fd, settings, handlers=handlers, workspace=Path(command["fork"]))
                    with contextlib.suppress(OSError):
                        os.setpgid(pid, pid)  # the child does it too: whoever comes first
                    workers.add(pid)
                    answer = {"pid": pid}
                os.close(fds[0])
            else:
                pid = command["end"]
                answer = {"status": _end(pid) if pid in workers else None}
                workers.discard(pid)
            control.sendall(json.dumps(answer).encode())
    finally:
        for pid in workers:
            _end(pid)


def _prepare(settings: dict[str, Any]) -> dict[str, Handler]:
    handlers = load_handlers(settings["handlers"])
    for name in settings["preload"]:
        import_short(name)
    for name, arguments in settings["prepare"].items():
        import_short(name).prepare(arguments)
    forbidden = sorted({"grpc", "sqlalchemy"} & sys.modules.keys())
    if forbidden:
        raise ImportError(f"a worker must not import {forbidden[0]}: {settings['handlers']} does")
    limit_mb, used_mb = settings["memory_limit_mb"], private_memory_mb()
    if limit_mb is not None and used_mb >= limit_mb:
        raise ConfigError(f"memory_limit_mb: {limit_mb} is too little: the imports alone take {used_mb:.0f} MiB")
    gc.collect()
    gc.freeze()  # what is imported stays shared between the forks
    return handlers


def _end(pid: int) -> int:
    """Kills a worker with all that it started and reaps it; nobody else does, so that the pid cannot be another's."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def _worker(
    channel_fd: int, lifeline_fd: int, settings: dict[str, Any], *, handlers: dict[str, Handler], workspace: Path
) -> NoReturn:
    """Answers units until the socket closes, or one of them has confined the process, which no other could work in.
    Never returns into the zygote's code."""
    status, untouched = 1, True
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.nice(settings["nice"])
        if settings["memory_limit_mb"] is not None:
            limit_memory(settings["memory_limit_mb"])
        threading.Thread(target=_end_with, args=(lifeline_fd,), daemon=True).start()
        _reseed()
        channel = socket.socket(fileno=channel_fd)
        blobs, kept = Blobs(Path(settings["blobs_root"])), dict[str, Any]()
        while (frame := _receive(channel)) is not None:
            reply = PING
            if frame != PING:
                _clear(workspace)
                make_private_directory(workspace)
                context = WorkContext(blobs, workspace, settings["memory_limit_mb"], untouched, kept)
                with limited_cpu(settings["cpu_limit_s"]):
                    reply = execute(frame, handlers, context)
                untouched = False
                if not is_confined():  # else the role removes it
                    _clear(workspace)
            channel.sendall(LENGTH.pack(len(reply)) + reply)
            if is_confined():
                break
        status = 0
    except (ConnectionError, KeyboardInterrupt):
        pass
    finally:
        os._exit(status)


def _end_with(lifeline_fd: int) -> None:
    """Blocks until the role process is gone, then ends this process and all that it started."""
    with contextlib.suppress(OSError):
        os.read(lifeline_fd, 1)
    os.killpg(0, signal.SIGKILL)


def _reseed() -> None:
    """Forks would share the state of generators that were imported before; nothing that protects anybody uses these."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
        sys.modules["torch"].seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _clear(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _receive(channel: socket.socket) -> bytes | None:
    """The next frame, or None when the other side has closed."""
    header = _receive_exactly(channel, LENGTH.size)
    if header is None:
        return None
    (length,) = LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        return None
    return _receive_exactly(channel, length)


def _receive_exactly(channel: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = channel.recv(min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
