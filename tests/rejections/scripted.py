"""A real aggregator, and scripted parties: honest, until a test makes them do something else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from src.aggregator.app import App
from src.aggregator.round_row import RoundRow
from src.client import AsyncSottoClient, JobSigner
from src.communication.generated import federation_pb2, federation_pb2_grpc, jobs_pb2
from src.communication.grpc_client import connect
from src.communication.messages import signed_from_proto, signed_to_proto
from src.communication.streams import receive_bytes
from src.communication.tls import TlsFiles
from src.config import load_aggregator_config, load_client_config, load_party_config
from src.encryption.scheme import Layout, Scheme
from src.jobs.executors.units import WorkContext
from src.learning.flatten import to_safetensors
from src.party.work import HANDLERS, encode
from src.privacy.entropy import SystemEntropy
from src.protocol.batches import StoredBatch, expected_header, write_batch
from src.protocol.keyring import Keyring
from src.protocol.merkle import batch_root
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
    signed_digest,
)
from src.protocol.roster import load_roster
from src.protocol.signing import Signed, SigningKey, open_signed
from src.storage.blobs import BlobRef, Blobs

PARTIES: Final = ("a", "b", "c", "d")
SCIENTISTS: Final = ("scientist", "eve")
COHORT: Final = ("a", "b", "c")
DIMENSION: Final = 60  # three ciphertexts of a 512-bit key
PATIENCE_S: Final = 60.0  # only a hang reaches it
Name: TypeAlias = federation_pb2.RoundName


class Memory:
    """A blob store that forgets."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def write(self, data: bytes | Iterable[bytes]) -> BlobRef:
        whole = data if isinstance(data, bytes) else b"".join(data)
        name = sha256(whole).hexdigest()
        self._kept[name] = whole
        return BlobRef(name, len(whole))

    def open(self, sha256: str) -> BinaryIO:
        return BytesIO(self._kept[sha256])

    def read(self, sha256: str) -> bytes:
        return self._kept[sha256]


@dataclass(frozen=True)
class Part:
    """What a party has of one round: `values` is what it adds to the sum, its share of the noise included."""

    name: Name
    plan: RoundPlan
    digest: str
    values: NDArray[np.int64]
    header: bytes
    body: bytes
    proof: str
    root: Signed

    @property
    def layout(self) -> Layout:
        return Layout.from_json(self.plan.layout)

    @property
    def statement(self) -> dict[str, Any]:
        return RootStatement(
            self.digest,
            self.root.signer,
            self.root_of(self.body),
            self.layout.ciphertext_count,
            len(self.body),
            self.proof,
        ).to_statement()

    def root_of(self, body: bytes) -> str:
        return batch_root(self.header, [body], ciphertext_bytes=self.layout.ciphertext_bytes)[0]


@dataclass(frozen=True)
class Opened:
    """An opening as a party saw it: what it says, every contributor's batch, and this party's share of the product."""

    name: Name
    plan: RoundPlan
    digest: str
    statement: OpeningStatement
    batches: dict[str, bytes]
    share: bytes

    @property
    def layout(self) -> Layout:
        return Layout.from_json(self.plan.layout)


