"""A second, slow verifier of the golden vectors, written from docs/wire-format.md and docs/protocol.md alone.

It shares no code with the package: plain Python integers, hashlib, json and struct. From the repository root,
`python -m tests.vectors.verify_slow FILES` says what each check found and exits with 1 if one failed.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations
from math import factorial, gcd, prod
from pathlib import Path
from typing import Final

from .slow_forms import (
    Json,
    VectorError,
    canonical,
    cut,
    digest_of,
    fields,
    integer,
    is_prime,
    jacobi,
    merkle_root,
    message_of,
    names_in,
    number,
    opened,
    parse_header,
    rational,
    real,
    require,
    sha256,
    told_head,
    tuple_hash,
    unhex,
    verify_forms,
    verify_key_of,
    verify_ledger,
    verify_ledger_2,
    verify_ledger_3,
)
from .slow_knowledge import check_knowledge
from .slow_plans import PLAN_FIELDS, check_figures, derived, verify_order, verify_plan


class Round:
    """A vector with its numbers read, for the checks below."""

    def __init__(self, vector: Json) -> None:
        self.vector = vector
        self.p, self.q = integer(vector["primes"]["p"]), integer(vector["primes"]["q"])
        self.n = self.p * self.q
        self.n2 = self.n**2
        key = vector["threshold_key"]
        self.bits: int = key["public"]["modulus_bits"]
        self.h = integer(key["public"]["h"])
        self.v, self.verification = integer(key["v"]), [integer(text) for text in key["verification"]]
        self.threshold, self.holders = key["threshold"], key["holders"]
        self.delta = factorial(self.holders)
        self.width = self.bits // 4
        self.plan = json.loads(vector["plan"]["statement"])
        self.layout = self.plan["layout"]

    def ciphertexts(self, body: str) -> list[int]:
        values = [number(item) for item in cut(unhex(body), self.width)]
        require(len(values) == self.layout["ciphertext_count"], "the body has as many ciphertexts as the layout")
        require(all(0 < c < self.n2 and gcd(c, self.n) == 1 for c in values), "every ciphertext is in Z*_{n²}")
        return values

    def words(self, *values: int) -> bytes:
        return b"".join(value.to_bytes(self.width, "big") for value in values)

    def lagrange(self, indices: tuple[int, ...]) -> dict[int, int]:
        result = {}
        for i in indices:
            value = self.delta * prod(Fraction(j, j - i) for j in indices if j != i)
            require(Fraction(value).denominator == 1, "Δ makes the coefficients integers")
            result[i] = int(value)
        return result

    def first_and_last(self) -> Iterator[tuple[int, ...]]:
        every = list(combinations(range(1, self.holders + 1), self.threshold))
        yield from {every[0], every[-1]}


def check_keys(r: Round) -> None:
    """Primes, public values, ids, and the shares of the deal."""
    key, public = r.vector["threshold_key"], r.vector["threshold_key"]["public"]
    fields(key, "kind", "version", "public", "threshold", "holders", "v", "verification")
    fields(public, "kind", "version", "n", "h", "modulus_bits")
    require((key["kind"], key["version"]) == ("threshold-key", 1), "it is a threshold key, version 1")
    require((public["kind"], public["version"]) == ("public-key", 1), "it is a public key, version 1")
    require(integer(public["n"]) == r.n and r.n.bit_length() == r.bits, "n is p·q and has its length")
    require(r.bits % 64 == 0 and r.n % 4 == 1, "n is whole words, and 1 modulo 4")
    require(sha256(canonical(public).encode())[:32] == r.vector["key_id"], "the key id is the front of a digest")
    require(sha256(canonical(key).encode()) == r.vector["threshold_key_digest"], "the digest of the threshold key")
    for prime in (r.p, r.q):
        require(prime.bit_length() == r.bits // 2, "a prime has half the length")
        require(is_prime(prime) and is_prime(prime // 2), "a prime is a safe prime")
    for value in (r.h, r.v, *r.verification):
        require(1 < value < r.n2 - 1 and jacobi(value, r.n) == 1, "h, v and v_i are non-trivial, of Jacobi symbol 1")
    order = (r.p // 2) * (r.q // 2)
    require(pow(r.h, 2 * order, r.n2) == 1, "h is an n-th power, of an element of Jacobi symbol 1")
    require(pow(r.v, r.n * order, r.n2) == 1, "v is a square")
    require(2 <= r.threshold <= r.holders == len(r.verification), "the counts of the deal")
    require(len(r.vector["key_shares"]) == r.holders, "every holder has a share")
    shares = {}
    for index, share in enumerate(r.vector["key_shares"], 1):
        fields(share, "kind", "version", "index", "value", "key_id")
        require((share["kind"], share["version"], share["index"]) == ("key-share", 1, index), "it is this share")
        require(share["key_id"] == r.vector["key_id"], "a share names its deal")
        shares[index] = integer(share["value"])
        require(pow(r.v, r.delta * shares[index], r.n2) == r.verification[index - 1], f"v_{index} = v^(Δ·s)")
    secret = order * pow(order, -1, r.n)
    for group in r.first_and_last():
        total = sum(factor * shares[i] for i, factor in r.lagrange(group).items())
        require((total - r.delta * secret) % (r.n * order) == 0, "a threshold of shares hold d ≡ 0 (m), 1 (n)")


def check_roster(r: Round) -> None:
    """Who is in, and that each key belongs to its seed."""
    for keys in r.vector["signing_keys"].values():
        require(verify_key_of(unhex(keys["seed"])).hex() == keys["verify_key"], "a verification key is its seed's")
    signed = r.vector["roster"]
    roster = opened(r.vector, signed, "roster", signer="operator")
    require(sha256(message_of("roster", canonical(roster))) == r.vector["roster_digest"], "the digest of the roster")
    names = {"federation", "key_id", "custody", "threshold", "colluders", "aggregator_verify_key", "members"}
    fields(roster, *names, "created_at")
    require(roster["key_id"] == r.vector["key_id"] and roster["threshold"] == r.threshold, "the roster names the key")
    require(roster["custody"] == "threshold" and 2 * r.threshold > r.holders + roster["colluders"], "its custody")
    keys = r.vector["signing_keys"]
    require(roster["aggregator_verify_key"] == keys["aggregator"]["verify_key"], "the aggregator's key")
    require([m["share_index"] for m in roster["members"]] == list(range(1, r.holders + 1)), "who holds which share")
    for member in roster["members"]:
        fields(member, "name", "verify_key", "share_index")
        require(member["verify_key"] == keys[member["name"]]["verify_key"], "a party's key")


def check_plan(r: Round) -> None:
    """The plan's fields, and every figure that follows from others."""
    plan = opened(r.vector, r.vector["plan"], "plan", signer="aggregator")
    require(digest_of(r.vector["plan"], "plan") == r.vector["plan_digest"], "the digest of the plan")
    fields(plan, *PLAN_FIELDS)
    check_figures(plan, derived(plan))
    roster = json.loads(r.vector["roster"]["statement"])
    require(plan["roster_digest"] == r.vector["roster_digest"], "the plan names the roster")
    for name in ("federation", "key_id", "custody", "threshold", "colluders"):
        require(plan[name] == roster[name], f"plan and roster agree on {name}")
    require(set(plan["cohort"]) <= {member["name"] for member in roster["members"]}, "the cohort is in the roster")
    require(r.layout["modulus_bits"] == r.bits, "the layout is for this modulus")


