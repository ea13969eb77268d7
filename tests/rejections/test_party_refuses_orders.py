"""An aggregator that invents, lengthens, repeats or alters a job, against the real node of party a: it trains for
nothing that no scientist ordered, and opens nothing of it.

The aggregator has its own key, and every order that a scientist ever signed; it has no scientist's key. Each row is
what it tries, and the reason that a reports. Nothing is charged for it; and every time a round that was ordered still
works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest

from src.jobs.spec import FederatedTrainingSpec, LocalTraining, PartyPrivacy
from src.party.openings import LATE_ROUND_TIMEOUTS
from src.protocol.order import order_time
from src.protocol.plan import PLAN_KIND
from src.protocol.roster import AGGREGATOR
from src.protocol.signing import Signed
from tests.rejections.cheating import SPEC, Answer, CheatingAggregator, Meeting, Round

Cheat = Callable[[CheatingAggregator], Round]


def other(**fields: Any) -> FederatedTrainingSpec:
    """A specification that nobody ordered: SPEC with fields changed."""
    return FederatedTrainingSpec.from_json({**SPEC.to_json(), **fields})


def signed_by(them: CheatingAggregator, key: str) -> Signed:
    """The order, with a signature by somebody else under the scientist's name."""
    order = them.order()
    by = {"aggregator": them.key, **them.keys, **them.scientists}[key]
    statement = {name: value for name, value in _read(order).items() if name != "kind"}
    return by.sign("order", statement, signer="scientist")


def _read(order: Signed) -> dict[str, Any]:
    from src.protocol.canonical import parse_canonical

    return parse_canonical(order.statement)


def planned_as(spec: FederatedTrainingSpec, **changes: Any) -> Cheat:
    """A round of another job than was ordered."""

    def cheat(them: CheatingAggregator) -> Round:
        return them.plan(spec=spec, order=them.order(), **changes)

    return cheat


def under(spec: FederatedTrainingSpec) -> Cheat:
    """The same, said to be the one that was ordered."""
    return planned_as(spec, spec_digest=SPEC.digest)


def without_order(them: CheatingAggregator) -> Round:
    round_ = them.plan(order=None)
    plan = replace(round_.plan, order="")
    return Round(plan, them.sign(PLAN_KIND, plan.to_statement()))


def order_left_out(them: CheatingAggregator) -> Round:
    round_ = them.plan()
    return Round(round_.plan, round_.signed)


def order_not_named(them: CheatingAggregator) -> Round:
    return replace(without_order(them), order=them.order())


def another_order_named(them: CheatingAggregator) -> Round:
    return replace(them.plan(), order=them.order(other(seed=9)))


def first_model_of_its_own(them: CheatingAggregator) -> Round:
    """The order names a model; the first round starts from another."""
    spec = other(initial_model_sha256="ab" * 32)
    return them.plan(spec=spec)


def less_noise_for_rows(them: CheatingAggregator) -> Round:
    """Under fedavg the multiplier of DP-SGD is no part of the order: what it costs is."""
    local = them.plan().plan.local
    return them.plan(local=replace(local, noise_multiplier=repr(float(local.noise_multiplier) * 0.9)))


def less_noise_in_a_sum(them: CheatingAggregator) -> Round:
    """Of fedsgd: a job with a larger ε, planned as the one that was ordered."""
    asked = _sum(epsilon=0.5)
    rows = dict.fromkeys("abc", 100)
    cheaper = them.plan(spec=_sum(epsilon=2.0), order=them.order(asked), declared_rows=rows, spec_digest=asked.digest)
    return cheaper


def _sum(**local: Any) -> FederatedTrainingSpec:
    return other(
        strategy="fedsgd",
        trusted_aggregator=False,
        party_privacy=PartyPrivacy(noise_by="parties").model_dump(exclude={"adaptive_clipping"}),
        local_training={**LocalTraining(steps=1).model_dump(), **local},
    )


def a_trusted_server(them: CheatingAggregator) -> Round:
    """What no order asked for, in the order's name; and what a would not take part in either way."""
    spec = _sum()
    trusted = FederatedTrainingSpec.from_json(
        {**spec.to_json(), "trusted_aggregator": True, "party_privacy": {"noise_by": "aggregator"}}
    )
    rows = dict.fromkeys("abc", 100)
    return them.plan(spec=trusted, order=them.order(spec), declared_rows=rows, spec_digest=spec.digest)


