"""`sotto demo`: a whole federation on this machine, on real data, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import echo_json

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def demo(
    parties: Annotated[int, typer.Option(help="Data owners, 2 to 20.")] = 3,
    rounds: Annotated[int | None, typer.Option(help="Rounds that release a model (default 15).")] = None,
    threshold: Annotated[
        int | None, typer.Option(help="Key shares that open a sum (default: the least that is safe).")
    ] = None,
    modulus_bits: Annotated[int, typer.Option(help="Of the Paillier key: 3072, or 2048 for 112-bit security.")] = 3072,
    insecure_small_modulus: Annotated[
        bool, typer.Option("--insecure-small-modulus", help="Allow fewer than 2048 bits: breakable, for tests.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of split and initialisation; never of noise or keys.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the result goes, in a directory of its own.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; everything else to stderr.")] = False,
) -> None:
    """Train an encrypted, differentially private federation on real health data, on this machine.

    An aggregator and the parties run as processes of their own and talk gRPC over loopback with mutual TLS.
    """
    from ..demo.view import View
    from ..extras import require

    require("demo", "the demo")
    view = View(to_stderr=as_json)
    view.headline("Sotto: federated learning under lock and key")
    import asyncio

    from ..demo.run import Demo, Options

    given = {} if rounds is None else {"rounds": rounds}
    options = Options(
        parties=parties,
        threshold=threshold,
        modulus_bits=modulus_bits,
        insecure_small_modulus=insecure_small_modulus,
        seed=seed,
        out=out,
        **given,
    )
    result = asyncio.run(Demo(options, view).run())
    if as_json:
        echo_json(result)
