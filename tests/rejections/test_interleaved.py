"""Whatever an aggregator asks a party for at the same time, in whatever order its answers come, and wherever the party
is stopped: no round goes back, nothing is told or sent for less than it costs, and no sum is opened that must not be.

The real worker of party a on a real database. Whatever it asks for over the network, and each unit of its workers,
waits until hypothesis lets it go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, MetaData

from src.communication.generated import common_pb2, federation_pb2
from src.communication.messages import signed_to_proto
from src.communication.streams import send_bytes
from src.config import load_party_config
from src.errors import SottoError
from src.party.accounts import PartyAccounts
from src.party.home import Home
from src.party.orders import OrderBook
from src.party.rounds import RoundWorker
from src.party.store import PartyRound, RoundMemory, Stage
from src.privacy.ledger import Charge, charges, from_line
from src.protocol.batches import StoredBatch
from src.protocol.canonical import parse_canonical
from src.protocol.ledger import EntrySigner
from src.protocol.plan import PLAN_KIND, signed_digest
from src.protocol.roster import AGGREGATOR
from src.protocol.signing import Signed
from src.storage.blobs import Blobs
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations
from tests.rejections.cheating import CheatingAggregator, Pool, Round, contribute_to, open_of

# A file that a thread opens for somebody who is cancelled meanwhile is closed when it is collected, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROUNDS: Final = 2
OTHERS: Final = ("b", "c", AGGREGATOR)
SET_ONCE: Final = ("plan", "batch", "root", "list", "aggregate_root", "share", "ended")
ORDER: Final = (Stage.RESERVED, Stage.COMMITTED, Stage.REVEALED, Stage.DELIVERED)
HOPS: Final = 12
"""Turns of the event loop, the database and the file system, in which whatever can go on comes to its next gate."""

STEPS: Final = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["contribute", "reveal", "ended"]), st.integers(1, ROUNDS)),
        st.tuples(st.sampled_from(["open with a", "open without a", "reveal other list"]), st.integers(1, ROUNDS)),
        st.tuples(st.sampled_from(["let go"] * 4), st.integers(0, 9)),
        st.tuples(st.sampled_from(["drop", "restart"]), st.just(0)),
    ),
    min_size=1,
    max_size=24,
)


class Gates:
    """What waits to be let go on, in order."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.open = False

    async def wait(self) -> None:
        if not self.open:
            gate = asyncio.get_running_loop().create_future()
            self.waiting.append(gate)
            try:
                await gate
            finally:
                if gate in self.waiting:
                    self.waiting.remove(gate)

    def let_go(self, which: int) -> None:
        if self.waiting:
            self.waiting.pop(which % len(self.waiting)).set_result(None)


