"""Sotto: federated learning under lock and key.

The package is installed as ``sotto`` and is importable from a checkout as ``src``. Under both names at once there would
be two of every class and two registries, so the second import is refused.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

_other = sys.modules.get("src" if __name__ == "sotto" else "sotto")
if _other is not None and Path(str(_other.__file__)).resolve() == Path(__file__).resolve():
    raise ImportError(f"Sotto is already loaded as {_other.__name__!r}: import it under one name in a process")
