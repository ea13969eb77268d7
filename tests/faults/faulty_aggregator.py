"""An aggregator that dies, or stands still, exactly where it is told to: `python -m tests.faults.faulty_aggregator`.

What the environment says of it:

    CRASH="before 2"        kills itself, as `kill -9` does, right before its second commit
    CRASH="after 1"         right after its first one
    CRASH="before-blob 1"   right before its first blob gets its name, CRASH="after-blob 1" right after
    STALL=FILE              a worker that is given the unit that is named in the file stands still (SIGSTOP)

Only commits count that changed something. What it does to take up its jobs when it starts does not count, unless
CRASH begins with "start: ". It builds and evaluates no models, as if torch were not installed: that saves seconds.

With a configuration as argument it is one aggregator. Without, it does its imports, reads lines from stdin, JSON
objects {"config": PATH, "environ": {…}}, and forks an aggregator for each: it prints its process id, then its exit
code, and only then reads the next line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import Connection

from src.aggregator import pipeline
from src.aggregator.coordinator import Coordinator
from src.aggregator.main import run
from src.jobs.executors.processes import Worker
from src.storage.blobs import Blobs
from src.storage.database import Database


class Crash:
    """Counts boundaries of effects, and dies at the one that was asked for."""

    def __init__(self, text: str) -> None:
        self.counting = text.startswith("start: ")
        place, _, number = text.removeprefix("start: ").partition(" ")
        self._place, self._left = place, int(number)

    def reached(self, place: str) -> None:
        if not self.counting or place != self._place:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def crash_at_commits(crash: Crash) -> None:
    transact = Database._transact

    def counted(self: Database, work: Callable[[Connection], Any]) -> Any:
        wrote = False

        def watched(connection: Connection) -> Any:
            nonlocal wrote
            before = _changes(connection)
            result = work(connection)
            wrote = _changes(connection) != before
            if wrote:
                crash.reached("before")
            return result

        result = transact(self, watched)
        if wrote:
            crash.reached("after")
        return result

    mock.patch.object(Database, "_transact", counted).start()


def _changes(connection: Connection) -> int:
    """Rows that this connection has written so far."""
    driver: Any = connection.connection.driver_connection
    return int(driver.total_changes)


def crash_at_blobs(crash: Crash) -> None:
    adopt = Blobs._adopt

    def counted(self: Blobs, temporary: Path, sha256: str) -> None:
        crash.reached("before-blob")
        adopt(self, temporary, sha256)
        crash.reached("after-blob")

    mock.patch.object(Blobs, "_adopt", counted).start()


def count_once_restored(crash: Crash) -> None:
    restore = Coordinator.restore

    async def restored(self: Coordinator) -> None:
        await restore(self)
        crash.counting = True

    mock.patch.object(Coordinator, "restore", restored).start()


def stall(file: Path) -> None:
    ask = Worker.ask

    def named() -> str:
        return file.read_text() if file.exists() else ""

    async def asked(self: Worker, frame: bytes) -> bytes:
        if json.loads(frame)["name"] == named():
            os.kill(self.pid, signal.SIGSTOP)
        return await ask(self, frame)

    mock.patch.object(Worker, "ask", asked).start()


def live(config: Path) -> None:
    """Be an aggregator to the end."""
    mock.patch.object(pipeline, "has_torch", return_value=False).start()
    if point := os.environ.get("CRASH", ""):
        crash = Crash(point)
        crash_at_commits(crash)
        crash_at_blobs(crash)
        count_once_restored(crash)
    if named := os.environ.get("STALL", ""):
        stall(Path(named))
    run(config)


def live_again_and_again() -> None:
    """One life after the other. This process has one thread and no channel, or those that it forks would hang."""
    import src.aggregator.app  # noqa: F401  so that no life waits for it

    for line in sys.stdin:
        life = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            os.environ.update(life["environ"])
            live(Path(life["config"]))
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        live(Path(sys.argv[1]))
    else:
        live_again_and_again()
