"""The audit finds what is broken in DP-SGD, by training as it is run, and does not flag what is right.

Every run is seeded, so no outcome is left to chance: also where the command line would draw from the operating system.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src import cli
from src.cli import audit as command
from src.errors import CATALOGUE, ConfigError, InvalidInput, NotFoundError, Refused
from src.learning import audit as audits
from src.learning.audit import AuditPlan, AuditResult, Trainer, audit, claimed, noise_test, plan_audit
from src.learning.canaries import WithCanaries
from src.learning.dpsgd import train_dpsgd
from src.learning.per_example import computed_as_chain
from src.learning.settings import LocalTraining
from src.learning.task import Dataset, Loss, default_loss
from src.privacy.audit import VERDICT_P, correct_guesses, epsilon_lower_bound, p_value, verdict_delta
from src.privacy.entropy import DeterministicEntropy, Entropy

MakeEntropy = Callable[[str], Entropy]
MakeData = Callable[..., Dataset]


def linear(features: int = 4) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Linear(features, 1)


def normalised(features: int = 4) -> torch.nn.Module:
    """Goes by gradients that are written out, the other path of DP-SGD."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(features, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))


def broken(change: Callable[[LocalTraining], LocalTraining]) -> Trainer:
    """DP-SGD that claims one configuration and runs another."""

    def train(model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy) -> None:
        train_dpsgd(model, dataset, loss=loss, config=change(config), entropy=entropy)

    return train


NOISE_OFF = broken(lambda config: replace(config, noise_multiplier=0.0))
NOISE_HALVED = broken(lambda config: replace(config, noise_multiplier=config.noise_multiplier / 2))
CLIPPING_OFF = broken(
    lambda config: replace(
        config, max_grad_norm=config.max_grad_norm * 1e6, noise_multiplier=config.noise_multiplier / 1e6
    )
)
"""Noise as planned, in a bound that no gradient reaches."""


@pytest.fixture
def run(data: MakeData, entropy: MakeEntropy) -> Callable[..., AuditResult]:
    """An audit of `model` beside 50 rows, repeatable."""

    def audited(plan: AuditPlan, train: Trainer = train_dpsgd, model: torch.nn.Module | None = None) -> AuditResult:
        return audit(model or linear(), data(50), loss=default_loss, plan=plan, entropy=entropy("audit"), train=train)

    return audited


Run = Callable[..., AuditResult]
SMALL = {"epsilon": 1.0, "canaries": 1000, "rows": 50}
SUBSAMPLED: dict[str, Any] = {"sampling_rate": 0.3, "steps": 15} | SMALL
FULL_BATCH: dict[str, Any] = {"sampling_rate": 1.0, "steps": 3} | SMALL

planned = functools.cache(plan_audit)
"""Calibration under sampling takes a second: once for all tests of a configuration."""


@pytest.mark.parametrize("build", [linear, normalised])
@pytest.mark.parametrize("config", [SUBSAMPLED, FULL_BATCH], ids=["subsampled", "full batch"])
@pytest.mark.parametrize("fault", [NOISE_OFF, CLIPPING_OFF], ids=["noise off", "clipping off"])
def test_noise_off_and_clipping_off_are_refuted(
    build: Callable[[], torch.nn.Module], config: dict[str, Any], fault: Trainer, run: Run
) -> None:
    """On both paths of DP-SGD; the number of guesses is in the plan, before anything is drawn."""
    rows = Dataset(np.zeros((1, 4), np.float32), np.zeros(1, np.int64), "x")
    assert computed_as_chain(build(), rows, loss=default_loss) == (build is linear)
    plan = planned(**config)
    assert plan.guesses == 100
    found = run(plan, fault, build())
    assert found.guesses_flagged
    assert found.verdict_p_value <= VERDICT_P
    assert found.exceeded
    assert found.verdict_lower_bound > found.verdict_epsilon
    assert found.exceeds(1.0)
    assert found.variance_flagged == (fault is NOISE_OFF)


@pytest.mark.parametrize("build", [linear, normalised])
@pytest.mark.parametrize("config", [SUBSAMPLED, FULL_BATCH], ids=["subsampled", "full batch"])
def test_the_right_mechanism_is_not_flagged(
    build: Callable[[], torch.nn.Module], config: dict[str, Any], run: Run
) -> None:
    found = run(planned(**config), model=build())
    assert found.epsilon <= 1.0
    assert not any((found.exceeded, found.guesses_flagged, found.variance_flagged))
    assert not found.exceeds(1.0)
    assert 400 < found.included < 600


