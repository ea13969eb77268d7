"""The only place that wires an aggregator together."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path
from typing import Final

from google.longrunning import operations_pb2_grpc
from sqlalchemy import MetaData

from .. import __version__
from ..communication.bounds import Bounds
from ..communication.generated import budget_pb2_grpc, federation_pb2_grpc, jobs_pb2_grpc
from ..communication.grpc_server import GrpcServer
from ..communication.tls import TlsFiles
from ..communication.validity import warnings_of
from ..config import AggregatorConfig
from ..config_budgets import limit_of, limits_of
from ..config_database import located
from ..config_sections import split_address
from ..descriptors import descriptor_limit, room_for_connections
from ..errors import UnavailableError
from ..files import make_private_directory, open_state_directory, who_may_replace, write_over
from ..jobs.admission import JobSettings
from ..jobs.executors.pool import WorkerPool
from ..jobs.executors.settings import PoolSettings
from ..jobs.service import JobService
from ..jobs.store import JobStore
from ..protocol.ledger import EntrySigner
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.ledger import LedgerStore
from ..storage.leftovers import Leftovers
from ..storage.migrations import Migrations
from ..storage.sweeping import Sweeper
from .accounts import Accounts
from .budgets import Budgets
from .computations import Computations
from .coordinator import Coordinator, capacity_of
from .federation import Federation, open_federation
from .orders import OrderDesk
from .pipeline import AggregatorPipeline
from .results import Results
from .servicers import budget as budget_servicer
from .servicers import federation as federation_servicer
from .servicers import jobs as jobs_servicer
from .servicers import operations as operations_servicer
from .servicers.ids import check_ids
from .sessions import Sessions
from .store import BlobNames, EnrolmentStore, RoundStore
from .work import why_not_evaluated

LOG = logging.getLogger("sotto.aggregator")

GRACE_S: Final = 3.0
"""How long calls under way may take to end when the aggregator stops."""


class App:
    """An aggregator: started, serving, stopped."""

    def __init__(self, config: AggregatorConfig) -> None:
        self.config = config
        self._changed = [*open_state_directory(config.state_dir), *who_may_replace(config.state_dir)]
        self.federation = open_federation(config, now=time.time())
        metadata = MetaData()
        jobs, rounds, ledger, enrolments = (
            JobStore(metadata),
            RoundStore(metadata),
            LedgerStore(metadata, signer=EntrySigner(self.federation.signing_key)),
            EnrolmentStore(metadata),
        )
        self._database = Database(located(config), Migrations("aggregator"))
        blobs = Blobs(config.blobs_dir)
        self._leftovers = leftovers = Leftovers(self._database, blobs, BlobNames(jobs, rounds))
        self._sweeper = Sweeper(leftovers, blobs)
        self._pool = _make_pool(config)
        self._sessions = Sessions()
        self._accounts = Accounts(ledger, config.privacy, federation=config.federation)
        pipeline = AggregatorPipeline(self._pool, self.federation, config, blobs)
        self._coordinator = Coordinator(
            config=config,
            database=self._database,
            jobs=jobs,
            rounds=rounds,
            accounts=self._accounts,
            results=self._make_results(jobs, rounds, blobs, pipeline),
            pipeline=pipeline,
            computations=Computations(self._pool, config, self.federation, blobs),
            federation=self.federation,
            sessions=self._sessions,
            enrolments=enrolments,
            leftovers=leftovers,
        )
        self._service = JobService(
            self._database,
            jobs,
            blobs=blobs,
            coordinator=self._coordinator,
            settings=_settings(config),
            leftovers=leftovers,
        )
        self._coordinator.on_event(self._service.notify, self._service.notify_all, ended=self._sweeper.soon)
        self._budgets = Budgets(
            self._database,
            ledger,
            jobs=jobs,
            limits=limits_of(config),
            federation=config.federation,
            max_message_bytes=config.limits.max_message_bytes,
        )
        self._server = self._make_server(blobs, pipeline)
        self._loop: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None

    def _make_results(self, jobs: JobStore, rounds: RoundStore, blobs: Blobs, pipeline: AggregatorPipeline) -> Results:
        return Results(
            database=self._database,
            jobs=jobs,
            rounds=rounds,
            accounts=self._accounts,
            blobs=blobs,
            pipeline=pipeline,
            federation=self.federation,
            leftovers=self._leftovers,
            most_bytes=self.config.limits.max_stored_bytes_per_scientist,
        )

    def _make_server(self, blobs: Blobs, pipeline: AggregatorPipeline) -> GrpcServer:
        server, config = self.config.server, self.config
        tls = TlsFiles(server.tls.certificate, server.tls.key, server.tls.ca) if server.tls else None
        grpc_server = GrpcServer(
            listen=server.listen,
            tls=tls,
            insecure=server.insecure,
            federation=config.federation,
            roles={
                **federation_servicer.ROLES,
                **jobs_servicer.ROLES,
                **operations_servicer.ROLES,
                **budget_servicer.ROLES,
            },
            reflection=server.reflection,
            heartbeat_interval_s=server.heartbeat_interval_s,
            max_message_bytes=config.limits.max_message_bytes,
            bounds=_bounds(config),
            check=check_ids,
        )
        parties = federation_servicer.FederationServicer(
            config=config,
            coordinator=self._coordinator,
            trainings=self._coordinator.trainings,
            federation=self.federation,
            pipeline=pipeline,
            sessions=self._sessions,
            blobs=blobs,
            leftovers=self._leftovers,
        )
        grpc_server.add(
            federation_pb2_grpc.add_FederationServiceServicer_to_server, parties, federation_servicer.SERVICE
        )
        desk = OrderDesk(lambda: self.federation.roster, allow_unsigned=config.policy.allow_unsigned_jobs)
        scientists = jobs_servicer.JobServicer(self._service, blobs, desk)
        grpc_server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, scientists, jobs_servicer.SERVICE)
        operations = operations_servicer.OperationsServicer(self._service)
        grpc_server.add(operations_pb2_grpc.add_OperationsServicer_to_server, operations, operations_servicer.SERVICE)
        budgets = budget_servicer.BudgetServicer(self._budgets, verify_key=self.federation.signing_key.verify_key)
        grpc_server.add(budget_pb2_grpc.add_BudgetServiceServicer_to_server, budgets, budget_servicer.SERVICE)
        return grpc_server

    async def start(self) -> str:
        """Serve; returns the bound "host:port"."""
        await self._database.open()
        for warning in [*self._changed, *await self._database.run(lambda c: self._accounts.open(c, now=time.time()))]:
            LOG.warning("%s", warning)
        await self._log_limits()
        self._server.try_address()  # before the workers start, which takes seconds
        await self._coordinator.restore()
        await self._pool.start()
        port = await self._server.start()
        host, _ = split_address(self.config.server.listen)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._loop = asyncio.create_task(self._coordinator.run())
        self._sweeping = asyncio.create_task(self._sweeper.run())
        log_start(self.config, self.federation, address)
        if self.config.server.address_file is not None:
            _write_address(self.config.server.address_file, address)
        return address

    async def _log_limits(self) -> None:
        lines, warnings = await self._database.run(self._accounts.in_force)
        for line in lines:
            LOG.info("in force for %s", line)
        for warning in warnings:
            LOG.warning("%s", warning)

    async def watch(self) -> None:
        """Until something ends without which there is no aggregator: what drives the jobs, or the server.

        Raises:
            UnavailableError: which of them; the log has the rest.
        """
        assert self._loop is not None
        server = asyncio.create_task(self._server.ended())
        try:
            await asyncio.wait({self._loop, server}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.cancel()
        what, ended = ("what drives its jobs", self._loop) if self._loop.done() else ("its server", server)
        (cause,) = await asyncio.gather(ended, return_exceptions=True)
        why = cause if isinstance(cause, Exception) else None
        raise UnavailableError(f"the aggregator stops: {what} has ended by itself") from why

    async def stop(self) -> None:
        """Take nothing more, let what runs come to its end for a while, and leave the rest to the rows, from which the
        next process goes on."""
        self._service.close()
        await self._coordinator.drain(0.0 if self._loop is None else self.config.server.shutdown_s)
        self._sessions.close_all()
        await self._server.stop(GRACE_S)
        for task in (self._loop, self._sweeping):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._coordinator.stop()
        await self._pool.close()
        await self._database.close()
        LOG.info("stopped")


def _bounds(config: AggregatorConfig) -> Bounds:
    limits = config.limits
    return Bounds(
        streams=limits.max_streams_per_caller,
        requests=limits.max_requests_per_caller,
        silence_s=limits.idle_timeout_s,
        lifetimes_s={jobs_servicer.WATCH: jobs_servicer.LONGEST_WATCH_S},
    )


def _make_pool(config: AggregatorConfig) -> WorkerPool:
    evaluates = bool(config.evaluation) and not why_not_evaluated()
    return WorkerPool(
        PoolSettings(**config.workers.model_dump()),
        handlers="aggregator.work",
        blobs_root=config.blobs_dir,
        workspace=config.state_dir / "work",
        preload=("learning.evaluation",) if evaluates else (),
        prepare={"learning.warm": list(config.evaluation)} if evaluates else {},
    )


def _settings(config: AggregatorConfig) -> JobSettings:
    limits, jobs = config.limits, config.jobs
    return JobSettings(
        max_jobs_pending=limits.max_jobs_pending,
        max_pending_per_scientist=jobs.max_pending_per_scientist,
        max_jobs_a_day_per_scientist=limits.max_jobs_a_day_per_scientist,
        max_stored_bytes_per_scientist=limits.max_stored_bytes_per_scientist,
        max_rounds=limits.max_rounds,
        max_parties=limits.max_parties,
        max_round_timeout_s=limits.max_round_timeout_s,
        capacity=capacity_of(config),
        max_attempts=1 + len(jobs.retry_delays_s),
        computation_timeout_s=jobs.computation_timeout_s,
    )


def log_start(config: AggregatorConfig, federation: Federation, address: str) -> None:
    """What an operator wants to see first: configuration, key, pipeline parameters, address."""
    privacy = config.privacy
    LOG.info("Sotto %s, aggregator of federation %r", __version__, config.federation)
    LOG.info(
        "custody %s, key id %s, %d bits, threshold %d of %d holders",
        federation.custody,
        federation.keyring.key_id,
        federation.keyring.modulus_bits,
        federation.roster.threshold,
        len(federation.roster.holders),
    )
    LOG.info(
        "noise by %s, %d colluders tolerated, party-level budget: %s",
        privacy.noise_by,
        privacy.colluders,
        limit_of(privacy.budget),
    )
    LOG.info("%d descriptors, %d of them for connections", descriptor_limit(), room_for_connections())
    LOG.info(
        "%d to %d workers, %s at the start; state in %s",
        config.workers.min_size,
        config.workers.max_size,
        config.workers.size,
        config.state_dir,
    )
    tls = config.server.tls
    for warning in (*config.exposed(), *(warnings_of(tls.certificate, tls.ca) if tls else ())):
        LOG.warning("%s", warning)
    if federation.custody == "aggregator":
        LOG.warning("custody aggregator: this process holds the key and can read every update")
    if config.evaluation and why_not_evaluated():
        LOG.warning("nothing is evaluated here: %s", why_not_evaluated())
    if config.policy.allow_unsigned_jobs:
        LOG.warning("jobs that nobody signed are taken (policy.allow_unsigned_jobs)")
    if config.server.insecure:
        LOG.warning("INSECURE: no TLS; anybody on this machine can pose as a party or scientist")
    if federation.keyring.modulus_bits < 2048:  # NIST SP 800-57 part 1: the least that is acceptable
        LOG.warning("INSECURE: a modulus of %d bits is breakable", federation.keyring.modulus_bits)
    LOG.info("listening on %s", address)


def _write_address(path: Path, address: str) -> None:
    make_private_directory(path.parent)
    write_over(path, f"{address}\n".encode(), secret=False)


async def serve(config: AggregatorConfig) -> None:
    """Run until SIGTERM or SIGINT."""
    app = App(config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        await app.start()
        told, broken = asyncio.create_task(stopping.wait()), asyncio.create_task(app.watch())
        await asyncio.wait({told, broken}, return_when=asyncio.FIRST_COMPLETED)
        for task in (told, broken):
            task.cancel()
        if not stopping.is_set():
            await broken
    finally:
        await app.stop()
