"""Jobs over the wire: a real gRPC server, a real database, the real client; only the coordinator is played."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2
from sqlalchemy import MetaData

from src import cli
from src.aggregator.servicers import jobs as jobs_servicer
from src.aggregator.servicers import operations as operations_servicer
from src.client import AsyncSottoClient, SottoClient, result_of
from src.communication.generated import jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.communication.grpc_server import GrpcServer
from src.communication.identity import Identity
from src.errors import (
    DOMAIN,
    AbandonedError,
    AccessError,
    BudgetError,
    ConflictError,
    DeadlineError,
    DigestError,
    InvalidInput,
    JobFailed,
    NotFoundError,
    SottoError,
    StateError,
    VersionError,
)
from src.jobs.service import Activity, JobService, Notifier, PartyStatus, Status
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.states import Event, EventKind, failed_event, round_event, succeeded_event
from src.jobs.store import JobStore
from src.protocol.roster import Roster, save_roster, sign_roster
from src.protocol.signing import SigningKey
from src.storage.blobs import Blobs
from src.storage.database import Database

ANN, BOB, OPERATOR = Identity("scientist", "ann"), Identity("scientist", "bob"), Identity("operator", "olga")
LONG_S = 30.0
"""Far beyond what any wait here takes; only a hang reaches it."""
MODEL = bytes(range(256)) * 3000  # two chunks
KEY = SigningKey.from_bytes(bytes(32))
ROSTER = Roster(
    federation="demo",
    key_id="k",
    custody="aggregator",
    threshold=0,
    colluders=0,
    aggregator_verify_key=KEY.verify_key,
    members=(),
    created_at="2025-01-01T00:00:00Z",
)


@dataclass(frozen=True)
class Limits:
    max_jobs_pending: int = 10
    max_rounds: int = 100
    max_parties: int = 3
    max_round_timeout_s: float = 1000.0


class PlayedCoordinator:
    """Runs the oldest job by a script: each round waits for a permit; a seed of 13 fails the job."""

    def __init__(self, database: Database, store: JobStore, *, blobs: Blobs, notifier: Notifier) -> None:
        self._database, self._store, self._blobs, self._notifier = database, store, blobs, notifier
        self.permits = asyncio.Semaphore(0)
        self._woken = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def price(self, spec: FederatedTrainingSpec) -> None:
        if spec.local_training.epsilon > 100:
            raise BudgetError("party a has 4 of 100.5 left", party="a")

    def wake(self) -> None:
        self._woken.set()

    def progress(self, job_id: str) -> Activity | None:
        return Activity("round 1: training", ("b", "c"))

    def status(self) -> Status:
        return Status(
            federation="demo",
            software_version="9.9",
            key_id="k",
            custody="threshold",
            parties=(PartyStatus("a", True, "an update"), PartyStatus("b", False)),
            workers_busy=2,
            workers_idle=1,
            jobs_pending=0,
            jobs_running=0,
        )

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            while job := await self._database.run(self._store.next_pending):
                await self._execute(job.job_id, FederatedTrainingSpec.from_json(job.spec))

    async def _execute(self, job_id: str, spec: FederatedTrainingSpec) -> None:
        await self._happen(job_id, Event(kind=EventKind.STARTED, message="started"))
        for number in range(1, spec.rounds + 1):
            await self.permits.acquire()
            if (await self._database.run(lambda c: self._store.get(c, job_id))).state == "CANCELLING":
                await self._happen(job_id, Event(kind=EventKind.CANCELLED, message="cancelled"))
                return
            if spec.seed == 13:
                event = failed_event("BUDGET_EXCEEDED", "party a refuses", stage=f"round {number}", parties=["a"])
                await self._happen(job_id, event)
                return
            await self._happen(job_id, round_event(summary(number)))
        await self._happen(job_id, succeeded_event(self._write_artifact(job_id)))

    async def _happen(self, job_id: str, event: Event) -> None:
        await self._database.run(lambda c: self._store.apply(c, job_id, event, now=1e9))
        self._notifier.notify(job_id)

    def _write_artifact(self, job_id: str) -> dict[str, Any]:
        model = self._blobs.write(MODEL)
        statement = {"job_id": job_id, "model": {"file": "model.safetensors", "sha256": model.sha256}}
        signed = KEY.sign("manifest", statement, signer="aggregator").to_json()
        manifest = self._blobs.write(json.dumps({"manifest": signed, "readable": statement}).encode())
        files = [("model.safetensors", model), ("manifest.json", manifest)]
        return {
            "files": [{"name": name, "bytes": blob.size, "sha256": blob.sha256} for name, blob in files],
            "metrics": {"auc": 0.625},
            "epsilon_example": 3.5,
            "epsilon_party": 40.0,
            "epsilon_party_against_aggregator": math.inf,
            "delta": 1e-5,
        }


def summary(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "state": "RELEASED",
        "contributions": 3,
        "metrics": {"auc": 0.5 + number / 100},
        "epsilon_party": 10.0 * number,
        "epsilon_party_against_aggregator": math.inf,
        "parties": [
            {"party": "a", "bytes_up": 1000, "example_epsilon_spent": 0.5, "example_epsilon_left": 3.5},
            {"party": "b", "bytes_up": 1001, "example_epsilon_spent": None, "example_epsilon_left": None},
        ],
        "seconds": 1.5,
        "reason": None,
    }


class House:
    """A served job service, and callers."""

    def __init__(self, directory: Path) -> None:
        self.metadata = MetaData()
        self.store = JobStore(self.metadata)
        self.database = Database(directory / "jobs.db", self.metadata, schema_version=1)
        self.blobs = Blobs(directory / "blobs")
        self.address = ""
        self._closing: list[Any] = []

    async def start(self) -> None:
        await self.database.open()
        notifier = Notifier()
        self.coordinator = PlayedCoordinator(self.database, self.store, blobs=self.blobs, notifier=notifier)
        service = JobService(
            self.database,
            self.store,
            blobs=self.blobs,
            coordinator=self.coordinator,
            limits=Limits(),
            notifier=notifier,
        )
        self.server = GrpcServer(
            listen="127.0.0.1:0",
            tls=None,
            insecure=True,
            federation="demo",
            roles={**jobs_servicer.ROLES, **operations_servicer.ROLES},
        )
        servicer = jobs_servicer.JobServicer(service, self.blobs)
        self.server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, servicer, jobs_servicer.SERVICE)
        operations = operations_servicer.OperationsServicer(service)
        add = operations_pb2_grpc.add_OperationsServicer_to_server
        self.server.add(add, operations, operations_servicer.SERVICE)
        self.address = f"127.0.0.1:{await self.server.start()}"

    def client(self, identity: Identity = ANN) -> AsyncSottoClient:
        client = AsyncSottoClient(self.address, insecure=True, identity=identity, roster=ROSTER, retry_for_s=LONG_S)
        self._closing.append(client)
        return client

    def operations(self) -> Any:
        """The stock stub of google.longrunning."""
        channel = connect(self.address, tls=None, insecure=True, identity=ANN)
        self._closing.append(channel)
        return operations_pb2_grpc.OperationsStub(channel)

    def permit(self, rounds: int) -> None:
        for _ in range(rounds):
            self.coordinator.permits.release()

    async def stop(self) -> None:
        for one in self._closing:
            await one.close()
        await self.server.stop(0)
        self.coordinator.task.cancel()
        await asyncio.gather(self.coordinator.task, return_exceptions=True)
        await self.database.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "aggregator")
    await house.start()
    yield house
    await house.stop()


def training(**fields: Any) -> jobs_pb2.FederatedTraining:
    return jobs_pb2.FederatedTraining(task="randhie", rounds=3, **fields)


async def test_submit_walk_away_and_come_back_to_a_verified_model(house: House, tmp_path: Path) -> None:
    client = house.client()
    job = await client.submit(jobs_pb2.Job(display_name="mine", federated_training=training()))
    assert job.state in (jobs_pb2.PENDING, jobs_pb2.RUNNING)
    assert (job.owner, job.display_name) == ("scientist/ann", "mine")
    assert job.federated_training.local_training.epsilon == 4.0
    house.permit(3)
    job = await client.wait(job.job_id, timeout_s=LONG_S)
    assert job.state == jobs_pb2.SUCCEEDED
    assert job.end_time.seconds == 10**9
    progress = job.progress
    assert (progress.rounds_released, progress.rounds_planned, progress.rounds_failed) == (3, 3, 0)
    last = progress.rounds[-1]
    assert (last.metrics["auc"], last.epsilon_party, last.epsilon_party_against_aggregator) == (0.53, 30.0, math.inf)
    assert last.parties[0].example_epsilon_left == 3.5
    assert not last.parties[1].HasField("example_epsilon_left")
    files = await client.fetch_artifact(job.job_id, tmp_path / "out")
    assert files["model.safetensors"].read_bytes() == MODEL
    assert result_of(job).metrics["auc"] == 0.625
    assert math.isinf(result_of(job).epsilon_party_against_aggregator)


async def test_the_same_request_is_the_same_job_and_not_for_another_one(house: House) -> None:
    client = house.client()
    first = await client.submit(training(), "request 1")
    assert (await client.submit(training(), "request 1")).job_id == first.job_id
    with pytest.raises(ConflictError, match=first.job_id):
        await client.submit(training(seed=1), "request 1")
    assert (await house.client(BOB).submit(training(), "request 1")).job_id != first.job_id


async def test_a_refused_job_says_why_to_the_client_as_it_was_raised(house: House) -> None:
    client = house.client()
    bad = training(local_training={"steps": -1}, quorum=-1)
    with pytest.raises(InvalidInput) as caught:
        await client.submit(bad)
    assert set(caught.value.violations) == {"federated_training.quorum", "federated_training.local_training.steps"}
    with pytest.raises(BudgetError, match=r"4 of 100\.5") as budget:
        await client.submit(training(local_training={"epsilon": 100.5}))
    assert budget.value.metadata["party"] == "a"
    assert await client.list_jobs() == []


async def test_a_watch_follows_until_rest_and_goes_on_where_it_was_left(house: House) -> None:
    client = house.client()
    job = await client.submit(training())
    events = client.watch(job.job_id)
    seen = [await anext(events), await anext(events)]
    house.permit(1)
    seen.append(await anext(events))
    await events.aclose()
    house.permit(2)
    async with asyncio.timeout(LONG_S):
        seen += [event async for event in client.watch(job.job_id, after_sequence=seen[-1].sequence)]
    assert [event.sequence for event in seen] == [1, 2, 3, 4, 5, 6]
    assert [event.kind for event in seen] == ["submitted", "started", "round", "round", "round", "succeeded"]
    assert seen[2].round.round == 1
    assert seen[-1].state == jobs_pb2.SUCCEEDED


async def test_cancelling_a_waiting_and_a_running_job(house: House) -> None:
    client = house.client()
    running = await client.submit(training())
    waiting = await client.submit(training())
    events = client.watch(running.job_id)
    while (await anext(events)).kind != "started":
        pass
    await events.aclose()
    queued = await client.get(waiting.job_id)
    assert (queued.progress.queue_position, list(queued.progress.waiting_for)) == (1, ["b", "c"])
    assert (await client.cancel(waiting.job_id)).state == jobs_pb2.CANCELLED
    assert (await client.cancel(running.job_id)).state == jobs_pb2.CANCELLING
    house.permit(1)
    job = await client.wait(running.job_id, timeout_s=LONG_S)
    with pytest.raises(AbandonedError):
        result_of(job)


async def test_a_failed_job_names_stage_party_and_cause(house: House, tmp_path: Path) -> None:
    client = house.client()
    job = await client.submit(training(seed=13))
    with pytest.raises(StateError):
        await client.result(job.job_id)
    house.permit(1)
    assert (await client.wait(job.job_id, LONG_S)).state == jobs_pb2.FAILED
    with pytest.raises(JobFailed, match="round 1: party a refuses") as caught:
        await client.fetch_artifact(job.job_id, tmp_path)
    assert caught.value.metadata["reason"] == "BUDGET_EXCEEDED"


async def test_a_job_that_takes_too_long_is_left_running(house: House) -> None:
    client = house.client()
    job = await client.submit(training())
    with pytest.raises(DeadlineError, match=job.job_id):
        await client.wait(job.job_id, timeout_s=0.05)
    assert (await client.get(job.job_id)).state in (jobs_pb2.PENDING, jobs_pb2.RUNNING)


async def test_jobs_are_listed_by_page_and_state_and_only_to_whom_they_belong(house: House) -> None:
    ann, bob = house.client(), house.client(BOB)
    mine = [(await ann.submit(training())).job_id for _ in range(4)]
    await ann.cancel(mine[3])
    await bob.submit(training())
    assert [job.job_id for job in await ann.list_jobs(page_size=2)] == mine[::-1]
    assert [job.job_id for job in await ann.list_jobs(page_size=2, limit=3)] == mine[:0:-1]
    assert [job.job_id for job in await ann.list_jobs(state="CANCELLED")] == mine[3:]
    assert len(await house.client(OPERATOR).list_jobs()) == 5
    assert len(await bob.list_jobs()) == 1
    for refused in (bob.get(mine[0]), bob.cancel(mine[0]), bob.wait(mine[0]), bob.result(mine[0])):
        with pytest.raises(NotFoundError):
            await refused
    with pytest.raises(InvalidInput) as caught:
        await ann.list_jobs(state="DONE")
    assert list(caught.value.violations) == ["filter"]


async def test_a_party_may_call_none_of_it(house: House) -> None:
    party = house.client(Identity("party", "a"))
    for refused in (party.submit(training()), party.list_jobs(), party.status(), anext(party.watch("x"))):
        with pytest.raises(AccessError):
            await refused


async def test_status_answers(house: House) -> None:
    client = house.client()
    await client.submit(training())
    status = await client.status()
    assert (status.federation, status.workers_busy, status.parties[0].waiting_for) == ("demo", 2, "an update")
    assert status.jobs_pending + status.jobs_running == 1


async def test_an_artifact_is_served_from_an_offset_and_not_beyond_its_end(house: House, tmp_path: Path) -> None:
    client = house.client()
    job = await client.submit(training())
    house.permit(3)
    await client.wait(job.job_id, timeout_s=LONG_S)
    channel = connect(house.address, tls=None, insecure=True, identity=ANN)
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    request = jobs_pb2.DownloadArtifactRequest(job_id=job.job_id, file="model.safetensors", offset=len(MODEL) - 7)
    chunks = [chunk async for chunk in stub.DownloadArtifact(request)]
    assert [chunk.data for chunk in chunks] == [MODEL[-7:]]
    refusals: list[tuple[dict[str, Any], type[SottoError]]] = [
        ({"file": "model.safetensors", "offset": len(MODEL) + 1}, InvalidInput),
        ({"file": "../jobs.db"}, NotFoundError),
        ({"file": ""}, NotFoundError),
    ]
    for fields, error in refusals:
        with pytest.raises(error):
            await anext(aiter(stub.DownloadArtifact(jobs_pb2.DownloadArtifactRequest(job_id=job.job_id, **fields))))
    await channel.close(None)


async def test_a_damaged_blob_is_noticed_by_who_downloads_it(house: House, tmp_path: Path) -> None:
    client = house.client()
    job = await client.submit(training())
    house.permit(3)
    result = result_of(await client.wait(job.job_id, timeout_s=LONG_S))
    path = house.blobs.path(result.files[0].sha256.hex())
    path.chmod(0o600)
    path.write_bytes(MODEL[:-1] + b"?")
    with pytest.raises(DigestError, match="model"):
        await client.fetch_artifact(job.job_id, tmp_path / "out")
    assert list((tmp_path / "out").glob("model*")) == []


async def test_the_blocking_client_does_the_same(house: House, tmp_path: Path) -> None:
    house.permit(3)

    def scientist() -> tuple[list[str], dict[str, Path]]:
        with SottoClient(house.address, insecure=True, identity=ANN, roster=ROSTER) as client:
            job = client.submit(training(), "blocking")
            kinds = [event.kind for event in client.watch(job.job_id)]
            assert client.wait(job.job_id, timeout_s=LONG_S).state == jobs_pb2.SUCCEEDED
            assert client.get(job.job_id).job_id == client.list_jobs(limit=1)[0].job_id == job.job_id
            assert client.cancel(job.job_id).state == jobs_pb2.SUCCEEDED
            assert client.result(job.job_id).metrics["auc"] == 0.625
            assert client.status().federation == "demo"
            with pytest.raises(NotFoundError):
                client.get("none")
            with pytest.raises(NotFoundError):
                next(client.watch("none"))
            return kinds, client.fetch_artifact(job.job_id, tmp_path)

    kinds, files = await asyncio.to_thread(scientist)
    assert kinds == ["submitted", "started", "round", "round", "round", "succeeded"]
    assert files["model.safetensors"].read_bytes() == MODEL


# --- the command line -------------------------------------------------------------------------------------------------


class CommandLine:
    """`sotto jobs …` in this process, with a client.yaml of its own."""

    def __init__(self, house: House, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        signed = sign_roster(ROSTER, KEY)
        save_roster(directory / "roster.json", signed, operator_verify_key=KEY.verify_key)
        self.config = directory / "client.yaml"
        self.config.write_text(
            f"version: 1\nfederation: demo\nname: ann\nserver: {{address: '{house.address}', insecure: true}}\n"
            "keys: {roster: roster.json}\n"
        )
        self._capture = capture

    async def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capture.readouterr()
        words = ["jobs", command, *arguments, "--config", str(self.config)]
        code = await asyncio.to_thread(cli.run, words)
        out, err = self._capture.readouterr()
        return code, out, err


@pytest.fixture
def sotto(house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(house, tmp_path, capsys)


async def test_a_scientist_needs_only_the_command_line(house: House, sotto: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "display_name: from a file\nfederated_training: {task: randhie, rounds: 9, local_training: {delta: 1e-6}}\n"
    )
    code, out, _ = await sotto("submit", str(tmp_path / "job.yaml"), "--rounds", "3", "--epsilon", "2")
    job_id = out.strip()
    assert code == 0
    house.permit(3)
    code, out, _ = await sotto("watch", job_id)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["1", "2", "3", "4", "5", "6"]
    assert "round 2 released (3 updates, auc 0.5200, party-level ε 20)" in out
    code, out, _ = await sotto("wait", job_id)
    assert (code, out.splitlines()[0]) == (0, f"job {job_id} succeeded")
    code, out, _ = await sotto("show", job_id)
    assert code == 0
    assert [word for word in ("from a file", "∞", "0.5300", "scientist/ann") if word not in out] == []
    code, out, _ = await sotto("list")
    assert job_id in out
    code, out, _ = await sotto("result", job_id, "--out", str(tmp_path / "out"))
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == MODEL


async def test_with_json_every_command_prints_json(house: House, sotto: CommandLine, tmp_path: Path) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--rounds", "1", "--parties", "a, b", "--json")
    job = json.loads(out)
    assert job["federated_training"]["parties"] == ["a", "b"]
    house.permit(1)
    _, out, _ = await sotto("watch", job["job_id"], "--json")
    assert [json.loads(line)["sequence"] for line in out.splitlines()] == [1, 2, 3, 4]
    for command in ("wait", "show", "cancel"):
        _, out, _ = await sotto(command, job["job_id"], "--json")
        shown = json.loads(out)
        assert (shown["state"], shown["result"]["epsilon_party_against_aggregator"]) == ("SUCCEEDED", "inf")
        assert shown["progress"]["rounds"][0]["parties"][0]["bytes_up"] == 1000
    _, out, _ = await sotto("list", "--json", "--state", "succeeded")
    assert [each["job_id"] for each in json.loads(out)] == [job["job_id"]]
    _, out, _ = await sotto("result", job["job_id"], "--json", "--out", str(tmp_path / "out"))
    assert set(json.loads(out)["paths"]) == {"model.safetensors", "manifest.json"}
    again = {"federated_training": job["federated_training"]}
    (tmp_path / "again.json").write_text(json.dumps(again))
    _, out, _ = await sotto("submit", str(tmp_path / "again.json"), "--json")
    assert json.loads(out)["spec_digest"] == job["spec_digest"]


async def test_exit_codes_are_the_catalogues(house: House, sotto: CommandLine, tmp_path: Path) -> None:
    _, out, _ = await sotto("submit", "--task", "randhie", "--seed", "13")
    failing = out.strip()
    code, _, err = await sotto("result", failing)
    assert (code, "no result yet" in err) == (8, True)
    assert (await sotto("wait", failing, "--timeout", "0.01"))[0] == 11
    house.permit(1)
    code, _, err = await sotto("wait", failing)
    assert (code, "party a refuses [BUDGET_EXCEEDED]" in err) == (13, True)
    code, out, _ = await sotto("show", failing)
    assert (code, "BUDGET_EXCEEDED in round 1: party a refuses (parties: a)" in out) == (0, True)
    assert (await sotto("show", "none"))[0] == 7
    assert (await sotto("submit", "--task", "randhie", "--epsilon", "101"))[0] == 6
    code, _, err = await sotto("submit", "--task", "randhie", "--epsilon", "-1")
    assert (code, "federated_training.local_training.epsilon" in err) == (4, True)
    assert (await sotto("submit"))[0] == 2
    assert (await sotto("submit", str(tmp_path / "none.yaml")))[0] == 3
    _, out, _ = await sotto("submit", "--task", "randhie")
    code, out, _ = await sotto("cancel", out.strip())
    assert (code, out.split()[1] in {"CANCELLED", "CANCELLING"}) == (0, True)


# --- google.longrunning -----------------------------------------------------------------------------------------------


async def test_stock_operation_stubs_get_wait_list_and_cancel(house: House) -> None:
    client, stub = house.client(), house.operations()
    job = await client.submit(training())
    name = f"operations/{job.job_id}"
    operation = await stub.GetOperation(operations_pb2.GetOperationRequest(name=name))
    metadata = jobs_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    assert (operation.name, operation.done, metadata.job_id) == (name, False, job.job_id)
    request = operations_pb2.WaitOperationRequest(name=name, timeout=Duration(nanos=1))
    assert not (await stub.WaitOperation(request)).done
    house.permit(3)
    operation = await stub.WaitOperation(operations_pb2.WaitOperationRequest(name=name), timeout=LONG_S)
    result = jobs_pb2.JobResult()
    assert operation.done
    assert operation.response.Unpack(result)
    assert result.epsilon_example == 3.5

    other = await client.submit(training())
    await stub.CancelOperation(operations_pb2.CancelOperationRequest(name=f"operations/{other.job_id}"))
    house.permit(1)
    request = operations_pb2.WaitOperationRequest(name=f"operations/{other.job_id}")
    operation = await stub.WaitOperation(request, timeout=LONG_S)
    assert operation.error.code == code_pb2.CANCELLED

    listed = await stub.ListOperations(operations_pb2.ListOperationsRequest(name="operations", page_size=1))
    assert [each.name for each in listed.operations] == [f"operations/{other.job_id}"]
    token = listed.next_page_token
    listed = await stub.ListOperations(operations_pb2.ListOperationsRequest(page_size=1, page_token=token))
    assert ([each.name for each in listed.operations], listed.next_page_token) == ([name], "")


async def test_a_failed_operation_carries_the_status_that_an_rpc_would_have(house: House) -> None:
    job = await house.client().submit(training(seed=13))
    house.permit(1)
    request = operations_pb2.WaitOperationRequest(name=f"operations/{job.job_id}")
    operation = await house.operations().WaitOperation(request, timeout=LONG_S)
    info = error_details_pb2.ErrorInfo()
    assert operation.error.code == code_pb2.FAILED_PRECONDITION
    assert operation.error.message == "party a refuses"
    assert operation.error.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["stage"]) == ("BUDGET_EXCEEDED", DOMAIN, "round 1")


@pytest.mark.parametrize("name", ["", "operations/", "operations/none", "jobs/x"])
async def test_other_names_are_no_operations(house: House, name: str) -> None:
    with pytest.raises(NotFoundError):
        await house.operations().GetOperation(operations_pb2.GetOperationRequest(name=name))


async def test_operations_are_kept(house: House) -> None:
    with pytest.raises(VersionError, match="jobs are kept"):  # UNIMPLEMENTED
        await house.operations().DeleteOperation(operations_pb2.DeleteOperationRequest(name="operations/x"))
