"""`sotto provision`: the kits of a federation, made once by its operator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .prose import prose
from .screen import echo, echo_json

if TYPE_CHECKING:
    from ..provisioning import Summary

_HANG = " " * 16

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def provision(
    out: Annotated[Path, typer.Option(help="A directory that does not exist yet, or is empty.")],
    party: Annotated[list[str], typer.Option(help="A party's name; once for each.")],
    federation: Annotated[str, typer.Option(help="The federation's name.")] = "demo",
    threshold: Annotated[
        int | None, typer.Option(help="Key shares that open a sum; by default just over half of them.")
    ] = None,
    colluders: Annotated[int, typer.Option(help="Corrupt parties to stand, besides the aggregator.")] = 0,
    custody: Annotated[str, typer.Option(help="threshold, or aggregator: it then holds the whole key.")] = "threshold",
    modulus_bits: Annotated[
        int, typer.Option(help="Of the Paillier key: 3072 (128-bit security) or 2048 (112-bit).")
    ] = 3072,
    insecure_small_modulus: Annotated[
        bool, typer.Option("--insecure-small-modulus", help="Allow less than 2048 bits: tests only, breakable.")
    ] = False,
    address: Annotated[
        str, typer.Option(help="host:port under which everybody dials the aggregator.")
    ] = "127.0.0.1:50051",
    scientist: Annotated[list[str] | None, typer.Option(help="A scientist's name; once for each.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the kits of a federation: certificates, keys, shares, settings.

    Run it anywhere but on the aggregator's machine: nobody holds the whole private key afterwards. Example:

    sotto provision --out kits --party a --party b --party c --threshold 2
    """
    from .. import provisioning

    summary = provisioning.provision(
        out,
        federation=federation,
        parties=party,
        threshold=threshold,
        colluders=colluders,
        custody=custody,
        modulus_bits=modulus_bits,
        insecure_small=insecure_small_modulus,
        address=address,
        scientists=scientist or ["scientist"],
        progress=None if as_json else lambda line: echo(f"sotto: {line}", err=True),
    )
    if as_json:
        echo_json(summary.to_json())
    else:
        echo(describe(summary).split("\n"))


def describe(summary: Summary) -> str:
    """What was made, what it stands, and what goes to whom, for people."""
    lines = [
        f"Federation {summary.federation}: {len(summary.parties)} parties, {summary.modulus_bits}-bit Paillier key"
    ]
    if summary.custody == "threshold":
        lines += [
            f"  key id        {summary.key_id}",
            f"  opening       {summary.threshold} of {len(summary.parties)} key shares open a sum",
            *prose(f"  collusion     {_collusion(summary)}", hang=_HANG),
        ]
    else:
        said = "the aggregator makes and holds the key: updates are protected, but not from it"
        lines += prose(f"  custody       {said}", hang=_HANG)
    lines += [f"  certificates  valid for {summary.valid_days} days", "", "What goes to whom, by a channel you trust:"]
    width = max(len(str(kit.path)) for kit in summary.kits)
    lines += [f"  {kit.path!s:<{width}}  to {kit.recipient}" for kit in summary.kits]
    uses = dict.fromkeys(kit.use for kit in summary.kits if kit.use.startswith("sotto "))
    lines += ["", "There, in the kit's directory:", *(f"  {use}" for use in uses)]
    return "\n".join(lines)


def _collusion(summary: Summary) -> str:
    tolerated = summary.tolerated_colluders
    if not tolerated:
        return "stands a malicious aggregator alone; with a colluding party, ask jobs for quorum = all parties"
    return f"stands a malicious aggregator with up to {tolerated} colluding part{'y' if tolerated == 1 else 'ies'}"
