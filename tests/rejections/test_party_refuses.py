"""All that an honest party refuses before it trains, with the error and the words that it says why in.

The list reads: what somebody tries → the error, and a part of its message. What the aggregator signs here is really
signed by the key that the party's roster pins: nobody can do better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from src.config import PartyConfig
from src.encryption.dealer import deal
from src.encryption.scheme import Scheme
from src.errors import (
    InvalidInput,
    PlanError,
    PolicyError,
    SignatureError,
    SottoError,
)
from src.party.rules import check_contribution, check_plan
from src.party.work import dataset_options
from src.privacy.entropy import DeterministicEntropy
from src.protocol.derive import derive
from src.protocol.keyring import Keyring
from src.protocol.plan import LocalPlan, RoundPlan
from src.protocol.roster import Member, Roster
from src.protocol.signing import Signed, SigningKey

# Safe primes of 256 bits: they protect nothing, and are long enough for every code path.
P = 0xE3B9FF6586D70C163EC926DDEAD91F6B011B351FBF8CDA056459F50D3E9BA993
Q = 0xFAAA49171DF29F6E64818C4F9C0526B6962FD595EF4A54FC599214270537BE5B

KEYS = {name: SigningKey.from_bytes(name.encode().ljust(32, b"-")) for name in ("aggregator", "a", "b", "c", "d", "z")}
KEY, _ = deal(P, Q, threshold=2, holders=3, entropy=DeterministicEntropy(bytes(32), purpose="rejections"))
KEYRING = Keyring(KEY.public, KEY)
ROSTER = Roster(
    federation="demo",
    key_id=KEYRING.key_id,
    custody="threshold",
    threshold=2,
    colluders=0,
    aggregator_verify_key=KEYS["aggregator"].verify_key,
    members=tuple(
        Member(name, KEYS[name].verify_key, share) for name, share in (("a", 1), ("b", 2), ("c", 3), ("d", 0))
    ),
    created_at="2026-01-01T00:00:00+00:00",
)
PAILLIER = KEYRING.scheme("paillier")
PLAINTEXT = KEYRING.scheme("plaintext")


def make_plan(
    scheme: Scheme = PAILLIER,
    *,
    cohort: tuple[str, ...] = ("a", "b", "c"),
    quorum: int = 2,
    colluders: int = 0,
    noise_by: str = "both",
    noise_multiplier: float = 0.5,
    priced_rounds: int = 5,
    **changes: Any,
) -> RoundPlan:
    """A plan that is right in itself; `changes` are laid over it."""
    derived = derive(
        scheme,
        dimension=10,
        clipping_norm=1.0,
        resolution_bits=16,
        noise_by=noise_by,
        noise_multiplier=noise_multiplier,
        delta=1e-5,
        cohort=len(cohort),
        quorum=quorum,
        colluders=colluders,
        priced_rounds=priced_rounds,
    )
    local = LocalPlan(
        steps=10, sampling_rate="0.05", learning_rate="0.1", max_grad_norm="1.0", noise_multiplier="1.1", delta="1e-05"
    )
    plan = RoundPlan(
        federation="demo",
        job_id="job",
        round=1,
        priced_rounds=priced_rounds,
        spec_digest="5" * 64,
        task="randhie",
        task_options="{}",
        seed=0,
        model_sha256="a" * 64,
        model_bytes=100,
        dimension=10,
        local=local,
        clipping_norm="1.0",
        resolution_bits=16,
        rounded_bound=derived.rounded_bound,
        scheme=scheme.name,
        key_id=KEYRING.key_id,
        layout=derived.layout.to_json(),
        noise=derived.noise,
        roster_digest=ROSTER.digest,
        cohort=cohort,
        quorum=quorum,
        colluders=colluders,
        threshold=2,
        custody="threshold",
    )
    return replace(plan, **changes)


def sign(kind: str, statement: dict[str, Any], *, key: str = "aggregator", signer: str = "") -> Signed:
    return KEYS[key].sign(kind, statement, signer=signer or key)


def sign_plan(plan: RoundPlan) -> Signed:
    return sign("plan", plan.to_statement())


def altered(**changes: Any) -> Signed:
    """The plan with fields that nothing else was adapted to."""
    return sign_plan(replace(PLAN, **changes))


PLAN = make_plan()
SIGNED_PLAN = sign_plan(PLAN)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PartyConfig]:
    """Party a's configuration; sections are laid over it."""
    kit: Path = tmp_path_factory.mktemp("kit")
    files = ("public_key", "roster", "signing_key", "share")
    for name in files:
        (kit / name).touch()

    def make(**sections: Any) -> PartyConfig:
        keys = {"custody": "threshold", **{name: str(kit / name) for name in files}}
        values: dict[str, Any] = {
            "version": 1,
            "name": "a",
            "federation": "demo",
            "state_dir": str(kit / "state"),
            "server": {"insecure": True, "address": "127.0.0.1:50051"},
            "keys": keys,
            "datasets": {"randhie": {"declared_rows": 100}},
        }
        return PartyConfig.model_validate({**values, **sections, "keys": {**keys, **sections.get("keys", {})}})

    return make


