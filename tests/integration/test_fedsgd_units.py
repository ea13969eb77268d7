"""fedsgd is central DP-SGD: the units of work of both roles, one after the other, with samples and noise known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import src.learning.dpsgd as central_dpsgd
import src.learning.simulate as simulation
import src.party.work as party_work
from src.aggregator import work as aggregator_work
from src.aggregator.planning import Model, plan_round
from src.encryption.keys import PrivateKey
from src.encryption.scheme import Layout
from src.learning.baselines import pool
from src.learning.flatten import flatten, load_tensors, model_to_tensors, unflatten
from src.learning.settings import LocalTraining
from src.learning.task import Dataset, find_task, loss_of
from src.privacy.entropy import DeterministicEntropy
from src.privacy.noise import discrete_gaussian
from src.privacy.noise_plan import fraction_from_json
from src.privacy.rounding import round_to_nearest
from src.privacy.sampling import poisson_sample
from src.protocol.batches import StoredBatch, fold_batches, write_batch
from src.protocol.plan import RoundPlan
from src.protocol.roster import AGGREGATOR

from .units import KEY, P, Q, UnitsOfWork

PARTIES = ("a", "b", "c")
DECLARED = {"a": 5000, "b": 5400, "c": 6000}
ROUNDS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def injected(name: str, number: int) -> DeterministicEntropy:
    """What a party, or the aggregator, draws from in a round: here it is known."""
    return DeterministicEntropy(bytes(32), purpose="fedsgd", party=name, round_number=number)


def options(name: str) -> dict[str, Any]:
    return {"party": PARTIES.index(name), "parties": 3, "seed": 0}


def dataset(name: str) -> Dataset:
    return find_task("randhie").load_data(options(name))


class Units(UnitsOfWork):
    """A federation of three, which draws what is known."""

    def __init__(
        self,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        noise_by: str = "both",
        scheme: str = "plaintext",
        sampling_rate: float = 0.02,
        quorum: int = 3,
        server: Mapping[str, Any] | None = None,
    ) -> None:
        spec = {
            "task": "randhie",
            "strategy": "fedsgd",
            "trusted_aggregator": noise_by == "aggregator",
            "rounds": ROUNDS,
            "spare_rounds": 0,
            "quorum": quorum,
            "local_training": {"sampling_rate": sampling_rate, "learning_rate": 1.5, "epsilon": 2.0},
            "party_privacy": {"noise_by": noise_by},
            "encryption": {"scheme": scheme},
            "server_optimizer": server or {},
            "seed": 3,
        }
        super().__init__(directory, spec, parties=PARTIES)
        self.monkeypatch = monkeypatch

    def first_model(self) -> Model:
        return self.store(model_to_tensors(find_task("randhie").build_model(self.spec.seed)))

    def plan(self, number: int, model: Model) -> RoundPlan:
        scheme = self.keyring.scheme(self.spec.encryption.scheme)
        return plan_round(
            self.spec,
            job_id="job",
            number=number,
            model=model,
            roster=self.roster,
            scheme=scheme,
            declared_rows=DECLARED,
        )

    def contribute(self, plan: RoundPlan, name: str) -> dict[str, Any]:
        self.monkeypatch.setattr(party_work, "SystemEntropy", lambda: injected(name, plan.round))
        data = {"name": name, "options": options(name), "declared_rows": DECLARED[name]}
        return party_work.HANDLERS["contribute"]({**self.params(plan), **data}, self.context)

    def round(self, plan: RoundPlan, *, state: str = "", contributors: tuple[str, ...] = PARTIES) -> dict[str, Any]:
        """Contribute, noise, fold, open, apply: what `open_aggregate` answers."""
        params = self.params(plan)
        batches = {name: self.contribute(plan, name) for name in contributors}
        if plan.aggregator_adds_noise:
            self.monkeypatch.setattr(aggregator_work, "SystemEntropy", lambda: injected(AGGREGATOR, plan.round))
            batches[AGGREGATOR] = aggregator_work.HANDLERS["make_noise"](params, self.context)
        aggregate = aggregator_work.HANDLERS["fold"]({**params, "batches": batches}, self.context)
        opening = self.opening(aggregate, contributions=len(batches), updates=contributors, state=state)
        return aggregator_work.HANDLERS["open_aggregate"]({**params, **opening}, self.context)

    def train(self) -> tuple[list[RoundPlan], list[NDArray[np.float32]]]:
        """The plans of all rounds, and the parameters before the first and after each."""
        model = self.first_model()
        plans, parameters = [], [self.parameters(model.sha256)]
        state = ""
        for number in range(1, ROUNDS + 1):
            plans.append(self.plan(number, model))
            result = self.round(plans[-1], state=state)
            state = result["state_sha256"]
            model = Model(result["model_sha256"], result["model_bytes"], model.dimension)
            parameters.append(self.parameters(model.sha256))
        return plans, parameters


def draws(plan: RoundPlan) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """The rows that each party sampled, and all the noise of the round, drawn again in the order in which they were."""
    rate, share = float(plan.local.sampling_rate), fraction_from_json(plan.noise.share_sigma2)
    chosen, noise = {}, np.zeros(plan.dimension, np.int64)
    for name in PARTIES:
        source = injected(name, plan.round)
        chosen[name] = poisson_sample(len(dataset(name)), sampling_rate=rate, entropy=source)
        noise += discrete_gaussian(share, plan.dimension, entropy=source)
    own = fraction_from_json(plan.noise.aggregator_sigma2)
    return chosen, noise + discrete_gaussian(own, plan.dimension, entropy=injected(AGGREGATOR, plan.round))


def slow_gradient(
    parameters: NDArray[np.float64], rows: list[tuple[NDArray[Any], Any]], norm: float
) -> NDArray[np.float64]:
    """Σ of clipped gradients, one example at a time, by torch alone."""
    task = find_task("randhie")
    model = task.build_model(0)
    load_tensors(model, unflatten(parameters.astype(np.float32), _signature()))
    model.double()
    with torch.no_grad():
        named = sorted(model.named_parameters())
        start = 0
        for _, parameter in named:
            flat = torch.from_numpy(parameters[start : start + parameter.numel()])
            parameter.copy_(flat.reshape(parameter.shape))
            start += parameter.numel()
    total = np.zeros(start)
    for features, label in rows:
        inputs = torch.from_numpy(features[None].astype(np.float64))
        value = loss_of(task)(model(inputs), torch.tensor([label]))
        found = torch.autograd.grad(value.sum(), [parameter for _, parameter in named])
        gradient = torch.cat([part.reshape(-1) for part in found]).numpy()
        total += gradient * min(1.0, norm / float(np.linalg.norm(gradient)))
    return total


def _signature() -> Any:
    return flatten(model_to_tensors(find_task("randhie").build_model(0)))[1]


@pytest.mark.parametrize("noise_by", ["parties", "both", "aggregator"])
def test_with_the_same_samples_and_noise_it_is_central_dp_sgd_up_to_quantisation(
    noise_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against DP-SGD on pooled rows in its slowest form, parameter by parameter, after each of several steps."""
    plans, found = Units(tmp_path, monkeypatch, noise_by=noise_by).train()
    data = {name: dataset(name) for name in PARTIES}
    central = found[0].astype(np.float64)
    grid = 2.0 ** -plans[0].resolution_bits
    expected_batch = float(plans[0].local.sampling_rate) * sum(DECLARED.values())
    step = 1.5 / expected_batch
    for number, plan in enumerate(plans, start=1):
        chosen, noise = draws(plan)
        assert all(len(rows) for rows in chosen.values())
        rows = [(data[name].features[i], data[name].labels[i]) for name in PARTIES for i in chosen[name]]
        total = slow_gradient(central, rows, 1.0)
        central -= step * (total + noise * grid)
        # Of each step: three roundings of half a unit, the clipping margin, and a float32 for the model.
        quantisation = step * (1.5 * grid + len(rows) * 2.0**-20) + 2.0**-24 * np.abs(central).max()
        np.testing.assert_allclose(found[number], central, rtol=0, atol=2 * number * quantisation)
        assert np.abs(noise).max() * grid * step > 100 * quantisation  # what is compared would be lost in nothing less


