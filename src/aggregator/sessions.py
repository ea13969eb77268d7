"""Who is reachable, who was turned away, and what was last pushed to whom.

Work is level-triggered: after every change the coordinator offers each connected party what it is wanted for now, and
a session passes on what differs from what it passed on before. So a reconnect, or a restart of either side, loses
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from ..communication.generated import federation_pb2
from ..communication.validity import ends_soon
from ..errors import TwinError
from ..logs import Seldom
from .flows import Flows
from .offers import offer_for
from .round_row import RoundRow

LOG = logging.getLogger("sotto.aggregator")

AWAY_S: Final = 30.0
"""After so long without a stream a party is away: a round that has its quorum goes on without it. A party that is
started again, or whose line breaks, is back within some seconds: its workers import torch meanwhile."""

TWIN_SHOWN_S: Final = 300.0
"""How long after it last asked a second process of a party is shown: it asks every few seconds while it lives."""


@dataclass
class Session:
    """One open stream of assignments to a party, from its process `session_id` at `host`, since `since` (seconds)."""

    party: str
    session_id: str
    host: str = ""
    since: float = 0.0
    queue: asyncio.Queue[federation_pb2.Assignment | None] = field(default_factory=asyncio.Queue)
    sent: dict[tuple[str, int], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Twin:
    """A process that asked for a party's place while another one had it: from where, how often, and when last."""

    host: str
    times: int
    last: float


class Sessions:
    """The open streams of assignments, at most one a party. A newer one of the same process ends the older; one of
    another process is refused for as long as the older lives: two that threw each other out would do so for ever, and
    neither would ever finish a round. And in `flows` those that carry what is asked for."""

    def __init__(
        self, clock: Callable[[], float] = time.time, *, stopwatch: Callable[[], float] = time.monotonic
    ) -> None:
        self.flows = Flows()
        self._clock, self._stopwatch = clock, stopwatch
        self._began = stopwatch()
        self._gone: dict[str, float] = {}
        self._open: dict[str, Session] = {}
        self._refused: dict[str, str] = {}
        self._twins: dict[str, _Twin] = {}
        self._certificates: dict[str, bytes] = {}
        self._seldom = Seldom(LOG)
        self._sequence = 0

    @property
    def connected(self) -> frozenset[str]:
        """Names of the parties with an open stream."""
        return frozenset(self._open)

    def away(self, parties: Iterable[str]) -> frozenset[str]:
        """Which of these have had no stream for `AWAY_S`: since their last one ended, or since this process began."""
        latest = self._stopwatch() - AWAY_S
        return frozenset(
            name for name in parties if name not in self._open and self._gone.get(name, self._began) <= latest
        )

    @property
    def refused(self) -> Mapping[str, str]:
        """Parties that were turned away when they last joined: name → why, for everybody to read."""
        return self._refused

    def refuse(self, party: str, why: str) -> None:
        """Remember why a party was turned away, for those who wait for it; until it opens a stream."""
        self._refused[party] = why

    def check_place(self, party: str, session_id: str, *, host: str = "") -> None:
        """Whether a process may have a party's place.

        Args:
            session_id: of the process, made at its start.
            host: from where it asks.

        Raises:
            TwinError: another process has it, whose connection is alive as far as is known: gRPC's keepalive ends one
                that does not answer (`options.server_options`).
        """
        holder = self._open.get(party)
        if holder is None or holder.session_id == session_id:
            return
        known = self._twins.get(party, _Twin(host, 0, 0.0))
        self._twins[party] = replace(known, host=host, times=known.times + 1, last=self._clock())
        here = f" ({_at(holder.host)}since {_utc(holder.since)})"
        self._seldom.log(
            logging.WARNING,
            ("twin", party),
            "another process %suses the kit of party %s, and is refused while the first one%s lives",
            _at(host),
            party,
            here,
        )
        raise TwinError(
            f"another process uses the kit of party {party}{here}: stop one of the two; if nobody of yours started it, "
            "tell your operator that the kit was copied; if it was this party before a cut, its place is free as "
            "soon as its connection is known to be dead",
            party=party,
        )

    def warnings(self, party: str) -> tuple[str, ...]:
        """What somebody should look at, a sentence each: a second process that asked for a party's place of late, a
        certificate that ends soon. Every scientist reads it: addresses are for the log."""
        said = [ends_soon(self._certificates.get(party, b""))]
        twin = self._twins.get(party)
        if twin is not None and self._clock() - twin.last <= TWIN_SHOWN_S:
            said.append(f"another process uses the same kit: refused {twin.times} times, last at {_utc(twin.last)}")
        return tuple(filter(None, said))

    def shown(self, party: str, certificate: bytes) -> None:
        """Remember the certificate (PEM) that a party came with; empty without TLS."""
        self._certificates[party] = certificate
        ends = ends_soon(certificate)
        if ends:
            self._seldom.log(logging.WARNING, ("certificate", party), "%s", ends)

    def open(self, party: str, session_id: str, *, host: str = "") -> Session:
        """Begin a stream to a party. Raises TwinError: see `check_place`."""
        self.check_place(party, session_id, host=host)
        self._refused.pop(party, None)
        older = self._open.get(party)
        if older is not None:
            older.queue.put_nowait(None)
        session = Session(party, session_id, host, self._clock())
        self._open[party] = session
        LOG.info("party %s is connected (session %s)", party, session_id)
        return session

    def close(self, session: Session) -> None:
        """End a stream; a newer one of the same party stays."""
        if self._open.get(session.party) is session:
            del self._open[session.party]
            self._gone[session.party] = self._stopwatch()
            LOG.info("party %s is gone", session.party)

    def close_all(self) -> None:
        """End every stream (shutdown)."""
        for session in self._open.values():
            session.queue.put_nowait(None)

    def offer(self, party: str, rows: Sequence[RoundRow]) -> None:
        """Push what the party is wanted for in these rounds and has not been sent on its present stream."""
        session = self._open.get(party)
        if session is None:
            return
        found = {(row.job_id, row.number): offer_for(row, party) for row in rows}
        offers = {key: offer for key, offer in found.items() if offer is not None}
        for key, (identity, message) in offers.items():
            if session.sent.get(key) == identity:
                continue
            session.sent[key] = identity
            self._sequence += 1
            message.sequence = self._sequence
            session.queue.put_nowait(message)
        for key in [key for key in session.sent if key not in offers]:
            del session.sent[key]


def _at(host: str) -> str:
    return f"at {host} " if host else ""


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
