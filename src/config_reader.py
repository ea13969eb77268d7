"""How a configuration is read: YAML, environment, and one sentence for every problem. It knows no particular model.

`config_yaml` reads the file. `SOTTO__SECTION__KEY=value` overrides what it says; the value is read as YAML. Relative
paths are relative to the directory of the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from .config_yaml import ENVIRONMENT_PREFIX, parse_yaml
from .errors import ConfigError
from .files import expanded

_SHOWN_CHARACTERS: Final = 40  # of a wrong value: enough to recognise it, too little for a pasted file
_LONGEST_PATH: Final = 1024  # PATH_MAX is 4096 on Linux and 1024 on macOS

Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True)
class Loading:
    """What validators of one load share, as the validation context.

    Attributes:
        base: directory that relative paths start from.
        problems: what was found so far, as "path: what is wrong".
        missing: files that a kit has and this place has not, as (path of the key, file).
        origins: which environment variable a value came from, by its path.
    """

    base: Path
    problems: list[str] = field(default_factory=list)
    missing: list[tuple[str, Path]] = field(default_factory=list)
    origins: dict[tuple[str, ...], str] = field(default_factory=dict)

    def require_file(self, where: str, path: Path | None) -> None:
        """Note a file that has to be there."""
        if path is not None and not path.is_file():
            self.missing.append((where, path))


def loading(info: ValidationInfo) -> Loading:
    """The context of this load; a fresh one, with the working directory as base, when a model is built by hand."""
    return info.context if isinstance(info.context, Loading) else Loading(Path.cwd())


def finish(info: ValidationInfo, state: Loading) -> None:
    """Raise what `state` collected where nobody will look at it later: when a model is built by hand."""
    if info.context is not state and (state.problems or state.missing):
        raise ValueError("; ".join([*state.problems, *(f"{where}: no such file" for where, _ in state.missing)]))


def _resolve(value: object, info: ValidationInfo) -> object:
    """A path as written → absolute. What looks like the secret itself is refused without being shown."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if re.fullmatch(r"[0-9a-fA-F]{64,}", text) or "\n" in text or "\0" in text or len(text) > _LONGEST_PATH:
        raise ValueError("must be the path of a file, not its content")
    if not text:
        raise ValueError("must be a path, not an empty text")
    try:
        path = expanded(Path(text))
    except ConfigError as error:
        raise ValueError(error.message) from error
    return path if path.is_absolute() else loading(info).base / path


ConfigPath = Annotated[Path, BeforeValidator(_resolve)]
"""A path, absolute after loading."""


# ----------------------------------------------------------------------------------------------------- environment


