"""The demonstration's task: who is a person, who gets which rows, and that there is something to learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from src.errors import ConfigError, InvalidInput
from src.learning.baselines import central, pool, pooled_training
from src.learning.evaluation import evaluate
from src.learning.flatten import flatten, model_to_tensors
from src.learning.server_optimizer import ServerOptimizer
from src.learning.settings import LocalTraining
from src.learning.simulate import FederationSettings, simulate
from src.learning.task import Dataset
from src.learning.tasks import randhie
from src.learning.tasks.randhie import COVARIATES, DEMO, RandHieTask
from src.privacy.entropy import DeterministicEntropy

TASK = RandHieTask()
ROWS = 20_190
SIZES = [2, 3, 5, 20]


def parts(parties: int, seed: int = 0) -> tuple[list[Dataset], Dataset]:
    """Every party's rows, and the hold-out rows."""
    options: dict[str, object] = {"parties": parties, "seed": seed}
    return [TASK.load_data(options | {"party": party}) for party in range(parties)], TASK.load_holdout(options)


@pytest.mark.parametrize("parties", SIZES)
def test_every_row_is_in_one_place(parties: int) -> None:
    data, holdout = parts(parties)
    assert sum(map(len, data)) + len(holdout) == ROWS
    everything = np.concatenate([*(each.features for each in data), holdout.features])
    labels = np.concatenate([*(each.labels for each in data), holdout.labels])
    rows = np.column_stack([everything, labels])
    file = randhie._file()
    original = np.column_stack([file.features, file.labels])
    assert np.array_equal(rows[np.lexsort(rows.T)], original[np.lexsort(original.T)])


@pytest.mark.parametrize("parties", SIZES)
def test_no_person_is_in_two_places(parties: int) -> None:
    """A person's rows are adjacent and share health covariates: no two adjacent rows that do are apart."""
    place = randhie._assignment(parties, 0, 0.2)[randhie._file().group]
    health = randhie._file().features[:, [list(COVARIATES).index(name) for name in randhie._HEALTH]]
    same = (health[1:] == health[:-1]).all(axis=1)
    assert same.sum() == ROWS - 4902
    assert np.array_equal(place[1:][same], place[:-1][same])
    assert set(place) == set(range(-1, parties))


@pytest.mark.parametrize("parties", SIZES)
def test_parties_are_of_comparable_size(parties: int) -> None:
    data, holdout = parts(parties)
    sizes = np.array([len(each) for each in data])
    assert sizes.max() < 1.1 * sizes.min()
    assert 0.2 * ROWS <= len(holdout) < 0.21 * ROWS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parties_have_different_plans(seed: int) -> None:
    """Shares of the five plans differ between two of three parties by a tenth of the rows at least."""
    data, _ = parts(3, seed)
    plans = np.unique(data[0].features[:, 0])
    assert len(plans) == 5
    mixes = np.array([[np.mean(each.features[:, 0] == plan) for plan in plans] for each in data])
    distances = [np.abs(mixes[i] - mixes[j]).sum() / 2 for i in range(3) for j in range(i)]
    assert max(distances) > 0.1


def test_the_same_seed_gives_the_same_split_and_the_hold_out_depends_on_nothing_else() -> None:
    data, holdout = parts(3, 5)
    again, _ = parts(3, 5)
    _, of_ten = parts(10, 5)
    other, _ = parts(3, 6)
    assert np.array_equal(data[1].features, again[1].features)
    assert np.array_equal(holdout.features, of_ten.features)
    assert data[1].features.shape != other[1].features.shape or not np.array_equal(data[1].features, other[1].features)


def test_the_description_tells_no_count() -> None:
    data, _ = parts(3)
    assert str(len(data[0])) not in data[0].description
    assert "party 0 of 3" in data[0].description


def test_features_are_of_order_one_and_labels_are_visits() -> None:
    file = randhie._file()
    assert file.features.shape == (ROWS, 9)
    assert np.abs(file.features).max() < 5
    assert np.linalg.norm(file.features, axis=1).max() < 6
    assert 0.68 < file.labels.mean() < 0.69


def test_the_model_is_small_and_its_seed_decides_it() -> None:
    vectors = [flatten(model_to_tensors(TASK.build_model(seed)))[0] for seed in (0, 0, 1)]
    assert len(vectors[0]) == 177
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])


