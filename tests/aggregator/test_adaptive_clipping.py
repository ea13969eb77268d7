"""Jobs with adaptive clipping at the aggregator: planned, priced, carried from round to round, and put on record."""

from __future__ import annotations

import json
from collections.abc import Callable
from string import ascii_lowercase
from typing import Any

import pytest

from src.aggregator.federation import Federation
from src.aggregator.planning import Model, plan_of, plan_round, round_costs
from src.aggregator.round_row import RoundState
from src.encryption.keys import ThresholdKey
from src.errors import InvalidInput, PlanError
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.states import JobState
from src.privacy.events import NoisySum
from src.protocol.canonical import parse_canonical
from src.protocol.derive import derive_again
from src.protocol.keyring import Keyring
from src.protocol.plan import RoundPlan
from src.protocol.roster import Roster, sign_roster
from src.protocol.signing import Signed, SigningKey
from tests.aggregator.played import Place

MakeRoster = Callable[..., Roster]
NAMES = ascii_lowercase[:20]


@pytest.fixture
def twenty(key: ThresholdKey, make_roster: MakeRoster, signing_key: SigningKey) -> Federation:
    roster = make_roster(NAMES, holders=3)
    return Federation(
        roster=roster,
        signed_roster=sign_roster(roster, signing_key),
        keyring=Keyring(key.public, key),
        signing_key=signing_key,
        pinned=True,
    )


@pytest.fixture
def federation(twenty: Federation) -> Federation:
    """Of which `place` is."""
    return twenty


def plan_for(federation: Federation, norm: float | None = None, **privacy: Any) -> RoundPlan:
    spec = FederatedTrainingSpec.from_json({"task": "t", "party_privacy": {"adaptive_clipping": {}, **privacy}})
    return plan_round(
        spec,
        job_id="job",
        number=1,
        model=Model("a" * 64, 4000, 97),
        roster=federation.roster,
        scheme=federation.scheme("paillier", allow_plaintext=False),
        local_noise=1.0,
        clipping_norm=norm,
    )


def test_a_job_that_says_no_more_gets_a_twentieth_of_its_quorum_as_noise_on_the_count(twenty: Federation) -> None:
    plan = plan_for(twenty, clipping_norm=0.5)
    assert plan.adaptive_clipping is not None
    assert (plan.adaptive_clipping.bit_deviation, plan.adaptive_clipping.quantile) == ("1.0", "0.5")
    assert (plan.adaptive_clipping.smallest, plan.adaptive_clipping.largest) == (repr(0.5 / 1024), "512.0")
    assert plan.clipping_norm == "0.5"
    derive_again(twenty.scheme("paillier", allow_plaintext=False), plan)


def test_no_round_costs_more_than_the_one_with_the_smallest_norm(twenty: Federation) -> None:
    """Which is what a job is priced at: its shares of the noise are the furthest from one discrete Gaussian."""
    scheme = twenty.scheme("paillier", allow_plaintext=False)
    taus = []
    for norm in (0.01, 0.02, 1.0, 10.0):
        cost = round_costs(scheme, plan_for(twenty, norm, noise_multiplier=0.1, adaptive_clipping={"smallest": 0.01}))
        assert isinstance(cost["release"], NoisySum)
        assert (cost["release"].noise_multiplier, cost["release"].dimension) == (0.1, 98)
        taus.append(cost["release"].tau)
    assert taus == sorted(taus, reverse=True)


def test_what_cannot_be_planned_is_refused(twenty: Federation) -> None:
    with pytest.raises(InvalidInput, match="noise on the count of bits is too small"):
        plan_for(twenty, noise_multiplier=2.0)
    spec = FederatedTrainingSpec.from_json(
        {"task": "t", "parties": list(NAMES[:19]), "party_privacy": {"adaptive_clipping": {}}}
    )
    with pytest.raises(PlanError, match="quorum of at least 20 parties \\(got 19\\)"):
        plan_round(
            spec,
            job_id="job",
            number=1,
            model=Model("a" * 64, 4000, 97),
            roster=twenty.roster,
            scheme=twenty.scheme("paillier", allow_plaintext=False),
            local_noise=1.0,
        )


async def test_the_norm_goes_from_round_to_round_through_a_restart_and_into_the_manifest(place: Place) -> None:
    """A failed round moves nothing: its successor starts from the last release."""
    spec = place.training(
        parties=(), rounds=2, spare_rounds=1, party_privacy={"clipping_norm": 1.0, "adaptive_clipping": {}}
    )
    job_id = await place.submit(spec)
    await place.turn()
    assert plan_of((await place.round(job_id)).plan).clipping_norm == "1.0"
    place.work.opened = {"next_clipping_norm": "1.25"}
    await place.contribute(job_id)
    first = await place.round(job_id)
    assert first.state is RoundState.RELEASED
    transcript = parse_canonical(Signed.from_json((first.result or {})["transcript"]).statement)
    assert transcript["next_clipping_norm"] == "1.25"
    assert plan_of((await place.round(job_id, 2)).plan).clipping_norm == "1.25"

    await place.coordinator.stop()
    place.coordinator = place.another()
    await place.coordinator.restore()
    await place.turn(after_s=1001.0)
    assert (await place.round(job_id, 2)).state is RoundState.FAILED
    assert plan_of((await place.round(job_id, 3)).plan).clipping_norm == "1.25"
    place.work.opened = {"next_clipping_norm": "1.5"}
    await place.contribute(job_id, 3)
    job = await place.job(job_id)
    assert job.state is JobState.SUCCEEDED
    manifest = next(file for file in (job.result or {})["files"] if file["name"] == "manifest.json")
    told = json.loads(place.blobs.read(manifest["sha256"]))["readable"]
    assert [each["clipping_norm"] for each in told["rounds"]] == ["1.0", "1.25", "1.25"]
    party = told["privacy"]["party"]
    assert party["adaptive_clipping"]["next_clipping_norm"] == "1.5"
    assert float(party["adaptive_clipping"]["update_noise_multiplier"]) > float(party["noise_multiplier"])
    assert "the bit" in party["neighbouring"]
