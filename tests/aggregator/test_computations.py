"""Evaluations and exports: who gets them, what comes of them, and what their manifests prove."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.aggregator import computations
from src.aggregator.artifact import MANIFEST_FILE, MODEL_FILE, UNKNOWN_PRIVACY, write_artifact
from src.aggregator.computations import Computations, Workers
from src.aggregator.federation import Federation
from src.aggregator.pipeline import StoredModel
from src.aggregator.planning import Model, plan_round
from src.aggregator.round_row import RoundRow, RoundState
from src.aggregator.work import HANDLERS
from src.config import AggregatorConfig
from src.errors import (
    DeadlineError,
    InvalidInput,
    NotFoundError,
    PolicyError,
    SignatureError,
    SottoError,
    StateError,
    StorageError,
    WorkerError,
)
from src.jobs.artifact import verify_manifest
from src.jobs.computations import EvaluationSpec, ExportSpec
from src.jobs.executors.pool import WorkerPool
from src.jobs.executors.units import WorkContext, decode_reply, encode_unit, execute
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import JobSpec
from src.jobs.states import JobRow, JobState, utc
from src.jobs.wire import ASSUMPTIONS, FIGURES
from src.learning.flatten import from_safetensors, model_to_tensors, to_safetensors
from src.learning.tasks.randhie import RandHieTask
from src.protocol.plan import PLAN_KIND, TRANSCRIPT_KIND, signed_digest
from src.protocol.signing import SigningKey
from src.storage.blobs import Blobs

pytestmark = pytest.mark.parametrize("federation", ["threshold"], indirect=True)

NOW = 1.8e9
OWNER = "scientist/ann"
ROWS = {"parties": 3, "seed": 0, "holdout": 0.2}
TRAINING = FederatedTrainingSpec(task="randhie", rounds=1, spare_rounds=0)
PRIVACY = (*FIGURES, *ASSUMPTIONS)


def accepts(pool: WorkerPool) -> Workers:
    """The real pool is one (the type checker says so)."""
    return pool


@dataclass
class Inline:
    """Units as a worker runs them, JSON in and JSON out, in this process."""

    context: WorkContext
    asked: list[tuple[str, float | None, bool]] = field(default_factory=list)

    async def run(
        self, name: str, params: Mapping[str, Any], *, timeout_s: float | None = None, urgent: bool = False
    ) -> dict[str, Any]:
        self.asked.append((name, timeout_s, urgent))
        return decode_reply(execute(encode_unit(name, params, version=1), HANDLERS, self.context))


@dataclass
class Place:
    """An aggregator with a finished training."""

    federation: Federation
    blobs: Blobs
    pool: Inline
    computations: Computations
    model: bytes
    source: JobRow

    def check(self, spec: JobSpec, **changes: Any) -> None:
        self.computations.check(spec, replace(self.source, **changes), owner=OWNER)

    def run(self, spec: JobSpec, source: JobRow | None = None, **changes: Any) -> dict[str, Any]:
        job = replace(make_row("c1", spec), **changes)
        return asyncio.run(self.computations.run(job, source or self.source, now=NOW))

    def fetched(self, result: dict[str, Any], folder: Path) -> dict[str, Any]:
        """What `SottoClient.fetch_artifact` has verified: the manifest's statement, the files beside it."""
        for file in result["files"]:
            (folder / file["name"]).write_bytes(self.blobs.read(file["sha256"]))
            assert file["bytes"] == (folder / file["name"]).stat().st_size
        files = {file["name"]: folder / file["name"] for file in result["files"]}
        return verify_manifest(folder / MANIFEST_FILE, self.federation.roster, files=files, job_id="c1")

    def manifest(self, job: JobRow) -> dict[str, Any]:
        (sha256,) = [file["sha256"] for file in (job.result or {})["files"] if file["name"] == MANIFEST_FILE]
        return {"sha256": sha256, **json.loads(self.blobs.read(sha256))["readable"]}


