"""The forms of docs/wire-format.md that stand apart from any round: plain Python integers, hashlib, json, struct.

Part of the slow verifier (`verify_slow.py`), which shares no code with the package.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Final

Json = dict[str, Any]


class VectorError(Exception):
    """What does not hold."""


def require(holds: bool, claim: str) -> None:
    """Raise VectorError unless `claim` holds."""
    if not holds:
        raise VectorError(f"does not hold: {claim}")


def names_in(text: str) -> list[str]:
    """Words between white space."""
    return text.split()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unhex(text: str) -> bytes:
    require(re.fullmatch(r"(?:[0-9a-f]{2})*", text) is not None, "bytes are lower-case hexadecimal")
    return bytes.fromhex(text)


def integer(text: str) -> int:
    require(re.fullmatch(r"0|[1-9a-f][0-9a-f]*", text) is not None, "an integer is lower-case hexadecimal")
    return int(text, 16)


def cut(data: bytes, width: int) -> list[bytes]:
    require(len(data) % width == 0, f"the bytes are whole items of {width}")
    return [data[at : at + width] for at in range(0, len(data), width)]


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def tuple_hash(*parts: bytes) -> bytes:
    """H of docs/wire-format.md."""
    return hashlib.sha256(b"".join(struct.pack(">Q", len(part)) + part for part in parts)).digest()


# --- canonical JSON ---------------------------------------------------------------------------------------------------

SHORT: Final = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def quoted(text: str, *, ascii_only: bool = False) -> str:
    out = []
    for character in text:
        code = ord(character)
        require(not 0xD800 <= code < 0xE000, "no lone surrogates")
        if character in SHORT:
            out.append(SHORT[character])
        elif code < 0x20 or (ascii_only and code > 0x7E and code < 0x10000):
            # DEL is ASCII and stays as it is in either form.
            out.append(character if code == 0x7F else f"\\u{code:04x}")
        elif ascii_only and code >= 0x10000:
            rest = code - 0x10000
            out.append(f"\\u{0xD800 + (rest >> 10):04x}\\u{0xDC00 + (rest & 0x3FF):04x}")
        else:
            out.append(character)
    return '"' + "".join(out) + '"'


def canonical(value: Any, *, ascii_only: bool = False) -> str:
    """The canonical form; with `ascii_only` that of a ledger line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return quoted(value, ascii_only=ascii_only)
    if isinstance(value, list):
        return "[" + ",".join(canonical(item, ascii_only=ascii_only) for item in value) + "]"
    require(isinstance(value, dict), "no other type has a canonical form")
    members = [(quoted(name, ascii_only=ascii_only), item) for name, item in sorted(value.items())]
    return "{" + ",".join(f"{name}:{canonical(item, ascii_only=ascii_only)}" for name, item in members) + "}"


def once(pairs: list[tuple[str, Any]]) -> Json:
    require(len({name for name, _ in pairs}) == len(pairs), "no name twice in an object")
    return dict(pairs)


def parse(text: str, *, ascii_only: bool = False) -> Json:
    """The object of which `text` is the canonical form."""
    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise VectorError("does not hold: the text is JSON") from error
    require(isinstance(value, dict), "the text is a JSON object")
    require(canonical(value, ascii_only=ascii_only) == text, "the text is in canonical form")
    return dict(value)


def fields(value: Json, *names: str) -> None:
    require(set(value) == set(names), f"the fields are {sorted(names)}, not {sorted(value)}")


def real(text: str) -> float:
    value = float(text)
    require(repr(value) == text, "a real has its shortest form")
    return value


def rational(text: str) -> Fraction:
    value = Fraction(text)
    require(f"{value.numerator}/{value.denominator}" == text, "a rational is in lowest terms")
    return value


# --- Ed25519 (RFC 8032, section 5.1) ----------------------------------------------------------------------------------

FIELD: Final = 2**255 - 19
ORDER: Final = 2**252 + 27742317777372353535851937790883648493
CURVE_D: Final = -121665 * pow(121666, -1, FIELD) % FIELD
Point = tuple[int, int, int, int]


