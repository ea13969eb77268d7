"""`sotto aggregator` and `sotto party`: start a role and stay until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import echo

aggregator_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
party_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Option("--config", "-c", help="The YAML file that says everything else.")]


@aggregator_app.command()
def aggregator(config: Config) -> None:
    """Run the aggregator of a federation, until SIGTERM or Ctrl-C."""
    from ..aggregator.main import run

    run(config)


@party_app.command()
def party(
    config: Config,
    name: Annotated[str | None, typer.Option("--name", help="Be this party instead of the one in the file.")] = None,
    check_data: Annotated[
        bool, typer.Option("--check-data", help="Load the data, try the model on it, say here what is wrong, and end.")
    ] = False,
) -> None:
    """Run a party: a data owner's node, until SIGTERM or Ctrl-C. It makes outbound connections only."""
    if check_data:
        _check_data(config, name)
        return
    from ..party.main import run

    run(config, name=name)


def _check_data(config: Path, name: str | None) -> None:
    """For the owner alone: nothing is sent or logged.

    Raises:
        InvalidInput: not every row can be trained on.
    """
    from ..config import load_party_config
    from ..errors import InvalidInput
    from ..party.check import check_data

    loaded = load_party_config(config, name=name)
    if not loaded.datasets:
        echo(f"{config} lists no datasets: this party trains nothing")
    found = []
    for line, fine in check_data(loaded):
        echo(line)
        found.append(fine)
    if not all(found):
        raise InvalidInput("not every row can be trained on")