class ScriptedParty:
    """Party `name` over its own connection. Every method is one honest step, with something to be dishonest about."""

    def __init__(self, kit: Path, address: str) -> None:
        self.config = load_party_config(kit / "party.yaml", environ={})
        keys = self.config.keys
        self.name = self.config.name
        self.key = SigningKey.load(keys.signing_key)
        self.keyring = Keyring.load(keys.public_key, insecure_small=True)
        _, self.roster = load_roster(cast(Path, keys.roster))
        self.share_file = cast(Path, keys.share)
        self.memory = Memory()
        self.channel = connect(address, tls=_tls(self.config), insecure=False)
        self.stub = federation_pb2_grpc.FederationServiceStub(self.channel)
        self._work: Any = None

    async def join(self, **changes: Any) -> federation_pb2.JoinResponse:
        known = {
            "protocol_version": PROTOCOL_VERSION,
            "verify_key": self.key.verify_key,
            "key_id": self.keyring.key_id,
            "roster_digest": self.roster.digest,
        }
        return await self.stub.Join(federation_pb2.JoinRequest(**{**known, **changes}))

    async def wanted(self, kind: str) -> federation_pb2.Assignment:
        """The next assignment of this kind; others are passed over."""
        if self._work is None:
            self._work = self.stub.StreamAssignments(federation_pb2.StreamAssignmentsRequest(session_id=self.name))
            self._work = aiter(self._work)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = cast(federation_pb2.Assignment, await anext(self._work))
                if found.WhichOneof("work") == kind:
                    return found

    def scheme(self, plan: RoundPlan) -> Scheme:
        return self.keyring.scheme(plan.scheme, expected_ciphertexts=int(plan.layout["ciphertext_count"]))

    def prepare(
        self, assignment: federation_pb2.Assignment, spoil: Callable[[bytes, Layout], bytes] = lambda body, _: body
    ) -> Part:
        """A random update, encoded with its noise, protected and signed; `spoil` changes the body before it is."""
        signed = signed_from_proto(assignment.contribute.plan)
        plan = RoundPlan.from_statement(open_signed(signed, PLAN_KIND, verify_key=self.roster.aggregator_verify_key))
        digest = signed_digest(signed, PLAN_KIND)
        update = np.random.default_rng(ord(self.name)).normal(0, 0.05, DIMENSION).astype(np.float32)
        values = encode(update, plan, entropy=SystemEntropy())
        batch = write_batch(
            self.scheme(plan),
            plan,
            values,
            plan_digest=digest,
            contributor=self.name,
            blobs=self.memory,
            entropy=SystemEntropy(),
        )
        body = spoil(self.memory.read(batch.sha256), Layout.from_json(plan.layout))
        part = Part(
            Name(job_id=plan.job_id, round=plan.round),
            plan,
            digest,
            values,
            bytes.fromhex(batch.header),
            body,
            batch.proof,
            Signed(b"", self.name, b""),
        )
        return replace(part, root=self.key.sign(ROOT_KIND, part.statement, signer=self.name))

    async def commit(self, part: Part, root: Signed | None = None, **changes: Any) -> None:
        request = federation_pb2.CommitRootRequest(round=part.name, root=signed_to_proto(root or part.root))
        for field_name, value in changes.items():
            setattr(request, field_name, value)
        await self.stub.CommitRoot(request)

    async def contribute(self) -> Part:
        assignment = await self.wanted("contribute")
        assert assignment.contribute.HasField("order")
        part = self.prepare(assignment)
        await self.commit(part)
        return part

    async def upload(
        self, part: Part, *, header: bytes | None = None, body: list[bytes] | None = None, root: Signed | None = None
    ) -> bool:
        pieces = [part.body[:100], part.body[100:]] if body is None else body
        parts = [federation_pb2.UploadUpdateRequest(body=piece) for piece in pieces]
        return await self.send([self.header(part, root=root, header=header), *parts])

    def header(
        self, part: Part, *, root: Signed | None = None, header: bytes | None = None
    ) -> federation_pb2.UploadUpdateRequest:
        """What an upload begins with."""
        first = federation_pb2.UpdateHeader(
            round=part.name,
            root=signed_to_proto(root or part.root),
            batch_header=part.header if header is None else header,
        )
        return federation_pb2.UploadUpdateRequest(header=first)

    async def send(self, parts: list[federation_pb2.UploadUpdateRequest]) -> bool:
        return bool((await self.stub.UploadUpdate(_each(parts))).accepted)

    def another_root(self, part: Part) -> Signed:
        """A well-formed root of other bytes."""
        other = part.root_of(part.body[::-1])
        return self.key.sign(ROOT_KIND, {**part.statement, "root": other}, signer=self.name)

    async def deliver(self, part: Part) -> None:
        await self.wanted("reveal")
        assert await self.upload(part)

    async def download(self, name: Name, contributor: str) -> bytes:
        request = federation_pb2.DownloadContributionRequest(round=name, contributor=contributor)
        return await receive_bytes(self.stub.DownloadContribution(request), max_bytes=1 << 20)

    async def look(self, assignment: federation_pb2.Assignment, binding_name: str | None = None) -> Opened:
        """Multiply the contributions, as asked, and open the product; `binding_name` is whose proof it is to be."""
        plan_signed, work = signed_from_proto(assignment.open.plan), assignment.open
        key = self.roster.aggregator_verify_key
        opening = OpeningStatement.from_statement(
            open_signed(signed_from_proto(work.opening), OPENING_KIND, verify_key=key)
        )
        plan = RoundPlan.from_statement(open_signed(plan_signed, PLAN_KIND, verify_key=key))
        digest, text = signed_digest(plan_signed, PLAN_KIND), plan_signed.statement.decode()
        batches = {name: await self.download(assignment.round, name) for name in opening.contributors}
        params = {"plan": text, "plan_digest": digest, "public": json.dumps(self.keyring.to_json())}
        listed = open_signed(signed_from_proto(work.frozen_list), LIST_KIND, verify_key=key)["roots"]
        proofs = {each["signer"]: json.loads(each["statement"])["proof"] for each in listed}
        width = Layout.from_json(plan.layout).ciphertext_bytes
        stored = {}
        for name, body in batches.items():
            header = expected_header(plan, digest, name).encode()
            root = batch_root(header, [body], ciphertext_bytes=width)[0]
            ref = self.memory.write(body)
            stored[name] = StoredBatch(header.hex(), ref.sha256, ref.size, root, proofs[name]).to_json()
        aggregate = self._run("recompute", {**params, "name": self.name, "batches": stored})
        assert aggregate["root"] == opening.aggregate_root
        share = self._run(
            "open_share",
            {
                **params,
                "name": binding_name or self.name,
                "share": str(self.share_file),
                "aggregate": aggregate["sha256"],
                "aggregate_root": aggregate["root"],
            },
        )
        return Opened(assignment.round, plan, digest, opening, batches, self.memory.read(share["sha256"]))

    def _run(self, unit: str, params: dict[str, Any]) -> dict[str, Any]:
        return HANDLERS[unit](params, WorkContext(cast(Any, self.memory), Path()))

    async def send_share(
        self, seen: Opened, share: bytes | None = None, *, key: SigningKey | None = None, **changes: Any
    ) -> bool:
        data = seen.share if share is None else share
        statement = {
            "plan": seen.digest,
            "aggregate_root": seen.statement.aggregate_root,
            "party": self.name,
            "sha256": sha256(data).hexdigest(),
            "bytes": len(data),
        }
        signed = (key or self.key).sign(SHARES_KIND, {**statement, **changes}, signer=self.name)
        header = federation_pb2.SharesHeader(round=seen.name, shares=signed_to_proto(signed))
        parts = [federation_pb2.UploadSharesRequest(header=header)]
        parts += [federation_pb2.UploadSharesRequest(body=data[at : at + 500]) for at in range(0, len(data), 500)]
        return bool((await self.stub.UploadShares(_each(parts))).accepted)

    async def send_share_of(self, part: Part, aggregate_root: str = "0" * 64) -> bool:
        """A share in a round that has nothing to open."""
        statement = OpeningStatement(part.digest, "", (), aggregate_root)
        return await self.send_share(Opened(part.name, part.plan, part.digest, statement, {}, b"share"))

    async def open(self) -> Opened:
        seen = await self.look(await self.wanted("open"))
        assert await self.send_share(seen)
        return seen


