"""A one-run audit of DP-SGD as it is run here, and a test of its noise on input that is known.

`audit` puts canaries into public rows, each with probability 1/2, trains once by the very function that trains on
private rows, and guesses from the outcome who was in; what the guesses prove is in `privacy.audit`. Two kinds:

- **dirac**: beside the model that is audited lies a linear layer of √m × √m weights, one for each canary, which no
  other row touches. A canary's loss is linear in its own weight, so its gradient is one coordinate, far longer than the
  bound until it is clipped to it: the example that shows most. In each step its weight moves by the noised sum along
  its direction; the score is how much likelier all these moves are if it was in.
- **examples**: rows out of the distribution, with random labels, through the model itself; the score is by how much
  their loss fell. Nothing but the trained model is looked at. What they show depends on what the model can remember.

Only public rows are trained on, so an audit costs no budget, and what it prints is nobody's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError, NotFoundError, Refused
from ..privacy import accounting
from ..privacy.audit import (
    VARIANCE_P,
    VERDICT_P,
    VarianceTest,
    can_refute,
    correct_guesses,
    default_guesses,
    epsilon_lower_bound,
    p_value,
    variance_test,
    verdict_delta,
)
from ..privacy.entropy import Entropy
from ..privacy.events import DpSgdSteps
from .canaries import CANARY_WEIGHT, Watch, WithCanaries
from .dpsgd import train_dpsgd
from .installed import known_tasks
from .per_example import computed_as_chain
from .settings import LocalTraining
from .synthetic import SyntheticTask
from .task import Dataset, Loss, Task, find_task, holdout_of

Kind = Literal["dirac", "examples"]

DEFAULT_CANARIES: Final[dict[Kind, int]] = {"dirac": 100_000, "examples": 1_000}
"""With 100 000 Dirac canaries noise of half the size is found at ε = 1 (docs/audit.md)."""

MAX_CANARIES: Final = 1_000_000
"""Far below 2^24, up to which float32 holds their indices exactly."""

OVERREACH: Final = 100.0
"""A Dirac canary's gradient before clipping, in clipping norms: without clipping nobody could miss it."""

FAR: Final = 3.0
"""Magnitude of an out-of-distribution feature, in root mean squares of the public rows' features."""

VARIANCE_SIDE: Final = 256
"""Side of the canary layer in the variance test: 65 536 weights, of which one is used, tell 5 % of the variance."""

ANCHORS_PER_STEP: Final = 4.0
"""Rows on that one weight that a step of the variance test sees on average: few steps are empty, but some are."""

MAX_VALUES: Final = 1 << 36
"""Values that a training may write, some minutes of work; beyond it an audit asks for fewer canaries."""

ROW_VALUES: Final = 1 << 16
"""What a row costs at least, some tenths of a millisecond, in values written."""

_CHUNK: Final = 4096  # rows in one forward pass when losses are computed


