"""client.yaml: read in milliseconds where it is plainly right, and as the models read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.client_config import connection_of, full_connection, plain_connection
from src.config import load_client_config
from src.config_yaml import read_document
from src.errors import ConfigError

PLAIN: dict[str, str] = {
    "the least": "version: 1\nfederation: demo",
    "other files": "version: 1\nfederation: demo\nserver: {tls: {certificate: other.pem, ca: ./tls/ca.pem}}",
    "an operator elsewhere": (
        "version: 1\nfederation: demo\nrole: operator\nname: olga\nserver: {address: 'sotto.example.org:443'}\n"
        "keys: {roster: roster.json}"
    ),
    "insecure": (
        "version: 1\nfederation: demo\nname: ann\n"
        "server: {insecure: true, address: 'localhost:65535', tls: {certificate: none.pem}}\nkeys: {roster: null}"
    ),
    "a key to sign with": (
        "version: 1\nfederation: demo\nname: ann\nkeys: {roster: roster.json, signing_key: signing.key}"
    ),
    "no TLS section": "version: 1\nfederation: demo\nserver: {tls: null, insecure: false}\nkeys: {}",
}
NOT_PLAIN: dict[str, str] = {
    "nothing": "{}",
    "another version": "version: 2\nfederation: demo",
    "a version that is true": "version: true\nfederation: demo",
    "a version that is no whole number": "version: 1.0\nfederation: demo",
    "no federation": "version: 1",
    "a federation that is a number": "version: 1\nfederation: 7",
    "a name with capitals": "version: 1\nfederation: demo\nname: Ann",
    "a name that is true": "version: 1\nfederation: demo\nname: true",
    "no such role": "version: 1\nfederation: demo\nrole: party",
    "an unknown key": "version: 1\nfederation: demo\ncolour: red",
    "an unknown key of the server": "version: 1\nfederation: demo\nserver: {port: 1}",
    "an unknown key of TLS": "version: 1\nfederation: demo\nserver: {tls: {password: x}}",
    "an unknown key of the keys": "version: 1\nfederation: demo\nkeys: {share: x}",
    "a server that is a list": "version: 1\nfederation: demo\nserver: []",
    "keys that are a text": "version: 1\nfederation: demo\nkeys: roster.json",
    "TLS that is a text": "version: 1\nfederation: demo\nserver: {tls: x.pem}",
    "no port": "version: 1\nfederation: demo\nserver: {address: localhost}",
    "port 0": "version: 1\nfederation: demo\nserver: {address: 'localhost:0'}",
    "a port beyond 65535": "version: 1\nfederation: demo\nserver: {address: 'localhost:65536'}",
    "an address that is a number": "version: 1\nfederation: demo\nserver: {address: 50051}",
    "insecure to another machine": "version: 1\nfederation: demo\nserver: {address: '10.0.0.1:1', insecure: true}",
    "insecure as a text": "version: 1\nfederation: demo\nserver: {insecure: 'true'}",
    "a file that is not there": "version: 1\nfederation: demo\nkeys: {roster: none.json}",
    "a signing key that is not there": "version: 1\nfederation: demo\nkeys: {signing_key: none.key}",
    "a signing key instead of its file": f"version: 1\nfederation: demo\nkeys: {{signing_key: '{'ab' * 32}'}}",
    "a key instead of its file": f"version: 1\nfederation: demo\nserver: {{tls: {{key: '{'ab' * 32}'}}}}",
    "a path of a home": "version: 1\nfederation: demo\nkeys: {roster: ~/roster.json}",
}


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    (tmp_path / "tls").mkdir()
    for name in ("tls/cert.pem", "tls/key.pem", "tls/ca.pem", "other.pem", "roster.json", "signing.key"):
        (tmp_path / name).touch()
    return tmp_path / "client.yaml"


@pytest.mark.parametrize("text", PLAIN.values(), ids=PLAIN)
def test_a_plain_configuration_is_read_as_the_models_read_it(kit: Path, text: str) -> None:
    kit.write_text(text)
    plain = plain_connection(read_document(kit), base=kit.parent)
    assert plain is not None
    assert plain == full_connection(load_client_config(kit))


@pytest.mark.parametrize("text", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plainly_right_is_left_to_the_models(kit: Path, text: str) -> None:
    kit.write_text(text)
    assert plain_connection(read_document(kit), base=kit.parent) is None


def test_the_environment_overrides_a_configuration(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write_text(PLAIN["insecure"])
    monkeypatch.setenv("SOTTO__SERVER__ADDRESS", "127.0.0.1:7")
    assert connection_of(kit)["address"] == "127.0.0.1:7"
    monkeypatch.setenv("SOTTO__SERVER__ADDRESS", "nowhere")
    with pytest.raises(ConfigError, match="host:port"):
        connection_of(kit)