class World:
    """The aggregator, as a sees it, and what was seen of a."""

    def __init__(self, kits: Path, state: Path) -> None:
        self.state = state
        self.them = CheatingAggregator(kits, state)
        config = load_party_config(kits / "party-a" / "party.yaml", environ={})
        self.config = config.model_copy(update={"state_dir": state})
        self.gates = Gates()
        self.blobs = Blobs(state / "blobs")
        self.tasks: dict[tuple[int, str], asyncio.Task[None]] = {}
        self.known: dict[int, PartyRound] = {}
        self.rounds: dict[int, Round] = {}
        self.uploads: dict[int, set[bytes]] = {}
        self.shares: dict[int, set[tuple[str, bytes]]] = {}
        self.with_a: dict[int, set[str]] = {}
        self.told: set[int] = set()
        for number in range(1, ROUNDS + 1):
            self.rounds[number] = self.them.plan(number)
            self.them.contribute(self.rounds[number], *OTHERS)

    # --- the stub that the worker calls -------------------------------------------------------------------------------

    async def _model(self) -> AsyncIterator[common_pb2.DataChunk]:
        await self.gates.wait()
        async for chunk in send_bytes(self.them.model):
            yield chunk

    def DownloadModel(self, _request: Any) -> AsyncIterator[common_pb2.DataChunk]:
        return self._model()

    async def AwaitQuorum(self, _request: Any) -> federation_pb2.AwaitQuorumResponse:
        await self.gates.wait()
        return federation_pb2.AwaitQuorumResponse(reached=True)

    async def CommitRoot(self, request: federation_pb2.CommitRootRequest) -> None:
        number = request.round.round
        self.told.add(number)
        found = self.charges(number)
        assert [each.settled.kind for each in found if each.settled] == ["final", "final"], "told before it was paid"
        statement = parse_canonical(request.root.statement)
        row = self.row(number)
        assert row is not None
        assert row.batch is not None
        assert statement["root"] == row.batch["root"]
        assert not row.ended
        self.known_batch(number, row)
        await self.gates.wait()

    async def UploadUpdate(self, parts: AsyncIterator[Any]) -> federation_pb2.UploadUpdateResponse:
        first = await anext(parts)
        number = first.header.round.round
        row = self.row(number)
        assert row is not None
        assert row.stage in (Stage.REVEALED, Stage.DELIVERED)
        assert [each.released is not None for each in self.charges(number)] == [True, True], "shown, and not entered"
        body = first.header.batch_header + b"".join([part.body async for part in parts])
        self.uploads.setdefault(number, set()).add(body)
        assert len(self.uploads[number]) == 1, "other bytes than before"
        await self.gates.wait()
        return federation_pb2.UploadUpdateResponse(accepted=True)

    def DownloadContribution(self, request: Any) -> AsyncIterator[common_pb2.DataChunk]:
        return self._contribution(request.round.round, request.contributor)

    async def _contribution(self, number: int, contributor: str) -> AsyncIterator[common_pb2.DataChunk]:
        await self.gates.wait()
        async for chunk in send_bytes(self.them.body(self.rounds[number], contributor)):
            yield chunk

    async def UploadShares(self, parts: AsyncIterator[Any]) -> None:
        first = await anext(parts)
        number = first.header.round.round
        statement = parse_canonical(first.header.shares.statement)
        share = b"".join([part.body async for part in parts])
        self.shares.setdefault(number, set()).add((str(statement["aggregate_root"]), share))
        assert len(self.shares[number]) == 1, "two aggregates of a round, or two shares of one"
        row = self.row(number)
        assert row is not None
        assert row.aggregate_root == statement["aggregate_root"]
        if row.stage is Stage.DELIVERED:
            assert row.aggregate_root in self.with_a.get(number, set()), "a sum without a's delivered update"
        await self.gates.wait()

    async def ReportFailure(self, _request: Any) -> None:
        await self.gates.wait()

    # --- party a ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        metadata, home = MetaData(), Home(self.config)
        ledger = LedgerStore(metadata, signer=EntrySigner(home.signing_key))
        accounts = PartyAccounts(ledger, self.config)
        self.database = Database(self.state / "party.sqlite", Migrations("party"))
        await self.database.open()
        await self.database.run(lambda c: accounts.open(c, now=0.0))
        world, pool = self, Pool(self.blobs)
        run = pool.run

        async def gated(name: str, params: Any, **how: Any) -> dict[str, Any]:
            await world.gates.wait()
            return await run(name, params, **how)

        pool.run = gated  # type: ignore[method-assign]
        self.worker = RoundWorker(
            home=home,
            database=self.database,
            memory=RoundMemory(metadata),
            accounts=accounts,
            orders=OrderBook(metadata),
            blobs=self.blobs,
            pool=cast(Any, pool),
            clock=lambda: 0.0,
        )

    async def stop(self) -> None:
        await self.drop()
        await self.worker.stop()
        await self.database.close()

    async def drop(self) -> None:
        """The connection is gone, and with it all that was asked for over it."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        for _ in range(HOPS):
            await self.database.run(lambda _: None)
            await asyncio.to_thread(lambda: None)
            await asyncio.sleep(0)
        for task in [task for task in self.tasks.values() if task.done()]:
            if not task.cancelled() and task.exception() is not None:
                raise cast(BaseException, task.exception())
        self.tasks = {key: task for key, task in self.tasks.items() if not task.done()}

    def begin(self, number: int, kind: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """As the node does: the same once at a time; a refusal is noted, and told."""
        if (number, kind) in self.tasks:
            return

        async def do() -> None:
            try:
                await work()
            except SottoError as error:
                if kind == "ended":
                    raise
                plan = signed_digest(self.rounds[number].signed, PLAN_KIND)
                with contextlib.suppress(SottoError):
                    name = self.rounds[number].name
                    await self.worker.failed(cast(Any, self), name, stage=kind, plan=plan, error=error)

        self.tasks[number, kind] = asyncio.create_task(do())

    # --- what it is asked for -----------------------------------------------------------------------------------------

    def known_batch(self, number: int, row: PartyRound) -> None:
        """What a committed to is one of the round's batches."""
        round_ = self.rounds[number]
        if "a" not in round_.batches and row.batch is not None:
            round_.batches["a"] = StoredBatch(**row.batch)
            round_.roots["a"] = Signed.from_json(row.root or {})
            self.them.blobs.write(self.blobs.read(row.batch["sha256"]))

    def listed(self, number: int, *, other: bool = False) -> Signed:
        """The frozen list of all whose roots are there; another one, with a in it too."""
        round_ = self.rounds[number]
        names = [name for name in sorted(round_.roots) if not (other and name == "c")]
        return self.them.freeze(round_, [round_.roots[name] for name in names])

    def ask(self, what: str, number: int) -> None:
        round_, worker, stub = self.rounds[number], self.worker, cast(Any, self)
        plan = signed_to_proto(round_.signed)
        if what == "contribute":
            self.begin(number, what, lambda: worker.contribute(stub, round_.name, contribute_to(round_)))
        elif what.startswith("reveal"):
            listed = signed_to_proto(self.listed(number, other=what != "reveal"))
            work = federation_pb2.Reveal(plan=plan, frozen_list=listed)
            self.begin(number, "reveal", lambda: worker.reveal(stub, round_.name, work))
        elif what == "ended":
            for key in [key for key in self.tasks if key[0] == number and key[1] != "ended"]:
                self.tasks[key].cancel()
            work_ = federation_pb2.RoundEnded(state="FAILED")
            self.begin(number, "ended", lambda: worker.ended(round_.name, work_))
        else:
            names = sorted(name for name in round_.batches if what == "open with a" or name != "a")
            listed_, opening = self.listed(number), self.them.opening(round_, self.listed(number), names)
            if "a" in names:
                root = parse_canonical(opening.statement)["aggregate_root"]
                self.with_a.setdefault(number, set()).add(str(root))
            open_ = open_of(round_, listed_, opening)
            self.begin(number, "open", lambda: worker.open(stub, round_.name, open_))

    # --- what must hold at any time -----------------------------------------------------------------------------------

    def _read(self, read: Callable[[Any], Any]) -> Any:
        with closing(sqlite3.connect(self.state / "party.sqlite")) as connection:
            return read(connection)

    def row(self, number: int) -> PartyRound | None:
        query = "SELECT content FROM party_rounds WHERE number = ?"
        found = self._read(lambda c: c.execute(query, (number,)).fetchone())
        return None if found is None else PartyRound.from_json(json.loads(found[0]))

    def charges(self, number: int) -> list[Charge]:
        lines = self._read(lambda c: c.execute("SELECT line FROM ledger ORDER BY sequence").fetchall())
        return [each for each in charges(from_line(line) for (line,) in lines).values() if each.entry.round == number]

    def check(self) -> None:
        for number in self.rounds:
            before, now = self.known.get(number), self.row(number)
            if now is None:
                assert before is None
                continue
            self.known[number] = now
            self._check_round(number, before or replace(now), now)

    def _check_round(self, number: int, before: PartyRound, now: PartyRound) -> None:
        if before.stage in ORDER and now.stage in ORDER:
            assert ORDER.index(now.stage) >= ORDER.index(before.stage)
        else:
            assert now.stage is before.stage or (before.stage, now.stage) == (Stage.RESERVED, Stage.FAILED)
        if before.aggregate_root:
            assert now.stage in (before.stage, Stage.FAILED) or before.stage is Stage.REVEALED, (
                "an update after the sum"
            )
        for field in SET_ONCE:
            assert getattr(before, field) in (None, "", getattr(now, field)), field
        assert now.trainings >= before.trainings
        kinds = {each.settled.kind if each.settled else "open" for each in self.charges(number)}
        if now.stage is Stage.WITNESS:
            assert not kinds
        elif now.trainings or number in self.told:
            assert kinds == {"final"}
        elif now.ended or now.stage is Stage.FAILED:
            assert kinds == {"returned"}
        if not now.ended:
            for blob in ((now.batch or {}).get("sha256"), now.share):
                assert not blob or self.blobs.exists(blob), "a blob that an open round needs is gone"


