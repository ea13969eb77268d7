"""The node's loop: join, listen for assignments, do them; reconnect when the aggregator is gone. Outbound only."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, NoReturn

import grpc

from ..communication.generated import federation_pb2, federation_pb2_grpc
from ..communication.messages import heads_from_proto, heads_to_proto, signed_from_proto, standing_to_proto
from ..errors import (
    BudgetError,
    ConfigError,
    DeadlineError,
    LedgerError,
    SottoError,
    UnavailableError,
)
from ..logs import on_behalf_of
from ..protocol.faults import TaskStanding
from ..protocol.plan import PLAN_KIND, signed_digest
from ..protocol.roster import AGGREGATOR
from ..protocol.signing import open_signed
from ..storage.database import Database
from .accounts import PartyAccounts
from .desk import ENDED, Desk
from .home import Home
from .means import Stub
from .readiness import Readiness
from .rounds import RoundWorker
from .standing import (
    LASTED_S,
    LASTING,
    WAITED_OUT,
    Acceptance,
    Away,
    Ends,
    Patience,
    check_told,
    heartbeat_of,
    passes,
)
from .store import RoundMemory

LOG = logging.getLogger("sotto.party")

MAX_IN_HAND: Final = 64
"""Rounds of which a party asks how they ended: an aggregator looks at no more. Of others it asks the next time."""
MISSED_HEARTBEATS: Final = 3
"""After so many the stream counts as dead, whatever TCP says."""


class Node:
    """Keeps one stream of assignments open and works on what comes."""

    def __init__(
        self,
        *,
        home: Home,
        database: Database,
        memory: RoundMemory,
        accounts: PartyAccounts,
        worker: RoundWorker,
        dial: Callable[[], grpc.aio.Channel],
        readiness: Readiness | None = None,
    ) -> None:
        self._home = home
        self._database = database
        self._memory = memory
        self._accounts = accounts
        self._worker = worker
        self._dial = dial
        self._readiness = readiness
        self._session_id = secrets.token_hex(8)
        self._last_sequence = 0
        self._told: Mapping[str, TaskStanding] = {}
        self._patience = Patience()
        self._away = Away()
        self._acceptance = Acceptance(home)
        self._desk = Desk(self._do)
        self._tasks = self._desk.tasks

    async def run(self) -> None:
        """Until cancelled. Whatever the aggregator says or does is waited out; what the party finds out about itself
        ends the node (`standing`)."""
        on_behalf_of("the aggregator")
        while True:
            began = time.monotonic()
            try:
                async with self._dial() as channel:
                    await self._session(federation_pb2_grpc.FederationServiceStub(channel))
            except Ends as ending:
                raise ending.error from ending
            except Exception as error:  # from outside comes anything, and nothing of it ends the node
                await self._consider(error)
            finally:
                await self._desk.cancel()
            if time.monotonic() - began >= LASTED_S:
                self._patience.reset()
            await asyncio.sleep(self._patience.next_s())

    async def _consider(self, error: Exception) -> None:
        """Raises what ends the node: what the error is, or makes the party find when it looks at itself."""
        new = self._away.note(error)
        found: SottoError | None = error if isinstance(error, LASTING) and not error.remote else None
        if found is None:
            blamed = new and isinstance(error, SottoError) and error.remote and not isinstance(error, WAITED_OUT)
            found = await self._look_at_itself(thoroughly=blamed or self._away.suspected)
        if self._away.lasts(found) and found is not None:
            raise found

    async def _look_at_itself(self, *, thoroughly: bool) -> SottoError | None:
        """What this party finds about itself: its certificate, and where it was blamed its kit and ledger."""
        try:
            await asyncio.to_thread(self._home.check_files if thoroughly else self._home.check_certificate)
            if thoroughly:
                await self._database.run(self._accounts.verify)
        except (ConfigError, LedgerError) as error:
            return error
        except Exception as error:  # its own disk, say: then it cannot work now, and looks again
            LOG.warning("this party cannot look at itself: %s", error)
        return None

    async def _session(self, stub: Stub) -> None:
        await asyncio.to_thread(self._worker.check_room)
        try:
            heartbeat_s = await self._join(stub)
        except SottoError as error:
            misfit = self._acceptance.misfit(error)
            if misfit is not None:
                raise Ends(misfit) from error
            raise
        rows = await self._database.run(self._memory.open_rounds)
        if len(rows) > MAX_IN_HAND:  # any of them, so that none is never told
            rows = secrets.SystemRandom().sample(rows, MAX_IN_HAND)
        in_hand = [federation_pb2.RoundName(job_id=row.job_id, round=row.number) for row in rows]
        request = federation_pb2.StreamAssignmentsRequest(
            session_id=self._session_id, last_sequence=self._last_sequence, in_hand=in_hand
        )
        stream = stub.StreamAssignments(request)
        telling = asyncio.create_task(self._tell(stub))
        try:
            await self._listen(stub, stream.__aiter__(), heartbeat_s)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _tell(self, stub: Stub) -> None:
        """Tell the aggregator whenever something changes about what this party is ready for, since it joined."""
        if self._readiness is None:
            return
        told, patience = self._told, Patience()
        while True:
            now = await self._readiness.change(told)
            request = federation_pb2.TellReadinessRequest()
            for task, standing in now.items():
                request.tasks[task].CopyFrom(standing_to_proto(standing))
            try:
                await stub.TellReadiness(request)
            except SottoError as error:  # an aggregator of before, say
                LOG.debug("the aggregator was not told what this party is ready for: %s", error.message)
                await asyncio.sleep(patience.next_s())
            else:
                told = now

    async def _listen(
        self, stub: Stub, iterator: AsyncIterator[federation_pb2.Assignment], heartbeat_s: float
    ) -> NoReturn:
        while True:
            await self._desk.room()
            try:
                # Not wait_for: in Python 3.11 it loses a cancellation that meets the end of the stream.
                async with asyncio.timeout(heartbeat_s * MISSED_HEARTBEATS):
                    assignment = await anext(iterator)
            except StopAsyncIteration:
                raise UnavailableError("the aggregator ended the stream of assignments") from None
            except TimeoutError:
                raise UnavailableError("the aggregator has stopped sending heartbeats") from None
            kind = assignment.WhichOneof("work")
            if kind in ("contribute", "reveal", "open", "ended"):  # not a heartbeat, nor what a later version asks
                self._last_sequence = assignment.sequence
                self._desk.take(assignment.round.job_id, assignment.round.round, kind, (stub, assignment))

    async def _join(self, stub: Stub) -> float:
        request = self._home.introduction()
        request.instance_id = self._session_id
        key = self._home.aggregator_key
        seen = await self._database.run(lambda c: self._accounts.aggregator_heads(c, key=key))
        request.aggregator_ledger.extend(heads_to_proto(seen))
        self._told = self._readiness.standings if self._readiness else {}
        for task, standing in self._told.items():
            request.tasks[task].CopyFrom(standing_to_proto(standing))
        answer = await stub.Join(request)
        heartbeat_s = heartbeat_of(answer)
        self._home.accept(answer)
        told, signed = heads_from_proto(answer.party_ledger), self._home.signed_heads(answer.party_ledger)
        await self._database.run(lambda c: check_told(c, self._accounts, told=told, signed=signed))
        self._acceptance.note()
        self._away.over()
        LOG.info(
            "joined federation %s at %s (key id %s, custody %s)",
            answer.federation,
            self._home.config.server.address,
            self._home.keyring.key_id,
            answer.custody,
        )
        return heartbeat_s

    async def _do(self, work: tuple[Stub, federation_pb2.Assignment], kind: str) -> None:
        stub, assignment = work
        name, patience = assignment.round, Patience()
        try:
            if kind == ENDED:
                await self._abandon(name)
            while True:
                try:
                    await self._refresh_roster(stub, assignment, kind)
                    await self._work(stub, assignment, kind)
                except SottoError as error:
                    if not passes(error):
                        raise
                    await self._wait_out(error, kind, name, patience)
                else:
                    return
        except (UnavailableError, DeadlineError) as error:
            LOG.warning("%s of round %d is interrupted: %s", kind, name.round, error.message)
        except Exception as error:
            text = error.message if isinstance(error, SottoError) else type(error).__name__
            extra = {"job": name.job_id}
            if isinstance(error, BudgetError) and error.private:
                extra["private"] = error.private  # whose quota it is, which the aggregator is not told
            LOG.warning("%s of round %d is refused: %s", kind, name.round, text, extra=extra)
            if not isinstance(error, SottoError):
                LOG.exception("unexpected")
            if kind == ENDED:
                return
            await self._report(stub, assignment, kind, error)

    async def _wait_out(self, error: SottoError, kind: str, name: federation_pb2.RoundName, patience: Patience) -> None:
        """Before the same is done again; when the round ends, or the stream, there is nothing to wait for any more."""
        pause_s = patience.next_s()
        level = logging.WARNING if patience.first else logging.DEBUG
        LOG.log(level, "%s of round %d is tried again: %s", kind, name.round, error.message)
        await asyncio.sleep(pause_s)

    async def _report(self, stub: Stub, assignment: federation_pb2.Assignment, kind: str, error: Exception) -> None:
        """Tell the aggregator, so that the round does not wait in silence."""
        name, patience = assignment.round, Patience()
        while True:
            try:
                plan = signed_digest(signed_from_proto(getattr(assignment, kind).plan), PLAN_KIND)
                await self._worker.failed(stub, name, stage=kind, plan=plan, error=error)
            except SottoError as failure:
                if not passes(failure):
                    return
                await self._wait_out(failure, "a report", name, patience)
            else:
                return

    def _work(self, stub: Stub, assignment: federation_pb2.Assignment, kind: str) -> Awaitable[None]:
        name = assignment.round
        if kind == "contribute":
            return self._worker.contribute(stub, name, assignment.contribute)
        if kind == "reveal":
            return self._worker.reveal(stub, name, assignment.reveal)
        if kind == "open":
            return self._worker.open(stub, name, assignment.open)
        return self._worker.ended(name, assignment.ended)

    async def _refresh_roster(self, stub: Stub, assignment: federation_pb2.Assignment, kind: str) -> None:
        """Without a pinned roster others may have joined since: ask again when a plan names a roster not seen yet."""
        if self._home.pinned or kind == ENDED:
            return
        signed = getattr(assignment, kind).plan
        statement = open_signed(
            signed_from_proto(signed), PLAN_KIND, verify_key=self._home.roster.verify_key(AGGREGATOR)
        )
        if statement.get("roster_digest") != self._home.roster.digest:
            await self._join(stub)

    async def _abandon(self, name: federation_pb2.RoundName) -> None:
        """Stop what is still done for a round that has ended: it is of no use, and the next round needs the worker."""
        await self._desk.cancel(lambda key: key[:2] == (name.job_id, name.round) and key[2] != ENDED)
