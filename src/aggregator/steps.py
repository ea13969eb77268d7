"""The steps of a round, performed: each reads a row, does its work, and gives the event that says so.

Every step is idempotent. What it stores is content-addressed or named by the row, so that a step that is repeated after
a crash either finds its work done or does it afresh before anything of it was shown to anybody.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PASSING, DeadlineError, EvaluationError, SottoError
from ..jobs.spec import FederatedTrainingSpec
from ..privacy.accounting import epsilon
from ..privacy.events import Event as Mechanism
from ..privacy.events import event_from_json
from ..privacy.figures import Figure, figures
from ..protocol.batches import StoredBatch
from ..protocol.canonical import number_or_inf, real
from ..protocol.plan import (
    LIST_KIND,
    OPENING_KIND,
    ROOT_KIND,
    TRANSCRIPT_KIND,
    OpeningStatement,
    RootStatement,
    signed_digest,
)
from ..protocol.roster import AGGREGATOR
from ..protocol.signing import Signed
from .federation import Federation
from .held import public_reason
from .pipeline import AggregatorPipeline
from .planning import Model, plan_of
from .round_row import (
    Batch,
    Evaluated,
    Event,
    Failure,
    Folded,
    ListFrozen,
    NoiseMade,
    PartyFailed,
    Released,
    RoundRow,
    SharesAsked,
    SpentRounds,
    Work,
)
from .rounds import COMMIT_SHARE, UPLOAD_SHARE, holders_to_ask

LOG = logging.getLogger("sotto.aggregator")


@dataclass(frozen=True, slots=True)
class History:
    """What a release needs to know of the job besides its round.

    Attributes:
        spent: rounds before it that count as spent.
        state_sha256: the server optimiser's state after the last release; empty before the first.
        ledger_head: digest of the aggregator's ledger.
    """

    spent: tuple[SpentRounds, ...]
    state_sha256: str
    ledger_head: str


class RoundSteps:
    """Performs the steps of rounds; of its own it knows only which jobs' models are not worth measuring again."""

    def __init__(self, pipeline: AggregatorPipeline, federation: Federation, *, clock: Callable[[], float]) -> None:
        self._pipeline = pipeline
        self._federation = federation
        self._clock = clock
        self._endless: dict[str, str] = {}

    def ended(self, job_id: str) -> None:
        """A job is over: nothing of it is remembered."""
        self._endless.pop(job_id, None)

    async def make_noise(self, row: RoundRow) -> Event:
        """The aggregator's noise as one more contribution, its root signed like any other."""
        batch = await self._pipeline.make_noise(row)
        return NoiseMade(self._sign_root(row, batch).to_json(), Batch(batch.header, batch.sha256, batch.size))

    async def freeze_list(self, row: RoundRow) -> Event:
        """Sign the list of roots: nothing else can become a contribution."""
        statement = {"plan": row.plan_digest, "roots": [row.roots[name] for name in sorted(row.roots)]}
        return ListFrozen(self._federation.sign(LIST_KIND, statement).to_json())

    async def fold(self, row: RoundRow) -> Event:
        """Multiply what was delivered."""
        aggregate = await self._pipeline.fold(row)
        return Folded(Batch(aggregate.header, aggregate.sha256, aggregate.size), aggregate.root)

    async def ask_shares(self, row: RoundRow, *, connected: frozenset[str]) -> Event:
        """Sign what is to be opened, and choose whom to ask."""
        if row.frozen_list is None:
            raise AssertionError("a round opens after its list was frozen")
        statement = OpeningStatement(
            plan=row.plan_digest,
            list=signed_digest(Signed.from_json(row.frozen_list), LIST_KIND),
            contributors=row.contributors,
            aggregate_root=row.aggregate_root,
        )
        opening = self._federation.sign(OPENING_KIND, statement.to_statement())
        return SharesAsked(opening.to_json(), holders_to_ask(row, connected=connected, now=self._clock()))

    async def release(self, row: RoundRow, *, spec: FederatedTrainingSpec, history: History) -> list[Event]:
        """Open, apply, record. Wrong shares instead become the failures of those who sent them."""
        opened = await self._pipeline.open(row, optimizer=spec.server_optimizer, state_sha256=history.state_sha256)
        if "wrong" in opened:
            return [
                PartyFailed(party, Failure(Work.OPEN.value, "SHARE_INVALID", why))
                for party, why in opened["wrong"].items()
            ]
        delta = spec.party_privacy.delta
        party, others, aggregator = await asyncio.to_thread(
            party_figures, [*history.spent, SpentRounds(row.costs, 1)], delta
        )
        epsilons = party.epsilon, aggregator
        transcript = self._transcript(row, opened, epsilons=epsilons, ledger_head=history.ledger_head)
        result: dict[str, Any] = {
            "model_sha256": opened["model_sha256"],
            "model_bytes": opened["model_bytes"],
            "state_sha256": opened["state_sha256"],
            "blobs": [blob for blob in (opened["model_sha256"], opened["state_sha256"]) if blob],
            "epsilon_party": number_or_inf(party.epsilon),
            "epsilon_party_against_aggregator": number_or_inf(aggregator),
            "epsilon_party_if_all_others_collude": number_or_inf(others.epsilon),
            "party_assumption": party.assumes,
            "party_delta": delta,
            "transcript": transcript.to_json(),
            **_next_norm(opened),
        }
        return [Released(result)]

    async def evaluate(self, row: RoundRow) -> Event:
        """Measure the released model. Whatever fails, the model is there: then it is said why it was not measured. What
        did not end in time once is not begun again: it would hold up every further round for as long.

        Raises:
            SottoError: one of `errors.PASSING`: it may be done in a moment, here or by the next process.
        """
        if row.job_id in self._endless:
            return Evaluated({}, f"not tried again in this job: {self._endless[row.job_id]}")
        plan = plan_of(row.plan)
        model = {"sha256": (row.result or {})["model_sha256"], "seed": plan.seed, "not_trained": plan.not_trained}
        options = json.loads(plan.task_options)
        try:
            return await self._pipeline.evaluate(plan.task, options, model, timeout_s=row.timeout_s)
        except PASSING:
            raise
        except Exception as error:
            private, why = getattr(error, "private", repr(error)), public_reason(error)
            LOG.warning("round %d of job %s is not evaluated: %s %s", row.number, row.job_id, why, private)
            if isinstance(error, DeadlineError):
                self._endless[row.job_id] = f"the model of round {row.number} was not measured in time ({why})"
            return Evaluated({}, why)

    async def try_evaluation(self, job_id: str, spec: FederatedTrainingSpec, model: Model) -> str:
        """Measure the model that a job starts from, before anything is charged: what comes in the way of that, in
        words; empty where it works.

        Raises:
            EvaluationError: no model of this task can be measured here.
            SottoError: one of `errors.PASSING`.
        """
        params = {"sha256": model.sha256, "seed": spec.seed, "not_trained": model.not_trained}
        try:
            found = await self._pipeline.evaluate(
                spec.task, spec.task_options, params, timeout_s=float(spec.round_timeout_s)
            )
        except EvaluationError as error:
            raise EvaluationError(
                f"no model of this job could be evaluated, and nothing was charged: {error.message} (whoever runs the "
                f"aggregator mends that, or takes evaluation.{spec.task} out of its configuration)",
                private=error.private,
            ) from error
        except PASSING:
            raise
        except SottoError as error:  # of this model, or by chance
            LOG.warning("the initial model of a job is not evaluated: %s %s", error.message, error.private)
            if isinstance(error, DeadlineError):
                self._endless[job_id] = f"the initial model was not measured in time ({error.message})"
            return error.message
        return found.without

    def _transcript(self, row: RoundRow, opened: Any, *, epsilons: tuple[float, float], ledger_head: str) -> Signed:
        listed = Signed.from_json(row.frozen_list or {})
        statement = {
            "plan": row.plan_digest,
            "job_id": row.job_id,
            "round": row.number,
            "list": signed_digest(listed, LIST_KIND),
            "contributors": list(row.contributors),
            "aggregate_root": row.aggregate_root,
            "opened_by": sorted(row.shares) or [AGGREGATOR],
            "model_sha256": opened["model_sha256"],
            "epsilon_party": real(epsilons[0]),
            "epsilon_party_against_aggregator": real(epsilons[1]),
            "ledger_head": ledger_head,
            "party_ledger_heads": party_ledger_heads([row]),
            **_next_norm(opened),
        }
        return self._federation.sign(TRANSCRIPT_KIND, statement)

    def _sign_root(self, row: RoundRow, batch: StoredBatch) -> Signed:
        layout = plan_of(row.plan).layout
        statement = RootStatement(
            plan=row.plan_digest,
            contributor=AGGREGATOR,
            root=batch.root,
            ciphertexts=int(layout["ciphertext_count"]),
            body_bytes=batch.size,
            proof=batch.proof,
        )
        return self._federation.sign(ROOT_KIND, statement.to_statement())


