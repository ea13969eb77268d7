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
    keeps: int = 0,
    now: float,
    settings: JobSettings,
) -> None:
    """Whether there is a place for one job more of an owner, in the queue and on disk.

    Args:
        model: the SHA-256 (hex) and the size (bytes) of the model that comes with it; None for none.
        keeps: bytes of the models of rounds that it is to keep.
        now: seconds since the epoch.

    Raises:
        LimitError: too many jobs wait already, they have made too many since a day ago, or what comes with it, or what
            it is to keep, does not fit beside what their jobs keep; its metadata name the limit.
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
    if model is None and not keeps:
        return
    sizes = kept_bytes(connection, store=store, blobs=blobs, owner=owner)
    comes = 0 if model is None or model[0] in sizes else model[1]  # the same bytes are one file
    comes_words = f"the model that comes with this one has {comes}" if comes else ""
    keeps_words = f"the models of rounds that it is to keep have {keeps}" if keeps else ""
    check_bytes(
        sum(sizes.values()),
        comes + keeps,
        what=" and ".join(filter(None, (comes_words, keeps_words))),
        most=settings.max_stored_bytes_per_scientist,
        advice=", or keep fewer" if keeps else "",
    )


def check_bytes(kept: int, more: int, *, what: str, most: int, who: str = "your jobs", advice: str = "") -> None:
    """Whether there is room on disk for `more` bytes beside those that a scientist has `kept_bytes` of.

    Args:
        what: is to come, in words.
        most: bytes that one scientist's jobs may keep (limits.max_stored_bytes_per_scientist).
        who: keeps what is kept.
        advice: besides deleting jobs.

    Raises:
        LimitError: there is none.
    """
    if more and kept + more > most:
        raise LimitError(
            f"{who} keep {kept} bytes here, and {what}; at most {most} may lie here "
            f"(limits.max_stored_bytes_per_scientist): delete jobs that you do not need any more{advice}",
            limit="max_stored_bytes_per_scientist",
            at_most=most,
        )


def kept_bytes(connection: Connection, *, store: JobStore, blobs: Blobs, owner: str) -> dict[str, int]:
    """What an owner's jobs keep on disk: sizes (bytes) by SHA-256 (hex)."""
    files, brought = store.kept_for(connection, owner)
    return {**{sha256: _size(blobs, sha256) for sha256 in brought}, **files}


def _size(blobs: Blobs, sha256: str) -> int:
    try:
        return blobs.size(sha256)
    except NotFoundError:  # its job has just ended
        return 0
