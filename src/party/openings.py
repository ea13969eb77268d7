"""One party's part in opening a round: fetch, multiply, compare, note, and only then make a share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection

from ..communication.generated import federation_pb2
from ..communication.messages import signed_from_proto, signed_to_proto
from ..communication.streams import blob_pieces
from ..errors import OpeningError
from ..protocol.batches import StoredBatch, expected_header
from ..protocol.plan import SHARES_KIND, OpeningStatement, RootStatement
from ..protocol.signing import Signed
from .means import PIECE_BYTES, Means, Stub, round_name
from .orders import OrderBook, Ordered
from .rules import CheckedPlan, check_list, check_opening
from .store import PartyRound, Stage

LOG = logging.getLogger("sotto.party")

LATE_ROUND_TIMEOUTS: Final = 2.0
"""How long after the end of an order a holder may first hear of a round that was begun before, times the round's
time-out: a round has that time from when a quorum can train it, and waits for that for a part of it."""


class Openings:
    """Opens rounds, each once."""

    def __init__(self, means: Means, orders: OrderBook, *, clock: Callable[[], float]) -> None:
        self._means = means
        self._orders = orders
        self._clock = clock

    async def open(self, stub: Stub, name: federation_pb2.RoundName, work: federation_pb2.Open) -> None:
        """Send a share of the aggregate that this party multiplied itself, and of no other in this round, ever."""
        signed, listed = signed_from_proto(work.plan), signed_from_proto(work.frozen_list)
        checked = self._means.check(signed, name)
        roots = check_list(listed, self._means.home.roster, plan=checked.plan, plan_digest=checked.digest)

        def asked(connection: Connection) -> tuple[PartyRound, OpeningStatement]:
            """The round as it is now, and what may be opened of it: while others are fetched and multiplied it goes on,
            and this party's own update may be delivered."""
            row = self._means.memory.find(connection, name.job_id, name.round)
            row = row or PartyRound(job_id=name.job_id, number=name.round, plan=checked.digest, stage=Stage.WITNESS)
            opening = check_opening(
                signed_from_proto(work.opening),
                self._means.home.roster,
                row=row,
                plan=checked.plan,
                listed=listed,
                roots=roots,
                name=self._means.home.name,
            )
            if row.ended:
                raise OpeningError("this round has ended")
            return row, opening

        row, opening = await self._means.database.run(asked)
        if not row.share:
            # Of a round that this party took part in before the order was checked, for this plan.
            ordered = await self._means.check_order(work, checked) if row.stage is Stage.WITNESS else None
            with contextlib.ExitStack() as used:
                row = await self._make_share(stub, checked, ordered, signed=signed, asked=asked, roots=roots, used=used)
        await self._means.upload(stub.UploadShares, self._shares(row))
        LOG.info("opened", extra={"job": row.job_id, "round": row.number, "contributions": len(opening.contributors)})

    async def _make_share(
        self,
        stub: Stub,
        checked: CheckedPlan,
        ordered: Ordered | None,
        *,
        signed: Signed,
        asked: Callable[[Connection], tuple[PartyRound, OpeningStatement]],
        roots: dict[str, RootStatement],
        used: contextlib.ExitStack,
    ) -> PartyRound:
        """The round with its stored share; `used` keeps what is fetched and made for that until it is closed."""
        row, opening = await self._means.database.run(asked)
        batches = {}
        for name in opening.contributors:
            batches[name] = await self._fetch(stub, row, checked, roots[name], used)
        params = {**self._means.params(checked, signed), "name": self._means.home.name}
        own = {name: batch.to_json() for name, batch in batches.items()}
        with self._means.uses.storing():
            aggregate = StoredBatch(**await self._means.pool.run("recompute", {**params, "batches": own}))
            used.enter_context(self._means.uses.using(aggregate.sha256))
        if aggregate.root != opening.aggregate_root:
            raise OpeningError("the aggregate that this party multiplied is not the one it is asked to open")

        def note(connection: Connection) -> None:
            """Of a round that this party hears of only now, begun elsewhere before, the order counts it too."""
            row, opening = asked(connection)
            late_s = LATE_ROUND_TIMEOUTS * ordered.spec.round_timeout_s if ordered else 0.0
            self._orders.begin(connection, ordered, checked.plan, now=self._clock(), late_s=late_s)
            self._means.memory.put(connection, replace(row, aggregate_root=aggregate.root, list=opening.list))

        # Before a share exists: from here on no other aggregate of this round is opened, whatever happens.
        await self._means.database.run(note)
        unit = {
            **params,
            "share": str(self._means.home.config.keys.share),
            "aggregate": aggregate.sha256,
            "aggregate_root": aggregate.root,
        }
        with self._means.uses.storing():
            share = str((await self._means.pool.run("open_share", unit))["sha256"])
            used.callback(self._means.uses.let_go, [share])  # where no row keeps it

            def keep(connection: Connection) -> PartyRound:
                row, _ = asked(connection)
                row = replace(row, share=row.share or share)  # of two that were made at a time the first is sent
                self._means.memory.put(connection, row)
                return row

            return await self._means.database.run(keep)

    async def _fetch(
        self, stub: Stub, row: PartyRound, checked: CheckedPlan, root: RootStatement, used: contextlib.ExitStack
    ) -> StoredBatch:
        """A contributor's batch; its own it has. Whether it has its root is found while multiplying. It counts as used
        from before it is stored: until then nobody waits for what an aggregator may never send."""

        def use(sha256: str) -> None:
            used.enter_context(self._means.uses.using(sha256))

        header = expected_header(checked.plan, checked.digest, root.contributor).encode().hex()
        if root.contributor == self._means.home.name and row.batch is not None:
            own = StoredBatch(**row.batch)
            use(own.sha256)
            return own
        request = federation_pb2.DownloadContributionRequest(round=round_name(row), contributor=root.contributor)
        limit = min(self._means.home.config.limits.max_update_bytes, root.body_bytes)
        ref = await self._means.download(stub.DownloadContribution(request), max_bytes=limit, storing=use)
        return StoredBatch(header, ref.sha256, ref.size, root.root, root.proof)

    async def _shares(self, row: PartyRound) -> AsyncIterator[federation_pb2.UploadSharesRequest]:
        size = await asyncio.to_thread(self._means.blobs.size, row.share)
        statement = {
            "plan": row.plan,
            "aggregate_root": row.aggregate_root,
            "party": self._means.home.name,
            "sha256": row.share,
            "bytes": size,
        }
        signed = self._means.home.signing_key.sign(SHARES_KIND, statement, signer=self._means.home.name)
        header = federation_pb2.SharesHeader(round=round_name(row), shares=signed_to_proto(signed))
        yield federation_pb2.UploadSharesRequest(header=header)
        async for piece in blob_pieces(self._means.blobs, row.share, piece_bytes=PIECE_BYTES):
            yield federation_pb2.UploadSharesRequest(body=piece)