def test_halved_noise_is_found_at_epsilon_one_by_the_guesses_and_by_the_variance(run: Run) -> None:
    """20 000 Dirac canaries; the guesses alone put ε above the claim, at confidence 95 %."""
    plan = plan_audit(sampling_rate=1.0, steps=1, epsilon=1.0, rows=50, canaries=20_000)
    assert plan.guesses == 400
    halved, right = run(plan, NOISE_HALVED), run(plan)
    assert halved.lower_bound > 1.0 >= halved.epsilon
    assert halved.exceeded
    assert halved.variance_flagged
    assert 0.24 < halved.variance.ratio < 0.26
    assert 0.3 < right.lower_bound < 0.8
    assert not any((right.exceeded, right.guesses_flagged, right.variance_flagged))


def test_halved_noise_is_found_at_epsilon_one_under_sampling_too(data: MakeData, entropy: MakeEntropy) -> None:
    """30 steps at a rate of 0.05: each step is looked at, so the auditor too gains from knowing the rate."""
    plan = plan_audit(sampling_rate=0.05, steps=30, epsilon=1.0, rows=50, canaries=20_000)
    source = entropy("sampled")
    included = audits._coins(plan.canaries, source)
    scores = audits._dirac_scores(
        linear(), data(50), loss=default_loss, plan=plan, included=included, entropy=source, train=NOISE_HALVED
    )
    guessed = {"canaries": plan.canaries, "guesses": plan.guesses}
    correct = correct_guesses(scores, included, guesses=plan.guesses)
    assert epsilon_lower_bound(**guessed, correct=correct, delta=plan.delta, p=0.05) > 1.0


