"""`sotto train`: one training on one node, without a federation, paid for before data is touched.

The order is the guarantee: settle what it costs, reserve, touch the data, train, make the charge final, show the model.
What follows from the task's code and public rows is found before; and rows that cannot be loaded, or do not go with the
task by shape and dtype, are given back, as a party that is not ready for a task is charged nothing. Once training
begins nothing is given back: a crash, at any time, or a failure of any kind counts as spent.
Without differential privacy there is no guarantee, and the data is looked at first: what cannot be trained on need not
cost an infinite ε.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import (
    ConfigError,
    EvaluationError,
    InvalidInput,
    JobFailed,
    LimitError,
    Refused,
    SottoError,
    TaskError,
    meaning,
)
from ..logs import muted, type_and_place
from ..privacy.accounting import calibrate_dp_sgd, epsilon
from ..privacy.entropy import Entropy
from ..privacy.events import DpSgdSteps, Event, NonPrivate
from ..privacy.guarantee import check_guarantee, guarantees_nothing
from .loading import CHECK_DATA, needs, starting_from, why_not_loaded
from .settings import LocalTraining
from .standalone_job import CLASSIFICATION, SYNTHETIC, TrainJob, default
from .synthetic import ROWS, SyntheticTask
from .task import Dataset, Options, Task, find_task, loss_for

if TYPE_CHECKING:
    import torch

MAX_STEPS: Final = 1_000_000
"""Of one run: an hour or more even of the smallest model."""

_TRIED: Final = 2
"""Rows that are computed before a training without DP is paid for: of one, batch normalisation has no deviation."""
_NOT_CHARGED: Final = "nothing was charged (sotto party --check-data says more)"


class Purse(Protocol):
    """Where a training is paid for: the node's ledger."""

    def reserve(self, job_id: str, event: Event) -> None:
        """Charge a run to every budget that it spends.

        Raises:
            BudgetError: one of them does not allow it; nothing is charged, and the ledger has a refusal.
        """
        ...

    def give_back(self, reason: str) -> bool:
        """Undo the charge of a run that never began to train. False: too many were given back today, and it counts."""
        ...

    def finalise(self, figures: Mapping[str, str]) -> str:
        """Make the charge irrevocable, and enter what is shown now: names and digests. Returns the ledger's head."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The rows of a dataset, not loaded yet.

    Attributes:
        dataset: its name.
        task: what is learnt from it.
        options: of the task.
        n: the number of rows that may be known: that of generated rows, or the one the owner declared.
        n_is: "generated rows" or "declared by the owner".
        directory: where relative paths in options start.
    """

    dataset: str
    task: Task
    options: Options
    n: int
    n_is: str
    directory: Path = Path()

    def load(self) -> Dataset:
        """The rows; raises whatever the task does."""
        with starting_from(self.directory):
            return self.task.load_data(self.options)

    def load_holdout(self) -> Dataset | None:
        """The task's public rows; None where it has none.

        Raises:
            EvaluationError: they cannot be used.
            ConfigError: a module that they need is not installed.
        """
        from .evaluation import public_rows

        try:
            with starting_from(self.directory):
                return public_rows(self.task, self.options)
        except EvaluationError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError):
                raise ConfigError(needs(self.task.name, cause.name or "")) from error
            if cause is None or isinstance(cause, SottoError):
                raise
            why = why_not_loaded(cause, task=self.dataset, options=self.options, directory=self.directory)
            text = f"the hold-out rows of task {self.task.name!r} cannot be loaded: {why}; nothing was charged"
            raise EvaluationError(text, private=error.private) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run does and costs, settled before anything is charged.

    Attributes:
        local: the training.
        batch_size: rows that a step sees in expectation.
        event: what is charged.
        epsilon: at `job.delta`; infinite without DP.
    """

    job: TrainJob
    source: Source
    local: LocalTraining
    batch_size: int
    event: Event
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model that may be shown: its charge is final.

    Attributes:
        model: safetensors.
        metrics: exact, of public rows; None where the task has none, or they could not be computed.
        holdout_rows, holdout: how many these are, and what.
        ledger_head: after the final entry.
        not_evaluated: what is missing of the metrics and why, in words; empty where nothing is.
    """

    model: bytes
    metrics: dict[str, float] | None
    holdout_rows: int
    holdout: str
    ledger_head: str
    not_evaluated: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """A dataset that the node's configuration offers: for the task of the same name."""

    declared_rows: int
    options: Options = field(default_factory=dict)
    directory: Path = Path()
    """Where relative paths in options start."""