def check_batches(r: Round) -> None:
    """Every contributor's header, plaintexts, ciphertexts, proof of knowledge, root, and signature on it."""
    layout, names = r.layout, [batch["contributor"] for batch in r.vector["batches"]]
    parties = set(names) - {"aggregator"}
    require(names == sorted(set(names)) and parties <= set(r.plan["cohort"]), "contributors are invited, each once")
    require(len(parties) >= r.plan["quorum"], "a quorum contributes")
    draws = rational(r.plan["noise"]["aggregator_sigma2"]) > 0
    require(("aggregator" in names) == draws, "the aggregator contributes exactly if it draws noise")
    for batch in r.vector["batches"]:
        header = parse_header(unhex(batch["header"]))
        expected = {name: layout[name] for name in layout if name not in NOT_IN_HEADER}
        expected |= {"job_id": r.plan["job_id"], "round": r.plan["round"], "contributor": batch["contributor"]}
        expected["plan_digest"] = r.vector["plan_digest"]
        require(header == expected, f"the header of {batch['contributor']} is the plan's")
        check_body(r, batch)
        public = r.vector["threshold_key"]["public"]
        check_knowledge(r.vector["key_id"], public, batch, plan_digest=r.vector["plan_digest"])
        ciphertexts = cut(unhex(batch["body"]), r.width)
        require(merkle_root([unhex(batch["header"]), *ciphertexts]).hex() == batch["root"], "the root of a batch")
        statement = opened(r.vector, batch["signed_root"], "root", signer=batch["contributor"])
        signed = {
            "plan": r.vector["plan_digest"],
            "contributor": batch["contributor"],
            "root": batch["root"],
            "ciphertexts": layout["ciphertext_count"],
            "body_bytes": layout["ciphertext_count"] * r.width,
            "proof": batch["proof"],
            "ledger_head": told_head(batch),
        }
        require(statement == signed, "the signed root is of this batch")


