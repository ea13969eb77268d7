"""Nothing that an aggregator says or does ends a party's node: it is waited out. What the party finds out about itself
does: its certificate, its kit, its ledger, and an aggregator that never fitted to a kit that none ever accepted."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import grpc
import pytest

from src.aggregator.servicers.federation import ROLES, SERVICE
from src.communication import validity
from src.communication.generated import federation_pb2, federation_pb2_grpc
from src.communication.grpc_server import GrpcServer
from src.communication.tls import TlsFiles
from src.errors import (
    CATALOGUE,
    ConfigError,
    InvalidInput,
    KeyMaterialError,
    LedgerError,
    SignatureError,
    SottoError,
    StorageError,
    StorageFullError,
    UnavailableError,
    VersionError,
)
from src.party import home as home_module
from src.party import standing
from src.party.rounds import ROOM_BYTES, RoundWorker
from src.party.standing import TROUBLED, Away, Patience, is_trouble
from src.protocol.plan import PROTOCOL_VERSION
from src.storage.heads import HEADS_KEPT
from tests.rejections.cheating import PATIENCE_S, CheatingAggregator, Meeting, PartyA, contribute_to

ALL: Final = sorted(CATALOGUE, key=lambda cls: cls.__name__)
TROUBLES: Final = [cls for cls in ALL if issubclass(cls, TROUBLED) or cls is SottoError]
OTHERS: Final = [cls for cls in ALL if cls not in TROUBLES]
Raise = Callable[[Any], Awaitable[None]]


def raising(error: Exception) -> Raise:
    async def step(_context: Any) -> None:
        raise error

    return step


def aborting(code: grpc.StatusCode) -> Raise:
    """As a server does it that is not ours."""

    async def step(context: Any) -> None:
        await context.abort(code, "no")

    return step


class Failing(CheatingAggregator):
    """Fails as it is told to, call by call, and then does what it should."""

    def __init__(self, kits: Path, state: Path) -> None:
        super().__init__(kits, state)
        self.failures: dict[str, list[Raise]] = {}
        self.calls: list[str] = []
        self.lies: list[Callable[[federation_pb2.JoinResponse], None]] = []

    async def _fail(self, method: str, context: Any) -> None:
        self.calls.append(method)
        if self.failures.get(method):
            await self.failures[method].pop(0)(context)

    async def Join(self, request: Any, context: Any) -> federation_pb2.JoinResponse:
        await self._fail("Join", context)
        answer = await super().Join(request, context)
        if self.lies:
            self.lies.pop(0)(answer)
        return answer

    async def StreamAssignments(self, request: Any, context: Any) -> AsyncIterator[federation_pb2.Assignment]:
        await self._fail("StreamAssignments", context)
        async for assignment in super().StreamAssignments(request, context):
            yield assignment

    async def DownloadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._fail("DownloadModel", context)
        async for chunk in super().DownloadModel(request, context):
            yield chunk

    async def AwaitQuorum(self, request: Any, context: Any) -> federation_pb2.AwaitQuorumResponse:
        return federation_pb2.AwaitQuorumResponse(reached=True)

    async def CommitRoot(self, request: Any, context: Any) -> federation_pb2.CommitRootResponse:
        await self._fail("CommitRoot", context)
        return await super().CommitRoot(request, context)

    async def UploadUpdate(self, request_iterator: Any, context: Any) -> federation_pb2.UploadUpdateResponse:
        await self._fail("UploadUpdate", context)
        return await super().UploadUpdate(request_iterator, context)

    async def DownloadContribution(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._fail("DownloadContribution", context)
        async for chunk in super().DownloadContribution(request, context):
            yield chunk

    async def UploadShares(self, request_iterator: Any, context: Any) -> federation_pb2.UploadSharesResponse:
        await self._fail("UploadShares", context)
        return await super().UploadShares(request_iterator, context)

    async def ReportFailure(self, request: Any, context: Any) -> federation_pb2.ReportFailureResponse:
        await self._fail("ReportFailure", context)
        return await super().ReportFailure(request, context)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(standing, "LONGEST_PAUSE_S", 0.02)


@pytest.fixture
async def them(kits: Path, tmp_path: Path) -> AsyncIterator[Failing]:
    """An aggregator that nobody has met yet, at `address`."""
    them = Failing(kits, tmp_path)
    tls = kits / "aggregator" / "tls"
    server = GrpcServer(
        listen="127.0.0.1:0",
        tls=TlsFiles(tls / "cert.pem", tls / "key.pem", tls / "ca.pem"),
        insecure=False,
        federation="demo",
        roles=ROLES,
    )
    server.add(federation_pb2_grpc.add_FederationServiceServicer_to_server, them, SERVICE)
    them.address = f"127.0.0.1:{await server.start()}"  # type: ignore[attr-defined]
    yield them
    await server.stop(0)


@pytest.fixture
async def a(kits: Path, tmp_path: Path, them: Any) -> AsyncIterator[PartyA]:
    """The real node of party a, not started yet, on a copy of its kit."""
    own = tmp_path / "kits"
    shutil.copytree(kits / "party-a", own / "party-a")
    a = PartyA(own, tmp_path / "state", them.address)
    them.settled = a.idle
    yield a
    if hasattr(a, "_task"):
        await a.stop()


async def met(them: Failing, a: PartyA) -> Meeting:
    """They have worked together."""
    await a.start()
    meeting = Meeting(them, a)
    await meeting.committed(number=1)
    return meeting


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what happens is the node's, which has no event to show
            await asyncio.sleep(0.005)


async def again(a: PartyA) -> None:
    """The stream breaks, and the node joins anew."""
    await a.stop()
    await a.start()


async def ending(a: PartyA) -> BaseException:
    async with asyncio.timeout(PATIENCE_S):
        (error,) = await asyncio.gather(a._task, return_exceptions=True)
    assert isinstance(error, BaseException)
    return error


# --- joining ----------------------------------------------------------------------------------------------------------


CODES: Final = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("method", ["Join", "StreamAssignments"])
async def test_whatever_reason_an_aggregator_gives_a_party_asks_again(them: Failing, a: PartyA, method: str) -> None:
    """Every error of the catalogue, and every status of gRPC without one: to a party that it has never met."""
    refusals = [*(raising(cls("a text that says nothing")) for cls in ALL), *map(aborting, CODES)]
    them.failures = {method: list(refusals)}
    await a.start()
    round_ = them.plan(1)
    answer = await them.ask_contribute(round_)
    assert answer.kind == "root", answer
    assert not them.failures[method], "the node ended before all of them were tried"
    assert them.calls.count(method) == len(refusals) + 1
    assert not a._task.done()


def changed(**fields: Any) -> Callable[[federation_pb2.JoinResponse], None]:
    def lie(answer: federation_pb2.JoinResponse) -> None:
        for name, value in fields.items():
            answer.ClearField(name)  # type: ignore[arg-type]  # a field's name
            if isinstance(value, list):
                getattr(answer, name).extend(value)
            else:
                setattr(answer, name, value)

    return lie


HEAD: Final = federation_pb2.LedgerHead(digest="0" * 64, round=federation_pb2.RoundName(job_id="job", round=1))
MALFORMED: Final = {
    "nothing": lambda answer: answer.Clear(),
    "a public key that is no JSON": changed(public_key=b"\xff"),
    "a public key that is another thing": changed(public_key=b'{"kind":"public-key","version":1}'),
    "a public key deeper than any": changed(public_key=b"[" * 100_000),
    "no heartbeat": changed(heartbeat_interval_s=0.0),
    "a heartbeat that was": changed(heartbeat_interval_s=-1.0),
    "a heartbeat that never comes": changed(heartbeat_interval_s=math.inf),
    "a heartbeat that is no number": changed(heartbeat_interval_s=math.nan),
    "a head that is none": changed(party_ledger=[federation_pb2.LedgerHead(digest="x")]),
    "more heads than anybody keeps": changed(party_ledger=[HEAD] * (HEADS_KEPT + 1)),
}
NEXT_MAJOR: Final = str(int(PROTOCOL_VERSION.partition(".")[0]) + 1)
MISFITS: Final = {
    "another protocol": (VersionError, changed(protocol_version=f"{NEXT_MAJOR}.0")),
    "another federation": (KeyMaterialError, changed(federation="other")),
    "another custody": (SottoError, changed(custody="aggregator")),
    "another verification key": (KeyMaterialError, changed(aggregator_verify_key=bytes(32))),
}


async def test_no_answer_ends_the_node_of_a_party_that_was_accepted_once(them: Failing, a: PartyA) -> None:
    """Malformed ones, and ones that do not fit the kit: it was accepted with it before, so it is not the kit."""
    await met(them, a)
    them.lies = [*MALFORMED.values(), *(lie for _, lie in MISFITS.values())]
    number = len(them.lies)
    before = len(them.joined)
    await again(a)
    answer = await them.ask_contribute(them.plan(2))
    assert answer.kind == "root", answer
    assert len(them.joined) - before == number + 1


@pytest.mark.parametrize("name", MALFORMED)
async def test_an_answer_that_is_malformed_ends_no_node_at_all(them: Failing, a: PartyA, name: str) -> None:
    them.lies = [MALFORMED[name]]
    await a.start()
    assert (await them.ask_contribute(them.plan(1))).kind == "root"
    assert len(them.joined) == 2


@pytest.mark.parametrize("name", MISFITS)
async def test_an_aggregator_that_never_fitted_ends_the_node_of_a_kit_that_none_accepted(
    them: Failing, a: PartyA, name: str
) -> None:
    error, lie = MISFITS[name]
    them.lies = [lie]
    await a.start()
    found = await ending(a)
    assert isinstance(found, error)
    assert not found.remote  # type: ignore[attr-defined]  # one of ours


@pytest.mark.parametrize(
    "refusal",
    [
        VersionError("another one", protocol=NEXT_MAJOR),
        KeyMaterialError("another key", key_id="0" * 32),
        KeyMaterialError("another roster", roster_digest="0" * 64),
        SignatureError("another signature", verify_key="0" * 64),
    ],
    ids=lambda error: error.message,
)
async def test_a_refusal_ends_a_node_only_if_what_it_says_of_the_aggregator_does_not_fit_and_none_ever_did(
    them: Failing, a: PartyA, refusal: SottoError
) -> None:
    them.failures = {"Join": [raising(refusal)]}
    await a.start()
    found = await ending(a)
    assert (type(found), str(found)) == (type(refusal), refusal.message)
    await a._database.close()

    await met(them, a)  # the kit was right after all
    them.failures = {"Join": [raising(refusal)]}
    await again(a)
    assert (await them.ask_contribute(them.plan(2))).kind == "root"


async def test_a_refusal_that_says_what_the_party_has_itself_ends_nothing(them: Failing, a: PartyA) -> None:
    fits = a_fingerprint(a)
    refusal = KeyMaterialError("you have another", key_id=fits["key_id"], roster_digest=fits["roster_digest"])
    them.failures = {"Join": [raising(refusal), raising(SignatureError("no", verify_key=fits["verify_key"]))]}
    await a.start()
    assert (await them.ask_contribute(them.plan(1))).kind == "root"


def a_fingerprint(a: PartyA) -> dict[str, str]:
    return home_module.Home(a.config).fingerprint()


# --- what the party finds out about itself ----------------------------------------------------------------------------


async def test_who_is_told_that_its_ledger_is_damaged_looks_and_ends_only_if_it_is(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch
) -> None:
    await met(them, a)
    claim = raising(LedgerError("the ledger of party a is damaged"))
    them.failures = {"Join": [claim]}
    await again(a)
    assert (await them.ask_contribute(them.plan(2))).kind == "root"

    def broken(*_: Any) -> None:
        raise LedgerError("ledger entry 1: its digest is wrong")

    them.failures = {"Join": [claim]}
    await a.stop()
    await a.start()
    monkeypatch.setattr(a._node._accounts, "verify", broken)
    found = await ending(a)
    assert str(found) == "ledger entry 1: its digest is wrong"


async def test_a_certificate_that_has_expired_ends_the_node_whatever_is_in_the_way_of_its_use(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch
) -> None:
    await met(them, a)
    them.failures = {"Join": [raising(UnavailableError("gone"))] * 1000}
    await again(a)
    await until(lambda: them.calls.count("Join") > 5)
    assert not a._task.done()
    monkeypatch.setattr(validity, "clock", lambda: datetime(2050, 1, 2, tzinfo=UTC))
    found = await ending(a)
    assert isinstance(found, ConfigError)
    assert "the certificate of party/a of demo held until" in str(found)
    assert "this machine's clock says 2050-01-02 00:00 UTC" in str(found)


async def test_a_kit_whose_files_are_being_replaced_is_looked_at_twice(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment a key may not be its certificate's; one that stays so ends the node."""
    await met(them, a)
    tls = a.config.server.tls
    assert tls is not None
    whole = tls.key.read_bytes()
    monkeypatch.setattr(standing, "LONGEST_PAUSE_S", 0.2)  # long enough to put it right between two looks
    monkeypatch.setattr(standing, "FIRST_PAUSE_S", 0.2)
    them.failures = {"Join": [raising(UnavailableError("gone"))] * 3}
    await again(a)
    await until(lambda: them.calls.count("Join") > 2)
    tls.key.write_bytes(b"half")
    await until(lambda: a._node._away.suspected)
    tls.key.write_bytes(whole)
    assert (await them.ask_contribute(them.plan(2))).kind == "root"

    them.failures = {"StreamAssignments": [raising(UnavailableError("gone"))], "Join": them.failures["Join"]}
    await again(a)
    tls.key.write_bytes(b"half")
    found = await ending(a)
    assert isinstance(found, ConfigError)
    assert "tls.key" in str(found)
    tls.key.write_bytes(whole)