def party_ledger_heads(rows: Iterable[RoundRow]) -> dict[str, str]:
    """Where the parties' own ledgers were when they last committed to a batch, by party, as far as they told."""
    found: dict[str, str] = {}
    for row in rows:
        for name in row.committed:
            statement = json.loads(row.roots[name]["statement"])
            found |= {name: statement["ledger_head"]} if statement.get("ledger_head") else {}
    return dict(sorted(found.items()))


def costs_of(costs: Mapping[str, Mapping[str, Any]]) -> tuple[Mechanism, Mechanism]:
    """What a round costs a party (`RoundRow.costs`): against whoever sees the release, and against the aggregator."""
    return event_from_json(costs["release"]), event_from_json(costs["aggregator"])


def party_figures(spent: Iterable[SpentRounds], delta: float) -> tuple[Figure, Figure, float]:
    """Of a party, against the release and against all others; and ε against the aggregator, as its own events say."""
    costs = [tuple(event.repeated(each.rounds) for event in costs_of(each.costs)) for each in spent]
    party, _, others = figures([release for release, _ in costs], unit="party", delta=delta)
    return party, others, epsilon([aggregator for _, aggregator in costs], delta=delta)


def _next_norm(opened: Mapping[str, Any]) -> dict[str, str]:
    """What adaptive clipping made of the bits, for the next round; nothing without it."""
    return {key: opened[key] for key in ("next_clipping_norm",) if key in opened}


def lacking(row: RoundRow) -> tuple[str, ...]:
    """Whose part a failed round lacks: who refused or failed and, where its time was up, who did not answer."""
    silent: set[str] = set()
    if row.spent:
        silent = set(row.asked) - set(row.shares) if row.ended_at >= row.deadline else set()
    elif row.frozen_list is not None:
        closed = row.ended_at >= row.began_at + UPLOAD_SHARE * row.timeout_s
        silent = set(row.cohort) - set(row.batches if closed else row.roots)
    elif row.ended_at >= row.began_at + COMMIT_SHARE * row.timeout_s:
        silent = set(row.cohort) - set(row.roots)
    return tuple(sorted(silent | set(row.failures)))
