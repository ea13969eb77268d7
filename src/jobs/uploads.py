"""Models that scientists hand in before the job that is to begin with them: by stream, since a message holds few bytes.

They are kept for a while, in memory and on disk: a restart forgets them, and whoever still needs one sends it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from ..communication.generated.common_pb2 import DataChunk
from ..communication.options import MAX_UPLOAD_BYTES
from ..communication.streams import receive_pieces
from ..errors import BusyError, DigestError, InvalidInput, LimitError, NotFoundError
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.leftovers import BlobUses
from ..storage.sweeping import trying
from .admission import JobSettings
from .quotas import check_bytes, kept_bytes
from .specs import JobSpec
from .store import JobStore

MAX_UPLOADS: Final = 8
"""Of one scientist, that wait for a job."""
KEPT_S: Final = 3600.0
"""How long one waits for its job."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One that is kept: its size in bytes, and when it goes (seconds since the epoch)."""

    sha256: str
    size: int
    until: float


class Uploads:
    """What was uploaded, by who did. Used from the event loop alone.

    Args:
        database, store: of the jobs, whose models and files count for the same quota.
        blobs: where the bytes are.
        uses: of the blobs: what is kept here does not leave the disk.
        settings: has the quota.
        clock: seconds since the epoch.
        kept_s: how long an upload waits for its job.
    """

    def __init__(
        self,
        database: Database,
        store: JobStore,
        *,
        blobs: Blobs,
        uses: BlobUses,
        settings: JobSettings,
        clock: Callable[[], float] = time.time,
        kept_s: float = KEPT_S,
    ) -> None:
        self._database = database
        self._store = store
        self._blobs = blobs
        self._uses = uses
        self._settings = settings
        self._clock = clock
        self._kept_s = kept_s
        self._kept: dict[tuple[str, str], Upload] = {}
        self._sending: set[str] = set()

    async def receive(self, owner: str, stream: AsyncIterable[DataChunk]) -> Upload:
        """Take the model that a stream carries; the same again is kept for longer.

        Raises:
            BusyError: another one of this owner's is under way.
            LimitError: it is too large, or too many wait already, or it has no place beside what the owner's jobs keep.
            DigestError, InvalidInput: the stream is not what its first chunk announces.
            StorageError: it cannot be stored.
        """
        if owner in self._sending:
            raise BusyError("another model of yours is being uploaded: one at a time", limit="uploads", at_most=1)
        self._sending.add(owner)
        try:
            return await self._receive(owner, stream)
        finally:
            self._sending.discard(owner)

    async def model_of(self, spec: JobSpec, *, owner: str) -> bytes:
        """The bytes of the model that a job names by its digest; empty where it names none.

        Raises:
            NotFoundError: the owner has neither uploaded it nor a job that keeps it.
        """
        field = spec.digest_field()
        sha256 = str(getattr(spec, field)) if field else ""
        if not sha256 or spec.source_job_id:  # that of a job is looked for there
            return b""
        self.sweep()
        kept = (owner, sha256) in self._kept or sha256 in await self._kept_by_jobs(owner)
        if not kept:
            raise NotFoundError(
                f"no model with the SHA-256 {sha256} is kept for you here: upload it first (UploadModel), and submit "
                "the job within an hour",
                sha256=sha256,
            )
        return await asyncio.to_thread(self._blobs.read, sha256)

    def sweep(self) -> None:
        """Let go what has waited for too long."""
        now = self._clock()
        for key in [key for key, upload in self._kept.items() if upload.until <= now]:
            self._uses.release(self._kept.pop(key).sha256)

    async def _receive(self, owner: str, stream: AsyncIterable[DataChunk]) -> Upload:
        chunks = aiter(stream)
        first = await anext(chunks, None)
        if first is None or len(first.sha256) != 32 or first.offset:
            raise InvalidInput(
                "the first chunk of an upload announces the whole",
                violations={"sha256": "32 bytes, in the first chunk, whose offset is 0"},
            )
        sha256, size = first.sha256.hex(), int(first.total_bytes)
        await self._check_place(owner, sha256, size)
        with await asyncio.to_thread(self._blobs.writer) as writer:
            await receive_pieces(_bodies(first, chunks), writer, size=size)
            with trying(self._uses) as stored:
                stored.add(sha256)
                await asyncio.to_thread(writer.commit, sha256)
                return self._keep(owner, sha256, size)

    async def _check_place(self, owner: str, sha256: str, size: int) -> None:
        if not 0 < size <= MAX_UPLOAD_BYTES:
            raise LimitError(f"a model of {size} bytes; 1 to {MAX_UPLOAD_BYTES} are taken", at_most=MAX_UPLOAD_BYTES)
        self.sweep()
        others = [upload for (whose, _), upload in self._kept.items() if whose == owner and upload.sha256 != sha256]
        if len(others) >= MAX_UPLOADS:
            raise LimitError(
                f"{len(others)} models of yours wait for a job already; at most {MAX_UPLOADS} may, each for an hour",
                limit="uploads",
                at_most=MAX_UPLOADS,
            )
        kept = await self._kept_by_jobs(owner)
        kept |= {upload.sha256: upload.size for upload in others}
        kept.pop(sha256, None)  # the same bytes are one file
        check_bytes(
            sum(kept.values()),
            size,
            what=f"this model has {size}",
            most=self._settings.max_stored_bytes_per_scientist,
            who="your jobs and uploads",
        )

    async def _kept_by_jobs(self, owner: str) -> dict[str, int]:
        return await self._database.run(partial(kept_bytes, store=self._store, blobs=self._blobs, owner=owner))

    def _keep(self, owner: str, sha256: str, size: int) -> Upload:
        if (owner, sha256) not in self._kept:
            self._uses.hold(sha256)
        upload = self._kept[owner, sha256] = Upload(sha256, size, self._clock() + self._kept_s)
        asyncio.get_running_loop().call_later(self._kept_s + 1, self.sweep)
        return upload


async def _bodies(first: DataChunk, chunks: AsyncIterator[DataChunk]) -> AsyncIterator[bytes]:
    """What a stream carries, piece by piece; DigestError where one does not begin at the end of the one before."""
    yield first.data
    position = len(first.data)
    async for chunk in chunks:
        if chunk.offset != position:
            raise DigestError(f"a chunk begins at byte {chunk.offset} where {position} was expected")
        position += len(chunk.data)
        yield chunk.data
