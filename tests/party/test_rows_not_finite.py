"""A row that is not finite: the party contributes as without it, nobody hears of it but its owner, who asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from src import cli
from src.errors import ConfigError
from src.jobs.executors.units import WorkContext
from src.learning import task as task_module
from src.learning.flatten import model_to_tensors, to_safetensors
from src.learning.task import Dataset
from src.party import check
from src.party.work import contribution
from src.privacy.entropy import DeterministicEntropy
from src.protocol.plan import RoundPlan
from src.storage.blobs import Blobs

ROWS, COLUMNS = 60, 9
ROOT = Path(__file__).resolve().parents[2]


class Wards:
    """Ten parameters; `broken` rows hold a NaN."""

    name = "randhie"
    broken: tuple[int, ...] = ()

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(COLUMNS, 1)

    def load_data(self, options: object) -> Dataset:
        features = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
        features[list(self.broken), 3] = np.nan
        return Dataset(features, np.arange(ROWS) % 2, "x")


@pytest.fixture
def wards(monkeypatch: pytest.MonkeyPatch) -> type[Wards]:
    """Stands where the task `randhie` is."""
    monkeypatch.setattr(Wards, "broken", ())
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


@pytest.mark.parametrize(
    ("broken", "line", "code"),
    [
        ((), "randhie: 60 rows (5000 declared), all of them finite", 0),
        (
            (4, 11),
            "randhie: 2 of 60 rows (5000 declared) hold a value that is not finite, and count for nothing in training: "
            "4, 11",
            4,
        ),
        (
            tuple(range(ROWS)),
            "randhie: 60 of 60 rows (5000 declared) hold a value that is not finite, and count for nothing in "
            "training: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …",
            4,
        ),
    ],
)
def test_the_owner_asks_and_is_told_which_rows(
    broken: tuple[int, ...], line: str, code: int, wards: type[Wards], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the screen of this machine; nothing is sent, and no worker is started."""
    wards.broken = broken
    assert cli.run(["party", "--config", str(ROOT / "config/party.yaml"), "--name", "b", "--check-data"]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (line + "\n", "sotto: not every row can be trained on\n" if code else "")


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
