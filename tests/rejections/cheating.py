"""An aggregator that cheats, and the real node of party a that it meets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, cast

import grpc
import numpy as np
from sqlalchemy import MetaData

from src.aggregator.planning import Model, plan_round
from src.communication.generated import common_pb2, federation_pb2, federation_pb2_grpc, jobs_pb2
from src.communication.grpc_client import connect
from src.communication.identity import Identity
from src.communication.messages import signed_from_proto, signed_to_proto
from src.communication.streams import send_bytes
from src.communication.tls import TlsFiles
from src.config import PartyConfig, load_party_config
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.scheme import Layout
from src.errors import WorkerError
from src.jobs.executors.units import WorkContext
from src.jobs.orders import order_of
from src.jobs.spec import FederatedTrainingSpec, PartyPrivacy
from src.jobs.specs import spec_into_proto
from src.learning.flatten import to_safetensors
from src.party.accounts import PartyAccounts
from src.party.home import Home
from src.party.node import Node
from src.party.orders import OrderBook
from src.party.rounds import RoundWorker
from src.party.store import PartyRound, RoundMemory
from src.party.work import HANDLERS
from src.privacy.entropy import SystemEntropy
from src.privacy.ledger import Entry, charges
from src.protocol.batches import StoredBatch, expected_header, fold_batches, write_batch
from src.protocol.canonical import canonical_bytes, parse_canonical
from src.protocol.keyring import Keyring, load_share
from src.protocol.ledger import EntrySigner
from src.protocol.merkle import MerkleHasher
from src.protocol.order import ORDER_KIND, sign_order
from src.protocol.plan import (
    LIST_KIND,
    OPENING_KIND,
    PLAN_KIND,
    PROTOCOL_VERSION,
    ROOT_KIND,
    SHARES_KIND,
    OpeningStatement,
    RootStatement,
    RoundPlan,
    aggregate_header,
    share_binding,
    signed_digest,
)
from src.protocol.roster import AGGREGATOR, load_roster
from src.protocol.signing import Signed, SigningKey, open_signed
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations

DIMENSION: Final = 60  # three ciphertexts of a 512-bit key
PATIENCE_S: Final = 60.0  # only a hang reaches it
SPEC: Final = FederatedTrainingSpec(
    task="scripted", parties=("a", "b", "c"), quorum=2, party_privacy=PartyPrivacy(noise_multiplier=0.5)
)


@dataclass
class Round:
    """A round as the aggregator lays it out: the plan, the stored batches and signed roots by contributor."""

    plan: RoundPlan
    signed: Signed
    order: Signed | None = None
    batches: dict[str, StoredBatch] = field(default_factory=dict)
    roots: dict[str, Signed] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return signed_digest(self.signed, PLAN_KIND)

    @property
    def name(self) -> federation_pb2.RoundName:
        return federation_pb2.RoundName(job_id=self.plan.job_id, round=self.plan.round)

    @property
    def layout(self) -> Layout:
        return Layout.from_json(self.plan.layout)


def contribute_to(round_: Round) -> federation_pb2.Contribute:
    """What an aggregator asks for first, with the order that the round rests on."""
    work = federation_pb2.Contribute(plan=signed_to_proto(round_.signed))
    if round_.order is not None:
        work.order.CopyFrom(signed_to_proto(round_.order))
    return work


def open_of(round_: Round, listed: Signed, opening: Signed) -> federation_pb2.Open:
    """What it asks for last."""
    work = federation_pb2.Open(
        plan=signed_to_proto(round_.signed),
        frozen_list=signed_to_proto(listed),
        opening=signed_to_proto(opening),
    )
    if round_.order is not None:
        work.order.CopyFrom(signed_to_proto(round_.order))
    return work


@dataclass(frozen=True)
class Answer:
    """What came back from a: a root, an upload, shares, or a failure's (stage, reason)."""

    kind: str
    what: Any


