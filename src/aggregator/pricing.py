"""What a job would cost, before anybody trains: refused where the budget does not allow it.

Submitting has to be quick while every worker is busy, so nothing here waits for one: the size of a task's model is
asked for once, and what a specification costs is remembered.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from sqlalchemy import Connection

from ..errors import StateError
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.store import JobStore
from ..privacy.events import Event as Mechanism
from ..storage.database import Database
from .accounts import Accounts
from .federation import Federation
from .pipeline import AggregatorPipeline
from .planning import Model, plan_round, round_costs
from .store import RoundStore

REMEMBERED: Final = 1024
"""Costs by specification: more than jobs can wait."""
_NO_MODEL: Final = "0" * 64
"""Stands for the model's digest: it has no part in what a round costs."""

Planned = tuple[int, Mechanism]
"""Rounds that a job may still be charged for, and what one costs."""


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
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._rounds = rounds
        self._accounts = accounts
        self._pipeline = pipeline
        self._federation = federation
        self._known: dict[tuple[str, str], Mechanism] = {}

    async def check(self, spec: FederatedTrainingSpec) -> None:
        """Refuse a job that could not be run to its end within the budget beside those accepted before.

        Raises:
            BudgetError: it would overspend.
            InvalidInput, PlanError, PolicyError: no round of it could be planned.
            StateError: no party has joined yet.
        """
        self._pipeline.check(spec)
        if not self._federation.pinned and not self._federation.roster.members:
            raise StateError("no party has joined yet: a job can be priced only for parties that are known")
        cost = await self._cost(spec)
        others = [(left, await self._cost(other)) for other, left in await self._database.run(self._committed)]
        planned: list[Planned] = [*others, (spec.priced_rounds, cost)]
        await self._database.run(partial(self._accounts.check, planned=planned))

    async def _cost(self, spec: FederatedTrainingSpec) -> Mechanism:
        key = (spec.digest, self._federation.roster.digest)
        if key not in self._known:
            model = Model(_NO_MODEL, 0, await self._pipeline.dimension(spec))
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = await asyncio.to_thread(self._derive, spec, model)
        return self._known[key]

    def _derive(self, spec: FederatedTrainingSpec, model: Model) -> Mechanism:
        scheme = self._pipeline.scheme(spec.encryption.scheme)
        plan = plan_round(spec, job_id="priced", number=1, model=model, roster=self._federation.roster, scheme=scheme)
        return round_costs(scheme, plan)["release"]

    def _committed(self, connection: Connection) -> list[tuple[FederatedTrainingSpec, int]]:
        """The trainings already accepted, with the rounds that each may still be charged for."""
        found = []
        for row in self._jobs.unfinished(connection, kind=FederatedTrainingSpec.kind):
            latest = self._rounds.latest(connection, row.job_id) if row.started_at else None
            spec = FederatedTrainingSpec.from_json(row.spec)
            left = spec.priced_rounds - (latest.number if latest else 0)
            if left > 0:
                found.append((spec, left))
        return found
