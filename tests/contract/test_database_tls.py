"""A real PostgreSQL server reached over the network: by TLS that proves its name, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import URL, MetaData

from src.errors import ConfigError, UnavailableError
from src.provisioning.certificates import Authority
from src.storage.database import Database, read_only
from src.storage.location import Insecure
from src.storage.schema import FromMetadata
from tests.contract.conftest import USER, Server, binaries_or_skip

NAME = "db.example"
"""A name that nothing here resolves: the address stands beside it."""
SCHEMA = FromMetadata(MetaData())


class Networked:
    """A server on loopback whose certificate is for `NAME`, and what is needed to verify it."""

    def __init__(self, directory: Path, address: str) -> None:
        authority = Authority("demo", now=datetime.now(UTC))
        certificate = authority.server("aggregator", hosts=[NAME])
        self.ca, self.another_ca = directory / "ca.pem", directory / "another.pem"
        self.ca.write_bytes(authority.certificate.pem)
        self.another_ca.write_bytes(Authority("other").certificate.pem)
        self.port = address.rpartition(":")[2]
        self.server = Server(
            binaries_or_skip(),
            listen_addresses="127.0.0.1",
            port=self.port,
            ssl="on",
            ssl_cert_file="server.pem",
            ssl_key_file="server.key",
        )
        for name, content in (("server.pem", certificate.pem), ("server.key", certificate.key_pem)):
            file = self.server.directory / "data" / name
            file.write_bytes(content)
            file.chmod(0o600)
            shutil.chown(file, self.server.directory.stat().st_uid)
        self.server.start()

    def url(self, name: str = NAME, **more: str) -> URL:
        query = {"hostaddr": "127.0.0.1", "sslrootcert": str(self.ca), **more}
        return URL.create(
            "postgresql+psycopg", username=USER, host=name, port=int(self.port), database="postgres", query=query
        )


@pytest.fixture(scope="module")
def networked(
    tmp_path_factory: pytest.TempPathFactory, reserved_address: Callable[[], AbstractContextManager[str]]
) -> Iterator[Networked]:
    with reserved_address() as address:
        made = Networked(tmp_path_factory.mktemp("tls"), address)
        yield made
        made.server.remove()


async def encrypted(url: URL | Insecure) -> bool:
    database = Database(url, SCHEMA)
    await database.open()
    try:
        query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        return bool(await database.run(lambda connection: connection.exec_driver_sql(query).scalar()))
    finally:
        await database.close()


async def test_a_server_that_proves_its_name_is_used_and_nothing_has_to_be_said(networked: Networked) -> None:
    assert await encrypted(networked.url())
    with read_only(networked.url()) as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


@pytest.mark.parametrize("case", ["another name", "another authority"])
async def test_one_that_does_not_is_never_spoken_to(networked: Networked, case: str) -> None:
    """Who stands between: with a certificate of somebody else, or with one that they made."""
    wrong = {
        "another name": networked.url("other.example"),
        "another authority": networked.url(sslrootcert=str(networked.another_ca)),
    }[case]
    with pytest.raises(UnavailableError, match="certificate"):
        await encrypted(wrong)


@pytest.mark.parametrize("mode", ["disable", "require", "verify-ca"])
async def test_less_is_refused_before_anything_is_sent(networked: Networked, mode: str) -> None:
    with pytest.raises(ConfigError, match="verify-full"):
        await encrypted(networked.url(sslmode=mode))


async def test_what_the_environment_says_does_not_count(networked: Networked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "disable")
    assert await encrypted(networked.url())


async def test_the_insecure_setting_lets_through_what_the_url_says(networked: Networked) -> None:
    assert not await encrypted(Insecure(networked.url(sslmode="disable")))
