"""A party's rows are read once for a job in each worker, and nobody writes to what is held."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.jobs.executors.units import WorkContext
from src.learning import task as task_module
from src.learning.flatten import model_to_tensors, to_safetensors
from src.learning.task import Dataset
from src.party import rows as held
from src.party.rows import held_rows, read_only, stamps_of
from src.party.work import contribution
from src.privacy.entropy import DeterministicEntropy
from src.protocol.plan import RoundPlan
from src.storage.blobs import Blobs

ROWS, COLUMNS = 12, 9


@pytest.fixture(autouse=True)
def no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of tests are always new."""
    monkeypatch.setattr(held, "_TICK_NS", 0)


class Table:
    """Counts how often it is read, and keeps what it returned, as tasks do."""

    name = "table"
    read = 0
    returned: Dataset | None = None
    whole: NDArray[np.float32]

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(COLUMNS, 1)

    def load_data(self, options: object) -> Dataset:
        Table.read += 1
        self.whole = np.full((ROWS, COLUMNS + 1), float(Table.read), np.float32)
        Table.returned = Dataset(self.whole[:, 1:], np.arange(ROWS) % 2, "x")
        return Table.returned


class Writes(Table):
    """Its loss writes to what was loaded."""

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert self.returned is not None
        self.returned.labels[0] = 1
        return outputs[:, 0] ** 2


class Remembers(Table):
    """Its loss needs what the loader found."""

    def load_data(self, options: object) -> Dataset:
        self.scale = 2.0
        return super().load_data(options)

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.scale * outputs[:, 0] ** 2


class Nameless(Table):
    """Goes by the name under which it is registered alone."""

    @property
    def name(self) -> str:  # type: ignore[override]
        raise AttributeError("name")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Dataset]:
    """load(kept, job=…, **options): how often it was read is in every feature."""
    monkeypatch.setattr(Table, "read", 0)

    def rows(kept: dict[str, Any], job: str = "j", name: str = "table", **options: Any) -> Dataset:
        task = Table()
        known: dict[str, Any] = {"name": name, "options": options, "directory": tmp_path, "job": job, "kept": kept}
        return held_rows(task, **known, load=lambda: task.load_data(options))[1]

    return rows


def reads(rows: Dataset) -> int:
    return int(rows.features[0, 0])


def test_rows_are_read_once_for_a_job_in_each_worker(load: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "rows.npz").write_bytes(b"1")
    one: dict[str, Any] = {}
    assert [reads(load(one, file="rows.npz")) for _ in range(5)] == [1] * 5
    assert reads(load({}, file="rows.npz")) == 2
    assert reads(load(one, "another job", file="rows.npz")) == 3
    assert reads(load(one, "another job", file="rows.npz", seed=1)) == 4
    assert len(one) == 1


def test_rows_of_a_dataset_are_those_of_no_other_whatever_its_task_calls_itself(load: Callable[..., Dataset]) -> None:
    """Each has a budget of its own; and an aggregator names its jobs as it likes."""
    kept: dict[str, Any] = {}
    assert [reads(load(kept, name=name)) for name in ("one", "other", "one", "other")] == [1, 2, 1, 2]


def replaced(file: Path) -> None:
    (file.parent / "new").write_bytes(file.read_bytes())
    (file.parent / "new").replace(file)


