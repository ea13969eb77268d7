"""Makes the golden vectors beside it: `python -m tests.vectors.generate` from the repository root.

Every value follows from the constants below, so that a second run writes the same bytes (`test_vectors.py` holds it).
The moduli of 512 bits protect nothing; the primes are published here, so those of 2048 bits do not either.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from src.encryption.batch import BatchHeader
from src.encryption.dealer import deal
from src.encryption.keys import KeyShare, PublicKey
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.scheme import Layout
from src.protocol.batches import expected_header
from src.protocol.canonical import real
from src.protocol.derive import derive
from src.protocol.merkle import batch_root
from src.protocol.plan import (
    LIST_KIND,
    OPENING_KIND,
    PLAN_KIND,
    ROOT_KIND,
    SHARES_KIND,
    TRANSCRIPT_KIND,
    LocalPlan,
    OpeningStatement,
    RootStatement,
    RoundPlan,
    aggregate_header,
    knowledge_binding,
    share_binding,
    signed_digest,
)
from src.protocol.roster import AGGREGATOR, OPERATOR, Member, Roster, sign_roster
from src.protocol.signing import Signed, SigningKey

from .generate_forms import forms_vector, ledger_entries, ledger_vector, ledger_vector_2, ledger_vector_3
from .generate_plans import order_vector, plan_vectors

HERE: Final = Path(__file__).parent
Json = dict[str, Any]

PRIMES: Final = {
    512: (
        0xE3B9FF6586D70C163EC926DDEAD91F6B011B351FBF8CDA056459F50D3E9BA993,
        0xFAAA49171DF29F6E64818C4F9C0526B6962FD595EF4A54FC599214270537BE5B,
    ),
    2048: (
        int(
            "ef10d3e8a79ec75c709a65fbf6765e8b1353f8b6d14aa955124aa95db3bd838de30f15eaca7b94b34d4c0fe9fb30a8f0"
            "6012ac90adaf031d5892eab4a0d54f09cbd8d63d73e2c9a41b43744b24ea51348174a965ffd38d1bd6a9320f50dc6fb2"
            "0b3971e2b11e86d1df7ba83bcdaf51dcf3afebbd29af5233bf9e4371a253230b",
            16,
        ),
        int(
            "c40b327d8c385457ef31ee5bb4c90df90a2731239e96d25823e21eedeb68a79cb4e6e2d6ba333d96d2d0d7ab974b62a9"
            "222c826359e6ae5d1308a485639dc1c3fb914da4b17a75385a9425b4aade491ba9e4b6268c3b7ba22be1cd2d1d6248e4"
            "db9982de3a58b65c4c122264b03dcfeb743dc1ebdff19e0c99bfb674949e93fb",
            16,
        ),
    ),
}


class SeededEntropy:
    """NOT random: the stream SHA-256(seed ‖ 0) ‖ SHA-256(seed ‖ 1) ‖ …, counters of 8 bytes, big-endian."""

    def __init__(self, seed: str) -> None:
        self._seed = f"sotto vectors: {seed}".encode()
        self._counter = 0
        self._left = b""

    def token(self, size: int) -> bytes:
        """The next `size` bytes; how a request is divided does not matter."""
        while len(self._left) < size:
            self._left += hashlib.sha256(self._seed + self._counter.to_bytes(8, "big")).digest()
            self._counter += 1
        token, self._left = self._left[:size], self._left[size:]
        return token

    def below(self, limit: int) -> int:
        """An integer in [0, limit), with a bias that does not matter here."""
        return int.from_bytes(self.token(limit.bit_length() // 8 + 16), "big") % limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A round to play: who is in, who contributes, who draws the noise."""

    modulus_bits: int
    threshold: int
    parties: tuple[str, ...]
    quorum: int
    contributors: tuple[str, ...]
    noise_by: str
    noise_multiplier: float
    clipping_norm: float
    resolution_bits: int
    dimension: int
    job_id: str

    @property
    def name(self) -> str:
        return f"round_{self.modulus_bits}_{self.threshold}of{len(self.parties)}"


