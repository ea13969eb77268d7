"""What a party declares when a job begins counts to its end: nobody changes in between what others divide by."""

from __future__ import annotations

import pytest

from src.aggregator.planning import declared_rows_of, plan_of
from tests.aggregator.played import Place

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_declaration_that_changes_between_the_rounds_of_a_job_changes_none_of_them(
    place: Place, restarted: bool
) -> None:
    """The party that says otherwise refuses by itself, and names both numbers."""
    for name in ("a", "b"):
        place.federation.declare(name, {"t": 1000})
    job_id = await place.submit(place.training(strategy="fedsgd", rounds=2, local_training={"sampling_rate": 0.05}))
    await place.turn()
    place.federation.declare("b", {"t": 5000})
    if restarted:
        await place.coordinator.stop()
        place.coordinator = place.another()
        await place.coordinator.restore()
    await place.contribute(job_id)
    first, second = [plan_of((await place.round(job_id, number)).plan) for number in (1, 2)]
    assert declared_rows_of(first) == declared_rows_of(second) == {"a": 1000, "b": 1000}
    assert first.gradient_sum == second.gradient_sum
    await place.contribute(job_id, 2)
    other = await place.submit(place.training(strategy="fedsgd", local_training={"sampling_rate": 0.05}))
    await place.turn()
    assert declared_rows_of(plan_of((await place.round(other)).plan)) == {"a": 1000, "b": 5000}
