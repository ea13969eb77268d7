"""All that an honest party refuses before it sends and before it opens, with the error and the words.

Each list reads: what somebody tries → the error, and a part of its message. What the aggregator signs here is really
signed by the key that the party's roster pins: nobody can do better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from src.encryption.plaintext import PlaintextScheme
from src.errors import InvalidInput, OpeningError, PlanError, SignatureError, SottoError
from src.party.rules import check_list, check_opening, check_reveal
from src.party.store import PartyRound, Stage
from src.protocol.derive import derive
from src.protocol.plan import LocalPlan, OpeningStatement, RootStatement, RoundPlan, signed_digest
from src.protocol.roster import Member, Roster
from src.protocol.signing import Signed, SigningKey

KEYS = {name: SigningKey.from_bytes(name.encode().ljust(32, b"-")) for name in ("aggregator", "a", "b", "c", "d", "z")}
ROSTER = Roster(
    federation="demo",
    key_id="",
    custody="threshold",
    threshold=2,
    colluders=0,
    aggregator_verify_key=KEYS["aggregator"].verify_key,
    members=tuple(
        Member(name, KEYS[name].verify_key, share) for name, share in (("a", 1), ("b", 2), ("c", 3), ("d", 0))
    ),
    created_at="2026-01-01T00:00:00+00:00",
)


def make_plan(*, quorum: int = 2, noise_by: str = "both", model_sha256: str = "a" * 64) -> RoundPlan:
    """A plan for a, b and c; d is enrolled and was not invited."""
    derived = derive(
        PlaintextScheme(2, 3),
        dimension=10,
        clipping_norm=1.0,
        resolution_bits=16,
        noise_by=noise_by,
        noise_multiplier=0.5,
        delta=1e-5,
        cohort=3,
        quorum=quorum,
        colluders=0,
        priced_rounds=5,
    )
    return RoundPlan(
        federation="demo",
        job_id="job",
        round=1,
        priced_rounds=5,
        spec_digest="5" * 64,
        task="randhie",
        task_options="{}",
        seed=0,
        model_sha256=model_sha256,
        model_bytes=100,
        dimension=10,
        local=LocalPlan(10, "0.05", "0.1", "1.0", "1.1", "1e-05"),
        clipping_norm="1.0",
        resolution_bits=16,
        rounded_bound=derived.rounded_bound,
        scheme="plaintext",
        key_id="",
        layout=derived.layout.to_json(),
        noise=derived.noise,
        roster_digest=ROSTER.digest,
        cohort=("a", "b", "c"),
        quorum=quorum,
        colluders=0,
        threshold=2,
        custody="threshold",
    )


def sign(kind: str, statement: dict[str, Any], *, key: str = "aggregator", signer: str = "") -> Signed:
    return KEYS[key].sign(kind, statement, signer=signer or key)


PLAN = make_plan()
DIGEST = signed_digest(sign("plan", PLAN.to_statement()), "plan")
OTHER_PLAN = make_plan(model_sha256="b" * 64)
OTHER_DIGEST = signed_digest(sign("plan", OTHER_PLAN.to_statement()), "plan")


@dataclass(frozen=True)
class Refusal:
    """What is tried, the error, and words of its message (a regular expression)."""

    tried: Any
    error: type[SottoError]
    words: str


def check(what: Callable[[], object], refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match=refusal.words) as caught:
        what()
    assert type(caught.value) is refusal.error


# ------------------------------------------------------------------------------------------- before a byte is sent


def root(name: str, **changes: Any) -> RootStatement:
    return replace(RootStatement(DIGEST, name, f"root of {name}", 1, 128, ""), **changes)


def signed_root(name: str, *, key: str = "", signer: str = "", **changes: Any) -> dict[str, str]:
    return sign("root", root(name, **changes).to_statement(), key=key or name, signer=signer).to_json()


ROOTS = [signed_root(name) for name in ("a", "aggregator", "b", "c")]


def sign_list(*roots: Any, key: str = "aggregator", plan: str = DIGEST) -> Signed:
    return sign("list", {"plan": plan, "roots": list(roots or ROOTS)}, key=key)


UNSIGNED = {**ROOTS[2], "signature": ""}
CHANGED = {**ROOTS[2], "statement": ROOTS[2]["statement"].replace("root of b", "root of B")}
LISTS = {
    "a list that is not signed": Refusal(
        replace(sign_list(), signature=b""), SignatureError, "'aggregator' on a list does not verify"
    ),
    "a list signed by a party": Refusal(sign_list(key="b"), SignatureError, "on a list does not verify"),
    "a list of another plan": Refusal(sign_list(plan=OTHER_DIGEST), PlanError, "the frozen list belongs to another"),
    "a list without a plan": Refusal(sign("list", {"roots": ROOTS}), PlanError, "another round plan"),
    "a list without roots": Refusal(sign("list", {"plan": DIGEST}), InvalidInput, "malformed"),
    "a list of something else": Refusal(sign("list", {"plan": DIGEST, "roots": 7}), InvalidInput, "malformed"),
    "roots that are no signed statements": Refusal(sign_list("root"), InvalidInput, "malformed"),
    "an unsigned root": Refusal(sign_list(ROOTS[0], UNSIGNED), SignatureError, "'b' on a root does not verify"),
    "a root changed after signing": Refusal(sign_list(ROOTS[0], CHANGED), SignatureError, "'b' on a root"),
    "a root signed by a stranger": Refusal(
        sign_list(*ROOTS, signed_root("z")), SignatureError, "signed by 'z', who is not in the roster"
    ),
    "a root that a stranger signed in a party's name": Refusal(
        sign_list(ROOTS[0], ROOTS[1], signed_root("b", key="z", signer="b")), SignatureError, "'b' on a root"
    ),
    "a root that the aggregator made up for a party": Refusal(
        sign_list(ROOTS[0], ROOTS[1], signed_root("b", key="aggregator", signer="b")), SignatureError, "'b' on a root"
    ),
    "a root in another party's name": Refusal(
        sign_list(*ROOTS[:3], signed_root("c", key="b")), SignatureError, "b signed a root in the name of c"
    ),
    "a root that the aggregator signed in a party's name": Refusal(
        sign_list(*ROOTS[:3], signed_root("c", key="aggregator")),
        SignatureError,
        "aggregator signed a root in the name of c",
    ),
    "a root of another plan": Refusal(
        sign_list(*ROOTS[:2], signed_root("b", plan=OTHER_DIGEST)), PlanError, "the root of b belongs to another round"
    ),
    "a root that is malformed": Refusal(
        sign_list(*ROOTS[:2], sign("root", {"contributor": "b"}, key="b").to_json()), InvalidInput, "malformed"
    ),
    "a contributor twice": Refusal(sign_list(*ROOTS, ROOTS[2]), PlanError, "names b twice"),
    "a contributor with two roots": Refusal(
        sign_list(*ROOTS, signed_root("b", root="another")), PlanError, "names b twice"
    ),
    "an enrolled party that was not invited": Refusal(
        sign_list(*ROOTS, signed_root("d")), PlanError, "names who was not invited: d"
    ),
    "fewer parties than the quorum": Refusal(sign_list(*ROOTS[:2]), PlanError, "has 1 parties, the quorum is 2"),
    "a list of noise alone": Refusal(sign_list(ROOTS[1]), PlanError, "has 0 parties, the quorum is 2"),
    "no noise of the aggregator where the plan has it": Refusal(
        sign_list(ROOTS[0], ROOTS[2], ROOTS[3]), PlanError, "disagree on the aggregator's noise"
    ),
}


@pytest.mark.parametrize("refusal", LISTS.values(), ids=LISTS.keys())
def test_a_party_sends_nothing_against(refusal: Refusal) -> None:
    check(lambda: check_list(refusal.tried, ROSTER, plan=PLAN, plan_digest=DIGEST), refusal)


def test_noise_of_the_aggregator_that_the_plan_does_not_have_is_refused() -> None:
    plan = make_plan(noise_by="parties")
    with pytest.raises(PlanError, match="disagree on the aggregator's noise"):
        check_list(sign_list(), ROSTER, plan=plan, plan_digest=DIGEST)


LIST = sign_list()
LIST_DIGEST = signed_digest(LIST, "list")
LISTED = {each.contributor: each for each in map(root, ("a", "aggregator", "b", "c"))}
COMMITTED = PartyRound(
    job_id="job",
    number=1,
    plan=DIGEST,
    stage=Stage.COMMITTED,
    batch={"header": "", "sha256": "x", "size": 128, "root": "root of a"},
    root=ROOTS[0],
)
REVEALS = {
    "a list without this party's root": Refusal((COMMITTED, {k: v for k, v in LISTED.items() if k != "a"}), PlanError,
                                                "does not have this party's root"),
    "another root in this party's name": Refusal(
        (COMMITTED, {**LISTED, "a": root("a", root="another")}), PlanError, "does not have this party's root"
    ),
    "a round in which it committed to nothing": Refusal(
        (replace(COMMITTED, stage=Stage.RESERVED, batch=None, root=None), LISTED), PlanError, "this party's root"
    ),
    "a second, different list": Refusal(
        (replace(COMMITTED, stage=Stage.REVEALED, list="0" * 64), LISTED), PlanError, "has accepted another frozen list"
    ),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REVEALS.values(), ids=REVEALS.keys())
def test_a_party_reveals_nothing_for(refusal: Refusal) -> None:
    row, roots = refusal.tried
    check(lambda: check_reveal(row, LIST, roots, name="a"), refusal)


# ------------------------------------------------------------------------------------------------- before it opens

OPENING = OpeningStatement(DIGEST, LIST_DIGEST, ("a", "aggregator", "b"), "r" * 64)
DELIVERED = replace(COMMITTED, stage=Stage.DELIVERED, list=LIST_DIGEST)
WITNESS = PartyRound(job_id="job", number=1, plan=DIGEST, stage=Stage.WITNESS)


def sign_opening(*, key: str = "aggregator", **changes: Any) -> Signed:
    return sign("opening", replace(OPENING, **changes).to_statement(), key=key)


def opens(
    signed: Signed,
    row: PartyRound,
    *,
    plan: RoundPlan = PLAN,
    listed: Signed = LIST,
    roots: dict[str, RootStatement] | None = None,
) -> OpeningStatement:
    chosen = LISTED if roots is None else roots
    return check_opening(signed, ROSTER, row=row, plan=plan, listed=listed, roots=chosen, name="a")


OPENINGS = {
    "an opening that is not signed": Refusal(
        (replace(sign_opening(), signature=b""), DELIVERED), SignatureError, "on a opening does not verify"
    ),
    "an opening signed by a party": Refusal((sign_opening(key="b"), DELIVERED), SignatureError, "'b' on a opening"),
    "an opening that is malformed": Refusal(
        (sign("opening", {"plan": DIGEST}), DELIVERED), InvalidInput, "an opening statement is malformed"
    ),
    "another plan": Refusal(
        (sign_opening(plan=OTHER_DIGEST), DELIVERED), OpeningError, "the opening belongs to another round plan"
    ),
    "another list": Refusal(
        (sign_opening(list="0" * 64), DELIVERED), OpeningError, "the opening belongs to another frozen list"
    ),
    "another list than the one accepted": Refusal(
        (sign_opening(), replace(DELIVERED, list="0" * 64)), OpeningError, "another frozen list"
    ),
    "a contributor twice": Refusal(
        (sign_opening(contributors=("a", "aggregator", "b", "b")), DELIVERED), OpeningError, "twice, or not in order"
    ),
    "contributors out of order": Refusal(
        (sign_opening(contributors=("b", "aggregator", "a")), DELIVERED), OpeningError, "twice, or not in order"
    ),
    "a contributor who is not listed": Refusal(
        (sign_opening(contributors=("a", "aggregator", "b", "d")), DELIVERED), OpeningError, "not on the frozen list: d"
    ),
    "one party alone": Refusal(
        (sign_opening(contributors=("a", "aggregator")), DELIVERED), OpeningError, "has 1 parties, the quorum is 2"
    ),
    "another party alone": Refusal(
        (sign_opening(contributors=("aggregator", "b")), WITNESS), OpeningError, "has 1 parties"
    ),
    "the noise alone": Refusal((sign_opening(contributors=("aggregator",)), WITNESS), OpeningError, "has 0 parties"),
    "nobody": Refusal((sign_opening(contributors=()), WITNESS), OpeningError, "has 0 parties"),
    "a sum without the aggregator's noise": Refusal(
        (sign_opening(contributors=("a", "b", "c")), DELIVERED), OpeningError, "the aggregator's noise is not part"
    ),
    "a sum without this party's delivered update": Refusal(
        (sign_opening(contributors=("aggregator", "b", "c")), DELIVERED),
        OpeningError,
        "this party's delivered update is not part",
    ),
    "another aggregate of a round that it opened": Refusal(
        (sign_opening(), replace(DELIVERED, aggregate_root="0" * 64)), OpeningError, "has opened another aggregate"
    ),
    "another aggregate of a round that it opened as a witness": Refusal(
        (sign_opening(), replace(WITNESS, aggregate_root="0" * 64)), OpeningError, "has opened another aggregate"
    ),
    "the same plan under another job, so that it would be opened twice": Refusal(
        (sign_opening(), replace(WITNESS, job_id="other")), OpeningError, "round 1 of job job, not of the round"
    ),
    "the same plan under another round": Refusal(
        (sign_opening(), replace(WITNESS, number=2)), OpeningError, "round 1 of job job, not of the round"
    ),
}


@pytest.mark.parametrize("refusal", OPENINGS.values(), ids=OPENINGS.keys())
def test_a_party_does_not_open(refusal: Refusal) -> None:
    check(lambda: opens(*refusal.tried), refusal)


def test_a_party_does_not_open_what_was_contributed_under_a_plan_that_it_was_not_shown() -> None:
    """The aggregator shows this party one plan and opens, under the same round, what others gave under another."""
    roots = [signed_root(name, plan=OTHER_DIGEST) for name in ("aggregator", "b", "c")]
    listed = sign_list(*roots, plan=OTHER_DIGEST)
    found = check_list(listed, ROSTER, plan=OTHER_PLAN, plan_digest=OTHER_DIGEST)
    for said in (DIGEST, OTHER_DIGEST):
        signed = sign_opening(plan=said, list=signed_digest(listed, "list"), contributors=("aggregator", "b", "c"))
        with pytest.raises(OpeningError, match="another round plan"):
            opens(signed, COMMITTED, plan=OTHER_PLAN, listed=listed, roots=found)


def test_a_quorum_of_one_never_opens_one_update() -> None:
    plan = make_plan(quorum=1)
    with pytest.raises(OpeningError, match="has 1 parties"):
        opens(sign_opening(contributors=("a", "aggregator")), DELIVERED, plan=plan)
