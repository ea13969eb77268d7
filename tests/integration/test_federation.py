"""A whole federation: an aggregator, three parties and a scientist, processes of their own, mutual TLS on loopback."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.client import Evaluation, Export, Job, JobEvent, result_of, verify_manifest
from src.communication.generated import jobs_pb2
from src.encryption.packing import pack
from src.encryption.scheme import Layout, LayoutRequest, SystemEntropy
from src.errors import BudgetError, ConflictError, TooFewSharesError
from src.jobs.spec import LocalTraining
from src.learning.flatten import from_safetensors
from src.privacy.accounting import epsilon
from src.privacy.ledger import Entry
from src.protocol.batches import expected_header
from src.protocol.canonical import parse_canonical
from src.protocol.keyring import Keyring, load_share
from src.protocol.merkle import batch_root
from src.protocol.plan import PLAN_KIND, TRANSCRIPT_KIND, RoundPlan, signed_digest
from src.protocol.roster import AGGREGATOR, load_roster
from src.protocol.signing import Signed, open_signed
from src.storage.blobs import Blobs

ROUNDS, TARGET_EPSILON = 3, 3.0
PARTIES = ("a", "b", "c")


@dataclass(frozen=True)
class First:
    """The federation's first job, with everything that it left, read before another one ran."""

    job: Job
    events: list[JobEvent]
    rows: list[Any]
    manifest: dict[str, Any]
    ledgers: dict[str, list[Entry]]


@pytest.fixture(scope="session")
def first(federation: Any, tmp_path_factory: pytest.TempPathFactory) -> First:
    federation.start(*PARTIES)
    job_id = federation.submit(rounds=ROUNDS, epsilon=TARGET_EPSILON)
    events = list(federation.client.watch(job_id))
    job = federation.succeed(job_id)
    files = federation.client.fetch_artifact(job_id, tmp_path_factory.mktemp("artifact"))  # verifies with its roster
    _, roster = load_roster(federation.kits / "scientist" / "roster.json")
    return First(
        job=job,
        events=events,
        rows=federation.rounds(job_id),
        manifest=verify_manifest(files["manifest.json"], roster, job_id=job_id),
        ledgers={name: federation.ledger(name) for name in (AGGREGATOR, *PARTIES)},
    )


@pytest.fixture
def running(federation: Any, first: First) -> Any:
    """The federation with all parties, warm from its first job."""
    federation.start(*PARTIES)
    return federation


# --- what a job leaves ------------------------------------------------------------------------------------------------


def test_a_job_ends_with_a_model_and_a_manifest_that_verify(first: First) -> None:
    assert first.job.state == jobs_pb2.SUCCEEDED
    assert {file.name for file in first.job.result.files} == {"model.safetensors", "manifest.json"}
    assert first.manifest["job_id"] == first.job.job_id
    assert 0.5 < first.job.result.metrics["auc"] < 1  # better than a coin: three short noisy rounds promise no more
    assert float(first.manifest["evaluation"]["auc"]) == first.job.result.metrics["auc"]
    assert [row.contributors for row in first.rows] == [("a", AGGREGATOR, "b", "c")] * ROUNDS
    assert any("no update and no sum could be opened by fewer than 2" in each for each in first.manifest["statements"])


def test_every_round_is_an_event_and_the_epsilon_of_a_row_grows_up_to_its_target(first: First) -> None:
    assert [event.sequence for event in first.events] == list(range(1, len(first.events) + 1))
    rounds = [event.round for event in first.events if event.kind == "round"]
    assert [(each.round, each.state, each.contributions) for each in rounds] == [
        (number, "RELEASED", 3) for number in range(1, ROUNDS + 1)
    ]
    for index in range(len(PARTIES)):
        spent = [each.parties[index].example_epsilon_spent for each in rounds]
        assert spent == sorted(set(spent))
        assert 0.9 * TARGET_EPSILON < spent[-1] <= TARGET_EPSILON
        assert spent[-1] == pytest.approx(first.job.result.epsilon_example, rel=1e-9)

    # of a party, with the noise that leaves three of them a model, nothing is claimed, and it is said what would be
    others = ("", "_against_aggregator", "_if_all_others_collude")
    assert {getattr(each, f"epsilon_party{name}") for each in rounds for name in others} == {math.inf}
    assert all("3 carry an honest noise share" in each.party_assumption for each in rounds)
    assert {each.party_delta for each in rounds} == {first.job.result.party_delta} == {1e-5}
    assert {each.example_epsilon_left_delta for each in rounds[-1].parties} == {1e-5}


