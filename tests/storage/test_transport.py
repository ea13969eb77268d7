"""A PostgreSQL server on another host is reached by TLS that proves its name, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import URL, MetaData, make_url

from src.config import load_aggregator_config
from src.config_database import located
from src.errors import ConfigError, UnavailableError
from src.storage.database import Database, read_only
from src.storage.location import Insecure
from src.storage.schema import FromMetadata
from src.storage.transport import REQUIRED, is_local, transport_of

REMOTE = "postgresql+psycopg://u@db.example/d"
LOCAL = [
    "postgresql+psycopg://u@/d",
    "postgresql+psycopg:///d",
    "postgresql+psycopg://u@localhost/d",
    "postgresql+psycopg://u@LocalHost:5432/d",
    "postgresql+psycopg://u@127.0.0.1:5432/d",
    "postgresql+psycopg://u@127.9.9.9/d",
    "postgresql+psycopg://u@[::1]:5432/d",
    "postgresql+psycopg://u@/d?host=/var/run/postgresql",
    "postgresql+psycopg://u@/d?host=@abstract",
    "postgresql+psycopg://u@/d?host=localhost:5432&host=127.0.0.1:5433",
    "postgresql+psycopg://u@/d?host=localhost,/tmp",
    "postgresql+psycopg://u@localhost/d?hostaddr=127.0.0.1",
]
ELSEWHERE = [
    REMOTE,
    "postgresql+psycopg://u@192.0.2.1/d",
    "postgresql+psycopg://u@[2001:db8::1]/d",
    "postgresql+psycopg://u@localhost.example/d",
    "postgresql+psycopg://u@127.0.0.1.example/d",
    "postgresql+psycopg://u@0.0.0.0/d",
    "postgresql+psycopg://u@2130706433/d",
    "postgresql+psycopg://u@/d?host=db.example",
    "postgresql+psycopg://u@/d?host=localhost:5432&host=db.example:5432",
    "postgresql+psycopg://u@/d?host=localhost,db.example",
    "postgresql+psycopg://u@/d?host=/tmp,192.0.2.1",
    "postgresql+psycopg://u@localhost/d?host=db.example",
    "postgresql+psycopg://u@localhost/d?hostaddr=192.0.2.1",
    "postgresql+psycopg://u@localhost/d?hostaddr=127.0.0.1,192.0.2.1",
    "postgresql+psycopg://u@localhost/d?service=theirs",
    "postgresql+psycopg://u@/d?service=theirs",
]
FROM_ELSEWHERE = [
    {"PGHOST": "db.example"},
    {"PGHOST": "localhost,db.example"},
    {"PGHOSTADDR": "192.0.2.1"},
    {"PGSERVICE": "theirs"},
]
WEAKER = ["disable", "allow", "prefer", "require", "verify-ca", "VERIFY-FULL", "verify-full,disable", ""]


@pytest.mark.parametrize("url", LOCAL)
def test_this_machine_is_reached_as_one_likes(url: str) -> None:
    assert transport_of(make_url(url), environ={}) == {}
    assert transport_of(make_url(url).update_query_dict({"sslmode": "disable"}), environ={}) == {}


@pytest.mark.parametrize("url", ELSEWHERE)
def test_another_host_is_reached_by_verified_tls_alone(url: str) -> None:
    """Hosts of a list, addresses beside a name, and services count as well."""
    assert transport_of(make_url(url), environ={}) == REQUIRED
    for mode in WEAKER:
        with pytest.raises(ConfigError, match=r"sslmode is verify-full"):
            transport_of(make_url(url).update_query_dict({"sslmode": mode}), environ={})


@pytest.mark.parametrize("environ", FROM_ELSEWHERE)
def test_what_the_environment_adds_counts_as_the_url_does(environ: Mapping[str, str]) -> None:
    url = make_url("postgresql+psycopg://u@/d")
    assert transport_of(url, environ=environ) == REQUIRED
    assert transport_of(url, environ={}) == {}


@pytest.mark.parametrize("query", [{"gssencmode": "prefer"}, {"sslmode": ("verify-full", "disable")}])
def test_no_way_around_it_is_left_open(query: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="to another host"):
        transport_of(make_url(REMOTE).update_query_dict(query), environ={})


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789.-:[]", min_size=1, max_size=30))
def test_a_name_is_local_only_if_it_is_plainly_so(name: str) -> None:
    """Whatever is not an address of loopback, or the word, is elsewhere: an odd spelling does not pass for local."""
    url = URL.create("postgresql+psycopg", host=name, database="d")
    plain = name.rpartition(":")[0] if name.rpartition(":")[2].isdigit() else name.rstrip(":")
    if is_local(url, environ={}):
        bare = {each.strip("[]") for each in (name, plain)}
        assert bare & {"localhost", "::1"} or any(each.startswith("127.") for each in bare)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is handed to libpq."""
    found: list[dict[str, Any]] = []

    def connect(*_: object, **parameters: Any) -> None:
        found.append(parameters)
        raise psycopg.OperationalError("not here")

    monkeypatch.setattr(psycopg, "connect", connect)
    return found


@pytest.mark.parametrize("name", ["PGSSLMODE", "PGGSSENCMODE", "PGREQUIRESSL"])
async def test_neither_the_environment_nor_a_service_can_weaken_it(
    name: str, dialled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For writing and for reading, what libpq is told is explicit: it looks nowhere else then."""
    monkeypatch.setenv(name, "disable")
    with pytest.raises(UnavailableError):
        await Database(f"{REMOTE}?service=theirs", FromMetadata(MetaData())).open()
    with pytest.raises(UnavailableError), read_only(f"{REMOTE}?service=theirs"):
        pass
    assert [{key: each.get(key) for key in REQUIRED} for each in dialled] == [dict(REQUIRED)] * 2


async def test_who_says_that_it_is_insecure_gets_what_the_url_says(dialled: list[dict[str, Any]]) -> None:
    with pytest.raises(UnavailableError):
        await Database(Insecure(f"{REMOTE}?sslmode=disable"), FromMetadata(MetaData())).open()
    assert dialled[0]["sslmode"] == "disable"
    assert "gssencmode" not in dialled[0]


def test_a_configuration_says_so_by_a_name_that_says_so_and_the_operator_is_told(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    text = "version: 1\nfederation: demo\nserver: {insecure: true}\nkeys: {custody: aggregator}\n"
    file.write_text(f"{text}database: {{url: '{REMOTE}?sslmode=require'}}\n")
    config = load_aggregator_config(file, environ={})
    with pytest.raises(ConfigError, match="insecure_transport"):
        Database(located(config), FromMetadata(MetaData()))
    assert config.exposed() == []
    config = load_aggregator_config(file, environ={"SOTTO__DATABASE__INSECURE_TRANSPORT": "true"})
    Database(located(config), FromMetadata(MetaData()))
    assert any("INSECURE: database.insecure_transport" in line for line in config.exposed())
