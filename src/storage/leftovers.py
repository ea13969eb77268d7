"""What nobody needs any more leaves the disk: all of it when a role starts, and later what a deleted job, a round that
has ended or a unit of work lets go.

A blob is stored first and named in a row then. Between the two nothing says that somebody needs it, and since blobs are
named by their content, a job's last blob may be another's first. So whoever stores says so while it does (`storing`),
whoever works with a blob that no row names says which (`using`), and a blob goes only if, after everybody has ended who
was storing when it was looked at, no row names it, nobody uses it, and nobody has stored the same bytes since: that
makes another file of it. Rows are written in the database's one thread, in order; there it is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from typing import Final, Protocol

from sqlalchemy import Connection

from ..errors import SottoError
from .blobs import Blobs, Mark
from .database import Database

LOG = logging.getLogger("sotto.storage")

FEW: Final = 64
"""Blobs that are asked about by name; of more, all that are needed are read instead."""


class Names(Protocol):
    """Which blobs rows name, by SHA-256 (hex)."""

    def blobs(self, connection: Connection, *, among: Set[str] | None = None) -> Set[str]:
        """All that are needed, or at least those of these: so that who asks about a few reads about a few."""
        ...


class JobNames(Names, Protocol):
    """The same, where jobs are deleted."""

    def blobs_of(self, connection: Connection, job_id: str) -> Set[str]:
        """Those that a job named before it was deleted, whoever else may name them."""
        ...


class BlobUses:
    """Who needs which blobs, and the removal of those that nobody does. Used from the event loop alone.

    Args:
        database: where the rows are.
        blobs: the role's store.
        names: which of them rows name.
    """

    def __init__(self, database: Database, blobs: Blobs, names: Names) -> None:
        self._database = database
        self._blobs = blobs
        self._names = names
        self._storing: set[asyncio.Future[None]] = set()
        self._used: Counter[str] = Counter()
        self._leaving: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """From before a blob is stored until the row that names it is handed to the database, or somebody says that
        it is used. Nothing leaves the disk meanwhile: not to be held while somebody else may take as long as they like.
        """
        ended = asyncio.get_running_loop().create_future()
        self._storing.add(ended)
        try:
            yield
        finally:
            self._storing.discard(ended)
            ended.set_result(None)

    @contextlib.contextmanager
    def using(self, *digests: str) -> Iterator[None]:
        """While somebody works with blobs that no row may name; from before they are fetched, or while they are sure to
        be there. What they let go at the end is removed, as soon as nobody else needs it."""
        self.hold(*digests)
        try:
            yield
        finally:
            self.release(*digests)

    def hold(self, *digests: str) -> None:
        """The beginning of `using`, for whoever does not know yet when it ends: `release` is the end, once."""
        self._used.update(digests)

    def release(self, *digests: str) -> None:
        """The end of what `hold` began."""
        self._used.subtract(digests)
        self._used += Counter()  # drops what is at 0
        self.let_go(digests)

    async def collect(self) -> int:
        """Before anybody stores: whatever no row names. Returns how many files went."""
        return await asyncio.to_thread(self._blobs.collect, await self._database.run(self._names.blobs))

    def let_go(self, digests: Iterable[str]) -> None:
        """Somebody needs these no more: what nobody else needs goes, beside whatever the caller does next. What stays
        because something fails, or the process ends, is collected at the next start."""
        wanted = frozenset(digests) - {""}
        if wanted:
            task = asyncio.get_running_loop().create_task(self._leave(wanted))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def settled(self) -> None:
        """Once all that was let go by now is gone, or known to be needed."""
        await asyncio.gather(*self._leaving)

    async def _leave(self, digests: Set[str]) -> None:
        try:
            await self._remove_unless_needed(digests)
        except (SottoError, OSError) as error:
            LOG.warning("what nobody needs any more is collected at the next start: %s", error)

    async def _remove_unless_needed(self, digests: Set[str]) -> int:
        seen = await asyncio.to_thread(self._seen, digests)
        if seen and self._storing:
            await asyncio.wait(set(self._storing))
        # Who begins to use one of these later stores it first, which makes another file of it.
        left = {sha256: mark for sha256, mark in seen.items() if not self._used[sha256]}
        return await self._database.run(lambda connection: self._remove(connection, left))

    def _seen(self, digests: Set[str]) -> dict[str, Mark]:
        marks = {sha256: self._blobs.mark(sha256) for sha256 in sorted(digests)}
        return {sha256: mark for sha256, mark in marks.items() if mark is not None}

    def _remove(self, connection: Connection, seen: dict[str, Mark]) -> int:
        if not seen:
            return 0
        named = self._names.blobs(connection, among=seen.keys() if len(seen) <= FEW else None)
        return sum(self._blobs.remove(sha256, mark) for sha256, mark in seen.items() if sha256 not in named)


class Leftovers(BlobUses):
    """The same for a role whose jobs are deleted."""

    _names: JobNames

    def __init__(self, database: Database, blobs: Blobs, names: JobNames) -> None:
        super().__init__(database, blobs, names)

    async def drop(self, job_id: str) -> None:
        """Of a deleted job: what it alone named, as soon as it is sure that nobody else is about to. What stays because
        something fails, or the process ends, is collected at the next start."""
        try:
            named = await self._database.run(lambda connection: self._names.blobs_of(connection, job_id))
            gone = await self._remove_unless_needed(named)
            LOG.info("job %s was deleted, and %d files with it", job_id, gone)
        except (SottoError, OSError) as error:
            LOG.warning("what job %s left is collected at the next start: %s", job_id, error)