async def play(kits: Path, state: Path, steps: list[tuple[str, int]]) -> None:
    world = World(kits, state)
    await world.start()
    try:
        for what, which in steps:
            if what == "let go":
                world.gates.let_go(which)
            elif what == "drop":
                await world.drop()
            elif what == "restart":
                await world.stop()
                await world.start()
            else:
                world.ask(what, which)
            await world.settle()
            world.check()
        world.gates.open = True
        while world.gates.waiting:
            world.gates.let_go(0)
            await world.settle()
            world.check()
        for number in world.rounds:  # and whatever happened, the end is heard
            world.ask("ended", number)
        await world.settle()
        world.check()
        assert all(row is None or row.ended for row in map(world.row, world.rounds))
        await world.database.run(_verify)
    finally:
        world.gates.open = True
        await world.stop()


def _verify(connection: Connection) -> None:
    LedgerStore(MetaData()).verify(connection)


def run(kits: Path, steps: list[tuple[str, int]]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="sotto-interleaved-"))
    try:
        with asyncio.Runner() as runner:
            runner.run(play(kits, directory, steps))
    finally:
        shutil.rmtree(directory)


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(steps=STEPS)
def test_whatever_is_asked_for_at_once_a_party_stays_with_what_it_said_and_pays_for_what_it_tells(
    kits: Path, steps: list[tuple[str, int]]
) -> None:
    run(kits, steps)


