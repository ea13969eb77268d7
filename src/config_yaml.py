"""YAML as a configuration is written in: its 1.2 core rules, and nothing twice. It imports no model of anything.

`1e-5` is a number however it is written, `no` and `on` are texts, `010` is ten, a date is a text; a key that appears
twice is a problem.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from .errors import ConfigError

ENVIRONMENT_PREFIX: Final = "SOTTO__"
"""`SOTTO__SECTION__KEY=value` overrides what a configuration file says."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and without silent duplicates."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.problems: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent does, noting keys that appear twice and keys that are no texts."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                self.problems.append(f"line {key.start_mark.line + 1}: a key must be a text")
            elif key.value in seen:
                line, first = key.start_mark.line + 1, seen[key.value]
                self.problems.append(f"line {line}: {key.value!r} appears twice in one section (first in line {first})")
            else:
                seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


_KEY_TAGS: Final = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_NUMBER_START: Final = list("-+0123456789.")

_Loader.yaml_implicit_resolvers = {}  # the rules of YAML 1.1 go; those of the 1.2 core schema come
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), _NUMBER_START)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    _NUMBER_START,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)), 10)


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """A YAML document as data, and the problems in it. A syntax error leaves no data (None)."""
    loader = _Loader("")
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.problems
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return None, [*loader.problems, f"{line}not YAML: {error.problem or error.context}"]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None, [*loader.problems, "not YAML"]
    finally:
        loader.dispose()


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not readable, not YAML, duplicate keys, not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {type(error).__name__}") from error
    data, problems = parse_yaml(text)
    if not problems and not isinstance(data, dict):
        problems.append("the file must hold a mapping of sections, such as `version: 1`")
    if problems:
        raise unusable(path, problems)
    return dict(data)


def unusable(path: Path, problems: list[str], *, advice: str = "") -> ConfigError:
    """The error that carries all problems of one file; `advice` is no problem, and is not counted as one."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(
        f"{path} cannot be used ({count}{advice and f'; {advice}'}): " + "; ".join(problems), problems=tuple(problems)
    )
