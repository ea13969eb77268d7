"""Uploads and downloads of a round at the real aggregator: one upload a party, nothing held for who only begins, and no
stream outlives what it is for. Whoever goes over a limit is told; what the others do counts as if nothing had been."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from src.aggregator.round_row import RoundState
from src.communication.generated import federation_pb2, jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.messages import signed_to_proto
from src.errors import AbandonedError, BusyError, CiphertextError, InvalidInput, SottoError, StateError
from src.protocol.plan import SHARES_KIND
from tests.rejections.scripted import PATIENCE_S, House, Opened, Part, ScriptedParty

pytestmark = pytest.mark.asyncio(loop_scope="module")

Update = federation_pb2.UploadUpdateRequest
Share = federation_pb2.UploadSharesRequest
MANY: Final = 150
"""More than twice what one caller may have open at a time."""


class Sending:
    """An upload whose messages the test sends one by one."""

    def __init__(self, call: Callable[[AsyncIterator[Any]], Any], *messages: Any) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        for message in messages:
            self.send(message)
        self.answer = asyncio.ensure_future(self._call(call))
        self.answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    def send(self, message: Any) -> None:
        """None: no further one comes."""
        self._messages.put_nowait(message)

    async def _call(self, call: Callable[[AsyncIterator[Any]], Any]) -> bool:
        return bool((await call(self._each())).accepted)

    async def _each(self) -> AsyncIterator[Any]:
        while (message := await self._messages.get()) is not None:
            yield message

    async def error(self) -> BaseException:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait({self.answer})
        error = self.answer.exception()
        assert error is not None, "it was accepted"
        return error


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what happens is the aggregator's, which has no event to show
            await asyncio.sleep(0.01)


def incoming(house: House) -> set[str]:
    """What lies half in the blob store."""
    return {name for name in house.files() if name.startswith(".incoming")}


def descriptors() -> int:
    """How many this process, which the aggregator runs in, has open."""
    return len(list(Path("/dev/fd").iterdir()))


def receiving(house: House) -> int:
    """Uploads that the aggregator is taking now."""
    return len(house.app._sessions.flows._receiving)


@contextlib.asynccontextmanager
async def collecting(house: House) -> AsyncIterator[tuple[str, dict[str, ScriptedParty], dict[str, Part]]]:
    """a, b and c have committed, and are asked to upload."""
    async with house.job() as (job_id, parties):
        parts = {name: await parties[name].contribute() for name in "abc"}
        for name in "abc":
            await parties[name].wanted("reveal")
        yield job_id, parties, parts


@contextlib.asynccontextmanager
async def opening(house: House) -> AsyncIterator[tuple[str, dict[str, ScriptedParty], Opened, str]]:
    """Everybody has delivered; a holder is asked for a share that it does not send: (…, what it saw, its name)."""
    async with collecting(house) as (job_id, parties, parts):
        for name in "abc":
            assert await parties[name].upload(parts[name])
        asked = [asyncio.ensure_future(party.wanted("open")) for party in parties.values()]
        (first, *_), others = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for each in others:
            each.cancel()
        name = next(name for name, each in zip(parties, asked, strict=True) if each is first)
        yield job_id, parties, await parties[name].look(first.result()), name


def share_header(party: ScriptedParty, seen: Opened) -> Any:
    from hashlib import sha256

    statement = {
        "plan": seen.digest,
        "aggregate_root": seen.statement.aggregate_root,
        "party": party.name,
        "sha256": sha256(seen.share).hexdigest(),
        "bytes": len(seen.share),
    }
    signed = party.key.sign(SHARES_KIND, statement, signer=party.name)
    return Share(header=federation_pb2.SharesHeader(round=seen.name, shares=signed_to_proto(signed)))


# --- one upload a party -----------------------------------------------------------------------------------------------


async def test_of_many_uploads_that_only_begin_one_stays_and_none_holds_a_file(house: House) -> None:
    """The others of that party end, each with a reason; all other parties deliver, and so does its last one."""
    async with collecting(house) as (_, parties, parts):
        c, before = parties["c"], house.files()
        before_it = descriptors()
        uploads = [Sending(c.stub.UploadUpdate, c.header(parts["c"])) for _ in range(MANY)]
        await until(lambda: sum(not each.answer.done() for each in uploads) == 1)
        assert receiving(house) == 1
        errors = {type(each.answer.exception()) for each in uploads if each.answer.done()}
        assert errors <= {AbandonedError, BusyError}
        assert AbandonedError in errors
        assert house.files() == before
        assert descriptors() < before_it + 10
        for name in "ab":
            assert await parties[name].upload(parts[name])
        (left,) = [each for each in uploads if not each.answer.done()]
        left.send(Update(body=parts["c"].body))
        left.send(None)
        assert await left.answer
        assert set((await house.row(parts["a"].name)).batches) == {"a", "b", "c"}


async def test_a_newer_upload_ends_one_that_is_half_there_and_counts_itself(house: House) -> None:
    async with collecting(house) as (_, parties, parts):
        c, part = parties["c"], parts["c"]
        older = Sending(c.stub.UploadUpdate, c.header(part), Update(body=part.body[:100]))
        await until(lambda: incoming(house))
        assert await c.upload(part)
        error = await older.error()
        assert isinstance(error, AbandonedError)
        assert "a newer upload of c in round 1" in error.message
        assert not incoming(house)
        row = await house.row(part.name)
        assert set(row.batches) == {"c"}
        assert row.failures == {}


async def test_an_upload_that_is_refused_ends_no_older_one(house: House) -> None:
    async with collecting(house) as (_, parties, parts):
        c, part = parties["c"], parts["c"]
        older = Sending(c.stub.UploadUpdate, c.header(part), Update(body=part.body[:100]))
        await until(lambda: incoming(house))
        with pytest.raises(SottoError):
            await c.upload(part, root=c.another_root(part))
        older.send(Update(body=part.body[100:]))
        older.send(None)
        assert await older.answer


async def test_uploads_of_two_parties_do_not_disturb_each_other(house: House) -> None:
    async with collecting(house) as (_, parties, parts):
        both = [
            Sending(parties[name].stub.UploadUpdate, parties[name].header(parts[name]), Update(body=parts[name].body))
            for name in "ab"
        ]
        await until(lambda: receiving(house) == 2)
        for each in both:
            each.send(None)
        assert await asyncio.gather(*(each.answer for each in both)) == [True, True]


class Slow:
    """The check of a whole body, held up until the test lets it go on."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on, self.times, self.left = asyncio.Event(), asyncio.Event(), 0, False
        pipeline = house.app._coordinator._pipeline
        check = pipeline.check_body

        async def checking(*arguments: Any) -> None:
            self.times += 1
            self.begun.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.left = True
                raise
            await check(*arguments)

        monkeypatch.setattr(pipeline, "check_body", checking)