@dataclass(frozen=True)
class Refusal:
    """What is tried, the error, and words of its message (a regular expression)."""

    tried: Any
    error: type[SottoError]
    words: str
    config: dict[str, Any] | None = None
    scheme: Scheme = PAILLIER


def check(what: Callable[[], object], refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match=refusal.words) as caught:
        what()
    assert type(caught.value) is refusal.error


# ------------------------------------------------------------------------------------------------------ before training

NOISE = PLAN.noise
PLANS = {
    # who signed it
    "a plan without a signature": Refusal(replace(SIGNED_PLAN, signature=b""), SignatureError, "does not verify"),
    "a plan changed after signing": Refusal(
        replace(SIGNED_PLAN, statement=SIGNED_PLAN.statement.replace(b'"quorum":2', b'"quorum":1')),
        SignatureError,
        "does not verify",
    ),
    "a plan signed by another party": Refusal(
        sign("plan", PLAN.to_statement(), key="b"), SignatureError, "'b' on a plan does not verify"
    ),
    "a plan signed by a stranger in the aggregator's name": Refusal(
        sign("plan", PLAN.to_statement(), key="z", signer="aggregator"), SignatureError, "'aggregator' on a plan"
    ),
    "a statement of another kind": Refusal(sign("list", PLAN.to_statement()), SignatureError, "on a plan"),
    "a plan with a field that is not known": Refusal(
        sign("plan", {**PLAN.to_statement(), "extra": 1}), InvalidInput, "malformed"
    ),
    "a plan whose numbers are none": Refusal(
        altered(clipping_norm="wide"), InvalidInput, "clipping_norm is not a decimal number"
    ),
    # what the kit pins
    "a plan of another federation": Refusal(
        altered(federation="other"), PlanError, "federation is 'other', this party's kit says 'demo'"
    ),
    "a plan with another roster": Refusal(altered(roster_digest="0" * 64), PlanError, "roster_digest is '0000"),
    "a plan under another key": Refusal(altered(key_id="other"), PlanError, "key_id is 'other'"),
    "a plan with another custody": Refusal(altered(custody="aggregator"), PlanError, "custody is 'aggregator'"),
    "a plan with a lower threshold": Refusal(altered(threshold=1), PlanError, "threshold is 1"),
    "a plan with a higher threshold": Refusal(altered(threshold=3), PlanError, "threshold is 3"),
    "a plan that assumes another number of colluders": Refusal(
        altered(colluders=1), PlanError, "colluders is 1, this party's kit says 0"
    ),
    "a cohort with a stranger": Refusal(
        sign_plan(make_plan(cohort=("a", "b", "z"))), PlanError, "who is not in the roster, or somebody twice: z"
    ),
    "a cohort with the aggregator in it": Refusal(
        sign_plan(make_plan(cohort=("a", "b", "aggregator"))), PlanError, "not in the roster.*: aggregator"
    ),
    "a cohort with somebody twice": Refusal(
        sign_plan(make_plan(cohort=("a", "b", "b"))), PlanError, "or somebody twice"
    ),
    "an empty cohort": Refusal(altered(cohort=()), PlanError, "a quorum of 2 does not fit 0"),
    "a quorum of nobody": Refusal(altered(quorum=0), PlanError, "a quorum of 0 does not fit 3"),
    "a quorum beyond the cohort": Refusal(altered(quorum=4), PlanError, "a quorum of 4 does not fit"),
    # what this party asks for
    "a quorum below the policy": Refusal(
        sign_plan(PLAN), PolicyError, "a sum of 2 updates hides too little.*min_quorum 3", {"policy": {"min_quorum": 3}}
    ),
    "a quorum of one, by default": Refusal(
        sign_plan(make_plan(quorum=1)), PolicyError, "a sum of 1 updates hides too little"
    ),
    "a federation that is not in the configuration": Refusal(
        SIGNED_PLAN, PolicyError, "belongs to federation 'mine', not to 'demo'", {"federation": "mine"}
    ),
    "no encryption": Refusal(
        sign_plan(make_plan(PLAINTEXT)), PolicyError, "does not send unencrypted updates", scheme=PLAINTEXT
    ),
    "another custody than configured": Refusal(
        SIGNED_PLAN,
        PolicyError,
        "this party's keys.custody is aggregator, the plan's is threshold",
        {"keys": {"custody": "aggregator"}},
    ),
    "fewer colluders than this party fears": Refusal(
        SIGNED_PLAN, PolicyError, "stands 0 colluders, this party asks for 1", {"privacy": {"colluders": 1}}
    ),
    "less noise from parties than this party asks for": Refusal(
        SIGNED_PLAN,
        PolicyError,
        "the noise that the parties draw has multiplier 0.3536, less than this party's 1",
        {"policy": {"min_parties_noise_multiplier": 1.0}},
    ),
    "noise that only the aggregator draws, where parties have to": Refusal(
        sign_plan(make_plan(noise_by="aggregator", noise_multiplier=5.0)),
        PolicyError,
        "the noise that the parties draw has multiplier 0, less than this party's 1",
        {"policy": {"min_parties_noise_multiplier": 1.0}},
    ),
    "a model that is too large": Refusal(
        altered(model_bytes=2000),
        PolicyError,
        "a model of 2000 bytes is larger",
        {"limits": {"max_update_bytes": 1000}},
    ),
    "updates that are too large": Refusal(
        SIGNED_PLAN, PolicyError, "updates are larger than limits", {"limits": {"max_update_bytes": 100}}
    ),
    # what follows from the settings
    **{
        f"a layout whose {name} does not follow": Refusal(
            altered(layout={**PLAN.layout, name: value}), PlanError, "layout does not follow"
        )
        for name, value in {
            "slot_bits": int(PLAN.layout["slot_bits"]) - 1,
            "offset": 1,
            "contributions": 2,
            "parameter_count": 9,
            "key_id": "other",
            "scheme": "plaintext",
            "ciphertext_count": "1",
        }.items()
    },
    "no noise shares where the multiplier asks for them": Refusal(
        altered(noise=replace(NOISE, share_sigma2="0/1")), PlanError, "noise does not follow"
    ),
    "noise shares reckoned for a fuller cohort": Refusal(
        altered(noise=make_plan(quorum=3).noise), PlanError, "noise does not follow"
    ),
    "no noise of the aggregator where both draw": Refusal(
        altered(noise=replace(NOISE, aggregator_sigma2="0/1")), PlanError, "noise does not follow"
    ),
    "another bound on the noise": Refusal(
        altered(noise=replace(NOISE, bound=NOISE.bound + 1)), PlanError, "noise does not follow"
    ),
    "another sensitivity": Refusal(
        altered(rounded_bound=PLAN.rounded_bound - 1), PlanError, "rounded_bound does not follow"
    ),
}


