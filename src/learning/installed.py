"""A task's code as it is installed: which files, their digest, and where in them something was raised.

Nothing of it is imported: its files are found, and read as text. So what a role says of its tasks does not wait for
them, and a package that cannot be imported has a digest too.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Final

ENTRY_POINT_GROUP: Final = "sotto.tasks"
BUILT_IN: Final[Mapping[str, tuple[str, str]]] = {"randhie": (".tasks.randhie", "RandHieTask")}
"""Short name → (module relative to this package, class): found without an installed distribution too."""

MAX_FILES: Final = 2000
MAX_BYTES: Final = 32 << 20
"""Of a package's source; of a larger one the task's own module counts alone."""


def known_tasks() -> tuple[str, ...]:
    """Every registered short name, sorted."""
    return tuple(sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def entry_of(name: str) -> EntryPoint | None:
    """Of a task that is not built in: its entry point; None where none has this name."""
    return next((point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)


def packages_of(name: str) -> tuple[str, ...]:
    """The distributions that register a task under this name, as "distribution (module:class)", sorted. The same one
    that is found twice, installed and in a checkout, counts once."""
    points = entry_points(group=ENTRY_POINT_GROUP)
    found = {f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points if point.name == name}
    return tuple(sorted(found))


def code_digest(name: str) -> str:
    """SHA-256 (64 hex digits) of the source text of a task's top-level package and its distribution's name and version;
    empty where it is not installed or no source of it is found.

    The same on every machine, system and version of Python that has the same package: of each file counts its place in
    the package and its text with line ends as LF, and neither bytecode nor where it was installed.
    """
    files = source_files(name)
    if not files:
        return ""
    point = entry_of(name) if name not in BUILT_IN else None
    about = point.dist if point is not None else None
    try:
        texts = {where: hashlib.sha256(_text(file)).hexdigest() for where, file in files.items()}
    except OSError:
        return ""
    found = {"name": "" if about is None else about.name, "version": "" if about is None else about.version}
    statement = json.dumps({**found, "files": texts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(statement.encode()).hexdigest()


def place_in(name: str, error: BaseException) -> str:
    """ "file.py:line" of the innermost line of a task's own code from which `error` came; empty where there is none."""
    files = {file.resolve(): file.name for file in source_files(name).values()}
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    for file, line in reversed(frames):
        known = files.get(Path(file).resolve())
        if known is not None and line:
            return f"{known}:{line}"
    return ""


def is_place_of(name: str, place: str) -> bool:
    """Whether a "file.py:line" can be one of a task's own code: a file of its package has this name."""
    return place.rpartition(":")[0] in {file.name for file in source_files(name).values()}


def source_files(name: str) -> dict[str, Path]:
    """The source of a task by its place in the package, as "package/module.py"; empty where none is found."""
    if name in BUILT_IN:
        module = BUILT_IN[name][0].rpartition(".")[2]
        return {f"{module}.py": Path(__file__).parent / "tasks" / f"{module}.py"}
    point = entry_of(name)
    if point is None or not point.pattern.match(point.value):
        return {}
    parts = point.module.split(".")
    try:
        spec = find_spec(parts[0])  # of a top-level name: nothing is run
    except (ImportError, ValueError, AttributeError):
        return {}
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {f"{parts[0]}.py": Path(spec.origin)} if spec.origin and spec.origin.endswith(".py") else {}
    try:
        return _below(parts, [Path(each) for each in spec.submodule_search_locations])
    except OSError:  # it is being installed just now, or not this user's to read
        return {}


def _below(parts: list[str], places: list[Path]) -> dict[str, Path]:
    """The files of the outermost package with an `__init__.py`; of a namespace the part that the task is in."""
    for depth in range(1, len(parts) + 1):
        package = next((place for place in places if (place / "__init__.py").is_file()), None)
        if package is not None:
            return _all_of(package, "/".join(parts[:depth])) or _module_of(parts, places, depth=depth)
        if depth == len(parts):
            break
        module = next((place / f"{parts[depth]}.py" for place in places), None)
        if module is not None and module.is_file():
            return {f"{'/'.join(parts[: depth + 1])}.py": module}
        places = [place / parts[depth] for place in places if (place / parts[depth]).is_dir()]
    return {}


def _all_of(package: Path, prefix: str) -> dict[str, Path]:
    """Every module below a package; empty for one that is too large to be read."""
    found: dict[str, Path] = {}
    size = 0
    for file in _modules(package):
        found[f"{prefix}/{file.relative_to(package).as_posix()}"] = file
        size += file.stat().st_size
        if len(found) > MAX_FILES or size > MAX_BYTES:
            return {}
    return found


def _modules(package: Path) -> Iterator[Path]:
    pending = [package]
    while pending:
        for each in sorted(pending.pop().iterdir()):
            if each.is_dir() and not each.is_symlink() and not each.name.startswith((".", "__pycache__")):
                pending.append(each)
            elif each.suffix == ".py" and each.is_file():
                yield each


def _module_of(parts: list[str], places: Iterable[Path], *, depth: int) -> dict[str, Path]:
    for place in places:
        path = place.joinpath(*parts[depth:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return {"/".join([*parts[:-1], file.name]): file}
    return {}


def _text(file: Path) -> bytes:
    return file.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
