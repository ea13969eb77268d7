"""A row that counts for nothing: the party contributes as without it, nobody hears of it but its owner, who asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from src import cli
from src.errors import ConfigError, InvalidInput
from src.jobs.executors.units import WorkContext
from src.learning import task as task_module
from src.learning.flatten import model_to_tensors, to_safetensors
from src.learning.task import Dataset, default_loss
from src.party import check
from src.party.work import contribution
from src.privacy.entropy import DeterministicEntropy
from src.protocol.plan import RoundPlan
from src.storage.blobs import Blobs

ROWS, COLUMNS = 60, 9
ROOT = Path(__file__).resolve().parents[2]


class Wards:
    """Ten parameters; `broken` rows hold a NaN, and `unknown` ones a label for which there is no loss."""

    name = "randhie"
    broken: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(COLUMNS, 1)

    def load_data(self, options: object) -> Dataset:
        features = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
        features[list(self.broken), 3] = np.nan
        labels = np.arange(ROWS) % 2
        labels[list(self.unknown)] = 7
        return Dataset(features, labels, "x")

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (labels > 1).any():
            raise IndexError("no such class")
        return default_loss(outputs, labels)


@pytest.fixture
def wards(monkeypatch: pytest.MonkeyPatch) -> type[Wards]:
    """Stands where the task `randhie` is."""
    monkeypatch.setattr(Wards, "broken", ())
    monkeypatch.setattr(Wards, "unknown", ())
    for place in (task_module, check):  # units import it when they run
        monkeypatch.setattr(place, "find_task", lambda name: Wards())
    return Wards


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("broken", [(7,), tuple(range(ROWS))], ids=["one of its rows", "all of its rows"])
def test_a_party_contributes_whatever_is_not_finite_in(
    strategy: str,
    broken: tuple[int, ...],
    wards: type[Wards],
    tmp_path: Path,
    make_plan: Callable[..., RoundPlan],
    make_sum_plan: Callable[..., RoundPlan],
) -> None:
    context = WorkContext(Blobs(tmp_path / "blobs"), tmp_path)
    model = context.blobs.write(to_safetensors(model_to_tensors(Wards().build_model(0))))
    plan = (make_plan if strategy == "fedavg" else make_sum_plan)(model_sha256=model.sha256)
    wards.broken = broken
    entropy = DeterministicEntropy(bytes(32), purpose="not finite")
    found = contribution(plan, {"options": {}, "declared_rows": ROWS}, context, entropy=entropy)
    assert found.shape == (10,)


FINE = "60 rows (5000 declared): the task's model takes them, and all of them count in training"
NOT_FINITE = "a value is not finite"
NO_LOSS = "loss or gradient cannot be computed, or is not finite"
ALL = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"
NOTHING = "count for nothing in training; by position, counted from 0:"
FINDINGS: list[tuple[tuple[int, ...], tuple[int, ...], str, int]] = [
    ((), (), FINE, 0),
    ((4, 11), (), f"2 of 60 rows (5000 declared) {NOTHING} {NOT_FINITE} (2): 4, 11", 4),
    (tuple(range(ROWS)), (), f"60 of 60 rows (5000 declared) {NOTHING} {NOT_FINITE} (60): {ALL}", 4),
    ((), (0, 59), f"2 of 60 rows (5000 declared) {NOTHING} {NO_LOSS} (2): 0, 59", 4),
    ((4,), (4, 5), f"2 of 60 rows (5000 declared) {NOTHING} {NOT_FINITE} (1): 4; {NO_LOSS} (1): 5", 4),
]


@pytest.mark.parametrize(("broken", "unknown", "line", "code"), FINDINGS)
def test_the_owner_asks_and_is_told_which_rows(
    broken: tuple[int, ...],
    unknown: tuple[int, ...],
    line: str,
    code: int,
    wards: type[Wards],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the screen of this machine; nothing is sent, and no worker is started."""
    wards.broken, wards.unknown = broken, unknown
    assert cli.run(["party", "--config", str(ROOT / "config/party.yaml"), "--name", "b", "--check-data"]) == code
    printed = capsys.readouterr()
    assert printed.out == f"randhie: {line}\n"
    assert printed.err == ("sotto: not every row can be trained on\n" if code else "")


