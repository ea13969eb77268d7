"""Start a party: `sotto party`, `sotto-party`, `python -m src.party.main`."""

from __future__ import annotations

import sys
from pathlib import Path


def run(config_path: Path, *, name: str | None = None) -> None:
    """Work until SIGTERM or SIGINT.

    Args:
        config_path: the party's YAML file.
        name: replaces `name` of the file, where one file serves several parties.

    Raises:
        ConfigError: with every problem of the configuration; what the workers would import is not installed.
    """
    import asyncio

    from ..config import load_party_config
    from ..descriptors import raise_descriptor_limit
    from ..extras import require
    from ..hardening import forbid_core_dumps, keep_files_private
    from ..logs import configure

    forbid_core_dumps()
    keep_files_private()
    from .app import work

    config = load_party_config(config_path, name=name)
    require("party", "a party")
    raise_descriptor_limit()
    configure(level=config.logging.level, format=config.logging.format)
    asyncio.run(work(config))


def main() -> None:
    """The console script `sotto-party`: the same as `sotto party`."""
    from ..cli import main as cli

    cli(["party", *sys.argv[1:]])


if __name__ == "__main__":
    main()
