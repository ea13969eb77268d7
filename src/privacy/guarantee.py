"""Whether a mechanism guarantees anything at all, and the one rule on who may run one that does not. Pure."""

from __future__ import annotations

from typing import Final

from ..errors import PolicyError
from .accounting import epsilon
from .events import Event

LARGEST_EPSILON: Final = 700.0
"""Above it e^ε, by which the odds may change, is no double any more: such an ε counts as infinite."""


def guarantees_nothing(event: Event, *, delta: float) -> bool:
    """Whether ε of `event` at `delta` is infinite: no noise, next to none, or a δ that its failures use up.

    Raises:
        InvalidInput: δ out of range.
    """
    return not epsilon([event], delta=delta) <= LARGEST_EPSILON


def check_guarantee(event: Event, *, delta: float, allow_without_dp: bool) -> None:
    """Raise PolicyError for a mechanism without a guarantee, unless the owner of the rows allows it.

    Args:
        event: of a row.
        delta: in (0, 1).
        allow_without_dp: `policy.allow_without_dp` of whoever has the rows.

    Raises:
        PolicyError: it guarantees nothing, and the policy does not allow that.
        InvalidInput: δ out of range.
    """
    if not allow_without_dp and guarantees_nothing(event, delta=delta):
        raise PolicyError(
            "nothing is trained here without differential privacy (policy.allow_without_dp): of a row ε would be ∞"
        )
