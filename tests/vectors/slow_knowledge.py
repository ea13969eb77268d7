"""The proof of knowledge of one batch, by plain integers: docs/wire-format.md, "Proof of knowledge".

Part of the slow verifier; shares no code with the package.
"""

from __future__ import annotations

import hashlib
import struct
from math import prod

from .slow_forms import Json, integer, number, require, tuple_hash, unhex


def weights_of(seed: bytes, count: int) -> list[int]:
    """e_0 … e_{count-1}."""
    hashes = (hashlib.sha256(b"sotto/knowledge/weight/1" + seed + struct.pack(">Q", j)) for j in range(count))
    return [number(each.digest()[:16]) for each in hashes]


def check_knowledge(key_id: str, public: Json, batch: Json, *, plan_digest: str) -> None:
    """The proof holds as whoever has no secret checks it, and its masks are as long as they should be."""
    n, h, bits = integer(public["n"]), integer(public["h"]), public["modulus_bits"]
    width, n_squared = bits // 4, n * n
    binding = f"sotto/v1/knowledge\n{plan_digest}\n{batch['contributor']}"
    require(batch["knowledge_binding"] == binding, "the binding of a proof is of plan and contributor")
    proof, body = unhex(batch["proof"]), unhex(batch["body"])
    mask_bits = bits // 2 + 128 + 40 + 128
    require(len(proof) == 32 + bits // 8 + -(-(mask_bits + 1) // 8), "a proof of knowledge has its length")
    seed, z, w = proof[:32], number(proof[32 : 32 + bits // 8]), number(proof[32 + bits // 8 :])
    require(z < n, "the answer z is reduced")
    require(w < 1 << mask_bits + 1, "the answer w is no longer than the masks allow")
    ciphertexts = [number(body[at : at + width]) for at in range(0, len(body), width)]
    weights = weights_of(seed, len(ciphertexts))
    powers = prod(pow(c, e, n_squared) for c, e in zip(ciphertexts, weights, strict=True))
    commitment = (1 + n * z) * pow(h, w, n_squared) * pow(powers, -1, n_squared) % n_squared
    expected = tuple_hash(
        b"sotto/knowledge/challenge/1",
        key_id.encode(),
        n.to_bytes(width, "big") + h.to_bytes(width, "big"),
        binding.encode(),
        hashlib.sha256(body).digest(),
        commitment.to_bytes(width, "big"),
    )
    require(expected == seed, f"{batch['contributor']} knows what is inside")
    plaintexts, exponents = ([integer(text) for text in batch[name]] for name in ("plaintexts", "exponents"))
    u = (z - sum(e * m for e, m in zip(weights, plaintexts, strict=True))) % n
    s = w - sum(e * r for e, r in zip(weights, exponents, strict=True))
    require(1 <= s <= 1 << mask_bits, "the mask of the exponents is as long as it should be")
    require((1 + n * u) * pow(h, s, n_squared) % n_squared == commitment, "the commitment is to the masks")
