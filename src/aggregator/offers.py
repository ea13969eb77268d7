"""What a party is wanted for, as the message that is pushed to it."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from ..communication.generated import common_pb2, federation_pb2
from ..communication.messages import signed_to_proto
from ..protocol.signing import Signed
from .round_row import RoundRow, Work
from .rounds import wanted

Offer = tuple[str, federation_pb2.Assignment]
"""What identifies the work (so that it is pushed once), and the message."""


def round_name(row: RoundRow) -> federation_pb2.RoundName:
    """The wire's name of a round."""
    return federation_pb2.RoundName(job_id=row.job_id, round=row.number)


def offer_for(row: RoundRow, party: str) -> Offer | None:
    """The assignment of a party in a round, identified by the kind of work; None when there is nothing to do."""
    work = wanted(row, party)
    if work is None:
        return None
    message = federation_pb2.Assignment(round=round_name(row), deadline=Timestamp(seconds=int(row.deadline)))
    if work is Work.CONTRIBUTE:
        message.contribute.plan.CopyFrom(_signed(row.plan))
        if row.order is not None:
            message.contribute.order.CopyFrom(_signed(row.order))
    elif work is Work.REVEAL:
        message.reveal.plan.CopyFrom(_signed(row.plan))
        message.reveal.frozen_list.CopyFrom(_signed(row.frozen_list))
    elif work is Work.OPEN:
        message.open.plan.CopyFrom(_signed(row.plan))
        message.open.frozen_list.CopyFrom(_signed(row.frozen_list))
        message.open.opening.CopyFrom(_signed(row.opening))
        if row.order is not None:
            message.open.order.CopyFrom(_signed(row.order))
    else:
        message.ended.state = row.state.value
        message.ended.reason = row.reason
        if row.result is not None:
            message.ended.transcript.CopyFrom(_signed(row.result["transcript"]))
    return work.value, message


def _signed(value: dict[str, str] | None) -> common_pb2.Signed:
    if value is None:  # the rules of a round never want work before its statement exists
        raise AssertionError("the round row lacks a statement that its state implies")
    return signed_to_proto(Signed.from_json(value))
