"""A malicious aggregator against the real node of party a, over mutual TLS: no share and no byte leaves for nothing.

The aggregator of these tests holds its own key and plays parties b, c and d honestly; towards a it cheats. Each row
below is one cheat, and the reason that a reports. What counts as proof is what arrived at the aggregator; and every
time an honest round afterwards still works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from src.communication.generated import federation_pb2
from src.encryption.scheme import Layout
from src.errors import TooFewSharesError
from src.learning.flatten import to_safetensors
from src.privacy.entropy import SystemEntropy
from src.protocol.batches import StoredBatch, expected_header
from src.protocol.canonical import canonical_bytes, parse_canonical
from src.protocol.merkle import batch_root
from src.protocol.plan import LIST_KIND, OPENING_KIND, PLAN_KIND, ROOT_KIND
from src.protocol.roster import AGGREGATOR
from src.protocol.signing import Signed, SigningKey
from tests.rejections.cheating import DIMENSION, SPEC, Answer, CheatingAggregator, Meeting, Round, root_statement

# --- cheats -----------------------------------------------------------------------------------------------------------

PlanCheat = Callable[[CheatingAggregator], Round]
ListCheat = Callable[[CheatingAggregator, Round], Signed]
Opening = tuple[Signed, Signed]
OpeningCheat = Callable[[CheatingAggregator, Round, Signed], Opening]


def by_another_key(them: CheatingAggregator) -> Round:
    plan = them.plan().plan
    return Round(plan, them.keys["b"].sign(PLAN_KIND, plan.to_statement(), signer=AGGREGATOR))


def of_other_parties(them: CheatingAggregator) -> Round:
    return them.plan(spec=SPEC.model_copy(update={"parties": ("b", "c", "d")}))


def wider_slots(them: CheatingAggregator) -> Round:
    layout = them.plan().layout
    return them.plan(layout=replace(layout, offset=layout.offset + 1).to_json())


def less_noise(them: CheatingAggregator) -> Round:
    return them.plan(noise=replace(them.plan().plan.noise, share_sigma2="0/1"))


def another_model(them: CheatingAggregator) -> Round:
    round_ = them.plan()
    them.model = to_safetensors({"w": np.ones(DIMENSION, np.float32)})
    return round_


PLANS: Final[list[tuple[str, str, PlanCheat]]] = [
    ("a plan signed by somebody else", "SIGNATURE_INVALID", by_another_key),
    ("a plan under another public key", "PLAN_REFUSED", lambda t: t.plan(key_id="0" * 32)),
    ("a plan with another roster", "PLAN_REFUSED", lambda t: t.plan(roster_digest="0" * 64)),
    ("a plan with another threshold", "PLAN_REFUSED", lambda t: t.plan(threshold=2)),
    ("a plan that the aggregator can open alone", "PLAN_REFUSED", lambda t: t.plan(custody="aggregator")),
    ("a plan with a stranger in the cohort", "PLAN_REFUSED", lambda t: t.plan(cohort=("a", "b", "mallory"))),
    ("a plan with one party twice", "PLAN_REFUSED", lambda t: t.plan(cohort=("a", "b", "b"))),
    ("a plan without this party", "PLAN_REFUSED", of_other_parties),
    ("a plan with other slots than follow from it", "PLAN_REFUSED", wider_slots),
    ("a plan with less noise than it says", "PLAN_REFUSED", less_noise),
    ("a plan of another federation", "PLAN_REFUSED", lambda t: t.plan(federation="other")),
    ("a plan with a quorum of one", "POLICY_REFUSED", lambda t: t.plan(quorum=1)),
    ("a plan without encryption", "POLICY_REFUSED", lambda t: t.plan(scheme="plaintext")),
    ("a plan for data that is not there", "POLICY_REFUSED", lambda t: t.plan(task="other")),
    ("another model than the plan says", "DIGEST_MISMATCH", another_model),
]


def cheats(rows: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("reason", "cheat"), [pytest.param(*row[1:], id=row[0]) for row in rows])


@cheats(PLANS)
async def test_no_commitment_to_a_false_plan(meeting: Meeting, reason: str, cheat: PlanCheat) -> None:
    answer = await meeting.them.ask_contribute(cheat(meeting.them))
    assert answer == Answer("failure", ("contribute", reason))
    meeting.them.model = to_safetensors({"w": np.zeros(DIMENSION, np.float32)})
    await meeting.opens(*await meeting.delivered(number=2))


SECOND_PLANS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("another model", {"model_sha256": "0" * 64}),
    ("another specification", {"spec_digest": "0" * 64}),
    ("another start", {"seed": 7}),
]


@pytest.mark.parametrize("changes", [pytest.param(row[1], id=row[0]) for row in SECOND_PLANS])
async def test_a_round_has_one_plan_also_after_a_restart(meeting: Meeting, changes: dict[str, Any]) -> None:
    await meeting.delivered()
    await meeting.restart()
    other = meeting.them.plan(**changes)
    assert await meeting.them.ask_contribute(other) == Answer("failure", ("contribute", "PLAN_REFUSED"))
    meeting.them.contribute(other, "b", "c", AGGREGATOR)
    listed = meeting.them.freeze(other)
    assert await meeting.them.ask_reveal(other, listed) == Answer("failure", ("reveal", "OPENING_REFUSED"))
    opening = meeting.them.opening(other, listed)
    assert await meeting.them.ask_open(other, listed, opening) == Answer("failure", ("open", "OPENING_REFUSED"))
    assert meeting.them.came("shares") == []
    assert len(meeting.them.came("upload")) == 1


def roots(round_: Round, *names: str) -> list[Signed]:
    return [round_.roots[name] for name in names]


def a_stranger_in_it(them: CheatingAggregator, round_: Round) -> Signed:
    key, statement = SigningKey.generate(), root_statement(round_, "mallory", round_.batches["b"])
    return them.freeze(round_, [*round_.roots.values(), key.sign(ROOT_KIND, statement, signer="mallory")])


def d_in_it(them: CheatingAggregator, round_: Round) -> Signed:
    them.contribute(round_, "d")
    return them.freeze(round_)


def b_by(signer: str) -> ListCheat:
    """b's root, made by the aggregator itself: signed with its own key or c's, under that name or b's."""

    def cheat(them: CheatingAggregator, round_: Round) -> Signed:
        key = them.key if signer == AGGREGATOR else them.keys["c"]
        statement = root_statement(round_, "b", round_.batches["c"])
        made = key.sign(ROOT_KIND, statement, signer=signer)
        return them.freeze(round_, [*roots(round_, "a", "c", AGGREGATOR), made])

    return cheat