CASES: Final = (
    Case(
        modulus_bits=512,
        threshold=2,
        parties=("a", "b", "c"),
        quorum=2,
        contributors=("a", "b", "c"),
        noise_by="parties",
        noise_multiplier=0.5,
        clipping_norm=1.0,
        resolution_bits=10,
        dimension=60,
        job_id="job-1",
    ),
    Case(
        modulus_bits=512,
        threshold=3,
        parties=("a", "b", "c", "d", "ö"),
        quorum=3,
        contributors=("a", "aggregator", "c", "ö"),
        noise_by="both",
        noise_multiplier=0.7,
        clipping_norm=0.3,
        resolution_bits=12,
        dimension=41,
        job_id="Job_2",
    ),
    Case(
        modulus_bits=2048,
        threshold=2,
        parties=("a", "b", "c"),
        quorum=2,
        contributors=("a", "aggregator", "b"),
        noise_by="aggregator",
        noise_multiplier=0.1,
        clipping_norm=2.5,
        resolution_bits=16,
        dimension=100,
        job_id="job-3",
    ),
)


class Played:
    """One round from its keys to its transcript."""

    def __init__(self, case: Case) -> None:
        self.case = case
        p, q = PRIMES[case.modulus_bits]
        self.key, self.key_shares = deal(
            p, q, threshold=case.threshold, holders=len(case.parties), entropy=SeededEntropy(f"{case.name} deal")
        )
        self.scheme = PaillierScheme(self.key.public, self.key)
        names = (OPERATOR, AGGREGATOR, *case.parties)
        self.seeds = {name: SeededEntropy(f"{case.name} signing key of {name}").token(32) for name in names}
        self.signing = {name: SigningKey.from_bytes(seed) for name, seed in self.seeds.items()}

    def sign(self, kind: str, statement: Json, *, signer: str = AGGREGATOR) -> Signed:
        return self.signing[signer].sign(kind, statement, signer=signer)

    def vector(self) -> Json:
        """Everything, in the order in which it comes about."""
        case, (p, q) = self.case, PRIMES[self.case.modulus_bits]
        roster = self._roster()
        plan = self._plan(roster)
        self.plan, self.layout = plan, Layout.from_json(plan.layout)
        signed_plan = self.sign(PLAN_KIND, plan.to_statement())
        self.plan_digest = signed_digest(signed_plan, PLAN_KIND)
        batches = [self._batch(name) for name in case.contributors]
        roots = sorted((batch["signed_root"] for batch in batches), key=lambda root: str(root["signer"]))
        listed = self.sign(LIST_KIND, {"plan": self.plan_digest, "roots": roots})
        aggregate, body = self._aggregate(batches)
        opening = self.sign(
            OPENING_KIND,
            OpeningStatement(
                self.plan_digest, signed_digest(listed, LIST_KIND), case.contributors, aggregate["root"]
            ).to_statement(),
        )
        shares = [self._share(share, body, aggregate["root"]) for share in self.key_shares]
        opened = self._open(body, shares)
        return {
            "format": "sotto-round-vector/1",
            "name": case.name,
            "primes": {"p": f"{p:x}", "q": f"{q:x}"},
            "threshold_key": self.key.to_json(),
            "threshold_key_digest": self.key.digest,
            "key_id": self.key.key_id,
            "key_shares": [share.to_json() for share in self.key_shares],
            "signing_keys": {
                name: {"seed": seed.hex(), "verify_key": self.signing[name].verify_key.hex()}
                for name, seed in self.seeds.items()
            },
            "roster": sign_roster(roster, self.signing[OPERATOR]).to_json(),
            "roster_digest": roster.digest,
            "plan": signed_plan.to_json(),
            "plan_digest": self.plan_digest,
            "batches": batches,
            "list": listed.to_json(),
            "list_digest": signed_digest(listed, LIST_KIND),
            "aggregate": aggregate,
            "opening": opening.to_json(),
            "shares": shares,
            **opened,
            "transcript": self._transcript(listed, aggregate["root"]).to_json(),
        }

    def _roster(self) -> Roster:
        case = self.case
        return Roster(
            federation="vectors",
            key_id=self.key.key_id,
            custody="threshold",
            threshold=case.threshold,
            colluders=0,
            aggregator_verify_key=self.signing[AGGREGATOR].verify_key,
            members=tuple(Member(name, self.signing[name].verify_key, i) for i, name in enumerate(case.parties, 1)),
            created_at="2026-01-01T00:00:00+00:00",
        )

    def _plan(self, roster: Roster) -> RoundPlan:
        case = self.case
        derived = derive(
            self.scheme,
            dimension=case.dimension,
            clipping_norm=case.clipping_norm,
            resolution_bits=case.resolution_bits,
            noise_by=case.noise_by,
            noise_multiplier=case.noise_multiplier,
            delta=1e-5,
            cohort=len(case.parties),
            quorum=case.quorum,
            colluders=0,
            priced_rounds=6,
        )
        return RoundPlan(
            federation="vectors",
            job_id=case.job_id,
            round=4,
            priced_rounds=6,
            spec_digest=hashlib.sha256(b"specification").hexdigest(),
            task="randhie",
            task_options='{"hidden":8}',
            seed=7,
            model_sha256=hashlib.sha256(b"model").hexdigest(),
            model_bytes=1234,
            dimension=case.dimension,
            local=LocalPlan(
                steps=10,
                sampling_rate=real(0.05),
                learning_rate=real(0.1),
                max_grad_norm=real(1.0),
                noise_multiplier=real(1.1),
                delta=real(1e-5),
            ),
            clipping_norm=real(case.clipping_norm),
            resolution_bits=case.resolution_bits,
            rounded_bound=derived.rounded_bound,
            scheme=self.scheme.name,
            key_id=self.key.key_id,
            layout=derived.layout.to_json(),
            noise=derived.noise,
            roster_digest=roster.digest,
            cohort=case.parties,
            quorum=case.quorum,
            colluders=0,
            threshold=case.threshold,
            custody="threshold",
        )

    def _values(self, name: str) -> list[int]:
        """The extremes of a slot, zero, and what a seed gives."""
        offset, entropy = self.layout.offset, SeededEntropy(f"{self.case.name} values of {name}")
        values = [entropy.below(2 * offset + 1) - offset for _ in range(self.layout.parameter_count)]
        values[:3] = [offset, -offset, 0]
        values[-2:] = [-offset, offset]
        return values

    def _batch(self, name: str) -> Json:
        layout, public = self.layout, self.key.public
        values = self._values(name)
        plaintexts = pack(values, layout)
        entropy = SeededEntropy(f"{self.case.name} exponents of {name}")
        exponents = [int.from_bytes(entropy.token(layout.modulus_bits // 16), "big") for _ in plaintexts]
        width = layout.ciphertext_bytes
        ciphertexts = [encrypt(public, m, r) for m, r in zip(plaintexts, exponents, strict=True)]
        body = b"".join(c.to_bytes(width, "big") for c in ciphertexts)
        header = expected_header(self.plan, self.plan_digest, name).encode()
        root, count, size = batch_root(header, [body], ciphertext_bytes=width)
        binding = knowledge_binding(self.plan_digest, name)
        prover = self.scheme.prover(layout, binding=binding, entropy=SeededEntropy(f"{self.case.name} proof of {name}"))
        prover.add(body, plaintexts, exponents)
        proof = prover.proof().hex()
        head = "" if name == AGGREGATOR else party_ledger_head(name)
        statement = RootStatement(self.plan_digest, name, root, count, size, proof, head)
        return {
            "contributor": name,
            "values": values,
            "plaintexts": [f"{m:x}" for m in plaintexts],
            "exponents": [f"{r:x}" for r in exponents],
            "header": header.hex(),
            "body": body.hex(),
            "body_sha256": hashlib.sha256(body).hexdigest(),
            "root": root,
            "knowledge_binding": binding.decode(),
            "proof": proof,
            "signed_root": self.sign(ROOT_KIND, statement.to_statement(), signer=name).to_json(),
        }

    def _aggregate(self, batches: list[Json]) -> tuple[Json, bytes]:
        bodies = [io.BytesIO(bytes.fromhex(batch["body"])) for batch in batches]
        body = b"".join(self.scheme.fold(self.layout, bodies))
        leaf = aggregate_header(self.plan_digest, self.case.contributors)
        root, _, _ = batch_root(leaf, [body], ciphertext_bytes=self.layout.ciphertext_bytes)
        return {
            "contributors": list(self.case.contributors),
            "first_leaf": leaf.decode(),
            "body": body.hex(),
            "body_sha256": hashlib.sha256(body).hexdigest(),
            "root": root,
        }, body

    def _share(self, share: KeyShare, body: bytes, root: str) -> Json:
        party = self.case.parties[share.index - 1]
        binding = share_binding(self.plan_digest, root, party)
        entropy = SeededEntropy(f"{self.case.name} mask of {party}")
        data = self.scheme.open_share(self.layout, share, [body], binding=binding, entropy=entropy)
        statement = {
            "plan": self.plan_digest,
            "aggregate_root": root,
            "party": party,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
        }
        return {
            "party": party,
            "index": share.index,
            "binding": binding.decode(),
            "data": data.hex(),
            "signed": self.sign(SHARES_KIND, statement, signer=party).to_json(),
        }

    def _open(self, body: bytes, shares: list[Json]) -> Json:
        layout, count = self.layout, len(self.case.contributors)
        chosen = {share["index"]: bytes.fromhex(share["data"]) for share in shares}
        opened = b"".join(self.scheme.combine(layout, body, chosen))
        sums = [int(v) for part in self.scheme.decode(layout, [opened], contributions=count) for v in part]
        width = layout.modulus_bits // 8
        return {
            "opened": [opened[at : at + width].hex() for at in range(0, len(opened), width)],
            "slots": [total + count * layout.offset for total in sums],
            "sums": sums,
        }

    def _transcript(self, listed: Signed, root: str) -> Signed:
        statement = {
            "plan": self.plan_digest,
            "job_id": self.case.job_id,
            "round": 4,
            "list": signed_digest(listed, LIST_KIND),
            "contributors": list(self.case.contributors),
            "aggregate_root": root,
            "opened_by": sorted(self.case.parties[: self.case.threshold]),
            "model_sha256": hashlib.sha256(b"next model").hexdigest(),
            "epsilon_party": real(180.25),
            "epsilon_party_against_aggregator": real(float("inf")),
            "ledger_head": ledger_entries()[-1].digest,
            "party_ledger_heads": {n: party_ledger_head(n) for n in self.case.contributors if n != AGGREGATOR},
        }
        return self.sign(TRANSCRIPT_KIND, statement)


def party_ledger_head(name: str) -> str:
    """Of a ledger of which no vector shows more."""
    return hashlib.sha256(f"ledger of {name}".encode()).hexdigest()


def pack(values: list[int], layout: Layout) -> list[int]:
    """Slot j of a plaintext is value + offset, shifted left by j·slot_bits."""
    per = layout.slots_per_ciphertext
    groups = (values[start : start + per] for start in range(0, len(values), per))
    return [sum(value + layout.offset << layout.slot_bits * j for j, value in enumerate(group)) for group in groups]


def encrypt(public: PublicKey, plaintext: int, exponent: int) -> int:
    """(1 + n·m)·h^r mod n²: the formula itself, so that no vector depends on how an exponent is drawn."""
    n, n_squared = int(public.n), int(public.n) ** 2
    return (1 + n * plaintext) * pow(int(public.h), exponent, n_squared) % n_squared


EXAMPLE_HEADER: Final = BatchHeader(
    scheme="paillier",
    key_id="0123456789abcdef0123456789abcdef",
    modulus_bits=3072,
    slot_bits=20,
    offset=131071,
    parameter_count=1000,
    ciphertext_count=7,
    ciphertext_bytes=768,
    job_id="job-1",
    round_number=4,
    contributor="a",
    plan_digest=bytes(range(32)),
)
"""The worked example of docs/wire-format.md."""


def pretty(value: Any, indent: str = "") -> str:
    """JSON with an indent of one space, in which a list of numbers or texts without line breaks takes one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {pretty(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + pretty(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def build() -> dict[str, str]:
    """Every file's text by its name."""
    vectors = {case.name: Played(case).vector() for case in CASES}
    vectors |= {"ledger": ledger_vector(), "ledger_2": ledger_vector_2()}
    vectors |= {"ledger_3": ledger_vector_3(), "forms": forms_vector()}
    p, q = PRIMES[512]
    key, _ = deal(p, q, threshold=2, holders=3, entropy=SeededEntropy("plans deal"))
    scheme = PaillierScheme(key.public, key)
    vectors |= {**plan_vectors(scheme), "order": order_vector(scheme)}
    return {f"{name}.json": pretty(vector) + "\n" for name, vector in vectors.items()}


def main() -> None:
    """Write them."""
    for name, text in build().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text)} characters")


if __name__ == "__main__":
    main()
