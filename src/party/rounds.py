"""One party's part in a round: contribute, reveal, open. Durable before visible; refused rather than guessed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection

from ..communication.generated import federation_pb2, federation_pb2_grpc
from ..communication.messages import signed_from_proto, signed_to_proto
from ..communication.streams import blob_pieces, receive_blob
from ..errors import (
    AbandonedError,
    BudgetError,
    OpeningError,
    PlanError,
    SottoError,
    UnavailableError,
    WorkerError,
    meaning,
)
from ..jobs.executors.pool import WorkerPool
from ..protocol.batches import StoredBatch, expected_header
from ..protocol.canonical import finite
from ..protocol.plan import ROOT_KIND, SHARES_KIND, TRANSCRIPT_KIND, OpeningStatement, RootStatement, RoundPlan
from ..protocol.roster import AGGREGATOR
from ..protocol.signing import Signed, open_signed
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.heads import Head
from .accounts import PartyAccounts
from .home import Home
from .orders import OrderBook, Ordered, check_order
from .rules import (
    CheckedPlan,
    check_contribution,
    check_list,
    check_opening,
    check_plan,
    check_reveal,
    describe,
    open_plan,
)
from .store import PartyRound, RoundMemory, Stage, check_same
from .work import dataset_options

LOG = logging.getLogger("sotto.party")

PIECE_BYTES: Final = 1 << 19
"""Of an upload in one message."""

NO_CONTRIBUTION: Final = "this party could not compute its contribution"
"""All that anybody hears of a failure once data was touched: which failure it was may tell of a row."""

Stub: TypeAlias = "federation_pb2_grpc.FederationServiceAsyncStub"
"""Exists for the type checker only: the generated stub's asynchronous face."""


