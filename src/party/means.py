"""What the parts of a party's work share: its kit and memory, its store and workers, and the plan's check."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from ..communication.generated import federation_pb2, federation_pb2_grpc
from ..communication.generated.common_pb2 import DataChunk
from ..communication.messages import signed_from_proto
from ..communication.streams import receive_blob, unless_not_taken, unless_silent
from ..errors import PlanError
from ..jobs.executors.pool import WorkerPool
from ..protocol.signing import Signed
from ..storage.blobs import BlobRef, Blobs
from ..storage.database import Database
from ..storage.leftovers import BlobUses
from .home import Home
from .orders import Ordered, check_order
from .rules import CheckedPlan, check_plan, open_plan
from .store import PartyRound, RoundMemory

T = TypeVar("T")
R = TypeVar("R")

PIECE_BYTES: Final = 1 << 19
"""Of an upload in one message."""

SILENCE_S: Final = 60.0
"""How long a download may bring nothing, and a piece of an upload not be taken: as an aggregator has it by default
(`limits.idle_timeout_s`). It is progress that counts; the whole may take as long as its round."""

Stub: TypeAlias = "federation_pb2_grpc.FederationServiceAsyncStub"
"""Exists for the type checker only: the generated stub's asynchronous face."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a party works with, wired once."""

    home: Home
    database: Database
    memory: RoundMemory
    blobs: Blobs
    pool: WorkerPool
    uses: BlobUses

    def check(self, signed: Signed, name: federation_pb2.RoundName) -> CheckedPlan:
        """The plan, verified before anything in it is believed, and of the round that the assignment names.

        Raises:
            SignatureError, PlanError, PolicyError: as `rules.check_plan`.
        """
        plan, _ = open_plan(signed, self.home.roster)
        if (plan.job_id, plan.round) != (name.job_id, name.round):
            raise PlanError("the assignment names another round than its plan")
        return check_plan(
            signed,
            self.home.roster,
            config=self.home.config,
            scheme=self.home.scheme(plan.scheme),
            pinned=self.home.pinned,
        )

    async def check_order(
        self, work: federation_pb2.Contribute | federation_pb2.Open, checked: CheckedPlan
    ) -> Ordered | None:
        """The order that a round rests on. To see that it follows, it is planned again: that is for a thread.

        Raises:
            PolicyError, SignatureError, InvalidInput, PlanError: as `orders.check_order`.
        """
        return await asyncio.to_thread(
            check_order,
            signed_from_proto(work.order) if work.HasField("order") else None,
            checked.plan,
            roster=self.home.roster,
            pinned=self.home.pinned,
            scheme=self.home.scheme(checked.plan.scheme),
            allow_unsigned=self.home.config.policy.allow_unsigned_jobs,
        )

    async def download(
        self,
        chunks: AsyncIterable[DataChunk],
        *,
        max_bytes: int,
        expected_sha256: str | None = None,
        storing: Callable[[str], object] = lambda _sha256: None,
    ) -> BlobRef:
        """What the aggregator sends, as a stored blob: see `receive_blob`. It is to count as used before it is stored,
        by `storing` or since before; nobody else waits for whether it comes.

        Raises:
            UnavailableError: the aggregator sent nothing for `SILENCE_S`.
        """
        async with contextlib.aclosing(unless_silent(chunks, silence_s=SILENCE_S)) as stream:
            return await receive_blob(
                stream, self.blobs, max_bytes=max_bytes, expected_sha256=expected_sha256, storing=storing
            )

    async def upload(self, call: Callable[[AsyncIterator[T]], Awaitable[R]], parts: AsyncIterable[T]) -> R:
        """What the aggregator answers to what it is sent.

        Raises:
            UnavailableError: it did not take the next part for `SILENCE_S`.
        """
        return await unless_not_taken(call, parts, silence_s=SILENCE_S)

    def params(self, checked: CheckedPlan, signed: Signed) -> dict[str, Any]:
        """What every unit of work of a round is told."""
        return {
            "plan": signed.statement.decode(),
            "plan_digest": checked.digest,
            "public": json.dumps(self.home.keyring.to_json()),
            "processes": self.pool.cores_for_a_unit(),
        }


def round_name(row: PartyRound) -> federation_pb2.RoundName:
    """The wire's name of a round."""
    return federation_pb2.RoundName(job_id=row.job_id, round=row.number)
