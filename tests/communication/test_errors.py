"""An error raised by a servicer arrives as the same error; what nobody raised on purpose arrives as a number."""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from src import logs
from src.communication.errors import DETAILS_KEY, MAX_STATUS_BYTES, from_rpc_error, from_status, to_status
from src.communication.generated import federation_pb2, federation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from src.communication.identity import Identity
from src.errors import (
    CATALOGUE,
    AbandonedError,
    BudgetError,
    DeadlineError,
    DigestError,
    InvalidInput,
    LimitError,
    PolicyError,
    Refused,
    SottoError,
    StorageError,
    StorageFullError,
    UnavailableError,
    VersionError,
)

CLASSES = list(CATALOGUE)


def _example(cls: type[SottoError]) -> SottoError:
    more: dict[str, Any] = {"violations": {"job.rounds": "must be ≥ 1"}} if issubclass(cls, InvalidInput) else {}
    return cls("what is wrong, übrigens", private="of private rows", party="a", index=3, **more)


def _same(found: BaseException, sent: SottoError) -> None:
    assert type(found) is type(sent)
    assert isinstance(found, SottoError)
    assert (found.message, found.metadata) == (sent.message, sent.metadata)
    assert found.private == ""
    if isinstance(sent, InvalidInput) and isinstance(found, InvalidInput):
        assert found.violations == sent.violations


@pytest.mark.parametrize("cls", CLASSES)
async def test_every_error_arrives_as_itself_without_its_private_text(
    plain: Any, scientist: grpc.aio.Channel, cls: type[SottoError], caplog: pytest.LogCaptureFixture
) -> None:
    sent = _example(cls)
    plain.behaviour.raises(sent)
    stub = jobs_pb2_grpc.JobServiceStub(scientist)
    with caplog.at_level(logging.INFO, "sotto"), pytest.raises(SottoError) as caught:
        await stub.GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    _same(caught.value, sent)
    cause = caught.value.__cause__
    assert isinstance(cause, grpc.aio.AioRpcError)
    assert cause.code().name == CATALOGUE[cls].status
    assert "private rows" not in repr(cause)
    assert [vars(record)["private"] for record in caplog.records if "private" in vars(record)] == ["of private rows"]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_its_status(cls: type[SottoError]) -> None:
    sent = _example(cls)
    found = from_status(status_pb2.Status.FromString(to_status(sent).SerializeToString()))
    assert found is not None
    _same(found, sent)


class _SpecialBudgetError(BudgetError):
    """Of a class that has no row of its own."""


def test_a_subclass_without_a_row_travels_as_its_nearest_ancestor() -> None:
    assert type(from_status(to_status(_SpecialBudgetError("none left")))) is BudgetError


async def test_the_status_on_the_wire_is_the_richer_error_model(plain: Any, scientist: grpc.aio.Channel) -> None:
    """What a client in another language sees."""
    plain.behaviour.raises(InvalidInput("malformed", violations={"job.rounds": "must be ≥ 1"}, limit=5))
    with pytest.raises(InvalidInput) as caught:
        await jobs_pb2_grpc.JobServiceStub(scientist).GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    cause = caught.value.__cause__
    assert isinstance(cause, grpc.aio.AioRpcError)
    trailers: dict[str, Any] = dict(cause.trailing_metadata())  # type: ignore[arg-type]
    status = status_pb2.Status.FromString(trailers[DETAILS_KEY])
    assert (status.code, status.message) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "malformed")
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.reason, info.domain, dict(info.metadata)) == ("INVALID_INPUT", "sotto.v1", {"limit": "5"})
    assert [(each.field, each.description) for each in bad.field_violations] == [("job.rounds", "must be ≥ 1")]


