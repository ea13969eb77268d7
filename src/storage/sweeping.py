"""What no row names and nobody uses leaves the disk while a role runs, whoever left it there.

Who stores something lets it go again where nothing comes of it (`trying`). What that misses, a caller that went away in
the wrong moment or a worker that died in the middle of a file, is found by looking at everything: when somebody has
ended of whom files may be left, and every few minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from ..errors import SottoError
from .blobs import Blobs
from .leftovers import BlobUses

LOG = logging.getLogger("sotto.storage")

SWEEP_EVERY_S: Final = 300.0
"""How long something may lie there that was left behind by whoever does not say so."""
SWEEP_PAUSE_S: Final = 2.0
"""Between two sweeps, however often one is asked for: each reads what all jobs at hand name."""


@contextlib.contextmanager
def trying(uses: BlobUses) -> Iterator[set[str]]:
    """From before something is stored that somebody sent until the row that names it is handed to the database. What
    was added to the set goes at once if an error, or whoever goes away, ends the block before."""
    stored: set[str] = set()
    try:
        with uses.storing():
            yield stored
    except BaseException:
        uses.let_go(stored)  # where a row names it all the same, it stays
        raise


class Sweeper:
    """Looks at everything in a store. Used from the event loop alone.

    Args:
        uses: who needs what.
        blobs: the store.
        every_s, pause_s: seconds between two looks, at most and at least.
    """

    def __init__(
        self, uses: BlobUses, blobs: Blobs, *, every_s: float = SWEEP_EVERY_S, pause_s: float = SWEEP_PAUSE_S
    ) -> None:
        self._uses = uses
        self._blobs = blobs
        self._every_s = every_s
        self._pause_s = pause_s
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        """Somebody has ended of whom files may be left."""
        self._wanted.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                await self.sweep()
            except (SottoError, OSError) as error:
                LOG.warning("what nobody needs any more is looked for again later: %s", error)
            await asyncio.sleep(self._pause_s)

    async def sweep(self) -> None:
        """Remove what no row names and nobody uses or is about to name, and parts of files that nobody writes."""
        parts = await asyncio.to_thread(self._blobs.remove_abandoned)
        if parts:
            LOG.info("%d files were left half-written by processes that are gone", parts)
        self._uses.let_go(await asyncio.to_thread(self._blobs.digests))
        await self._uses.settled()