def make_row(job_id: str, spec: JobSpec) -> JobRow:
    return JobRow(
        job_id=job_id,
        request_id=job_id,
        owner=OWNER,
        display_name=f"job {job_id}",
        kind=spec.kind,
        spec=spec.to_json(),
        spec_digest=spec.digest,
        state=JobState.RUNNING,
        created_at=utc(NOW - 10),
    )


@pytest.fixture(scope="module")
def trained() -> bytes:
    return to_safetensors(model_to_tensors(RandHieTask().build_model(3)))


@pytest.fixture
def place(federation: Federation, trained: bytes, tmp_path: Path) -> Place:
    blobs = Blobs(tmp_path / "blobs")
    model = blobs.write(trained)
    plan = plan_round(
        TRAINING,
        job_id="t1",
        number=1,
        model=Model(model.sha256, model.size, 177),
        roster=federation.roster,
        scheme=federation.scheme("paillier", allow_plaintext=False),
    )
    signed = federation.sign(PLAN_KIND, plan.to_statement())
    row = RoundRow(
        job_id="t1",
        number=1,
        state=RoundState.RELEASED,
        plan=signed.to_json(),
        plan_digest=signed_digest(signed, PLAN_KIND),
        model_sha256=model.sha256,
        cohort=plan.cohort,
        quorum=plan.quorum,
        holders=(),
        threshold=0,
        noise_needed=True,
        started_at=0.0,
        timeout_s=1.0,
        contributors=("a", "aggregator", "b", "c"),
        result={
            "model_sha256": model.sha256,
            "model_bytes": model.size,
            "metrics": {"auc": 0.75},
            "epsilon_party": 3.5,
            "epsilon_party_against_aggregator": "inf",
            "transcript": federation.sign(TRANSCRIPT_KIND, {"round": 1}).to_json(),
        },
    )
    source = make_row("t1", TRAINING)
    result = write_artifact(
        source,
        TRAINING,
        [row],
        model=StoredModel(model.sha256, model.size),
        federation=federation,
        blobs=blobs,
        ledger_head="f" * 64,
        created_at=utc(NOW - 99),
    )
    source = replace(source, state=JobState.SUCCEEDED, result=result)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    pool = Inline(WorkContext(blobs, workspace))
    config = AggregatorConfig.model_construct(evaluation={"randhie": ROWS})
    return Place(federation, blobs, pool, Computations(pool, config, federation, blobs), trained, source)


# ------------------------------------------------------------------------------------------------ before it is accepted

EXPORT = ExportSpec(job_id="t1")
EVALUATION = EvaluationSpec(job_id="t1")
SOURCES: dict[str, tuple[dict[str, Any], type[SottoError], str]] = {
    "another's": ({"owner": "scientist/bob"}, NotFoundError, "no job 't1'"),
    "an export": ({"kind": "export"}, InvalidInput, "job_id"),
    "pending": ({"state": JobState.PENDING}, StateError, "PENDING"),
    "running": ({"state": JobState.RUNNING}, StateError, "RUNNING"),
    "failed": ({"state": JobState.FAILED}, StateError, "FAILED"),
    "cancelled": ({"state": JobState.CANCELLED}, StateError, "CANCELLED"),
    "deleted": ({"deleted_at": utc(NOW)}, StateError, "deleted"),
    "another one": ({"job_id": "t2"}, NotFoundError, "no job 't1'"),
}


@pytest.mark.parametrize("spec", [EXPORT, EVALUATION], ids=["export", "evaluation"])
@pytest.mark.parametrize("case", SOURCES)
def test_only_the_owners_finished_training_is_computed_on(place: Place, spec: JobSpec, case: str) -> None:
    changes, error, words = SOURCES[case]
    place.check(spec)
    with pytest.raises(error) as caught:
        place.check(spec, **changes)
    assert words in str(getattr(caught.value, "violations", "") or caught.value)
    with pytest.raises(error):  # and the same when it runs: things may have changed since
        place.run(spec, replace(place.source, **changes))
    with pytest.raises(NotFoundError):
        place.computations.check(spec, None, owner=OWNER)
    assert place.pool.asked == []


