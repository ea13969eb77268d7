"""What is not trained of a model comes from the job's seed: at the parties, where it is measured, and in the result."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load

from src.aggregator import work
from src.aggregator.work import HANDLERS, model_shape
from src.errors import EvaluationError, InvalidInput, SottoError
from src.jobs.executors.units import WorkContext, decode_reply, encode_unit, execute
from src.learning import installed
from src.learning.flatten import model_to_tensors, to_safetensors
from src.learning.model_file import read_model_file
from src.learning.task import Dataset
from src.learning.whole import digest_of_rest, model_file_of
from src.party.work import _model
from src.storage.blobs import Blobs

SEED = 5


class Frozen:
    """A random extractor that is not trained, a statistic in a buffer, and a head that is."""

    name = "frozen"
    version = 0

    def build_model(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed + self.version)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        net[0].requires_grad_(False)
        net.register_buffer("order", torch.randperm(6))
        return net

    def load_data(self, options: Any) -> Dataset:
        features = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
        with torch.no_grad():
            labels = self.build_model(SEED)(torch.from_numpy(features)).argmax(1).numpy()
        return Dataset(features, labels, "what the model of seed 5 says")

    load_holdout = load_data


class Newer(Frozen):
    version = 1


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("frozen", f"{__name__}:Frozen", "sotto.tasks")]
    monkeypatch.setattr(installed, "entry_points", lambda group: points)


@pytest.fixture
def context(tmp_path: Path) -> WorkContext:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    return WorkContext(Blobs(tmp_path / "blobs"), workspace)


def run(context: WorkContext, name: str, **params: Any) -> dict[str, Any]:
    return decode_reply(execute(encode_unit(name, params, version=1), HANDLERS, context))


def whole(context: WorkContext, sha256: str, **params: Any) -> dict[str, Any]:
    known = {"task": "frozen", "seed": SEED, "initial": "", "not_trained": "", "sha256": sha256}
    return run(context, "whole_model", **{**known, **params})


def accuracy(context: WorkContext, sha256: str, seed: int | None, **params: Any) -> float:
    known: dict[str, Any] = {"task": "frozen", "options": {}, "sha256": sha256, "seed": seed, "not_trained": ""}
    return float(run(context, "evaluate_model", **{**known, **params})["metrics"]["accuracy"])


def test_a_round_has_what_is_trained_and_the_digest_of_the_rest_is_known_beside_it(context: WorkContext) -> None:
    made = run(context, "initial_model", task="frozen", seed=SEED)
    assert read_model_file(context.blobs.read(made["sha256"])).entries.keys() == {"2.weight", "2.bias"}
    assert made["dimension"] == 18
    assert made["not_trained"] == digest_of_rest(Frozen().build_model(SEED))
    assert run(context, "task_shape", task="frozen", seed=SEED)["not_trained"] == made["not_trained"]


def test_a_model_is_measured_with_what_its_seed_gives_it(context: WorkContext) -> None:
    sha256 = run(context, "initial_model", task="frozen", seed=SEED)["sha256"]
    assert accuracy(context, sha256, SEED) == 1.0
    assert accuracy(context, sha256, 0) < 0.9  # as every evaluation was, whatever the seed


def test_a_result_is_the_whole_model_and_is_measured_as_its_rounds_were(context: WorkContext) -> None:
    made = run(context, "initial_model", task="frozen", seed=SEED)
    result = whole(context, made["sha256"], not_trained=made["not_trained"])
    fresh = Frozen().build_model(0)
    fresh.load_state_dict(load(context.blobs.read(result["sha256"])), strict=True)
    expected = Frozen().build_model(SEED).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
    assert result["not_trained"] == made["not_trained"]
    assert accuracy(context, result["sha256"], None) == accuracy(context, result["sha256"], 0) == 1.0
    assert model_shape(context.blobs.read(result["sha256"])) == 18  # and a job can begin with it


def test_an_aggregator_without_torch_makes_it_of_the_model_that_the_job_came_with(
    context: WorkContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = context.blobs.write(model_file_of(Frozen().build_model(SEED)).to_bytes())
    trained = Frozen().build_model(SEED)
    with torch.no_grad():
        cast(Any, trained)[2].weight.mul_(2.0)
    sha256 = context.blobs.write(to_safetensors(model_to_tensors(trained))).sha256
    monkeypatch.setattr(work, "has_torch", lambda: False)
    result = whole(context, sha256, initial=initial.sha256)
    assert context.blobs.read(result["sha256"]) == model_file_of(trained).to_bytes()


def test_an_aggregator_that_would_build_another_rest_says_so_and_makes_nothing_up(
    context: WorkContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(context, "initial_model", task="frozen", seed=SEED)
    monkeypatch.setattr(Frozen, "version", 1)
    with pytest.raises(InvalidInput, match="what is not trained of the task's model"):
        whole(context, made["sha256"], not_trained=made["not_trained"])
    with pytest.raises(EvaluationError, match="what is not trained of the task's model"):
        accuracy(context, made["sha256"], SEED, not_trained=made["not_trained"])


def test_what_is_trained_alone_is_not_measured_with_any_rest(context: WorkContext) -> None:
    """A file that a scientist brings says no seed; a training does, and its artifact may be of an earlier version."""
    sha256 = run(context, "initial_model", task="frozen", seed=SEED)["sha256"]
    with pytest.raises(InvalidInput, match="holds what is trained of the model alone, and the rest is not known"):
        accuracy(context, sha256, None)


def test_an_export_holds_the_whole_model(context: WorkContext) -> None:
    made = whole(context, run(context, "initial_model", task="frozen", seed=SEED)["sha256"])
    file = run(context, "export_model", sha256=made["sha256"], format="npz")
    with np.load(context.blobs.path(file["sha256"]), allow_pickle=False) as archive:
        found = dict(archive)
    for name, value in Frozen().build_model(SEED).state_dict().items():
        assert np.array_equal(found[name], value.numpy())
        assert found[name].dtype == value.numpy().dtype


def party_s(context: WorkContext, made: dict[str, Any], **fields: Any) -> Any:
    known = {"task": "frozen", "seed": SEED, "model_sha256": made["sha256"], "dimension": made["dimension"]}
    return _model(cast(Any, SimpleNamespace(**{**known, "not_trained": made["not_trained"], **fields})), context)


def test_a_party_that_has_another_rest_does_not_train_and_says_which_fault_it_is(
    context: WorkContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(context, "initial_model", task="frozen", seed=SEED)
    _, model, _ = party_s(context, made)
    assert digest_of_rest(model) == made["not_trained"]
    monkeypatch.setattr(Frozen, "version", 1)
    with pytest.raises(SottoError) as caught:
        party_s(context, made)
    assert caught.value.metadata["problem"] == "NOT_TRAINED_STATE_DIFFERS"
    party_s(context, made, not_trained="")  # nobody knows, as with aggregators of earlier versions


def test_a_party_takes_the_whole_model_that_a_job_came_with(context: WorkContext) -> None:
    stored = model_file_of(Frozen().build_model(SEED))
    made = {"sha256": context.blobs.write(stored.to_bytes()).sha256, "dimension": 18, "not_trained": stored.not_trained}
    _, model, parameters = party_s(context, made)
    assert parameters.shape == (18,)
    assert digest_of_rest(model) == stored.not_trained
    assert json.loads(json.dumps(made)) == made


MODELS: dict[str, tuple[Any, str]] = {
    "bfloat16": (
        lambda seed: torch.nn.Linear(6, 2).bfloat16(),
        "parameter 'weight' is bfloat16; models are trained in",
    ),
    "float64": (lambda seed: torch.nn.Linear(6, 2).double(), "parameter 'weight' is float64; models are trained"),
    "lazy": (lambda seed: torch.nn.LazyLinear(2), "is not initialised: a lazy layer"),
    "none trained": (lambda seed: torch.nn.Linear(6, 2).requires_grad_(False), "no parameter to train"),
    "a list": (lambda seed: [torch.nn.Parameter(torch.zeros(3))], "returns a torch.nn.Module; here it returns a list"),
    "raises": (lambda seed: torch.nn.Linear(-1, 2), r"cannot be built: RuntimeError at .*test_whole_models\.py:\d+"),
}


@pytest.mark.parametrize("which", MODELS)
def test_a_model_that_cannot_be_trained_is_refused_when_a_job_asks_for_it(
    context: WorkContext, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    build, said = MODELS[which]
    monkeypatch.setattr(Frozen, "build_model", lambda self, seed: build(seed))
    with pytest.raises(InvalidInput, match=said):
        run(context, "task_shape", task="frozen", seed=0)
    with pytest.raises(InvalidInput, match=said):
        run(context, "initial_model", task="frozen", seed=0)
