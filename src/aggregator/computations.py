"""Runs evaluations and exports: one unit of work each, then a signed manifest.

Neither costs privacy: public rows are nobody's secret, and what is made of a released model is post-processing (Dwork &
Roth 2014, proposition 2.1). Running one twice is harmless: units and files depend on the job alone, all of them are
stored under their digest, and the manifest of a second run differs in its time at most. What a process that died left
behind is named by no job, and leaves the disk when what nobody names is looked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Protocol

from ..config import AggregatorConfig
from ..errors import DeadlineError, InvalidInput, NotFoundError, PolicyError, StateError
from ..jobs.artifact import NOT_YET
from ..jobs.computations import EvaluationSpec, ExportSpec
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.specs import JobSpec, spec_of
from ..jobs.states import JobRow, JobState, seconds, utc
from ..jobs.wire import ASSUMPTIONS, FIGURES, MEASURED, ROUND_FIELDS
from ..learning.installed import known_tasks
from ..learning.model_file import read_model_file
from ..storage.blobs import Blobs
from ..text import shown
from .artifact import MODEL_FILE, Source, evaluation_statement, export_statement, read_source, write_files
from .federation import Federation
from .pipeline import evaluation_options
from .work import EXPORTS, why_not_evaluated

OPERATORS: Final = "operator/"
"""How their names begin: they see everybody's jobs."""


class Workers(Protocol):
    """What computes: a `WorkerPool`."""

    async def run(
        self, name: str, params: Mapping[str, Any], *, timeout_s: float | None = None, urgent: bool = False
    ) -> dict[str, Any]:
        """The result of a unit of work."""
        ...