def test_the_owner_is_told_that_the_tasks_model_does_not_take_the_rows(
    wards: type[Wards], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a job is charged for finding out."""

    def wide(self: Wards, options: object) -> Dataset:
        return Dataset(np.zeros((ROWS, COLUMNS + 3), np.float32), np.arange(ROWS) % 2, "x")

    def texts(self: Wards, options: object) -> Dataset:
        return Dataset(np.zeros((ROWS, COLUMNS), np.float32), np.array(["healthy", "ill"] * (ROWS // 2)), "x")

    for load, text in (
        (wide, "features of shape (12,): RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x12 and 9x1)"),
        (texts, "labels are whole numbers for classes, or floats; here they are <U7"),
    ):
        monkeypatch.setattr(Wards, "load_data", load)
        assert cli.run(["party", "--config", str(ROOT / "config/party.yaml"), "--check-data"]) == 4
        printed = capsys.readouterr().out
        assert printed.startswith("randhie: 60 rows (5000 declared) cannot be trained on: InvalidInput: "), printed
        assert text in printed


class Plain(Wards):
    """With the default loss."""

    def __getattribute__(self, name: str) -> object:
        if name == "loss":
            raise AttributeError(name)
        return super().__getattribute__(name)


LABELS = {
    "from 1": (
        np.arange(ROWS) % 2 + 1,
        f"30 of 60 rows (5000 declared) {NOTHING} a label is no class of the model (30): 1, 3, 5, 7, 9, 11, 13, 15, "
        "17, 19, … (labels are 0 or 1; found 1 and 2: labels seem to start at 1; take labels - 1)",
    ),
    "a code for unknown": (
        np.where(np.arange(ROWS) == 8, 999, np.arange(ROWS) % 2),
        f"1 of 60 rows (5000 declared) {NOTHING} a label is no class of the model (1): 8 (labels are 0 or 1; found "
        "0, 1 and 999: if one of these stands for unknown, leave its rows out, or as they are, to count for nothing)",
    ),
    "a score": (
        np.arange(ROWS) * 1.5,
        "60 rows (5000 declared) cannot be trained on: InvalidInput: labels of one output are floats, and the default "
        "loss is for classes: for a regression, give the task a loss of its own; for classes, bring whole numbers, 0 "
        "and 1 (labels.astype(np.int64))",
    ),
}


@pytest.mark.parametrize("what", LABELS)
def test_the_owner_is_told_what_labels_look_like_that_are_no_classes(
    what: str, wards: type[Wards], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, line = LABELS[what]
    features = np.ones((ROWS, COLUMNS), np.float32)
    monkeypatch.setattr(Plain, "load_data", lambda self, options: Dataset(features, labels, "x"))
    monkeypatch.setattr(check, "find_task", lambda name: Plain())
    assert cli.run(["party", "--config", str(ROOT / "config/party.yaml"), "--check-data"]) == 4
    assert capsys.readouterr().out == f"randhie: {line}\n"


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("what", LABELS)
def test_a_party_contributes_whatever_its_labels_are_and_no_regression_without_a_loss(
    strategy: str,
    what: str,
    wards: type[Wards],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_plan: Callable[..., RoundPlan],
    make_sum_plan: Callable[..., RoundPlan],
) -> None:
    labels, _ = LABELS[what]
    features = np.ones((ROWS, COLUMNS), np.float32)
    monkeypatch.setattr(Plain, "load_data", lambda self, options: Dataset(features, labels, "x"))
    monkeypatch.setattr(task_module, "find_task", lambda name: Plain())
    context = WorkContext(Blobs(tmp_path / "blobs"), tmp_path)
    model = context.blobs.write(to_safetensors(model_to_tensors(Wards().build_model(0))))
    plan = (make_plan if strategy == "fedavg" else make_sum_plan)(model_sha256=model.sha256)
    entropy = DeterministicEntropy(bytes(32), purpose="labels")
    params = {"options": {}, "declared_rows": ROWS}
    if labels.dtype.kind == "f":
        with pytest.raises(InvalidInput, match="for a regression, give the task a loss of its own"):
            contribution(plan, params, context, entropy=entropy)
    else:
        assert contribution(plan, params, context, entropy=entropy).shape == (10,)


def test_the_owner_is_told_why_rows_cannot_be_loaded(
    wards: type[Wards], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(self: Wards, options: object) -> Dataset:
        raise FileNotFoundError("no such file: /srv/wards.npz")

    def misconfigured(self: Wards, options: object) -> Dataset:
        raise ConfigError("the options cannot be used", problems=("file: missing",))

    def nothing(self: Wards, options: object) -> None:
        return None

    for load, text in (
        (unreadable, "FileNotFoundError: no such file"),
        (misconfigured, "ConfigError: the options"),
        (nothing, "AttributeError"),
    ):
        monkeypatch.setattr(Wards, "load_data", load)
        assert cli.run(["party", "--config", str(ROOT / "config/party.yaml"), "--check-data"]) == 4
        assert capsys.readouterr().out.startswith(f"randhie: cannot be loaded: {text}")


def test_the_owner_is_told_that_there_are_no_rows_and_of_a_model_that_writes_into_them(
    wards: type[Wards], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training nobody can write to what was loaded: rows are looked at here as they are held there."""
    kept: list[Dataset] = []

    def load(self: Wards, options: object) -> Dataset:
        kept.append(Dataset(np.ones((ROWS * len(kept), COLUMNS), np.float32), np.arange(ROWS * len(kept)) % 2, "x"))
        return kept[-1]

    real = Wards.loss

    def writes(self: Wards, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if kept and len(kept[-1]):
            kept[-1].features[0] = 0.0
        return real(self, outputs, labels)

    monkeypatch.setattr(Wards, "load_data", load)
    monkeypatch.setattr(Wards, "loss", writes)
    for said in (
        "0 rows (5000 declared): there is nothing to learn from",
        "60 rows (5000 declared) cannot be trained on: InvalidInput: ",
    ):
        assert cli.run(["party", "--config", str(ROOT / "config/party.yaml"), "--check-data"]) == 4
        assert capsys.readouterr().out.startswith(f"randhie: {said}")
    assert kept[-1].features.all()
