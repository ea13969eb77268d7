"""Where `sotto` writes to: every line that a command prints goes through here, on stdout and on stderr.

Much of it was said by somebody else: an aggregator's names and reasons, another scientist's labels, a ledger's entries.
None of it begins a line of its own, and none of it steers a terminal. Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Final

import typer

from ..terminals import shows_everything
from ..text import printable

_STYLE: Final = re.compile("(\x1b\\[[0-9;]{1,8}m)")
"""What `typer.style` puts around a word, and no more: it colours."""


def echo(lines: str | Iterable[str], *, err: bool = False, styled: bool = False) -> None:
    """Print lines, each as one: what is not printable in it, line breaks too, is escaped.

    Args:
        lines: one text is one line.
        err: on stderr.
        styled: colours that `typer.style` gave stay, on a terminal.
    """
    for line in (lines,) if isinstance(lines, str) else lines:
        typer.echo(_with_its_style(line) if styled else printable(line), err=err)


def echo_json(value: object, *, err: bool = False) -> None:
    """Print one line of JSON; where a terminal would not show all of it as it is, it is escaped as JSON has it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    as_it_is = text.isprintable() and shows_everything(sys.stderr if err else sys.stdout)
    typer.echo(text if as_it_is else json.dumps(value, allow_nan=False), err=err)


def _with_its_style(line: str) -> str:
    return "".join(part if _STYLE.fullmatch(part) else printable(part) for part in _STYLE.split(line))
