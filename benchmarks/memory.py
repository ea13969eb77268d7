"""What one operation takes in memory, measured in a process of its own: `memory.py encrypt|fold …` prints megabytes."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import peak_mb
from src.encryption import parallel
from src.encryption.keys import PublicKey
from src.encryption.registry import scheme_for
from src.encryption.scheme import Layout, SystemEntropy


def encrypt(public: PublicKey, layout: Layout, body: Path) -> float:
    """Protect random values on two cores, tables and all; the batch goes to the file `body`."""
    scheme = scheme_for("paillier", public, processes=2)
    values = np.random.default_rng(0).integers(-layout.offset, layout.offset + 1, layout.parameter_count)
    with body.open("wb") as file:
        return peak_mb(scheme.protect(layout, [values], entropy=SystemEntropy()), take=file.write)


def fold(public: PublicKey, layout: Layout, body: Path, count: int) -> float:
    """Multiply `count` uploads (the file `body` every time) on two cores; the product is dropped."""
    # Two uploads would be multiplied by one process, and could not be compared.
    parallel.SMALLEST_PART_PRODUCTS = 1  # type: ignore[misc]
    scheme = scheme_for("paillier", public, processes=2)
    with ExitStack() as stack:
        bodies = [stack.enter_context(body.open("rb")) for _ in range(count)]
        return peak_mb(scheme.fold(layout, bodies), take=len)


def main() -> None:
    """Arguments: the operation, a JSON file with public key and layout, the body, and for `fold` a count."""
    operation, settings, body, *count = sys.argv[1:]
    given = json.loads(Path(settings).read_text())
    public, layout = PublicKey.from_json(given["public"]), Layout.from_json(given["layout"])
    print(
        encrypt(public, layout, Path(body))
        if operation == "encrypt"
        else fold(public, layout, Path(body), *map(int, count))
    )


if __name__ == "__main__":
    main()
