"""The client in examples/clients/node, which knows Sotto from its .proto files alone, against real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf import json_format

from src.client import verify_manifest
from src.communication.generated import jobs_pb2
from src.communication.identity import Identity
from src.errors import DOMAIN
from src.jobs.orders import check_order
from src.jobs.specs import spec_from_proto
from src.protocol.order import open_order
from src.protocol.roster import Roster, Scientist, load_roster, save_roster, sign_roster
from src.protocol.signing import Signed, SigningKey

ROOT = Path(__file__).resolve().parents[2]
PARTIES = ("a", "b", "c")
LONG_S: Final = 300.0
"""Only a hang reaches it."""
EVENT: Final = re.compile(r"event (\d+) \S+ (\w+): ")
SMALL: Final = {
    "spare_rounds": 0,
    "local_training": {"steps": 5, "sampling_rate": 0.02, "learning_rate": 1.5, "epsilon": 3.0},
    "party_privacy": {"clipping_norm": 0.5, "noise_multiplier": 0.2},
    "round_timeout_s": 150,
}
"""Trains little: what `Federation.submit` asks for."""


def needed(program: str) -> str:
    """Where a program is: skipped on a laptop without it, a failure in CI."""
    found = shutil.which(program)
    if found is None:
        _missing(f"{program} is missing")
    return str(found)


def _missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set: the Node client would go untested")
    pytest.skip(what)


@dataclass(frozen=True)
class Node:
    """The client, installed.

    Attributes:
        program: where `node` is.
        folder: a copy of examples/clients/node with its dependencies; proto/ and third_party/ lie where they do here.
    """

    program: str
    folder: Path

    def start(self, *arguments: object, output: Path | None = None) -> subprocess.Popen[str]:
        """`node run.mjs ARGUMENTS`; its output goes to a file where one is given."""
        with (output or Path(os.devnull)).open("w", encoding="utf-8") as file:
            return subprocess.Popen(
                [self.program, "run.mjs", *map(str, arguments)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file if output else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def run(self, *arguments: object) -> tuple[int, list[str], str]:
        """Exit code, lines of stdout, and stderr."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=LONG_S)
        finally:
            process.kill()
        return process.returncode, out.splitlines(), err

    def evaluate(self, script: str, text: str) -> Any:
        """What a module prints as JSON that reads `text` from stdin."""
        command = [self.program, "--input-type=module", "--eval", script]
        done = subprocess.run(
            command, cwd=self.folder, input=text, capture_output=True, text=True, check=False, timeout=LONG_S
        )
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    program, npm = needed("node"), needed("npm")
    place = tmp_path_factory.mktemp("node")
    clients = place / "examples" / "clients"
    shutil.copytree(ROOT / "examples" / "clients", clients, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(ROOT / "proto", place / "proto")
    folder = clients / "node"
    lean = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--prefer-offline", "--loglevel=error")
    patience = ("--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000")  # not minutes
    install = (npm, "install", *lean, *patience)
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False, timeout=LONG_S)
    if done.returncode:
        _missing(f"npm cannot install the Node client's dependencies ({done.stderr.strip()[:300]})")
    return Node(program, folder)


@dataclass(frozen=True)
class Trained:
    """A job that the Node client submitted, watched and fetched."""

    job_id: str
    lines: list[str]
    folder: Path
    federation: Any

    @property
    def kit(self) -> Path:
        return Path(self.federation.kits / "scientist")


