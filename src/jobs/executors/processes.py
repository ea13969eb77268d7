"""The role's end of its processes: one zygote, and the workers that it forks (see `worker`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import WorkerError
from .units import MAX_FRAME_BYTES, ROOT
from .worker import BOOT, COMMAND_BYTES, LENGTH, PING, THREADS_ENV

_log = logging.getLogger("sotto.jobs.pool")

_ANSWER_TIMEOUT_S: Final = 10.0
"""How long a zygote may take to fork or to kill, and to end all workers, before it is killed; it takes milliseconds."""
_IMPORT_TIMEOUT_S: Final = 300.0
"""How long its imports may take: seconds, minutes where they come over a slow network."""


class Lost(Exception):
    """The process at the other end is gone."""


class Zygote:
    """The role's end of one zygote process. `lost` once it is gone or does not answer; its workers end then, too."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        *,
        lifeline: int,
        watch: int,
        on_gone: Callable[[], None],
    ) -> None:
        self._process = process
        self._control = control
        self._lifeline: int | None = lifeline
        self._watch: int | None = watch
        self._on_gone = on_gone
        self._one_at_a_time = asyncio.Lock()
        self.lost = False
        asyncio.get_running_loop().add_reader(watch, self._gone)

    @classmethod
    def launch(cls, on_gone: Callable[[], None]) -> Zygote:
        """Starts the process; `on_gone` is called if it ends by itself later. `prepare` comes next."""
        with contextlib.ExitStack() as passed, contextlib.ExitStack() as kept:
            control, theirs = socket.socketpair()
            kept.callback(control.close)
            passed.callback(theirs.close)
            lifeline, ours = os.pipe()
            kept.callback(os.close, ours)
            passed.callback(os.close, lifeline)
            watch, watched = os.pipe()
            kept.callback(os.close, watch)
            passed.callback(os.close, watched)
            fds = (theirs.fileno(), lifeline, watched)
            arguments = [
                json.dumps([str(Path(entry).absolute()) for entry in sys.path]),
                f"{ROOT}.jobs.executors.worker",
            ]
            process = subprocess.Popen(  # noqa: S603  our own interpreter
                [sys.executable, "-P", "-c", BOOT, *arguments, *map(str, fds)],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env={**os.environ, **THREADS_ENV},
                process_group=0,  # Ctrl-C in a terminal goes to the role alone, which ends this one in order
            )
            kept.pop_all()
        control.setblocking(False)
        return cls(process, control, lifeline=ours, watch=watch, on_gone=on_gone)

    async def prepare(self, settings: dict[str, Any]) -> None:
        """Tells it what to import and waits until that is done.

        Raises:
            WorkerError: the imports fail.
        """
        message = "the worker processes cannot be started"
        try:
            answer = await self.ask(settings, timeout_s=_IMPORT_TIMEOUT_S)
        except Lost:
            raise WorkerError(message, private="the zygote died") from None
        except asyncio.CancelledError:
            self._process.kill()  # it has no workers yet, and might be in the middle of long imports
            raise
        if "error" in answer:
            raise WorkerError(message, private=answer["error"])
        if answer["threads"] != 1:
            _log.warning("the zygote has %d threads: a worker forked from it may hang", answer["threads"])

    async def ask(
        self, command: dict[str, Any], fd: int | None = None, *, timeout_s: float = _ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        """Sends one command and returns its answer. Raises Lost."""
        async with self._one_at_a_time:
            if self.lost:
                raise Lost
            try:
                # A line is far smaller than a socket's buffer, and the zygote has answered the one before.
                socket.send_fds(self._control, [json.dumps(command).encode()], [] if fd is None else [fd])
                async with asyncio.timeout(timeout_s):
                    data = await asyncio.get_running_loop().sock_recv(self._control, COMMAND_BYTES)
            except TimeoutError:
                self._process.kill()
                data = b""
            except OSError:
                data = b""
            except asyncio.CancelledError:
                self.lost = True
                self._control.close()  # its answer would be taken for the next one's
                raise
            if not data:
                self.lost = True
                raise Lost
        answer: dict[str, Any] = json.loads(data)
        return answer

    async def close(self) -> None:
        """Ends it and all of its workers, and waits until it is gone; closing again is allowed."""
        self._unwatch()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        async with self._one_at_a_time:  # a socket that is closed while somebody reads from it wakes nobody
            self.lost = True
            self._control.close()
        try:
            await asyncio.to_thread(self._process.wait, _ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _gone(self) -> None:
        """The pipe that only the zygote holds open is closed."""
        self._unwatch()
        self.lost = True
        self._on_gone()

    def _unwatch(self) -> None:
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch)
            os.close(self._watch)
            self._watch = None


class _Channel(asyncio.Protocol):
    """One frame out, one frame in."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._reply: asyncio.Future[bytes | None] | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self.lost = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(self._buffer)
        end = LENGTH.size + length
        if length > MAX_FRAME_BYTES or self._reply is None or self._reply.done() or len(self._buffer) > end:
            self.abort()
        elif len(self._buffer) == end:
            self._reply.set_result(bytes(self._buffer[LENGTH.size :]))
            self._buffer.clear()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(None)
        if not self.closed.done():
            self.closed.set_result(None)
        self.on_lost()

    def abort(self) -> None:
        self.lost = True
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, frame: bytes) -> bytes:
        if self.lost or self._transport is None:
            raise Lost
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(LENGTH.pack(len(frame)))
        self._transport.write(frame)
        try:
            reply = await self._reply
        finally:
            self._reply = None
        if reply is None:
            raise Lost
        return reply


@dataclass(slots=True, eq=False)
class Worker:
    """The role's end of one worker process.

    Attributes:
        units: that it was given so far.
        idle_since_s: since when it has had nothing to do, of the event loop's clock.
        checked_s: when it last answered.
    """

    zygote: Zygote
    pid: int
    workspace: Path
    channel: _Channel
    units: int = 0
    idle_since_s: float = 0.0
    checked_s: float = 0.0

    @classmethod
    async def start(cls, zygote: Zygote, workspace: Path, on_lost: Callable[[Worker], None]) -> Worker:
        """Forks one; `on_lost` is called when it is gone.

        Raises:
            Lost: the zygote is gone.
            WorkerError: the system forks no more processes.
        """
        ours, theirs = socket.socketpair()
        channel = _Channel()
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
            answer = await zygote.ask({"fork": str(workspace)}, theirs.fileno())
            if "error" in answer:
                raise WorkerError("a worker process cannot be started", private=answer["error"])
        except BaseException:
            channel.abort()
            ours.close()
            raise
        finally:
            theirs.close()
        worker = cls(zygote, answer["pid"], workspace, channel)
        channel.on_lost = lambda: on_lost(worker)
        return worker

    @property
    def alive(self) -> bool:
        """False once the process closed its end, or its zygote is gone: then it will be, too."""
        return not self.channel.lost and not self.zygote.lost

    async def ask(self, frame: bytes) -> bytes:
        """Sends a unit and returns the reply's frame. Raises Lost."""
        return await self.channel.ask(frame)

    async def ping(self, timeout_s: float) -> None:
        """Returns when it has answered. Raises Lost, also when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.channel.ask(PING)
        except TimeoutError:
            raise Lost from None

    async def end(self) -> int | None:
        """Kills it with all that it started, removes its workspace, and returns how it ended (negative: a signal)."""
        self.channel.abort()
        status: int | None = None
        with contextlib.suppress(Lost):
            status = (await self.zygote.ask({"end": self.pid}))["status"]
        await self.channel.closed
        if self.workspace.exists():
            await asyncio.to_thread(shutil.rmtree, self.workspace, ignore_errors=True)
        return status
