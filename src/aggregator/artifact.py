"""The artifact of a job: the model, and a signed manifest that says what was done and what is guaranteed.

Three kinds of manifests, one schema. A training's says how the model was made. An export's carries that over to the
same model in another format, and names the manifest that it comes from. An evaluation's says what a model was measured
on and what came of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator

from ..errors import NotFoundError, StorageError
from ..jobs.artifact import OF_ROUND, UNSIGNED
from ..jobs.computations import ExportSpec
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import JobRow
from ..privacy.accounting import MEANINGLESS_EPSILON, epsilon
from ..privacy.events import NoisySum
from ..privacy.figures import AGAINST, EVERYBODY, OWN_NOISE, against_of_rows
from ..protocol.canonical import number_or_inf, real
from ..protocol.derive import adaptation_of, charged_against, example_event, noise_of, party_event
from ..protocol.plan import MANIFEST_KIND, TRANSCRIPT_KIND, RoundPlan, signed_digest
from ..protocol.signing import Signed, open_signed
from ..storage.blobs import Blobs
from ..versions import versions_of
from .early import figures_of_party, place_of, said_first
from .federation import Federation
from .pipeline import StoredModel
from .planning import plan_of
from .round_row import RoundRow, RoundState
from .steps import party_ledger_heads

MANIFEST_VERSION: Final = 1
MODEL_FILE: Final = "model.safetensors"
MANIFEST_FILE: Final = "manifest.json"
SCHEMA: Final = json.loads((Path(__file__).parent / "manifest.schema.json").read_text())
UNKNOWN_PRIVACY: Final = "unknown: the model came with the job"
ACCOUNTANT_TEXT: Final = "RDP by dp-accounting, converted to (epsilon, delta)"
SUM_NOISE_BY: Final = {
    "parties": "shares of the parties, added up under encryption",
    "both": "shares of the parties, added up under encryption, and as much again by the aggregator",
    "aggregator": "the aggregator, as a trusted server",
}
"""Under fedsgd, by the plan's `noise_by`."""
PACKAGES: Final = ("cryptography", "dp-accounting", "gmpy2", "numpy", "torch")