def test_the_ledgers_at_both_ends_hold_exactly_the_rounds_that_ran(first: First) -> None:
    job_id = first.job.job_id
    kinds = ("reservation", "final", "release")
    expected = [(kind, job_id, number) for number in range(1, ROUNDS + 1) for kind in kinds]
    books = {
        name: [(each.kind, each.job_id, each.round) for each in book if each.job_id]
        for name, book in first.ledgers.items()
    }
    assert books[AGGREGATOR] == expected
    for name in PARTIES:  # one charge for a row, one for the party
        assert sorted(books[name]) == sorted(expected * 2)
    charged = [entry.event for entry in first.ledgers[AGGREGATOR] if entry.event is not None]
    assert epsilon(charged, delta=1e-5) == pytest.approx(first.job.result.epsilon_party, rel=1e-9)


def test_the_manifest_names_the_head_of_the_ledger(first: First) -> None:
    assert first.manifest["ledger_head"] == first.ledgers[AGGREGATOR][-1].digest


def test_the_manifests_digests_are_those_of_the_rounds_plans_and_transcripts(first: First, federation: Any) -> None:
    _, roster = load_roster(federation.kits / "party-a" / "roster.json")
    assert first.manifest["encryption"]["roster_digest"] == roster.digest
    for row, entry in zip(first.rows, first.manifest["rounds"], strict=True):
        plan, transcript = Signed.from_json(row.plan), Signed.from_json(row.result["transcript"])
        assert entry["plan"] == row.plan_digest == signed_digest(plan, PLAN_KIND)
        assert entry["transcript"] == signed_digest(transcript, TRANSCRIPT_KIND)
        said = open_signed(transcript, TRANSCRIPT_KIND, verify_key=roster.aggregator_verify_key)
        assert said["plan"] == row.plan_digest
        assert said["contributors"] == list(row.contributors)
        assert said["ledger_head"] in {each.digest for each in first.ledgers[AGGREGATOR]}
    assert said["model_sha256"] == first.manifest["model"]["sha256"]


def test_nobody_keeps_an_update_once_its_round_is_over(
    first: First, running: Any, wait_until: Callable[..., Any]
) -> None:
    sizes = {row.batches[name].size for row in first.rows for name in row.batches}
    for name in (AGGREGATOR, *PARTIES):  # a party hears of the end when it is reached
        wait_until(lambda name=name: not sizes & set(_sizes(running.state(name) / "blobs")), f"{name} keeps no update")


# --- one federation, many jobs ----------------------------------------------------------------------------------------


def test_the_status_says_who_is_there_and_what_holds(running: Any) -> None:
    status = running.client.status()
    assert [(each.party, each.connected) for each in status.parties] == [(name, True) for name in PARTIES]
    assert (status.federation, status.custody, status.workers.size) == ("demo", "threshold", 2)
    assert status.workers.tasks_done > 0
    assert status.workers.failure_rate == 0
    keyring = Keyring.load(running.kits / "aggregator" / "public_key.json", insecure_small=True)
    assert status.key_id == keyring.key_id


def test_two_trainings_run_at_a_time_and_a_third_waits_for_one_of_them(running: Any) -> None:
    before = {name: process.pid for name, process in running.processes.running.items()}
    with running.processes.hold("a"):  # until the second is there
        jobs = [running.submit(seed=seed) for seed in (1, 2, 3)]
        running.reached(jobs[1], lambda row: row.state == "TRAINING", "the second runs")
    assert [running.succeed(job_id).progress.rounds_released for job_id in jobs] == [1, 1, 1]
    first, second, third = (running.rounds(job_id)[0] for job_id in jobs)
    assert second.started_at < first.ended_at
    assert third.started_at >= min(first.ended_at, second.ended_at)
    assert {name: process.pid for name, process in running.processes.running.items()} == before


