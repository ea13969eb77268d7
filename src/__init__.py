"""Sotto: federated learning under lock and key.

The package is installed as ``sotto`` and is importable from a checkout as ``src``. Under both names at once there would
be two of every class and two registries, so the second import is refused.
"""

import os
import sys
from pathlib import Path

__version__ = "0.1.0"

# Before gRPC is imported, by whichever module: its core writes lines of its own to stderr, past the log, one for each
# handshake that fails, and anybody who reaches a port can have as many of these as they like. What matters of it is in
# the error of a call. Whoever sets GRPC_VERBOSITY gets what it says.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_other = sys.modules.get("src" if __name__ == "sotto" else "sotto")
if _other is not None and Path(str(_other.__file__)).resolve() == Path(__file__).resolve():
    raise ImportError(f"Sotto is already loaded as {_other.__name__!r}: import it under one name in a process")
