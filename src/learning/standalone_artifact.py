"""The artifact of `sotto train`: made, hashed, signed, and verified. Needs no torch.

`schemas/train-artifact.schema.json` says what is in it. Its hash shows damage; only a signature shows who made it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import DigestError, InvalidInput, SignatureError
from ..privacy.accounting import ACCOUNTANT, MEANINGLESS_EPSILON, epsilon
from ..privacy.events import DpSgdSteps
from ..protocol.canonical import canonical_bytes, number_or_inf
from ..protocol.signing import Signed, SigningKey, open_signed
from ..versions import versions_of
from .model_file import parameters_of
from .standalone import Plan, Trained, steps_of
from .standalone_json import load_schema, read_object, rfc8785, violations

VERSION: Final = 1
SCHEMA: Final = load_schema("train-artifact")
SIGNATURE_KIND: Final = "train-artifact"
ARTIFACT_FILE: Final = "artifact.json"
MODEL_FILE: Final = "model.safetensors"
MAX_INLINE_BYTES: Final = 4 << 20
"""Of a model that is printed within its artifact; a larger one needs a file."""

_PACKAGES: Final = ("dp-accounting", "numpy", "torch")
_UNSEALED: Final = frozenset({"hash", "signature"})
_EPSILON_SLACK: Final = 1e-9
"""Relative: another libm may round the last bits of ε another way."""

MOCK_STATEMENT: Final = "MOCK: nothing was trained, nothing was charged, there is no model and no guarantee"


def artifact_hash(artifact: Mapping[str, Any]) -> str:
    """SHA-256, hex, of the canonical form (RFC 8785) without `hash` and `signature`."""
    return hashlib.sha256(rfc8785({key: artifact[key] for key in artifact if key not in _UNSEALED})).hexdigest()


def build_artifact(
    plan: Plan,
    trained: Trained,
    *,
    created_at: str,
    in_file: bool,
    signing_key: SigningKey | None = None,
    signer: str = "",
) -> dict[str, Any]:
    """The artifact of a run.

    Args:
        created_at: UTC, ISO 8601 with microseconds.
        in_file: whether the model lies in `MODEL_FILE` beside the artifact rather than within it.
        signing_key, signer: the node's key and name; None leaves the artifact unsigned.
    """
    metrics = trained.metrics or {}
    body: dict[str, Any] = {
        "model": _model(trained.model, in_file=in_file),
        "epsilon": number_or_inf(plan.epsilon),
        "accuracy": metrics.get("accuracy"),
        "n": plan.source.n,
        "provenance": {
            "accuracy": "public rows, exact" if "accuracy" in metrics else "not evaluated",
            "n": plan.source.n_is,
        },
        "evaluation": {"rows": trained.holdout_rows, "description": trained.holdout, "metrics": metrics}
        if metrics
        else None,
    }
    said = [*_statements(plan), *([f"not evaluated: {trained.not_evaluated}"] if trained.not_evaluated else [])]
    sealed = _seal(plan, body, ledger_head=trained.ledger_head, statements=said, created_at=created_at)
    if signing_key is not None:
        statement = {"hash": sealed["hash"], "job_id": sealed["job_id"]}
        sealed["signature"] = {
            "signer": signer,
            "verify_key": signing_key.verify_key.hex(),
            "signature": signing_key.sign(SIGNATURE_KIND, statement, signer=signer).signature.hex(),
        }
    return sealed


def build_mock(plan: Plan, *, created_at: str) -> dict[str, Any]:
    """What stands in for an artifact where nothing was trained: no model, no metric, and no way to lose the mark."""
    body: dict[str, Any] = {
        "model": None,
        "epsilon": 0,
        "accuracy": None,
        "n": 0,
        "provenance": {"accuracy": "not evaluated", "n": "nothing was trained"},
        "evaluation": None,
    }
    return _seal(plan, body, ledger_head=None, statements=[MOCK_STATEMENT], created_at=created_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found in order. `epsilon` may be infinite; `signer` is "" for an unsigned artifact."""

    job_id: str
    hash: str
    epsilon: float
    delta: float
    signer: str
    verify_key: str