class CheatingAggregator(federation_pb2_grpc.FederationServiceServicer):
    """Serves whatever a test says, and keeps all that arrives."""

    def __init__(self, kits: Path, state: Path) -> None:
        self.key = SigningKey.load(kits / "aggregator" / "signing.key")
        _, self.roster = load_roster(kits / "aggregator" / "roster.json")
        self.keyring = Keyring.load(kits / "aggregator" / "public_key.json", insecure_small=True)
        self.keys = {name: SigningKey.load(kits / f"party-{name}" / "signing.key") for name in "bcd"}
        self.scientists = {
            name: SigningKey.load(kits / kit / "signing.key")
            for name, kit in (("scientist", "scientist"), ("eve", "scientist-eve"), ("operator", "operator"))
        }
        self.shares = {name: load_share(kits / f"party-{name}" / "share.json") for name in "abcd"}
        self.blobs = Blobs(state / "aggregator-blobs")
        self.model = to_safetensors({"w": np.zeros(DIMENSION, np.float32)})
        self.served: dict[str, bytes] = {}
        self.received: list[Answer] = []
        self.told: list[str] = []
        self.reports: list[federation_pb2.ReportFailureRequest] = []
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._work: asyncio.Queue[federation_pb2.Assignment | None] = asyncio.Queue()
        self.gates: dict[str, asyncio.Event] = {}
        self.asked_for: list[str] = []  # and met with a gate
        self.gone = asyncio.Event()
        self.joined: list[federation_pb2.JoinRequest] = []
        self.party_ledger: list[federation_pb2.LedgerHead] = []
        self.told_by: dict[str, Signed] = {}
        self.settled: Callable[[], Awaitable[None]] | None = None
        self.quorum: Callable[[Any], Awaitable[None]] | None = None

    # --- what a sees of it --------------------------------------------------------------------------------------------

    async def Join(self, request: Any, context: Any) -> federation_pb2.JoinResponse:
        self.joined.append(request)
        return federation_pb2.JoinResponse(
            protocol_version=PROTOCOL_VERSION,
            federation=self.roster.federation,
            public_key=canonical_bytes(self.keyring.to_json()),
            key_id=self.keyring.key_id,
            aggregator_verify_key=self.key.verify_key,
            custody="threshold",
            heartbeat_interval_s=60,
            party_ledger=self.party_ledger,
        )

    async def StreamAssignments(self, request: Any, context: Any) -> AsyncIterator[federation_pb2.Assignment]:
        self.gone.clear()
        try:
            while (work := await self._work.get()) is not None:
                yield work
        finally:
            self.gone.set()

    async def DownloadModel(self, request: Any, context: Any) -> AsyncIterator[common_pb2.DataChunk]:
        await self._let_through("model")
        async for chunk in send_bytes(self.model):
            yield chunk

    async def AwaitQuorum(self, request: Any, context: Any) -> federation_pb2.AwaitQuorumResponse:
        await self._let_through("quorum")
        if self.quorum is not None:
            await self.quorum(context)
        return federation_pb2.AwaitQuorumResponse(reached=True)

    async def CommitRoot(self, request: Any, context: Any) -> federation_pb2.CommitRootResponse:
        signed = signed_from_proto(request.root)
        self.told_by[request.round.job_id] = signed
        self._told(request.round, json.loads(signed.statement)["ledger_head"])
        self._came("root", signed)
        return federation_pb2.CommitRootResponse()

    async def UploadUpdate(self, request_iterator: Any, context: Any) -> federation_pb2.UploadUpdateResponse:
        parts = [part async for part in request_iterator]
        self._told(parts[0].header.round, parts[0].header.ledger_head)
        self._came("upload", (parts[0].header.batch_header, b"".join(part.body for part in parts)))
        return federation_pb2.UploadUpdateResponse(accepted=True)

    async def DownloadContribution(self, request: Any, context: Any) -> AsyncIterator[common_pb2.DataChunk]:
        await self._let_through(request.contributor)
        async for chunk in send_bytes(self.served[request.contributor]):
            yield chunk

    async def UploadShares(self, request_iterator: Any, context: Any) -> federation_pb2.UploadSharesResponse:
        parts = [part async for part in request_iterator]
        self._came("shares", (signed_from_proto(parts[0].header.shares), b"".join(part.body for part in parts)))
        return federation_pb2.UploadSharesResponse(accepted=True)

    async def ReportFailure(self, request: Any, context: Any) -> federation_pb2.ReportFailureResponse:
        self.told.append(request.message)
        self.reports.append(request)
        self._came("failure", (request.stage, request.reason))
        return federation_pb2.ReportFailureResponse()

    async def TellReadiness(self, request: Any, context: Any) -> federation_pb2.TellReadinessResponse:
        return federation_pb2.TellReadinessResponse()

    async def _let_through(self, what: str) -> None:
        """What a asks for waits as long as there is a gate that is not open: the model, or a contributor's batch."""
        if what in self.gates:
            self.asked_for.append(what)
            await self.gates[what].wait()

    def _told(self, name: federation_pb2.RoundName, digest: str) -> None:
        """In this it is honest: it remembers the heads of a's ledger, and the root by which a said so."""
        root = signed_to_proto(self.told_by[name.job_id]) if name.job_id in self.told_by else None
        told = federation_pb2.LedgerHead(digest=digest, round=name, root=root)
        self.party_ledger = [*(each for each in self.party_ledger if each.round.job_id != name.job_id), told]

    def _came(self, kind: str, what: Any) -> None:
        self.received.append(Answer(kind, what))
        self.answers.put_nowait(self.received[-1])

    def came(self, kind: str) -> list[Any]:
        """All that ever arrived of a kind."""
        return [answer.what for answer in self.received if answer.kind == kind]

    # --- what it asks of a --------------------------------------------------------------------------------------------

    async def ask(self, name: federation_pb2.RoundName, **work: Any) -> Answer:
        """Push an assignment, and wait for what comes of it."""
        await self.tell(name, **work)
        async with asyncio.timeout(PATIENCE_S):
            answer = await self.answers.get()
            if self.settled is not None:  # what is asked for while the same work ends would be passed over
                await self.settled()
        return answer

    async def tell(self, name: federation_pb2.RoundName, **work: Any) -> None:
        """Push an assignment."""
        self._work.put_nowait(federation_pb2.Assignment(sequence=1, round=name, **work))

    async def drop(self) -> None:
        """End the stream of assignments, as a broken connection does; a comes back by itself."""
        self._work.put_nowait(None)
        await self.gone.wait()

    async def ask_contribute(self, round_: Round) -> Answer:
        return await self.ask(round_.name, contribute=contribute_to(round_))

    async def ask_reveal(self, round_: Round, listed: Signed) -> Answer:
        work = federation_pb2.Reveal(plan=signed_to_proto(round_.signed), frozen_list=signed_to_proto(listed))
        return await self.ask(round_.name, reveal=work)

    async def ask_open(
        self, round_: Round, listed: Signed, opening: Signed, name: federation_pb2.RoundName | None = None
    ) -> Answer:
        """The answer; a delivered batch of another name is served as it is stored."""
        self.served = {who: self.blobs.read(batch.sha256) for who, batch in round_.batches.items()} | self.served
        return await self.ask(name or round_.name, open=open_of(round_, listed, opening))

    # --- how it lays out a round --------------------------------------------------------------------------------------

    def plan(
        self,
        number: int = 1,
        *,
        spec: FederatedTrainingSpec = SPEC,
        order: Signed | None = None,
        job_id: str = "job",
        declared_rows: Mapping[str, int] | None = None,
        **changes: Any,
    ) -> Round:
        """A round as an honest aggregator plans it, with fields changed afterwards.

        Args:
            order: that it rests on; by default the scientist's, for this specification.
        """
        order = order or self.order(spec)
        plan = plan_round(
            spec,
            job_id=job_id,
            number=number,
            model=Model(sha256(self.model).hexdigest(), len(self.model), DIMENSION),
            roster=self.roster,
            scheme=self.keyring.scheme("paillier"),
            declared_rows=declared_rows,
            order=signed_digest(order, ORDER_KIND),
        )
        plan = replace(plan, **changes)
        return Round(plan, self.sign(PLAN_KIND, plan.to_statement()), order)

    def plan_of_another_job(self, job_id: str, **changes: Any) -> Round:
        """The first round of a job that rests on an order of its own."""
        return self.plan(job_id=job_id, order=self.order(request_id=f"r-{job_id}"), **changes)

    def order(self, asked: FederatedTrainingSpec = SPEC, /, *, by: str = "scientist", **changes: Any) -> Signed:
        """What the scientist signed for a job, as the aggregator has it; with fields changed before it was signed."""
        job = jobs_pb2.Job()
        spec_into_proto(job, asked)
        order = order_of(
            job, federation="demo", scientist=by, request_id=f"r-{asked.digest[:8]}", expires_at="2100-01-01T00:00:00Z"
        )
        changes = {"model_sha256": asked.initial_model_sha256, **changes}
        return sign_order(replace(order, **changes), self.scientists[by])

    def sign(self, kind: str, statement: Mapping[str, Any]) -> Signed:
        return self.key.sign(kind, statement, signer=AGGREGATOR)

    def scheme(self, round_: Round) -> PaillierScheme:
        count = int(round_.plan.layout["ciphertext_count"])
        return cast(PaillierScheme, self.keyring.scheme("paillier", expected_ciphertexts=count))

    def contribute(self, round_: Round, *names: str) -> None:
        """Batches of others, random and honest, and their signed roots."""
        for name in names:
            values = np.random.default_rng(len(name)).integers(-50, 50, DIMENSION)
            self.keep(round_, name, stored(self.scheme(round_), round_, name, values, self.blobs))

    def keep(self, round_: Round, name: str, batch: StoredBatch) -> None:
        round_.batches[name] = batch
        statement = root_statement(round_, name, batch)
        key = self.key if name == AGGREGATOR else self.keys[name]
        round_.roots[name] = key.sign(ROOT_KIND, statement, signer=name)

    def freeze(self, round_: Round, roots: list[Signed] | None = None, **changes: Any) -> Signed:
        entries = [round_.roots[name] for name in sorted(round_.roots)] if roots is None else roots
        statement = {"plan": round_.digest, "roots": [entry.to_json() for entry in entries], **changes}
        return self.sign(LIST_KIND, statement)

    def fold(self, round_: Round, names: list[str]) -> StoredBatch:
        chosen = {name: round_.batches[name] for name in names}
        scheme = self.scheme(round_)
        return fold_batches(scheme, round_.plan, chosen, plan_digest=round_.digest, blobs=self.blobs)

    def opening(self, round_: Round, listed: Signed, names: list[str] | None = None, **changes: Any) -> Signed:
        """What is to be opened, its root computed honestly unless `changes` says otherwise."""
        who = sorted(round_.batches) if names is None else names
        root = changes.pop("aggregate_root", None) or self.fold(round_, who).root
        statement = OpeningStatement(round_.digest, signed_digest(listed, LIST_KIND), tuple(who), root)
        return self.sign(OPENING_KIND, {**statement.to_statement(), **changes})

    def root_of(self, round_: Round, names: list[str], factors: list[bytes]) -> str:
        """The root of a product of any bodies, said to be the one of `names`."""
        width, n_squared = round_.layout.ciphertext_bytes, self.keyring.public.n_squared
        hasher = MerkleHasher()
        hasher.add(aggregate_header(round_.digest, tuple(names)))
        for at in range(0, round_.layout.body_bytes, width):
            product = 1
            for body in factors:
                product = product * int.from_bytes(body[at : at + width], "big") % n_squared
            hasher.add(int(product).to_bytes(width, "big"))
        return hasher.root()

    def body(self, round_: Round, name: str) -> bytes:
        return self.blobs.read(round_.batches[name].sha256)


