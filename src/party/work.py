"""What a party's workers compute. An update leaves the worker only protected: no other form of it is stored or logged.

Each unit is data: JSON parameters and blobs in, JSON and blobs out. Any of them may carry `processes`, the cores that
it may use (1 without it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..encryption.keys import KeyShare
from ..encryption.scheme import Layout
from ..errors import InvalidInput, StateError, StorageFullError, WorkerError
from ..jobs.executors.units import Handler, WorkContext
from ..learning.flatten import flatten, model_to_tensors
from ..learning.settings import LocalTraining
from ..learning.task import chosen_options
from ..logs import muted, type_and_place
from ..privacy.clipping import clip, l2_norm
from ..privacy.entropy import Entropy, SystemEntropy
from ..privacy.noise import discrete_gaussian
from ..privacy.noise_plan import fraction_from_json
from ..privacy.rounding import conditional_round, project, round_to_nearest
from ..privacy.sampling import poisson_sample
from ..protocol.batches import StoredBatch, fold_batches, write_batch
from ..protocol.derive import adaptation_of, own_batch_cap
from ..protocol.keyring import load_share
from ..protocol.plan import RoundPlan, share_binding
from ..protocol.units import Params, unit_plan, unit_processes, unit_scheme
from .trial_work import load_plans_model, try_task

if TYPE_CHECKING:
    from ..learning.task import Dataset, Task

Result = dict[str, Any]


def contribute(params: Params, context: WorkContext) -> Result:
    """Train, clip, encode, add the noise share, protect, store.

    {plan, plan_digest, public, name, options, directory, declared_rows} → the stored batch. `directory` is where
    relative paths in options start; without it, the working directory. The plaintext update or gradient sum lives and
    dies in this function. What encryption needs beside it is prepared on idle cores while the model trains.
    """
    plan, entropy = unit_plan(params), SystemEntropy()
    scheme = unit_scheme(params, plan)
    with scheme.prepare(Layout.from_json(plan.layout), entropy=entropy) as prepared:
        try:
            with muted():
                values = contribution(plan, params, context, entropy=entropy)
        except StorageFullError as error:  # raised by the task: that there is no room is said of the batch alone
            raise WorkerError("the contribution could not be computed", private=type_and_place(error)) from error
        batch = write_batch(
            scheme,
            plan,
            values,
            plan_digest=params["plan_digest"],
            contributor=params["name"],
            blobs=context.blobs,
            entropy=entropy,
            prepared=prepared,
        )
    return batch.to_json()


def contribution(plan: RoundPlan, params: Params, context: WorkContext, *, entropy: Entropy) -> NDArray[np.int64]:
    """What the plan asks of this party, as integers with its noise share, shape (value_count,): an update (fedavg), or
    the sum of clipped gradients over a sample of its rows (fedsgd)."""
    if plan.gradient_sum is None:
        return encode(_train(plan, params, context, entropy), plan, entropy=entropy)
    own = params.get("declared_rows")  # where it is not said, as much as the largest computes
    cap = plan.gradient_sum.batch_cap if own is None else own_batch_cap(plan, int(own))
    total = _sampled_gradients(plan, params, context, batch_cap=cap, entropy=entropy)
    return encode_sum(total, plan, entropy=entropy)


def encode(update: NDArray[np.float32], plan: RoundPlan, *, entropy: Entropy) -> NDArray[np.int64]:
    """The update, shape (dimension,), clipped, rounded to integers, with this party's share of the noise added.

    With adaptive clipping one value more: whether the update was within the norm.
    """
    norm = float(plan.clipping_norm)
    clipped = clip(update, norm)
    values = conditional_round(
        clipped, resolution_bits=plan.resolution_bits, bound=float(plan.rounded_bound), entropy=entropy
    )
    adaptive = adaptation_of(plan)
    if adaptive is not None:
        bit = adaptive.bit(l2_norm(update), norm, unit=plan.bit_unit)
        values = np.append(values, np.int64(bit))
    return _with_share(values, plan, entropy)


def encode_sum(total: NDArray[np.float64], plan: RoundPlan, *, entropy: Entropy) -> NDArray[np.int64]:
    """A sum of clipped gradients, shape (dimension,), rounded to nearest, with this party's share of the noise added.

    A batch above the cap may have a sum that no slot holds. Such a sum is projected onto the ball of those that fit,
    which takes no two sums further apart: nothing is refused, nobody sees it, and what one example can change stays
    what it is, even for a party with more rows than it declares.
    """
    values = round_to_nearest(project(total, float(plan.clipping_norm)), resolution_bits=plan.resolution_bits)
    return _with_share(values, plan, entropy)


def _with_share(values: NDArray[np.int64], plan: RoundPlan, entropy: Entropy) -> NDArray[np.int64]:
    sigma2 = fraction_from_json(plan.noise.share_sigma2)
    return values + discrete_gaussian(sigma2, values.size, entropy=entropy) if sigma2 else values


def _model(plan: RoundPlan, context: WorkContext) -> tuple[Task, Any, NDArray[np.float32]]:
    """The plan's task, the global model (a torch module), and its parameters, shape (dimension,)."""
    from ..learning.task import find_task
    from ..learning.whole import built

    task = find_task(plan.task)
    model = built(task, plan.seed)
    return task, model, load_plans_model(model, context.blobs.read(plan.model_sha256), plan)


def _sampled_gradients(
    plan: RoundPlan, params: Params, context: WorkContext, *, batch_cap: int, entropy: Entropy
) -> NDArray[np.float64]:
    from ..learning.gradients import clipped_gradient_sum
    from ..learning.task import loss_for

    task, model, _ = _model(plan, context)
    task, dataset = _held_rows(task, plan, params, context)
    chosen = poisson_sample(len(dataset), sampling_rate=float(plan.local.sampling_rate), entropy=entropy)
    return clipped_gradient_sum(
        model,
        dataset,
        chosen,
        loss=loss_for(task, model, dataset),
        max_grad_norm=float(plan.local.max_grad_norm),
        padded_to=batch_cap,
    )


