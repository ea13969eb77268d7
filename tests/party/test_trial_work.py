"""The unit of work that tries a task, in real workers: what it finds, what it says, and what it cannot reach."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from src import confinement
from src.errors import StateError, WorkerError
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.settings import PoolSettings
from src.jobs.executors.units import WorkContext
from src.learning.flatten import flatten, model_to_tensors, to_safetensors
from src.learning.model_file import ModelFile, parameters_of
from src.learning.whole import model_file_of
from src.party.trial_work import try_task
from src.protocol.canonical import canonical_bytes
from src.protocol.faults import PLACE, TaskProblem
from src.storage.blobs import Blobs
from tests.party.conftest import MakePlan

TASKS = Path(__file__).with_name("tried_tasks.py")
LANDLOCK = pytest.mark.skipif(not confinement.version(), reason="this kernel has no Landlock")
ROWS: dict[str, Any] = {"shape": [6], "labels": "int64"}
NAMES = [
    line[6:].partition("(")[0].partition(":")[0] for line in TASKS.read_text().splitlines() if line[:6] == "class "
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where private rows are; the tasks are on the import path, and installed."""
    place, installed = tmp_path_factory.mktemp("private"), tmp_path_factory.mktemp("installed")
    (place / "rows.csv").write_text("31337")
    about = installed / "tried_tasks-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tried-tasks\nVersion: 1\n")
    lines = [f"{name.lower()} = tried_tasks:{name}" for name in NAMES]
    (about / "entry_points.txt").write_text("\n".join(["[sotto.tasks]", *lines]))
    (installed / "tried_tasks.py").write_text(TASKS.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed))
        patch.setenv("TRIED_PRIVATE", str(place / "rows.csv"))
        yield place
    sys.modules.pop("tried_tasks", None)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool(place: Path) -> AsyncIterator[WorkerPool]:
    settings = PoolSettings(size=1, min_size=1, max_size=1, nice=0)
    pool = WorkerPool(
        settings,
        handlers="party.work",
        blobs_root=place / "blobs",
        workspace=place / "work",
        preload=("learning.dpsgd",),
        prepare={"learning.warm": [name.lower() for name in NAMES]},
    )
    await pool.start()
    yield pool
    await pool.close()


def model_of_plain() -> bytes:
    layers = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return to_safetensors(model_to_tensors(layers))


def model_of(task: str) -> bytes:
    if task in ("wide", "saysitsshape"):
        return to_safetensors(model_to_tensors(torch.nn.Linear(9, 2)))
    if task in ("regresses", "oneoutput"):
        return to_safetensors(model_to_tensors(torch.nn.Linear(6, 1)))
    return model_of_plain()


class Trying:
    def __init__(self, pool: WorkerPool, place: Path, make_plan: MakePlan) -> None:
        self._pool, self._blobs, self._make_plan = pool, Blobs(place / "blobs"), make_plan

    def params(self, task: str, *, rows: Any = ROWS, model: bytes = b"", **changes: Any) -> dict[str, Any]:
        data = model or model_of(task)
        dimension = flatten(parameters_of(data))[1].size
        changes = {"task": task, "dimension": dimension, "model_sha256": self._blobs.write(data).sha256, **changes}
        plan = self._make_plan(**changes)
        return {"plan": canonical_bytes(plan.to_statement()).decode(), "rows": rows}

    async def run(self, task: str, **given: Any) -> dict[str, Any]:
        return await self._pool.run("try_task", self.params(task, **given), alone=True)


@pytest.fixture
def trying(pool: WorkerPool, place: Path, make_plan: MakePlan) -> Trying:
    return Trying(pool, place, make_plan)


FAULTS = {
    "drops": TaskProblem.RANDOM_DRAWN,
    "normalises": TaskProblem.LAYER_REFUSED,
    "averages": TaskProblem.LOSS_NOT_PER_EXAMPLE,
    "mixes": TaskProblem.ROWS_MIXED,
    "remembers": TaskProblem.STATE_KEPT,
    "regresses": TaskProblem.LOSS_MISSING,
    "wide": TaskProblem.SHAPE_MISMATCH,
    "fails": TaskProblem.NOT_COMPUTABLE,
    "unbuilt": TaskProblem.MODEL_NOT_BUILT,
    "leaves": TaskProblem.MODEL_NOT_BUILT,
    "nomodel": TaskProblem.MODEL_NOT_BUILT,
    "half": TaskProblem.MODEL_NOT_BUILT,
    "later": TaskProblem.MODEL_DOES_NOT_FIT_PLAN,
    "nobodys": TaskProblem.TASK_NOT_INSTALLED,
}
WITH_PLACE = {"mixes", "fails", "unbuilt", "leaves"}


@pytest.mark.parametrize("task", FAULTS)
async def test_a_fault_is_a_class_of_the_list_and_a_place_in_the_tasks_file(trying: Trying, task: str) -> None:
    found = await trying.run(task)
    assert found["problem"] == FAULTS[task]
    assert found["detail"]
    assert found["place"] == "" or (PLACE.fullmatch(found["place"]) and found["place"].startswith("tried_tasks.py:"))
    assert found["place"] or task not in WITH_PLACE
    line = int(found["place"].partition(":")[2] or 0)
    assert not line or line <= len(TASKS.read_text().splitlines())  # no line that a task's exception claims


