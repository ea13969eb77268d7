"""What a party makes of the order that a round rests on: whether a scientist signed it, whether the round follows from
it, and how many rounds were begun for it.

Nothing about a job is believed because the aggregator says so: whatever a plan takes from the job's specification is
planned again here, from the specification that the scientist signed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    func,
    or_,
    select,
)

from ..encryption.scheme import Scheme
from ..errors import InvalidInput, PlanError, PolicyError, SignatureError
from ..jobs.orders import spec_of_order
from ..jobs.plans import Model, round_plan
from ..jobs.spec import FederatedTrainingSpec
from ..privacy.accounting import epsilon
from ..privacy.events import Event
from ..protocol.derive import example_event
from ..protocol.order import Order, open_order
from ..protocol.plan import FEDSGD, RoundPlan
from ..protocol.roster import Roster
from ..protocol.signing import Signed


@dataclass(frozen=True, slots=True)
class Ordered:
    """An order that a round follows from: what a scientist signed, its digest, and its specification."""

    order: Order
    digest: str
    spec: FederatedTrainingSpec


def check_order(
    signed: Signed | None, plan: RoundPlan, *, roster: Roster, pinned: bool, scheme: Scheme, allow_unsigned: bool
) -> Ordered | None:
    """The order that a plan rests on, once the plan follows from it; None where it rests on nobody's, and may.

    Whose key is whose only a kit can say. In a roster that came from the aggregator, scientists are as much its word as
    the job is: what they signed is nobody's, and if it is taken, no name is known for it.

    Args:
        signed: the order that came with the plan; None where none did.
        plan: checked against kit and policy.
        roster: this party's.
        pinned: whether it is a kit's; else the aggregator made it.
        scheme: the plan's, under this federation's key.
        allow_unsigned: `policy.allow_unsigned_jobs`.

    Raises:
        PolicyError: nobody signed for the job, and this party does not take part in such.
        SignatureError: the order is signed by nobody who may.
        InvalidInput: it is no order, or its specification none.
        PlanError: the plan does not follow from it; names the field.
    """
    if not plan.order:
        if signed is not None:
            raise PlanError("the plan does not name the order that came with it", field="order")
        if not allow_unsigned:
            raise PolicyError(
                "no scientist signed for this job: this party takes part in none that the aggregator may have made up "
                "(policy.allow_unsigned_jobs)"
            )
        return None
    if not pinned and not allow_unsigned:
        raise SignatureError(
            "a job order is signed by a stranger: this party has no kit, whose roster alone says who may order jobs "
            "(policy.allow_unsigned_jobs)"
        )
    if signed is None:
        raise PlanError("the plan names an order that did not come with it", field="order")
    order, digest = open_order(signed, roster)
    if digest != plan.order:
        raise PlanError("the plan names another order than the one that came with it", field="order")
    spec = spec_of_order(order)
    if not isinstance(spec, FederatedTrainingSpec):
        raise PlanError(
            f"the order of {order.scientist} is for an {order.job}, which no party has part in", field="order"
        )
    if plan.round > order.most_rounds:
        raise PlanError(
            f"{order.scientist} ordered at most {order.most_rounds} rounds, this is round {plan.round}", field="round"
        )
    _check_follows(plan, spec, by=order.scientist, roster=roster, scheme=scheme)
    _check_epsilon(plan, spec, by=order.scientist)
    return Ordered(order, digest, spec) if pinned else None


def _check_follows(plan: RoundPlan, spec: FederatedTrainingSpec, *, by: str, roster: Roster, scheme: Scheme) -> None:
    """Plans the round again, from what was ordered and from what no order can say: job, round, model and noise."""
    fedsgd = spec.strategy == FEDSGD
    adapts = spec.party_privacy.adaptive_clipping is not None and plan.round > 1
    try:
        ordered = round_plan(
            spec,
            job_id=plan.job_id,
            number=plan.round,
            model=Model(plan.model_sha256, plan.model_bytes, plan.dimension, plan.not_trained),
            roster=roster,
            scheme=scheme,
            noise=float(plan.noise.noise_multiplier if fedsgd else plan.local.noise_multiplier),
            declared_rows=plan.gradient_sum.declared_rows if plan.gradient_sum else {},
            clipping_norm=float(plan.clipping_norm) if adapts else None,
            order=plan.order,
        )
    except (InvalidInput, PlanError) as error:
        raise PlanError(f"no such round follows from what {by} ordered: {error.message}") from error
    for field in _differences(ordered, plan):
        raise PlanError(f"the plan's {field} is not what {by} ordered", field=field)
    if plan.round == 1 and spec.initial_model_sha256 not in ("", plan.model_sha256):
        raise PlanError(f"the first round does not start from the model that {by} ordered", field="model_sha256")


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields that differ."""
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if mine != theirs and is_dataclass(mine) and type(mine) is type(theirs):
            yield from _differences(mine, theirs, f"{path}{field.name}.")
        elif mine != theirs:
            yield f"{path}{field.name}"