def b_of_another_round(them: CheatingAggregator, round_: Round) -> Signed:
    other = them.plan(2)
    them.contribute(other, "b")
    return them.freeze(round_, [*roots(round_, "a", "c", AGGREGATOR), other.roots["b"]])


def a_of_other_bytes(them: CheatingAggregator, round_: Round) -> Signed:
    statement = {**parse_canonical(round_.roots["a"].statement), "root": "0" * 64}
    forged = replace(round_.roots["a"], statement=canonical_bytes(statement))
    return them.freeze(round_, [*roots(round_, "b", "c", AGGREGATOR), forged])


def without_signature(them: CheatingAggregator, round_: Round) -> Signed:
    return replace(them.freeze(round_), signature=bytes(64))


def signed_by_b(them: CheatingAggregator, round_: Round) -> Signed:
    statement = parse_canonical(them.freeze(round_).statement)
    del statement["kind"]
    return them.keys["b"].sign(LIST_KIND, statement, signer=AGGREGATOR)


LISTS: Final[list[tuple[str, str, ListCheat]]] = [
    ("a list without its root", "PLAN_REFUSED", lambda t, r: t.freeze(r, roots(r, "b", "c", AGGREGATOR))),
    ("a list with its root over other bytes", "SIGNATURE_INVALID", a_of_other_bytes),
    ("a list without a signature", "SIGNATURE_INVALID", without_signature),
    ("a list signed by a party", "SIGNATURE_INVALID", signed_by_b),
    ("a list with a stranger's root", "SIGNATURE_INVALID", a_stranger_in_it),
    ("a list with a root in b's name, signed by the aggregator", "SIGNATURE_INVALID", b_by(AGGREGATOR)),
    ("a list with a root in b's name, signed by c", "SIGNATURE_INVALID", b_by("b")),
    ("a list with c's signature on b's root", "SIGNATURE_INVALID", b_by("c")),
    ("a list with a root of another round", "PLAN_REFUSED", b_of_another_round),
    ("a list with the root of one not invited", "PLAN_REFUSED", d_in_it),
    ("a list with one root twice", "PLAN_REFUSED", lambda t, r: t.freeze(r, [*r.roots.values(), r.roots["b"]])),
    ("a list below the quorum", "PLAN_REFUSED", lambda t, r: t.freeze(r, roots(r, "a", AGGREGATOR))),
    ("a list without the aggregator's noise", "PLAN_REFUSED", lambda t, r: t.freeze(r, roots(r, "a", "b", "c"))),
    ("a list of another plan", "PLAN_REFUSED", lambda t, r: t.freeze(r, plan="0" * 64)),
    ("a list of no form", "INVALID_INPUT", lambda t, r: t.sign(LIST_KIND, {"plan": r.digest, "roots": "all"})),
]


