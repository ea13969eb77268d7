"""What a job order (`protocol.order`) asks for: its specification is the wire's message as JSON.

That is ProtoJSON (https://protobuf.dev/programming-guides/json), with field names as in proto/sotto/v1/jobs.proto, of
the message that the job's `oneof spec` holds, without the bytes of a model: so that a client in any language makes one
from the proto alone.
"""

from __future__ import annotations

import hashlib

from google.protobuf import json_format

from ..communication.generated import jobs_pb2
from ..communication.identity import Identity
from ..errors import InvalidInput
from ..protocol.order import MAX_ORDER_BYTES, Order
from ..protocol.roster import OPERATOR
from .spec import FederatedTrainingSpec
from .specs import KINDS, JobSpec, model_bytes, spec_from_proto


def order_of(job: jobs_pb2.Job, *, federation: str, scientist: str, request_id: str, expires_at: str) -> Order:
    """What a scientist signs for a job that is to be submitted.

    Args:
        expires_at: as `protocol.order.order_time` writes it.

    Raises:
        InvalidInput: with every violation by its field's path: the aggregator would refuse the job as well.
    """
    spec, model = spec_from_proto(job), model_bytes(job)
    bare = jobs_pb2.Job()
    bare.CopyFrom(job)
    message = getattr(bare, spec.kind)
    if model:
        message.ClearField(spec.model_field)
    text = json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None, ensure_ascii=False)
    return Order(
        federation=federation,
        scientist=scientist,
        request_id=request_id,
        expires_at=expires_at,
        job=spec.kind,
        spec=text,
        model_sha256=hashlib.sha256(model).hexdigest() if model else "",
        most_rounds=rounds_of(spec),
    )


def rounds_of(spec: JobSpec) -> int:
    """That may be begun for a job, spares included; 0 for one without rounds."""
    return spec.priced_rounds if isinstance(spec, FederatedTrainingSpec) else 0


def spec_of_order(order: Order) -> JobSpec:
    """The specification that an order's text is.

    Raises:
        InvalidInput: there is no such kind of job, the text is no such message, has the bytes of a model, or leaves the
            specification's ranges; or `most_rounds` is not what follows from it.
    """
    if order.job not in KINDS or len(order.spec) > MAX_ORDER_BYTES:
        raise InvalidInput(f"a job order is for no kind of job: {order.job[:40]!r}")
    job = jobs_pb2.Job()
    message = getattr(job, order.job)
    message.SetInParent()
    try:
        json_format.Parse(order.spec, message)
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidInput(f"a job order's specification is no {message.DESCRIPTOR.name} in JSON") from error
    if model_bytes(job):
        raise InvalidInput("a job order holds a model: model_sha256 stands for it")
    spec = spec_from_proto(job, model_sha256=order.model_sha256)
    if order.most_rounds != rounds_of(spec):
        raise InvalidInput(f"a job order is for {order.most_rounds} rounds, its specification for {rounds_of(spec)}")
    return spec


def caller_of(order: Order) -> Identity:
    """Who has to be calling to hand it in."""
    if order.scientist == OPERATOR:
        return Identity(OPERATOR, OPERATOR)
    return Identity("scientist", order.scientist)


def check_order(order: Order, *, spec: JobSpec, caller: Identity, request_id: str, now: float) -> None:
    """Whether an order, whose signature was verified, is for the job that came with it.

    Args:
        spec: of the job.
        caller: who handed it in; request_id: under which.
        now: seconds since the epoch.

    Raises:
        InvalidInput: it is not, by the fields of the order that say something else.
    """
    ordered = spec_of_order(order)
    violations: dict[str, str] = {}
    if caller_of(order) != caller:
        violations["order.scientist"] = f"signed by {caller_of(order)}, handed in by {caller}"
    if order.request_id != request_id:
        violations["order.request_id"] = "is not that of the request"
    if now > order.expires:
        violations["order.expires_at"] = f"it expired at {order.expires_at}"
    if ordered != spec:
        others = ", ".join(_differences(ordered, spec))
        violations["order.spec"] = f"is not the job that came with it; other than there: {others}"
    if violations:
        listed = "; ".join(f"{path}: {text}" for path, text in violations.items())
        raise InvalidInput(f"the job's order does not fit: {listed}", violations=violations)


def _differences(one: JobSpec, other: JobSpec) -> list[str]:
    if one.kind != other.kind:
        return ["kind"]
    mine, theirs = one.to_json(), other.to_json()
    return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