def scores_of_a_full_batch(
    multiplier: float, canaries: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What one step on all canaries gives, in clipping norms."""
    generator = np.random.default_rng(seed)
    included = generator.random(canaries) < 0.5
    return included + multiplier * generator.normal(size=canaries), included


@pytest.mark.parametrize(("factor", "least", "most"), [(0.5, 40, 40), (1.0, 0, 0)])
def test_the_power_and_the_false_alarms_that_the_documentation_states(factor: float, least: int, most: int) -> None:
    """40 seeded audits at ε = 1 with 100 000 canaries: halved noise found each time, the planned noise never."""
    plan = plan_audit(sampling_rate=1.0, steps=1, epsilon=1.0)
    found = 0
    for seed in range(40):
        scores, included = scores_of_a_full_batch(factor * plan.training.noise_multiplier, plan.canaries, seed)
        correct = correct_guesses(scores, included, guesses=plan.guesses)
        # Above the claim if and only if the claim is refuted.
        claim = claimed(plan.training, plan.delta)
        p = p_value(canaries=plan.canaries, guesses=plan.guesses, correct=correct, epsilon=claim, delta=plan.delta)
        found += p < 0.05
    assert least <= found <= most


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_without_noise_a_dirac_canarys_score_says_how_often_it_was_sampled(
    momentum: float, data: MakeData, entropy: MakeEntropy
) -> None:
    """The canary layer sees coordinates clipped to the bound, and nothing of the model's own rows."""
    plan = planned(**SUBSAMPLED)
    plan = replace(plan, training=replace(plan.training, momentum=momentum))
    training, included = plan.training, np.arange(1000) % 2 == 0
    scores = audits._dirac_scores(
        linear(), data(50), loss=default_loss, plan=plan, included=included, entropy=entropy("x"), train=NOISE_OFF
    )
    rate, variance = training.sampling_rate, (0.5 * training.noise_multiplier) ** 2
    seen, unseen = (math.log(1 - rate + rate * math.exp(sign / (2 * variance))) for sign in (1, -1))
    times = (scores - training.steps * unseen) / (seen - unseen)
    np.testing.assert_allclose(times, np.round(times), atol=1e-3)
    np.testing.assert_allclose(times[~included], 0.0, atol=1e-3)
    assert times.max() <= training.steps
    # 500 binomial counts, 15 draws of 0.3 each: their mean has a standard error of 0.08, and the draws are seeded.
    assert abs(times[included].mean() - 4.5) < 0.5


def test_the_model_and_its_own_rows_train_as_without_canaries(data: MakeData, training: Any) -> None:
    """Sampling and noise aside: full batch, no noise, canaries beside it; the model ends where it ends without them."""
    rows, config = data(32), training(steps=3, max_grad_norm=0.1)
    alone, wrapped = linear(), WithCanaries(linear(), rows, side=4)
    source = DeterministicEntropy(b"x", purpose="unused")
    train_dpsgd(alone, rows, loss=default_loss, config=config, entropy=source)
    both = wrapped.dataset(rows, rows, np.array([0, 5, 15]))
    train_dpsgd(wrapped, both, loss=wrapped.loss_beside(default_loss, 10.0), config=config, entropy=source)
    for one, other in zip(alone.parameters(), wrapped.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    moved = torch.nonzero(wrapped.canaries.weight.reshape(-1)).reshape(-1)
    assert moved.tolist() == [0, 5, 15]


def test_an_audit_leaves_the_model_and_torchs_generator_alone(run: Run) -> None:
    model = linear()
    before, state = [value.clone() for value in model.parameters()], torch.get_rng_state()
    run(plan_audit(**FULL_BATCH), model=model)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------- other canaries


def test_canaries_that_are_examples_find_missing_noise_in_a_model_that_can_remember(
    data: MakeData, entropy: MakeEntropy
) -> None:
    """2 000 weights, 500 canaries, each judged by its loss alone."""
    plan = plan_audit(**SUBSAMPLED | {"kind": "examples", "canaries": 500, "steps": 20})
    found = {
        name: audit(
            linear(2000), data(50, 2000), loss=default_loss, plan=plan, entropy=entropy("examples"), train=train
        )
        for name, train in {"right": train_dpsgd, "off": NOISE_OFF}.items()
    }
    assert found["off"].guesses_flagged
    assert found["off"].exceeded
    right = found["right"]
    assert not any((right.exceeded, right.guesses_flagged, right.variance_flagged))


@pytest.mark.parametrize("labels", [np.zeros(0, np.int64), np.zeros(3, np.float32)], ids=["no rows", "no classes"])
def test_refuses_rows_that_no_examples_can_be_made_from(labels: NDArray[Any], entropy: MakeEntropy) -> None:
    plan = plan_audit(**SUBSAMPLED | {"kind": "examples"})
    rows = Dataset(np.ones((len(labels), 4), np.float32), labels, "x")
    with pytest.raises(ConfigError, match="made from public rows"):
        audit(linear(), rows, loss=default_loss, plan=plan, entropy=entropy("x"))


def test_dirac_canaries_need_no_rows(entropy: MakeEntropy) -> None:
    none = Dataset(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), "none")
    found = audit(linear(), none, loss=default_loss, plan=plan_audit(**FULL_BATCH), entropy=entropy("x"))
    assert not found.exceeds(1.0)


# ----------------------------------------------------------------------------------------------------- the noise test


class Repeated:
    """Entropy that gives every draw of a size the same words: noise that a difference takes away."""

    def __init__(self, source: Entropy) -> None:
        self.source = source
        self.seen: dict[int, NDArray[np.uint64]] = {}

    def token(self, size: int) -> bytes:
        return self.source.token(size)

    def words(self, count: int) -> NDArray[np.uint64]:
        return self.seen.setdefault(count, self.source.words(count))


def same_noise_in_every_step(
    model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
) -> None:
    train_dpsgd(model, dataset, loss=loss, config=config, entropy=Repeated(entropy))


def a_layer_without_noise(
    model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
) -> None:
    first = next(model.parameters())
    before = first.detach().clone()
    train_dpsgd(model, dataset, loss=loss, config=config, entropy=entropy)
    with torch.no_grad():
        first.copy_(before)


FAULTS = {
    "noise off": NOISE_OFF,
    "noise halved": NOISE_HALVED,
    "noise doubled": broken(lambda config: replace(config, noise_multiplier=config.noise_multiplier * 2)),
    "a twentieth too little": broken(lambda config: replace(config, noise_multiplier=config.noise_multiplier * 0.95)),
    "one step left out": broken(lambda config: replace(config, steps=config.steps - 1)),
    "the same noise in every step": same_noise_in_every_step,
    "a layer without noise": a_layer_without_noise,
}


@pytest.mark.parametrize("build", [linear, normalised])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_noise_test_finds(
    fault: str, build: Callable[[], torch.nn.Module], data: MakeData, entropy: MakeEntropy
) -> None:
    config = LocalTraining(4, 0.5, 0.1, 0.7, 1.5, declared_rows=80)
    pooled, smallest = noise_test(
        build(), data(5), loss=default_loss, training=config, entropy=entropy("noise"), train=FAULTS[fault]
    )
    assert pooled.flagged or smallest <= 1e-6
    if fault != "a layer without noise":
        assert pooled.flagged


@pytest.mark.parametrize("build", [linear, normalised])
@pytest.mark.parametrize(
    "change", [{}, {"momentum": 0.9}, {"sampling_rate": 1.0}, {"max_grad_norm": 1e-6}, {"max_grad_norm": 1e4}], ids=str
)
def test_the_noise_test_passes_what_is_right(
    change: dict[str, float], build: Callable[[], torch.nn.Module], data: MakeData, entropy: MakeEntropy
) -> None:
    """False alarm at most 2e-6 for each by the bound, and the draws are seeded."""
    config = replace(LocalTraining(4, 0.5, 0.1, 0.7, 1.5, declared_rows=80), **change)  # type: ignore[arg-type]
    pooled, smallest = noise_test(build(), data(5), loss=default_loss, training=config, entropy=entropy("right"))
    assert not pooled.flagged
    assert smallest > 1e-6
    assert pooled.count == 256 * 256 - 1 + sum(value.numel() for value in build().parameters())


# ----------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_holds_what_the_accountant_calibrates() -> None:
    plan = plan_audit(sampling_rate=0.05, steps=100, epsilon=1.0)
    assert 0.99 < claimed(plan.training, plan.delta) <= 1.0
    assert (plan.canaries, plan.guesses, plan.kind) == (100_000, 2000, "dirac")
    assert plan_audit(sampling_rate=0.05, steps=100, noise_multiplier=2.5, epsilon=1.0).training.noise_multiplier == 2.5


@pytest.mark.parametrize(("multiplier", "fewest"), [(5.0, 29), (1.5, 514), (0.6, 5)])
def test_fewer_canaries_than_could_refute_the_claim_are_refused_and_the_least_is_named(
    multiplier: float, fewest: int
) -> None:
    """If every guess were right. The last claim is beyond the default, too: there they have to show some ε at all."""
    settings: dict[str, Any] = {"sampling_rate": 1.0, "steps": 1, "noise_multiplier": multiplier}
    for canaries in {1, fewest - 1}:
        with pytest.raises(ConfigError) as caught:
            plan_audit(**settings, canaries=canaries)
        (problem,) = caught.value.problems
        assert problem.startswith(f"canaries: at least {fewest}: fewer could not")
    plan = plan_audit(**settings, canaries=fewest)
    delta = verdict_delta(fewest, plan.delta)
    right = {"canaries": fewest, "guesses": plan.guesses, "correct": plan.guesses}
    refuted = p_value(**right, epsilon=claimed(plan.training, delta), delta=delta) <= VERDICT_P
    assert refuted == (multiplier > 1.0)
    assert epsilon_lower_bound(**right, delta=plan.delta, p=0.05) > 0.0


def test_too_few_guesses_are_refused_unless_they_can_tell_what_is_expected() -> None:
    settings: dict[str, Any] = {"sampling_rate": 1.0, "steps": 1, "noise_multiplier": 4.0, "canaries": 1000}
    with pytest.raises(ConfigError) as caught:
        plan_audit(**settings, guesses=3)
    (problem,) = caught.value.problems
    fewest = int(problem.removeprefix("guesses: at least ").partition(":")[0])
    assert plan_audit(**settings, guesses=fewest).guesses == fewest
    assert plan_audit(**settings, guesses=fewest - 1, expect_below=0.1).guesses == fewest - 1
    with pytest.raises(ConfigError):
        plan_audit(**settings, guesses=fewest - 1)


def test_refuses_noise_that_does_not_keep_the_epsilon_asked_for() -> None:
    with pytest.raises(Refused, match="epsilon is larger"):
        plan_audit(sampling_rate=0.05, steps=100, noise_multiplier=2.0, epsilon=1.0)


REFUSED: list[dict[str, Any]] = [
    {"epsilon": None},
    {"epsilon": None, "noise_multiplier": 0.0},
    {"kind": "parrots"},
    {"canaries": 0},
    {"canaries": 1_000_001},
    {"guesses": 0},
    {"guesses": 1001},
    {"confidence": 0.5},
    {"confidence": 1.0},
    {"noise_multiplier": 5.0, "delta": 0.0, "epsilon": None},
    {"steps": 0},
    {"sampling_rate": 0.0},
    {"clip": 0.0},
    {"learning_rate": 0.0},
]


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_refuses_plans_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_audit(**SUBSAMPLED | change)
    assert caught.value.problems


def test_refuses_more_canaries_than_a_step_can_take(run: Run) -> None:
    """By per-example gradients each row of a batch would bring a gradient of every canary's weight."""
    plan = plan_audit(sampling_rate=1.0, steps=20, epsilon=1.0, canaries=100_000, rows=50)
    with pytest.raises(ConfigError, match="take too long"):
        run(plan, model=normalised())


def test_a_diverged_training_is_an_error_and_no_finding(run: Run) -> None:
    def diverged(
        model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
    ) -> None:
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(math.nan)

    with pytest.raises(InvalidInput, match="diverged"):
        run(plan_audit(**FULL_BATCH), diverged)


# --------------------------------------------------------------------------------------------------- the command line

QUICK = ["audit", "--steps", "2", "--sampling-rate", "1", "--canaries", "1000"]


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch, entropy: MakeEntropy) -> None:
    """One audit in a million of the right mechanism is flagged: not these."""
    monkeypatch.setattr("src.privacy.entropy.SystemEntropy", lambda: entropy("the command line"))