def _check_epsilon(plan: RoundPlan, spec: FederatedTrainingSpec, *, by: str) -> None:
    """The noise that no order can name is as much as the ε that was asked for needs, all rounds run."""
    local = spec.local_training
    cost = _cost(example_event(plan), spec.priced_rounds, local.delta)
    if not cost <= local.epsilon:
        raise PlanError(
            f"with this plan's noise {spec.priced_rounds} rounds cost a row ε {cost:.6g} at δ {local.delta:g}: {by} "
            f"ordered at most {local.epsilon:g}",
            field="local.noise_multiplier",
        )


@lru_cache(maxsize=64)
def _cost(event: Event, rounds: int, delta: float) -> float:
    """Of a job's rounds, which are alike: asked once, not in every round."""
    return epsilon([event.repeated(rounds)], delta=delta)


class OrderBook:
    """The tables `orders` and `order_rounds`: which job each order is, and its rounds. Rows are never deleted.

    Methods work inside the caller's transaction: a round is begun, charged and counted together, or not at all.
    """

    def __init__(self, metadata: MetaData) -> None:
        self._orders = Table(
            "orders",
            metadata,
            Column("digest", String(64), primary_key=True),
            Column("scientist", String(64), nullable=False),
            Column("request_id", String(100), nullable=False),
            Column("job_id", String(64), nullable=False, unique=True),
            Column("most_rounds", BigInteger, nullable=False),
            Column("expires_at", String(20), nullable=False),
            UniqueConstraint("scientist", "request_id", name="orders_request"),
        )
        self._rounds = Table(
            "order_rounds",
            metadata,
            Column("digest", String(64), primary_key=True),
            Column("number", Integer, primary_key=True),
        )

    def begin(
        self, connection: Connection, ordered: Ordered | None, plan: RoundPlan, *, now: float, late_s: float = 0.0
    ) -> None:
        """Count a round of an order, once; nothing where nobody signed.

        Args:
            now: seconds since the epoch.
            late_s: how long after the order's end this party may hear of a round that was begun before.

        Raises:
            PlanError: the order is another job's, the job another order's, or the request was ordered once before; it
                has expired; or as many rounds as were ordered have begun.
        """
        if ordered is None:
            return
        self._bind(connection, ordered, plan.job_id)
        order, digest, rounds = ordered.order, ordered.digest, self._rounds.c
        here = select(rounds.number).where(rounds.digest == digest, rounds.number == plan.round)
        if connection.execute(here).first() is not None:
            return
        if now > order.expires + late_s:
            raise PlanError(f"the order of {order.scientist} expired at {order.expires_at}: no round begins for it")
        if self.rounds_begun(connection, digest) >= order.most_rounds:
            raise PlanError(f"the {order.most_rounds} rounds that {order.scientist} ordered have all begun")
        connection.execute(self._rounds.insert().values(digest=digest, number=plan.round))

    def rounds_begun(self, connection: Connection, digest: str) -> int:
        """Of an order."""
        query = select(func.count()).select_from(self._rounds).where(self._rounds.c.digest == digest)
        return int(connection.execute(query).scalar_one())

    def _bind(self, connection: Connection, ordered: Ordered, job_id: str) -> None:
        """One order, one job; one job, one order; one request of a scientist, one order."""
        order, table = ordered.order, self._orders
        same_request = (table.c.scientist == order.scientist) & (table.c.request_id == order.request_id)
        query = select(table.c.digest, table.c.job_id)
        query = query.where(or_(table.c.digest == ordered.digest, table.c.job_id == job_id, same_request))
        known = connection.execute(query).all()
        for digest, job in known:
            if (digest, job) != (ordered.digest, job_id):
                what = (
                    f"this order of {order.scientist} is that of job {job}"
                    if digest == ordered.digest
                    else f"job {job_id} rests on another order"
                    if job == job_id
                    else f"request {order.request_id!r} of {order.scientist} was ordered before, as job {job}"
                )
                raise PlanError(f"{what}: what was ordered once is not done twice")
        if not known:
            connection.execute(
                table.insert().values(
                    digest=ordered.digest,
                    scientist=order.scientist,
                    request_id=order.request_id,
                    job_id=job_id,
                    most_rounds=order.most_rounds,
                    expires_at=order.expires_at,
                )
            )
