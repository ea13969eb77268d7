"""Signing a job before it is submitted: what makes it the scientist's, and nobody else's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .communication.generated.common_pb2 import Signed
    from .communication.generated.jobs_pb2 import Job
    from .protocol.signing import SigningKey

ORDER_VALID_S: Final = 30 * 86_400.0
"""How long rounds may begin for a job that sets no timeout: it may have to wait for its turn, and for the parties."""
CLOCKS_S: Final = 3600.0
"""By so much clocks may differ: an order outlives the timeout of its job by it."""


@dataclass(frozen=True, slots=True)
class JobSigner:
    """Who signs jobs.

    Attributes:
        federation: whose roster has the key.
        name: of the scientist in it, or "operator".
        key: theirs, or the file that it is in, read when it is needed.
    """

    federation: str
    name: str
    key: SigningKey | Path

    def sign(self, job: Job, request_id: str, *, now: float | None = None) -> Signed:
        """The signed order for a job, which is good until the job's timeout is over, or for `ORDER_VALID_S`.

        Args:
            now: seconds since the epoch; by this machine's clock where it is None.

        Raises:
            InvalidInput: the job would not be accepted; every violation by its field's path.
            KeyMaterialError: there is no signing key in the file.
        """
        from .communication.messages import signed_to_proto
        from .errors import KeyMaterialError
        from .jobs.orders import order_of
        from .protocol.order import order_time, sign_order
        from .protocol.signing import SigningKey

        valid_s = job.timeout.ToNanoseconds() / 1e9 + CLOCKS_S if job.HasField("timeout") else ORDER_VALID_S
        expires_at = order_time((time.time() if now is None else now) + valid_s)
        order = order_of(
            job, federation=self.federation, scientist=self.name, request_id=request_id, expires_at=expires_at
        )
        try:
            key = SigningKey.load(self.key) if isinstance(self.key, Path) else self.key
        except OSError as error:
            raise KeyMaterialError(f"cannot read the signing key {self.key}: {error.strerror}") from error
        return signed_to_proto(sign_order(order, key))
