"""What no row names any more leaves the disk: all of it when a role starts, and later what one job alone named.

A blob is stored first and named in a row then. Between the two nothing says that somebody needs it, and since blobs are
named by their content, a job's last blob may be another's first. So whoever stores says so while it does (`storing`),
and a blob goes only if, after everybody has ended who was storing when it was looked at, no row names it, and nobody
has stored the same bytes since: that makes another file of it. Rows are written in the database's one thread, in order;
there it is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Set
from typing import Protocol

from sqlalchemy import Connection

from ..errors import SottoError
from .blobs import Blobs, Mark
from .database import Database

LOG = logging.getLogger("sotto.storage")


class Names(Protocol):
    """Which blobs rows name, by SHA-256 (hex)."""

    def blobs(self, connection: Connection) -> Set[str]:
        """All that are needed."""
        ...

    def blobs_of(self, connection: Connection, job_id: str) -> Set[str]:
        """Those that a job named before it was deleted, whoever else may name them."""
        ...


class Leftovers:
    """Removes blobs that no row names. Used from the event loop alone."""

    def __init__(self, database: Database, blobs: Blobs, names: Names) -> None:
        self._database = database
        self._blobs = blobs
        self._names = names
        self._storing: set[asyncio.Future[None]] = set()

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """From before a blob is stored until the row that names it is handed to the database."""
        ended = asyncio.get_running_loop().create_future()
        self._storing.add(ended)
        try:
            yield
        finally:
            self._storing.discard(ended)
            ended.set_result(None)

    async def collect(self) -> int:
        """Before anybody stores: whatever no row names. Returns how many files went."""
        return await asyncio.to_thread(self._blobs.collect, await self._database.run(self._names.blobs))

    async def drop(self, job_id: str) -> None:
        """Of a deleted job: what it alone named, as soon as it is sure that nobody else is about to. What stays because
        something fails, or the process ends, is collected at the next start."""
        try:
            named = await self._database.run(lambda connection: self._names.blobs_of(connection, job_id))
            seen = await asyncio.to_thread(self._seen, named)
            if seen and self._storing:
                await asyncio.wait(set(self._storing))
            gone = await self._database.run(lambda connection: self._remove(connection, seen))
            LOG.info("job %s was deleted, and %d files with it", job_id, gone)
        except (SottoError, OSError) as error:
            LOG.warning("what job %s left is collected at the next start: %s", job_id, error)

    def _seen(self, digests: Set[str]) -> dict[str, Mark]:
        marks = {sha256: self._blobs.mark(sha256) for sha256 in sorted(digests)}
        return {sha256: mark for sha256, mark in marks.items() if mark is not None}

    def _remove(self, connection: Connection, seen: dict[str, Mark]) -> int:
        if not seen:
            return 0
        named = self._names.blobs(connection)
        return sum(self._blobs.remove(sha256, mark) for sha256, mark in seen.items() if sha256 not in named)
