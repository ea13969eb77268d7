"""Who is reachable, who was turned away, and what was last pushed to whom.

Work is level-triggered: after every change the coordinator offers each connected party what it is wanted for now, and
a session passes on what differs from what it passed on before. So a reconnect, or a restart of either side, loses
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..communication.generated import federation_pb2
from .flows import Flows
from .offers import offer_for
from .round_row import RoundRow

LOG = logging.getLogger("sotto.aggregator")


@dataclass
class Session:
    """One open stream of assignments to a party."""

    party: str
    session_id: str
    queue: asyncio.Queue[federation_pb2.Assignment | None] = field(default_factory=asyncio.Queue)
    sent: dict[tuple[str, int], str] = field(default_factory=dict)


class Sessions:
    """The open streams of assignments, at most one a party: a newer one ends the older. And in `flows` those that carry
    what is asked for."""

    def __init__(self) -> None:
        self.flows = Flows()
        self._open: dict[str, Session] = {}
        self._refused: dict[str, str] = {}
        self._sequence = 0

    @property
    def connected(self) -> frozenset[str]:
        """Names of the parties with an open stream."""
        return frozenset(self._open)

    @property
    def refused(self) -> Mapping[str, str]:
        """Parties that were turned away when they last joined: name → why, for everybody to read."""
        return self._refused

    def refuse(self, party: str, why: str) -> None:
        """Remember why a party was turned away, for those who wait for it; until it opens a stream."""
        self._refused[party] = why

    def open(self, party: str, session_id: str) -> Session:
        """Begin a stream to a party."""
        self._refused.pop(party, None)
        older = self._open.get(party)
        if older is not None:
            older.queue.put_nowait(None)
        session = Session(party, session_id)
        self._open[party] = session
        LOG.info("party %s is connected (session %s)", party, session_id)
        return session

    def close(self, session: Session) -> None:
        """End a stream; a newer one of the same party stays."""
        if self._open.get(session.party) is session:
            del self._open[session.party]
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