def find_source(job: TrainJob, configured: Mapping[str, Configured]) -> Source:
    """The rows that a job asks for.

    Raises:
        InvalidInput: the node has no such dataset, or has it for another task.
        NotFoundError: a configured dataset's task is not installed.
    """
    if job.dataset == SYNTHETIC:
        source = Source(
            dataset=SYNTHETIC, task=SyntheticTask(), options={"seed": job.seed}, n=ROWS, n_is="generated rows"
        )
    elif job.dataset in configured:
        offer = configured[job.dataset]
        # An option that is null is one that the owner leaves to a federation's job.
        options = {key: value for key, value in offer.options.items() if value is not None}
        source = Source(
            dataset=job.dataset,
            task=find_task(job.dataset),
            options=options,
            directory=offer.directory,
            n=offer.declared_rows,
            n_is="declared by the owner",
        )
    else:
        known = ", ".join([SYNTHETIC, *sorted(configured)])
        raise _unusable(dataset=f"this node has no dataset {job.dataset!r}; it has: {known}")
    if job.task not in (None, source.task.name) and (source.dataset, job.task) != (SYNTHETIC, CLASSIFICATION):
        raise _unusable(task=f"dataset {job.dataset!r} is for task {source.task.name!r}, not for {job.task!r}")
    return source


