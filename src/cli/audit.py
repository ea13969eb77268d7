"""`sotto audit`: attack a training configuration with canaries, and print what the attack proves beside the claim."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from ..errors import ConfigError, Refused
from .prose import prose, say
from .screen import echo, echo_json

if TYPE_CHECKING:
    from ..learning.audit import AuditPlan, AuditResult
    from ..learning.made_up import Apart, Found

CANARIES = "Default: 100000 of kind dirac, 1000 examples. Too few to tell anything are refused."
GUESSES = "Fixed beforehand (default: by canaries and claim). Too few to tell anything are refused."
MADE_UP = "Also search for weights with which one row moves a clipped sum beyond the bound, and tell such a pair apart."
BEYOND = (
    "the guesses could not have refuted this claim, had all of them been right: only the noise was tested against it"
)

ROW_S = 0.6e-3
"""Of one core, roughly, by `make bench ONLY=training`."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def audit(
    task: Annotated[str, typer.Option(help="Whose model is trained: 'synthetic', or a task with public rows.")] = (
        "synthetic"
    ),
    epsilon: Annotated[
        float | None, typer.Option(help="ε that the training claims: the noise follows from it.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Standard deviation of a step's noise over the clipping norm.")
    ] = None,
    delta: Annotated[float, typer.Option(help="δ at which ε is claimed.")] = 1e-5,
    clip: Annotated[float, typer.Option(help="Clipping norm of an example's gradient.")] = 1.0,
    sampling_rate: Annotated[float, typer.Option(help="Probability of an example to be in a step.")] = 0.05,
    steps: Annotated[int | None, typer.Option(help="Gradient steps (default 100).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead of --steps: times that an example is seen.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Of SGD.")] = 0.1,
    kind: Annotated[str, typer.Option(help="Canaries: 'dirac' (strongest) or 'examples'.")] = "dirac",
    canaries: Annotated[int | None, typer.Option(help=CANARIES)] = None,
    guesses: Annotated[int | None, typer.Option(help=GUESSES)] = None,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    expect_below: Annotated[
        float | None, typer.Option(help="Exit with 5 if ε is shown to be above this, or the mechanism is flagged.")
    ] = None,
    made_up_weights: Annotated[bool, typer.Option("--made-up-weights", help=MADE_UP)] = False,
    seed: Annotated[int, typer.Option(help="Of the initial model; never of canaries, sampling or noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train once on public rows and canaries, guess who was in, and bound ε from below by how often that is right.

    A lower bound proves that something is wrong; it never proves that nothing is. See docs/audit.md.
    """
    from ..learning import audit as learning
    from ..learning.made_up import attack
    from ..learning.task import loss_for
    from ..privacy.entropy import SystemEntropy

    found, rows = learning.find_audited(task)
    plan = learning.plan_audit(
        sampling_rate=sampling_rate,
        steps=_steps(steps, epochs, sampling_rate),
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        delta=delta,
        clip=clip,
        learning_rate=learning_rate,
        rows=len(rows),
        kind=cast(Literal["dirac", "examples"], kind),  # checked there
        canaries=canaries,
        guesses=guesses,
        confidence=confidence,
        expect_below=expect_below,
    )
    _say_how_long(plan, rows=len(rows), quiet=as_json)
    model, entropy = found.build_model(seed), SystemEntropy()
    loss = loss_for(found, model, rows)
    result = learning.audit(model, rows, loss=loss, plan=plan, entropy=entropy, threads=1)
    tried = None
    if made_up_weights:
        tried = attack(model, rows, loss=loss, training=plan.training, delta=plan.delta, entropy=entropy)
    if as_json:
        echo_json(describe(task, result, expect_below=expect_below, made_up=tried))
    else:
        echo([*_lines(task, result), *(["", *_made_up_lines(*tried)] if tried else [])])
    _refuse(result, tried, expect_below)


def _say_how_long(plan: AuditPlan, *, rows: int, quiet: bool = False) -> None:
    """Before minutes in which nothing is to be seen."""
    computed = plan.training.sampling_rate * plan.training.steps * (rows + plan.canaries)
    minutes = computed * ROW_S / 60
    if minutes >= 0.5 and not quiet:
        say(f"about {computed:,.0f} rows are computed, one at a time: some {minutes:.0f} min of one core", err=True)


def _refuse(result: AuditResult, tried: tuple[Found, Apart] | None, expect_below: float | None) -> None:
    if expect_below is not None and result.exceeds(expect_below):
        raise Refused(_complaint(result, expect_below))
    if tried and (tried[0].broken or tried[1].flagged):
        raise Refused("the mechanism is not what it claims to be: see what made-up weights found")


def _made_up_lines(found: Found, apart: Apart) -> list[str]:
    mark = "FLAGGED: " if found.broken else ""
    verdict = f"FLAGGED (p = {apart.p_value:.2g})" if apart.flagged else "not refuted"
    return [
        *prose(
            f"{mark}of {found.candidates} weights that were made up, the worst let one row more (beside {found.rows}) "
            f"move the clipped sum by {found.moved:.6f} clipping norms; 1 is allowed"
        ),
        *prose(
            f"one step on that pair, told apart by {apart.guesses} guesses in {apart.releases} releases, "
            f"{apart.correct} of them right: ε is at least {apart.lower_bound:.4g}, claimed is {apart.epsilon:.4g}: "
            f"{verdict}"
        ),
    ]


def _describe_made_up(found: Found, apart: Apart) -> dict[str, Any]:
    from ..protocol.canonical import finite

    return {
        "candidates": found.candidates,
        "rows": found.rows,
        "moved": found.moved,
        "broken": found.broken,
        "releases": apart.releases,
        "guesses": {"count": apart.guesses, "correct": apart.correct},
        "epsilon": finite(apart.epsilon),
        "lower_bound": apart.lower_bound,
        "p_value": apart.p_value,
        "flagged": apart.flagged,
    }


def _steps(steps: int | None, epochs: float | None, sampling_rate: float) -> int:
    """Steps in which an example is seen `epochs` times in expectation, or `steps`, or 100."""
    if steps is not None and epochs is not None:
        raise ConfigError("the audit cannot be run", problems=("--epochs: not beside --steps",))
    if epochs is None:
        return 100 if steps is None else steps
    if not (0.0 < epochs < math.inf and 0.0 < sampling_rate <= 1.0):
        problem = "--epochs: finite and above 0, with a sampling rate above 0 and at most 1"
        raise ConfigError("the audit cannot be run", problems=(problem,))
    return math.ceil(epochs / sampling_rate)


def describe(
    task: str,
    result: AuditResult,
    *,
    expect_below: float | None = None,
    made_up: tuple[Found, Apart] | None = None,
) -> dict[str, Any]:
    """The audit as a JSON object; an infinite ε is null."""
    from ..privacy.accounting import ACCOUNTANT
    from ..privacy.audit import VERDICT_P
    from ..privacy.events import RELATIONS
    from ..protocol.canonical import finite

    plan, training = result.plan, result.plan.training
    return {
        "task": task,
        "unit": "example",
        "relation": RELATIONS["example"],
        "accountant": ACCOUNTANT,
        "training": {
            "steps": training.steps,
            "sampling_rate": training.sampling_rate,
            "learning_rate": training.learning_rate,
            "clip": training.max_grad_norm,
            "noise_multiplier": training.noise_multiplier,
        },
        "canaries": {"kind": plan.kind, "count": plan.canaries, "included": result.included},
        "guesses": {"count": plan.guesses, "correct": result.correct},
        "audit": {
            "delta": plan.delta,
            "confidence": plan.confidence,
            "epsilon": finite(result.epsilon),
            "lower_bound": result.lower_bound,
            "exceeded": result.exceeded,
        },
        "verdict": {
            "delta": result.verdict_delta,
            "confidence": 1.0 - VERDICT_P,
            "epsilon": finite(result.verdict_epsilon),
            "lower_bound": result.verdict_lower_bound,
            "p_value": result.verdict_p_value,
            "flagged": result.guesses_flagged,
        },
        "variance": {
            "values": result.variance.count,
            "ratio": result.variance.ratio,
            "low": result.variance.low,
            "high": result.variance.high,
            "p_value": min(result.variance.p_value, result.variance_p_value),
            "flagged": result.variance_flagged,
        },
        "made_up_weights": None if made_up is None else _describe_made_up(*made_up),
        "expect_below": expect_below,
        "passed": None if expect_below is None else not result.exceeds(expect_below),
    }


def _lines(task: str, result: AuditResult) -> list[str]:
    from ..privacy.accounting import ACCOUNTANT
    from ..privacy.audit import VERDICT_P

    plan, training, noise = result.plan, result.plan.training, result.variance
    rows = (
        (plan.delta, plan.confidence, result.epsilon, result.lower_bound),
        (result.verdict_delta, 1.0 - VERDICT_P, result.verdict_epsilon, result.verdict_lower_bound),
    )
    return [
        *prose(
            f"DP-SGD of task {task}: {training.steps} steps, sampling rate {training.sampling_rate:g}, clipping norm "
            f"{training.max_grad_norm:g}, noise multiplier {training.noise_multiplier:g}"
        ),
        *prose(
            f"{plan.canaries} canaries ({plan.kind}), {result.included} of them in; {plan.guesses} guesses, fixed "
            f"beforehand, {result.correct} right ({result.correct / plan.guesses:.1%})"
        ),
        "",
        f"{'':<28}{'claimed ε':>12}{'ε is at least':>16}",
        *(
            f"{f'at δ = {delta:.3g}, {confidence:.6g} sure':<28}{claim:>12.4g}{bound:>16.4g}"
            for delta, confidence, claim, bound in rows
        ),
        "",
        f"claimed by: {ACCOUNTANT}, one example more or less",
        f"noise on known input: {noise.ratio:.4f} of the planned variance (right: {noise.low:.4f} to {noise.high:.4f})",
        *([] if result.guesses_can_refute else prose(BEYOND)),
        *(line for each in _verdict(result) for line in prose(each)),
    ]


def _verdict(result: AuditResult) -> list[str]:
    from ..privacy.audit import VARIANCE_P, VERDICT_P

    found = []
    if result.guesses_flagged:
        found.append(f"FLAGGED: the guesses refute the claim (p = {result.verdict_p_value:.2g} ≤ {VERDICT_P:g})")
    elif result.exceeded:
        found.append(f"EXCEEDED: ε is above the claim, at confidence {result.plan.confidence:g}")
    if result.variance_flagged:
        p = min(result.variance.p_value, result.variance_p_value)
        found.append(f"FLAGGED: this is not the planned noise (p = {p:.2g} ≤ {VARIANCE_P:g})")
    return found or ["nothing found against it, which proves nothing for it"]


def _complaint(result: AuditResult, expected: float) -> str:
    if result.lower_bound > expected:
        return f"epsilon is at least {result.lower_bound:.4g}, expected was at most {expected:g}"
    return "the mechanism is not what it claims to be: " + "; ".join(_verdict(result))
