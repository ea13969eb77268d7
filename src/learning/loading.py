"""Loading a party's rows: where relative paths start, and what its owner's log may say of rows that cannot be loaded.

What a task or a library raises while it reads rows may quote one, a file that a row names for example. So a log holds
what follows from the configuration and the task's code alone: an option's file that is not there, a module that is not
installed, an option that is not set. Of all else it holds type and place, and how the owner gets to see the rest.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from glob import has_magic
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from ..extras import extra_of
from ..logs import type_and_place
from .task import Options

CHECK_DATA: Final = "`sotto party --check-data` shows what it says"
_PACKAGE: Final = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def starting_from(directory: str | Path) -> Iterator[None]:
    """Relative paths start from this directory inside: that of the configuration, whose options they are. For a
    process, or a part of its life, in which nothing else goes by the working directory."""
    with contextlib.chdir(directory):
        yield


def why_not_loaded(error: BaseException, *, task: str, options: Options, directory: str | Path) -> str:
    """What may be logged of an error that `load_data` raised; nothing in it was computed from a row."""
    if isinstance(error, OSError) and error.errno:
        found = _of_a_file(error, task, options, Path(directory))
        if found:
            return found
    if isinstance(error, ModuleNotFoundError) and error.name and _is_in_code(error.name.partition(".")[0], error):
        return needs(task, error.name)
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        key = error.args[0]
        if key not in options and _line(_frames(error)[-1:], rf"""["']{re.escape(key)}["']"""):
            return f"datasets.{task}.options.{_short(key)} is not set, and the task asks for it"
    if isinstance(error, ConfigError) and _PACKAGE in Path(_frames(error)[-1].filename).resolve().parents:
        return "; ".join([error.message, *error.problems])
    missing = not_there(task, options, Path(directory))
    return "; ".join([*missing, type_and_place(error), CHECK_DATA])


def needs(task: str, module: str) -> str:
    """What to install where a task asks for a module that is not there."""
    package = module.partition(".")[0]
    extra = extra_of(package)
    if extra is not None:
        return f"{task} needs {package}: pip install 'sotto-fl[{extra}]'"
    return f"{task} needs the module {_short(package)}, which is not installed here"


def texts_of(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """What in options may name a file: texts at any depth, with where they stand, as "sites.north" or "files[2]"."""
    if isinstance(value, str) and value:
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from texts_of(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from texts_of(each, f"{name}[{number}]")


def _of_a_file(error: OSError, task: str, options: Options, directory: Path) -> str:
    """Where the file is one that an option names: which, and what is wrong with it."""
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    for name, value in texts_of(options):
        if _absolute(directory, value) == _absolute(directory, error.filename):
            what = os.strerror(error.errno or 0)
            return f"datasets.{task}.options.{name}: {_absolute(directory, value)}: {what}"
    return ""


def not_there(task: str, options: Options, directory: Path) -> list[str]:
    """Options that look like files, and name none: not every library says which it looked for."""
    paths = {name: value for name, value in texts_of(options) if "/" in value or Path(value).suffix}
    plain = {name: value for name, value in paths.items() if "://" not in value and not has_magic(value)}
    named = {name: _absolute(directory, value) for name, value in plain.items()}
    return [f"datasets.{task}.options.{name}: {path} is not there" for name, path in named.items() if _missing(path)]


def _missing(path: str) -> bool:
    try:
        return not Path(path).exists()
    except (OSError, ValueError):  # a text that is no path
        return False


def _absolute(directory: Path, path: str | os.PathLike[str]) -> str:
    return os.path.normpath(directory / os.path.expanduser(path))  # noqa: PTH111  which raises for no user


def _is_in_code(word: str, error: BaseException) -> bool:
    """Whether a word is in a line of the code that led to the error: then it comes from there, and from no row."""
    return _line(_frames(error), rf"(?<!\w){re.escape(word)}(?!\w)")


def _line(frames: list[traceback.FrameSummary], pattern: str) -> bool:
    return any(re.search(pattern, linecache.getline(each.filename, each.lineno or 0)) for each in frames)


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _short(text: str) -> str:
    return text[:100]