def test_a_trained_model_is_evaluated_and_exported_as_jobs_of_their_own(
    running: Any, first: First, tmp_path: Path
) -> None:
    client, trained = running.client, first.job
    evaluated = client.wait(client.submit(Evaluation(job_id=trained.job_id)).job_id, 200)
    assert result_of(evaluated).metrics["auc"] == pytest.approx(trained.result.metrics["auc"])
    exported = client.wait(client.submit(Export(job_id=trained.job_id)).job_id, 200)
    assert result_of(exported).epsilon_example == trained.result.epsilon_example
    files = client.fetch_artifact(exported.job_id, tmp_path / "exported")
    original = client.fetch_artifact(trained.job_id, tmp_path / "trained")
    with np.load(files["model.npz"], allow_pickle=False) as arrays:
        tensors = from_safetensors(original["model.safetensors"].read_bytes())
        assert set(arrays) == set(tensors)
        assert all(np.array_equal(arrays[name], tensors[name]) for name in tensors)
    assert [event.kind for event in client.events(exported.job_id)] == ["submitted", "started", "succeeded"]


def test_the_same_request_is_the_same_job(running: Any) -> None:
    job_id = running.submit(request_id="once")
    assert running.submit(request_id="once") == job_id
    assert running.succeed(job_id).state == jobs_pb2.SUCCEEDED
    assert running.submit(request_id="once") == job_id
    with pytest.raises(ConflictError, match=job_id):
        running.submit(request_id="once", seed=1)
    assert len(running.rounds(job_id)) == 1


# --- what the aggregator sees -----------------------------------------------------------------------------------------


def test_what_the_aggregator_stores_of_an_update_is_ciphertexts_that_one_share_does_not_open(
    running: Any, wait_until: Callable[..., Any]
) -> None:
    keyring = Keyring.load(running.kits / "aggregator" / "public_key.json", insecure_small=True)
    root = running.state(AGGREGATOR) / "blobs"
    known = {path.name for path in root.glob("??/*")}
    with running.processes.hold("b"):
        job_id = running.submit(parties=("a", "b"))
        row = running.reached(job_id, lambda row: "a" in row.roots, "a commits")
        plan = RoundPlan.from_statement(_statement(row.plan))
        layout = Layout.from_json(plan.layout)
        aggregator = running.processes.hold("aggregator")
        aggregator.__enter__()
    try:  # b goes on and commits; uploads come in, and stay unchecked as long as the aggregator's workers are held
        others = {*known, row.batches[AGGREGATOR].sha256}
        bodies = wait_until(
            lambda: found if len(found := dict(_bodies(root, layout.body_bytes, but=others))) == 2 else None,
            "two uploads are stored",
        )
        row = running.rounds(job_id)[0]
        assert row.state == "COLLECTING"
        signed = {name: _statement(row.roots[name])["root"] for name in ("a", "b")}
        headers = {name: expected_header(plan, row.plan_digest, name).encode() for name in ("a", "b")}
        found = {
            name: body
            for body in bodies.values()
            for name in ("a", "b")
            if batch_root(headers[name], [body], ciphertext_bytes=layout.ciphertext_bytes)[0] == signed[name]
        }
    finally:
        aggregator.__exit__(None, None, None)
    assert set(found) == {"a", "b"}
    scheme: Any = keyring.scheme("paillier")
    n = scheme.public.n
    share = load_share(running.kits / "party-a" / "share.json")
    for body in found.values():
        assert len(body) == layout.ciphertext_count * layout.ciphertext_bytes
        assert b"".join(scheme.check(layout, [body])) == body  # each in Z*_{n²}
        values = [int.from_bytes(body[i : i + layout.ciphertext_bytes], "big") for i in _starts(layout)]
        assert len(set(values)) == len(values)
        assert all((value - 1) % n for value in values)  # 1 + n·m would be the plaintext for everybody
        part = scheme.open_share(layout, share, [body], binding=bytes(32), entropy=SystemEntropy())
        for shares in ({}, {share.index: part}):
            with pytest.raises(TooFewSharesError):
                list(scheme.combine(layout, body, shares))
    running.succeed(job_id)


def test_no_word_of_the_encoded_values_is_in_a_protected_body(federation: Any) -> None:
    keyring = Keyring.load(federation.kits / "aggregator" / "public_key.json", insecure_small=True)
    scheme: Any = keyring.scheme("paillier")
    request = LayoutRequest(parameter_count=200, value_bound=1 << 20, noise_bound=1 << 10, contributions=4)
    layout = scheme.plan(request)
    values = np.random.default_rng(0).integers(-(1 << 20), 1 << 20, size=200, dtype=np.int64)
    body = b"".join(scheme.protect(layout, [values], entropy=SystemEntropy()))
    plaintexts = pack(values, layout)
    raw = [values.tobytes(), values.byteswap().tobytes()]
    raw += [text.to_bytes(scheme.public.plaintext_bytes, order) for text in plaintexts for order in ("big", "little")]
    words = {text[at : at + 8] for text in raw for at in range(len(text) - 7) if any(text[at : at + 4])}
    assert len(words) > 1000
    assert not [word for word in words if word in body]
    again = b"".join(scheme.protect(layout, [values], entropy=SystemEntropy()))
    assert not set(_split(body, layout)) & set(_split(again, layout))  # fresh randomness: equal values do not show