def test_an_evaluation_needs_a_registered_task_with_public_rows(place: Place) -> None:
    with pytest.raises(InvalidInput) as caught:
        place.check(EvaluationSpec(job_id="t1", task="other"))
    assert list(caught.value.violations) == ["evaluation.task"]
    bare = Computations(place.pool, AggregatorConfig.model_construct(evaluation={}), place.federation, place.blobs)
    with pytest.raises(PolicyError, match="no public rows for task 'randhie'"):
        bare.check(EVALUATION, place.source, owner=OWNER)
    bare.check(EXPORT, place.source, owner=OWNER)


def test_without_torch_nothing_is_evaluated_and_everything_exported(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computations, "why_not_evaluated", lambda: "evaluating a model needs the extra `party`")
    with pytest.raises(PolicyError, match="evaluates nothing: evaluating a model needs the extra `party`"):
        place.check(EVALUATION)
    place.check(EXPORT)


def test_bytes_that_are_no_model_are_refused_before_a_job_is_accepted(place: Place) -> None:
    sha256 = place.blobs.write(b"weights").sha256
    with pytest.raises(InvalidInput) as caught:
        place.computations.check(EvaluationSpec(model_sha256=sha256, task="randhie"), None, owner=OWNER)
    assert list(caught.value.violations) == ["evaluation.model"]


def test_a_training_is_no_computation(place: Place) -> None:
    with pytest.raises(InvalidInput, match="federated_training is no computation"):
        place.computations.check(TRAINING, None, owner=OWNER)


def test_what_a_submission_waits_for_takes_milliseconds_and_no_worker(place: Place) -> None:
    sha256 = place.blobs.write(to_safetensors({"a": np.zeros(750_000, np.float32)})).sha256
    spec = EvaluationSpec(model_sha256=sha256, task="randhie")
    took = []
    for _ in range(5):
        start = time.process_time()
        place.computations.check(spec, None, owner=OWNER)
        took.append(time.process_time() - start)  # so that a busy machine does not matter
    assert min(took) < 0.05  # 3 MiB: 6 ms
    assert place.pool.asked == []


# --------------------------------------------------------------------------------------------------------------- export


def test_an_export_is_the_same_model_with_all_that_was_guaranteed_for_it(place: Place, tmp_path: Path) -> None:
    result = place.run(EXPORT)
    statement = place.fetched(result, tmp_path)
    with np.load(tmp_path / "model.npz", allow_pickle=False) as archive:
        found = dict(archive)
    expected = from_safetensors(place.model)
    assert {name: a.tobytes() for name, a in found.items()} == {name: a.tobytes() for name, a in expected.items()}
    source = place.manifest(place.source)
    kept = set(source) - {"sha256", "job_id", "display_name", "created_at", "spec_digest", "model"}
    assert {name: statement[name] for name in kept} == {name: source[name] for name in kept}
    assert {"privacy", "encryption", "rounds", "ledger_head", "statements", "evaluation", "task"} <= kept
    assert statement["exported_from"] == {
        "job_id": "t1",
        "spec_digest": TRAINING.digest,
        "created_at": source["created_at"],
        "model_sha256": source["model"]["sha256"],
        "manifest_sha256": source["sha256"],
        "format": "npz",
    }
    assert (statement["job_id"], statement["spec_digest"]) == ("c1", EXPORT.digest)
    assert (statement["created_at"], statement["display_name"]) == (utc(NOW), "job c1")


