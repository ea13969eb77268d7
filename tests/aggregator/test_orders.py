"""Whose jobs an aggregator takes, and until when it begins rounds for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from src.aggregator.orders import OrderDesk, order_in_force
from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.errors import DeadlineError, InvalidInput, PolicyError, SignatureError
from src.jobs.orders import order_of
from src.jobs.specs import spec_from_proto
from src.jobs.states import JobRow
from src.protocol.order import ORDER_KIND, order_time, sign_order
from src.protocol.plan import signed_digest
from src.protocol.roster import Roster, Scientist
from src.protocol.signing import Signed, SigningKey

NOW = 1_800_000_000.0
ANN = Identity("scientist", "ann")
KEY = SigningKey.from_bytes(bytes(32))
ROSTER = Roster(
    federation="demo",
    key_id="",
    custody="threshold",
    threshold=2,
    colluders=0,
    aggregator_verify_key=bytes(32),
    members=(),
    created_at="",
    scientists=(Scientist("ann", KEY.verify_key),),
)
JOB = jobs_pb2.Job(federated_training=jobs_pb2.FederatedTraining(task="randhie"))
SPEC = spec_from_proto(JOB)


def signed(**changes: Any) -> Signed:
    order = order_of(JOB, federation="demo", scientist="ann", request_id="r", expires_at=order_time(NOW + 60))
    return sign_order(replace(order, **changes), KEY)


@pytest.mark.parametrize("allow_unsigned", [False, True])
def test_what_is_signed_has_to_be_right_also_where_unsigned_jobs_are_taken(allow_unsigned: bool) -> None:
    desk = OrderDesk(lambda: ROSTER, allow_unsigned=allow_unsigned, clock=lambda: NOW)
    desk.check(signed(), spec=SPEC, caller=ANN, request_id="r")
    with pytest.raises(InvalidInput, match=r"order\.request_id"):
        desk.check(signed(request_id="s"), spec=SPEC, caller=ANN, request_id="r")
    with pytest.raises(SignatureError):
        desk.check(replace(signed(), signature=bytes(64)), spec=SPEC, caller=ANN, request_id="r")


def test_an_unsigned_job_is_taken_where_policy_says_so_and_nowhere_else() -> None:
    OrderDesk(lambda: ROSTER, allow_unsigned=True).check(None, spec=SPEC, caller=ANN, request_id="r")
    with pytest.raises(PolicyError, match=r"policy\.allow_unsigned_jobs"):
        OrderDesk(lambda: ROSTER, allow_unsigned=False).check(None, spec=SPEC, caller=ANN, request_id="r")


def row(order: str) -> JobRow:
    fields = {"job_id": "j", "request_id": "r", "owner": str(ANN), "display_name": "", "kind": SPEC.kind}
    return JobRow(**fields, spec=SPEC.to_json(), spec_digest=SPEC.digest, created_at="", signed_order=order)  # type: ignore[arg-type]


def test_rounds_begin_until_the_order_expires_and_no_longer() -> None:
    job = row(signed().to_text())
    assert order_in_force(job, ROSTER, now=NOW + 60) == (signed(), signed_digest(signed(), ORDER_KIND))
    with pytest.raises(DeadlineError, match="the order that ann signed for this job expired at 2027-01-15T08:01:00Z"):
        order_in_force(job, ROSTER, now=NOW + 61)


def test_a_job_without_an_order_has_none_and_a_row_that_was_changed_is_found() -> None:
    assert order_in_force(row(""), ROSTER, now=NOW) == (None, "")
    for text in ("{}", "nonsense", signed().to_text().replace("randhie", "another")):
        with pytest.raises(InvalidInput):  # a SignatureError is one
            order_in_force(row(text), ROSTER, now=NOW)
