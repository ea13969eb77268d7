"""One party's part in a round: contribute, reveal, open. Durable before visible; refused rather than guessed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import Connection

from ..communication.generated import federation_pb2
from ..communication.messages import signed_from_proto, signed_to_proto
from ..communication.streams import blob_pieces
from ..encryption.scheme import Layout
from ..errors import (
    AbandonedError,
    BudgetError,
    OpeningError,
    PlanError,
    SottoError,
    StateError,
    StorageFullError,
    TaskError,
    UnavailableError,
    VersionError,
    WorkerError,
    meaning,
)
from ..jobs.executors.pool import WorkerPool
from ..learning.loading import CHECK_DATA
from ..protocol.batches import StoredBatch
from ..protocol.canonical import finite
from ..protocol.plan import ROOT_KIND, TRANSCRIPT_KIND, RootStatement, RoundPlan
from ..protocol.roster import AGGREGATOR
from ..protocol.signing import Signed, open_signed
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.heads import Head
from ..storage.leftovers import BlobUses
from .accounts import ExampleBalance, PartyAccounts
from .home import Home
from .means import PIECE_BYTES, Means, Stub, round_name
from .openings import Openings
from .orders import OrderBook, Ordered
from .readiness import Readiness
from .rules import (
    CheckedPlan,
    check_contribution,
    check_list,
    check_reveal,
    describe,
)
from .store import PartyRound, RoundMemory, Stage, check_same
from .trials import Trials
from .work import dataset_options

LOG = logging.getLogger("sotto.party")

NO_CONTRIBUTION: Final = "this party could not compute its contribution"
"""All that anybody hears of a failure once data was touched: which failure it was may tell of a row."""

ROOM_BYTES: Final = 1 << 20
"""What a party writes before it joins, to see whether it can; and what is to be free beside its update."""

ASK_AGAIN_S: Final = 1.0
"""After an aggregator has said that too few can train a round, for which it takes its time, or should."""

MOST_TRAININGS: Final = 3
"""As often may the training of one round begin, of which a stop of this process ends all but the last. Each shows how
long it takes, or that it takes longer, for one charge."""

ENDS: Final = frozenset({"RELEASED", "FAILED", "CANCELLED"})
"""In what a round ends; of an aggregator that says something else only that it has ended is kept."""


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
        readiness: Readiness | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home = home
        self._database = database
        self._memory = memory
        self._accounts = accounts
        self._orders = orders
        self._blobs = blobs
        self._pool = pool
        self._readiness = readiness
        self._clock = clock
        self.uses = BlobUses(database, blobs, memory)
        self._means = Means(home=home, database=database, memory=memory, blobs=blobs, pool=pool, uses=self.uses)
        self.trials = Trials(pool, self.uses)
        self._openings = Openings(self._means, orders, clock=clock)
        self._trainings: dict[tuple[str, int], asyncio.Task[PartyRound]] = {}

    def check_room(self) -> None:
        """Write something, and take it away again: a party that cannot write is of no use to a round, and stays away.

        Raises:
            StorageError: it could not be written.
        """
        with self._blobs.writer() as writer:
            writer.write(bytes(ROOM_BYTES))

    async def stop(self) -> None:
        """End what runs whoever is connected; the rows stay as they are."""
        for key in list(self._trainings):
            await self._stop_training(*key)
        await self.trials.stop()
        await self.uses.settled()

    # --- contribute ---------------------------------------------------------------------------------------------------

    async def contribute(self, stub: Stub, name: federation_pb2.RoundName, work: federation_pb2.Contribute) -> None:
        """Train and commit: send the signed root of the finished batch."""
        signed = signed_from_proto(work.plan)
        checked = self._means.check(signed, name)
        check_contribution(checked.plan, self._home.config)
        ordered = await self._means.check_order(work, checked)
        checked = replace(checked, scientist=ordered.order.scientist if ordered else "")
        with self.uses.using(checked.plan.model_sha256):
            fetch = _once(lambda: self._fetch(stub, checked.plan))
            row = await self._accepted(checked, signed, ordered=ordered, fetch=fetch)
            if row.stage is Stage.FAILED:
                await self._report(stub, name, "contribute", row.failure)
                return
            if row.stage is Stage.RESERVED:
                size = Layout.from_json(checked.plan.layout).body_bytes + ROOM_BYTES
                await asyncio.to_thread(self._blobs.require_room, size)
                if not row.trainings and not await self._quorum(stub, name):
                    return
            if row.stage is Stage.RESERVED:
                LOG.info("contributing", extra={**describe(checked.plan), "ordered_by": checked.scientist or "nobody"})
                await self._train(checked, signed, row, fetch=fetch)
        plan, disclose = checked.plan, self._home.config.policy.disclose_epsilon
        row, balance = await self._database.run(lambda c: self._about_to_tell(c, name, plan))
        request = federation_pb2.CommitRootRequest(
            round=name,
            root=signed_to_proto(Signed.from_json(row.root or {})),
            example_epsilon_spent=finite(balance.spent) if disclose else None,
            example_epsilon_left=finite(balance.left) if disclose else None,
            example_epsilon_left_delta=balance.left_delta if disclose else None,
        )
        await stub.CommitRoot(request)

    async def _accepted(
        self, checked: CheckedPlan, signed: Signed, *, ordered: Ordered | None, fetch: Callable[[], Awaitable[None]]
    ) -> PartyRound:
        """The round, charged; what keeps every round of a job from being computed is found before, at no cost."""
        plan = checked.plan
        known = await self._database.run(lambda c: self._memory.find(c, plan.job_id, plan.round))
        if self._readiness is not None and (
            known is None or known.stage is Stage.RESERVED
        ):  # what is stored needs none
            await self._readiness.require(plan.task)
        if known is None:
            rows = self._readiness.rows_of(plan.task) if self._readiness is not None else None
            await self.trials.require(plan, signed, rows=rows, fetch=fetch)
        try:
            return await self._database.run(lambda c: self._begin(c, checked, ordered))
        except BudgetError as error:
            refused = error
            await self._database.run(lambda c: self._accounts.refuse(c, checked, refused, now=self._clock()))
            raise

    async def _quorum(self, stub: Stub, name: federation_pb2.RoundName) -> bool:
        """Waits until as many parties can train the round as it needs, for which nobody pays: what is reserved is given
        back if the round ends before. False: it has ended."""
        try:
            while True:
                answer = await stub.AwaitQuorum(federation_pb2.AwaitQuorumRequest(round=name))
                if answer.reached:
                    return True
                await asyncio.sleep(ASK_AGAIN_S)
        except StateError as error:
            LOG.info("it does not begin: %s", error.message, extra={"job": name.job_id, "round": name.round})
            return False
        except VersionError:  # an aggregator of before, which lets everybody begin at once
            return True

    async def _fetch(self, stub: Stub, plan: RoundPlan) -> None:
        """The plan's model; it counts as used by whoever asks."""
        name = federation_pb2.RoundName(job_id=plan.job_id, round=plan.round)
        pieces = stub.DownloadModel(federation_pb2.DownloadModelRequest(round=name))
        limit = self._home.config.limits.max_update_bytes
        await self._means.download(pieces, max_bytes=limit, expected_sha256=plan.model_sha256)

    def _begin(self, connection: Connection, checked: CheckedPlan, ordered: Ordered | None) -> PartyRound:
        """The remembered round, or a new one with its charges, counted on its order; all in one transaction."""
        plan = checked.plan
        known = self._memory.find(connection, plan.job_id, plan.round)
        fresh = PartyRound(job_id=plan.job_id, number=plan.round, plan=checked.digest, stage=Stage.RESERVED)
        if known is not None:
            check_same(known, fresh)
            if known.ended:
                raise PlanError("this round has ended")
            if known.stage is Stage.WITNESS:
                raise PlanError("this party has opened this round: it takes no other part in it")
            return known
        self._orders.begin(connection, ordered, plan, now=self._clock())
        self._accounts.reserve(connection, checked, now=self._clock())
        self._memory.put(connection, fresh)
        return fresh

    def _about_to_tell(
        self, connection: Connection, name: federation_pb2.RoundName, plan: RoundPlan
    ) -> tuple[PartyRound, ExampleBalance]:
        """The round with its root, which may be told now, and what it leaves of the budget. The charge is final: when
        the root comes tells how long the work took. (It is final since training began, but for rounds of before.)"""
        row = self._memory.find(connection, name.job_id, name.round)
        if row is None or row.root is None or row.ended:
            raise PlanError("this round has ended")
        self._accounts.spend(connection, row.job_id, row.number, now=self._clock(), reason="its root is told")
        return row, self._accounts.example_balance(connection, plan.task, delta=float(plan.local.delta))

    async def _train(
        self, checked: CheckedPlan, signed: Signed, row: PartyRound, *, fetch: Callable[[], Awaitable[None]]
    ) -> None:
        """Fetch the model and train, or wait for the training that is under way: it goes on without a connection. Else
        whoever breaks that could time the same round again and again, for one charge."""
        plan, key = checked.plan, (row.job_id, row.number)
        options = dataset_options(self._home.config.datasets[plan.task].options, plan)
        if key not in self._trainings:
            await fetch()
        if key not in self._trainings:
            self._trainings[key] = asyncio.create_task(self._contribution(checked, signed, options))
            self._trainings[key].add_done_callback(lambda done: self._training_ended(key, done))
        await asyncio.shield(self._trainings[key])

    def _training_ended(self, key: tuple[str, int], task: asyncio.Task[PartyRound]) -> None:
        """What came of it is in the round's row, also if nobody waits for it any more."""
        self._trainings.pop(key, None)
        if not task.cancelled():
            task.exception()

    async def _stop_training(self, job_id: str, number: int) -> None:
        task = self._trainings.get((job_id, number))
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _contribution(self, checked: CheckedPlan, signed: Signed, options: dict[str, Any]) -> PartyRound:
        """The round with its stored batch. From its first line on the charge is final: that no root has come by a time
        of the aggregator's choosing tells as much as when one comes."""
        plan = checked.plan
        params = {
            **self._means.params(checked, signed),
            "name": self._home.name,
            "options": options,
            "directory": str(self._home.config.directory),
            "declared_rows": self._home.config.datasets[plan.task].declared_rows,
        }
        with self.uses.using(plan.model_sha256), self.uses.storing():
            row = await self._database.run(lambda c: self._begin_training(c, plan))
            try:
                if row.trainings > MOST_TRAININGS:
                    raise WorkerError("the training of this round was begun too often")
                batch = StoredBatch(**await self._pool.run("contribute", params))
                return await self._database.run(lambda c: self._commit(c, plan, batch))
            except (AbandonedError, UnavailableError):  # this process is being stopped: it is done again
                raise
            except StorageFullError as error:  # what is written here is the batch, and its size is public
                LOG.error("no contribution: %s", error.message, extra={"job": row.job_id, "round": row.number})
                raise await self._spent_in_vain(row) from None
            except Exception as error:
                raise await self._failed_on_data(row, error, task=plan.task) from None

    def _begin_training(self, connection: Connection, plan: RoundPlan) -> PartyRound:
        row = self._memory.find(connection, plan.job_id, plan.round)
        if row is None or row.ended or row.stage is not Stage.RESERVED:
            raise PlanError("this round has ended")
        self._accounts.spend(connection, row.job_id, row.number, now=self._clock(), reason="training begins")
        row = replace(row, trainings=row.trainings + 1)
        self._memory.put(connection, row)
        return row

    def _commit(self, connection: Connection, plan: RoundPlan, batch: StoredBatch) -> PartyRound:
        """Sign for the batch, and for where the ledger is: others then know an entry that it must have from now on.
        Of a round that has ended or is being opened meanwhile nothing is kept."""
        row = self._memory.find(connection, plan.job_id, plan.round)
        if row is None or row.ended or row.aggregate_root or row.stage is not Stage.RESERVED:
            raise PlanError("this round has ended")
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

    async def _failed_on_data(self, row: PartyRound, error: Exception, *, task: str) -> WorkerError:
        """What is said of a failure that a row may have caused; that it happened is told, so the round is spent."""
        # Of the worker's own errors the private text is a place in the code or an exit status; others may quote a row.
        detail = error.private if isinstance(error, WorkerError) else ""
        advice = "" if CHECK_DATA in detail else f"; {CHECK_DATA}"
        text = f"no contribution: {type(error).__name__} {detail}{advice}"
        LOG.error("%s", text, extra={"job": row.job_id, "round": row.number, "task": task})
        if self._readiness is not None:
            self._readiness.look_again(task)
        return await self._spent_in_vain(row)

    async def _spent_in_vain(self, row: PartyRound) -> WorkerError:
        """Enter that a round has failed after data was touched; returns the one thing that is told of it."""
        failure = WorkerError(NO_CONTRIBUTION)
        said = (meaning(failure).reason, failure.message)

        def note(connection: Connection) -> None:
            now = self._memory.find(connection, row.job_id, row.number)
            if now is None or now.ended or now.stage is not Stage.RESERVED:
                return  # it ended meanwhile, and what there is to enter was entered then
            reason = "computing the contribution failed after data was touched"
            self._accounts.spend(connection, row.job_id, row.number, now=self._clock(), reason=reason)
            # That it failed is all that anybody is ever told of it: nothing more can come, after a reset say.
            figures = {"failure": said[0]}
            self._accounts.release(connection, row.job_id, row.number, figures=figures, now=self._clock())
            self._memory.put(connection, replace(now, stage=Stage.FAILED, failure=said))

        try:
            await self._database.run(note)
        except SottoError as unwritten:  # then it is neither told nor given back: the round is done again, or ends
            raise UnavailableError("a failed contribution could not be entered") from unwritten
        return failure

    # --- reveal -------------------------------------------------------------------------------------------------------

    async def reveal(self, stub: Stub, name: federation_pb2.RoundName, work: federation_pb2.Reveal) -> None:
        """Upload the stored batch, once the frozen list is one that this party can live with."""
        signed, listed = signed_from_proto(work.plan), signed_from_proto(work.frozen_list)
        checked = self._means.check(signed, name)
        roots = check_list(listed, self._home.roster, plan=checked.plan, plan_digest=checked.digest)

        def accept(connection: Connection) -> tuple[PartyRound, str]:
            row = self._memory.find(connection, name.job_id, name.round)
            if row is None or row.plan != checked.digest or row.batch is None:
                raise OpeningError("this party has committed to nothing in this round")
            if row.ended:
                raise PlanError("this round has ended")
            digest = check_reveal(row, listed, roots, name=self._home.name)
            if row.aggregate_root and row.stage is not Stage.DELIVERED:
                raise PlanError("this round is being opened: it is too late for this party's update")
            if row.stage is Stage.COMMITTED:
                row = replace(row, stage=Stage.REVEALED, list=digest)
                self._enter_shown(connection, row, reason="the upload begins")
                self._memory.put(connection, row)
            elif self._accounts.is_over(connection, row.job_id, row.number):
                raise PlanError("this round was charged to an accounting period that is over: it is not sent again")
            return row, self._accounts.head(connection)

        row, head = await self._database.run(accept)
        answer = await self._means.upload(stub.UploadUpdate, self._upload(row, ledger_head=head))
        if answer.accepted:
            await self._database.run(lambda c: self._delivered(c, name))
            LOG.info("delivered", extra={"job": row.job_id, "round": row.number})

    def _delivered(self, connection: Connection, name: federation_pb2.RoundName) -> None:
        row = self._memory.find(connection, name.job_id, name.round)
        if row is not None and row.stage is Stage.REVEALED:
            self._enter_shown(connection, row, reason="the upload is done")
            self._memory.put(connection, replace(row, stage=Stage.DELIVERED))

    def _enter_shown(self, connection: Connection, row: PartyRound, *, reason: str) -> None:
        """The charge is final, and the ledger holds what of the round anybody may have seen; once, whoever asks."""
        now = self._clock()
        self._accounts.spend(connection, row.job_id, row.number, now=now, reason=reason)
        self._accounts.release(connection, row.job_id, row.number, figures=_shown(row), now=now)

    async def _upload(self, row: PartyRound, *, ledger_head: str) -> AsyncIterator[federation_pb2.UploadUpdateRequest]:
        batch = StoredBatch(**(row.batch or {}))
        header = federation_pb2.UpdateHeader(
            round=round_name(row),
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
        await self._openings.open(stub, name, work)

    # --- the end of a round -------------------------------------------------------------------------------------------

    async def ended(self, name: federation_pb2.RoundName, work: federation_pb2.RoundEnded) -> None:
        """Note how the round ended; give back what was reserved if no training began; let go of what nobody needs."""
        head: Head | None = None
        if work.HasField("transcript"):
            signed = signed_from_proto(work.transcript)
            transcript = open_signed(signed, TRANSCRIPT_KIND, verify_key=self._home.roster.verify_key(AGGREGATOR))
            head = Head(str(transcript.get("ledger_head")), name.job_id, name.round)

        state = work.state if work.state in ENDS else "ENDED"

        def note(connection: Connection) -> PartyRound | None:
            row = self._memory.find(connection, name.job_id, name.round)
            if row is None or row.ended:
                return None
            self._settle(connection, row, state)
            self._memory.put(connection, replace(row, ended=state))
            if head is not None:
                self._accounts.remember(connection, head, key=self._home.aggregator_key)
            return row

        await self._stop_training(name.job_id, name.round)
        row = await self._database.run(note)
        if row is not None:
            LOG.info("round ended: %s %s", work.state, work.reason, extra={"job": row.job_id, "round": row.number})
            self.uses.let_go([(row.batch or {}).get("sha256", ""), row.share])

    def _settle(self, connection: Connection, row: PartyRound, state: str) -> None:
        """The ledger's last word on a round: given back if no training began, else spent, with what was shown of it.
        After this nothing more is."""
        if row.stage is Stage.RESERVED and not row.trainings:
            reason = f"the round ended ({state}) before training began"
            self._accounts.return_(connection, row.job_id, row.number, now=self._clock(), reason=reason)
        elif row.stage in (Stage.RESERVED, Stage.COMMITTED, Stage.REVEALED):
            self._enter_shown(connection, row, reason=f"the round ended ({state})")

    # --- refusals -----------------------------------------------------------------------------------------------------

    async def failed(
        self, stub: Stub, name: federation_pb2.RoundName, *, stage: str, plan: str, error: BaseException
    ) -> None:
        """Remember a refusal or failure, give back what was charged if no training began, and tell the aggregator, by
        public text.

        A round in which data was touched is not given back: its charge is final.
        `plan` is the digest of what was asked for: a refusal of another plan changes nothing in the round as it is.
        """
        text = error.message if isinstance(error, SottoError) else "internal error"
        if isinstance(error, BudgetError) and not self._home.config.policy.disclose_epsilon:
            text = "this party's budget does not allow it"
        failure = (meaning(error).reason, text)

        def note(connection: Connection) -> None:
            row = self._memory.find(connection, name.job_id, name.round)
            if stage != "contribute" or row is None or row.plan != plan or row.ended:
                return
            if row.stage is Stage.RESERVED and not row.trainings:
                self._accounts.return_(connection, row.job_id, row.number, now=self._clock(), reason=failure[0])
                self._memory.put(connection, replace(row, stage=Stage.FAILED, failure=failure))

        await self._database.run(note)
        public = error.metadata if isinstance(error, TaskError) else {}
        await self._report(stub, name, stage, failure, **{each: public.get(each, "") for each in ("problem", "place")})

    async def _report(
        self, stub: Stub, name: federation_pb2.RoundName, stage: str, failure: tuple[str, str], **public: str
    ) -> None:
        request = federation_pb2.ReportFailureRequest(
            round=name, reason=failure[0], message=failure[1], stage=stage, **public
        )
        await stub.ReportFailure(request)


def _once(work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """It is done when it is asked for first, and not again once it is done."""
    done = False

    async def ask() -> None:
        nonlocal done
        if not done:
            await work()
            done = True

    return ask


def _shown(row: PartyRound) -> dict[str, str]:
    """Of a round as far as it has come, what anybody may have seen of it, as the ledger keeps it."""
    if row.batch is None:
        return {"plan": row.plan}
    return {"plan": row.plan, **({"list": row.list} if row.list else {}), "root": str(row.batch["root"])}