@pytest.mark.parametrize("spec", [EXPORT, EVALUATION], ids=["export", "evaluation"])
def test_the_figures_of_privacy_are_the_trainings(place: Place, spec: JobSpec) -> None:
    known = place.source.result or {}
    result = place.run(spec)
    assert {name: result[name] for name in PRIVACY} == {name: known[name] for name in PRIVACY}
    assert result["epsilon_party_against_aggregator"] == "inf"


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_proves_what_a_trainings_model_does_on_public_rows(place: Place, tmp_path: Path) -> None:
    result = place.run(EVALUATION)
    statement = place.fetched(result, tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == place.model
    source = place.manifest(place.source)
    assert statement["evaluation"] == {name: repr(value) for name, value in result["metrics"].items()}
    assert set(result["metrics"]) == {"accuracy", "auc", "n"}
    assert statement["evaluated"] == {"job_id": "t1", "manifest_sha256": source["sha256"]}
    assert (statement["model"], statement["privacy"]) == (source["model"], source["privacy"])
    assert statement["task"] == "randhie"
    assert "public rows" in statement["data"]
    assert set(source["statements"]) < set(statement["statements"])
    assert not {"rounds", "encryption", "ledger_head"} & set(statement)


def test_a_metric_that_is_no_finite_number_is_named_in_the_statement_and_in_the_result(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandHieTask, "metrics", lambda *_: {"auc": 0.5, "deviance": math.inf}, raising=False)
    result = place.run(EVALUATION)
    why = "not finite, and left out: deviance"
    assert (result["metrics"].keys(), result["not_evaluated"]) == ({"auc", "n"}, why)
    statement = place.fetched(result, tmp_path)
    assert statement["evaluation"]["auc"] == "0.5"
    assert f"not all metrics are given: {why}" in statement["statements"]


def test_an_export_says_of_its_model_what_its_training_said(place: Place) -> None:
    said = {"metrics": {"auc": 0.5}, "not_evaluated": "not finite, and left out: deviance"}
    source = replace(place.source, result={**(place.source.result or {}), **said})
    result = place.run(EXPORT, source)
    assert {name: result[name] for name in said} == said


def test_of_a_model_that_came_with_the_job_no_privacy_is_claimed(place: Place, tmp_path: Path) -> None:
    sha256 = place.blobs.write(place.model).sha256
    result = place.run(EvaluationSpec(model_sha256=sha256, task="randhie"))
    statement = place.fetched(result, tmp_path)
    assert [result[name] for name in PRIVACY] == [None] * len(PRIVACY)
    assert statement["privacy"] == UNKNOWN_PRIVACY
    assert statement["evaluated"] == {"job_id": "", "manifest_sha256": ""}
    assert any("nothing is known of how this model was made" in line for line in statement["statements"])
    assert result["metrics"] == place.run(EVALUATION)["metrics"]


def test_a_trainings_own_options_count_for_its_own_task_where_the_aggregator_leaves_them_open(place: Place) -> None:
    """Public rows are chosen by the operator: whatever else a job sets, a path say, is refused before anything runs."""

    def n(**options: Any) -> float:
        spec = FederatedTrainingSpec(task="randhie", task_options=options)
        return float(place.run(EVALUATION, replace(place.source, spec=spec.to_json()))["metrics"]["n"])

    def configured(**options: Any) -> None:
        config = AggregatorConfig.model_construct(evaluation={"randhie": options})
        place.computations = Computations(place.pool, config, place.federation, place.blobs)

    configured(holdout=0.2, seed=None)
    assert n() == n(holdout=0.2) == n(seed=0)
    for options in ({"holdout": 0.5}, {"parties": 3}, {"path": "/etc/passwd"}, {"holdout": None}):
        with pytest.raises(
            PolicyError, match=r"has not left open: .* \(evaluation\.randhie: null leaves one to the job"
        ):
            n(**options)
        with pytest.raises(PolicyError, match="has not left open"):
            place.computations.check(EVALUATION, _of(place.source, options), owner=place.source.owner)
    configured(holdout=None)
    assert n(holdout=0.2) < n(holdout=0.5)


def _of(source: JobRow, options: dict[str, Any]) -> JobRow:
    return replace(source, spec=FederatedTrainingSpec(task="randhie", task_options=options).to_json())


def test_a_model_of_another_shape_fails_the_job_for_good(place: Place) -> None:
    sha256 = place.blobs.write(to_safetensors({"a": np.zeros(177, np.float32)})).sha256
    with pytest.raises(InvalidInput, match="not this model's"):
        place.run(EvaluationSpec(model_sha256=sha256, task="randhie"))


def test_a_task_without_public_rows_fails_the_job_for_good(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(RandHieTask, "load_holdout")
    with pytest.raises(PolicyError, match="nothing to say"):
        place.run(EVALUATION)


# ------------------------------------------------------------------------------------------- crashes, deadlines, damage


@pytest.mark.parametrize("spec", [EXPORT, EVALUATION], ids=["export", "evaluation"])
def test_a_second_run_gives_the_same_result_and_leaves_nothing_more_behind(place: Place, spec: JobSpec) -> None:
    first = place.run(spec)
    stored = {path for path in place.blobs.root.rglob("*") if path.is_file()}
    assert place.run(spec) == first
    assert {path for path in place.blobs.root.rglob("*") if path.is_file()} == stored
    kept = {file["sha256"] for row in (first, place.source.result or {}) for file in row["files"]}
    assert {path.name for path in stored} == kept


@pytest.mark.parametrize(("spec", "unit"), [(EXPORT, "export_model"), (EVALUATION, "evaluate_model")])
def test_one_urgent_unit_gets_the_time_that_the_deadline_leaves(place: Place, spec: JobSpec, unit: str) -> None:
    place.run(spec)
    place.run(spec, deadline_at=utc(NOW + 90))
    assert place.pool.asked == [(unit, None, True), (unit, pytest.approx(90), True)]
    with pytest.raises(DeadlineError):
        place.run(spec, deadline_at=utc(NOW - 1))
    assert len(place.pool.asked) == 2


def test_a_worker_that_dies_writes_no_artifact(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(*_: Any, **__: Any) -> dict[str, Any]:
        raise WorkerError("a worker died")

    before = {path for path in place.blobs.root.rglob("*") if path.is_file()}
    monkeypatch.setattr(place.pool, "run", die)
    with pytest.raises(WorkerError):
        place.run(EXPORT)
    assert {path for path in place.blobs.root.rglob("*") if path.is_file()} == before


def forged(place: Place, change: Callable[[dict[str, Any]], None]) -> JobRow:
    """The training with another manifest, as somebody with the database and the blobs, and no key, could write it."""
    content = json.loads(place.blobs.read(place.manifest(place.source)["sha256"]))
    change(content)
    blob = place.blobs.write(json.dumps(content).encode())
    result = json.loads(json.dumps(place.source.result))
    result["files"][1] = {"name": MANIFEST_FILE, "bytes": blob.size, "sha256": blob.sha256}
    return replace(place.source, result=result)


def test_claims_that_this_aggregator_never_signed_are_not_signed_again(place: Place) -> None:
    def lie(content: dict[str, Any]) -> None:
        content["manifest"]["statement"] = content["manifest"]["statement"].replace('"task":"randhie"', '"task":"x"')

    def another_key(content: dict[str, Any]) -> None:
        statement = {**content["readable"], "owner": "me"}
        content["manifest"] = (
            SigningKey.from_bytes(bytes(32)).sign("manifest", statement, signer="aggregator").to_json()
        )

    for change in (lie, another_key):
        with pytest.raises(SignatureError):
            place.run(EXPORT, forged(place, change))


def test_a_manifest_of_another_job_or_another_model_vouches_for_nothing(place: Place) -> None:
    other = replace(place.source, job_id="t2")
    with pytest.raises(StorageError, match="not about its model"):
        place.run(ExportSpec(job_id="t2"), other)
    blob = place.blobs.write(to_safetensors({"a": np.zeros(1, np.float32)}))
    result = json.loads(json.dumps(place.source.result))
    result["files"][0] = {"name": MODEL_FILE, "bytes": blob.size, "sha256": blob.sha256}
    with pytest.raises(StorageError, match="not about its model"):
        place.run(EXPORT, replace(place.source, result=result))


def test_a_damaged_model_is_not_exported(place: Place) -> None:
    path = place.blobs.path((place.source.result or {})["files"][0]["sha256"])
    path.chmod(0o600)
    path.write_bytes(place.model[:-1] + b"?")
    with pytest.raises(StorageError, match="damaged"):
        place.run(EXPORT)
