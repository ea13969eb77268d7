"""What every command that talks to an aggregator shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from ..client import SottoClient

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="SOTTO_CLIENT_CONFIG", help="client.yaml: where the aggregator is.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: one object, or one a line for events.")]
JobId = Annotated[str, typer.Argument(help="The job's id.", show_default=False)]
DEFAULT_CONFIG: Final = Path("client.yaml")
IMPATIENT_S: Final = 2.0
"""How long somebody at a terminal is kept before hearing that the aggregator cannot be reached."""


@contextmanager
def connected(config: Path, *, patient: bool = False) -> Iterator[SottoClient]:
    """A connection; a patient one outlives a restart of the aggregator, the others soon say that it is not there."""
    from ..client import RETRY_FOR_S, SottoClient
    from ..logs import tidy_last_resort

    tidy_last_resort()
    with SottoClient.from_config(config, retry_for_s=RETRY_FOR_S if patient else IMPATIENT_S) as client:
        yield client
