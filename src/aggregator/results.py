"""Released rounds as results: which models stay, and the manifest of one that somebody asks for.

A job that does not come to its end has released models all the same, which were paid for. Any of them that is kept is a
result: its manifest is written when it is asked for, and again when the job has moved on since, as what it states is
what all rounds of the job have cost by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection

from ..errors import InvalidInput, NotFoundError
from ..jobs.keeping import LAST, Keep
from ..jobs.quotas import check_bytes, kept_bytes
from ..jobs.released import Released
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import JobRow, JobState, utc
from ..jobs.store import JobStore
from ..storage.blobs import Blobs
from ..storage.database import Database
from ..storage.leftovers import BlobUses
from ..storage.sweeping import trying
from .accounts import Accounts
from .artifact import MODEL_FILE, released_model, write_artifact
from .early import predecessor
from .federation import Federation
from .pipeline import AggregatorPipeline
from .round_row import RoundRow, RoundState
from .store import RoundStore
from .summary import round_summary


class Results:
    """What the rounds of trainings have released, on disk and with a signature.

    Args:
        most_bytes: that one scientist's jobs may keep.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        database: Database,
        jobs: JobStore,
        rounds: RoundStore,
        accounts: Accounts,
        blobs: Blobs,
        pipeline: AggregatorPipeline,
        federation: Federation,
        leftovers: BlobUses,
        most_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._rounds = rounds
        self._accounts = accounts
        self._blobs = blobs
        self._pipeline = pipeline
        self._federation = federation
        self._leftovers = leftovers
        self._most_bytes = most_bytes
        self._clock = clock
        self._writing = asyncio.Lock()

    # --- as rounds go on; in the caller's transaction -----------------------------------------------------------------

    def released(self, connection: Connection, row: RoundRow) -> None:
        """A round was released: beside the ledger's word on it."""
        result = row.result or {}
        sha256, size = str(result["model_sha256"]), int(result["model_bytes"])
        self._jobs.released.add(connection, row.job_id, row.number, sha256=sha256, size=size)

    def settled(self, connection: Connection, row: RoundRow) -> tuple[set[str], str]:
        """Nothing more will be known of a round. Returns the blobs that its job needs no more, and what there is to say
        of it; empty where everything is as was ordered."""
        if row.state is not RoundState.RELEASED:
            return set(), ""
        metrics = round_summary(row)["metrics"]
        self._jobs.released.set_metrics(connection, row.job_id, row.number, metrics=metrics)
        job = self._jobs.get(connection, row.job_id)
        keep = Keep.from_text(FederatedTrainingSpec.from_json(job.spec).keep)
        gone, lost = self._jobs.released.let_go(
            connection,
            row.job_id,
            keep,
            kept_bytes=lambda: sum(self._kept_bytes(connection, job.owner).values()),
            most_bytes=self._most_bytes,
        )
        if not lost:
            return gone, ""
        numbers = ", ".join(map(str, lost))
        return gone, (
            f"no room is left for what your jobs keep (limits.max_stored_bytes_per_scientist): the model of round "
            f"{numbers} went"
        )

    def keeps(self, connection: Connection, job_id: str) -> bool:
        """Whether a job that is being cancelled ends with what it has released, and what of it is paid for."""
        return self._jobs.keeps(connection, job_id)

    # --- what somebody asks for ---------------------------------------------------------------------------------------

    async def find(self, job: JobRow, choice: str) -> Released:
        """The released round that is meant (`jobs.keeping`), whose model is there.

        Raises:
            InvalidInput: that is no choice, or the job is no training.
            NotFoundError: there is no such round, or its model is there no more.
        """
        return await self._database.run(partial(self._find, job_id=job.job_id, choice=choice))

    def _find(self, connection: Connection, job_id: str, choice: str) -> Released:
        job = self._jobs.get(connection, job_id)
        if job.kind != FederatedTrainingSpec.kind:
            raise InvalidInput(
                f"job {job_id} is of kind {job.kind}: only a {FederatedTrainingSpec.kind} has rounds",
                violations={"round": f"of a {FederatedTrainingSpec.kind}"},
            )
        if job.deleted_at:
            raise NotFoundError(f"the files of job {job_id} were deleted", job_id=job_id)
        return self._jobs.released.find(connection, job_id, choice)

    async def of_round(self, job: JobRow, choice: str, *, as_known: str = "") -> dict[str, Any]:
        """A released round as a result (`jobs.states.JobRow.result`): its model and a signed manifest of all rounds of
        the job by now.

        Args:
            as_known: SHA-256 (hex) of a file of it that the caller knows of: where it still is one, nothing is written
                afresh.

        Raises:
            InvalidInput, NotFoundError: as `find`.
            LimitError: the model whole, with what is not trained, has no place beside what the owner's jobs keep.
            StorageError: the manifest cannot be written.
        """
        async with self._writing:
            job, found, as_of = await self._database.run(partial(self._look, job_id=job.job_id, choice=choice))
            if job.state is JobState.SUCCEEDED and _is_of(job, found):
                return dict(job.result or {})
            if found.result and (found.as_of == as_of or as_known in _files(found.result)):
                return found.result
            with trying(self._leftovers) as made:
                result = await self.write(job, number=found.number)
                made.update(_files(result))
                store = partial(self._store, job_id=job.job_id, number=found.number, result=result, as_of=as_of)
                before = await self._database.run(store)
            self._leftovers.let_go({before})
            return result

    def _look(self, connection: Connection, job_id: str, choice: str) -> tuple[JobRow, Released, str]:
        found = self._find(connection, job_id, choice)
        job, latest = self._jobs.get(connection, job_id), self._rounds.latest(connection, job_id)
        if latest is None:
            raise AssertionError("what was released was a round")
        return job, found, f"{job.state.value} {latest.number} {latest.state.value} {latest.spent} {latest.settled}"

    def _store(self, connection: Connection, job_id: str, number: int, *, result: dict[str, Any], as_of: str) -> str:
        self._find(connection, job_id, str(number))  # it may have been deleted meanwhile
        self._check_place(connection, job_id, number, files=result["files"])
        return self._jobs.released.set_result(connection, job_id, number, result=result, as_of=as_of)

    def _check_place(self, connection: Connection, job_id: str, number: int, *, files: list[dict[str, Any]]) -> None:
        """What is trained of a model was counted as its round was kept; all of it may be a thousand times as large. The
        last model is had in any case, as that of a job that comes to its end."""
        sizes = self._kept_bytes(connection, self._jobs.get(connection, job_id).owner)
        comes = sum(file["bytes"] for file in files if file["name"] == MODEL_FILE and file["sha256"] not in sizes)
        if comes and number != self._find(connection, job_id, LAST).number:
            what = f"all of the model of round {number} has {comes} more"
            check_bytes(sum(sizes.values()), comes, what=what, most=self._most_bytes)

    def _kept_bytes(self, connection: Connection, owner: str) -> dict[str, int]:
        return kept_bytes(connection, store=self._jobs, blobs=self._blobs, owner=owner)

    async def write(self, job: JobRow, *, number: int | None = None) -> dict[str, Any]:
        """The artifact of a training: of a released round, or of the last one where no number is given."""
        spec = FederatedTrainingSpec.from_json(job.spec)
        history = await self._database.run(partial(self._rounds.of_job, job_id=job.job_id))
        continued = await self._continued(spec)
        head = await self._database.run(self._accounts.head)
        model = await self._pipeline.whole_model(spec, *released_model(history, number))
        return await asyncio.to_thread(
            write_artifact,
            job,
            spec,
            history,
            model=model,
            federation=self._federation,
            blobs=self._blobs,
            ledger_head=head,
            created_at=utc(self._clock()),
            number=number,
            continued=continued,
        )

    async def _continued(self, spec: FederatedTrainingSpec) -> list[dict[str, Any]]:
        """The jobs that a specification goes on from, the nearest first."""
        found: list[dict[str, Any]] = []
        while spec.continue_from is not None:
            job_id = spec.continue_from.job_id
            history = await self._database.run(partial(self._rounds.of_job, job_id=job_id))
            found.append(await asyncio.to_thread(predecessor, spec, history))
            job = await self._database.run(partial(self._jobs.get, job_id=job_id))
            spec = FederatedTrainingSpec.from_json(job.spec)
        return found

    # --- a job that goes on from another ------------------------------------------------------------------------------

    async def check_continued(self, spec: FederatedTrainingSpec, source: JobRow | None, *, owner: str) -> None:
        """Refuse a job that goes on from what is not there, is another's, or is something else than was ordered.

        Args:
            source: the job of `spec.continue_from`; None where there is none.
            owner: of the job that is to be, as "role/name".

        Raises:
            NotFoundError: the owner has no such job, its round was not released, or the model is there no more.
            InvalidInput: it is no training of the same task, or the model of that round is another one.
        """
        continued = spec.continue_from
        if continued is None:
            return
        if source is None or source.owner != owner:
            raise NotFoundError(f"no job {continued.job_id}", job_id=continued.job_id)
        found = await self.of_round(source, str(continued.round), as_known=continued.model_sha256)
        task = source.spec["task"]
        if task != spec.task:
            problem = f"job {source.job_id} trained task {task!r}, this one is to train {spec.task!r}"
            raise InvalidInput(problem, violations={f"{spec.kind}.continue_from": problem})
        sha256 = next(file["sha256"] for file in found["files"] if file["name"] == MODEL_FILE)
        if sha256 != continued.model_sha256:
            problem = f"the model of round {continued.round} of job {source.job_id} has SHA-256 {sha256}"
            raise InvalidInput(problem, violations={f"{spec.kind}.continue_from.model_sha256": problem})


def _files(result: dict[str, Any]) -> set[str]:
    return {file["sha256"] for file in result.get("files", ())}


def _is_of(job: JobRow, found: Released) -> bool:
    """Whether a job's own result is the model of that round. (Earlier ones did not say the round, and had the file that
    the round made.)"""
    result = job.result or {}
    return found.number == result.get("round") or ("round" not in result and found.sha256 in _files(result))
