"""One unit of work in a process without a past: `jobs_cold.py HANDLERS BLOBS < FRAME` prints the reply's frame."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.jobs.executors.units import WorkContext, execute, load_handlers
from src.storage.blobs import Blobs


def main() -> None:
    """Imports what the unit needs and nothing else, as a worker would that nobody kept warm."""
    handlers, blobs = sys.argv[1:]
    frame = sys.stdin.buffer.read()
    with tempfile.TemporaryDirectory() as workspace:
        reply = execute(frame, load_handlers(handlers), WorkContext(Blobs(Path(blobs)), Path(workspace)))
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
