"""What ε a ledger's events come to, against whom, and what each figure rests on: the one place that makes the words.

An event is charged at the guaranteed noise, and says of whose hands that is (`events.Shares`). From this follows what
is left of it against the aggregator, which knows the noise that it drew itself, and what is left if everybody else
colludes: one share, the party's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final, Literal

from .accounting import epsilon
from .events import DpSgdSteps, Event, NoisySum, NonPrivate, SampledNoisySum, Shares, Unit

Against = Literal["release", "aggregator", "all_others"]
"""Whoever sees the release; the aggregator, which knows the noise that it drew itself; the aggregator and all other
parties together, who can subtract everything but one party's contribution."""

AGAINST: Final[dict[Against, str]] = {
    "release": "whoever sees the release",
    "aggregator": "the aggregator",
    "all_others": "the aggregator and all other parties together",
}
EVERYBODY: Final = "everybody, the aggregator and the other parties included"
NOT_ONLY_THE_RELEASE: Final = "whoever sees the release, the aggregator included"
TRUSTED: Final = "everybody but the aggregator, which is trusted with the exact sums"
UNLESS_TRUSTED: Final = "everybody, the aggregator included unless the job called it trusted"
REASONS: Final[dict[Against, str]] = {
    "release": "no noise at party level",
    "aggregator": "the aggregator can know the exact sum",
    "all_others": "the aggregator and all other parties together can know the exact update",
}
"""Why ε is infinite."""

NO_NOISE: Final = "nothing: there is no noise"
OWN_NOISE: Final = "nothing of the others: the party adds the noise itself, before anything leaves it"
UNKNOWN: Final = "unknown: the ledger does not say who drew the noise (an entry of an earlier version)"
NOTHING_YET: Final = "nothing: nothing was spent"
JOINT: Final = " / "
"""Between what events of several kinds rest on, where one figure is of all of them; in none of these texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One ε, and what it rests on.

    Attributes:
        epsilon: at `delta`; infinite where nothing is guaranteed.
        delta: in (0, 1).
        unit: whom it protects.
        against: from whom, in words.
        assumes: what has to hold for it, in words; encryption and custody of keys, which hide all but the sum, are
            assumed by all but the figure against all others.
    """

    epsilon: float
    delta: float
    unit: Unit
    against: str
    assumes: str


def assumption(shares: Shares | None, against: Against, *, sampled: bool = False) -> str:
    """What a figure of noise on a sum rests on, in words.

    Args:
        shares: of whose hands the noise is; None: there is none.
        sampled: the sum is over secret Poisson samples.
    """
    if shares is None:
        return NO_NOISE
    may = f"up to {shares.colluders}" if shares.colluders else "none"
    own = "the aggregator added its noise and keeps it to itself"
    honest = (
        f"of every {shares.quorum} contributions at least {shares.honest} carry an honest noise share, whoever "
        f"else contributes; {may} of them may collude"
    )
    drawn = {"both": f"{honest}; {own}", "parties": honest, "aggregator": own}[shares.noise_by]
    if against == "aggregator":
        drawn = honest if shares.share_multiplier else "nothing: the aggregator drew all the noise and is trusted"
    if against == "all_others":
        drawn = "the party's own noise share alone" if shares.share_multiplier else "nothing: the party drew no noise"
    secret = "; each party keeps secret which of its rows were sampled" if sampled else ""
    return drawn if drawn.startswith("nothing") else drawn + secret


def not_above_root(square: Fraction, near: float) -> float:
    """`near`, or the next float below it whose square is at most `square`: what is claimed is never rounded up."""
    while Fraction(near) ** 2 > square:
        near = math.nextafter(near, 0.0)
    return near


def charged_to(event: NoisySum | SampledNoisySum) -> Against:
    """Against whom an event is charged: a sum that hides a party against the release; one that hides a row against the
    aggregator too, unless that is the trusted server which draws all the noise."""
    trusted = event.shares is not None and event.shares.noise_by == "aggregator"
    return "release" if isinstance(event, NoisySum) or trusted else "aggregator"