@pytest.mark.parametrize("leaves", [False, True])
async def test_an_upload_that_has_all_its_bytes_is_waited_for_by_a_newer_one_whoever_leaves(
    house: House, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """It is checked once, and both are told that it counts: nothing that was accepted is lost, or done twice."""
    async with collecting(house) as (_, parties, parts):
        c, part, slow = parties["c"], parts["c"], Slow(house, monkeypatch)
        older = Sending(c.stub.UploadUpdate, c.header(part), Update(body=part.body), None)
        async with asyncio.timeout(PATIENCE_S):
            await slow.begun.wait()
        newer = Sending(c.stub.UploadUpdate, c.header(part))
        await until(lambda: receiving(house) == 1)
        if leaves:
            older.answer.cancel()
            await asyncio.wait({older.answer})
        slow.go_on.set()
        assert await newer.answer
        assert leaves or await older.answer
        assert slow.times == 1
        assert set((await house.row(part.name)).batches) == {"c"}


async def test_after_one_that_was_not_accepted_the_next_is_judged_anew(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collecting(house) as (_, parties, parts):
        c, part = parties["c"], parts["c"]
        check = house.app._coordinator._pipeline.check_body
        tries = []

        async def once(*arguments: Any) -> None:
            tries.append(arguments)
            if len(tries) == 1:
                raise CiphertextError("not one", index=0)
            await check(*arguments)

        monkeypatch.setattr(house.app._coordinator._pipeline, "check_body", once)
        with pytest.raises(CiphertextError):
            await c.upload(part)
        assert await c.upload(part)
        assert len(tries) == 2


async def test_of_many_shares_that_only_begin_one_stays(house: House) -> None:
    async with opening(house) as (_, parties, seen, name):
        party, before = parties[name], house.files()
        header = share_header(party, seen)
        uploads = [Sending(party.stub.UploadShares, header) for _ in range(MANY)]
        await until(lambda: sum(not each.answer.done() for each in uploads) == 1)
        assert receiving(house) == 1
        assert house.files() == before
        (left,) = [each for each in uploads if not each.answer.done()]
        half = len(seen.share) // 2
        left.send(Share(body=seen.share[:half]))
        await until(lambda: incoming(house))
        assert await party.send_share(seen)
        assert isinstance(await left.error(), AbandonedError)
        assert not incoming(house)


# --- no longer than what it is for ------------------------------------------------------------------------------------


async def test_a_cancelled_job_ends_what_flows_for_it(house: House) -> None:
    async with collecting(house) as (job_id, parties, parts):
        held = [
            Sending(parties["a"].stub.UploadUpdate, parties["a"].header(parts["a"])),
            Sending(parties["b"].stub.UploadUpdate, parties["b"].header(parts["b"]), Update(body=parts["b"].body[:7])),
        ]
        await until(lambda: receiving(house) == 2)
        await until(lambda: incoming(house))
        await house.client.cancel(job_id)
        for each in held:
            error = await each.error()
            assert isinstance(error, StateError)
            assert "CANCELLED" in error.message
        assert not incoming(house)
        assert not house.app._sessions.flows._open


async def test_a_cancelled_job_ends_shares_that_are_half_there(house: House) -> None:
    async with opening(house) as (job_id, parties, seen, name):
        held = Sending(parties[name].stub.UploadShares, share_header(parties[name], seen), Share(body=seen.share[:50]))
        await until(lambda: incoming(house))
        await house.client.cancel(job_id)
        assert isinstance(await held.error(), StateError)
        assert not incoming(house)


async def test_a_cancelled_job_ends_the_check_of_an_upload_that_is_all_there(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes on computing for it, and a worker is free for others."""
    async with collecting(house) as (job_id, parties, parts):
        c, part, slow = parties["c"], parts["c"], Slow(house, monkeypatch)
        upload = Sending(c.stub.UploadUpdate, c.header(part), Update(body=part.body), None)
        async with asyncio.timeout(PATIENCE_S):
            await slow.begun.wait()
        await house.client.cancel(job_id)
        error = await upload.error()
        assert isinstance(error, StateError)
        assert "CANCELLED" in error.message
        await until(lambda: slow.left)
        assert not house.app._sessions.flows._settling


async def test_an_upload_ends_when_its_round_takes_none_any_more(house: House) -> None:
    """Without this party too there is a quorum: it had the time that the round gives, however slowly it sends."""
    async with house.job(quorum=2) as (_, parties):
        parts = {name: await parties[name].contribute() for name in "abc"}
        for name in "ab":
            await parties[name].deliver(parts[name])
        late = Sending(parties["c"].stub.UploadUpdate, parties["c"].header(parts["c"]), Update(body=b"x"))
        await until(lambda: incoming(house))
        key = (parts["c"].name.job_id, parts["c"].name.round)
        trainings = house.app._coordinator.trainings
        row = trainings._recent[key]
        monday = row.started_at + row.timeout_s  # when the round's time is up
        with _clock(house, monday):
            house.app._coordinator.wake()
            error = await late.error()
        assert isinstance(error, StateError)
        assert (await house.row(parts["c"].name)).state is not RoundState.COLLECTING
        assert not incoming(house)


@contextlib.contextmanager
def _clock(house: House, now: float) -> Iterator[None]:
    trainings = house.app._coordinator.trainings
    before = trainings._clock
    trainings._clock = lambda: now
    try:
        yield
    finally:
        trainings._clock = before


@pytest.mark.parametrize("what", ["model", "contribution"])
async def test_what_is_fetched_for_a_round_ends_with_it(
    house: House, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A reader that waits for the next piece is told; and what is over is not begun."""
    from src.aggregator.servicers import federation as servicer
    from src.communication.generated.common_pb2 import DataChunk

    async def endless(*_: Any, **__: Any) -> AsyncIterator[DataChunk]:
        yield DataChunk(data=b"x", total_bytes=2, sha256=bytes(32))
        await asyncio.Event().wait()

    async with opening(house) as (job_id, parties, seen, name):
        monkeypatch.setattr(servicer, "send_blob", endless)

        def fetch() -> Any:
            if what == "model":
                return parties["a"].stub.DownloadModel(federation_pb2.DownloadModelRequest(round=seen.name))
            asked = federation_pb2.DownloadContributionRequest(round=seen.name, contributor="a")
            return parties[name].stub.DownloadContribution(asked)

        call = fetch()
        await call.read()
        rest = asyncio.ensure_future(call.read())
        await house.client.cancel(job_id)
        assert isinstance(await _error(rest), StateError)
        assert isinstance(await _error(fetch().read()), SottoError)
        assert not house.app._sessions.flows._open


async def _error(call: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return (await asyncio.gather(call, return_exceptions=True))[0]


# --- the aggregator's own limits --------------------------------------------------------------------------------------


async def test_what_one_caller_may_have_is_what_the_configuration_says(house: House) -> None:
    """Watches of one scientist, and beside them a party's call and the scientist's own."""
    most = house.app.config.limits.max_streams_per_caller
    async with house.job() as (job_id, parties), connect(house.address, tls=house.scientist_tls) as channel:
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        watches = [stub.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id)) for _ in range(most)]
        for watch in watches:
            await watch.read()
        with pytest.raises(BusyError, match=f"scientist/.* has {most} streams"):
            await stub.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id)).read()
        assert (await stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id))).job_id == job_id
        assert await parties["a"].wanted("contribute")
        for watch in watches:
            watch.cancel()


