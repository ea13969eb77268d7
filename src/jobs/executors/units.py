"""A unit of CPU work is data: a short name, a version, JSON parameters, blobs by digest; its result likewise.

Nothing is pickled, and what is sent names no module: a worker looks the short name up in its own table. JSON here is
Python's dialect, in which a float may be NaN or infinite (an ε can be).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias, TypeVar

from ...errors import (
    BY_REASON,
    ConfigError,
    InvalidInput,
    LimitError,
    NotFoundError,
    SottoError,
    VersionError,
    WorkerError,
    meaning,
)
from ...logs import type_and_place
from ...storage.blobs import Blobs

ROOT: Final = __name__.removesuffix(".jobs.executors.units")
"""The name this package goes by: "sotto" where it is installed, "src" in a checkout."""

MAX_FRAME_BYTES: Final = 16 << 20
"""Of a unit or its result as JSON: ten times the largest plan; whatever is larger belongs into a blob."""

_TORCH_NO_MEMORY: Final = "can't allocate memory"
"""How torch says it, in a RuntimeError (c10/core/impl/alloc_cpu.cpp)."""


@dataclass(frozen=True, slots=True)
class WorkContext:
    """What a handler may use besides its parameters.

    Attributes:
        blobs: the role's blob store.
        workspace: a directory of this unit's own, empty at its start, removed at its end.
        memory_limit_mb: private memory that the worker may have, in MiB; None: as much as there is.
        untouched: whether the worker has computed nothing before, as those of `WorkerPool.run(…, alone=True)`.
        kept: what units leave here for later ones of the same worker; gone with it.
    """

    blobs: Blobs
    workspace: Path
    memory_limit_mb: int | None = None
    untouched: bool = False
    kept: dict[str, Any] = field(default_factory=dict)


Handler: TypeAlias = Callable[[Mapping[str, Any], WorkContext], dict[str, Any]]

_H = TypeVar("_H", bound=Callable[..., Any])


def unit_version(version: int) -> Callable[[_H], _H]:
    """Marks a handler as answering units of this version; without the mark it is 1."""

    def mark(handler: _H) -> _H:
        handler.unit_version = version  # type: ignore[attr-defined]
        return handler

    return mark


def import_short(name: str) -> ModuleType:
    """The module that is called `name` inside this package, or else outside it ("party.work", "numpy")."""
    try:
        return importlib.import_module(f"{ROOT}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{ROOT}.{name}".startswith(error.name):
            raise  # it exists, and misses something itself
        return importlib.import_module(name)


def load_handlers(name: str) -> dict[str, Handler]:
    """`HANDLERS` of the module with this short name.

    Raises:
        ConfigError: the module has no such table.
    """
    table = getattr(import_short(name), "HANDLERS", None)
    if not isinstance(table, dict):
        raise ConfigError(f"{name} has no table HANDLERS of units of work")
    return table


def encode_unit(name: str, params: Mapping[str, Any], *, version: int) -> bytes:
    """One unit as a frame.

    Raises:
        InvalidInput: the parameters are not JSON.
        LimitError: they are larger than `MAX_FRAME_BYTES`.
    """
    try:
        frame = _encode({"name": name, "version": version, "params": dict(params)})
    except (TypeError, ValueError):
        raise InvalidInput(f"the parameters of unit {name} are not JSON") from None
    if len(frame) > MAX_FRAME_BYTES:
        raise LimitError(f"the parameters of unit {name} have {len(frame)} bytes", limit_bytes=MAX_FRAME_BYTES)
    return frame


def execute(frame: bytes, handlers: Mapping[str, Handler], context: WorkContext) -> bytes:
    """Runs the unit in `frame` and returns the frame with its result or error. Never raises."""
    name = "?"
    try:
        unit = json.loads(frame)
        name = unit["name"]
        handler = handlers.get(name)
        if handler is None:
            raise NotFoundError(f"there is no unit of work called {name}")
        known = getattr(handler, "unit_version", 1)
        if known != unit["version"]:
            raise VersionError(f"unit {name} has version {known} here, not {unit['version']}")
        reply = _encode({"result": handler(unit["params"], context)})
        if len(reply) > MAX_FRAME_BYTES:
            raise LimitError(f"the result of unit {name} has {len(reply)} bytes", limit_bytes=MAX_FRAME_BYTES)
    except SottoError as error:
        return _encode(_described(error))
    except MemoryError:
        return _encode(_described(_no_memory(name, context)))
    except BaseException as error:  # a handler that exits or is interrupted failed, and the worker lives on
        if isinstance(error, RuntimeError) and _TORCH_NO_MEMORY in str(error):
            return _encode(_described(_no_memory(name, context)))
        return _encode(_described(WorkerError(f"unit {name} failed", private=type_and_place(error), unit=name)))
    return reply


def decode_reply(frame: bytes) -> dict[str, Any]:
    """The result in a frame.

    Raises:
        SottoError: the error in it, of the class that the handler raised; `WorkerError` for any other exception, with
            nothing of it but its type and place in `private` (its text may hold private data).
    """
    reply = json.loads(frame)
    if "result" in reply:
        result: dict[str, Any] = reply["result"]
        return result
    description = reply["error"]
    error = BY_REASON.get(description["reason"], SottoError)(description["message"], private=description["private"])
    error.metadata = description["metadata"]
    if isinstance(error, InvalidInput):
        error.violations = description["violations"]
    if isinstance(error, ConfigError):
        error.problems = tuple(description["problems"])
    raise error


def exhausted_memory(error: SottoError) -> bool:
    """Whether a unit ended because it got no more memory: its worker may have little left for the next one."""
    return error.metadata.get("exhausted") == "memory"


def _no_memory(name: str, context: WorkContext) -> WorkerError:
    limit_mb = context.memory_limit_mb
    allowed = "" if limit_mb is None else f"; a worker may have {limit_mb} MiB"
    return WorkerError(f"unit {name} got no more memory{allowed}", unit=name, exhausted="memory")


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _described(error: SottoError) -> dict[str, Any]:
    description: dict[str, Any] = {
        "reason": meaning(error).reason,
        "message": error.message,
        "private": error.private,
        "metadata": error.metadata,
    }
    if isinstance(error, InvalidInput):
        description["violations"] = error.violations
    if isinstance(error, ConfigError):
        description["problems"] = list(error.problems)
    return {"error": description}