def test_with_the_same_samples_and_noise_it_is_what_dp_sgd_computes_on_pooled_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against `train_dpsgd`, with its sampler and its noise replaced by what the federation drew."""
    plans, found = Units(tmp_path, monkeypatch, noise_by="parties").train()
    data = {name: dataset(name) for name in PARTIES}
    starts = dict(zip(PARTIES, np.cumsum([0, len(data["a"]), len(data["b"])]), strict=True))
    task = find_task("randhie")
    model = task.build_model(3)
    samples, noises = [], []
    for plan in plans:
        chosen, noise = draws(plan)
        samples.append(np.concatenate([chosen[name] + starts[name] for name in PARTIES]))
        tensors = unflatten((noise * 2.0**-plan.resolution_bits).astype(np.float32), _signature())
        noises.append(np.concatenate([tensors[name].reshape(-1) for name, _ in model.named_parameters()]))
    assert len(noises) == ROUNDS
    monkeypatch.setattr(central_dpsgd, "poisson_sample", lambda *_, **__: samples.pop(0))
    monkeypatch.setattr(central_dpsgd, "secure_normals", lambda *_: noises.pop(0).astype(np.float64))
    config = LocalTraining(
        steps=ROUNDS,
        sampling_rate=0.02,
        learning_rate=1.5,
        max_grad_norm=1.0,
        noise_multiplier=1.0,  # the injected noise has the right size already
        declared_rows=sum(DECLARED.values()),
    )
    union = pool([data[name] for name in PARTIES])
    central_dpsgd.train_dpsgd(model, union, loss=loss_of(task), config=config, entropy=injected("nobody", 0))
    assert not samples
    assert not noises
    central = flatten(model_to_tensors(model))[0]
    np.testing.assert_allclose(found[-1], central, rtol=0, atol=ROUNDS * 1.5 * 4e-6)
    assert np.abs(found[-1] - found[0]).max() > 0.05


def test_the_aggregators_learning_rate_and_momentum_are_applied_to_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Units(tmp_path / "plain", monkeypatch, noise_by="parties")
    heavy = Units(tmp_path / "heavy", monkeypatch, noise_by="parties", server={"name": "fedavgm", "learning_rate": 0.5})
    _, slow = plain.train()
    _, fast = heavy.train()
    np.testing.assert_allclose(fast[1] - fast[0], 0.5 * (slow[1] - slow[0]), rtol=1e-3, atol=1e-6)
    assert not np.allclose(fast[2] - fast[1], 0.5 * (slow[2] - slow[1]), atol=1e-4)


def test_plaintext_integers_are_those_that_paillier_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same contributions, encrypted and in the clear: the same sums, and the same model to the last bit."""
    sums, models = {}, {}
    values: dict[str, NDArray[np.int64]] = {}
    for name in ("plaintext", "paillier"):
        units = Units(tmp_path / name, monkeypatch, noise_by="parties", scheme=name)
        model = units.first_model()
        plan = units.plan(1, model)
        scheme, layout = units.keyring.scheme(name), Layout.from_json(plan.layout)
        params = units.params(plan)
        batches: dict[str, StoredBatch] = {}
        for party in PARTIES:
            drawn = party_work.contribution(
                plan, {**params, "options": options(party)}, units.context, entropy=injected(party, 1)
            )
            assert np.array_equal(values.setdefault(party, drawn), drawn)
            batches[party] = write_batch(
                scheme,
                plan,
                drawn,
                plan_digest=params["plan_digest"],
                contributor=party,
                blobs=units.context.blobs,
                entropy=injected(party, 99),
            )
        aggregate = fold_batches(
            scheme, plan, batches, plan_digest=params["plan_digest"], blobs=units.context.blobs, unproven=PARTIES
        )
        with units.context.blobs.open(aggregate.sha256) as file:
            opened = scheme.open_with_key(layout, PrivateKey(P, Q, KEY.public), [file.read()])
        sums[name] = np.concatenate(list(scheme.decode(layout, opened, contributions=3)))
        mean = aggregator_work.mean_update(plan, sums[name].astype(np.float64), PARTIES)
        models[name] = units.parameters(model.sha256) + mean
    assert np.array_equal(sums["plaintext"], sums["paillier"])
    assert np.array_equal(sums["plaintext"], sum(values.values()))
    assert np.array_equal(models["plaintext"], models["paillier"])