def write_artifact(
    job: JobRow,
    spec: FederatedTrainingSpec,
    history: Sequence[RoundRow],
    *,
    model: StoredModel,
    federation: Federation,
    blobs: Blobs,
    ledger_head: str,
    created_at: str,
    number: int | None = None,
    continued: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Store the manifest beside a released model; returns a job's result (`jobs.states.JobRow.result`).

    Args:
        history: every round that was begun, whatever became of it: all figures are of all of them.
        model: the one that is meant (`released_model`), whole.
        number: of the round whose model that is; None: the last that was released.
        continued: the jobs that this one goes on from (`predecessor`), the nearest first.
    """
    released = [row for row in history if row.state is RoundState.RELEASED and row.result]
    meant = _meant(history, number)
    whole = meant is released[-1] and len(released) >= spec.rounds
    last = {**(meant.result or {}), **({} if whole else figures_of_party(history, spec.party_privacy.delta))}
    plan = plan_of(meant.plan)
    plans = [plan_of(row.plan) for row in history]
    spent_example = epsilon(map(example_event, plans), delta=float(plan.local.delta))
    privacy = _privacy(plan, plans, last, spent_example=spent_example)
    place = {} if whole else place_of(job, spec, history, meant)
    goes_on = {"continued_from": [dict(each) for each in continued]} if continued else {}
    words = [*said_first(place, goes_on), *statements(plan, federation.keyring.modulus_bits, last)]
    statement = {
        **_head(job, federation, created_at=created_at),
        "task": spec.task,
        **({} if spec.strategy == "fedavg" else {"strategy": spec.strategy}),
        "data": f"rows that the parties hold; options shared by all: {spec.task_options_text}",
        "model": _model(model, last),
        **({OF_ROUND: place} if place else {}),
        **goes_on,
        "evaluation": _evaluation(meant),
        "privacy": privacy,
        "encryption": _encryption(plan, federation),
        "rounds": [_round(row) for row in history],
        "ledger_head": ledger_head,
        **({"party_ledger_heads": heads} if (heads := party_ledger_heads(history)) else {}),
        "versions": versions_of(PACKAGES),
        "statements": [*words, *_left_out(meant), *_not_whole(model)],
    }
    return {
        "files": write_files(statement, federation=federation, blobs=blobs),
        "metrics": meant.metrics,
        **({"not_evaluated": meant.not_evaluated} if meant.not_evaluated else {}),
        "epsilon_example": number_or_inf(spent_example),
        "epsilon_party": last["epsilon_party"],
        "epsilon_party_against_aggregator": last["epsilon_party_against_aggregator"],
        "delta": float(plan.local.delta),
        "party_delta": float(plan.noise.delta),
        "epsilon_example_if_all_others_collude": privacy["example"]["epsilon_if_all_others_collude"],
        "epsilon_party_if_all_others_collude": privacy["party"]["epsilon_if_all_others_collude"],
        "example_assumption": privacy["example"]["assumption"],
        "party_assumption": privacy["party"]["assumption"],
        "party_assumption_against_aggregator": privacy["party"]["assumption_against_aggregator"],
        "round": meant.number,
        **{name: place[name] for name in ("rounds_released", "rounds_planned") if place},
        **goes_on,
    }


@dataclass(frozen=True, slots=True)
class Source:
    """A finished training's artifact, as its manifest describes it.

    Attributes:
        statement: what the aggregator signed.
        manifest_sha256: of the manifest's file.
        model_sha256, model_bytes: of the model's file.
    """

    statement: dict[str, Any]
    manifest_sha256: str
    model_sha256: str
    model_bytes: int


def file_of(job: JobRow, name: str) -> dict[str, Any]:
    """A file of a job's result: {"name", "bytes", "sha256"}; NotFoundError when it has none of this name (any more)."""
    for file in (job.result or {}).get("files", ()):
        if file["name"] == name:
            return dict(file)
    raise NotFoundError(f"job {job.job_id} has no file {name}", job_id=job.job_id, file=name)


def read_source(job: JobRow, *, federation: Federation, blobs: Blobs) -> Source:
    """The manifest of a training that succeeded. What is signed again is verified first: whoever can write to the
    database and the blobs, and has no key, gets nothing signed this way.

    Raises:
        NotFoundError: its files are gone.
        SignatureError: this aggregator did not sign the manifest.
        StorageError: a file is damaged, or the manifest is not about this job and this model.
    """
    model, manifest = file_of(job, MODEL_FILE), file_of(job, MANIFEST_FILE)
    content = json.loads(blobs.read(manifest["sha256"]))
    key = federation.signing_key.verify_key
    statement = open_signed(Signed.from_json(content["manifest"]), MANIFEST_KIND, verify_key=key)
    described = {"file": MODEL_FILE, "sha256": model["sha256"], "bytes": model["bytes"]}
    if statement["job_id"] != job.job_id or not described.items() <= statement["model"].items():
        raise StorageError(f"the manifest of job {job.job_id} is not about its model", job_id=job.job_id)
    return Source(statement, manifest["sha256"], model["sha256"], model["bytes"])


def export_statement(
    job: JobRow, spec: ExportSpec, source: Source, *, federation: Federation, file: Mapping[str, Any], created_at: str
) -> dict[str, Any]:
    """What holds for an exported model: all that held for the one it was made of, and which that was."""
    return {
        **source.statement,
        **_head(job, federation, created_at=created_at),
        "model": {**source.statement["model"], **file},
        "exported_from": {
            "job_id": spec.job_id,
            "spec_digest": source.statement["spec_digest"],
            "created_at": source.statement["created_at"],
            "model_sha256": source.model_sha256,
            "manifest_sha256": source.manifest_sha256,
            "format": spec.format,
        },
    }


def evaluation_statement(
    job: JobRow,
    source: Source | None,
    *,
    federation: Federation,
    task: str,
    rows: str,
    model: Mapping[str, Any],
    metrics: Mapping[str, float],
    lacking: str,
    created_at: str,
) -> dict[str, Any]:
    """What was measured, on what, of which model; of a training's model also what is guaranteed for it.

    Args:
        source: of the training whose model it is; None for a model that came with the job: of that one nothing is
            known but its bytes.
        rows: the public rows, in words.
        model: {"file", "sha256", "bytes"}.
        lacking: which metrics there are not, and why, in words; empty where there are all.
    """
    lines = ["the metrics are exact, without noise: they are of public rows, and cost no privacy", *_lacking(lacking)]
    if source is None:
        lines.append("nothing is known of how this model was made: it came with the job")
    else:
        lines += source.statement["statements"]
    return {
        **_head(job, federation, created_at=created_at),
        "task": task,
        "data": f"public rows that the aggregator holds: {rows}",
        "model": dict(model),
        "evaluation": _metrics(metrics),
        "evaluated": {
            "job_id": source.statement["job_id"] if source else "",
            "manifest_sha256": source.manifest_sha256 if source else "",
        },
        "privacy": source.statement["privacy"] if source else UNKNOWN_PRIVACY,
        "versions": versions_of(PACKAGES),
        "statements": lines,
    }


def write_files(statement: Mapping[str, Any], *, federation: Federation, blobs: Blobs) -> list[dict[str, Any]]:
    """Sign and store a manifest; returns the files of the result (`jobs.states.JobRow.result`), the model's first."""
    Draft202012Validator(SCHEMA).validate(statement)
    signed = federation.sign(MANIFEST_KIND, dict(statement))
    content = json.dumps({"manifest": signed.to_json(), "readable": statement}, indent=1, ensure_ascii=False)
    manifest = blobs.write(content.encode() + b"\n")
    model = statement["model"]
    return [
        {"name": model["file"], "bytes": model["bytes"], "sha256": model["sha256"]},
        {"name": MANIFEST_FILE, "bytes": manifest.size, "sha256": manifest.sha256},
    ]


def _head(job: JobRow, federation: Federation, *, created_at: str) -> dict[str, Any]:
    return {
        "version": MANIFEST_VERSION,
        "job_id": job.job_id,
        "display_name": job.display_name,
        "owner": job.owner,
        "order": Signed.from_text(job.signed_order).to_json() if job.signed_order else UNSIGNED,
        "created_at": created_at,
        "federation": federation.roster.federation,
        "spec_digest": job.spec_digest,
    }


def released_model(history: Sequence[RoundRow], number: int | None = None) -> tuple[RoundPlan, StoredModel]:
    """The plan of a released round, the last one where no number is given, and what is trained of its model."""
    row = _meant(history, number)
    result = row.result or {}
    return plan_of(row.plan), StoredModel(result["model_sha256"], result["model_bytes"])


def _meant(history: Sequence[RoundRow], number: int | None) -> RoundRow:
    released = [row for row in history if row.state is RoundState.RELEASED and row.result]
    return released[-1] if number is None else next(row for row in released if row.number == number)


def _model(model: StoredModel, last: Mapping[str, Any]) -> dict[str, Any]:
    trained = last["model_sha256"]
    return {
        "file": MODEL_FILE,
        "sha256": model.sha256,
        "bytes": model.size,
        **({} if trained == model.sha256 else {"trained_sha256": trained}),
        **({"not_trained_sha256": model.not_trained} if model.not_trained else {}),
    }


def _not_whole(model: StoredModel) -> list[str]:
    """Where the file is not all of the model."""
    if not model.without:
        return []
    return [f"{MODEL_FILE} holds what was trained alone, to be put into the task's build_model(seed): {model.without}"]


def _evaluation(row: RoundRow) -> dict[str, str] | str:
    """Of the released model: its metrics, or that and why there are none."""
    why = f": {row.not_evaluated}" if row.not_evaluated else ""
    return _metrics(row.metrics) or f"not evaluated{why}"


def _left_out(row: RoundRow) -> list[str]:
    return _lacking(row.not_evaluated) if row.metrics else []


def _lacking(why: str) -> list[str]:
    return [f"not all metrics are given: {why}"] if why else []


def _metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: real(value) for name, value in metrics.items()}


