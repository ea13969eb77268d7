"""The first day, walked as README has it: each command literally, in a fresh environment outside the checkout.

What is indented under "For real" is run in the order in which it stands, by whom the text says, in the directory of
their kit: then what "In Python", "On one node" and "A task of your own" say. Put in is what a page cannot know: an
address and a file on this machine, and the number of a job. Prints each command with its seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SECTION: Final = "## For real"
SOURCES: Final = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "constraints.txt")
START_S: Final = 180.0
STOP_S: Final = 30.0
LOG_LINES: Final = 30


class Stumbled(Exception):
    """A command of README's did not do what it is there for."""


def section(readme: str, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    return readme.split(f"{heading}\n", 1)[1].split("\n##", 1)[0]


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def indented(text: str) -> list[str]:
    """The commands that are indented, one each, without the comments behind them."""
    joined = re.sub(r" \\\n\s+", " ", text)
    lines = [match.group(1) for match in re.finditer(r"^    (\S.*)$", joined, flags=re.MULTILINE)]
    return [re.sub(r"\s+# .*$", "", line).strip() for line in lines]


def installation(readme: str) -> str:
    """The command that installs what a party needs."""
    wanted = (line for line in re.findall(r"`(pip install [^`]*)`", section(readme, SECTION)) if "[party," in line)
    found: str = next(wanted)
    return found


def free_address() -> str:
    """An address on the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@dataclass
class Walk:
    """Where the day takes place, and what was done so far."""

    place: Path
    readme: str
    log: list[tuple[str, float]] = field(default_factory=list)
    roles: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    job: str = ""

    @property
    def kits(self) -> Path:
        """What `provision` makes."""
        return self.place / "kits"

    @property
    def scientist(self) -> Path:
        """The scientist's kit."""
        return self.kits / "scientist"

    def parties(self) -> list[Path]:
        """The parties' kits."""
        return sorted(self.kits.glob("party-*"))

    def environment(self) -> dict[str, str]:
        """Of every command: what was installed comes first, and nothing of the checkout is seen."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("SOTTO_")}
        path = f"{self.place / 'venv' / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
        return kept | {"PATH": path, "no_proxy": "127.0.0.1,localhost", "HOME": str(self.place / "home")}

    def run(self, command: str, *, cwd: Path, timeout_s: float = 1800) -> str:
        """Run one command to its end, which has to be a good one; its output."""
        print(f"  $ {command}", flush=True)
        begun = time.monotonic()
        done = subprocess.run(  # the commands that our own README tells people to type
            shlex.split(command),
            cwd=cwd,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        self.log.append((command, time.monotonic() - begun))
        print(f"      {self.log[-1][1]:.1f} s", flush=True)
        if done.returncode != 0:
            raise Stumbled(f"`{command}` in {cwd} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, name: str, command: str) -> None:
        """Start a role that stays."""
        print(f"  $ {command}    # in kits/{name}, stays", flush=True)
        with (self.place / f"{name}.log").open("wb") as log:
            self.roles[name] = subprocess.Popen(  # likewise
                shlex.split(command),
                cwd=self.kits / name,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.log.append((command, 0.0))

    def start_aggregator(self, command: str) -> None:
        """Until it listens."""
        self.start("aggregator", command)
        self.wait_for("aggregator", "listening on")

    def start_parties(self, command: str) -> None:
        """Until each has joined."""
        for kit in self.parties():
            self.start(kit.name, command)
        for kit in self.parties():
            self.wait_for(kit.name, "joined federation")

    def text(self, name: str) -> str:
        """What a role has said so far."""
        return (self.place / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, words: str) -> None:
        """Until a role says `words`, which it has to within `START_S`."""
        deadline = time.monotonic() + START_S
        while words not in self.text(name):
            ended = self.roles[name].poll()
            if ended is not None or time.monotonic() > deadline:
                why = f"ended with {ended}" if ended is not None else f"said no {words!r} in {START_S:.0f} s"
                raise Stumbled(f"{name} {why}:\n" + "\n".join(self.text(name).splitlines()[-LOG_LINES:]))
            time.sleep(0.2)

    def stop(self) -> None:
        """End every role as Ctrl-C does."""
        for process in reversed(self.roles.values()):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in self.roles.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.roles.clear()


@contextlib.contextmanager
def walk(place: Path) -> Iterator[Walk]:
    """Everything up to the model of the first job; yields while the roles still run."""
    readme = (ROOT / "README.md").read_text()
    day = Walk(place, readme)
    (place / "home").mkdir()
    source = place / "checkout"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)  # our own interpreter
    day.run(installation(readme), cwd=source)
    shutil.rmtree(source)  # what was installed is what runs
    try:
        for command in indented(section(readme, SECTION)):
            _step(day, command)
        yield day
    finally:
        day.stop()


def _step(day: Walk, command: str) -> None:
    """One line of README's, by whom it is meant for."""
    if command.startswith("sotto provision "):
        day.run(re.sub(r"(?<=--address )\S+", free_address(), command), cwd=day.place)
    elif command.startswith("sotto aggregator "):
        day.start_aggregator(command)
    elif command.startswith("sotto party "):
        day.start_parties(command)
    elif command.startswith("sotto jobs submit "):
        day.job = day.run(command, cwd=day.scientist).split()[0]
    elif command.startswith("sotto jobs "):
        day.run(command.replace("JOB", day.job), cwd=day.scientist)
    else:
        raise Stumbled(f"README's {SECTION!r} has a command that this walk does not know: {command}")


def looks(day: Walk) -> dict[str, str]:
    """What the text says in passing, of the budget and of the aggregator: each command's output."""
    text = section(day.readme, SECTION)
    asked = dict.fromkeys(re.findall(r"`(sotto (?:budget show|status) [^`]*)`", text))
    places = {"party.yaml": day.kits / "party-north", "client.yaml": day.scientist}
    return {command: day.run(command, cwd=places[command.rsplit(maxsplit=1)[1]]) for command in asked}


def in_python(day: Walk) -> None:
    """The few lines of Python, in the scientist's directory."""
    (script,) = fenced(section(day.readme, "### In Python"), "python")
    (day.scientist / "few_lines.py").write_text(script)
    day.run("python few_lines.py", cwd=day.scientist)


def on_one_node(day: Walk) -> None:
    """Training without a federation, each line in a shell."""
    for command in indented(section(day.readme, "### On one node")):
        day.run(f"bash -c {shlex.quote('set -o pipefail; ' + command)}", cwd=day.place)


def task_of_ones_own(day: Walk) -> None:
    """The task that README shows: as a package, registered, listed by every party, trained."""
    text = section(day.readme, "## A task of your own")
    package = day.place / "hospital"
    (package / "hospital").mkdir(parents=True)
    (package / "hospital" / "__init__.py").write_text("")
    (package / "hospital" / "triage.py").write_text(fenced(text, "python")[0])
    (package / "pyproject.toml").write_text('[project]\nname = "hospital"\nversion = "1"\n\n' + fenced(text, "toml")[0])
    day.run("pip install .", cwd=package)
    shutil.rmtree(package)
    table = (
        "import numpy as np; r = np.random.default_rng(0); "
        "np.savez('triage.npz', features=r.normal(size=(500, 12)), labels=r.integers(0, 3, 500))"
    )
    listed = fenced(text, "yaml")[0].replace("/srv/triage.npz", "triage.npz").replace("20000", "500")
    for kit in day.parties():
        day.run(f"python -c {shlex.quote(table)}", cwd=kit)
        file = kit / "party.yaml"
        file.write_text(re.sub(r"^datasets:\n", listed, file.read_text(), flags=re.MULTILINE))
    day.stop()
    day.start_aggregator("sotto aggregator --config aggregator.yaml")
    day.start_parties("sotto party --config party.yaml")
    (command,) = dict.fromkeys(re.findall(r"`(sotto jobs submit --task triage)`", text))
    day.job = day.run(f"{command} --rounds 1 --config client.yaml", cwd=day.scientist).split()[0]
    day.run(f"sotto jobs wait {day.job} --config client.yaml", cwd=day.scientist)
    day.run(f"sotto jobs result {day.job} --out triage --config client.yaml", cwd=day.scientist)


def main() -> int:
    """Walk, and say how long it took."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        try:
            with walk(Path(place)) as day:
                first_model = time.monotonic() - begun
                for part in (looks, in_python, on_one_node, task_of_ones_own):
                    part(day)
        except Stumbled as error:
            print(f"NO  {error}")
            return 1
    print(f"yes {len(day.log)} commands in {time.monotonic() - begun:.0f} s; the first model after {first_model:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
