"""What lies in a kit, and the configuration that runs it, written with its comments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..config import AggregatorConfig, ClientConfig, PartyConfig
from ..config_sections import AggregatorLimits, DatasetSection, is_loopback, split_address
from ..config_yaml import parse_yaml
from ..files import make_private_directory, write_new
from .certificates import Certificate

RANDHIE_PARTIES: Final = range(2, 21)  # what the demonstration's task can be split into
RANDHIE_TRAINING_ROWS: Final = 16_152  # 20 190 person-years less the fifth that is held out
DEFAULT_USER_EPSILON: Final = 10.0  # as in the shipped config/party.yaml: `sotto train` works with a kit as it is made
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")

Values = dict[str, Any]


def write_json(path: Path, value: Mapping[str, Any], *, secret: bool) -> None:
    """Indented JSON with sorted keys."""
    write_new(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), secret=secret)


def write_tls(kit: Path, certificate: Certificate, *, authority: Certificate) -> None:
    """kit/tls/{cert,key,ca}.pem."""
    tls = make_private_directory(kit / "tls")
    write_new(tls / "cert.pem", certificate.pem, secret=False)
    write_new(tls / "key.pem", certificate.key_pem, secret=True)
    write_new(tls / "ca.pem", authority.pem, secret=False)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Values:
    """`base` with `changes` laid over it, section by section; neither is modified."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


# --------------------------------------------------------------------------------------------------- what is in them


def _tls() -> Values:
    return {"certificate": "tls/cert.pem", "key": "tls/key.pem", "ca": "tls/ca.pem"}


def _keys(custody: str, *, small: bool, share: bool = False) -> Values:
    keys: Values = {"custody": custody}
    if custody == "threshold":
        keys["public_key"] = "public_key.json"
    keys |= {"roster": "roster.json", "signing_key": "signing.key", "insecure_small_modulus": small}
    return keys | ({"share": "share.json"} if share else {})


def aggregator_values(
    federation: str, address: str, *, custody: str, colluders: int, modulus_bits: int, small: bool, parties: int
) -> Values:
    """aggregator.yaml. Where parties dial another host than this one, the aggregator listens on every interface."""
    host, port = split_address(address)
    values = merge(
        default_values(AggregatorConfig),
        {
            "version": 1,
            "federation": federation,
            "server": {"listen": address if is_loopback(host) else f"0.0.0.0:{port}", "tls": _tls()},
            "privacy": {"colluders": colluders},
            "limits": {"max_parties": max(parties, AggregatorLimits.model_fields["max_parties"].default)},
            "evaluation": {"randhie": {"seed": 0}},
        },
    )
    values["keys"] = _keys(custody, small=small)
    if custody == "aggregator":
        values["keys"]["modulus_bits"] = modulus_bits
    return values


def party_values(
    federation: str, address: str, *, names: Sequence[str], name: str, custody: str, colluders: int, small: bool
) -> Values:
    """party.yaml, with this party's part of the demonstration's data."""
    values = merge(
        default_values(PartyConfig),
        {
            "version": 1,
            "name": name,
            "federation": federation,
            "server": {"address": address, "tls": _tls()},
            "privacy": {"colluders": colluders, "budgets": {"default_user_epsilon": DEFAULT_USER_EPSILON}},
        },
    )
    values["keys"] = _keys(custody, small=small, share=custody == "threshold")
    count = len(names)
    if count in RANDHIE_PARTIES:
        options = {"party": list(names).index(name), "parties": count, "seed": 0}
        rows = _round_down(RANDHIE_TRAINING_ROWS // count)
        values["datasets"] = {"randhie": default_values(DatasetSection) | {"declared_rows": rows, "options": options}}
    return values


def client_values(federation: str, address: str, *, role: str, name: str) -> Values:
    """client.yaml."""
    return {
        "version": 1,
        "federation": federation,
        "role": role,
        "name": name,
        "server": {"insecure": False, "tls": _tls(), "address": address},
        "keys": {"roster": "roster.json", "signing_key": "signing.key"},
    }


def _round_down(rows: int) -> int:
    """To one significant digit: what is declared need not be exact."""
    unit = int(10 ** (len(str(rows)) - 1))
    return rows // unit * unit


# ------------------------------------------------------------------------------------------------ YAML with comments

HEADERS: Final = {
    AggregatorConfig: "The aggregator of federation {federation}. Start it:  sotto aggregator --config aggregator.yaml",
    PartyConfig: "Party {name} of federation {federation}. Start it:  sotto party --config party.yaml",
    ClientConfig: "How to reach federation {federation}. For example:  sotto jobs list --config client.yaml",
}
NOTES: Final = (
    "Relative paths start from this file's directory. SOTTO__SECTION__KEY in the environment overrides a value.",
)
DATASET_NOTE: Final = (
    "The example is the demonstration's task: this party's part of the public RAND Health Insurance data, which",
    "pip install 'sotto-fl[randhie]' brings. For data of your own, register a task (entry point group sotto.tasks) and",
    "put its short name and options here.",
)


def default_values(model: type[BaseModel]) -> Values:
    """Every default of a model, section by section, null too: it is worth reading what that stands for. A field
    without a default is left out."""
    values: Values = {}
    for name, field in model.model_fields.items():
        default = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            values[name] = merge(default_values(field.annotation), default)
        elif default is not PydanticUndefined:
            values[name] = str(default) if isinstance(default, Path) else default
    return values


def render(model: type[BaseModel], values: Mapping[str, Any]) -> str:
    """The YAML text of a configuration, every key under its description."""
    header = HEADERS[model].format(federation=values["federation"], name=values.get("name", ""))
    return "\n".join([*(f"# {line}" for line in (header, *NOTES)), *_lines(model, values, indent=""), ""])


def _lines(model: type[BaseModel], values: Mapping[str, Any], *, indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if name not in values:
            continue
        if not indent:
            lines.append("")
        lines.append(f"{indent}# {field.description}")
        lines += [f"{indent}# {line}" for line in (DATASET_NOTE if name == "datasets" else ())]
        lines += _entry(name, values[name], section=_section_of(field.annotation), indent=indent)
    lines += _unknown(model, values, indent=indent)
    return lines


def _unknown(model: type[BaseModel], values: Mapping[str, Any], *, indent: str) -> list[str]:
    """Keys the model does not have are written too: loading the file will name them."""
    return [
        line
        for name, value in values.items()
        if name not in model.model_fields
        for line in _entry(name, value, section=None, indent=indent)
    ]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model in `Section`, `Section | None` or `dict[str, Section]`."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)


def _entry(name: str, value: Any, *, section: type[BaseModel] | None, indent: str) -> list[str]:
    if not isinstance(value, Mapping) or not value:
        return [f"{indent}{_scalar(name)}: {_scalar(value)}"]
    lines = [f"{indent}{_scalar(name)}:"]
    deeper = indent + "  "
    if section is None:
        return lines + [line for key, item in value.items() for line in _entry(key, item, section=None, indent=deeper)]
    if set(value) <= set(section.model_fields):
        return lines + _lines(section, value, indent=deeper)
    for key, item in value.items():  # a mapping of sections, by task
        lines.append(f"{deeper}{_scalar(key)}:")
        lines += _lines(section, item, indent=deeper + "  ")
    return lines


def _scalar(value: Any) -> str:
    """A scalar or a list: plain where YAML reads it back as the same text, as JSON otherwise."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and parse_yaml(value) == (value, []):
        return value
    return json.dumps(value, ensure_ascii=False)