def _privacy(
    plan: RoundPlan, plans: Sequence[RoundPlan], last: dict[str, Any], *, spent_example: float
) -> dict[str, Any]:
    """What holds for a row and for a party after all `plans`, of which `plan` was the last to release a model."""
    fedavg = plan.gradient_sum is None
    noise = noise_of(plan)
    alone = [party_event(each, noise_of(each), against="all_others") for each in plans]
    return {
        "example": {
            "unit": "one row of one party's data",
            "neighbouring": "add or remove one",
            "epsilon": real(spent_example),
            "delta": plan.local.delta,
            "accountant": ACCOUNTANT_TEXT,
            "noise_multiplier": plan.local.noise_multiplier,
            "sampling_rate": plan.local.sampling_rate,
            "steps": plan.local.steps * len(plans),
            "max_grad_norm": plan.local.max_grad_norm,
            **(_update_privacy(spent_example) if fedavg else _sum_privacy(plan, plans)),
        },
        "party": {
            "unit": "one party's whole update",
            "neighbouring": _PARTY_NEIGHBOURS[plan.adaptive_clipping is not None],
            "against": AGAINST["release"],
            "epsilon": real(last["epsilon_party"]),
            "epsilon_against_aggregator": real(last["epsilon_party_against_aggregator"]),
            "epsilon_if_all_others_collude": real(epsilon(alone, delta=float(plan.noise.delta))),
            "assumption": noise.assumption("release"),
            "assumption_against_aggregator": noise.assumption("aggregator"),
            "delta": plan.noise.delta,
            "accountant": ACCOUNTANT_TEXT,
            "mechanism": "discrete Gaussian on the sum",
            "clipping_norm": plan.clipping_norm,
            "noise_multiplier": plan.noise.noise_multiplier if fedavg else _party_multiplier(plan),
            "noise_by": plan.noise.noise_by,
            "colluders_assumed": plan.colluders,
            **_adaptive(plan, last),
        },
    }


