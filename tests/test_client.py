"""The client against servers that go away, send half, or lie."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from src.aggregator.servicers.jobs import ROLES, SERVICE
from src.client import AsyncSottoClient, SottoClient, result_of, verify_manifest
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.generated.common_pb2 import DataChunk
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.errors import (
    AbandonedError,
    ConfigError,
    DigestError,
    InvalidInput,
    JobFailed,
    SignatureError,
    SottoError,
    StateError,
    StorageError,
    UnavailableError,
)
from src.jobs.spec import FederatedTrainingSpec
from src.protocol.roster import Roster, save_roster, sign_roster
from src.protocol.signing import SigningKey

ANN = Identity("scientist", "ann")
RETRY_FOR_S = 20.0
AGGREGATOR, OPERATOR, MALLORY = (SigningKey.from_bytes(bytes([n]) * 32) for n in (1, 2, 3))
ROSTER = Roster(
    federation="demo",
    key_id="k",
    custody="aggregator",
    threshold=0,
    colluders=0,
    aggregator_verify_key=AGGREGATOR.verify_key,
    members=(),
    created_at="2025-01-01T00:00:00Z",
)
MODEL = bytes(range(256)) * 40
JOB_ID = "0123456789abcdef"


def make_manifest(
    *, key: SigningKey = AGGREGATOR, signer: str = "aggregator", kind: str = "manifest", **changes: Any
) -> bytes:
    model = {"file": "model.safetensors", "sha256": hashlib.sha256(MODEL).hexdigest(), "bytes": len(MODEL)}
    statement = {"job_id": JOB_ID, "model": model, "rounds": [1, 2], **changes}
    signed = key.sign(kind, statement, signer=signer)
    return json.dumps({"manifest": signed.to_json(), "readable": statement}).encode()


class PlayedService(jobs_pb2_grpc.JobServiceServicer):
    """Answers as the test has it; remembers what was asked."""

    def __init__(self) -> None:
        self.files = {"model.safetensors": MODEL, "manifest.json": make_manifest()}
        self.announced: dict[str, bytes] = {}
        self.breaks = 0
        self.download_breaks = 0
        self.break_after = 10**9
        self.code = grpc.StatusCode.UNAVAILABLE
        self.lie: Callable[[DataChunk], list[DataChunk]] = lambda chunk: [chunk]
        self.asked: list[Any] = []

    async def _break(self, context: Any) -> None:
        self.breaks = max(0, self.breaks - 1)
        await context.abort(self.code, "gone")

    async def CreateJob(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        if self.breaks:
            await self._break(context)
        return operations_pb2.Operation(name=f"operations/{JOB_ID}")

    async def GetJob(self, request: Any, context: Any) -> Any:
        if self.breaks:
            await self._break(context)
        files = [
            jobs_pb2.ArtifactFile(
                name=name, bytes=len(data), sha256=hashlib.sha256(self.announced.get(name, data)).digest()
            )
            for name, data in self.files.items()
        ]
        return jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.SUCCEEDED, result=jobs_pb2.JobResult(files=files))

    async def ListJobs(self, request: Any, context: Any) -> Any:
        raise AssertionError("not asked for here")

    async def CancelJob(self, request: Any, context: Any) -> Any:
        raise AssertionError("not asked for here")

    async def GetStatus(self, request: Any, context: Any) -> Any:
        raise AssertionError("not asked for here")

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        first = max(1, request.after_sequence)  # the last one known once more, as after a lost acknowledgement
        for sequence in range(first, 8):
            if self.breaks and sequence >= first + self.break_after:
                await self._break(context)
            yield jobs_pb2.JobEvent(sequence=sequence, kind="round")

    async def DownloadArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        data = self.files[request.file]
        for sent, begin in enumerate(range(request.offset, len(data), 1000)):
            if self.download_breaks and sent >= self.break_after:
                self.download_breaks -= 1
                await self._break(context)
            for chunk in self.lie(DataChunk(data=data[begin : begin + 1000], offset=begin)):
                yield chunk


class House:
    """A played service, served, and callers of it."""

    def __init__(self) -> None:
        self.service = PlayedService()
        self.server = GrpcServer(listen="127.0.0.1:0", tls=None, insecure=True, federation="demo", roles=ROLES)
        self.server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, self.service, SERVICE)
        self.address = ""
        self.clients: list[AsyncSottoClient] = []

    def client(self, *, roster: Roster | None = ROSTER, retry_for_s: float = RETRY_FOR_S) -> AsyncSottoClient:
        client = AsyncSottoClient(self.address, insecure=True, identity=ANN, roster=roster, retry_for_s=retry_for_s)
        self.clients.append(client)
        return client


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    house.address = f"127.0.0.1:{await house.server.start()}"
    yield house
    for client in house.clients:
        await client.close()
    await house.server.stop(0)


# --- an aggregator that goes away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_broken_watch_goes_on_and_every_event_comes_once(house: House, code: grpc.StatusCode) -> None:
    house.service.breaks, house.service.break_after, house.service.code = 3, 2, code
    events = [event.sequence async for event in house.client().watch(JOB_ID)]
    assert events == [1, 2, 3, 4, 5, 6, 7]
    assert [request.after_sequence for request in house.service.asked] == [0, 2, 3, 4]


async def test_a_submission_that_got_lost_is_sent_again_under_the_same_request_id(house: House) -> None:
    house.service.breaks = 2
    job = await house.client().submit(FederatedTrainingSpec.from_json({"task": "t"}))
    assert job.job_id == JOB_ID
    assert len(house.service.asked) == 3
    assert len({request.request_id for request in house.service.asked}) == 1
    assert house.service.asked[0].job.federated_training.task == "t"


async def test_two_submissions_are_two_requests(house: House) -> None:
    for _ in range(2):
        await house.client().submit(jobs_pb2.FederatedTraining(task="t"))
    assert len({request.request_id for request in house.service.asked}) == 2


async def test_patience_ends(house: House) -> None:
    house.service.breaks, house.service.break_after = 10**6, 0
    client = house.client(retry_for_s=0.15)
    for attempt in (client.get(JOB_ID), anext(client.watch(JOB_ID)), client.submit(jobs_pb2.FederatedTraining())):
        with pytest.raises(UnavailableError):
            await attempt


# --- files ------------------------------------------------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def offsets(asked: Sequence[Any], name: str = "model.safetensors") -> list[int]:
    return [request.offset for request in asked if request.file == name]


async def test_a_broken_download_goes_on_after_the_last_byte(house: House, tmp_path: Path) -> None:
    house.service.download_breaks, house.service.break_after = 2, 3
    files = await house.client().fetch_artifact(JOB_ID, tmp_path / "new" / "folder")
    assert files["model.safetensors"].read_bytes() == MODEL
    assert offsets(house.service.asked) == [0, 3000, 6000]


async def test_a_part_on_disk_is_continued_and_a_whole_file_not_fetched_again(house: House, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(MODEL[:5000])
    client = house.client()
    files = await client.fetch_artifact(JOB_ID, tmp_path)
    assert files == {name: tmp_path / name for name in ("model.safetensors", "manifest.json")}
    assert files["model.safetensors"].read_bytes() == MODEL
    assert offsets(house.service.asked) == [5000]
    assert names_in(tmp_path) == ["manifest.json", "model.safetensors"]
    await client.fetch_artifact(JOB_ID, tmp_path)
    assert len(house.service.asked) == 2


@pytest.mark.parametrize("part", [b"x" * 5000, MODEL[:-1] + b"x", MODEL + b"x", b"x" * len(MODEL)])
async def test_a_part_on_disk_that_is_wrong_is_fetched_anew(house: House, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(part)
    (tmp_path / "model.safetensors").write_bytes(b"the model of another job")
    files = await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert files["model.safetensors"].read_bytes() == MODEL
    assert offsets(house.service.asked)[-1] == 0


LIES: dict[str, Callable[[DataChunk], list[DataChunk]]] = {
    "a flipped bit": lambda chunk: [DataChunk(data=bytes([chunk.data[0] ^ 1]) + chunk.data[1:], offset=chunk.offset)],
    "a gap": lambda chunk: [] if chunk.offset == 1000 else [chunk],
    "a chunk twice": lambda chunk: [chunk, chunk],
    "an offset elsewhere": lambda chunk: [DataChunk(data=chunk.data, offset=chunk.offset + 1)],
    "too little": lambda chunk: [] if chunk.offset > 8000 else [chunk],
    "too much": lambda chunk: [DataChunk(data=chunk.data * 20, offset=chunk.offset)],
    "nothing": lambda chunk: [],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_bytes_that_are_not_those_announced_get_no_name(
    house: House, tmp_path: Path, lie: Callable[[DataChunk], list[DataChunk]]
) -> None:
    house.service.lie = lie
    with pytest.raises(DigestError, match=r"model\.safetensors"):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "name", ["", "..", "../model", "/etc/model", "a/b", "a\\b", ".hidden", "x.part", "a\x00b", "a" * 101, "é"]
)
async def test_a_file_may_not_choose_where_it_lands(house: House, tmp_path: Path, name: str) -> None:
    house.service.files = {name: b"x"}
    with pytest.raises(InvalidInput, match="name"):
        await house.client(roster=None).fetch_artifact(JOB_ID, tmp_path / "out")
    assert not house.service.asked


async def test_a_directory_that_cannot_be_written_is_a_storage_error(house: House, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError):
        await house.client().fetch_artifact(JOB_ID, tmp_path / "out")


# --- what the aggregator signed ---------------------------------------------------------------------------------------

OTHER_MODEL = {"file": "model.safetensors", "sha256": "0" * 64}
BAD_MANIFESTS: dict[str, tuple[bytes, type[SottoError]]] = {
    "signed by somebody else": (make_manifest(key=MALLORY), SignatureError),
    "signed as a party": (make_manifest(signer="a"), SignatureError),
    "of another kind": (make_manifest(kind="transcript"), SignatureError),
    "of another job": (make_manifest(job_id="ffff"), SignatureError),
    "of another model": (make_manifest(model=OTHER_MODEL), DigestError),
    "of a model that is not there": (make_manifest(model={**OTHER_MODEL, "file": "other"}), DigestError),
    "of no model": (make_manifest(model={}), DigestError),
    "with a readable half of its own": (make_manifest().replace(b"[1, 2]", b"[1, 3]"), SignatureError),
    "with something added": (make_manifest()[:-1] + b', "note": "trust me"}', SignatureError),
    "not JSON": (b"?", InvalidInput),
    "not an object": (b"[]", InvalidInput),
    "without a signed half": (b'{"readable": {}}', InvalidInput),
}


@pytest.mark.parametrize(("manifest", "error"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
async def test_a_manifest_that_does_not_vouch_for_the_model_is_refused_and_nothing_kept(
    house: House, tmp_path: Path, manifest: bytes, error: type[SottoError]
) -> None:
    house.service.files["manifest.json"] = manifest
    with pytest.raises(error):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert names_in(tmp_path) == []


async def test_with_a_roster_files_without_a_manifest_are_refused(house: House, tmp_path: Path) -> None:
    del house.service.files["manifest.json"]
    with pytest.raises(SignatureError, match="no manifest"):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert await house.client(roster=None).fetch_artifact(JOB_ID, tmp_path)


def test_a_kept_artifact_can_be_verified_again_and_every_flipped_byte_shows(tmp_path: Path) -> None:
    path, model = tmp_path / "manifest.json", tmp_path / "model.safetensors"
    path.write_bytes(make_manifest())
    model.write_bytes(MODEL)
    assert verify_manifest(path, ROSTER)["rounds"] == [1, 2]
    good = path.read_bytes()
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
        with pytest.raises(InvalidInput):
            verify_manifest(path, ROSTER)
    path.write_bytes(good)
    model.write_bytes(MODEL[:-1])
    with pytest.raises(DigestError):
        verify_manifest(path, ROSTER)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_what_a_job_brought_depends_on_its_state() -> None:
    error = jobs_pb2.JobError(reason="ROUND_FAILED", message="nobody answered", stage="round 2", parties=["a", "b"])
    failed = jobs_pb2.Job(job_id="x", state=jobs_pb2.FAILED, error=error)
    with pytest.raises(JobFailed, match=r"failed in round 2: nobody answered \[ROUND_FAILED\]") as caught:
        result_of(failed)
    assert caught.value.metadata["parties"] == "a, b"
    with pytest.raises(AbandonedError):
        result_of(jobs_pb2.Job(state=jobs_pb2.CANCELLED))
    for state in (jobs_pb2.PENDING, jobs_pb2.RUNNING, jobs_pb2.CANCELLING):
        with pytest.raises(StateError):
            result_of(jobs_pb2.Job(state=state))


async def test_a_configuration_is_all_it_takes(house: House, tmp_path: Path) -> None:
    save_roster(tmp_path / "roster.json", sign_roster(ROSTER, OPERATOR), operator_verify_key=OPERATOR.verify_key)
    path = tmp_path / "client.yaml"
    path.write_text(
        f"version: 1\nfederation: demo\nserver: {{address: '{house.address}', insecure: true}}\n"
        "keys: {roster: roster.json}\n"
    )
    async with AsyncSottoClient.from_config(path) as client:
        house.service.files["manifest.json"] = make_manifest(key=MALLORY)
        with pytest.raises(SignatureError):
            await client.fetch_artifact(JOB_ID, tmp_path / "out")
    with pytest.raises(ConfigError, match="no such"):
        AsyncSottoClient.from_config(tmp_path / "none.yaml")


def test_a_closed_client_says_so() -> None:
    client = SottoClient("127.0.0.1:1", insecure=True, identity=ANN)
    client.close()
    client.close()
    with pytest.raises(StateError, match="closed"):
        client.get("x")
    with pytest.raises(StateError, match="closed"):
        next(client.watch("x"))


@pytest.mark.parametrize("wait", [lambda client: list(client.watch("x")), lambda client: client.get("x")])
def test_closing_ends_what_waits_in_another_thread(wait: Callable[[SottoClient], Any]) -> None:
    """Nobody listens at port 1, so that both would wait for as long as their patience lasts."""
    client = SottoClient("127.0.0.1:1", insecure=True, identity=ANN, retry_for_s=10**6)
    errors: list[BaseException] = []
    begun = threading.Event()

    def scientist() -> None:
        begun.set()
        try:
            wait(client)
        except StateError as error:
            errors.append(error)

    thread = threading.Thread(target=scientist)
    thread.start()
    begun.wait()
    client.close()
    thread.join(30)
    assert [str(error) for error in errors] == ["this client is closed"]


def test_a_client_that_cannot_be_made_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match="loopback"):
        SottoClient("example.org:1", insecure=True)
    assert threading.active_count() == before