def override(
    data: dict[str, Any], model: type[BaseModel], *, environ: Mapping[str, str], state: Loading
) -> dict[str, Any]:
    """`data` with every `SOTTO__SECTION__KEY` of `environ` in its place; unknown names become problems."""
    merged: dict[str, Any] = _copy(data)
    for variable in sorted(name for name in environ if name.upper().startswith(ENVIRONMENT_PREFIX)):
        parts = tuple(part.lower() for part in variable[len(ENVIRONMENT_PREFIX) :].split("__"))
        complaint = _not_a_key(model, parts)
        if complaint:
            state.problems.append(f"{variable}: {complaint}")
            continue
        value, problems = parse_yaml(environ[variable])
        if problems:
            state.problems.append(f"{variable}: the value is not YAML")
            continue
        target = merged
        for part in parts[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[parts[-1]] = value
        state.origins[parts] = variable
    return merged


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _not_a_key(model: type[BaseModel], parts: tuple[str, ...]) -> str:
    """Why `parts` does not name a value of the model; empty if it does."""
    annotation: Any = model
    for depth, part in enumerate(parts):
        section = ".".join(parts[:depth]) or "the top level"
        if _is_model(annotation):
            if part not in annotation.model_fields:
                return f"no key {part!r} in {section}{_nearest(part, annotation.model_fields)}"
            annotation = _plain(annotation.model_fields[part].annotation)
        elif get_origin(annotation) is dict and part:
            annotation = _plain(get_args(annotation)[1])
        else:
            return f"{section} has no keys"
    if _is_model(annotation):
        return f"{'.'.join(parts)} is a section; name a key in it: {', '.join(annotation.model_fields)}"
    return ""


# ------------------------------------------------------------------------------------------------------- validation


def validate(model: type[Model], data: Mapping[str, Any], *, state: Loading) -> Model | None:
    """The model that `data` describes; None, with all reasons in `state.problems`, if it describes none."""
    try:
        result = model.model_validate(dict(data), context=state)
    except ValidationError as error:
        # Validators that add to the state and still fail elsewhere leave their findings: they come first.
        state.problems.extend(_sentence(model, detail, state) for detail in error.errors(include_url=False))
        return None
    return None if state.problems or state.missing else result


def _sentence(model: type[BaseModel], detail: ErrorDetails, state: Loading) -> str:
    """One problem as "path: what is wrong and what is allowed"."""
    parts = tuple(str(part) for part in detail["loc"])
    where = ".".join(parts) or "the file"
    annotation, metadata = _locate(model, parts)
    kind = detail["type"]
    if kind == "extra_forbidden":
        section, _ = _locate(model, parts[:-1])
        keys = list(_plain(section).model_fields)
        return f"{where}: unknown key{_nearest(parts[-1], keys)}; allowed here: {', '.join(keys)}"
    if kind == "missing":
        return f"{where}: required: {_allowed(annotation, metadata)}"
    if kind == "value_error":
        return f"{where}: {detail['ctx']['error']}{_origin(parts, state)}"
    limits = _range(metadata)
    off_limits = kind in {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of"}
    rule = limits if off_limits and limits else _allowed(annotation, metadata)
    shown = _shown(detail["input"], secret=_plain(annotation) is Path)
    return f"{where}: must be {rule} (got {shown}){_origin(parts, state)}"


def _origin(parts: tuple[str, ...], state: Loading) -> str:
    return f" [from {state.origins[parts]}]" if parts in state.origins else ""


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _plain(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        rest = [argument for argument in get_args(annotation) if argument is not NoneType]
        return _plain(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _nullable(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


def _locate(model: type[BaseModel], parts: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """The annotation and metadata of the field at a path; (Any, []) where there is none."""
    annotation: Any = model
    metadata: list[Any] = []
    for part in parts:
        plain = _plain(annotation)
        if _is_model(plain) and part in plain.model_fields:
            annotation, metadata = plain.model_fields[part].annotation, list(plain.model_fields[part].metadata)
        elif get_origin(plain) is dict:
            annotation, metadata = get_args(plain)[1], []
        else:
            return Any, []
    return annotation, metadata


def _range(metadata: list[Any]) -> str:
    """The limits in a field's metadata, as "> 0 and < 1"."""
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    limits = [f"{sign} {getattr(item, name):g}" for name, sign in signs for item in metadata if hasattr(item, name)]
    limits += [f"a multiple of {item.multiple_of}" for item in metadata if hasattr(item, "multiple_of")]
    return " and ".join(limits)


_TYPE_NAMES: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    Path: "a path",
}


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    """What a field takes, in words."""
    plain = _plain(annotation)
    if get_origin(plain) is Literal:
        words = " or ".join(repr(value) for value in get_args(plain))
    elif _is_model(plain):
        words = f"a section with the keys {', '.join(plain.model_fields)}"
    elif get_origin(plain) is dict:
        words = "a mapping"
    else:
        words = _TYPE_NAMES.get(plain, "another value")
    limits = _range(metadata)
    return words + (f" {limits}" if limits else "") + (", or null" if _nullable(annotation) else "")


def _shown(value: object, *, secret: bool) -> str:
    """A wrong value as far as it is safe and useful to show."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if secret:
        return "something else"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
