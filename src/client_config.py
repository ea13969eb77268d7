"""client.yaml → how to make a client.

What is plainly right is read here, in a few milliseconds. Everything else, and whatever is wrong, goes to
`config.load_client_config`, whose models know every rule and say what is broken: importing them takes a command line
a quarter of a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .client_signing import JobSigner
from .communication.identity import Identity
from .communication.tls import TlsFiles, is_loopback
from .config_yaml import ENVIRONMENT_PREFIX, read_document
from .files import expanded

if TYPE_CHECKING:
    from .config import ClientConfig

_KEYS: Final = {"version", "federation", "role", "name", "server", "keys"}
_SERVER_KEYS: Final = {"address", "insecure", "tls"}
_TLS_KEYS: Final = {"certificate", "key", "ca"}
_KEY_FILES: Final = {"roster", "signing_key"}
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_ADDRESS: Final = re.compile(r"[A-Za-z0-9.-]+:([1-9][0-9]{0,4})")
_PATH: Final = re.compile(r"(?=.*[./])[A-Za-z0-9_./-]{1,500}")
"""With a dot or a slash in it: no key written out in hex."""


def connection_of(path: Path | str, *, address: str | None = None) -> dict[str, Any]:
    """The arguments of a client, but `retry_for_s`, as a client.yaml says. Relative paths are relative to the file.

    Args:
        address: "host:port" instead of the one that the file says.

    Raises:
        ConfigError: the file cannot be used; every problem in `problems`.
    """
    path = expanded(Path(path)).absolute()
    overridden = any(name.upper().startswith(ENVIRONMENT_PREFIX) for name in os.environ)
    found = None if overridden else plain_connection(read_document(path), base=path.parent)
    if found is None:
        from .config import load_client_config

        found = full_connection(load_client_config(path))
    return {**found, "address": address or found["address"]}


def full_connection(config: ClientConfig) -> dict[str, Any]:
    """The arguments of a client, from the model."""
    server = config.server
    tls = server.tls and TlsFiles(certificate=server.tls.certificate, key=server.tls.key, ca=server.tls.ca)
    return {
        "address": server.address,
        "tls": tls,
        "insecure": server.insecure,
        "identity": Identity(config.role, config.name) if server.insecure else None,
        "roster": config.keys.roster,
        "signer": config.keys.signing_key and JobSigner(config.federation, config.name, config.keys.signing_key),
    }


def plain_connection(document: Mapping[str, Any], *, base: Path) -> dict[str, Any] | None:
    """The same of a document in which everything is plainly right; None where anything needs a closer look.

    Args:
        document: what the file holds.
        base: the file's directory.
    """
    role, name = document.get("role", "scientist"), document.get("name", "scientist")
    server, keys = document.get("server", {}), document.get("keys", {})
    right = (
        set(document) <= _KEYS
        and type(document.get("version")) is int
        and document["version"] == 1
        and _matches(_NAME, document.get("federation"), name)
        and role in ("scientist", "operator")
        and isinstance(server, dict)
        and set(server) <= _SERVER_KEYS
        and isinstance(keys, dict)
        and set(keys) <= _KEY_FILES
    )
    if not right:
        return None
    files = _files(server, keys, base=base)
    insecure, address = server.get("insecure", False), server.get("address", "127.0.0.1:50051")
    if files is None or not isinstance(insecure, bool) or not _is_address(address):
        return None
    if insecure and not is_loopback(address):
        return None
    return {
        "address": address,
        "tls": None if insecure else TlsFiles(**{key: files[key] for key in _TLS_KEYS}),
        "insecure": insecure,
        "identity": Identity(role, name) if insecure else None,
        "roster": files.get("roster"),
        "signer": JobSigner(document["federation"], name, files["signing_key"]) if "signing_key" in files else None,
    }


def _files(server: Mapping[str, Any], keys: Mapping[str, Any], *, base: Path) -> dict[str, Path] | None:
    """The files that the document names, or would have; None unless all of them are plain names of files."""
    written: dict[str, Any] = {}
    if server.get("insecure") is not True:
        tls = server.get("tls")
        tls = {} if tls is None else tls
        if not isinstance(tls, dict) or not set(tls) <= _TLS_KEYS:
            return None
        written = {"certificate": "tls/cert.pem", "key": "tls/key.pem", "ca": "tls/ca.pem", **tls}
    written |= {name: keys[name] for name in sorted(_KEY_FILES) if keys.get(name) is not None}
    if not _matches(_PATH, *written.values()):
        return None
    files = {key: base / text for key, text in written.items()}
    return files if all(file.is_file() for file in files.values()) else None


def _is_address(value: object) -> bool:
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    return found is not None and int(found[1]) <= 65535


def _matches(pattern: re.Pattern[str], *values: object) -> bool:
    return all(isinstance(value, str) and pattern.fullmatch(value) for value in values)
