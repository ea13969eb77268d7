"""A model as it is stored: safetensors that hold its whole state, so that `load_state_dict` takes it as it is.

A model is more than what is trained: layers that are frozen, buffers, a parameter that stands under two names. What is
trained travels between the aggregator and the parties; the rest comes from the task's `build_model(seed)`, everywhere
the same. Where the two differ, the file says in its metadata which tensors are trained, under which parameter's name,
and gives the digest of the rest. A file without such metadata holds trained parameters alone.

Everything here works without torch; `whole` has what needs it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from ..errors import InvalidInput
from ..text import shown
from .flatten import Tensors, from_safetensors, signature_of, to_safetensors

METADATA: Final = "sotto"
"""The key of the file's metadata. Its value is JSON: {"trained": {name here: parameter}, "not_trained": digest}."""
_PARAMETER: Final = "F32"
_HEAD_BYTES: Final = 8
_NUMPY: Final[Mapping[str, str]] = {
    "BOOL": "?",
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    **{f"C{bits}": f"<c{bits // 8}" for bits in (64, 128)},
}
"""Dtypes of safetensors that numpy has."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of any dtype: as safetensors names it ("F32", "BF16", "I64"), its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The state of a model.

    Attributes:
        entries: by their names in `state_dict`.
        trained: of those that are trained, the parameter's name; one that has two names is there twice.
        not_trained: digest (hex) of all else (`digest_of`); empty where there is nothing else, or it is not known.
        described: whether it was said what is trained; else all of it is taken to be.
    """

    entries: Mapping[str, Entry]
    trained: Mapping[str, str] = field(default_factory=dict)
    not_trained: str = ""
    described: bool = True

    @property
    def rest(self) -> tuple[str, ...]:
        """Names of what is not trained, sorted."""
        return tuple(sorted(self.entries.keys() - self.trained.keys()))

    def parameters(self) -> Tensors:
        """What is trained, by the parameters' names.

        Raises:
            InvalidInput: one is not float32, or has two names and two values.
        """
        found: dict[str, Entry] = {}
        for name, parameter in sorted(self.trained.items()):
            entry = self.entries[name]
            if entry.dtype != _PARAMETER:
                raise InvalidInput(f"tensor {shown(name)} is {entry.dtype}, parameters are float32")
            if found.setdefault(parameter, entry) != entry:
                raise InvalidInput(f"parameter {shown(parameter)} has two names in this file, and two values")
        return {
            name: np.frombuffer(entry.data, np.float32).reshape(entry.shape).copy() for name, entry in found.items()
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it, by name, as numpy has it.

        Raises:
            InvalidInput: a tensor is of a dtype that numpy has not.
        """
        found: dict[str, NDArray[Any]] = {}
        for name, entry in self.entries.items():
            dtype = _NUMPY.get(entry.dtype)
            if dtype is None:
                raise InvalidInput(f"tensor {shown(name)} is {entry.dtype}, which numpy does not have")
            found[name] = np.frombuffer(entry.data, dtype).reshape(entry.shape).copy()
        return found

    def with_parameters(self, tensors: Tensors) -> ModelFile:
        """The same with other values of what is trained.

        Raises:
            InvalidInput: names or shapes are others.
        """
        if signature_of(tensors) != signature_of(self.parameters()):
            raise InvalidInput("the parameters are not this model's: names or shapes differ")
        entries = dict(self.entries)
        for name, parameter in self.trained.items():
            values = np.ascontiguousarray(tensors[parameter], np.float32)
            entries[name] = replace(entries[name], data=values.tobytes())
        return replace(self, entries=entries)

    def to_bytes(self) -> bytes:
        """The same state gives the same bytes. Without metadata where all is trained, under the names that it has."""
        if not self.not_trained and all(name == parameter for name, parameter in self.trained.items()):
            return to_safetensors(self.parameters())
        said = {"trained": dict(sorted(self.trained.items())), "not_trained": self.not_trained}
        header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(said, sort_keys=True)}}
        body = []
        place = 0
        for name, entry in sorted(self.entries.items(), key=_aligned):
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [place, place + len(entry.data)],
            }
            place += len(entry.data)
            body.append(entry.data)
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % _HEAD_BYTES)
        return len(head).to_bytes(_HEAD_BYTES, "little") + head + b"".join(body)


def _aligned(named: tuple[str, Entry]) -> tuple[int, str]:
    """Wide values first, so that all lie at a multiple of their size."""
    name, entry = named
    bits = int("".join(filter(str.isdigit, entry.dtype.partition("_")[0])) or 8)
    return -bits, name


def read_model_file(data: bytes) -> ModelFile:
    """The inverse of `ModelFile.to_bytes`; of any other safetensors file, all of it as trained.

    Raises:
        InvalidInput: it is no safetensors file, or its description is malformed.
    """
    try:
        entries = {
            str(name): Entry(str(each["dtype"]), tuple(each["shape"]), bytes(each["data"]))
            for name, each in deserialize(data)  # type: ignore[no-untyped-call]
        }
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidInput("these bytes are not a safetensors file that can be read", private=str(error)) from error
    said = _described(data)
    if said is None:
        return ModelFile(entries, {name: name for name in entries}, described=False)
    trained: Any = said.get("trained")
    digest = said.get("not_trained")
    named = isinstance(trained, dict) and all(isinstance(each, str) for each in trained.values())
    if not named or not isinstance(digest, str) or not trained.keys() <= entries.keys():
        raise InvalidInput("the model's file does not say which of its tensors are trained")
    return ModelFile(entries, trained, digest)


def _described(data: bytes) -> dict[str, Any] | None:
    """What the metadata of a safetensors file (which was read already) says of it; None where it says nothing."""
    length = int.from_bytes(data[:_HEAD_BYTES], "little")
    metadata = json.loads(data[_HEAD_BYTES : _HEAD_BYTES + length]).get("__metadata__")  # which may be null
    text = (metadata or {}).get(METADATA)
    if text is None:
        return None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    return said if isinstance(said, dict) else {}


def parameters_of(data: bytes) -> Tensors:
    """What is trained of a stored model, by name.

    Raises:
        InvalidInput: it is no model, or one that is not trained in float32.
    """
    found = read_model_file(data)
    return found.parameters() if found.described else from_safetensors(data)


def digest_of(entries: Mapping[str, Entry]) -> str:
    """SHA-256 (hex) of tensors, by names, dtypes, shapes and bits; empty where there are none."""
    if not entries:
        return ""
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        head = json.dumps([name, entry.dtype, list(entry.shape)], ensure_ascii=True).encode()
        digest.update(len(head).to_bytes(_HEAD_BYTES, "little") + head + entry.data)
    return digest.hexdigest()
