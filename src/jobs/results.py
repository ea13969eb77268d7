"""The files of a job's result, and of a released round's; when there are any to come, or to delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import NotFoundError, StateError
from ..text import shown
from .artifact import NOT_YET
from .states import JobRow, JobState
from .views import Artifact


def result_of(row: JobRow) -> dict[str, Any]:
    """A job's own result.

    Raises:
        NotFoundError: its files were deleted.
        StateError: it has none (yet).
    """
    if row.state is not JobState.SUCCEEDED:
        raise StateError(f"job {row.job_id} is {row.state.value}: {NOT_YET}", state=row.state.value)
    if row.deleted_at:
        raise NotFoundError(f"the files of job {row.job_id} were deleted", job_id=row.job_id)
    return row.result or {}


def file_in(job_id: str, result: Mapping[str, Any], name: str, *, sha256: str = "") -> Artifact:
    """A file of a result.

    Args:
        sha256: which one has to be (hex); empty: whichever has this name.

    Raises:
        NotFoundError: there is no such file, or it is another one by now.
    """
    files = {entry["name"]: entry for entry in result.get("files", ())}
    if name not in files:
        raise NotFoundError(f"job {job_id} has no file {shown(name)}; it has: {', '.join(sorted(files))}", file=name)
    if sha256 and files[name]["sha256"] != sha256:
        raise NotFoundError(f"{shown(name)} of job {job_id} is another one by now: the job has moved on", file=name)
    return Artifact(name, int(files[name]["bytes"]), str(files[name]["sha256"]))


def check_has_one_coming(row: JobRow, *, kept: bool) -> None:
    """A job that is being cancelled ends with a result where that was `kept` by whoever stopped it first.

    Raises:
        StateError: it will have none.
    """
    if not kept:
        raise StateError(
            f"job {row.job_id} is being stopped already, without keeping its last round as its result; what it has "
            "released can be had by its round all the same",
            job_id=row.job_id,
        )


def check_at_rest(row: JobRow) -> None:
    """Files of a job are deleted once nothing more can be added to them. Raises StateError before."""
    if not row.at_rest:
        state = row.state.value
        raise StateError(f"job {row.job_id} is {state}: only a job at rest is deleted; cancel it first", state=state)