def steps_of(epochs: int, n: int, *, batch_size: int) -> int:
    """⌈epochs · n / batch_size⌉: every row is seen at least `epochs` times in expectation."""
    return -(-epochs * n // batch_size)


def plan_run(job: TrainJob, source: Source, *, allow_without_dp: bool) -> Plan:
    """Steps, noise and ε of a run.

    Args:
        allow_without_dp: the node's policy.

    Raises:
        InvalidInput: batch size or δ do not go with the number of rows, the run is too long, or no noise reaches ε.
        Refused: the noise multiplier costs more than the ε asked for.
        PolicyError: the job asks for no privacy and the node does not allow that.
    """
    batch_size = min(default("batch_size"), source.n) if job.batch_size is None else job.batch_size
    steps = steps_of(job.epochs, source.n, batch_size=batch_size)
    problems = {}
    if batch_size > source.n:
        problems["batch_size"] = f"must be at most n = {source.n}"
    if steps > MAX_STEPS:
        problems["epochs"] = f"epochs * n / batch_size gives {steps} steps, at most {MAX_STEPS} are allowed"
    if job.private and job.delta * source.n >= 1:
        problems["dp.delta"] = f"must be below 1/n (n = {source.n}): at 1/n a row may be published as it is"
    if problems:
        raise _unusable(**problems)
    rate = batch_size / source.n
    event = _event(job, rate, steps, allow_without_dp=allow_without_dp)
    return Plan(
        job=job,
        source=source,
        local=LocalTraining(
            steps=steps,
            sampling_rate=rate,
            learning_rate=job.learning_rate,
            max_grad_norm=job.clip,
            noise_multiplier=event.noise_multiplier if isinstance(event, DpSgdSteps) else 0.0,
            declared_rows=source.n,
        ),
        batch_size=batch_size,
        event=event,
        epsilon=epsilon([event], delta=job.delta),
    )


def run_plan(plan: Plan, *, purse: Purse, entropy: Entropy, max_model_bytes: int | None = None) -> Trained:
    """Reserve, train, make final, evaluate on public rows.

    Args:
        entropy: of sampling and noise.
        max_model_bytes: refuse a larger model before anything is charged; None for no limit.

    Raises:
        BudgetError: nothing was charged and, with DP, no data touched.
        LimitError: the model is too large; nothing was charged.
        InvalidInput: DP-SGD cannot train the task's model, or a public row, or without DP any row, is not finite;
            nothing was charged.
        EvaluationError: the public rows, or what the task makes of them, are at fault; nothing was charged.
        JobFailed: the training failed, for a reason of which type and place are told, or its parameters are not finite
            numbers; charged. Or the data cannot be loaded, or does not go with the task; nothing was charged.
    """
    from .dpsgd import train_dpsgd, train_plain
    from .flatten import flatten, model_to_tensors
    from .whole import built, model_file_of

    task = plan.source.task
    model = built(task, plan.job.seed)
    size = len(model_file_of(model).to_bytes())
    if max_model_bytes is not None and size > max_model_bytes:
        raise LimitError(
            f"the model takes {size} bytes, more than the {max_model_bytes} that are printed: "
            "name a directory for it (--out)",
            limit=max_model_bytes,
        )
    holdout = plan.source.load_holdout()  # public; also shows whether data can be loaded, before that is paid for
    if plan.job.private:
        _try_public(task, model, holdout)
    _try_evaluation(task, model, holdout)
    unprotected = None if plan.job.private else _unprotected(plan.source, model)
    purse.reserve(plan.job.job_id, plan.event)
    rows = _ready_rows(plan.source, purse) if unprotected is None else unprotected
    train = train_dpsgd if plan.job.private else train_plain
    try:
        with _nothing_told("the training failed: {}; what it cost is charged"):
            train(model, rows, loss=loss_for(task, model, rows), config=plan.local, entropy=entropy)
    except SottoError as error:
        purse.finalise({"failure": meaning(error).reason})  # all that is told of it; nothing more can come
        raise
    content = model_file_of(model).to_bytes()
    head = purse.finalise({"model_sha256": hashlib.sha256(content).hexdigest()})
    if not math.isfinite(float(abs(flatten(model_to_tensors(model))[0]).sum(dtype=float))):
        causes = "a smaller learning_rate may help"
        if not plan.job.private:  # with DP such a row counts for nothing
            causes += ", or a row has no finite loss (sotto party --check-data says which)"
        raise JobFailed(f"the training diverged: {causes}; what it cost is charged")
    metrics, without = _measured(task, model, holdout)
    return Trained(
        model=content,
        metrics=metrics,
        not_evaluated=without,
        holdout_rows=_rows(holdout),
        holdout="" if holdout is None else holdout.description,
        ledger_head=head,
    )


def _event(job: TrainJob, rate: float, steps: int, *, allow_without_dp: bool) -> Event:
    if not job.private:
        without = NonPrivate(unit="example", reason="dp.enabled: false")
        check_guarantee(without, delta=job.delta, allow_without_dp=allow_without_dp)
        return without
    multiplier = job.noise_multiplier
    if multiplier is None:
        assert job.epsilon is not None  # the schema has one of them
        multiplier = calibrate_dp_sgd(epsilon=job.epsilon, delta=job.delta, sampling_rate=rate, steps=steps)
    event = DpSgdSteps(sampling_rate=rate, noise_multiplier=multiplier, steps=steps)
    costs = epsilon([event], delta=job.delta)
    if guarantees_nothing(event, delta=job.delta):
        raise _unusable(**{"dp.noise_multiplier": "so little noise gives no finite epsilon"})
    if job.epsilon is not None and costs > job.epsilon:
        needed = calibrate_dp_sgd(epsilon=job.epsilon, delta=job.delta, sampling_rate=rate, steps=steps)
        raise Refused(
            f"dp.noise_multiplier {multiplier:g} costs epsilon {costs:.6g} at delta {job.delta:g} in {steps} steps, "
            f"more than dp.epsilon {job.epsilon:g}, which takes a noise_multiplier of {needed:.4g}: leave one of the "
            "two out, or give both so that they fit",
            epsilon=costs,
            noise_multiplier=needed,
        )
    return event


def _try_public(task: Task, model: torch.nn.Module, holdout: Dataset | None) -> None:
    """Raises what keeps DP-SGD from training on any row, as far as the task's code and public rows tell."""
    from .row_kind import RowKind
    from .trying import compute

    with _not_charged(), _nothing_told(f"the task cannot be tried: {{}}; {_NOT_CHARGED}"):
        compute(task, model, None if holdout is None else RowKind.of(holdout))


def _ready_rows(source: Source, purse: Purse) -> Dataset:
    """Rows that a party would be ready to train on; of others what was reserved is given back."""
    from .readiness import check_loaded, load

    try:
        with muted():
            rows = load(source.dataset, source.task, source.options, directory=source.directory)
            check_loaded(source.dataset, source.task, rows)
    except Exception as error:
        why = error.private if isinstance(error, TaskError) else type_and_place(error)
        if not purse.give_back("the data was not ready to be trained on"):
            raise JobFailed(f"{why}; it is charged, as too much was given back today") from None
        raise JobFailed(f"{why}; {'nothing was charged' if CHECK_DATA in why else _NOT_CHARGED}") from None
    return rows


def _unprotected(source: Source, model: torch.nn.Module) -> Dataset:
    """Rows to train on without DP, all of them finite; the first ones have been computed."""
    import torch

    from .trial import checked_losses

    with _not_charged(), _nothing_told(f"the data cannot be loaded: {{}}; {_NOT_CHARGED}"):
        rows = source.load()
        rows.require_finite()
    with _not_charged(), _nothing_told(f"the data cannot be trained on: {{}}; {_NOT_CHARGED}"):
        loss, few = loss_for(source.task, model, rows), min(_TRIED, len(rows))
        features, labels = torch.from_numpy(rows.features[:few]), torch.from_numpy(rows.labels[:few])
        checked_losses(loss(copy.deepcopy(model).train()(features), labels), few)
    return rows


@contextmanager
def _not_charged() -> Iterator[None]:
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"{error.message}; {_NOT_CHARGED}") from error