def point_add(a: Point, b: Point) -> Point:
    e = (a[1] - a[0]) * (b[1] - b[0]) % FIELD
    f = (a[1] + a[0]) * (b[1] + b[0]) % FIELD
    g, h = 2 * a[3] * b[3] * CURVE_D % FIELD, 2 * a[2] * b[2] % FIELD
    p, q, r, s = f - e, h - g, h + g, f + e
    return p * q % FIELD, r * s % FIELD, q * r % FIELD, p * s % FIELD


def point_times(scalar: int, point: Point) -> Point:
    result: Point = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            result = point_add(result, point)
        point, scalar = point_add(point, point), scalar >> 1
    return result


def point_decode(data: bytes) -> Point:
    value = int.from_bytes(data, "little")
    sign, y = value >> 255, value & (1 << 255) - 1
    require(len(data) == 32 and y < FIELD, "a point has 32 bytes and a y below 2^255 - 19")
    square = (y * y - 1) * pow(CURVE_D * y * y + 1, -1, FIELD) % FIELD
    x = pow(square, (FIELD + 3) // 8, FIELD)
    if (x * x - square) % FIELD:
        x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    require((x * x - square) % FIELD == 0 and not (x == 0 and sign), "a point is on the curve")
    x = FIELD - x if x & 1 != sign else x
    return x, y, 1, x * y % FIELD


def point_encode(point: Point) -> bytes:
    inverse = pow(point[2], -1, FIELD)
    x, y = point[0] * inverse % FIELD, point[1] * inverse % FIELD
    return (y | (x & 1) << 255).to_bytes(32, "little")


BASE: Final = point_decode((4 * pow(5, -1, FIELD) % FIELD).to_bytes(32, "little"))


def verify_key_of(seed: bytes) -> bytes:
    low = int.from_bytes(hashlib.sha512(seed).digest()[:32], "little")
    return point_encode(point_times(low & (1 << 254) - 8 | 1 << 254, BASE))


def check_signature(key: bytes, message: bytes, signature: bytes) -> None:
    require(len(signature) == 64, "a signature has 64 bytes")
    scalar = int.from_bytes(signature[32:], "little")
    require(scalar < ORDER, "the scalar of a signature is reduced")
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % ORDER
    point_decode(signature[:32])
    right = point_add(point_decode(signature[:32]), point_times(challenge, point_decode(key)))
    require(point_encode(point_times(scalar, BASE)) == point_encode(right), "the signature verifies")


def message_of(kind: str, statement: str) -> bytes:
    return f"sotto/v1/{kind}\n{statement}".encode()


def opened(vector: Json, signed: Json, kind: str, *, signer: str) -> Json:
    """The statement in a signed one, without its kind."""
    fields(signed, "statement", "signer", "signature")
    require(signed["signer"] == signer, f"{kind}: the signer is {signer}")
    require(signer in vector["signing_keys"], f"{kind}: the signer is known")
    key = unhex(vector["signing_keys"][signer]["verify_key"])
    check_signature(key, message_of(kind, signed["statement"]), unhex(signed["signature"]))
    statement = parse(signed["statement"])
    require(statement.pop("kind", None) == kind, f"{kind}: the statement is of this kind")
    return statement


def digest_of(signed: Json, kind: str) -> str:
    return sha256(message_of(kind, signed["statement"]))


# --- batches ----------------------------------------------------------------------------------------------------------

HEADER: Final = (
    ("scheme", 0),
    ("key_id", 0),
    ("modulus_bits", 4),
    ("slot_bits", 2),
    ("offset", 8),
    ("parameter_count", 8),
    ("ciphertext_count", 8),
    ("ciphertext_bytes", 4),
    ("job_id", 0),
    ("round", 4),
    ("contributor", 0),
)
"""Size in bytes; 0 for a text."""


def parse_header(data: bytes) -> Json:
    """The fields of a batch header."""
    require(data[:6] == b"SOTB\x00\x01", "a batch begins with SOTB and version 1")
    at = 6
    header: Json = {}
    for name, size in HEADER:
        if size == 0:
            require(at < len(data), f"{name} is there")
            size, at = data[at], at + 1
            part = data[at : at + size]
            header[name] = part.decode("ascii" if name in ("scheme", "key_id") else "utf-8")
        else:
            part = data[at : at + size]
            header[name] = number(part)
        require(len(part) == size, f"{name} is complete")
        at += size
    header["plan_digest"] = data[at:].hex()
    require(len(data) - at == 32, "a digest of 32 bytes ends the header")
    return header


def told_head(batch: Json) -> str:
    """Of the contributor's own ledger, as its root says it; the aggregator says its own in the transcript alone."""
    head: str = json.loads(batch["signed_root"]["statement"])["ledger_head"]
    require(len(unhex(head)) == 32 * (batch["contributor"] != "aggregator"), "a party says where its ledger was")
    return head


def merkle_root(leaves: list[bytes]) -> bytes:
    """As RFC 9162 defines it, from the top."""
    if len(leaves) <= 1:
        return hashlib.sha256(b"".join(b"\x00" + leaf for leaf in leaves)).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:half]) + merkle_root(leaves[half:])).digest()