def _tls(config: Any) -> TlsFiles:
    return TlsFiles(config.server.tls.certificate, config.server.tls.key, config.server.tls.ca)


async def _each(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


class House:
    """A real aggregator with its workers, a scientist, and parties a to d of whom d holds a share and no data."""

    def __init__(self, kits: Path, state: Path) -> None:
        self.kits, self.blobs = kits, Blobs(state / "blobs")
        config = load_aggregator_config(kits / "aggregator" / "aggregator.yaml", environ={})
        self.app = App(config.model_copy(update={"state_dir": state, "evaluation": {}}))
        self.initial = np.linspace(-1, 1, DIMENSION, dtype=np.float32)
        self.address = ""

    async def start(self) -> None:
        self.address = await self.app.start()
        config = load_client_config(self.kits / "scientist" / "client.yaml", environ={})
        self.scientist_tls = _tls(config)
        self.client = AsyncSottoClient(self.address, tls=self.scientist_tls, signer=self.signer())

    def signer(self, name: str = "scientist") -> JobSigner:
        """Signs as one of those in the roster."""
        kit = self.kits / (name if name in ("scientist", "operator") else f"scientist-{name}")
        return JobSigner("demo", name, kit / "signing.key")

    async def stop(self) -> None:
        await self.client.close()
        await self.app.stop()

    @asynccontextmanager
    async def parties(self) -> AsyncIterator[dict[str, ScriptedParty]]:
        """All four, joined, each over a connection of its own."""
        async with AsyncExitStack() as stack:
            found = {name: ScriptedParty(self.kits / f"party-{name}", self.address) for name in PARTIES}
            for party in found.values():
                await stack.enter_async_context(party.channel)
                await party.join()
            yield found

    @asynccontextmanager
    async def job(
        self, *, rounds: int = 1, noise_multiplier: float = 0.0, quorum: int = 0
    ) -> AsyncIterator[tuple[str, dict[str, ScriptedParty]]]:
        """A job for a, b and c, and the parties; whatever is left of it at the end is cancelled."""
        training = jobs_pb2.FederatedTraining(
            task="scripted",
            rounds=rounds,
            spare_rounds=0,
            parties=COHORT,
            quorum=quorum,
            initial_model=to_safetensors({"w": self.initial}),
            party_privacy=jobs_pb2.PartyPrivacy(noise_multiplier=noise_multiplier),
        )
        job_id = str((await self.client.submit(training)).job_id)
        try:
            async with self.parties() as parties:
                yield job_id, parties
        finally:
            await self.client.cancel(job_id)
            await self.client.wait(job_id, timeout_s=PATIENCE_S)

    async def row(self, name: federation_pb2.RoundName) -> RoundRow:
        return await self.app._coordinator.trainings.row(name.job_id, name.round)

    def files(self) -> set[str]:
        """What lies in the blob store, whole or in part."""
        return {path.name for path in self.blobs.root.rglob("*") if path.is_file()}