@pytest.mark.usefixtures("repeatable")
def test_the_command_prints_the_bound_beside_the_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*QUICK, "--epsilon", "1", "--expect-below", "3.4"]) == 0
    out = capsys.readouterr().out
    for text in ("claimed ε", "ε is at least", "1000 canaries (dirac)", "100 guesses, fixed beforehand", "RDP"):
        assert text in out


@pytest.mark.usefixtures("repeatable")
def test_the_command_says_all_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*QUICK, "--epsilon", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["steps"] == 2
    assert found["unit"] == "example"
    assert found["guesses"]["count"] == 100
    guessed = {"canaries": 1000, "guesses": 100, "correct": found["guesses"]["correct"]}
    assert found["audit"]["lower_bound"] == epsilon_lower_bound(**guessed, delta=1e-5, p=1.0 - 0.95)
    assert 0.99 < found["audit"]["epsilon"] <= 1.0
    assert not found["verdict"]["flagged"]
    assert found["passed"] is None


@pytest.mark.usefixtures("repeatable")
def test_the_exit_code_tells_that_epsilon_is_above_what_was_expected(capsys: pytest.CaptureFixture[str]) -> None:
    """With noise of a twentieth of the clipping norm every guess is right."""
    code = cli.run([*QUICK, "--noise-multiplier", "0.05", "--expect-below", "1", "--json"])
    assert code == CATALOGUE[Refused].exit_code
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["passed"]
    assert "epsilon is at least" in json.loads(captured.err)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], ConfigError),
        (["--epsilon", "1", "--kind", "parrots"], ConfigError),
        (["--epsilon", "1", "--expect-below", "-1"], ConfigError),
        (["--epsilon", "1", "--epochs", "3"], ConfigError),
        (["--epsilon", "1", "--canaries", "1"], ConfigError),
        (["--epsilon", "0"], InvalidInput),
        (["--epsilon", "1", "--task", "no-such-task"], NotFoundError),
        (["--epsilon", "1", "--noise-multiplier", "0.1"], Refused),
    ],
    ids=str,
)
def test_the_command_refuses(arguments: list[str], error: type, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*QUICK, *arguments]) == CATALOGUE[error].exit_code
    assert capsys.readouterr().out == ""