def verify_artifact(
    data: bytes, *, directory: Path | None, verify_key: bytes | None = None, allow_unsigned: bool = False
) -> Verified:
    """Check an artifact as it is: form, hash, model, ε, signature.

    Only a signature tells a real one from a mock, or anything else, that was edited and hashed anew; and only one of a
    key that is known to be somebody's.

    Args:
        data: the JSON text.
        directory: where a model in a file lies; None where there is no such place.
        verify_key: that must have signed it; None takes a signature by any key.
        allow_unsigned: whether one without a signature will do, where no key is named.

    Raises:
        InvalidInput: it breaks the schema, is a mock, or its ε is less than what its settings cost.
        DigestError: its hash or its model's is another.
        SignatureError: the signature does not verify, is missing, or is of another key.
    """
    artifact = read_object(data, what="the artifact")
    if artifact.get("mock") is True or MOCK_STATEMENT in _said(artifact):
        raise InvalidInput("this artifact is a MOCK: nothing was trained, and it stands for nothing")
    problems = violations(SCHEMA, artifact)
    if problems:
        raise InvalidInput("this is not an artifact of sotto train", violations=problems)
    if artifact_hash(artifact) != artifact["hash"]:
        raise DigestError("the artifact was changed: its hash is another")
    _check_model(artifact["model"], directory)
    _check_coherence(artifact)
    _check_epsilon(artifact)
    signature = artifact.get("signature", {})
    _check_signature(artifact, signature, verify_key, allow_unsigned=allow_unsigned)
    return Verified(
        job_id=artifact["job_id"],
        hash=artifact["hash"],
        epsilon=float(artifact["epsilon"]),  # "inf" too
        delta=float(artifact["dp"]["delta"]),
        signer=signature.get("signer", ""),
        verify_key=signature.get("verify_key", ""),
    )


def _seal(
    plan: Plan, body: Mapping[str, Any], *, ledger_head: str | None, statements: list[str], created_at: str
) -> dict[str, Any]:
    """The whole artifact with its hash, in the order in which a person reads it; checked against the schema."""
    job, local = plan.job, plan.local
    artifact: dict[str, Any] = {
        "version": VERSION,
        "job_id": job.job_id,
        "dataset": plan.source.dataset,
        "task": plan.source.task.name,
        "mock": body["model"] is None,
        **body,
        "dp": {
            "enabled": job.private,
            "epsilon": number_or_inf(plan.epsilon),
            "delta": job.delta,
            "clip": job.clip if job.private else None,
            "noise_multiplier": local.noise_multiplier,
        },
        "training": {
            "epochs": job.epochs,
            "steps": local.steps,
            "batch_size": plan.batch_size,
            "sampling_rate": local.sampling_rate,
            "learning_rate": local.learning_rate,
        },
        "privacy": {
            "unit": "one row",
            "neighbouring": "add or remove one",
            "accountant": ACCOUNTANT,
            "ledger_head": ledger_head,
            "statements": statements,
        },
        "seed": job.seed,
        "created_at": created_at,
        "versions": versions_of(_PACKAGES),
    }
    sealed = {**artifact, "hash": artifact_hash(artifact)}
    problems = violations(SCHEMA, sealed)
    assert not problems, problems
    return sealed


def _model(model: bytes, *, in_file: bool) -> dict[str, Any]:
    where = {"file": MODEL_FILE} if in_file else {"base64": base64.b64encode(model).decode()}
    return {"format": "safetensors", "bytes": len(model), "sha256": hashlib.sha256(model).hexdigest(), **where}


