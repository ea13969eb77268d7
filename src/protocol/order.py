"""A job order: what a scientist signs, so that nobody else can invent, lengthen, repeat or alter a job.

The aggregator takes a job only with one, and sends it to the parties with each round; a party trains for nothing that
does not follow from it. The specification in it is text: its form is a matter of `jobs.orders`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Final

from ..errors import InvalidInput, NotFoundError, SignatureError
from .plan import signed_digest
from .roster import Roster
from .signing import Signed, SigningKey, open_signed

ORDER_KIND: Final = "order"
ORDER_VERSION: Final = 1
MAX_ORDER_BYTES: Final = 256 << 10
"""Of the statement: every party gets it with every round. Four times what a task's options may take."""
MAX_REQUEST_ID_CHARACTERS: Final = 100
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_SHA256: Final = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job, as its scientist asked for it.

    Attributes:
        federation: in which it may run.
        scientist: who asks, by the name in the roster; "operator" is the operator.
        request_id: as in `CreateJobRequest`: one request of a scientist is one job.
        expires_at: no round begins after it; UTC, "2026-01-31T00:00:00Z".
        job: the kind of the job: "federated_training", "evaluation" or "export".
        spec: its specification as JSON text, without the bytes of a model.
        model_sha256: of the model that comes with it, in hex; empty where none does.
        most_rounds: that may ever be begun for it, spares included; 0 for a job without rounds.
        version: of this form.
    """

    federation: str
    scientist: str
    request_id: str
    expires_at: str
    job: str
    spec: str
    model_sha256: str
    most_rounds: int
    version: int = ORDER_VERSION

    def to_statement(self) -> dict[str, Any]:
        """Canonical-JSON-able."""
        return asdict(self)

    @classmethod
    def from_statement(cls, value: Mapping[str, Any]) -> Order:
        """Raises InvalidInput when it is malformed, or of another version."""
        if value.get("version") != ORDER_VERSION or isinstance(value.get("version"), bool):
            raise InvalidInput(f"a job order has version {ORDER_VERSION}, not {str(value.get('version'))[:20]}")
        try:
            order = cls(**value)
        except TypeError as error:
            raise InvalidInput("a job order is malformed") from error
        for field in fields(cls):
            if type(getattr(order, field.name)) is not (int if str(field.type) == "int" else str):
                raise InvalidInput(f"a job order is malformed: {field.name} is not of type {field.type}")
        if not 0 < len(order.request_id) <= MAX_REQUEST_ID_CHARACTERS or "\0" in order.request_id:
            raise InvalidInput(
                f"a job order's request_id has 1 to {MAX_REQUEST_ID_CHARACTERS} characters, none of them NUL"
            )
        if order.most_rounds < 0 or not _SHA256.fullmatch(order.model_sha256):
            raise InvalidInput("a job order is malformed: most_rounds is negative, or model_sha256 is no digest")
        order.check_time()
        return order

    @property
    def expires(self) -> float:
        """`expires_at` in seconds since the epoch."""
        return datetime.strptime(self.expires_at, _TIME).replace(tzinfo=UTC).timestamp()

    def check_time(self) -> None:
        """Raises InvalidInput unless `expires_at` is a time in its one form."""
        try:
            same = order_time(self.expires) == self.expires_at
        except (ValueError, OverflowError):
            same = False
        if not same:
            raise InvalidInput("a job order is malformed: expires_at is not a time such as 2026-01-31T00:00:00Z")


def order_time(seconds: float) -> str:
    """Seconds since the epoch as orders have them, cut to whole ones."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime(_TIME)


def sign_order(order: Order, key: SigningKey) -> Signed:
    """The order as its scientist's signed statement."""
    return key.sign(ORDER_KIND, order.to_statement(), signer=order.scientist)


def open_order(signed: Signed, roster: Roster) -> tuple[Order, str]:
    """What a scientist of the roster ordered, and the order's digest. Whether it has expired is for the caller to see.

    Raises:
        SignatureError: signed by nobody in the roster, or not by whom it names.
        InvalidInput: too large, or not an order; of another federation.
    """
    if len(signed.statement) > MAX_ORDER_BYTES:
        raise InvalidInput(f"a job order has at most {MAX_ORDER_BYTES} bytes")
    try:
        scientist = roster.scientist(signed.signer)
    except NotFoundError as error:
        raise SignatureError(f"a job order is signed by a stranger: {error.message}") from error
    order = Order.from_statement(open_signed(signed, ORDER_KIND, verify_key=scientist.verify_key))
    if order.scientist != scientist.name:
        raise SignatureError(f"{scientist.name} signed a job order in the name of {order.scientist[:64]!r}")
    if order.federation != roster.federation:
        raise InvalidInput(
            f"a job order is for federation {order.federation[:64]!r}, this one is {roster.federation!r}"
        )
    return order, signed_digest(signed, ORDER_KIND)