@cheats(LISTS)
async def test_no_byte_of_an_update_leaves_for_a_false_list(meeting: Meeting, reason: str, cheat: ListCheat) -> None:
    round_ = await meeting.committed()
    answer = await meeting.them.ask_reveal(round_, cheat(meeting.them, round_))
    assert answer == Answer("failure", ("reveal", reason))
    assert meeting.them.came("upload") == []
    await meeting.opens(*await meeting.delivered(number=2))


async def test_a_round_has_one_list_and_what_is_sent_again_is_what_was_sent(meeting: Meeting) -> None:
    round_, listed = await meeting.delivered()
    await meeting.restart()
    other = meeting.them.freeze(round_, roots(round_, "a", "b", AGGREGATOR))
    assert await meeting.them.ask_reveal(round_, other) == Answer("failure", ("reveal", "PLAN_REFUSED"))
    assert (await meeting.them.ask_reveal(round_, listed)).kind == "upload"
    first, second = meeting.them.came("upload")
    assert first == second


def naming(*names: str, **changes: Any) -> OpeningCheat:
    """An opening that names these contributors."""

    def cheat(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
        return listed, them.opening(round_, listed, list(names), aggregate_root="0" * 64, **changes)

    return cheat


def product(*names: str, of: Callable[[CheatingAggregator, Round], list[bytes]]) -> OpeningCheat:
    """An opening of another product under honest names."""

    def cheat(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
        root = them.root_of(round_, list(names), of(them, round_))
        return listed, them.opening(round_, listed, list(names), aggregate_root=root)

    return cheat


ALL: Final = ("a", AGGREGATOR, "b", "c")


def bodies(them: CheatingAggregator, round_: Round, *names: str) -> list[bytes]:
    return [them.body(round_, name) for name in names]


def with_d(them: CheatingAggregator, round_: Round) -> list[bytes]:
    them.contribute(round_, "d")
    return bodies(them, round_, *ALL, "d")


def with_noise_of_its_own(them: CheatingAggregator, round_: Round) -> list[bytes]:
    """Times n-th residues: the same plaintexts under other randomness."""
    public, width = them.keyring.public, round_.layout.ciphertext_bytes
    residue = int(pow(5, int(public.n), int(public.n_squared))).to_bytes(width, "big")
    return [*bodies(them, round_, *ALL), residue * round_.layout.ciphertext_count]


def an_older_list(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
    other = them.freeze(round_, roots(round_, "a", "b", AGGREGATOR))
    return other, them.opening(round_, other, ["a", AGGREGATOR, "b"])


def another_lists_opening(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
    return listed, them.opening(round_, listed, list="0" * 64)


def an_opening_signed_by_b(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
    statement = parse_canonical(them.opening(round_, listed).statement)
    del statement["kind"]
    return listed, them.keys["b"].sign(OPENING_KIND, statement, signer=AGGREGATOR)


def serving(contributor: str, change: Callable[[bytes], bytes]) -> OpeningCheat:
    """An honest opening, for which a is given other bytes than were committed to."""

    def cheat(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
        them.served[contributor] = change(them.body(round_, contributor))
        return listed, them.opening(round_, listed)

    return cheat


def b_in_place_of_c(them: CheatingAggregator, round_: Round, listed: Signed) -> Opening:
    them.served["c"] = them.body(round_, "b")
    return listed, them.opening(round_, listed)


OPENINGS: Final[list[tuple[str, str, OpeningCheat]]] = [
    ("this party's update alone", "OPENING_REFUSED", naming("a", AGGREGATOR)),
    ("another party's update alone", "OPENING_REFUSED", naming(AGGREGATOR, "b")),
    ("nobody's update", "OPENING_REFUSED", naming(AGGREGATOR)),
    ("a sum without its own update", "OPENING_REFUSED", naming(AGGREGATOR, "b", "c")),
    ("a sum without the aggregator's noise", "OPENING_REFUSED", naming("a", "b", "c")),
    ("a sum with a party twice", "OPENING_REFUSED", naming("a", AGGREGATOR, "b", "b")),
    ("a sum with somebody not on the list", "OPENING_REFUSED", naming("a", AGGREGATOR, "b", "c", "d")),
    ("names in disorder", "OPENING_REFUSED", naming("b", "a", AGGREGATOR)),
    ("an opening of another plan", "OPENING_REFUSED", naming(*ALL, plan="0" * 64)),
    ("an opening of another list", "OPENING_REFUSED", another_lists_opening),
    ("an opening under another list", "OPENING_REFUSED", an_older_list),
    ("an opening signed by a party", "SIGNATURE_INVALID", an_opening_signed_by_b),
    ("a product with one factor more", "OPENING_REFUSED", product(*ALL, of=with_d)),
    ("a product with b twice", "OPENING_REFUSED", product(*ALL, of=lambda t, r: bodies(t, r, *ALL, "b"))),
    ("a product without b", "OPENING_REFUSED", product(*ALL, of=lambda t, r: bodies(t, r, "a", AGGREGATOR, "c"))),
    ("its own ciphertexts alone", "OPENING_REFUSED", product(*ALL, of=lambda t, r: bodies(t, r, "a"))),
    ("a product that was re-randomised", "OPENING_REFUSED", product(*ALL, of=with_noise_of_its_own)),
    ("b's bytes with a flipped bit", "DIGEST_MISMATCH", serving("b", lambda d: d[:-1] + bytes([d[-1] ^ 1]))),
    ("b's bytes cut short", "DIGEST_MISMATCH", serving("b", lambda d: d[:-128])),
    ("b's bytes and some more", "LIMIT_EXCEEDED", serving("b", lambda d: d + b"\0")),
    ("b's bytes in place of c's", "DIGEST_MISMATCH", b_in_place_of_c),
]


@cheats(OPENINGS)
async def test_no_share_leaves_for_a_false_aggregate(meeting: Meeting, reason: str, cheat: OpeningCheat) -> None:
    round_, listed = await meeting.delivered()
    listed, opening = cheat(meeting.them, round_, listed)
    answer = await meeting.them.ask_open(round_, listed, opening)
    assert answer == Answer("failure", ("open", reason))
    assert meeting.them.came("shares") == []
    meeting.them.served.clear()
    await meeting.opens(*await meeting.delivered(number=2))
    assert len(meeting.them.came("shares")) == 1


async def test_a_plan_is_not_opened_again_under_another_rounds_name(meeting: Meeting) -> None:
    round_, listed = await meeting.delivered()
    await meeting.opens(round_, listed)
    opening = meeting.them.opening(round_, listed)
    elsewhere = federation_pb2.RoundName(job_id="job", round=9)
    answer = await meeting.them.ask_open(round_, listed, opening, elsewhere)
    assert answer == Answer("failure", ("open", "PLAN_REFUSED"))


@pytest.mark.parametrize("restarted", [False, True])
async def test_of_one_round_no_second_aggregate_is_opened_and_the_first_is_answered_alike(
    meeting: Meeting, restarted: bool
) -> None:
    """The difference of two sums with one party more would be that party's update."""
    round_, listed = await meeting.delivered()
    share = await meeting.opens(round_, listed)
    if restarted:
        await meeting.restart()
    fewer = meeting.them.opening(round_, listed, ["a", AGGREGATOR, "b"])
    answer = await meeting.them.ask_open(round_, listed, fewer)
    assert answer == Answer("failure", ("open", "OPENING_REFUSED"))
    assert await meeting.opens(round_, listed) == share
    first, second = meeting.them.came("shares")
    assert first == second


async def test_killed_between_its_note_and_its_share_a_party_opens_the_aggregate_it_noted_and_no_other(
    meeting: Meeting,
) -> None:
    round_, listed = await meeting.delivered()
    meeting.a.pool.dies_at = "open_share"
    answer = await meeting.them.ask_open(round_, listed, meeting.them.opening(round_, listed))
    assert answer == Answer("failure", ("open", "WORKER_FAILED"))
    await meeting.restart()
    fewer = meeting.them.opening(round_, listed, ["a", AGGREGATOR, "b"])
    answer = await meeting.them.ask_open(round_, listed, fewer)
    assert answer == Answer("failure", ("open", "OPENING_REFUSED"))
    assert meeting.them.came("shares") == []
    await meeting.opens(round_, listed)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_holder_that_was_not_invited_opens_one_aggregate_and_no_second(
    meeting: Meeting, restarted: bool
) -> None:
    round_ = of_other_parties(meeting.them)
    meeting.them.contribute(round_, "b", "c", "d", AGGREGATOR)
    listed = meeting.them.freeze(round_)
    await meeting.opens(round_, listed)
    if restarted:
        await meeting.restart()
    fewer = meeting.them.opening(round_, listed, [AGGREGATOR, "b", "c"])
    answer = await meeting.them.ask_open(round_, listed, fewer)
    assert answer == Answer("failure", ("open", "OPENING_REFUSED"))
    assert len(meeting.them.came("shares")) == 1


async def test_fewer_shares_than_the_threshold_open_nothing(meeting: Meeting) -> None:
    """The aggregator holds none; with two of three, from a and from a colluding b, it still has nothing."""
    them = meeting.them
    round_, listed = await meeting.delivered()
    shares = {1: await meeting.opens(round_, listed)}
    scheme, layout = them.scheme(round_), Layout.from_json(round_.plan.layout)
    material = them.blobs.read(them.fold(round_, list(ALL)).sha256)
    while len(shares) < them.roster.threshold:
        with pytest.raises(TooFewSharesError):
            list(scheme.combine(layout, material, shares))
        index = len(shares) + 1
        own = them.shares["abcd"[index - 1]]
        shares[index] = scheme.open_share(layout, own, [material], binding=b"", entropy=SystemEntropy())
    opened = list(scheme.combine(layout, material, shares))
    assert np.concatenate(list(scheme.decode(layout, opened, contributions=len(ALL)))).shape == (DIMENSION,)


# --- what was learnt in one round, used in another --------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2**10])
@pytest.mark.parametrize("with_a_proof", [False, True])
async def test_ciphertexts_of_an_earlier_round_do_not_come_back_as_the_aggregator_s_noise(
    meeting: Meeting, power: int, with_a_proof: bool
) -> None:
    """Opened, such a sum would show a's earlier update. The proof made for it names that round and a."""
    them = meeting.them
    first, _ = await meeting.delivered()
    width, n_squared = first.layout.ciphertext_bytes, them.keyring.public.n_squared
    old = them.body(first, "a")
    values = [int.from_bytes(old[at : at + width], "big") for at in range(0, len(old), width)]
    copied = b"".join(int(pow(value, power, n_squared)).to_bytes(width, "big") for value in values)

    round_ = await meeting.committed(2)
    header = expected_header(round_.plan, round_.digest, AGGREGATOR).encode()
    root = batch_root(header, [copied], ciphertext_bytes=width)[0]
    ref = them.blobs.write(copied)
    proof = first.batches["a"].proof if with_a_proof else ""
    them.keep(round_, AGGREGATOR, StoredBatch(header.hex(), ref.sha256, ref.size, root, proof))
    listed = them.freeze(round_)
    answer = await them.ask_reveal(round_, listed)
    assert answer.kind == "upload"  # nothing is wrong with the list as such
    meeting.keep_upload(round_, answer.what)
    answer = await them.ask_open(round_, listed, them.opening(round_, listed))
    assert answer == Answer("failure", ("open", "KNOWLEDGE_UNPROVEN"))
    assert them.came("shares") == []