class Trainer(Protocol):
    """What is audited: `dpsgd.train_dpsgd`, or in tests something that is broken."""

    def __call__(
        self, model: torch.nn.Module, dataset: Dataset, *, loss: Loss, config: LocalTraining, entropy: Entropy
    ) -> None:
        """Train `model` in place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPlan:
    """What is fixed before the audit draws anything.

    Attributes:
        training: the configuration that is audited; `declared_rows` only scales the steps.
        delta: δ in (0, 1) at which ε is claimed.
        kind: of the canaries.
        canaries: m, 1 to `MAX_CANARIES`.
        guesses: r, 1 to m.
        confidence: of the lower bound at `delta`, 0.7 to below 1.

    Raises:
        ConfigError: a setting is out of its range; all that are get listed.
    """

    training: LocalTraining
    delta: float
    kind: Kind
    canaries: int
    guesses: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        checks = {
            "noise_multiplier: above 0, or nothing is claimed that could be audited": (
                self.training.noise_multiplier > 0.0
            ),
            "delta: above 0 and below 1": 0.0 < self.delta < 1.0,
            f"kind: {' or '.join(get_args(Kind))}": self.kind in get_args(Kind),
            f"canaries: 1 to {MAX_CANARIES}": 1 <= self.canaries <= MAX_CANARIES,
            "guesses: 1 to the number of canaries": 1 <= self.guesses <= self.canaries,
            "confidence: at least 0.7 and below 1": 0.7 <= self.confidence < 1.0,
        }
        problems = tuple(text for text, holds in checks.items() if not holds)
        if problems:
            raise ConfigError("the audit cannot be run", problems=problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What an audit found.

    Attributes:
        plan: what was fixed beforehand.
        included: canaries that were in.
        correct: guesses that were right.
        epsilon: the accountant's ε at `plan.delta`: the claim.
        lower_bound: ε of this training is at least this at `plan.delta`, at `plan.confidence`.
        verdict_delta: the smaller δ of the verdict.
        verdict_epsilon: the accountant's ε there.
        verdict_lower_bound: ε is at least this there, at confidence 1 - `privacy.audit.VERDICT_P`.
        verdict_p_value: of `correct`, if the accountant were right there.
        variance: of the noise on known input, over all values.
        variance_p_value: the same for each parameter by itself, the smallest times their number.
    """

    plan: AuditPlan
    included: int
    correct: int
    epsilon: float
    lower_bound: float
    verdict_delta: float
    verdict_epsilon: float
    verdict_lower_bound: float
    verdict_p_value: float
    variance: VarianceTest
    variance_p_value: float

    @property
    def exceeded(self) -> bool:
        """Whether ε is above the claim, at the plan's confidence."""
        return self.lower_bound > self.epsilon

    @property
    def guesses_flagged(self) -> bool:
        """Whether the guesses refute the accountant at `privacy.audit.VERDICT_P`."""
        return self.verdict_p_value <= VERDICT_P

    @property
    def guesses_can_refute(self) -> bool:
        """Whether they could have refuted it, had all of them been right."""
        return can_refute(
            canaries=self.plan.canaries,
            guesses=self.plan.guesses,
            epsilon=self.verdict_epsilon,
            delta=self.verdict_delta,
            p=VERDICT_P,
        )

    @property
    def variance_flagged(self) -> bool:
        """Whether the noise is not the planned noise, at `privacy.audit.VARIANCE_P`."""
        return self.variance.flagged or self.variance_p_value <= VARIANCE_P

    def exceeds(self, epsilon: float) -> bool:
        """Whether it fails an expectation of at most `epsilon`: ε is above it, or the mechanism is flagged."""
        return self.lower_bound > epsilon or self.guesses_flagged or self.variance_flagged


