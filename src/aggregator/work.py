"""What the aggregator's workers compute. Each unit is data: JSON parameters and blobs in, JSON and blobs out.

Any unit may carry `processes`, the cores that it may use (1 without it). A worker holds no channel and no database.
Torch is imported only by the units that need it, so that an aggregator without torch can do everything else.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ..encryption.scheme import Layout, Scheme
from ..errors import InvalidInput, PolicyError, ShareError, SottoError
from ..extras import lacking
from ..jobs.executors.units import Handler, WorkContext
from ..learning.flatten import Tensors, flatten, from_safetensors, to_safetensors, unflatten
from ..learning.model_file import ModelFile, parameters_of, read_model_file
from ..learning.server_optimizer import ServerOptimizer
from ..logs import type_and_place
from ..privacy.entropy import SystemEntropy
from ..privacy.noise import discrete_gaussian
from ..privacy.noise_plan import fraction_from_json
from ..protocol.batches import StoredBatch, check_knowledge, fold_batches, write_batch
from ..protocol.canonical import real
from ..protocol.derive import adaptation_of
from ..protocol.faults import SENTENCES, TaskProblem
from ..protocol.keyring import load_private_key
from ..protocol.plan import RoundPlan, share_binding
from ..protocol.roster import AGGREGATOR
from ..protocol.units import Params, unit_plan, unit_processes, unit_scheme
from ..storage.blobs import CHUNK_BYTES
from ..text import brief

Result = dict[str, Any]


_NPZ_SUFFIX: Final = ".npy"
_NPZ_DATE: Final = (1980, 1, 1, 0, 0, 0)
"""The earliest that a ZIP can say: the same model always gives the same bytes."""
_NPZ_MAX_NAME_BYTES: Final = 4096
"""Far beyond any parameter's name, and well below the 65535 bytes that a ZIP can hold."""


NO_MODEL: Final = (
    "this aggregator has no torch to build a model with: submit the job with its initial model (the field "
    "initial_model, or `sotto jobs submit --build-initial-model`)"
)


def has_torch() -> bool:
    """Whether this installation can build models."""
    return find_spec("torch") is not None


def why_not_evaluated() -> str:
    """What this installation lacks to evaluate models, and what to install; empty where it can."""
    return lacking("party", "evaluating a model")


def model_shape(data: bytes) -> int:
    """How many parameters a model has. Needs no torch and no worker: some milliseconds for what fits into a message.

    Raises:
        InvalidInput: it is no safetensors file, or what is trained of it is not float32.
    """
    return flatten(parameters_of(data))[1].size


def initial_model(params: Params, context: WorkContext) -> Result:
    """{task, seed} → {sha256, size, dimension, not_trained}: what is trained of the task's model, as its seed
    initialises it, and the digest of the rest."""
    stored = _built(params["task"], params["seed"])
    tensors = stored.parameters()
    blob = context.blobs.write(to_safetensors(tensors))
    found = {"sha256": blob.sha256, "size": blob.size, "dimension": flatten(tensors)[1].size}
    return {**found, "not_trained": stored.not_trained}


def task_shape(params: Params, context: WorkContext) -> Result:
    """{task, seed} → {dimension, not_trained}: how many parameters the task's model trains, whatever its seed, and the
    digest of the rest, by its seed."""
    stored = _built(params["task"], params["seed"])
    return {"dimension": flatten(stored.parameters())[1].size, "not_trained": stored.not_trained}


def _built(task: str, seed: int) -> ModelFile:
    if not has_torch():
        raise PolicyError(NO_MODEL)
    from ..learning.task import find_task
    from ..learning.whole import built, model_file_of

    found = find_task(task)
    try:
        return model_file_of(built(found, seed))
    except SottoError:
        raise
    except Exception as error:  # of the task's own code, which may raise anything
        raise InvalidInput(
            f"the model of task {task!r} cannot be built: {type_and_place(error)}", private=brief(error)
        ) from error


def whole_model(params: Params, context: WorkContext) -> Result:
    """{task, seed, initial, sha256, not_trained} → {sha256, size, not_trained}: the whole model, of which `sha256` is
    what was trained, and the digest of the rest.

    The rest is that of the model that the job came with (`initial`, its digest), if that says what it is, or else the
    task's, built from `seed`.

    Raises:
        InvalidInput: it is another than the parties trained with (`not_trained`, where known), or cannot be built.
    """
    tensors = parameters_of(context.blobs.read(params["sha256"]))
    stored = read_model_file(context.blobs.read(params["initial"])) if params["initial"] else None
    if stored is None or not stored.described:
        stored = _built(params["task"], params["seed"])
    if params["not_trained"] not in ("", stored.not_trained):
        raise InvalidInput(SENTENCES[TaskProblem.NOT_TRAINED_STATE_DIFFERS])
    blob = context.blobs.write(stored.with_parameters(tensors).to_bytes())
    return {"sha256": blob.sha256, "size": blob.size, "not_trained": stored.not_trained}