@pytest.fixture(scope="session")
def trained(node: Node, federation: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    federation.start(*PARTIES)
    folder = tmp_path_factory.mktemp("fetched") / "out"
    code, lines, err = node.run(*submission(federation, out=folder, rounds=1, spec=SMALL))
    assert (code, err) == (0, "")
    return Trained(lines[0].split()[1], lines, folder, federation)


def submission(federation: Any, *, out: Path, rounds: int, spec: dict[str, Any]) -> Sequence[object]:
    """Arguments of run.mjs."""
    kit = federation.kits / "scientist"
    where = ("--kit", kit, "--address", federation.address, "--out", out)
    return (*where, "--task", "randhie", "--rounds", str(rounds), "--spec", json.dumps(spec))


def events(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Sequence number and kind of each event that was printed."""
    return [(int(found[1]), found[2]) for line in lines if (found := EVENT.match(line))]


def history(federation: Any, job_id: str) -> list[tuple[int, str]]:
    """The same as the aggregator has it."""
    return [(event.sequence, event.kind) for event in federation.client.watch(job_id)]


# --- what a scientist does --------------------------------------------------------------------------------------------


def test_a_job_is_submitted_watched_waited_for_and_fetched(trained: Trained) -> None:
    seen = events(trained.lines)
    assert seen == history(trained.federation, trained.job_id)
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert {"submitted", "started", "round", "succeeded"} <= {kind for _, kind in seen}
    assert sorted(path.name for path in trained.folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert any(line.startswith(f"verified: manifest of job {trained.job_id}") for line in trained.lines)


def test_what_it_verified_the_python_client_verifies_too(trained: Trained) -> None:
    _, roster = load_roster(trained.kit / "roster.json")
    manifest = verify_manifest(trained.folder / "manifest.json", roster, job_id=trained.job_id)
    size, sha256 = manifest["model"]["bytes"], manifest["model"]["sha256"]
    path = trained.folder / "model.safetensors"
    assert f"file {path} {size} bytes, SHA-256 {sha256}" in trained.lines
    assert path.stat().st_size == size


def test_a_watch_misses_nothing_when_the_aggregator_is_killed_and_comes_back(
    node: Node, trained: Trained, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    federation, output = trained.federation, tmp_path / "stdout"
    with federation.processes.hold("a"):
        process = node.start(*submission(federation, out=tmp_path / "out", rounds=1, spec=SMALL), output=output)
        try:
            wait_until(lambda: "started" in dict(events(output.read_text().splitlines())).values(), "the job starts")
            job_id = output.read_text().split()[1]
            federation.reached(job_id, lambda row: row.roots, "a party commits")
            federation.processes.kill("aggregator")
            federation.start_aggregator()
        except BaseException:
            process.kill()
            raise
    try:
        _, err = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    seen = events(output.read_text().splitlines())
    assert seen == history(federation, job_id)
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))


def test_the_same_request_is_the_same_job_and_not_for_another_one(node: Node, trained: Trained) -> None:
    request_id = trained.lines[0].rpartition(" ")[2].removesuffix(")")
    again = submission(trained.federation, out=trained.folder, rounds=1, spec=SMALL)
    code, lines, err = node.run(*again, "--request-id", request_id)
    assert (code, lines, err) == (0, trained.lines, "")
    other = submission(trained.federation, out=trained.folder, rounds=1, spec={**SMALL, "seed": 1})
    code, lines, err = node.run(*other, "--request-id", request_id)
    assert (code, lines) == (1, [])
    assert err.startswith(f"ALREADY_EXISTS ALREADY_EXISTS ({DOMAIN})")


LOOK: Final = """
import { readFileSync } from "node:fs";
import { SottoClient, toNumber } from "./client.mjs";
const { kit, address, jobId } = JSON.parse(readFileSync(0, "utf8"));
const client = await SottoClient.fromKit(kit, { address });
const listed = [];
for await (const job of client.list({ filter: "state=SUCCEEDED", pageSize: 1 })) listed.push(job.job_id);
const job = await client.get(jobId);
const { state } = await client.cancel(jobId);
const unknown = await client.wait("no-such-job").catch(({ code, reason }) => [code, reason]);
const { parties } = await client.status();
const training = job.federated_training;
const { quorum, local_training: local, party_privacy: party } = training;
for await (const event of client.watch(jobId)) if (event.kind === "started") break; // leaving the loop hangs up
client.close();
console.log(JSON.stringify({
  listed, state, unknown, spec: job.spec, quorum, epsilon: local.epsilon, noise: party.noise_multiplier,
  sizes: job.result.files.map(({ bytes }) => toNumber(bytes)), connected: parties.map(({ connected }) => connected),
}));
"""


def test_jobs_are_listed_looked_at_and_cancelled(node: Node, trained: Trained) -> None:
    """64-bit integers come as decimal strings, enumerations as names, doubles as numbers."""
    federation = trained.federation
    wishes = {"kit": str(trained.kit), "address": federation.address, "jobId": trained.job_id}
    seen = node.evaluate(LOOK, json.dumps(wishes))
    job = federation.client.get(trained.job_id)
    assert trained.job_id in seen.pop("listed")
    assert seen == {
        "state": "SUCCEEDED",
        "unknown": ["NOT_FOUND", "NOT_FOUND"],
        "spec": "federated_training",
        "quorum": str(job.federated_training.quorum),
        "epsilon": 3.0,
        "noise": 0.2,
        "sizes": [file.bytes for file in job.result.files],
        "connected": [True] * len(PARTIES),
    }


# --- refusals ---------------------------------------------------------------------------------------------------------

WRONG: Final[dict[str, tuple[dict[str, Any], int, tuple[str, ...]]]] = {
    "numbers below zero": (
        {"quorum": -1, "local_training": {"steps": -1}},
        1,
        ("INVALID_ARGUMENT INVALID_INPUT (" + DOMAIN + ")", "federated_training.quorum", "local_training.steps"),
    ),
    "beyond the budget": ({}, 500, ("FAILED_PRECONDITION BUDGET_EXCEEDED (" + DOMAIN + ")", "limit: 200")),
    "a field that does not exist": (
        {"local_training": {"steps": 5, "epsilom": 1}},
        1,
        ("INVALID_ARGUMENT INVALID_INPUT: unknown", "field federated_training.local_training.epsilom"),
    ),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_job_is_refused_with_its_reason_and_the_fields_at_fault(
    node: Node, trained: Trained, tmp_path: Path, why: str
) -> None:
    wrong, rounds, expected = WRONG[why]
    spec = {**SMALL, **wrong}
    code, lines, err = node.run(*submission(trained.federation, out=tmp_path, rounds=rounds, spec=spec))
    assert (code, lines) == (1, [])
    assert [text for text in expected if text not in err] == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def _replace_in_statement(content: dict[str, Any]) -> None:
    signed = content["manifest"]
    signed["statement"] = signed["statement"].replace('"randhie"', '"randhiE"')


TAMPERED: Final[dict[str, tuple[str, Callable[[Path], object], str]]] = {
    "a bit of the model": ("model.safetensors", _flip, "DIGEST_MISMATCH"),
    "no model": ("model.safetensors", Path.unlink, "DIGEST_MISMATCH"),
    "the statement": ("manifest.json", _edit(_replace_in_statement), "SIGNATURE_INVALID"),
    "the half that people read": (
        "manifest.json",
        _edit(lambda content: content["readable"].update(task="other")),
        "SIGNATURE_INVALID",
    ),
    "something beside both": ("manifest.json", _edit(lambda content: content.update(more=1)), "SIGNATURE_INVALID"),
    "another signer": (
        "manifest.json",
        _edit(lambda content: content["manifest"].update(signer="a")),
        "SIGNATURE_INVALID",
    ),
    "no manifest at all": ("manifest.json", lambda path: path.write_text("[]"), "SIGNATURE_INVALID"),
    "half a manifest": ("manifest.json", lambda path: path.write_text('{"manifest"'), "INVALID_INPUT"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_afterwards_does_not_verify(node: Node, trained: Trained, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(trained.folder, tmp_path / "out")
    name, change, reason = TAMPERED[what]
    arguments = ("--kit", trained.kit, "--out", folder, "--verify")
    assert node.run(*arguments)[0] == 0
    change(folder / name)
    code, lines, err = node.run(*arguments)
    assert (code, lines) == (1, [])
    assert reason in err.splitlines()[0]


def test_a_manifest_of_another_job_does_not_verify(node: Node, trained: Trained) -> None:
    arguments = ("--kit", trained.kit, "--out", trained.folder, "--verify", "--job", "another")
    code, _, err = node.run(*arguments)
    assert (code, "SIGNATURE_INVALID" in err) == (1, True)


def test_nothing_is_kept_of_what_the_aggregator_of_the_kit_did_not_sign(
    node: Node, trained: Trained, tmp_path: Path
) -> None:
    """The kit of a federation with another aggregator, which this one's TLS certificate speaks for."""
    kit, folder = shutil.copytree(trained.kit, tmp_path / "kit"), tmp_path / "out"
    operator = SigningKey.generate()
    _, roster = load_roster(kit / "roster.json")
    other = replace(roster, aggregator_verify_key=SigningKey.generate().verify_key)
    (kit / "roster.json").unlink()
    save_roster(kit / "roster.json", sign_roster(other, operator), operator_verify_key=operator.verify_key)
    address = trained.federation.address
    code, _, err = node.run("--kit", kit, "--address", address, "--out", folder, "--job", trained.job_id)
    assert (code, "SIGNATURE_INVALID" in err) == (1, True)
    assert list(folder.iterdir()) == []


# --- what was begun before --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["its first half", "something else", "more than all of it"])
def test_a_file_that_is_there_in_part_is_continued_or_fetched_anew(
    node: Node, trained: Trained, tmp_path: Path, begun: str
) -> None:
    model = (trained.folder / "model.safetensors").read_bytes()
    parts = {"its first half": model[: len(model) // 2], "something else": b"?" * 99, "more than all of it": model * 2}
    (tmp_path / "model.safetensors.part").write_bytes(parts[begun])
    address = trained.federation.address
    code, _, err = node.run("--kit", trained.kit, "--address", address, "--out", tmp_path, "--job", trained.job_id)
    assert (code, err) == (0, "")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in trained.folder.iterdir()
    }


# --- orders -----------------------------------------------------------------------------------------------------------

SIGN: Final = """
import { readFileSync } from "node:fs";
import { signOrder } from "./order.mjs";
const { key, jobs } = JSON.parse(readFileSync(0, "utf8"));
const signer = { federation: "demo", scientist: "ann", key: Buffer.from(key, "hex") };
const orders = jobs.map(({ job, model }) => {
  if (model) Object.values(job)[0][model] = Buffer.from("weights");
  const made = signOrder(job, signer, { requestId: "r \u00e9", now: 1_800_000_000_123 });
  const { statement, signer: by, signature } = made;
  return { statement: statement.toString(), signer: by, signature: signature.toString("hex") };
});
console.log(JSON.stringify(orders));
"""

ORDERED: Final[list[tuple[dict[str, Any], str, dict[str, Any]]]] = [
    ({"federated_training": {"task": "randhie"}}, "", {}),
    ({"federated_training": {**SMALL, "task": "randhie", "rounds": "7"}}, "", {"most_rounds": 7}),
    (
        {
            "federated_training": {
                "task": "randhie",
                "parties": ["a", "b"],
                "encryption": {"paillier": {}, "resolution_bits": 15},
                "seed": 2**53 - 1,
                "task_options": {
                    "fields": {
                        "\u03b5": {"number_value": 0.1},
                        "l": {
                            "list_value": {"values": [{"string_value": "x"}, {"null_value": 0}, {"bool_value": False}]}
                        },
                        "s": {"struct_value": {"fields": {"n": {"number_value": 3}}}},
                    }
                },
            },
            "timeout": {"seconds": 60},
        },
        "initial_model",
        {"expires_at": "2027-01-15T09:01:00Z", "most_rounds": 12},
    ),
    ({"evaluation": {"task": "randhie"}}, "model", {"most_rounds": 0}),
    ({"export": {"job_id": "j"}, "display_name": "d"}, "", {"expires_at": "2027-02-14T08:00:00Z"}),
]


def test_what_it_signs_is_the_order_that_the_aggregator_and_the_parties_read(node: Node) -> None:
    """Of every kind of job, with and without a model, with options of every type."""
    key = SigningKey.from_bytes(bytes(range(32)))
    jobs = [{"job": job, "model": model} for job, model, _ in ORDERED]
    signed = node.evaluate(SIGN, json.dumps({"key": bytes(range(32)).hex(), "jobs": jobs}))
    roster = Roster(
        federation="demo",
        key_id="",
        custody="threshold",
        threshold=2,
        colluders=0,
        aggregator_verify_key=bytes(32),
        members=(),
        created_at="",
        scientists=(Scientist("ann", key.verify_key),),
    )
    for (given, model, said), each in zip(ORDERED, signed, strict=True):
        order, _ = open_order(Signed.from_json(each), roster)
        kind = order.job
        content = {name: value for name, value in given.items() if name == kind}
        options = content[kind].get("task_options")
        job = json_format.ParseDict(
            {kind: {**content[kind], **({"task_options": {}} if options else {})}}, jobs_pb2.Job()
        )
        if model:
            setattr(getattr(job, kind), model, b"weights")
        if options:
            job.federated_training.task_options.update({"\u03b5": 0.1, "l": ["x", None, False], "s": {"n": 3}})
        spec = spec_from_proto(job)
        check_order(order, spec=spec, caller=Identity("scientist", "ann"), request_id="r \u00e9", now=1.8e9)
        assert {name: getattr(order, name) for name in said} == said


# --- bytes ------------------------------------------------------------------------------------------------------------

CANONICAL: Final = """
import { readFileSync } from "node:fs";
import { parseCanonical } from "./verify.mjs";
const accepted = (text) => { try { return Boolean(parseCanonical(text)); } catch { return false; } };
const { canonical, refused } = JSON.parse(readFileSync(0, "utf8"));
const wrong = [
  ...canonical.filter(({ text }) => !accepted(text)).map(({ text }) => text),
  ...refused.filter(({ text }) => accepted(text)).map(({ why }) => why),
];
console.log(JSON.stringify(wrong));
"""


def test_it_takes_and_refuses_the_canonical_json_that_the_vectors_do(node: Node) -> None:
    vector = json.loads((ROOT / "tests" / "vectors" / "forms.json").read_text(encoding="utf-8"))
    more = ['{"a":"\\\\ud83d"}', '{"__proto__":{"a":1},"toString":0}', '{"a":-9007199254740993}']
    vector["canonical"] += [{"text": text} for text in more]
    assert node.evaluate(CANONICAL, json.dumps(vector)) == []


def test_its_dependencies_are_pinned_exactly() -> None:
    """Without a lock file, which would name the registry it came from."""
    folder = ROOT / "examples" / "clients" / "node"
    versions = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert [name for name, version in versions.items() if not re.fullmatch(r"\d+\.\d+\.\d+", version)] == []
    assert not (folder / "package-lock.json").exists()