_PARTY_NEIGHBOURS: Final = {
    False: "replaced by the zero update; who contributed is public",
    True: "replaced by zeros, in the slot of the bit too; who contributed is public",
}
"""By whether there is a bit (adaptive clipping)."""


def _adaptive(plan: RoundPlan, last: Mapping[str, Any]) -> dict[str, Any]:
    """Of adaptive clipping: how the norm moved on from that of the plan, and what update and bit carry of the noise."""
    adaptive = adaptation_of(plan)
    if adaptive is None:
        return {}
    multiplier = float(plan.noise.noise_multiplier)
    return {
        "adaptive_clipping": {
            "quantile": real(adaptive.quantile),
            "learning_rate": real(adaptive.learning_rate),
            "smallest": real(adaptive.smallest),
            "largest": real(adaptive.largest),
            "next_clipping_norm": last["next_clipping_norm"],
            "bit_deviation": real(adaptive.bit_deviation if multiplier else 0.0),
            "update_noise_multiplier": real(adaptive.update_multiplier(multiplier) if multiplier else 0.0),
        }
    }


def _update_privacy(spent: float) -> dict[str, str]:
    """Of fedavg: a party protects its rows itself, before anything leaves it."""
    return {
        "against": EVERYBODY,
        "assumption": OWN_NOISE,
        "mechanism": "DP-SGD, Poisson sampling",
        "noise_by": "each party, on its own gradients",
        "epsilon_if_all_others_collude": real(spent),
    }