REFUSED: Final[list[tuple[str, str, Cheat]]] = [
    # invented
    ("a job that nobody signed", "POLICY_REFUSED", without_order),
    ("a job whose order is not shown", "PLAN_REFUSED", order_left_out),
    ("a job that does not name its order", "PLAN_REFUSED", order_not_named),
    ("a job that names another order", "PLAN_REFUSED", another_order_named),
    ("an order signed by the aggregator", "SIGNATURE_INVALID", lambda t: t.plan(order=signed_by(t, AGGREGATOR))),
    ("an order signed by a party", "SIGNATURE_INVALID", lambda t: t.plan(order=signed_by(t, "b"))),
    ("an order signed by another scientist", "SIGNATURE_INVALID", lambda t: t.plan(order=signed_by(t, "eve"))),
    ("an order for another federation", "INVALID_INPUT", lambda t: t.plan(order=t.order(federation="other"))),
    ("an order that has expired", "PLAN_REFUSED", lambda t: t.plan(order=t.order(expires_at="2026-01-01T00:00:00Z"))),
    ("an order for something that is no training", "PLAN_REFUSED", lambda t: t.plan(order=an_export(t))),
    ("an order that is none", "INVALID_INPUT", lambda t: t.plan(order=t.order(spec="{}"))),
    # lengthened
    ("a round more than was ordered", "PLAN_REFUSED", lambda t: t.plan(13)),
    ("more rounds in its plan", "PLAN_REFUSED", under(other(rounds=11))),
    ("fewer rounds in its plan", "PLAN_REFUSED", under(other(rounds=9))),
    (
        "an order that says more than its specification",
        "INVALID_INPUT",
        lambda t: t.plan(order=t.order(most_rounds=13)),
    ),
    # altered: all that a plan takes from a job
    ("another specification", "PLAN_REFUSED", planned_as(other(seed=9))),
    ("another seed", "PLAN_REFUSED", under(other(seed=9))),
    ("other options of the task", "PLAN_REFUSED", under(other(task_options={"x": 1}))),
    (
        "another strategy",
        "PLAN_REFUSED",
        lambda t: t.plan(
            spec=_sum(), order=t.order(), declared_rows=dict.fromkeys("abc", 100), spec_digest=SPEC.digest
        ),
    ),
    ("a trusted server", "POLICY_REFUSED", a_trusted_server),
    ("a party more", "PLAN_REFUSED", under(other(parties=["a", "b", "c", "d"], quorum=2))),
    (
        "a smaller quorum",
        "PLAN_REFUSED",
        lambda t: t.plan(spec=other(quorum=2), order=t.order(other(quorum=3)), spec_digest=other(quorum=3).digest),
    ),
    ("more steps", "PLAN_REFUSED", under(other(local_training={"steps": 11}))),
    ("another sampling rate", "PLAN_REFUSED", under(other(local_training={"sampling_rate": 0.5}))),
    ("another learning rate", "PLAN_REFUSED", under(other(local_training={"learning_rate": 9.0}))),
    ("another norm of gradients", "PLAN_REFUSED", under(other(local_training={"max_grad_norm": 9.0}))),
    ("another δ", "PLAN_REFUSED", under(other(local_training={"delta": 1e-3}))),
    (
        "another norm of updates",
        "PLAN_REFUSED",
        under(other(party_privacy={"clipping_norm": 9.0, "noise_multiplier": 0.5})),
    ),
    ("no noise on the sum", "PLAN_REFUSED", under(other(party_privacy={"noise_multiplier": 0.0}))),
    ("noise by others", "PLAN_REFUSED", under(other(party_privacy={"noise_by": "parties", "noise_multiplier": 0.5}))),
    ("a coarser grid", "PLAN_REFUSED", under(other(encryption={"resolution_bits": 15}))),
    ("less noise for rows", "PLAN_REFUSED", less_noise_for_rows),
    ("less noise in a sum of gradients", "PLAN_REFUSED", less_noise_in_a_sum),
    ("a first model that was not ordered", "PLAN_REFUSED", first_model_of_its_own),
]