REFUSED: list[tuple[dict[str, object], list[str]]] = [
    ({"pary": 0}, ["pary"]),
    ({"party": 3, "parties": 3}, ["party"]),
    ({"party": -1}, ["party"]),
    ({"party": "0"}, ["party"]),
    ({"parties": 1}, ["parties"]),
    ({"parties": 21}, ["parties"]),
    ({"parties": True}, ["parties"]),
    ({"seed": 1.5}, ["seed"]),
    ({"holdout": 0.0}, ["holdout"]),
    ({"holdout": True, "seed": None}, ["seed", "holdout"]),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=str)
def test_refuses_options(options: dict[str, object], named: list[str]) -> None:
    for load in (TASK.load_data, TASK.load_holdout):
        with pytest.raises(ConfigError) as caught:
            load(options)
        assert [problem.split(":")[0] for problem in caught.value.problems] == named


def source(name: str) -> DeterministicEntropy:
    return DeterministicEntropy(b"tests/randhie", purpose=name)


def test_central_baselines_learn() -> None:
    """Without privacy and with DP-SGD at the demonstration's noise, well above what chance and a constant give: after
    one of the demonstration's rounds already."""
    data, holdout = parts(DEMO.parties)
    local = DEMO.local_training(noise_multiplier=2.77)
    private = pooled_training(local, rounds=1, parties=DEMO.parties, learning_rate=DEMO.central_dp_learning_rate)
    assert private.steps == local.steps
    assert private.expected_batch == pytest.approx(DEMO.parties * local.expected_batch)
    assert (private.sampling_rate, private.noise_multiplier) == (local.sampling_rate, local.noise_multiplier)
    plain = replace(DEMO.central_training(), steps=500)
    result = central(TASK, data, holdout=holdout, plain=plain, private=private, seed=0, entropy=source("central"))
    start = evaluate(TASK, TASK.build_model(0), holdout)
    assert result.central["auc"] >= 0.63
    assert result.central_dp["auc"] >= 0.62
    assert start["auc"] < 0.6
    assert result.central["n"] == len(holdout)


def test_pooling_is_the_union_and_refuses_nothing_and_mixtures() -> None:
    data, _ = parts(3)
    pooled = pool(data)
    assert np.array_equal(pooled.features, np.concatenate([each.features for each in data]))
    assert len(pooled) == sum(map(len, data))
    narrow = Dataset(np.zeros((1, 2), np.float32), np.zeros(1), "x")
    for wrong in ([], [data[0], narrow]):
        with pytest.raises(InvalidInput):
            pool(wrong)


def simulated(**changes: Any) -> list[dict[str, float]]:
    data, holdout = parts(3)
    local = LocalTraining(10, 0.05, 1.5, 1.0, 1.0, DEMO.declared_rows)
    defaults: dict[str, Any] = {"rounds": 3, "local": local, "clipping_norm": 0.5, "party_noise_multiplier": 0.2}
    settings = FederationSettings(**(defaults | changes))
    return simulate(TASK, data, holdout=holdout, settings=settings, seed=0, entropy=source("federation"))


def test_a_simulated_federation_learns_and_is_repeatable() -> None:
    history = simulated()
    assert history[0]["auc"] == simulated(rounds=1)[0]["auc"]
    assert history[-1]["auc"] > 0.58
    assert len(history) == 3


def test_party_level_noise_and_the_clipping_norm_matter() -> None:
    """Noise far above the clipping norm destroys the model, and a tiny norm keeps it where it started."""
    start = evaluate(TASK, TASK.build_model(0), parts(3)[1])["auc"]
    drowned = simulated(rounds=1, party_noise_multiplier=200.0)[-1]["auc"]
    pinned = simulated(rounds=1, clipping_norm=1e-6, party_noise_multiplier=0.0)[-1]["auc"]
    assert abs(pinned - start) < 1e-3
    assert abs(drowned - start) > 1e-3


def test_rounds_are_announced_one_by_one() -> None:
    seen: list[int] = []
    data, holdout = parts(20)
    settings = FederationSettings(2, LocalTraining(1, 0.01, 1.0, 1.0, 1.0, 800), 1.0, 0.0, ServerOptimizer("fedavgm"))
    history = simulate(
        TASK,
        data[:2],
        holdout=holdout,
        settings=settings,
        seed=1,
        entropy=source("announced"),
        on_round=lambda number, metrics: seen.append(number),
    )
    assert seen == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["auc"])) for row in history)


@pytest.mark.parametrize("change", [{"rounds": 0}, {"clipping_norm": 0.0}, {"party_noise_multiplier": -1.0}], ids=str)
def test_refuses_settings_of_a_federation(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as caught:
        simulated(**change)
    assert [problem.split(":")[0] for problem in caught.value.problems] == list(change)