def test_the_tasks_that_are_named_are_those_that_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*QUICK, "--epsilon", "1", "--task", "nope"]) == CATALOGUE[NotFoundError].exit_code
    assert "no task is called 'nope'; known: synthetic, randhie" in capsys.readouterr().err


@pytest.mark.usefixtures("repeatable")
def test_guesses_that_cannot_refute_the_claim_are_said_to_be_such(capsys: pytest.CaptureFixture[str]) -> None:
    for multiplier, said in (("0.3", True), ("5", False)):
        assert cli.run([*QUICK, "--noise-multiplier", multiplier]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("the guesses could not have refuted this claim" in out) == said


@pytest.mark.usefixtures("repeatable")
def test_epochs_are_steps_of_the_expected_number(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["audit", "--epochs", "1", "--sampling-rate", "0.3", "--canaries", "400", "--epsilon", "1", "--json"]
    assert cli.run(line) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 4


def test_epochs_without_a_usable_rate_are_refused() -> None:
    assert cli.run(["audit", "--epochs", "1", "--sampling-rate", "0", "--epsilon", "1"]) == 3


@pytest.mark.parametrize(
    ("steps", "said"), [(100, "about 510,000 rows are computed, one at a time: some 5 min"), (1, "")]
)
def test_what_takes_minutes_says_so_before(steps: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    command._say_how_long(plan_audit(sampling_rate=0.05, steps=steps, epsilon=1.0), rows=2000)
    out, err = capsys.readouterr()
    assert (out, said in " ".join(err.split())) == ("", True)
    assert bool(err) == bool(said)
