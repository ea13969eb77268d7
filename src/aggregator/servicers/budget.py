"""`sotto.v1.BudgetService` over `aggregator.budgets.Budgets`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from ...communication.generated import budget_pb2, budget_pb2_grpc
from ...communication.identity import caller
from ...privacy.events import RELATIONS, event_to_json
from ...privacy.ledger import Entry, to_line
from ...protocol.canonical import finite
from ..budgets import AccountView, Budgets, Question
from .jobs import in_thread_if_many

SERVICE: Final = "sotto.v1.BudgetService"
ROLES: Final[dict[str, frozenset[str]]] = {
    f"/{SERVICE}/{method}": frozenset({"operator", "scientist", "party"}) for method in ("GetBudget", "ListEntries")
}
"""Who may call which method; what each may see is `Budgets`' rule."""


class BudgetServicer(budget_pb2_grpc.BudgetServiceServicer):
    """Answers everybody in the federation.

    Args:
        budgets: answers.
        verify_key: of the aggregator, Ed25519, 32 bytes.
    """

    def __init__(self, budgets: Budgets, *, verify_key: bytes) -> None:
        self._budgets = budgets
        self._verify_key = verify_key

    async def GetBudget(  # noqa: N802  # named by the wire, as all methods here
        self, request: budget_pb2.GetBudgetRequest, context: Any
    ) -> budget_pb2.GetBudgetResponse:
        views, head, entries = await self._budgets.budgets(
            caller(), unit=request.unit, subject=request.subject, delta=request.delta
        )
        return budget_pb2.GetBudgetResponse(
            budgets=[budget_to_proto(view) for view in views], head=head, entries=entries, verify_key=self._verify_key
        )

    async def ListEntries(  # noqa: N802
        self, request: budget_pb2.ListEntriesRequest, context: Any
    ) -> budget_pb2.ListEntriesResponse:
        question = Question(unit=request.unit, subject=request.subject, job_id=request.job_id, kind=request.kind)
        entries, token, head = await self._budgets.entries(
            caller(), question, page_size=request.page_size, page_token=request.page_token
        )
        return await in_thread_if_many(
            lambda found: budget_pb2.ListEntriesResponse(
                entries=[entry_to_proto(entry) for entry in found], next_page_token=token, head=head
            ),
            entries,
            count=len(entries),
        )


def budget_to_proto(view: AccountView) -> budget_pb2.AccountBudget:
    """The message of one budget."""
    budget, now = view.budget, view.now
    charged, aggregator, others = view.figures
    return budget_pb2.AccountBudget(
        unit=budget.unit,
        subject=budget.subject,
        neighbouring_relation=RELATIONS[budget.unit],
        rounds_spent=now.rounds_spent,
        rounds_limit=budget.max_rounds,
        rounds_left=now.rounds_left,
        epsilon_spent=finite(now.epsilon_spent),
        epsilon_limit=budget.epsilon,
        epsilon_left=now.epsilon_left,
        delta=budget.delta,
        periods=view.periods,
        rounds_ever=view.ever.rounds_spent,
        epsilon_ever=finite(view.ever.epsilon_spent),
        epsilon_at_delta=finite(view.epsilon_at),
        against=charged.against,
        assumption=charged.assumes,
        epsilon_against_aggregator=finite(aggregator.epsilon),
        assumption_against_aggregator=aggregator.assumes,
        epsilon_if_all_others_collude=finite(others.epsilon),
    )


def entry_to_proto(entry: Entry) -> budget_pb2.LedgerEntry:
    """The message of one entry."""
    time = Timestamp()
    time.FromDatetime(datetime.fromisoformat(entry.at))
    event = "" if entry.event is None else json.dumps(event_to_json(entry.event), sort_keys=True, separators=(",", ":"))
    return budget_pb2.LedgerEntry(
        sequence=entry.sequence,
        time=time,
        kind=entry.kind,
        job_id=entry.job_id,
        round=entry.round,
        unit=entry.unit,
        neighbouring_relation=entry.relation,
        subject=entry.subject,
        charged_rounds=entry.charged_rounds,
        event=event,
        reason=entry.reason,
        previous=entry.previous,
        digest=entry.digest,
        line=to_line(entry),
    )
