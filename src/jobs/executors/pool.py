"""A pool of warm worker processes for units of CPU work.

The role process never forks itself: it starts a zygote (see `worker`), which does. Everything here is driven by the
event loop; no thread waits for a worker.

This is `multiprocessing`'s forkserver in what it does, without three things that come with it: a main module that is
imported again in every child, one forkserver a process that outlives the pool, and pickled arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import AbandonedError, DeadlineError, StateError, WorkerError
from .units import MAX_FRAME_BYTES, ROOT, decode_reply, encode_unit
from .worker import BOOT, COMMAND_BYTES, LENGTH, THREADS_ENV

_log = logging.getLogger("sotto.jobs.pool")

_END_TIMEOUT_S: Final = 10.0
"""How long a zygote may take to end its workers before it is killed; it takes milliseconds."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Workers: `size` in all, of which `busy` compute and `idle` wait (the rest are being replaced); `replaced` so far.
    Units: `tasks_done` and `tasks_failed` so far, and `waiting` for a worker."""

    size: int
    busy: int
    idle: int
    replaced: int
    tasks_done: int
    tasks_failed: int
    waiting: int


class _Lost(Exception):
    """The process at the other end is gone."""


class _Zygote:
    """The role's end of one zygote process."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, lifeline: int) -> None:
        self._process = process
        self._control = control
        self._lifeline: int | None = lifeline
        self._one_at_a_time = asyncio.Lock()
        self.lost = False

    @classmethod
    async def start(cls, settings: dict[str, Any]) -> _Zygote:
        """Starts it and waits until its imports are done. Raises WorkerError when they fail."""
        control, theirs = socket.socketpair()
        lifeline, ours = os.pipe()
        arguments = [json.dumps([os.fspath(entry) for entry in sys.path]), f"{ROOT}.jobs.executors.worker"]
        try:
            process = subprocess.Popen(  # noqa: ASYNC220, S603  exec of our own interpreter: milliseconds
                [sys.executable, "-P", "-c", BOOT, *arguments, str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                env={**os.environ, **THREADS_ENV},
                process_group=0,  # Ctrl-C in a terminal goes to the role alone, which ends this one in order
            )
        finally:
            theirs.close()
            os.close(lifeline)
        control.setblocking(False)
        zygote = cls(process, control, ours)
        try:
            answer = await zygote.ask(settings)
        except BaseException as error:
            await zygote.close()
            if isinstance(error, _Lost):
                raise WorkerError("the worker processes cannot be started", private="the zygote died") from None
            raise
        if "error" in answer:
            await zygote.close()
            raise WorkerError("the worker processes cannot be started", private=answer["error"])
        if answer["threads"] != 1:
            _log.warning("the zygote has %d threads: a worker forked from it may hang", answer["threads"])
        return zygote

    async def ask(self, command: dict[str, Any], fd: int | None = None) -> dict[str, Any]:
        """Sends one command and returns its answer. Raises _Lost."""
        async with self._one_at_a_time:
            try:
                # A line is far smaller than a socket's buffer, and the zygote has answered the one before.
                socket.send_fds(self._control, [json.dumps(command).encode()], [] if fd is None else [fd])
                data = await asyncio.get_running_loop().sock_recv(self._control, COMMAND_BYTES)
            except OSError:
                data = b""
            except asyncio.CancelledError:
                self._control.close()  # its answer would be taken for the next one's
                raise
        if not data:
            self.lost = True
            raise _Lost
        answer: dict[str, Any] = json.loads(data)
        return answer

    async def close(self) -> None:
        """Ends it and all of its workers, and waits until they are gone."""
        if self._lifeline is None:
            return
        os.close(self._lifeline)
        self._lifeline = None
        self._control.close()
        try:
            await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)