NOT_IN_HEADER: Final = {"version", "contributions", "slots_per_ciphertext"}


def check_body(r: Round, batch: Json) -> None:
    """Values → slots → plaintexts → ciphertexts, by the formulas."""
    w, s, offset = (r.layout[name] for name in ("slot_bits", "slots_per_ciphertext", "offset"))
    values, ciphertexts = batch["values"], r.ciphertexts(batch["body"])
    require(len(values) == r.plan["dimension"], "as many values as parameters")
    require(all(-offset <= value <= offset for value in values), "values lie in [-offset, offset]")
    plaintexts = [0] * len(ciphertexts)
    for i, value in enumerate(values):
        plaintexts[i // s] += value + offset << i % s * w
    require([integer(text) for text in batch["plaintexts"]] == plaintexts, "the plaintexts hold the values")
    exponents = [integer(text) for text in batch["exponents"]]
    require(all(exponent < 1 << r.bits // 2 for exponent in exponents), "exponents have half the length")
    formula = [
        (1 + r.n * m) * pow(r.h, exponent, r.n2) % r.n2 for m, exponent in zip(plaintexts, exponents, strict=True)
    ]
    require(formula == ciphertexts, "c = (1 + n·m)·h^r mod n²")
    require(sha256(unhex(batch["body"])) == batch["body_sha256"], "the digest of the body")


def check_list(r: Round) -> None:
    """The frozen list has every root, in order."""
    statement = opened(r.vector, r.vector["list"], "list", signer="aggregator")
    roots = [batch["signed_root"] for batch in r.vector["batches"]]
    require(statement == {"plan": r.vector["plan_digest"], "roots": roots}, "the list is of these roots")
    require(digest_of(r.vector["list"], "list") == r.vector["list_digest"], "the digest of the list")


def check_aggregate(r: Round) -> None:
    """The product, and the root over it and who is in it."""
    aggregate = r.vector["aggregate"]
    names = [batch["contributor"] for batch in r.vector["batches"]]
    require(aggregate["contributors"] == names, "all contributed")
    columns = zip(*(r.ciphertexts(batch["body"]) for batch in r.vector["batches"]), strict=True)
    require([prod(column) % r.n2 for column in columns] == r.ciphertexts(aggregate["body"]), "the product modulo n²")
    require(sha256(unhex(aggregate["body"])) == aggregate["body_sha256"], "the digest of the aggregate")
    leaf = f"sotto/v1/aggregate\n{r.vector['plan_digest']}\n{','.join(names)}"
    require(aggregate["first_leaf"] == leaf, "the first leaf says what was multiplied")
    leaves = [leaf.encode(), *cut(unhex(aggregate["body"]), r.width)]
    require(merkle_root(leaves).hex() == aggregate["root"], "the root of the aggregate")


def check_opening(r: Round) -> None:
    """What the aggregator asks to be opened."""
    statement = opened(r.vector, r.vector["opening"], "opening", signer="aggregator")
    expected = {
        "plan": r.vector["plan_digest"],
        "list": r.vector["list_digest"],
        "contributors": r.vector["aggregate"]["contributors"],
        "aggregate_root": r.vector["aggregate"]["root"],
    }
    require(statement == expected, "the opening is of this aggregate")


def read_share(r: Round, data: bytes, *, index: int) -> tuple[list[int], int, int]:
    """Values, challenge and response of a share batch."""
    count, response_bytes = r.layout["ciphertext_count"], -(-(mask_bits(r) + 1) // 8)
    header = b"SOTS" + struct.pack(">H", 1) + unhex(r.vector["key_id"]) + struct.pack(">HQI", index, count, r.width)
    require(data[:36] == header, f"share {index}: the header of a share batch")
    require(len(data) == 36 + count * r.width + 32 + response_bytes, f"share {index}: its length")
    values = [number(item) for item in cut(data[36 : 36 + count * r.width], r.width)]
    rest = data[36 + count * r.width :]
    return values, number(rest[:32]), number(rest[32:])


def mask_bits(r: Round) -> int:
    return 2 * r.bits + r.delta.bit_length() + 384


def check_share(r: Round, share: Json) -> None:
    """One holder's values, by the formula, and the proof, as whoever has no secret verifies it."""
    index, ciphertexts = share["index"], r.ciphertexts(r.vector["aggregate"]["body"])
    values, challenge, response = read_share(r, unhex(share["data"]), index=index)
    require(all(0 < d < r.n2 and gcd(d, r.n) == 1 for d in values), "every d is in Z*_{n²}")
    binding = f"sotto/v1/shares\n{r.vector['plan_digest']}\n{r.vector['aggregate']['root']}\n{share['party']}"
    require(share["binding"] == binding, "the binding is of plan, aggregate and party")
    v_i = r.verification[index - 1]
    statement = tuple_hash(
        b"sotto/share-proof/statement/1",
        r.vector["threshold_key_digest"].encode(),
        r.vector["key_id"].encode(),
        r.words(r.n, r.v, v_i),
        struct.pack(">H", index),
        binding.encode(),
        r.words(*ciphertexts),
        r.words(*values),
    )
    stream = hashlib.shake_256(b"sotto/share-proof/weights/1" + statement).digest(16 * len(values))
    weights = [number(item) for item in cut(stream, 16)]
    base = pow(prod(pow(c, e, r.n2) for c, e in zip(ciphertexts, weights, strict=True)), 4, r.n2)
    image = pow(prod(pow(d, e, r.n2) for d, e in zip(values, weights, strict=True)), 2, r.n2)
    points = (
        base,
        image,
        pow(base, response, r.n2) * pow(image, -challenge, r.n2) % r.n2,
        pow(r.v, response, r.n2) * pow(v_i, -challenge, r.n2) % r.n2,
    )
    expected = tuple_hash(b"sotto/share-proof/challenge/1", statement, r.words(*points))
    require(number(expected) == challenge, f"the proof of share {index} holds")
    secret = integer(r.vector["key_shares"][index - 1]["value"])
    mask = response - challenge * r.delta * secret
    require(1 <= mask <= 1 << mask_bits(r), "the mask is as long as it should be")
    require([pow(c, 2 * r.delta * secret, r.n2) for c in ciphertexts] == values, "d = c^(2Δs)")


def check_shares(r: Round) -> None:
    """Every holder's share batch, and the signature on it."""
    roster = json.loads(r.vector["roster"]["statement"])
    holders = {member["share_index"]: member["name"] for member in roster["members"]}
    require([share["index"] for share in r.vector["shares"]] == list(holders), "every holder's share is there")
    for share in r.vector["shares"]:
        require(share["party"] == holders[share["index"]], "a share is its holder's")
        check_share(r, share)
        statement = opened(r.vector, share["signed"], "shares", signer=share["party"])
        expected = {
            "plan": r.vector["plan_digest"],
            "aggregate_root": r.vector["aggregate"]["root"],
            "party": share["party"],
            "sha256": sha256(unhex(share["data"])),
            "bytes": len(unhex(share["data"])),
        }
        require(statement == expected, "the signed statement is of this share batch")


def decrypt(r: Round, ciphertext: int) -> int:
    """Paillier 1999, without remainder tricks."""
    order = (r.p - 1) * (r.q - 1)
    power: int = pow(ciphertext, order, r.n2)
    inverse: int = pow(order, -1, r.n)
    return (power - 1) // r.n * inverse % r.n


def combine(r: Round, values: dict[int, int]) -> int:
    """Shoup's combination of one ciphertext's partial decryptions."""
    power = 1
    for i, factor in r.lagrange(tuple(values)).items():
        power = power * pow(values[i], 2 * factor, r.n2) % r.n2
    require(power % r.n == 1, "the shares fit together")
    inverse: int = pow(4 * r.delta**2, -1, r.n)
    return (power - 1) // r.n * inverse % r.n


def check_opened(r: Round) -> None:
    """The key and every threshold of shares (the first and the last) open the same, and the sum is the sum."""
    ciphertexts = r.ciphertexts(r.vector["aggregate"]["body"])
    plaintexts = [number(unhex(text)) for text in r.vector["opened"]]
    require(all(len(text) == r.bits // 4 for text in r.vector["opened"]), "an opened plaintext is as long as n")
    require([decrypt(r, c) for c in ciphertexts] == plaintexts, "the key opens the aggregate")
    shares = {s["index"]: read_share(r, unhex(s["data"]), index=s["index"])[0] for s in r.vector["shares"]}
    for group in r.first_and_last():
        together = [combine(r, {i: shares[i][j] for i in group}) for j in range(len(ciphertexts))]
        require(together == plaintexts, f"shares {group} open the aggregate")
    w, s, offset = (r.layout[name] for name in ("slot_bits", "slots_per_ciphertext", "offset"))
    slots = [m >> j * w & (1 << w) - 1 for m in plaintexts for j in range(s)]
    require(all(m < 1 << s * w for m in plaintexts), "no bit lies above the last slot")
    count, used = len(r.vector["batches"]), r.plan["dimension"]
    require(max(slots[:used]) <= 2 * count * offset and not any(slots[used:]), "every slot is one that a sum can have")
    require(slots[:used] == r.vector["slots"], "the slots")
    sums = [slot - count * offset for slot in slots[:used]]
    columns = zip(*(batch["values"] for batch in r.vector["batches"]), strict=True)
    require(sums == r.vector["sums"] == [sum(column) for column in columns], "the sums are the sums of the values")


def check_transcript(r: Round) -> None:
    """The record of the round names the rest."""
    statement = opened(r.vector, r.vector["transcript"], "transcript", signer="aggregator")
    expected = {
        "plan": r.vector["plan_digest"],
        "job_id": r.plan["job_id"],
        "round": r.plan["round"],
        "list": r.vector["list_digest"],
        "contributors": r.vector["aggregate"]["contributors"],
        "aggregate_root": r.vector["aggregate"]["root"],
        "party_ledger_heads": {b["contributor"]: told_head(b) for b in r.vector["batches"] if told_head(b)},
    }
    for name, value in expected.items():
        require(statement.pop(name) == value, f"the transcript's {name}")
    opened_by = statement.pop("opened_by")
    require(opened_by == sorted(opened_by) and len(opened_by) >= r.threshold, "enough holders opened")
    require(set(opened_by) <= {share["party"] for share in r.vector["shares"]}, "holders opened")
    real(statement.pop("epsilon_party"))
    real(statement.pop("epsilon_party_against_aggregator"))
    fields(statement, "model_sha256", "ledger_head")
    require(all(len(unhex(text)) == 32 for text in statement.values()), "digests have 32 bytes")


ROUND_CHECKS: Final[tuple[Callable[[Round], None], ...]] = (
    check_plan,
    check_roster,
    check_list,
    check_opening,
    check_transcript,
    check_batches,
    check_aggregate,
    check_opened,
    check_shares,
    check_keys,
)
ROUND_FIELDS: Final = names_in(
    "format name primes threshold_key threshold_key_digest key_id key_shares signing_keys roster roster_digest plan "
    "plan_digest batches list list_digest aggregate opening shares opened slots sums transcript"
)


def verify_round(vector: Json) -> Iterator[str]:
    """Every check of a round, cheap ones first; yields what held."""
    fields(vector, *ROUND_FIELDS)
    key = vector["threshold_key"]
    name = f"round_{key['public']['modulus_bits']}_{key['threshold']}of{key['holders']}"
    require(vector["name"] == name, "the name says what it is")
    everybody = {"operator", "aggregator", *json.loads(vector["plan"]["statement"])["cohort"]}
    require(set(vector["signing_keys"]) == everybody, "everybody who signs has a key")
    r = Round(vector)
    for check in ROUND_CHECKS:
        check(r)
        yield f"{check.__name__.removeprefix('check_')}: {(check.__doc__ or '').splitlines()[0]}"


KINDS: Final = {
    "sotto-round-vector/1": verify_round,
    "sotto-plan-vector/1": verify_plan,
    "sotto-order-vector/1": verify_order,
    "sotto-ledger-vector/1": verify_ledger,
    "sotto-ledger-vector/2": verify_ledger_2,
    "sotto-ledger-vector/3": verify_ledger_3,
    "sotto-forms-vector/1": verify_forms,
}


def verify(vector: Json) -> Iterator[str]:
    """Yields what held, one line a check; raises VectorError at the first that does not."""
    try:
        require(vector["format"] in KINDS, "the format is known")
        yield from KINDS[vector["format"]](vector)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, ArithmeticError) as error:
        raise VectorError(f"malformed: {type(error).__name__}") from error


def main(names: list[str]) -> int:
    """Verify files; 1 if one fails."""
    failed = 0
    for name in names:
        try:
            for held in verify(json.loads(Path(name).read_text(encoding="utf-8"))):
                print(f"ok    {Path(name).name}: {held}")
        except VectorError as error:
            failed = 1
            print(f"WRONG {Path(name).name}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