def _statements(plan: Plan) -> list[str]:
    """What holds, and against whom; what does not hold is said as well."""
    if not plan.job.private:
        lines = ["NO PRIVACY: trained without DP, entered in the ledger as non-private"]
    else:
        lines = [
            f"each row: epsilon {plan.epsilon:.6g} at delta {plan.job.delta:g}, against everybody who sees the model; "
            "somebody with several rows has less"
        ]
        if plan.epsilon > MEANINGLESS_EPSILON:
            lines.append("no meaningful guarantee at so large an epsilon")
        lines.append("DP-SGD's noise is floating-point: open to attacks on its low bits in principle")
    lines.append("accuracy is of public rows, and n is public: neither is computed from private rows")
    return lines


def _check_model(model: Mapping[str, Any], directory: Path | None) -> None:
    if "base64" in model:
        try:
            content = base64.b64decode(model["base64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInput("the artifact's model is not base64") from error
    elif directory is None:
        raise InvalidInput(f"the model is in a file, {MODEL_FILE}: verify the artifact's file, beside which it lies")
    else:
        try:
            content = (directory / MODEL_FILE).read_bytes()
        except OSError as error:
            raise DigestError(f"{MODEL_FILE} cannot be read beside the artifact: {error.strerror}") from error
    if len(content) != model["bytes"] or hashlib.sha256(content).hexdigest() != model["sha256"]:
        raise DigestError("the model is not the one that the artifact is about")
    parameters_of(content)


def _check_coherence(artifact: Mapping[str, Any]) -> None:
    """What is there twice says the same, and what follows from something else does."""
    training, n, accuracy = artifact["training"], artifact["n"], artifact["accuracy"]
    metrics = (artifact["evaluation"] or {}).get("metrics", {})
    source = "not evaluated" if accuracy is None else "public rows, exact"
    follows = {
        "training.sampling_rate": training["sampling_rate"] == training["batch_size"] / n,
        "training.steps": training["steps"] == steps_of(training["epochs"], n, batch_size=training["batch_size"]),
        "accuracy": accuracy == metrics.get("accuracy"),
        "provenance.accuracy": artifact["provenance"]["accuracy"] == source,
    }
    problems = {path: "contradicts the rest of the artifact" for path, holds in follows.items() if not holds}
    if problems:
        raise InvalidInput("the artifact contradicts itself", violations=problems)


def _check_epsilon(artifact: Mapping[str, Any]) -> None:
    """ε is recomputed from what it follows from: an artifact that understates it is refused."""
    dp, training = artifact["dp"], artifact["training"]
    costs = math.inf
    if dp["enabled"]:
        event = DpSgdSteps(
            sampling_rate=float(training["sampling_rate"]),
            noise_multiplier=float(dp["noise_multiplier"]),
            steps=int(training["steps"]),
        )
        costs = epsilon([event], delta=float(dp["delta"]))
    for path, claimed in (("epsilon", float(artifact["epsilon"])), ("dp.epsilon", float(dp["epsilon"]))):
        if costs > claimed * (1.0 + _EPSILON_SLACK):
            raise InvalidInput(f"{path} is {claimed:.6g}, but the settings cost {costs:.6g}")


def _said(artifact: Mapping[str, Any]) -> list[Any]:
    """The statements of what may not be an artifact at all."""
    privacy = artifact.get("privacy")
    found = privacy.get("statements") if isinstance(privacy, dict) else None
    return found if isinstance(found, list) else []


def _check_signature(
    artifact: Mapping[str, Any], signature: Mapping[str, str], verify_key: bytes | None, *, allow_unsigned: bool
) -> None:
    if not signature:
        if verify_key is not None or not allow_unsigned:
            raise SignatureError("the artifact is not signed: nothing shows that it was not made up or edited")
        return
    own = bytes.fromhex(signature["verify_key"])
    if verify_key not in (None, own):
        raise SignatureError(f"the artifact is signed with another key, {own.hex()}")
    statement = {"hash": artifact["hash"], "job_id": artifact["job_id"]}
    body = canonical_bytes({**statement, "kind": SIGNATURE_KIND})
    signed = Signed(body, signature["signer"], bytes.fromhex(signature["signature"]))
    open_signed(signed, SIGNATURE_KIND, verify_key=own)
