"""A job whose rounds too few parties could take part in is refused when it is submitted, as far as that is certain from
what parties told of their rows' ε; and whoever submits is told who is not connected."""

from __future__ import annotations

from typing import Any

import pytest

from src.aggregator.federation import Federation
from src.aggregator.readiness import NAMED, who_is_away
from src.aggregator.round_row import RootCommitted
from src.aggregator.servicers.federation import FederationServicer
from src.communication.generated import federation_pb2
from src.errors import BudgetError, TaskError
from src.jobs.spec import FederatedTrainingSpec
from src.protocol.plan import PROTOCOL_VERSION
from src.protocol.roster import Roster

from .conftest import MakeRoster
from .played import ANN, BOB, Place, digest

DELTA = 1e-5
Budget = tuple[float | None, float | None, float | None]

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


def asks(epsilon: float = 1.0, *, delta: float = DELTA, rate: float = 0.01) -> dict[str, Any]:
    return {"epsilon": epsilon, "delta": delta, "sampling_rate": rate, "steps": 1}


async def told(place: Place, party: str, budget: Budget, **fields: Any) -> str:
    """A round under way in which a party committed, and told this."""
    job_id = await place.submit(place.training(**{"parties": ("a", "b", "c"), "local_training": asks(), **fields}))
    await place.turn()
    await place.coordinator.trainings.happened(job_id, 1, RootCommitted(party, {"statement": digest(party)}, budget))
    return job_id


async def submitted(place: Place, **fields: Any) -> str:
    """What is said of a job of a, b and c beside who is away, as whoever submits it hears it."""
    spec = place.training(**{"parties": ("a", "b", "c"), "local_training": asks(), **fields})
    _, *said = await place.coordinator.price(spec, owner=ANN)
    return "".join(said)


@pytest.mark.parametrize("spent", [1.0, None], ids=["spent", "infinite"])
async def test_where_a_party_has_nothing_left_a_job_that_needs_it_is_refused(place: Place, spent: float | None) -> None:
    await told(place, "b", (spent, 0.0, DELTA))
    with pytest.raises(BudgetError) as raised:
        await submitted(place, local_training=asks(0.1))
    assert raised.value.message == ("a round of task t needs updates of 3 of 3 parties, and b has no ε left for a row")
    with pytest.raises(BudgetError):
        await submitted(place, local_training=asks(delta=1e-6))  # whatever δ it asks at
    assert await submitted(place, parties=("a", "c")) == ""


@pytest.mark.parametrize(("strategy", "too_much"), [("fedavg", 5.0), ("fedsgd", 20.0)])
async def test_a_job_that_alone_costs_a_row_more_than_a_party_allows_is_refused(
    place: Place, strategy: str, too_much: float
) -> None:
    """Under fedsgd by what it costs against whoever sees the releases: a party may count no more than that."""
    for name in "abc":
        place.federation.declare(name, {"t": 1000})
    await told(place, "b", (1.0, 3.0, DELTA))
    with pytest.raises(BudgetError, match=r"b lets a row spend ε = 4 in all, of which this job needs [0-9.]+ at δ"):
        await submitted(place, strategy=strategy, local_training=asks(too_much))
    assert await submitted(place, strategy=strategy, local_training=asks(3.5)) == ""  # with another it may be too much


async def test_a_job_is_refused_for_what_it_costs_and_not_for_what_it_asks_for(place: Place) -> None:
    """Its noise is found in steps: it costs a little less than its target."""
    await told(place, "b", (1.0, 3.0, DELTA))
    assert await submitted(place, local_training=asks(4.0 + 1e-8)) == ""


async def test_where_the_quorum_holds_without_the_party_it_is_said_and_the_job_taken(place: Place) -> None:
    await told(place, "b", (4.0, 0.0, DELTA))
    assert await submitted(place, quorum=2) == "b has no ε left for a row: rounds go on without b"


@pytest.mark.parametrize(
    "budget", [(None, None, None), (0.5, None, None), (0.5, 0.5, 1e-6), (None, 0.5, DELTA), (0.5, 0.6, DELTA)], ids=str
)
async def test_what_is_not_certain_is_not_guessed_at(place: Place, budget: Budget) -> None:
    """Without figures, or with some at two δ, or where ε left and the job's may still fit together."""
    await told(place, "b", budget)
    assert await submitted(place) == ""


