"""Sentences for people, in lines that can be read. Imports nothing heavy."""

from __future__ import annotations

import shutil
import sys
import textwrap

from .screen import echo

WIDTH = 100
"""Columns of a line, where no terminal is narrower."""

_NARROWEST = 20
"""Columns that are left to a text beside its indent, however narrow the terminal."""


def prose(text: str, *, indent: str = "", hang: str = "  ") -> list[str]:
    """A text in lines of at most `WIDTH` columns; a word that is longer (a digest, a path) stays whole.

    Args:
        text: one paragraph.
        indent: before the first line.
        hang: before all others.
    """
    room = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    return textwrap.wrap(
        text,
        width=max(min(WIDTH, room), max(len(indent), len(hang)) + _NARROWEST),
        initial_indent=indent,
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def assuming(word: str, text: str, *, indent: str = "  ") -> list[str]:
    """What a figure assumes, as `privacy.figures` says it: one sentence, or a bullet for each kind of events.

    Args:
        word: before it: "assumes".
        text: "" for nothing to say.
    """
    from ..privacy.figures import JOINT

    each = [part for part in text.split(JOINT) if part]
    if len(each) < 2:
        return prose(f"{word} {text}", indent=indent, hang=f"{indent}  ") if each else []
    lines = prose(f"{word}, by kind of events:", indent=indent, hang=f"{indent}  ")
    return [*lines, *(line for part in each for line in prose(part, indent=f"{indent}- ", hang=f"{indent}  "))]


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 round", "2 rounds", "2 entries"."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def say(text: str, *, indent: str = "", hang: str = "  ", err: bool = False) -> None:
    """Print it, on stderr if asked to."""
    echo(prose(text, indent=indent, hang=hang), err=err)


def warn(text: str) -> None:
    """Print a warning on stderr; a command that it ends with has a line of its own, so that it can be copied."""
    words, run, command = text.partition(" run: ")
    lines = prose(f"sotto: warning: {words}{run}".rstrip())
    echo([*lines, *([f"  {command}"] if command else [])], err=True)
