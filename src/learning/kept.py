"""What a model and a loss hold between two calls: whether computing rows changes it.

A row's gradient is a function of that row and the model alone as long as nothing of one row is there when the next one
is computed. Parameters, buffers, attributes, containers, generators, closures and hooks are looked at, and what the
task's own methods name of their module; not what is hidden deeper, which only its author knows.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

_MOST: Final = 100_000
"""Values that are looked at; a task that holds more is looked at as far as that."""
_WHOLE_BYTES: Final = 1 << 26
"""Of an array up to this size every byte counts, of a larger one its ends."""
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
_NOTHING: Final = (type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)
_OPEN: Final = (functools.partial, types.MethodType, types.FunctionType, Mapping, list, tuple, deque)
"""What is looked into although the standard library defines it; of its other objects their text is compared."""
_LIBRARIES: Final = ("torch", "numpy")
_CONTAINERS: Final = (dict, list, set, deque, torch.Tensor, np.ndarray)


def state_of(**roots: Any) -> dict[str, str]:
    """What is reachable from each root, by its path (`loss.seen[2]`), as something that can be compared."""
    return {path: summary for path, _, summary in _reached(roots)}


def arrays_of(model: torch.nn.Module) -> dict[str, str]:
    """As `state_of`, tensors and arrays alone, and of these what is in none of the model's `state_dict`."""
    state = [each for each in model.state_dict(keep_vars=True).values() if isinstance(each, torch.Tensor)]
    known = {id(each) for each in state}
    places = {each.untyped_storage().data_ptr() for each in state if each.numel()}
    found = {}
    for path, value, summary in _reached({"": model}):
        if isinstance(value, torch.Tensor):
            if id(value) in known or (value.numel() and value.untyped_storage().data_ptr() in places):
                continue
        elif not isinstance(value, np.ndarray):
            continue
        found[path.removeprefix(".")] = summary
    return found


def _reached(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Path, value and what can be compared of it."""
    paths: set[str] = set()
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque(roots.items())
    while waiting and len(paths) < _MOST:
        path, value = waiting.popleft()
        while path in paths:  # an attribute and a name of the module, say
            path += "'"
        if isinstance(value, _PLAIN):
            paths.add(path)
            yield path, value, repr(value)
            continue
        if isinstance(value, _NOTHING) or id(value) in seen:
            continue
        seen.add(id(value))
        summary = _summary(value)
        if summary is None:
            waiting.extend(_parts(path, value))
            if isinstance(value, Mapping | list | tuple | deque):
                summary = f"{len(value)} items"
        if summary is not None:
            paths.add(path)
            yield path, value, summary


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Paths of what is not what it was, shortest first: where something was added, what it was added to."""
    differ = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return sorted(differ, key=lambda path: (len(path), path))


def _summary(value: Any) -> str | None:
    """Of what is looked at as a whole; None for what has parts."""
    if isinstance(value, torch.Tensor):
        try:
            return _bytes_of(value.detach().cpu().resolve_conj().resolve_neg().numpy())
        except (RuntimeError, TypeError):  # sparse, or of a type that numpy does not have
            return repr(value)
    if isinstance(value, np.ndarray):
        return _bytes_of(value)
    if isinstance(value, torch.Generator):
        return _bytes_of(value.get_state().numpy())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, set | frozenset):
        return repr(sorted(map(repr, value)))
    standard = type(value).__module__.partition(".")[0] in sys.stdlib_module_names
    return repr(value) if standard and not isinstance(value, _OPEN) else None  # a logger, a lock, an iterator's place


def _bytes_of(values: np.ndarray[Any, Any]) -> str:
    flat = values.reshape(-1)
    if values.nbytes > _WHOLE_BYTES:
        some = (1 << 20) // values.itemsize
        flat = np.concatenate([flat[:some], flat[-some:]])
    return f"{values.shape} {hashlib.sha256(flat.tobytes()).hexdigest()}"


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}[{_name(key)}]", each) for key, each in value.items())
    elif isinstance(value, list | tuple | deque):
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, types.MethodType):
        yield from ((path, each) for each in (value.__self__, value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(path, value)
    elif isinstance(value, torch.nn.Module):
        for kind in (value._parameters, value._buffers, value._modules):
            yield from ((f"{path}.{name}", each) for name, each in kind.items())
        own = {name: each for name, each in vars(value).items() if name not in _OF_MODULES}
        yield from ((f"{path}.{name}", each) for name, each in own.items())
        yield from _of_class(path, value)
    else:
        yield from ((f"{path}.{name}", each) for name, each in getattr(value, "__dict__", {}).items())
        yield from _of_class(path, value)
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        yield from ((f"{path}.{name}", getattr(value, name)) for name in slots if hasattr(value, name))


_OF_MODULES: Final = ("_parameters", "_buffers", "_modules", "training")


def _of_class(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Containers and arrays that all instances of a task's classes share, and what their methods name."""
    for kind in type(value).__mro__:
        room = kind.__module__.partition(".")[0]
        if room not in _LIBRARIES and room not in sys.stdlib_module_names:
            shared = {name: each for name, each in vars(kind).items() if isinstance(each, _CONTAINERS)}
            yield from ((f"{path}.{name}", each) for name, each in shared.items() if not name.startswith("__"))
            for each in vars(kind).values():
                if isinstance(each, types.FunctionType):
                    yield from _of_function(path, each)


def _of_function(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What it closes over, its defaults and attributes, and what it names of its module but other functions."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from ((f"{path}.{number}", each) for number, each in enumerate(function.__defaults__ or ()))
    for named in (function.__kwdefaults__ or {}, vars(function)):
        yield from ((f"{path}.{name}", each) for name, each in named.items())
    for name in function.__code__.co_names:
        if name in function.__globals__ and not isinstance(function.__globals__[name], types.FunctionType):
            yield f"{path}.{name}", function.__globals__[name]


def _name(key: object) -> str:
    return repr(key) if isinstance(key, _PLAIN) else type(key).__name__
