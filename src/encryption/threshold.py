"""Threshold opening (Damgård & Jurik 2001, section 4.1, s = 1; after Shoup 2000) with one proof for a whole batch.

Holder i's partial decryption of c is d = c^(2Δ·s_i) mod n², Δ = holders!. Any `threshold` of them combine to
∏ d_i^(2λ_i) = (1 + n)^(4Δ²·m), λ_i = Δ·∏_{j≠i} j/(j − i).

The proof says that one exponent x = Δ·s_i takes v to v_i and each c_j⁴ to d_j². It is Chaum & Pedersen's, made
non-interactive by Fiat and Shamir, over C = (∏ c_j^{e_j})⁴ and D = (∏ d_j^{e_j})² with 128-bit weights e_j that a hash
of everything fixes (Bellare, Garay & Rabin 1998, small exponents). All of it happens among squares: their order n·p'·q'
has no factor below 2^128, so a wrong d_j² passes with probability 2^-128, whereas with elements of order 2 around it
would pass with probability 1/2 (Boyd & Pavlovski 2000). What the squares do not see, the sign of a d_j, is harmless:
`combine` raises every d_i to an even power.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from ..errors import CiphertextError, ShareError, TooFewSharesError
from .integers import (
    Entropy,
    PackedIntegers,
    digest_parts,
    from_bytes,
    invert,
    join,
    mpz,
    multi_power,
    powmod,
    powmod_sec,
    random_bits,
)
from .keys import KeyShare, ThresholdKey, check_share
from .paillier import check_ciphertexts
from .parallel import fan_out, pieces, worthwhile

WEIGHT_BITS: Final = 128
"""A false batch passes with probability 2^-128."""
CHALLENGE_BITS: Final = 256
HIDING_BITS: Final = 128
"""The mask is this much longer than share × challenge, so that the response is within 2^-128 of one without a share."""

SHARE_MAGIC: Final = b"SOTS"
SHARE_VERSION: Final = 1
_KEY_ID_BYTES: Final = 16
_CHALLENGE_BYTES: Final = CHALLENGE_BITS // 8


@dataclass(frozen=True, slots=True)
class ShareBatch:
    """One holder's partial decryptions of a batch, with their proof.

    Bytes: `SOTS`, version (2), key id (16), index (2), count (8), width of a value (4), the values back to back,
    challenge (32), response (fixed by the key, `response_bytes`); all integers big-endian.

    Attributes:
        key_id: 32 hexadecimal digits.
        index: the holder, 1 … holders.
        values: d_j in [1, n²); of a batch that was read, its bytes, converted as they are used.
        challenge: in [0, 2^256).
        response: mask + challenge · Δ·s_i, over the integers.
    """

    key_id: str
    index: int
    values: Sequence[int]
    challenge: int
    response: int

    def encode(self, key: ThresholdKey) -> bytes:
        """The bytes above."""
        width = key.public.ciphertext_bytes
        return b"".join(
            (
                SHARE_MAGIC,
                SHARE_VERSION.to_bytes(2, "big"),
                bytes.fromhex(self.key_id),
                self.index.to_bytes(2, "big"),
                len(self.values).to_bytes(8, "big"),
                width.to_bytes(4, "big"),
                join(self.values, width),
                self.challenge.to_bytes(_CHALLENGE_BYTES, "big"),
                self.response.to_bytes(response_bytes(key), "big"),
            )
        )

    @classmethod
    def decode(cls, data: bytes, key: ThresholdKey, *, count: int, index: int) -> ShareBatch:
        """Read the share batch that holder `index` sent for `count` ciphertexts.

        Raises:
            ShareError: another format, version, key, holder, count or length; `metadata["index"]` is `index`.
        """
        width = key.public.ciphertext_bytes
        expected = (
            ("magic", 4, SHARE_MAGIC),
            ("version", 2, SHARE_VERSION.to_bytes(2, "big")),
            ("key id", _KEY_ID_BYTES, bytes.fromhex(key.key_id)),
            ("index", 2, index.to_bytes(2, "big")),
            ("count", 8, count.to_bytes(8, "big")),
            ("width", 4, width.to_bytes(4, "big")),
        )
        at = 0
        for name, size, value in expected:
            if data[at : at + size] != value:
                raise wrong_share(index, f"its {name} is not the expected one")
            at += size
        end = at + count * width
        if len(data) != end + _CHALLENGE_BYTES + response_bytes(key):
            raise wrong_share(index, "its length is not the expected one")
        proof_at = end + _CHALLENGE_BYTES
        challenge, response = from_bytes(data[end:proof_at]), from_bytes(data[proof_at:])
        return cls(key.key_id, index, PackedIntegers(data[at:end], width), challenge, response)


def response_bytes(key: ThresholdKey) -> int:
    """Length of a proof's response."""
    return -(-(_mask_bits(key) + 1) // 8)


def _mask_bits(key: ThresholdKey) -> int:
    return 2 * key.public.modulus_bits + key.delta.bit_length() + CHALLENGE_BITS + HIDING_BITS


def wrong_share(index: int, problem: str) -> ShareError:
    """The error that names a holder."""
    return ShareError(f"the share of holder {index} is refused: {problem}", index=index)


def partial_decrypt(share: KeyShare, key: ThresholdKey, ciphertext: int) -> int:
    """c^(2Δ·s_i) mod n², by `powmod_sec`: the exponent is what the share protects."""
    return powmod_sec(ciphertext, 2 * key.delta * share.value, key.public.n_squared)


def partial_decrypt_all(
    share: KeyShare, key: ThresholdKey, ciphertexts: Sequence[int], *, processes: int = 1
) -> PackedIntegers:
    """`partial_decrypt` for every ciphertext, in up to `processes` processes: the part of an opening that takes long.

    Raises:
        CiphertextError: a ciphertext outside Z*_{n²}.
        KeyMaterialError: a share of another key.
    """
    check_share(key, share)
    check_ciphertexts(key.public, ciphertexts)
    exponent, n_squared, width = 2 * key.delta * share.value, key.public.n_squared, key.public.ciphertext_bytes
    processes = worthwhile(processes, len(ciphertexts) * exponent.bit_length())
    parts = pieces(len(ciphertexts), processes)

    def work(piece: int) -> bytes:
        part = ciphertexts[parts[piece].start : parts[piece].stop]
        return join((powmod_sec(ciphertext, exponent, n_squared) for ciphertext in part), width)

    return PackedIntegers(b"".join(fan_out(work, len(parts), processes=processes)), width)


def _weigh(
    key: ThresholdKey, index: int, ciphertexts: Sequence[int], values: Sequence[int], *, binding: bytes, processes: int
) -> tuple[bytes, int, int]:
    """The statement's hash, C and D."""
    public, width = key.public, key.public.ciphertext_bytes
    statement = digest_parts(
        b"sotto/share-proof/statement/1",
        key.digest.encode("ascii"),
        key.key_id.encode("ascii"),
        join([public.n, key.v, key.verification[index - 1]], width),
        index.to_bytes(2, "big"),
        binding,
        join(ciphertexts, width),
        join(values, width),
    )
    size = WEIGHT_BITS // 8
    stream = hashlib.shake_256(b"sotto/share-proof/weights/1" + statement).digest(size * len(ciphertexts))
    weights, n_squared = PackedIntegers(stream, size), public.n_squared
    base, image = (
        multi_power(bases, weights, n_squared, exponent_bits=WEIGHT_BITS, processes=processes)
        for bases in (ciphertexts, values)
    )
    return statement, powmod(base, 4, n_squared), powmod(image, 2, n_squared)


def _challenge(key: ThresholdKey, statement: bytes, points: Sequence[int]) -> int:
    return from_bytes(
        digest_parts(b"sotto/share-proof/challenge/1", statement, join(points, key.public.ciphertext_bytes))
    )


def prove(
    share: KeyShare,
    key: ThresholdKey,
    ciphertexts: Sequence[int],
    values: Sequence[int],
    *,
    binding: bytes,
    entropy: Entropy,
    processes: int = 1,
) -> ShareBatch:
    """The share batch for `values` = `partial_decrypt_all(ciphertexts)`, proven under `binding`."""
    n_squared = key.public.n_squared
    statement, base, image = _weigh(key, share.index, ciphertexts, values, binding=binding, processes=processes)
    mask = random_bits(entropy, _mask_bits(key)) + 1  # powmod_sec wants it positive
    width = key.public.ciphertext_bytes

    def commitment(piece: int) -> bytes:
        return join([powmod_sec((base, key.v)[piece], mask, n_squared)], width)

    processes = worthwhile(processes, 2 * _mask_bits(key))
    commitments = [from_bytes(data) for data in fan_out(commitment, 2, processes=processes)]
    challenge = _challenge(key, statement, [base, image, *commitments])
    response = mask + challenge * key.delta * share.value
    return ShareBatch(key.key_id, share.index, values, challenge, response)


def open_batch(
    share: KeyShare,
    key: ThresholdKey,
    ciphertexts: Sequence[int],
    *,
    binding: bytes,
    entropy: Entropy,
    processes: int = 1,
) -> ShareBatch:
    """Partial decryptions of all ciphertexts and their proof; raises as `partial_decrypt_all` does."""
    values = partial_decrypt_all(share, key, ciphertexts, processes=processes)
    return prove(share, key, ciphertexts, values, binding=binding, entropy=entropy, processes=processes)


def verify_share_batch(
    key: ThresholdKey,
    ciphertexts: Sequence[int],
    batch: ShareBatch,
    *,
    index: int,
    binding: bytes,
    processes: int = 1,
) -> None:
    """Check holder `index`'s share batch for `ciphertexts` (already checked to be in Z*_{n²}).

    Raises:
        ShareError: not that holder's, not in Z*_{n²}, or not proven for these ciphertexts under `binding`;
            `metadata["index"]` is `index`.
    """
    if not 1 <= index <= key.holders or batch.index != index or batch.key_id != key.key_id:
        raise wrong_share(index, "it is another holder's or another key's")
    if len(batch.values) != len(ciphertexts):
        raise wrong_share(index, f"{len(batch.values)} values for {len(ciphertexts)} ciphertexts")
    try:
        check_ciphertexts(key.public, batch.values)
    except CiphertextError as error:
        raise wrong_share(index, f"value {error.metadata['index']} is not an element of Z*_{{n²}}") from error
    n_squared = key.public.n_squared
    statement, base, image = _weigh(key, index, ciphertexts, batch.values, binding=binding, processes=processes)
    image_inverse = invert(image, n_squared)
    v_inverse = invert(key.verification[index - 1], n_squared)
    commitments = [
        powmod(base, batch.response, n_squared) * powmod(image_inverse, batch.challenge, n_squared) % n_squared,
        powmod(key.v, batch.response, n_squared) * powmod(v_inverse, batch.challenge, n_squared) % n_squared,
    ]
    if _challenge(key, statement, [base, image, *commitments]) != batch.challenge:
        raise wrong_share(index, "its proof does not hold")


def lagrange(key: ThresholdKey, indices: Sequence[int]) -> dict[int, int]:
    """λ_i = Δ·∏_{j≠i} j/(j − i), an integer of either sign, for each index."""
    coefficients = {}
    for i in indices:
        others = [j for j in indices if j != i]
        coefficients[i] = key.delta * prod(others) // prod(j - i for j in others)
    return coefficients


def combine(key: ThresholdKey, shares: Mapping[int, Sequence[int]]) -> list[int]:
    """The plaintexts, from verified partial decryptions by holder index; the `threshold` lowest indices are used.

    Raises:
        TooFewSharesError: fewer than the threshold.
        ShareError: shares that do not fit together, which verified ones always do.
    """
    if len(shares) < key.threshold:
        raise TooFewSharesError(
            f"{len(shares)} shares, and an opening needs {key.threshold}", shares=len(shares), threshold=key.threshold
        )
    chosen = sorted(shares)[: key.threshold]
    n, n_squared = key.public.n, key.public.n_squared
    exponents = {i: 2 * coefficient for i, coefficient in lagrange(key, chosen).items()}
    scale = invert(4 * key.delta**2, n)
    plaintexts = []
    for values in zip(*(shares[i] for i in chosen), strict=True):
        over = under = mpz(1)
        for i, value in zip(chosen, values, strict=True):
            power = powmod(value, abs(exponents[i]), n_squared)
            if exponents[i] > 0:
                over = over * power % n_squared
            else:
                under = under * power % n_squared
        try:
            opened = over * invert(under, n_squared) % n_squared
        except ZeroDivisionError as error:
            raise ShareError("a share is not an element of Z*_{n²}") from error
        if opened % n != 1:
            raise ShareError("the shares do not fit together: verify each one")
        plaintexts.append((opened - 1) // n * scale % n)
    return plaintexts
