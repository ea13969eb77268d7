"""The manifest: valid, signed, and honest about what does not hold with the settings at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from src.aggregator.artifact import (
    MANIFEST_FILE,
    MODEL_FILE,
    SCHEMA,
    UNKNOWN_PRIVACY,
    released_model,
    statements,
    write_artifact,
)
from src.aggregator.federation import Federation
from src.aggregator.pipeline import StoredModel
from src.aggregator.planning import Model, plan_round
from src.aggregator.round_row import RoundRow, RoundState
from src.communication.generated import jobs_pb2
from src.errors import SignatureError
from src.jobs.artifact import verify_manifest
from src.jobs.orders import order_of
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import spec_into_proto
from src.jobs.states import JobRow
from src.protocol.order import sign_order
from src.protocol.plan import MANIFEST_KIND, PLAN_KIND, TRANSCRIPT_KIND, RoundPlan, signed_digest
from src.protocol.roster import Scientist
from src.protocol.signing import Signed, SigningKey, open_signed
from src.storage.blobs import Blobs

MODEL = b"a model"
MakeManifest = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


def make_spec(**fields: Any) -> FederatedTrainingSpec:
    return FederatedTrainingSpec.from_json({"task": "randhie", "rounds": 2, "spare_rounds": 1, **fields})


def make_plan(federation: Federation, spec: FederatedTrainingSpec, number: int = 1) -> RoundPlan:
    scheme = federation.scheme(spec.encryption.scheme, allow_plaintext=True)
    model = Model("a" * 64, 4000, 97)
    return plan_round(
        spec,
        job_id="job",
        number=number,
        model=model,
        roster=federation.roster,
        scheme=scheme,
        declared_rows={"a": 5000, "b": 5400, "c": 6000},
    )


def ended_round(
    federation: Federation, spec: FederatedTrainingSpec, number: int, *, result: dict[str, Any] | None
) -> RoundRow:
    """A round that was released with this result, or failed without one."""
    signed = federation.sign(PLAN_KIND, make_plan(federation, spec, number).to_statement())
    transcript = federation.sign(TRANSCRIPT_KIND, {"round": number}).to_json()
    return RoundRow(
        job_id="job",
        number=number,
        state=RoundState.RELEASED if result else RoundState.FAILED,
        plan=signed.to_json(),
        plan_digest=signed_digest(signed, PLAN_KIND),
        model_sha256="a" * 64,
        cohort=("a", "b", "c"),
        quorum=3,
        holders=(),
        threshold=0,
        noise_needed=True,
        started_at=0.0,
        timeout_s=1.0,
        contributors=("a", "aggregator", "b", "c") if result else (),
        result={**result, "transcript": transcript} if result else None,
    )


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.fixture
def manifest(federation: Federation, blobs: Blobs) -> MakeManifest:
    """manifest(spec, …): (the job's result, the signed statement) after a failed and two released rounds."""

    def make(
        spec: FederatedTrainingSpec,
        *,
        metrics: dict[str, float] | None = None,
        epsilon_party: float | str = 3.5,
        order: Signed | None = None,
        whole: StoredModel | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        model = blobs.write(MODEL)
        result = {
            "model_sha256": model.sha256,
            "model_bytes": model.size,
            "metrics": metrics or {},
            "epsilon_party": epsilon_party,
            "epsilon_party_against_aggregator": "inf",
        }
        ends = (result, None, result)
        history = [ended_round(federation, spec, number, result=end) for number, end in enumerate(ends, start=1)]
        job = JobRow(
            job_id="job",
            request_id="r",
            owner="scientist/s",
            display_name="a job",
            kind="federated_training",
            spec=spec.to_json(),
            spec_digest=spec.digest,
            created_at="2026-01-01T00:00:00.000000Z",
            signed_order=order.to_text() if order else "",
        )
        found = write_artifact(
            job,
            spec,
            history,
            model=whole or released_model(history)[1],
            federation=federation,
            blobs=blobs,
            ledger_head="f" * 64,
            created_at="2026-01-01T01:00:00.000000Z",
        )
        content = json.loads(blobs.read(found["files"][1]["sha256"]))
        key = federation.roster.aggregator_verify_key
        statement = open_signed(Signed.from_json(content["manifest"]), MANIFEST_KIND, verify_key=key)
        assert content["readable"] == statement
        return found, statement

    return make


def test_a_manifest_follows_its_schema_and_is_signed(manifest: MakeManifest, federation: Federation) -> None:
    result, statement = manifest(make_spec(), metrics={"auc": 0.75})
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(statement)
    assert [file["name"] for file in result["files"]] == [MODEL_FILE, MANIFEST_FILE]
    assert statement["evaluation"] == {"auc": "0.75"}
    assert [entry["state"] for entry in statement["rounds"]] == ["RELEASED", "FAILED", "RELEASED"]
    assert ["transcript" in entry for entry in statement["rounds"]] == [True, False, True]
    assert statement["encryption"]["key_id"] == federation.keyring.key_id
    assert statement["encryption"]["modulus_bits"] == 512
    assert statement["ledger_head"] == "f" * 64


def test_what_a_scientist_downloads_verifies_and_nothing_else_does(
    manifest: MakeManifest, federation: Federation, blobs: Blobs, tmp_path: Path
) -> None:
    result, statement = manifest(make_spec())
    path = tmp_path / MANIFEST_FILE
    content = blobs.read(result["files"][1]["sha256"])
    path.write_bytes(content)
    (tmp_path / MODEL_FILE).write_bytes(MODEL)
    assert verify_manifest(path, federation.roster, job_id="job") == statement
    for count in (1, -1):  # in the signed half alone, and in the readable one too
        path.write_bytes(content.replace(b"a job", b"A job", count))
        with pytest.raises(SignatureError):
            verify_manifest(path, federation.roster)


def order_of_s(spec: FederatedTrainingSpec, key: SigningKey, **changes: Any) -> Signed:
    """What scientist s signs for a job."""
    job = jobs_pb2.Job()
    spec_into_proto(job, spec)
    order = order_of(job, federation="demo", scientist="s", request_id="r", expires_at="2026-02-01T00:00:00Z")
    return sign_order(replace(order, **changes), key)


def test_a_manifest_says_who_signed_for_the_job_or_that_nobody_did(
    manifest: MakeManifest, federation: Federation, blobs: Blobs, tmp_path: Path
) -> None:
    """With the order itself, which whoever has the roster verifies: another's, or one for another job, is found."""
    key, path = SigningKey.generate(), tmp_path / MANIFEST_FILE
    named = (Scientist("s", key.verify_key), Scientist("t", key.verify_key))
    roster = replace(federation.roster, scientists=named)
    (tmp_path / MODEL_FILE).write_bytes(MODEL)

    def verified(order: Signed | None) -> Any:
        result, _ = manifest(make_spec(), order=order)
        path.write_bytes(blobs.read(result["files"][1]["sha256"]))
        return verify_manifest(path, roster)["order"]

    assert verified(None) == "nobody signed"
    signed = order_of_s(make_spec(), key)
    assert verified(signed) == signed.to_json()
    wrong = {
        "stranger": replace(signed, signer="nobody"),
        "does not verify": order_of_s(make_spec(), SigningKey.generate()),
        "an order of t, and is of scientist/s's": order_of_s(make_spec(), key, scientist="t"),
        "an order of s for another job": order_of_s(make_spec(seed=8), key),
    }
    for said, order in wrong.items():
        with pytest.raises(SignatureError, match=said):
            verified(order)


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_a_manifest_without_a_field_or_with_one_more_is_not_valid(manifest: MakeManifest) -> None:
    _, statement = manifest(make_spec())
    validator = Draft202012Validator(SCHEMA)
    assert {*SCHEMA["required"], *SCHEMA["else"]["required"]} == set(statement)
    wrong = [{name: value for name, value in statement.items() if name != field} for field in statement]
    wrong += [{**statement, "surplus": 1}, {**statement, "version": 2}, {**statement, "privacy": UNKNOWN_PRIVACY}]
    wrong += [{**statement, "evaluated": {"job_id": "", "manifest_sha256": ""}}]  # an evaluation has no rounds
    for part in ("model", "privacy", "encryption"):
        wrong.append({**statement, part: {**statement[part], "surplus": "1"}})
        wrong += [
            {**statement, part: {k: v for k, v in statement[part].items() if k != key}} for key in statement[part]
        ]
    for each in wrong:
        with pytest.raises(ValidationError):
            validator.validate(each)


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_every_round_that_was_charged_counts_failed_ones_too(manifest: MakeManifest) -> None:
    result, statement = manifest(make_spec(local_training={"epsilon": 2.0}))
    assert 1.9 < result["epsilon_example"] <= 2.0  # two rounds and one spare were priced, and all three were charged
    assert float(statement["privacy"]["example"]["epsilon"]) == result["epsilon_example"]


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_without_public_rows_it_says_not_evaluated(manifest: MakeManifest) -> None:
    assert manifest(make_spec())[1]["evaluation"] == "not evaluated"


@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_both_guarantees_name_unit_relation_and_against_whom(manifest: MakeManifest) -> None:
    privacy = manifest(make_spec(), epsilon_party="inf")[1]["privacy"]
    assert privacy["example"]["unit"] == "one row of one party's data"
    assert privacy["party"]["unit"] == "one party's whole update"
    assert privacy["example"]["neighbouring"] != privacy["party"]["neighbouring"]
    assert (privacy["party"]["epsilon"], privacy["party"]["epsilon_against_aggregator"]) == ("inf", "inf")
    assert privacy["party"]["noise_by"] == "both"


# --------------------------------------------------------------------------------------- what does not hold is said

ALWAYS = {"a party's clipping is not enforced", "DP-SGD's noise is floating-point"}
HIDDEN = "no update and no sum could be opened by fewer than 2 key shares; the aggregator holds none"
HOLDS_KEY = "the aggregator holds the key: updates are protected in transit and at rest, not from it"
PLAINTEXT = "INSECURE: updates travelled unencrypted"
SMALL = "INSECURE: a modulus of 512 bits is breakable"
SHORT = "a modulus of 2048 bits stands for 112-bit security; 3072 bits for 128"
EXACT_SUM = "the aggregator can know the exact sum"
FEW = "no meaningful party-level guarantee"

CASES: dict[str, tuple[dict[str, Any], int, float | str, set[str]]] = {
    "the defaults": ({}, 3072, 3.5, {HIDDEN}),
    "custody aggregator": ({"custody": "aggregator"}, 3072, 3.5, {HOLDS_KEY}),
    "no encryption": ({"scheme": "plaintext"}, 3072, 3.5, {PLAINTEXT}),
    "no encryption, custody aggregator": ({"scheme": "plaintext", "custody": "aggregator"}, 3072, 3.5, {PLAINTEXT}),
    "a small modulus": ({}, 512, 3.5, {HIDDEN, SMALL}),
    "2048 bits": ({}, 2048, 3.5, {HIDDEN, SHORT}),
    "noise by the aggregator": ({"noise_by": "aggregator"}, 3072, 3.5, {HIDDEN, EXACT_SUM}),
    "noise by the parties": ({"noise_by": "parties"}, 3072, 3.5, {HIDDEN}),
    "a large party-level epsilon": ({}, 3072, 20.5, {HIDDEN, FEW}),
    "an infinite one": ({}, 3072, "inf", {HIDDEN, FEW}),
    "one at the border": ({}, 3072, 20.0, {HIDDEN}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("federation", ["threshold"], indirect=True)
def test_the_manifest_says_what_holds_and_what_does_not(federation: Federation, case: str) -> None:
    changes, modulus_bits, epsilon_party, expected = CASES[case]
    plan = make_plan(federation, make_spec())
    noise = replace(plan.noise, noise_by=changes.get("noise_by", "both"))
    plan = replace(plan, **{name: value for name, value in changes.items() if name != "noise_by"}, noise=noise)
    lines = statements(plan, modulus_bits, {"epsilon_party": epsilon_party})
    assert len(lines) == len(expected | ALWAYS)
    for words in expected | ALWAYS:
        assert any(words in line for line in lines), words


@pytest.mark.parametrize("noise_by", ["both", "parties", "aggregator"])
def test_under_fedsgd_every_figure_says_whom_it_holds_against_and_what_it_rests_on(
    manifest: MakeManifest, noise_by: str
) -> None:
    spec = make_spec(
        strategy="fedsgd",
        trusted_aggregator=noise_by == "aggregator",
        local_training={"epsilon": 2.0},
        party_privacy={"noise_by": noise_by},
    )
    found, statement = manifest(spec, epsilon_party=3000.0)
    row, party = statement["privacy"]["example"], statement["privacy"]["party"]
    assert statement["strategy"] == "fedsgd"
    assert 1.9 < float(row["epsilon"]) == found["epsilon_example"] <= 2.0  # three rounds, as many as were priced
    assert row["steps"] == 3
    release, alone = float(row["epsilon_release"]), float(row["epsilon_if_all_others_collude"])
    lines = " ".join(statement["statements"])
    if noise_by == "aggregator":
        assert (release, alone) == (float(row["epsilon"]), math.inf)
        assert row["noise_by"] == "the aggregator, as a trusted server"
        assert "trusted with the exact sums" in row["against"]
        assert "TRUSTED SERVER" in lines
    else:
        assert release <= float(row["epsilon"]) < alone < math.inf
        assert (release < float(row["epsilon"])) is (noise_by == "both")
        assert "share" in row["assumption"]
        assert "TRUSTED SERVER" not in lines
    assert float(party["noise_multiplier"]) < 0.1
    assert float(party["clipping_norm"]) > 100  # a whole batch of gradients
    assert "under fedsgd, whose noise hides rows" in lines
    assert "no low bits to attack" in lines


def test_a_manifest_of_fedavg_says_what_is_left_if_all_others_collude(manifest: MakeManifest) -> None:
    """Of a row everything: a party adds that noise itself. Of the party one share of the noise."""
    found, statement = manifest(make_spec(party_privacy={"noise_multiplier": 3.0}))
    assert "strategy" not in statement
    row, party = statement["privacy"]["example"], statement["privacy"]["party"]
    assert row["epsilon_if_all_others_collude"] == row["epsilon"]
    assert row["assumption"].startswith("nothing of the others")
    assert "epsilon_release" not in row
    assert float(party["epsilon"]) < float(party["epsilon_if_all_others_collude"]) < math.inf
    assert "share" in party["assumption"]
    assert "the aggregator added its noise" in party["assumption"]
    assert "share" in party["assumption_against_aggregator"]
    assert "the aggregator added its noise" not in party["assumption_against_aggregator"]
    assert party["against"] == "whoever sees the release"
    for name in ("assumption", "assumption_against_aggregator", "delta"):
        assert str(found[f"party_{name}"]) == party[name]
    assert found["epsilon_party_if_all_others_collude"] == party["epsilon_if_all_others_collude"]


def test_a_manifest_tells_what_was_trained_of_a_model_from_the_whole(manifest: MakeManifest) -> None:
    whole = StoredModel("ab" * 32, 999, "cd" * 32)
    result, statement = manifest(make_spec(), whole=whole)
    assert result["files"][0] == {"name": "model.safetensors", "bytes": 999, "sha256": "ab" * 32}
    trained = statement["model"].pop("trained_sha256")
    assert statement["model"] == {
        "file": "model.safetensors",
        "bytes": 999,
        "sha256": "ab" * 32,
        "not_trained_sha256": "cd" * 32,
    }
    assert trained == manifest(make_spec())[1]["model"]["sha256"]  # as the transcripts of rounds name it


def test_a_manifest_says_where_the_file_is_not_the_whole_model(manifest: MakeManifest) -> None:
    plain = manifest(make_spec())[1]
    trained = StoredModel(plain["model"]["sha256"], plain["model"]["bytes"], without="the task is not installed")
    statement = manifest(make_spec(), whole=trained)[1]
    assert statement["model"] == plain["model"]
    assert statement["statements"][-1].endswith("build_model(seed): the task is not installed")
