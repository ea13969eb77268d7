"""The only place that wires a party together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import Final

import grpc
from sqlalchemy import MetaData

from .. import __version__
from ..communication.grpc_client import connect
from ..communication.identity import Identity
from ..communication.tls import TlsFiles
from ..communication.validity import warnings_of
from ..config import PartyConfig
from ..config_database import located
from ..files import open_state_directory, who_may_replace
from ..jobs.executors.pool import WorkerPool
from ..jobs.executors.settings import PoolSettings
from ..logs import type_and_place
from ..protocol.ledger import EntrySigner
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.ledger import LedgerStore
from ..storage.migrations import Migrations
from ..storage.sweeping import Sweeper
from .accounts import PartyAccounts
from .home import Home
from .node import Node
from .orders import OrderBook
from .readiness import Readiness
from .rounds import RoundWorker
from .store import RoundMemory

LOG = logging.getLogger("sotto.party")

CALL_S: Final = 60.0
"""How long the aggregator may take for one answer: it is some reads and one write of its database. What streams ends
with its round."""


class App:
    """A party: started, working, stopped."""

    def __init__(self, config: PartyConfig) -> None:
        self.config = config
        state = config.state_dir
        self._changed = [*open_state_directory(state), *who_may_replace(state)]
        home = Home(config)
        self._refuses_all = _why_nobody_may_order(home)
        metadata = MetaData()
        self._memory = RoundMemory(metadata)
        ledger = LedgerStore(metadata, signer=EntrySigner(home.signing_key))
        location = located(config)
        self._database = Database(location, Migrations("party"))
        self._blobs = Blobs(state / "blobs")
        self._accounts = PartyAccounts(ledger, config)
        self._pool = WorkerPool(
            PoolSettings(**config.workers.model_dump()),
            handlers="party.work",
            blobs_root=state / "blobs",
            workspace=state / "work",
            preload=("learning.dpsgd",),
            prepare={"learning.warm": list(config.datasets)},
        )
        self._readiness = Readiness(config, self._pool)
        self._worker = RoundWorker(
            home=home,
            database=self._database,
            memory=self._memory,
            accounts=self._accounts,
            orders=OrderBook(metadata),
            blobs=self._blobs,
            pool=self._pool,
            readiness=self._readiness,
        )
        self._sweeper = Sweeper(self._worker.uses, self._blobs)
        self._beside: list[asyncio.Task[None]] = []
        self._node = Node(
            home=home,
            database=self._database,
            memory=self._memory,
            accounts=self._accounts,
            worker=self._worker,
            dial=self._dial,
            readiness=self._readiness,
        )

    def _dial(self) -> grpc.aio.Channel:
        server = self.config.server
        tls = TlsFiles(server.tls.certificate, server.tls.key, server.tls.ca) if server.tls else None
        return connect(
            server.address,
            tls=tls,
            insecure=server.insecure,
            identity=Identity("party", self.config.name),
            max_message_bytes=self.config.limits.max_message_bytes,
            call_timeout_s=CALL_S,
        )

    async def run(self) -> None:
        """Work until cancelled."""
        await self._database.open()
        try:
            found = await self._database.run(lambda c: self._accounts.open(c, now=time.time()))
            for warning in [*self._changed, *found]:
                LOG.warning("%s", warning)
            lines, warnings = await self._database.run(self._accounts.in_force)
            keep = await self._database.run(self._memory.blobs)
            await asyncio.to_thread(self._blobs.collect, keep)
            self._log_start(lines, warnings)  # before the workers start, which takes seconds: somebody waits to see it
            await self._pool.start()
            self._beside = [
                asyncio.create_task(self._sweeper.run()),
                asyncio.create_task(self._readiness.run()),
            ]
            for task in self._beside:
                task.add_done_callback(_say_why_it_ended)
            await self._node.run()
        finally:
            await self._stop_beside()
            await self._worker.stop()
            await self._pool.close()
            await self._database.close()
            LOG.info("stopped")

    async def _stop_beside(self) -> None:
        for task in self._beside:
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)

    def _log_start(self, in_force: list[str], warnings: list[str]) -> None:
        config = self.config
        LOG.info("Sotto %s, party %r of federation %r", __version__, config.name, config.federation)
        LOG.info("aggregator %s, custody %s, state in %s", config.server.address, config.keys.custody, config.state_dir)
        for line in in_force:
            LOG.info("in force for %s", line)
        tls = config.server.tls
        for warning in (*warnings, *config.exposed(), *(warnings_of(tls.certificate, tls.ca) if tls else ())):
            LOG.warning("%s", warning)
        if config.policy.allow_without_dp:
            LOG.warning("rows may be trained on without differential privacy (policy.allow_without_dp)")
        if config.keys.custody == "aggregator":
            LOG.warning("custody aggregator: the aggregator holds the key and can read this party's updates")
        if config.policy.allow_unsigned_jobs:
            LOG.warning("jobs that nobody signed are taken part in (policy.allow_unsigned_jobs)")
        elif self._refuses_all:
            LOG.warning("every job will be refused: %s", self._refuses_all)
        if config.server.insecure:
            LOG.warning("INSECURE: no TLS; anybody on this machine can pose as the aggregator")


def _why_nobody_may_order(home: Home) -> str:
    """Empty where somebody may."""
    if not home.pinned:
        return "there is no kit, whose roster says who may order jobs, and policy.allow_unsigned_jobs is off"
    return "" if home.roster.scientists else "the roster of this kit was made before scientists signed their jobs"


async def work(config: PartyConfig) -> None:
    """Run until SIGTERM or SIGINT."""
    app = App(config)
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(app.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _say_why_it_ended(task: asyncio.Task[None]) -> None:
    """Of what runs beside the node as long as that does: nobody waits for it, and nobody would hear."""
    if not task.cancelled() and (error := task.exception()) is not None:
        LOG.error("something beside this node has ended, start the party again: %s", type_and_place(error))