def _sum_privacy(plan: RoundPlan, plans: Sequence[RoundPlan]) -> dict[str, str]:
    """Of fedsgd: whom the figure holds against, what it rests on, and what is left where that fails."""
    delta = float(plan.local.delta)
    noise = noise_of(plan)
    return {
        "against": against_of_rows(noise.shares),
        "assumption": noise.assumption(charged_against(noise), sampled=True),
        "mechanism": "DP-SGD over the rows of all parties, Poisson sampling, discrete Gaussian on the rounded sum",
        "noise_by": SUM_NOISE_BY[plan.noise.noise_by],
        "assumption_release": noise.assumption("release", sampled=True),
        "epsilon_release": real(epsilon([example_event(each, against="release") for each in plans], delta=delta)),
        "epsilon_if_all_others_collude": real(
            epsilon([example_event(each, against="all_others") for each in plans], delta=delta)
        ),
    }


def _party_multiplier(plan: RoundPlan) -> str:
    """Of fedsgd: all planned noise, over what one party can change."""
    event = party_event(plan, noise_of(plan))
    return real(event.noise_multiplier if isinstance(event, NoisySum) else 0.0)


def _encryption(plan: RoundPlan, federation: Federation) -> dict[str, Any]:
    return {
        "scheme": plan.scheme,
        "custody": plan.custody,
        "threshold": plan.threshold,
        "holders": len(federation.roster.holders),
        "key_id": plan.key_id,
        "modulus_bits": federation.keyring.modulus_bits,
        "roster_digest": plan.roster_digest,
    }


def _round(row: RoundRow) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "round": row.number,
        "state": row.state.value,
        "plan": row.plan_digest,
        "quorum": row.quorum,
        "contributors": list(row.contributors),
    }
    plan = plan_of(row.plan)
    if plan.adaptive_clipping is not None:
        entry["clipping_norm"] = plan.clipping_norm
    if row.result:
        entry["transcript"] = signed_digest(Signed.from_json(row.result["transcript"]), TRANSCRIPT_KIND)
    return entry


def statements(plan: RoundPlan, modulus_bits: int, last: dict[str, Any]) -> list[str]:
    """What holds for a run and against whom, in plain words; what does not hold is said as well."""
    lines = []
    if plan.scheme == "plaintext":
        lines.append("INSECURE: updates travelled unencrypted (scheme plaintext): nothing hides them")
    elif plan.custody == "aggregator":
        lines.append("the aggregator holds the key: updates are protected in transit and at rest, not from it")
    else:
        lines.append(
            f"no update and no sum could be opened by fewer than {plan.threshold} key shares; the aggregator holds none"
        )
    if modulus_bits < 2048:  # NIST SP 800-57 part 1: 2048 bits are the least that is acceptable
        lines.append(f"INSECURE: a modulus of {modulus_bits} bits is breakable")
    elif modulus_bits < 3072:  # NIST SP 800-57 part 1, table 2
        lines.append(f"a modulus of {modulus_bits} bits stands for 112-bit security; 3072 bits for 128")
    if plan.noise.noise_by == "aggregator":
        lines.append("the aggregator can know the exact sum: it drew all the noise")
    if plan.gradient_sum is not None and plan.gradient_sum.trusted_aggregator:
        lines.append("TRUSTED SERVER: the job lets the aggregator alone protect every row; nothing holds against it")
    party = last["epsilon_party"]
    if party == "inf" or float(party) > MEANINGLESS_EPSILON:
        few = "with so few parties" if plan.gradient_sum is None else "under fedsgd, whose noise hides rows"
        lines.append(f"no meaningful party-level guarantee {few}")
    lines.append("a party's clipping is not enforced against a malicious party, which can also spoil a sum")
    if plan.gradient_sum is None:
        lines.append("DP-SGD's noise is floating-point: open to attacks on its low bits in principle")
    else:
        lines.append("the noise is an exact discrete Gaussian on integers: it has no low bits to attack")
    return lines
