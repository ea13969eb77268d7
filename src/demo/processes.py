"""The roles as processes of their own: started, watched, measured, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from ..errors import JobFailed
from ..hardening import INSPECTION

PACKAGE: Final = __name__.partition(".")[0]
"""The name this package goes by here: `sotto` where it is installed, `src` in a checkout."""
LOG_LINES: Final = 20
"""How much of a failing role's log is shown."""
STOP_S: Final = 10.0
SAMPLE_S: Final = 0.5


@dataclass
class Role:
    """One process with its workers, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    peak_mb: float = 0.0

    def tail(self) -> list[str]:
        """The last lines of the log."""
        with contextlib.suppress(OSError), self.log.open(errors="replace") as file:
            return [line.rstrip() for line in deque(file, LOG_LINES)]
        return []

    def measure(self) -> None:
        """Note the memory of the process and its workers, each page counted once where the system can tell."""
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    full = process.memory_full_info()
                    total += getattr(full, "pss", full.uss)  # macOS knows no proportional share
        self.peak_mb = max(self.peak_mb, total / 2**20)


@dataclass
class Roles:
    """All processes of the demonstration."""

    directory: Path
    running: dict[str, Role] = field(default_factory=dict)

    def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Role:
        """Start `sotto ARGUMENTS`; its log is NAME.log in the directory."""
        log = self.directory / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and package
                [sys.executable, "-m", PACKAGE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, INSPECTION: "1", **environment},  # to be measured; its rows are public
                start_new_session=True,  # Ctrl-C goes to the demonstration, which stops the roles in order
            )
        self.running[name] = Role(name, process, log)
        return self.running[name]

    def check(self) -> None:
        """Raises JobFailed, which names the role, when one has ended by itself."""
        for role in self.running.values():
            code = role.process.poll()
            if code is not None:
                raise JobFailed(f"{role.name} has ended (exit code {code})", role=role.name)

    async def watch(self) -> None:
        """Check and measure until cancelled; raises as `check` does."""
        while True:
            self.check()
            for role in self.running.values():
                await asyncio.to_thread(role.measure)
            await asyncio.sleep(SAMPLE_S)

    def stop(self) -> None:
        """End everybody, the parties first; who does not listen is killed."""
        for role in reversed(list(self.running.values())):
            with contextlib.suppress(ProcessLookupError):
                role.process.terminate()
        for role in self.running.values():
            try:
                role.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                role.process.kill()
                role.process.wait()
