"""Who may have jobs run here: those whose orders verify under the roster, and nobody else unless policy says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ..communication.identity import Identity
from ..errors import DeadlineError, PolicyError
from ..jobs.orders import check_order
from ..jobs.specs import JobSpec
from ..jobs.states import JobRow
from ..protocol.order import open_order
from ..protocol.roster import Roster
from ..protocol.signing import Signed

UNSIGNED: Final = (
    "this aggregator takes no job that nobody signed (policy.allow_unsigned_jobs), and the parties have a policy of "
    "their own: a scientist's kit has a signing key, which client.yaml names (keys: {signing_key: signing.key})"
)


class OrderDesk:
    """Looks at the order that comes with a job.

    Args:
        roster: gives the one in force.
        allow_unsigned: jobs without an order are taken too.
        clock: seconds since the epoch.
    """

    def __init__(
        self, roster: Callable[[], Roster], *, allow_unsigned: bool, clock: Callable[[], float] = time.time
    ) -> None:
        self._roster = roster
        self._allow_unsigned = allow_unsigned
        self._clock = clock

    def check(self, signed: Signed | None, *, spec: JobSpec, caller: Identity, request_id: str) -> None:
        """Return if a job may be taken.

        Args:
            signed: the order that came with it; None where none did.
            spec: of the job.
            caller: who handed it in; request_id: under which.

        Raises:
            PolicyError: it has none, and is not taken without.
            SignatureError: the order is signed by nobody who may.
            InvalidInput: it is not an order, or not one for this job.
        """
        if signed is None:
            if not self._allow_unsigned:
                raise PolicyError(UNSIGNED)
            return
        order, _ = open_order(signed, self._roster())
        check_order(order, spec=spec, caller=caller, request_id=request_id, now=self._clock())


def order_in_force(job: JobRow, roster: Roster, *, now: float) -> tuple[Signed | None, str]:
    """The order that the next round of a job rests on, and its digest; None and "" where nobody signed for the job.

    Raises:
        SignatureError, InvalidInput: whoever changed the row has no scientist's key.
        DeadlineError: it has expired: no party would begin a round.
    """
    if not job.signed_order:
        return None, ""
    signed = Signed.from_text(job.signed_order)
    order, digest = open_order(signed, roster)
    if now > order.expires:
        raise DeadlineError(f"the order that {order.scientist} signed for this job expired at {order.expires_at}")
    return signed, digest
