"""What a job would cost, before anybody trains: refused where the budget does not allow it.

Submitting has to be quick while every worker is busy, so nothing here waits for one: the size of a task's model is
asked for once, and what a specification costs is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from sqlalchemy import Connection

from ..encryption.scheme import Layout
from ..errors import BudgetError, PlanError, StateError
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import JobRow
from ..jobs.store import JobStore
from ..privacy.accounting import epsilon
from ..privacy.events import Event as Mechanism
from ..privacy.events import NonPrivate
from ..protocol.derive import example_event
from ..storage.database import Database
from .accounts import Accounts, Planned
from .disclosed import check_rows, too_dear
from .federation import Federation
from .pipeline import AggregatorPipeline
from .planning import (
    Model,
    check_local_noise,
    declarations,
    declared_rows_of,
    invited,
    plan_of,
    plan_round,
    round_costs,
    undeclared,
)
from .store import RoundStore

REMEMBERED: Final = 1024
"""Costs by specification: more than jobs can wait."""
_NO_MODEL: Final = "0" * 64
_NO_NOISE: Final = 1.0
"""Stand for the model's digest and the noise of DP-SGD, which have no part in what a round costs a party. To calibrate
that noise takes a second, which only who plans a round has to wait."""

_UNKNOWN: Final = NonPrivate(unit="party", reason="not every invited party has declared its rows yet")
"""What a fedsgd job counts as that waits for parties to come back: a round of infinite epsilon."""


class Pricing:
    """Prices federated trainings against the federation's party-level budget."""

    def __init__(
        self,
        *,
        database: Database,
        jobs: JobStore,
        rounds: RoundStore,
        accounts: Accounts,
        pipeline: AggregatorPipeline,
        federation: Federation,
        max_update_bytes: int,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._rounds = rounds
        self._accounts = accounts
        self._pipeline = pipeline
        self._federation = federation
        self._max_update_bytes = max_update_bytes
        self._known: dict[tuple[str, str], Planned] = {}

    async def check(self, spec: FederatedTrainingSpec, *, owner: str, model: bytes = b"") -> str:
        """Refuse a job that could not be run to its end within the budgets beside those accepted before, or in whose
        rounds, by what parties told, too few could take part.

        Args:
            owner: whose job it would be: a refusal of it is entered beside one of the same job of somebody else.
            model: the bytes of the model that comes with it, which lies nowhere yet.

        Returns:
            A sentence about the parties that cannot take part; empty where none is known.

        Raises:
            BudgetError: it would overspend.
            InvalidInput, PlanError, PolicyError: no round of it could be planned.
            StateError: no party has joined yet, or (fedsgd) one of those invited has not.
        """
        self._pipeline.check(spec)
        if not self._federation.pinned and not self._federation.roster.members:
            raise StateError("no party has joined yet: a job can be priced only for parties that are known")
        self._federation.readiness.check(spec, self._federation.roster)
        missing = undeclared(spec, self._federation)
        if missing:
            raise StateError(
                f"fedsgd needs the number of rows that each invited party declares when it joins: {', '.join(missing)} "
                f"has declared none for task {spec.task!r} since this aggregator started"
            )
        roster = self._federation.roster.digest
        asked = await self._price(spec.digest, roster, lambda: spec, model=model)
        said = await self._check_rows(spec, model=model)
        planned: list[Planned] = []
        for row, begun, rows in await self._database.run(self._accepted):
            spec_of = partial(FederatedTrainingSpec.from_json, row.spec)
            price = await self._price(row.spec_digest, roster, spec_of, planned_rows=rows)
            if price.rounds > begun:
                planned.append(price._replace(rounds=price.rounds - begun))
        planned.append(asked)
        try:
            await self._database.run(partial(self._accounts.check, planned=planned))
        except BudgetError as error:
            refuse = partial(self._accounts.refuse, job_id="", number=None, event=asked.event, parties=asked.parties)
            request = hashlib.sha256(f"{owner}\n{spec.digest}".encode()).hexdigest()
            await self._database.run(partial(refuse, error=error, now=time.time(), request=request))
            raise
        return said

    async def _check_rows(self, spec: FederatedTrainingSpec, *, model: bytes) -> str:
        """Whether the parties that told of their rows' ε could be charged, as `disclosed.check_rows` says it."""
        local, roster = spec.local_training, self._federation.roster
        cohort = invited(spec, roster)[0]
        bounds = self._federation.disclosed.bounds(cohort, spec.task, delta=local.delta)
        cost = local.epsilon  # or less, which takes a second to find
        if any(0 < bound < cost for bound in bounds.values()):
            shape = Model(_NO_MODEL, 0, await self._pipeline.dimension(spec, model=model))
            cost = await asyncio.to_thread(self._row_epsilon, spec, shape)
        return check_rows(too_dear(bounds, spec, epsilon=cost), spec, roster)

    def _row_epsilon(self, spec: FederatedTrainingSpec, model: Model) -> float:
        """ε for a row, at the job's δ, of all rounds that it is priced for, against whoever sees the releases: whatever
        a party counts against, it charges no less."""
        plan = plan_round(
            spec,
            job_id="priced",
            number=1,
            model=model,
            roster=self._federation.roster,
            scheme=self._pipeline.scheme(spec.encryption.scheme),
            declared_rows=declarations(spec, self._federation),
        )
        event = example_event(plan, against="release").repeated(spec.priced_rounds)
        return epsilon([event], delta=spec.local_training.delta)

    async def _price(
        self,
        digest: str,
        roster: str,
        spec: Callable[[], FederatedTrainingSpec],
        *,
        planned_rows: Mapping[str, int] = MappingProxyType({}),
        model: bytes = b"",
    ) -> Planned:
        """Rounds of a specification in all, what one costs, and whom they invite; both digests are asked for once, not
        for every job.

        What fedsgd costs depends on what parties declare, too, and is not remembered. Of a job that has begun counts
        what its plans name.
        """
        known = self._known.get((digest, roster))
        if known is not None:
            return known
        given = spec()
        if set(undeclared(given, self._federation)) - planned_rows.keys():
            return Planned(given.priced_rounds, _UNKNOWN, invited(given, self._federation.roster)[0])
        rows = {**declarations(given, self._federation), **planned_rows}
        shape = Model(_NO_MODEL, 0, await self._pipeline.dimension(given, model=model))
        cost = await asyncio.to_thread(self._derive, given, shape, rows)
        price = Planned(given.priced_rounds, cost, invited(given, self._federation.roster)[0])
        if given.strategy == "fedavg":
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[digest, roster] = price
        return price

    def _derive(self, spec: FederatedTrainingSpec, model: Model, declared_rows: dict[str, int]) -> Mechanism:
        if spec.strategy == "fedavg":
            check_local_noise(spec)
        scheme, roster = self._pipeline.scheme(spec.encryption.scheme), self._federation.roster
        plans = [
            plan_round(
                spec,
                job_id="priced",
                number=1,
                model=model,
                roster=roster,
                scheme=scheme,
                local_noise=_NO_NOISE,
                declared_rows=declared_rows,
                clipping_norm=norm,
            )
            for norm in dict.fromkeys(spec.party_privacy.norm_bounds)
        ]
        largest = max(Layout.from_json(plan.layout).body_bytes for plan in plans)
        if largest > self._max_update_bytes:
            raise PlanError(
                f"a contribution to this job may take {largest} bytes; this aggregator takes {self._max_update_bytes} "
                "(limits.max_update_bytes)"
            )
        # Under the smallest norm there is the least noise, whose shares are the furthest from one discrete Gaussian: no
        # round costs more. The largest needs the widest slots: where these fit, all do.
        return round_costs(scheme, plans[0])["release"]

    def _accepted(self, connection: Connection) -> list[tuple[JobRow, int, dict[str, int]]]:
        """The trainings already accepted, with the number of the round that each has come to, and the rows that its
        plan says parties declare."""
        found = []
        for row in self._jobs.unfinished(connection, kind=FederatedTrainingSpec.kind):
            latest = self._rounds.latest(connection, row.job_id) if row.started_at else None
            rows = declared_rows_of(plan_of(latest.plan)) if latest else {}
            found.append((row, latest.number if latest else 0, rows))
        return found
