"""AggregatorPipeline: what is computed on a round's contributions, as units of work for the pool."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ..config import AggregatorConfig
from ..encryption.scheme import Scheme
from ..errors import PASSING, DeadlineError, InvalidInput, PolicyError, SottoError
from ..jobs.executors.pool import WorkerPool
from ..jobs.executors.stats import PoolStats
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.spec import ServerOptimizer as OptimizerSpec
from ..learning.installed import code_digest, known_tasks
from ..learning.model_file import read_model_file
from ..learning.task import chosen_options
from ..privacy.accounting import import_accountant
from ..protocol.batches import StoredBatch
from ..protocol.canonical import parse_canonical
from ..protocol.faults import TaskProblem, TaskStanding
from ..protocol.plan import RootStatement, RoundPlan
from ..protocol.signing import Signed
from ..storage.blobs import Blobs
from .federation import Federation
from .planning import Model, check_noise_by
from .round_row import Evaluated, RoundRow
from .work import NO_MODEL, has_torch, model_shape

LOG = logging.getLogger("sotto.aggregator")

BUILT_IN_S: Final = 120.0
"""How long a task's package may take to be imported, and its model to be built, as this aggregator starts."""
SOON_S: Final = 20.0
"""The same at the first try: what takes longer is tried again after the others, which do not wait for it."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model's file.

    Attributes:
        sha256, size: of its bytes.
        not_trained: digest of what is in it beside what was trained; empty: nothing, or not known.
        without: why it holds what was trained alone, in words, where the model has more.
    """

    sha256: str
    size: int
    not_trained: str = ""
    without: str = ""