def written_unseen(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"2")
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock ticks
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda file: file.write_bytes(b"12"),
    "is written again with the same size": lambda file: file.write_bytes(b"2"),
    "is written again and made as old as it was": written_unseen,
    "is replaced by one that looks the same": replaced,
    "is gone": lambda file: file.unlink(),
}
NAMED: dict[str, Any] = {
    "by its path from the configuration's directory": {"file": "data/rows.npz"},
    "in a list of a mapping": {"tables": {"of": ["data/none.npz", "data/rows.npz"]}},
    "by its directory": {"folder": "data"},
    "by a pattern": {"files": "data/*.npz"},
    "by a pattern of directories": {"files": "d*a/rows.npz"},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("named", NAMED)
def test_they_are_read_again_where_a_file_that_an_option_names_has_changed(
    load: Callable[..., Dataset], tmp_path: Path, named: str, change: str
) -> None:
    file = tmp_path / "data" / "rows.npz"
    file.parent.mkdir()
    file.write_bytes(b"1")
    os.utime(file, ns=(5, 5))
    kept: dict[str, Any] = {}
    assert [reads(load(kept, **NAMED[named])) for _ in range(2)] == [1, 1]
    CHANGES[change](file)
    assert [reads(load(kept, **NAMED[named])) for _ in range(2)] == [2, 2]


def test_they_are_not_held_where_a_change_would_not_show(
    load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changed a moment before may change again in the same tick of its clock; of too many none is looked
    at; and one that was replaced while it was read is another one."""
    file = tmp_path / "rows.npz"
    file.write_bytes(b"1")
    kept: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(held, "_TICK_NS", 10**12)
        assert [reads(load(kept, file="rows.npz")) for _ in range(2)] == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(held, "MAX_FILES", 0)
        assert [reads(load(kept, file="rows.npz")) for _ in range(2)] == [3, 4]
    task, options = Table(), {"file": "rows.npz"}

    def meanwhile() -> Dataset:
        replaced(file)
        return task.load_data(options)

    held_rows(task, name="table", options=options, directory=tmp_path, job="j", kept=kept, load=meanwhile)
    assert not kept


def test_a_log_that_the_loader_writes_is_no_change(tmp_path: Path) -> None:
    log, kept, task = tmp_path / "loads.txt", dict[str, Any](), Table()

    def load() -> Dataset:
        with log.open("a") as file:
            file.write("read\n")
        return task.load_data({})

    for _ in range(4):
        held_rows(task, name="t", options={"log": str(log)}, directory=tmp_path, job="j", kept=kept, load=load)
    assert log.read_text() == "read\n"


@pytest.mark.parametrize("text", ["", "\0", "x" * 5000, "~nobody/a", "postgresql://host/rows?a=*", "*", "[", "**"])
def test_texts_that_are_no_files_have_no_stamps(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").mkdir()
    assert stamps_of({"a": text, "b": 1, "c": None}, tmp_path) == {}


def test_nobody_writes_to_what_is_held() -> None:
    whole = np.ones((4, 3), np.float32)
    given = Dataset(whole[:, 1:], np.arange(4), "x")
    rows = read_only(given)
    for values in (rows.features, rows.labels, given.features, given.labels):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 7
    for values in (rows.features, rows.labels):
        with pytest.raises(ValueError, match="WRITEABLE"):
            values.setflags(write=True)
    whole[:] = 7  # a table of which the task returned a part
    assert (rows.features == 1).all()


def test_what_is_held_are_plain_arrays_or_files_mapped_read_only(tmp_path: Path) -> None:
    class Drawing(np.ndarray[Any, Any]):
        """Would give another row each time."""

        def __getitem__(self, which: Any) -> Any:
            return np.asarray(self)[which] + np.random.default_rng().random()

    drawn = read_only(Dataset(np.ones((4, 2), np.float32).view(Drawing), np.arange(4), "x"))
    assert type(drawn.features) is np.ndarray
    assert (drawn.features[[0, 1]] == 1).all()
    np.save(tmp_path / "a.npy", np.ones((4, 2), np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert read_only(Dataset(mapped, np.arange(4), "x")).features is mapped
    written = np.load(tmp_path / "a.npy", mmap_mode="c")
    assert type(read_only(Dataset(written, np.arange(4), "x")).features) is np.ndarray
    none = read_only(Dataset(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), "x"))
    assert none.features.shape == (0, 2)
    texts = np.array(["a"] * 4, object)
    assert read_only(Dataset(np.ones((4, 2), np.float32), texts, "x")).labels is texts  # refused by its dtype, later


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("task", [Table, Writes, Remembers, Nameless])
def test_rounds_of_a_job_train_on_rows_that_were_read_once(
    strategy: str,
    task: type[Table],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_plan: Callable[..., RoundPlan],
    make_sum_plan: Callable[..., RoundPlan],
) -> None:
    """With the instance of the task that read them; a loss that writes to them fails on public rows, and says where."""
    monkeypatch.setattr(Table, "read", 0)
    monkeypatch.setattr(task_module, "find_task", lambda name: task())
    context = WorkContext(Blobs(tmp_path / "blobs"), tmp_path)
    model = context.blobs.write(to_safetensors(model_to_tensors(Table().build_model(0))))
    plan = (make_plan if strategy == "fedavg" else make_sum_plan)(model_sha256=model.sha256)
    for number in range(3):
        entropy = DeterministicEntropy(bytes(32), purpose=str(number))
        params = {"options": {}, "declared_rows": ROWS}
        if task is Writes:
            with pytest.raises(InvalidInput, match=r"read-only \(test_rows\.py:\d+\)"):
                contribution(plan, params, context, entropy=entropy)
        else:
            assert contribution(plan, params, context, entropy=entropy).shape == (10,)
    assert Table.read == 1
