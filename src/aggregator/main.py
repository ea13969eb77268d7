"""Start an aggregator: `sotto aggregator`, `sotto-aggregator`, `python -m src.aggregator.main`."""

from __future__ import annotations

import sys
from pathlib import Path


def run(config_path: Path) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: with every problem of the configuration.
    """
    import asyncio

    from ..config import load_aggregator_config
    from ..descriptors import raise_descriptor_limit
    from ..hardening import forbid_core_dumps, keep_files_private
    from ..logs import configure

    forbid_core_dumps()
    keep_files_private()
    from .app import serve

    config = load_aggregator_config(config_path)
    raise_descriptor_limit()
    configure(level=config.logging.level, format=config.logging.format)
    asyncio.run(serve(config))


def main() -> None:
    """The console script `sotto-aggregator`: the same as `sotto aggregator`."""
    from ..cli import main as cli

    cli(["aggregator", *sys.argv[1:]])


if __name__ == "__main__":
    main()
