"""What does not get on at the moment, each said once until it changes: a disk that is full for an hour is two lines."""

from __future__ import annotations

import logging
from typing import Final

from ..errors import PASSING, SottoError, meaning
from ..logs import Seldom

LOG = logging.getLogger("sotto.aggregator")

MOST_KNOWN: Final = 256
"""Of more the oldest are forgotten: of a job that ended in trouble nobody says that it is over."""


class Troubles:
    """Troubles by what they are in the way of: the reason of one that may pass, the whole text of another."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._told: set[str] = set()
        self._seldom = Seldom(LOG)

    def note(self, what: str, error: Exception) -> None:
        """`what` failed, and will be tried again.

        An error that may pass (`errors.PASSING`: a database that is restarted, a full disk) is one line, whatever else
        it keeps from getting on; of another the way through the code stands below, the first time that it is this one.
        What comes and goes, as room on a full disk does, is one line a minute.
        """
        passing = isinstance(error, PASSING)
        text = f"{meaning(error).reason}: {error.message}" if isinstance(error, SottoError) else repr(error)
        trouble = meaning(error).reason if passing else text
        if self._known.get(what) == trouble:
            return
        said = passing and trouble in self._known.values()
        self._known.pop(what, None)
        self._known[what] = trouble
        if len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        if said:
            LOG.debug("nor does %s get on: %s", what, text)
            return
        extra = {"private": error.private} if isinstance(error, PASSING) and error.private else {}
        cause = None if passing else error
        key = trouble if passing else (what, trouble)
        saying = "%s does not get on, and is tried again: %s"
        if self._seldom.log(logging.ERROR, key, saying, what, text, exc_info=cause, extra=extra):
            self._told = {trouble, *self._told.intersection(self._known.values())}

    def over(self, what: str) -> None:
        """`what` went well, or is not wanted any more; what was said once is over when all that it was said of is."""
        trouble = self._known.pop(what, None)
        if trouble in self._told and trouble not in self._known.values():
            self._told.discard(trouble)
            LOG.info("%s gets on again", what)