@dataclass(slots=True, eq=False)
class _Worker:
    """The role's end of one worker process."""

    zygote: _Zygote
    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    workspace: Path

    @classmethod
    async def start(cls, zygote: _Zygote, workspace: Path) -> _Worker:
        """Forks one. Raises _Lost when the zygote is gone."""
        ours, theirs = socket.socketpair()
        try:
            pid = (await zygote.ask({"fork": str(workspace)}, theirs.fileno()))["pid"]
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        return cls(zygote, pid, reader, writer, workspace)

    @property
    def alive(self) -> bool:
        """False once the process closed its end, or its zygote is gone: then it will be, too."""
        return not self.reader.at_eof() and not self.writer.is_closing() and not self.zygote.lost

    async def ask(self, frame: bytes) -> bytes:
        """Sends a unit and returns the reply's frame. Raises _Lost."""
        try:
            self.writer.write(LENGTH.pack(len(frame)))
            self.writer.write(frame)
            await self.writer.drain()
            (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
            if length > MAX_FRAME_BYTES:
                raise _Lost
            return await self.reader.readexactly(length)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise _Lost from error

    async def end(self) -> int | None:
        """Kills it with all that it started, removes its workspace, and returns how it ended (negative: a signal)."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        status: int | None = None
        with contextlib.suppress(_Lost):
            status = (await self.zygote.ask({"end": self.pid}))["status"]
        await asyncio.to_thread(shutil.rmtree, self.workspace, ignore_errors=True)
        return status


class WorkerPool:
    """Runs units of work in `size` processes, first come, first served.

    A worker that dies fails its unit and is replaced; so is one whose unit takes too long or is no longer wanted.

    Args:
        handlers: short name of the module with the table `HANDLERS` ("party.work").
        blobs_root: the role's blob store.
        workspace: directory for scratch files, the pool's own; what an earlier run left there is removed.
        size: number of processes, ≥ 1.
        nice: by how much they yield to the role process, 0 to 19.
        preload: further modules to import once in the zygote, by short name.
    """

    def __init__(
        self,
        *,
        handlers: str,
        blobs_root: Path,
        workspace: Path,
        size: int,
        nice: int = 10,
        preload: tuple[str, ...] = (),
    ) -> None:
        if size < 1:
            raise ValueError("a pool has at least one worker")
        self._size = size
        self._workspace = workspace.absolute()
        self._settings = {
            "handlers": handlers,
            "blobs_root": str(blobs_root.absolute()),
            "nice": nice,
            "preload": list(preload),
        }
        self._zygote: _Zygote | None = None
        self._starting = asyncio.Lock()
        self._workers: set[_Worker] = set()
        self._idle: deque[_Worker] = deque()
        self._waiting: deque[asyncio.Future[_Worker]] = deque()
        self._growing: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[int | None]] = set()
        self._open = False
        self._numbers = itertools.count(1)
        self._busy = self._replaced = self._done = self._failed = 0

    async def start(self) -> None:
        """Starts the processes and waits until they are ready.

        Raises:
            StateError: it is started already.
            WorkerError: they cannot be started; the log says which import failed.
        """
        if self._zygote is not None:
            raise StateError("the pool is started already")
        await asyncio.to_thread(self._sweep)
        try:
            for _ in range(self._size):
                self._idle.append(await self._new_worker())
        except BaseException:
            await self.close()
            raise
        self._open = True

    async def close(self) -> None:
        """Ends every process, whatever it is doing, and waits until they are gone. Units under way are abandoned."""
        self._open = False
        while self._waiting:
            _fail(self._waiting.popleft(), AbandonedError("the worker pool is closed"))
        for task in self._growing:
            task.cancel()
        await asyncio.gather(*self._growing, *self._ending, return_exceptions=True)
        if self._zygote is not None:
            await self._zygote.close()
            self._zygote = None
        self._idle.clear()
        for worker in list(self._workers):
            await self._forget(worker)
        await asyncio.to_thread(self._sweep)

    async def run(
        self, name: str, params: Mapping[str, Any], *, version: int = 1, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Runs one unit in the next free worker and returns its result. Cancelling the caller kills the worker.

        Args:
            name: of the handler.
            params: JSON values; blobs by digest.
            version: of the unit; the handler must have the same.
            timeout_s: how long it may compute, not counting the wait for a worker; None: as long as it likes.

        Raises:
            SottoError: whatever the handler raised, as the same class.
            WorkerError: it raised something else, or its worker died.
            DeadlineError: it took longer than `timeout_s`.
            AbandonedError: the pool was closed meanwhile.
            StateError: the pool is not started.
            InvalidInput, LimitError: the parameters are not JSON, or too large.
        """
        frame = encode_unit(name, params, version=version)
        worker = await self._acquire()
        self._busy += 1
        try:
            async with asyncio.timeout(timeout_s):
                reply = await worker.ask(frame)
        except BaseException as error:
            self._failed += 1
            ending = self._replace(worker)
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"unit {name} did not end within {timeout_s} s", unit=name) from None
            if isinstance(error, _Lost):
                raise await self._death(name, ending) from None
            raise
        finally:
            self._busy -= 1
        self._release(worker)
        try:
            result = decode_reply(reply)
        except Exception:
            self._failed += 1
            raise
        self._done += 1
        return result

    def stats(self) -> PoolStats:
        """How busy it is."""
        return PoolStats(
            size=self._size,
            busy=self._busy,
            idle=len(self._idle),
            replaced=self._replaced,
            tasks_done=self._done,
            tasks_failed=self._failed,
            waiting=len(self._waiting),
        )

    async def _acquire(self) -> _Worker:
        """The next free worker, in the order of asking."""
        while True:
            if not self._open:
                raise StateError("the worker pool is not started, or closed")
            self._grow()
            if self._idle:
                worker = self._idle.popleft()
            else:
                worker = await self._wait()
            if worker.alive:
                return worker
            self._replace(worker)  # it died while it had nothing to do: no unit's fault

    async def _wait(self) -> _Worker:
        future: asyncio.Future[_Worker] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result())  # handed over in the moment of cancelling
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(future)
            raise

    def _release(self, worker: _Worker) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(worker)
                return
        self._idle.append(worker)

    def _replace(self, worker: _Worker) -> asyncio.Task[int | None] | None:
        """Ends a worker and starts another, both without being waited for; returns the task that ends it.

        None while the pool is being closed: `close` ends all of them.
        """
        if not self._open:
            return None
        self._replaced += 1
        ending = asyncio.create_task(self._forget(worker))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        self._spawn(self._add_worker(after=ending))
        return ending

    def _grow(self) -> None:
        """Makes up for replacements that failed."""
        for _ in range(self._size - len(self._workers) - len(self._growing)):
            self._spawn(self._add_worker())

    def _spawn(self, adding: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(adding)
        self._growing.add(task)
        task.add_done_callback(self._growing.discard)

    async def _add_worker(self, after: asyncio.Task[int | None] | None = None) -> None:
        try:
            if after is not None:
                await asyncio.shield(after)
            self._release(await self._new_worker())
        except WorkerError as error:
            _log.error("a worker cannot be replaced: %s", error.private)
            while self._waiting and not self._workers:
                _fail(self._waiting.popleft(), error)

    async def _new_worker(self) -> _Worker:
        """A worker of the present zygote, or of a new one where that is gone, and with it all of its workers."""
        async with self._starting:
            for _ in range(2):
                if self._zygote is None:
                    self._zygote = await _Zygote.start(self._settings)
                try:
                    worker = await _Worker.start(self._zygote, self._workspace / f"worker-{next(self._numbers)}")
                except _Lost:
                    await self._zygote.close()
                    self._zygote = None
                    continue
                self._workers.add(worker)
                return worker
        raise WorkerError("the worker processes cannot be started", private="the zygote died twice")

    async def _forget(self, worker: _Worker) -> int | None:
        self._workers.discard(worker)
        return await worker.end()

    async def _death(self, name: str, ending: asyncio.Task[int | None] | None) -> AbandonedError | WorkerError:
        if ending is None:
            return AbandonedError(f"unit {name} was abandoned: the worker pool is closed", unit=name)
        status = await asyncio.shield(ending)
        return WorkerError(f"the worker of unit {name} died", private=f"exit status {status}", unit=name)

    def _sweep(self) -> None:
        if self._workspace.is_dir():
            for leftover in self._workspace.glob("worker-*"):
                shutil.rmtree(leftover, ignore_errors=True)


def _fail(future: asyncio.Future[_Worker], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