def test_the_simulation_computes_the_same_models_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the streams of the parties, one after the other: what figures show is what a federation would have had."""
    units = Units(tmp_path, monkeypatch, noise_by="parties")
    plans, found = units.train()

    class InTurn:
        """What each party draws from, in the order in which they contribute."""

        def __init__(self) -> None:
            self.turns = [injected(name, plan.round) for plan in plans for name in PARTIES]

        def words(self, count: int) -> NDArray[np.uint64]:
            return self.turns[0].words(count)

        def token(self, size: int) -> bytes:
            return self.turns[0].token(size)

    entropy, models = InTurn(), []

    def draw(*arguments: Any, **settings: Any) -> NDArray[np.int64]:
        noise = discrete_gaussian(*arguments, **settings)
        entropy.turns.pop(0)  # the last that a party draws in a round
        return noise

    def keep(_task: Any, model: Any, _rows: Dataset) -> dict[str, float]:
        models.append(flatten(model_to_tensors(model))[0])
        return {}

    monkeypatch.setattr(simulation, "discrete_gaussian", draw)
    monkeypatch.setattr(simulation, "evaluate", keep)
    settings = simulation.SumSettings(
        rounds=ROUNDS,
        sampling_rate=0.02,
        max_grad_norm=1.0,
        noise_multiplier=float(plans[0].noise.noise_multiplier),
        learning_rate=1.5,
        declared_rows=DECLARED,
    )
    simulation.simulate_fedsgd(
        find_task("randhie"),
        {name: dataset(name) for name in PARTIES},
        holdout=dataset("a"),
        settings=settings,
        seed=3,
        entropy=entropy,
    )
    assert len(models) == ROUNDS
    for simulated, real in zip(models, found[1:], strict=True):
        assert np.array_equal(simulated, real)


def test_an_empty_batch_is_a_full_upload_of_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = Units(tmp_path, monkeypatch, noise_by="parties", sampling_rate=1e-9)
    plan = units.plan(1, units.first_model())
    stored = units.contribute(plan, "a")
    assert stored["size"] == Layout.from_json(plan.layout).body_bytes
    source = injected("a", 1)
    assert len(poisson_sample(len(dataset("a")), sampling_rate=1e-9, entropy=source)) == 0
    noise = discrete_gaussian(fraction_from_json(plan.noise.share_sigma2), plan.dimension, entropy=source)
    words = np.frombuffer(units.context.blobs.read(stored["sha256"]), ">u8").astype(np.int64)
    assert np.array_equal(words - Layout.from_json(plan.layout).offset, noise)


def test_the_divisor_counts_what_the_contributors_declare_and_not_who_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Units(tmp_path, monkeypatch, noise_by="parties", quorum=2).plan(1, Model("a" * 64, 1, 177))
    total = np.full(177, 2.0**plan.resolution_bits)
    for contributors, rows in ((PARTIES, 16_400), (("a", "c"), 11_000)):
        found = aggregator_work.mean_update(plan, total, contributors)
        np.testing.assert_allclose(found, -1.5 / (0.02 * rows))


def test_a_batch_above_the_cap_is_sent_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of a party that has far more rows than it declares: its sum is shortened to what a slot holds."""
    units = Units(tmp_path, monkeypatch, noise_by="parties")
    plan = units.plan(1, units.first_model())
    assert plan.gradient_sum is not None
    cap, layout = plan.gradient_sum.batch_cap, Layout.from_json(plan.layout)
    direction = np.zeros(plan.dimension)
    direction[0] = 1.0
    for rows in (cap, cap + 1, 40 * cap):
        values = party_work.encode_sum(direction * rows, plan, entropy=injected("a", 1))
        noise = values - round_to_nearest(direction * cap, resolution_bits=plan.resolution_bits)
        assert np.abs(noise).max() <= plan.noise.bound
        assert np.abs(values).max() <= layout.offset
    assert Fraction(cap) < Fraction(DECLARED["c"])