# --- ledger and forms -------------------------------------------------------------------------------------------------


def is_prime(candidate: int) -> bool:
    """Miller–Rabin to the first twelve primes: enough against accidents."""
    odd, twos = candidate - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        power = pow(base, odd, candidate)
        if power != 1 and all(pow(power, 1 << i, candidate) != candidate - 1 for i in range(twos)):
            return False
    return True


def jacobi(a: int, n: int) -> int:
    result, a = 1, a % n
    while a:
        while a % 2 == 0:
            a, result = a // 2, -result if n % 8 in (3, 5) else result
        a, n = n, a
        result = -result if a % 4 == n % 4 == 3 else result
        a %= n
    return result if n == 1 else 0


LEDGER_FIELDS: Final = names_in(
    "version sequence at kind job_id round unit subject reservation_id charged_rounds event reason previous digest"
)
EVENT_FIELDS: Final = {
    "dp_sgd_steps": {"sampling_rate", "noise_multiplier", "steps"},
    "noisy_sum": {"noise_multiplier", "tau", "failure_probability", "rounds", "dimension"},
    "sampled_noisy_sum": {
        *names_in("sampling_rate noise_multiplier tau failure_probability rounds dimension"),
    },
    "non_private": {"unit", "reason"},
}
SUMS: Final = {"noisy_sum", "sampled_noisy_sum"}
OF_A_SHARE: Final = {"share_multiplier", "shares_tau"}
SHARES: Final = {"noise_by", "quorum", "colluders", *OF_A_SHARE}
REALS: Final = {"sampling_rate", "noise_multiplier", "tau", "failure_probability", *OF_A_SHARE}


LEDGER_FIELDS_2: Final = [*LEDGER_FIELDS, "relation", "user", "figures", "correction", "signature"]
NAMES_A_SCIENTIST: Final = {"opening_balance", "reservation", "refusal"}
RELATIONS: Final = {"example": "ADD_OR_REMOVE_ONE", "party": "REPLACE_SPECIAL"}


def verify_ledger(vector: Json) -> Iterator[str]:
    """Form, numbers, chain and head."""
    fields(vector, "format", "lines", "head")
    head = ledger_head(vector["lines"], key=None)
    require(head == vector["head"], "the head is the digest of the last line")
    yield f"ledger: {len(vector['lines'])} lines chain to their head"


def verify_ledger_2(vector: Json) -> Iterator[str]:
    """The same where lines of version 2 follow those of version 1, with their signatures."""
    fields(vector, "format", "lines", "head", "verify_key")
    head = ledger_head(vector["lines"], key=vector["verify_key"])
    require(head == vector["head"], "the head is the digest of the last line")
    yield f"ledger: {len(vector['lines'])} lines chain to their head; those of version 2 are signed"