def stored(scheme: PaillierScheme, round_: Round, name: str, values: Any, blobs: Blobs) -> StoredBatch:
    return write_batch(
        scheme,
        round_.plan,
        values,
        plan_digest=round_.digest,
        contributor=name,
        blobs=blobs,
        entropy=SystemEntropy(),
    )


def root_statement(round_: Round, name: str, batch: StoredBatch) -> dict[str, Any]:
    count = round_.layout.ciphertext_count
    return RootStatement(round_.digest, name, batch.root, count, batch.size, batch.proof).to_statement()


# --- party a ----------------------------------------------------------------------------------------------------------


class Pool:
    """A party's units of work, run at once in this process; training is a random vector, so that no torch is needed."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.dies_at = ""
        self.error: Exception | None = None
        self.gates: dict[str, asyncio.Event] = {}
        """By unit, or unit and job ("contribute of job"): what is begun waits for it."""
        self.begun: list[str] = []
        self.tried: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {"problem": "", "place": "", "detail": "", "confined": True}
        """By the trial of a task, on public rows."""

    def cores_for_a_unit(self) -> int:
        """One: batches here are small."""
        return 1

    async def run(self, name: str, params: Mapping[str, Any], **how: Any) -> dict[str, Any]:
        if name == "try_task":
            assert how["alone"], "a trial is made in a worker of its own"
            return await self._try(params)
        self.begun.append(name)
        data = json.loads(json.dumps(params))
        statement = parse_canonical(data["plan"].encode())
        for gate in (name, f"{name} of {statement['job_id']}"):
            if gate in self.gates:
                await self.gates[gate].wait()
        if name == self.dies_at:
            raise self.error or WorkerError(f"unit {name} was killed")
        if name != "contribute":
            return HANDLERS[name](data, WorkContext(self._blobs, Path()))
        del statement["kind"]
        plan = RoundPlan.from_statement(statement)
        self._blobs.read(plan.model_sha256)  # as the real unit begins
        keyring = Keyring.from_json(json.loads(data["public"]), insecure_small=True)
        values = np.random.default_rng(7).integers(-50, 50, DIMENSION)
        round_ = Round(plan, Signed(data["plan"].encode(), AGGREGATOR, b""))
        scheme = cast(PaillierScheme, keyring.scheme("paillier"))
        return stored(scheme, round_, str(data["name"]), values, self._blobs).to_json()

    async def _try(self, params: Mapping[str, Any]) -> dict[str, Any]:
        assert set(params) == {"plan", "rows"}, "a trial is told nothing of the data but what a row looks like"
        self.tried.append(dict(params))
        if "try_task" in self.gates:
            await self.gates["try_task"].wait()
        if self.dies_at == "try_task":
            raise self.error or WorkerError("unit try_task was killed")
        return self.found


class PartyNode:
    """The real node on a state directory that outlives it."""

    def __init__(self, config: PartyConfig, address: str) -> None:
        self.config = config
        self._address = address
        self.blobs = Blobs(config.state_dir / "blobs")

    async def start(self) -> None:
        metadata = MetaData()
        home = Home(self.config)
        memory, ledger = RoundMemory(metadata), LedgerStore(metadata, signer=EntrySigner(home.signing_key))
        accounts = PartyAccounts(ledger, self.config)
        self._database = Database(self.config.state_dir / "party.sqlite", Migrations("party"))
        await self._database.open()
        self.pool = Pool(self.blobs)
        self.worker = RoundWorker(
            home=home,
            database=self._database,
            memory=memory,
            accounts=accounts,
            orders=OrderBook(metadata),
            blobs=self.blobs,
            pool=cast(Any, self.pool),
        )
        self._node = Node(
            home=home,
            database=self._database,
            memory=memory,
            accounts=accounts,
            worker=self.worker,
            dial=self._dial,
        )
        self._task = asyncio.create_task(self._node.run())

    def _dial(self) -> grpc.aio.Channel:
        tls = self.config.server.tls
        files = TlsFiles(tls.certificate, tls.key, tls.ca) if tls else None
        return connect(
            self._address,
            tls=files,
            insecure=self.config.server.insecure,
            identity=Identity("party", self.config.name),
        )

    async def charges(self) -> list[str]:
        """What became of everything that was charged: "reserved", "final" or "returned"."""
        books = charges(await self.entries()).values()
        return [each.settled.kind if each.settled else "reserved" for each in books]

    async def entries(self) -> list[Entry]:
        """Of its ledger."""
        return await self._database.run(LedgerStore(MetaData()).entries)

    async def open_rounds(self) -> list[PartyRound]:
        """Of which it does not know how they ended."""
        return await self._database.run(RoundMemory(MetaData()).open_rounds)

    async def idle(self) -> None:
        """Until nothing of what was asked for is under way."""
        await asyncio.gather(*self._node._tasks.values())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.worker.stop()
        await self._database.close()


class PartyA(PartyNode):
    """a, by its kit."""

    def __init__(self, kits: Path, state: Path, address: str) -> None:
        config = load_party_config(kits / "party-a" / "party.yaml", environ={})
        super().__init__(config.model_copy(update={"state_dir": state}), address)


@dataclass(frozen=True)
class Meeting:
    """The aggregator and a, brought to the stage where the cheat happens."""

    them: CheatingAggregator
    a: PartyA

    async def restart(self) -> None:
        await self.a.stop()
        await self.them.gone.wait()
        await self.a.start()

    async def committed(self, number: int = 1) -> Round:
        """a has committed; the other roots are there too."""
        round_ = self.them.plan(number)
        self.them.contribute(round_, "b", "c", AGGREGATOR)
        answer = await self.them.ask_contribute(round_)
        assert answer.kind == "root", answer
        round_.roots["a"] = answer.what
        return round_

    async def delivered(self, number: int = 1) -> tuple[Round, Signed]:
        """a has uploaded, under an honest list."""
        round_ = await self.committed(number)
        listed = self.them.freeze(round_)
        answer = await self.them.ask_reveal(round_, listed)
        assert answer.kind == "upload", answer
        self.keep_upload(round_, answer.what)
        return round_, listed

    def keep_upload(self, round_: Round, upload: tuple[bytes, bytes]) -> None:
        """What a uploaded becomes one of the round's batches."""
        header, body = upload
        assert header == expected_header(round_.plan, round_.digest, "a").encode()
        root = open_signed(round_.roots["a"], ROOT_KIND, verify_key=self.them.roster.verify_key("a"))
        ref = self.them.blobs.write(body)
        round_.batches["a"] = StoredBatch(header.hex(), ref.sha256, ref.size, root["root"], root["proof"])

    async def opens(self, round_: Round, listed: Signed) -> bytes:
        """a opens the honest aggregate; its share is right, and is returned."""
        opening = self.them.opening(round_, listed)
        answer = await self.them.ask_open(round_, listed, opening)
        assert answer.kind == "shares", answer
        signed, data = answer.what
        statement = open_signed(signed, SHARES_KIND, verify_key=self.them.roster.verify_key("a"))
        aggregate = self.them.fold(round_, sorted(round_.batches))
        assert (statement["plan"], statement["aggregate_root"]) == (round_.digest, aggregate.root)
        binding = share_binding(round_.digest, aggregate.root, "a")
        material = self.them.blobs.read(aggregate.sha256)
        self.them.scheme(round_).verify_share(round_.layout, material, data, index=1, binding=binding)
        return cast(bytes, data)
