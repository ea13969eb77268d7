"""What one scientist may leave with an aggregator: so many jobs a day, and so many bytes until they are deleted.

Jobs stay in the database for ever, whatever became of them, and their files until somebody deletes them. Whoever may
submit could fill the disk with both, without anybody being asked for a budget.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from ..errors import LimitError, NotFoundError
from ..storage.blobs import Blobs
from .admission import JobSettings, check_room
from .states import JobState, utc
from .store import JobStore

DAY_S: Final = 86_400.0


def check_place(
    connection: Connection,
    store: JobStore,
    blobs: Blobs,
    *,
    owner: str,
    model: tuple[str, int] | None,
    now: float,
    settings: JobSettings,
) -> None:
    """Whether there is a place for one job more of an owner, in the queue and on disk.

    Args:
        model: the SHA-256 (hex) and the size (bytes) of the model that comes with it; None for none.
        now: seconds since the epoch.

    Raises:
        LimitError: too many jobs wait already, they have made too many since a day ago, or the model does not fit
            beside what their jobs keep; its metadata name the limit.
    """
    check_room(store.count(connection, JobState.PENDING), store.pending_of(connection, owner), settings)
    made, most = store.made_since(connection, owner, utc(now - DAY_S)), settings.max_jobs_a_day_per_scientist
    if made >= most:
        raise LimitError(
            f"you have submitted {made} jobs within a day already; at most {most} are taken "
            "(limits.max_jobs_a_day_per_scientist)",
            limit="max_jobs_a_day_per_scientist",
            at_most=most,
        )
    if model is None:
        return
    files, brought = store.kept_for(connection, owner)
    sizes = {**{sha256: _size(blobs, sha256) for sha256 in brought}, **files}
    if model[0] in sizes:
        return  # the same bytes are one file
    kept, room = sum(sizes.values()), settings.max_stored_bytes_per_scientist
    if kept + model[1] > room:
        raise LimitError(
            f"your jobs keep {kept} bytes here, and the model that comes with this one has {model[1]}; at most {room} "
            "may lie here (limits.max_stored_bytes_per_scientist): delete jobs that you do not need any more",
            limit="max_stored_bytes_per_scientist",
            at_most=room,
        )


def _size(blobs: Blobs, sha256: str) -> int:
    try:
        return blobs.size(sha256)
    except NotFoundError:  # its job has just ended
        return 0