WAYS: Final = {
    "an opening that began before the update was delivered": [
        *[("contribute", 1), ("let go", 0), ("let go", 0), ("let go", 0), ("open without a", 1), ("reveal", 1)],
        *[("let go", 9), ("let go", 9), ("let go", 0), ("let go", 0), ("let go", 0), ("let go", 0), ("let go", 0)],
    ],
    "an update that is asked for once a sum without it is being opened": [
        *[("contribute", 1), ("let go", 0), ("let go", 0), ("let go", 0), ("open without a", 1)],
        *[("let go", 0), ("let go", 0), ("let go", 0), ("let go", 0), ("reveal", 1), ("let go", 9), ("let go", 9)],
    ],
    "an end while an update is on its way": [
        *[("contribute", 1), ("let go", 0), ("let go", 0), ("let go", 0), ("reveal", 1), ("ended", 1), ("let go", 0)],
    ],
    "a training that outlives its connection, its round, and its process": [
        *[
            ("contribute", 1),
            ("let go", 0),
            ("drop", 0),
            ("contribute", 1),
            ("ended", 1),
            ("let go", 0),
            ("restart", 0),
        ],
        *[("contribute", 2), ("let go", 0), ("restart", 0), ("contribute", 2), ("let go", 0), ("let go", 0)],
    ],
    "an opening while a trains": [
        *[("contribute", 1), ("let go", 0), ("open without a", 1), *[("let go", 1)] * 6, ("let go", 0), ("reveal", 1)],
    ],
}


def test_ways_that_were_gone_wrong_once(kits: Path) -> None:
    for steps in WAYS.values():
        run(kits, steps)