async def test_an_unexpected_exception_shows_only_an_incident_that_the_log_explains(
    plain: Any, scientist: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    plain.behaviour.raises(ZeroDivisionError("row 17 of patients.csv"))
    with pytest.raises(SottoError) as caught:
        await jobs_pb2_grpc.JobServiceStub(scientist).GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    incident = caught.value.metadata["incident"]
    assert type(caught.value) is SottoError
    assert caught.value.message == f"internal error (incident {incident})"
    assert "patients" not in repr(caught.value.__cause__)
    assert [vars(record).get("incident") for record in caplog.records] == [incident]
    assert "row 17 of patients.csv" in caplog.text


async def test_an_error_between_chunks_of_a_stream_is_translated_too(plain: Any, scientist: grpc.aio.Channel) -> None:
    plain.behaviour.after_first = PolicyError("no more", party="a")
    stub = jobs_pb2_grpc.JobServiceStub(scientist)
    chunks = aiter(stub.DownloadArtifact(jobs_pb2.DownloadArtifactRequest(), timeout=60))
    assert (await anext(chunks)).offset == 0
    with pytest.raises(PolicyError, match="no more"):
        await anext(chunks)
    call = stub.DownloadArtifact(jobs_pb2.DownloadArtifactRequest(), timeout=60)
    await call.read()
    with pytest.raises(PolicyError, match="no more"):
        await call.read()


async def test_a_server_that_ends_an_upload_early_says_why(plain: Any, party: grpc.aio.Channel) -> None:
    plain.behaviour.raises(Refused("the round is over"))
    stub = federation_pb2_grpc.FederationServiceStub(party)

    async def endless() -> Any:
        while True:
            yield federation_pb2.UploadUpdateRequest(body=b"x" * 1000)

    async def iterated() -> None:
        await stub.UploadUpdate(endless(), timeout=60)

    async def written() -> None:
        call: Any = stub.UploadUpdate(timeout=60)  # type: ignore[call-arg]  # the stubs know one of the two ways
        while True:
            await call.write(federation_pb2.UploadUpdateRequest(body=b"x" * 1000))

    for upload in (iterated, written):
        for _ in range(20):  # gRPC may lose a status that meets a message on its way; who is told so asks again
            with pytest.raises((Refused, UnavailableError)) as caught:
                await upload()
            if not caught.errisinstance(UnavailableError):
                break
        assert str(caught.value) == "the round is over"


async def test_an_error_in_the_caller_s_own_request_iterator_is_what_the_caller_sees(
    plain: Any, party: grpc.aio.Channel
) -> None:
    async def broken() -> Any:
        yield federation_pb2.UploadUpdateRequest(body=b"x")
        raise DigestError("my own file is damaged")

    with pytest.raises(DigestError, match="my own file"):
        await federation_pb2_grpc.FederationServiceStub(party).UploadUpdate(broken(), timeout=60)


async def test_a_server_that_is_not_there_is_named(open_channel: Any, plain: Any) -> None:
    channel = open_channel("127.0.0.1:1", insecure=True)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 cannot be reached"):
        await jobs_pb2_grpc.JobServiceStub(channel).GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 cannot be reached"):
        async for _ in jobs_pb2_grpc.JobServiceStub(channel).WatchJob(jobs_pb2.WatchJobRequest(), timeout=60):
            pass


async def test_a_deadline_is_a_deadline_error_and_ends_the_servicer_too(
    plain: Any, scientist: grpc.aio.Channel
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    plain.behaviour.act = hang
    timeout_s = 0.1
    while not begun.is_set():  # on a busy machine a call may be over before it arrives
        timeout_s *= 2
        with pytest.raises(DeadlineError, match=f"{plain.address} did not answer in time"):
            await jobs_pb2_grpc.JobServiceStub(scientist).GetJob(jobs_pb2.GetJobRequest(), timeout=timeout_s)
    await asyncio.wait_for(ended.wait(), 60)


async def test_a_method_that_the_server_does_not_have_is_another_version(scientist: grpc.aio.Channel) -> None:
    call = scientist.unary_unary("/sotto.v1.JobService/Fly", lambda text: text, lambda data: data)
    with pytest.raises(VersionError, match="does not know this method"):
        await call(b"", timeout=60)


async def test_bytes_that_are_no_message_are_invalid_input(
    scientist: grpc.aio.Channel, party: grpc.aio.Channel
) -> None:
    unary = scientist.unary_unary("/sotto.v1.JobService/GetJob", lambda data: data, lambda data: data)
    with pytest.raises(InvalidInput, match="not a message of this method"):
        await unary(b"\xff\xff\xff", timeout=60)
    stream = party.stream_unary("/sotto.v1.FederationService/UploadUpdate", lambda data: data, lambda data: data)
    first = federation_pb2.UploadUpdateRequest(body=b"x").SerializeToString()
    with pytest.raises(InvalidInput, match="not a message of this method"):
        await stream(iter([first, b"\xff\xff\xff"]), timeout=60)


async def test_a_message_over_the_limit_is_a_limit_error(
    start_server: Any, open_channel: Any, scientist: grpc.aio.Channel
) -> None:
    small = await start_server(tls=None, insecure=True, max_message_bytes=2000)
    channel = open_channel(small.address, insecure=True, identity=Identity("scientist", "ada"))
    with pytest.raises(LimitError):
        await jobs_pb2_grpc.JobServiceStub(channel).GetJob(jobs_pb2.GetJobRequest(job_id="x" * 3000), timeout=60)


LONG = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(lambda text: text * 40)


@settings(max_examples=40, deadline=None)
@given(
    message=LONG,
    metadata=st.dictionaries(st.sampled_from([f"key_{n}" for n in range(30)]), LONG, max_size=30),
    violations=st.dictionaries(LONG, LONG, max_size=30),
)
def test_a_status_always_fits_into_the_trailers(
    message: str, metadata: dict[str, str], violations: dict[str, str]
) -> None:
    status = to_status(InvalidInput(message, violations=violations, **metadata))
    assert status.ByteSize() <= MAX_STATUS_BYTES
    assert type(from_status(status)) is InvalidInput


async def test_the_largest_status_arrives(plain: Any, scientist: grpc.aio.Channel) -> None:
    violations = {f"parties[{n}]": "é" * 400 for n in range(40)}
    more: dict[str, Any] = {f"key_{n}": "ü" * 400 for n in range(40)}
    plain.behaviour.raises(InvalidInput("ø" * 5000, violations=violations, **more))
    with pytest.raises(InvalidInput, match=r"ø{300}") as caught:
        await jobs_pb2_grpc.JobServiceStub(scientist).GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    assert caught.value.violations["parties[0]"].startswith("é" * 200)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.INTERNAL, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.CANCELLED, AbandonedError),
        (grpc.StatusCode.UNKNOWN, SottoError),
    ],
)
@pytest.mark.parametrize("trailer", [None, b"", b"\xff garbage", status_pb2.Status(code=3).SerializeToString()])
def test_a_status_without_our_details_means_what_its_code_means(
    code: grpc.StatusCode, cls: type[SottoError], trailer: bytes | None
) -> None:
    metadata = grpc.aio.Metadata(*([] if trailer is None else [(DETAILS_KEY, trailer)]))
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="a\nb", debug_error_string=None)
    found = from_rpc_error(error, address="host:1")
    assert type(found) is cls
    assert "host:1" in found.message
    assert "\n" not in found.message