def make_noise(params: Params, context: WorkContext) -> Result:
    """{plan, plan_digest, public} → the aggregator's noise batch."""
    plan = unit_plan(params)
    scheme = unit_scheme(params, plan)
    entropy = SystemEntropy()
    sigma2 = fraction_from_json(plan.noise.aggregator_sigma2)
    noise = discrete_gaussian(sigma2, plan.value_count, entropy=entropy)
    batch = write_batch(
        scheme,
        plan,
        noise,
        plan_digest=params["plan_digest"],
        contributor=AGGREGATOR,
        blobs=context.blobs,
        entropy=entropy,
    )
    return batch.to_json()


def check_body(params: Params, context: WorkContext) -> Result:
    """{plan, plan_digest, public, sha256, proof, contributor} → {}.

    CiphertextError names the first ciphertext of an upload that is none; KnowledgeError a sender who has not proven to
    know what is inside.
    """
    plan = unit_plan(params)
    scheme, layout = unit_scheme(params, plan), Layout.from_json(plan.layout)
    with context.blobs.open(params["sha256"]) as file:
        scheme.check_body(layout, file)
        file.seek(0)
        check_knowledge(
            scheme,
            layout,
            params["proof"],
            file,
            plan_digest=params["plan_digest"],
            contributor=params["contributor"],
        )
    return {}


def fold(params: Params, context: WorkContext) -> Result:
    """{plan, plan_digest, public, batches} → the aggregate."""
    plan = unit_plan(params)
    batches = {name: StoredBatch(**batch) for name, batch in params["batches"].items()}
    aggregate = fold_batches(
        unit_scheme(params, plan),
        plan,
        batches,
        plan_digest=params["plan_digest"],
        blobs=context.blobs,
        processes=unit_processes(params),
    )
    return aggregate.to_json()


def open_aggregate(params: Params, context: WorkContext) -> Result:
    """Open the aggregate and apply it to the model.

    {plan, plan_digest, public, aggregate, aggregate_root, contributions, updates: [party],
    shares: [{party, index, sha256}], private_key, optimizer, state_sha256} → {model_sha256, model_bytes, state_sha256}
    and, with adaptive clipping, {next_clipping_norm}; or {wrong: {party: why}} where shares are wrong: then nothing has
    been opened.
    """
    plan = unit_plan(params)
    scheme = unit_scheme(params, plan)
    layout = Layout.from_json(plan.layout)
    with context.blobs.open(params["aggregate"]) as file:
        material = b"".join(scheme.opening_material(layout, file))
    if plan.custody == "aggregator":
        private = load_private_key(Path(params["private_key"]), insecure_small=True)
        opened = scheme.open_with_key(layout, private, [material])
    else:
        shares, wrong = _checked_shares(scheme, layout, material, params, context)
        if wrong:
            return {"wrong": wrong}
        opened = scheme.combine(layout, material, shares)
    parts = list(scheme.decode(layout, opened, contributions=params["contributions"]))
    total = np.concatenate(parts)
    mean = mean_update(plan, total[: plan.dimension].astype(np.float64), params["updates"])
    return {**_apply(plan, mean, params, context), **_next_norm(plan, total, contributions=len(params["updates"]))}


def _next_norm(plan: RoundPlan, total: NDArray[np.int64], *, contributions: int) -> Result:
    """{next_clipping_norm}, as statements carry reals, with adaptive clipping; {} without."""
    adaptive = adaptation_of(plan)
    if adaptive is None:
        return {}
    found = adaptive.next_norm(
        float(plan.clipping_norm),
        noisy_bits=int(total[plan.dimension]),
        unit=plan.bit_unit,
        contributions=contributions,
    )
    return {"next_clipping_norm": real(found)}


def mean_update(plan: RoundPlan, total: NDArray[np.float64], contributors: Sequence[str]) -> NDArray[np.float64]:
    """What an opened sum (integers as float64, shape (dimension,)) says about the model's next step.

    Under fedavg the mean of the contributors' updates. Under fedsgd -η times the mean gradient, over the examples that
    the contributors' samples hold in expectation, by what they declared: the divisor is public.
    """
    real_sum = total / 2.0**plan.resolution_bits
    if plan.gradient_sum is None:
        return real_sum / len(contributors)
    rows = sum(plan.gradient_sum.declared_rows[name] for name in contributors)
    return -float(plan.local.learning_rate) * real_sum / (float(plan.local.sampling_rate) * rows)


