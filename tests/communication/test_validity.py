"""Certificates that do not hold now: each end says whose, until when, and what its clock says; and says so in time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
import trustme
from cryptography import x509

from src.communication import validity
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.tls import TlsFiles
from src.communication.validity import ends_soon, out_of_time
from src.errors import ConfigError, SottoError, UnavailableError
from src.provisioning.certificates import VALID_DAYS, Authority

NOW: Final = datetime.now(UTC)
DAY: Final = timedelta(days=1)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validity, "_probed", {})


def at(monkeypatch: pytest.MonkeyPatch, when: datetime) -> None:
    monkeypatch.setattr(validity, "clock", lambda: when)


def a_party(made: datetime) -> bytes:
    return Authority("demo", now=made).client("party", "a").pem


def written(folder: Path, ca: trustme.CA, name: str, begins: datetime, ends: datetime) -> TlsFiles:
    leaf = ca.issue_cert("localhost", "127.0.0.1", common_name=name, not_before=begins, not_after=ends)
    folder.mkdir(exist_ok=True)
    files = TlsFiles(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")
    leaf.cert_chain_pems[0].write_to_path(str(files.certificate))
    leaf.private_key_pem.write_to_path(str(files.key))
    ca.cert_pem.write_to_path(str(files.ca))
    return files


# --- the sentence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1970, 1999, 2026, 2049, 2050, 2051, 2100])
def test_the_times_read_are_those_that_the_library_reads(year: int) -> None:
    """Years from 2050 on are written in another way."""
    pem = Authority("demo", now=datetime(year, 3, 4, 5, 6, 7, tzinfo=UTC)).certificate.pem
    (der,) = validity._certificates(pem)
    found = x509.load_der_x509_certificate(der)
    assert validity._period(der) == (found.not_valid_before_utc, found.not_valid_after_utc)


def test_of_a_certificate_that_has_ended_or_not_begun_is_said_whose_until_when_and_what_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = datetime(2026, 1, 1, 12, tzinfo=UTC)
    pem = a_party(made)
    at(monkeypatch, made + 900 * DAY)
    assert out_of_time(pem) == (
        "the certificate of party/a of demo held until 2028-04-05 11:00 UTC, and this machine's clock says "
        "2028-06-19 12:00 UTC: ask for a new one"
    )
    at(monkeypatch, made - DAY)
    assert out_of_time(pem) == (
        "the certificate of party/a of demo holds from 2026-01-01 11:00 UTC on, and this machine's clock says "
        "2025-12-31 12:00 UTC: is the clock right?"
    )
    at(monkeypatch, made)
    assert out_of_time(pem) == ""


def test_a_chain_holds_for_as_long_as_each_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    young, old = a_party(NOW), a_party(NOW - (VALID_DAYS - 1) * DAY)
    assert "in time" in ends_soon(young + old)
    at(monkeypatch, NOW + 2 * DAY)
    assert "held until" in out_of_time(young + old)


@pytest.mark.parametrize(("days", "said"), [(100, False), (61, False), (59, True), (1, True), (-1, False)])
def test_sixty_days_before_its_end_a_certificate_is_named(
    monkeypatch: pytest.MonkeyPatch, days: int, said: bool
) -> None:
    pem = a_party(NOW)
    at(monkeypatch, NOW + VALID_DAYS * DAY - days * DAY)
    assert bool(ends_soon(pem)) is said


# --- both ends --------------------------------------------------------------------------------------------------------

PERIODS: Final = {
    "ended": (NOW - 3 * DAY, NOW - DAY, "held until"),
    "not begun": (NOW + DAY, NOW + 3 * DAY, "holds from"),
}


@pytest.mark.parametrize("why", PERIODS)
@pytest.mark.parametrize("role", ["client", "server"])
async def test_nobody_begins_with_a_certificate_of_its_own_that_does_not_hold(
    tmp_path: Path, why: str, role: str
) -> None:
    begins, ends, words = PERIODS[why]
    files = written(tmp_path, trustme.CA(), "me", begins, ends)

    async def begin() -> None:
        if role == "client":
            connect("127.0.0.1:1", tls=files)
        else:
            await server(files).start()

    with pytest.raises(ConfigError, match=rf"tls\.certificate: the certificate of .*me.* {words} .*clock says"):
        await begin()


def server(files: TlsFiles) -> GrpcServer:
    return GrpcServer(listen="127.0.0.1:0", tls=files, insecure=False, federation="demo", roles={})


@pytest.mark.parametrize("why", PERIODS)
async def test_a_server_whose_certificate_does_not_hold_is_named_by_who_dials_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    begins, ends, words = PERIODS[why]
    ca = trustme.CA()
    theirs = written(tmp_path, ca, "aggregator", begins, ends)
    mine = written(tmp_path, ca, "me", NOW - DAY, NOW + DAY)
    error = await refused(monkeypatch, theirs, mine, begins + DAY)
    assert isinstance(error, UnavailableError)
    assert "CN=aggregator" in str(error)
    assert words in str(error)
    assert "clock says" in str(error)


async def test_whose_certificate_the_other_ends_clock_refuses_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own clock it holds: it is told that the clocks differ."""
    ca = trustme.CA()
    theirs = written(tmp_path, ca, "aggregator", NOW - 3 * DAY, NOW + DAY)
    mine = written(tmp_path, ca, "me", NOW - 3 * DAY, NOW - DAY)
    error = await refused(monkeypatch, theirs, mine, NOW - 2 * DAY, until_the_end=True)
    assert "hangs up when it is shown the certificate of CN=me" in str(error)
    assert "this machine's clock says" in str(error)
    assert "its clock says otherwise" in str(error)


async def refused(
    monkeypatch: pytest.MonkeyPatch, theirs: TlsFiles, mine: TlsFiles, then: datetime, *, until_the_end: bool = False
) -> SottoError:
    """What a call to a server raises whose own clock, when it began, said `then`."""
    now = validity.clock
    at(monkeypatch, then)
    served = server(theirs)
    port = await served.start()
    if not until_the_end:
        monkeypatch.setattr(validity, "clock", now)
    try:
        async with connect(f"127.0.0.1:{port}", tls=mine) as channel:
            with pytest.raises(SottoError) as caught:
                await jobs_pb2_grpc.JobServiceStub(channel).GetStatus(jobs_pb2.GetStatusRequest())
    finally:
        await served.stop(0)
    return caught.value
