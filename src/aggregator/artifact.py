"""The artifact of a job: the model, and a signed manifest that says what was done and what is guaranteed."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator

from .. import __version__
from ..jobs.spec import FederatedTrainingSpec
from ..jobs.states import JobRow
from ..privacy.accounting import MEANINGLESS_EPSILON, epsilon
from ..protocol.canonical import real
from ..protocol.derive import example_event
from ..protocol.plan import MANIFEST_KIND, TRANSCRIPT_KIND, RoundPlan, signed_digest
from ..protocol.signing import Signed
from ..storage.blobs import Blobs
from .federation import Federation
from .planning import plan_of
from .round_row import RoundRow, RoundState

MANIFEST_VERSION: Final = 1
MODEL_FILE: Final = "model.safetensors"
MANIFEST_FILE: Final = "manifest.json"
SCHEMA: Final = json.loads((Path(__file__).parent / "manifest.schema.json").read_text())
PACKAGES: Final = ("cryptography", "dp-accounting", "gmpy2", "numpy", "opacus", "torch")


def write_artifact(
    job: JobRow,
    spec: FederatedTrainingSpec,
    history: Sequence[RoundRow],
    *,
    federation: Federation,
    blobs: Blobs,
    ledger_head: str,
    created_at: str,
) -> dict[str, Any]:
    """Store the manifest beside the last model; returns a job's result (`jobs.states.JobRow.result`)."""
    released = [row for row in history if row.state is RoundState.RELEASED and row.result]
    last = released[-1].result or {}
    plan = plan_of(released[-1].plan)
    spent_example = epsilon([example_event(plan).repeated(len(history))], delta=float(plan.local.delta))
    statement = {
        "version": MANIFEST_VERSION,
        "job_id": job.job_id,
        "display_name": job.display_name,
        "owner": job.owner,
        "created_at": created_at,
        "federation": plan.federation,
        "task": spec.task,
        "data": f"rows that the parties hold; options shared by all: {spec.task_options_text}",
        "spec_digest": spec.digest,
        "model": {"file": MODEL_FILE, "sha256": last["model_sha256"], "bytes": last["model_bytes"]},
        "evaluation": {name: real(value) for name, value in last["metrics"].items()} or "not evaluated",
        "privacy": _privacy(plan, last, rounds=len(history), spent_example=spent_example),
        "encryption": _encryption(plan, federation),
        "rounds": [_round(row) for row in history],
        "ledger_head": ledger_head,
        "versions": _versions(),
        "statements": statements(plan, federation.keyring.modulus_bits, last),
    }
    Draft202012Validator(SCHEMA).validate(statement)
    signed = federation.sign(MANIFEST_KIND, statement)
    content = json.dumps({"manifest": signed.to_json(), "readable": statement}, indent=1, ensure_ascii=False)
    manifest = blobs.write(content.encode() + b"\n")
    return {
        "files": [
            {"name": MODEL_FILE, "bytes": last["model_bytes"], "sha256": last["model_sha256"]},
            {"name": MANIFEST_FILE, "bytes": manifest.size, "sha256": manifest.sha256},
        ],
        "metrics": last["metrics"],
        "epsilon_example": spent_example if math.isfinite(spent_example) else "inf",
        "epsilon_party": last["epsilon_party"],
        "epsilon_party_against_aggregator": last["epsilon_party_against_aggregator"],
        "delta": float(plan.local.delta),
    }


def _privacy(plan: RoundPlan, last: dict[str, Any], *, rounds: int, spent_example: float) -> dict[str, Any]:
    accountant = "RDP by dp-accounting, converted to (epsilon, delta)"
    return {
        "example": {
            "unit": "one row of one party's data",
            "neighbouring": "add or remove one",
            "epsilon": real(spent_example),
            "delta": plan.local.delta,
            "accountant": accountant,
            "against": "everybody, the aggregator and the other parties included",
            "mechanism": "DP-SGD, Poisson sampling",
            "noise_multiplier": plan.local.noise_multiplier,
            "sampling_rate": plan.local.sampling_rate,
            "steps": plan.local.steps * rounds,
            "max_grad_norm": plan.local.max_grad_norm,
            "noise_by": "each party, on its own gradients",
        },
        "party": {
            "unit": "one party's whole update",
            "neighbouring": "replaced by the zero update; who contributed is public",
            "epsilon": _text(last["epsilon_party"]),
            "epsilon_against_aggregator": _text(last["epsilon_party_against_aggregator"]),
            "delta": plan.noise.delta,
            "accountant": accountant,
            "mechanism": "discrete Gaussian on the sum",
            "clipping_norm": plan.clipping_norm,
            "noise_multiplier": plan.noise.noise_multiplier,
            "noise_by": plan.noise.noise_by,
            "colluders_assumed": plan.colluders,
        },
    }


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
    party = last["epsilon_party"]
    if party == "inf" or float(party) > MEANINGLESS_EPSILON:
        lines.append("no meaningful party-level guarantee with so few parties")
    lines.append("a party's clipping is not enforced against a malicious party, which can also spoil a sum")
    lines.append("DP-SGD's noise is floating-point: open to attacks on its low bits in principle")
    return lines


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else real(value)


def _versions() -> dict[str, str]:
    found = {"sotto": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an aggregator needs no torch
    return found
