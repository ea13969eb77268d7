"""Text that somebody else may have written, made fit for a log, an error or a terminal.

Whoever sends a name, a reason or a version chooses its length and its characters: line breaks that begin a line of
their own, control sequences that a terminal obeys, marks that turn the reading direction. What is shown of it is cut
first and escaped then, so that a huge value costs no more than what is left of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from typing import Final

CUT: Final = "…"
"""Stands for what was cut off."""

SHOWN_CHARACTERS: Final = 200
"""Of a value in a message, unless more is asked for: enough to recognise it."""

_MAX_ITEMS: Final = 20
_MAX_DEPTH: Final = 3
_MAX_INTEGER_BITS: Final = 1024
"""Beyond, an integer is described: its digits take time that grows with the square of their number."""

_PLAIN_TEXTS: Final = (BaseException.__str__, KeyError.__str__)
"""Of exceptions that show their arguments and nothing else."""


def printable(text: str, most: int | None = None) -> str:
    """`text` in one line: characters that no line can show are escaped as in a Python literal.

    Escaped are control characters (C0, DEL, C1), line and paragraph separators, marks of reading direction and other
    invisible ones, unpaired surrogates, and what Unicode does not assign: whatever `str.isprintable` says no to.

    Args:
        most: as many characters are left, `CUT` the last of them where some were cut; None: all.
    """
    cut = most is not None and len(text) > most
    text = text[:most]
    if not text.isprintable():
        text = _with_escapes(text)
        cut = cut or (most is not None and len(text) > most)
    return f"{text[: (most or 1) - 1]}{CUT}" if cut else text


def _with_escapes(text: str) -> str:
    """With escapes; takes a microsecond for each ten characters, so that what is long is cut before."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def shown(value: object, most: int = SHOWN_CHARACTERS) -> str:
    """`repr(value)` in one printable line of at most `most` characters, rendered no further than that."""
    return printable(repr(value[: most + 1]) if isinstance(value, str) else _rendered(value, most, 0), most)


def brief(value: object, most: int = SHOWN_CHARACTERS) -> str:
    """`str(value)` in one printable line of at most `most` characters.

    Of texts, bytes, numbers, exceptions, dataclasses and containers of these no more is rendered than that; an object
    that cannot be rendered is named by its type.
    """
    return printable(value if isinstance(value, str) else _rendered(value, most, 0), most)


def _rendered(value: object, most: int, depth: int) -> str:
    """Roughly `most` characters of it at most; not yet printable."""
    found: str | None = None
    if isinstance(value, str):
        found = repr(value[: most + 1])
    elif isinstance(value, bytes | bytearray | memoryview):
        found = repr(bytes(value[: most + 1]))
    elif isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        found = f"<an integer of {value.bit_length()} bits>"
    elif isinstance(value, BaseException):
        found = _said(value, most)
    elif isinstance(value, Mapping):
        found = f"{{{_listed(value.items(), most, depth, pair=': ')}}}"
    elif isinstance(value, list | tuple | Set):
        found = f"[{_listed(value, most, depth)}]"
    elif type(value).__str__ is object.__str__ and dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value) if each.repr)
        found = f"{type(value).__name__}({_listed(fields, most, depth, pair='=')})"
    elif callable(getattr(value, "ByteSize", None)):  # a message of the wire, whose text is many times its size
        found = f"<{type(value).__name__}>"
    return _text_of(value) if found is None else found


def _listed(items: Iterable[object], most: int, depth: int, *, pair: str = "") -> str:
    if depth >= _MAX_DEPTH:
        return CUT
    parts: list[str] = []
    room = most
    for item in islice(items, _MAX_ITEMS + 1):
        if room < 0 or len(parts) == _MAX_ITEMS:
            parts.append(CUT)
            break
        each = item if pair and isinstance(item, tuple) else (item,)
        keys = [part if pair == "=" else _rendered(part, room, depth + 1) for part in each[:-1]]
        parts.append(pair.join([*map(str, keys), _rendered(each[-1], room, depth + 1)]))
        room -= len(parts[-1])
    return ", ".join(parts)


def _said(error: BaseException, most: int) -> str:
    """What an exception says: of those that show their arguments no more than is asked for."""
    if type(error).__str__ not in _PLAIN_TEXTS:
        return _text_of(error)
    if len(error.args) != 1:
        return _rendered(error.args, most, 0) if error.args else ""
    only = error.args[0]
    quoted = isinstance(error, KeyError) or not isinstance(only, str)
    return _rendered(only, most, 0) if quoted else only[: most + 1]


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # whatever it is, it is not what keeps a line from being written
        return f"<{type(value).__name__}>"
