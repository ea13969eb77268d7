"""What does not get on at the moment, each said once until it changes: a disk that is full for an hour is two lines."""

from __future__ import annotations

import logging
from typing import Final

from ..errors import SottoError, meaning

LOG = logging.getLogger("sotto.aggregator")

MOST_KNOWN: Final = 256
"""Of more the oldest are forgotten: of a job that ended in trouble nobody says that it is over."""


class Troubles:
    """Troubles by what they are in the way of."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def note(self, what: str, error: Exception) -> None:
        """`what` failed, and will be tried again. With the error's way through the code the first time that it is this
        one."""
        text = f"{meaning(error).reason}: {error.message}" if isinstance(error, SottoError) else repr(error)
        if self._known.get(what) != text:
            self._known.pop(what, None)
            self._known[what] = text
            if len(self._known) > MOST_KNOWN:
                del self._known[next(iter(self._known))]
            LOG.error("%s does not get on, and is tried again: %s", what, text, exc_info=error)

    def over(self, what: str) -> None:
        """`what` went well, or is not wanted any more."""
        if self._known.pop(what, None) is not None:
            LOG.info("%s gets on again", what)