def verify_ledger_3(vector: Json) -> Iterator[str]:
    """The same where lines of version 3, which may name a scientist, follow those of version 2."""
    fields(vector, "format", "lines", "head", "verify_key")
    head = ledger_head(vector["lines"], key=vector["verify_key"], newest=3)
    require(head == vector["head"], "the head is the digest of the last line")
    yield f"ledger: {len(vector['lines'])} lines chain to their head; those of versions 2 and 3 are signed"


def ledger_head(lines: list[str], *, key: str | None, newest: int = 2) -> str:
    head, versions = "0" * 64, {1} if key is None else set(range(1, newest + 1))
    for place, line in enumerate(lines, 1):
        entry = parse(line, ascii_only=True)
        version = entry["version"]
        require(version in versions, f"line {place} is of a version that may stand here")
        versions = {each for each in versions if each >= version}
        fields(entry, *(LEDGER_FIELDS if version == 1 else LEDGER_FIELDS_2), *ledger_names(entry))
        require(entry["sequence"] == place, f"line {place} is in its place")
        require(entry["previous"] == head, f"line {place} follows from the line before")
        head = entry.pop("digest")
        signature = entry.pop("signature", "")
        body = canonical(entry, ascii_only=True).encode("ascii")
        require(sha256(b"sotto.v1.ledger-entry\x00" + body) == head, f"line {place} has its digest")
        if version > 1:
            require(entry["relation"] == RELATIONS[entry["unit"]], f"line {place} has the relation of its unit")
            require(signature[:64] == key and len(signature) == 192, f"line {place} is signed by the ledger's key")
            require(signature == signature.lower(), "hex digits are lower-case")
            signed = message_of("ledger-entry", canonical({"digest": head, "kind": "ledger-entry"}))
            check_signature(bytes.fromhex(signature[:64]), signed, bytes.fromhex(signature[64:]))
        ledger_event(entry["event"])
    return head


def ledger_names(entry: Json) -> list[str]:
    """The fields that a line has only where they name somebody: from version 2 on, and from version 3 on."""
    found = []
    if entry["version"] > 1 and "parties" in entry:
        parties = entry["parties"]
        require(bool(parties) and parties == sorted(set(parties)) and all(parties), "parties are sorted names, if any")
        found.append("parties")
    if entry["version"] > 2 and "scientist" in entry:
        require(entry["scientist"] != "" and entry["kind"] in NAMES_A_SCIENTIST, "who ordered what is charged, if any")
        found.append("scientist")
    return found


def ledger_event(value: Json | None) -> None:
    if value is not None:
        event = dict(value)
        kind, version = event.pop("type"), event.pop("version")
        require(version == 1 or (version == 2 and kind in SUMS), "an event's version")
        names = EVENT_FIELDS[kind] | (SHARES if version == 2 else set())
        fields(event, *(names - OF_A_SHARE if event.get("noise_by") == "aggregator" else names))
        for name in REALS & set(event):
            real(event[name])


def verify_forms(vector: Json) -> Iterator[str]:
    """Canonical JSON, reals, Merkle trees."""
    fields(vector, "format", "canonical", "refused", "reals", "trees")
    for case in vector["canonical"]:
        require(canonical(case["value"]) == case["text"] and parse(case["text"]) == case["value"], "a canonical form")
        require(sha256(message_of("vector", case["text"])) == case["digest"], "the digest of a statement")
    yield f"canonical: {len(vector['canonical'])} statements have their form and digest"
    for case in vector["refused"]:
        try:
            parse(case["text"])
        except VectorError:
            continue
        raise VectorError(f"does not hold: {case['why']} is refused")
    yield f"refused: {len(vector['refused'])} texts are not canonical"
    for case in vector["reals"]:
        require(struct.pack(">d", real(case["text"])).hex() == case["double"], "a real is this double")
    yield f"reals: {len(vector['reals'])} texts are their doubles"
    for case in vector["trees"]:
        require(merkle_root([unhex(leaf) for leaf in case["leaves"]]).hex() == case["root"], "a Merkle root")
    yield f"trees: {len(vector['trees'])} Merkle roots"