def plan_audit(
    *,
    sampling_rate: float,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float = 1e-5,
    clip: float = 1.0,
    learning_rate: float = 0.1,
    rows: int = 1,
    kind: Kind = "dirac",
    canaries: int | None = None,
    guesses: int | None = None,
    confidence: float = 0.95,
    expect_below: float | None = None,
) -> AuditPlan:
    """The plan for a training configuration that is given by ε, by its noise multiplier, or by both.

    Args:
        rows: public rows that are trained on beside the canaries; only the divisor of a step depends on it.
        canaries, guesses: None for `DEFAULT_CANARIES` and `privacy.audit.default_guesses`.
        expect_below: an ε at `delta`, ≥ 0, that is expected to be kept, whatever is claimed.

    Raises:
        ConfigError: neither ε nor a noise multiplier, a setting out of its range, or so few canaries or guesses that
            they could refute neither claim nor expectation, were every guess right; says how many it takes.
        Refused: both, and with this noise multiplier ε is larger.
    """
    if epsilon is None and noise_multiplier is None:
        raise ConfigError("the audit cannot be run", problems=("epsilon: this, or a noise multiplier, is needed",))
    if kind not in DEFAULT_CANARIES:
        raise ConfigError("the audit cannot be run", problems=(f"kind: {' or '.join(DEFAULT_CANARIES)}",))
    if expect_below is not None and not expect_below >= 0.0:
        raise ConfigError("the audit cannot be run", problems=("expect_below: at least 0",))
    amount = DEFAULT_CANARIES[kind] if canaries is None else canaries
    training = LocalTraining(
        steps=steps,
        sampling_rate=sampling_rate,
        learning_rate=learning_rate,
        max_grad_norm=clip,
        noise_multiplier=0.0 if noise_multiplier is None else noise_multiplier,
        declared_rows=max(1, rows + amount // 2),
    )
    if noise_multiplier is None and epsilon is not None:
        found = accounting.calibrate_dp_sgd(epsilon=epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps)
        training = replace(training, noise_multiplier=found)
    plan = AuditPlan(training=training, delta=delta, kind=kind, canaries=amount, guesses=amount, confidence=confidence)
    by_default = default_guesses(amount, epsilon=claimed(training, verdict_delta(amount, delta)))
    if epsilon is not None and noise_multiplier is not None and claimed(training, delta) > epsilon:
        raise Refused("with this noise multiplier epsilon is larger than the one asked for")
    plan = replace(plan, guesses=by_default if guesses is None else guesses)
    _check_enough(plan, guesses_given=guesses is not None, expect_below=expect_below)
    return plan


def _check_enough(plan: AuditPlan, *, guesses_given: bool, expect_below: float | None) -> None:
    """Raise ConfigError for guesses, or canaries below the default, that could decide nothing were all of them right.

    Where the default could not refute the claim either, it is enough that they can show some ε: the test of the noise
    remains.
    """

    def decides(canaries: int, guesses: int | None = None) -> bool:
        delta = verdict_delta(canaries, plan.delta)
        claim = claimed(plan.training, delta)
        count = default_guesses(canaries, epsilon=claim) if guesses is None else guesses
        if can_refute(canaries=canaries, guesses=count, epsilon=claim, delta=delta, p=VERDICT_P):
            return True
        return expect_below is not None and shows(canaries, count, expect_below)

    def shows(canaries: int, guesses: int | None = None, epsilon: float = 0.0) -> bool:
        count = default_guesses(canaries, epsilon=epsilon) if guesses is None else guesses
        p = 1.0 - plan.confidence
        return can_refute(canaries=canaries, guesses=count, epsilon=epsilon, delta=plan.delta, p=p)

    if decides(plan.canaries, plan.guesses):
        return
    default = DEFAULT_CANARIES[plan.kind]
    enough, what = decides, f"refute the claim at p = {VERDICT_P:g}"
    if not decides(default):
        enough, what = shows, "show anything"
    why = f"fewer could not {what}, were every guess right"
    if enough(plan.canaries, plan.guesses):
        return
    if guesses_given and enough(plan.canaries, plan.canaries):
        fewest = _least(plan.guesses, plan.canaries, lambda count: enough(plan.canaries, count))
        raise ConfigError("the audit cannot be run", problems=(f"guesses: at least {fewest}: {why}",))
    if plan.canaries < default and enough(default):
        fewest = _least(plan.canaries, default, enough)
        raise ConfigError("the audit cannot be run", problems=(f"canaries: at least {fewest}: {why}",))


def _least(failing: int, holding: int, holds: Callable[[int], bool]) -> int:
    """The first number at which `holds`, after one at which it does not and up to one at which it does."""
    while holding - failing > 1:
        middle = (failing + holding) // 2
        failing, holding = (failing, middle) if holds(middle) else (middle, holding)
    return holding


def claimed(training: LocalTraining, delta: float) -> float:
    """ε at `delta` of `training`, as ledgers compute it; `math.inf` where nothing is guaranteed."""
    event = DpSgdSteps(
        sampling_rate=float(training.sampling_rate),
        noise_multiplier=float(training.noise_multiplier),
        steps=training.steps,
    )
    return accounting.epsilon([event], delta=delta)


def find_audited(name: str) -> tuple[Task, Dataset]:
    """A task and its public rows: `synthetic`, or one that is registered and has a hold-out.

    Raises:
        NotFoundError: no task has this name.
        ConfigError: it has no public rows.
    """
    known = (SyntheticTask.name, *known_tasks())
    if name not in known:
        raise NotFoundError(f"no task is called {name!r}; known: {', '.join(known)}")
    task: Task = SyntheticTask() if name == SyntheticTask.name else find_task(name)
    rows = holdout_of(task, {})
    if rows is None:
        raise ConfigError(f"task {name!r} has no public rows, and an audit trains on nothing else")
    return task, rows


def audit(
    model: torch.nn.Module,
    rows: Dataset,
    *,
    loss: Loss,
    plan: AuditPlan,
    entropy: Entropy,
    train: Trainer = train_dpsgd,
    threads: int | None = None,
) -> AuditResult:
    """Audit `plan.training` of `model`, which is left as it is.

    Args:
        rows: public; none will do for Dirac canaries.
        loss: one loss for each example, shape (n,).
        entropy: decides which canaries are in, and goes on to `train`.
        threads: of torch, in this process from now on; None leaves them.

    Raises:
        ConfigError: rows that "examples" cannot be made from.
        InvalidInput: as `train_dpsgd`; or the training diverged.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    included = _coins(plan.canaries, entropy)
    run = _dirac_scores if plan.kind == "dirac" else _example_scores
    scores = run(model, rows, loss=loss, plan=plan, included=included, entropy=entropy, train=train)
    correct = correct_guesses(scores, included, guesses=plan.guesses)
    small = verdict_delta(plan.canaries, plan.delta)
    claim, claim_at_small = claimed(plan.training, plan.delta), claimed(plan.training, small)
    guessed = {"canaries": plan.canaries, "guesses": plan.guesses, "correct": correct}
    pooled, smallest = noise_test(model, rows, loss=loss, training=plan.training, entropy=entropy, train=train)
    return AuditResult(
        plan=plan,
        included=int(included.sum()),
        correct=correct,
        epsilon=claim,
        lower_bound=epsilon_lower_bound(**guessed, delta=plan.delta, p=1.0 - plan.confidence),
        verdict_delta=small,
        verdict_epsilon=claim_at_small,
        verdict_lower_bound=epsilon_lower_bound(**guessed, delta=small, p=VERDICT_P),
        verdict_p_value=p_value(**guessed, epsilon=claim_at_small, delta=small)
        if math.isfinite(claim_at_small)
        else 1.0,
        variance=pooled,
        variance_p_value=smallest,
    )


def noise_test(
    model: torch.nn.Module,
    rows: Dataset,
    *,
    loss: Loss,
    training: LocalTraining,
    entropy: Entropy,
    train: Trainer = train_dpsgd,
) -> tuple[VarianceTest, float]:
    """Train on rows that all pull at one weight, and compare how far all others moved with the planned noise.

    `model` has no gradient then, so each of its parameters is known to move by noise alone, as the canary layer does.

    Returns:
        The test over all values together, and the smallest p-value of one parameter's values times their number.
    """
    anchors = math.ceil(ANCHORS_PER_STEP / training.sampling_rate)
    # A step of noise then moves a weight by a standard normal whatever the bound, so float32 loses nothing of it.
    scale = training.max_grad_norm * training.noise_multiplier
    config = replace(training, learning_rate=training.expected_batch / scale)
    wrapped = WithCanaries(model, rows, side=VARIANCE_SIDE)
    before = {name: value.detach().clone() for name, value in wrapped.named_parameters()}
    known = wrapped.dataset(None, rows, np.zeros(anchors, dtype=np.int64))
    train(
        wrapped,
        known,
        loss=wrapped.loss_beside(loss, OVERREACH * training.max_grad_norm),
        config=config,
        entropy=entropy,
    )
    moved = {
        name: (value.detach().double() - before[name].double()).numpy().reshape(-1)
        for name, value in wrapped.named_parameters()
        if value.requires_grad and value.numel()
    }
    moved[CANARY_WEIGHT] = moved[CANARY_WEIGHT][1:]  # without the one they pulled at
    variance = _noise_gain(training)
    tests = [variance_test(values, variance=variance) for values in moved.values()]
    pooled = variance_test(np.concatenate(list(moved.values())), variance=variance)
    return pooled, min(1.0, len(tests) * min(test.p_value for test in tests))


def _dirac_scores(
    model: torch.nn.Module,
    rows: Dataset,
    *,
    loss: Loss,
    plan: AuditPlan,
    included: NDArray[np.bool_],
    entropy: Entropy,
    train: Trainer,
) -> NDArray[np.float64]:
    """How much likelier the moves of each canary's weight are if it was in: the logarithm of the ratio."""
    training = plan.training
    watch = Watch(training, plan.canaries)
    wrapped = WithCanaries(model, rows, side=math.isqrt(plan.canaries - 1) + 1)
    dataset = wrapped.dataset(rows, rows, np.flatnonzero(included).astype(np.int64))
    beside = wrapped.loss_beside(loss, OVERREACH * training.max_grad_norm)
    _check_work(wrapped, dataset, loss=beside, training=training)
    with watch.every_step():
        train(wrapped, dataset, loss=beside, config=training, entropy=entropy)
    watch.close(wrapped.canaries.weight)
    return watch.scores


def _check_work(wrapped: WithCanaries, dataset: Dataset, *, loss: Loss, training: LocalTraining) -> None:
    """Raise ConfigError where a training takes hours: a row costs a fixed time, and some for each value it brings."""
    chain = computed_as_chain(wrapped, dataset, loss=loss)
    per_row = ROW_VALUES + wrapped.side if chain else ROW_VALUES + wrapped.side**2
    if training.steps * training.sampling_rate * len(dataset) * per_row > MAX_VALUES:
        raise ConfigError("so many canaries take too long", problems=("canaries: fewer, or fewer steps",))


def _example_scores(
    model: torch.nn.Module,
    rows: Dataset,
    *,
    loss: Loss,
    plan: AuditPlan,
    included: NDArray[np.bool_],
    entropy: Entropy,
    train: Trainer,
) -> NDArray[np.float64]:
    """By how much the loss of each canary fell."""
    canaries = _strangers(rows, plan.canaries, entropy)
    dataset = Dataset(
        np.concatenate([rows.features, canaries.features[included]]),
        np.concatenate([rows.labels, canaries.labels[included]]),
        "public rows and canaries",
    )
    trained = copy.deepcopy(model)
    train(trained, dataset, loss=loss, config=plan.training, entropy=entropy)
    return _losses(model, canaries, loss) - _losses(trained, canaries, loss)


def _strangers(rows: Dataset, count: int, entropy: Entropy) -> Dataset:
    """Rows unlike any other: every feature ± `FAR` root mean squares, the label one of those there are, by chance."""
    if not len(rows) or not np.issubdtype(rows.labels.dtype, np.integer):
        raise ConfigError("canaries of kind 'examples' are made from public rows with whole-number labels")
    shape = (count, *rows.features.shape[1:])
    magnitude = FAR * math.sqrt(float(np.mean(np.square(rows.features, dtype=np.float64))))
    signs = np.where(_coins(math.prod(shape), entropy), magnitude, -magnitude).astype(np.float32).reshape(shape)
    classes = np.unique(rows.labels)
    drawn = (entropy.words(count) % np.uint64(len(classes))).astype(np.int64)
    return Dataset(signs, classes[drawn], "out of the distribution")


def _losses(model: torch.nn.Module, dataset: Dataset, loss: Loss) -> NDArray[np.float64]:
    frozen = copy.deepcopy(model).eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(dataset), _CHUNK):
            part = slice(start, start + _CHUNK)
            outputs = frozen(torch.from_numpy(dataset.features[part]))
            found.append(loss(outputs, torch.from_numpy(dataset.labels[part])).double().numpy())
    return np.concatenate(found)


def _coins(count: int, entropy: Entropy) -> NDArray[np.bool_]:
    """Fair coins, shape (count,)."""
    return np.unpackbits(entropy.words(-(-count // 64)).view(np.uint8), count=count).astype(np.bool_)


def _noise_gain(training: LocalTraining) -> float:
    """Variance of the sum of all steps, each a standard normal; with momentum a step's goes on into later ones."""
    kept = training.momentum
    gains = [(1.0 - kept**age) / (1.0 - kept) for age in range(1, training.steps + 1)]
    return math.fsum(gain * gain for gain in gains)