def an_export(them: CheatingAggregator) -> Signed:
    return them.order(job="export", spec='{"job_id":"j"}', most_rounds=0)


def cheats(rows: list[tuple[str, str, Cheat]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("reason", "cheat"), [pytest.param(*row[1:], id=row[0]) for row in rows])


@cheats(REFUSED)
async def test_a_party_trains_for_nothing_that_no_scientist_ordered(
    meeting: Meeting, reason: str, cheat: Cheat
) -> None:
    answer = await meeting.them.ask_contribute(cheat(meeting.them))
    assert answer == Answer("failure", ("contribute", reason)), meeting.them.told
    assert await meeting.a.charges() == []
    await meeting.opens(*await meeting.delivered())


OF_OTHERS: Final = SPEC.model_copy(update={"parties": ("b", "c", "d")})
"""A holder that is not invited is asked to open such a job's rounds."""


def of_others(cheat: str) -> Cheat:
    def make(them: CheatingAggregator) -> Round:
        order = them.order(OF_OTHERS)
        if cheat == "signed by the aggregator":
            statement = {name: value for name, value in _read(order).items() if name != "kind"}
            order = them.key.sign("order", statement, signer="scientist")
        if cheat == "expired":
            late_s = LATE_ROUND_TIMEOUTS * OF_OTHERS.round_timeout_s
            order = them.order(OF_OTHERS, expires_at=order_time(time.time() - late_s - 60))
        if cheat == "altered":
            return them.plan(spec=OF_OTHERS, order=them.order(OF_OTHERS.model_copy(update={"seed": 9})))
        round_ = them.plan(spec=OF_OTHERS, order=order)
        if cheat == "unsigned":
            plan = replace(round_.plan, order="")
            return Round(plan, them.sign(PLAN_KIND, plan.to_statement()))
        return Round(round_.plan, round_.signed) if cheat == "not shown" else round_

    return make


NOT_OPENED: Final[list[tuple[str, str, Cheat]]] = [
    ("a job that nobody signed", "POLICY_REFUSED", of_others("unsigned")),
    ("a job whose order is not shown", "PLAN_REFUSED", of_others("not shown")),
    ("an order signed by the aggregator", "SIGNATURE_INVALID", of_others("signed by the aggregator")),
    ("an order that had expired before the round could begin", "PLAN_REFUSED", of_others("expired")),
    ("another job than was ordered", "PLAN_REFUSED", of_others("altered")),
]


@cheats(NOT_OPENED)
async def test_who_is_only_asked_to_open_opens_nothing_that_no_scientist_ordered(
    meeting: Meeting, reason: str, cheat: Cheat
) -> None:
    them = meeting.them
    round_ = cheat(them)
    them.contribute(round_, "b", "c", "d", AGGREGATOR)
    listed = them.freeze(round_)
    answer = await them.ask_open(round_, listed, them.opening(round_, listed))
    assert answer == Answer("failure", ("open", reason)), them.told
    assert them.came("shares") == []
    them.served.clear()
    honest = them.plan(spec=OF_OTHERS)
    them.contribute(honest, "b", "c", "d", AGGREGATOR)
    await meeting.opens(honest, them.freeze(honest))


async def test_a_round_that_began_in_time_is_opened_although_its_order_has_expired_meanwhile(meeting: Meeting) -> None:
    them = meeting.them
    round_ = them.plan(spec=OF_OTHERS, order=them.order(OF_OTHERS, expires_at=order_time(time.time() - 60)))
    them.contribute(round_, "b", "c", "d", AGGREGATOR)
    await meeting.opens(round_, them.freeze(round_))


async def test_who_ordered_a_round_stands_in_the_party_s_ledger_with_what_it_cost(meeting: Meeting) -> None:
    """Also with what was refused for its budget; and in the place of nobody whose data it is."""
    them = meeting.them
    assert (await them.ask_contribute(them.plan(order=them.order(by="eve")))).kind == "root"
    too_long = other(rounds=60)
    answer = await them.ask_contribute(them.plan(spec=too_long, job_id="job2"))
    assert answer == Answer("failure", ("contribute", "BUDGET_EXCEEDED"))
    found = [(entry.kind, entry.unit, entry.scientist, entry.user) for entry in await meeting.a.entries()]
    assert found == [
        ("reservation", "example", "eve", ""),
        ("reservation", "party", "eve", ""),
        ("final", "example", "", ""),
        ("final", "party", "", ""),
        ("refusal", "example", "scientist", ""),
    ]


# --- repeated ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_order_is_one_job_also_after_a_restart(meeting: Meeting, restarted: bool) -> None:
    """Whoever has an order cannot spend what it allows a second time, under another name."""
    await meeting.delivered()
    if restarted:
        await meeting.restart()
    for job_id in ("job2", "job3"):
        answer = await meeting.them.ask_contribute(meeting.them.plan(job_id=job_id))
        assert answer == Answer("failure", ("contribute", "PLAN_REFUSED"))
    assert "is that of job job" in meeting.them.told[-1]
    await meeting.delivered(number=2)


async def test_a_job_is_one_order(meeting: Meeting) -> None:
    await meeting.delivered()
    answer = await meeting.them.ask_contribute(meeting.them.plan(2, spec=other(seed=9)))
    assert answer == Answer("failure", ("contribute", "PLAN_REFUSED"))
    assert "job job rests on another order" in meeting.them.told[-1]


async def test_a_request_that_was_signed_twice_is_one_job(meeting: Meeting) -> None:
    """As a client does that lost the answer: both orders are good, and only one of them is carried out."""
    await meeting.delivered()
    again = meeting.them.order(expires_at="2099-01-01T00:00:00Z")
    answer = await meeting.them.ask_contribute(meeting.them.plan(job_id="job2", order=again))
    assert answer == Answer("failure", ("contribute", "PLAN_REFUSED"))
    assert "was ordered before, as job job" in meeting.them.told[-1]


async def test_the_same_request_of_another_scientist_is_another_job(meeting: Meeting) -> None:
    await meeting.delivered()
    round_ = meeting.them.plan(job_id="job2", order=meeting.them.order(by="eve"))
    assert (await meeting.them.ask_contribute(round_)).kind == "root"


async def test_what_was_opened_for_others_counts_as_a_job_too(meeting: Meeting) -> None:
    them = meeting.them
    round_ = them.plan(spec=OF_OTHERS)
    them.contribute(round_, "b", "c", "d", AGGREGATOR)
    await meeting.opens(round_, them.freeze(round_))
    them.served.clear()
    again = them.plan(spec=OF_OTHERS, job_id="job2")
    them.contribute(again, "b", "c", "d", AGGREGATOR)
    listed = them.freeze(again)
    answer = await them.ask_open(again, listed, them.opening(again, listed))
    assert answer == Answer("failure", ("open", "PLAN_REFUSED"))


async def test_rounds_are_counted_and_end_with_what_was_ordered_whether_they_were_released_or_not(
    meeting: Meeting,
) -> None:
    """Two and no spare one: the second fails, and that is all."""
    spec = other(rounds=2, spare_rounds=0)
    them = meeting.them
    for number in (1, 2):
        assert (await them.ask_contribute(them.plan(number, spec=spec))).kind == "root"
    await meeting.restart()
    for number in (3, 0):
        answer = await them.ask_contribute(them.plan(number, spec=spec))
        assert answer == Answer("failure", ("contribute", "PLAN_REFUSED"))
    assert (await them.ask_contribute(them.plan(2, spec=spec))).kind == "root"  # the same again is no round more


async def test_a_round_is_begun_before_its_order_expires_and_goes_on_after(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    them = meeting.them
    order = them.order(expires_at=order_time(time.time() + 3600))
    round_ = them.plan(order=order)
    them.contribute(round_, "b", "c", AGGREGATOR)
    answer = await them.ask_contribute(round_)
    assert answer.kind == "root"
    round_.roots["a"] = answer.what
    monkeypatch.setattr(meeting.a.worker, "_clock", lambda: time.time() + 7200)
    late = await them.ask_contribute(them.plan(2, order=order))
    assert late == Answer("failure", ("contribute", "PLAN_REFUSED"))
    listed = them.freeze(round_)
    answer = await them.ask_reveal(round_, listed)
    assert answer.kind == "upload"
    meeting.keep_upload(round_, answer.what)
    await meeting.opens(round_, listed)
