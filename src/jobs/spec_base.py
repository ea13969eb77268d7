"""What the specifications of all kinds of jobs have in common: how they are read, refused and hashed.

The same model reads the wire, a job file and the database. A violation is reported by its field's path, all of them at
once. Defaults and ranges are documented in proto/sotto/v1/jobs.proto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..errors import InvalidInput
from ..protocol.canonical import digest, real

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
JOB_ID_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
"""64 hexadecimal digits, or empty: there is none."""

_SHA256_SUFFIX: Final = "_sha256"
_S = TypeVar("_S", bound="Spec")


class Part(BaseModel):
    """A specification or a section of one: frozen, no unknown fields, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Spec(Part):
    """What a job of one kind asks for.

    Attributes:
        kind: as in the wire's `oneof spec`, in a job file and in `JobRow.kind`; the domain of the digest.
        model_field: the wire's field with the bytes of a model, of which a specification only knows the SHA-256 (in
            the field of that name and "_sha256"); empty: the kind has none.
    """

    kind: ClassVar[str] = ""
    model_field: ClassVar[str] = ""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form under the kind; reals as decimal strings."""
        return digest(cast("dict[str, Any]", _reals_as_text(self._hashed())), domain=self.kind)

    @property
    def source_job_id(self) -> str:
        """The job whose result this one is about; empty where there is none."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with every field, as the store keeps it."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` wrote, or any object of some of its fields.

        Raises:
            InvalidInput: with every violation by its field's path.
        """
        spec, violations = read_spec(cls, value)
        if spec is None:
            raise refused(violations)
        return spec

    def _hashed(self) -> dict[str, Any]:
        return self.to_json()

    @classmethod
    def digest_field(cls) -> str:
        """The field with the SHA-256 of `model_field`; empty where there is none."""
        return cls.model_field and cls.model_field + _SHA256_SUFFIX


def read_spec(cls: type[_S], value: Mapping[str, Any]) -> tuple[_S | None, dict[str, str]]:
    """A specification, or None and what is wrong, by path.

    By way of JSON text: there a list is a tuple and a text is a literal, and still no text is a number.
    """
    try:
        return cls.model_validate_json(json.dumps(value, default=str)), {}
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, {_path(cls, detail): _sentence(cls, detail) for detail in details}


def refused(violations: dict[str, str]) -> InvalidInput:
    """The error that lists every violation."""
    listed = "; ".join(f"{path}: {text}" for path, text in violations.items())
    return InvalidInput(f"the job cannot be accepted: {listed}", violations=violations)


def set_fields(message: Any, *names: str) -> dict[str, Any]:
    """Of a message the fields that are neither zero nor empty."""
    return {name: getattr(message, name) for name in names if getattr(message, name)}


def _path(cls: type[Spec], detail: ErrorDetails) -> str:
    """As the caller knows it: whoever sends a model knows nothing of a field with its digest."""
    path = [str(part) for part in detail["loc"]]
    if path == [cls.digest_field()]:
        path = [cls.model_field]
    return ".".join((cls.kind, *path))


def _sentence(cls: type[Spec], detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "missing":
        return "required"
    if kind == "extra_forbidden":
        model: Any = cls
        for part in detail["loc"][:-1]:
            model = model.model_fields[str(part)].annotation
        known = (cls.model_field if name == cls.digest_field() else name for name in model.model_fields)
        return f"unknown field; allowed here: {', '.join(known)}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    given = detail["input"]
    shown = f" (got {given!r})" if isinstance(given, int | float | str) and len(str(given)) <= 40 else ""
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}{shown}"


def _reals_as_text(value: object) -> object:
    if isinstance(value, dict):
        return {key: _reals_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_reals_as_text(item) for item in value]
    return real(value) if isinstance(value, float) else value