def left_against(event: Event, against: Against) -> Event:
    """What is left of an event's guarantee against the aggregator, or all others: that of the noise it does not know.

    Never more than what is charged ("release" gives the event itself). Without noise of which it is known to be the
    parties', nothing is.
    """
    if against == "release" or not isinstance(event, NoisySum | SampledNoisySum):
        return event
    shares = event.shares
    if shares is None or not shares.share_multiplier:
        return NonPrivate(unit=event.unit, reason=REASONS[against])
    if against == "all_others":
        return replace(event, noise_multiplier=min(event.noise_multiplier, shares.share_multiplier), tau=0.0)
    together = min(event.noise_multiplier, shares.share_multiplier * math.sqrt(shares.honest))
    together = not_above_root(shares.honest * Fraction(shares.share_multiplier) ** 2, together)
    return replace(event, noise_multiplier=together, tau=shares.shares_tau)


def counted(event: Event, against: Against) -> Event:
    """What a budget counts of an event.

    Args:
        against: "release": the event as it is charged. "aggregator": what is left of it against the aggregator: noise
            that it drew itself, or of which an entry does not say who drew it, is none.
    """
    by_parties = isinstance(event, SampledNoisySum) and event.shares is not None and event.shares.share_multiplier
    return event if by_parties else left_against(event, against)  # a row is charged for the parties' noise already


def figures(
    events: Iterable[Event], *, unit: Unit, delta: float, counts: Against = "release"
) -> tuple[Figure, Figure, Figure]:
    """ε of all `events` as they are counted, against the aggregator, and if all others collude, in this order.

    Args:
        events: of one unit.
        unit: theirs; the figures of no events have it too.
        delta: in (0, 1).
        counts: against whom their budget counts (`counted`).

    Raises:
        InvalidInput: δ out of range, or events of several units.
    """
    spent = list(events)

    def figure(against: Against) -> Figure:
        return Figure(
            epsilon=epsilon([left_against(event, against) for event in spent], delta=delta),
            delta=delta,
            unit=unit,
            against=AGAINST[against],
            assumes=_assumes(spent, against),
        )

    budgeted = Figure(
        epsilon=epsilon([counted(event, counts) for event in spent], delta=delta),
        delta=delta,
        unit=unit,
        against=_against(spent, unit, counts),
        assumes=_assumes(spent, counts),
    )
    return budgeted, figure("aggregator"), figure("all_others")


def _joined(texts: Iterable[str]) -> str:
    return JOINT.join(dict.fromkeys(texts))


def _against(events: Sequence[Event], unit: Unit, counts: Against) -> str:
    """Against whom what is counted holds."""
    if unit == "party":
        return AGAINST["release"] if counts == "release" else NOT_ONLY_THE_RELEASE
    return against_of_rows(*(event.shares for event in events if isinstance(event, SampledNoisySum)), counts=counts)


def against_of_rows(*sums: Shares | None, counts: Against = "release") -> str:
    """Against whom the counted figure of rows holds: only whom each of its parts holds against.

    Args:
        sums: of whose hands the noise on each sum over samples is; beside them, what holds against everybody.
        counts: as of `figures`; what counts against the aggregator holds against it.
    """
    if not sums:
        return EVERYBODY
    drawn = [shares.noise_by for shares in sums if shares is not None]
    by_parties = [each.colluders for each in sums if each is not None and each.noise_by != "aggregator"]
    whom = "everybody, the aggregator included"
    if counts == "release" and "aggregator" in drawn:
        whom = TRUSTED
    elif counts == "release" and None in sums:
        whom = UNLESS_TRUSTED
    if not by_parties:
        return whom
    colluders = min(by_parties)
    most = {0: "the other parties do not collude", 1: "at most 1 other party colludes"}
    return f"{whom}, as long as {most.get(colluders, f'at most {colluders} other parties collude')}"


def _assumes(events: Sequence[Event], against: Against) -> str:
    return _joined(_rests_on(event, against) for event in events) or NOTHING_YET


def _rests_on(event: Event, against: Against) -> str:
    if isinstance(event, DpSgdSteps):
        return OWN_NOISE if event.noise_multiplier else NO_NOISE
    if isinstance(event, NonPrivate):
        return NO_NOISE
    if event.shares is None:
        return UNKNOWN
    return assumption(
        event.shares, charged_to(event) if against == "release" else against, sampled=isinstance(event, SampledNoisySum)
    )
