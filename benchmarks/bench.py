"""`make bench`: what Sotto's pieces cost, beside its peers in the same run, written to build/bench.json.

Figures on one core are CPU times, best of several runs; speed-ups, and all that somebody waits for, are wall times.
Absolute figures differ from machine to machine: the ratios are what counts, and they do to some extent too, so the
processor stands beside them. Needs two cores that nobody else uses, and ten minutes.

`make bench-check`: the same, and it fails unless everything that is to be reached was measured, and is reached or
listed in shortfalls.toml.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import encryption, jobs, ledger, privacy, rounds_history, training
from benchmarks.measure import Figures
from benchmarks.reach import HOLDS, problems

Benches = Mapping[str, tuple[Callable[[], Figures], Mapping[str, tuple[str, float]]]]
BENCHES: Benches = {
    "encryption": (encryption.run, encryption.REACH),
    "jobs": (jobs.run, jobs.REACH),
    "ledger": (ledger.run, ledger.REACH),
    "privacy": (privacy.run, privacy.REACH),
    "rounds_history": (rounds_history.run, rounds_history.REACH),
    "training": (training.run, training.REACH),
}
"""By name: what measures, and what it is to reach."""
SHORTFALLS = Path(__file__).with_name("shortfalls.toml")


def processor() -> str:
    """As the system calls it, with what it is: some call themselves no more than by their maker's name."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    said = found.get("model name", platform.machine())
    return f"{said} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def main() -> int:
    """Run what is asked for, print a table, merge the figures into build/bench.json; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BENCHES))
    parser.add_argument("--check", action="store_true", help="fail unless all holds, or is listed")
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else sorted(BENCHES)
    shortfalls = tomllib.loads(SHORTFALLS.read_text())
    figures: Figures = {}
    reach: dict[str, tuple[str, float]] = {}
    for name in chosen:
        measure, asked = BENCHES[name]
        figures |= measure()
        reach |= asked
    print(f"on {processor()}")
    for name, value in figures.items():
        asked_of = reach.get(name)
        missed = asked_of is not None and not HOLDS[asked_of[0]](value, asked_of[1])
        said = "" if not missed else "LISTED" if name in shortfalls else "MISSED"
        print(f"{name:<36} {value:>14,.3f}", *([f"  {asked_of[0]} {asked_of[1]:,}", said] if asked_of else []))
    for name, known in shortfalls.items():
        if name in reach and name in figures:
            held = HOLDS[reach[name][0]](figures[name], reach[name][1])
            print(f"{name}: {'holds here, though it is listed' if held else known['reason'].strip()}")
    path = ROOT / "build" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    known_figures = json.loads(path.read_text()) if path.exists() else {}
    written = {**known_figures, **figures, "processor": processor()}
    path.write_text(json.dumps(written, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    wrong = problems(figures, reach, shortfalls) if arguments.check else []
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
