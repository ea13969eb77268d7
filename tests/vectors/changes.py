"""Changes to a vector: any leaf of it, or one that leaves every digest and signature as it should be."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from src.protocol.plan import signed_digest
from src.protocol.signing import Signed, SigningKey

from .slow_forms import ORDER

Json = dict[str, Any]
HERE = Path(__file__).parent


def load(name: str) -> Json:
    vector: Json = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return vector


Path_ = tuple[str | int, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every number, text, truth value and null with where it is."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def spelled(path: Path_) -> str:
    """batches[].values[]: where, whatever the position in a list."""
    return "".join("[]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def flipped(value: Any) -> Any:
    """Another value of the same type; one digit or character is another."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, dict | list):
        return {"x": 1} if isinstance(value, dict) else [1]
    if not value:
        return "0"
    if re.fullmatch("[0-9a-f]+", value):
        return value[:-1] + f"{int(value[-1], 16) ^ 1:x}"
    middle = len(value) // 2
    return value[:middle] + ("x" if value[middle] != "x" else "y") + value[middle + 1 :]


SAID_ONLY = {"refused[].why", "refused[].text"}
"""A reason in words, and texts that stay wrong when another character of them changes: see the next test."""


def places(name: str) -> dict[str, Path_]:
    """One leaf for every spelling of a path: the last."""
    return {spelled(path): path for path, _ in leaves(load(name)) if spelled(path) not in SAID_ONLY}


def sign_again(vector: Json, signed: Json, change: Callable[[Json], None] | str) -> None:
    """The statement changed and signed by the same signer: only what it says is wrong."""
    statement = json.loads(signed["statement"])
    seed = bytes.fromhex(vector["signing_keys"][signed["signer"]]["seed"])
    key, kind = SigningKey.from_bytes(seed), statement.pop("kind")
    if isinstance(change, str):
        signature = Ed25519PrivateKey.from_private_bytes(seed).sign(f"sotto/v1/{kind}\n{change}".encode())
        signed |= {"statement": change, "signature": signature.hex()}
    else:
        change(statement)
        signed |= key.sign(kind, statement, signer=signed["signer"]).to_json()
    if signed is vector["plan"]:
        vector["plan_digest"] = signed_digest(Signed.from_json(signed), kind)


def planned(*path: str, value: object) -> Callable[[Json], None]:
    """A plan with another value somewhere, signed again."""

    def change(statement: Json) -> None:
        at = statement
        for key in path[:-1]:
            at = at[key]
        assert at[path[-1]] != value
        at[path[-1]] = value

    return lambda vector: sign_again(vector, vector["plan"], change)


def stated(name: str, change: Callable[[Json], None] | str) -> Callable[[Json], None]:
    return lambda vector: sign_again(vector, vector[name], change)


def swapped(name: str) -> Callable[[Json], None]:
    def change(vector: Json) -> None:
        items = vector[name]
        items[0], items[1] = items[1], items[0]

    return change


def in_batch(field: str, change: Callable[[Any], Any]) -> Callable[[Json], None]:
    return lambda vector: vector["batches"][0].update({field: change(vector["batches"][0][field])})


def in_share(change: Callable[[bytes, int], bytes]) -> Callable[[Json], None]:
    """The first share batch with other bytes, which its holder signs."""

    def apply(vector: Json) -> None:
        share, n = vector["shares"][0], int(vector["threshold_key"]["public"]["n"], 16)
        data = change(bytes.fromhex(share["data"]), n)
        share["data"] = data.hex()
        sign_again(
            vector, share["signed"], lambda s: s.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        )

    return apply


def in_proof(change: Callable[[bytes, int], bytes]) -> Callable[[Json], None]:
    """The first proof of knowledge with other bytes, under signatures that hold: of its contributor and after."""

    def apply(vector: Json) -> None:
        batch, n = vector["batches"][0], int(vector["threshold_key"]["public"]["n"], 16)
        batch["proof"] = change(bytes.fromhex(batch["proof"]), n).hex()
        sign_again(vector, batch["signed_root"], lambda s: s.update(proof=batch["proof"]))
        sign_again(vector, vector["list"], lambda s: s.update(roots=[b["signed_root"] for b in vector["batches"]]))
        vector["list_digest"] = signed_digest(Signed.from_json(vector["list"]), "list")
        for name in ("opening", "transcript"):
            sign_again(vector, vector[name], lambda s: s.update(list=vector["list_digest"]))

    return apply