class AggregatorPipeline:
    """Noise, check, product, opening, evaluation: each runs in a worker, none blocks the event loop."""

    def __init__(self, pool: WorkerPool, federation: Federation, config: AggregatorConfig, blobs: Blobs) -> None:
        self._pool = pool
        self._blobs = blobs
        self._federation = federation
        self._config = config
        self._public = json.dumps(federation.keyring.to_json())
        self._dimensions: dict[str, int] = {}
        self._tasks = known_tasks()  # reading the entry points takes milliseconds, too long for every submission

    def stats(self) -> PoolStats:
        """How busy the workers are."""
        return self._pool.stats()

    def scheme(self, name: str) -> Scheme:
        """A scheme under the federation's key; PolicyError where `plaintext` is not allowed."""
        return self._federation.scheme(name, allow_plaintext=self._config.privacy.allow_plaintext_scheme)

    def check(self, spec: FederatedTrainingSpec) -> None:
        """Refuse what no round of the job could do: an unknown task, noise drawn by others than configured, options of
        the task that are not open to jobs."""
        check_noise_by(spec, self._config.privacy.noise_by)
        if spec.task in self._config.evaluation:
            evaluation_options(self._config, spec.task, spec.task_options)
        if spec.initial_model_sha256:
            return
        if spec.task not in self._tasks:
            raise InvalidInput(
                f"no task is called {spec.task!r} here; known: {', '.join(self._tasks)}",
                violations={"federated_training.task": "not registered at this aggregator"},
            )
        if not has_torch():
            raise PolicyError(NO_MODEL)

    async def dimension(self, spec: FederatedTrainingSpec, *, model: bytes = b"") -> int:
        """Parameters of the model that a job trains. A task's model is measured once; its seed changes nothing here.

        Args:
            model: the bytes of the one that comes with the job; empty where it is stored already.

        Raises:
            InvalidInput: it is no model.
        """
        if model:
            return await asyncio.to_thread(model_shape, model)
        if spec.initial_model_sha256:
            return await asyncio.to_thread(self._measure, spec.initial_model_sha256)
        if spec.task not in self._dimensions:
            found = await self._pool.run("task_shape", {"task": spec.task, "seed": 0}, urgent=True)
            self._dimensions[spec.task] = int(found["dimension"])
        return self._dimensions[spec.task]

    async def warm(self) -> None:
        """Measure the models of the known tasks and import the accountant, before somebody waits for it; a task that
        cannot be built is passed over here and refused when a job asks for it."""
        await asyncio.to_thread(import_accountant)
        first = sorted(self._tasks, key=lambda task: task not in self._config.evaluation)
        slow = [task for task in first if not await self._warmed(task, SOON_S)]
        for task in slow:
            await self._warmed(task, BUILT_IN_S)

    async def _warmed(self, task: str, timeout_s: float) -> bool:
        """Whether it is known how it stands with a task: not yet, where that takes longer than `SOON_S`."""
        digest = await asyncio.to_thread(code_digest, task)
        standing = TaskStanding(digest, has_torch())
        try:
            if has_torch() and self._config.evaluation:  # else the first job that needs torch imports it
                found = await self._pool.run("task_shape", {"task": task, "seed": 0}, timeout_s=timeout_s)
                self._dimensions[task] = int(found["dimension"])
        except SottoError as error:
            if isinstance(error, DeadlineError) and timeout_s < BUILT_IN_S:
                self._federation.readiness.own[task] = TaskStanding(digest, False, TaskProblem.CHECKING)
                return False
            LOG.warning("task %s cannot be used here: %s %s", task, error.message, error.private)
            problem = error.metadata.get("problem", TaskProblem.MODEL_NOT_BUILT)
            standing = TaskStanding(digest, False, problem, error.metadata.get("place", ""))
        self._federation.readiness.own[task] = standing
        return True

    async def initial_model(self, spec: FederatedTrainingSpec) -> Model:
        """The model a job starts from: the one that came with it, or the task's own, by its seed."""
        sha256 = spec.initial_model_sha256
        if not sha256:
            built = await self._pool.run("initial_model", {"task": spec.task, "seed": spec.seed})
            return Model(built["sha256"], built["size"], built["dimension"], built["not_trained"])
        stored = await asyncio.to_thread(lambda: read_model_file(self._blobs.read(sha256)))
        size = await asyncio.to_thread(self._blobs.size, sha256)
        rest = stored.not_trained if stored.described else await self._rest(spec)
        return Model(sha256, size, await asyncio.to_thread(self._measure, sha256), rest)

    async def _rest(self, spec: FederatedTrainingSpec) -> str:
        """The digest of what is not trained of a model whose file does not say it; empty where it cannot be known."""
        if not self._builds(spec.task):
            return ""
        try:
            found = await self._pool.run("task_shape", {"task": spec.task, "seed": spec.seed})
        except PASSING:
            raise
        except SottoError as error:  # the parties say what of the task cannot be trained
            LOG.warning("task %s cannot be built: %s %s", spec.task, error.message, error.private)
            return ""
        return str(found["not_trained"])

    def _builds(self, task: str) -> bool:
        return has_torch() and task in self._tasks

    async def whole_model(self, spec: FederatedTrainingSpec, plan: RoundPlan, trained: StoredModel) -> StoredModel:
        """All of a released model, of which a round has what is trained; that alone, and why, where the rest cannot be
        had here.

        Raises:
            SottoError: one of `errors.PASSING`.
        """
        initial = spec.initial_model_sha256
        if initial:
            stored = await asyncio.to_thread(lambda: read_model_file(self._blobs.read(initial)))
            initial = initial if stored.described else ""
        if not initial and not self._builds(spec.task):
            why = f"this aggregator cannot build task {spec.task!r}"
            return replace(trained, without=why if plan.not_trained else "")
        params = {"task": spec.task, "seed": spec.seed, "initial": initial, "not_trained": plan.not_trained}
        try:
            found = await self._pool.run("whole_model", {**params, "sha256": trained.sha256})
        except PASSING:
            raise
        except SottoError as error:  # the model was paid for, and what is trained of it is there
            LOG.warning("the whole model of job %s cannot be had: %s %s", plan.job_id, error.message, error.private)
            return replace(trained, without=error.message)
        return StoredModel(found["sha256"], found["size"], found["not_trained"])

    def _measure(self, sha256: str) -> int:
        """Raises InvalidInput when it is no model."""
        return model_shape(self._blobs.read(sha256))

    async def make_noise(self, row: RoundRow) -> StoredBatch:
        """The aggregator's noise, protected like any update."""
        return StoredBatch(**await self._pool.run("make_noise", self._params(row)))

    async def check_body(self, row: RoundRow, sha256: str, root: RootStatement) -> None:
        """Raises CiphertextError, which names the first ciphertext that is none, or KnowledgeError."""
        upload = {"sha256": sha256, "proof": root.proof, "contributor": root.contributor}
        await self._pool.run("check_body", {**self._params(row), **upload})

    async def fold(self, row: RoundRow) -> StoredBatch:
        """The product of the contributors' batches."""
        batches = {
            name: {
                "header": row.batches[name].header,
                "sha256": row.batches[name].sha256,
                "size": row.batches[name].size,
                "root": _root(row.roots[name]),
            }
            for name in row.contributors
        }
        return StoredBatch(**await self._pool.run("fold", {**self._params(row), "batches": batches}))

    async def open(self, row: RoundRow, *, optimizer: OptimizerSpec, state_sha256: str) -> Mapping[str, Any]:
        """Open the aggregate and apply it; {"wrong": {party: why}} when shares are wrong and nothing was opened."""
        if row.aggregate is None:
            raise AssertionError("a round opens after its contributions were multiplied")
        index = {member.name: member.share_index for member in self._federation.roster.members}
        private = self._config.keys.private_key
        updates = [name for name in row.contributors if name in row.cohort]
        return await self._pool.run(
            "open_aggregate",
            {
                **self._params(row),
                "aggregate": row.aggregate.sha256,
                "aggregate_root": row.aggregate_root,
                "contributions": len(row.contributors),
                "updates": updates,
                "shares": [
                    {"party": name, "index": index[name], "sha256": sha256} for name, sha256 in row.shares.items()
                ],
                "private_key": str(private) if private else "",
                "optimizer": _optimizer(optimizer),
                "state_sha256": state_sha256,
            },
        )

    async def evaluate(
        self, task: str, asked: Mapping[str, Any], model: Mapping[str, Any], *, timeout_s: float
    ) -> Evaluated:
        """The task's metrics on public rows; empty where this aggregator evaluates nothing of this task.

        Args:
            asked: the task's options that the job sets.
            model: "sha256", "seed" and "not_trained", as `work.evaluate_model` takes them.

        Raises:
            PolicyError: the configuration has changed since the job was accepted, and leaves an option open no more.
            EvaluationError: the rows, the task's model or its metrics are at fault, whatever the parameters are.
            SottoError: another, of this model or this moment.
        """
        if task not in self._config.evaluation:
            return Evaluated({})
        options, directory = evaluation_options(self._config, task, asked), str(self._config.directory)
        params = {"task": task, "options": options, "directory": directory, **model}
        found = await self._pool.run("evaluate_model", params, timeout_s=timeout_s)
        metrics = {str(name): float(value) for name, value in found["metrics"].items()}
        return Evaluated(metrics, str(found.get("without", "")))

    def _params(self, row: RoundRow) -> dict[str, Any]:
        return {
            "plan": Signed.from_json(row.plan).statement.decode(),
            "plan_digest": row.plan_digest,
            "public": self._public,
            "processes": self._pool.cores_for_a_unit(),
        }


def evaluation_options(config: AggregatorConfig, task: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """With what the public rows of a task are loaded for a job that sets these options.

    Raises:
        PolicyError: the configuration has not left one of them open.
    """
    own = config.evaluation[task]
    return chosen_options(own, asked, task=task, owner="this aggregator's evaluation", key=f"evaluation.{task}")


def _root(signed: Mapping[str, str]) -> str:
    return str(parse_canonical(Signed.from_json(signed).statement)["root"])


def _optimizer(spec: OptimizerSpec) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": spec.name, "learning_rate": spec.learning_rate}
    return settings if spec.momentum is None else {**settings, "momentum": spec.momentum}