async def test_what_is_not_trained_is_the_plans_or_the_task_is_not_trained_here(trying: Trying) -> None:
    def model(seed: int) -> ModelFile:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        net[0].requires_grad_(False)
        return model_file_of(net)

    plans, others = model(0), model(1)
    for stored in (plans.to_bytes(), to_safetensors(plans.parameters())):  # as a job may come, and as rounds begin
        given = {"model": stored, "dimension": 10}
        for known in ("", plans.not_trained):
            assert (await trying.run("frozen", **given, not_trained=known))["problem"] == ""
        found = await trying.run("frozen", **given, not_trained=others.not_trained)
        assert found["problem"] == TaskProblem.NOT_TRAINED_STATE_DIFFERS


async def test_a_plan_whose_model_is_not_finite_is_no_fault_of_the_task_and_is_told_all_the_same(
    trying: Trying,
) -> None:
    tensors = model_to_tensors(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
    tensors["0.bias"][0] = np.nan
    assert (await trying.run("plain", model=to_safetensors(tensors)))["problem"] == TaskProblem.NOT_COMPUTABLE


async def test_a_task_that_can_be_trained_is_fine(trying: Trying) -> None:
    assert await trying.run("plain") == {
        "problem": "", "place": "", "detail": "", "confined": confinement.version() > 0
    }  # fmt: skip


async def test_what_a_task_says_of_its_rows_counts_and_not_what_the_data_looked_like(trying: Trying) -> None:
    assert (await trying.run("saysitsshape"))["problem"] == ""
    assert (await trying.run("saysitsshape", rows=None))["problem"] == ""


@pytest.mark.parametrize("labels", ["U", "S", "O", "M", "c"])
async def test_labels_that_are_no_numbers(trying: Trying, labels: str) -> None:
    found = await trying.run("plain", rows={"shape": [6], "labels": labels})
    assert found["problem"] == TaskProblem.LABELS_NOT_NUMBERS


async def test_a_missing_label_which_makes_floats_of_all_is_not_told(trying: Trying) -> None:
    floats = {"shape": [6], "labels": "float64"}
    assert (await trying.run("whole", rows=floats))["problem"] == (await trying.run("whole"))["problem"] == ""
    assert (await trying.run("oneoutput", rows=floats))["problem"] == ""
    assert (await trying.run("averages", rows=floats))["problem"] == TaskProblem.LOSS_NOT_PER_EXAMPLE
    assert (await trying.run("fails", rows=floats))["problem"] == TaskProblem.NOT_COMPUTABLE


async def test_where_nobody_knows_what_rows_look_like_the_model_alone_is_looked_at(trying: Trying) -> None:
    assert (await trying.run("normalises", rows=None))["problem"] == TaskProblem.LAYER_REFUSED
    assert (await trying.run("wide", rows=None))["problem"] == ""


async def test_a_model_that_does_not_fit_the_plan(trying: Trying) -> None:
    other = to_safetensors({"w": np.zeros(46, np.float32)})
    assert (await trying.run("plain", model=other))["problem"] == TaskProblem.MODEL_DOES_NOT_FIT_PLAN
    assert (await trying.run("plain", dimension=47))["problem"] == TaskProblem.MODEL_DOES_NOT_FIT_PLAN


async def test_a_model_that_ends_its_process_ends_no_other(trying: Trying) -> None:
    with pytest.raises(WorkerError):
        await trying.run("dies")
    assert (await trying.run("plain"))["problem"] == ""


@LANDLOCK
async def test_private_rows_are_out_of_reach_whatever_is_in_them(trying: Trying, place: Path) -> None:
    told = []
    for rows in ("31337", "31337\n"):
        (place / "rows.csv").write_text(rows)
        told.append(await trying.run("looks"))
    assert told[0] == told[1]
    assert told[0]["problem"] == TaskProblem.MODEL_NOT_BUILT
    assert "Permission denied" in told[0]["detail"]


@LANDLOCK
async def test_nothing_is_left_where_others_find_it(trying: Trying, place: Path) -> None:
    assert (await trying.run("writes"))["problem"] == TaskProblem.MODEL_NOT_BUILT
    assert not (place / "left").exists()


async def test_it_is_done_in_a_worker_of_its_own_or_not_at_all(trying: Trying, place: Path, pool: WorkerPool) -> None:
    params = trying.params("plain")
    with pytest.raises(StateError):
        try_task(params, WorkContext(Blobs(place / "blobs"), place))
    assert not confinement.is_confined()
    looked = await pool.run("check_rows", {"task": "plain", "options": {}, "directory": str(place)})
    assert looked == ROWS


async def test_where_the_kernel_confines_nobody_the_log_quotes_nothing_that_a_task_raised(
    place: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)  # the unit sets it, for a process of its own
    monkeypatch.setattr("src.party.trial_work.confine", lambda **_: False)
    trying = Trying.__new__(Trying)
    trying._blobs, trying._make_plan = Blobs(place / "blobs"), make_plan
    context = WorkContext(trying._blobs, place, untouched=True)
    found = await asyncio.to_thread(try_task, trying.params("fails"), context)
    assert (found["problem"], found["confined"]) == (TaskProblem.NOT_COMPUTABLE, False)
    assert "31337" not in str(found)
    assert os.environ["TRIED_PRIVATE"] not in str(found)