async def test_refusals_of_one_caller_fill_no_log_and_hide_no_other_callers(plain: Any, quiet: None) -> None:
    """As fast as they can, each refusal with another text; also who is not known, or may not call at all."""
    stream = io.StringIO()
    logs.configure(stream=stream)

    async def ask(name: str, count: int, *, identity: str = "") -> None:
        metadata = (("sotto-identity", identity or f"scientist/{name}"),)
        async with grpc.aio.insecure_channel(plain.address) as channel:
            get = jobs_pb2_grpc.JobServiceStub(channel).GetJob
            for number in range(count):
                plain.behaviour.raises(InvalidInput(f"refused for the {number}th time"))
                with pytest.raises(grpc.RpcError):
                    await get(jobs_pb2.GetJobRequest(), metadata=metadata)

    for identity in ("scientist/eve", "party/eve", "eve"):
        before = stream.getvalue().count("\n")
        await ask("", 3 * logs.LINES_AT_ONCE, identity=identity)
        assert stream.getvalue().count("\n") - before < 2 * logs.LINES_AT_ONCE
        assert "causes too many lines" in stream.getvalue().splitlines()[-1]
    await ask("bob", 1)
    assert "refused for the 0th time" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize("cls", [StorageFullError, StorageError])
async def test_what_passes_by_itself_is_one_line_whatever_it_fails_and_what_does_not_is_one_a_call(
    plain: Any, scientist: grpc.aio.Channel, cls: type[SottoError], caplog: pytest.LogCaptureFixture
) -> None:
    stub = jobs_pb2_grpc.JobServiceStub(scientist)
    plain.behaviour.raises(cls("no"))
    for _ in range(5):
        with pytest.raises(cls):
            await stub.GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    said = [each for each in caplog.records if CATALOGUE[cls].reason in each.getMessage()]
    assert len(said) == (1 if cls is StorageFullError else 5)


async def test_a_long_text_of_a_caller_s_becomes_a_short_line_and_a_short_answer(
    plain: Any, scientist: grpc.aio.Channel, quiet: None
) -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)

    huge = "\x9b" * 3_000_000
    plain.behaviour.raises(InvalidInput(f"no job {huge!r}", private=huge, job_id=huge))
    with pytest.raises(InvalidInput) as caught:
        await jobs_pb2_grpc.JobServiceStub(scientist).GetJob(jobs_pb2.GetJobRequest(), timeout=60)
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert len(line) < 3000
    assert len(caught.value.message) < 1000