class RoundWorker:
    """Does what an assignment asks, if the rules allow it."""

    def __init__(
        self,
        *,
        home: Home,
        database: Database,
        memory: RoundMemory,
        accounts: PartyAccounts,
        orders: OrderBook,
        blobs: Blobs,
        pool: WorkerPool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home = home
        self._database = database
        self._memory = memory
        self._accounts = accounts
        self._orders = orders
        self._blobs = blobs
        self._pool = pool
        self._clock = clock

    # --- contribute ---------------------------------------------------------------------------------------------------

    async def contribute(self, stub: Stub, name: federation_pb2.RoundName, work: federation_pb2.Contribute) -> None:
        """Train and commit: send the signed root of the finished batch."""
        signed = signed_from_proto(work.plan)
        checked = self._check(signed, name)
        check_contribution(checked.plan, self._home.config)
        ordered = await self._check_order(work, checked)
        checked = replace(checked, scientist=ordered.order.scientist if ordered else "")
        try:
            row = await self._database.run(lambda c: self._begin(c, checked, ordered))
        except BudgetError as error:
            refused = error
            await self._database.run(lambda c: self._accounts.refuse(c, checked, refused, now=self._clock()))
            raise
        if row.stage is Stage.FAILED:
            await self._report(stub, name, "contribute", row.failure)
            return
        if row.stage is Stage.RESERVED:
            LOG.info("contributing", extra={**describe(checked.plan), "ordered_by": checked.scientist or "nobody"})
            row = await self._train(stub, checked, signed, row)
        plan, disclose = checked.plan, self._home.config.policy.disclose_epsilon
        balance = await self._database.run(
            lambda c: self._accounts.example_balance(c, plan.task, delta=float(plan.local.delta))
        )
        request = federation_pb2.CommitRootRequest(
            round=name,
            root=signed_to_proto(Signed.from_json(row.root or {})),
            example_epsilon_spent=finite(balance.spent) if disclose else None,
            example_epsilon_left=finite(balance.left) if disclose else None,
            example_epsilon_left_delta=balance.left_delta if disclose else None,
        )
        await stub.CommitRoot(request)

    def _begin(self, connection: Connection, checked: CheckedPlan, ordered: Ordered | None) -> PartyRound:
        """The remembered round, or a new one with its charges, counted on its order; all in one transaction."""
        plan = checked.plan
        known = self._memory.find(connection, plan.job_id, plan.round)
        fresh = PartyRound(job_id=plan.job_id, number=plan.round, plan=checked.digest, stage=Stage.RESERVED)
        if known is not None:
            check_same(known, fresh)
            if known.ended:
                raise PlanError("this round has ended")
            return known
        self._orders.begin(connection, ordered, plan, now=self._clock())
        self._accounts.reserve(connection, checked, now=self._clock())
        self._memory.put(connection, fresh)
        return fresh

    async def _train(self, stub: Stub, checked: CheckedPlan, signed: Signed, row: PartyRound) -> PartyRound:
        plan = checked.plan
        dataset = self._home.config.datasets[plan.task]
        options = dataset_options(dataset.options, plan)
        request = federation_pb2.DownloadModelRequest(round=_round_name(row))
        limit = self._home.config.limits.max_update_bytes
        await receive_blob(stub.DownloadModel(request), self._blobs, max_bytes=limit, expected_sha256=plan.model_sha256)
        params = {
            **self._params(checked, signed),
            "name": self._home.name,
            "options": options,
            "declared_rows": dataset.declared_rows,
        }
        try:
            batch = StoredBatch(**await self._pool.run("contribute", params))
        except (AbandonedError, UnavailableError):  # this process is being stopped: it is done again
            raise
        except Exception as error:
            raise await self._failed_on_data(row, error) from None
        finally:
            self._blobs.path(plan.model_sha256).unlink(missing_ok=True)
        return await self._database.run(lambda c: self._commit(c, row, plan, batch))

    def _commit(self, connection: Connection, row: PartyRound, plan: RoundPlan, batch: StoredBatch) -> PartyRound:
        """Sign for the batch, and for where the ledger is: others then know an entry that it must have from now on."""
        statement = RootStatement(
            plan=row.plan,
            contributor=self._home.name,
            root=batch.root,
            ciphertexts=int(plan.layout["ciphertext_count"]),
            body_bytes=batch.size,
            proof=batch.proof,
            ledger_head=self._accounts.head(connection),
        )
        root = self._home.signing_key.sign(ROOT_KIND, statement.to_statement(), signer=self._home.name)
        row = replace(row, stage=Stage.COMMITTED, batch=batch.to_json(), root=root.to_json())
        self._memory.put(connection, row)
        return row

    async def _failed_on_data(self, row: PartyRound, error: Exception) -> WorkerError:
        """What is said of a failure that a row may have caused; that it happened is told, so the round is spent."""
        failure = WorkerError(NO_CONTRIBUTION)
        # Of the worker's own errors the private text is a place in the code or an exit status; others may quote a row.
        detail = error.private if isinstance(error, WorkerError) else ""
        LOG.error("no contribution: %s %s", type(error).__name__, detail, extra={"job": row.job_id})
        said = replace(row, stage=Stage.FAILED, failure=(meaning(failure).reason, failure.message))

        def note(connection: Connection) -> None:
            reason = "computing the contribution failed after data was touched"
            self._accounts.spend(connection, row.job_id, row.number, now=self._clock(), reason=reason)
            # That it failed is all that anybody is ever told of it: nothing more can come, after a reset say.
            figures = {"failure": said.failure[0] if said.failure else ""}
            self._accounts.release(connection, row.job_id, row.number, figures=figures, now=self._clock())
            self._memory.put(connection, said)

        try:
            await self._database.run(note)
        except SottoError as unwritten:  # then it is neither told nor given back: the round is done again, or ends
            raise UnavailableError("a failed contribution could not be entered") from unwritten
        return failure

    # --- reveal -------------------------------------------------------------------------------------------------------

    async def reveal(self, stub: Stub, name: federation_pb2.RoundName, work: federation_pb2.Reveal) -> None:
        """Upload the stored batch, once the frozen list is one that this party can live with."""
        signed, listed = signed_from_proto(work.plan), signed_from_proto(work.frozen_list)
        checked = self._check(signed, name)
        roots = check_list(listed, self._home.roster, plan=checked.plan, plan_digest=checked.digest)

        def accept(connection: Connection) -> tuple[PartyRound, str]:
            row = self._memory.find(connection, name.job_id, name.round)
            if row is None or row.plan != checked.digest or row.batch is None:
                raise OpeningError("this party has committed to nothing in this round")
            if row.ended:
                raise PlanError("this round has ended")
            digest = check_reveal(row, listed, roots, name=self._home.name)
            if row.stage is Stage.COMMITTED:
                self._accounts.spend(connection, row.job_id, row.number, now=self._clock())
                row = replace(row, stage=Stage.REVEALED, list=digest)
                self._memory.put(connection, row)
            return row, self._accounts.head(connection)

        row, head = await self._database.run(accept)
        answer = await stub.UploadUpdate(self._upload(row, ledger_head=head))
        if answer.accepted:
            await self._database.run(lambda c: self._delivered(c, row))
            LOG.info("delivered", extra={"job": row.job_id, "round": row.number})

    def _delivered(self, connection: Connection, row: PartyRound) -> None:
        """What was shown is entered with it."""
        figures = {"plan": row.plan, "list": row.list, "root": str((row.batch or {})["root"])}
        self._accounts.release(connection, row.job_id, row.number, figures=figures, now=self._clock())
        self._memory.put(connection, replace(row, stage=Stage.DELIVERED))

    async def _upload(self, row: PartyRound, *, ledger_head: str) -> AsyncIterator[federation_pb2.UploadUpdateRequest]:
        batch = StoredBatch(**(row.batch or {}))
        header = federation_pb2.UpdateHeader(
            round=_round_name(row),
            root=signed_to_proto(Signed.from_json(row.root or {})),
            batch_header=bytes.fromhex(batch.header),
            ledger_head=ledger_head,
        )
        yield federation_pb2.UploadUpdateRequest(header=header)
        async for piece in blob_pieces(self._blobs, batch.sha256, piece_bytes=PIECE_BYTES):
            yield federation_pb2.UploadUpdateRequest(body=piece)

    # --- open ---------------------------------------------------------------------------------------------------------

    async def open(self, stub: Stub, name: federation_pb2.RoundName, work: federation_pb2.Open) -> None:
        """Send a share of the aggregate that this party multiplied itself, and of no other in this round, ever."""
        signed, listed = signed_from_proto(work.plan), signed_from_proto(work.frozen_list)
        checked = self._check(signed, name)
        roots = check_list(listed, self._home.roster, plan=checked.plan, plan_digest=checked.digest)
        row = await self._database.run(lambda c: self._memory.find(c, name.job_id, name.round))
        ordered = await self._check_order(work, checked) if row is None else None  # else it was, for this plan
        row = row or PartyRound(job_id=name.job_id, number=name.round, plan=checked.digest, stage=Stage.WITNESS)
        opening = check_opening(
            signed_from_proto(work.opening),
            self._home.roster,
            row=row,
            plan=checked.plan,
            listed=listed,
            roots=roots,
            name=self._home.name,
        )
        if not row.share:
            row = await self._make_share(stub, row, checked, ordered, signed=signed, opening=opening, roots=roots)
        await stub.UploadShares(self._shares(row))
        LOG.info("opened", extra={"job": row.job_id, "round": row.number, "contributions": len(opening.contributors)})

    async def _make_share(
        self,
        stub: Stub,
        row: PartyRound,
        checked: CheckedPlan,
        ordered: Ordered | None,
        *,
        signed: Signed,
        opening: OpeningStatement,
        roots: dict[str, RootStatement],
    ) -> PartyRound:
        mine = (row.batch or {}).get("sha256")
        fetched: set[str] = set()
        try:
            return await self._open_fetched(
                stub, row, checked, ordered, signed=signed, opening=opening, roots=roots, fetched=fetched
            )
        finally:
            for blob in fetched - {mine}:  # refused or opened: nobody needs them any more
                self._blobs.path(blob).unlink(missing_ok=True)

    async def _open_fetched(
        self,
        stub: Stub,
        row: PartyRound,
        checked: CheckedPlan,
        ordered: Ordered | None,
        *,
        signed: Signed,
        opening: OpeningStatement,
        roots: dict[str, RootStatement],
        fetched: set[str],
    ) -> PartyRound:
        batches = {}
        for name in opening.contributors:
            batches[name] = await self._fetch(stub, row, checked, roots[name])
            fetched.add(batches[name].sha256)
        params = self._params(checked, signed)
        own = {name: batch.to_json() for name, batch in batches.items()}
        aggregate = StoredBatch(
            **await self._pool.run("recompute", {**params, "name": self._home.name, "batches": own})
        )
        fetched.add(aggregate.sha256)
        if aggregate.root != opening.aggregate_root:
            raise OpeningError("the aggregate that this party multiplied is not the one it is asked to open")
        row = replace(row, aggregate_root=aggregate.root, list=opening.list)
        # Before a share exists: from here on no other aggregate of this round is opened, whatever happens.
        await self._database.run(lambda c: self._witness(c, row, checked.plan, ordered))
        share = await self._pool.run(
            "open_share",
            {
                **params,
                "name": self._home.name,
                "share": str(self._home.config.keys.share),
                "aggregate": aggregate.sha256,
                "aggregate_root": aggregate.root,
            },
        )
        row = replace(row, share=share["sha256"])
        await self._database.run(lambda c: self._memory.put(c, row))
        return row

    def _witness(self, connection: Connection, row: PartyRound, plan: RoundPlan, ordered: Ordered | None) -> None:
        """Note what is about to be opened. Of a round that this party hears of only now, begun elsewhere before, the
        order counts it too."""
        late_s = ordered.spec.round_timeout_s if ordered else 0.0
        self._orders.begin(connection, ordered, plan, now=self._clock(), late_s=late_s)
        self._memory.put(connection, row)

    async def _fetch(self, stub: Stub, row: PartyRound, checked: CheckedPlan, root: RootStatement) -> StoredBatch:
        """A contributor's batch; its own it has. Whether it has its root is found while multiplying."""
        header = expected_header(checked.plan, checked.digest, root.contributor).encode().hex()
        if root.contributor == self._home.name and row.batch is not None:
            return StoredBatch(**row.batch)
        request = federation_pb2.DownloadContributionRequest(round=_round_name(row), contributor=root.contributor)
        limit = min(self._home.config.limits.max_update_bytes, root.body_bytes)
        ref = await receive_blob(stub.DownloadContribution(request), self._blobs, max_bytes=limit)
        return StoredBatch(header, ref.sha256, ref.size, root.root, root.proof)

    async def _shares(self, row: PartyRound) -> AsyncIterator[federation_pb2.UploadSharesRequest]:
        size = await asyncio.to_thread(self._blobs.size, row.share)
        statement = {
            "plan": row.plan,
            "aggregate_root": row.aggregate_root,
            "party": self._home.name,
            "sha256": row.share,
            "bytes": size,
        }
        signed = self._home.signing_key.sign(SHARES_KIND, statement, signer=self._home.name)
        header = federation_pb2.SharesHeader(round=_round_name(row), shares=signed_to_proto(signed))
        yield federation_pb2.UploadSharesRequest(header=header)
        async for piece in blob_pieces(self._blobs, row.share, piece_bytes=PIECE_BYTES):
            yield federation_pb2.UploadSharesRequest(body=piece)

    # --- the end of a round -------------------------------------------------------------------------------------------

    async def ended(self, name: federation_pb2.RoundName, work: federation_pb2.RoundEnded) -> None:
        """Note how the round ended; give back what was reserved if no byte left; drop what nobody needs any more."""
        head: Head | None = None
        if work.HasField("transcript"):
            signed = signed_from_proto(work.transcript)
            transcript = open_signed(signed, TRANSCRIPT_KIND, verify_key=self._home.roster.verify_key(AGGREGATOR))
            head = Head(str(transcript.get("ledger_head")), name.job_id, name.round)

        def note(connection: Connection) -> PartyRound | None:
            row = self._memory.find(connection, name.job_id, name.round)
            if row is None or row.ended:
                return None
            if row.stage in (Stage.RESERVED, Stage.COMMITTED):
                reason = f"the round ended ({work.state[:20]}) before anything was sent"
                self._accounts.return_(connection, row.job_id, row.number, now=self._clock(), reason=reason)
            self._memory.put(connection, replace(row, ended=work.state[:20] or "ENDED"))
            if head is not None:
                self._accounts.remember(connection, head, key=self._home.aggregator_key)
            return row

        row = await self._database.run(note)
        if row is not None:
            LOG.info("round ended: %s %s", work.state, work.reason, extra={"job": row.job_id, "round": row.number})
            for blob in [(row.batch or {}).get("sha256", ""), row.share]:
                if blob:
                    self._blobs.path(blob).unlink(missing_ok=True)

    # --- refusals -----------------------------------------------------------------------------------------------------

    async def failed(
        self, stub: Stub, name: federation_pb2.RoundName, *, stage: str, plan: str, error: BaseException
    ) -> None:
        """Remember a refusal or failure, give back what did not leave, and tell the aggregator, by public text.

        A round in which data was touched is not given back: `_failed_on_data` has entered it as spent.
        `plan` is the digest of what was asked for: a refusal of another plan changes nothing in the round as it is.
        """
        text = error.message if isinstance(error, SottoError) else "internal error"
        if isinstance(error, BudgetError) and not self._home.config.policy.disclose_epsilon:
            text = "this party's budget does not allow it"
        failure = (meaning(error).reason, text)

        def note(connection: Connection) -> None:
            row = self._memory.find(connection, name.job_id, name.round)
            if stage == "contribute" and row is not None and (row.stage, row.plan) == (Stage.RESERVED, plan):
                self._accounts.return_(connection, row.job_id, row.number, now=self._clock(), reason=failure[0])
                self._memory.put(connection, replace(row, stage=Stage.FAILED, failure=failure))

        await self._database.run(note)
        await self._report(stub, name, stage, failure)

    async def _report(self, stub: Stub, name: federation_pb2.RoundName, stage: str, failure: tuple[str, str]) -> None:
        request = federation_pb2.ReportFailureRequest(round=name, reason=failure[0], message=failure[1], stage=stage)
        await stub.ReportFailure(request)

    # --- shared -------------------------------------------------------------------------------------------------------

    def _check(self, signed: Signed, name: federation_pb2.RoundName) -> CheckedPlan:
        """The plan, verified before anything in it is believed, and of the round that the assignment names."""
        plan, _ = open_plan(signed, self._home.roster)
        if (plan.job_id, plan.round) != (name.job_id, name.round):
            raise PlanError("the assignment names another round than its plan")
        return check_plan(
            signed,
            self._home.roster,
            config=self._home.config,
            scheme=self._home.scheme(plan.scheme),
            pinned=self._home.pinned,
        )

    async def _check_order(
        self, work: federation_pb2.Contribute | federation_pb2.Open, checked: CheckedPlan
    ) -> Ordered | None:
        """The order that a round rests on. To see that it follows, it is planned again: that is for a thread."""
        return await asyncio.to_thread(
            check_order,
            signed_from_proto(work.order) if work.HasField("order") else None,
            checked.plan,
            roster=self._home.roster,
            scheme=self._home.scheme(checked.plan.scheme),
            allow_unsigned=self._home.config.policy.allow_unsigned_jobs,
        )

    def _params(self, checked: CheckedPlan, signed: Signed) -> dict[str, Any]:
        return {
            "plan": signed.statement.decode(),
            "plan_digest": checked.digest,
            "public": json.dumps(self._home.keyring.to_json()),
            "processes": self._pool.cores_for_a_unit(),
        }


def _round_name(row: PartyRound) -> federation_pb2.RoundName:
    return federation_pb2.RoundName(job_id=row.job_id, round=row.number)