async def test_a_party_whose_own_disk_fails_for_a_moment_goes_on(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch
) -> None:
    await met(them, a)
    run = a._database.run
    failures = iter([StorageError("the database party.sqlite failed: disk I/O error")] * 3)

    async def failing(work: Any) -> Any:
        for failure in failures:
            raise failure
        return await run(work)

    await a.stop()
    await a.start()
    monkeypatch.setattr(a._node._database, "run", failing)
    run = type(a._database).run.__get__(a._database)
    them._work.put_nowait(federation_pb2.Assignment())  # wakes nobody: what it asks for is not known here
    answer = await them.ask_contribute(them.plan(2))
    assert answer.kind == "root"
    assert not a._task.done()


async def test_a_party_that_cannot_write_stays_away_until_it_can_and_says_so_once(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await met(them, a)
    tries: list[int] = []

    def full(_: object) -> None:
        tries.append(len(tries))
        if len(tries) <= 5:
            raise StorageFullError("a blob cannot be stored: No space left on device")

    monkeypatch.setattr(RoundWorker, "check_room", full)
    before = len(them.joined)
    await again(a)
    assert (await them.ask_contribute(them.plan(2))).kind == "root"
    assert (len(tries), len(them.joined)) == (6, before + 1)
    assert caplog.text.count("stays away as long as it cannot write") <= 1


@pytest.mark.parametrize(
    "error",
    [
        StorageFullError("the database party.sqlite failed: database or disk is full"),
        UnavailableError("the database party.sqlite failed: database is locked"),
    ],
    ids=["full", "locked by another process"],
)
async def test_a_round_whose_work_meets_a_disk_that_fails_for_a_moment_is_done_after_it(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch, error: SottoError
) -> None:
    """It was reported as failed, and the next one met the same: all spare rounds went in half a second."""
    await met(them, a)
    begin, times = RoundWorker._begin, iter(range(4))

    def full(self: RoundWorker, *args: Any) -> Any:
        if next(times, None) is not None:
            raise error
        return begin(self, *args)

    monkeypatch.setattr(RoundWorker, "_begin", full)
    assert (await them.ask_contribute(them.plan(2))).kind == "root"
    assert them.came("failure") == []


# --- the work of a round ----------------------------------------------------------------------------------------------


async def contribute(meeting: Meeting) -> str:
    return (await meeting.them.ask_contribute(meeting.them.plan(2))).kind


async def reveal(meeting: Meeting) -> str:
    round_ = await meeting.committed(number=2)
    return (await meeting.them.ask_reveal(round_, meeting.them.freeze(round_))).kind


async def open_(meeting: Meeting) -> str:
    round_, listed = await meeting.delivered(number=2)
    opening = meeting.them.opening(round_, listed)
    return (await meeting.them.ask_open(round_, listed, opening)).kind


STEPS: Final = [
    ("DownloadModel", contribute, "root"),
    ("CommitRoot", contribute, "root"),
    ("UploadUpdate", reveal, "upload"),
    ("DownloadContribution", open_, "shares"),
    ("UploadShares", open_, "shares"),
]


@pytest.mark.parametrize(("method", "work", "kind"), STEPS, ids=[method for method, _, _ in STEPS])
async def test_work_that_an_aggregator_in_trouble_interrupts_is_done_again_and_not_given_up(
    them: Any, a: PartyA, method: str, work: Callable[[Meeting], Awaitable[str]], kind: str
) -> None:
    """Its disk, its workers, its bugs are not the round's: nothing is reported as the party's failure."""
    meeting = await met(them, a)
    them.failures = {method: [raising(cls("not now")) for cls in TROUBLES]}
    assert await work(meeting) == kind
    assert not them.failures[method]
    assert them.came("failure") == []
    assert not a._task.done()


@pytest.mark.parametrize(("method", "work", "kind"), STEPS, ids=[method for method, _, _ in STEPS])
async def test_work_that_is_refused_for_a_reason_of_its_own_is_reported_and_ends_no_node(
    them: Any, a: PartyA, method: str, work: Callable[[Meeting], Awaitable[str]], kind: str
) -> None:
    meeting = await met(them, a)
    # More than once: gRPC may say of a refusal that met a half-sent upload only that the call failed, which is trouble.
    them.failures = {method: [raising(InvalidInput("not so"))] * 9}
    assert await work(meeting) == "failure"
    assert them.came("failure")[-1][1] == "INVALID_INPUT"
    assert not a._task.done()


async def test_every_other_reason_for_which_a_root_is_refused_is_reported_once(them: Any, a: PartyA) -> None:
    await met(them, a)
    for number, cls in enumerate(OTHERS, start=2):
        them.failures = {"CommitRoot": [raising(cls("no"))]}
        answer = await them.ask_contribute(them.plan_of_another_job(f"job-{number}"))
        assert (answer.kind, answer.what) == ("failure", ("contribute", CATALOGUE[cls].reason))
    assert not a._task.done()


async def test_a_report_that_cannot_be_delivered_now_is_delivered_later(them: Any, a: PartyA) -> None:
    await met(them, a)
    them.failures = {"ReportFailure": [raising(cls("not now")) for cls in TROUBLES]}
    answer = await them.ask_contribute(them.plan(2, federation="other"))
    assert answer.kind == "failure"


async def test_a_round_that_ends_ends_what_is_tried_again_for_it(them: Any, a: PartyA) -> None:
    meeting = await met(them, a)
    round_ = them.plan(2)
    them.failures = {"CommitRoot": [raising(StorageError("full"))] * 100_000}
    await them.tell(round_.name, contribute=contribute_to(round_))
    await until(lambda: them.calls.count("CommitRoot") > 3)
    await them.tell(round_.name, ended=federation_pb2.RoundEnded(state="FAILED"))
    await until(lambda: not meeting.a._node._tasks)
    calls = them.calls.count("CommitRoot")
    them.failures = {}
    assert (await them.ask_contribute(them.plan(3))).kind == "root"
    assert them.calls.count("CommitRoot") == calls + 1


# --- how it waits -----------------------------------------------------------------------------------------------------


def test_pauses_grow_are_bounded_and_never_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(standing, "LONGEST_PAUSE_S", 10.0)
    for _ in range(50):
        patience = Patience()
        for base in (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0):
            assert base / 2 <= patience.next_s() <= base * 1.5
    assert len({Patience().next_s() for _ in range(100)}) > 50
    patience.reset()
    assert patience.next_s() <= 0.3


@pytest.fixture
def away(caplog: pytest.LogCaptureFixture) -> tuple[Away, list[float], Callable[[], list[str]]]:
    """An aggregator's absence, a clock to turn, and the lines that were logged."""
    now = [1000.0]
    caplog.set_level(logging.INFO, logger="sotto.party")
    return Away(lambda: now[0]), now, lambda: [record.getMessage() for record in caplog.records]


def remote(error: SottoError) -> SottoError:
    error.remote = True
    return error


def test_why_an_aggregator_is_away_is_said_once_until_it_changes(away: Any) -> None:
    absence, now, lines = away
    for port in range(100):
        absence.note(remote(UnavailableError(f"127.0.0.1:1 cannot be reached from port {port}")))
        now[0] += 0.5
    assert len(lines()) == 1
    for _ in range(100):
        absence.note(remote(StorageError("the disk is full")))
        now[0] += 5
    absence.note(remote(InvalidInput("not you")))
    absence.note(remote(InvalidInput("not you")))
    assert [line.partition(":")[0] for line in lines()[1:]] == [
        "waiting for the aggregator, which is in trouble",
        "the aggregator does not take this party, which asks it again",
    ]
    assert lines()[2].endswith("not you [INVALID_INPUT]")
    absence.over()
    assert lines()[-1] == "the aggregator is back after 550 s"
    absence.note(remote(UnavailableError("gone")))
    now[0] += 2
    absence.note(remote(UnavailableError("gone")))
    assert len(lines()) == 5


def test_a_restart_is_not_worth_a_line(away: Any) -> None:
    absence, now, lines = away
    absence.note(remote(UnavailableError("gone")))
    now[0] += 0.5
    absence.note(remote(UnavailableError("gone")))
    absence.over()
    assert lines() == []


def test_trouble_is_the_aggregator_s_and_never_what_the_party_found_itself() -> None:
    for cls in ALL:
        assert not is_trouble(cls("x"))
        assert is_trouble(remote(cls("x"))) == (cls in TROUBLES)
    assert not is_trouble(ValueError("x"))
    assert {CATALOGUE[cls].reason for cls in TROUBLES} == {
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "INTERNAL",
        "LEASE_LOST",
        "LEDGER_DAMAGED",
        "STORAGE_DAMAGED",
        "STORAGE_FULL",
        "TOO_MANY_CALLS",
        "UNAVAILABLE",
        "WORKER_FAILED",
    }


async def test_without_room_for_an_update_nothing_is_computed_and_nothing_paid_until_there_is(
    them: Failing, a: PartyA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round was charged, and failed as its update was written: all spare rounds went in seconds."""
    await met(them, a)
    paid, begun, refused = len(await a.charges()), list(a.pool.begun), []

    def usage(_path: object) -> SimpleNamespace:
        refused.append(list(a.pool.begun))
        return SimpleNamespace(free=ROOM_BYTES if len(refused) < 4 else 10 * ROOM_BYTES)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert (await them.ask_contribute(them.plan(2))).kind == "root"
    assert them.came("failure") == []
    assert refused == [begun] * 4
    assert (await a.charges())[paid:] == ["final", "final"]
