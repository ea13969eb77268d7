"""`kill -9` of any process, wherever a round is: the job ends, nothing is drawn or charged twice, nothing is forgotten.

A round is brought to a place by suspending the workers of somebody it needs, and let go on after the kill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from src.errors import BudgetError
from src.party.store import Stage
from src.protocol.roster import AGGREGATOR


@contextlib.contextmanager
def round_in(pair: Any, state: str, wait_until: Callable[..., Any]) -> Iterator[str]:
    """A job whose only round stays in this state inside the block."""
    federation, hold = pair.federation, pair.federation.processes.hold
    with contextlib.ExitStack() as held:
        b = held.enter_context(contextlib.ExitStack())
        b.enter_context(hold("b"))
        job_id = pair.submit()
        federation.reached(job_id, lambda row: "a" in row.roots, "a commits while b is held")
        if state != "TRAINING":
            aggregator = held.enter_context(contextlib.ExitStack())
            aggregator.enter_context(hold(AGGREGATOR))  # uploads come in, and are not checked
            b.close()
            stage = (Stage.REVEALED, Stage.REVEALED)
            wait_until(lambda: (_stage(federation, "a", job_id), _stage(federation, "b", job_id)) == stage, "uploads")
            if state == "OPENING":
                held.enter_context(hold("a", "b"))  # shares are asked for, and not made
                aggregator.close()
                federation.reached(job_id, lambda row: set(row.asked) == {"a", "b"}, "shares are asked for")
        federation.reached(job_id, lambda row: row.state == state, state)
        yield job_id


def _stage(federation: Any, party: str, job_id: str) -> Stage | None:
    row = federation.memory(party, job_id)
    return row.stage if row else None


def _check_end(pair: Any, job_id: str) -> Any:
    """The job succeeded with one round that everybody was charged for once; the round."""
    pair.federation.succeed(job_id)
    (row,) = pair.check_trained(job_id)
    return row


@pytest.mark.parametrize("state", ["TRAINING", "COLLECTING", "OPENING"])
def test_a_killed_aggregator_goes_on_with_the_round_and_charges_it_once(
    pair: Any, state: str, wait_until: Callable[..., Any]
) -> None:
    federation = pair.federation
    with round_in(pair, state, wait_until) as job_id:
        federation.processes.kill(AGGREGATOR)
        (before,) = federation.rounds(job_id)
        # Whoever has been asked for a share may have opened: by then the charge is final.
        assert pair.settled(AGGREGATOR, job_id) == (["final"] if before.asked else ["open"])
        assert bool(before.asked) == (state == "OPENING")
        federation.start_aggregator()
    row = _check_end(pair, job_id)
    assert row.plan == before.plan
    assert row.batches[AGGREGATOR] == before.batches[AGGREGATOR]  # noise is never drawn twice
    assert {name: row.roots[name] for name in before.roots} == before.roots
    assert before.frozen_list in (None, row.frozen_list)
    assert before.opening in (None, row.opening)


@dataclass(frozen=True)
class Killed:
    """A job in whose round both parties were killed: a while it trained, b after its commitment.

    Attributes:
        row: the round once it was released; committed: b's root as the aggregator had it before.
        memory, ledgers: of each party, between its end and its next start.
    """

    federation: Any
    job_id: str
    row: Any
    committed: dict[str, str]
    memory: dict[str, Any]
    ledgers: dict[str, list[Any]]


@pytest.fixture(scope="module")
def killed(_pair: Any, wait_until: Callable[..., Any]) -> Killed:
    federation = _pair.federation
    federation.start("a", "b")
    with federation.processes.hold("a"):
        job_id = _pair.submit()
        wait_until(lambda: (row := federation.memory("a", job_id)) and row.trainings, "a is charged, and trains")
        committed = federation.reached(job_id, lambda row: "b" in row.roots, "b commits").roots["b"]
        federation.processes.kill("a")
    federation.processes.kill("b")
    memory = {name: federation.memory(name, job_id) for name in ("a", "b")}
    ledgers = {name: federation.ledger(name) for name in ("a", "b")}
    federation.start("a", "b")
    return Killed(federation, job_id, _check_end(_pair, job_id), committed, memory, ledgers)


def test_a_party_killed_while_it_trains_trains_again_and_is_charged_once(killed: Killed) -> None:
    before, after = killed.memory["a"], killed.federation.memory("a", killed.job_id)
    assert (before.stage, before.batch, before.trainings) == (Stage.RESERVED, None, 1)
    assert (after.stage, after.trainings) == (Stage.DELIVERED, 2)


def test_a_party_killed_after_its_commitment_sends_the_stored_batch(killed: Killed) -> None:
    before, after = killed.memory["b"], killed.federation.memory("b", killed.job_id)
    assert (before.stage, after.stage) == (Stage.COMMITTED, Stage.DELIVERED)
    assert after.batch == before.batch
    assert killed.row.roots["b"] == killed.committed == before.root
    assert killed.row.batches["b"].sha256 == before.batch["sha256"]


def test_a_killed_party_forgets_nothing_that_it_reserved(killed: Killed) -> None:
    for name in ("a", "b"):
        before, after = killed.ledgers[name], killed.federation.ledger(name)
        assert after[: len(before)] == before
        mine = [entry.kind for entry in after if entry.job_id == killed.job_id]
        assert mine == [*["reservation"] * 2, *["final"] * 2, *["release"] * 2]
        kinds = [entry.kind for entry in before if entry.job_id == killed.job_id]
        assert kinds == [*["reservation"] * 2, *["final"] * 2]  # that a trained, and what b told, may have shown itself


def test_a_round_budget_survives_a_restart_and_allows_exactly_what_it_says(pair: Any) -> None:
    federation = pair.federation
    assert federation.processes.stop(AGGREGATOR) == 0
    spent = len([charge for charge in federation.ledger(AGGREGATOR) if charge.kind == "final"])
    pair.serve(SOTTO__PRIVACY__BUDGET__MAX_ROUNDS=str(spent + 2))
    with pytest.raises(BudgetError, match=r"asked 3, .*left 2"):
        pair.submit(rounds=3)
    with pytest.raises(BudgetError):
        pair.submit(rounds=2, spare_rounds=1)
    assert federation.succeed(pair.submit(rounds=2)).progress.rounds_released == 2
    with pytest.raises(BudgetError, match="left 0"):
        pair.submit()
    assert federation.processes.stop(AGGREGATOR) == 0  # the next one starts with the budget of its kit
