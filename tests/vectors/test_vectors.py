"""The golden vectors: the package, a slow verifier that shares no code with it, and Node agree on every one of them.

What the package refuses is tested beside its rooms; here it is what the slow verifier refuses, so that its yes means
something.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from src.encryption.batch import BatchHeader
from src.encryption.dealer import deal
from src.encryption.keys import KeyShare, PrivateKey, ThresholdKey, check_kit
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.scheme import Layout
from src.errors import BatchError, InvalidInput, KnowledgeError, LedgerError, PlanError, ShareError, SignatureError
from src.jobs.orders import spec_of_order
from src.privacy import ledger
from src.protocol.batches import check_batch_header, check_knowledge
from src.protocol.canonical import canonical_bytes, digest, parse_canonical, real
from src.protocol.derive import derive, derive_again, derive_gradient_sum, example_multiplier
from src.protocol.merkle import MerkleHasher, batch_root
from src.protocol.order import open_order
from src.protocol.plan import RoundPlan, signed_digest
from src.protocol.roster import Roster, Scientist
from src.protocol.signing import Signed, open_signed
from tests.protocol.signatures import check_signatures
from tests.vectors import generate
from tests.vectors.changes import NODE_NOTICES, WRONG, WRONG_SUMS, Json, Path_, flipped, load, places
from tests.vectors.slow_forms import VectorError, parse_header
from tests.vectors.slow_plans import derived, derived_of_sum
from tests.vectors.verify_slow import verify

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROUNDS = [case.name for case in generate.CASES]
PLANS = ["plan_fedsgd", "plan_fedsgd_trusted", "plan_adaptive"]
EVERY = [*ROUNDS, *PLANS, "order", "ledger", "ledger_2", "ledger_3", "forms"]


def test_the_generator_writes_these_very_bytes() -> None:
    built = generate.build()
    assert sorted(built) == sorted(path.name for path in HERE.glob("*.json"))
    for name, text in built.items():
        assert (HERE / name).read_text(encoding="utf-8") == text, f"{name}: run python -m tests.vectors.generate"


@pytest.mark.parametrize("name", EVERY)
def test_the_slow_verifier_agrees(name: str) -> None:
    assert list(verify(load(name)))


def test_the_slow_verifier_shares_no_code_with_the_package() -> None:
    known = set(sys.stdlib_module_names) | {"slow_forms", "slow_knowledge", "slow_plans"}
    for file in ("verify_slow.py", "slow_forms.py", "slow_knowledge.py", "slow_plans.py"):
        for node in ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= known


def test_the_slow_verifier_is_a_command(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(load("ledger") | {"head": "0" * 64}))
    files = [str(HERE / "forms.json"), str(wrong)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.vectors.verify_slow", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ok    forms.json: trees: 9 Merkle roots\n" in done.stdout
    assert "WRONG wrong.json: does not hold: the head is the digest of the last line\n" in done.stdout


# --- the package agrees -----------------------------------------------------------------------------------------------


class Read:
    """A round vector as the package reads it."""

    def __init__(self, name: str) -> None:
        self.vector = vector = load(name)
        self.key = ThresholdKey.from_json(vector["threshold_key"], insecure_small=True)
        self.scheme = PaillierScheme(self.key.public, self.key)
        self.plan = RoundPlan.from_statement(self.open("plan", "aggregator"))
        self.digest = signed_digest(Signed.from_json(vector["plan"]), "plan")
        self.layout = Layout.from_json(self.plan.layout)
        self.material = bytes.fromhex(vector["aggregate"]["body"])

    def open(self, kind: str, signer: str, signed: Json | None = None) -> Json:
        key = bytes.fromhex(self.vector["signing_keys"][signer]["verify_key"])
        return open_signed(Signed.from_json(signed or self.vector[kind]), kind, verify_key=key)

    def decode(self, opened: Iterator[bytes]) -> list[int]:
        parts = self.scheme.decode(self.layout, opened, contributions=len(self.vector["batches"]))
        return [int(value) for part in parts for value in part]


@pytest.fixture(scope="module", params=ROUNDS)
def read(request: pytest.FixtureRequest) -> Read:
    return Read(request.param)


def test_keys_shares_and_ids_are_the_ones_recorded(read: Read) -> None:
    assert (read.key.key_id, read.key.digest) == (read.vector["key_id"], read.vector["threshold_key_digest"])
    assert read.key.to_json() == read.vector["threshold_key"]
    for share in read.vector["key_shares"]:
        check_kit(read.key, KeyShare.from_json(share))
    p, q = (int(read.vector["primes"][name], 16) for name in "pq")
    assert PrivateKey(p, q, read.key.public).public == read.key.public


def test_statements_verify_and_name_one_another(read: Read) -> None:
    roster = Roster.from_statement(read.open("roster", "operator"))
    assert roster.digest == read.vector["roster_digest"] == read.plan.roster_digest
    assert read.digest == read.vector["plan_digest"]
    derive_again(read.scheme, read.plan)
    for kind in ("list", "opening", "transcript"):
        assert read.open(kind, "aggregator")["plan"] == read.digest
    for share in read.vector["shares"]:
        statement = read.open("shares", share["party"], share["signed"])
        assert statement["sha256"] == hashlib.sha256(bytes.fromhex(share["data"])).hexdigest()


class Exponents:
    """Hands out exponents as whoever encrypts draws them: little-endian, one after the other."""

    def __init__(self, exponents: list[str], size: int) -> None:
        self._left = b"".join(int(each, 16).to_bytes(size, "little") for each in exponents)

    def token(self, size: int) -> bytes:
        assert size <= len(self._left)
        token, self._left = self._left[:size], self._left[size:]
        return token


def test_the_same_values_and_exponents_give_the_same_bytes(read: Read) -> None:
    for batch in read.vector["batches"]:
        entropy = Exponents(batch["exponents"], read.layout.modulus_bits // 16)
        values = np.array(batch["values"], dtype=np.int64)
        assert b"".join(read.scheme.protect(read.layout, [values], entropy=entropy)).hex() == batch["body"]


def test_headers_and_roots_are_the_ones_recorded(read: Read) -> None:
    for batch in read.vector["batches"]:
        header, body = bytes.fromhex(batch["header"]), bytes.fromhex(batch["body"])
        check_batch_header(read.plan, read.digest, batch["contributor"], header)
        assert BatchHeader.decode(header).encode() == header
        root, count, size = batch_root(header, [body], ciphertext_bytes=read.layout.ciphertext_bytes)
        statement = read.open("root", batch["contributor"], batch["signed_root"])
        assert statement["root"] == batch["root"] == root
        assert (statement["ciphertexts"], statement["body_bytes"]) == (count, size)


def test_recorded_proofs_of_knowledge_verify_for_their_contributor_and_plan_alone(read: Read) -> None:
    for batch in read.vector["batches"]:
        name, body = batch["contributor"], bytes.fromhex(batch["body"])
        proof = read.open("root", name, batch["signed_root"])["proof"]
        for plan_digest, contributor in [(read.digest, name), (read.digest, "x"), ("0" * 64, name)]:
            bound = {"plan_digest": plan_digest, "contributor": contributor}
            if bound == {"plan_digest": read.digest, "contributor": name}:
                check_knowledge(read.scheme, read.layout, proof, io.BytesIO(body), **bound)
            else:
                with pytest.raises(KnowledgeError):
                    check_knowledge(read.scheme, read.layout, proof, io.BytesIO(body), **bound)


def test_the_batches_fold_to_the_aggregate_and_open_to_the_sums(read: Read) -> None:
    bodies = [io.BytesIO(bytes.fromhex(batch["body"])) for batch in read.vector["batches"]]
    assert b"".join(read.scheme.fold(read.layout, bodies)) == read.material
    p, q = (int(read.vector["primes"][name], 16) for name in "pq")
    opened = list(read.scheme.open_with_key(read.layout, PrivateKey(p, q, read.key.public), [read.material]))
    assert b"".join(opened).hex() == "".join(read.vector["opened"])
    assert read.decode(iter(opened)) == read.vector["sums"]


def test_recorded_shares_verify_and_any_threshold_opens_to_the_sums(read: Read) -> None:
    shares = {share["index"]: bytes.fromhex(share["data"]) for share in read.vector["shares"]}
    for share in read.vector["shares"]:
        index, binding = share["index"], share["binding"].encode()
        read.scheme.verify_share(read.layout, read.material, shares[index], index=index, binding=binding)
    indices, threshold = sorted(shares), read.key.threshold
    for group in (indices[:threshold], indices[-threshold:]):
        opened = read.scheme.combine(read.layout, read.material, {index: shares[index] for index in group})
        assert read.decode(opened) == read.vector["sums"]


def test_the_package_refuses_what_is_changed_in_a_round(read: Read) -> None:
    batch, share = read.vector["batches"][0], read.vector["shares"][0]
    header = bytearray.fromhex(batch["header"])
    header[-1] ^= 1
    with pytest.raises(BatchError, match="plan_digest"):
        check_batch_header(read.plan, read.digest, batch["contributor"], bytes(header))
    data = bytearray.fromhex(share["data"])
    data[-1] ^= 1
    with pytest.raises(ShareError, match="proof"):
        read.scheme.verify_share(
            read.layout, read.material, bytes(data), index=share["index"], binding=share["binding"].encode()
        )
    with pytest.raises(SignatureError):
        read.open("plan", "operator")


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_has_the_bytes_and_the_figures_recorded(name: str) -> None:
    vector = load(name)
    key = bytes.fromhex(vector["signing_keys"]["aggregator"]["verify_key"])
    signed = Signed.from_json(vector["plan"])
    plan = RoundPlan.from_statement(open_signed(signed, "plan", verify_key=key))
    assert (plan.strategy == "fedsgd") == (plan.adaptive_clipping is None)
    assert canonical_bytes({**plan.to_statement(), "kind": "plan"}) == signed.statement
    assert signed_digest(signed, "plan") == vector["plan_digest"]
    p, q = generate.PRIMES[512]
    public = deal(p, q, threshold=2, holders=3, entropy=generate.SeededEntropy("plans deal"))[0]
    found = derive_again(PaillierScheme(public.public, public), plan)
    assert found.cap == (plan.gradient_sum.batch_cap if plan.gradient_sum else 0)
    assert found.bit_unit == plan.bit_unit


@settings(deadline=None, max_examples=60)
@given(
    clipping_norm=st.floats(1e-3, 1e3),
    resolution_bits=st.integers(8, 24),
    dimension=st.integers(1, 10**7),
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    noise_multiplier=st.floats(0.1, 8),
    cohort=st.integers(2, 40),
    priced_rounds=st.integers(1, 1000),
    data=st.data(),
)
def test_what_a_plan_derives_is_what_exact_arithmetic_gives(data: st.DataObject, **chosen: Any) -> None:
    """The package computes R in doubles; up to c = 2^40 it is the integer that the formula has."""
    read, cohort = Read(ROUNDS[0]), chosen.pop("cohort")
    quorum = data.draw(st.integers(1, cohort))
    colluders = data.draw(st.integers(0, quorum - 1))
    try:
        found = derive(read.scheme, delta=1e-5, cohort=cohort, quorum=quorum, colluders=colluders, **chosen)
    except InvalidInput:
        assume(False)
    noise = {name: str(chosen[name]) for name in ("noise_by", "noise_multiplier")}
    plan = {**chosen, "cohort": ["x"] * cohort, "quorum": quorum, "colluders": colluders, "noise": noise}
    plan |= {"scheme": "paillier", "key_id": ""}
    plan |= {"clipping_norm": real(chosen["clipping_norm"]), "layout": {"modulus_bits": read.layout.modulus_bits}}
    expected = derived(plan)
    assert expected["rounded_bound"] == found.rounded_bound
    assert expected["bound"] == found.noise.bound
    assert expected["share_sigma2"] == found.noise_plan.share_sigma2
    assert expected["aggregator_sigma2"] == found.noise_plan.aggregator_sigma2
    for name in ("slot_bits", "offset", "contributions", "slots_per_ciphertext", "ciphertext_count"):
        assert expected[name] == getattr(found.layout, name)


@settings(deadline=None, max_examples=30)
@given(
    max_grad_norm=st.floats(0.05, 50),
    sampling_rate=st.floats(0.001, 1),
    resolution_bits=st.integers(12, 24),
    dimension=st.integers(1, 10**5),
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    noise_multiplier=st.floats(0.1, 8),
    priced_rounds=st.integers(1, 1000),
    declared=st.lists(st.integers(1, 120), min_size=2, max_size=6),
    data=st.data(),
)
def test_what_a_plan_of_fedsgd_derives_is_what_exact_arithmetic_gives(data: st.DataObject, **chosen: Any) -> None:
    """The cap by whole numbers, which the package has from logarithms of 60 digits."""
    read, rows = Read(ROUNDS[0]), {f"p{i}": count for i, count in enumerate(chosen.pop("declared"))}
    quorum = data.draw(st.integers(1, len(rows)))
    chosen |= {"quorum": quorum, "colluders": data.draw(st.integers(0, quorum - 1))}
    trusted = chosen["noise_by"] == "aggregator"
    try:
        found = derive_gradient_sum(read.scheme, delta=1e-5, declared_rows=rows, trusted_aggregator=trusted, **chosen)
    except (InvalidInput, PlanError):
        assume(False)
    noise = {name: str(chosen[name]) for name in ("noise_by", "noise_multiplier")}
    local = {name: real(chosen[name]) for name in ("max_grad_norm", "sampling_rate")}
    plan = {**chosen, "cohort": list(rows), "noise": noise, "local": local, "scheme": "paillier", "key_id": ""}
    plan |= {"gradient_sum": {"declared_rows": rows}, "layout": {"modulus_bits": read.layout.modulus_bits}}
    expected = derived_of_sum(plan)
    assert (expected["batch_cap"], expected["rounded_bound"]) == (found.cap, found.rounded_bound)
    assert expected["clipping_norm"] == real(found.contribution_norm)
    assert expected["local.noise_multiplier"] == real(example_multiplier(found.noise_plan))
    assert (expected["bound"], expected["offset"]) == (found.noise.bound, found.layout.offset)
    for name in ("slot_bits", "contributions", "slots_per_ciphertext", "ciphertext_count"):
        assert expected[name] == getattr(found.layout, name)


@pytest.mark.parametrize("name", ["ledger", "ledger_2", "ledger_3"])
def test_ledger_lines_verify(name: str) -> None:
    vector = load(name)
    entries = ledger.verify_lines(vector["lines"], known_heads=[vector["head"]])
    assert [ledger.to_line(entry) for entry in entries] == vector["lines"]
    assert entries[-1].digest == vector["head"]
    with pytest.raises(LedgerError):
        ledger.verify_lines([flipped(line) for line in vector["lines"]])


def test_signatures_on_ledger_lines_verify() -> None:
    vector = load("ledger_3")
    entries = ledger.verify_lines(vector["lines"])
    keys = [bytes.fromhex(vector["verify_key"])]
    assert check_signatures(entries, verify_keys=keys) == sum(entry.version > 1 for entry in entries) == 19
    assert [entry.version for entry in entries] == [1] * 6 + [2] * 12 + [3] * 7
    assert {entry.kind for entry in entries} == set(get_args(ledger.Kind))
    assert [entry.scientist for entry in entries if entry.scientist] == ["ann"] * 2


def test_an_order_and_a_plan_that_rests_on_it_are_read() -> None:
    vector = load("order")
    scientists = (Scientist("ann", bytes.fromhex(vector["signing_keys"]["ann"]["verify_key"])),)
    roster = Roster(**{**ROSTER_OF_ORDERS, "scientists": scientists})
    order, digest_ = open_order(Signed.from_json(vector["order"]), roster)
    key = bytes.fromhex(vector["signing_keys"]["aggregator"]["verify_key"])
    plan = RoundPlan.from_statement(open_signed(Signed.from_json(vector["plan"]), "plan", verify_key=key))
    assert plan.order == digest_ == vector["order_digest"]
    assert (order.most_rounds, order.request_id) == (plan.priced_rounds, "request \u00e9")
    assert spec_of_order(order).to_json()["task_options"] == {"\u03b5": 1}


ROSTER_OF_ORDERS: dict[str, Any] = {
    "federation": "vectors",
    "key_id": "",
    "custody": "threshold",
    "threshold": 2,
    "colluders": 1,
    "aggregator_verify_key": bytes(32),
    "members": (),
    "created_at": "",
}


def test_forms_are_the_ones_recorded() -> None:
    vector = load("forms")
    for case in vector["canonical"]:
        assert canonical_bytes(case["value"]) == case["text"].encode()
        assert parse_canonical(case["text"].encode()) == case["value"]
        assert digest(case["value"], domain="vector") == case["digest"]
    for case in vector["refused"]:
        with pytest.raises(InvalidInput):
            parse_canonical(case["text"].encode())
    for case in vector["reals"]:
        assert real(float(case["text"])) == case["text"]
    for case in vector["trees"]:
        hasher = MerkleHasher()
        for leaf in case["leaves"]:
            hasher.add(bytes.fromhex(leaf))
        assert hasher.root() == case["root"]


# --- every field counts -----------------------------------------------------------------------------------------------

PLACES = [
    pytest.param(name, path, id=f"{name}:{where}")
    for name in ("round_512_2of3", *PLANS, "order", "ledger", "ledger_2", "ledger_3", "forms")
    for where, path in places(name).items()
]


@pytest.mark.parametrize(("name", "path"), PLACES)
def test_no_field_of_a_vector_can_change_unnoticed(name: str, path: Path_) -> None:
    vector = load(name)
    at = vector
    for key in path[:-1]:
        at = at[key]  # type: ignore[index]  # what leaves() walked
    at[path[-1]] = flipped(at[path[-1]])  # type: ignore[index]
    with pytest.raises(VectorError):
        list(verify(vector))


@pytest.mark.parametrize("why", [case["why"] for case in load("forms")["refused"]])
def test_a_text_counts_as_refused_only_if_it_is(why: str) -> None:
    vector = load("forms")
    next(case for case in vector["refused"] if case["why"] == why)["text"] = "{}"
    with pytest.raises(VectorError, match=re.escape(why)):
        list(verify(vector))


# --- what one digit does not show -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "claim"), [pytest.param(*rest, id=name) for name, *rest in WRONG])
def test_the_slow_verifier_names_what_is_wrong(change: Callable[[Json], None], claim: str) -> None:
    vector = copy.deepcopy(load("round_512_2of3"))
    change(vector)
    with pytest.raises(VectorError, match=claim):
        list(verify(vector))


@pytest.mark.parametrize(("change", "claim"), [pytest.param(*rest, id=name) for name, *rest in WRONG_SUMS])
def test_the_slow_verifier_names_what_is_wrong_in_a_plan_of_fedsgd(change: Callable[[Json], None], claim: str) -> None:
    vector = copy.deepcopy(load("plan_fedsgd"))
    change(vector)
    with pytest.raises(VectorError, match=claim):
        list(verify(vector))


# --- Node -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> str:
    """Where `node` is: skipped on a laptop without it, a failure in CI."""
    found = shutil.which("node")
    if found is None and os.environ.get("CI"):
        pytest.fail("node is missing, and CI is set: the Node verifier would go untested")
    if found is None:
        pytest.skip("node is missing")
    return found


def run_node(node: str, *files: Path) -> tuple[int, list[str]]:
    command = [node, str(ROOT / "examples" / "node" / "verify_batch.mjs"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout.splitlines()


def test_node_checks_every_round_without_a_dependency(node: str) -> None:
    code, lines = run_node(node, *(HERE / f"{name}.json" for name in ROUNDS))
    assert code == 0
    assert len(lines) == 8 * len(ROUNDS)
    assert all(line.startswith("ok ") for line in lines)


def test_node_says_what_is_wrong_and_exits_with_1(node: str, tmp_path: Path) -> None:
    files = []
    for number, change in enumerate(NODE_NOTICES.values()):
        vector = load("round_512_2of3")
        change(vector)
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(vector))
    code, lines = run_node(node, *files)
    wrong = {line.split()[1].removesuffix(":") for line in lines if line.startswith("WRONG ")}
    assert code == 1
    assert wrong == set(map(str, files))


# --- the pages --------------------------------------------------------------------------------------------------------


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_worked_example_of_the_page_is_the_header_it_says() -> None:
    block = page("wire-format.md").partition("```text\n")[2].partition("```")[0]
    written = bytes.fromhex(
        "".join(" ".join(re.findall(r"^ *((?:[0-9a-f]{2} ?)+)(?:  |$)", block, flags=re.M)).split())
    )
    assert written == generate.EXAMPLE_HEADER.encode()
    assert len(written) == 126
    fields = parse_header(written)
    assert (fields["offset"], fields["job_id"], fields["contributor"]) == (131071, "job-1", "a")
    assert fields["ciphertext_count"] == -(-1000 // (3071 // 20))


@pytest.mark.parametrize("name", ["wire-format.md", "numerics.md"])
def test_every_file_and_test_that_a_page_names_exists(name: str) -> None:
    text = page(name)
    files = set(re.findall(r"`((?:tests|src|examples|docs)/[\w./-]+\.(?:py|mjs|md|json))`", text))
    assert files
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
