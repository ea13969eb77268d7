"""Arguments without pydantic.

typer 0.29 converts every argument by a pydantic model of its own: importing pydantic takes a fifth of a second, more
than all the rest of a short command. What is plainly right is converted here; everything else, and whatever is wrong,
goes to typer, which says what is broken. Another typer, which has no such conversion, is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MISSED = object()
"""Not plainly right."""


def quicken(command: Any) -> Any:
    """The same command (of typer), its parameters and those of its sub-commands converted quickly where they can be."""
    for parameter in command.params:
        _quicken_parameter(parameter)
    find_help = command.get_help_option  # made anew by typer when the command is parsed, and converted as well
    command.get_help_option = lambda ctx: _quicken_parameter(find_help(ctx))
    for inner in getattr(command, "commands", {}).values():
        quicken(inner)
    return command


def _quicken_parameter(parameter: Any) -> Any:
    known = hasattr(parameter, "get_runtime_param") and hasattr(parameter, "type_descriptor")
    if known and not isinstance(parameter.get_runtime_param, _Conversion):
        parameter.get_runtime_param = _Conversion(parameter, parameter.get_runtime_param)
    return parameter


class _Conversion:
    """Stands where typer asks a parameter for its conversion, and is the conversion that it gets."""

    def __init__(self, parameter: Any, original: Any) -> None:
        self._original = original
        self._annotation = parameter.type_descriptor.annotation
        self._info = parameter.type_descriptor.parameter_info

    def __call__(self) -> _Conversion:
        return self

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value as the command's function takes it; raises typer's own errors."""
        quick = MISSED if param.multiple or param.nargs != 1 else convert(value, self._annotation, info=self._info)
        return self._original().coerce(value, param=param, ctx=ctx) if quick is MISSED else quick


def convert(value: Any, annotation: Any, *, info: Any) -> Any:
    """A value from the command line or of a default, converted; `MISSED` when that is not plainly possible.

    Args:
        annotation: what it is to be: text, number, flag or path.
        info: the bounds of the parameter, as typer has them.
    """
    if value is None:
        return None
    if info.parser is not None or annotation not in (str, bool, int, float, Path):
        return MISSED
    if annotation is Path:
        unusual = info.exists or info.resolve_path or info.allow_dash or info.path_type is not None
        plain = not unusual and info.file_okay and info.dir_okay and isinstance(value, str | Path)
        return Path(value) if plain else MISSED
    if annotation is int and isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    within = type(value) is annotation
    within = within and (info.min is None or value >= info.min)
    within = within and (info.max is None or value <= info.max)
    return value if within else MISSED
