"""`sotto.v1.FederationService`: what parties ask of the aggregator. Thin: checks, stores, tells the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final

from ... import __version__
from ...communication.connections import host_of
from ...communication.generated import common_pb2, federation_pb2, federation_pb2_grpc
from ...communication.identity import caller
from ...communication.messages import (
    heads_from_proto,
    heads_to_proto,
    signed_from_proto,
    signed_to_proto,
    standings_from_proto,
)
from ...communication.streams import receive_pieces, send_blob
from ...communication.validity import certificate_of
from ...config import AggregatorConfig
from ...encryption.batch import LARGEST_HEADER_BYTES
from ...errors import (
    ConflictError,
    DigestError,
    InvalidInput,
    KeyMaterialError,
    LedgerError,
    LimitError,
    NotFoundError,
    SignatureError,
    SottoError,
    StateError,
    TwinError,
    VersionError,
)
from ...protocol.batches import check_batch_header
from ...protocol.canonical import canonical_bytes
from ...protocol.merkle import MerkleHasher
from ...protocol.plan import PROTOCOL_VERSION, ROOT_KIND, SHARES_KIND, RootStatement
from ...protocol.signing import Signed, open_signed
from ...storage.blobs import BlobRef, Blobs, BlobWriter, check_digest
from ...storage.heads import Head
from ...storage.leftovers import Leftovers
from ...storage.sweeping import trying
from ..coordinator import Coordinator
from ..failures import failure_of
from ..federation import Federation
from ..pipeline import AggregatorPipeline
from ..planning import plan_of
from ..round_row import (
    Batch,
    BatchStored,
    PartyFailed,
    RootCommitted,
    RoundRow,
    RoundState,
    ShareStored,
    Work,
)
from ..rounds import wanted
from ..sessions import Session, Sessions
from ..trainings import Trainings
from .declared import declared_rows

LOG = logging.getLogger("sotto.aggregator")

SERVICE: Final = "sotto.v1.FederationService"
ROLES: Final[dict[str, frozenset[str]]] = {
    f"/{SERVICE}/{method}": frozenset({"party"})
    for method in (
        "Join",
        "StreamAssignments",
        "DownloadModel",
        "AwaitQuorum",
        "CommitRoot",
        "UploadUpdate",
        "DownloadContribution",
        "UploadShares",
        "ReportFailure",
        "TellReadiness",
    )
}
"""Who may call which method."""

QUORUM_S: Final = 20.0
"""So long is a quorum waited for in one call."""
SHARE_OVERHEAD_BYTES: Final = 1 << 16
"""What a share batch may hold besides its partial decryptions: header and proof."""
_ROOT: Final = re.compile(r"[0-9a-f]{64}")
_PROOF: Final = re.compile(r"[0-9a-f]{0,8192}")  # of an 8192-bit key it has 3 212 digits


class FederationServicer(federation_pb2_grpc.FederationServiceServicer):
    """Answers parties. Who calls is in `identity.caller`: a party speaks for itself only."""

    def __init__(
        self,
        *,
        config: AggregatorConfig,
        coordinator: Coordinator,
        trainings: Trainings,
        federation: Federation,
        pipeline: AggregatorPipeline,
        sessions: Sessions,
        blobs: Blobs,
        leftovers: Leftovers,
    ) -> None:
        self._config = config
        self._coordinator = coordinator
        self._trainings = trainings
        self._federation = federation
        self._pipeline = pipeline
        self._sessions = sessions
        self._blobs = blobs
        self._leftovers = leftovers

    async def Join(  # noqa: N802  # named by the wire, as all methods here
        self, request: federation_pb2.JoinRequest, context: Any
    ) -> federation_pb2.JoinResponse:
        name = caller().name
        try:
            remembered = await self._admit(name, request, host=host_of(context.peer()))
        except TwinError:  # of a second process: the first one works on
            raise
        except SottoError as error:
            if name in self._federation.roster.names:
                lost = f"the aggregator's ledger lacks an entry that {name} knows of"
                self._sessions.refuse(name, lost if isinstance(error, LedgerError) else error.message)
            raise
        self._sessions.shown(name, certificate_of(context))
        LOG.info("party %s joined (Sotto %s)", name, request.software_version)
        return federation_pb2.JoinResponse(
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            federation=self._federation.roster.federation,
            public_key=canonical_bytes(self._federation.keyring.to_json()),
            key_id=self._federation.keyring.key_id,
            roster=signed_to_proto(self._federation.signed_roster),
            aggregator_verify_key=self._federation.signing_key.verify_key,
            custody=self._federation.custody,
            heartbeat_interval_s=self._config.server.heartbeat_interval_s,
            party_ledger=heads_to_proto(remembered, await self._trainings.roots_of(name, remembered)),
        )

    async def _admit(self, name: str, request: federation_pb2.JoinRequest, *, host: str) -> tuple[Head, ...]:
        """What is remembered of the party's ledger, once all that it says of itself is in order."""
        if request.protocol_version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
            spoken = request.protocol_version or "none"
            raise VersionError(
                f"this aggregator speaks protocol {PROTOCOL_VERSION}, party {name} {spoken}",
                protocol=PROTOCOL_VERSION.partition(".")[0],
            )
        if len(request.verify_key) != 32:  # Ed25519
            raise InvalidInput("a verification key has 32 bytes", violations={"verify_key": "must have 32 bytes"})
        standings = standings_from_proto(request.tasks)
        declared = declared_rows(request, most=self._config.limits.max_declared_rows)
        if self._federation.pinned:
            self._check_member(name, request)
        if request.instance_id:
            self._sessions.check_place(name, request.instance_id, host=host)
        if not self._federation.pinned:
            await self._coordinator.enrol(name, request.verify_key)
        remembered = await self._coordinator.meet(name, heads_from_proto(request.aggregator_ledger))
        self._federation.declare(name, declared)
        self._federation.readiness.tell(name, standings)
        self._federation.disclosed.joined(name, request.instance_id)
        return remembered

    def _check_member(self, name: str, request: federation_pb2.JoinRequest) -> None:
        roster = self._federation.roster
        member = roster.member(name)
        if request.key_id and roster.key_id and request.key_id != roster.key_id:
            raise KeyMaterialError(
                f"party {name} has public key {request.key_id}, this federation has {roster.key_id}: "
                "use the kit of this deal",
                party=name,
                key_id=roster.key_id,
            )
        if request.roster_digest and request.roster_digest != roster.digest:
            raise KeyMaterialError(
                f"party {name} has another roster than this aggregator: use one kit",
                party=name,
                roster_digest=roster.digest,
            )
        if member.verify_key != request.verify_key:
            raise SignatureError(
                f"party {name} signs with another key than the roster has",
                party=name,
                verify_key=member.verify_key.hex(),
            )

    async def StreamAssignments(  # noqa: N802
        self, request: federation_pb2.StreamAssignmentsRequest, context: Any
    ) -> AsyncIterator[federation_pb2.Assignment]:
        name = caller().name
        self._federation.roster.member(name)
        session = self._sessions.open(name, request.session_id[:64], host=host_of(context.peer()))
        try:
            rows = [await self._trainings.row(each.job_id, each.round) for each in request.in_hand[:64]]
            self._sessions.offer(name, [*rows, *self._trainings.rows()])
        except NotFoundError:
            LOG.warning("party %s has a round in hand that this aggregator does not know", name)
        self._coordinator.wake()
        try:
            while True:
                assignment = await self._next(session)
                if assignment is None:
                    return
                yield assignment
        finally:
            self._sessions.close(session)

    async def _next(self, session: Session) -> federation_pb2.Assignment | None:
        """The next thing to push, or a heartbeat; None when a newer stream took over."""
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(session.queue.get(), self._config.server.heartbeat_interval_s)
        return federation_pb2.Assignment(heartbeat=federation_pb2.Heartbeat())

    async def DownloadModel(  # noqa: N802
        self, request: federation_pb2.DownloadModelRequest, context: Any
    ) -> AsyncIterator[common_pb2.DataChunk]:
        row = await self._row(request.round, cohort=True)
        with self._sessions.flows.open(row, _under_way):
            async for chunk in send_blob(self._blobs, row.model_sha256):
                yield chunk

    async def AwaitQuorum(  # noqa: N802
        self, request: federation_pb2.AwaitQuorumRequest, context: Any
    ) -> federation_pb2.AwaitQuorumResponse:
        row = await self._row(request.round, cohort=True)
        with self._sessions.flows.open(row, _under_way):
            reached = await self._trainings.quorum(row, caller().name, at_most_s=QUORUM_S)
        return federation_pb2.AwaitQuorumResponse(reached=reached)

    async def CommitRoot(  # noqa: N802
        self, request: federation_pb2.CommitRootRequest, context: Any
    ) -> federation_pb2.CommitRootResponse:
        name = caller().name
        row = await self._row(request.round, cohort=True)
        signed = signed_from_proto(request.root)
        statement = self._root_statement(row, name, signed)
        if row.roots.get(name) != signed.to_json():  # said again it may be older than what was told since
            await self._told(row, name, statement.ledger_head)
        budget = tuple(_disclosed(request, f"example_epsilon_{each}") for each in ("spent", "left", "left_delta"))
        await self._trainings.happened(row.job_id, row.number, RootCommitted(name, signed.to_json(), budget))
        return federation_pb2.CommitRootResponse()

    def _root_statement(self, row: RoundRow, name: str, signed: Signed) -> RootStatement:
        """What a party signed, once it is what this round can use."""
        key = self._federation.roster.member(name).verify_key
        statement = RootStatement.from_statement(open_signed(signed, ROOT_KIND, verify_key=key))
        layout = plan_of(row.plan).layout
        body_bytes = layout["ciphertext_count"] * layout["ciphertext_bytes"]
        # The signer's name is not under the signature, and is what others will look the key up by.
        if statement.plan != row.plan_digest or {statement.contributor, signed.signer} != {name}:
            raise SignatureError(f"the root of {name} was signed for another round or by another name", party=name)
        # Root and proof go to every party with the frozen list.
        if not _ROOT.fullmatch(statement.root) or not _PROOF.fullmatch(statement.proof):
            raise InvalidInput(f"the root or the proof of {name} is not what it should be, in hex", party=name)
        if (statement.ciphertexts, statement.body_bytes) != (layout["ciphertext_count"], body_bytes):
            raise InvalidInput(
                f"the root of {name} announces {statement.ciphertexts} ciphertexts, the plan has "
                f"{layout['ciphertext_count']}",
                party=name,
            )
        return statement

    async def UploadUpdate(  # noqa: N802
        self, request_iterator: AsyncIterator[federation_pb2.UploadUpdateRequest], context: Any
    ) -> federation_pb2.UploadUpdateResponse:
        name = caller().name
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput("an upload begins with its header")
        row = await self._row(first.header.round, cohort=True)
        if self._checked_update(row, name, first.header) is None:
            return federation_pb2.UploadUpdateResponse(accepted=True)  # it was stored; the answer was lost
        async with self._sessions.flows.upload(row, name, Work.REVEAL, _collecting) as upload:
            row = await self._row(first.header.round, cohort=True)
            statement = self._checked_update(row, name, first.header)
            if statement is None:  # an older upload brought it meanwhile
                return federation_pb2.UploadUpdateResponse(accepted=True)
            await self._told(row, name, first.header.ledger_head)  # before a ciphertext of it is kept
            header, counter = first.header.batch_header, _Counter(first.ByteSize())
            hasher = _LeafHasher(statement, header, plan_of(row.plan).layout["ciphertext_bytes"])
            writer = await self._received(hasher.through(counter.bodies(request_iterator)), statement.body_bytes)
            await upload.settle(self._store_update(row, statement, header, writer=writer, counter=counter))
        return federation_pb2.UploadUpdateResponse(accepted=True)

    def _checked_update(self, row: RoundRow, name: str, header: federation_pb2.UpdateHeader) -> RootStatement | None:
        """What the party committed to, once an upload that begins so can be taken; None for one that is there."""
        signed = signed_from_proto(header.root)
        statement = self._root_statement(row, name, signed)
        committed = row.roots.get(name) == signed.to_json()
        if committed and name in row.batches:
            return None
        if not _collecting(row):
            raise StateError(f"round {row.number} takes no uploads now: it is {row.state.value}", party=name)
        if not committed:
            raise ConflictError(f"party {name} uploads what is not on the frozen list of this round", party=name)
        if len(header.batch_header) > LARGEST_HEADER_BYTES:
            raise LimitError(f"a batch header has at most {LARGEST_HEADER_BYTES} bytes")
        check_batch_header(plan_of(row.plan), row.plan_digest, name, header.batch_header)
        if statement.body_bytes > self._config.limits.max_update_bytes:
            raise LimitError(f"an update of {statement.body_bytes} bytes is larger than limits.max_update_bytes")
        return statement

    async def _received(self, pieces: AsyncIterator[bytes], size: int) -> BlobWriter:
        """A body whose size is fixed before a byte is kept, not yet stored; there is a file from its first byte on."""
        writer = self._blobs.writer()
        try:
            await receive_pieces(pieces, writer, size=size)
        except BaseException:
            writer.abort()
            raise
        return writer

    async def _store_update(
        self, row: RoundRow, statement: RootStatement, header: bytes, *, writer: BlobWriter, counter: _Counter
    ) -> None:
        name = statement.contributor
        with trying(self._leftovers) as kept, writer:
            ref = await asyncio.to_thread(writer.commit)
            kept.add(ref.sha256)
            await self._pipeline.check_body(row, ref.sha256, statement)
            batch = Batch(header.hex(), ref.sha256, statement.body_bytes)
            await self._trainings.happened(row.job_id, row.number, BatchStored(name, batch, counter.total))

    async def _told(self, row: RoundRow, party: str, digest: str) -> None:
        """Remember the head of a party's ledger; one that is not said is not known."""
        if digest:
            await self._coordinator.told(party, Head(digest, row.job_id, row.number))

    async def DownloadContribution(  # noqa: N802
        self, request: federation_pb2.DownloadContributionRequest, context: Any
    ) -> AsyncIterator[common_pb2.DataChunk]:
        row = await self._row(request.round, cohort=False)
        if request.contributor not in row.contributors or caller().name not in row.asked:
            raise NotFoundError(f"{request.contributor!r} contributed nothing that {caller().name} is asked to open")
        with self._sessions.flows.open(row, _under_way):
            async for chunk in send_blob(self._blobs, row.batches[request.contributor].sha256):
                yield chunk

    async def UploadShares(  # noqa: N802
        self, request_iterator: AsyncIterator[federation_pb2.UploadSharesRequest], context: Any
    ) -> federation_pb2.UploadSharesResponse:
        name = caller().name
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput("shares begin with their header")
        row = await self._row(first.header.round, cohort=False)
        if self._checked_shares(row, name, first.header) is None:
            return federation_pb2.UploadSharesResponse(accepted=True)  # it was stored; the answer was lost
        asked = partial(_asked_to_open, party=name)
        async with self._sessions.flows.upload(row, name, Work.OPEN, asked) as upload:
            row = await self._row(first.header.round, cohort=False)
            announced = self._checked_shares(row, name, first.header)
            if announced is None:
                return federation_pb2.UploadSharesResponse(accepted=True)
            writer = await self._received(_Counter(0).bodies(request_iterator), announced.size)
            await upload.settle(self._store_shares(row, name, announced.sha256, writer=writer))
        return federation_pb2.UploadSharesResponse(accepted=True)

    def _checked_shares(self, row: RoundRow, name: str, header: federation_pb2.SharesHeader) -> BlobRef | None:
        """What the holder announces, once it can be taken; None for what is there. Before a byte of it is kept."""
        signed = signed_from_proto(header.shares)
        key = self._federation.roster.member(name).verify_key
        statement = open_signed(signed, SHARES_KIND, verify_key=key)
        expected = {"plan": row.plan_digest, "aggregate_root": row.aggregate_root, "party": name}
        if {field: statement.get(field) for field in expected} != expected:
            raise SignatureError(f"the shares of {name} are for another round, aggregate or party", party=name)
        if not _asked_to_open(row, party=name):
            if row.shares.get(name) == statement.get("sha256"):
                return None
            raise StateError(f"party {name} is not asked for a share in round {row.number}", party=name)
        layout, size = plan_of(row.plan).layout, statement.get("bytes")
        most = layout["ciphertext_count"] * layout["ciphertext_bytes"] + SHARE_OVERHEAD_BYTES
        if not isinstance(size, int) or not 0 < size <= most:
            raise LimitError(f"shares of this round have at most {most} bytes")
        return BlobRef(check_digest(str(statement.get("sha256"))), size)

    async def _store_shares(self, row: RoundRow, name: str, sha256: str, *, writer: BlobWriter) -> None:
        with trying(self._leftovers) as kept, writer:
            ref = await asyncio.to_thread(writer.commit, sha256)
            kept.add(ref.sha256)
            await self._trainings.happened(row.job_id, row.number, ShareStored(name, ref.sha256))

    async def ReportFailure(  # noqa: N802
        self, request: federation_pb2.ReportFailureRequest, context: Any
    ) -> federation_pb2.ReportFailureResponse:
        name = caller().name
        row = await self._row(request.round, cohort=False)
        failure = failure_of(request, task=plan_of(row.plan).task)
        LOG.warning("party %s in round %d of job %s: %s", name, row.number, row.job_id, failure.message)
        with contextlib.suppress(SottoError):  # a party that has no part in the round changes nothing
            await self._trainings.happened(row.job_id, row.number, PartyFailed(name, failure))
        return federation_pb2.ReportFailureResponse()

    async def TellReadiness(  # noqa: N802
        self, request: federation_pb2.TellReadinessRequest, context: Any
    ) -> federation_pb2.TellReadinessResponse:
        name = self._federation.roster.member(caller().name).name
        self._federation.readiness.tell(name, standings_from_proto(request.tasks))
        self._coordinator.wake()
        return federation_pb2.TellReadinessResponse()

    async def _row(self, name: federation_pb2.RoundName, *, cohort: bool) -> RoundRow:
        """The round, if the caller has a part in it; otherwise it does not exist for them."""
        party = caller().name
        row = await self._trainings.row(name.job_id, name.round)
        if party not in row.cohort and (cohort or party not in row.holders):
            raise NotFoundError(f"no round {name.round} of job {name.job_id!r} for party {party}")
        return row


