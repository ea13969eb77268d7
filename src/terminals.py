"""Streams that cannot show every character: a terminal that is not UTF-8, a pipe in a C locale.

What such a stream cannot show is written in ASCII that says the same, or escaped: an ε or a ✓ ends no command. This is
done to the stream, once, so that whatever writes to it is covered: commands, their help, tables of rich's, the log.
"""

from __future__ import annotations

import codecs
import unicodedata
from typing import Final, TextIO

ERRORS: Final = "sotto_legible"
"""The name of the error handler, for `open` and `encode`."""
_PLAIN_ASCII: Final = "sotto_ascii"
"""ASCII by another name. Under its own, typer takes a stream for misconfigured, and writes UTF-8 to it all the same."""

_INSTEAD: Final = {
    **{"ε": "eps", "δ": "delta", "σ": "sigma", "∞": "inf", "√": "sqrt", "Δ": "Delta", "τ": "tau", "α": "alpha"},
    **{"…": "...", "·": ".", "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "≤": "<=", "≥": ">=", "≠": "!="},
    **{"→": "->", "↔": "<->", "✓": "ok", "✗": "x", "²": "^2", "³": "^3", "½": "1/2", "•": "*"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "\N{NO-BREAK SPACE}": " ", "\N{REPLACEMENT CHARACTER}": "?"},
}


def make_legible(stream: TextIO | None) -> None:
    """Let a stream write what its encoding does not have in other characters, instead of raising an error."""
    reconfigure = getattr(stream, "reconfigure", None)
    if stream is None or reconfigure is None:  # a file of a test's, no terminal
        return
    of_ascii = _name_of(stream) == "ascii"
    reconfigure(encoding=_PLAIN_ASCII if of_ascii else stream.encoding, errors=ERRORS)


def shows_everything(stream: TextIO | None) -> bool:
    """Whether every character can be written to it as it is."""
    return _name_of(stream).startswith("utf")


def as_shown(text: str, stream: TextIO | None) -> str:
    """`text` as this stream shows it: what is to stand in columns has the width of that."""
    if shows_everything(stream):
        return text
    name = _name_of(stream)
    return text.encode(name, ERRORS).decode(name)


def _name_of(stream: TextIO | None) -> str:
    """Of its encoding; that of a stream which has none, as a text in memory, is UTF-8's."""
    try:
        return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name
    except LookupError:
        return "ascii"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_instead, error.object[error.start : error.end])), error.end


def _instead(character: str) -> str:
    """In ASCII."""
    if character in _INSTEAD:
        return _INSTEAD[character]
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        words = name.removeprefix("BOX DRAWINGS ").split()
        return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(words[-1], "+") if "AND" not in words else "+"
    if name.startswith(("BRAILLE PATTERN", "BLOCK", "FULL BLOCK")):  # what a bar and a wheel are drawn with
        return "#"
    letter = unicodedata.normalize("NFKD", character)[0]
    return letter if letter.isascii() else character.encode("unicode_escape").decode("ascii")


def _find(name: str) -> codecs.CodecInfo | None:
    if name != _PLAIN_ASCII:
        return None
    found = codecs.lookup("ascii")
    return codecs.CodecInfo(
        found.encode,
        found.decode,
        streamreader=found.streamreader,
        streamwriter=found.streamwriter,
        incrementalencoder=found.incrementalencoder,
        incrementaldecoder=found.incrementaldecoder,
        name=_PLAIN_ASCII,
    )


codecs.register(_find)
codecs.register_error(ERRORS, _replace)