async def test_the_last_that_was_told_counts_and_of_its_task_alone(place: Place) -> None:
    async def said_of(budget: Budget, task: str = "t") -> str:
        job_id = await told(place, "b", budget, task=task)
        await place.refuse(job_id, TaskError, "a")  # it is over
        try:
            return await submitted(place)
        except BudgetError:
            return "refused"

    assert await said_of((4.0, 0.0, DELTA), "other") == ""
    assert await said_of((4.0, 0.0, DELTA)) == "refused"
    assert await said_of((4.0, 1.0, DELTA)) == ""
    assert await said_of((4.0, 0.0, DELTA)) == "refused"
    assert await said_of((None, None, None)) == ""  # its policy is now to tell nothing


async def test_what_another_round_has_reserved_may_come_back(place: Place) -> None:
    other = await place.submit(place.training(parties=("b", "c")), owner=BOB)
    await place.turn()
    assert (await place.round(other)).cohort == ("b", "c")
    await told(place, "b", (4.0, 0.0, DELTA))
    assert await submitted(place) == ""


@pytest.mark.parametrize(
    ("joins", "forgotten"), [(["one", "two"], True), (["one", "one"], False), (["", ""], True), (["one", ""], True)]
)
async def test_another_process_of_a_party_may_have_another_limit(
    place: Place, joins: list[str], forgotten: bool
) -> None:
    """One whose connection broke has the same."""
    servicer = FederationServicer(
        config=place.config,
        coordinator=place.coordinator,
        trainings=place.coordinator.trainings,
        federation=place.federation,
        pipeline=place.coordinator._pipeline,
        sessions=place.coordinator._sessions,
        blobs=place.blobs,
        leftovers=place.leftovers,
    )

    async def join(instance: str) -> None:
        request = federation_pb2.JoinRequest(
            protocol_version=PROTOCOL_VERSION, verify_key=bytes(32), instance_id=instance
        )
        await servicer._admit("b", request, host="")

    await join(joins[0])
    await told(place, "b", (4.0, 0.0, DELTA))
    await join(joins[1])
    if forgotten:
        assert await submitted(place) == ""
    else:
        with pytest.raises(BudgetError):
            await submitted(place)


# --- who is away ------------------------------------------------------------------------------------------------------


async def test_whoever_submits_hears_who_is_not_connected(place: Place) -> None:
    place.coordinator._sessions.open("b", "b's process")
    spec = place.training(parties=("a", "b", "c"), quorum=2)
    to_open = "; 2 of 3 holders of key shares are needed to open it, and the job waits for them"
    assert await place.coordinator.price(spec, owner=ANN) == (
        f"not connected when it was submitted: a, c (a round needs updates of 2 of 3 parties{to_open})",
    )
    place.coordinator._sessions.open("c", "c's process")
    assert await place.coordinator.price(spec, owner=ANN) == (
        "not connected when it was submitted: a (a round needs updates of 2 of 3 parties)",
    )
    for name in ("a", "c"):
        place.coordinator._sessions.open(name, f"{name}'s process")
    assert await place.coordinator.price(spec, owner=ANN) == ()


def test_who_holds_a_key_share_is_named_too_where_too_few_of_them_are_there(
    federation: Federation, make_roster: MakeRoster
) -> None:
    roster: Roster = make_roster("abc", threshold=3)
    said = who_is_away(FederatedTrainingSpec(task="t", parties=("a", "b")), roster, connected=("a", "b"))
    assert said.startswith("not connected when it was submitted: c (a round needs updates of 2 of 2 parties; 3 of 3")


def test_of_very_many_who_are_away_some_are_named(federation: Federation, make_roster: MakeRoster) -> None:
    roster: Roster = make_roster("abcdefghijklmnopqrstuvwxyz", custody="aggregator")
    said = who_is_away(FederatedTrainingSpec(task="t"), roster, connected=("a", "c"))
    assert f"b, d, {', '.join('efghijklmnopqrstuv')}, {24 - NAMED} more (" in said
