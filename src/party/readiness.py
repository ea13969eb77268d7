"""Which of its datasets a party is ready to train on: looked at when it starts, and whenever that may have changed.

Workers look (`learning.readiness`), beside whatever the party does. The owner's log says all of it; others hear a class
of a closed list, and of data that it is ready or not. How long looking took would tell how large a table is: so what
came of it counts from the next of 1, 2, 4, 8, … seconds on.

What a row looks like, by which trials of jobs go, is known from the same look: rows are loaded once for both.

What is not ready is looked at again in pauses that grow, and at once when a job asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

from ..config import PartyConfig
from ..errors import AbandonedError, DeadlineError, SottoError, TaskError, UnavailableError, WorkerError
from ..learning.installed import code_digest, known_tasks
from ..learning.loading import CHECK_DATA
from ..learning.row_kind import RowKind
from ..protocol.faults import TaskProblem, TaskStanding, sentence, task_error

LOG = logging.getLogger("sotto.party")

CODE_TIMEOUT_S: Final = 120.0
OTHERS_TIMEOUT_S: Final = 20.0
"""Of a task that is not listed: what is to be tried waits for it."""
"""How long importing a task, building its model and trying it on public rows may take; it takes seconds."""
FIRST_PAUSE_S: Final = 4.0
LONGEST_PAUSE_S: Final = 60.0
"""Until what is not ready is looked at again, if nobody asks."""
ASKED_PAUSE_S: Final = 2.0
"""Between two looks at least, whoever asks: an aggregator that does so in vain keeps no worker busy."""


class Workers(Protocol):
    """What looks: a `WorkerPool`."""

    async def run(
        self, name: str, params: Mapping[str, Any], *, timeout_s: float | None = None, alone: bool = False
    ) -> dict[str, Any]:
        """The result of a unit of work."""
        ...


class Readiness:
    """How it stands with each dataset of a party."""

    def __init__(self, config: PartyConfig, pool: Workers) -> None:
        self._config = config
        self._pool = pool
        self._digests = {task: code_digest(task) for task in config.datasets}
        self._standings = {
            task: TaskStanding(digest, False, TaskProblem.CHECKING) for task, digest in self._digests.items()
        }
        self._rows: dict[str, RowKind] = {}
        self._said: dict[str, str] = {}
        self._imported: set[str] = set()  # of these another text on the disk is not what is running
        self._asked = {task: asyncio.Event() for task in config.datasets}
        self._looks = dict.fromkeys(config.datasets, 0)
        self._changed = asyncio.Condition()

    @property
    def standings(self) -> Mapping[str, TaskStanding]:
        """By task, as others may know it now."""
        return dict(self._standings)

    def rows_of(self, task: str) -> RowKind | None:
        """What a row of a dataset looks like, as of when it was last found to be ready; None before."""
        return self._rows.get(task)

    async def change(self, known: Mapping[str, TaskStanding]) -> Mapping[str, TaskStanding]:
        """The standings, once they are others than `known`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._standings != known)
            return self.standings

    async def run(self) -> None:
        """Look, and look again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_at_others())
            for task in self._config.datasets:
                group.create_task(self._follow(task))

    def look_again(self, task: str) -> None:
        """Something about a dataset may have changed: whoever needs it waits for what comes of looking."""
        known = self._standings.get(task)
        if known is not None and known.ready:
            self._standings[task] = TaskStanding(known.digest, False, TaskProblem.CHECKING)
            self._asked[task].set()

    async def require(self, task: str) -> None:
        """Return once a dataset is known to be ready; one that is not is looked at again first.

        Raises:
            TaskError: it is not: class and place alone.
        """
        standing = self._standings.get(task)
        if standing is None or standing.ready:  # what is not listed is refused elsewhere
            return
        looks = self._looks[task]
        if standing.not_ready:
            self._asked[task].set()
        async with self._changed:
            await self._changed.wait_for(lambda: self._looks[task] > looks or self._standings[task].ready)
        standing = self._standings[task]
        if not standing.ready:
            raise task_error(TaskProblem(standing.problem), task=task, place=standing.place)

    async def _follow(self, task: str) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            self._asked[task].clear()
            began = time.monotonic()
            standing, why = await self._look(task)
            took_s = time.monotonic() - began
            told_s = _told_after(took_s)
            await asyncio.sleep(told_s - took_s)
            await self._say(task, standing, why)
            async with self._changed:
                self._standings[task] = standing
                self._looks[task] += 1
                self._changed.notify_all()
            await asyncio.sleep(ASKED_PAUSE_S)
            pause_s = FIRST_PAUSE_S if standing.ready else min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                async with asyncio.timeout(None if standing.ready else max(pause_s, told_s)):
                    await self._asked[task].wait()
            except TimeoutError:
                pass

    async def _look(self, task: str) -> tuple[TaskStanding, str]:
        """How it stands with a dataset, and what its owner's log says of it."""
        dataset = self._config.datasets[task]
        if task not in self._imported:
            self._digests[task] = await asyncio.to_thread(code_digest, task)
        digest, died = self._digests[task], TaskProblem.TRIAL_DIED
        hint, place, said, rows_seen = TaskProblem.DATA_NOT_READY, "", "", False
        try:
            found = await self._pool.run("check_code", {"task": task}, timeout_s=CODE_TIMEOUT_S, alone=True)
            self._imported.add(task)
            if found["problem"]:
                hint, place, said = TaskProblem(found["problem"]), found["place"], found["said"]
            died, rows_seen = hint, True
            options = {key: value for key, value in dataset.options.items() if value is not None}
            params = {"task": task, "options": options, "directory": str(self._config.directory)}
            rows = await self._pool.run("check_rows", params)
            self._rows[task] = RowKind.from_json(found["rows"] or rows)
        except TaskError as error:
            problem, where = TaskProblem(error.metadata["problem"]), error.metadata["place"]
            if rows_seen:  # the worker may keep something of them: what it finds of the code is told nobody else
                return TaskStanding(digest, False, hint, place), "; ".join(filter(None, (said, error.private)))
            if problem not in (TaskProblem.TASK_IMPORT_FAILED, TaskProblem.TASK_NOT_INSTALLED):
                self._imported.add(task)
            return TaskStanding(digest, False, problem, where), error.private
        except (AbandonedError, UnavailableError):  # the party is being stopped: nothing more is found out
            await asyncio.Event().wait()
        except (WorkerError, DeadlineError) as error:
            return TaskStanding(digest, False, died, place), f"{error.message} {error.private}; {CHECK_DATA}"
        except SottoError as error:
            return TaskStanding(digest, False, died, place), f"{type(error).__name__}; {CHECK_DATA}"
        return TaskStanding(digest, True), ""

    async def _say(self, task: str, standing: TaskStanding, why: str) -> None:
        """In the owner's log, once until it changes."""
        if standing.ready:
            if self._said.pop(task, None) is not None or not self._looks[task]:
                LOG.info("ready for %s", task)
            return
        text = f"{sentence(standing.problem, standing.place)}: {why}"
        if task in self._imported and await asyncio.to_thread(code_digest, task) != self._digests[task]:
            text += "; its code has changed since this party started: start it again"
        elif task in self._imported and standing.problem != TaskProblem.DATA_NOT_READY:
            text += "; start this party again once the task's code is mended"
        if self._said.get(task) != text:
            self._said[task] = text
            LOG.warning("not ready for %s: %s", task, text)

    async def _look_at_others(self) -> None:
        """Tasks that are installed and not listed: one that cannot be imported is named, and concerns nobody else."""
        for task in sorted(set(known_tasks()) - set(self._config.datasets)):
            try:
                await self._pool.run("check_code", {"task": task}, timeout_s=OTHERS_TIMEOUT_S, alone=True)
            except TaskError as error:
                if error.metadata["problem"] == TaskProblem.TASK_IMPORT_FAILED:
                    LOG.warning("task %s is installed and cannot be used: %s", task, error.private)
            except (WorkerError, DeadlineError) as error:
                LOG.warning("task %s is installed and cannot be used: %s %s", task, error.message, error.private)
            except SottoError:  # the party is being stopped
                return


def _told_after(seconds: float) -> float:
    """The next power of two seconds, 1 at least."""
    told = 1.0
    while told < seconds:
        told *= 2
    return told