@pytest.mark.parametrize("refusal", PLANS.values(), ids=PLANS.keys())
def test_a_party_does_not_train_for(refusal: Refusal, make_config: Callable[..., PartyConfig]) -> None:
    config = make_config(**(refusal.config or {}))
    check(lambda: check_plan(refusal.tried, ROSTER, config=config, scheme=refusal.scheme, pinned=True), refusal)


def test_two_groups_that_could_open_two_sums_are_refused(make_config: Callable[..., PartyConfig]) -> None:
    """2 of 4 shares with a quorum of 3 of 4: {a, b} and {c, d} could open sums that differ by one party."""
    members = tuple(Member(name, KEYS[name].verify_key, index) for index, name in enumerate("abcd", start=1))
    roster = replace(ROSTER, members=members)
    cohort = ("a", "b", "c", "d")
    for quorum in (2, 3):
        signed = sign_plan(make_plan(cohort=cohort, quorum=quorum, roster_digest=roster.digest))
        with pytest.raises(PlanError, match="two sums could be opened that differ by one party"):
            check_plan(signed, roster, config=make_config(), scheme=PAILLIER, pinned=True)
    everybody = sign_plan(make_plan(cohort=cohort, quorum=4, roster_digest=roster.digest))
    check_plan(everybody, roster, config=make_config(), scheme=PAILLIER, pinned=True)


def test_a_roster_that_is_not_pinned_excuses_nothing_in_custody_threshold(
    make_config: Callable[..., PartyConfig],
) -> None:
    signed = altered(roster_digest="0" * 64)
    with pytest.raises(PlanError, match="the plan names another roster"):
        check_plan(signed, ROSTER, config=make_config(), scheme=PAILLIER, pinned=False)


def test_a_party_does_not_train_where_it_is_not_invited_or_has_no_data(make_config: Callable[..., PartyConfig]) -> None:
    with pytest.raises(PlanError, match="party a is not invited"):
        check_contribution(make_plan(cohort=("b", "c")), make_config())
    with pytest.raises(PolicyError, match=r"no data for task 'mnist' \(datasets: randhie\)"):
        check_contribution(make_plan(task="mnist"), make_config())
    with pytest.raises(PolicyError, match=r"no data for task 'randhie' \(datasets: none\)"):
        check_contribution(PLAN, make_config(datasets={}))


OWN = {"party": 0, "parties": 3, "columns": None, "rows": None}
OPTIONS = {
    "another part of the data": ('{"party":1}', PolicyError, "not left open: party"),
    "an option that this party does not have": ('{"path":"/etc/passwd"}', PolicyError, "not left open: path"),
    "one that is open and two that are not": ('{"a":1,"columns":2,"party":1}', PolicyError, "not left open: a, party"),
    "null for what is set": ('{"party":null}', PolicyError, "not left open: party"),
    "options that are no object": ("[1]", InvalidInput, "not a JSON object"),
    "options that are no JSON": ("{", InvalidInput, "not JSON"),
}


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS.values(), ids=OPTIONS.keys())
def test_a_job_does_not_choose_the_data_by(options: str, error: type[SottoError], words: str) -> None:
    with pytest.raises(error, match=words):
        dataset_options(OWN, make_plan(task_options=options))