def _under_way(row: RoundRow) -> bool:
    """Whether what a round needs may still be fetched."""
    return not row.at_rest


def _collecting(row: RoundRow) -> bool:
    """Whether a round takes updates."""
    return row.state is RoundState.COLLECTING and row.frozen_list is not None


def _asked_to_open(row: RoundRow, *, party: str) -> bool:
    """Whether a round takes a share of this party."""
    return wanted(row, party) is Work.OPEN


class _Counter:
    """The body parts of an upload, counted as they travel."""

    def __init__(self, header_bytes: int) -> None:
        self.total = header_bytes

    async def bodies(self, requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        async for request in requests:
            if request.WhichOneof("part") != "body":
                raise InvalidInput("after its header an upload holds body parts only")
            self.total += request.ByteSize()
            yield request.body


def _disclosed(request: federation_pb2.CommitRootRequest, field: str) -> float | None:
    """What a party discloses of its ε; it ends up in the job's history, which holds numbers only."""
    if not request.HasField(field):  # type: ignore[arg-type]  # one of the optional fields
        return None
    value = float(getattr(request, field))
    if not math.isfinite(value):
        raise InvalidInput("a disclosed ε is a finite number", violations={field: "must be finite"})
    return value


class _LeafHasher:
    """Passes on a body that arrives in pieces of any length, and ends with DigestError unless it has its root.

    A body of another size is not judged here: who counts the bytes says what is wrong with it.
    """

    def __init__(self, statement: RootStatement, header: bytes, ciphertext_bytes: int) -> None:
        self._hasher = MerkleHasher()
        self._hasher.add(header)
        self._statement = statement
        self._width = ciphertext_bytes
        self._pending = b""

    async def through(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same pieces."""
        size = 0
        async for piece in pieces:
            size += len(piece)
            data = self._pending + piece
            whole = len(data) - len(data) % self._width
            for start in range(0, whole, self._width):
                self._hasher.add(data[start : start + self._width])
            self._pending = data[whole:]
            yield piece
        statement = self._statement
        if size == statement.body_bytes and self._hasher.root() != statement.root:
            raise DigestError(
                f"the upload of {statement.contributor} does not have the root it committed to",
                party=statement.contributor,
            )