def _train(plan: RoundPlan, params: Params, context: WorkContext, entropy: Entropy) -> NDArray[np.float32]:
    from ..learning.dpsgd import train_dpsgd
    from ..learning.task import loss_for

    task, model, before = _model(plan, context)
    local = plan.local
    config = LocalTraining(
        steps=local.steps,
        sampling_rate=float(local.sampling_rate),
        learning_rate=float(local.learning_rate),
        max_grad_norm=float(local.max_grad_norm),
        noise_multiplier=float(local.noise_multiplier),
        declared_rows=int(params["declared_rows"]),
    )
    task, dataset = _held_rows(task, plan, params, context)
    train_dpsgd(model, dataset, loss=loss_for(task, model, dataset), config=config, entropy=entropy)
    after, _ = flatten(model_to_tensors(model))
    return after - before


def _held_rows(task: Task, plan: RoundPlan, params: Params, context: WorkContext) -> tuple[Task, Dataset]:
    """The party's rows, and the instance of the task that loaded them. Raises WorkerError as `_rows`."""
    from .rows import held_rows

    return held_rows(
        task,
        name=plan.task,
        options=params["options"],
        directory=Path(params.get("directory", ".")).absolute(),
        job=plan.job_id,
        kept=context.kept,
        load=lambda: _rows(task, params, name=plan.task),
    )


def _rows(task: Task, params: Params, *, name: str) -> Dataset:
    """The party's rows.

    Raises:
        WorkerError: they cannot be loaded; `private` says why, as far as that depends on no row.
    """
    from ..learning.loading import starting_from, why_not_loaded

    options, directory = params["options"], params.get("directory", ".")
    try:
        with starting_from(directory):
            return task.load_data(options)
    except MemoryError:
        raise
    except BaseException as error:  # of the task's own code, which may raise anything
        why = why_not_loaded(error, task=name, options=options, directory=directory)
        raise WorkerError("the rows could not be loaded", private=why) from None


def dataset_options(own: Mapping[str, Any], plan: RoundPlan) -> dict[str, Any]:
    """A party's own options of a task; where one is null it takes the job's value.

    Raises:
        PolicyError: the job sets an option that this party has not left open: data is chosen by its owner.
        InvalidInput: the job's options are not a JSON object.
    """
    try:
        asked = json.loads(plan.task_options)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("the job's task options are not JSON") from error
    if not isinstance(asked, dict):
        raise InvalidInput("the job's task options are not a JSON object")
    return chosen_options(own, asked, task=plan.task, owner="this party", key=f"datasets.{plan.task}.options")


def check_code(params: Params, context: WorkContext) -> Result:
    """{task} → {problem, place, said, rows}: what to say to others if the task's rows do not go with it, and to their
    owner (empty where nothing is), and what the task says that a row looks like (`RowKind`, or null). No data is
    touched, nor was in this worker before: a task may keep something of rows that it loaded. TaskError where the task
    cannot be trained on whatever the rows are."""
    from ..learning.readiness import check_code as check

    if not context.untouched:
        raise StateError("a task's code is looked at in a worker of its own")
    found, rows = check(params["task"])
    told = {key: found.metadata[key] if found else "" for key in ("problem", "place")}
    return {**told, "said": found.private if found else "", "rows": rows.to_json() if rows else None}


def check_rows(params: Params, context: WorkContext) -> Result:
    """{task, options, directory} → what a row looks like (`RowKind`), and nothing of a row; TaskError where the rows
    cannot be loaded, or do not go with model and loss."""
    from ..learning.readiness import check_rows as check

    return check(params["task"], params["options"], directory=params["directory"]).to_json()


def recompute(params: Params, context: WorkContext) -> Result:
    """{plan, plan_digest, public, name, batches} → the aggregate, multiplied by this party itself from signed batches.

    Everybody else has to have proven to know what is inside theirs: nothing of an earlier round comes back in disguise.
    """
    plan = unit_plan(params)
    batches = {name: StoredBatch(**batch) for name, batch in params["batches"].items()}
    aggregate = fold_batches(
        unit_scheme(params, plan),
        plan,
        batches,
        plan_digest=params["plan_digest"],
        blobs=context.blobs,
        unproven=batches.keys() - {params["name"]},
        processes=unit_processes(params),
    )
    return aggregate.to_json()


def open_share(params: Params, context: WorkContext) -> Result:
    """{plan, plan_digest, public, name, share, aggregate, aggregate_root} → {sha256, size} of the share batch."""
    plan = unit_plan(params)
    scheme, layout = unit_scheme(params, plan), Layout.from_json(plan.layout)
    share = load_share(Path(params["share"]))
    if plan.scheme == "plaintext":
        share = KeyShare(share.index, 1, "")  # a receipt that opens nothing, as that scheme has no key
    binding = share_binding(params["plan_digest"], params["aggregate_root"], params["name"])
    with context.blobs.open(params["aggregate"]) as file:
        material = scheme.opening_material(layout, file)
        batch = scheme.open_share(layout, share, material, binding=binding, entropy=SystemEntropy())
    ref = context.blobs.write(batch)
    return {"sha256": ref.sha256, "size": ref.size}


HANDLERS: Final[dict[str, Handler]] = {
    "contribute": contribute,
    "check_code": check_code,
    "check_rows": check_rows,
    "recompute": recompute,
    "open_share": open_share,
    "try_task": try_task,
}