def unreduced(proof: bytes, n: int) -> bytes:
    """z + n says the same; where that has no room, another number above n."""
    z = min(int.from_bytes(proof[32:96], "big") + n, (1 << 512) - 1)
    return proof[:32] + z.to_bytes(64, "big") + proof[96:]


def borrowed(vector: Json) -> None:
    """The proof that another contributor made of its own batch."""
    in_proof(lambda proof, n: bytes.fromhex(vector["batches"][1]["proof"]))(vector)


def negated(data: bytes, n: int) -> bytes:
    first = n * n - int.from_bytes(data[36:164], "big")
    return data[:36] + first.to_bytes(128, "big") + data[164:]


def malleable(vector: Json) -> None:
    """S + order verifies wherever the range of S is not checked."""
    signature = bytes.fromhex(vector["plan"]["signature"])
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    vector["plan"]["signature"] = (signature[:32] + scalar.to_bytes(32, "little")).hex()


def negative_ciphertext(vector: Json) -> None:
    n = int(vector["threshold_key"]["public"]["n"], 16)
    body = bytes.fromhex(vector["batches"][0]["body"])
    first = n * n - int.from_bytes(body[:128], "big")
    vector["batches"][0]["body"] = (first.to_bytes(128, "big") + body[128:]).hex()


def exchanged_shares(vector: Json) -> None:
    one, two = vector["shares"][0], vector["shares"][1]
    one["data"], two["data"] = two["data"], one["data"]


def other_head(statement: Json) -> None:
    statement["party_ledger_heads"] |= {"a": "0" * 64}


def unreduced_share(vector: Json) -> None:
    vector["key_shares"][0]["value"] = f"{int(vector['key_shares'][0]['value'], 16) + 1:x}"


WRONG: list[tuple[str, Callable[[Json], None], str]] = [
    ("a plan for slots one bit wider", planned("layout", "slot_bits", value=16), "slot_bits follows"),
    ("a plan with a larger offset", planned("layout", "offset", value=4745), "offset follows"),
    ("a plan with less noise in a share", planned("noise", "share_sigma2", value="1/4"), "share_sigma2 follows"),
    ("a plan whose noise gets a higher bound", planned("noise", "bound", value=3721), "bound follows"),
    ("a plan with a larger clipping norm", planned("clipping_norm", value="1.5"), "offset follows|bound follows"),
    ("a plan for more rounds", planned("priced_rounds", value=600), "bound follows"),
    ("a plan with a real written otherwise", planned("noise", "delta", value="0.00001"), "shortest form"),
    ("a plan with a variance not in lowest terms", planned("noise", "aggregator_sigma2", value="0/2"), "lowest terms"),
    ("a plan under another roster", planned("roster_digest", value="0" * 64), "names the roster"),
    ("a plan with another threshold", planned("threshold", value=3), "agree on threshold"),
    ("a plan with a stranger in it", planned("cohort", value=["a", "b", "x"]), "everybody|cohort"),
    ("a statement with a space in it", stated("list", '{"kind": "list"}'), "canonical form"),
    ("a statement with a field twice", stated("list", '{"kind":"list","kind":"list"}'), "twice|JSON"),
    ("a statement of another kind", stated("opening", '{"kind":"list"}'), "of this kind|verifies"),
    ("a signature that is not reduced", malleable, "reduced"),
    ("a list that leaves out a root", stated("list", lambda s: s["roots"].pop()), "of these roots"),
    ("a list in another order", stated("list", lambda s: s["roots"].reverse()), "of these roots"),
    ("an opening of fewer contributors", stated("opening", lambda s: s["contributors"].pop()), "of this aggregate"),
    ("a transcript that one holder opened", stated("transcript", lambda s: s["opened_by"].pop()), "enough holders"),
    ("a transcript with another ledger head", stated("transcript", other_head), "party_ledger_heads"),
    ("two batches in each other's place", swapped("batches"), "each once|of these roots"),
    ("two share batches in each other's place", swapped("shares"), "every holder's share"),
    ("the data of two holders exchanged", exchanged_shares, "header of a share batch"),
    ("a header with a byte after it", in_batch("header", lambda text: text + "00"), "ends the header"),
    ("a header cut short", in_batch("header", lambda text: text[:-2]), "ends the header"),
    ("a header of version 2", in_batch("header", lambda text: text[:11] + "2" + text[12:]), "version 1"),
    ("a body with a byte too few", in_batch("body", lambda text: text[:-2]), "whole items"),
    ("a body with a ciphertext too many", in_batch("body", lambda text: text + text[:256]), "as many ciphertexts"),
    ("a ciphertext that is zero", in_batch("body", lambda text: "0" * 256 + text[256:]), "in Z"),
    ("a ciphertext of the other sign", negative_ciphertext, "c = "),
    ("a body in capitals", in_batch("body", str.upper), "lower-case"),
    ("a value beyond the offset", in_batch("values", lambda values: [4745, *values[1:]]), "offset"),
    ("a value too few", in_batch("values", lambda values: values[:-1]), "as many values"),
    ("an exponent too long", in_batch("exponents", lambda texts: ["1" + "0" * 64, texts[1]]), "half the length"),
    ("no proof of knowledge", in_proof(lambda proof, n: b""), "proof of knowledge has its length"),
    ("a proof with a byte after it", in_proof(lambda proof, n: proof + b"\x00"), "proof of knowledge has its length"),
    ("a proof with another seed", in_proof(lambda proof, n: bytes([proof[0] ^ 1]) + proof[1:]), "a knows what is"),
    ("a proof with another z", in_proof(lambda p, n: p[:95] + bytes([p[95] ^ 1]) + p[96:]), "a knows what is"),
    ("a proof with another w", in_proof(lambda proof, n: proof[:-1] + bytes([proof[-1] ^ 1])), "a knows what is"),
    ("a proof whose z is not reduced", in_proof(unreduced), "z is reduced"),
    ("a proof whose w is too long", in_proof(lambda p, n: p[:96] + b"\xff" + p[97:]), "w is no longer"),
    ("somebody else's proof", borrowed, "a knows what is"),
    ("a partial decryption of the other sign", in_share(negated), "proof of share 1 holds"),
    ("a partial decryption that is zero", in_share(lambda d, n: d[:36] + bytes(128) + d[164:]), "in Z|fit together"),
    ("a share batch of version 2", in_share(lambda d, n: d[:5] + b"\x02" + d[6:]), "header of a share batch"),
    ("a share batch with a byte after it", in_share(lambda d, n: d + b"\x00"), "length"),
    ("another challenge", in_share(lambda d, n: d[:-200] + bytes([d[-200] ^ 1]) + d[-199:]), "proof of share 1 holds"),
    ("a key share one too large", unreduced_share, "mask|v_1|d = c"),
]