class Computations:
    """Evaluations and exports at this aggregator."""

    def __init__(self, pool: Workers, config: AggregatorConfig, federation: Federation, blobs: Blobs) -> None:
        self._pool = pool
        self._config = config
        self._federation = federation
        self._blobs = blobs
        self._tasks = known_tasks()  # reading the entry points takes milliseconds, too long for every submission

    # --- before a job is accepted -------------------------------------------------------------------------------------

    def check(self, spec: JobSpec, source: JobRow | None, *, owner: str, model: bytes = b"") -> None:
        """Refuse what could not be computed. No worker is asked; a model that came with the job is read (milliseconds).

        Args:
            source: the job of `spec.source_job_id`; None where there is none. Whether it has released the round that is
                meant, `results` says.
            owner: of the job that is to be, as "role/name".
            model: the bytes of the model that comes with it; empty where that is stored already.

        Raises:
            NotFoundError: the owner has no such job.
            InvalidInput: it is no federated training, the task is not registered, or the model is none.
            StateError: it has no model (yet), or its files were dropped.
            PolicyError: this aggregator has no public rows for the task, no torch, or has not left open what the job
                that made the model sets.
        """
        if spec.source_job_id:
            self._check_source(spec, source, owner)
        if isinstance(spec, EvaluationSpec):
            task = _task(spec, source)
            self._check_task(task)
            evaluation_options(self._config, task, _public_options(task, source))
            if spec.model_sha256:
                self._check_model(model or self._blobs.read(spec.model_sha256))
        elif not isinstance(spec, ExportSpec):
            raise InvalidInput(f"a {spec.kind} is no computation on a model")

    def _check_source(self, spec: JobSpec, source: JobRow | None, owner: str) -> None:
        job_id = spec.source_job_id
        if source is None or source.job_id != job_id or not may_see(source, owner):
            raise NotFoundError(f"no job {shown(job_id)}", job_id=job_id)
        if source.kind != FederatedTrainingSpec.kind:
            raise InvalidInput(
                f"job {job_id} is of kind {source.kind}: only a {FederatedTrainingSpec.kind} makes a model",
                violations={f"{spec.kind}.job_id": f"must be a {FederatedTrainingSpec.kind}"},
            )
        if source.state is not JobState.SUCCEEDED and not round_of(spec):
            raise StateError(f"job {job_id} is {source.state.value}: {NOT_YET}", state=source.state.value)
        if source.deleted_at:
            raise StateError(f"the files of job {job_id} were deleted", state=source.state.value)

    def _check_task(self, task: str) -> None:
        if task not in self._tasks:
            raise InvalidInput(
                f"no task is called {task!r} here; known: {', '.join(self._tasks)}",
                violations={f"{EvaluationSpec.kind}.task": "not registered at this aggregator"},
            )
        if task not in self._config.evaluation:
            raise PolicyError(f"this aggregator has no public rows for task {task!r}: nothing can be evaluated on them")
        lacking = why_not_evaluated()
        if lacking:
            raise PolicyError(f"this aggregator evaluates nothing: {lacking}")

    def _check_model(self, model: bytes) -> None:
        try:
            read_model_file(model)
        except InvalidInput as error:
            raise InvalidInput(
                f"the model cannot be used: {error.message}",
                violations={f"{EvaluationSpec.kind}.{EvaluationSpec.model_field}": error.message},
                private=error.private,
            ) from error

    # --- a job that runs ----------------------------------------------------------------------------------------------

    async def run(self, job: JobRow, source: JobRow | None, *, now: float) -> dict[str, Any]:
        """Compute, and write the artifact; returns the job's result (`JobRow.result`).

        Args:
            job: of kind evaluation or export.
            source: the job that it is about, with the result that is meant; None where there is none.
            now: seconds since the epoch.

        Raises:
            NotFoundError, InvalidInput, StateError, PolicyError: as `check`: things may have changed since.
            InvalidInput: the model is not that of the task.
            SignatureError, StorageError: the files of `source` are not what the aggregator made, or are damaged.
            DeadlineError: the job's deadline passed.
            EvaluationError: the public rows, the task's model or its metrics are at fault.
            WorkerError: the worker died or failed.
        """
        spec = spec_of(job.kind, job.spec)
        source = source if spec.source_job_id else None
        await asyncio.to_thread(self.check, spec, source, owner=job.owner)
        made_by, known = None, {}
        if source is not None:
            made_by = await asyncio.to_thread(read_source, source, federation=self._federation, blobs=self._blobs)
            known = source.result or {}
        if isinstance(spec, EvaluationSpec):
            statement, measured = await self._evaluate(job, spec, source, made_by, now)
        elif isinstance(spec, ExportSpec) and made_by is not None:
            statement = await self._export(job, spec, made_by, now)
            measured = {name: known[name] for name in MEASURED if name in known}
        else:
            raise AssertionError("check lets through evaluations, and exports of a job")
        files = await asyncio.to_thread(write_files, statement, federation=self._federation, blobs=self._blobs)
        carried: dict[str, Any] = {name: known[name] for name in ROUND_FIELDS if name in known}
        figures: dict[str, Any] = {name: known.get(name) for name in (*FIGURES, *ASSUMPTIONS)}
        return {"files": files, "metrics": {}, **measured, **figures, **carried}

    async def _evaluate(
        self, job: JobRow, spec: EvaluationSpec, source: JobRow | None, made_by: Source | None, now: float
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The statement, and `MEASURED` of the result."""
        task = _task(spec, source)
        if made_by is None:
            sha256, size = spec.model_sha256, await asyncio.to_thread(self._blobs.size, spec.model_sha256)
        else:
            sha256, size = made_by.model_sha256, made_by.model_bytes
        options = evaluation_options(self._config, task, _public_options(task, source))
        directory = str(self._config.directory)
        model = {"sha256": sha256, "seed": _seed(task, source), "not_trained": ""}
        params = {"task": task, "options": options, "directory": directory, **model}
        found = await self._unit(job, "evaluate_model", params, now)
        metrics = {str(name): float(value) for name, value in found["metrics"].items()}
        if not metrics:
            raise PolicyError(f"there is nothing to say: {found['without']}")
        statement = evaluation_statement(
            job,
            made_by,
            federation=self._federation,
            task=task,
            rows=found["rows"],
            model={"file": MODEL_FILE, "sha256": sha256, "bytes": size},
            metrics=metrics,
            lacking=found["without"],
            created_at=utc(now),
        )
        return statement, {"metrics": metrics, **({"not_evaluated": found["without"]} if found["without"] else {})}

    async def _export(self, job: JobRow, spec: ExportSpec, made_by: Source, now: float) -> dict[str, Any]:
        params = {"sha256": made_by.model_sha256, "format": spec.format}
        made = await self._unit(job, "export_model", params, now)
        name, _ = EXPORTS[spec.format]
        file = {"file": name, "sha256": made["sha256"], "bytes": made["size"]}
        return export_statement(job, spec, made_by, federation=self._federation, file=file, created_at=utc(now))

    async def _unit(self, job: JobRow, name: str, params: dict[str, Any], now: float) -> dict[str, Any]:
        """Ahead of the many units of trainings: somebody waits for this one, and there is no second."""
        left_s = seconds(job.deadline_at) - now if job.deadline_at else None
        if left_s is not None and left_s <= 0:
            raise DeadlineError(f"the job was not done by its deadline, {job.deadline_at}")
        return await self._pool.run(name, params, timeout_s=left_s, urgent=True)


def may_see(source: JobRow, owner: str) -> bool:
    """Whether a job is there for whoever is to own a computation on its model."""
    return source.owner == owner or owner.startswith(OPERATORS)


def round_of(spec: JobSpec) -> str:
    """Which released round of its job a computation is about; empty: none but its result."""
    return spec.round if isinstance(spec, EvaluationSpec | ExportSpec) else ""


def _task(spec: EvaluationSpec, source: JobRow | None) -> str:
    """Whose public rows."""
    return spec.task or (FederatedTrainingSpec.from_json(source.spec).task if source is not None else "")


def _seed(task: str, source: JobRow | None) -> int | None:
    """From which the training built what it did not train, if it is of this task: earlier artifacts lack that."""
    if source is None:
        return None
    training = FederatedTrainingSpec.from_json(source.spec)
    return training.seed if training.task == task else None


def _public_options(task: str, source: JobRow | None) -> dict[str, Any]:
    """Those of the training, if it is of this task: so a model is evaluated as it was in its rounds."""
    if source is None:
        return {}
    training = FederatedTrainingSpec.from_json(source.spec)
    return dict(training.task_options) if training.task == task else {}