# --- cancelling, and budgets ------------------------------------------------------------------------------------------


def test_a_running_job_can_be_cancelled_and_the_federation_gets_back_what_was_not_opened(
    running: Any, wait_until: Callable[..., Any]
) -> None:
    """Each party has trained, or begun to, and its time has told something: that round of it is spent."""
    with running.processes.hold("b"):
        job_id = running.submit(rounds=2)
        running.reached(job_id, lambda row: {"a", "c"} <= set(row.roots), "a and c commit")
        wait_until(lambda: (row := running.memory("b", job_id)) and row.trainings, "b trains")
        assert running.client.get(job_id).state == jobs_pb2.RUNNING
        running.client.cancel(job_id)
        assert running.end(job_id).state == jobs_pb2.CANCELLED
    (row,) = running.rounds(job_id)
    assert (row.state, row.spent, row.asked) == ("CANCELLED", False, ())
    for name in PARTIES:
        wait_until(lambda name=name: running.memory(name, job_id).ended, f"{name} heard of it")
    for name, (count, kind) in {AGGREGATOR: (1, "returned"), **dict.fromkeys(PARTIES, (2, "final"))}.items():
        assert _kinds(running, name, job_id) == {kind}
        assert len(running.charges(name, job_id)) == count
    running.succeed(running.submit())  # b's worker was busy with what nobody needs any more: it is free again


def test_a_job_that_would_overspend_the_round_budget_is_refused_at_submission(running: Any) -> None:
    before = running.ledger(AGGREGATOR)
    with pytest.raises(BudgetError, match="round budget at party level") as caught:
        running.submit(rounds=500)
    assert caught.value.metadata["limit"] == "200"
    *known, refusal = running.ledger(AGGREGATOR)
    assert (known, refusal.kind, refusal.job_id) == (before, "refusal", "")
    assert not [job for job in running.client.list() if job.federated_training.rounds == 500]


def test_a_job_that_no_row_of_a_party_can_ever_pay_is_refused_at_submission(running: Any) -> None:
    running.succeed(running.submit())  # with which c tells what it allows
    with pytest.raises(BudgetError, match="c lets a row spend ε = 40 in all, of which this job needs"):
        running.submit(epsilon=100.0)


def test_a_job_beyond_one_partys_budget_fails_and_names_that_party(running: Any) -> None:
    """At another δ than the budget's, which nobody but the party can compare."""
    local = LocalTraining(steps=5, sampling_rate=0.02, learning_rate=1.5, epsilon=100.0, delta=1e-6)
    job_id = running.submit(local_training=local)
    job = running.end(job_id)
    assert job.state == jobs_pb2.FAILED
    assert "c: the epsilon budget at example level" in job.error.message
    assert "[BUDGET_EXCEEDED]" in job.error.message
    assert list(job.error.parties) == ["c"]
    assert _kinds(running, AGGREGATOR, job_id) == {"returned"}
    assert running.charges("c", job_id) == []  # refused before anything was charged or touched


def _kinds(federation: Any, name: str, job_id: str) -> set[str]:
    """How the job's charges were settled."""
    return {each.settled.kind if each.settled else "open" for each in federation.charges(name, job_id)}


def _statement(signed: dict[str, str]) -> dict[str, Any]:
    statement = parse_canonical(Signed.from_json(signed).statement)
    statement.pop("kind", None)
    return statement


def _bodies(root: Path, size: int, *, but: set[str]) -> Iterator[tuple[str, bytes]]:
    """Stored blobs of this size, by digest."""
    blobs = Blobs(root)
    for path in root.glob("??/*"):
        if path.name not in but and path.stat().st_size == size:
            yield path.name, blobs.read(path.name)


def _sizes(root: Path) -> Iterator[int]:
    """Of all that is stored."""
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            if path.is_file():
                yield path.stat().st_size


def _starts(layout: Layout) -> range:
    return range(0, layout.body_bytes, layout.ciphertext_bytes)


def _split(body: bytes, layout: Layout) -> list[bytes]:
    return [body[start : start + layout.ciphertext_bytes] for start in _starts(layout)]