@contextmanager
def _nothing_told(failed: str) -> Iterator[None]:
    """Around what touches private rows: what is logged there, or the text of an error, may hold a row or a loss.

    Args:
        failed: what the error says, with {} for type and place.
    """
    try:
        with muted():
            yield
    except SottoError:
        raise  # its text is public
    except (Exception, SystemExit) as error:  # of the latter the interpreter would print the text
        raise JobFailed(failed.format(type_and_place(error))) from None


def _try_evaluation(task: Task, model: torch.nn.Module, holdout: Dataset | None) -> None:
    """Raises EvaluationError where no model of the task can be measured."""
    from .evaluation import evaluate

    try:
        if holdout is not None:
            evaluate(task, model, holdout)
    except EvaluationError as error:
        raise EvaluationError(f"{error.message}; {_NOT_CHARGED}", private=error.private) from error
    except InvalidInput:  # of the model as it begins
        pass


def _measured(task: Task, model: torch.nn.Module, holdout: Dataset | None) -> tuple[dict[str, float] | None, str]:
    """Metrics without `n`, which the artifact has elsewhere, and what is missing, in words. Whatever fails: the model
    is there, and paid for."""
    from .evaluation import evaluate

    if holdout is None:
        return None, ""
    try:
        found = evaluate(task, model, holdout)
    except SottoError as error:
        return None, error.message
    except Exception as error:
        return None, type(error).__name__
    metrics = {name: value for name, value in found.items() if name != "n" and math.isfinite(value)}
    lost = sorted(found.keys() - metrics.keys() - {"n"})
    return metrics, f"not finite, and left out: {', '.join(lost)}" if lost else ""


def _rows(holdout: Dataset | None) -> int:
    return 0 if holdout is None else len(holdout)


def _unusable(**violations: Any) -> InvalidInput:
    return InvalidInput("the job cannot be used", violations=violations)
