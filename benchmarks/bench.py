"""`make bench`: what Sotto's pieces cost, beside its peers in the same run, written to build/bench.json.

Figures on one core are CPU times, best of several runs; speed-ups, and all that somebody waits for, are wall times.
Absolute figures differ from machine to machine: the ratios are what counts. Needs two cores that nobody else uses, and
eight minutes.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import encryption, jobs, ledger, privacy, training
from benchmarks.measure import Figures

BENCHES: dict[str, Callable[[], Figures]] = {
    "encryption": encryption.run,
    "jobs": jobs.run,
    "ledger": ledger.run,
    "privacy": privacy.run,
    "training": training.run,
}
REACH = encryption.REACH | jobs.REACH | ledger.REACH | privacy.REACH | training.REACH
HOLDS: dict[str, Callable[[float, float], bool]] = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


def main() -> None:
    """Run what is asked for, print a table, merge the figures into build/bench.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHES))
    only = parser.parse_args().only
    figures: Figures = {}
    for name in [only] if only else sorted(BENCHES):
        figures |= BENCHES[name]()
    for name, value in figures.items():
        asked = REACH.get(name)
        missed = asked is not None and not HOLDS[asked[0]](value, asked[1])
        print(f"{name:<36} {value:>14,.3f}", *([f"  {asked[0]} {asked[1]:,}", "MISSED" * missed] if asked else []))
    path = ROOT / "build" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | figures, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
