"""A task is tried before anything is charged for it: on public rows, once for all rounds of a job.

What the trial finds depends on the task's code, the job and public numbers, never on a row; so it is told to others by
its class (`protocol.faults`), and costs nobody anything. What fails later, once rows are at hand, is told by none.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, Final, TypeAlias

from ..errors import AbandonedError, DeadlineError, TaskError, UnavailableError, WorkerError
from ..jobs.executors.pool import WorkerPool
from ..learning.row_kind import RowKind
from ..protocol.faults import TaskProblem, task_error
from ..protocol.plan import RoundPlan
from ..protocol.signing import Signed
from ..storage.leftovers import BlobUses

LOG = logging.getLogger("sotto.party")

LONGEST_S: Final = 300.0
"""A trial takes a second or two: five rows, some dozen times."""
MOST_KNOWN: Final = 256
"""Of jobs and models; of more the oldest are forgotten, and tried again."""

_OF_ROWS: Final = (TaskProblem.SHAPE_MISMATCH, TaskProblem.LABELS_NOT_NUMBERS, TaskProblem.NOT_COMPUTABLE)
"""What says nothing where a job sets options of its own: then rows may look otherwise than when they were looked at."""

Verdict: TypeAlias = TaskError | None
"""None: nothing speaks against it."""


class Trials:
    """What trials have found. The code that workers run is what it was when this process started, and so are they.

    What a row looks like says the task, or what this party's rows looked like when it last found that it is ready for
    the task (`readiness`): no trial looks at one. Shape and dtype count as public, as the names of a table's columns do
    (docs/threat-model.md).
    """

    def __init__(self, pool: WorkerPool, uses: BlobUses) -> None:
        self._pool = pool
        self._uses = uses
        self._known: dict[str, Verdict] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._unconfined_said = False

    async def require(
        self,
        plan: RoundPlan,
        signed: Signed,
        *,
        rows: RowKind | None,
        fetch: Callable[[], Awaitable[object]],
    ) -> None:
        """Returns where the task, with the plan's model, can be trained as far as public rows tell.

        Args:
            rows: what a row looks like; None where nobody knows.
            fetch: brings the plan's model; asked where the trial is not known yet.

        Raises:
            TaskError: it cannot. The private text is for this party's log alone.
            UnavailableError, AbandonedError: of this process or the aggregator: it is asked again.
        """
        key = _key(plan, rows)
        if key not in self._known:
            if key not in self._running:
                await fetch()
            await asyncio.shield(self._begun(key, plan, signed, rows))
        found = self._known[key]
        if found is not None:
            raise task_error(
                TaskProblem(found.metadata["problem"]),
                task=plan.task,
                place=found.metadata["place"],
                private=found.private,
            )

    async def stop(self) -> None:
        """End what is being tried."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _begun(self, key: str, plan: RoundPlan, signed: Signed, rows: RowKind | None) -> asyncio.Task[None]:
        """The trial under way, whoever began it. It goes on when the round ends meanwhile, or the connection: its owner
        is to read what it finds, and no other round needs to wait for it again."""
        if key not in self._running:
            held = ExitStack()
            held.enter_context(self._uses.using(plan.model_sha256))  # it may outlive the round that began it
            self._running[key] = asyncio.create_task(self._find(key, plan, signed, rows))
            self._running[key].add_done_callback(lambda _: held.close())
            self._running[key].add_done_callback(lambda done: self._over(key, done))
        return self._running[key]

    def _over(self, key: str, task: asyncio.Task[None]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()

    async def _find(self, key: str, plan: RoundPlan, signed: Signed, rows: RowKind | None) -> None:
        found = await self._try(plan, signed, rows)
        if found is not None:
            LOG.warning("%s", found.message, extra={"job": plan.job_id, "private": found.private})
        self._known[key] = found
        if len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]

    async def _try(self, plan: RoundPlan, signed: Signed, rows: RowKind | None) -> Verdict:
        params: dict[str, Any] = {"plan": signed.statement.decode(), "rows": rows.to_json() if rows else None}
        try:
            found = await self._pool.run("try_task", params, alone=True, timeout_s=LONGEST_S)
        except (AbandonedError, UnavailableError):
            raise
        except (DeadlineError, WorkerError) as error:  # not remembered: the machine may have more to give the next time
            text = f"{error.message} {error.private}"
            raise task_error(TaskProblem.TRIAL_DIED, task=plan.task, private=text) from error
        if not found["confined"] and not self._unconfined_said:
            self._unconfined_said = True
            LOG.warning("this kernel has no Landlock: a task that is tried could read any file, if it is made to")
        if not found["problem"] or (plan.task_options != "{}" and found["problem"] in _OF_ROWS):
            return None
        return task_error(TaskProblem(found["problem"]), task=plan.task, place=found["place"], private=found["detail"])


def _key(plan: RoundPlan, rows: RowKind | None) -> str:
    """What a trial depends on: the job, of the model what the plan fixes of it, and what a row looks like."""
    fixed: list[Any] = [plan.spec_digest, plan.task, plan.seed, plan.dimension, plan.layout, plan.not_trained]
    return json.dumps([*fixed, rows.to_json() if rows else None], sort_keys=True)