NODE_NOTICES: dict[str, Callable[[Json], object]] = {
    "header": in_batch("header", flipped),
    "a ciphertext": in_batch("body", flipped),
    "a proof of knowledge": in_batch("proof", flipped),
    "root": in_batch("root", flipped),
    "a value": in_batch("values", lambda values: [values[0] - 1, *values[1:]]),
    "the aggregate": lambda vector: vector["aggregate"].update(body=flipped(vector["aggregate"]["body"])),
    "its root": lambda vector: vector["aggregate"].update(root=flipped(vector["aggregate"]["root"])),
    "an opened plaintext": lambda vector: vector.update(opened=[*vector["opened"][:-1], flipped(vector["opened"][-1])]),
    "a sum": lambda vector: vector.update(sums=[vector["sums"][0] + 1, *vector["sums"][1:]]),
    "a prime": lambda vector: vector["primes"].update(p=f"{int(vector['primes']['p'], 16) + 2:x}"),
}


def without_strategy(statement: Json) -> None:
    del statement["strategy"], statement["gradient_sum"]


WRONG_SUMS: list[tuple[str, Callable[[Json], None], str]] = [
    ("a larger cap", planned("gradient_sum", "batch_cap", value=299), "batch_cap follows"),
    ("another norm of the sum", planned("clipping_norm", value="0.7"), "clipping_norm follows"),
    ("a smaller sensitivity", planned("rounded_bound", value=11469), "rounded_bound follows"),
    ("a noise that nobody draws", planned("local", "noise_multiplier", value="1.3"), "local.noise_multiplier follows"),
    ("two steps", planned("local", "steps", value=2), "local.steps follows"),
    ("a higher sampling rate", planned("local", "sampling_rate", value="0.2"), "batch_cap follows|offset follows"),
    ("a coarser grid", planned("resolution_bits", value=10), "a hundredth"),
    ("fewer rounds", planned("priced_rounds", value=1), "bound follows|batch_cap follows"),
    ("a trusted aggregator", planned("gradient_sum", "trusted_aggregator", value=True), "called trusted"),
    ("a party that declares nothing", planned("gradient_sum", "declared_rows", value={"a": 300}), "declares its rows"),
    ("another strategy", planned("strategy", value="fedavg"), "the strategy"),
    ("a plan of fedavg", stated("plan", without_strategy), "the fields are"),
]
"""Of a plan of fedsgd, signed again."""