def _checked_shares(
    scheme: Scheme, layout: Layout, material: bytes, params: Params, context: WorkContext
) -> tuple[dict[int, bytes], dict[str, str]]:
    shares: dict[int, bytes] = {}
    wrong: dict[str, str] = {}
    for share in params["shares"]:
        batch = context.blobs.read(share["sha256"])
        binding = share_binding(params["plan_digest"], params["aggregate_root"], share["party"])
        try:
            scheme.verify_share(layout, material, batch, index=share["index"], binding=binding)
        except ShareError as error:
            wrong[share["party"]] = error.message
        else:
            shares[share["index"]] = batch
    return shares, wrong


def _apply(plan: RoundPlan, mean: NDArray[np.float64], params: Params, context: WorkContext) -> Result:
    parameters, signature = flatten(parameters_of(context.blobs.read(plan.model_sha256)))
    state = from_safetensors(context.blobs.read(params["state_sha256"])) if params["state_sha256"] else {}
    parameters, state = ServerOptimizer(**params["optimizer"]).step(parameters, mean, state=state)
    model = context.blobs.write(to_safetensors(unflatten(parameters, signature)))
    kept = context.blobs.write(to_safetensors(state)).sha256 if state else ""
    return {"model_sha256": model.sha256, "model_bytes": model.size, "state_sha256": kept}


def evaluate_model(params: Params, context: WorkContext) -> Result:
    """{task, options, directory, sha256, seed, not_trained} → {metrics, rows, without}: on public rows, what these are
    in words, and what is missing, in words: metrics that are not finite, or why there are none at all.

    `directory` is where relative paths in options start. What is not trained of a model is in its file, or else built
    from `seed` (null: not known); where `not_trained` is known, its digest is that.

    EvaluationError says what of the rows, the model or the metrics is at fault.
    """
    if why := why_not_evaluated():
        return {"metrics": {}, "rows": "", "without": why}
    from ..learning.evaluation import evaluate, public_rows
    from ..learning.loading import starting_from
    from ..learning.task import find_task
    from ..learning.whole import restored

    task = find_task(params["task"])
    with starting_from(params.get("directory", ".")):
        rows = public_rows(task, params["options"])
    if rows is None:
        return {"metrics": {}, "rows": "", "without": f"task {task.name!r} has no public rows"}
    stored = read_model_file(context.blobs.read(params["sha256"]))
    model = restored(task, stored, seed=params.get("seed"), not_trained=params.get("not_trained", ""))
    found = evaluate(task, model, rows)
    metrics = {name: value for name, value in found.items() if math.isfinite(value)}
    lost = sorted(found.keys() - metrics.keys())
    without = f"not finite, and left out: {', '.join(lost)}" if lost else ""
    return {"metrics": metrics, "rows": rows.description, "without": without}


def export_model(params: Params, context: WorkContext) -> Result:
    """{sha256, format} → {sha256, size}: a model in a format of `EXPORTS`; the same model gives the same bytes."""
    tensors = read_model_file(context.blobs.read(params["sha256"])).arrays()
    _, write = EXPORTS[params["format"]]
    path = context.workspace / "export"
    with path.open("w+b") as file:
        write(tensors, file)
        file.seek(0)
        blob = context.blobs.write(iter(lambda: file.read(CHUNK_BYTES), b""))
    return {"sha256": blob.sha256, "size": blob.size}


def write_npz(tensors: Tensors, file: BinaryIO) -> None:
    """NumPy's archive of arrays by name: `np.load(file)[name]`, shapes and dtypes as they are, nothing pickled.

    `np.savez` takes the names as arguments of its own, of which some are taken; this writes the same format (NEP 1).

    Raises:
        InvalidInput: an array's name cannot be told apart in such an archive.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(tensors):
            member = zipfile.ZipInfo(name + _NPZ_SUFFIX, _NPZ_DATE)
            kept = member.filename == name + _NPZ_SUFFIX  # not with a NUL in it
            if not kept or name.endswith(_NPZ_SUFFIX) or len(name.encode()) > _NPZ_MAX_NAME_BYTES:
                raise InvalidInput(f"a tensor's name cannot stand in an npz file: {name[:100]!r}")
            with archive.open(member, "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, tensors[name], allow_pickle=False)


EXPORTS: Final[dict[str, tuple[str, Callable[[Tensors, BinaryIO], None]]]] = {"npz": ("model.npz", write_npz)}
"""Format of an export → (name of the file, how it is written)."""

HANDLERS: Final[dict[str, Handler]] = {
    "initial_model": initial_model,
    "make_noise": make_noise,
    "check_body": check_body,
    "fold": fold,
    "open_aggregate": open_aggregate,
    "evaluate_model": evaluate_model,
    "export_model": export_model,
    "task_shape": task_shape,
    "whole_model": whole_model,
}