async def test_ids_are_looked_at_before_anything_else(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the database is asked about what cannot be one."""

    async def never(*_: Any) -> Any:
        raise AssertionError("the database was asked")

    async with house.parties() as parties, connect(house.address, tls=house.scientist_tls) as channel:
        monkeypatch.setattr(house.app._database, "run", never)
        monkeypatch.setattr(house.app._coordinator.trainings, "row", never)
        bad = federation_pb2.RoundName(job_id="a\u202eb\0" * 1000, round=1)
        stub, jobs = parties["a"].stub, jobs_pb2_grpc.JobServiceStub(channel)
        calls: list[Any] = [
            stub.Join(federation_pb2.JoinRequest(key_id="\n" * 1000)),
            stub.StreamAssignments(federation_pb2.StreamAssignmentsRequest(in_hand=[bad])).read(),
            stub.DownloadModel(federation_pb2.DownloadModelRequest(round=bad)).read(),
            stub.CommitRoot(federation_pb2.CommitRootRequest(round=bad)),
            stub.UploadUpdate(iter([Update(header=federation_pb2.UpdateHeader(round=bad))])),
            stub.UploadShares(iter([Share(header=federation_pb2.SharesHeader(round=bad))])),
            stub.DownloadContribution(federation_pb2.DownloadContributionRequest(round=bad)).read(),
            stub.ReportFailure(federation_pb2.ReportFailureRequest(round=bad)),
            jobs.GetJob(jobs_pb2.GetJobRequest(job_id=bad.job_id)),
            jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=bad.job_id)).read(),
            jobs.DownloadArtifact(jobs_pb2.DownloadArtifactRequest(job_id="job", file="../x")).read(),
            jobs.CreateJob(jobs_pb2.CreateJobRequest(request_id="\0")),
        ]
        for call in calls:
            assert type(await _error(call)) is InvalidInput
